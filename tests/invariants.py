"""What must be true of paygate's database after whatever has happened, computed here anew: `check_books(url)`."""

import hashlib
import itertools
from datetime import UTC
from typing import Any

import psycopg
import psycopg.rows

from shop import Shop

Row = dict[str, Any]

RANKS = {
    "pending": 0,
    "failed": 1,
    "expired": 1,
    "review": 2,
    "completed": 3,
    "partially_refunded": 4,
    "refunded": 5,
}
PAID = ("completed", "partially_refunded", "refunded")


def check_books(database_url: str) -> list[Row]:
    """All payments in `database_url`, after every invariant has been checked on them."""
    with psycopg.connect(database_url, row_factory=psycopg.rows.dict_row) as conn:
        conn.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ  # all of it as at one moment
        payments = conn.execute("SELECT * FROM payments ORDER BY created_at, id").fetchall()
        keys = {row["payment_id"]: row for row in conn.execute("SELECT * FROM idempotency_keys")}
        charges = {row["reference"]: row for row in conn.execute("SELECT * FROM charges")}
        incidents = {(row["kind"], row["subject"]) for row in conn.execute("SELECT * FROM incidents")}
        events = conn.execute("SELECT * FROM payment_events ORDER BY payment_id, n").fetchall()
        heard = conn.execute("SELECT * FROM provider_events").fetchall()
    trails = {payment_id: list(rows) for payment_id, rows in itertools.groupby(events, lambda row: row["payment_id"])}
    assert trails.keys() == {payment["id"] for payment in payments} == keys.keys()
    for payment in payments:
        check_trail(trails[payment["id"]])
        check_last_row(payment, trails[payment["id"]][-1])
        check_money(payment, charges)
        check_answer(payment, keys[payment["id"]])
    check_charges(payments, charges, incidents)
    for event in heard:
        assert (event["outcome"] != "applied") or event["reference"] in charges, event["reference"]
    return payments


def event_hash(previous_hash: bytes | None, event: Row) -> bytes:
    """The hash that an audit row must have: SHA-256 over the hash before it and the row's own fields, a line each."""
    at = event["at"].astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    names = "amount_minor", "currency", "mode", "reference", "charged_minor", "refunded_minor"
    fields = [event["payment_id"], event["n"], at, event["actor"], event["why"], event["from_status"] or ""]
    lines = [(previous_hash or b"").hex(), *fields, event["to_status"], *(event[name] for name in names)]
    return hashlib.sha256("\n".join(map(str, [*lines, event["digest"].hex()])).encode()).digest()


def check_trail(trail: list[Row]) -> None:
    """The rows of one payment are numbered without a gap, each follows from the one before it, and none was changed."""
    before: Row = {"hash": None, "to_status": None}
    for n, event in enumerate(trail, start=1):
        name = f"audit row {n} of {event['payment_id']}"
        assert event["n"] == n, f"{name} is missing"
        assert event["hash"] == event_hash(before["hash"], event), f"{name} was changed"
        assert event["from_status"] == before["to_status"], f"{name} does not follow from the one before it"
        assert n == 1 or RANKS[event["to_status"]] >= RANKS[event["from_status"]], f"{name} falls"
        before = event
    assert (trail[0]["to_status"], trail[0]["why"]) == ("pending", "reserved")


def check_last_row(payment: Row, last: Row) -> None:
    reference = payment["charge_reference"] or payment["reference"] + (
        f"-{payment['attempt']}" if payment["attempt"] > 1 else ""
    )
    stands = {"to_status": payment["status"], "reference": reference}
    stands |= {name: payment[name] for name in ("amount_minor", "currency", "mode", "charged_minor", "refunded_minor")}
    assert {name: last[name] for name in stands} == stands, f"the audit trail of {payment['id']} lacks a change"


def check_money(payment: Row, charges: dict[str, Row]) -> None:
    """Money came exactly where the payment says so, and all of it where it counts as paid."""
    if payment["status"] in ("pending", "failed", "expired"):
        assert payment["charge_reference"] is None
        assert payment["id"] not in {charge["payment_id"] for charge in charges.values()}, f"{payment['id']} was paid"
        return
    charge = charges[payment["charge_reference"]]
    assert (charge["payment_id"], charge["mode"]) == (payment["id"], payment["mode"])
    assert payment["charged_minor"] == charge["amount_minor"]
    asked = payment["amount_minor"] if charge["requested_minor"] is None else charge["requested_minor"]
    pays = (asked, charge["currency"]) == (payment["amount_minor"], payment["currency"])
    pays = pays and charge["amount_minor"] >= payment["amount_minor"]
    if payment["accepted_by"] is None and payment["status"] != "refunded":
        assert pays == (payment["status"] in PAID), f"{payment['id']} is {payment['status']}"


def check_answer(payment: Row, key: Row) -> None:
    """One payment, at most one checkout URL ever given out."""
    if key["answer"] is None:
        assert payment["checkout_url"] is None
        return
    if key["answer"] == "payment":
        assert payment["checkout_url"] or payment["charge_reference"], f"{payment['id']} was answered without a page"
    else:
        assert payment["checkout_url"] is None, f"{payment['id']} was refused, and has a page"


def check_charges(payments: list[Row], charges: dict[str, Row], incidents: set[tuple[str, str]]) -> None:
    """Money that is not its payment's own, or does not pay for it, has been put before a person."""
    by_id = {payment["id"]: payment for payment in payments}
    for reference, charge in charges.items():
        payment = by_id[charge["payment_id"]]
        assert reference == payment["reference"] or reference[:-2] == payment["reference"]
        if payment["charge_reference"] != reference:
            assert ("second_charge", reference) in incidents, reference
        elif payment["status"] == "review":
            assert ("mismatch", reference) in incidents, reference


def only_payment(shop: Shop) -> dict[str, Any]:
    """The one payment that there is, as its row stands, after the books have been checked."""
    (payment,) = check_books(shop.database_url)
    return payment
