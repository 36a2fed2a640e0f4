"""compare our books with Paystack's lists

Reads all the account's transactions and refunds since a day (30 days ago), and prints a line for each difference: paid
there and unknown here; paid here and not there; other amounts, currencies, fees or refunds; money that went back
without refunds that explain it. It ignores other shops' transactions on the same account, and counts those
rows that it cannot read. The status is 1 if there is a difference.

examples:
  python manage.py reconcile
  python manage.py reconcile --since 2026-01 --format csv > differences.csv
"""

import argparse
import csv
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from psycopg import sql

import commands
import db
import money
import paystack
import worker
from commands import Environment, Parser, complain, print_next, provider


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--since", type=commands.moment, metavar="DATE", help="payments from this day on (30 days ago)")
    commands.add_format(parser, "table", "csv")


def run(arguments: argparse.Namespace, env: Environment, url: str) -> int:
    since = arguments.since or datetime.now(UTC) - timedelta(days=30)
    count, found = 0, None
    write = money.render if arguments.format == "csv" else money.readable
    with provider.open_service(env, url) as service, commands.reading(url) as conn:
        listed_from = since - timedelta(days=1)
        left_out: list[paystack.Unreadable] = []
        transactions = service.gateway.transactions(listed_from)
        charges = commands.watch(readable(transactions, left_out), unit=" charges")
        listed = service.gateway.refunds(listed_from)
        given_back = commands.watch(readable(listed, left_out), unit=" refunds")
        writer = csv.writer(sys.stdout, lineterminator="\n")
        if arguments.format == "csv":
            writer.writerow(("payment", "reference", "difference", "there", "here", "currency"))
        for found in differences(conn, service.gateway.mode, since, charges, given_back):
            count += 1
            there, here = (
                "" if found[side] is None else write(found[side], found["currency"]) for side in ("there", "here")
            )
            if arguments.format == "csv":
                cells = (found["payment"] or "", found["reference"], found["difference"], there, here)
                writer.writerow((*map(commands.cell, cells), found["currency"]))
            else:
                sides = ", ".join(f"{value} {side}" for value, side in ((there, "there"), (here, "here")) if value)
                name = found["payment"] or "no payment"
                print(f"{name}  {found['reference']}: {found['difference']} ({sides})")
        ours = [row for row in left_out if worker.may_be_ours(service.database, service.gateway.mode, row)]
    if left_out:
        complain(f"rows of the lists that cannot be read, and were left out: {len(left_out):,}")
    if count:
        if arguments.format == "table" and found and found["payment"]:
            print_next(f"sync {found['payment']}")
        return complain(f"differences since {since:%Y-%m-%d}: {count:,}")
    if ours:
        return complain(f"of these may be ours, which proves nothing: {len(ours):,}")
    if arguments.format == "table":
        print(f"no difference since {since:%Y-%m-%d}")
        print_next("audit")
    return 0


Listed = TypeVar("Listed", money.Charge, money.Refund)


def readable(rows: Iterable[Listed | paystack.Unreadable], left_out: list[paystack.Unreadable]) -> Iterator[Listed]:
    for row in rows:
        if isinstance(row, paystack.Unreadable):
            left_out.append(row)
        else:
            yield row


LISTED = """
CREATE TEMPORARY TABLE listed_charges (
    reference text, amount_minor bigint, currency text, fees_minor bigint, is_reversed boolean) ON COMMIT DROP;
CREATE TEMPORARY TABLE listed_refunds (
    provider_id numeric, reference text, charge_id bigint, amount_minor bigint, status text) ON COMMIT DROP
"""

DIFFERENCES = """
WITH theirs AS (
    SELECT DISTINCT ON (reference) * FROM listed_charges
     WHERE reference ~ '^PG-[0-9A-HJKMNP-TV-Z]{26}(-[2-9])?$'
), theirs_back AS (
    SELECT DISTINCT ON (l.provider_id) l.*, c.reference AS ours, c.payment_id, c.currency
      FROM listed_refunds l JOIN charges c
        ON c.reference = l.reference OR (l.reference IS NULL AND c.provider_id = l.charge_id)
     WHERE c.mode = %(mode)s
)
SELECT p.id AS payment, t.reference, 'paid, but unknown here' AS difference, t.amount_minor AS there,
       NULL::bigint AS here, t.currency
  FROM theirs t LEFT JOIN payments p ON p.reference = left(t.reference, 29)
 WHERE NOT EXISTS (SELECT FROM charges c WHERE c.reference = t.reference AND c.mode = %(mode)s)
UNION ALL
SELECT c.payment_id, c.reference, 'paid here, but not there', NULL, c.amount_minor, c.currency
  FROM charges c JOIN payments p ON p.id = c.payment_id
 WHERE c.mode = %(mode)s AND p.created_at >= %(since)s AND c.recorded_at < %(begun)s
   AND NOT EXISTS (SELECT FROM theirs t WHERE t.reference = c.reference)
UNION ALL
SELECT p.id, p.charge_reference, p.status || ' here, without a charge', NULL, p.amount_minor, p.currency
  FROM payments p
 WHERE p.mode = %(mode)s AND p.created_at >= %(since)s
   AND p.status IN ('completed', 'partially_refunded', 'refunded')
   AND NOT EXISTS (SELECT FROM charges c WHERE c.reference = p.charge_reference)
UNION ALL
SELECT c.payment_id, c.reference, 'another ' || CASE WHEN t.currency <> c.currency THEN 'currency: ' || t.currency
                                                     ELSE 'amount' END, t.amount_minor, c.amount_minor, c.currency
  FROM theirs t JOIN charges c USING (reference)
 WHERE c.mode = %(mode)s AND (t.amount_minor, t.currency) <> (c.amount_minor, c.currency)
UNION ALL
SELECT c.payment_id, c.reference, CASE WHEN c.fees_minor IS NULL THEN 'fees unknown here' ELSE 'other fees' END,
       t.fees_minor, c.fees_minor, c.currency
  FROM theirs t JOIN charges c USING (reference)
 WHERE c.mode = %(mode)s AND t.fees_minor IS NOT NULL AND t.fees_minor IS DISTINCT FROM c.fees_minor
UNION ALL
SELECT c.payment_id, c.reference, 'reversed there, more than its refunds', t.amount_minor, r.amount_minor, c.currency
  FROM theirs t JOIN charges c USING (reference),
       LATERAL (SELECT coalesce(sum(amount_minor), 0)::bigint AS amount_minor FROM refunds
                 WHERE charge_reference = c.reference AND status NOT IN ('refused', 'failed', 'not_made')) r
 WHERE c.mode = %(mode)s AND t.is_reversed AND r.amount_minor < c.amount_minor
UNION ALL
SELECT b.payment_id, b.ours, 'refund ' || b.provider_id || ' (' || b.status || ') unknown here', b.amount_minor, NULL,
       b.currency
  FROM theirs_back b
 WHERE NOT EXISTS (SELECT FROM refunds r WHERE r.mode = %(mode)s AND r.provider_id = b.provider_id)
UNION ALL
SELECT r.payment_id, r.charge_reference, 'refund ' || r.id || ' is ' || b.status || ' there, ' || r.status || ' here',
       b.amount_minor, r.amount_minor, r.currency
  FROM theirs_back b JOIN refunds r ON r.provider_id = b.provider_id AND r.mode = %(mode)s
 WHERE (b.amount_minor, b.status) <> (r.amount_minor, r.status)
UNION ALL
SELECT r.payment_id, r.charge_reference, 'refund ' || r.id || ' (' || r.status || ') not there', NULL, r.amount_minor,
       r.currency
  FROM refunds r
 WHERE r.mode = %(mode)s AND r.created_at >= %(since)s AND r.created_at < %(begun)s
   AND r.status NOT IN ('unanswered', 'refused', 'not_made')
   AND NOT EXISTS (SELECT FROM listed_refunds l WHERE l.provider_id = r.provider_id)
 ORDER BY reference, difference
"""


def differences(
    conn: db.BoundedConnection,
    mode: str,
    since: datetime,
    charges: Iterable[money.Charge],
    given_back: Iterable[money.Refund],
) -> Iterator[commands.Row]:
    """Where the provider's lists (complete, from `since` on) and our books differ.

    The lists go into temporary tables as they come, page after page. What we learned after the listing began is left
    out, for it may not be on a page that was read before.
    """
    with conn.transaction():
        # The tables are filled for as long as the provider takes.
        begun = db.only_row(conn, "SELECT now() AS begun, set_config('statement_timeout', '0', true)")["begun"]
        conn.execute(sql.SQL(LISTED))
        with conn.cursor().copy("COPY listed_charges FROM STDIN") as copy:
            for charge in charges:
                sums = (charge.amount_minor, charge.currency, charge.fees_minor)
                copy.write_row((charge.reference, *sums, charge.is_reversed))
        with conn.cursor().copy("COPY listed_refunds FROM STDIN") as copy:
            for each in given_back:
                facts = (each.provider_id, each.charge_reference, each.charge_provider_id)
                copy.write_row((*facts, each.amount_minor, each.status))
        conn.execute("ANALYZE listed_charges, listed_refunds")
        yield from commands.stream(conn, DIFFERENCES, {"mode": mode, "since": since, "begun": begun})
