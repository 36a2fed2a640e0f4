# ruff: noqa: F811  (fixtures are imported by their names)
"""Refunds that an operator asks for: parts and the whole, asked twice, of a second charge."""

import functools
import json
from typing import Any

import pytest

import db
import paystack
from backstage import at_once
from invariants import check_books
from local.sandbox import Sandbox
from money_back import DAY, MINUTE, age, incidents, only_refund, refunds, seek, settle, statuses
from refunds import RefundAsked, Request
from refunds import refund as ask_refund
from shop import Shop, open_shop, sandbox, shop  # noqa: F401  # fixtures
from till import Till, open_till, paid, till  # noqa: F401  # fixtures

# A part and the whole


def test_a_part_then_the_rest_is_partially_refunded_then_refunded(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    assert "refund RF-" in till.did("refund", payment["id"], "--amount", "20.00", "--reason", "one item")
    assert shop.get(payment["id"])["status"] == "completed"
    settle(shop, sandbox, payment["reference"])
    assert (shop.get(payment["id"])["status"], shop.get(payment["id"])["refunded_amount"]) == ("partially_refunded", 20)
    till.did("refund", payment["id"])
    settle(shop, sandbox, payment["reference"])
    assert (shop.get(payment["id"])["status"], shop.get(payment["id"])["refunded_amount"]) == ("refunded", 50)
    assert [refund["amount"] for refund in sandbox.refunds()] == [2000, 3000]
    assert incidents(shop) == []
    check_books(shop.database_url)


def test_a_small_part_needs_no_minimum(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"], "--amount", "0.01")
    assert [refund["amount"] for refund in sandbox.refunds()] == [1]


@pytest.mark.parametrize(
    ("amount", "words"),
    [
        ("50.01", "only NGN 50.00 of"),
        ("0", "must be greater than 0"),
        ("-1", "must be greater than 0"),
        ("0.001", "at most 2 decimals"),
    ],
)
def test_an_amount_that_cannot_be_given_back_is_refused(
    shop: Shop, sandbox: Sandbox, till: Till, amount: str, words: str
) -> None:
    payment = paid(shop)
    done = till.run("refund", payment["id"], f"--amount={amount}")
    assert done.status == 1
    assert words in done.err
    assert (sandbox.calls("refund"), refunds(shop)) == (0, [])


def test_what_was_never_paid_cannot_be_given_back(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = shop.created()
    done = till.run("refund", payment["id"])
    assert (done.status, sandbox.calls("refund")) == (1, 0)
    assert "no money has come" in done.err


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_the_provider_refuses_and_the_amount_is_free_again(
    shop: Shop, sandbox: Sandbox, till: Till, status: int
) -> None:
    payment = paid(shop)
    sandbox.fault("refund", "answer", status=status, body={"status": False, "message": "Balance is too low"})
    done = till.run("refund", payment["id"])
    assert done.status == 1
    assert "Balance is too low" in done.err
    assert statuses(shop) == ["refused"]
    till.did("refund", payment["id"])
    assert statuses(shop) == ["refused", "pending"]
    assert len(sandbox.refunds()) == 1


@pytest.mark.parametrize("status", [402, 409, 422])
def test_what_is_no_clear_refusal_may_have_been_made(shop: Shop, sandbox: Sandbox, till: Till, status: int) -> None:
    payment = paid(shop)
    sandbox.fault("refund", "answer", effect=True, status=status, body={"status": False, "message": "Perhaps"})
    assert till.run("refund", payment["id"]).status == 1
    assert statuses(shop) == ["unanswered"]
    seek(shop)
    assert statuses(shop) == ["pending"]


# Asked twice


def test_the_same_refund_asked_for_twice_is_made_once(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"], "--amount", "20")
    again = till.did("refund", payment["id"], "--amount", "20.00", OPERATOR="grace")
    assert f"asked for already: refund {only_refund(shop)['id']} of NGN 20.00" in again
    assert "operator:ada" in again
    assert sandbox.calls("refund") == 1


def test_another_amount_of_what_went_back_whole_is_refused(shop: Shop, till: Till) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"])
    assert "asked for already" in till.did("refund", payment["id"])
    assert "asked for already" in till.did("refund", payment["id"], "--amount", "50.00")
    more = till.run("refund", payment["id"], "--amount", "1.00")
    assert more.status == 1
    assert "only NGN 0.00" in more.err


def test_again_makes_two_equal_refunds_two(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"], "--amount", "20")
    till.did("refund", payment["id"], "--amount", "20", "--again")
    seek(shop)
    settle(shop, sandbox, payment["reference"])
    assert [refund["amount_minor"] for refund in refunds(shop)] == [2000, 2000]
    assert len({refund["provider_id"] for refund in refunds(shop)}) == 2
    assert sorted(statuses(shop)) == ["pending", "processed"]


def test_after_a_day_the_same_amount_is_another_refund(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"], "--amount", "20")
    age(shop, DAY + MINUTE)
    till.did("refund", payment["id"], "--amount", "20")
    assert len(sandbox.refunds()) == 2


def test_with_nothing_left_the_refund_that_took_it_is_named(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"])
    assert only_refund(shop)["id"] in till.did("refund", payment["id"])
    age(shop, DAY + MINUTE)
    done = till.run("refund", payment["id"])
    assert done.status == 1
    assert only_refund(shop)["id"] in done.err
    assert sandbox.calls("refund") == 1


def give_back(shop: Shop, payment_id: str, minor: int, *, again: bool = False) -> str:
    """What became of one operator's refund: its status, or why there is none."""
    database, gateway = shop.app.database, shop.app.gateway
    try:
        return ask_refund(database, gateway, Request(payment_id, f"{minor / 100}", "operator:ada", again=again)).status
    except (db.Impossible, RefundAsked) as refused:
        return type(refused).__name__


@pytest.mark.parametrize(("again", "outcome"), [(False, "RefundAsked"), (True, "Impossible")])
def test_eight_operators_at_once_give_back_sixty_percent_once(
    shop: Shop, sandbox: Sandbox, till: Till, again: bool, outcome: str
) -> None:
    payment = paid(shop)
    outcomes = at_once([lambda: give_back(shop, payment["id"], 3000, again=again)] * 8)
    assert sorted(outcomes) == sorted(["pending", *[outcome] * 7])
    assert [refund["amount"] for refund in sandbox.refunds()] == [3000]

    settle(shop, sandbox, payment["reference"], "failed")
    assert incidents(shop) == ["refund_failed"]
    till.did("refund", payment["id"], "--amount", "30.00")  # it can be given back again
    assert [refund["status"] for refund in sandbox.refunds()] == ["failed", "pending"]


def test_different_parts_at_once_never_add_up_to_more_than_came(shop: Shop, sandbox: Sandbox) -> None:
    payment = paid(shop)
    amounts = (3000, 2900, 2800, 2700, 2600, 2500)
    outcomes = at_once([functools.partial(give_back, shop, payment["id"], minor) for minor in amounts])
    assert outcomes.count("pending") == 1
    assert sum(refund["amount"] for refund in sandbox.refunds()) <= 5000


# A second charge


def pay_again(shop: Shop, sandbox: Sandbox, payment: dict[str, Any]) -> str:
    """A second transaction of the same payment is paid: an earlier answer was lost, and both pages were open."""
    second = f"{payment['reference']}-2"
    sandbox.charge_elsewhere(second, amount=5000)
    assert shop.deliver(second).status_code == 200
    return second


def test_the_second_charge_is_given_back_and_the_payment_stays_completed(
    shop: Shop, sandbox: Sandbox, till: Till
) -> None:
    payment = paid(shop)
    second = pay_again(shop, sandbox, payment)
    assert incidents(shop) == ["second_charge"]
    assert f"as {second}: refund that charge" in till.did("show", payment["id"])
    till.did("refund", second)
    settle(shop, sandbox, second)
    told = shop.get(payment["id"])
    assert (told["status"], told["refunded_amount"]) == ("completed", 0)
    assert incidents(shop) == []
    assert [(refund["reference"], refund["amount"]) for refund in sandbox.refunds()] == [(second, 5000)]
    assert till.run("audit").status == 0


def test_a_reference_means_exactly_that_charge(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    done = till.run("refund", f"{payment['reference']}-3")
    assert (done.status, sandbox.calls("refund")) == (1, 0)
    assert f"no money has come for {payment['reference']}-3" in done.err


# What is said


def test_the_refund_for_a_program_is_json(shop: Shop, till: Till) -> None:
    payment = paid(shop)
    told = json.loads(till.did("refund", payment["id"], "--amount", "20", "--json"))
    assert (told["amount"], told["status"], told["payment"]) == (20, "pending", payment["id"])
    assert not told["is_repetition"]
    again = json.loads(till.did("refund", payment["id"], "--amount", "20", "--json"))
    assert (again["id"], again["is_repetition"]) == (told["id"], True)


def test_a_live_key_does_not_touch_a_test_payment(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    live = {"PAYSTACK_SECRET_KEY": "sk_live_0123456789abcdef", "PUBLIC_URL": "https://pay.example.com"}
    for words in (("refund", payment["id"]), ("sync", payment["id"])):
        done = till.run(*words, **live)
        assert done.status == 1
        assert payment["id"] in done.err
    assert sandbox.calls("refund") == 0


@pytest.mark.parametrize(
    ("amount", "given", "left"),
    [((), "50.00", "0.00"), (("--amount", "20"), "20.00", "30.00"), (("--amount", "0.01"), "0.01", "49.99")],
)
def test_a_dry_run_says_what_would_be_given_back_and_left(
    shop: Shop, till: Till, amount: tuple[str, ...], given: str, left: str
) -> None:
    payment = paid(shop)
    out = till.did("refund", payment["id"], *amount, "--dry-run")
    assert out == f"would give back NGN {given} of {payment['reference']}; NGN {left} would be left\n"


def test_a_dry_run_after_a_part_counts_from_what_is_left(shop: Shop, till: Till) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"], "--amount", "20")
    assert "would give back NGN 30.00 of" in till.did("refund", payment["id"], "--dry-run")
    assert "NGN 25.00 would be left" in till.did("refund", payment["id"], "--amount", "5", "--dry-run")
    assert "only NGN 30.00 of" in till.run("refund", payment["id"], "--amount", "30.01").err


def test_the_sums_of_a_refund_are_of_its_charges_currency(shop: Shop, till: Till) -> None:
    payment = paid(shop, customer_email="other-currency@example.com")
    out = till.did("refund", payment["id"], "--amount", "20", "--dry-run")
    assert "give back GHS 20.00 of" in out and "GHS 30.00 would be left" in out
    assert "of GHS 20.00 for" in till.did("refund", payment["id"], "--amount", "20")


@pytest.mark.parametrize("seconds", [0, 2 * MINUTE])
def test_a_failover_that_forgets_that_a_refund_was_sent_sends_no_second(
    shop: Shop, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    payment = paid(shop)
    request = Request(payment["id"], "10", "operator:ada", key="one")
    ask = paystack.Gateway.refund

    def lost(gateway: paystack.Gateway, *what: Any) -> Any:
        ask(gateway, *what)
        shop.sql("SET session_replication_role = replica; UPDATE refunds SET sent_at = NULL")
        raise paystack.Unavailable("no answer")

    monkeypatch.setattr(paystack.Gateway, "refund", lost)
    assert ask_refund(shop.app.database, shop.app.gateway, request).status == "unanswered"
    age(shop, seconds)
    with pytest.raises(RefundAsked):
        ask_refund(shop.app.database, shop.app.gateway, request)
    assert (sandbox.calls("refund"), statuses(shop)) == (1, ["unanswered"])
