# ruff: noqa: F811  (fixtures are imported by their names)
"""The API's flow, to the letter: what a request must be, tokens, keys, the provider's refusals, reading."""

import concurrent.futures
import contextlib
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from falcon.testing import Result

from answers import guarded, invalid, problem, to_be_retried, without_request_id
from local.sandbox import Sandbox
from shop import (  # noqa: F401  # fixtures
    JSON,
    LIVE,
    ORDER,
    PAYMENTS,
    UNKNOWN_ID,
    OpenShop,
    Shop,
    closed_shop,
    count,
    counter,
    open_shop,
    raw,
    sandbox,
    shop,
    wait_until,
)

ID, REFERENCE, SECOND = r"PAY-[0-9A-HJKMNP-TV-Z]{26}", r"PG-[0-9A-HJKMNP-TV-Z]{26}", r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ"

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
    answer = counter.create(amount=0, headers={"X-Request-Id": "3f2b9c0d11aa55ee"})
    message = answer.json["message"]
    assert answer.text == (
        f'{{"status": "error", "code": "invalid_fields", "message": "{message}", '
        '"errors": {"amount": ["must be greater than 0"]}, "request_id": "3f2b9c0d11aa55ee"}'
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


def test_a_payment_without_a_body_is_refused(counter: Shop) -> None:
    problem(counter.client.simulate_post(PAYMENTS, headers=JSON), 400, "invalid_json")


# API_TOKEN


def test_with_a_token_set_a_payment_needs_it() -> None:
    with closed_shop(API_TOKEN="open-sesame-0123") as shop:
        for given in (
            "",
            "open-sesame-0123",
            "Bearer",
            "Bearer ",
            "Bearer open",
            "Bearer open-sesame-01231",
            "Basic open-sesame-0123",
        ):
            answer = shop.post("{}", {"Authorization": given})
            problem(answer, 401, "unauthorized")
            assert answer.headers["www-authenticate"] == "Bearer"
        problem(shop.post("{}"), 401, "unauthorized")
        problem(shop.post("{}", {"Authorization": "Bearer öpen-sesame"}), 401, "unauthorized")
        for given in ("Bearer open-sesame-0123", "bearer open-sesame-0123"):
            invalid(shop.post("{}", {"Authorization": given}))


def test_paystack_and_the_customer_need_no_token(open_shop: OpenShop) -> None:
    shop, with_token = open_shop(API_TOKEN="open-sesame-0123"), {"Authorization": "Bearer open-sesame-0123"}
    payment = shop.created(headers=with_token)
    shop.pay(payment["reference"])
    told = shop.client.simulate_get(f"{PAYMENTS}/{payment['id']}", headers=with_token)
    assert told.json["payment"]["status"] == "completed"
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
    shop = open_shop(API_TOKEN="open-sesame-0123")
    shop.create("k")
    shop.create("k", headers={"Authorization": "Bearer open-sesame-0123"}, amount=0)
    answer = shop.create("k", headers={"Authorization": "Bearer open-sesame-0123"})
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
    assert (again.status_code, without_request_id(again)) == (422, without_request_id(answer))
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
    assert without_request_id(shop.create("k")) == without_request_id(answer)
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
        assert shop.create("finished").json["payment"] == shop.get(payment["id"])
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
        return shop.client.simulate_get(f"{PAYMENTS}/{payment_id}", headers={"X-Request-Id": "3f2b9c0d11aa55ee"})

    problem(read(payment_id), 404, "not_found")
    assert read(payment_id).text == read("PAY-" + "0" * 26).text


def test_a_read_of_an_unpaid_payment_makes_it_due_for_a_look_and_asks_nobody(shop: Shop) -> None:
    read, lately, paid, page = (shop.created()["id"] for _ in range(4))
    shop.pay(shop.get(paid)["reference"])
    shop.sql("UPDATE payments SET poll_at = now() + interval '1 hour', polled_at = now() - interval '6 s'")
    shop.sql("UPDATE payments SET polled_at = now() WHERE id = %s", lately)
    for payment_id in (read, lately, paid):
        shop.get(payment_id)
    shop.client.simulate_get(f"/pay/{page}")

    def due() -> set[str]:
        return {row["id"] for row in shop.sql("SELECT id FROM payments WHERE wanted_at IS NOT NULL")}

    wait_until(lambda: due() == {read, page}, within_seconds=5)
    assert shop.sandbox.calls("verify") == 0


def test_only_a_pending_payment_shows_its_checkout(shop: Shop) -> None:
    payment = shop.created()
    assert shop.get(payment["id"])["checkout_url"] == payment["checkout_url"]
    shop.sql("UPDATE payments SET status = 'expired' WHERE id = %s", payment["id"])
    assert shop.get(payment["id"])["checkout_url"] is None
