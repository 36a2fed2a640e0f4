# ruff: noqa: F811  (fixtures are imported by their names)
"""What becomes of money that comes."""

from typing import Any

import pytest

import charges
import db
import money
import refunds
from backstage import (
    age,
    incidents,
    lose_all_rows,
    poll,
    refuse_charges,
    second_of_two,
    slow_process,
    worker_of,
)
from invariants import check_books, only_payment
from shop import Shop, open_shop, sandbox, shop  # noqa: F401  # fixtures
from till import Till, open_till, till  # noqa: F401  # fixtures


def two_references(shop: Shop) -> tuple[str, str]:
    """A payment of which a first answer was lost: both its transactions can be paid."""
    shop.sandbox.fault("initialize", "lost-answer")
    second = shop.created(key="one")["reference"]
    return second.removesuffix("-2"), second


@pytest.mark.parametrize("customer", ["john", "overpaid", "pays-fees", "no-requested-amount", "metadata-string"])
def test_a_payment_paid_in_full_is_completed(shop: Shop, customer: str) -> None:
    payment = shop.created(customer_email=f"{customer}@example.com")
    shop.pay(payment["reference"])
    told = shop.get(payment["id"])
    assert (told["status"], told["checkout_url"], told["amount"]) == ("completed", None, 50.0)
    assert told["paid_at"] is not None
    row = only_payment(shop)
    assert (row["charged_minor"] > 5000) == (customer in ("overpaid", "pays-fees"))
    assert incidents(shop) == []


@pytest.mark.parametrize(
    ("customer", "altered"),
    [
        ("underpaid", {}),
        ("other-currency", {}),
        ("john", {"requested_amount": 4000, "amount": 4000}),
        ("john", {"requested_amount": 6000, "amount": 6000}),
        ("no-requested-amount", {"amount": 4999}),
    ],
)
def test_money_that_differs_from_the_price_is_put_before_a_person(
    shop: Shop, customer: str, altered: dict[str, Any]
) -> None:
    payment = shop.created(customer_email=f"{customer}@example.com")
    shop.sandbox.pay(payment["reference"])
    shop.sandbox.alter(payment["reference"], **altered)
    for _ in range(2):
        assert shop.deliver(payment["reference"]).status_code == 200
        told = shop.get(payment["id"])
        assert (told["status"], told["paid_at"]) == ("review", None)
        assert "the price is NGN 50.00" in told["status_reason"]
    assert incidents(shop) == [("mismatch", payment["reference"])]
    poll(shop)
    assert only_payment(shop)["status"] == "review"


@pytest.mark.parametrize(
    ("customer", "altered", "told"),
    [
        ("underpaid", {}, "paid NGN 49.00, asked at NGN 50.00"),
        ("no-requested-amount", {"amount": 4999}, "paid NGN 49.99, asked at NGN 50.00"),
        ("john", {"requested_amount": 4000, "amount": 3900}, "paid NGN 39.00, asked at NGN 40.00"),
        ("other-currency", {}, "paid GHS 50.00, asked at GHS 50.00"),
    ],
)
def test_who_reviews_reads_what_was_paid_what_was_asked_and_the_price(
    shop: Shop, customer: str, altered: dict[str, Any], told: str
) -> None:
    payment = shop.created(customer_email=f"{customer}@example.com")
    shop.sandbox.pay(payment["reference"])
    shop.sandbox.alter(payment["reference"], **altered)
    shop.deliver(payment["reference"])
    assert shop.get(payment["id"])["status_reason"] == f"{told}, the price is NGN 50.00"


def test_an_event_of_the_other_mode_is_stored_and_not_applied(shop: Shop) -> None:
    payment = shop.created(customer_email="live-domain@example.com")
    shop.pay(payment["reference"])
    poll(shop)
    assert only_payment(shop)["status"] == "pending"
    assert shop.sql("SELECT outcome, body IS NULL AS bare FROM provider_events") == [
        {"outcome": "other_mode", "bare": False}
    ]
    assert shop.sql("SELECT * FROM charges") == []


@pytest.mark.parametrize("first", [0, 1])
def test_a_second_charge_opens_an_incident_and_changes_nothing_else(shop: Shop, first: int) -> None:
    both = two_references(shop)
    own, other = both[first], both[1 - first]
    shop.pay(own)
    before = only_payment(shop)
    shop.pay(other)
    shop.deliver(other)
    shop.deliver(own)
    assert only_payment(shop) == before
    assert before["charge_reference"] == own
    assert incidents(shop) == [("second_charge", other)]
    assert len(shop.sql("SELECT * FROM charges")) == 2


def test_a_whole_second_charge_does_not_complete_a_payment_under_review(shop: Shop) -> None:
    first, second = two_references(shop)
    shop.pay(first, amount=4000)
    shop.pay(second)
    assert only_payment(shop)["status"] == "review"
    assert incidents(shop) == [("mismatch", first), ("second_charge", second)]


@pytest.mark.parametrize("ended", ["failed", "expired"])
def test_money_that_comes_late_counts(shop: Shop, ended: str) -> None:
    payment = shop.created()
    if ended == "failed":
        shop.sandbox.decline(payment["reference"])
    age(shop.database_url, None, 25 * 3600)
    poll(shop)
    assert shop.get(payment["id"])["status"] == ended
    shop.pay(payment["reference"])
    told = shop.get(payment["id"])
    assert (told["status"], told["status_reason"]) == ("completed", None)
    only_payment(shop)


@pytest.mark.parametrize("word", ["reversed", "reversal pending"])
def test_reversed_means_that_money_came(shop: Shop, word: str) -> None:
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    shop.sandbox.alter(payment["reference"], status=word)
    poll(shop)
    assert only_payment(shop)["status"] == "completed"


def test_an_event_of_money_that_cannot_be_read_makes_us_ask_at_once(shop: Shop) -> None:
    payment, other = shop.created(), shop.created()
    shop.sandbox.pay(payment["reference"])
    shop.sandbox.pay(other["reference"])
    shop.sql("UPDATE payments SET poll_at = now() + interval '1 day'")
    assert shop.deliver(payment["reference"], amount="much").status_code == 200
    worker_of(shop).poll()
    assert [shop.get(each["id"])["status"] for each in (payment, other)] == ["completed", "pending"]
    before = check_books(shop.database_url)
    shop.deliver(payment["reference"], amount="more")
    worker_of(shop).poll()
    looks = {"poll_at": None, "polled_at": None, "poll_leased_until": None}
    assert [{**row, **looks} for row in check_books(shop.database_url)] == [{**row, **looks} for row in before]


def test_money_for_a_reference_of_ours_that_nobody_knows_is_an_incident(shop: Shop) -> None:
    lost = "PG-0123456789ABCDEFGHJKMNPQRS"
    for reference in (lost, f"{lost}-3"):
        shop.sandbox.charge_elsewhere(reference)
        for _ in range(2):
            assert shop.deliver(reference).status_code == 200
    assert incidents(shop) == [("unknown_reference", lost), ("unknown_reference", f"{lost}-3")]
    assert shop.sql("SELECT DISTINCT outcome, deliveries FROM provider_events") == [
        {"outcome": "noted", "deliveries": 2}
    ]


def test_an_event_that_came_before_its_payment_was_known_is_applied_when_it_comes_again(shop: Shop) -> None:
    """Seen is not handled: the rows were lost, the event came, and then the customer's shop tried again."""
    reference = shop.created(key="one")["reference"]
    lose_all_rows(shop)
    shop.sandbox.pay(reference)
    assert shop.deliver(reference).status_code == 200
    shop.sandbox.fault("initialize", "lost-request", times=2)
    assert shop.create(key="one").status_code == 503
    shop.deliver(reference)
    assert only_payment(shop)["status"] == "completed"


def test_another_shops_money_on_the_same_account_is_not_ours(shop: Shop) -> None:
    shop.sandbox.charge_elsewhere("T000000000000001")
    assert shop.deliver("T000000000000001").status_code == 200
    assert shop.sql("SELECT outcome, reference, body FROM provider_events") == [
        {"outcome": "foreign", "reference": "T000000000000001", "body": None}
    ]
    assert incidents(shop) == []


def test_a_dispute_is_put_before_a_person(shop: Shop) -> None:
    payment = shop.created()
    shop.pay(payment["reference"])
    shop.sandbox.dispute(payment["reference"])
    for event in ("charge.dispute.create", "charge.dispute.remind"):
        assert shop.deliver(payment["reference"], event).status_code == 200
    assert incidents(shop) == [("dispute", payment["reference"])]
    assert only_payment(shop)["status"] == "completed"
    shop.deliver(payment["reference"], "charge.dispute.resolve", resolution="declined")
    assert shop.sql("SELECT kind, closed_by FROM incidents") == [{"kind": "dispute", "closed_by": "webhook"}]
    assert shop.sql("SELECT refunds_awaited_since FROM payments") == [{"refunds_awaited_since": None}]


# Two at the same moment


def test_of_two_charges_at_the_same_moment_one_is_the_second(shop: Shop) -> None:
    both = two_references(shop)
    for reference in both:
        shop.sandbox.pay(reference)
    first, second = (shop.app.gateway.verify(reference, 10) for reference in both)
    assert isinstance(first, money.Charge) and isinstance(second, money.Charge)
    second_of_two(
        shop,
        lambda database: database.transaction(charges.apply_charge, first, "webhook"),
        lambda database: database.transaction(charges.apply_charge, second, "worker"),
    )
    assert only_payment(shop)["charge_reference"] == both[0]
    assert incidents(shop) == [("second_charge", both[1])]


def test_a_refund_that_is_told_of_at_the_end_of_a_poll_is_awaited(shop: Shop) -> None:
    payment = shop.created()
    shop.pay(payment["reference"])
    stood = db.find_payment(shop.app.database, payment["id"])
    assert stood is not None
    second_of_two(
        shop,
        lambda database: database.run(lambda conn: charges.await_refunds(conn, stood.id)),
        lambda database: charges.finish_poll_of_paid(database, stood, stood.created_at),
    )
    assert shop.sql("SELECT refunds_awaited_since IS NOT NULL AS is_awaited FROM payments") == [{"is_awaited": True}]


def test_an_event_that_failed_is_tried_by_one_worker_at_a_time(shop: Shop) -> None:
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    refuse_charges(shop)
    shop.deliver(payment["reference"])
    with slow_process(shop) as database:
        assert len(charges.claim_events(database, "test", 20)) == 1
        assert charges.claim_events(shop.app.database, "test", 20) == []


# The ninth reference, and the last of each time


def test_money_by_the_ninth_reference_is_found_by_its_event_and_by_a_poll(shop: Shop, till: Till) -> None:
    heard, polled = shop.created(), shop.created()
    for payment in (heard, polled):
        shop.sandbox.charge_elsewhere(f"{payment['reference']}-9", amount=5000)
    shop.deliver(f"{heard['reference']}-9")
    shop.sql("UPDATE payments SET attempt = 9 WHERE id = %s", polled["id"])
    poll(shop)
    for payment in (heard, polled):
        told = shop.get(payment["id"])
        assert (told["status"], told["reference"]) == ("completed", f"{payment['reference']}-9")
        assert payment["id"] in till.did("show", f"{payment['reference']}-9")
    till.did("erase", heard["id"])
    assert shop.sql("SELECT DISTINCT body FROM provider_events") == [{"body": "erased"}]


@pytest.mark.parametrize("tail", ["-10", "-1", "-0", "-", "-9-9"])
def test_there_is_no_tenth_reference(shop: Shop, tail: str) -> None:
    payment = shop.created()
    shop.sandbox.charge_elsewhere(f"{payment['reference']}{tail}", amount=5000)
    shop.deliver(f"{payment['reference']}{tail}")
    assert (shop.get(payment["id"])["status"], incidents(shop)) == ("pending", [])


@pytest.mark.parametrize(
    ("days", "next_days"), [(0, 1), (0.9, 0.1), (1, 6), (7, 23), (30, 60), (90, 60), (149, 1), (150, None)]
)
def test_a_paid_payment_is_verified_for_the_last_time_after_150_days(days: float, next_days: float | None) -> None:
    seconds = charges.next_verify_seconds(days * refunds.DAY)
    assert seconds == (next_days and pytest.approx(next_days * refunds.DAY))


@pytest.mark.parametrize(
    ("awaited", "seconds"), [(0, 5), (5, 5), (599, 1), (600, 1200), (1799, 1), (1800, None), (9999, None)]
)
def test_awaited_refunds_are_imported_for_the_last_time_after_half_an_hour(
    awaited: float, seconds: float | None
) -> None:
    assert charges.next_import_seconds(awaited) == seconds
