# ruff: noqa: F811  (fixtures are imported by their names)
"""What one mode does touches nothing of the other, though both are in one database and number their rows alike."""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

import charges
import checkout
import db
import money
import paystack
import refunds
import worker
from backstage import end_leases, incidents, make_due, poll, refuse_charges
from commands import doctor
from shop import LIVE, Shop, live, open_shop, sandbox, sign  # noqa: F401  # fixtures
from till import Till, open_till, paid, till  # noqa: F401  # fixtures
from web import outbox, readers

NOTIFY = {"NOTIFY_URL": "http://127.0.0.1:9/", "NOTIFY_SECRET": "whsec_" + "QUFB" * 11}


@pytest.fixture
def shop(open_shop: Callable[..., Shop]) -> Shop:
    return open_shop(**NOTIFY)


def everything_due(shop: Shop, till: Till) -> dict[str, Any]:
    """A payment of the test mode with one row of each kind that a worker claims, and all of them due."""
    payment = paid(shop)
    shop.sandbox.fault("refund", "lost-answer")
    till.run("refund", payment["id"], "--amount", "10")
    other = shop.created()
    shop.sandbox.pay(other["reference"])
    refuse_charges(shop)
    shop.deliver(other["reference"])
    make_due(shop.database_url)
    for table, column in (("refunds", "poll_at"), ("provider_events", "retry_at"), ("notifications", "due_at")):
        shop.sql(f"UPDATE {table} SET {column} = now() WHERE {column} IS NOT NULL")  # noqa: S608
    shop.sql("UPDATE payments SET wanted_at = now() WHERE id = %s", other["id"])
    return payment


CLAIMS: dict[str, Callable[[db.Database, str], object]] = {
    "refunds": lambda database, mode: refunds.claim_due(database, mode, 20, 60),
    "events": lambda database, mode: charges.claim_events(database, mode, 20),
    "notifications": lambda database, mode: outbox.claim_notification(database, mode, 60),
    **{
        f"payments, {order}": lambda database, mode, order=order: worker.claim_due(database, mode, 60, order)  # type: ignore[misc]
        for order in worker.ORDERS
    },
}


@pytest.mark.parametrize("what", CLAIMS)
def test_what_is_due_is_claimed_in_its_own_mode_alone(shop: Shop, till: Till, what: str) -> None:
    everything_due(shop, till)
    assert not CLAIMS[what](shop.app.database, "live")
    assert CLAIMS[what](shop.app.database, "test")


# Money


def test_money_of_the_other_mode_pays_nothing(shop: Shop) -> None:
    payment = shop.created()
    charge = money.Charge(payment["reference"], "live", 1, 5000, 5000, 0, "NGN", "card", None)
    shop.app.database.transaction(charges.apply_charge, charge, "webhook")
    assert shop.get(payment["id"])["status"] == "pending"
    assert (shop.sql("SELECT * FROM charges"), incidents(shop)) == ([], [("unknown_reference", payment["reference"])])


def test_nothing_of_the_other_mode_is_given_back(shop: Shop) -> None:
    payment = paid(shop)
    for target in (payment["id"], payment["reference"]):
        with pytest.raises(db.Impossible, match="there is no live payment"):
            shop.app.database.run(partial(refunds.lock_refundable, mode="live", target=target))


def same_refund(shop: Shop) -> dict[str, Any]:
    """A payment with a refund that is under way: the first of its mode, and so of the same numbers in both."""
    payment = paid(shop)
    request = refunds.Request(payment["id"], "10.00", "operator:ada")
    refunds.refund(shop.app.database, shop.app.gateway, request)
    return payment


@pytest.mark.parametrize("named_by", ["its id", "its charge's id"])
def test_a_refund_of_the_same_number_in_both_modes_is_two(shop: Shop, live: Shop, named_by: str) -> None:
    same_refund(shop)
    same_refund(live)
    (row,) = shop.sql("SELECT * FROM refunds WHERE mode = 'live'")
    (charge,) = shop.sql("SELECT * FROM charges WHERE mode = 'live'")
    number = row["provider_id"] if named_by == "its id" else 99
    listed = money.Refund(number, None, charge["provider_id"], 1000, "NGN", "processed", None)
    shop.app.database.transaction(refunds.apply_refund, "live", listed, "worker")
    told = shop.sql("SELECT mode, status FROM refunds ORDER BY mode, status")
    assert {row["status"] for row in told if row["mode"] == "test"} == {"pending"}
    assert "processed" in {row["status"] for row in told if row["mode"] == "live"}


def test_a_refund_that_names_a_charge_of_the_other_mode_is_not_recorded(shop: Shop) -> None:
    payment = paid(shop)
    listed = money.Refund(7, payment["reference"], None, 1000, "NGN", "processed", None)
    assert shop.app.database.transaction(refunds.apply_refund, "live", listed, "worker") is None
    assert shop.sql("SELECT * FROM refunds") == []


def test_a_row_that_cannot_be_read_and_names_what_is_of_the_other_mode_stops_no_list(shop: Shop, live: Shop) -> None:
    payment = same_refund(shop)
    (ours,) = shop.sql("SELECT id FROM refunds")
    live.sandbox.foreign_refund(transaction_reference=payment["reference"])
    live.sandbox.foreign_refund(merchant_note=ours["id"])
    live.sandbox.foreign_refund()  # of the same transaction's id as ours
    worker.apply_lists(live.app.database, live.app.gateway)


# Events


def hear(shop: Shop, reference: str, event: str, **members: Any) -> None:
    body = json.dumps(
        {"event": event, "data": {"transaction_reference": reference, "domain": "live", **members}}
    ).encode()
    assert shop.webhook(body, sign(body, LIVE["PAYSTACK_SECRET_KEY"])).status_code == 200


def test_an_event_that_names_a_payment_of_the_other_mode_is_not_put_to_it(shop: Shop, live: Shop) -> None:
    payment = shop.created()
    hear(live, payment["reference"], "refund.processed", amount=700)
    hear(live, payment["reference"], "charge.success")
    assert shop.sql("SELECT DISTINCT payment_id FROM provider_events") == [{"payment_id": None}]
    assert shop.sql("SELECT refunds_awaited_since FROM payments") == [{"refunds_awaited_since": None}]


def test_a_refund_that_the_other_mode_tells_of_is_not_awaited(shop: Shop, live: Shop) -> None:
    payment = paid(shop)
    hear(live, payment["reference"], "refund.processed", amount=700)
    shop.sandbox.dashboard_refund(payment["reference"], 1000)
    assert shop.deliver(payment["reference"], "refund.pending").status_code == 200
    poll(shop)
    assert shop.sql("SELECT refunds_awaited_since FROM payments") == [{"refunds_awaited_since": None}]


def test_one_order_paid_in_both_modes_is_not_paid_twice(shop: Shop, live: Shop) -> None:
    for each in (shop, live):
        payment = each.created(metadata={"order": "7"})
        shop.sql("SET session_replication_role = replica; UPDATE payments SET source = 'link'")
        each.pay(payment["reference"])
    assert incidents(shop) == []


def test_a_reader_of_the_other_mode_makes_nobody_look(shop: Shop) -> None:
    payment = shop.created()
    readers.poll_soon(shop.app.database, "live", {payment["id"]: 0.0}, [])
    assert shop.sql("SELECT wanted_at FROM payments") == [{"wanted_at": None}]
    readers.poll_soon(shop.app.database, "test", {payment["id"]: 0.0}, [])
    assert shop.sql("SELECT wanted_at FROM payments") != [{"wanted_at": None}]


# Keys


def test_a_key_in_both_modes_is_two_keys_at_each_step(shop: Shop, live: Shop) -> None:
    order = checkout.Order("Jane Doe", "jane@example.com", "+2348012345678", 5000, "Lagos", "NGN")
    key = checkout.key_of("order-1")
    theirs = "SELECT * FROM idempotency_keys WHERE mode = 'live'"
    checkout.reserve(shop.app.office, key, order)
    checkout.reserve(live.app.office, key, order)
    end_leases(shop.database_url)
    before = shop.sql(theirs)
    for _ in range(2):  # a lease that was over, and one that was given back
        taken = checkout.reserve(shop.app.office, key, order)
        checkout.release_lease(shop.app.database, taken, attempt=1, reference_exists=False)
        assert shop.sql(theirs) == before
    taken = checkout.reserve(shop.app.office, key, order)
    settled = shop.app.database.transaction(checkout.settle, taken, paystack.Opened("https://checkout.paystack.com/x"))
    assert (settled.payment.mode, settled.answer) == ("test", "payment")
    assert shop.sql(theirs) == before
    assert checkout.reserve(live.app.office, key, order).answer is None


# The worker's jobs, and what is told


def test_a_job_is_of_its_mode(shop: Shop) -> None:
    database = shop.app.database
    assert worker.claim_job(database, "apply_lists", "test", 60)
    assert worker.claim_job(database, "apply_lists", "live", 60)
    worker.finish_job(database, "apply_lists", "test", 60)
    shop.created()
    for table, column in (("jobs", "done_at"), ("payments", "created_at")):
        shop.sql(
            f"SET session_replication_role = replica; UPDATE {table} SET {column} = now() - interval '5 days'"  # noqa: S608
            f" WHERE {column} IS NOT NULL"
        )
    assert worker.days_since_job(database, "apply_lists", "test") == pytest.approx(5, abs=0.1)
    assert worker.days_since_job(database, "apply_lists", "live") == pytest.approx(0, abs=0.1)


def test_nothing_of_the_other_mode_is_sent_again(shop: Shop) -> None:
    payment = paid(shop)
    shop.sql("UPDATE notifications SET due_at = NULL, dead_at = now()")
    for payment_id in (None, payment["id"]):
        assert shop.app.database.transaction(outbox.send_again, "live", payment_id) == 0
        assert shop.app.database.transaction(outbox.send_again, "test", payment_id) == 1
        shop.sql("UPDATE notifications SET due_at = NULL, dead_at = now()")


# What people read


def test_a_report_is_of_one_mode(shop: Shop, till: Till) -> None:
    same_refund(shop)
    shop.sql("UPDATE refunds SET status = 'processed', processed_at = now()")
    assert "no money moved" in till.did("report", **LIVE)
    assert "no money moved" not in till.did("report")


@pytest.mark.parametrize(
    "what", ["poll_seconds", "refund_seconds", "event_seconds", "notification_seconds", "dead", "is_deaf"]
)
def test_what_doctor_looks_at_is_of_one_mode(shop: Shop, till: Till, what: str) -> None:
    everything_due(shop, till)
    shop.sql("INSERT INTO notifications (mode, type, sequence, facts, dead_at) VALUES ('test', 'x', 1, '{}', now())")
    shop.sql("SET session_replication_role = replica; UPDATE payment_events SET actor = 'worker'")
    live_health, health = (shop.app.database.only_row(doctor.HEALTH, {"mode": mode})[what] for mode in ("live", "test"))
    assert live_health in (None, 0, False)
    assert health not in (None, 0, False)


def test_doctor_names_the_incidents_of_one_mode(shop: Shop, till: Till) -> None:
    paid(shop, customer_email="underpaid@example.com")
    assert "incident 1" in till.run("doctor").out
    assert "incident" not in till.run("doctor", **LIVE).out
