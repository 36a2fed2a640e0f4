"""Talks to a sandbox as paygate would, and hears its events as paygate would."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import requests

from local.sandbox import Sandbox

Json = dict[str, Any]
KEY = "sk_test_0123456789"
PAID = "/transaction/verify/PG-1"


class Shop:
    """Receives webhooks, as paygate would: answers the codes in `answers`, then 200, after `delay` seconds."""

    def __init__(self) -> None:
        self.events: list[Json] = []
        self.raw: list[tuple[bytes, str]] = []
        self.times: list[float] = []
        self.answers: list[int] = []
        self.delay = 0.0
        shop = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                shop.times.append(time.monotonic())
                shop.raw.append((body, self.headers["x-paystack-signature"]))
                shop.events.append(json.loads(body))
                time.sleep(shop.delay)
                self.send_response(shop.answers.pop(0) if shop.answers else 200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def heard(self, count: int, timeout_seconds: float = 3.0) -> list[str]:
        """The names of the first `count` events, once they are there."""
        end = time.monotonic() + timeout_seconds
        while len(self.events) < count and time.monotonic() < end:
            time.sleep(0.005)
        return [event["event"] for event in self.events]


@pytest.fixture(autouse=True)
def without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(KEY) as running:
        yield running


@pytest.fixture
def shop() -> Iterator[Shop]:
    receiver = Shop()
    yield receiver
    receiver.close()


@pytest.fixture
def told(shop: Shop) -> Iterator[Sandbox]:
    """A sandbox that sends its events to the shop."""
    with Sandbox(KEY, shop.url, retry_seconds=[0.02] * 5) as running:
        yield running


def call(
    sandbox: Sandbox, method: str, path: str, timeout: float = 5, key: str = KEY, **arguments: Any
) -> requests.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return requests.request(
        method, sandbox.url + path, headers=headers, timeout=timeout, allow_redirects=False, **arguments
    )


def initialize(
    sandbox: Sandbox, reference: str = "PG-1", email: str = "john@example.com", timeout: float = 5, **order: Any
) -> requests.Response:
    body = {"email": email, "amount": 500000, "currency": "NGN", "reference": reference, **order}
    return call(sandbox, "POST", "/transaction/initialize", timeout, json=body)


def verified(sandbox: Sandbox, reference: str = "PG-1") -> Json:
    answer = call(sandbox, "GET", f"/transaction/verify/{reference}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["data"])


def paid(sandbox: Sandbox, reference: str = "PG-1", email: str = "john@example.com", **order: Any) -> None:
    assert initialize(sandbox, reference, email, **order).status_code == 200
    sandbox.pay(reference)


def refund(sandbox: Sandbox, reference: str = "PG-1", timeout: float = 5, **members: Any) -> requests.Response:
    return call(sandbox, "POST", "/refund", timeout, json={"transaction": reference, **members})


def fields(order: str) -> Json:
    return {"custom_fields": [{"display_name": "Order", "variable_name": "order", "value": order}]}
