"""list payments, newest first

Lists the current mode's payments (test or live, by PAYSTACK_SECRET_KEY). Dates are in TIMEZONE; --until is exclusive.
CSV and JSON hold the members that GET gives, and phone, location and metadata, with times in UTC.

examples:
  python manage.py list --status review
  python manage.py list --since 2026-01-01 --until 2026-02-01 --limit 0 --format csv > january.csv
  python manage.py list --email john@example.com
  python manage.py list --order 1001
"""

import argparse
import csv
import itertools
import json
import re
import sys
from collections.abc import Iterator
from datetime import tzinfo

import commands
import db
import money
import settings
from commands import Parser
from web import books, shapes


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--status", choices=books.STATUSES, help="paid: completed, or given back in part or whole")
    parser.add_argument("--email", help="the customer's, in capitals or not")
    parser.add_argument("--phone", help="the customer's; the last nine digits count")
    parser.add_argument("--order", metavar="X", help="`order` in the metadata, such as a link's --order")
    parser.add_argument("--reference", metavar="PG-…", help="any reference of the payment at Paystack")
    commands.add_period(parser)
    parser.add_argument(
        "--limit", type=commands.whole_number, default=50, metavar="N", help="at most so many (50; 0: all)"
    )
    commands.add_format(parser, "table", "json", "csv")


def run(arguments: argparse.Namespace, env: commands.Environment, url: str) -> int:
    with commands.reading(url) as conn:
        filters = {
            "mode": settings.mode_of(env),
            "after": None,
            **{name: getattr(arguments, name) for name in ("status", "since", "until", "email", "order")},
            "phone": re.sub("[^0-9]", "", arguments.phone)[-9:] if arguments.phone is not None else None,
            "reference": db.base_of(arguments.reference) or arguments.reference,
            "limit": arguments.limit + 1 if arguments.limit else None,
        }
        rows = map(db.Payment.of, commands.stream(conn, books.PAYMENTS, filters))
        shown = itertools.islice(rows, arguments.limit or None)
        if arguments.format == "table":
            print_table(shown, arguments.zone)
        else:
            {"json": print_json, "csv": print_csv}[arguments.format](shown)
        if list(rows):  # at most one; reading to the end lets the server end the statement
            commands.remark(f"there are more than {arguments.limit}: --limit 0 lists all")
    return 0


def print_table(payments: Iterator[db.Payment], zone: tzinfo) -> None:
    first = next(payments, None)
    print(f"{'CREATED':21}  {'ID':30}  {'STATUS':18}  {'AMOUNT':>22}  CUSTOMER")
    for payment in itertools.chain([first] if first else [], payments):
        customer = commands.plain(f"{payment.customer_name} <{payment.customer_email}>")
        amount = money.readable(payment.amount_minor, payment.currency)
        at = f"{payment.created_at.astimezone(zone):%Y-%m-%d %H:%M %Z}"
        print(f"{at:21}  {payment.id}  {payment.status:18}  {amount:>22}  {customer}")
    commands.print_next(f"show {first.id}" if first else "list --help")


def print_json(payments: Iterator[db.Payment]) -> None:
    separator = "["
    for payment in payments:
        print(separator + shapes.payment_json(payment, *commands.EXPORTED), end="")
        separator = ",\n"
    print("[]" if separator == "[" else "]")


def print_csv(payments: Iterator[db.Payment]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(EXPORT_HEADER)
    writer.writerows(map(cells, payments))


EXPORT_HEADER = (
    *("id", "customer_name", "customer_email", "amount", "status", "currency", "reference", "checkout_url"),
    *("status_reason", "mode", "created_at", "paid_at", "refunded_amount", *commands.EXPORTED),
)


def cells(payment: db.Payment) -> list[str]:
    """An export's members as cells: a string's own text, nothing for null, anything else as JSON."""
    members = shapes.payment_members(payment, *commands.EXPORTED)
    texts = [members[name] for name in EXPORT_HEADER]
    return [
        commands.cell(json.loads(text)) if text.startswith('"') else "" if text == "null" else text for text in texts
    ]
