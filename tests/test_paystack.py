"""What is asked of Paystack, to the letter, and what is made of each of its answers."""
# ruff: noqa: F811  # a fixture bears the name of its import

import contextlib
import hashlib
import hmac
import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest

import money
import paystack
from sandbox import Sandbox
from shop import SECRET_KEY, sandbox, wait_until  # noqa: F401  # a fixture

API = "https://api.paystack.co"
INITIALIZE, VERIFY = f"{API}/transaction/initialize", f"{API}/transaction/verify/PG-1"
CHECKOUT = "https://checkout.paystack.com/3ni8kdavz62431k"
MORNING = datetime(2026, 1, 31, 8, 0, tzinfo=UTC)


@pytest.fixture
def gateway() -> paystack.Gateway:
    return paystack.Gateway((SECRET_KEY,), API, 10, "test")


@dataclass(frozen=True)
class Exchange:
    """A request that is expected, and its answer. `asked` is its query, `sent` its JSON, `headers` some of its own."""

    method: str
    url: str
    answer: bytes
    status: int
    answer_headers: dict[str, str]
    asked: dict[str, str] | None
    sent: object
    headers: dict[str, str]


class Wire:
    """Paystack as http.client sees it: a server of ours, to which each connection leads, whatever host it is for. A
    request that is not expected is an error, and so is one that does not come."""

    def __init__(self) -> None:
        self.expected: list[Exchange] = []
        self.errors: list[str] = []
        self.schemes: dict[int, str] = {}
        """By the port that the client's connection has."""
        wire = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 5

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                url = f"{wire.schemes[self.client_address[1]]}://{self.headers['Host']}{self.path}"
                exchange = wire.find(self.command, url, dict(self.headers), body)
                self.send_response(exchange.status)
                for name, value in exchange.answer_headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(exchange.answer)))
                self.end_headers()
                self.wfile.write(exchange.answer)

            do_GET = do_POST = answer  # the names that BaseHTTPRequestHandler calls

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True

    def connect(self, connection: http.client.HTTPConnection) -> None:
        connection.sock = socket.create_connection(self.server.server_address[:2])  # type: ignore[arg-type]
        is_tls = isinstance(connection, http.client.HTTPSConnection)
        self.schemes[connection.sock.getsockname()[1]] = "https" if is_tls else "http"

    def post(self, url: str, **members: Any) -> None:
        self.expect("POST", url, **members)

    def get(self, url: str, **members: Any) -> None:
        self.expect("GET", url, **members)

    def expect(
        self,
        method: str,
        url: str,
        *,
        answer: object = None,
        raw: str | bytes | None = None,
        status: int = 200,
        answer_headers: dict[str, str] | None = None,
        asked: dict[str, str] | None = None,
        sent: object = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        content = json.dumps(answer) if raw is None else raw
        content = content.encode() if isinstance(content, str) else content
        self.expected.append(Exchange(method, url, content, status, answer_headers or {}, asked, sent, headers or {}))

    def find(self, method: str, url: str, headers: dict[str, str], body: bytes) -> Exchange:
        base, _, query = url.partition("?")
        for exchange in self.expected:
            if (
                (exchange.method, exchange.url) == (method, base)
                and exchange.asked in (None, dict(parse_qsl(query)))
                and exchange.sent in (None, json.loads(body or b"null"))
                and exchange.headers.items() <= headers.items()
            ):
                self.expected.remove(exchange)
                return exchange
        self.errors.append(f"{method} {url} {headers} {body!r}")
        return Exchange(method, url, b"", 404, {}, None, None, {})


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    wire = Wire()

    def connect(connection: http.client.HTTPConnection) -> None:
        wire.connect(connection)

    for kind in (http.client.HTTPConnection, http.client.HTTPSConnection):
        monkeypatch.setattr(kind, "connect", connect)
    thread = threading.Thread(target=wire.server.serve_forever, args=(0.01,))
    thread.start()
    yield wire
    wire.server.shutdown()
    thread.join()
    wire.server.server_close()
    assert not wire.errors
    assert not wire.expected


def initialize(gateway: paystack.Gateway, within_seconds: float = 10) -> object:
    return gateway.initialize(
        reference="PG-1",
        email="john@example.com",
        amount_minor=5000,
        currency="NGN",
        callback_url="https://pay.example.com/pay/PAY-1",
        metadata={"payment": "PAY-1"},
        within_seconds=within_seconds,
    )


def opened(**data: object) -> dict[str, Any]:
    return {
        "status": True,
        "message": "Authorization URL created",
        "data": {"authorization_url": CHECKOUT, "access_code": "3ni8kdavz62431k", "reference": "PG-1", **data},
    }


def refusal(message: str, code: str | None = None) -> dict[str, Any]:
    return {"status": False, "message": message, **({"code": code, "type": "validation_error"} if code else {})}


def transaction(**members: object) -> dict[str, Any]:
    return {
        "id": 4099260516,
        "domain": "test",
        "status": "success",
        "reference": "PG-1",
        "amount": 40333,
        "requested_amount": 30050,
        "fees": 10283,
        "currency": "NGN",
        "channel": "card",
        "gateway_response": "Successful",
        "paid_at": "2026-01-31T09:15:02.000+01:00",
        **members,
    }


def verified(**members: object) -> dict[str, Any]:
    return {"status": True, "message": "Verification successful", "data": transaction(**members)}


# initialize


def test_initialize_asks_what_paystack_documents(gateway: paystack.Gateway, wire: Wire) -> None:
    wire.post(
        INITIALIZE,
        answer=opened(),
        headers={"Authorization": f"Bearer {SECRET_KEY}", "Content-Type": "application/json"},
        sent={
            "reference": "PG-1",
            "email": "john@example.com",
            "amount": 5000,
            "currency": "NGN",
            "callback_url": "https://pay.example.com/pay/PAY-1",
            "metadata": {"payment": "PAY-1"},
        },
    )
    assert initialize(gateway) == paystack.Opened(CHECKOUT)


def test_of_two_keys_the_first_calls(wire: Wire) -> None:
    wire.post(INITIALIZE, answer=opened(), headers={"Authorization": "Bearer sk_test_newer000"})
    initialize(paystack.Gateway(("sk_test_newer000", SECRET_KEY), API, 10, "test"))


@pytest.mark.parametrize(
    "url",
    [
        "http://checkout.paystack.com/x",
        "https://evil.example/x",
        "https://checkout.paystack.com.evil.example/x",
        "https://checkout.paystack.com@evil.example/x",
        "https://evil.example\\@checkout.paystack.com/x",
        "https://checkout.paystack.com:8443/x",
        "https://api.paystack.co/x",
        "//checkout.paystack.com/x",
        "javascript:alert(1)//https://checkout.paystack.com/",
        "https://checkout.paystack.com/x\r\nSet-Cookie: x=1",
        "https://checkout.paystack.com/ x",
        "https://checkout.pаystack.com/x",  # the first a is Cyrillic
        "",
        None,
        7,
        ["https://checkout.paystack.com/x"],
    ],
)
def test_a_customer_is_sent_to_nothing_but_paystacks_checkout(
    gateway: paystack.Gateway, wire: Wire, url: object
) -> None:
    wire.post(INITIALIZE, answer=opened(authorization_url=url))
    with pytest.raises(paystack.Unavailable):
        initialize(gateway)


def test_what_stands_in_for_paystack_may_have_its_own_checkout(wire: Wire) -> None:
    gateway = paystack.Gateway((SECRET_KEY,), "http://127.0.0.1:8010", 10, "test")
    wire.post(
        "http://127.0.0.1:8010/transaction/initialize", answer=opened(authorization_url="http://127.0.0.1:8010/c")
    )
    assert initialize(gateway) == paystack.Opened("http://127.0.0.1:8010/c")
    wire.post(
        "http://127.0.0.1:8010/transaction/initialize", answer=opened(authorization_url="http://127.0.0.1:8011/c")
    )
    with pytest.raises(paystack.Unavailable):
        initialize(gateway)


@pytest.mark.parametrize(
    "answer",
    [
        refusal("Duplicate Transaction Reference", "duplicate_reference"),
        refusal("Duplicate Transaction Reference"),
        refusal("The reference is a duplicate"),
        refusal("Nein.", "duplicate_reference"),
    ],
)
def test_a_used_reference_is_known_by_its_code_or_its_message(
    gateway: paystack.Gateway, wire: Wire, answer: dict[str, Any]
) -> None:
    wire.post(INITIALIZE, answer=answer, status=400)
    assert initialize(gateway) == paystack.Duplicate()


@pytest.mark.parametrize(
    ("answer", "field"),
    [
        (refusal("Email Address is required", "missing_params"), "customer_email"),
        (refusal("Invalid Email Address Passed", "invalid_email_address"), "customer_email"),
        (refusal("Invalid amount passed", "invalid_params"), "amount"),
        (refusal("Amount is below the minimum"), "amount"),
    ],
)
def test_a_400_about_the_customer_or_the_amount_refuses_the_payment(
    gateway: paystack.Gateway, wire: Wire, answer: dict[str, Any], field: str
) -> None:
    wire.post(INITIALIZE, answer=answer, status=400)
    assert initialize(gateway) == paystack.Refused(field, answer["message"])


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (401, refusal("Invalid key", "invalid_Key")),
        (401, refusal("Your email is not verified")),
        (403, refusal("Your IP address is not allowed to make this call")),
        (404, refusal("Not here")),
        (422, refusal("Unprocessable amount")),
        (400, refusal("Currency not supported by merchant", "unsupported_currency")),
        (400, refusal("Amount in this currency is not supported by merchant")),
        (400, refusal("Invalid callback URL")),
        (400, {}),
    ],
)
def test_any_other_4xx_is_about_us(gateway: paystack.Gateway, wire: Wire, status: int, answer: dict[str, Any]) -> None:
    wire.post(INITIALIZE, answer=answer, status=status)
    with pytest.raises(paystack.Misconfigured):
        initialize(gateway)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, json.dumps({**opened(), "status": "true"})),
        (200, json.dumps({**opened(), "status": "false"})),
        (200, json.dumps({**opened(), "status": 1})),
        (200, json.dumps({**opened(), "status": False})),
        (200, json.dumps({name: value for name, value in opened().items() if name != "status"})),
        (200, json.dumps({**opened(), "data": None})),
        (200, json.dumps({**opened(), "data": [opened()["data"]]})),
        (200, json.dumps(opened(reference="PG-2"))),
        (200, json.dumps(opened(reference=None))),
        (200, "<html>maintenance</html>"),
        (200, ""),
        (200, "[]"),
        (200, "null"),
        (200, "[" * 100_000),
        (200, '{"status": true, "data": ' + "9" * 100_000 + "}"),
        (200, b"\xff\xfe\x00"),
        (201, json.dumps(opened())),
        (204, ""),
        (302, json.dumps(opened())),
        (304, ""),
        (500, json.dumps({"status": False, "message": "An error occurred", "type": "api_error"})),
        (502, "<html>Bad Gateway</html>"),
        (503, ""),
        (504, json.dumps(opened())),
    ],
)
def test_any_other_answer_is_none(gateway: paystack.Gateway, wire: Wire, status: int, body: str | bytes) -> None:
    wire.post(INITIALIZE, raw=body, status=status)
    with pytest.raises(paystack.Unavailable) as unknown:
        initialize(gateway)
    assert not unknown.value.asked_to_wait


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({}, 1),
        ({"Retry-After": "Fri, 31 Dec 2027 23:59:59 GMT"}, 1),
        ({"Retry-After": ""}, 1),
    ],
)
def test_a_429_says_how_long_to_wait(
    gateway: paystack.Gateway, wire: Wire, headers: dict[str, str], seconds: float
) -> None:
    wire.post(INITIALIZE, answer=refusal("Too many requests"), status=429, answer_headers=headers)
    with pytest.raises(paystack.Unavailable) as unknown:
        initialize(gateway)
    assert unknown.value.asked_to_wait
    assert unknown.value.retry_after_seconds == seconds


def test_a_reason_is_one_short_line(gateway: paystack.Gateway, wire: Wire) -> None:
    wire.post(INITIALIZE, answer=refusal("Invalid\r\n email\x00\u202e " + "x" * 1000), status=400)
    refused = initialize(gateway)
    assert isinstance(refused, paystack.Refused)
    assert refused.reason.startswith("Invalid email x")
    assert refused.reason.isprintable()
    assert len(refused.reason) <= 200


# verify


def verify(gateway: paystack.Gateway, wire: Wire, **members: object) -> object:
    wire.get(VERIFY, answer=verified(**members))
    return gateway.verify("PG-1", 10)


def test_a_success_is_a_charge_with_all_that_is_told_of_it(gateway: paystack.Gateway, wire: Wire) -> None:
    assert verify(gateway, wire) == money.Charge(
        reference="PG-1",
        mode="test",
        provider_id=4099260516,
        amount_minor=40333,
        requested_minor=30050,
        fees_minor=10283,
        currency="NGN",
        channel="card",
        paid_at=datetime(2026, 1, 31, 8, 15, 2, tzinfo=UTC),
    )


@pytest.mark.parametrize("word", ["reversed", "reversal_pending", "reversal-pending", "reversing"])
def test_a_reversal_says_that_money_came(gateway: paystack.Gateway, wire: Wire, word: str) -> None:
    charge = verify(gateway, wire, status=word)
    assert isinstance(charge, money.Charge)
    assert charge.is_reversed


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"requested_amount": None}, {"requested_minor": None}),
        ({"amount": "40333", "fees": "10283"}, {"amount_minor": 40333, "fees_minor": 10283}),
        ({"fees": None, "channel": None, "id": None}, {"fees_minor": None, "channel": None, "provider_id": None}),
        ({"fees": 0}, {"fees_minor": 0}),
        ({"fees": -1}, {"fees_minor": None}),
        ({"paid_at": None}, {"paid_at": None}),
        ({"paid_at": "yesterday"}, {"paid_at": None}),
        ({"paid_at": "2026-01-31T09:15:02"}, {"paid_at": None}),  # of no known zone
        ({"paid_at": "0001-01-01T00:00:00+14:00"}, {"paid_at": None}),  # before the first day in UTC
        ({"paid_at": "9999-12-31T23:59:59-14:00"}, {"paid_at": None}),
    ],
)
def test_what_is_missing_or_cannot_be_read_in_a_charge_is_not_known(
    gateway: paystack.Gateway, wire: Wire, members: dict[str, object], told: dict[str, object]
) -> None:
    charge = verify(gateway, wire, **members)
    assert {name: getattr(charge, name) for name in told} == told


@pytest.mark.parametrize(
    "members",
    [
        {"amount": None},
        {"amount": 40333.5},
        {"amount": -1},
        {"amount": True},
        {"amount": "403.33"},
        {"amount": 10**30},  # more than a database holds
        {"id": 10**30},
        {"currency": None},
        {"domain": "live"},
        {"domain": None},
        {"reference": "PG-2"},
        {"reference": None},
    ],
)
def test_a_success_that_cannot_be_read_is_no_answer(
    gateway: paystack.Gateway, wire: Wire, members: dict[str, object]
) -> None:
    with pytest.raises(paystack.Unavailable):
        verify(gateway, wire, **members)


@pytest.mark.parametrize("requested", [40332.5, "403.32", -1, [], {}, True, "40 333"])
def test_a_requested_amount_that_cannot_be_read_never_pays(
    gateway: paystack.Gateway, wire: Wire, requested: object
) -> None:
    try:
        charge = verify(gateway, wire, requested_amount=requested)
    except paystack.Unavailable:
        return
    assert isinstance(charge, money.Charge)
    assert not charge.pays(40333, "NGN")


@pytest.mark.parametrize("member", ["currency", "channel"])
def test_no_charge_holds_what_a_database_cannot_store(gateway: paystack.Gateway, wire: Wire, member: str) -> None:
    try:
        charge = verify(gateway, wire, **{member: "N\x00\ud800"})
    except paystack.Unavailable:
        return
    text = getattr(charge, member)
    assert text is None or text.isprintable()


def test_a_domain_that_is_not_told_is_ours(gateway: paystack.Gateway, wire: Wire) -> None:
    answer = verified()
    del answer["data"]["domain"]
    wire.get(VERIFY, answer=answer)
    assert isinstance(gateway.verify("PG-1", 10), money.Charge)


@pytest.mark.parametrize(
    ("members", "outcome"),
    [
        ({"status": "abandoned"}, paystack.Unpaid(None)),
        ({"status": "failed", "gateway_response": "Insufficient Funds"}, paystack.Unpaid("Insufficient Funds")),
        ({"status": "failed", "gateway_response": " Do not\nhonour\x00"}, paystack.Unpaid("Do not honour")),
        ({"status": "failed", "gateway_response": None}, paystack.Unpaid("Declined")),
        ({"status": "failed", "gateway_response": " "}, paystack.Unpaid("Declined")),
        *(
            ({"status": word}, paystack.UnderWay())
            for word in ("ongoing", "pending", "processing", "queued", "unheard-of", "", None, 1, True, ["success"])
        ),
    ],
)
def test_each_word_for_a_transaction_is_paid_or_unpaid_or_under_way(
    gateway: paystack.Gateway, wire: Wire, members: dict[str, object], outcome: object
) -> None:
    assert verify(gateway, wire, **members) == outcome


@pytest.mark.parametrize("status", [400, 404])
@pytest.mark.parametrize(
    "answer",
    [
        refusal("Transaction reference not found.", "transaction_not_found"),
        refusal("Transaction reference not found"),
        refusal("Nothing there", "transaction_not_found"),
    ],
)
def test_an_unknown_reference_is_not_found(
    gateway: paystack.Gateway, wire: Wire, status: int, answer: dict[str, Any]
) -> None:
    wire.get(VERIFY, answer=answer, status=status)
    assert gateway.verify("PG-1", 10) == paystack.NotFound()


@pytest.mark.parametrize(
    ("status", "answer"),
    [(401, refusal("Invalid key")), (401, refusal("Key not found")), (400, refusal("What?")), (404, refusal("No"))],
)
def test_any_other_4xx_of_verify_is_about_us(
    gateway: paystack.Gateway, wire: Wire, status: int, answer: dict[str, Any]
) -> None:
    wire.get(VERIFY, answer=answer, status=status)
    with pytest.raises(paystack.Misconfigured):
        gateway.verify("PG-1", 10)


@pytest.mark.parametrize("status", [200, 429, 500, 502])
def test_an_answer_without_a_transaction_is_none(gateway: paystack.Gateway, wire: Wire, status: int) -> None:
    wire.get(VERIFY, answer={"status": True, "message": "Verification successful"}, status=status)
    with pytest.raises(paystack.Unavailable):
        gateway.verify("PG-1", 10)


# Lists


def page(wire: Wire, path: str, number: int, rows: list[object]) -> None:
    asked = {"perPage": "100", "page": str(number), "from": "2026-01-31T08:00:00.000Z"}
    wire.get(API + path, answer={"status": True, "data": rows}, asked=asked)


def test_the_list_is_read_page_after_page(gateway: paystack.Gateway, wire: Wire) -> None:
    page(wire, "/transaction", 1, [transaction(reference=f"PG-{number}") for number in range(100)])
    page(wire, "/transaction", 2, [transaction(reference=f"PG-{number}") for number in range(100, 103)])
    charges = list(gateway.transactions(since=MORNING))
    assert [charge.reference for charge in charges] == [f"PG-{number}" for number in range(103)]


def test_the_list_tells_of_charges_of_our_mode_alone(gateway: paystack.Gateway, wire: Wire) -> None:
    rows: list[object] = [
        transaction(reference="paid"),
        transaction(reference="back", status="reversed"),
        transaction(reference="other mode", domain="live"),
        transaction(reference="unpaid", status="abandoned"),
        transaction(reference="declined", status="failed"),
        transaction(reference="under way", status="ongoing"),
        transaction(reference="unreadable", amount=None),
        transaction(reference="last"),
    ]
    page(wire, "/transaction", 1, rows)
    assert [charge.reference for charge in gateway.transactions(since=MORNING)] == ["paid", "back", "last"]


@pytest.mark.parametrize(
    ("status", "answer", "error"),
    [
        (200, {"status": True, "data": None}, paystack.Unavailable),
        (200, {"status": True, "data": {"rows": []}}, paystack.Unavailable),
        (200, {"status": False, "data": []}, paystack.Unavailable),
        (502, {}, paystack.Unavailable),
        (429, {}, paystack.Unavailable),
        (401, refusal("Invalid key"), paystack.Misconfigured),
        (400, refusal("Invalid page"), paystack.Misconfigured),
    ],
)
def test_a_list_that_cannot_be_read_to_its_end_is_no_list(
    gateway: paystack.Gateway,
    wire: Wire,
    status: int,
    answer: dict[str, Any],
    error: type[Exception],
) -> None:
    page(wire, "/transaction", 1, [transaction() for _ in range(100)])
    page_2 = {"perPage": "100", "page": "2", "from": "2026-01-31T08:00:00.000Z"}
    wire.get(f"{API}/transaction", answer=answer, status=status, asked=page_2)
    with pytest.raises(error):
        list(gateway.transactions(since=MORNING))


# Refunds


def refund(**members: object) -> dict[str, Any]:
    return {
        "id": 3018284,
        "transaction": {"id": 4099260516, "reference": "PG-1"},
        "amount": 1000,
        "currency": "NGN",
        "status": "pending",
        "merchant_note": "R-1",
        **members,
    }


def test_a_refund_is_asked_for_by_reference_amount_and_note(gateway: paystack.Gateway, wire: Wire) -> None:
    asked = {"transaction": "PG-1", "amount": 1000, "currency": "NGN", "merchant_note": "R-1"}
    wire.post(f"{API}/refund", answer={"status": True, "data": refund()}, sent=asked)
    assert gateway.refund("PG-1", 1000, "NGN", "R-1") == money.Refund(
        provider_id=3018284,
        charge_reference="PG-1",
        charge_provider_id=4099260516,
        amount_minor=1000,
        currency="NGN",
        status="pending",
        note="R-1",
    )


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refund_that_was_not_taken_is_refused_with_the_reason(
    gateway: paystack.Gateway, wire: Wire, status: int
) -> None:
    wire.post(f"{API}/refund", answer=refusal("Transaction has been fully reversed"), status=status)
    refused = gateway.refund("PG-1", 1000, "NGN", "R-1")
    assert refused == paystack.RefundRefused("Transaction has been fully reversed")


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (200, {"status": "false", "data": refund()}),
        (200, {"status": True, "data": None}),
        (200, {"status": True, "data": refund(id=None)}),
        (200, {"status": True, "data": refund(transaction={"id": 1, "reference": "PG-2"})}),
        (409, refusal("Busy")),
        (429, refusal("Too many requests")),
        (500, refusal("An error occurred")),
        (502, {}),
    ],
)
def test_nobody_knows_of_a_refund_after_any_other_answer(
    gateway: paystack.Gateway, wire: Wire, status: int, answer: dict[str, Any]
) -> None:
    wire.post(f"{API}/refund", answer=answer, status=status)
    with pytest.raises(paystack.Unavailable):
        gateway.refund("PG-1", 1000, "NGN", "R-1")  # once: a second request would be one that is not expected


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"status": "processed"}, {"status": "processed"}),
        ({"status": "needs-attention"}, {"status": "needs-attention"}),
        ({"status": "failed"}, {"status": "failed"}),
        ({"status": "unheard-of"}, {"status": "processing"}),
        ({"transaction": 4099260516}, {"charge_reference": None, "charge_provider_id": 4099260516}),
        ({"transaction": 4099260516, "transaction_reference": "PG-1"}, {"charge_reference": "PG-1"}),
        ({"amount": "1000"}, {"amount_minor": 1000}),
        ({"merchant_note": None}, {"note": None}),
    ],
)
def test_a_refund_is_fetched_as_it_stands(
    gateway: paystack.Gateway, wire: Wire, members: dict[str, object], told: dict[str, object]
) -> None:
    wire.get(f"{API}/refund/3018284", answer={"status": True, "data": refund(**members)})
    fetched = gateway.refund_of_id(3018284)
    assert {name: getattr(fetched, name) for name in told} == told


def test_another_refund_than_the_one_asked_for_is_no_answer(gateway: paystack.Gateway, wire: Wire) -> None:
    wire.get(f"{API}/refund/3018284", answer={"status": True, "data": refund(id=3018285)})
    with pytest.raises(paystack.Unavailable):
        gateway.refund_of_id(3018284)


def test_refunds_are_listed_page_after_page(gateway: paystack.Gateway, wire: Wire) -> None:
    page(wire, "/refund", 1, [refund(id=number) for number in range(100)])
    page(wire, "/refund", 2, [refund(id=100), refund(id=101, domain="live"), refund(id=102, domain="test")])
    assert [each.provider_id for each in gateway.refunds(since=MORNING)] == [*range(101), 102]


def test_a_list_of_refunds_with_a_row_that_cannot_be_read_is_not_complete(
    gateway: paystack.Gateway, wire: Wire
) -> None:
    page(wire, "/refund", 1, [refund(), refund(amount="a lot")])
    with pytest.raises(paystack.Unavailable):
        list(gateway.refunds(since=MORNING))


# Signatures and events


def sign(body: bytes, key: str = SECRET_KEY) -> str:
    return hmac.new(key.encode(), body, hashlib.sha512).hexdigest()


def test_a_signature_is_over_the_raw_body_by_any_of_our_keys() -> None:
    gateway = paystack.Gateway(("sk_test_newer000", SECRET_KEY), API, 10, "test")
    body = b'{"event": "charge.success",  "data": {"amount":\t5000}}\n'
    assert gateway.is_signed(body, sign(body))
    assert gateway.is_signed(body, sign(body, "sk_test_newer000"))
    assert gateway.is_signed(b"", sign(b""))


def test_nothing_else_is_a_signature(gateway: paystack.Gateway) -> None:
    body = b'{"event": "charge.success"}'
    for given in ("", "0" * 128, sign(body)[:-1], sign(body) + "0", f"sha512={sign(body)}", "ü" * 128, "\u20ac"):
        assert not gateway.is_signed(body, given)
    assert not gateway.is_signed(body + b" ", sign(body))
    assert not gateway.is_signed(body, sign(body, "sk_test_another00"))
    assert not gateway.is_signed(body, hmac.new(SECRET_KEY.encode(), body, hashlib.sha256).hexdigest())


def event(name: str = "charge.success", **data: object) -> bytes:
    return json.dumps({"event": name, "data": data}).encode()


def test_a_charge_success_holds_the_charge(gateway: paystack.Gateway, wire: Wire) -> None:
    heard = paystack.read_event(event(**transaction()), "test")
    assert heard is not None
    assert (heard.name, heard.reference, heard.mode) == ("charge.success", "PG-1", "test")
    assert heard.charge == verify(gateway, wire)


@pytest.mark.parametrize(
    ("body", "name", "reference", "mode"),
    [
        (event("refund.processed", transaction_reference="PG-1", domain="live"), "refund.processed", "PG-1", "live"),
        (event("charge.dispute.create", transaction={"reference": "PG-1"}), "charge.dispute.create", "PG-1", None),
        (event("transfer.success", reference="T1"), "transfer.success", "T1", None),
        (event("unheard.of"), "unheard.of", None, None),
        (event("charge.success", reference="PG-1", status="success", amount=None), "charge.success", "PG-1", None),
        (event("charge.success", reference="PG-1", status="failed", amount=1), "charge.success", "PG-1", None),
        (event("charge.success", reference=7, transaction="PG-1"), "charge.success", None, None),
        (event("charge.success", reference="PG-1\x00"), "charge.success", None, None),
    ],
)
def test_any_other_event_holds_none(body: bytes, name: str, reference: str | None, mode: str | None) -> None:
    assert paystack.read_event(body, "test") == paystack.Event(name, reference, mode, None)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"charge.success"',
        b"{}",
        b'{"event": "charge.success"}',
        b'{"event": "charge.success", "data": []}',
        b'{"event": 1, "data": {}}',
        b'{"event": "charge\\u0000", "data": {}}',
        b'{"event": "\\ud800", "data": {}}',
        b'{"event": "' + b"x" * 101 + b'", "data": {}}',
        b"[" * 100_000,
        b'{"event": "charge.success", "data": {"amount": ' + b"9" * 100_000 + b"}}",
        b"\xff\xfe",
        b"event=charge.success",
        event(**transaction()).decode().encode("utf-16"),  # JSON that is exchanged is UTF-8 (RFC 8259)
        event(**transaction(channel="?")).replace(b"?", b"\xed\xa0\x80"),
    ],
)
def test_what_is_no_event_is_none(body: bytes) -> None:
    assert paystack.read_event(body, "test") is None


# The network, over a real socket


def gateway_of(provider: Sandbox, key: str = SECRET_KEY) -> paystack.Gateway:
    return paystack.Gateway((key,), provider.url, 10, "test")


def assert_ends(call: Callable[[], object], *, within_seconds: float) -> None:
    """The call is given up, in time."""
    started = time.monotonic()
    with pytest.raises(paystack.Unavailable):
        call()
    assert time.monotonic() - started < within_seconds


@pytest.mark.parametrize("fault", ["drip", "drip-body", "slow", "time-out", "time-out-before"])
def test_a_call_ends_when_its_time_is_over_whatever_trickles_in(sandbox: Sandbox, fault: str) -> None:
    sandbox.fault("*", fault, times=None, seconds=0.1 if fault.startswith("drip") else 30)
    gateway = gateway_of(sandbox)
    assert_ends(lambda: initialize(gateway, 0.5), within_seconds=5)
    assert_ends(lambda: gateway.verify("PG-1", 0.5), within_seconds=5)


def test_a_byte_that_comes_late_buys_no_more_time(sandbox: Sandbox) -> None:
    sandbox.fault("verify", "drip", seconds=1.8)
    assert_ends(lambda: gateway_of(sandbox).verify("PG-1", 2), within_seconds=3.4)


def test_a_huge_answer_is_not_read_to_its_end(sandbox: Sandbox) -> None:
    size = 1 << 30
    sandbox.fault("verify", "huge", size=size)
    assert_ends(lambda: gateway_of(sandbox).verify("PG-1", 10), within_seconds=5)


@pytest.mark.parametrize("fault", ["lost-request", "lost-answer", "truncated", "garbage", "redirect", "502", "no-data"])
def test_a_broken_answer_is_none_and_spoils_no_later_call(sandbox: Sandbox, fault: str) -> None:
    gateway = gateway_of(sandbox)
    assert isinstance(initialize(gateway), paystack.Opened)
    sandbox.fault("verify", fault)
    with pytest.raises(paystack.Unavailable):
        gateway.verify("PG-1", 5)

    def works() -> bool:
        try:
            return gateway.verify("PG-1", 5) == paystack.Unpaid(None)
        except paystack.Unavailable:  # the connection has been closed a moment after it was kept for the next call
            return False

    wait_until(works)


def test_a_redirect_is_not_followed(sandbox: Sandbox) -> None:
    sandbox.fault("*", "redirect", times=None)
    gateway = gateway_of(sandbox)
    with pytest.raises(paystack.Unavailable):
        initialize(gateway)
    with pytest.raises(paystack.Unavailable):
        gateway.verify("PG-1", 5)
    assert sandbox.calls("elsewhere") == 0


def test_a_server_that_is_not_there_is_no_answer(sandbox: Sandbox) -> None:
    gateway = gateway_of(sandbox)
    sandbox.stop()
    assert_ends(lambda: initialize(gateway), within_seconds=5)


def test_a_wrong_key_is_about_us(sandbox: Sandbox) -> None:
    gateway = gateway_of(sandbox, "sk_test_another00")
    with pytest.raises(paystack.Misconfigured):
        initialize(gateway)
    with pytest.raises(paystack.Misconfigured):
        gateway.verify("PG-1", 5)


def test_neither_netrc_nor_a_proxy_of_the_environment_is_used(
    sandbox: Sandbox,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login shop password hush\ndefault login shop password hush\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody answers there
    assert isinstance(initialize(gateway_of(sandbox)), paystack.Opened)


def test_an_ipv6_address_needs_no_port(wire: Wire) -> None:
    wire.get("https://[::1]/transaction/verify/PG-1", answer=verified())
    assert isinstance(paystack.Gateway((SECRET_KEY,), "https://[::1]", 10, "test").verify("PG-1", 5), money.Charge)


# A certificate for 127.0.0.1 that nobody has signed, and its key, good for nothing but the tests below.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgYJla9cbDiyRbeHvt
msAGCl2krUzrUl3Vczks8GHYLHihRANCAAQnys4gCcpa7BSZ4mt7SR9YRJ/3F8ri
MImSV4XfKdaFm3jflX9tcC4a4m+c1ndgqdq6Xru9AjCuk0kq//EqUt4c
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBmjCCAUGgAwIBAgIUL8xPNSdgMAUmmvPgHjtq1GGLH4EwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyNDIwMTQzNloYDzIxMjYxMDMx
MjAxNDM2WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAQnys4gCcpa7BSZ4mt7SR9YRJ/3F8riMImSV4XfKdaFm3jflX9tcC4a
4m+c1ndgqdq6Xru9AjCuk0kq//EqUt4co28wbTAdBgNVHQ4EFgQUbANhx6L3YTtJ
HAAK8yqrWdT+91UwHwYDVR0jBBgwFoAUbANhx6L3YTtJHAAK8yqrWdT+91UwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDRwAwRAIgFY+3RSrPY39ZxKh6gkwxi6y15wTukzha1cJOM0OmPK4CIFVl
w0IQu2qFXTjXywzSqH3XE/TjGJbwsIdW08kA887O
-----END CERTIFICATE-----
"""
ANSWER = json.dumps(verified()).encode()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(ANSWER)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    path = tmp_path / "certificate.pem"
    path.write_text(CERTIFICATE)
    return path


@contextlib.contextmanager
def server(answers: Sequence[Sequence[bytes]], pause_seconds: float, certificate: Path | None = None) -> Iterator[str]:
    """The URL of a server that answers the first request with the first of `answers` and so on, the last one for ever,
    each in its parts, with pauses after them; after an empty part it closes. Over TLS with a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if certificate is not None:
        context.load_cert_chain(certificate)
    is_over = threading.Event()
    to_come = list(answers)

    def serve(listener: socket.socket) -> None:
        while not is_over.is_set():
            with contextlib.suppress(OSError):  # nobody came, or whoever came went away
                connection, _ = listener.accept()
                connection.settimeout(1)
                with connection if certificate is None else context.wrap_socket(connection, server_side=True) as sock:
                    while sock.recv(65536):
                        parts = to_come.pop(0) if len(to_come) > 1 else to_come[0]
                        for part in parts:
                            sock.sendall(part)
                            is_over.wait(pause_seconds)
                        if not parts[-1]:
                            break

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield f"http{'s' if certificate else ''}://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            is_over.set()
            thread.join()


def tls_server(certificate: Path, pause_seconds: float) -> contextlib.AbstractContextManager[str]:
    """A server that sends a transaction over TLS, a byte at a time with pauses between."""
    return server([[bytes([byte]) for byte in HEAD + ANSWER]], pause_seconds, certificate)


def test_a_call_over_tls_works_and_ends_in_time_too(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("certifi.where", lambda: str(certificate))
    with tls_server(certificate, 0) as url:
        gateway = paystack.Gateway((SECRET_KEY,), url, 10, "test")
        assert isinstance(gateway.verify("PG-1", 5), money.Charge)
    with tls_server(certificate, 0.1) as url:
        gateway = paystack.Gateway((SECRET_KEY,), url, 10, "test")
        assert_ends(lambda: gateway.verify("PG-1", 0.5), within_seconds=5)


def test_a_server_whose_certificate_is_not_trusted_is_told_nothing(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))  # the environment has no say in whom to trust
    with tls_server(certificate, 0) as url:
        gateway = paystack.Gateway((SECRET_KEY,), url, 10, "test")
        assert_ends(lambda: gateway.verify("PG-1", 5), within_seconds=4)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.0 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(ANSWER),
    ],
)
def test_an_answer_that_ends_its_connection_is_read_to_its_end(certificate: Path, head: bytes) -> None:
    """However long after its head its body comes."""
    with server([[head, ANSWER[:9], ANSWER[9:], b""]], 0.05) as url:
        gateway = paystack.Gateway((SECRET_KEY,), url, 10, "test")
        for _ in range(2):
            assert isinstance(gateway.verify("PG-1", 5), money.Charge)


LONG = HEAD.replace(b"%d" % len(ANSWER), b"%d" % (8191 - len(HEAD))) + ANSWER.ljust(8191 - len(HEAD))
"""An answer of 8192 bytes, which is as much as http.client reads at once."""
EARLY = b"HTTP/1.1 103 Early Hints\r\n\r\n"


@pytest.mark.parametrize("early", [b"", EARLY])
def test_what_comes_uncalled_is_no_answer_to_the_next_call(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, early: bytes
) -> None:
    """Of one TLS record a part may be read and the rest be waiting, unseen by who asks the operating system."""
    monkeypatch.setattr("certifi.where", lambda: str(certificate))
    uncalled = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    with server([[early + LONG + uncalled], [HEAD + ANSWER]], 0, certificate) as url:
        gateway = paystack.Gateway((SECRET_KEY,), url, 10, "test")
        with contextlib.suppress(paystack.Unavailable):
            gateway.verify("PG-1", 5)
        assert isinstance(gateway.verify("PG-1", 5), money.Charge)


def test_a_length_that_is_none_is_no_answer() -> None:
    with server([[b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n{}", b""]], 0) as url:
        assert_ends(lambda: paystack.Gateway((SECRET_KEY,), url, 10, "test").verify("PG-1", 5), within_seconds=4)


def test_the_addresses_of_a_host_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead one leaves the next its part of the time, and all of them hold the caller no longer than one."""
    resolve = socket.getaddrinfo

    def of_several(host: str, *rest: Any, **options: Any) -> list[Any]:
        addresses = hosts.get(host, [host])
        return [found for address in addresses for found in resolve(address, *rest, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", of_several)
    hosts = {"one-dead.example": ["127.0.0.2", "127.0.0.1"], "all-dead.example": ["127.0.0.2"] * 6}
    with server([[HEAD + ANSWER]], 0) as url, contextlib.ExitStack() as stack:
        port = int(url.rpartition(":")[2])
        stack.enter_context(socket.create_server(("127.0.0.2", port), backlog=0))
        for _ in range(3):  # more than wait to be accepted: from then on nobody answers there
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.2", port))
        one, none = (
            paystack.Gateway((SECRET_KEY,), f"http://{host}:{port}", 10, "test")
            for host in ("one-dead.example", "all-dead.example")
        )
        assert isinstance(one.verify("PG-1", 2), money.Charge)
        assert_ends(lambda: none.verify("PG-1", 1), within_seconds=3)
