# ruff: noqa: F811  (fixtures are imported by their names)
"""Every payment comes to an end or to a person's eyes, and no work that fails stops the rest of it."""

from collections.abc import Callable, Iterator

import pytest

import charges
import refunds
from backstage import age, end_time, incidents, poll, poll_all, refuse_charges, worker_of
from db import open_incident
from invariants import check_books
from merchant import Merchant, merchant  # noqa: F401
from relay import Moment, Relay
from shop import LIVE, Shop, open_shop, query, sandbox, shop, wait_until  # noqa: F401
from test_worker import DAY, HOUR, MINUTE, manage, seconds_to_the_next_poll
from till import Till, open_till, till  # noqa: F401
from web import readers

# A payment that gets no end


@pytest.mark.parametrize("silence", ["not-found", "ongoing", "a-word-of-2031"])
def test_a_payment_that_gets_no_end_opens_an_incident_after_a_day_and_is_polled_more_rarely(
    shop: Shop, till: Till, silence: str
) -> None:
    payment = shop.created()
    if silence == "not-found":
        shop.sandbox.fault("verify", silence, times=None)
    else:
        shop.sandbox.alter(payment["reference"], status=silence)
    end_time(shop.database_url, payment["id"])
    poll(shop)
    assert not incidents(shop)
    assert seconds_to_the_next_poll(shop, payment["id"]) == pytest.approx(30 * MINUTE, abs=5)
    age(shop.database_url, payment["id"], DAY + HOUR)
    for _ in range(2):
        poll(shop)
        assert incidents(shop) == [("never_ended", payment["id"])]
    assert shop.get(payment["id"])["status"] == "pending"
    assert seconds_to_the_next_poll(shop, payment["id"]) == pytest.approx(23 * HOUR, abs=5)
    assert "does not say that it is unpaid" in till.run("doctor").out
    age(shop.database_url, payment["id"], 400 * DAY)
    poll(shop)
    assert 0 < (seconds_to_the_next_poll(shop, payment["id"]) or 0) <= 7 * DAY, "a pending payment is never given up"


@pytest.mark.parametrize("end", ["poll", "webhook"])
def test_the_incident_of_a_payment_without_an_end_closes_by_its_end(shop: Shop, end: str) -> None:
    payment = shop.created()
    shop.sandbox.fault("verify", "not-found")
    age(shop.database_url, payment["id"], 3 * DAY)
    poll(shop)
    assert shop.sql("SELECT closed_by FROM incidents") == [{"closed_by": None}]
    if end == "webhook":
        shop.pay(payment["reference"])
    else:
        poll(shop)
    assert shop.get(payment["id"])["status"] == ("completed" if end == "webhook" else "expired")
    assert shop.sql("SELECT closed_by FROM incidents") == [{"closed_by": end.replace("poll", "worker")}]
    check_books(shop.database_url)


def test_a_payment_that_was_declined_once_ends_as_failed_whatever_the_last_poll_says(shop: Shop) -> None:
    payment = shop.created()
    shop.sandbox.decline(payment["reference"])
    poll(shop)
    shop.sandbox.alter(payment["reference"], status="abandoned", gateway_response="The transaction was not completed")
    end_time(shop.database_url, payment["id"])
    poll(shop)
    told = shop.get(payment["id"])
    assert (told["status"], told["status_reason"]) == ("failed", "last try declined: Insufficient Funds")
    check_books(shop.database_url)


@pytest.mark.parametrize("status", ["failed", "expired", "completed"])
def test_erase_clears_what_a_bank_said_whatever_the_status(
    open_shop: Callable[..., Shop], till: Till, status: str
) -> None:
    shop = open_shop(NOTIFY_URL="http://127.0.0.1:9/", NOTIFY_SECRET="whsec_" + "QUFB" * 11)
    payment = shop.created()
    reason = "last try declined: Card of Ngozi is stolen"
    shop.sql("UPDATE payments SET status_reason = %s", reason)
    if status != "completed":
        end_time(shop.database_url, payment["id"])
        shop.app.database.transaction(
            lambda conn: conn.execute("UPDATE payments SET status = %(status)s", {"status": status})
        )
    shop.pay(shop.created()["reference"])  # somebody else's, untouched by it
    if status == "completed":
        shop.pay(payment["reference"])
        shop.sql("UPDATE payments SET status_reason = %s WHERE id = %s", reason, payment["id"])
        shop.sql("UPDATE notifications SET facts = facts || jsonb_build_object('status_reason', %s::text)", reason)
    age(shop.database_url, payment["id"], 40 * DAY)
    till.did("erase", payment["id"])
    assert shop.get(payment["id"])["status_reason"] == "erased"
    told = shop.sql("SELECT facts FROM notifications WHERE payment_id = %s", payment["id"])
    assert told
    assert "Ngozi" not in str(told)
    assert till.run("audit").status == 0


# Work that goes on


@pytest.mark.parametrize("fault", ["away", "bug"])
def test_worker_once_does_all_it_can_and_says_at_the_end_what_failed(
    open_shop: Callable[..., Shop], merchant: Merchant, fault: str
) -> None:
    shop = open_shop(**merchant.settings)
    shop.pay(shop.created()["reference"])
    assert len(shop.sql("SELECT id FROM notifications WHERE delivered_at IS NULL")) == 1
    if fault == "away":
        shop.sandbox.fault("list-transactions", "500", times=None)
    else:
        shop.sandbox.pay(shop.created()["reference"])
        refuse_charges(shop)
    (failed,) = worker_of(shop).run_once()
    assert failed.startswith("apply_lists: ")
    assert shop.sql("SELECT id FROM notifications WHERE delivered_at IS NULL") == []
    assert {row["name"] for row in shop.sql("SELECT name FROM jobs WHERE done_at IS NOT NULL")} >= {"prune"}


def test_the_status_of_worker_once_says_whether_all_was_done(shop: Shop) -> None:
    shop.sandbox.fault("list-transactions", "500", times=None)
    for status in (1, 0):  # the list is tried again in an hour, by the next run then
        process = manage(shop, "worker", "--once")
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == status, printed
        assert ("apply_lists: " in printed) == bool(status)


def test_a_payment_without_its_key_is_polled_and_holds_up_no_other(shop: Shop) -> None:
    broken, other = shop.created(), shop.created()
    for payment in (broken, other):
        shop.sandbox.pay(payment["reference"])
    shop.sql(
        f"SET session_replication_role = replica; DELETE FROM idempotency_keys WHERE payment_id = '{broken['id']}'"  # noqa: S608
    )
    shop.sql("UPDATE payments SET poll_at = now() - interval '1 h' WHERE id = %s", broken["id"])
    shop.sql("UPDATE payments SET poll_at = now() - interval '1 min' WHERE id = %s", other["id"])
    poll_all(shop)
    assert {row["status"] for row in shop.sql("SELECT status FROM payments")} == {"completed"}


def test_not_found_ends_no_payment_whose_key_is_lost(shop: Shop) -> None:
    payment = shop.created()
    shop.sql("SET session_replication_role = replica; DELETE FROM idempotency_keys")
    shop.sandbox.fault("verify", "not-found", times=None)
    end_time(shop.database_url, payment["id"])
    poll(shop)
    assert shop.get(payment["id"])["status"] == "pending"


# The other mode


@pytest.fixture
def gone_live(shop: Shop, open_shop: Callable[..., Shop]) -> Shop:
    """A shop that went live on the database of its tests, in which one test payment is still open."""
    shop.created()
    shop.sql("UPDATE payments SET poll_at = now() - interval '1 h'")
    return open_shop(METRICS_TOKEN="count-what-waits", **LIVE)


def test_after_going_live_no_test_payment_is_measured_or_made_due(gone_live: Shop) -> None:
    (payment,) = gone_live.sql("SELECT id FROM payments")
    answer = gone_live.client.simulate_get("/metrics", headers={"Authorization": "Bearer count-what-waits"})
    assert 'paygate_oldest_due_poll_seconds{mode="live"} 0\n' in answer.text
    assert 'mode="test"' not in answer.text
    waited = readers.poll_soon(gone_live.app.database, "live", {payment["id"]: 0.0}, [payment["id"]])
    assert waited == {payment["id"]: "pending"}
    assert gone_live.sql("SELECT wanted_at FROM payments") == [{"wanted_at": None}]
    readers.poll_soon(gone_live.app.database, "test", {payment["id"]: 0.0}, [])
    assert gone_live.sql("SELECT id FROM payments WHERE wanted_at IS NOT NULL") != []
    assert worker_of(gone_live).poll() > 0


def test_doctor_of_a_live_key_looks_at_live_work_also_when_the_configuration_is_wrong(
    gone_live: Shop, till: Till
) -> None:
    done = till.run("doctor", **{**LIVE, "CURRENCIES": "XXX"})
    assert ("configuration" in done.out, "polls waiting" in done.out) == (True, False)
    assert "polls waiting" in till.run("doctor").out


def test_pruning_covers_the_other_mode_too(shop: Shop, gone_live: Shop) -> None:
    shop.pay(shop.created()["reference"])
    shop.sql("UPDATE provider_events SET received_at = now() - interval '1000 days'")
    shop.sql(
        "INSERT INTO notifications (mode, type, sequence, facts, delivered_at)"
        " VALUES ('test', 'payment.completed', 1, '{}', now() - interval '1000 days')"
    )
    worker_of(gone_live).prune()
    assert shop.sql("SELECT id FROM provider_events WHERE body IS NOT NULL") == []
    assert shop.sql("SELECT id FROM notifications") == []


def test_a_paid_payment_that_another_account_does_not_know_is_asked_about_daily(shop: Shop) -> None:
    """As after a change of the key's account. At the usual lease a few hundred of these would use up all polls."""
    payment = shop.created()
    shop.pay(payment["reference"])
    shop.sandbox.fault("verify", "not-found", times=None)
    poll(shop)
    assert seconds_to_the_next_poll(shop, payment["id"]) == pytest.approx(DAY, abs=30)
    assert charges.next_verify_seconds(8 * DAY, is_answered=False) == DAY
    assert charges.next_verify_seconds(151 * DAY, is_answered=False) == DAY
    assert charges.next_verify_seconds(157 * DAY, is_answered=False) is None


# A lost reply


@pytest.fixture
def relay(database_url: str) -> Iterator[Relay]:
    with Relay(database_url) as relay:
        yield relay


@pytest.fixture
def cut_till(relay: Relay, open_till: Callable[..., Till]) -> Till:
    """Commands whose database loses the replies that a test tells the relay to lose."""
    return open_till(DATABASE_URL=relay.url)


def lost(relay: Relay, words: bytes) -> Moment:
    moment = relay.after(words)
    moment.over.set()
    return moment


def test_a_review_is_accepted_though_the_reply_to_its_commit_was_lost(shop: Shop, relay: Relay, cut_till: Till) -> None:
    payment = shop.created(customer_email="underpaid@example.com")
    shop.pay(payment["reference"])
    moment = lost(relay, b"COMMIT\0")
    told = cut_till.did("resolve", payment["id"], "accept", "--reason", "the rest came in cash", "--yes")
    moment.wait()
    assert "is completed" in told
    assert len(shop.sql("SELECT id FROM payment_events WHERE why = 'accepted'")) == 1
    other = cut_till.run("resolve", payment["id"], "accept", "--reason", "mine", "--by", "Grace", "--yes")
    assert (other.status, "nothing to accept" in other.err) == (1, True)


def test_an_incident_is_closed_though_the_reply_was_lost(shop: Shop, relay: Relay, cut_till: Till) -> None:
    shop.app.database.transaction(lambda conn: open_incident(conn, "test", "dispute", "PG-1"))
    moment = lost(relay, b"UPDATE incidents")
    assert "incident 1 closed" in cut_till.did("resolve", "--incident", "1", "--reason", "answered")
    moment.wait()
    for reason, by in (("another", "ada"), ("answered", "Grace")):
        again = cut_till.run("resolve", "--incident", "1", "--reason", reason, "--by", by)
        assert (again.status, "no open incident 1" in again.err) == (1, True)
    shop.sql("UPDATE incidents SET closed_at = closed_at - interval '2 min'")
    assert cut_till.run("resolve", "--incident", "1", "--reason", "answered").status == 1


def test_a_payment_is_erased_though_the_reply_to_its_commit_was_lost(shop: Shop, relay: Relay, cut_till: Till) -> None:
    payment = shop.created()
    shop.pay(payment["reference"])
    moment = lost(relay, b"COMMIT\0")
    assert f"{payment['id']}: erased\n" in cut_till.did("erase", payment["id"], "--yes")
    moment.wait()
    assert "has been erased before" in cut_till.did("erase", payment["id"], "--yes")


def test_a_refund_is_sent_though_the_reply_to_the_commit_that_claims_it_was_lost(
    open_shop: Callable[..., Shop], relay: Relay
) -> None:
    shop = open_shop(DATABASE_URL=relay.url)
    payment = shop.created()
    shop.pay(payment["reference"])
    request = refunds.Request(payment["id"], None, "operator:ada")
    begun = refunds.begin(shop.app.database, shop.app.gateway.mode, request)
    moment = lost(relay, b"COMMIT\0")
    assert refunds.send(shop.app.database, shop.app.gateway, begun).status == "pending"
    moment.wait()
    assert shop.sandbox.calls("refund") == 1


def test_the_first_daily_list_of_a_backup_reads_as_far_back_as_the_backup_is_old(shop: Shop) -> None:
    """As after `restore`: what came since the backup is only at the provider, and the list had never been read."""
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    shop.sandbox.backdate(payment["reference"], 10 * DAY)
    shop.sql("UPDATE payments SET poll_at = NULL")
    age(shop.database_url, payment["id"], 10 * DAY)
    worker_of(shop).apply_lists()
    assert shop.get(payment["id"])["status"] == "completed"


# What is done once a day


@pytest.mark.parametrize("list_of", ["list-transactions", "list-refunds"])
def test_a_day_s_lists_that_the_provider_did_not_give_are_not_done(shop: Shop, list_of: str) -> None:
    shop.created()
    shop.sandbox.fault(list_of, "503")
    assert worker_of(shop).run_once()
    assert shop.sql("SELECT done_at FROM jobs WHERE name = 'apply_lists'") == [{"done_at": None}]
    assert shop.sql("SELECT due_at < now() + interval '61 min' AS soon FROM jobs WHERE name = 'apply_lists'")[0]["soon"]
    shop.sql("UPDATE jobs SET due_at = now()")
    assert worker_of(shop).run_once() == []
    assert shop.sql("SELECT done_at FROM jobs WHERE name = 'apply_lists'") != [{"done_at": None}]


def test_a_pruning_that_failed_is_not_done(shop: Shop) -> None:
    shop.sql("ALTER TABLE notifications RENAME TO notified")
    worker_of(shop).run_once()
    assert shop.sql("SELECT done_at FROM jobs WHERE name = 'prune'") == [{"done_at": None}]


@pytest.mark.parametrize("silence", ["503", "lost-answer", "invalid-key"])
def test_a_poll_without_an_answer_is_no_look_that_got_one(shop: Shop, silence: str) -> None:
    shop.created()
    shop.sandbox.fault("verify", silence)
    poll(shop)
    assert shop.sql("SELECT * FROM jobs WHERE name = 'poll'") == []
    poll(shop)
    assert len(shop.sql("SELECT * FROM jobs WHERE name = 'poll'")) == 1
