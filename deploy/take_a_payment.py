"""Take one payment through a running paygate whose provider is the sandbox: the proof that a deployment works."""

import argparse
import http.client
import json
import sys
import time
from typing import Any
from urllib.parse import urlsplit

ORDER = {
    "customer_name": "John Doe",
    "customer_email": "john@example.com",
    "customer_phone": "+234 801 234 5678",
    "amount": 50,
    "location": "Lagos",
}
READY_SECONDS, PAID_SECONDS = 60, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--paygate", default="http://127.0.0.1:8000", help="its address (%(default)s)")
    parser.add_argument("--sandbox", default="http://127.0.0.1:8010", help="its provider's (%(default)s)")
    options = parser.parse_args()

    wait_until_ready(options.paygate)
    payment = ask(options.paygate, "POST", "/api/v1/payments", ORDER, expected=201)["payment"]
    print(f"opened {payment['id']}, reference {payment['reference']}")
    ask(options.sandbox, "POST", "/_sandbox/pay", {"reference": payment["reference"]}, expected=200)
    paid = wait_until_completed(options.paygate, payment["id"])
    print(f"{paid['status']}: {paid['amount']:.2f} {paid['currency']}, paid at {paid['paid_at']}")


def wait_until_ready(paygate: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            ask(paygate, "GET", "/readyz", expected=200)
            return
        except (OSError, http.client.HTTPException, Unexpected) as reason:
            if time.monotonic() > deadline:
                sys.exit(f"{paygate} is not ready after {READY_SECONDS} s: {reason}")
        time.sleep(0.2)


def wait_until_completed(paygate: str, payment_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + PAID_SECONDS
    while True:
        payment: dict[str, Any] = ask(paygate, "GET", f"/api/v1/payments/{payment_id}", expected=200)["payment"]
        if payment["status"] == "completed":
            return payment
        if time.monotonic() > deadline:
            sys.exit(f"{payment_id} is {payment['status']} {PAID_SECONDS} s after it was paid")
        time.sleep(0.2)


class Unexpected(Exception):
    pass


def ask(server: str, method: str, path: str, body: object = None, *, expected: int) -> Any:
    """The JSON of an answer. http.client, unlike urllib, knows of no proxy that might be set in the environment."""
    connection = http.client.HTTPConnection(urlsplit(server).netloc, timeout=15)
    try:
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        if answer.status != expected:
            raise Unexpected(f"{method} {path}: {answer.status} {text.decode(errors='replace')[:300]}")
        return json.loads(text)
    finally:
        connection.close()


if __name__ == "__main__":
    main()
