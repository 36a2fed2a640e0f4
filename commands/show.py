"""tell the whole story of one payment

Finds it in either mode by its id, one of its references, the number of its receipt, or your own order (its
Idempotency-Key, or `order` in its metadata). Tells in order of time (UTC): the request, each change and who made it,
Paystack's answers, charges, refunds, notifications and incidents.

examples:
  python manage.py show PAY-0123456789ABCDEFGHJKMNPQRS
  python manage.py show order-1001 --json
"""

import argparse
import hashlib
import json
import shlex

import commands
import db
import money
from commands import Parser, Refused
from web import shapes, story


def add_arguments(parser: Parser) -> None:
    parser.add_argument("name", metavar="ID|REFERENCE|ORDER")
    commands.add_json(parser)


def run(arguments: argparse.Namespace, env: commands.Environment, url: str) -> int:
    with commands.reading(url) as conn:
        payment = named(conn, arguments.name)
        values = {"id": payment.id, "references": db.references_of(payment.reference)}
        told = story.told(payment, commands.stream(conn, story.STORY, values))
        if arguments.json:
            timeline = f"[{', '.join(map(story.as_json, told))}]"
            members = {"payment": shapes.payment_json(payment, *commands.EXPORTED), "timeline": timeline}
            print(shapes.json_object(members))
            return 0
        print_payment(payment)
        print("\n  in UTC               who             what happened")
        for each in told:
            print(f"  {each['at']:%Y-%m-%d %H:%M:%S}  {commands.plain(each['who']):14}  {commands.plain(each['text'])}")
    follow = {
        "review": f'resolve {payment.id} accept --reason "…"',
        **dict.fromkeys(db.UNPAID, f"sync {payment.id}"),
    }
    commands.print_next(follow.get(payment.status, "list"))
    return 0


def named(conn: db.BoundedConnection, name: str) -> db.Payment:
    """The payment of an id, a reference, a receipt's number, or an order of the merchant's. Raises Refused."""
    if db.ID_PATTERN.fullmatch(name) or db.base_of(name):
        return commands.named(conn, name)
    rows = conn.execute(
        """
        SELECT * FROM payments
         WHERE id = ANY(ARRAY(
            SELECT id FROM payments WHERE metadata ->> 'order' = %(name)s
            UNION
            SELECT payment_id FROM idempotency_keys WHERE mode IN ('test', 'live') AND key = %(key)s
            UNION  -- a receipt's number is ten of the 26 characters of its reference
            SELECT id FROM payments
             WHERE length(%(name)s) = 10
               AND reference BETWEEN rpad('PG-' || %(receipt)s, 29, '0') AND rpad('PG-' || %(receipt)s, 29, 'Z')))
         ORDER BY created_at DESC LIMIT 2
        """,
        {"name": name, "receipt": name.upper(), "key": hashlib.sha256(name.encode()).digest()},
    ).fetchall()
    if len(rows) > 1:
        raise Refused(f"there is more than one: see python manage.py list --order {shlex.quote(name)}")
    if not rows:
        raise Refused(f"there is no payment {commands.plain(name)}")
    return db.Payment.of(rows[0])


def print_payment(payment: db.Payment) -> None:
    amount = money.readable
    is_other = payment.refunded_currency != payment.currency
    status = payment.status.replace("_", " ")
    price = amount(payment.amount_minor, payment.currency)
    print(f"{payment.id}: {price}, {status}{' (TEST)' if payment.mode == 'test' else ''}")
    lines = {
        "why": payment.status_reason,
        "customer": f"{payment.customer_name} <{payment.customer_email}>, {payment.customer_phone}, {payment.location}",
        "for": payment.description,
        "metadata": json.dumps(payment.metadata, ensure_ascii=False) if payment.metadata else None,
        "reference": payment.current_reference,
        "checkout": payment.open_checkout_url,
        "paid": amount(payment.charged_minor, payment.refunded_currency) if is_other else None,
        "given back": amount(payment.refunded_minor, payment.refunded_currency) if payment.refunded_minor else None,
        "accepted": payment.accepted_by,
    }
    for name, line in lines.items():
        if line:
            print(f"  {name:10}  {commands.plain(line)}")
