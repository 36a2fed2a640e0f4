# ruff: noqa: F811  (fixtures are imported by their names)
"""What is dear, odd or malicious in a request's body, and what it costs us."""

import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from local.sandbox import Sandbox
from shop import JSON, ORDER, PAYMENTS, SECRET_KEY, WEBHOOK, Server, Shop, open_shop, sandbox, shop  # noqa: F401

CARD, AMEX = "4111111111111111", "378282246310005"
GROUPS = ("4111", "1111", "1111", "1111")
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
REFUSED = "must not contain a card number"


@pytest.fixture(scope="module")
def counter() -> Iterator[Shop]:
    """A shop whose database is not there: what is refused at the counter never asks it."""
    nowhere = "postgresql://nobody@127.0.0.1:9/none"
    with Shop(
        nowhere, Sandbox(SECRET_KEY, port=9), RETURN_URL_ORIGINS="https://shop.example.com", PAY_FORM="on"
    ) as each:
        yield each


def errors(shop: Shop, **fields: Any) -> dict[str, list[str]]:
    answer = shop.create(**fields)
    assert answer.status_code == 422, answer.text
    return dict(answer.json["errors"])


# Card numbers


@pytest.mark.parametrize(
    "card",
    [
        CARD,
        AMEX,
        *(
            separator.join(GROUPS)
            for separator in (" ", "-", ".", "/", "_", "\\", " . ", "\u00a0", "\u2011", "\u2013", "\u2212")
        ),
        *(separator.join(GROUPS) for separator in ("\u200b", "\u00ad", "\u2060", "\u2003")),
        "".join(chr(0xFF10 + int(digit)) for digit in CARD),
        "".join(chr(0x0660 + int(digit)) for digit in CARD),
        "+" + CARD,
        "+" + AMEX,
        "phone +234 801 234 5678, card " + "/".join(GROUPS),
    ],
)
def test_a_card_number_is_refused_in_every_text_however_it_is_written(counter: Shop, card: str) -> None:
    sent: dict[str, Any] = {
        **dict.fromkeys(("customer_name", "location", "description"), card),
        "metadata": {"a": card},
    }
    assert errors(counter, **sent) == {name: [REFUSED] for name in sent}


def test_a_card_number_is_refused_in_an_address_of_any_kind(counter: Shop) -> None:
    assert errors(counter, customer_email=f"{CARD}@example.com") == {"customer_email": [REFUSED]}
    for path in (CARD, "?card=" + "-".join(GROUPS), "?card=" + "%20".join(GROUPS)):
        assert errors(counter, return_url="https://shop.example.com/" + path) == {"return_url": [REFUSED]}


def test_a_card_number_that_is_no_telephone_number_is_refused_as_one(counter: Shop) -> None:
    for phone in (AMEX, "+" + AMEX, "3782 822463 10005", "(3782)-822463.10005"):
        assert errors(counter, customer_phone=phone) == {"customer_phone": [REFUSED]}
    for phone in (CARD, " ".join(GROUPS)):
        assert "customer_phone" in errors(counter, customer_phone=phone)


def test_genuine_telephone_numbers_times_and_order_numbers_are_taken(shop: Shop) -> None:
    phones = [
        "+234 801 234 5678",
        "2348012345673",
        "0801-234-5678",
        "+49 151 23456785",
        "+55 11 91234-5678",
        "4915123456785",
    ]
    for phone in phones:
        shop.created(customer_phone=phone)
    for text in (
        *(f"+2348012345{n:03d}" for n in range(10)),  # one of ten passes the Luhn check
        *(f"2348012345{n:03d}" for n in range(10)),
        *(f"+49 151 23456{n:03d}" for n in range(10)),
        *(f"176967{n:07d}" for n in range(10)),  # milliseconds
        *(f"2026/01/31_12000{n}" for n in range(10)),
        "ORD-2026-01-000123",
        "flat 4111, 1111 Allen Avenue",
    ):
        shop.created(description=text, metadata={"order": text})


# What a request may cost


def cost(shop: Shop, body: bytes, path: str = PAYMENTS, headers: dict[str, str] = JSON) -> tuple[float, int]:
    """The least processor's time of some tries, and the size of the answer."""
    assert len(body) <= 16 * 1024
    times = []
    for _ in range(7):
        begun = time.process_time()
        answer = shop.client.simulate_post(path, body=body, headers=headers)
        times.append(time.process_time() - begun)
        assert answer.status_code in (400, 422), answer.text
    return min(times), len(answer.content)


DIGITS = " ".join("4567856" * 1100)
DEAR: dict[str, dict[str, Any]] = {
    "unknown members": {f"a{n}": "" for n in range(1200)},
    "long unknown members": {f"{'customer_name' * 3}{n:03d}": "" for n in range(300)},
    "digits": {**ORDER, "description": DIGITS, "amount": 0},
    "digits in what is short": {
        **ORDER,
        "amount": 0,
        "customer_name": DIGITS[:99],
        "location": DIGITS[:119],
        "description": DIGITS[:199],
        "metadata": {f"{n}": DIGITS[:399] for n in range(9)},
        "return_url": "https://shop.example.com/" + DIGITS[:1900].replace(" ", "-"),
    },
    "an e-mail": {**ORDER, "customer_email": "4 " * 7000},
    "a telephone number": {**ORDER, "customer_phone": "( " * 7000},
    "an amount": {**ORDER, "amount": "9" * 15_000},
    "metadata": {**ORDER, "metadata": {f"{n}": "" for n in range(1200)}},
    "what NFKC makes longer": {**ORDER, "amount": 0, "metadata": {f"{n}": "\ufdfa" * 130 for n in range(9)}},
}


@pytest.mark.parametrize("name", DEAR)
def test_no_request_costs_much_more_than_a_plain_one(counter: Shop, name: str) -> None:
    """As a ratio, so that it does not matter how quick the machine is; these took up to a thousand times as much."""
    plain, _ = cost(counter, json.dumps({**ORDER, "amount": 0}).encode())
    dear, size = cost(counter, json.dumps(DEAR[name], ensure_ascii=False).encode())
    assert dear < 100 * plain
    assert size < 4096


def test_no_form_costs_much_more_than_a_plain_one(open_shop: Callable[..., Shop]) -> None:
    counter = open_shop(PAY_FORM="on", RATE_LIMIT="off")
    fields = {name: str(value) for name, value in ORDER.items()} | {"amount": "0"}
    plain, _ = cost(counter, urlencode(fields).encode(), "/pay", FORM)
    for each in ({"customer_name": DIGITS[:10_000]}, {"location": "<" * 5000}, {f"a{n}": "" for n in range(40)}):
        assert cost(counter, urlencode({**fields, **each}).encode(), "/pay", FORM)[0] < 50 * plain


def test_a_few_unknown_members_are_named_and_a_long_name_is_compared_with_none(counter: Shop) -> None:
    named = errors(counter, **{f"a{n}": "" for n in range(1000)})
    assert list(named) == [f"a{n}" for n in range(10)]
    long = errors(counter, **{"customer_name" * 5: ""})
    assert long == {("customer_name" * 5)[:50]: ["is not a field here"]}


# Methods, bodies and origins


def test_head_is_answered_like_get_without_a_body(shop: Shop) -> None:
    payment = shop.created()["id"]
    paths = (
        "/healthz",
        "/readyz",
        "/docs",
        "/paygate.css",
        f"{PAYMENTS}/{payment}",
        f"/pay/{payment}",
        "/nowhere",
        "/metrics",
    )
    for path in paths:
        got, head = shop.client.simulate_get(path), shop.client.simulate_head(path)
        assert (head.status_code, head.content) == (got.status_code, b""), path
        ours = {"x-request-id", "date"}
        assert {n: v for n, v in head.headers.items() if n not in ours} == {
            n: v for n, v in got.headers.items() if n not in ours
        }
    refused = shop.client.simulate_head(WEBHOOK)
    assert (refused.status_code, refused.content) == (405, b"")
    assert "HEAD" in shop.client.simulate_delete("/healthz").headers["allow"]


def test_a_form_may_come_in_chunks(database_url: str, sandbox: Sandbox, tmp_path: Path) -> None:
    with Server(database_url, sandbox, tmp_path, PAY_FORM="on", RUN_WORKER="0") as server:
        body = urlencode(ORDER).encode()
        answer = server.request("POST", "/pay", [body[:20], body[20:]], FORM)
        assert answer.status_code == 303
        assert answer.headers["location"].startswith(sandbox.url)
        assert server.request("POST", "/pay", [b"x" * 1024] * 17, FORM).status_code == 413


def test_a_slow_form_is_told_so_on_a_page(counter: Shop) -> None:
    class Late(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise TimeoutError

    answer = counter.client.simulate_post(
        "/pay", headers={**FORM, "Content-Length": "9"}, extras={"wsgi.input": Late()}
    )
    assert answer.status_code == 408
    assert answer.headers["content-type"].startswith("text/html")


def test_caches_keep_the_answers_for_different_origins_apart(open_shop: Callable[..., Shop]) -> None:
    shop = open_shop(CORS_ORIGINS="https://shop.example.com, capacitor://localhost")
    for origin in ({"Origin": "https://shop.example.com"}, {"Origin": "https://evil.example"}, {}):
        assert shop.client.simulate_get("/healthz", headers=origin).headers["vary"] == "Origin"
    app = shop.client.simulate_get("/healthz", headers={"Origin": "capacitor://localhost"})
    assert app.headers["access-control-allow-origin"] == "capacitor://localhost"
    assert "vary" not in open_shop().client.simulate_get("/healthz").headers


def test_an_app_may_be_returned_to(open_shop: Callable[..., Shop]) -> None:
    shop = open_shop(RETURN_URL_ORIGINS="myapp://paid, https://shop.example.com")
    shop.created(return_url="myapp://paid/thanks?x=1")
    shop.created(return_url="MyApp://PAID")
    for other in ("myapp://other/", "yourapp://paid/", "myapp:paid", "javascript://paid/%0aalert(1)"):
        assert "return_url" in errors(shop, return_url=other)


def test_guesses_of_the_token_of_the_metrics_are_limited(open_shop: Callable[..., Shop]) -> None:
    shop = open_shop(METRICS_TOKEN="count-" * 3, RATE_LIMIT="3/hour")
    right = {"Authorization": f"Bearer {'count-' * 3}"}
    assert [shop.client.simulate_get("/metrics").status_code for _ in range(4)] == [401, 401, 401, 429]
    assert {shop.client.simulate_get("/metrics", headers=right).status_code for _ in range(5)} == {200}
