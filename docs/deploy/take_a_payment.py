"""Take one payment through a running paygate whose provider is the sandbox: the proof that a deployment works."""

import argparse
import http.client
import json
import sys
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

ORDER = {
    "customer_name": "John Doe",
    "customer_email": "john@example.com",
    "customer_phone": "+234 801 234 5678",
    "amount": 50,
    "location": "Lagos",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--paygate", default="http://127.0.0.1:8000", help="its address (%(default)s)")
    parser.add_argument("--sandbox", default="http://127.0.0.1:8010", help="its provider's (%(default)s)")
    options = parser.parse_args()

    wait_until(lambda: ask(options.paygate, "GET", "/readyz") is not None, 60, f"{options.paygate} does not get ready")
    payment = ask(options.paygate, "POST", "/api/v1/payments", ORDER)["payment"]
    print(f"opened {payment['id']}, reference {payment['reference']}")
    ask(options.sandbox, "POST", "/_sandbox/pay", {"reference": payment["reference"]})
    path = f"/api/v1/payments/{payment['id']}"

    def is_paid() -> bool:
        return bool(ask(options.paygate, "GET", path)["payment"]["status"] == "completed")

    wait_until(is_paid, 20, f"{payment['id']} was paid, and does not get completed")
    print(f"{payment['id']} is completed")


def wait_until(done: Callable[[], bool], seconds: float, complaint: str) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if done():
                return
            reason: object = ""
        except (OSError, http.client.HTTPException) as error:
            reason = error
        if time.monotonic() > deadline:
            sys.exit(f"{complaint} within {seconds} s {reason}")
        time.sleep(0.2)


def ask(server: str, method: str, path: str, body: object = None) -> Any:
    """The JSON of an answer. http.client, unlike urllib, knows of no proxy that might be set in the environment."""
    connection = http.client.HTTPConnection(urlsplit(server).netloc, timeout=15)
    try:
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode(errors="replace")
        if answer.status not in (200, 201):
            raise http.client.HTTPException(f"{method} {path}: {answer.status} {text[:300]}")
        return json.loads(text)
    finally:
        connection.close()


if __name__ == "__main__":
    main()
