"""What is made of Paystack's lists, and of all that it says of refunds."""
# ruff: noqa: F811  # a fixture bears the name of its import

from datetime import UTC, datetime
from typing import Any

import pytest
from responses import RequestsMock
from responses.matchers import json_params_matcher, query_param_matcher

import money
import paystack
from test_paystack import API, gateway, refusal, transaction, wire  # noqa: F401  # fixtures

MORNING = datetime(2026, 1, 31, 8, 0, tzinfo=UTC)


# Lists


def asked(**place: str) -> list[Any]:
    size = {"perPage": "100", "per_page": "100"}
    return [query_param_matcher({**size, **place, "from": "2026-01-31T08:00:00.000Z"})]


def page(wire: RequestsMock, path: str, number: int, rows: list[Any], **meta: object) -> None:
    wire.get(API + path, json={"status": True, "data": rows, "meta": meta}, match=asked(page=str(number)))


@pytest.mark.parametrize(
    "meta", [{}, {"total": 153}, {"total": "153", "pageCount": 3}, {"pageCount": 3}, {"total": 153, "pageCount": 2}]
)
def test_the_list_is_read_page_after_page(
    gateway: paystack.Gateway, wire: RequestsMock, meta: dict[str, object]
) -> None:
    """Short as a page may be, and whatever its `meta` tells of."""
    sizes = [(0, 100), (100, 150), (150, 153)]
    for number, (first, last) in enumerate(sizes, 1):
        page(wire, "/transaction", number, transactions(first, last), **meta)
    if not meta:
        page(wire, "/transaction", 4, [])
    assert references(gateway) == [f"PG-{number}" for number in range(153)]


def transactions(first: int, last: int) -> list[dict[str, Any]]:
    return [transaction(reference=f"PG-{number}") for number in range(first, last)]


def references(gateway: paystack.Gateway) -> list[str | None]:
    listed = gateway.transactions(since=MORNING)
    return [each.reference if isinstance(each, money.Charge) else None for each in listed]


def test_a_list_is_read_by_its_cursor_where_it_gives_one(gateway: paystack.Gateway, wire: RequestsMock) -> None:
    page(wire, "/transaction", 1, transactions(0, 3), next="dW5k+Zg=", previous=None)
    last = {"status": True, "data": transactions(3, 5), "meta": {"next": None, "previous": "x"}}
    wire.get(f"{API}/transaction", json=last, match=asked(use_cursor="true", next="dW5k+Zg="))
    assert references(gateway) == [f"PG-{number}" for number in range(5)]


def test_rows_that_come_on_top_meanwhile_hide_none_of_the_others(gateway: paystack.Gateway, wire: RequestsMock) -> None:
    page(wire, "/transaction", 1, transactions(2, 5), total=5, pageCount=2)
    page(wire, "/transaction", 2, transactions(3, 6), total=7, pageCount=3)  # two new ones moved the others on
    page(wire, "/transaction", 3, transactions(6, 7), total=7, pageCount=3)
    assert set(references(gateway)) >= {f"PG-{number}" for number in range(2, 7)}


@pytest.mark.parametrize(
    ("second", "meta"),
    [
        ([], {"total": 4}),
        ([], {"total": 4, "pageCount": 2}),
        (transactions(0, 3), {"total": 6}),
        (transactions(0, 3), {}),
    ],
)
def test_a_list_that_ends_before_its_total_or_repeats_itself_is_no_list(
    gateway: paystack.Gateway, wire: RequestsMock, second: list[object], meta: dict[str, Any]
) -> None:
    page(wire, "/transaction", 1, transactions(0, 3), **meta)
    page(wire, "/transaction", 2, second, **meta)
    with pytest.raises(paystack.Unavailable):
        references(gateway)


def test_a_page_may_be_large(gateway: paystack.Gateway, wire: RequestsMock) -> None:
    rows = [row | {"metadata": {"all": "x" * 45_000}} for row in transactions(0, 100)]
    page(wire, "/transaction", 1, rows, total=100)
    assert len(references(gateway)) == 100


@pytest.mark.usefixtures("elsewhere")
def test_the_list_tells_of_charges_of_our_mode_alone(gateway: paystack.Gateway, wire: RequestsMock) -> None:
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
    page(wire, "/transaction", 1, rows, total=8)
    assert references(gateway) == ["paid", "back", None, "last"]


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
    wire: RequestsMock,
    status: int,
    answer: dict[str, Any],
    error: type[Exception],
) -> None:
    page(wire, "/transaction", 1, [transaction() for _ in range(100)])
    wire.get(f"{API}/transaction", json=answer, status=status, match=asked(page="2"))
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


def test_a_refund_is_asked_for_by_reference_amount_and_note(gateway: paystack.Gateway, wire: RequestsMock) -> None:
    asked = {"transaction": "PG-1", "amount": 1000, "currency": "NGN", "merchant_note": "R-1"}
    wire.post(f"{API}/refund", json={"status": True, "data": refund()}, match=[json_params_matcher(asked)])
    assert gateway.refund("PG-1", 1000, "NGN", "R-1", 5) == money.Refund(
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
    gateway: paystack.Gateway, wire: RequestsMock, status: int
) -> None:
    wire.post(f"{API}/refund", json=refusal("Transaction has been fully reversed"), status=status)
    refused = gateway.refund("PG-1", 1000, "NGN", "R-1", 5)
    assert refused == paystack.Refused("refund", "Transaction has been fully reversed")


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
    gateway: paystack.Gateway, wire: RequestsMock, status: int, answer: dict[str, Any]
) -> None:
    wire.post(f"{API}/refund", json=answer, status=status)
    with pytest.raises(paystack.Unavailable):
        gateway.refund("PG-1", 1000, "NGN", "R-1", 5)
    assert len(wire.calls) == 1


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
    gateway: paystack.Gateway, wire: RequestsMock, members: dict[str, object], told: dict[str, object]
) -> None:
    wire.get(f"{API}/refund/3018284", json={"status": True, "data": refund(**members)})
    fetched = gateway.refund_of_id(3018284)
    assert {name: getattr(fetched, name) for name in told} == told


def test_another_refund_than_the_one_asked_for_is_no_answer(gateway: paystack.Gateway, wire: RequestsMock) -> None:
    wire.get(f"{API}/refund/3018284", json={"status": True, "data": refund(id=3018285)})
    with pytest.raises(paystack.Unavailable):
        gateway.refund_of_id(3018284)


def test_refunds_are_listed_page_after_page(gateway: paystack.Gateway, wire: RequestsMock) -> None:
    page(wire, "/refund", 1, [refund(id=number) for number in range(100)], total=103)
    last = [refund(id=100), refund(id=101, domain="live"), refund(id=102, domain="test")]
    page(wire, "/refund", 2, last, total=103)
    listed = [each for each in gateway.refunds(since=MORNING) if isinstance(each, money.Refund)]
    assert [each.provider_id for each in listed] == [*range(101), 102]


def test_a_refund_that_cannot_be_read_says_what_charge_it_is_of(gateway: paystack.Gateway, wire: RequestsMock) -> None:
    page(wire, "/refund", 1, [refund(amount="a lot"), refund(id=2)], total=2)
    first, second = gateway.refunds(since=MORNING)
    assert first == paystack.Unreadable("PG-1", 4099260516, "R-1")
    assert isinstance(second, money.Refund)


WIDE = 2**64 - 1


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"id": WIDE}, {"provider_id": WIDE}),
        ({"id": str(WIDE)}, {"provider_id": WIDE}),
        ({"transaction": {"id": WIDE, "reference": "PG-1"}}, {"charge_reference": "PG-1", "charge_provider_id": None}),
        ({"transaction": {"id": 2**63 - 1}}, {"charge_provider_id": 2**63 - 1}),
        ({"merchant_note": "it\x00 broke\nin two"}, {"note": "it broke in two"}),
        ({"transaction_reference": "PG-1\ud800"}, {"charge_reference": "PG-1"}),
        ({"transaction": {"id": 7, "reference": ""}}, {"charge_reference": None, "charge_provider_id": 7}),
    ],
)
def test_of_a_refund_only_what_a_column_takes_is_kept(members: dict[str, object], told: dict[str, object]) -> None:
    read = paystack.read_refund(refund(**members))
    assert {name: getattr(read, name) for name in told} == told


@pytest.mark.parametrize(
    "members", [{"id": WIDE + 1}, {"id": -1}, {"amount": 2**63}, {"amount": 10.5}, {"status": None}]
)
def test_a_refund_without_what_is_needed_cannot_be_read(members: dict[str, object]) -> None:
    with pytest.raises(paystack.Unavailable):
        paystack.read_refund(refund(**members))
