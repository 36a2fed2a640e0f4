"""end a review, or close an incident

A payment is in review if the money that came is not its price. `accept` counts it as paid. `reject` gives the whole
charge back; repeat it if that fails. Close an incident after you have done what `show` or `doctor` says about it.

examples:
  python manage.py resolve PAY-0123456789ABCDEFGHJKMNPQRS accept --reason "the rest was paid in cash"
  python manage.py resolve PAY-0123456789ABCDEFGHJKMNPQRS reject --reason "wrong amount"
  python manage.py resolve --incident 7 --reason "answered in the dashboard"
"""

import argparse

import charges
import commands
import db
import refunds
from commands import Environment, Parser, Refused, complain, print_next, provider, refund


def add_arguments(parser: Parser) -> None:
    parser.add_argument("name", nargs="?", metavar="ID")
    parser.add_argument("decision", nargs="?", choices=("accept", "reject"))
    parser.set_defaults(json=False)
    parser.add_argument("--incident", type=commands.whole_number, metavar="N", help="close this incident instead")
    parser.add_argument(
        "--currency",
        type=str.upper,
        metavar="NGN",
        help="accept a charge in this currency, unlike the price's",
    )
    parser.add_argument("--reason", required=True, help="why; kept here, and erased with the customer's data")
    commands.add_decision(parser)


def run(arguments: argparse.Namespace, env: Environment, url: str) -> int:
    if (arguments.incident is None) == (arguments.decision is None):
        return complain("give either an ID and accept or reject, or --incident N; see manage.py resolve --help", 2)
    if arguments.incident is not None:
        return close_incident(arguments, env, url)
    with commands.reading(url) as conn:
        payment = commands.named(conn, arguments.name)
    if arguments.decision == "accept":
        return accept(arguments, env, url, payment)
    with provider.open_service(env, url) as service:
        # The payment's own charge, whichever of its references was named.
        request = refunds.Request(payment.id, None, arguments.by, arguments.reason, rejects=True)
        return refund.give_back(arguments, service, request)


IS_OPEN = "SELECT true FROM incidents WHERE id = %(number)s AND closed_at IS NULL"


def close_incident(arguments: argparse.Namespace, env: Environment, url: str) -> int:
    with db.Database(url, 1, notifies="NOTIFY_URL" in env) as database:
        if arguments.dry_run:
            is_open = bool(database.rows(IS_OPEN, {"number": arguments.incident}))
        else:
            is_open = database.transaction(db.close_incident, arguments.incident, arguments.by, arguments.reason)
    if not is_open:
        raise Refused(f"there is no open incident {arguments.incident}")
    print(f"incident {arguments.incident} {'would be ' if arguments.dry_run else ''}closed")
    print_next("doctor")
    return 0


def accept(arguments: argparse.Namespace, env: Environment, url: str, payment: db.Payment) -> int:
    what = f"{payment.id}, {payment.status_reason or payment.status}"
    commands.confirm(arguments, f"Accept {what}?")
    how = {"currency": arguments.currency, "dry_run": arguments.dry_run}
    with db.Database(url, 1, notifies="NOTIFY_URL" in env) as database:
        charges.accept(database, payment, arguments.by, arguments.reason, **how)
    print(commands.plain(f"would accept {what}") if arguments.dry_run else f"{payment.id} is completed")
    print_next(f"show {payment.id}")
    return 0
