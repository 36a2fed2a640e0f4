"""The operator's commands that need nothing but the database, and what all commands have in common.

A command's docstring is its page of help. It is run with its arguments, the environment, and the database's URL, which
may be the embedded one's; it returns its exit status. What it prints for a program goes to stdout alone.
"""

import argparse
import csv
import getpass
import importlib
import inspect
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

import backup
import books
import db
import log
import money
import orders
import settings
from books import Refused

Environment = dict[str, str]
Run = Callable[[argparse.Namespace, Environment, str], int] | Callable[[argparse.Namespace], None]
STATUSES = (*db.UNPAID, "review", *db.PAID)


class Parser(argparse.ArgumentParser):
    """Wrong usage is one line and status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


Commands = Any  # argparse's own type of what add_subparsers() returns has no public name


def add_command(commands: Commands, name: str, run: Run) -> Parser:
    page = inspect.cleandoc(run.__doc__ or "")
    parser: Parser = commands.add_parser(
        name,
        help=page.partition("\n")[0],
        description=page,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def register(commands: Commands) -> None:
    parser = add_command(commands, "list", list_payments)
    parser.add_argument("--status", choices=STATUSES)
    parser.add_argument("--email", help="of the customer, in any case")
    add_period(parser)
    parser.add_argument("--limit", type=whole_number, default=50, metavar="N", help="at most so many (50; 0: all)")
    add_format(parser, "table", "json", "csv")

    parser = add_command(commands, "show", show)
    parser.add_argument("name", metavar="ID|REFERENCE")
    add_json(parser)

    parser = add_command(commands, "link", link)
    parser.add_argument("--amount", type=amount, required=True, metavar="75.00", help="in major units")
    parser.add_argument("--currency", help="the first of CURRENCIES unless given")
    parser.add_argument("--description", default="", metavar="TEXT", help="what it is for: the customer sees it")
    parser.add_argument("--order", default="", metavar="X", help="yours: makes the link one for a single payment")
    parser.add_argument("--expires", type=moment, metavar="DATE", help="no payment is begun from then on")
    parser.add_argument("--qr", action="store_true", help="draw it too (pip install segno)")

    parser = add_command(commands, "audit", audit)
    parser.add_argument("--against", type=checkpoint, metavar="N:HASH", help="a checkpoint printed earlier")

    parser = add_command(commands, "backup", make_backup)
    parser.add_argument("file", type=Path, metavar="FILE")

    parser = add_command(commands, "restore", restore)
    parser.add_argument("file", type=Path, metavar="FILE")

    parser = add_command(commands, "report", report)
    add_period(parser)
    add_format(parser, "table", "csv", "html")

    parser = add_command(commands, "erase", erase)
    whose = parser.add_mutually_exclusive_group(required=True)
    whose.add_argument("name", nargs="?", metavar="ID|REFERENCE")
    whose.add_argument("--email", help="all payments of this customer, in both modes")
    add_decision(parser)
    add_operator(parser)


def list_payments(arguments: argparse.Namespace, env: Environment, url: str) -> int:
    """list payments, newest first

    Payments of the current mode (test or live, by PAYSTACK_SECRET_KEY). Dates are in UTC; --until is exclusive. The
    formats for programs hold what GET gives out and the phone, location and metadata.

    examples:
      python manage.py list --status review
      python manage.py list --since 2026-01-01 --until 2026-02-01 --limit 0 --format csv > january.csv
      python manage.py list --email john@example.com
    """
    with db.reading(url) as conn:
        rows = books.payments(
            conn,
            settings.mode_of(env),
            status=arguments.status,
            since=arguments.since,
            until=arguments.until,
            email=arguments.email,
            limit=arguments.limit or None,
        )
        {"table": print_table, "json": print_json, "csv": print_csv}[arguments.format](rows)
    return 0


def print_table(payments: Iterator[db.Payment]) -> None:
    first = next(payments, None)
    print(f"{'CREATED':20}  {'ID':30}  {'STATUS':18}  {'AMOUNT':>15}      CUSTOMER")
    for payment in itertools.chain([first] if first else [], payments):
        customer = books.plain(f"{payment.customer_name} <{payment.customer_email}>")
        amount = f"{money.render(payment.amount_minor, payment.currency):>15} {payment.currency}"
        print(f"{db.timestamp(payment.created_at)}  {payment.id}  {payment.status:18}  {amount}  {customer}")
    print_next(f"show {first.id}" if first else "list --help")


def print_json(payments: Iterator[db.Payment]) -> None:
    separator = "["
    for payment in payments:
        print(separator + payment.to_json(*books.EXPORTED), end="")
        separator = ",\n"
    print("[]" if separator == "[" else "]")


def print_csv(payments: Iterator[db.Payment]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(books.EXPORT_HEADER)
    writer.writerows(map(books.cells, payments))


def show(arguments: argparse.Namespace, env: Environment, url: str) -> int:
    """tell the whole story of one payment

    By its id or one of its references, of either mode: what was asked for, each change and who made it, what the
    provider said, charges, refunds, notifications and incidents, in the order of time (UTC).

    examples:
      python manage.py show PAY-0123456789ABCDEFGHJKMNPQRS
      python manage.py show PG-0123456789ABCDEFGHJKMNPQRS --json
    """
    with db.reading(url) as conn:
        payment = named(conn, arguments.name)
        story = books.story(conn, payment)
        if arguments.json:
            print('{"payment": ' + payment.to_json(*books.EXPORTED) + ', "timeline": [')
            for n, each in enumerate(story):
                row = {**each, "at": each["at"].isoformat(timespec="milliseconds").replace("+00:00", "Z")}
                print((",\n" if n else "") + json.dumps(row, ensure_ascii=False), end="")
            print("]}")
            return 0
        print_payment(payment)
        print("\n  in UTC               who             what happened")
        for each in story:
            print(f"  {each['at']:%Y-%m-%d %H:%M:%S}  {books.plain(each['who']):14}  {books.plain(each['text'])}")
    follow = {
        "review": f"resolve {payment.id} accept",
        "refunded": "audit",
        **dict.fromkeys(db.UNPAID, f"sync {payment.id}"),
    }
    print_next(follow.get(payment.status, f"refund {payment.id}"))
    return 0


def print_payment(payment: db.Payment) -> None:
    def amount(minor: int) -> str:
        return f"{money.render(minor, payment.currency)} {payment.currency}"

    status = payment.status.replace("_", " ")
    print(f"{payment.id}: {amount(payment.amount_minor)}, {status}{' (TEST)' if payment.mode == 'test' else ''}")
    lines = {
        "why": payment.status_reason,
        "customer": f"{payment.customer_name} <{payment.customer_email}>, {payment.customer_phone}, {payment.location}",
        "for": payment.description,
        "metadata": json.dumps(payment.metadata, ensure_ascii=False) if payment.metadata else None,
        "reference": payment.current_reference,
        "checkout": payment.open_checkout_url,
        "given back": amount(payment.refunded_minor) if payment.refunded_minor else None,
        "accepted": payment.accepted_by,
    }
    for name, line in lines.items():
        if line:
            print(f"  {name:10}  {books.plain(line)}")


def link(arguments: argparse.Namespace, env: Environment, url: str) -> int:
    """print a signed payment link

    Whoever opens it types name, e-mail, phone and town, and pays exactly this: a link that was changed is refused. With
    --order it is for one payment, whose metadata names the order, and shows the receipt once paid; without, anyone may
    pay by it as often as he likes. It needs no PAY_FORM. Dates are in UTC.

    examples:
      python manage.py link --amount 75.00 --description "A hat" --order 1001
      python manage.py link --amount 500 --currency XOF --expires 2027-01-01 --qr
    """
    values = settings.load({**env, "DATABASE_URL": url})
    currency = arguments.currency or values.currencies[0]
    expires = str(int(arguments.expires.timestamp())) if arguments.expires else ""
    made = orders.Link(arguments.amount, currency, arguments.description.strip(), arguments.order.strip(), expires)
    if problems := made.problems(values):
        raise Refused("; ".join(f"--{name} {text}" for name, texts in problems.items() for text in texts))
    if made.is_over:
        raise Refused("--expires is over already")
    made = replace(made, amount=money.render(money.parse(made.amount, currency), currency))
    with db.Database(url, 1) as database:
        address = f"{values.public_url}/pay?{made.query(database.secret(), values.mode)}"
    drawn = qr_code(address) if arguments.qr else None
    print(address)
    if drawn is not None:
        drawn.terminal(compact=True)
    print_next("list")
    return 0


def qr_code(text: str) -> Any:
    try:
        return importlib.import_module("segno").make_qr(text)
    except ModuleNotFoundError:
        raise Refused("--qr needs a package: pip install segno") from None


def audit(arguments: argparse.Namespace, env: Environment, url: str) -> int:
    """prove that the books are whole

    Computes the chain of audit rows of every payment anew, checks every rule that must hold between payments, charges,
    refunds and keys, and prints a line for each break, and a checkpoint. Keep that line outside of the database: with
    it, --against proves later that nothing up to then was changed or removed.

    examples:
      python manage.py audit
      python manage.py audit --against 1042:5d41402abc4b2a76b9719d911017c5925d41402abc4b2a76b9719d911017c592
    """
    breaks = 0
    with db.reading(url) as conn:
        proof = books.Proof(conn, watch, arguments.against)
        for line in proof.breaks():
            tqdm.write(books.plain(line))
            breaks += 1
    counted = ", ".join(f"{name}: {count:,}" for name, count in proof.counts.items())
    print(f"{f'BROKEN, places: {breaks:,}' if breaks else 'whole'} ({counted})")
    print(f"checkpoint {proof.checkpoint}")
    if breaks:
        return complain(f"broken places in the books: {breaks:,}")
    print_next(f"audit --against {proof.checkpoint}")
    return 0


def make_backup(arguments: argparse.Namespace, env: Environment, url: str) -> int:
    """write all there is to a file, and the checkpoint of `audit` beside it

    The service goes on meanwhile. FILE holds the customers' data and FILE.checkpoint proves later that nothing of it
    was changed: keep both in a safe place, the second one elsewhere too.

    examples:
      python manage.py backup /var/backups/paygate-2026-01-31.dump
    """
    with db.reading(url) as conn:
        proof = books.Proof(conn, watch)
        breaks = sum(1 for _ in proof.breaks())
    backup.write(url, arguments.file, proof.checkpoint)
    print(f"{arguments.file}: {arguments.file.stat().st_size:,} bytes, checkpoint {proof.checkpoint}")
    if breaks:
        return complain(f"broken places in the books before: {breaks:,}; see python manage.py audit")
    print_next(f"restore {arguments.file}   (with DATABASE_URL of an empty database, to try it)")
    return 0


def restore(arguments: argparse.Namespace, env: Environment, url: str) -> int:
    """bring a backup back into an empty database, and prove that it is whole

    Stop paygate first, or give it the new database afterwards. What the provider has done since is found once paygate
    runs; `reconcile` says whether anything is left.

    examples:
      DATABASE_URL=postgresql://… python manage.py restore /var/backups/paygate-2026-01-31.dump
    """
    number, digest = backup.read(url, arguments.file)
    with db.reading(url) as conn:
        proof, breaks = books.Proof(conn, watch, (number, digest)), 0
        for line in proof.breaks():
            tqdm.write(books.plain(line))
            breaks += 1
        last = books.only(conn, "SELECT max(at) AS at FROM payment_events")["at"]
    counted = ", ".join(f"{count:,} {name}" for name, count in proof.counts.items())
    print(f"restored {counted}: {f'{breaks:,} breaks' if breaks else f'whole up to checkpoint {number}:{digest}'}")
    if breaks:
        return complain(f"broken places in the books: {breaks:,}")
    print_next(f"reconcile --since {last:%Y-%m-%d}" if last else "doctor")
    return 0


def report(arguments: argparse.Namespace, env: Environment, url: str) -> int:
    """add up the money: gross, fees, refunds, net, by day, currency and location

    Of the current mode, from --since (the first of this month) to --until (now; exclusive), in UTC. Every charge counts
    on the day it was paid and every refund on the day it was paid out, so the totals are those of the charges.

    examples:
      python manage.py report
      python manage.py report --since 2026-01 --until 2026-02 --format html > january.html
      python manage.py report --since 2026-01 --format csv > report.csv
    """
    now = datetime.now(UTC)
    since = arguments.since or now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    until = arguments.until or now
    if since >= until:
        raise Refused(f"--since ({since:%Y-%m-%d}) is not before --until ({until:%Y-%m-%d})")
    mode = settings.mode_of(env)
    with db.reading(url) as conn:
        rows = books.report(conn, mode, since, until)
        if arguments.format == "html":
            print(books.report_page(rows, mode, since, until, now))
        elif arguments.format == "csv":
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow(("by", "key", "currency", "payments", *books.SUMS))
            writer.writerows(
                (row["by"], books.cell(row["key"]), row["currency"], row["payments"], *sums(row)) for row in rows
            )
        else:
            last = until - timedelta(microseconds=1)
            print_report(rows, f"{since:%Y-%m-%d} to {last:%Y-%m-%d}{' (TEST)' if mode == 'test' else ''}")
    return 0


def sums(row: dict[str, Any]) -> list[str]:
    return [money.render(row[name], row["currency"]) for name in books.SUMS]


def print_report(rows: Iterable[dict[str, Any]], period: str) -> None:
    print(period)
    by = None
    for row in rows:
        if (row["by"], row["currency"]) != by:
            by = row["by"], row["currency"]
            names = "".join(f"{name.upper():>16}" for name in books.SUMS)
            head = f"{'BY ' + row['by'].upper():22}  CUR  {'PAYMENTS':>8}{names}"
            print("" if row["by"] == "total" else f"\n{head}")
        amounts = "".join(f"{amount:>16}" for amount in sums(row))
        print(f"{books.plain(row['key'])[:22]:22}  {row['currency']}  {row['payments']:>8}{amounts}")
    if by is None:
        print("no money moved in this time")
    print_next("report --format html > report.html")


def erase(arguments: argparse.Namespace, env: Environment, url: str) -> int:
    """erase a customer's personal data, and keep the money facts

    Overwrites name, e-mail, phone, location, description, metadata, the stored answer, the bodies of events, and what
    was written as reasons. The audit trail stays whole. Refused for a payment that is pending, ended unpaid less than
    30 days ago, or has a refund under way; with --email the others are erased, and the status is 1.

    examples:
      python manage.py erase PAY-0123456789ABCDEFGHJKMNPQRS --dry-run
      python manage.py erase --email john@example.com --yes
    """
    operator, kept, erased = operator_of(arguments), 0, 0
    with db.reading(url) as conn, db.Database(url, 1, notifies="NOTIFY_URL" in env) as database:
        whose = arguments.email or arguments.name
        ids = books.payments_of(conn, whose) if arguments.email else iter([named(conn, whose).id])
        if not arguments.dry_run:
            confirm(arguments, f"Erase the personal data of {whose}? This cannot be undone.")
        for payment_id in ids:
            try:
                is_new = db.erase(database, payment_id, operator, dry_run=arguments.dry_run)
            except db.MustBeKept as error:
                kept += 1
                complain(str(error))
                continue
            erased += 1
            word = "would be erased" if arguments.dry_run else "erased"
            print(f"{payment_id}: {word if is_new else 'has been erased before'}")
    if not kept and not erased:
        raise Refused(f"no payment of {whose} is here")
    if kept:
        return 1
    print_next("audit")
    return 0


# What commands have in common


def add_period(parser: Parser) -> None:
    parser.add_argument("--since", type=moment, metavar="DATE", help="from this day on, such as 2026-01-31 or 2026-01")
    parser.add_argument("--until", type=moment, metavar="DATE", help="up to this day, which is not included")


def add_format(parser: Parser, *formats: str) -> None:
    parser.add_argument("--format", choices=formats, default=formats[0], help=f"{formats[0]} unless given")
    if "json" in formats:
        parser.add_argument("--json", action="store_const", dest="format", const="json", help="as --format json")


def add_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="for a program")


def add_decision(parser: Parser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask (without a terminal nothing is asked)")


def add_operator(parser: Parser) -> None:
    parser.add_argument("--by", type=operator_name, metavar="NAME", help="who; else $OPERATOR, else the OS user")


def operator_name(text: str) -> str:
    if not text.strip() or not text.isprintable() or len(text) > 100:
        raise argparse.ArgumentTypeError("a name has 1 to 100 characters on one line")
    return text.strip()


def operator_of(arguments: argparse.Namespace) -> str:
    """Who does it, as the audit trail says it."""
    name = arguments.by or os.environ.get("OPERATOR", "").strip()
    if not name:
        try:
            name = getpass.getuser()
        except (KeyError, OSError):  # a container whose uid has no name
            name = f"uid {os.getuid()}"
    try:
        return f"operator:{operator_name(name)}"
    except argparse.ArgumentTypeError as error:
        raise Refused(f"OPERATOR: {error}") from None


def moment(text: str) -> datetime:
    try:
        at = datetime.fromisoformat(f"{text}-01" if len(text) == len("2026-01") else text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no date such as 2026-01-31") from None
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def amount(text: str) -> str:
    if not money.NUMBER.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text} is no amount such as 10.00")
    return text


def whole_number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise argparse.ArgumentTypeError(f"{text} is no whole number")
    return int(text)


def checkpoint(text: str) -> tuple[int, str]:
    number, _, digest = text.removeprefix("checkpoint").strip().partition(":")
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise argparse.ArgumentTypeError("a checkpoint is N:HASH, as audit prints it")
    return whole_number(number), digest


def named(conn: db.BoundedConnection, name: str) -> db.Payment:
    payment = books.payment_named(conn, name)
    if payment is None:
        raise Refused(f"there is no payment {books.plain(name)}")
    return payment


def confirm(arguments: argparse.Namespace, question: str) -> None:
    """Ask on a terminal, unless --yes. Raises Refused."""
    if arguments.yes or not sys.stdin.isatty():
        return
    print(f"{books.plain(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Refused("nothing was done")


def watch(rows: Iterator[Any], total: int | None = None, unit: str = " rows") -> Iterator[Any]:
    """Rows handed on, with a bar on stderr where that is a terminal, once it takes more than a second."""
    return iter(tqdm(rows, total=total, unit=unit, disable=None, delay=1, leave=False))


@contextmanager
def without_log() -> Iterator[None]:
    """What a command has to say it prints; the log of the same is for the service."""
    loggers = logging.getLogger(), log.logger
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def print_next(words: str) -> None:
    print(f"next: python manage.py {words}")


def complain(line: str) -> int:
    print(f"manage.py: {books.plain(line)}", file=sys.stderr)
    return 1
