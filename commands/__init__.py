"""The operator's commands, a file each; here is what they share.

A command's docstring is its page of help. `run` gets the arguments, the environment, and the database's URL, which may
be the embedded one's. It returns the exit status. Output for a program goes to stdout alone.
"""

import argparse
import getpass
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any, NoReturn

import psycopg
import psycopg.rows
from psycopg import sql
from tqdm import tqdm

import db
import money

Environment = dict[str, str]


class Parser(argparse.ArgumentParser):
    """Wrong usage is one line and status 2. The help is the docstring as it is written."""

    def __init__(self, **kinds: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kinds)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def add_period(parser: Parser) -> None:
    parser.add_argument("--since", type=moment, metavar="DATE", help="from this day on, such as 2026-01-31 or 2026-01")
    parser.add_argument("--until", type=moment, metavar="DATE", help="before this day")


def add_format(parser: Parser, *formats: str) -> None:
    parser.add_argument("--format", choices=formats, default=formats[0], help=f"{formats[0]} unless given")
    if "json" in formats:
        parser.add_argument("--json", action="store_const", dest="format", const="json", help="as --format json")


def add_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for a program")


def add_decision(parser: Parser) -> None:
    """For a command that decides about money or removes something; the audit trail names who did it."""
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask; needed without a terminal")
    name = os.environ.get("OPERATOR", "").strip() or user_name()
    parser.add_argument("--by", type=operator, default=name, metavar="NAME", help="else $OPERATOR, else the OS user")


def user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose uid has no name
        return f"uid {os.getuid()}"


def operator(name: str) -> str:
    """Who does it, as the audit trail says it. argparse reads the default by this too."""
    if not name.strip() or not name.isprintable() or len(name) > 100:
        raise argparse.ArgumentTypeError("a name (also $OPERATOR) has 1 to 100 characters on one line")
    return f"operator:{name.strip()}"


def moment(text: str) -> datetime:
    try:
        return datetime.fromisoformat(f"{text}-01" if len(text) == len("2026-01") else text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no date such as 2026-01-31") from None


def place(arguments: argparse.Namespace, zone: tzinfo) -> None:
    """Dates are the merchant's, also those that were given without a zone."""
    arguments.zone = zone
    for name, value in vars(arguments).items():
        if isinstance(value, datetime):
            setattr(arguments, name, value.astimezone(zone) if value.tzinfo else value.replace(tzinfo=zone))


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


READING_SECONDS = 600
"""How long one statement of a report may take: of a million payments they take seconds."""


@contextmanager
def reading(url: str) -> Iterator[db.BoundedConnection]:
    """A connection for one who reads much, in transactions of its own.

    Raises db.DatabaseUnavailable, also while it is used."""
    try:
        with closing(db.BoundedConnection.connect(url, **db.connection_defaults(url))) as conn:
            conn.patience_seconds = READING_SECONDS
            db.configure(conn)
            conn.execute(
                """
                SELECT set_config('statement_timeout', %(ms)s, false),
                       set_config('idle_in_transaction_session_timeout', '0', false),
                       set_config('enable_seqscan', 'on', false)
                """,
                {"ms": str(READING_SECONDS * 1000)},
            )
            yield conn
    except psycopg.errors.UndefinedTable as error:
        raise db.DatabaseUnavailable(db.NO_SCHEMA) from error
    except psycopg.Error as error:  # a role without the right to read is no reason for a traceback
        raise db.DatabaseUnavailable(db.cause_of(error)) from error


def named(conn: db.BoundedConnection, name: str) -> db.Payment:
    """The payment of an id or of one of its references, in either mode. Raises Refused."""
    row = conn.execute(
        "SELECT * FROM payments WHERE id = %(name)s OR reference = %(base)s",
        {"name": name, "base": db.base_of(name)},
    ).fetchone()
    if row is None:
        raise Refused(f"there is no payment {plain(name)}")
    return db.Payment.of(row)


def confirm(arguments: argparse.Namespace, question: str) -> None:
    """Ask on a terminal, unless --yes or --dry-run. Raises Refused; without a terminal it ends as wrong usage does."""
    if arguments.yes or arguments.dry_run:
        return
    if not sys.stdin.isatty():
        sys.exit(complain(f"{question} There is no terminal to ask on: nothing was done; add --yes", 2))
    print(f"{plain(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Refused("nothing was done")


def watch(rows: Iterator[Any], total: int | None = None, unit: str = " rows") -> Iterator[Any]:
    """Rows handed on, with a bar on stderr where that is a terminal, once it takes more than a second."""
    return iter(tqdm(rows, total=total, unit=unit, disable=None, delay=1, leave=False))


def print_next(words: str) -> None:
    remark(f"next: python manage.py {words}")


def complain(line: str, status: int = 1) -> int:
    """Say why a command ends with this status."""
    remark(f"manage.py: {plain(line)}")
    return status


def remark(line: str) -> None:
    """Say something for people alone: not on stdout, which a program may read."""
    print(pasteable(line), file=sys.stderr)


def pasteable(line: str) -> str:
    """A line with `python manage.py` written so that this shell finds it: beside `make run`, .venv/bin/python."""
    python, script = sys.executable, Path(sys.argv[0])
    if shutil.which("python") == python:
        python = "python"
    elif Path(python).is_relative_to(Path.cwd()):
        python = str(Path(python).relative_to(Path.cwd()))
    called = f"{shlex.quote(python)} {shlex.quote(str(script)) if script.name == 'manage.py' else 'manage.py'}"
    return line.replace("python manage.py", called)


Row = dict[str, Any]


class Refused(Exception):
    """A command cannot be carried out: the line that says why."""


def stream(conn: db.BoundedConnection, query: str, values: Row | None = None) -> Iterator[Row]:
    """The rows of a query, a few thousand at a time."""
    with conn.transaction(), conn.cursor(name="books") as cursor:
        cursor.itersize = 2000
        cursor.execute(sql.SQL(query), values)
        yield from cursor


CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def plain(text: str) -> str:
    """Text for a terminal: what would break the line, move the cursor or turn the direction is written out."""
    return CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def cell(text: str) -> str:
    """Text for a spreadsheet, which would run what begins so: quoted, unless it is a number."""
    is_run = text.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠"))
    return f"'{text}" if is_run and not money.NUMBER.fullmatch(text) else text


EXPORTED = ("customer_phone", "location", "metadata")
"""What an export has besides the members that GET gives out."""
