"""The sandbox keeps Paystack's published contract, and each of its faults does what it says, over a real socket."""

import asyncio
import hashlib
import hmac
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import paystackapi  # type: ignore[import-untyped]
import paystackapi.base  # type: ignore[import-untyped]
import pypaystack2.base_clients
import pytest
import requests
from paystackapi.refund import Refund  # type: ignore[import-untyped]
from paystackapi.transaction import Transaction  # type: ignore[import-untyped]
from pypaystack2 import PaystackClient

import sandbox as sandbox_module
from sandbox import Sandbox, SandboxError

Json = dict[str, Any]
KEY = "sk_test_0123456789"
PUBLISHED = json.loads((Path(__file__).parent / "paystack-openapi.json").read_text())


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


# The published description


def as_json_schema(node: Any) -> Any:
    """OpenAPI 3.0 as JSON Schema, and mended where the description contradicts itself."""
    if isinstance(node, list):
        return [as_json_schema(item) for item in node]
    if not isinstance(node, dict):
        return node
    schema = {name: as_json_schema(value) for name, value in node.items()}
    if schema.pop("nullable", None) is True and isinstance(schema.get("type"), str):
        schema["type"] = [schema["type"], "null"]
    return schema


def published_schema(path: str, method: str, status: int) -> Json:
    components = as_json_schema(PUBLISHED["components"])
    # Error.code has Error.type's words; the example of a bad initialize shows what codes look like.
    del components["schemas"]["Error"]["properties"]["code"]["enum"]
    # The same moment as paid_at, which may be null: nobody has paid yet.
    components["schemas"]["TransactionListResponseArray"]["properties"]["paidAt"]["type"] = ["string", "null"]
    answer = as_json_schema(PUBLISHED["paths"][path][method]["responses"][str(status)])
    if "$ref" in answer:
        answer = components["responses"][answer["$ref"].rsplit("/", 1)[1]]
    return {**answer["content"]["application/json"]["schema"], "components": components}


def fields(order: str) -> Json:
    return {"custom_fields": [{"display_name": "Order", "variable_name": "order", "value": order}]}


PAID, UNPAID, NOT_THERE = "/transaction/verify/PG-1", "/transaction/verify/PG-2", "/transaction/verify/PG-none"
PUBLISHED_ANSWERS: list[tuple[str, str, int, Callable[[Sandbox], requests.Response]]] = [
    ("/transaction/initialize", "post", 200, lambda s: initialize(s, "PG-3")),
    ("/transaction/initialize", "post", 400, lambda s: initialize(s, "PG-1")),
    ("/transaction/initialize", "post", 401, lambda s: call(s, "POST", "/transaction/initialize", key="sk_test_other")),
    ("/transaction/verify/{reference}", "get", 200, lambda s: call(s, "GET", PAID)),
    ("/transaction/verify/{reference}", "get", 200, lambda s: call(s, "GET", UNPAID)),
    ("/transaction/verify/{reference}", "get", 404, lambda s: call(s, "GET", NOT_THERE)),
    ("/transaction", "get", 200, lambda s: call(s, "GET", "/transaction")),
    ("/transaction/{id}", "get", 200, lambda s: call(s, "GET", f"/transaction/{verified(s)['id']}")),
    ("/refund", "post", 200, lambda s: refund(s, amount=1000)),
    ("/refund", "get", 200, lambda s: call(s, "GET", "/refund")),
    ("/refund/{id}", "get", 200, lambda s: call(s, "GET", f"/refund/{s.refunds()[0]['id']}")),
    ("/refund/{id}", "get", 404, lambda s: call(s, "GET", "/refund/1")),
    ("/dispute", "get", 200, lambda s: call(s, "GET", "/dispute")),
    ("/dispute/transaction/{id}", "get", 200, lambda s: call(s, "GET", f"/dispute/transaction/{verified(s)['id']}")),
    ("/dispute/transaction/{id}", "get", 404, lambda s: call(s, "GET", "/dispute/transaction/1")),
]


@pytest.mark.parametrize(("path", "method", "status", "ask"), PUBLISHED_ANSWERS)
def test_answers_have_the_published_shape(
    sandbox: Sandbox, path: str, method: str, status: int, ask: Callable[[Sandbox], requests.Response]
) -> None:
    sandbox.configure(not_found_status=404)
    paid(sandbox, "PG-1", metadata=fields("A1"))
    assert initialize(sandbox, "PG-2", metadata=fields("A2")).status_code == 200
    sandbox.dashboard_refund("PG-1", 2000)
    sandbox.dispute("PG-1")
    answer = ask(sandbox)
    assert answer.status_code == status
    jsonschema.Draft202012Validator(published_schema(path, method, status)).validate(answer.json())


def test_a_used_reference_is_refused_in_paystacks_words(sandbox: Sandbox) -> None:
    initialize(sandbox)
    answer = initialize(sandbox)
    assert answer.status_code == 400
    assert answer.json() == {
        "status": False,
        "message": "Duplicate Transaction Reference",
        "meta": {"nextStep": "Try and create the Transaction or Charge with a new reference"},
        "type": "validation_error",
        "code": "duplicate_reference",
    }


@pytest.mark.parametrize(
    ("order", "code"),
    [
        ({"email": ""}, "missing_params"),
        ({"email": "john"}, "invalid_email_address"),
        ({"email": "john@localhost"}, "invalid_email_address"),
        ({"amount": 4999}, "invalid_amount"),
        ({"amount": 5000.5}, "invalid_amount"),
        ({"amount": True}, "invalid_amount"),
        ({"amount": None}, "invalid_amount"),
        ({"amount": 99, "currency": "XOF"}, "invalid_amount"),
        ({"currency": "EUR"}, "unsupported_currency"),
        ({"reference": "PG_1"}, "invalid_reference"),
        ({"reference": "PG 1"}, "invalid_reference"),
    ],
)
def test_a_bad_order_is_refused(sandbox: Sandbox, order: Json, code: str) -> None:
    answer = initialize(sandbox, **order)
    assert (answer.status_code, answer.json()["code"]) == (400, code)
    assert sandbox.transactions() == []


def test_a_key_of_another_account_opens_nothing(sandbox: Sandbox) -> None:
    for path in ("/transaction", "/refund", "/dispute", "/integration/payment_session_timeout"):
        answer = call(sandbox, "GET", path, key="sk_test_other")
        assert (answer.status_code, answer.json()["message"]) == (401, "Invalid key")


def test_a_transaction_is_abandoned_then_failed_then_paid(sandbox: Sandbox) -> None:
    initialize(sandbox)
    assert (verified(sandbox)["status"], verified(sandbox)["paid_at"]) == ("abandoned", None)
    sandbox.decline("PG-1")
    assert (verified(sandbox)["status"], verified(sandbox)["gateway_response"]) == ("failed", "Insufficient Funds")
    sandbox.pay("PG-1")
    data = verified(sandbox)
    assert (data["status"], data["amount"], data["requested_amount"], data["fees"]) == (
        "success",
        500000,
        500000,
        17500,
    )
    with pytest.raises(SandboxError):
        sandbox.pay("PG-1")


def test_lists_are_paged_filtered_and_newest_first(sandbox: Sandbox) -> None:
    for number in range(7):
        initialize(sandbox, f"PG-{number}", amount=10000 + number)
    sandbox.pay("PG-3")
    sandbox.backdate("PG-0", 3600)

    def references(query: str) -> list[str]:
        return [row["reference"] for row in call(sandbox, "GET", f"/transaction?{query}").json()["data"]]

    assert references("perPage=3&page=1") == ["PG-6", "PG-5", "PG-4"]
    assert references("perPage=3&page=3") == ["PG-0"]
    assert references("status=success") == ["PG-3"]
    assert references("amount=10005") == ["PG-5"]
    since = sandbox.transactions()[1]["created_at"]
    assert len(references(f"from={since}")) == 6
    assert references("to=2020-01-01") == []
    assert call(sandbox, "GET", "/transaction?perPage=3").json()["meta"] == {
        **{"total": 7, "skipped": 0, "perPage": 3, "page": 1, "pageCount": 3, "total_volume": 10003}
    }
    assert call(sandbox, "GET", "/transaction?from=yesterday").status_code == 400


def test_a_cursor_misses_and_repeats_nothing_while_new_ones_come(sandbox: Sandbox) -> None:
    for number in range(5):
        initialize(sandbox, f"PG-{number}")
    seen, cursor = [], ""
    while cursor is not None:
        answer = call(
            sandbox, "GET", "/transaction", params={"use_cursor": "true", "next": cursor, "perPage": 2}
        ).json()
        seen += [row["reference"] for row in answer["data"]]
        cursor = answer["meta"]["next"]
        initialize(sandbox, f"PG-late-{len(seen)}")
    assert seen == ["PG-4", "PG-3", "PG-2", "PG-1", "PG-0"]


def test_the_session_timeout_is_kept(sandbox: Sandbox) -> None:
    path = "/integration/payment_session_timeout"
    assert call(sandbox, "GET", path).json()["data"] == {"payment_session_timeout": 0}
    assert call(sandbox, "PUT", path, json={"timeout": 600}).json()["data"] == {"payment_session_timeout": 600}
    assert call(sandbox, "GET", path).json()["data"] == {"payment_session_timeout": 600}


# Refunds


def test_partial_refunds_add_up_to_the_charge_and_no_further(sandbox: Sandbox) -> None:
    paid(sandbox)
    first = refund(sandbox, amount=200000, merchant_note="ours").json()["data"]
    assert (first["status"], first["transaction"]["reference"], first["merchant_note"]) == ("pending", "PG-1", "ours")
    assert refund(sandbox, amount=300001).status_code == 400
    assert refund(sandbox, str(first["transaction"]["id"])).json()["data"]["amount"] == 300000
    assert verified(sandbox)["status"] == "reversal-pending"
    answer = refund(sandbox)
    assert (answer.status_code, answer.json()["code"]) == (400, "transaction_reversed")
    for row in sandbox.refunds():
        sandbox.move_refund(row["id"], "processed")
    assert verified(sandbox)["status"] == "reversed"
    sandbox.move_refund(first["id"], "failed")
    assert verified(sandbox)["status"] == "success"
    assert refund(sandbox).json()["data"]["amount"] == 200000


def test_what_is_not_paid_is_not_refunded(sandbox: Sandbox) -> None:
    initialize(sandbox)
    assert refund(sandbox).status_code == 400
    assert refund(sandbox, "PG-none").json()["code"] == "transaction_not_found"


def test_the_dashboard_may_refund_more_than_is_left(sandbox: Sandbox) -> None:
    paid(sandbox)
    sandbox.dashboard_refund("PG-1", 600000)
    assert [row["amount"] for row in call(sandbox, "GET", "/refund").json()["data"]] == [600000]


@pytest.mark.parametrize(
    ("email", "states"),
    [
        ("john@example.com", ["pending", "processing", "processed"]),
        ("refund-fails@example.com", ["pending", "processing", "failed"]),
        ("refund-fails-late@example.com", ["pending", "processing", "processed", "failed"]),
        ("refund-needs-attention+1@example.com", ["pending", "processing", "needs-attention"]),
    ],
)
def test_a_refund_goes_its_way_by_itself_and_events_tell(shop: Shop, email: str, states: list[str]) -> None:
    with Sandbox(KEY, shop.url, refund_seconds=0.1) as sandbox:
        paid(sandbox, email=email)
        shop.heard(1)  # events overtake each other, as Paystack's do
        refund(sandbox)
        assert shop.heard(1 + len(states)) == ["charge.success", *(f"refund.{state}" for state in states)]
        assert sandbox.refunds("PG-1")[0]["status"] == states[-1]
    told = shop.events[1]["data"]
    assert (told["amount"], told["refund_reference"], "id" in told) == ("500000", None, False)


def test_refund_events_bear_id_and_note_when_told_to(told: Sandbox, shop: Shop) -> None:
    told.configure(refund_events_with_id=True)
    paid(told)
    made = refund(told, merchant_note="ours").json()["data"]
    told.move_refund("PG-1", "processed")
    shop.heard(3)
    event = next(event["data"] for event in shop.events if event["event"] == "refund.processed")
    assert (event["id"], event["merchant_note"], event["amount"]) == (made["id"], "ours", 500000)


def test_a_dispute_is_told_and_listed(told: Sandbox, shop: Shop) -> None:
    paid(told)
    dispute = told.dispute("PG-1")
    told.remind_dispute(dispute["id"])
    told.resolve_dispute(dispute["id"], "declined")
    events = sorted(shop.heard(4))
    assert events == ["charge.dispute.create", "charge.dispute.remind", "charge.dispute.resolve", "charge.success"]
    listed = call(told, "GET", "/dispute?status=resolved").json()["data"]
    assert (listed[0]["resolution"], listed[0]["transaction"]["reference"]) == ("declined", "PG-1")


# Clients that we did not write


def test_pypaystack2_works(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pypaystack2.base_clients.AbstractAPIClient, "_BASE_URL", sandbox.url)
    client = PaystackClient(secret_key=KEY)
    begun = client.transactions.initialize(amount=500000, email="john@example.com", reference="PG-1")
    assert begun.status and begun.data.reference == "PG-1"
    sandbox.pay("PG-1")
    checked = client.transactions.verify("PG-1")
    assert checked.status and checked.data.status == "success" and checked.data.amount == 500000
    listed = client.transactions.get_transactions()
    assert [row.reference for row in listed.data] == ["PG-1"]
    assert client.transactions.get_transaction(checked.data.id).status
    made = client.refunds.create("PG-1", amount=1000, merchant_note="ours")
    assert made.status and made.data.amount == 1000
    # Its model wants an object where the published description has a string (customer.metadata): raw it is.
    refunds: Any = client.refunds.get_refunds().raw
    assert [row["amount"] for row in refunds["data"]] == [1000]
    assert client.transactions.verify("PG-none").status is False


def test_paystackapi_works(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paystackapi, "API_URL", f"{sandbox.url}/")
    monkeypatch.setattr(paystackapi, "SECRET_KEY", KEY)
    monkeypatch.setattr(paystackapi.base.Borg, "_shared_state", {})
    begun = Transaction.initialize(reference="PG-1", amount=500000, email="john@example.com")
    assert begun["data"]["authorization_url"].startswith(f"{sandbox.url}/checkout/")
    sandbox.pay("PG-1")
    assert Transaction.verify(reference="PG-1")["data"]["status"] == "success"
    assert [row["reference"] for row in Transaction.list()["data"]] == ["PG-1"]
    made = Refund.create(transaction="PG-1", amount=1000)
    assert made["message"] == "Refund has been queued for processing"
    assert [row["id"] for row in Refund.list()["data"]] == [made["data"]["id"]]
    assert Refund.fetch(made["data"]["id"])["data"]["amount"] == 1000


# Webhooks


def test_webhooks_are_signed_over_their_raw_body(told: Sandbox, shop: Shop) -> None:
    paid(told, email="zoë@example.com")
    assert shop.heard(1) == ["charge.success"]
    body, signature = shop.raw[0]
    assert signature == hmac.new(KEY.encode(), body, hashlib.sha512).hexdigest()
    assert json.loads(body)["data"] == verified(told)


def test_a_webhook_is_sent_again_until_it_is_answered_by_exactly_200(told: Sandbox, shop: Shop) -> None:
    shop.answers = [500, 302, 201, 200]
    paid(told)
    shop.heard(4)
    time.sleep(0.1)
    assert told.deliveries("PG-1")[0]["answers"] == [500, 302, 201, 200]
    assert len({body for body, _ in shop.raw}) == 1


def test_a_webhook_is_sent_again_when_the_answer_takes_too_long(told: Sandbox, shop: Shop) -> None:
    told.configure(webhook_timeout_seconds=0.1, retry_seconds=[0.05])
    shop.delay = 0.3
    paid(told)
    shop.heard(2)
    time.sleep(0.2)
    assert told.deliveries()[0]["answers"] == ["TimeoutError", "TimeoutError"]


def test_paystacks_schedule_of_retries_is_the_default() -> None:
    assert sandbox_module.RETRY_SECONDS["test"] == (3600.0,) * 10
    assert sum(sandbox_module.RETRY_SECONDS["live"]) == 4 * 180 + 72 * 3600


def test_webhook_faults_do_what_they_say(told: Sandbox, shop: Shop) -> None:
    for number, name in enumerate(("lost", "double", "forged")):
        told.fault("webhook", name, prefix=f"PG-{number}")
        paid(told, f"PG-{number}")
        assert told.wait_for_webhooks()
    assert [event["data"]["reference"] for event in shop.events] == ["PG-1", "PG-1", "PG-2"]
    body, signature = shop.raw[2]
    assert signature != hmac.new(KEY.encode(), body, hashlib.sha512).hexdigest()


def test_a_late_webhook_comes_late(told: Sandbox, shop: Shop) -> None:
    told.fault("webhook", "late", seconds=0.2)
    begun = time.monotonic()
    paid(told)
    shop.heard(1)
    assert 0.2 <= shop.times[0] - begun < 1


def test_a_reordered_webhook_comes_after_the_next(told: Sandbox, shop: Shop) -> None:
    paid(told, email="reordered-webhook@example.com")
    refund(told)
    assert shop.heard(2) == ["refund.pending", "charge.success"]


def test_held_webhooks_are_released_shuffled_by_a_seed(told: Sandbox, shop: Shop) -> None:
    told.hold_webhooks()
    for number in range(8):
        paid(told, f"PG-{number}")
    assert told.wait_for_webhooks() and not shop.events
    told.release_webhooks(seed=1)
    shop.heard(8)
    assert sorted(event["data"]["reference"] for event in shop.events) == [f"PG-{number}" for number in range(8)]


def test_an_event_can_be_sent_again_changed_or_handed_over(told: Sandbox, shop: Shop) -> None:
    paid(told)
    told.send_event("PG-1", domain="live")
    told.forge_event("PG-1")
    shop.heard(3)
    assert sorted(event["data"]["domain"] for event in shop.events) == ["live", "test", "test"]
    body, headers = told.event("PG-1", amount=1)
    assert json.loads(body)["data"]["amount"] == 1
    assert headers["x-paystack-signature"] == hmac.new(KEY.encode(), body, hashlib.sha512).hexdigest()


# Faults of the API

HAPPENED, NOT = True, False


def fails(answer: Callable[[], requests.Response]) -> None:
    with pytest.raises(requests.RequestException):
        answer()


def is_not_json(answer: Callable[[], requests.Response]) -> None:
    assert answer().status_code == 200
    with pytest.raises(requests.JSONDecodeError):
        answer().json()


def status(code: int, **headers: str | None) -> Callable[[Callable[[], requests.Response]], None]:
    def check(answer: Callable[[], requests.Response]) -> None:
        given = answer()
        assert given.status_code == code
        for name, value in headers.items():
            assert given.headers.get(name.replace("_", "-")) == value

    return check


def body(check: Callable[[Json], bool]) -> Callable[[Callable[[], requests.Response]], None]:
    return lambda answer: pytest.fail(answer().text) if not check(answer().json()) else None


@pytest.mark.parametrize(
    ("name", "options", "happened", "check"),
    [
        ("lost-request", {}, NOT, fails),
        ("lost-answer", {}, HAPPENED, fails),
        ("time-out", {"seconds": 1}, HAPPENED, fails),
        ("time-out-before", {"seconds": 1}, NOT, fails),
        ("truncated", {}, HAPPENED, fails),
        ("429", {}, NOT, status(429, Retry_After=None)),
        ("429-retry-after", {"retry_after": 7}, NOT, status(429, Retry_After="7")),
        ("500", {}, NOT, status(500)),
        ("500", {"effect": True}, HAPPENED, status(500)),
        ("502", {}, NOT, status(502, Content_Type="text/html")),
        ("503", {}, NOT, status(503)),
        ("invalid-key", {}, NOT, status(401)),
        ("not-found", {}, NOT, status(400)),
        ("redirect", {"url": "http://127.0.0.1:9/"}, NOT, status(302, Location="http://127.0.0.1:9/")),
        ("garbage", {}, HAPPENED, is_not_json),
        ("status-string", {}, HAPPENED, body(lambda b: b["status"] == "false")),
        ("status-missing", {}, HAPPENED, body(lambda b: "status" not in b)),
        ("no-data", {}, HAPPENED, body(lambda b: b["data"] is None)),
        ("foreign-url", {}, HAPPENED, body(lambda b: "paystack.com.example.com" in b["data"]["authorization_url"])),
        (
            "http-url",
            {},
            HAPPENED,
            body(lambda b: b["data"]["authorization_url"].startswith("http://checkout.paystack")),
        ),
        ("no-url", {}, HAPPENED, body(lambda b: "authorization_url" not in b["data"])),
        ("other-reference", {}, HAPPENED, body(lambda b: b["data"]["reference"] == "PG-1-other")),
        ("answer", {"status": 403, "body": {"status": False}, "headers": {"X-A": "b"}}, NOT, status(403, X_A="b")),
        ("huge", {"size": 3_000_000}, HAPPENED, body(lambda b: len(b["message"]) > 2_900_000)),
    ],
)
def test_a_fault_does_what_it_says(
    sandbox: Sandbox, name: str, options: Json, happened: bool, check: Callable[[Callable[[], requests.Response]], None]
) -> None:
    answers: list[requests.Response] = []

    def ask() -> requests.Response:
        if not answers:
            answers.append(initialize(sandbox, timeout=0.5))
        return answers[0]

    sandbox.fault("initialize", name, **options)
    check(ask)
    assert bool(sandbox.transactions()) == happened
    assert initialize(sandbox, "PG-2").status_code == 200  # once only
    assert sandbox.calls("initialize", "PG-1") == 1


def test_a_slow_answer_happens_after_the_client_has_gone(sandbox: Sandbox) -> None:
    sandbox.fault("initialize", "slow", seconds=0.3)
    fails(lambda: initialize(sandbox, timeout=0.1))
    assert sandbox.transactions() == []
    time.sleep(0.4)
    assert [row["reference"] for row in sandbox.transactions()] == ["PG-1"]


@pytest.mark.parametrize("name", ["drip", "drip-body"])
def test_a_dripping_answer_comes_byte_by_byte(sandbox: Sandbox, name: str) -> None:
    sandbox.fault("initialize", name, seconds=0.1)
    with socket.create_connection(("127.0.0.1", sandbox.port), timeout=2) as client:
        content = b'{"email": "john@example.com", "amount": 500000}'
        head = f"Authorization: Bearer {KEY}\r\nContent-Length: {len(content)}"
        client.sendall(f"POST /transaction/initialize HTTP/1.1\r\n{head}\r\n\r\n".encode() + content)
        pieces = [client.recv(65536) for _ in range(4)]
    assert [len(piece) for piece in pieces[1:]] == [1, 1, 1]
    assert (len(pieces[0]) == 1) == (name == "drip")


def test_a_redirect_leads_to_a_place_that_counts_who_follows(sandbox: Sandbox) -> None:
    sandbox.fault("initialize", "redirect")
    target = initialize(sandbox).headers["Location"]
    assert sandbox.calls("elsewhere") == 0
    requests.get(target, timeout=2)
    assert sandbox.calls("elsewhere") == 1


def test_verify_may_lag_behind(sandbox: Sandbox) -> None:
    paid(sandbox)
    sandbox.fault("verify", "stale")
    assert (verified(sandbox)["status"], verified(sandbox)["status"]) == ("abandoned", "success")
    sandbox.fault("verify", "not-found", lasts=0.2)
    assert [call(sandbox, "GET", PAID).status_code for _ in range(2)] == [400, 400]
    time.sleep(0.25)
    assert verified(sandbox)["status"] == "success"


@pytest.mark.parametrize("path", ["/transaction", "/refund"])
def test_lists_may_lag_behind(sandbox: Sandbox, path: str) -> None:
    paid(sandbox)
    refund(sandbox)
    endpoint = f"list-{path[1:]}s"

    def listed() -> int:
        return len(call(sandbox, "GET", path).json()["data"])

    sandbox.fault(endpoint, "empty-list", times=2)
    assert [listed(), listed(), listed()] == [0, 0, 1]
    sandbox.fault(endpoint, "lagging-list", seconds=60)
    assert [listed(), listed()] == [0, 1]
    sandbox.backdate("PG-1", 61)
    sandbox.fault(endpoint, "lagging-list", seconds=60)
    assert listed() == 1


def test_faults_by_chance_come_the_same_way_for_the_same_seed(sandbox: Sandbox) -> None:
    def outcomes(seed: int, prefix: str) -> list[int]:
        sandbox.clear_faults()
        sandbox.fault("initialize", "503", probability=0.5, seed=seed)
        return [initialize(sandbox, f"PG-{prefix}-{number}").status_code for number in range(12)]

    first = outcomes(3, "a")
    assert set(first) == {200, 503}
    assert outcomes(3, "b") == first
    assert outcomes(4, "c") != first


def test_a_fault_meets_only_the_references_and_endpoints_it_is_for(sandbox: Sandbox) -> None:
    sandbox.fault("initialize", "503", prefix="PG-x", times=None)
    assert [initialize(sandbox, name).status_code for name in ("PG-1", "PG-x1", "PG-x1")] == [200, 503, 503]
    assert verified(sandbox)["status"] == "abandoned"
    with pytest.raises(SandboxError, match="no fault 'nonsense'"):
        sandbox.fault("initialize", "nonsense")
    with pytest.raises(SandboxError, match="no endpoint 'nonsense'"):
        sandbox.fault("nonsense", "503")


# Customers


def test_an_email_chooses_a_fault_for_the_first_call_of_each_reference(sandbox: Sandbox) -> None:
    for reference in ("PG-1", "PG-2"):
        with pytest.raises(requests.ConnectionError):
            initialize(sandbox, reference, "lost-answer+x@example.com")
        assert initialize(sandbox, reference, "lost-answer@example.com").json()["code"] == "duplicate_reference"
    assert [initialize(sandbox, "PG-3", "503-always@example.com").status_code for _ in range(3)] == [503] * 3
    assert initialize(sandbox, "PG-4", "500-after@example.com").status_code == 500
    assert verified(sandbox, "PG-4")["status"] == "abandoned"
    initialize(sandbox, "PG-5", "verify-502@example.com")
    assert call(sandbox, "GET", "/transaction/verify/PG-5").status_code == 502
    assert verified(sandbox, "PG-5")["status"] == "abandoned"
    paid(sandbox, "PG-6", "refund-500-after@example.com")
    assert refund(sandbox, "PG-6").status_code == 500
    assert len(sandbox.refunds("PG-6")) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("underpaid", {"amount": 499900, "requested_amount": 500000}),
        ("overpaid", {"amount": 500100, "requested_amount": 500000}),
        ("other-currency", {"currency": "GHS"}),
        ("pays-fees", {"amount": 517767, "requested_amount": 500000, "fees": 17767}),
        ("live-domain", {"domain": "live"}),
        ("metadata-string", {"metadata": '{"order": "A1"}'}),
        ("metadata-empty", {"metadata": ""}),
        ("metadata-zero", {"metadata": 0}),
        ("metadata-null", {"metadata": None}),
    ],
)
def test_a_customer_pays_in_his_own_way(sandbox: Sandbox, name: str, expected: Json) -> None:
    paid(sandbox, email=f"{name}@example.com", metadata={"order": "A1"})
    data = verified(sandbox)
    assert {member: data[member] for member in expected} == expected
    assert data["status"] == "success"


def test_requested_amount_may_be_absent(sandbox: Sandbox) -> None:
    paid(sandbox, email="no-requested-amount@example.com")
    assert "requested_amount" not in verified(sandbox)


def test_paying_may_come_before_initialize_has_answered(told: Sandbox, shop: Shop) -> None:
    shop.delay = 0.1
    initialize(told, email="webhook-first@example.com")
    assert time.monotonic() >= shop.times[0] + 0.1
    assert verified(told)["status"] == "success"


def test_an_answer_can_be_altered_by_hand(sandbox: Sandbox) -> None:
    paid(sandbox)
    sandbox.alter("PG-1", without=["fees"], status="reversed", requested_amount=1)
    data = verified(sandbox)
    assert (data["status"], data["requested_amount"], "fees" in data) == ("reversed", 1, False)
    assert call(sandbox, "GET", "/transaction?status=reversed").json()["meta"]["total"] == 1


def test_another_shop_charges_on_the_same_account(told: Sandbox, shop: Shop) -> None:
    charge = told.charge_elsewhere(amount=700000)
    assert shop.heard(1) == ["charge.success"]
    assert verified(told, charge["reference"])["amount"] == 700000
    assert told.calls("initialize") == 0


@pytest.mark.parametrize("amount", [5000, 246000, 249999, 250000, 1_000_000, 99_999_999])
@pytest.mark.parametrize("currency", list(sandbox_module.CURRENCIES))
def test_fees_borne_by_the_customer_leave_the_price(currency: str, amount: int) -> None:
    total = sandbox_module.with_fees(currency, amount)
    assert total - sandbox_module.fee(currency, total) == amount


# Controls


def control(
    sandbox: Sandbox, method: str, headers: dict[str, str] | None = None, /, **arguments: Any
) -> requests.Response:
    return requests.post(f"{sandbox.url}/_sandbox/{method}", json=arguments, headers=headers, timeout=5)


def test_the_controls_work_over_http(sandbox: Sandbox) -> None:
    initialize(sandbox)
    assert control(sandbox, "pay", reference="PG-1", amount=1).json()["result"]["paid"] == 1
    assert control(sandbox, "fault", endpoint="verify", name="503").status_code == 200
    assert call(sandbox, "GET", PAID).status_code == 503
    assert control(sandbox, "calls", endpoint="verify", reference="PG-1").json() == {"result": 1}
    rows = requests.get(f"{sandbox.url}/_sandbox/transactions", timeout=5).json()["result"]
    assert [row["reference"] for row in rows] == ["PG-1"]
    for name, arguments in (("pay", {}), ("pay", {"reference": "PG-none"}), ("configure", {"key": 1})):
        assert control(sandbox, name, **arguments).status_code == 400
    assert control(sandbox, "stop").status_code == 404
    assert control(sandbox, "configure", webhook_url="http://example.com/").status_code == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://example.com"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Host": "rebound.example.com"},
        {"X-Forwarded-For": "192.0.2.1"},
    ],
)
def test_the_controls_are_out_of_reach_of_web_pages(sandbox: Sandbox, headers: dict[str, str]) -> None:
    initialize(sandbox)
    assert control(sandbox, "pay", headers, reference="PG-1").status_code == 403
    assert requests.get(f"{sandbox.url}/_sandbox/transactions", headers=headers, timeout=5).status_code == 403


def test_a_plain_form_reaches_no_control(sandbox: Sandbox) -> None:
    initialize(sandbox)
    answer = requests.post(f"{sandbox.url}/_sandbox/pay", data='{"reference": "PG-1"}', timeout=5)
    assert answer.status_code == 415
    assert requests.get(f"{sandbox.url}/_sandbox/pay?reference=PG-1", timeout=5).status_code == 404
    assert verified(sandbox)["status"] == "abandoned"


def test_the_help_names_every_fault_customer_setting_and_control() -> None:
    words = set(re.findall(r"[a-z0-9_-]+", f"{sandbox_module.__doc__} {Sandbox.configure.__doc__}".lower()))
    named = (
        *sandbox_module.FAULTS,
        *sandbox_module.WEBHOOK_FAULTS,
        *sandbox_module.CUSTOMERS,
        *sandbox_module.CONTROLS,
        *sandbox_module.SETTINGS,
        *sandbox_module.ENDPOINTS,
    )
    assert set(named) <= words
    for name in sandbox_module.CONTROLS:
        assert callable(getattr(Sandbox, name))


def test_it_listens_and_sends_on_loopback_only() -> None:
    with pytest.raises(SandboxError):
        Sandbox(KEY, host="0.0.0.0")  # noqa: S104
    with pytest.raises(SandboxError):
        Sandbox(KEY, "http://example.com/hook")


# The checkout page


def checkout(sandbox: Sandbox, email: str = "john@example.com", **order: Any) -> str:
    return str(initialize(sandbox, email=email, **order).json()["data"]["authorization_url"])


def press(url: str, button: str) -> requests.Response:
    return requests.post(url, data={"do": button}, timeout=5, allow_redirects=False)


def test_the_checkout_page_shows_who_is_paid_what(sandbox: Sandbox) -> None:
    answer = requests.get(checkout(sandbox, "<i>john</i>@example.com", amount=123456789), timeout=5)
    assert answer.status_code == 200
    for text in (
        "TEST",
        "Example Shop",
        "NGN\N{NO-BREAK SPACE}1,234,567.89",
        "&lt;i&gt;john&lt;/i&gt;@example.com",
        "PG-1",
    ):
        assert text in answer.text
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    assert not re.search(r"<script|style=|https?://|\son\w+=", answer.text)
    css = requests.get(f"{sandbox.url}/sandbox.css", timeout=5)
    assert css.headers["Content-Type"] == "text/css"
    assert len(answer.content) + len(css.content) < 10_000


def test_paying_leads_back_to_the_shop_and_happens_once(told: Sandbox, shop: Shop) -> None:
    url = checkout(told, callback_url="http://127.0.0.1:8000/pay/PAY-1?a=b")
    assert press(url, "nonsense").headers["Location"] == f"/checkout/{url.rsplit('/', 1)[1]}"
    for _ in range(2):
        answer = press(url, "pay")
        assert answer.status_code == 303
        assert answer.headers["Location"] == "http://127.0.0.1:8000/pay/PAY-1?a=b&trxref=PG-1&reference=PG-1"
    assert press(url, "decline").status_code == 303
    assert "Payment successful" in requests.get(url, timeout=5).text
    assert verified(told)["status"] == "success"
    told.wait_for_webhooks()
    assert shop.heard(1) == ["charge.success"]


def test_64_presses_at_once_pay_once(sandbox: Sandbox) -> None:
    url = checkout(sandbox)
    with ThreadPoolExecutor(32) as pool:
        assert {answer.status_code for answer in pool.map(lambda _: press(url, "pay"), range(64))} == {303}
    assert len(sandbox.deliveries("PG-1")) == 1


def test_after_a_declined_card_the_page_says_so_and_takes_another(sandbox: Sandbox) -> None:
    url = checkout(sandbox)
    assert "Declined" not in requests.get(url, timeout=5).text
    here = press(url, "decline")
    page = requests.get(sandbox.url + here.headers["Location"], timeout=5).text
    assert 'role="alert"' in page and "Insufficient Funds" in page
    press(url, "pay")
    assert verified(sandbox)["status"] == "success"


@pytest.mark.parametrize(("email", "states"), [("decline", ["failed", "success"]), ("declines", ["failed", "failed"])])
def test_some_customers_cards_are_declined(sandbox: Sandbox, email: str, states: list[str]) -> None:
    url, seen = checkout(sandbox, f"{email}@example.com"), []
    for _ in states:
        press(url, "pay")
        seen.append(verified(sandbox)["status"])
    assert seen == states


def test_who_walks_away_goes_where_the_shop_says(sandbox: Sandbox) -> None:
    url = checkout(sandbox, metadata={"cancel_action": "http://127.0.0.1:8000/pay/PAY-1"})
    assert press(url, "cancel").headers["Location"] == "http://127.0.0.1:8000/pay/PAY-1"
    assert verified(sandbox)["status"] == "abandoned"
    other = str(
        initialize(sandbox, "PG-2", metadata={"cancel_action": "javascript:alert(1)"}).json()["data"][
            "authorization_url"
        ]
    )
    assert (press(other, "cancel").status_code, "Nothing was paid" in press(other, "cancel").text) == (200, True)


def test_an_expired_session_takes_no_money_but_a_late_transfer_does(sandbox: Sandbox) -> None:
    url = checkout(sandbox)
    call(sandbox, "PUT", "/integration/payment_session_timeout", json={"timeout": 60})
    sandbox.backdate("PG-1", 61)
    assert requests.get(url, timeout=5).status_code == 410
    press(url, "pay")
    assert verified(sandbox)["status"] == "abandoned"
    sandbox.pay("PG-1")
    assert verified(sandbox)["status"] == "success"


def test_an_unknown_checkout_is_a_404(sandbox: Sandbox) -> None:
    assert requests.get(f"{sandbox.url}/checkout/nonsense", timeout=5).status_code == 404


# As a process


def started(folder: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, sandbox_module.__file__, "--secret-key", KEY, "--data", str(folder), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    ready = process.stdout.readline()
    match = re.fullmatch(r"sandbox ready on (http://127\.0\.0\.1:\d+)\n", ready)
    assert match, ready
    return process, match[1]


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_ended_at_any_moment_it_loses_nothing_that_was_answered(tmp_path: Path, ending: signal.Signals) -> None:
    process, url = started(tmp_path)
    headers = {"Authorization": f"Bearer {KEY}"}
    answered: list[str] = []

    def hammer(lane: int) -> None:
        for number in range(1000):
            reference = f"PG-{lane}-{number}"
            order = {"email": "john@example.com", "amount": 500000, "reference": reference}
            try:
                answer = requests.post(f"{url}/transaction/initialize", json=order, headers=headers, timeout=5)
            except requests.RequestException:
                return
            assert answer.status_code == 200
            answered.append(reference)

    lanes = [threading.Thread(target=hammer, args=(lane,)) for lane in range(4)]
    for thread in lanes:
        thread.start()
    while len(answered) < 40:
        time.sleep(0.01)
    control_url = f"{url}/_sandbox/pay"
    assert requests.post(control_url, json={"reference": answered[0]}, timeout=5).status_code == 200
    made = requests.post(f"{url}/refund", json={"transaction": answered[0]}, headers=headers, timeout=5).json()["data"]
    process.send_signal(ending)
    process.wait(5)
    for thread in lanes:
        thread.join(5)

    with Sandbox(KEY, data=tmp_path) as again:
        assert set(answered) <= {row["reference"] for row in again.transactions()}
        assert verified(again, answered[0])["status"] == "reversal-pending"
        assert [row["id"] for row in again.refunds()] == [made["id"]]
        assert initialize(again, answered[1]).json()["code"] == "duplicate_reference"
        assert initialize(again, "PG-new").status_code == 200
        with pytest.raises(SandboxError, match="another sandbox"):
            Sandbox(KEY, data=tmp_path)
    ids = [row["id"] for row in again.transactions()]
    assert len(set(ids)) == len(ids)


def test_the_whole_ledger_is_kept_and_half_a_line_is_no_harm(tmp_path: Path) -> None:
    with Sandbox(KEY, data=tmp_path) as first:
        paid(first, metadata=fields("A1"))
        dispute = first.dispute("PG-1")
        first.alter("PG-1", domain="live")
        call(first, "PUT", "/integration/payment_session_timeout", json={"timeout": 600})
    ledger = tmp_path / "ledger.jsonl"
    with ledger.open("a") as file:
        file.write('["Transaction", {"id": 1, "refer')
    for _ in range(2):
        with Sandbox(KEY, data=tmp_path) as again:
            assert again.transactions() == first.transactions()
            assert [row["id"] for row in again.disputes()] == [dispute["id"]]
            path = "/integration/payment_session_timeout"
            assert call(again, "GET", path).json()["data"] == {"payment_session_timeout": 600}
            again.decline(initialize(again, f"PG-{time.monotonic_ns()}").json()["data"]["reference"])
            first = again
    assert ledger.read_text().count("\n") == 6  # one for each of the four rows at the start, two for changes since


def test_an_open_refund_goes_on_after_a_restart(tmp_path: Path) -> None:
    with Sandbox(KEY, data=tmp_path) as first:
        paid(first)
        refund(first)
        first.move_refund("PG-1", "processing")
    with Sandbox(KEY, data=tmp_path, refund_seconds=0.02) as again:
        end = time.monotonic() + 2
        while again.refunds()[0]["status"] != "processed" and time.monotonic() < end:
            time.sleep(0.01)
        assert verified(again)["status"] == "reversed"


def test_another_key_may_take_over(told: Sandbox, shop: Shop) -> None:
    initialize(told)
    told.configure(secret_key="sk_test_next")
    assert initialize(told, "PG-2").status_code == 401
    told.pay("PG-1")
    shop.heard(1)
    body, signature = shop.raw[0]
    assert signature == hmac.new(b"sk_test_next", body, hashlib.sha512).hexdigest()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_within_a_second(tmp_path: Path, number: signal.Signals) -> None:
    process, url = started(tmp_path, "--latency-seconds", "20")
    port = int(url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as idle, socket.create_connection(("127.0.0.1", port)) as asking:
        asking.sendall(f"GET /transaction HTTP/1.1\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode())
        time.sleep(0.1)
        begun = time.monotonic()
        process.send_signal(number)
        assert process.wait(2) == 0
        assert time.monotonic() - begun < 1
        assert idle.recv(1) == b""


def test_a_port_in_use_and_a_foreign_address_are_one_line_each(tmp_path: Path, sandbox: Sandbox) -> None:
    for options in (["--port", str(sandbox.port)], ["--host", "0.0.0.0"], ["--webhook-url", "http://example.com"]):  # noqa: S104
        command = [sys.executable, sandbox_module.__file__, "--secret-key", KEY, *options]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        assert ended.returncode == 1
        assert ended.stderr.startswith("sandbox: ") and ended.stderr.count("\n") == 1
    with pytest.raises(OSError, match="in use"):
        Sandbox(KEY, port=sandbox.port).start()


def test_256_kept_connections_wait_side_by_side(sandbox: Sandbox) -> None:
    sandbox.configure(latency_seconds=0.3)

    async def customer(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", sandbox.port)
        for _ in range(2):
            writer.write(f"GET /refund HTTP/1.1\r\nAuthorization: Bearer {KEY}\r\nX-N: {number}\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            length = re.search(rb"Content-Length: (\d+)", head)
            assert length
            await reader.readexactly(int(length[1]))
        writer.close()

    async def crowd() -> None:
        await asyncio.gather(*(customer(number) for number in range(256)))

    begun = time.monotonic()
    asyncio.run(crowd())
    assert 0.6 <= time.monotonic() - begun < 2.5
