"""erase a customer's personal data, and keep the money facts

Overwrites name, e-mail, phone, location, description, metadata, return URL, the bodies of events, and reasons. The
audit trail stays whole. Refuses a payment that is pending, ended unpaid less than 30 days ago, or has a refund or an
event under way. With --email it still erases the customer's other payments, and exits with 1.

examples:
  python manage.py erase PAY-0123456789ABCDEFGHJKMNPQRS --dry-run
  python manage.py erase --email john@example.com --yes
"""

import argparse
import secrets
from collections.abc import Iterator
from typing import Any

import commands
import db
from commands import Parser, Refused


def add_arguments(parser: Parser) -> None:
    whose = parser.add_mutually_exclusive_group(required=True)
    whose.add_argument("name", nargs="?", metavar="ID|REFERENCE")
    whose.add_argument("--email", help="all payments of this customer, in both modes")
    commands.add_decision(parser)


def run(arguments: argparse.Namespace, env: commands.Environment, url: str) -> int:
    kept, erased = 0, 0
    with commands.reading(url) as conn, db.Database(url, 1, notifies="NOTIFY_URL" in env) as database:
        whose = arguments.name if arguments.email is None else arguments.email
        ids = iter([commands.named(conn, whose).id]) if arguments.email is None else payments_of(conn, whose)
        commands.confirm(arguments, f"Erase the personal data of {whose}? This cannot be undone.")
        for payment_id in ids:
            try:
                is_new = erase_payment(database, payment_id, arguments.by, dry_run=arguments.dry_run)
            except db.Impossible as error:
                kept += 1
                commands.complain(str(error))
                continue
            erased += 1
            word = "would be erased" if arguments.dry_run else "erased"
            print(f"{payment_id}: {word if is_new else 'has been erased before'}")
    if not kept and not erased:
        raise Refused(f"no payment of {whose} is here")
    if kept:
        return 1
    commands.print_next("audit")
    return 0


def payments_of(conn: db.BoundedConnection, email: str) -> Iterator[str]:
    """The ids of a customer's payments, of both modes."""
    query = "SELECT id FROM payments WHERE lower(customer_email) = lower(%(email)s) ORDER BY id"
    return (row["id"] for row in commands.stream(conn, query, {"email": email}))


def _refuse_to_erase(conn: db.BoundedConnection, payment: dict[str, Any]) -> None:
    row = db.only_row(
        conn,
        """
        SELECT %(expires_at)s > now() - interval '30 days' AS is_recent,
               (SELECT min(id) FROM refunds WHERE payment_id = %(id)s
                   AND status IN ('unanswered', 'pending', 'processing', 'needs-attention')) AS refund_id,
               EXISTS (SELECT FROM provider_events
                        WHERE reference = ANY(%(references)s) AND outcome = 'received') AS is_to_be_applied
        """,
        {**payment, "references": db.references_of(payment["reference"])},
    )
    if payment["status"] == "pending":
        raise db.Impossible(f"{payment['id']} is pending: it may still be paid")
    if payment["status"] in db.UNPAID and row["is_recent"]:
        raise db.Impossible(f"{payment['id']} ended unpaid less than 30 days ago: late money may still come")
    if row["refund_id"] is not None:
        raise db.Impossible(f"refund {row['refund_id']} of {payment['id']} is under way")
    if row["is_to_be_applied"]:
        raise db.Impossible(f"an event of {payment['id']} has not been applied yet")


def _erase(conn: db.BoundedConnection, payment: dict[str, Any]) -> None:
    references = db.references_of(payment["reference"])
    values = {**payment, "references": references, "fingerprint": secrets.token_bytes(32)}
    for statement in (
        """
        UPDATE payments
           SET customer_name = 'erased', customer_email = 'erased', customer_phone = 'erased', location = 'erased',
               description = CASE WHEN description IS NOT NULL THEN 'erased' END, metadata = NULL, return_url = NULL,
               status_reason = CASE WHEN status_reason IS NOT NULL THEN 'erased' END,
               erased_at = clock_timestamp(), salt = gen_random_uuid()
         WHERE id = %(id)s AND erased_at IS NULL
        """,
        """
        UPDATE idempotency_keys SET fingerprint = %(fingerprint)s
         WHERE payment_id = %(id)s AND %(erased_at)s::timestamptz IS NULL
        """,
        """
        UPDATE refunds
           SET reason = CASE WHEN reason IS NOT NULL THEN 'erased' END,
               refused_because = CASE WHEN refused_because IS NOT NULL THEN 'erased' END
         WHERE payment_id = %(id)s
        """,
        "UPDATE incidents SET close_reason = 'erased' WHERE payment_id = %(id)s AND close_reason <> 'erased'",
        """
        UPDATE notifications SET facts = facts || '{"status_reason": "erased"}'
         WHERE payment_id = %(id)s AND facts ->> 'status_reason' IS NOT NULL
        """,
        "UPDATE provider_events SET body = 'erased' WHERE reference = ANY(%(references)s) AND body IS NOT NULL",
    ):
        conn.execute(statement, values)


def erase_payment(database: db.Database, payment_id: str, operator: str, *, dry_run: bool = False) -> bool:
    """Overwrite a payment's personal data wherever they are stored; the money facts and the audit trail stay whole.
    False when that has been done before; then only what was written since is overwritten. Raises db.Impossible.

    The fingerprint of its key becomes random: the order could be guessed from it.
    """
    is_ours = False

    def work(conn: db.BoundedConnection) -> bool:
        nonlocal is_ours
        conn.execute("SELECT FROM idempotency_keys WHERE payment_id = %(id)s FOR UPDATE", {"id": payment_id})
        query = "SELECT * FROM payments WHERE id = %(id)s AND changed_by(%(operator)s, 'erased') FOR UPDATE"
        payment = db.only_row(conn, query, {"id": payment_id, "operator": operator})
        _refuse_to_erase(conn, payment)
        if not dry_run:
            _erase(conn, payment)
        is_ours = is_ours or payment["erased_at"] is None  # by a run whose COMMIT was not answered, too
        return is_ours

    return database.transaction(work)
