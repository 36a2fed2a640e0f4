# ruff: noqa: F811, S608  (fixtures are imported by their names; the SQL is written here)
"""What a person must look at: it opens when it happens, again when it happens again, and never by being told twice."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import psycopg.rows

import charges
import db
import refunds
from backstage import lose_all_rows, poll, second_of_two, worker_of
from local.sandbox import Sandbox
from money_back import incidents, settle
from shop import OpenShop, Shop, open_shop, sandbox, shop, wait_until  # noqa: F401  # fixtures
from till import Till, open_till, paid, till  # noqa: F401  # fixtures

NOTIFY = {"NOTIFY_URL": "http://127.0.0.1:9/", "NOTIFY_SECRET": "whsec_" + "QUFB" * 11}


def close(shop: Shop, till: Till) -> None:
    """The operator closes all that is open."""
    for row in shop.sql("SELECT id FROM incidents WHERE closed_at IS NULL ORDER BY id"):
        till.did("resolve", "--incident", str(row["id"]), "--reason", "seen")
    assert incidents(shop) == []


def paid_twice(shop: Shop) -> str:
    """The reference of a payment's second charge."""
    second = f"{paid(shop)['reference']}-2"
    shop.sandbox.charge_elsewhere(second)
    shop.deliver(second)
    assert incidents(shop) == ["second_charge"]
    return second


def test_a_refund_that_fails_again_after_it_was_paid_out_is_an_incident_again(
    shop: Shop, sandbox: Sandbox, till: Till
) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"])
    settle(shop, sandbox, payment["reference"], "failed")
    assert incidents(shop) == ["refund_failed"]
    settle(shop, sandbox, payment["reference"])
    assert incidents(shop) == []
    settle(shop, sandbox, payment["reference"], "failed")
    assert incidents(shop) == ["refund_failed"]


def test_a_second_charge_waits_again_once_its_refund_fails_after_all(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    second = paid_twice(shop)
    till.did("refund", second)
    for _ in range(2):
        settle(shop, sandbox, second)
        assert incidents(shop) == []
        settle(shop, sandbox, second, "failed")
        assert sorted(incidents(shop)) == ["refund_failed", "second_charge"]


def test_a_second_charge_waits_again_though_the_first_was_accepted(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop, customer_email="underpaid@example.com")
    till.did("resolve", payment["id"], "accept", "--reason", "enough")
    second = f"{payment['reference']}-2"
    sandbox.charge_elsewhere(second)
    shop.deliver(second)
    till.did("refund", second)
    settle(shop, sandbox, second)
    assert incidents(shop) == []
    settle(shop, sandbox, second, "failed")
    assert sorted(incidents(shop)) == ["refund_failed", "second_charge"]


def test_a_refund_that_was_made_though_it_seemed_refused_names_no_refusal(shop: Shop, sandbox: Sandbox) -> None:
    payment = paid(shop)
    request = refunds.Request(payment["id"], "20", "operator:ada")
    begun = refunds.begin(shop.app.database, shop.app.gateway.mode, request)
    shop.app.database.transaction(refunds.end_sending, begun, refused_because="Insufficient balance")
    sandbox.dashboard_refund(payment["reference"], 2000)
    sandbox.ledger.refund_named(payment["reference"]).merchant_note = begun.id
    settle(shop, sandbox, payment["reference"])
    assert incidents(shop) == ["refund_revived"]
    (refund,) = shop.sql("SELECT id, status, refused_because FROM refunds")
    assert refund == {"id": begun.id, "status": "processed", "refused_because": None}


def test_a_rejected_review_waits_again_once_its_refund_fails_after_all(
    shop: Shop, sandbox: Sandbox, till: Till
) -> None:
    payment = paid(shop, customer_email="underpaid@example.com")
    till.did("resolve", payment["id"], "reject", "--reason", "too little")
    settle(shop, sandbox, payment["reference"])
    settle(shop, sandbox, payment["reference"], "failed")
    assert sorted(incidents(shop)) == ["mismatch", "refund_failed"]
    told = shop.get(payment["id"])
    assert (told["status"], told["refunded_amount"]) == ("refunded", 0)
    assert till.run("audit").status == 0


def test_what_was_rejected_is_owed_whole_once_its_refund_fails_after_all(
    shop: Shop, sandbox: Sandbox, till: Till
) -> None:
    payment = shop.created()
    sandbox.ledger.known(payment["reference"]).amount = 6000
    shop.pay(payment["reference"])
    till.did("resolve", payment["id"], "reject", "--reason", "too much")
    settle(shop, sandbox, payment["reference"])
    settle(shop, sandbox, payment["reference"], "failed")
    till.did("refund", payment["id"])
    assert [refund["amount"] for refund in sandbox.refunds()] == [6000, 6000]
    settle(shop, sandbox, payment["reference"])
    assert incidents(shop) == ["refund_failed"]  # of the first refund, until somebody has read it


def test_an_accepted_review_does_not_wait_again(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop, customer_email="underpaid@example.com")
    till.did("resolve", payment["id"], "accept", "--reason", "enough")
    till.did("refund", payment["id"])
    settle(shop, sandbox, payment["reference"])
    settle(shop, sandbox, payment["reference"], "failed")
    assert incidents(shop) == ["refund_failed"]


def test_what_is_told_again_after_an_operator_has_closed_it_opens_nothing(
    shop: Shop, sandbox: Sandbox, till: Till
) -> None:
    second, disputed = paid_twice(shop), paid(shop)
    refunded = paid(shop)
    till.did("refund", refunded["id"])
    settle(shop, sandbox, refunded["reference"], "failed")
    overpaid = paid(shop)
    sandbox.dashboard_refund(overpaid["reference"], 6000)
    settle(shop, sandbox, overpaid["reference"])
    sandbox.dispute(disputed["reference"])
    shop.deliver(disputed["reference"], "charge.dispute.create")
    assert sorted(incidents(shop)) == ["dispute", "refund_failed", "refunded_too_much", "second_charge"]
    close(shop, till)
    shop.deliver(second)
    shop.deliver(disputed["reference"], "charge.dispute.create")
    shop.deliver(disputed["reference"], "charge.dispute.remind")
    shop.deliver(refunded["reference"], "refund.failed")
    for _ in range(2):
        shop.sql("DELETE FROM jobs")
        worker_of(shop).apply_lists()
        poll(shop)
    assert incidents(shop) == []


def test_each_time_is_notified_and_each_repetition_is_not(open_shop: OpenShop, sandbox: Sandbox, till: Till) -> None:
    shop = open_shop(**NOTIFY)
    payment = paid(shop)
    till.did("refund", payment["id"])
    for status in ("failed", "failed", "processed", "failed", "failed"):
        settle(shop, sandbox, payment["reference"], status)
    told = shop.sql("SELECT incident_id FROM notifications WHERE type = 'incident.opened'")
    assert len(told) == len({row["incident_id"] for row in told}) == 2


# One order, two pages


def linked(shop: Shop, key: str, order: str = "1002") -> dict[str, Any]:
    """A payment as an order's link makes it."""
    payment = shop.created(key=key, metadata={"order": order})
    shop.sql(
        f"SET session_replication_role = replica; UPDATE payments SET source = 'link' WHERE id = '{payment['id']}'"
    )
    return payment


def test_an_order_paid_on_two_pages_of_its_link_is_a_second_charge(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    first, second, other = linked(shop, "a"), linked(shop, "b"), linked(shop, "c", order="1003")
    for payment in (first, other):
        shop.pay(payment["reference"])
    assert incidents(shop) == []
    shop.pay(second["reference"])
    assert shop.sql("SELECT kind, subject, payment_id FROM incidents") == [
        {"kind": "second_charge", "subject": second["reference"], "payment_id": second["id"]}
    ]
    assert f"a second time, as {second['reference']}: refund that charge" in till.did("show", second["id"])
    till.did("refund", second["reference"])
    settle(shop, sandbox, second["reference"])
    assert incidents(shop) == []


def test_two_pages_of_an_order_paid_at_the_same_moment_are_a_second_charge(shop: Shop, sandbox: Sandbox) -> None:
    first, second = linked(shop, "a"), linked(shop, "b")
    for payment in (first, second):
        sandbox.pay(payment["reference"])
    connection = psycopg.connect(shop.database_url, row_factory=psycopg.rows.dict_row)
    with connection as conn, ThreadPoolExecutor(1) as threads:
        charge = shop.app.gateway.verify(first["reference"], 10)
        charges.apply_charge(conn, charge, "worker")  # type: ignore[arg-type]  # it is one; and any connection will do
        other = threads.submit(shop.deliver, second["reference"])
        wait_until(lambda: shop.sql("SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"))
        conn.commit()
        assert other.result(30).status_code == 200
    assert incidents(shop) == ["second_charge"]


def test_an_order_paid_again_after_its_money_went_back_is_none(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    first, second = linked(shop, "a"), linked(shop, "b")
    shop.pay(first["reference"])
    till.did("refund", first["id"])
    settle(shop, sandbox, first["reference"])
    shop.pay(second["reference"])
    assert incidents(shop) == []


def test_an_order_number_that_a_shop_sends_itself_says_nothing(shop: Shop) -> None:
    """Its metadata are its own: it may well pay one order in two parts."""
    for key in ("a", "b"):
        shop.pay(shop.created(key=key, metadata={"order": "1002"})["reference"])
    assert incidents(shop) == []


def test_who_closes_an_incident_waits_for_its_payment_first(shop: Shop, sandbox: Sandbox) -> None:
    """In the order of all that take both, or each of two may wait for the other."""
    payment = paid(shop, customer_email="underpaid@example.com")
    (opened,) = shop.sql("SELECT id FROM incidents")
    assert second_of_two(
        shop,
        lambda database: database.run(lambda conn: refunds.lock_refundable(conn, "test", payment["id"])),
        lambda database: database.transaction(db.close_incident, opened["id"], "operator:ada", "seen"),
        leaves="incidents",
    )


def test_unknown_money_is_explained_once_its_payment_is_back(shop: Shop, sandbox: Sandbox) -> None:
    payment = shop.created(key="one")
    sandbox.pay(payment["reference"])
    lose_all_rows(shop)
    assert shop.deliver(payment["reference"]).status_code == 200
    assert incidents(shop) == ["unknown_reference"]
    assert shop.created(key="one")["status"] == "completed"
    assert incidents(shop) == []
