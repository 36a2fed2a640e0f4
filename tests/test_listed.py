# ruff: noqa: F811  (fixtures are imported by their names)
"""What Paystack lists, with other shops' rows among it, numbers that no column takes and pages shorter than asked."""

from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

import paystack
import worker
from backstage import make_due, meanwhile, worker_of
from invariants import check_books, only_payment
from local.sandbox import Sandbox
from money_back import DAY, HOUR, MINUTE, age, incidents, only_refund, refunds, seek, settle, statuses, wait_for_refunds
from shop import Shop, open_shop, sandbox, shop, sign, wait_until  # noqa: F401  # fixtures
from till import Till, open_till, paid, till  # noqa: F401  # fixtures


def unpaid_here(shop: Shop, count: int = 1) -> list[dict[str, Any]]:
    """Payments whose money came, and nobody told us."""
    payments = [shop.created() for _ in range(count)]
    for payment in payments:
        shop.sandbox.pay(payment["reference"])
    return payments


def daily_list(shop: Shop) -> None:
    worker.apply_lists(shop.app.database, shop.app.gateway)


def completed(shop: Shop) -> int:
    return int(shop.sql("SELECT count(*) AS n FROM payments WHERE status = 'completed'")[0]["n"])


# Wide numbers


@pytest.mark.parametrize("customer", ["wide-id", "wide-metadata"])
def test_a_payment_of_wide_numbers_is_completed_and_given_back(
    shop: Shop, sandbox: Sandbox, till: Till, customer: str
) -> None:
    payment = paid(shop, customer_email=f"{customer}@example.com")
    assert shop.get(payment["id"])["status"] == "completed"
    assert shop.sql("SELECT provider_id IS NULL AS is_left_out FROM charges") == [
        {"is_left_out": customer == "wide-id"}
    ]
    till.did("refund", payment["id"])
    assert only_refund(shop)["provider_id"] == sandbox.refunds()[0]["id"]
    assert "no difference" in till.did("reconcile")
    sandbox.move_refund(payment["reference"], "processed")
    seek(shop)
    assert shop.get(payment["id"])["status"] == "refunded"
    assert incidents(shop) == []
    check_books(shop.database_url)


def test_wide_numbers_of_other_shops_hide_nothing_of_ours(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    unpaid_here(shop)
    elsewhere = sandbox.charge_elsewhere(email="wide-id@example.com", metadata={"user": 10**23})
    sandbox.dashboard_refund(elsewhere["reference"])
    assert till.run("reconcile").out.count("paid, but unknown here") == 1
    daily_list(shop)
    assert completed(shop) == 1
    assert "no difference" in till.did("reconcile")


# Short pages


def test_pages_that_are_shorter_than_asked_hide_nothing(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    sandbox.configure(page_cap=3)
    unpaid_here(shop, 7)
    daily_list(shop)
    assert completed(shop) == 7
    assert "no difference" in till.did("reconcile")


def test_a_refund_on_a_later_page_is_not_made_twice(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    sandbox.configure(page_cap=2)
    payment, other = paid(shop), paid(shop)
    sandbox.fault("refund", "lost-answer")
    assert till.run("refund", payment["id"]).status == 1
    for _ in range(4):
        sandbox.dashboard_refund(other["reference"], 100)
    age(shop, HOUR)
    seek(shop)
    assert "not_made" not in statuses(shop)
    assert "asked for already" in till.did("refund", payment["id"])
    assert len(sandbox.refunds(payment["reference"])) == 1


# Rows that cannot be read


def lost_answer(shop: Shop, till: Till, *words: str) -> dict[str, Any]:
    """A payment with a refund that was made, and whose answer never came."""
    payment = paid(shop)
    shop.sandbox.fault("refund", "lost-answer")
    assert till.run("refund", payment["id"], *words).status == 1
    return payment


def test_another_shops_refund_that_cannot_be_read_stops_nothing(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    sought, adopted, reversed_ = lost_answer(shop, till), paid(shop), paid(shop)
    sandbox.foreign_refund()
    sandbox.foreign_refund(["transaction_reference"], merchant_note="sent back", currency=None)
    sandbox.dashboard_refund(reversed_["reference"], 100)
    done = till.run("reconcile")
    assert "left out: 2" in done.err and "is pending there, unanswered here" not in done.out
    seek(shop)
    assert [refund["status"] for refund in refunds(shop) if refund["payment_id"] == sought["id"]] == ["pending"]
    daily_list(shop)
    assert [refund["payment_id"] for refund in refunds(shop)] == [sought["id"], reversed_["id"]]
    sandbox.dashboard_refund(adopted["reference"])
    settle(shop, sandbox, adopted["reference"])
    assert shop.get(adopted["id"])["status"] == "refunded"
    done = till.run("reconcile")
    assert (done.status, "left out: 2" in done.err) == (0, True)


@pytest.mark.parametrize("names", ["reference", "transaction", "note", "nothing", "a charge"])
def test_a_list_with_a_refund_that_cannot_be_read_and_may_be_ours_proves_nothing(
    shop: Shop, sandbox: Sandbox, till: Till, names: str
) -> None:
    payment = lost_answer(shop, till)
    (made,) = sandbox.refunds()
    left_out = {"reference": ["transaction_reference"], "transaction": ["transaction"], "note": ["merchant_note"]}
    kept = left_out.pop(names, [])
    if names == "a charge":  # by its id alone, which we may have of each but this one
        with psycopg.connect(shop.database_url) as conn:
            conn.execute("SET session_replication_role = replica")
            conn.execute("UPDATE charges SET provider_id = NULL")
        sandbox.alter_refund(made["id"], left_out["reference"] + left_out["note"], transaction=999, amount=None)
    elif names == "note":
        sandbox.alter_refund(made["id"], transaction=1, transaction_reference="T1", amount=None)
    else:
        sandbox.alter_refund(made["id"], [name for part in left_out.values() for name in part], amount=None)
    assert kept or names in ("nothing", "a charge")
    age(shop, HOUR)
    shop.sql("UPDATE refunds SET poll_at = now()")
    worker_of(shop).poll_refunds()
    assert (only_refund(shop)["status"], incidents(shop)) == ("unanswered", [])
    daily_list(shop)
    assert (only_refund(shop)["status"], incidents(shop)) == ("unanswered", ["unreadable_refund"])
    done = till.run("reconcile")
    assert done.status == 1
    sandbox.alter_refund(made["id"], amount=5000, transaction=made["transaction_id"], currency="NGN")
    sandbox.ledger.refunds[made["id"]].without.clear()
    sandbox.ledger.refunds[made["id"]].altered.clear()
    seek(shop)
    assert (only_refund(shop)["status"], only_refund(shop)["payment_id"]) == ("pending", payment["id"])


def test_a_transaction_that_cannot_be_read_is_left_out_and_counted(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    unpaid_here(shop)
    sandbox.alter(sandbox.charge_elsewhere()["reference"], amount=None)
    daily_list(shop)
    assert completed(shop) == 1
    done = till.run("reconcile")
    assert (done.status, "left out: 1" in done.err, "no difference" in done.out) == (0, True, True)


# Events that cannot be read


def test_a_signed_event_that_is_no_event_leaves_a_trace_and_makes_us_ask(shop: Shop, till: Till) -> None:
    (payment,) = unpaid_here(shop)
    shop.sql("UPDATE payments SET poll_at = now() + interval '1 day'")
    body = shop.sandbox.event(payment["reference"])[0].rstrip(b"} ")  # cut short
    for _ in range(2):
        assert shop.webhook(body, sign(body)).status_code == 200
    assert shop.sql("SELECT kind, subject, payment_id FROM incidents") == [
        {"kind": "unreadable_event", "subject": payment["reference"], "payment_id": payment["id"]}
    ]
    assert "cannot be read" in till.run("doctor").out
    worker_of(shop).poll()
    assert shop.get(payment["id"])["status"] == "completed"


def test_a_signed_event_that_cannot_be_read_and_names_nothing_leaves_a_trace(shop: Shop, till: Till) -> None:
    for body in (b"[]", b"[]", b"\xff\xfe"):
        assert shop.webhook(body, sign(body)).status_code == 200
    assert incidents(shop) == ["unreadable_event"] * 2
    assert "cannot be read" in till.run("doctor").out


def test_money_that_an_event_does_not_say_readably_leaves_a_trace(shop: Shop, sandbox: Sandbox) -> None:
    payment = paid(shop)
    assert shop.deliver(payment["reference"], amount="much").status_code == 200
    unknown = f"PG-{'0' * 26}"
    sandbox.charge_elsewhere(unknown)
    assert shop.deliver(unknown, amount=None).status_code == 200
    told = shop.sql("SELECT subject, payment_id FROM incidents WHERE kind = 'unreadable_event' ORDER BY id")
    assert told == [
        {"subject": payment["reference"], "payment_id": payment["id"]},
        {"subject": unknown, "payment_id": None},
    ]


# Fees


def test_fees_that_were_unknown_are_learned_from_the_next_answer(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment, other = paid(shop, customer_email="null-fees@example.com"), paid(shop)
    assert "fees are not known yet, so that net is too high: 1\n" in till.did("report")
    assert "charges of unknown fees" in till.did("report", "--format", "html")
    done = till.run("reconcile")
    assert f"{payment['reference']}: fees unknown here" in done.out and other["reference"] not in done.out
    (audited,) = shop.sql("SELECT count(*) FROM payment_events")
    daily_list(shop)
    known = {row["reference"]: row["fees"] for row in sandbox.transactions()}
    assert {row["reference"]: row["fees_minor"] for row in shop.sql("SELECT * FROM charges")} == known
    assert "no difference" in till.did("reconcile")
    assert "not known" not in till.did("report")
    assert shop.sql("SELECT count(*) FROM payment_events") == [{"count": audited["count"] + 1}]
    check_books(shop.database_url)


def test_fees_are_learned_once_and_in_the_currency_of_the_charge(shop: Shop, sandbox: Sandbox) -> None:
    payment = paid(shop, customer_email="null-fees@example.com")
    sandbox.alter(payment["reference"], currency="GHS", fees=3)
    daily_list(shop)
    assert shop.sql("SELECT fees_minor FROM charges") == [{"fees_minor": None}]
    sandbox.alter(payment["reference"], currency="NGN", fees=7)
    daily_list(shop)
    sandbox.alter(payment["reference"], fees=8)
    daily_list(shop)
    assert shop.sql("SELECT fees_minor FROM charges") == [{"fees_minor": 7}]


def test_the_database_lets_a_charge_learn_its_fees_once_and_nothing_else(shop: Shop) -> None:
    paid(shop, customer_email="null-fees@example.com")
    for change in ("fees_minor = 7, amount_minor = 1", "channel = 'bank'"):
        with pytest.raises(psycopg.errors.CheckViolation):
            shop.sql(f"UPDATE charges SET {change}")  # noqa: S608
    shop.sql("UPDATE charges SET fees_minor = 7")
    with pytest.raises(psycopg.errors.CheckViolation):
        shop.sql("UPDATE charges SET fees_minor = 8")


# Whose refund it is


def test_a_refund_is_of_the_transaction_whose_id_it_names_whatever_its_note_says(
    shop: Shop, sandbox: Sandbox, till: Till
) -> None:
    first, second = paid(shop), paid(shop)
    till.did("refund", first["id"], "--amount", "10")
    made = sandbox.dashboard_refund(second["reference"], 2000, merchant_note=only_refund(shop)["id"])
    sandbox.alter_refund(made["id"], ["transaction_reference"], status="processed")
    daily_list(shop)
    told = {row["payment_id"]: (row["amount_minor"], row["origin"]) for row in refunds(shop)}
    assert told == {first["id"]: (1000, "paygate"), second["id"]: (2000, "dashboard")}
    assert shop.get(first["id"])["refunded_amount"] == 0
    assert shop.get(second["id"])["refunded_amount"] == 20


def test_another_shops_refund_that_quotes_one_of_ours_is_none_of_ours(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"], "--amount", "10")
    quoted = only_refund(shop)["id"]
    sandbox.foreign_refund(["transaction_reference"], amount=2000, status="processed", merchant_note=quoted)
    daily_list(shop)
    assert (only_refund(shop)["amount_minor"], shop.get(payment["id"])["refunded_amount"]) == (1000, 0)


def test_a_refund_that_says_nothing_else_is_of_the_charge_that_its_note_quotes(
    shop: Shop, sandbox: Sandbox, till: Till
) -> None:
    payment = lost_answer(shop, till)
    sandbox.alter_refund(sandbox.refunds()[0]["id"], ["transaction_reference", "transaction"])
    seek(shop)
    assert (only_refund(shop)["status"], only_refund(shop)["payment_id"]) == ("pending", payment["id"])


# How often is asked


def asked(sandbox: Sandbox) -> int:
    return len(sandbox.requests())


def test_when_the_provider_asks_for_quiet_all_that_is_done_in_the_background_keeps_it(
    shop: Shop, sandbox: Sandbox, till: Till
) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"])
    shop.created()
    make_due(shop.database_url)
    shop.sql("UPDATE refunds SET poll_at = now()")
    worker = worker_of(shop)
    sandbox.fault("fetch-refund", "429-retry-after", retry_after=60)
    with pytest.raises(Exception, match="429"):
        worker.poll_refunds()
    before = asked(sandbox)
    pauses = [loop() for loop in (worker.poll, worker.poll_refunds, worker.apply_lists)]
    assert asked(sandbox) == before
    assert all(50 < pause <= 60 for pause in pauses), pauses
    assert shop.sql("SELECT name FROM jobs WHERE name = 'apply_lists'") == []
    with pytest.raises(Exception, match="429"):
        list(worker.gateway.refunds(datetime.now(UTC)))
    worker.pace.quiet_until = 0
    worker.poll()
    assert asked(sandbox) == before + 1


def test_an_awaited_refund_that_is_found_is_looked_for_no_more(shop: Shop, sandbox: Sandbox) -> None:
    payment = paid(shop)
    sandbox.dashboard_refund(payment["reference"], 1000)
    sandbox.fault("list-refunds", "empty-list", times=2)
    told = []
    shop.deliver(payment["reference"], "refund.pending")
    for _ in range(4):
        seek(shop)
        told.append((statuses(shop), sandbox.calls("list-refunds")))
    assert told == [([], 1), ([], 2), (["pending"], 3), (["pending"], 3)]


def test_a_refund_that_is_told_of_while_the_list_is_read_is_looked_for_again(shop: Shop, sandbox: Sandbox) -> None:
    """Two refunds of one amount are told of in the same words: that the first is known says nothing of the second."""
    payment = paid(shop)

    def give_back_and_tell() -> None:
        sandbox.dashboard_refund(payment["reference"], 1000)
        sandbox.move_refund(payment["reference"], "processed")
        assert shop.deliver(payment["reference"], "refund.processed").status_code == 200

    give_back_and_tell()
    sandbox.fault("list-refunds", "time-out", seconds=1, times=1)
    with meanwhile(lambda: seek(shop)) as done:
        wait_until(lambda: sandbox.calls("list-refunds") == 1)
        give_back_and_tell()
    done()
    assert shop.get(payment["id"])["refunded_amount"] == 20


def test_a_known_refund_is_looked_for_until_it_is_as_far_as_the_event_says(
    shop: Shop, sandbox: Sandbox, till: Till
) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"])
    shop.deliver(payment["reference"], "refund.pending")
    shop.sql("UPDATE refunds SET poll_at = NULL")
    seek(shop)
    seek(shop)
    assert sandbox.calls("list-refunds") == 1
    shop.deliver(payment["reference"], "refund.processed")  # the list is behind
    seek(shop)
    sandbox.move_refund(payment["reference"], "processed")
    seek(shop)
    seek(shop)
    assert shop.get(payment["id"])["status"] == "refunded"
    assert sandbox.calls("list-refunds") <= 3


def test_of_two_refunds_of_one_amount_the_other_one_is_awaited(shop: Shop, sandbox: Sandbox) -> None:
    payment = paid(shop)
    sandbox.dashboard_refund(payment["reference"], 1000)
    settle(shop, sandbox, payment["reference"])
    sandbox.dashboard_refund(payment["reference"], 1000)
    seek_for(shop, payment, "refund.pending")
    assert sorted(statuses(shop)) == ["pending", "processed"]
    sandbox.fault("list-refunds", "empty-list")
    shop.sql("UPDATE refunds SET poll_at = NULL")
    sandbox.move_refund(payment["reference"], "processed")
    seek_for(shop, payment, "refund.processed")
    assert sorted(statuses(shop)) == ["pending", "processed"]
    seek(shop)
    assert (statuses(shop), only_payment(shop)["refunded_minor"]) == (["processed"] * 2, 2000)


def seek_for(shop: Shop, payment: dict[str, Any], event: str) -> None:
    assert shop.deliver(payment["reference"], event).status_code == 200
    seek(shop)


def unreadable_refund_elsewhere(shop: Shop) -> None:
    """The newest refund that the provider lists is of another payment, and cannot be read."""
    shop.sandbox.dashboard_refund(paid(shop)["reference"], 1000)
    shop.sandbox.alter_refund(shop.sandbox.refunds()[-1]["id"], amount=None)


def test_a_refund_that_cannot_be_read_hides_no_other_payments_news(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment, reversed_ = paid(shop), paid(shop)
    sandbox.dashboard_refund(payment["reference"], 1000)
    sandbox.move_refund(payment["reference"], "processed")
    sandbox.reverse(reversed_["reference"])
    unreadable_refund_elsewhere(shop)
    daily_list(shop)
    assert shop.get(payment["id"])["refunded_amount"] == 10
    wait_for_refunds(shop)
    assert sorted(incidents(shop)) == ["chargeback", "unreadable_refund"]
    daily_list(shop)
    assert len(incidents(shop)) == 2, "told once"


@pytest.mark.parametrize("is_listed", [True, False])
def test_a_refund_that_no_list_proves_is_an_incident_after_thirty_days(
    shop: Shop, sandbox: Sandbox, till: Till, is_listed: bool
) -> None:
    lost_answer(shop, till)
    unreadable_refund_elsewhere(shop)
    sandbox.alter_refund(sandbox.refunds()[0]["id"], amount=0)
    if not is_listed:
        sandbox.fault("list-refunds", "invalid-key", times=None)
    age(shop, 31 * DAY)
    for _ in range(2):
        with suppress(paystack.Misconfigured):
            worker_of(shop).poll_refunds()
    assert (statuses(shop), incidents(shop)) == (["unanswered"], ["refund_not_final"])


@pytest.mark.parametrize("altered", [{"domain": None}, {"amount": 0}])
def test_a_refund_that_is_listed_oddly_is_not_made_twice(
    shop: Shop, sandbox: Sandbox, till: Till, altered: dict[str, Any]
) -> None:
    payment = lost_answer(shop, till, "--amount", "10")
    sandbox.alter_refund(sandbox.refunds()[0]["id"], **altered)
    age(shop, 31 * MINUTE)
    seek(shop)
    till.run("refund", "--amount", "10", payment["id"])
    assert len(sandbox.refunds()) == 1


def test_a_clock_that_was_ahead_proves_no_refund_unmade(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = lost_answer(shop, till, "--amount", "10")
    with psycopg.connect(shop.database_url) as conn:
        conn.execute("SET session_replication_role = replica")
        conn.execute("UPDATE charges SET paid_at = NULL, recorded_at = now() + interval '3 days'")
    age(shop, 31 * MINUTE)
    seek(shop)
    till.run("refund", payment["id"], "--amount", "10")
    assert (statuses(shop), len(sandbox.refunds())) == (["pending"], 1)


@pytest.mark.parametrize("names", ["another currency", "no charge of ours"])
def test_a_refund_that_an_event_tells_of_and_no_list_shows_is_an_incident(
    shop: Shop, sandbox: Sandbox, names: str
) -> None:
    payment = paid(shop, customer_email="wide-id@example.com")
    sandbox.dashboard_refund(payment["reference"], 2000)
    if names == "another currency":
        sandbox.ledger.refund_named(payment["reference"]).currency = "USD"
    else:
        sandbox.alter_refund(payment["reference"], ["transaction_reference"])
    settle(shop, sandbox, payment["reference"])
    wait_for_refunds(shop)
    assert (refunds(shop), incidents(shop)) == ([], ["unreadable_refund"])
