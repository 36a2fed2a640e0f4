# ruff: noqa: F811, S608  (fixtures are imported by their names; the SQL is written here)
"""The customer's bank takes the money back: told by events, or found without them."""

import pytest

import charges
import worker
from backstage import make_due, poll, poll_all, worker_of
from local.sandbox import Sandbox
from money_back import DAY, incidents, seek, settle, wait_for_refunds
from shop import Shop, open_shop, sandbox, shop  # noqa: F401  # fixtures
from till import Till, open_till, paid, till  # noqa: F401  # fixtures


def tell(shop: Shop, dispute: dict[str, object], what: str, resolution: str | None = None) -> None:
    told = shop.deliver(str(dispute["reference"]), f"charge.dispute.{what}", id=dispute["id"], resolution=resolution)
    assert told.status_code == 200


def test_a_second_dispute_of_a_charge_is_an_incident_of_its_own(shop: Shop, sandbox: Sandbox) -> None:
    reference = paid(shop)["reference"]
    first, second = sandbox.dispute(reference), sandbox.dispute(reference)
    tell(shop, first, "create")
    tell(shop, first, "resolve", "declined")
    assert incidents(shop) == []
    tell(shop, second, "create")
    tell(shop, second, "remind")
    tell(shop, first, "resolve", "declined")
    assert incidents(shop) == ["dispute"]
    tell(shop, second, "resolve", "declined")
    assert incidents(shop) == []


@pytest.mark.parametrize("resolution", ["merchant-accepted", "auto-accepted", "customer-won", None])
def test_a_dispute_that_is_not_won_stays_open(shop: Shop, sandbox: Sandbox, resolution: str | None) -> None:
    dispute = sandbox.dispute(paid(shop)["reference"])
    tell(shop, dispute, "create")
    tell(shop, dispute, "resolve", resolution)
    assert incidents(shop) == ["dispute"]


def test_the_end_of_a_dispute_makes_us_ask_what_became_of_the_money(shop: Shop, sandbox: Sandbox) -> None:
    payment = paid(shop)
    sandbox.reverse(payment["reference"])
    tell(shop, sandbox.dispute(payment["reference"]), "resolve", "merchant-accepted")
    poll_all(shop)
    assert shop.sql("SELECT reversed_at IS NOT NULL AS is_reversed FROM payments") == [{"is_reversed": True}]
    wait_for_refunds(shop)
    assert incidents(shop) == ["dispute", "chargeback"]
    assert shop.get(payment["id"])["status"] == "completed"


def test_a_chargeback_that_nobody_told_of_is_found(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    sandbox.reverse(payment["reference"])
    wait_for_refunds(shop)
    assert incidents(shop) == ["chargeback"]
    done = till.run("reconcile")
    assert (done.status, "reversed there, more than its refunds" in done.out) == (1, True)
    close = shop.sql("SELECT id FROM incidents")[0]["id"]
    till.did("resolve", "--incident", str(close), "--reason", "written off")
    shop.sql("DELETE FROM jobs")
    worker_of(shop).apply_lists()
    wait_for_refunds(shop)
    assert incidents(shop) == []


def test_a_chargeback_that_is_undone_closes_and_the_next_one_opens_again(shop: Shop, sandbox: Sandbox) -> None:
    reference = paid(shop)["reference"]
    sandbox.reverse(reference)
    wait_for_refunds(shop)
    sandbox.ledger.known(reference).is_charged_back = False
    shop.deliver(reference)
    assert incidents(shop) == ["chargeback"]  # an event may be an old one
    poll(shop)
    assert incidents(shop) == []
    sandbox.reverse(reference)
    wait_for_refunds(shop)
    assert incidents(shop) == ["chargeback"]


def test_a_reversal_that_refunds_explain_is_no_chargeback(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment, _ = paid(shop), paid(shop)
    till.did("refund", payment["id"])
    settle(shop, sandbox, payment["reference"])
    wait_for_refunds(shop)
    wait_for_refunds(shop)
    assert incidents(shop) == []
    assert till.did("reconcile")


def test_a_paid_payment_is_verified_after_1_7_30_90_and_150_days(shop: Shop) -> None:
    paid(shop)
    looks = []
    for days in (0, 1, 7, 30, 90, 150):
        shop.sql(
            f"SET session_replication_role = replica; UPDATE charges SET recorded_at = now() - interval '{days} days'"
        )
        if days:
            poll(shop)
        (look,) = shop.sql("SELECT extract(epoch FROM poll_at - now())::float8 AS seconds FROM payments")
        looks.append(None if look["seconds"] is None else round(look["seconds"] / DAY + days))
    assert looks == [1, 7, 30, 90, 150, None]


@pytest.mark.parametrize("silence", ["500", "429-retry-after"])
def test_the_last_verification_comes_again_after_no_answer(shop: Shop, sandbox: Sandbox, silence: str) -> None:
    payment = paid(shop)
    shop.sql("SET session_replication_role = replica; UPDATE charges SET recorded_at = now() - interval '151 days'")
    sandbox.reverse(payment["reference"])
    sandbox.fault("verify", silence)
    poll(shop)
    assert incidents(shop) == []
    (look,) = shop.sql("SELECT extract(epoch FROM poll_at - now())::float8 AS seconds FROM payments")
    assert look["seconds"] == pytest.approx(DAY, abs=60) if silence == "500" else 100 < look["seconds"] < 200
    poll(shop)
    wait_for_refunds(shop)
    assert incidents(shop) == ["chargeback"]


def test_a_paid_payment_without_an_answer_is_asked_about_again(shop: Shop, sandbox: Sandbox) -> None:
    payment = paid(shop)
    sandbox.reverse(payment["reference"])
    sandbox.fault("verify", "500")
    poll(shop)
    wait_for_refunds(shop)
    wait_for_refunds(shop)
    assert incidents(shop) == ["chargeback"]


def test_a_reversal_that_a_refund_explained_is_a_chargeback_once_the_refund_fails(
    shop: Shop, sandbox: Sandbox, till: Till
) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"])
    wait_for_refunds(shop)
    sandbox.reverse(payment["reference"])
    sandbox.move_refund(payment["reference"], "failed")
    seek(shop)
    wait_for_refunds(shop)
    assert sorted(incidents(shop)) == ["chargeback", "refund_failed"]


def test_what_an_event_makes_due_while_an_unpaid_payment_is_polled_stays_due(shop: Shop, sandbox: Sandbox) -> None:
    payment = shop.created()
    make_due(shop.database_url)
    due = worker.claim_due(shop.app.database, "test", 100, "newest")
    assert due is not None
    sandbox.pay(payment["reference"])
    assert shop.deliver(payment["reference"], amount=None).status_code == 200  # cannot be read
    shop.app.database.transaction(worker.finish_poll, due.payment, next_seconds=1800, ends=False, declined=None)
    assert shop.sql("SELECT poll_at <= now() AS is_due FROM payments") == [{"is_due": True}]


def test_what_an_event_makes_due_while_the_payment_is_polled_stays_due(shop: Shop, sandbox: Sandbox) -> None:
    payment = paid(shop)
    make_due(shop.database_url)
    due = worker.claim_due(shop.app.database, "test", 100, "newest")
    assert due is not None
    worker.verify_references(shop.app.database, shop.app.gateway, due)
    sandbox.reverse(payment["reference"])
    tell(shop, sandbox.dispute(payment["reference"]), "resolve", "merchant-accepted")
    charges.finish_poll_of_paid(shop.app.database, due.payment, due.asked_at)
    assert shop.sql("SELECT poll_at <= now() AS is_due FROM payments") == [{"is_due": True}]
