"""add up the money: gross, fees, refunds, net, by day, currency and location

Covers the current mode from --since (the first of this month) to --until (now; exclusive), in TIMEZONE. Each charge
counts on the day when it was paid, and each refund on the day when it was paid out. Fees that Paystack has not named
yet count as 0; the report says for how many charges.

examples:
  python manage.py report
  python manage.py report --since 2026-01 --until 2026-02 --format html > january.html
  python manage.py report --since 2026-01 --format csv > report.csv
"""

import argparse
import csv
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import date, datetime, timedelta
from typing import Any

import commands
import money
import settings
from commands import Parser, Refused
from web import books, html


def add_arguments(parser: Parser) -> None:
    commands.add_period(parser)
    commands.add_format(parser, "table", "csv", "html")


def run(arguments: argparse.Namespace, env: commands.Environment, url: str) -> int:
    now = datetime.now(arguments.zone)
    since = arguments.since or now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    until = arguments.until or now
    if since >= until:
        raise Refused(f"--since ({since:%Y-%m-%d}) is not before --until ({until:%Y-%m-%d})")
    first, last = since.date(), (until - timedelta(microseconds=1)).date()
    mode = settings.mode_of(env)
    with commands.reading(url) as conn:
        values = {"mode": mode, "since": since, "until": until, "zone": str(since.tzinfo)}
        rows = commands.stream(conn, books.REPORT, values)
        if arguments.format == "html":
            print(report_page(rows, mode, first, last, now))
        elif arguments.format == "csv":
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow(("by", "key", "currency", "payments", *books.SUMS, "unknown_fees"))
            for row in rows:
                head = (row["by"], commands.cell(row["key"]), row["currency"], row["payments"])
                writer.writerow((*head, *sums(row, money.render), row["unknown_fees"]))
        else:
            print_report(rows, f"{first} to {last}{' (TEST)' if mode == 'test' else ''}")
    return 0


def sums(row: dict[str, Any], write: Callable[[int, str], str]) -> list[str]:
    return [write(row[name], row["currency"]) for name in books.SUMS]


def print_report(rows: Iterable[dict[str, Any]], period: str) -> None:
    print(period)
    by = None
    for row in rows:
        if (row["by"], row["currency"]) != by:
            by = row["by"], row["currency"]
            names = "".join(f"{name.upper():>16}" for name in books.SUMS)
            head = f"{'BY ' + row['by'].upper():22}  CUR  {'PAYMENTS':>8}{names}"
            print("" if row["by"] == "total" else f"\n{head}")
        amounts = "".join(f"{amount:>16}" for amount in sums(row, money.grouped))
        print(f"{commands.plain(row['key'])[:22]:22}  {row['currency']}  {row['payments']:>8}{amounts}")
        if row["by"] == "total" and row["unknown_fees"]:
            print(f"charges whose fees are not known yet, so that net is too high: {row['unknown_fees']:,}")
    if by is None:
        print("no money moved in this time")
    commands.print_next("report --format html > report.html")


MOST_LOCATIONS = 12


def report_page(rows: Iterable[commands.Row], mode: str, first: date, last: date, made_at: datetime) -> str:
    """The report as one page that loads nothing. Beyond the largest locations the rest is one row."""
    sections = [
        _section(currency, list(_largest(group)), first, last)
        for currency, group in itertools.groupby(rows, key=lambda row: row["currency"])
    ]
    page = html.templates().get_template("report.html")
    return page.render(sections=sections, SUMS=books.SUMS, period=f"{first} to {last}", mode=mode, made_at=made_at)


def _largest(rows: Iterable[commands.Row]) -> Iterator[commands.Row]:
    """The rows of one currency, but only its largest locations, and one row for the others."""
    rest: commands.Row = {"by": "location", "key": "others", "payments": 0, **dict.fromkeys(books.SUMS, 0)}
    seen = 0
    for row in rows:
        seen += row["by"] == "location"
        if row["by"] == "location" and seen > MOST_LOCATIONS:
            rest |= {name: rest[name] + row[name] for name in ("payments", *books.SUMS)} | {"currency": row["currency"]}
        else:
            yield row
    if seen > MOST_LOCATIONS:
        yield rest


def _section(currency: str, rows: list[commands.Row], first: date, last: date) -> dict[str, Any]:
    """What the page shows of one currency."""
    by = {kind: [row for row in rows if row["by"] == kind] for kind in ("day", "location", "total")}
    return {"currency": currency, **by, "chart": _chart(by["day"], first, last)}


def _chart(days: list[commands.Row], first: date, last: date) -> dict[str, Any]:
    """A bar a day of what came (gross), with the number of its day; days without money are gaps."""
    count = (last - first).days + 1
    written = "%d" if count <= 31 else "%d %b"
    return {
        "count": count,
        "highest": max([row["gross"] for row in days] + [1]),
        "bars": [((date.fromisoformat(row["key"]) - first).days, row) for row in days],
        "labels": [(n, f"{first + timedelta(days=n):{written}}") for n in range(0, count, -(-count // 16))],
    }
