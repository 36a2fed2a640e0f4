"""print a signed payment link

Customers who open it type name, e-mail, phone and town, and pay exactly this amount. A changed link is refused. With
--order the link is for one payment: its metadata names the order, and the link shows the receipt once it is paid.
Without --order anyone may pay by it, as often as they like. It works without PAY_FORM. Dates are in TIMEZONE.

examples:
  python manage.py link --amount 75.00 --description "A hat" --order 1001
  python manage.py link --amount 500 --currency XOF --expires 2027-01-01 --qr
"""

import argparse
import shlex
import sys
import time

import segno

import commands
import db
import settings
from commands import Parser, Refused
from web import links, orders


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--amount", type=commands.amount, required=True, metavar="75.00", help="in major units")
    parser.add_argument("--currency", help="the first of CURRENCIES unless given")
    parser.add_argument("--description", metavar="TEXT", help="what it is for; the customer sees it")
    parser.add_argument("--order", metavar="X", help="your number: the link is then for a single payment")
    parser.add_argument("--expires", type=commands.moment, metavar="DATE", help="nobody starts a payment from then on")
    parser.add_argument("--qr", action="store_true", help="draw it as a QR code too, on stderr")


def run(arguments: argparse.Namespace, env: commands.Environment, url: str) -> int:
    values = settings.load({**env, "DATABASE_URL": url})
    asked = {name: getattr(arguments, name) for name in ("amount", "currency", "description", "order")}
    fields = orders.Fields({name: text for name, text in asked.items() if text is not None})
    expires = int(arguments.expires.timestamp()) if arguments.expires else None
    if expires is not None and not time.time() < expires < 10**10:
        raise Refused("--expires is over already, or after 2285")
    made = links.Link.asked_for(fields, values, str(expires or ""))
    if fields.errors:
        raise Refused("; ".join(f"--{name} {text}" for name, texts in fields.errors.items() for text in texts))
    with db.Database(url, 1) as database:
        address = made.address(values, database)
    try:
        code = segno.make_qr(address) if arguments.qr else None
    except segno.DataOverflowError:
        raise Refused("the link is too long for a QR code: shorten --description or --order") from None
    print(address)
    if code is not None:
        code.terminal(out=sys.stderr, compact=True)
    commands.print_next(f"list --order {shlex.quote(made.order)}" if made.order else "list")
    return 0
