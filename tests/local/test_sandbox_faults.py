# ruff: noqa: F811  (fixtures are imported by their names)
"""Each fault and each customer of the sandbox does what the help says, over a real socket."""

import json
import socket
import time
from collections.abc import Callable

import pytest
import requests

from local.sandbox import Sandbox, SandboxError, fees
from sandbox_client import (  # noqa: F401
    KEY,
    PAID,
    Json,
    Shop,
    call,
    initialize,
    paid,
    refund,
    sandbox,
    shop,
    told,
    verified,
    without_a_proxy,
)

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
        ("wide-metadata", {"metadata": {"order": "A1", "wide": 12345678901234567890123}}),
        ("null-fees", {"fees": 17500}),
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


def test_ids_may_need_more_than_63_bits(sandbox: Sandbox) -> None:
    paid(sandbox, email="wide-id@example.com")
    made, dispute = refund(sandbox, amount=1000).json()["data"], sandbox.dispute("PG-1")
    charge = verified(sandbox)
    assert min(charge["id"], made["id"], dispute["id"]) >= 2**63
    assert call(sandbox, "GET", f"/transaction/{charge['id']}").json()["data"]["reference"] == "PG-1"
    assert call(sandbox, "GET", f"/refund/{made['id']}").json()["data"]["transaction"] == charge["id"]
    assert call(sandbox, "GET", f"/dispute/{dispute['id']}").json()["data"]["transaction"]["id"] == charge["id"]
    paid(sandbox, "PG-2")
    assert verified(sandbox, "PG-2")["id"] < 2**63


def test_the_fees_may_be_unknown_when_the_event_comes(told: Sandbox, shop: Shop) -> None:
    paid(told, email="null-fees@example.com")
    shop.heard(1)
    assert shop.events[0]["data"]["fees"] is None
    assert json.loads(told.event("PG-1")[0])["data"]["fees"] is None
    assert verified(told)["fees"] == 17500
    assert call(told, "GET", "/transaction").json()["data"][0]["fees"] == 17500


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
    told.charge_elsewhere("T1", metadata={"cart": "a" * 300_000})
    listed = call(told, "GET", "/transaction").json()["data"]
    assert [len(str(row["metadata"])) > 300_000 for row in listed] == [True, False]


def test_a_chargeback_reverses_without_a_refund_or_an_event(told: Sandbox, shop: Shop) -> None:
    initialize(told)
    with pytest.raises(SandboxError, match="PG-1 is not paid"):
        told.reverse("PG-1")
    told.pay("PG-1")
    told.reverse("PG-1")
    assert (verified(told)["status"], verified(told)["amount"]) == ("reversed", 500000)
    assert call(told, "GET", "/transaction?status=reversed").json()["meta"]["total"] == 1
    assert refund(told).json()["code"] == "transaction_reversed"
    assert call(told, "GET", "/refund").json()["data"] == []
    assert [delivery["event"] for delivery in told.deliveries()] == ["charge.success"]


def test_another_shops_refund_is_in_the_list_without_an_amount(sandbox: Sandbox) -> None:
    paid(sandbox)
    sandbox.foreign_refund(without=["transaction_reference"], merchant_note="PG-1 ours?")
    [row] = call(sandbox, "GET", "/refund").json()["data"]
    assert (row["amount"], row["merchant_note"], "transaction_reference" in row) == (None, "PG-1 ours?", False)
    assert row["transaction"] not in (verified(sandbox)["id"], None)
    assert call(sandbox, "GET", f"/refund/{row['id']}").json()["data"]["amount"] is None


def test_what_answers_show_of_a_refund_can_be_altered(sandbox: Sandbox) -> None:
    paid(sandbox)
    made = refund(sandbox, merchant_note="ours").json()["data"]
    sandbox.alter_refund("PG-1", ["transaction_reference"], merchant_note="another's")
    [row] = call(sandbox, "GET", "/refund").json()["data"]
    assert (row["id"], row["transaction"], row["merchant_note"]) == (made["id"], verified(sandbox)["id"], "another's")
    assert "transaction_reference" not in row


@pytest.mark.parametrize("amount", [5000, 246000, 249999, 250000, 1_000_000, 99_999_999])
@pytest.mark.parametrize("currency", list(fees.CURRENCIES))
def test_fees_borne_by_the_customer_leave_the_price(currency: str, amount: int) -> None:
    total = fees.with_fees(currency, amount)
    assert total - fees.fee(currency, total) == amount
