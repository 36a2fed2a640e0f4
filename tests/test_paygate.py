"""The HTTP contract: what is asked and answered, to the letter, and all that is refused."""
# ruff: noqa: F811  # a fixture bears the name of its import

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import hmac
import http.client
import json
import re
import secrets
import socket
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from falcon.testing import Result
from psycopg.conninfo import conninfo_to_dict

import db
from conftest import Server as DatabaseServer
from conftest import url_of
from sandbox import Sandbox
from shop import (  # noqa: F401  # some are fixtures
    JSON,
    ORDER,
    PAYMENTS,
    SECRET_KEY,
    WEBHOOK,
    Reply,
    Server,
    Shop,
    open_shop,
    query,
    sandbox,
    shop,
    wait_until,
)

OpenShop = Callable[..., Shop]
CARD = "4084084084084081"
LIVE = {"PAYSTACK_SECRET_KEY": "sk_live_0123456789abcdef", "PUBLIC_URL": "https://pay.example.com"}
ID, REFERENCE, SECOND = r"PAY-[0-9A-HJKMNP-TV-Z]{26}", r"PG-[0-9A-HJKMNP-TV-Z]{26}", r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ"
UNKNOWN_ID = "PAY-0123456789ABCDEFGHJKMNPQRS"
TEXTS = ("customer_name", "location", "description")
FOUR_KIB = {**{str(number): "x" * 480 for number in range(8)}, "8": "x" * 175}
"""Metadata that are just not too much: 4,096 bytes as JSON."""


@pytest.fixture(scope="module")
def counter() -> Iterator[Shop]:
    """A shop whose database and provider are away: what it answers, it answers by itself, before it asks anyone."""
    with closed_shop() as shop:
        yield shop


def closed_shop(**env: str) -> Shop:
    nowhere = "postgresql://keeper:opensesame@127.0.0.1:9/vault"
    return Shop(nowhere, Sandbox(secret_key=SECRET_KEY, port=9), **env)


def guarded(answer: Result | Reply) -> None:
    """What every answer carries."""
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", answer.headers["x-request-id"])
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


def problem(answer: Result | Reply, status: int, code: str) -> dict[str, Any]:
    """The error in an answer, in the one shape that errors have."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    guarded(answer)
    error = answer.json
    members = ["status", "code", "message", *(["errors"] if "errors" in error else []), "request_id"]
    assert list(error) == members
    assert (error["status"], error["code"]) == ("error", code)
    assert error["message"].endswith(".")
    assert error["request_id"] == answer.headers["x-request-id"]
    return dict(error)


def invalid(answer: Result) -> dict[str, list[str]]:
    """What is wrong with the fields of a payment, by their names."""
    errors = problem(answer, 422, "invalid_fields")["errors"]
    assert all(messages and all(messages) for messages in errors.values())
    return dict(errors)


def to_be_retried(answer: Result | Reply) -> None:
    assert int(answer.headers["retry-after"]) >= 1


def raw(**members: str) -> str:
    """ORDER as JSON, with `members` written exactly so."""
    order = {**{name: json.dumps(value) for name, value in ORDER.items()}, **members}
    return "{" + ", ".join(f'"{name}": {value}' for name, value in order.items()) + "}"


def count(shop: Shop | Server, table: str) -> int:
    return int(shop.sql(f"SELECT count(*) AS n FROM {table}")[0]["n"])  # noqa: S608


def sign(body: bytes, key: str = SECRET_KEY) -> dict[str, str]:
    return {"x-paystack-signature": hmac.new(key.encode(), body, hashlib.sha512).hexdigest()}


# The answers of the page, to the letter


def test_the_answers_are_those_that_are_documented_to_the_letter(database_url: str) -> None:
    with Sandbox(LIVE["PAYSTACK_SECRET_KEY"]) as sandbox, Shop(database_url, sandbox, **LIVE) as shop:
        answer = shop.post(raw(amount="50.00"))
        payment = answer.json["payment"]
        assert re.fullmatch(ID, payment["id"])
        assert re.fullmatch(REFERENCE, payment["reference"])
        assert re.fullmatch(SECOND, payment["created_at"])
        assert payment["checkout_url"].startswith(f"{sandbox.url}/checkout/")
        assert answer.text == (
            f'{{"payment": {{"id": "{payment["id"]}", "customer_name": "John Doe", '
            '"customer_email": "john@example.com", "amount": 50.00, "status": "pending", "currency": "NGN", '
            f'"reference": "{payment["reference"]}", "checkout_url": "{payment["checkout_url"]}", '
            f'"status_reason": null, "mode": "live", "created_at": "{payment["created_at"]}", "paid_at": null, '
            '"refunded_amount": 0.00}, "status": "success", "message": "Payment initiated successfully."}'
        )
        shop.pay(payment["reference"])
        answer = shop.client.simulate_get(f"{PAYMENTS}/{payment['id']}")
        paid_at = answer.json["payment"]["paid_at"]
        assert re.fullmatch(SECOND, paid_at)
        assert answer.text == (
            f'{{"payment": {{"id": "{payment["id"]}", "customer_name": "John Doe", '
            '"customer_email": "john@example.com", "amount": 50.00, "status": "completed", "currency": "NGN", '
            f'"reference": "{payment["reference"]}", "checkout_url": null, '
            f'"status_reason": null, "mode": "live", "created_at": "{payment["created_at"]}", "paid_at": "{paid_at}", '
            '"refunded_amount": 0.00}, "status": "success", "message": "Payment details retrieved successfully."}'
        )


def test_the_error_is_the_one_that_is_documented_to_the_letter(counter: Shop) -> None:
    answer = counter.create(amount=0, headers={"X-Request-Id": "mine-1"})
    message = answer.json["message"]
    assert answer.text == (
        f'{{"status": "error", "code": "invalid_fields", "message": "{message}", '
        '"errors": {"amount": ["must be greater than 0"]}, "request_id": "mine-1"}'
    )


def test_a_new_payment_is_answered_with_its_address_and_is_not_to_be_cached(shop: Shop) -> None:
    answer = shop.create()
    assert answer.status_code == 201
    assert answer.headers["content-type"] == "application/json"
    assert "idempotent-replayed" not in answer.headers
    guarded(answer)
    payment_id = answer.json["payment"]["id"]
    assert answer.headers["location"].endswith(f"/api/v1/payments/{payment_id}")
    assert shop.get(payment_id) == answer.json["payment"]


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


# Fields


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
            metadata=[],
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
        ("customer_email", "x" * 243 + "@example.com"),
        ("customer_phone", "123456"),
        ("customer_phone", "1234567890123456"),
        ("customer_phone", "++2348012345678"),
        ("customer_phone", "234+8012345678"),
        ("customer_phone", "0801 CALL ME"),
        ("customer_phone", "٠٨٠١٢٣٤٥٦٧٨"),
        ("customer_phone", "( - . )"),
        ("location", "  "),
        ("location", "x" * 121),
        ("currency", "ngn"),
        ("currency", "GHS"),
        ("currency", "XXX"),
        ("currency", ""),
        ("currency", 566),
        ("description", "x" * 201),
        ("description", 5),
        ("description", ["x"]),
        ("metadata", "order=7"),
        ("metadata", ["order"]),
        ("metadata", {"order": 7}),
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
        *("0", "-1", "-0.01", "49.99", "50.001", "50.000", "5000001e-5", "1000000000000", "1e12", "1e999999999"),
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
        ],
        "customer_email": [("j@a.b", "j@a.b"), ("x" * 242 + "@example.com", "x" * 242 + "@example.com")],
        "customer_phone": [
            ("+234 (801) 234-56.78", "+23480123" + "45678"),
            ("[0801] 234", "0801234"),
            ("1" * 15, "1" * 15),
        ],
        "location": [(" 12 Allen Ave, Ikeja ", "12 Allen Ave, Ikeja"), ("x" * 120, "x" * 120)],
        "currency": [(None, "GHS"), (..., "GHS"), ("NGN", "NGN")],
        "description": [(None, None), ("", None), ("x" * 200, "x" * 200), ("50% off <b>", "50% off <b>")],
        "metadata": [
            (None, None),
            ({}, {}),
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
        "customer_phone": f"+234{character}8012345678",
        "amount": f"5{character}0",
        "location": f"La{character}gos",
        "currency": f"NGN{character}",
        "description": f"a{character}b",
        "metadata": {"order": f"7{character}"},
        "return_url": f"https://shop.example.com/{character}",
    }
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
        "4084.0840.8408.4081",
        "flat 4084, 0840 Allen Avenue, 84084 Lagos 081",
    ]
    for number in numbers:
        shop.created(**dict.fromkeys(TEXTS, number), metadata={number: number})
    shop.created(customer_phone="378282246310005", customer_email=f"{CARD}@example.com")


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


# Syntax


@pytest.mark.parametrize(
    "body",
    [
        *(
            "{",
            "{'amount': 50}",
            '{"amount": 50,}',
            '{"amount": 050}',
            '{"amount": .5}',
            '{"amount": +5}',
            "payment",
            " ",
        ),
        *("null", "[]", '"payment"', "50", "true", "[{}]"),
        *(raw(amount="NaN"), raw(amount="Infinity"), raw(amount="-Infinity"), raw(description="[NaN]")),
        *(raw()[:-1] + ', "amount": 50}', raw(metadata='{"a": "1", "a": "2"}')),
        *(raw()[:-1] + ', "am\\u006funt": 50}', raw() + "x", raw() + raw(), "\ufeff" + raw(), raw().replace('"', "“")),
        *("[" * 16_000, '{"a":' * 3_000, raw(metadata="[" * 16_000)),
        *(raw().encode("utf-16"), raw().encode() + b"\xff", b"\x00" + raw().encode(), b'{"a": "\xed\xa0\x80"}'),
        raw(description='"a\nb"'),
    ],
)
def test_what_is_not_one_json_object_is_a_bad_request(counter: Shop, body: str | bytes) -> None:
    problem(counter.post(body), 400, "invalid_json")


def test_an_error_quotes_nothing_of_a_body_that_is_not_json(counter: Shop) -> None:
    assert "zebedee" not in counter.post('{"customer_name": "zebedee').text


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonp", "json", ""],
)
def test_only_json_is_taken(counter: Shop, content_type: str) -> None:
    problem(counter.post(raw(), {"Content-Type": content_type}), 415, "unsupported_media_type")


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip"])
def test_an_encoded_body_is_not_taken(counter: Shop, encoding: str) -> None:
    problem(counter.post(raw(), {"Content-Encoding": encoding}), 415, "unsupported_media_type")


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON", "application/json;x"])
def test_json_may_be_named_with_parameters(counter: Shop, content_type: str) -> None:
    invalid(counter.post("{}", {"Content-Type": content_type, "Content-Encoding": "identity"}))


def test_a_payment_has_at_most_16_kib(shop: Shop) -> None:
    assert shop.post(raw().ljust(16 * 1024)).status_code == 201
    problem(shop.post(raw().ljust(16 * 1024 + 1)), 413, "payload_too_large")
    problem(shop.post("[" * 100_000), 413, "payload_too_large")


def test_a_payment_without_a_length_is_refused(counter: Shop) -> None:
    problem(counter.client.simulate_post(PAYMENTS, headers=JSON), 411, "length_required")


# API_TOKEN


def test_with_a_token_set_a_payment_needs_it() -> None:
    with closed_shop(API_TOKEN="open-sesame") as shop:
        for given in (
            "",
            "open-sesame",
            "Bearer",
            "Bearer ",
            "Bearer open",
            "Bearer open-sesame1",
            "Basic open-sesame",
        ):
            answer = shop.post("{}", {"Authorization": given})
            problem(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
        problem(shop.post("{}"), 401, "unauthorized")
        problem(shop.post("{}", {"Authorization": "Bearer öpen-sesame"}), 401, "unauthorized")
        for given in ("Bearer open-sesame", "bearer open-sesame"):
            invalid(shop.post("{}", {"Authorization": given}))


def test_the_token_is_for_new_payments_alone(open_shop: OpenShop) -> None:
    shop = open_shop(API_TOKEN="open-sesame")
    payment = shop.created(headers={"Authorization": "Bearer open-sesame"})
    shop.pay(payment["reference"])
    assert shop.get(payment["id"])["status"] == "completed"
    assert shop.client.simulate_get(f"/pay/{payment['id']}").status_code == 200


# Idempotency keys


@pytest.mark.parametrize(
    "key",
    [
        *("", " ", "a b", "a\tb", "a\x00b", "a\x7f", "schlüssel", "x" * 256, '"' + "x" * 256 + '"'),
        *('"', '""', '"a', 'a"', 'a"b"', "a,b", "a, b", '"a", "b"', '"a","b"', '"a" b', '"a\\"', '"a";x=1'),
    ],
)
def test_a_malformed_idempotency_key_is_a_bad_request(counter: Shop, key: str) -> None:
    problem(counter.create(key), 400, "invalid_idempotency_key")


@pytest.mark.parametrize(
    "bare", ["k", "x" * 255, "8e03978e-40d5-43dd-bc93-6894a57f9324", "!#$%&'()*+-./:;<=>?@[]^_`{|}~"]
)
def test_a_key_is_the_same_bare_and_quoted(shop: Shop, bare: str) -> None:
    first, second = shop.create(bare), shop.create(f'"{bare}"')
    assert second.text == first.text
    assert second.headers["idempotent-replayed"] == "true"


def test_a_quoted_key_may_escape_quotes_and_hold_commas(shop: Shop) -> None:
    ids = {key: shop.created(key=key)["id"] for key in ('"a\\"b"', '"a\\\\b"', '"a,b"', "a'b", "ab", "aB")}
    assert len(set(ids.values())) == 6
    assert shop.created(key="a\\b")["id"] == ids['"a\\\\b"']


def test_a_key_can_be_required(open_shop: OpenShop) -> None:
    shop = open_shop(REQUIRE_IDEMPOTENCY_KEY="on")
    problem(shop.create(), 400, "idempotency_key_required")
    assert shop.create("k").status_code == 201


def test_without_a_key_each_request_is_a_payment_of_its_own(shop: Shop) -> None:
    assert shop.created()["id"] != shop.created()["id"]


def test_a_finished_request_is_answered_again_as_it_was(shop: Shop) -> None:
    first = shop.create("k")
    payment = first.json["payment"]
    shop.pay(payment["reference"])
    again = shop.create("k")
    assert (again.status_code, again.text) == (201, first.text)
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]
    guarded(again)
    assert count(shop, "payments") == shop.sandbox.calls("initialize") == 1


def test_a_key_of_test_mode_starts_anew_in_live_mode(open_shop: OpenShop, database_url: str) -> None:
    test = open_shop().create("k").json["payment"]
    with Sandbox(LIVE["PAYSTACK_SECRET_KEY"]) as sandbox, Shop(database_url, sandbox, **LIVE) as shop:
        live = shop.create("k").json["payment"]
    assert (test["mode"], live["mode"]) == ("test", "live")
    assert test["id"] != live["id"]
    assert test["reference"] != live["reference"]


def test_it_is_the_same_request_however_it_is_written(shop: Shop) -> None:
    first = shop.create("k")
    backwards = {name: ORDER[name] for name in reversed(ORDER)}
    for body in (
        json.dumps(backwards, indent=4),
        raw(amount="50.00"),
        raw(amount='"50"'),
        raw(amount="5e1"),
        raw(currency='"NGN"'),
        raw(currency="null", description='""', metadata="null", return_url="null"),
        raw(customer_phone='"+2348012345678"', customer_name='" J\\u006fhn Doe "'),
    ):
        assert shop.post(body, {"Idempotency-Key": "k"}).text == first.text


@pytest.mark.parametrize(
    "change",
    [
        {"customer_name": "Jane Doe"},
        {"customer_email": "John@example.com"},
        {"customer_phone": "+234 801 234 5679"},
        {"amount": 50.01},
        {"location": "lagos"},
        {"currency": "GHS"},
        {"description": "Rice"},
        {"metadata": {"order": "7"}},
        {"metadata": {}},
        {"return_url": "https://shop.example.com/"},
    ],
)
def test_a_key_used_for_another_payment_is_refused_and_reveals_nothing(
    open_shop: OpenShop, change: dict[str, Any]
) -> None:
    shop = open_shop(CURRENCIES="NGN,GHS", RETURN_URL_ORIGINS="https://shop.example.com")
    payment = shop.created(key="k")
    answer = shop.create("k", **change)
    assert "errors" not in problem(answer, 422, "idempotency_key_reused")
    shown = answer.text + str(answer.headers)
    assert all(str(payment[name]) not in shown for name in ("id", "reference", "checkout_url", "customer_email"))
    assert count(shop, "payments") == 1


def test_what_is_refused_before_it_is_reserved_uses_no_key_up(open_shop: OpenShop) -> None:
    shop = open_shop(API_TOKEN="open-sesame")
    shop.create("k")
    shop.create("k", headers={"Authorization": "Bearer open-sesame"}, amount=0)
    answer = shop.create("k", headers={"Authorization": "Bearer open-sesame"})
    assert answer.status_code == 201
    assert "idempotent-replayed" not in answer.headers


@contextlib.contextmanager
def in_flight(shop: Shop, key: str, seconds: float = 1) -> Iterator[None]:
    """While a request with this key waits for the provider; it is answered 201 in the end."""
    calls = shop.sandbox.calls("initialize")
    shop.sandbox.fault("initialize", "slow", seconds=seconds)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        request = pool.submit(shop.create, key)
        wait_until(lambda: shop.sandbox.calls("initialize") > calls)
        yield
        assert request.result(20).status_code == 201


def test_a_request_in_flight_is_not_begun_again(shop: Shop) -> None:
    with in_flight(shop, "k"):
        answer = shop.create("k")
        problem(answer, 409, "request_in_flight")
        to_be_retried(answer)
        problem(shop.create("k", amount=51), 422, "idempotency_key_reused")
    assert shop.create("k").headers["idempotent-replayed"] == "true"
    assert count(shop, "payments") == shop.sandbox.calls("initialize") == 1


# The provider


def refuse(shop: Shop, message: str, status: int = 400) -> None:
    body = {"status": False, "message": message, "type": "validation_error", "code": "invalid_params"}
    shop.sandbox.fault("initialize", "answer", effect=False, status=status, body=body)


@pytest.mark.parametrize(
    ("message", "field"), [("Invalid Email Address Passed", "customer_email"), ("Invalid Amount Sent", "amount")]
)
def test_a_customer_or_amount_that_the_provider_refuses_fails_the_payment(shop: Shop, message: str, field: str) -> None:
    refuse(shop, message)
    answer = shop.create("k")
    assert problem(answer, 422, "provider_refused")["errors"] == {field: [message]}
    [row] = shop.sql("SELECT id, status, status_reason FROM payments")
    assert (row["status"], row["status_reason"]) == ("failed", message)
    again = shop.create("k")
    assert (again.status_code, again.text) == (422, answer.text)
    assert again.headers["idempotent-replayed"] == "true"
    assert shop.sandbox.calls("initialize") == 1


@pytest.mark.parametrize(
    ("status", "message"), [(401, "Invalid key"), (403, "Not allowed"), (400, "Currency not supported by merchant")]
)
def test_a_set_up_that_the_provider_refuses_is_the_operators_to_mend(shop: Shop, status: int, message: str) -> None:
    refuse(shop, message, status)
    answer = shop.create("k")
    problem(answer, 502, "provider_misconfigured")
    to_be_retried(answer)
    assert message not in answer.text
    assert shop.create("k").status_code == 201
    assert count(shop, "payments") == 1


def test_while_the_provider_is_away_the_same_key_may_be_tried_again(shop: Shop) -> None:
    shop.sandbox.fault("initialize", "502", times=None)
    answer = shop.create("k")
    problem(answer, 503, "provider_unavailable")
    to_be_retried(answer)
    shop.sandbox.clear_faults()
    answer = shop.create("k")
    assert answer.status_code == 201
    assert "idempotent-replayed" not in answer.headers
    assert count(shop, "payments") == 1


def test_the_wait_that_the_provider_asks_for_is_passed_on(shop: Shop) -> None:
    shop.sandbox.fault("initialize", "429-retry-after", retry_after=7)
    answer = shop.create()
    problem(answer, 503, "provider_unavailable")
    assert answer.headers["retry-after"] == "7"


def test_a_payment_whose_time_is_over_is_not_opened(shop: Shop) -> None:
    shop.sandbox.fault("initialize", "lost-request", times=2)
    assert shop.create("k").status_code == 503
    shop.sql("UPDATE payments SET expires_at = clock_timestamp()")
    answer = shop.create("k")
    problem(answer, 422, "payment_expired")
    assert shop.create("k").text == answer.text
    assert shop.sandbox.calls("initialize") == 2


def test_a_provider_that_hangs_stops_neither_reads_nor_webhooks_nor_finished_keys(open_shop: OpenShop) -> None:
    shop = open_shop(THREADS="2")  # one of them may wait for the provider
    finished = shop.create("finished")
    payment = finished.json["payment"]
    shop.sandbox.pay(payment["reference"])
    with in_flight(shop, "waiting", seconds=3):
        started = time.monotonic()
        answer = shop.create("another")
        problem(answer, 503, "busy")
        to_be_retried(answer)
        assert shop.create("finished").text == finished.text
        problem(shop.create("finished", amount=51), 422, "idempotency_key_reused")
        problem(shop.create("waiting"), 409, "request_in_flight")
        assert shop.deliver(payment["reference"]).status_code == 200
        assert shop.get(payment["id"])["status"] == "completed"
        assert time.monotonic() - started < 2.5
    assert shop.create("another").status_code == 201


# Reading


def test_a_payment_is_read_with_and_without_a_slash_alike(shop: Shop) -> None:
    bare = shop.create("k")
    slash = shop.client.simulate_post(f"{PAYMENTS}/", json=ORDER, headers={"Idempotency-Key": "k"})
    assert (slash.status_code, slash.text) == (201, bare.text)
    path = f"{PAYMENTS}/{bare.json['payment']['id']}"
    bare, slash = shop.client.simulate_get(path), shop.client.simulate_get(f"{path}/")
    assert (bare.status_code, slash.status_code) == (200, 200)
    assert slash.text == bare.text


def test_reading_gives_out_neither_phone_nor_location_nor_metadata(shop: Shop) -> None:
    payment = shop.created(metadata={"order": "wombat-7"}, description="Purple rice")
    answer = shop.client.simulate_get(f"{PAYMENTS}/{payment['id']}")
    assert list(answer.json["payment"]) == list(payment)
    for word in ("801", "Lagos", "wombat", "Purple"):
        assert word not in answer.text


@pytest.mark.parametrize(
    "payment_id",
    [
        UNKNOWN_ID,
        UNKNOWN_ID.lower(),
        UNKNOWN_ID[:-1],
        UNKNOWN_ID + "0",
        UNKNOWN_ID[:-1] + "I",
        "PAY-" + "\u0660" * 26,
        "PAY-%00",
        "%ff",
        "1",
        "' OR '1'='1",
        "x" * 5000,
    ],
)
def test_unknown_and_malformed_ids_are_one_and_the_same_404(shop: Shop, payment_id: str) -> None:
    def read(payment_id: str) -> Result:
        return shop.client.simulate_get(f"{PAYMENTS}/{payment_id}", headers={"X-Request-Id": "mine"})

    problem(read(payment_id), 404, "not_found")
    assert read(payment_id).text == read("PAY-" + "0" * 26).text


def test_a_read_of_an_unpaid_payment_makes_it_due_for_a_look_and_asks_nobody(shop: Shop) -> None:
    read, lately, paid, page = (shop.created()["id"] for _ in range(4))
    shop.pay(shop.get(paid)["reference"])
    shop.sql("UPDATE payments SET look_at = now() + interval '1 hour', looked_at = now() - interval '6 s'")
    shop.sql("UPDATE payments SET looked_at = now() WHERE id = %s", lately)
    for payment_id in (read, lately, paid):
        shop.get(payment_id)
    shop.client.simulate_get(f"/pay/{page}")

    def due() -> set[str]:
        return {row["id"] for row in shop.sql("SELECT id FROM payments WHERE look_at <= now()")}

    wait_until(lambda: due() == {read, page}, within_seconds=5)
    assert shop.sandbox.calls("verify") == 0


def test_only_a_pending_payment_shows_its_checkout(shop: Shop) -> None:
    payment = shop.created()
    assert shop.get(payment["id"])["checkout_url"] == payment["checkout_url"]
    shop.sql("UPDATE payments SET status = 'expired' WHERE id = %s", payment["id"])
    assert shop.get(payment["id"])["checkout_url"] is None


# The webhook


def events(shop: Shop | Server) -> list[dict[str, Any]]:
    return shop.sql(
        "SELECT mode, name, reference, payment_id, body, outcome, deliveries, applied_at IS NOT NULL AS is_applied "
        "FROM provider_events ORDER BY id"
    )


def test_a_signed_event_is_stored_applied_and_answered_200(shop: Shop) -> None:
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    body, headers = shop.sandbox.event(payment["reference"])
    answer = shop.webhook(body, headers)
    assert answer.status_code == 200
    guarded(answer)
    assert answer.json["status"] == "success"
    assert events(shop) == [
        {
            "mode": "test",
            "name": "charge.success",
            "reference": payment["reference"],
            "payment_id": payment["id"],
            "body": body.decode(),
            "outcome": "applied",
            "deliveries": 1,
            "is_applied": True,
        }
    ]
    assert shop.get(payment["id"])["status"] == "completed"
    assert count(shop, "charges") == 1


def test_an_event_with_a_slash_at_the_end_of_its_address_arrives(shop: Shop) -> None:
    assert shop.client.simulate_post(f"{WEBHOOK}/", body=b"{}", headers=sign(b"{}")).status_code == 200


@pytest.mark.parametrize("forgery", ["none", "empty", "other key", "other body", "short", "upper case", "sha256", "ü"])
def test_a_forged_event_is_stored_nowhere(shop: Shop, forgery: str) -> None:
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    body, headers = shop.sandbox.event(payment["reference"])
    signature = headers["x-paystack-signature"]
    forged = {
        "none": {},
        "empty": {"x-paystack-signature": ""},
        "other key": sign(body, "sk_test_another00"),
        "other body": sign(body + b" "),
        "short": {"x-paystack-signature": signature[:-1]},
        "upper case": {"x-paystack-signature": signature.upper()},
        "sha256": {"x-paystack-signature": hmac.new(SECRET_KEY.encode(), body, hashlib.sha256).hexdigest()},
        "ü": {"x-paystack-signature": "ü" * 128},
    }
    problem(shop.webhook(body, forged[forgery]), 401, "invalid_signature")
    assert count(shop, "provider_events") == count(shop, "charges") == 0
    assert shop.get(payment["id"])["status"] == "pending"


def test_the_signature_is_over_the_raw_body(shop: Shop) -> None:
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    body = (
        json.dumps(json.loads(shop.sandbox.event(payment["reference"])[0]), indent=3, sort_keys=True).encode() + b"\n"
    )
    assert shop.webhook(body, sign(body)).status_code == 200
    assert shop.get(payment["id"])["status"] == "completed"


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{}", b"null", b"[]", b"<xml/>", b"\xff\xfe\x00", b'{"event": "charge.success"}', b"[" * 100_000),
        b'{"event": 5, "data": {}}',
        json.dumps({"event": "charge.success", "data": {"reference": "x"}}).encode("utf-16"),
    ],
)
def test_a_signed_body_that_is_no_event_is_no_error(shop: Shop, body: bytes) -> None:
    assert shop.webhook(body, sign(body)).status_code == 200
    [event] = events(shop)
    assert (event["outcome"], event["name"], event["body"]) == ("no_event", None, None)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_a_signed_event_about_a_payment_in_another_encoding_is_no_error(shop: Shop, encoding: str) -> None:
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    body = shop.sandbox.event(payment["reference"])[0].decode().encode(encoding)
    assert shop.webhook(body, sign(body)).status_code == 200
    assert count(shop, "provider_events") == 1


def test_an_unknown_event_about_a_payment_is_stored_and_changes_nothing(shop: Shop) -> None:
    payment = shop.created()
    body = json.dumps({"event": "charge.unheard-of", "data": {"reference": payment["reference"]}}).encode()
    assert shop.webhook(body, sign(body)).status_code == 200
    [event] = events(shop)
    assert (event["name"], event["outcome"], event["payment_id"]) == ("charge.unheard-of", "noted", payment["id"])
    assert shop.get(payment["id"]) == payment


@pytest.mark.parametrize("reference", ["T012345", "PG-012", "PG-" + "0" * 26 + "-1", "PG-" + "0" * 26 + "-10"])
def test_of_another_shops_event_only_name_reference_and_digest_are_stored(shop: Shop, reference: str) -> None:
    shop.sandbox.charge_elsewhere(reference, email="stranger@example.com")
    body, headers = shop.sandbox.event(reference)
    assert shop.webhook(body, headers).status_code == 200
    [event] = events(shop)
    assert (event["name"], event["reference"], event["outcome"]) == ("charge.success", reference, "foreign")
    [stored] = shop.sql("SELECT * FROM provider_events")
    assert stored["digest"] == hashlib.sha256(body).digest()
    assert "stranger" not in str(stored)
    assert count(shop, "incidents") == count(shop, "charges") == 0


def test_an_event_of_the_other_mode_is_stored_and_not_applied(shop: Shop) -> None:
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    assert shop.deliver(payment["reference"], domain="live").status_code == 200
    [event] = events(shop)
    assert (event["outcome"], event["is_applied"]) == ("other_mode", False)
    assert event["body"] is not None
    assert count(shop, "charges") == 0
    assert shop.get(payment["id"])["status"] == "pending"


def test_a_repeated_event_is_answered_200_and_changes_nothing(shop: Shop) -> None:
    payment = shop.created()
    shop.pay(payment["reference"])
    before = shop.get(payment["id"]), count(shop, "payment_events")
    for _ in range(3):
        assert shop.deliver(payment["reference"]).status_code == 200
    assert shop.deliver(payment["reference"], fees=1).status_code == 200  # the same charge in another body
    assert [event["deliveries"] for event in events(shop)] == [4, 1]
    assert count(shop, "charges") == 1
    assert count(shop, "incidents") == 0
    assert (shop.get(payment["id"]), count(shop, "payment_events")) == before


def test_an_event_that_cannot_be_applied_is_kept_and_handled_when_it_comes_again(shop: Shop) -> None:
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    shop.sql("ALTER TABLE charges ADD CONSTRAINT broken CHECK (amount_minor < 0) NOT VALID")
    assert shop.deliver(payment["reference"]).status_code == 200
    [event] = events(shop)
    assert (event["outcome"], event["is_applied"]) == ("received", False)
    assert event["body"] is not None
    assert shop.get(payment["id"])["status"] == "pending"
    shop.sql("ALTER TABLE charges DROP CONSTRAINT broken")
    assert shop.deliver(payment["reference"]).status_code == 200
    assert [event["outcome"] for event in events(shop)] == ["applied"]
    assert shop.get(payment["id"])["status"] == "completed"


def test_while_a_key_is_being_replaced_both_verify(open_shop: OpenShop) -> None:
    shop = open_shop(PAYSTACK_SECRET_KEY=f"{SECRET_KEY},sk_test_older0000")
    for key in (SECRET_KEY, "sk_test_older0000"):
        payment = shop.created()
        shop.sandbox.pay(payment["reference"])
        body, _ = shop.sandbox.event(payment["reference"])
        assert shop.webhook(body, sign(body, key)).status_code == 200
        assert shop.get(payment["id"])["status"] == "completed"
    problem(shop.webhook(b"{}", sign(b"{}", "sk_test_oldest000")), 401, "invalid_signature")


def test_an_event_has_at_most_256_kib(shop: Shop) -> None:
    largest = b"{}".ljust(256 * 1024)
    assert shop.webhook(largest, sign(largest)).status_code == 200
    problem(shop.webhook(largest + b" ", sign(largest + b" ")), 413, "payload_too_large")
    assert count(shop, "provider_events") == 1


# The customer's page


def page_of(shop: Shop, payment_id: str, parameters: str = "") -> Result:
    return shop.client.simulate_get(f"/pay/{payment_id}", query_string=parameters)


def test_the_page_says_what_is_paid_to_whom_and_leads_to_the_checkout(open_shop: OpenShop) -> None:
    shop = open_shop(MERCHANT_NAME="Mama Put & Sons")
    payment = shop.created(amount=1234.5, description="Rice & beans")
    answer = page_of(shop, payment["id"])
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    guarded(answer)
    for text in ("1,234.50", "NGN", "Mama Put &amp; Sons", "Rice &amp; beans", "TEST", payment["reference"]):
        assert text in answer.text
    assert f'href="{payment["checkout_url"]}"' in answer.text
    assert '<meta http-equiv="refresh"' in answer.text
    assert page_of(shop, payment["id"] + "/").text == answer.text


def test_the_page_of_a_paid_payment_is_its_receipt(shop: Shop) -> None:
    payment = shop.created()
    shop.pay(payment["reference"])
    text = page_of(shop, payment["id"]).text
    assert "Paid" in text
    assert "50.00" in text
    assert payment["checkout_url"] not in text
    assert "http-equiv" not in text


def test_the_page_says_why_the_last_try_failed(shop: Shop) -> None:
    payment = shop.created()
    reason = "last try declined: Insufficient Funds"
    shop.sql("UPDATE payments SET status_reason = %s WHERE id = %s", reason, payment["id"])
    assert "Insufficient Funds" in page_of(shop, payment["id"]).text


def test_a_page_says_test_in_test_mode_alone(database_url: str) -> None:
    with Sandbox(LIVE["PAYSTACK_SECRET_KEY"]) as sandbox, Shop(database_url, sandbox, **LIVE) as shop:
        assert "TEST" not in page_of(shop, shop.created()["id"]).text


def test_the_page_shows_nobodys_data(shop: Shop) -> None:
    payment = shop.created(metadata={"order": "wombat-7"})
    shop.pay(payment["reference"])
    for word in ("John", "john@", "801", "wombat"):
        assert word not in page_of(shop, payment["id"]).text


def test_the_page_escapes_what_was_sent(open_shop: OpenShop) -> None:
    shop = open_shop(MERCHANT_NAME='<i>"Shop"</i>')
    payment = shop.created(description="<script>alert(1)</script> {0.__class__} {merchant} %s")
    text = page_of(shop, payment["id"]).text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; {0.__class__} {merchant} %s" in text
    assert "<script>" not in text
    assert "<i>" not in text


def test_a_page_has_a_policy_without_inline_code_that_lets_the_checkout_through(shop: Shop) -> None:
    answer = page_of(shop, shop.created()["id"])
    policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert "https://checkout.paystack.com" in policy["form-action"].split()
    assert shop.sandbox.url in policy["form-action"].split()
    assert policy["frame-ancestors"] == "'none'"
    assert "unsafe-inline" not in answer.headers["content-security-policy"]
    assert not re.search(r"<script>|<style|style=|\son\w+=", answer.text)


def test_nothing_on_a_page_is_loaded_from_another_host(shop: Shop) -> None:
    text = page_of(shop, shop.created()["id"]).text
    loaded = re.findall(r'<(?:link|img|script|iframe)\b[^>]*?(?:href|src)="([^"]*)"', text)
    assert "/paygate.css" in [address.partition("?")[0] for address in loaded]
    for address in loaded:
        assert re.match(r"/[^/]", address)
        answer = shop.client.simulate_get(address)
        assert answer.status_code == 200
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"(?:url\(|@import|src=|href=)[\s\"']*(?:https?:)?//", answer.text)


def test_the_customer_who_comes_back_from_the_checkout_goes_on_to_the_shop(open_shop: OpenShop) -> None:
    shop = open_shop(RETURN_URL_ORIGINS="https://shop.example.com")
    payment = shop.created(return_url="https://shop.example.com/thanks?order=7#top")
    for parameters in ("trxref=x&reference=x", "reference=x", "trxref=x"):
        answer = page_of(shop, payment["id"], parameters)
        assert answer.status_code == 303
        assert answer.headers["location"] == f"https://shop.example.com/thanks?order=7&payment={payment['id']}#top"
        guarded(answer)
    assert page_of(shop, payment["id"]).status_code == 200
    plain = shop.created(return_url="https://shop.example.com")
    assert page_of(shop, plain["id"], "reference=x").headers["location"].endswith(f"example.com?payment={plain['id']}")


def test_without_a_return_url_the_customer_stays_on_the_page(shop: Shop) -> None:
    payment = shop.created()
    answer = page_of(shop, payment["id"], f"trxref={payment['reference']}&reference={payment['reference']}")
    assert answer.status_code == 200
    assert shop.get(payment["id"])["status"] == "pending"  # the redirect proves nothing


def test_an_unknown_page_is_a_page_too(shop: Shop) -> None:
    answer = page_of(shop, UNKNOWN_ID, "reference=x")
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("text/html")
    assert "content-security-policy" in answer.headers
    guarded(answer)
    assert page_of(shop, "x").text == answer.text


# Every answer


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/api", "/api/v1", "/api/v1/payment", "/api/v2/payments", f"{PAYMENTS}/{UNKNOWN_ID}/refunds"),
        *("/pay/a/b", "/.env", "/settings.py", "/pages/payment.html", "/%00", "/%ff", "//evil.example"),
    ],
)
def test_there_is_nothing_at_another_address(counter: Shop, path: str) -> None:
    problem(counter.client.simulate_get(path), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        *((method, PAYMENTS, "POST") for method in ("GET", "PUT", "PATCH", "DELETE")),
        *((method, f"{PAYMENTS}/{UNKNOWN_ID}", "GET") for method in ("POST", "PUT", "DELETE")),
        ("GET", WEBHOOK, "POST"),
        ("POST", f"/pay/{UNKNOWN_ID}", "GET"),
        ("POST", "/healthz", "GET"),
        ("DELETE", "/readyz", "GET"),
    ],
)
def test_a_wrong_method_is_told_the_right_one(counter: Shop, method: str, path: str, allowed: str) -> None:
    answer = counter.client.simulate_request(method, path)
    problem(answer, 405, "method_not_allowed")
    assert set(answer.headers["allow"].split(", ")) - {"OPTIONS"} == {allowed}


@pytest.mark.parametrize("given", ["a", "3f-2_b.C", "x" * 64])
def test_a_sane_request_id_is_kept(counter: Shop, given: str) -> None:
    answer = counter.client.simulate_get("/healthz", headers={"X-Request-Id": given})
    assert answer.headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "a\nb", "ä", "<b>", '"a"', "a;b"])
def test_another_request_id_is_replaced(counter: Shop, given: str) -> None:
    answers = [counter.client.simulate_get("/healthz", headers={"X-Request-Id": given}) for _ in range(2)]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids - {given}) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in ids)


def test_no_url_is_made_of_the_host_header(open_shop: OpenShop) -> None:
    shop = open_shop(PUBLIC_URL="https://pay.example.com/shop")
    evil = {"Host": "evil.example", "X-Forwarded-Host": "evil.example", "Forwarded": "host=evil.example"}
    answer = shop.create(headers=evil)
    payment_id = answer.json["payment"]["id"]
    page = shop.client.simulate_get(f"/pay/{payment_id}", headers=evil)
    missing = shop.client.simulate_get("/nowhere", headers=evil)
    for each in (answer, page, missing):
        assert "evil" not in each.text + str(each.headers)
    [asked] = shop.sandbox.requests()
    assert "evil" not in str(asked)
    assert asked["body"]["callback_url"] == f"https://pay.example.com/shop/pay/{payment_id}"
    assert asked["body"]["metadata"]["cancel_action"] == f"https://pay.example.com/shop/pay/{payment_id}"


def test_the_addresses_that_are_given_out_begin_with_the_public_url(open_shop: OpenShop) -> None:
    shop = open_shop(PUBLIC_URL="https://pay.example.com/shop")
    answer = shop.create()
    payment_id = answer.json["payment"]["id"]
    assert answer.headers["location"] == f"https://pay.example.com/shop/api/v1/payments/{payment_id}"
    assert 'href="/shop/paygate.css?' in page_of(shop, payment_id).text  # 'self', whatever name the page was asked by


def test_an_error_that_nobody_expected_tells_nothing_of_its_cause(shop: Shop) -> None:
    shop.sql("ALTER TABLE payments ADD CONSTRAINT no_zebedee CHECK (customer_name <> 'Zebedee') NOT VALID")
    answer = shop.create(customer_name="Zebedee")
    problem(answer, 500, "internal_error")
    assert not re.search("zebedee|constraint|psycopg|payments|Traceback|INSERT|Error", answer.text)
    assert shop.create().status_code == 201


# Health


def test_the_process_lives_whatever_has_become_of_the_database(counter: Shop) -> None:
    answer = counter.client.simulate_get("/healthz")
    assert answer.status_code == 200
    guarded(answer)


def test_it_is_ready_when_the_database_can_be_written(shop: Shop) -> None:
    answer = shop.client.simulate_get("/readyz")
    assert answer.status_code == 200
    guarded(answer)


def assert_not_ready(answer: Result) -> None:
    assert answer.status_code == 503, answer.text
    guarded(answer)
    to_be_retried(answer)


def test_it_is_not_ready_without_its_schema(cluster: Any, sandbox: Sandbox) -> None:
    with Shop(cluster.url, sandbox) as shop:
        assert_not_ready(shop.client.simulate_get("/readyz"))


def test_it_is_not_ready_with_a_schema_older_than_it_needs_and_ready_with_a_newer(shop: Shop) -> None:
    shop.sql("INSERT INTO migrations VALUES (9999, now())")
    assert shop.client.simulate_get("/readyz").status_code == 200
    shop.sql("DELETE FROM migrations")
    assert_not_ready(shop.client.simulate_get("/readyz"))


def test_it_is_not_ready_where_the_database_can_only_be_read(database_url: str, sandbox: Sandbox) -> None:
    name = conninfo_to_dict(database_url)["dbname"]
    query(database_url, f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    with Shop(database_url, sandbox) as shop:
        assert_not_ready(shop.client.simulate_get("/readyz"))


def test_while_the_database_is_away_each_answer_says_so_in_time_and_no_more(counter: Shop) -> None:
    body = b'{"event": "charge.success", "data": {"reference": "T1"}}'
    requests: dict[str, Callable[[], Result]] = {
        "create": counter.create,
        "webhook": lambda: counter.webhook(body, sign(body)),
        "read": lambda: counter.client.simulate_get(f"{PAYMENTS}/{UNKNOWN_ID}"),
        "page": lambda: counter.client.simulate_get(f"/pay/{UNKNOWN_ID}"),
        "ready": lambda: counter.client.simulate_get("/readyz"),
    }
    seconds: dict[str, float] = {}

    def timed(name: str) -> Result:
        started = time.monotonic()
        answer = requests[name]()
        seconds[name] = time.monotonic() - started
        return answer

    with concurrent.futures.ThreadPoolExecutor() as pool:
        answers = dict(zip(requests, pool.map(timed, requests), strict=True))
    for name, answer in answers.items():
        assert answer.status_code == 503
        if name != "page":
            problem(answer, 503, "database_unavailable")
        guarded(answer)
        to_be_retried(answer)
        assert not re.search(r"keeper|opensesame|vault|127\.|psycopg|\w+Error|Timeout|refused|SELECT", answer.text)
    assert seconds["ready"] < 2
    assert max(seconds.values()) < 8


# As it is served, over a socket


@pytest.fixture(scope="session")
def served(server: DatabaseServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """gunicorn with one process of 6 threads and the worker; its provider sends webhooks."""
    name = f"served_{secrets.token_hex(8)}"
    url = url_of(dataclasses.replace(server, password=server.password or "sesame"), name)
    maintenance_url = url_of(server, server.maintenance_dbname)
    query(maintenance_url, f"CREATE DATABASE {name}")
    db.migrate(url)
    settings = {"THREADS": "6", "LOG_LEVEL": "DEBUG", "WORKER_INTERVAL": "0.2"}
    try:
        with (
            Sandbox(SECRET_KEY) as sandbox,
            Server(url, sandbox, tmp_path_factory.mktemp("served"), **settings) as gunicorn,
        ):
            sandbox.configure(webhook_url=gunicorn.url + WEBHOOK)
            yield gunicorn
    finally:
        query(maintenance_url, f"DROP DATABASE {name} WITH (FORCE)")


def payment_of(served: Server, answer: Reply) -> str:
    """The status of the payment in an answer, as it stands now."""
    reply = served.request("GET", f"{PAYMENTS}/{answer.json['payment']['id']}")
    guarded(reply)
    return str(reply.json["payment"]["status"])


def test_a_payment_is_completed_by_its_webhook_over_the_wire(served: Server) -> None:
    answer = served.create()
    guarded(answer)
    served.sandbox.pay(answer.json["payment"]["reference"])
    assert served.sandbox.wait_for_webhooks()
    assert payment_of(served, answer) == "completed"


def test_a_read_has_the_worker_find_soon_what_no_webhook_told(served: Server) -> None:
    answer = served.create(customer_email="lost-webhook@example.com")
    payment = answer.json["payment"]
    served.sql("UPDATE payments SET look_at = now() + interval '1 hour' WHERE id = %s", payment["id"])
    served.sandbox.pay(payment["reference"])
    wait_until(lambda: payment_of(served, answer) == "completed", within_seconds=15)


def test_a_slash_at_the_end_is_not_answered_by_a_redirect(served: Server) -> None:
    answer = served.request("POST", f"{PAYMENTS}/", json.dumps(ORDER), JSON)
    assert answer.status_code == 201
    path = f"{PAYMENTS}/{answer.json['payment']['id']}"
    assert served.request("GET", f"{path}/").status_code == served.request("GET", path).status_code == 200


def test_a_chunked_payment_is_refused_for_want_of_a_length(served: Server) -> None:
    problem(served.request("POST", PAYMENTS, [raw().encode()], JSON), 411, "length_required")


def test_a_chunked_webhook_arrives(served: Server) -> None:
    answer = served.create(customer_email="lost-webhook@example.com")
    reference = answer.json["payment"]["reference"]
    served.sandbox.pay(reference)
    body, headers = served.sandbox.event(reference)
    assert served.request("POST", WEBHOOK, [body[:10], body[10:]], headers).status_code == 200
    assert payment_of(served, answer) == "completed"
    problem(served.request("POST", WEBHOOK, [body, b" "], headers), 401, "invalid_signature")
    largest = [b" " * 1024] * 257
    problem(served.request("POST", WEBHOOK, largest, sign(b"".join(largest))), 413, "payload_too_large")


def test_two_idempotency_keys_are_a_bad_request(served: Server) -> None:
    for one, other in (("a", "b"), ('"a"', '"b"'), ("a", "a")):
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
        connection.putrequest("POST", PAYMENTS)
        body = raw().encode()
        for name, value in (("Idempotency-Key", one), ("Idempotency-Key", other), ("Content-Length", len(body))):
            connection.putheader(name, value)
        connection.putheader("Content-Type", "application/json")
        connection.endheaders(body)
        answer = connection.getresponse()
        reply = Reply(answer.status, dict(answer.getheaders()), answer.read().decode())
        connection.close()
        problem(reply, 400, "invalid_idempotency_key")


def send(served: Server, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    connection.sendall(data)
    return connection


def read(connection: socket.socket) -> Reply:
    """The next answer on a connection."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return Reply(answer.status, dict(answer.getheaders()), answer.read().decode())


@pytest.mark.parametrize(
    "data",
    [
        b"payment please\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nno header\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: many\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_http_is_answered_like_every_error(served: Server, data: bytes) -> None:
    with send(served, data) as connection:
        answer = read(connection)
    assert 400 <= answer.status_code < 500
    problem(answer, answer.status_code, "bad_request")


def test_a_body_that_was_not_read_is_not_taken_for_the_next_request(served: Server) -> None:
    smuggled = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    post = b"POST /api/v1/payments HTTP/1.1\r\nHost: x\r\n"
    plain = post + b"Content-Type: text/plain\r\nContent-Length: %d\r\n\r\n%b" % (len(smuggled), smuggled)
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(smuggled), smuggled)
    chunked = post + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
    last = b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    for request, status in ((plain, b"415"), (chunked, b"411")):
        with send(served, request + last) as connection, connection.makefile("rb") as answers:
            statuses = re.findall(rb"HTTP/1.1 (\d+)", answers.read())
        assert statuses in ([status, b"404"], [status])  # to close the connection is safe too


def test_a_client_that_waits_for_a_word_before_it_sends_its_body_gets_it(served: Server) -> None:
    head = f"POST {PAYMENTS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw())}\r\n"
    with send(served, f"{head}Expect: 100-continue\r\n\r\n".encode()) as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 100 ")
        connection.sendall(raw().encode())
        assert read(connection).status_code == 201


HALF_SENT = {
    "nothing": b"",
    "line": b"POST /api/v1/paym",
    "headers": b"POST /api/v1/payments HTTP/1.1\r\nHost: localhost\r\nContent-Ty",
    "payment": b"POST /api/v1/payments HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b'Content-Length: 100\r\n\r\n{"amount": 5',
    "event": b"POST /api/v1/webhooks/paystack HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
    "chunk": b"POST /api/v1/webhooks/paystack HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n64\r\n{",
}


def answer_status(connection: socket.socket) -> int | None:
    """The status that a connection is answered with; None where it is closed without an answer."""
    data = connection.recv(65536)
    return int(data.split(b" ")[1]) if data else None


def test_half_sent_requests_on_as_many_sockets_as_there_are_threads_stop_nobody(served: Server) -> None:
    """Each of them holds a thread for the 5 seconds that a socket may be silent, and not for ever."""
    with contextlib.ExitStack() as stack:
        connections = {name: stack.enter_context(send(served, data)) for name, data in HALF_SENT.items()}
        time.sleep(0.2)
        started = time.monotonic()
        assert served.create().status_code == 201
        assert time.monotonic() - started < 10
        statuses = {name: answer_status(connections[name]) for name in ("payment", "event", "chunk")}
    assert all(status is None or 400 <= status < 500 for status in statuses.values()), statuses


@pytest.mark.parametrize("half", ["payment", "event", "chunk"])
def test_a_body_that_ends_early_is_the_clients_error(served: Server, half: str) -> None:
    with send(served, HALF_SENT[half]) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert answer_status(connection) in (400, 401)


def test_a_stopping_server_finishes_what_it_has_begun(database_url: str, sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.fault("initialize", "slow", seconds=1)
    with Server(database_url, sandbox, tmp_path) as gunicorn, concurrent.futures.ThreadPoolExecutor() as pool:
        request = pool.submit(gunicorn.create)
        wait_until(lambda: sandbox.calls("initialize") == 1)
        assert gunicorn.stop() == 0
        assert request.result().status_code == 201


# Logs

SHIBBOLETH: dict[str, Any] = {
    "customer_name": "Zebedee Ọlá-Quux",
    "customer_email": "zebedee.quux@mail.example",
    "customer_phone": "+2348099887766",
    "location": "Umzimkulu Corner",
    "description": "Purple wombat",
    "metadata": {"order": "wombat-7781"},
}
HUSHED = ("zebedee", "quux", "99887766", "umzimkulu", "wombat", "sesame", CARD, SECRET_KEY, "shibboleth")


def provoke(served: Server) -> None:
    """Payments, events and errors of each kind, all of them about one customer."""
    bearer = {"Authorization": "Bearer sesame"}
    answer = served.create("zebedee-key", bearer, **SHIBBOLETH)
    assert answer.status_code == 201
    payment = answer.json["payment"]
    assert served.create("zebedee-key", **SHIBBOLETH).status_code == 201
    assert served.create("zebedee-key", **{**SHIBBOLETH, "location": "Umzimkulu"}).status_code == 422
    for broken in ({"amount": "zebedee"}, {"zebedee": "quux"}, {"description": CARD}, {"customer_email": "zebedee"}):
        assert served.create(**{**SHIBBOLETH, **broken}).status_code == 422
    for body, headers in (
        ('{"customer_name": "zebedee', JSON),
        ("customer_name=zebedee", {"Content-Type": "text/zebedee"}),
        (raw(), {**JSON, "Content-Encoding": "zebedee"}),
        (raw(), {**JSON, "Idempotency-Key": "zebedee quux"}),
        (raw().ljust(20_000), {**JSON, "X-Request-Id": "zebedee quux"}),
    ):
        assert 400 <= served.request("POST", PAYMENTS, body, headers).status_code < 500
    for path in (f"{PAYMENTS}/zebedee.quux@mail.example", "/pay/zebedee?reference=quux", "/zebedee?quux=wombat"):
        assert served.request("GET", path).status_code == 404
    assert served.request("ZEBEDEE", PAYMENTS).status_code in (400, 405)
    assert served.request("GET", f"/pay/{payment['id']}").status_code == 200
    for raw_request in (
        b"zebedee quux\r\n\r\n",
        b"GET /zebedee HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nzebedee quux\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: zebedee\r\n\r\n",
        b"GET / HTTP/1.1\r\nZebe(dee: quux\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: zebedee\r\n\r\n",
        b"GET /" + b"zebedee" * 2000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX-Zebedee: " + b"quux" * 5000 + b"\r\n\r\n",
    ):
        with send(served, raw_request) as connection:
            connection.recv(65536)
    # Events
    served.sandbox.pay(payment["reference"])
    assert served.sandbox.wait_for_webhooks()
    event, headers = served.sandbox.event(payment["reference"])
    assert b"zebedee" in event
    assert served.request("POST", WEBHOOK, event, sign(event, "sk_test_shibboleth")).status_code == 401
    for signed in (b"zebedee", b'{"event": "zebedee", "data": {"reference": "quux"}}'):
        assert served.request("POST", WEBHOOK, signed, sign(signed)).status_code == 200
    # The provider
    refusal = {"status": False, "message": "Invalid Email Address Passed: zebedee.quux@mail.example"}
    served.sandbox.fault("initialize", "answer", effect=False, status=400, body=refusal)
    assert served.create(**SHIBBOLETH).status_code == 422
    served.sandbox.fault("initialize", "answer", effect=False, status=403, body={"message": "zebedee"})
    assert served.create(**SHIBBOLETH).status_code == 502
    for fault in ("502", "garbage", "lost-answer", "truncated", "redirect", "foreign-url"):
        served.sandbox.fault("initialize", fault, times=2)
        assert served.create(**SHIBBOLETH).status_code in (201, 503)
        served.sandbox.clear_faults()
    # The database
    served.sql("ALTER TABLE payments ADD CONSTRAINT broken CHECK (customer_name NOT LIKE 'Zebedee%%') NOT VALID")
    assert served.create(**SHIBBOLETH).status_code == 500
    assert served.request("POST", WEBHOOK, event, headers).status_code == 200
    served.sql("ALTER TABLE payments DROP CONSTRAINT broken")


def take_the_database_away(served: Server, while_away: Callable[[], None]) -> None:
    name = str(conninfo_to_dict(served.database_url)["dbname"])
    with_others = served.database_url.replace(name, "postgres")
    query(with_others, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
    try:
        query(with_others, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", name)
        while_away()
    finally:
        query(with_others, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
        served.wait_until_ready()


def test_nobodys_data_and_no_secret_is_in_any_line_of_the_log(served: Server) -> None:
    provoke(served)

    def fail() -> None:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            requests = [
                pool.submit(served.create, **SHIBBOLETH),
                pool.submit(served.request, "GET", "/pay/PAY-ZEBEDEE0123456789ABCDEFGH"),
                pool.submit(served.request, "GET", "/readyz"),
            ]
            assert {request.result().status_code for request in requests} <= {404, 503}

    take_the_database_away(served, fail)
    text = served.log.read_text()
    for event in ("POST /api/v1/payments", "unexpected", "database_unavailable", "provider_refuses_us", "psycopg.pool"):
        assert event in text, f"no {event}: the test provokes less than it means to"
    leaks = [line for line in text.splitlines() if any(word in line.lower() for word in HUSHED)]
    assert not leaks, "\n".join(leaks)


def test_each_line_of_the_log_is_json_with_known_members(served: Server) -> None:
    served.create()
    for line in served.log.read_text().splitlines():
        assert line.startswith("{"), line
        members = set(json.loads(line))
        assert {"at", "level", "event"} <= members
        assert members <= {"at", "level", "event", "payment", "reference", "ms", "outcome", "request_id"}
