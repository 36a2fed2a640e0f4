"""ask Paystack about a payment now

Asks about all its references and its refunds, and stores the answers as the worker does.

examples:
  python manage.py sync PAY-0123456789ABCDEFGHJKMNPQRS
"""

import argparse

import charges
import commands
import db
import money
import worker
from commands import Environment, Parser, complain, print_next, provider


def add_arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="ID|REFERENCE")


def run(arguments: argparse.Namespace, env: Environment, url: str) -> int:
    with provider.open_service(env, url) as service:
        before = provider.find(service, url, arguments.name)
        is_answered = ask(service, before)
        after = provider.find(service, url, before.id)
    refunded = money.readable(after.refunded_minor, after.refunded_currency)
    given_back = f", {refunded} given back" if after.refunded_minor else ""
    why = f" ({after.status_reason})" if after.status_reason else ""
    still = "still " if (before.status, before.refunded_minor) == (after.status, after.refunded_minor) else ""
    print(commands.plain(f"{after.id} is {still}{after.status}{given_back}{why}"))
    if not is_answered:
        return complain("Paystack gave no final answer: it is asked again by itself")
    print_next(f"show {after.id}")
    return 0


FIND = f"""
    SELECT {worker.DUE_COLUMNS} FROM payments p LEFT JOIN idempotency_keys k ON k.payment_id = p.id WHERE p.id = %(id)s
    """  # noqa: S608  # the columns are ours


def ask(service: provider.Service, payment: db.Payment) -> bool:
    """Ask about a payment and its refunds; whether Paystack answered."""
    database, gateway = service.database, service.gateway
    due = worker.Due.of(database.only_row(FIND, {"id": payment.id}))
    outcome = worker.verify_references(database, gateway, due)
    found = db.find_payment(database, payment.id)
    if found is not None and found.charge_reference is not None:
        charges.import_refunds(database, gateway, found, due.asked_at)
    return outcome != "no_answer"
