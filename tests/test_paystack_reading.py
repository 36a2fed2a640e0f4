"""Numbers that no column takes: those that nobody needs are not looked at, the others are not guessed."""

# ruff: noqa: F811  # a fixture bears the name of its import

import json
from dataclasses import replace
from typing import Any

import pytest
from responses import RequestsMock

import money
import paystack
from test_paystack import (  # noqa: F401  # fixtures
    API,
    INITIALIZE,
    VERIFY,
    event,
    gateway,
    initialize,
    opened,
    transaction,
    wire,
)
from test_paystack_lists import refund

WIDE, DIGITS = 2**64 - 1, 10**23


def heard(**members: object) -> money.Charge | None:
    read = paystack.read_event(event(**transaction(**members)), "test")
    assert read is not None
    return read.charge


@pytest.mark.parametrize(
    "members",
    [
        {"metadata": {"user": 1234567890123456789}},
        {"metadata": {"users": [DIGITS, -DIGITS, 1.5e300]}},
        {"metadata": {"all": int("9" * 4000)}},
        {"order_id": DIGITS, "customer": {"id": WIDE}, "log": {"start_time": DIGITS}},
    ],
)
def test_a_number_that_nobody_needs_hides_no_money(members: dict[str, object]) -> None:
    assert heard(**members) == heard()


def test_a_number_of_more_digits_than_python_takes_hides_no_money() -> None:
    body = event(**transaction(metadata="DIGITS")).replace(b'"DIGITS"', b"9" * 100_000)
    read = paystack.read_event(body, "test")
    assert read is not None and read.charge == heard()


@pytest.mark.parametrize("provider_id", [WIDE, DIGITS, 2**63, -1, 1.5, "4099260516x"])
def test_an_id_that_no_column_takes_is_left_out(provider_id: object) -> None:
    charge = heard(id=provider_id)
    assert charge is not None and charge.provider_id is None


def test_the_largest_id_that_a_column_takes_is_kept() -> None:
    charge = heard(id=2**63 - 1)
    assert charge is not None and charge.provider_id == 2**63 - 1


@pytest.mark.parametrize("name", ["amount", "requested_amount"])
@pytest.mark.parametrize("value", [2**63, WIDE, DIGITS, str(DIGITS), -5, 50.5, True, "5 0", "٥٠"])
def test_a_sum_that_is_no_sum_is_not_guessed(name: str, value: object) -> None:
    assert heard(**{name: value}) is None


@pytest.mark.parametrize("value", [WIDE, DIGITS, None, "much"])
def test_fees_that_are_no_sum_are_unknown(value: object) -> None:
    charge = heard(fees=value)
    assert charge is not None and charge.fees_minor is None


def test_a_reference_that_no_column_takes_names_no_charge() -> None:
    assert heard(reference="PG-1\x00") is None


def test_an_event_of_a_refund_says_which_it_is_as_far_as_it_knows() -> None:
    def told(**members: Any) -> tuple[int | None, int | None]:
        body = json.dumps({"event": "refund.processed", "data": {"transaction_reference": "PG-1", **members}}).encode()
        read = paystack.read_event(body, "test")
        assert read is not None
        return read.refund_id, read.refund_minor

    assert told(id=WIDE, amount="5000") == (WIDE, 5000)
    assert told(refund_reference=None, amount=5000) == (None, 5000)
    assert told(id=DIGITS, amount=None) == (None, None)


# What Paystack may leave out


def lacking(members: dict[str, Any], name: str) -> dict[str, Any]:
    return {each: value for each, value in members.items() if each != name}


@pytest.mark.parametrize("name", ["id", "amount", "currency", "status"])
def test_a_refund_that_leaves_out_what_is_needed_cannot_be_read(name: str) -> None:
    with pytest.raises(paystack.Unavailable):
        paystack.read_refund(lacking(refund(), name))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("transaction", {"charge_reference": None, "charge_provider_id": None}),
        ("merchant_note", {"note": None}),
    ],
)
def test_what_a_refund_leaves_out_is_not_known(name: str, told: dict[str, Any]) -> None:
    assert paystack.read_refund(lacking(refund(), name)) == replace(paystack.read_refund(refund()), **told)


@pytest.mark.parametrize("name", ["reference", "amount", "currency"])
def test_money_that_leaves_out_what_is_needed_cannot_be_read(name: str) -> None:
    with pytest.raises(paystack.Unavailable):
        paystack.read_transaction(lacking(transaction(), name), "test")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("id", {"provider_id": None}),
        ("requested_amount", {"requested_minor": None}),
        ("fees", {"fees_minor": None}),
        ("channel", {"channel": None}),
        ("paid_at", {"paid_at": None}),
    ],
)
def test_what_a_charge_leaves_out_is_not_known(name: str, told: dict[str, Any]) -> None:
    members = {**transaction(), "created_at": "2026-01-31T09:00:00.000Z"}
    whole = paystack.read_transaction(members, "test")
    assert isinstance(whole, money.Charge)
    assert paystack.read_transaction(lacking(members, name), "test") == replace(whole, **told)


def test_a_transaction_that_leaves_out_its_status_is_under_way() -> None:
    told = paystack.read_transaction(lacking(transaction(), "status"), "test")
    assert isinstance(told, paystack.UnderWay)


def test_a_declined_try_that_leaves_out_its_reason_was_declined() -> None:
    declined = lacking(transaction(status="failed"), "gateway_response")
    assert paystack.read_transaction(declined, "test") == paystack.Unpaid("Declined")


def told(name: str, **data: Any) -> paystack.Event:
    read = paystack.read_event(json.dumps({"event": name, "data": data}).encode(), "test")
    assert read is not None
    return read


def test_what_an_event_leaves_out_is_not_known() -> None:
    refunded = told("refund.processed", transaction_reference="PG-1")
    assert (refunded.mode, refunded.refund_id, refunded.refund_minor) == (None, None, None)
    resolved = told("charge.dispute.resolve", transaction={"reference": "PG-1"})
    assert (resolved.reference, resolved.dispute, resolved.is_won) == ("PG-1", "", False)
    assert told("charge.success", reference="PG-1", domain="test").charge is None


def test_an_answer_that_leaves_out_its_reference_is_none(gateway: paystack.Gateway, wire: RequestsMock) -> None:
    wire.get(VERIFY, json={"status": True, "data": lacking(transaction(status="abandoned"), "reference")})
    wire.post(INITIALIZE, json={"status": True, "data": lacking(opened()["data"], "reference")})
    with pytest.raises(paystack.Unavailable):
        gateway.verify("PG-1", 10)
    with pytest.raises(paystack.Unavailable):
        initialize(gateway)


def test_an_answer_to_a_refund_that_leaves_out_its_charge_is_believed(
    gateway: paystack.Gateway, wire: RequestsMock
) -> None:
    wire.post(f"{API}/refund", json={"status": True, "data": lacking(refund(), "transaction")})
    made = gateway.refund("PG-1", 1000, "NGN", "R-1", 5)
    assert isinstance(made, money.Refund) and made.charge_reference is None


def test_an_error_that_leaves_out_its_words_is_about_us(gateway: paystack.Gateway, wire: RequestsMock) -> None:
    wire.get(VERIFY, json={"status": False}, status=404)
    with pytest.raises(paystack.Misconfigured):
        gateway.verify("PG-1", 10)


def test_an_answer_that_leaves_out_the_session_timeout_says_nothing_of_it(
    gateway: paystack.Gateway, wire: RequestsMock
) -> None:
    wire.get(f"{API}/integration/payment_session_timeout", json={"status": True, "data": {}})
    assert gateway.session_timeout() == (None, None)
