"""Amounts are exact: what is written is what is stored is what is written again, and nothing is ever rounded."""

import json
import re
import subprocess
import sys
from decimal import Decimal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import money
from shop import ROOT

HUNDREDTHS = [code for code, facts in money.CURRENCIES.items() if facts.decimals == 2]
LARGEST_MINOR = 10**12 * 100 - 1
PATIENT = settings(deadline=None)  # a machine under load is no bug
JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?", re.ASCII)


@st.composite
def amounts(draw: st.DrawFn) -> tuple[int, str]:
    """An amount that its currency takes, in hundredths."""
    currency = draw(st.sampled_from(sorted(money.CURRENCIES)))
    facts = money.CURRENCIES[currency]
    amount_minor = draw(st.integers(facts.minimum_minor, LARGEST_MINOR))
    return amount_minor if facts.decimals else amount_minor // 100 * 100, currency


@PATIENT
@given(amounts())
@example((LARGEST_MINOR, "NGN"))
@example((10, "GHS"))
@example((1_00, "XOF"))
def test_what_is_rendered_is_parsed_to_the_same_amount(amount: tuple[int, str]) -> None:
    amount_minor, currency = amount
    text = money.render(amount_minor, currency)
    assert money.parse(text, currency) == amount_minor
    assert Decimal(text) * 100 == amount_minor


@PATIENT
@given(amounts())
def test_what_is_rendered_is_a_json_number_with_the_decimals_of_its_currency(amount: tuple[int, str]) -> None:
    amount_minor, currency = amount
    text = money.render(amount_minor, currency)
    assert json.loads(text, parse_int=str, parse_float=str) == text
    assert len(text.partition(".")[2]) == money.CURRENCIES[currency].decimals


@PATIENT
@given(st.integers(0, 10**12 - 1), st.integers(0, 99), st.sampled_from(HUNDREDTHS))
@example(0, 29, "GHS")  # each of these is off by one where it goes through a float
@example(19, 99, "GHS")
@example(1, 15, "GHS")
@example(8, 41, "USD")
@example(999_999_999_999, 99, "NGN")
def test_each_amount_of_two_decimals_is_exact(whole: int, hundredths: int, currency: str) -> None:
    expected = whole * 100 + hundredths
    text = f"{whole}.{hundredths:02d}"
    if expected >= money.CURRENCIES[currency].minimum_minor:
        assert money.parse(text, currency) == expected
    else:
        with pytest.raises(ValueError, match="must be"):
            money.parse(text, currency)


@PATIENT
@given(
    st.integers(0, 10**12 - 1),
    st.text("0123456789", min_size=1, max_size=40),
    st.sampled_from(sorted(money.CURRENCIES)),
)
@example(50, "005", "NGN")
@example(500, "05", "XOF")
def test_more_decimals_than_the_currency_has_are_an_error(whole: int, decimals: str, currency: str) -> None:
    allowed = money.CURRENCIES[currency].decimals
    if len(decimals.rstrip("0")) > allowed:
        with pytest.raises(ValueError, match=r"decimals|whole amount|greater than 0"):
            money.parse(f"{whole}.{decimals}", currency)


@pytest.mark.parametrize(
    ("text", "currency", "amount_minor"),
    [
        *(("1000.0", "XOF", 100000), ("1000.00", "XOF", 100000), ("50.000", "NGN", 5000), ("50.100", "NGN", 5010)),
        *(("1.0e3", "XOF", 100000), ("60." + "0" * 15_000, "NGN", 6000)),
    ],
    ids=lambda value: str(value)[:10],
)
def test_zeros_at_the_end_are_no_decimals(text: str, currency: str, amount_minor: int) -> None:
    assert money.parse(text, currency) == amount_minor


@PATIENT
@given(st.from_regex(JSON_NUMBER, fullmatch=True), st.sampled_from(sorted(money.CURRENCIES)))
@example("5e1", "NGN")
@example("5000e-2", "NGN")
@example("1E+3", "XOF")
@example("-0", "NGN")
@example("1e-999999999", "NGN")
@example("1e99999999999999999999", "NGN")
def test_a_json_number_is_taken_exactly_or_refused(text: str, currency: str) -> None:
    try:
        amount_minor = money.parse(text, currency)
    except ValueError as error:
        assert str(error).startswith("must ")
    else:
        assert Decimal(text) * 100 == amount_minor
        assert money.CURRENCIES[currency].minimum_minor <= amount_minor <= LARGEST_MINOR


@PATIENT
@given(st.text(max_size=30), st.sampled_from(sorted(money.CURRENCIES)))
@example("5_000", "NGN")
@example(" 500", "NGN")
@example("500\n", "NGN")
@example("+500", "NGN")
@example("500.", "NGN")
@example("٥٠٠", "NGN")
@example("５００", "NGN")
@example("Infinity", "NGN")
@example("sNaN", "NGN")
@example("", "NGN")
def test_nothing_but_a_json_number_or_a_plain_decimal_is_an_amount(text: str, currency: str) -> None:
    if not JSON_NUMBER.fullmatch(text) and not money.PLAIN_DECIMAL.fullmatch(text):
        with pytest.raises(ValueError, match="must "):
            money.parse(text, currency)


@pytest.mark.parametrize(
    ("text", "currency", "message"),
    [
        ("0", "NGN", "must be greater than 0"),
        ("0.00", "NGN", "must be greater than 0"),
        ("-50", "NGN", "must be greater than 0"),
        ("49.99", "NGN", "must be at least NGN 50.00"),
        ("0.09", "GHS", "must be at least GHS 0.10"),
        ("2.99", "KES", "must be at least KES 3.00"),
        ("0.99", "ZAR", "must be at least ZAR 1.00"),
        ("1.99", "USD", "must be at least USD 2.00"),
        ("1000000000000", "NGN", "must have at most 12 digits before the point"),
        ("1000000000000", "XOF", "must have at most 12 digits before the point"),
        ("50.001", "NGN", "must have at most 2 decimals in NGN"),
        ("500.5", "XOF", "must be a whole amount in XOF"),
        ("fifty", "NGN", "must be an amount such as 50 or 50.00"),
        ("NaN", "NGN", "must be an amount such as 50 or 50.00"),
    ],
)
def test_a_refusal_says_what_would_be_right(text: str, currency: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        money.parse(text, currency)


def test_no_number_takes_long_to_refuse() -> None:
    """int() of such a number takes minutes, which no test could interrupt: hence another process."""
    numbers = [
        "1e999999999",
        "-1e999999999",
        "1e-999999999",
        "9" * 16_000,
        "0." + "0" * 16_000 + "1",
        "1e" + "9" * 9_000,
    ]
    code = (
        f"import money\nfor number in {numbers!r}:\n try: money.parse(number, 'NGN')\n except ValueError: print('no')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=ROOT, capture_output=True, text=True, timeout=10
    )
    assert done.stdout.split() == ["no"] * len(numbers), done.stderr


def test_what_no_price_of_ours_can_be_is_written_in_full_too() -> None:
    assert money.render(-310, "NGN") == "-3.10"
    assert money.render(-5, "NGN") == "-0.05"
    assert money.render(0, "XOF") == "0"
    assert money.render(150, "XOF") == "1.50"
    assert money.render(1234, "EUR") == "12.34"


def charge(amount_minor: int, requested_minor: int | None, currency: str = "NGN") -> money.Charge:
    return money.Charge(
        reference="PG-1",
        mode="test",
        provider_id=1,
        amount_minor=amount_minor,
        requested_minor=requested_minor,
        fees_minor=None,
        currency=currency,
        channel="card",
        paid_at=None,
    )


@pytest.mark.parametrize(
    ("came", "pays"),
    [
        (charge(5000, 5000), True),
        (charge(5000, None), True),
        (charge(5075, 5000), True),  # the customer bears the fees
        (charge(5075, None), True),
        (charge(4999, 5000), False),
        (charge(4999, None), False),
        (charge(5000, 4999), False),
        (charge(5000, 5001), False),
        (charge(5001, 5001), False),
        (charge(5000, 5000, "GHS"), False),
        (charge(5000, 5000, "ngn"), False),
    ],
)
def test_a_charge_pays_when_asked_at_the_price_and_paid_in_full(came: money.Charge, pays: bool) -> None:
    assert came.pays(5000, "NGN") is pays


def test_amounts_for_people_have_their_currency_first_and_their_thousands_apart() -> None:
    assert money.readable(125_000_00, "NGN") == "NGN 125,000.00"
    assert money.readable(-5, "NGN") == "NGN -0.05"
    assert money.readable(-1_234_50, "USD") == "USD -1,234.50"
    assert money.readable(1_000_00, "XOF") == "XOF 1,000"
    assert money.grouped(1_234_567_89, "GHS") == "1,234,567.89"
