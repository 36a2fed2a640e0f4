"""The operator's commands that ask Paystack: money back, reviews, looking, reconciling, the check before going live.

Apart from `commands`, so that a list or an audit does not wait for the HTTP client to be loaded.
"""

import argparse
import csv
import itertools
import json
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import books
import checkout
import commands
import db
import log
import money
import notifications
import paystack
import settings
import worker
from books import Refused
from commands import Environment, complain, print_next


def register(to: commands.Commands) -> None:
    parser = commands.add_command(to, "refund", refund)
    parser.add_argument("name", metavar="ID|REFERENCE")
    parser.add_argument(
        "--amount", type=commands.amount, metavar="10.00", help="a part, in major units (all that is left)"
    )
    parser.add_argument("--reason", help="kept here, and erased with the customer's data")
    parser.add_argument("--again", action="store_true", help="also when the same was asked for within 24 hours")
    commands.add_decision(parser)
    commands.add_operator(parser)
    commands.add_json(parser)

    parser = commands.add_command(to, "sync", sync)
    parser.add_argument("name", metavar="ID|REFERENCE")

    parser = commands.add_command(to, "resolve", resolve)
    parser.add_argument("name", nargs="?", metavar="ID")
    parser.add_argument("decision", nargs="?", choices=("accept", "reject"))
    parser.set_defaults(amount=None, again=False, json=False)
    parser.add_argument("--incident", type=commands.whole_number, metavar="N", help="close this incident instead")
    parser.add_argument("--reason", required=True, help="kept here, and erased with the customer's data")
    commands.add_decision(parser)
    commands.add_operator(parser)

    parser = commands.add_command(to, "notify", notify)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("name", nargs="?", metavar="ID|REFERENCE")
    what.add_argument("--dead", action="store_true", help="all that were given up")
    what.add_argument("--test", action="store_true", help="one that tells of nothing, now")

    parser = commands.add_command(to, "reconcile", reconcile)
    parser.add_argument("--since", type=commands.moment, metavar="DATE", help="payments from this day on (30 days ago)")
    commands.add_format(parser, "table", "csv")

    parser = commands.add_command(to, "doctor", doctor)
    commands.add_json(parser)

    parser = commands.add_command(to, "worker", run_worker)
    parser.add_argument("--once", action="store_true", help="do what is due, and end")


@dataclass(frozen=True)
class Desk:
    """What a command that asks the provider works with."""

    settings: settings.Settings
    database: db.Database
    gateway: paystack.Gateway


@contextmanager
def open_desk(env: Environment, url: str, pool_size: int | None = 1) -> Iterator[Desk]:
    """Raises Refused, also when the provider gives no answer while it is used. `pool_size` None is DB_POOL."""
    if "PAYSTACK_SECRET_KEY" not in env:
        raise Refused("no PAYSTACK_SECRET_KEY is set and no sandbox runs here: start python manage.py runserver first")
    values = settings.load({**env, "DATABASE_URL": url})
    try:
        size = values.db_pool if pool_size is None else pool_size
        with db.Database(url, size, notifies=values.notify_url is not None) as database:
            yield Desk(values, database, gateway_of(values))
    except paystack.Misconfigured:
        raise Refused("Paystack refuses our key or set-up: see python manage.py doctor") from None
    except paystack.Unavailable as error:
        raise Refused(f"Paystack gave no answer ({error}): try again later") from error


def gateway_of(values: settings.Settings) -> paystack.Gateway:
    keys, timeout_seconds = values.paystack_secret_keys, values.paystack_timeout_seconds
    return paystack.Gateway(keys, values.paystack_url, timeout_seconds, values.mode)


def find(desk: Desk, url: str, name: str) -> db.Payment:
    with db.reading(url) as conn:
        payment = commands.named(conn, name)
    if payment.mode != desk.gateway.mode:
        raise Refused(f"{payment.id} is a {payment.mode} payment, and the key is a {desk.gateway.mode} key")
    return payment


def amount_of(refund: db.Refund) -> str:
    return f"{money.render(refund.amount_minor, refund.currency)} {refund.currency}"


# Money back


def refund(arguments: argparse.Namespace, env: Environment, url: str) -> int:
    """give money back: all that is left of a payment, or a part

    An id means the payment's own charge and at most its price; a reference means exactly that charge, such as a second
    one. The refund is written down first and asked for once. Without an answer it counts as made and is looked for, and
    never asked for again by itself. The same amount of the same charge within 24 hours is taken for a repetition, which
    changes nothing and is a success; --again makes it a second refund.

    examples:
      python manage.py refund PAY-0123456789ABCDEFGHJKMNPQRS
      python manage.py refund PAY-0123456789ABCDEFGHJKMNPQRS --amount 10.00 --reason "one item out of stock"
      python manage.py refund PG-0123456789ABCDEFGHJKMNPQRS-2 --dry-run
    """
    return give_back(arguments, env, url, rejecting=False)


def give_back(arguments: argparse.Namespace, env: Environment, url: str, *, rejecting: bool) -> int:
    name, text, again = arguments.name, arguments.amount, arguments.again
    made_by = commands.operator_of(arguments)
    amount_minor = None if text is None else lambda currency: parse_amount(text, currency)
    with open_desk(env, url) as desk:
        find(desk, url, name)  # says at once, and better than a pool, that there is no database or no such payment
        try:
            charge, planned = db.plan_refund(
                desk.database, desk.gateway.mode, name, amount_minor=amount_minor, again=again, rejecting=rejecting
            )
            what = f"{money.render(planned, charge.currency)} {charge.currency} of {charge.reference}"
            if arguments.dry_run:
                left = money.render(charge.left_minor - planned, charge.currency)
                print(f"would give back {what}; {left} {charge.currency} would be left")
                return 0
            customer = f"{charge.payment.customer_name} <{charge.payment.customer_email}>"
            commands.confirm(arguments, f"Give back {what} to {customer}?")
            with naming_where_to_look(name):
                done = checkout.refund(
                    desk.database,
                    desk.gateway,
                    name,
                    amount_minor=lambda _: planned,
                    again=again,
                    rejecting=rejecting,
                    made_by=made_by,
                    reason=arguments.reason,
                )
        except db.RefundImpossible as error:
            raise Refused(str(error)) from None
        except db.RefundAsked as asked:
            return tell_repetition(arguments, asked)
    return tell_refund(arguments, done)


def parse_amount(text: str, currency: str) -> int:
    try:
        return money.parse_part(text, currency)
    except ValueError as error:
        raise Refused(f"--amount {error}") from None


@contextmanager
def naming_where_to_look(name: str) -> Iterator[None]:
    """Whoever stops in the middle, or loses the database, is told where the refund can be seen."""
    try:
        yield
    except (KeyboardInterrupt, db.Unavailable) as error:
        line = f"the refund may have been asked for, and is never asked for twice: manage.py show {name}"
        raise type(error)(line) from error


def tell_repetition(arguments: argparse.Namespace, asked: db.RefundAsked) -> int:
    refund = asked.refund
    at = f"{refund.created_at:%Y-%m-%d %H:%M} UTC by {refund.made_by}"
    line = f"asked for already: refund {refund.id} of {amount_of(refund)}, {refund.status}, {at}"
    if arguments.json:
        print_refund(refund, is_repetition=True)
    if not asked.is_recent:
        return complain(line)
    if not arguments.json:
        print(line)
        print_next(f"show {refund.payment_id}")
    return 0


def tell_refund(arguments: argparse.Namespace, refund: db.Refund) -> int:
    if arguments.json:
        print_refund(refund, is_repetition=False)
    match refund.status:
        case "refused":
            return complain(f"Paystack refused refund {refund.id} of {amount_of(refund)}: {refund.refused_because}")
        case "unanswered":
            line = f"no answer about refund {refund.id} of {amount_of(refund)}: it counts as made, and is looked for"
            return complain(f"{line}; manage.py show {refund.payment_id}")
    if not arguments.json:
        print(f"refund {refund.id} of {amount_of(refund)} for {refund.charge_reference}: {refund.status}")
        print_next(f"show {refund.payment_id}")
    return 0


def print_refund(refund: db.Refund, *, is_repetition: bool) -> None:
    members = {
        "id": json.dumps(refund.id),
        "payment": json.dumps(refund.payment_id),
        "reference": json.dumps(refund.charge_reference),
        "amount": money.render(refund.amount_minor, refund.currency),
        "currency": json.dumps(refund.currency),
        "status": json.dumps(refund.status),
        "refused_because": json.dumps(refund.refused_because, ensure_ascii=False),
        "made_by": json.dumps(refund.made_by, ensure_ascii=False),
        "created_at": json.dumps(db.timestamp(refund.created_at)),
        "is_repetition": json.dumps(is_repetition),
    }
    print(db.json_object(members))


def resolve(arguments: argparse.Namespace, env: Environment, url: str) -> int:
    """end a review, or close an incident

    A payment is in review when money came that is not its price. `accept` counts it as paid; `reject` gives the whole
    charge back, and may be repeated when that fails. An incident is closed once you have done what `show` or `doctor`
    says about it.

    examples:
      python manage.py resolve PAY-0123456789ABCDEFGHJKMNPQRS accept --reason "the rest was paid in cash"
      python manage.py resolve PAY-0123456789ABCDEFGHJKMNPQRS reject --reason "wrong amount"
      python manage.py resolve --incident 7 --reason "answered in the dashboard"
    """
    if (arguments.incident is None) == (arguments.decision is None):
        complain("resolve: give either an ID and accept or reject, or --incident N; see manage.py resolve --help")
        return 2
    if arguments.incident is not None:
        return close_incident(arguments, env, url)
    with db.reading(url) as conn:
        payment = commands.named(conn, arguments.name)
    if arguments.decision == "accept":
        return accept(arguments, env, url, payment)
    arguments.name = payment.id  # its own charge, whichever of its references was named
    return give_back(arguments, env, url, rejecting=True)


def close_incident(arguments: argparse.Namespace, env: Environment, url: str) -> int:
    operator = commands.operator_of(arguments)
    if not arguments.dry_run:
        with db.Database(url, 1, notifies="NOTIFY_URL" in env) as database:
            if not db.close_incident(database, arguments.incident, operator, arguments.reason):
                raise Refused(f"there is no open incident {arguments.incident}")
    print(f"incident {arguments.incident} {'would be ' if arguments.dry_run else ''}closed")
    print_next("doctor")
    return 0


def accept(arguments: argparse.Namespace, env: Environment, url: str, payment: db.Payment) -> int:
    operator = commands.operator_of(arguments)
    what = f"{payment.id}, {payment.status_reason or payment.status}"
    if arguments.dry_run:
        print(books.plain(f"would accept {what}"))
        return 0
    commands.confirm(arguments, f"Accept {what}?")
    with db.Database(url, 1, notifies="NOTIFY_URL" in env) as database:
        try:
            db.accept(database, payment, operator, arguments.reason)
        except db.RefundImpossible as error:
            raise Refused(str(error)) from None
    print(f"{payment.id} is completed")
    print_next(f"show {payment.id}")
    return 0


# Looking


def sync(arguments: argparse.Namespace, env: Environment, url: str) -> int:
    """ask Paystack about a payment now

    About every reference of it and its refunds; what is learned is stored, as the worker would have.

    examples:
      python manage.py sync PAY-0123456789ABCDEFGHJKMNPQRS
    """
    with open_desk(env, url) as desk:
        before = find(desk, url, arguments.name)
        is_answered = checkout.sync(desk.database, desk.gateway, before)
        after = find(desk, url, before.id)
    given_back = f", {money.render(after.refunded_minor, after.currency)} given back" if after.refunded_minor else ""
    why = f" ({after.status_reason})" if after.status_reason else ""
    still = "still " if (before.status, before.refunded_minor) == (after.status, after.refunded_minor) else ""
    print(books.plain(f"{after.id} is {still}{after.status}{given_back}{why}"))
    if not is_answered:
        return complain("Paystack gave no final answer: it is asked again by itself")
    print_next(f"show {after.id}")
    return 0


def reconcile(arguments: argparse.Namespace, env: Environment, url: str) -> int:
    """compare our books with Paystack's lists

    Reads all transactions and refunds of the account since a day (30 days ago), page after page, and prints a line for
    each difference: paid there and unknown here, paid here and not there, other amounts, currencies, fees or refunds.
    Of other shops' transactions on the same account nothing is said. The status is 1 where something differs.

    examples:
      python manage.py reconcile
      python manage.py reconcile --since 2026-01 --format csv > differences.csv
    """
    since = arguments.since or datetime.now(UTC) - timedelta(days=30)
    count, found = 0, None
    with open_desk(env, url) as desk, db.reading(url) as conn:
        listed_from = since - timedelta(days=1)
        charges = commands.watch(desk.gateway.transactions(listed_from), unit=" charges")
        refunds = commands.watch(desk.gateway.refunds(listed_from), unit=" refunds")
        writer = csv.writer(sys.stdout, lineterminator="\n")
        if arguments.format == "csv":
            writer.writerow(("payment", "reference", "difference", "there", "here", "currency"))
        for found in books.differences(conn, desk.gateway.mode, since, charges, refunds):
            count += 1
            there, here = (
                "" if found[side] is None else money.render(found[side], found["currency"])
                for side in ("there", "here")
            )
            if arguments.format == "csv":
                cells = (found["payment"] or "", found["reference"], found["difference"], there, here)
                writer.writerow((*map(books.cell, cells), found["currency"]))
            else:
                sides = ", ".join(f"{value} {side}" for value, side in ((there, "there"), (here, "here")) if value)
                name = found["payment"] or "no payment"
                print(f"{name}  {found['reference']}: {found['difference']} ({sides} {found['currency']})")
    if count:
        if arguments.format == "table" and found and found["payment"]:
            print_next(f"sync {found['payment']}")
        return complain(f"differences since {since:%Y-%m-%d}: {count:,}")
    if arguments.format == "table":
        print(f"no difference since {since:%Y-%m-%d}")
        print_next("audit")
    return 0


# Before going live


@dataclass(frozen=True)
class Finding:
    """`ok`, `note` or `BAD`; `todo` is what to do about it."""

    state: str
    about: str
    text: str
    todo: str = ""


def doctor(arguments: argparse.Namespace, env: Environment, url: str) -> int:
    """check what must be right before going live, and what waits for you

    Configuration, database, key and mode, clock, Paystack's session time-out against PAYMENT_TTL_HOURS, the age of due
    work, open incidents, and what to set in Paystack's dashboard. Each finding says what to do about it; the status is
    1 where one is BAD.

    examples:
      python manage.py doctor
      python manage.py doctor --json
    """
    bad = 0
    for n, finding in enumerate(findings(env, url)):
        bad += finding.state == "BAD"
        if arguments.json:
            print((",\n" if n else "[") + json.dumps(vars(finding), ensure_ascii=False), end="")
        else:
            print(books.plain(f"{finding.state:4}  {finding.about:13}  {finding.text}"))
            if finding.todo:
                print(books.plain(f"{'':21}→ {finding.todo}"))
    if arguments.json:
        print("]")
    if bad:
        return complain(f"findings that are bad: {bad}")
    if not arguments.json:
        print_next("audit")
    return 0


def findings(env: Environment, url: str) -> Iterator[Finding]:
    mode = "test"
    try:
        values = settings.load({**env, "DATABASE_URL": url})
        mode = values.mode
        yield from about_configuration(values)
        yield from about_provider(values)
    except settings.Invalid as error:
        yield Finding("BAD", "configuration", str(error), "set it in the environment or in .env")
    try:
        with db.reading(url) as conn:
            yield from about_database(books.health(conn, mode))
            for incident in itertools.islice(books.open_incidents(conn, mode), 20):
                todo = f"then: resolve --incident {incident['id']} --reason …"
                yield Finding("BAD", f"incident {incident['id']}", books.describe(incident), todo)
    except db.Unavailable as error:
        yield Finding("BAD", "database", str(error), "see DATABASE_URL, and whether it runs")


def about_configuration(values: settings.Settings) -> Iterator[Finding]:
    yield Finding("ok", "configuration", f"{values.mode} mode, {', '.join(values.currencies)}, {values.public_url}")
    if values.mode == "test":
        yield Finding("note", "mode", "no real money moves", "set PAYSTACK_SECRET_KEY to sk_live_… to go live")
    if settings.is_loopback(urlsplit(values.public_url).hostname or ""):
        yield Finding("note", "PUBLIC_URL", "only this machine can reach it", "set it to the https address of paygate")
    if values.api_token is None:
        yield Finding("note", "API_TOKEN", "anyone may start a payment to you", "set it where only your server does")
    if values.notify_url is None:
        yield Finding("note", "NOTIFY_URL", "your system is told nothing", "set it, or read GET /api/v1/payments/ID")
    hook = f"{values.public_url}/api/v1/webhooks/paystack"
    yield Finding("note", "dashboard", f"the webhook URL must be {hook}", "Settings, API Keys & Webhooks")


def about_provider(values: settings.Settings) -> Iterator[Finding]:
    try:
        timeout_seconds, clock = gateway_of(values).session_timeout()
    except paystack.Misconfigured:
        yield Finding("BAD", "provider", "Paystack refuses the key", "copy it again from the dashboard")
        return
    except paystack.Unavailable as error:
        yield Finding("BAD", "provider", f"no answer ({error})", "check the network and PAYSTACK_URL, then try again")
        return
    yield Finding("ok", "provider", f"{values.paystack_url} takes the {values.mode} key")
    if clock is not None:
        yield about_clock("Paystack's", clock)
    hours = values.payment_ttl_seconds / 3600
    if not timeout_seconds or timeout_seconds > values.payment_ttl_seconds:
        lasts = f"end after {timeout_seconds / 3600:g} hours" if timeout_seconds else "never end"
        text = f"checkout pages {lasts}, a payment after {hours:g} hours: customers may pay late"
        yield Finding("note", "session", text, f"set the payment session time-out to at most {hours:g} hours")
    else:
        yield Finding("ok", "session", f"checkout pages end after {timeout_seconds / 3600:g} hours")


def about_clock(whose: str, clock: datetime) -> Finding:
    off = (datetime.now(UTC) - clock).total_seconds()
    if abs(off) < 10:
        return Finding("ok", "clock", f"as {whose}")
    return Finding("BAD", "clock", f"{abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} {whose}", "set it by NTP")


def about_database(health: books.Row) -> Iterator[Finding]:
    if (health["migration"] or 0) < db.NEEDED_MIGRATION:
        yield Finding("BAD", "database", f"its schema is {health['migration']}", "run: python manage.py migrate")
    else:
        yield Finding("ok", "database", f"PostgreSQL {health['version']}, schema {health['migration']}")
    yield about_clock("the database's", health["clock"])
    late = {
        "look": ("looks", "start the worker: RUN_WORKER=1, or python manage.py worker"),
        "refund": ("looks at refunds", "start the worker: RUN_WORKER=1, or python manage.py worker"),
        "event": ("an event that failed", "see the log for event_not_applied"),
        "notification": ("notifications", "see whether NOTIFY_URL answers"),
    }
    for name, (what, todo) in late.items():
        seconds = health[f"{name}_seconds"]
        if seconds is not None and seconds > 300:
            yield Finding("BAD", "work", f"{what} waiting for {seconds / 60:.0f} minutes", todo)
    if health["dead"]:
        text = f"{health['dead']} notifications were given up"
        yield Finding("BAD", "notifications", text, "mend your receiver, then: python manage.py notify --dead")
    if health["is_deaf"]:
        todo = "set the webhook URL in Paystack's dashboard: payments are found late without it"
        yield Finding("BAD", "webhooks", "none came for the last payments", todo)


# The merchant's own system


def notify(arguments: argparse.Namespace, env: Environment, url: str) -> int:
    """send a notification again, or a test

    The last one of a payment, whatever became of it, or all that were given up after four days of tries: the worker
    sends them, under the webhook-id that they have. A test is sent from here, at once, and its answer is printed.

    examples:
      python manage.py notify --test
      python manage.py notify PAY-0123456789ABCDEFGHJKMNPQRS
      python manage.py notify --dead
    """
    with open_desk(env, url) as desk:
        if desk.settings.notify_url is None:
            raise Refused("no NOTIFY_URL is set: nobody is told of anything")
        if arguments.test:
            return notify_test(desk.settings.notify_url, desk.settings.notify_secrets)
        payment = None if arguments.dead else find(desk, url, arguments.name)
        count = db.send_again(desk.database, desk.gateway.mode, payment.id if payment else None)
    if payment is not None and count == 0:
        raise Refused(f"nobody was told of {payment.id} yet, or it was pruned after RETENTION_DAYS")
    print(f"{count} to be sent again" if count else "none was given up")
    print_next(f"show {payment.id}" if payment else "doctor")
    return 0


def notify_test(url: str, secrets: tuple[bytes, ...]) -> int:
    outcome = notifications.Notifier(url, secrets).send(str(uuid.uuid4()), notifications.body_of_test())
    if not outcome.startswith("2"):
        return complain(f"the receiver at NOTIFY_URL did not take it: {outcome}")
    print(f"the receiver at NOTIFY_URL took it: {outcome}")
    print_next("doctor")
    return 0


# The worker


def run_worker(arguments: argparse.Namespace, env: Environment, url: str) -> int:
    """look after payments in the background: lost webhooks, late money, refunds, notifications

    `runserver` and gunicorn do so themselves unless RUN_WORKER=0. With --once it does what is due and ends, for a
    scheduler.

    examples:
      python manage.py worker
      python manage.py worker --once
    """
    with open_desk(env, url, pool_size=None) as desk:
        log.configure(desk.settings.log_level)
        background = worker.Worker(desk.settings, desk.database, desk.gateway)
        if arguments.once:
            background.run_once()
            return 0
        background.start()
        with suppress(KeyboardInterrupt):
            print("looking after payments; Ctrl-C ends it", flush=True)
            threading.Event().wait()
        background.stop()
    return 0
