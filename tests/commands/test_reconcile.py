# ruff: noqa: F811  (fixtures are imported by their names)
"""Ours against the provider's: every difference is found, and nothing else."""

import csv
import io
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from backstage import meanwhile
from ledger import as_superuser, ledger  # noqa: F401  # fixtures
from local.sandbox import Sandbox
from money_back import settle
from shop import Shop, open_shop, sandbox, shop, wait_until  # noqa: F401  # fixtures
from till import Till, open_till, paid, till  # noqa: F401  # fixtures


def test_books_that_agree_have_no_difference(till: Till, ledger: list[dict[str, Any]]) -> None:
    assert "no difference" in till.did("reconcile")
    assert till.did("reconcile", "--format", "csv") == "payment,reference,difference,there,here,currency\n"


def differing(till: Till, *words: str) -> list[dict[str, str]]:
    done = till.run("reconcile", "--format", "csv", *words)
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert done.status == (1 if rows else 0), done
    return rows


def test_a_charge_that_our_database_lost_is_found(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment, kept = paid(shop), paid(shop)
    lost = f"PG-{'0' * 26}"
    sandbox.charge_elsewhere(lost, amount=7000)
    sandbox.charge_elsewhere(amount=9000)  # another shop's on the same account
    as_superuser(till, "DELETE FROM charges WHERE payment_id = %s", payment["id"])
    rows = {(row["payment"], row["reference"], row["difference"]) for row in differing(till)}
    assert rows == {
        (payment["id"], payment["reference"], "paid, but unknown here"),
        (payment["id"], payment["reference"], "completed here, without a charge"),
        ("", lost, "paid, but unknown here"),
    }
    assert kept["id"] not in till.run("reconcile").out


def test_a_webhook_that_is_still_missing_is_a_difference_until_sync(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = shop.created()
    sandbox.pay(payment["reference"])
    (row,) = differing(till)
    assert (row["payment"], row["there"], row["here"]) == (payment["id"], "50.00", "")
    assert "is completed" in till.did("sync", payment["id"])
    assert differing(till) == []


def test_a_completed_that_the_provider_does_not_know_is_found(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    sandbox.ledger.transactions[payment["reference"]].status = "abandoned"
    (row,) = differing(till)
    assert (row["payment"], row["difference"]) == (payment["id"], "paid here, but not there")


@pytest.mark.parametrize(
    ("members", "difference"),
    [({"amount": 4000}, "another amount"), ({"currency": "GHS"}, "another currency: GHS"), ({"fees": 1}, "other fees")],
)
def test_other_amounts_currencies_and_fees_are_found(
    shop: Shop, sandbox: Sandbox, till: Till, members: dict[str, Any], difference: str
) -> None:
    payment = paid(shop)
    sandbox.alter(payment["reference"], **members)
    (row,) = differing(till)
    assert (row["payment"], row["difference"]) == (payment["id"], difference)


def test_refunds_that_differ_are_found(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    unknown, moved, missing, undone = paid(shop), paid(shop), paid(shop), paid(shop)
    sandbox.dashboard_refund(unknown["reference"], 1000)
    for payment in (moved, missing, undone):
        till.did("refund", payment["id"])
    settle(shop, sandbox, undone["reference"])
    sandbox.ledger.refund_named(moved["reference"]).status = "processed"
    for payment in (missing, undone):
        del sandbox.ledger.refunds[sandbox.ledger.refund_named(payment["reference"]).id]
    told = {row["payment"]: row["difference"] for row in differing(till)}
    assert told[unknown["id"]].endswith("(pending) unknown here")
    assert told[moved["id"]].endswith("is processed there, pending here")
    assert told[missing["id"]].endswith("(pending) not there")
    assert told[undone["id"]].endswith("(processed) not there")


@pytest.mark.parametrize(("amount", "status"), [("20", "partially_refunded"), ("50", "refunded")])
def test_money_that_went_back_of_a_charge_that_is_gone_is_found(
    shop: Shop, sandbox: Sandbox, till: Till, amount: str, status: str
) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"], "--amount", amount)
    settle(shop, sandbox, payment["reference"])
    as_superuser(till, "DELETE FROM charges WHERE payment_id = %s", payment["id"])
    assert f"{status} here, without a charge" in {row["difference"] for row in differing(till)}


def test_what_the_other_mode_did_is_no_difference(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    """A provider numbers the refunds of each mode apart: the same number is another refund."""
    ours, others = paid(shop), paid(shop)
    for payment in (ours, others):
        till.did("refund", payment["id"])
    sandbox.alter(others["reference"], domain="live")
    sandbox.ledger.refunds.pop(sandbox.ledger.refund_named(others["reference"]).id)
    (number,) = till.sql("SELECT provider_id FROM refunds WHERE payment_id = %s", ours["id"])
    for table in ("payments", "idempotency_keys", "charges", "refunds"):
        column = "id" if table == "payments" else "payment_id"
        as_superuser(till, f"UPDATE {table} SET mode = 'live' WHERE {column} = %s", others["id"])  # noqa: S608
    as_superuser(
        till,
        "UPDATE refunds SET provider_id = %s, amount_minor = 1 WHERE payment_id = %s",
        number["provider_id"],
        others["id"],
    )
    assert differing(till) == []


def test_reconcile_reads_page_after_page(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    for _ in range(230):
        sandbox.charge_elsewhere()
    assert differing(till) == []
    assert sandbox.calls("list-transactions") >= 3
    sandbox.fault("list-transactions", "garbage", seed=10, probability=0.5)  # the second page
    done = till.run("reconcile")
    assert (done.status, "Paystack gave no answer" in done.err, payment["id"] in done.out) == (1, True, False)


def test_what_happens_while_the_lists_are_read_is_no_difference(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    sandbox.fault("list-refunds", "slow", seconds=3)
    with meanwhile(lambda: till.shell("reconcile", within_seconds=60)) as done:
        wait_until(lambda: sandbox.calls("list-refunds"), 40)  # the transactions have been read
        payment = paid(shop)
    assert done().status == 0, done()
    sandbox.ledger.transactions[payment["reference"]].status = "abandoned"
    assert len(differing(till)) == 1


@pytest.mark.usefixtures("elsewhere")
def test_since_leaves_older_payments_out(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    sandbox.ledger.transactions[payment["reference"]].status = "abandoned"
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).date()
    assert differing(till, "--since", str(tomorrow)) == []


def test_money_by_the_ninth_reference_that_our_database_lost_is_found(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = shop.created()
    sandbox.charge_elsewhere(f"{payment['reference']}-9", amount=5000)
    done = till.run("reconcile")
    line = f"{payment['id']}  {payment['reference']}-9: paid, but unknown here (NGN 50.00 there)"
    assert (done.status, line in done.out) == (1, True), done
    assert "differences since" in done.err and done.err.rstrip().endswith(": 1")


def test_each_sum_stands_on_its_side(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    sandbox.alter(payment["reference"], amount=4000)
    assert "another amount (NGN 40.00 there, NGN 50.00 here)" in till.run("reconcile").out
