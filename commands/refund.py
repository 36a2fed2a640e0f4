"""give money back: all that is left of a payment, or a part

With an ID it gives back the payment's own charge, at most its price. With a REFERENCE it gives back exactly that
charge, such as a second one. paygate writes the refund down, then asks Paystack once. If no answer comes, the refund
counts as made: paygate looks for it, and never asks again by itself. The same amount of the same charge within 24 hours
is a repetition: it changes nothing, and succeeds. --again makes it a second refund.

examples:
  python manage.py refund PAY-0123456789ABCDEFGHJKMNPQRS
  python manage.py refund PAY-0123456789ABCDEFGHJKMNPQRS --amount 10.00 --reason "one item out of stock"
  python manage.py refund PG-0123456789ABCDEFGHJKMNPQRS-2 --dry-run
"""

import argparse
from dataclasses import replace

import commands
import db
import money
import refunds
from commands import Environment, Parser, complain, print_next, provider
from web import shapes


def add_arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="ID|REFERENCE")
    parser.add_argument(
        "--amount", type=commands.amount, metavar="10.00", help="a part, in major units; all that is left unless given"
    )
    parser.add_argument("--reason", help="why; kept here, and erased with the customer's data")
    parser.add_argument("--again", action="store_true", help="a second refund, even of the same amount within 24 hours")
    commands.add_decision(parser)
    commands.add_json(parser)


def run(arguments: argparse.Namespace, env: Environment, url: str) -> int:
    with provider.open_service(env, url) as service:
        provider.find(service, url, arguments.name)  # says best that there is no database, or no such payment
        request = refunds.Request(arguments.name, arguments.amount, arguments.by, arguments.reason, arguments.again)
        return give_back(arguments, service, request)


def give_back(arguments: argparse.Namespace, service: provider.Service, request: refunds.Request) -> int:
    """Say what will be given back, ask, do it, and say what came of it."""
    database, gateway = service.database, service.gateway
    try:
        charge, amount_minor = database.run(lambda conn: refunds.plan(conn, gateway.mode, request))
    except refunds.RefundAsked as asked:
        return tell_repetition(arguments, asked)
    what = f"{money.readable(amount_minor, charge.currency)} of {charge.reference}"
    if arguments.dry_run:
        left = money.readable(charge.left_minor - amount_minor, charge.currency)
        print(f"would give back {what}; {left} would be left")
        return 0
    customer = f"{charge.payment.customer_name} <{charge.payment.customer_email}>"
    commands.confirm(arguments, f"Give back {what} to {customer}?")
    confirmed = replace(request, amount=money.render(amount_minor, charge.currency))
    try:
        return tell_refund(arguments, refunds.refund(database, gateway, confirmed))
    except refunds.RefundAsked as asked:  # by somebody else meanwhile
        return tell_repetition(arguments, asked)
    except (KeyboardInterrupt, db.DatabaseUnavailable) as error:
        line = f"the refund may have been asked for, and is never asked for twice: manage.py show {request.target}"
        raise type(error)(line) from error


def tell_repetition(arguments: argparse.Namespace, asked: refunds.RefundAsked) -> int:
    refund = asked.refund
    at = f"{refund.created_at:%Y-%m-%d %H:%M} UTC by {refund.made_by}"
    amount = money.readable(refund.amount_minor, refund.currency)
    line = f"asked for already: refund {refund.id} of {amount}, {refund.status}, {at}"
    if arguments.json:
        print(shapes.refund_json(refund, is_repetition="true"))
    if not asked.is_recent:
        return complain(line)
    if not arguments.json:
        print(line)
        print_next(f"show {refund.payment_id}")
    return 0


def tell_refund(arguments: argparse.Namespace, refund: refunds.Refund) -> int:
    if arguments.json:
        print(shapes.refund_json(refund, is_repetition="false"))
    what = f"refund {refund.id} of {money.readable(refund.amount_minor, refund.currency)}"
    match refund.status:
        case "refused":
            return complain(f"Paystack refused {what}: {refund.refused_because}")
        case "not_made":  # it was given up before it could be sent
            return complain(f"{what} was not made; ask for it again")
        case "unanswered":
            line = f"no answer about {what}: it counts as made, and is looked for"
            return complain(f"{line}; manage.py show {refund.payment_id}")
    if not arguments.json:
        print(f"{what} for {refund.charge_reference}: {refund.status}")
        print_next(f"show {refund.payment_id}")
    return 0
