# ruff: noqa: F811  (fixtures are imported by their names)
"""A review and its two ends."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from local.sandbox import Sandbox
from money_back import incidents, settle
from shop import OpenShop, Shop, open_shop, sandbox, shop  # noqa: F401  # fixtures
from till import Till, open_till, paid, till  # noqa: F401  # fixtures


@pytest.fixture
def review(shop: Shop) -> dict[str, Any]:
    """A payment of which NGN 1.00 is missing."""
    payment = paid(shop, customer_email="underpaid@example.com")
    assert shop.get(payment["id"])["status"] == "review"
    return payment


@pytest.mark.parametrize("email", ["underpaid@example.com", "other-currency@example.com"])
def test_money_that_is_not_the_price_goes_to_review(shop: Shop, email: str) -> None:
    payment = paid(shop, customer_email=email)
    assert shop.get(payment["id"])["status"] == "review"
    assert incidents(shop) == ["mismatch"]


def test_a_charge_asked_at_another_amount_goes_to_review(shop: Shop, sandbox: Sandbox) -> None:
    payment = shop.created()
    sandbox.alter(payment["reference"], requested_amount=4000)
    shop.pay(payment["reference"])
    assert (shop.get(payment["id"])["status"], incidents(shop)) == ("review", ["mismatch"])


def test_accept_completes_and_says_who_and_why(shop: Shop, till: Till, review: dict[str, Any]) -> None:
    till.did("resolve", review["id"], "accept", "--reason", "the rest came in cash", "--by", "Grace")
    assert shop.get(review["id"])["status"] == "completed"
    assert incidents(shop) == []
    story = till.did("show", review["id"])
    assert "operator:Grace" in story
    assert "the rest came in cash" in story
    assert till.run("audit").status == 0
    again = till.run("resolve", review["id"], "accept", "--reason", "twice")
    assert (again.status, "nothing to accept" in again.err) == (1, True)


def test_reject_gives_the_whole_charge_back_and_ends_in_refunded(
    shop: Shop, sandbox: Sandbox, till: Till, review: dict[str, Any]
) -> None:
    till.did("resolve", review["id"], "reject", "--reason", "too little")
    assert shop.get(review["id"])["status"] == "review"
    settle(shop, sandbox, review["reference"])
    told = shop.get(review["id"])
    assert (told["status"], told["refunded_amount"]) == ("refunded", 49)
    assert incidents(shop) == []
    assert till.run("audit").status == 0


def test_reject_may_be_repeated_after_a_failed_refund(
    shop: Shop, sandbox: Sandbox, till: Till, review: dict[str, Any]
) -> None:
    words = ("resolve", review["id"], "reject", "--reason", "too little")
    till.did(*words)
    settle(shop, sandbox, review["reference"], "failed")
    assert shop.get(review["id"])["status"] == "review"
    till.did(*words)
    settle(shop, sandbox, review["reference"])
    assert shop.get(review["id"])["status"] == "refunded"


def test_a_partial_refund_keeps_it_in_review_until_the_rest_goes_back(
    shop: Shop, sandbox: Sandbox, till: Till, review: dict[str, Any]
) -> None:
    till.did("refund", review["id"], "--amount", "9")
    accept = ("resolve", review["id"], "accept", "--reason", "enough")
    assert "open or made" in till.run(*accept).err  # nobody may count it as paid while money goes back
    settle(shop, sandbox, review["reference"])
    assert shop.get(review["id"])["status"] == "review"
    assert till.run(*accept).status == 1
    till.did("resolve", review["id"], "reject", "--reason", "too little")
    settle(shop, sandbox, review["reference"])
    assert shop.get(review["id"])["status"] == "refunded"
    assert [refund["amount"] for refund in sandbox.refunds()] == [900, 4000]


def test_what_is_not_in_review_is_not_rejected(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    done = till.run("resolve", payment["id"], "reject", "--reason", "by mistake")
    assert (done.status, sandbox.calls("refund")) == (1, 0)
    assert "nothing to reject" in done.err


def test_more_paid_than_asked_for_is_completed_and_show_says_so(shop: Shop, till: Till) -> None:
    payment = paid(shop, customer_email="overpaid@example.com")
    assert shop.get(payment["id"])["status"] == "completed"
    assert "NGN 1.00 more than the price" in till.did("show", payment["id"])


# Another currency than the price's


@pytest.fixture
def in_dollars(open_shop: OpenShop, sandbox: Sandbox) -> dict[str, Any]:
    """A payment of USD 10.00, paid with NGN 15,000.00."""
    shop = open_shop(CURRENCIES="USD,NGN")
    payment = shop.created(amount=10, currency="USD")
    transaction = sandbox.ledger.known(payment["reference"])
    transaction.currency, transaction.amount = "NGN", 1500000
    shop.pay(payment["reference"])
    return payment


def test_money_of_another_currency_is_accepted_only_by_its_name(
    shop: Shop, till: Till, in_dollars: dict[str, Any]
) -> None:
    accept = ("resolve", in_dollars["id"], "accept", "--reason", "agreed by phone")
    for words in (accept, (*accept, "--currency", "USD"), (*accept, "--currency", "GHS")):
        refused = till.run(*words)
        assert (refused.status, "--currency NGN accepts it" in refused.err) == (1, True)
    assert shop.get(in_dollars["id"])["status"] == "review"
    till.did(*accept, "--currency", "ngn")
    assert shop.get(in_dollars["id"])["status"] == "completed"


def test_the_sums_of_a_payment_are_of_its_charges_currency(
    shop: Shop, sandbox: Sandbox, till: Till, in_dollars: dict[str, Any]
) -> None:
    till.did("resolve", in_dollars["id"], "accept", "--reason", "agreed by phone", "--currency", "NGN")
    till.did("refund", in_dollars["id"], "--amount", "10")
    settle(shop, sandbox, in_dollars["reference"])
    told = shop.get(in_dollars["id"])
    assert (told["status"], told["refunded_amount"]) == ("partially_refunded", 10)
    story = till.did("show", in_dollars["id"])
    assert "given back  NGN 10.00" in story
    assert "accepted as paid: NGN 15,000.00" in story
    assert "NGN 10.00 given back" in till.did("sync", in_dollars["id"])
    till.did("refund", in_dollars["id"])
    settle(shop, sandbox, in_dollars["reference"])
    assert shop.get(in_dollars["id"])["status"] == "refunded"
    assert [refund["amount"] for refund in sandbox.refunds()] == [1000, 1499000]
    assert till.run("audit").status == 0


# When it was paid


@pytest.mark.parametrize("decision", ["accept", "reject"])
def test_a_review_was_paid_when_its_money_came(
    shop: Shop, sandbox: Sandbox, till: Till, review: dict[str, Any], decision: str
) -> None:
    came = shop.sql("SELECT paid_at FROM charges")[0]["paid_at"]
    assert came is not None
    till.did("resolve", review["id"], decision, "--reason", "as agreed")
    if decision == "reject":
        settle(shop, sandbox, review["reference"])
    assert shop.sql("SELECT paid_at FROM payments") == [{"paid_at": came}]


@pytest.mark.parametrize("days", [-20000, -2, 0, 1, 365])
def test_a_time_of_payment_that_cannot_be_is_not_believed(shop: Shop, sandbox: Sandbox, days: int) -> None:
    payment = shop.created()
    sandbox.pay(payment["reference"])
    told = datetime.now(UTC) + timedelta(days=days)
    shop.deliver(payment["reference"], paid_at=told.isoformat())
    (row,) = shop.sql("SELECT p.paid_at, c.recorded_at FROM payments p, charges c")
    assert row["paid_at"] == (row["recorded_at"] if days else told)


def test_what_is_only_tried_is_refused_as_if_it_were_done(shop: Shop, till: Till, review: dict[str, Any]) -> None:
    pending = shop.created()
    for words in (["--incident", "999"], [pending["id"], "accept"]):
        refused = till.run("resolve", *words, "--reason", "x", "--dry-run")
        assert (refused.status, refused.out) == (1, "")
    assert "would accept" in till.did("resolve", review["id"], "accept", "--reason", "x", "--dry-run")
    assert "would be closed" in till.did("resolve", "--incident", "1", "--reason", "x", "--dry-run")
    assert (shop.get(review["id"])["status"], incidents(shop)) == ("review", ["mismatch"])


def test_hundredths_of_a_whole_currency_go_back(
    open_shop: OpenShop, open_till: Callable[..., Till], sandbox: Sandbox
) -> None:
    sandbox.configure(currencies=["XOF", "NGN"])
    shop, till = open_shop(CURRENCIES="XOF"), open_till(CURRENCIES="XOF")
    payment = shop.created(amount=500, currency="XOF")
    shop.pay(payment["reference"], amount=49950)
    till.did("resolve", payment["id"], "reject", "--reason", "too little")
    assert [each["amount"] for each in sandbox.refunds()] == [49950]
