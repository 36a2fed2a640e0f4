# ruff: noqa: F811  (fixtures are imported by their names)
"""Money back: made once, whatever is lost on the way, and found wherever it was made."""

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import psycopg
import pytest

import db
import money
import paystack
from backstage import meanwhile, poll, second_of_two, slow_process, worker_of
from db import Database
from invariants import check_books
from local.sandbox import Sandbox
from money_back import DAY, HOUR, MINUTE, age, incidents, only_refund, refunds, seek, settle, statuses
from refunds import (
    Refund,
    Request,
    apply_refund,
    begin,
    claim_due,
    end_sending,
    finish_poll,
    give_up,
    lock_refundable,
    next_poll_seconds,
    send,
)
from relay import Relay
from shop import Shop, open_shop, sandbox, shop, wait_until  # noqa: F401  # fixtures
from till import Till, open_till, paid, till  # noqa: F401  # fixtures

COMMIT = b"COMMIT\0"  # and not that of READ COMMITTED
SECOND_CALL = 10
"""A seed with which a fault that meets a call with probability 0.5 meets the second one, and not the first."""

# Lost answers


@pytest.mark.parametrize(
    "fault", ["lost-answer", "500", "502", "503", "garbage", "no-data", "status-string", "truncated"]
)
def test_a_refund_whose_answer_is_lost_is_found_by_its_note_and_made_once(
    shop: Shop, sandbox: Sandbox, till: Till, fault: str
) -> None:
    payment = paid(shop)
    sandbox.fault("refund", fault, effect=True)
    done = till.run("refund", payment["id"])
    assert done.status == 1
    assert "it counts as made, and is looked for" in done.err
    assert only_refund(shop)["status"] == "unanswered"

    repeated = till.did("refund", payment["id"])  # the operator tries again: it is not sent again
    assert only_refund(shop)["id"] in repeated
    seek(shop)
    assert only_refund(shop)["status"] == "pending"
    assert only_refund(shop)["id"] == sandbox.refunds()[0]["merchant_note"]
    assert (sandbox.calls("refund"), len(sandbox.refunds())) == (1, 1)


def test_a_list_that_is_still_empty_proves_nothing(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    sandbox.fault("refund", "lost-answer")
    assert till.run("refund", payment["id"]).status == 1
    sandbox.fault("list-refunds", "empty-list", times=None)
    seek(shop)
    age(shop, 20 * MINUTE)
    seek(shop)
    assert only_refund(shop)["status"] == "unanswered"
    sandbox.clear_faults()
    seek(shop)
    assert only_refund(shop)["status"] == "pending"
    assert incidents(shop) == []


def test_a_refund_that_the_provider_never_took_is_free_after_half_an_hour(
    shop: Shop, sandbox: Sandbox, till: Till
) -> None:
    payment = paid(shop)
    sandbox.fault("refund", "lost-request")
    assert till.run("refund", payment["id"]).status == 1
    age(shop, 29 * MINUTE)
    seek(shop)
    assert only_refund(shop)["status"] == "unanswered"
    age(shop, 2 * MINUTE)
    seek(shop)
    assert (only_refund(shop)["status"], incidents(shop)) == ("not_made", ["refund_not_made"])
    till.did("refund", payment["id"])
    assert statuses(shop) == ["not_made", "pending"]


def test_a_refund_of_the_dashboard_counts_once_ours_is_given_up(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    """Before that it might have been ours."""
    payment = paid(shop)
    sandbox.fault("refund", "lost-request")
    assert till.run("refund", payment["id"], "--amount", "20").status == 1
    sandbox.dashboard_refund(payment["reference"], 1000)
    sandbox.move_refund(payment["reference"], "processed")
    seek(shop)
    assert (statuses(shop), shop.get(payment["id"])["status"]) == (["unanswered"], "completed")
    age(shop, 31 * MINUTE)
    seek(shop)
    assert sorted(statuses(shop)) == ["not_made", "processed"]
    told = shop.get(payment["id"])
    assert (told["status"], told["refunded_amount"]) == ("partially_refunded", 10)
    assert till.run("audit").status == 0


def test_a_younger_refund_stays_spent_when_an_older_one_is_given_up(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    sandbox.fault("refund", "lost-request", times=2)
    assert till.run("refund", paid(shop)["id"]).status == 1
    age(shop, 31 * MINUTE)
    assert till.run("refund", paid(shop)["id"]).status == 1
    seek(shop)
    assert statuses(shop) == ["not_made", "unanswered"]


def test_a_refund_that_shows_up_after_all_is_revived_and_counted(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    sandbox.fault("refund", "lost-answer")
    assert till.run("refund", payment["id"]).status == 1
    sandbox.fault("list-refunds", "empty-list", times=None)
    age(shop, 31 * MINUTE)
    seek(shop)
    assert only_refund(shop)["status"] == "not_made"
    sandbox.clear_faults()
    age(shop, 14 * MINUTE)
    seek(shop)
    assert (only_refund(shop)["status"], incidents(shop)) == ("pending", ["refund_revived"])
    settle(shop, sandbox, payment["reference"])
    assert shop.get(payment["id"])["status"] == "refunded"


def test_what_took_the_amount_is_recorded_before_it_is_free(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    """A colleague made it in the dashboard meanwhile: freed blindly, the amount would be given back twice."""
    payment = paid(shop)
    sandbox.fault("refund", "lost-request")
    assert till.run("refund", payment["id"]).status == 1
    sandbox.dashboard_refund(payment["reference"])
    seek(shop)
    assert statuses(shop) == ["unanswered"]  # it might be ours
    age(shop, 31 * MINUTE)
    seek(shop)
    assert sorted(statuses(shop)) == ["not_made", "pending"]
    done = till.run("refund", payment["id"])
    assert "asked for already" in done.out
    assert len(sandbox.refunds()) == 1


@pytest.mark.parametrize("fault", ["lost-request", "503", "invalid-key", "garbage", "429"])
def test_a_provider_that_is_away_for_an_hour_is_not_missing_a_refund(
    shop: Shop, sandbox: Sandbox, till: Till, fault: str
) -> None:
    payment = paid(shop)
    sandbox.fault("refund", "lost-answer")
    assert till.run("refund", payment["id"]).status == 1
    sandbox.fault("list-refunds", fault, times=None)
    age(shop, HOUR)
    for _ in range(3):
        shop.sql("UPDATE refunds SET poll_at = now()")
        with pytest.raises((paystack.Unavailable, paystack.Misconfigured)):
            worker_of(shop).poll_refunds()
    assert only_refund(shop)["status"] == "unanswered"
    sandbox.clear_faults()
    seek(shop)
    assert only_refund(shop)["status"] == "pending"


def test_a_listing_that_breaks_off_on_its_second_page_proves_nothing(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    other, payment = paid(shop, amount=500), paid(shop)
    for _ in range(100):
        sandbox.dashboard_refund(other["reference"], 100)
    sandbox.fault("refund", "lost-request")
    assert till.run("refund", payment["id"]).status == 1
    age(shop, HOUR)
    sandbox.backdate(other["reference"], HOUR)
    newest = sandbox.dashboard_refund(other["reference"], 100)  # the first page is full, and ours is not on it
    assert newest["id"]
    pages = sandbox.calls("list-refunds")
    sandbox.fault("list-refunds", "garbage", seed=SECOND_CALL, probability=0.5)
    with pytest.raises(paystack.Unavailable):
        worker_of(shop).poll_refunds()
    assert sandbox.calls("list-refunds") - pages == 2
    assert "not_made" not in statuses(shop)


def test_a_refund_that_stays_open_is_an_incident_after_thirty_days(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"])
    age(shop, 29 * DAY)
    seek(shop)
    assert (incidents(shop), only_refund(shop)["poll_at"] is None) == ([], False)
    age(shop, DAY)
    seek(shop)
    assert (incidents(shop), only_refund(shop)["poll_at"]) == (["refund_not_final"], None)
    settle(shop, sandbox, payment["reference"])
    assert incidents(shop) == []  # closed by its end


def test_the_end_of_one_refunds_looks_is_not_that_of_anothers(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    old, new = paid(shop), paid(shop)
    till.did("refund", old["id"])
    age(shop, 30 * DAY)
    till.did("refund", new["id"])
    seek(shop)
    looks = {refund["payment_id"]: refund["poll_at"] is not None for refund in refunds(shop)}
    assert looks == {old["id"]: False, new["id"]: True}
    assert incidents(shop) == ["refund_not_final"]


def test_one_refund_that_the_provider_does_not_know_holds_up_no_other(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    first, second = paid(shop), paid(shop)
    till.did("refund", first["id"])
    till.did("refund", second["id"])
    sandbox.move_refund(second["reference"], "processed")
    shop.sql("UPDATE refunds SET poll_at = now() - interval '1 min' WHERE payment_id = %s", first["id"])
    shop.sql("UPDATE refunds SET poll_at = now() WHERE payment_id = %s", second["id"])
    sandbox.fault("fetch-refund", "not-found", times=None, prefix=first["reference"])
    worker_of(shop).poll_refunds()
    assert shop.get(second["id"])["status"] == "refunded"


def test_an_answer_that_names_no_reference_is_known_by_the_refunds_own_id(
    shop: Shop, sandbox: Sandbox, till: Till
) -> None:
    payment = paid(shop)
    with psycopg.connect(shop.database_url) as conn:
        conn.execute("SET session_replication_role = replica")
        conn.execute("UPDATE charges SET provider_id = NULL")  # as from an event without one
    till.did("refund", payment["id"])
    (refund,) = sandbox.refunds()
    told = {"id": refund["id"], "transaction": 1, "amount": 5000, "currency": "NGN", "status": "processed"}
    sandbox.fault("fetch-refund", "answer", body={"status": True, "message": "", "data": told})
    age(shop, MINUTE)
    worker_of(shop).poll_refunds()
    assert shop.get(payment["id"])["status"] == "refunded"


# Killed, or cut off, at each step


@pytest.fixture
def relay(database_url: str) -> Iterator[Relay]:
    with Relay(database_url) as relay:
        yield relay


def kill_when(process: "subprocess.Popen[str]", reached: Callable[[], object]) -> None:
    try:
        wait_until(reached, 40)
    finally:
        process.kill()
        process.communicate(timeout=10)


@pytest.mark.parametrize("after", [False, True])
def test_killed_around_the_commit_nothing_was_asked_for(
    shop: Shop, sandbox: Sandbox, till: Till, relay: Relay, after: bool
) -> None:
    payment = paid(shop)
    moment = relay.after(COMMIT) if after else relay.before(COMMIT)
    process = till.start("refund", payment["id"], "--yes", env={"DATABASE_URL": relay.url})
    kill_when(process, moment.reached.is_set)
    moment.over.set()
    assert (statuses(shop), sandbox.calls("refund")) == (["unanswered"] if after else [], 0)
    age(shop, 33 * MINUTE)
    seek(shop)
    till.did("refund", payment["id"])
    assert len(sandbox.refunds()) == 1


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("again", [(), ("--again",)])
def test_a_commit_whose_reply_is_lost_makes_one_refund(
    shop: Shop, sandbox: Sandbox, till: Till, relay: Relay, after: bool, again: tuple[str, ...]
) -> None:
    payment = paid(shop)
    moment = relay.after(COMMIT) if after else relay.before(COMMIT)
    moment.over.set()
    till.did("refund", payment["id"], "--amount", "20", *again, DATABASE_URL=relay.url)
    assert moment.reached.is_set()
    assert (statuses(shop), sandbox.calls("refund")) == (["pending"], 1)


def test_a_database_that_goes_before_the_answer_is_stored_says_where_to_look(
    shop: Shop, sandbox: Sandbox, till: Till, relay: Relay
) -> None:
    payment = paid(shop)
    for _ in range(3):  # each try to store it
        relay.before(b"FROM charges\n         WHERE mode =").over.set()
    done = till.run("refund", payment["id"], DATABASE_URL=relay.url)
    assert done.status == 1
    assert f"never asked for twice: manage.py show {payment['id']}" in done.err
    seek(shop)
    assert (statuses(shop), sandbox.calls("refund")) == (["pending"], 1)


def test_killed_before_the_provider_took_it_it_is_not_made(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    sandbox.fault("refund", "time-out-before")
    kill_when(till.start("refund", payment["id"], "--yes"), lambda: sandbox.calls("refund") == 1)
    assert only_refund(shop)["status"] == "unanswered"
    assert only_refund(shop)["id"] in till.did("refund", payment["id"])
    age(shop, 33 * MINUTE)
    seek(shop)
    assert (statuses(shop), sandbox.refunds()) == (["not_made"], [])


def test_killed_before_the_answer_came_it_is_found(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    sandbox.fault("refund", "time-out")
    kill_when(till.start("refund", payment["id"], "--yes"), sandbox.refunds)
    assert only_refund(shop)["status"] == "unanswered"
    seek(shop)
    assert (statuses(shop), len(sandbox.refunds())) == (["pending"], 1)


def test_killed_before_the_answer_was_stored_it_is_found(
    shop: Shop, sandbox: Sandbox, till: Till, relay: Relay
) -> None:
    payment = paid(shop)
    moment = relay.before(b"FROM charges\n         WHERE mode =")
    process = till.start("refund", payment["id"], "--yes", env={"DATABASE_URL": relay.url})
    kill_when(process, moment.reached.is_set)
    moment.over.set()
    seek(shop)
    assert (statuses(shop), len(sandbox.refunds())) == (["pending"], 1)
    assert sandbox.calls("refund") == 1


def begun(shop: Shop, payment: dict[str, Any]) -> Refund:
    """A refund of 20 as it stands where its command was frozen before it sent it."""
    request = Request(payment["id"], "20", "operator:ada")
    return begin(shop.app.database, shop.app.gateway.mode, request)


def test_a_command_that_was_frozen_before_it_sent_sends_nothing_later(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    frozen = begun(shop, payment)
    age(shop, 33 * MINUTE)
    seek(shop)
    assert statuses(shop) == ["not_made"]
    till.did("refund", payment["id"], "--amount", "20")
    send(shop.app.database, shop.app.gateway, frozen)
    assert [refund["amount"] for refund in sandbox.refunds()] == [2000]
    assert sorted(statuses(shop)) == ["not_made", "pending"]


def test_a_command_that_was_frozen_for_minutes_frees_the_amount(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    frozen = begun(shop, payment)
    age(shop, 2 * MINUTE)
    assert send(shop.app.database, shop.app.gateway, frozen).status == "refused"
    assert sandbox.calls("refund") == 0
    till.did("refund", payment["id"])
    assert [refund["amount"] for refund in sandbox.refunds()] == [5000]


def test_a_refund_is_given_up_counted_from_its_sending(shop: Shop) -> None:
    """Its row is older than that, by the time that passes before."""
    begun(shop, paid(shop))
    age(shop, 33 * MINUTE)
    shop.sql("UPDATE refunds SET sent_at = now() - interval '31 min'")
    seek(shop)
    assert statuses(shop) == ["unanswered"]
    shop.sql("UPDATE refunds SET sent_at = now() - interval '32 min'")
    seek(shop)
    assert statuses(shop) == ["not_made"]


# Events and the dashboard


def test_what_is_listed_later_changes_no_amount_and_is_a_difference(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"], "--amount", "20")
    sandbox.ledger.refund_named(payment["reference"]).amount = 1500
    settle(shop, sandbox, payment["reference"])
    assert (only_refund(shop)["amount_minor"], only_refund(shop)["status"]) == (2000, "processed")
    assert "NGN 15.00 there, NGN 20.00 here" in till.run("reconcile").out


def test_a_refund_of_another_currency_than_its_charge_is_not_summed(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    sandbox.dashboard_refund(payment["reference"], 2000)
    sandbox.ledger.refund_named(payment["reference"]).currency = "USD"
    settle(shop, sandbox, payment["reference"])
    assert (refunds(shop), shop.get(payment["id"])["refunded_amount"]) == ([], 0)
    assert "unknown here" in till.run("reconcile").out


def test_an_event_without_an_id_before_our_own_answer_makes_no_second_refund(
    shop: Shop, sandbox: Sandbox, till: Till
) -> None:
    payment = paid(shop)
    sandbox.fault("refund", "time-out", seconds=1.0)
    with meanwhile(lambda: till.shell("refund", payment["id"], "--amount", "20", "--yes")) as done:
        wait_until(sandbox.refunds, 40)
        assert shop.deliver(payment["reference"], "refund.pending").status_code == 200
        poll(shop)
        assert statuses(shop) == ["pending"]
    assert done().status == 0
    seek(shop)
    assert (statuses(shop), len(sandbox.refunds())) == (["pending"], 1)


def test_a_refund_made_in_the_dashboard_is_adopted_once(shop: Shop, sandbox: Sandbox) -> None:
    payment = paid(shop)
    sandbox.dashboard_refund(payment["reference"], 2000)
    for _ in range(3):
        assert shop.deliver(payment["reference"], "refund.pending").status_code == 200
        seek(shop)
    settle(shop, sandbox, payment["reference"])
    assert (only_refund(shop)["origin"], only_refund(shop)["status"]) == ("dashboard", "processed")
    assert shop.get(payment["id"])["status"] == "partially_refunded"


def test_a_refund_of_all_that_was_paid_may_be_more_than_the_price(shop: Shop, sandbox: Sandbox) -> None:
    """Where the customer bore the fees, the dashboard gives those back too."""
    payment = paid(shop, customer_email="pays-fees@example.com")
    whole = sandbox.dashboard_refund(payment["reference"])["amount"]
    assert whole > 5000
    settle(shop, sandbox, payment["reference"])
    told = shop.get(payment["id"])
    assert (told["status"], told["refunded_amount"]) == ("refunded", whole / 100)
    assert incidents(shop) == []


def test_a_plain_refund_gives_back_at_most_the_price(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop, customer_email="pays-fees@example.com")
    till.did("refund", payment["id"])
    assert [refund["amount"] for refund in sandbox.refunds()] == [5000]


def test_more_given_back_than_came_is_recorded_and_is_an_incident(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    sandbox.dashboard_refund(payment["reference"], 6000)
    settle(shop, sandbox, payment["reference"])
    assert shop.get(payment["id"])["refunded_amount"] == 60
    assert incidents(shop) == ["refunded_too_much"]
    assert till.run("audit").status == 0  # somebody was told


def test_a_refund_that_fails_after_it_was_processed_lowers_the_sum_and_keeps_the_state(
    shop: Shop, sandbox: Sandbox, till: Till
) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"])
    settle(shop, sandbox, payment["reference"])
    assert shop.get(payment["id"])["status"] == "refunded"
    settle(shop, sandbox, payment["reference"], "failed")
    told = shop.get(payment["id"])
    assert (told["status"], told["refunded_amount"]) == ("refunded", 0)
    assert incidents(shop) == ["refund_failed"]
    till.did("refund", payment["id"])  # it is owed again
    settle(shop, sandbox, payment["reference"])
    assert shop.get(payment["id"])["refunded_amount"] == 50


def test_a_refund_that_wants_attention_is_an_incident_until_it_ends(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"])
    settle(shop, sandbox, payment["reference"], "needs-attention")
    assert incidents(shop) == ["refund_needs_attention"]
    settle(shop, sandbox, payment["reference"])
    assert incidents(shop) == []


def test_an_older_answer_does_not_undo_a_processed_refund(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"])
    settle(shop, sandbox, payment["reference"])
    sandbox.ledger.refund_named(payment["reference"]).status = "pending"
    poll(shop)
    till.did("sync", payment["id"])
    assert only_refund(shop)["status"] == "processed"


def test_a_refund_event_that_overtakes_its_charge_is_not_forgotten(shop: Shop, sandbox: Sandbox) -> None:
    payment = shop.created()
    sandbox.pay(payment["reference"])
    sandbox.dashboard_refund(payment["reference"], 1000)
    sandbox.move_refund(payment["reference"], "processed")
    assert shop.deliver(payment["reference"], "refund.processed").status_code == 200
    poll(shop)
    poll(shop)
    assert shop.get(payment["id"])["refunded_amount"] == 10


def test_reversed_without_any_webhook_is_paid_then_refunded(shop: Shop, sandbox: Sandbox) -> None:
    payment = shop.created()
    sandbox.pay(payment["reference"])
    sandbox.dashboard_refund(payment["reference"])
    sandbox.move_refund(payment["reference"], "processed")
    poll(shop)
    poll(shop)
    assert shop.get(payment["id"])["status"] == "refunded"
    trail = shop.sql("SELECT to_status FROM payment_events ORDER BY n")
    assert [row["to_status"] for row in trail][-2:] == ["completed", "refunded"]
    assert incidents(shop) == []
    check_books(shop.database_url)


def test_reversed_without_a_refund_is_a_chargeback_after_half_an_hour(shop: Shop, sandbox: Sandbox) -> None:
    payment = shop.created()
    sandbox.pay(payment["reference"])
    sandbox.alter(payment["reference"], status="reversed")
    poll(shop)
    poll(shop)
    assert (shop.get(payment["id"])["status"], incidents(shop)) == ("completed", [])
    shop.sql("UPDATE payments SET refunds_awaited_since = now() - interval '31 min'")
    poll(shop)
    assert incidents(shop) == ["chargeback"]
    assert shop.sql("SELECT refunds_awaited_since FROM payments") == [{"refunds_awaited_since": None}]


# Two at the same moment


def test_two_refunds_that_are_processed_at_the_same_moment_are_both_counted(shop: Shop, sandbox: Sandbox) -> None:
    payment = paid(shop)
    for amount in (1000, 2000):
        sandbox.dashboard_refund(payment["reference"], amount)
        sandbox.move_refund(payment["reference"], "processed")
    first, second = (shop.app.gateway.refund_of_id(refund["id"]) for refund in sandbox.refunds())
    second_of_two(
        shop,
        lambda database: database.transaction(apply_refund, "test", first, "worker"),
        lambda database: database.transaction(apply_refund, "test", second, "worker"),
    )
    assert shop.get(payment["id"])["refunded_amount"] == 30


def test_of_two_refunds_that_are_begun_at_the_same_moment_one_finds_too_little_left(shop: Shop) -> None:
    payment = paid(shop)
    begins = [Request(payment["id"], amount, "operator:ada") for amount in ("30.00", "29.00")]
    with pytest.raises(db.Impossible, match="only NGN 20"):
        second_of_two(
            shop,
            lambda database: begin(database, "test", begins[0]),
            lambda database: begin(database, "test", begins[1]),
        )


def test_a_refund_is_polled_by_one_worker_at_a_time(shop: Shop) -> None:
    begun(shop, paid(shop))
    shop.sql("UPDATE refunds SET poll_at = now()")
    with slow_process(shop) as database:
        assert len(claim_due(database, "test", 20, 60)) == 1
        assert claim_due(shop.app.database, "test", 20, 60) == []


FOUND = money.Refund(3018284, "", None, 2000, "NGN", "pending", None)


@pytest.mark.parametrize(
    "end",
    [
        lambda database, refund: database.transaction(end_sending, refund, refused_because="no"),
        lambda database, refund: database.transaction(finish_poll, refund, None),
        lambda database, refund: database.transaction(give_up, refund, []),
        lambda database, refund: database.transaction(
            apply_refund, "test", replace(FOUND, charge_reference=refund.charge_reference, note=refund.id), "worker"
        ),
    ],
    ids=["refused", "polled", "given up", "found"],
)
def test_who_waits_for_a_payment_holds_no_refund_of_it(shop: Shop, end: Callable[[Database, Refund], object]) -> None:
    """The payment is locked before its refunds, or each of two may wait for the other."""
    refund = begun(shop, paid(shop))
    second_of_two(
        shop,
        lambda database: database.run(lambda conn: lock_refundable(conn, "test", refund.payment_id)),
        lambda database: end(database, refund),
        leaves="refunds",
    )


def test_a_refund_that_is_found_at_the_same_moment_is_not_given_up(shop: Shop) -> None:
    refund = begun(shop, paid(shop))
    found = replace(FOUND, charge_reference=refund.charge_reference, note=refund.id)
    second_of_two(
        shop,
        lambda database: database.transaction(apply_refund, "test", found, "worker"),
        lambda database: database.transaction(give_up, refund, []),
    )
    assert (statuses(shop), incidents(shop)) == (["pending"], [])


@pytest.mark.parametrize(("days", "is_polled"), [(29.99, True), (30, False)])
def test_a_refund_is_polled_for_30_days(days: float, is_polled: bool) -> None:
    assert (next_poll_seconds(days * DAY) is not None) is is_polled
