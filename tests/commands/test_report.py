# ruff: noqa: F811  (fixtures are imported by their names)
"""The report: totals that tie to the charges, for a program and for people."""

import csv
import io
from decimal import Decimal
from html.parser import HTMLParser
from typing import Any

import pytest

from commands import report
from ledger import as_superuser
from local.sandbox import Sandbox
from money_back import settle
from shop import Shop, open_shop, sandbox, shop  # noqa: F401  # fixtures
from till import Till, open_till, paid, till  # noqa: F401  # fixtures


def report_rows(till: Till, *words: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(till.did("report", "--format", "csv", *words))))


def test_totals_tie_to_the_charges_to_the_last_kobo(shop: Shop, sandbox: Sandbox, open_shop: Any, till: Till) -> None:
    many = open_shop(CURRENCIES="NGN,GHS,XOF")
    places = ["Lagos", "Accra", "=Abidjan", "Kano"]
    orders = [(f"{50 + n}.{n:02d}", "NGN") for n in range(1, 18)] + [("0.10", "GHS"), ("3.33", "GHS"), ("500", "XOF")]
    for n, (amount, currency) in enumerate(orders):
        payment = many.created(amount=amount, currency=currency, location=places[n % 4])
        many.pay(payment["reference"], fees_by_customer=n % 3 == 0)
        if n % 5 == 0:
            till.did("refund", payment["id"])
            settle(many, sandbox, payment["reference"])
    shop.created()  # nobody has paid it
    rows = report_rows(till)
    for currency in ("NGN", "GHS", "XOF"):
        (came,) = shop.sql(
            "SELECT sum(amount_minor)::int AS gross, sum(fees_minor)::int AS fees, count(*)::int AS payments,"
            " (SELECT coalesce(sum(amount_minor), 0)::int FROM refunds WHERE status = 'processed' AND currency = %s)"
            " AS refunds FROM charges WHERE currency = %s",
            *(currency, currency),
        )
        came["net"] = came["gross"] - came["fees"] - came["refunds"]
        for by in ("day", "location", "total"):
            of = [row for row in rows if (row["by"], row["currency"]) == (by, currency)]
            for name in ("gross", "fees", "refunds", "net"):
                assert sum(Decimal(row[name]) for row in of) * 100 == came[name], (by, currency, name)
            assert sum(int(row["payments"]) for row in of) == came["payments"]
    assert {row["key"] for row in rows if row["by"] == "location"} == {"Lagos", "Accra", "'=Abidjan", "Kano"}


@pytest.mark.usefixtures("elsewhere")
def test_the_report_counts_by_the_day_of_the_payment_and_of_the_refund(
    shop: Shop, sandbox: Sandbox, till: Till
) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"])
    settle(shop, sandbox, payment["reference"])
    as_superuser(till, "UPDATE charges SET paid_at = '2026-01-31T23:59:59Z'")
    as_superuser(till, "UPDATE refunds SET processed_at = '2026-02-01T00:00:00Z'")
    january = {row["by"]: row for row in report_rows(till, "--since", "2026-01", "--until", "2026-02")}
    assert (january["day"]["key"], january["total"]["gross"], january["total"]["refunds"]) == (
        "2026-01-31",
        "50.00",
        "0.00",
    )
    february = {row["by"]: row for row in report_rows(till, "--since", "2026-02", "--until", "2026-03")}
    assert (february["total"]["gross"], february["total"]["refunds"], february["total"]["net"]) == (
        "0.00",
        "50.00",
        "-50.00",
    )
    assert "no money moved" in till.did("report", "--since", "2025-01", "--until", "2025-02")
    assert "2026-01-01 to 2026-01-31 (TEST)" in till.did("report", "--since", "2026-01", "--until", "2026-02")


@pytest.mark.usefixtures("elsewhere")
def test_days_are_the_merchant_s(shop: Shop, till: Till) -> None:
    paid(shop)
    as_superuser(till, "UPDATE charges SET paid_at = '2026-01-31T23:30:00Z'")
    for zone, shown, day, since, until in (
        ("UTC", "UTC", "2026-01-31", "2026-01", "2026-02"),
        ("Africa/Lagos", "WAT", "2026-02-01", "2026-02", "2026-03"),
        ("Africa/Lagos", "WAT", "2026-02-01", "2026-01-31T18:30-05:00", "2026-02-02"),
    ):
        period = ("--since", since, "--until", until)
        out = till.did("report", "--format", "csv", *period, TIMEZONE=zone)
        assert f"\nday,{day},NGN,1,50.00," in out
        assert f"Days in {shown}." in till.did("report", "--format", "html", *period, TIMEZONE=zone)
    assert "no money moved" in till.did("report", "--since", "2026-01", "--until", "2026-02", TIMEZONE="Africa/Lagos")


class Page(HTMLParser):
    """What an HTML page holds; `errors` are tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.errors: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "img", "br", "path"):
            self.open.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.errors.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "dd", "h1", "span"):
            self.cells.append(data)


def test_the_html_report_is_one_page_that_loads_nothing(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    place = '<script src="https://evil.example.com/x.js">&amp;</script>'
    payment = paid(shop, amount="1234567.89", location=place)
    text = till.did("report", "--format", "html")
    page = Page(text)
    assert page.errors == [] and page.open == []
    assert not [each for each in page.attributes if each[1] in ("src", "href", "onload", "style")]
    assert "url(" not in text and "@import" not in text and "<script" not in text
    assert place in page.cells
    assert "1,234,567.89" in page.cells
    assert page.attributes.count(("svg", "role", "img")) == 1
    assert len([each for each in page.attributes if each[:2] == ("rect", "height")]) == 1
    assert payment["id"] not in text and "John" not in text


def test_a_report_of_many_locations_names_the_largest_and_adds_up_the_others(shop: Shop, till: Till) -> None:
    for n in range(report.MOST_LOCATIONS + 3):
        paid(shop, amount=100 + n, location=f"Town {n}")
    page = Page(till.did("report", "--format", "html"))
    towns = [cell for cell in page.cells if cell.startswith("Town")]
    assert towns == [f"Town {n}" for n in range(report.MOST_LOCATIONS + 2, 2, -1)]
    assert page.cells[page.cells.index("others") + 2] == "303.00"


def test_the_first_moment_of_a_month_is_of_that_month(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"])
    settle(shop, sandbox, payment["reference"])
    for statement in ("UPDATE charges SET paid_at = %s", "UPDATE refunds SET processed_at = %s"):
        as_superuser(till, statement, "2026-02-01T00:00:00Z")
    assert report_rows(till, "--since", "2026-01", "--until", "2026-02") == []
    february = {row["by"]: row for row in report_rows(till, "--since", "2026-02", "--until", "2026-03")}
    assert (february["total"]["gross"], february["total"]["refunds"]) == ("50.00", "50.00")


def test_the_table_says_how_many_fees_are_not_known(shop: Shop, till: Till) -> None:
    for customer in ("null-fees@example.com", "null-fees@example.com", "john@example.com"):
        paid(shop, customer_email=customer, amount=1234)
    out = till.did("report")
    assert "so that net is too high: 2\n" in out
    assert "3,702.00" in out and "1,234.00" not in out.split("BY LOCATION")[0]


@pytest.mark.usefixtures("elsewhere")
def test_a_report_of_this_month_has_the_merchant_s_days(shop: Shop, till: Till) -> None:
    paid(shop)
    assert "Days in WAT." in till.did("report", "--format", "html", TIMEZONE="Africa/Lagos")
