# ruff: noqa: F811  (fixtures are imported by their names)
"""The rules of the fields: what is refused, by its name, and what is stored as it was meant."""

import time
import urllib.parse
from typing import Any

import pytest

from answers import invalid
from shop import CARD, ORDER, OpenShop, Shop, count, counter, open_shop, raw, sandbox, shop  # noqa: F401  # fixtures
from web.orders import INVISIBLE

TEXTS = ("customer_name", "location", "description")
FOUR_KIB = {**{str(number): "x" * 480 for number in range(8)}, "8": "x" * 175}
"""Metadata that are just not too much: 4,096 bytes as JSON."""


@pytest.mark.parametrize(
    ("written", "currency", "shown"),
    [
        ("50", "NGN", "50.00"),
        ("50.1", "NGN", "50.10"),
        ("50.10", "NGN", "50.10"),
        ('"50.1"', "NGN", "50.10"),
        ("5e1", "NGN", "50.00"),
        ("64.29", "NGN", "64.29"),
        ("999999999999.99", "NGN", "999999999999.99"),
        ("0.10", "GHS", "0.10"),
        ("500", "XOF", "500"),
        ("500.0", "XOF", "500"),
        ('"500.00"', "XOF", "500"),
        ('"50.000"', "NGN", "50.00"),
    ],
)
def test_an_amount_is_never_a_float_on_its_way(open_shop: OpenShop, written: str, currency: str, shown: str) -> None:
    shop = open_shop(CURRENCIES="NGN,GHS,XOF")
    answer = shop.post(raw(amount=written, currency=f'"{currency}"'))
    assert answer.status_code == 201, answer.text
    assert f'"amount": {shown}, ' in answer.text
    assert '"refunded_amount": ' + ("0}" if currency == "XOF" else "0.00}") in answer.text
    amount_minor = int(shown.replace(".", "")) * (100 if currency == "XOF" else 1)
    assert shop.sql("SELECT amount_minor, currency FROM payments") == [
        {"amount_minor": amount_minor, "currency": currency}
    ]
    [asked] = shop.sandbox.requests()
    assert (asked["body"]["amount"], asked["body"]["currency"]) == (amount_minor, currency)
    assert (
        f'"amount": {shown}, ' in shop.client.simulate_get(urllib.parse.urlsplit(answer.headers["location"]).path).text
    )


def test_all_that_is_wrong_is_told_at_once(shop: Shop) -> None:
    errors = invalid(
        shop.create(
            customer_name="",
            customer_email="john",
            customer_phone="12",
            amount="fifty",
            location=...,
            currency="EUR",
            description="x" * 201,
            metadata=["x"],
            return_url="shop",
            amuont=50,
        )
    )
    assert set(errors) == {*ORDER, "currency", "description", "metadata", "return_url", "amuont"}
    assert count(shop, "payments") == count(shop, "idempotency_keys") == 0
    assert shop.sandbox.requests() == []


NO_STRINGS: tuple[Any, ...] = (None, ..., [], {}, True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, value) for field in ORDER for value in NO_STRINGS),
        *((field, 50) for field in ORDER if field != "amount"),
        *((field, "") for field in ORDER),
        ("customer_name", "   "),
        ("customer_name", "x" * 101),
        ("customer_email", "john"),
        ("customer_email", "john@"),
        ("customer_email", "@example.com"),
        ("customer_email", "john@localhost"),
        ("customer_email", "john@example..com"),
        ("customer_email", "john@.example.com"),
        ("customer_email", "john@example.com."),
        ("customer_email", "john@doe@example.com"),
        ("customer_email", "john doe@example.com"),
        ("customer_email", "john@exam ple.com"),
        ("customer_email", "john@exam\u2003ple.com"),
        ("customer_email", " john@example.com"),
        ("customer_email", "john@example.com\u00a0"),
        ("customer_email", "jo\u200bhn@example.com"),
        ("customer_email", "john@exam\ufeffple.com"),
        ("customer_name", "\u3164"),
        ("customer_name", "\u200b \u2800\u00a0"),
        ("location", "\ufeff"),
        ("customer_email", "x" * 243 + "@example.com"),
        ("customer_phone", "123456"),
        ("customer_phone", "1234567890123456"),
        ("customer_phone", "++2348012345678"),
        ("customer_phone", "234+8012345678"),
        ("customer_phone", "0801 CALL ME"),
        ("customer_phone", "٠٨٠١٢٣٤٥٦٧٨"),
        ("customer_phone", "0801tel:2345678"),
        ("customer_phone", "( - . )"),
        ("location", "  "),
        ("location", "x" * 121),
        ("currency", "GHS"),
        ("currency", "XXX"),
        ("currency", ""),
        ("currency", 566),
        ("description", "x" * 201),
        ("description", 5),
        ("description", ["x"]),
        ("metadata", "order=7"),
        ("metadata", ["order"]),
        ("metadata", {"order": None}),
        ("metadata", {"order": {"id": "7"}}),
        ("metadata", {str(number): "" for number in range(21)}),
        ("metadata", {"order": "x" * 501}),
        ("metadata", {str(number): "x" * 499 for number in range(9)}),
        ("metadata", {"ü" * 2048: ""}),
        ("metadata", {**FOUR_KIB, "8": "x" * 176}),
        ("return_url", 5),
        ("return_url", "https://shop.example.com/"),
    ],
)
def test_a_field_that_breaks_its_rule_is_named(counter: Shop, field: str, value: Any) -> None:
    sent: dict[str, Any] = {field: value}
    assert set(invalid(counter.create(**sent))) == {field}


@pytest.mark.parametrize(
    "amount",
    [
        *("0", "-1", "-0.01", "49.99", "50.001", "5000001e-5", "1000000000000", "1e12", "1e999999999"),
        *("1e-999999999", "9" * 15_000, "1e" + "9" * 15_000, "0." + "0" * 15_000 + "1"),
        *('"-50"', '"+50"', '"50."', '".5"', '" 50"', '"50\\n"', '"5e1"', '"1_000"', '"1,000"', '"0x50"', '"٥٠"'),
        *('"５０"', '"NaN"', '"Infinity"', '"fifty"', '"' + "9" * 15_000 + '"', "true", "[50]", '{"NGN": 50}', "null"),
    ],
    ids=lambda amount: amount[:20],
)
def test_an_amount_is_a_number_or_a_plain_decimal_above_0_and_never_rounded(counter: Shop, amount: str) -> None:
    started = time.monotonic()
    assert set(invalid(counter.post(raw(amount=amount)))) == {"amount"}
    assert time.monotonic() - started < 5


def test_what_keeps_the_rules_is_stored_as_it_was_meant(open_shop: OpenShop) -> None:
    shop = open_shop(CURRENCIES="GHS,NGN", RETURN_URL_ORIGINS="https://shop.example.com")
    kept: dict[str, list[tuple[Any, Any]]] = {
        "customer_name": [
            ("  Ọlá 🎉 O'Brien ", "Ọlá 🎉 O'Brien"),
            ("x" * 100, "x" * 100),
            (" " + "x" * 100, "x" * 100),
            ("\u202aJohn Doe\u202c", "John Doe"),
            ("\u200b \ufeffJohn 👩‍👧 ❤️\u200e", "John 👩‍👧 ❤️"),
        ],
        "customer_email": [
            ("j@a.b", "j@a.b"),
            ("john@example.com\u200b", "john@example.com"),
            ("\ufeff\u202ajohn@example.com\u202c", "john@example.com"),
            ("x" * 242 + "@example.com", "x" * 242 + "@example.com"),
        ],
        "customer_phone": [
            ("+234 (801) 234-56.78", "+23480123" + "45678"),
            ("[0801] 234", "0801234"),
            ("1" * 15, "1" * 15),
            ("\u202a+234 801 234 5678\u202c", "+2348012345678"),
            ("\u2066+234\u00a0801\u2011234\u20115678\u2069", "+2348012345678"),
            ("\ufeff0801\u200b234\u200e5678\u200f", "08012345678"),
            ("tel:+234-801-234-5678", "+2348012345678"),
            ("Tel: 0801\u2009234\u20135678", "08012345678"),
        ],
        "location": [(" 12 Allen Ave, Ikeja ", "12 Allen Ave, Ikeja"), ("x" * 120, "x" * 120)],
        "currency": [(None, "GHS"), (..., "GHS"), ("NGN", "NGN"), ("ngn", "NGN"), ("NGN\u200b", "NGN")],
        "description": [(None, None), ("", None), ("x" * 200, "x" * 200), ("50% off <b>", "50% off <b>")],
        "metadata": [
            (None, None),
            ({}, {}),
            ([], {}),
            ({"n": 7, "x": True, "y": False}, {"n": "7", "x": "true", "y": "false"}),
            ({"order": "7", "ü": ""}, {"order": "7", "ü": ""}),
            ({str(number): "x" * 150 for number in range(20)}, {str(number): "x" * 150 for number in range(20)}),
            ({"x": "y" * 500}, {"x": "y" * 500}),
            (FOUR_KIB, FOUR_KIB),
        ],
        "return_url": [
            (None, None),
            ("https://shop.example.com/thanks?order=7#top", "https://shop.example.com/thanks?order=7#top"),
        ],
    }
    for field, pairs in kept.items():
        for sent, stored in pairs:
            payment = shop.created(**{field: sent})
            assert shop.sql(f"SELECT {field} FROM payments WHERE id = %s", payment["id"]) == [{field: stored}]  # noqa: S608


def test_numbers_in_metadata_are_kept_as_they_were_written(shop: Shop) -> None:
    answer = shop.post(raw(metadata='{"big": 12345678901234567890123, "price": 1.50, "e": 1E2}'))
    assert answer.status_code == 201, answer.text
    [stored] = shop.sql("SELECT metadata FROM payments")
    assert stored["metadata"] == {"big": "12345678901234567890123", "price": "1.50", "e": "1E2"}


def test_one_order_may_be_written_in_several_ways(shop: Shop) -> None:
    first = shop.create("one", customer_name="Ade\u0301 Ọla", metadata={"caf\u00e9": "Ze\u0301"})
    again = shop.create("one", customer_name="Ad\u00e9 O\u0323la", metadata={"cafe\u0301": "Z\u00e9"})
    assert again.headers["idempotent-replayed"] == "true"
    assert again.json["payment"]["id"] == first.json["payment"]["id"]
    shop.created()
    nothing: tuple[Any, ...] = (..., None, {}, [])
    for metadata in nothing:
        answer = shop.create("two", metadata=metadata, currency="ngn", amount="50.000")
        assert answer.status_code == 201, answer.text
    assert shop.create("two", metadata={"order": ""}).status_code == 422


FORBIDDEN = {
    **{f"U+{ord(character):04X}": character for character in "\x00\t\n\r\x1b\x7f\x85\u2028\u2029"},
    **{f"U+{code:04X}": chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))},
    "lone surrogate": "\ud800",
    "another": "\udfff",
}


@pytest.mark.parametrize("character", FORBIDDEN.values(), ids=FORBIDDEN)
def test_no_string_holds_a_character_that_is_none_of_a_line(counter: Shop, character: str) -> None:
    sent: dict[str, Any] = {
        "customer_name": f"John{character}Doe",
        "customer_email": f"john{character}@example.com",
        "amount": f"5{character}0",
        "location": f"La{character}gos",
        "currency": f"N{character}GN",
        "description": f"a{character}b",
        "metadata": {"order": f"7{character}"},
        "return_url": f"https://shop.example.com/{character}x",
    }
    if character not in INVISIBLE:  # which the phones put around what is copied
        sent["customer_phone"] = f"+234{character}8012345678"
    assert set(invalid(counter.create(**sent))) == set(sent)
    assert set(invalid(counter.create(metadata={f"or{character}der": "7"}))) == {"metadata"}


def with_check_digit(digits: str) -> str:
    """ISO/IEC 7812-1: the number that begins with `digits` and passes the Luhn check."""
    doubled = [int(digit) * (2 - place % 2) for place, digit in enumerate(reversed(digits))]
    return digits + str(-sum(number - 9 if number > 9 else number for number in doubled) % 10)


CARDS = [
    *(CARD, "4222222222222", "5555555555554444", "378282246310005", "6011111111111117"),
    *(
        with_check_digit(prefix.ljust(15, "7"))
        for prefix in ("2221", "2229", "223", "26", "271", "2720", "34", "5", "6")
    ),
    with_check_digit("4".ljust(18, "1")),
    *("4084 0840 8408 4081", "4084-0840-8408-4081", "4 0 8 4 0 8 4 0 8 4 0 8 4 0 8 1", "4084 - 0840 -- 8408   4081"),
    *(f"my card is {CARD}, thanks", f"x{CARD}y", "17 4084 0840 8408 4081 09/28", f"0{CARD[:4]} {CARD}"),
]


@pytest.mark.parametrize("card", CARDS)
def test_no_card_number_is_taken(counter: Shop, card: str) -> None:
    sent: dict[str, Any] = {**dict.fromkeys(TEXTS, card), "metadata": {"note": card}}
    answer = counter.create(**sent)
    assert set(invalid(answer)) == set(sent)
    assert card not in answer.text
    assert set(invalid(counter.create(metadata={card: "note"}))) == {"metadata"}


def test_a_card_number_is_stored_nowhere(shop: Shop) -> None:
    for field in TEXTS:
        sent: dict[str, Any] = {field: CARD}
        invalid(shop.create("one", **sent))
    for table in ("payments", "idempotency_keys", "payment_events", "provider_events"):
        assert count(shop, table) == 0
    assert shop.sandbox.requests() == []


def test_what_only_looks_like_a_card_number_is_taken(shop: Shop) -> None:
    numbers = [
        CARD[:-1] + "2",  # fails the check
        with_check_digit("170000000000"),  # a time in milliseconds
        with_check_digit("20260131000000"),  # an order number made of a date
        with_check_digit("2220".ljust(15, "7")),
        with_check_digit("2721".ljust(15, "7")),
        with_check_digit("35301113333000"),
        with_check_digit("4".ljust(11, "1")),  # too short
        with_check_digit("4".ljust(19, "1")),  # too long
        "flat 4084, 0840 Allen Avenue, 84084 Lagos 081",
    ]
    for number in numbers:
        shop.created(**dict.fromkeys(TEXTS, number), metadata={number: number})


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("amuont", "amount"),
        ("custmer_name", "customer_name"),
        ("email", "customer_email"),
        ("phone", "customer_phone"),
        ("returnUrl", "return_url"),
        ("meta", "metadata"),
        ("Currency", "currency"),
    ],
)
def test_an_unknown_field_is_told_the_closest_known_one(counter: Shop, name: str, closest: str) -> None:
    sent: dict[str, Any] = {name: "x"}
    [message] = invalid(counter.create(**sent))[name]
    assert message.endswith(f" {closest}")


def test_the_name_of_an_unknown_field_may_be_anything(counter: Shop) -> None:
    for name in ("", "\ud800", "\x00", "x" * 10_000, "'; DROP TABLE payments; --", "__proto__"):
        sent: dict[str, Any] = {name: "x"}
        errors = invalid(counter.create(**sent))
        assert len(errors) == 1
        assert all(len(shown) <= 50 for shown in errors)


def test_a_return_url_is_at_an_origin_that_the_operator_allows(open_shop: OpenShop) -> None:
    shop = open_shop(RETURN_URL_ORIGINS="https://shop.example.com, http://localhost:3000")
    for url in ("https://shop.example.com/", "https://SHOP.example.com:443/x?y#z", "http://localhost:3000"):
        shop.created(return_url=url)
    for url in (
        "http://shop.example.com/",
        "https://shop.example.com:8443/",
        "https://www.shop.example.com/",
        "https://shop.example.com.evil.example/",
        "https://shop.example.com@evil.example/",
        "https://evil.example/https://shop.example.com",
        "https://evil.example\\@shop.example.com/",
        "//shop.example.com/",
        "/thanks",
        "javascript:alert(1)//https://shop.example.com",
        "https://shop.example.com/a b",
        "https://shop.example.com/" + "x" * 2000,
        "https://shop.exämple.com/",
    ):
        assert set(invalid(shop.create(return_url=url))) == {"return_url"}, url
