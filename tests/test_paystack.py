"""What is asked of Paystack, to the letter, and what is made of each of its answers."""
# ruff: noqa: F811  # a fixture bears the name of its import

import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from responses import RequestsMock
from responses.matchers import header_matcher, json_params_matcher

import db
import money
import paystack
from local.sandbox import Sandbox
from shop import SECRET_KEY, sandbox, wait_until  # noqa: F401  # a fixture

API = "https://api.paystack.co"
INITIALIZE, VERIFY = f"{API}/transaction/initialize", f"{API}/transaction/verify/PG-1"
CHECKOUT = "https://checkout.paystack.com/3ni8kdavz62431k"


@pytest.fixture
def gateway() -> paystack.Gateway:
    return paystack.Gateway((SECRET_KEY,), API, 10, "test")


@pytest.fixture
def wire() -> Iterator[RequestsMock]:
    """Paystack's answers. A request that is not expected is an error, and so is one that does not come."""
    with RequestsMock() as wire:
        yield wire


def initialize(gateway: paystack.Gateway, within_seconds: float = 10) -> object:
    known: dict[str, Any] = {"customer_email": "john@example.com", "amount_minor": 5000, "currency": "NGN"}
    payment = db.Payment(**{**dict.fromkeys(db.PAYMENT_COLUMNS), "id": "PAY-1", **known})
    return gateway.initialize(payment, "PG-1", "https://pay.example.com/pay/PAY-1", within_seconds)


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


def test_initialize_asks_what_paystack_documents(gateway: paystack.Gateway, wire: RequestsMock) -> None:
    asked = {
        "reference": "PG-1",
        "email": "john@example.com",
        "amount": 5000,
        "currency": "NGN",
        "callback_url": "https://pay.example.com/pay/PAY-1",
        "metadata": {"payment": "PAY-1", "cancel_action": "https://pay.example.com/pay/PAY-1"},
    }
    headers = {"Authorization": f"Bearer {SECRET_KEY}", "Content-Type": "application/json"}
    wire.post(INITIALIZE, json=opened(), match=[json_params_matcher(asked), header_matcher(headers)])
    assert initialize(gateway) == paystack.Opened(CHECKOUT)


def test_of_two_keys_the_first_calls(wire: RequestsMock) -> None:
    wire.post(INITIALIZE, json=opened(), match=[header_matcher({"Authorization": "Bearer sk_test_newer000"})])
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
    gateway: paystack.Gateway, wire: RequestsMock, url: object
) -> None:
    wire.post(INITIALIZE, json=opened(authorization_url=url))
    with pytest.raises(paystack.Unavailable):
        initialize(gateway)


def test_what_stands_in_for_paystack_may_have_its_own_checkout(wire: RequestsMock) -> None:
    gateway = paystack.Gateway((SECRET_KEY,), "http://127.0.0.1:8010", 10, "test")
    wire.post("http://127.0.0.1:8010/transaction/initialize", json=opened(authorization_url="http://127.0.0.1:8010/c"))
    assert initialize(gateway) == paystack.Opened("http://127.0.0.1:8010/c")
    wire.post("http://127.0.0.1:8010/transaction/initialize", json=opened(authorization_url="http://127.0.0.1:8011/c"))
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
    gateway: paystack.Gateway, wire: RequestsMock, answer: dict[str, Any]
) -> None:
    wire.post(INITIALIZE, json=answer, status=400)
    assert isinstance(initialize(gateway), paystack.Duplicate)


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
    gateway: paystack.Gateway, wire: RequestsMock, answer: dict[str, Any], field: str
) -> None:
    wire.post(INITIALIZE, json=answer, status=400)
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
def test_any_other_4xx_is_about_us(
    gateway: paystack.Gateway, wire: RequestsMock, status: int, answer: dict[str, Any]
) -> None:
    wire.post(INITIALIZE, json=answer, status=status)
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
def test_any_other_answer_is_none(
    gateway: paystack.Gateway, wire: RequestsMock, status: int, body: str | bytes
) -> None:
    wire.post(INITIALIZE, body=body, status=status)
    with pytest.raises(paystack.Unavailable) as unknown:
        initialize(gateway)
    assert unknown.value.retry_after_seconds is None


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "0"}, 1),
        ({}, 1),
        ({"Retry-After": "Fri, 31 Dec 2027 23:59:59 GMT"}, 1),
        ({"Retry-After": ""}, 1),
    ],
)
def test_a_429_says_how_long_to_wait(
    gateway: paystack.Gateway, wire: RequestsMock, headers: dict[str, str], seconds: float
) -> None:
    wire.post(INITIALIZE, json=refusal("Too many requests"), status=429, headers=headers)
    with pytest.raises(paystack.Unavailable) as unknown:
        initialize(gateway)
    assert unknown.value.retry_after_seconds is not None
    assert unknown.value.retry_after_seconds == seconds


def test_a_reason_is_one_short_line(gateway: paystack.Gateway, wire: RequestsMock) -> None:
    wire.post(INITIALIZE, json=refusal("Invalid\r\n email\x00\u202e " + "x" * 1000), status=400)
    refused = initialize(gateway)
    assert isinstance(refused, paystack.Refused)
    assert refused.reason.startswith("Invalid email x")
    assert refused.reason.isprintable()
    assert len(refused.reason) <= 200


# verify


def verify(gateway: paystack.Gateway, wire: RequestsMock, **members: object) -> object:
    wire.get(VERIFY, json=verified(**members))
    return gateway.verify("PG-1", 10)


@pytest.mark.usefixtures("elsewhere")
def test_a_success_is_a_charge_with_all_that_is_told_of_it(gateway: paystack.Gateway, wire: RequestsMock) -> None:
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
def test_a_reversal_says_that_money_came(gateway: paystack.Gateway, wire: RequestsMock, word: str) -> None:
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
@pytest.mark.usefixtures("elsewhere")
def test_what_is_missing_or_cannot_be_read_in_a_charge_is_not_known(
    gateway: paystack.Gateway, wire: RequestsMock, members: dict[str, object], told: dict[str, object]
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
        {"currency": None},
        {"domain": "live"},
        {"domain": None},
        {"reference": "PG-2"},
        {"reference": None},
    ],
)
def test_a_success_that_cannot_be_read_is_no_answer(
    gateway: paystack.Gateway, wire: RequestsMock, members: dict[str, object]
) -> None:
    with pytest.raises(paystack.Unavailable):
        verify(gateway, wire, **members)


@pytest.mark.parametrize("requested", [40332.5, "403.32", -1, [], {}, True, "40 333"])
def test_a_requested_amount_that_cannot_be_read_never_pays(
    gateway: paystack.Gateway, wire: RequestsMock, requested: object
) -> None:
    try:
        charge = verify(gateway, wire, requested_amount=requested)
    except paystack.Unavailable:
        return
    assert isinstance(charge, money.Charge)
    assert not charge.pays(40333, "NGN")


@pytest.mark.parametrize("member", ["currency", "channel"])
def test_no_charge_holds_what_a_database_cannot_store(
    gateway: paystack.Gateway, wire: RequestsMock, member: str
) -> None:
    try:
        charge = verify(gateway, wire, **{member: "N\x00\ud800"})
    except paystack.Unavailable:
        return
    text = getattr(charge, member)
    assert text is None or text.isprintable()


def test_a_domain_that_is_not_told_is_ours(gateway: paystack.Gateway, wire: RequestsMock) -> None:
    answer = verified()
    del answer["data"]["domain"]
    wire.get(VERIFY, json=answer)
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
    gateway: paystack.Gateway, wire: RequestsMock, members: dict[str, object], outcome: object
) -> None:
    told = verify(gateway, wire, **members)
    assert (type(told), vars(told)) == (type(outcome), vars(outcome))


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
    gateway: paystack.Gateway, wire: RequestsMock, status: int, answer: dict[str, Any]
) -> None:
    wire.get(VERIFY, json=answer, status=status)
    assert isinstance(gateway.verify("PG-1", 10), paystack.NotFound)


@pytest.mark.parametrize(
    ("status", "answer"),
    [(401, refusal("Invalid key")), (401, refusal("Key not found")), (400, refusal("What?")), (404, refusal("No"))],
)
def test_any_other_4xx_of_verify_is_about_us(
    gateway: paystack.Gateway, wire: RequestsMock, status: int, answer: dict[str, Any]
) -> None:
    wire.get(VERIFY, json=answer, status=status)
    with pytest.raises(paystack.Misconfigured):
        gateway.verify("PG-1", 10)


@pytest.mark.parametrize("status", [200, 429, 500, 502])
def test_an_answer_without_a_transaction_is_none(gateway: paystack.Gateway, wire: RequestsMock, status: int) -> None:
    wire.get(VERIFY, json={"status": True, "message": "Verification successful"}, status=status)
    with pytest.raises(paystack.Unavailable):
        gateway.verify("PG-1", 10)


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


def test_a_charge_success_holds_the_charge(gateway: paystack.Gateway, wire: RequestsMock) -> None:
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
        b"\xff\xfe",
        b"event=charge.success",
        event(**transaction()).decode().encode("utf-16"),  # JSON that is exchanged is UTF-8 (RFC 8259)
        event(**transaction(channel="?")).replace(b"?", b"\xed\xa0\x80"),
    ],
)
def test_what_is_no_event_is_none(body: bytes) -> None:
    assert paystack.read_event(body, "test") is None


# The network, over a real socket; see test_calls.py for the calls themselves


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
