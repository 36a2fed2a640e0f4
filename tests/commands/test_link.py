# ruff: noqa: F811  (fixtures are imported by their names)
"""Payment links from the operator's shell to a paid order."""

import re
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlencode, urlsplit
from zoneinfo import ZoneInfo

import falcon.testing
import pytest

from shop import Shop, open_shop, sandbox  # noqa: F401
from till import Till, open_till, till  # noqa: F401

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
TYPED = {
    "customer_name": "John Doe",
    "customer_email": "john@example.com",
    "customer_phone": "08012345678",
    "location": "Lagos",
}


@pytest.fixture
def shop(open_shop: Callable[..., Shop]) -> Shop:
    return open_shop()


def link_of(output: str) -> str:
    """The link that `manage.py link` printed: its first line."""
    return output.splitlines()[0]


def pay_by(shop: Shop, link: str) -> falcon.testing.Result:
    """The form of the link, filled in and sent, which leads to the checkout."""
    query = urlsplit(link).query
    form = shop.client.simulate_get("/pay", query_string=query)
    assert form.status_code == 200, form.text
    fields = {**{name: values[0] for name, values in parse_qs(query).items()}, **TYPED}
    return shop.client.simulate_post("/pay", body=urlencode(fields), headers=FORM)


def test_by_a_link_exactly_what_it_says_is_paid(shop: Shop, till: Till) -> None:
    link = link_of(till.did("link", "--amount", "75", "--description", "A hat & a coat", "--order", "1001/ä"))
    assert link.startswith("http://127.0.0.1:8000/pay?")
    assert pay_by(shop, link).status_code == 303
    (payment,) = shop.sql("SELECT * FROM payments")
    assert (payment["amount_minor"], payment["currency"], payment["source"]) == (7500, "NGN", "link")
    assert (payment["description"], payment["metadata"]) == ("A hat & a coat", {"order": "1001/ä"})


def test_a_link_with_an_order_is_for_one_payment_and_one_without_for_many(shop: Shop, till: Till) -> None:
    ordered, free = (link_of(till.did("link", "--amount", "75.00", *more)) for more in (["--order", "1001"], []))
    for link, count in ((ordered, 1), (free, 3)):
        for _ in range(2):
            if link == ordered and shop.sql("SELECT id FROM payments"):
                assert shop.client.simulate_get("/pay", query_string=urlsplit(link).query).status_code == 303
            else:
                assert pay_by(shop, link).status_code == 303
        assert len(shop.sql("SELECT id FROM payments")) == count


def test_a_link_that_was_changed_is_refused(shop: Shop, till: Till) -> None:
    query = urlsplit(link_of(till.did("link", "--amount", "75.00", "--order", "1001"))).query
    for before, after in (("75.00", "7.50"), ("NGN", "GHS"), ("1001", "1002"), ("&signature", "&expires=9&signature")):
        assert before in query
        assert shop.client.simulate_get("/pay", query_string=query.replace(before, after)).status_code == 403


@pytest.mark.usefixtures("elsewhere")
def test_a_link_ends_when_it_says(shop: Shop, till: Till) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=2)
    query = urlsplit(link_of(till.did("link", "--amount", "75.00", "--expires", soon.isoformat()))).query
    assert shop.client.simulate_get("/pay", query_string=query).status_code == 200
    time.sleep(2)
    assert shop.client.simulate_get("/pay", query_string=query).status_code == 410


@pytest.mark.parametrize("zone", ["UTC", "Africa/Lagos"])
@pytest.mark.usefixtures("elsewhere")
def test_a_day_ends_where_it_begins_for_the_merchant(till: Till, zone: str) -> None:
    link = link_of(till.did("link", "--amount", "75.00", "--expires", "2199-12-31", TIMEZONE=zone))
    midnight = datetime(2199, 12, 31, tzinfo=ZoneInfo(zone)).timestamp()
    assert parse_qs(urlsplit(link).query)["expires"] == [str(int(midnight))]


def test_another_currency_must_be_one_that_is_taken(open_till: Callable[..., Till]) -> None:
    till = open_till(CURRENCIES="XOF,NGN")
    query = parse_qs(urlsplit(link_of(till.did("link", "--amount", "500"))).query)
    assert (query["amount"], query["currency"]) == (["500"], ["XOF"])
    query = parse_qs(urlsplit(link_of(till.did("link", "--amount", "500", "--currency", "ngn"))).query)
    assert (query["amount"], query["currency"]) == (["500.00"], ["NGN"])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--amount", "49.99"], "--amount must be at least NGN 50.00"),
        (["--amount", "75.001"], "--amount must have at most 2 decimals in NGN"),
        (["--amount", "75", "--currency", "USD"], "--currency must be one of NGN"),
        (["--amount", "75", "--description", "x" * 201], "--description must have at most 200 characters"),
        (["--amount", "75", "--order", "4084 0840 8408 4081"], "--order must not contain a card number"),
        (["--amount", "75", "--order", ""], "--order must not be empty"),
        (["--amount", "75", "--order", " "], "--order must not be empty"),
        (["--amount", "75", "--expires", "9999-12-31"], "--expires is over already, or after 2285"),
        (["--amount", "75", "--expires", "2026-01-01"], "--expires is over already, or after 2285"),
    ],
)
def test_a_link_by_which_nobody_could_pay_is_not_made(till: Till, words: list[str], reason: str) -> None:
    refused = till.run("link", *words)
    assert (refused.status, refused.out, refused.err) == (1, "", f"manage.py: {reason}\n")


@pytest.mark.parametrize("words", [[], ["--amount", "much"], ["--amount", "75", "--expires", "soon"]])
def test_what_is_no_link_at_all_is_wrong_usage(till: Till, words: list[str]) -> None:
    assert till.run("link", *words).status == 2


def test_it_leads_to_where_customers_reach_us(open_till: Callable[..., Till]) -> None:
    till = open_till(PUBLIC_URL="https://example.com/till")
    assert link_of(till.did("link", "--amount", "75")).startswith("https://example.com/till/pay?amount=75.00&")


def test_it_is_drawn_for_a_camera_beside_the_link_alone(till: Till) -> None:
    done = till.run("link", "--amount", "75", "--order", "1001", "--qr")
    assert re.fullmatch(r"http\S+\n", done.out)
    drawn = [line for line in done.err.splitlines() if set(line) <= set(" ▀▄█")]
    assert len(drawn) > 20
    assert {len(line) for line in drawn} == {len(drawn[0])}


def test_what_is_too_long_to_be_drawn_is_refused(till: Till) -> None:
    refused = till.run("link", "--amount", "75", "--qr", "--description", "日" * 200, "--order", "日" * 300)
    assert (refused.status, refused.out) == (1, "")
    assert "too long for a QR code: shorten --description or --order" in refused.err
