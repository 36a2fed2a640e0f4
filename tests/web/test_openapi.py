# ruff: noqa: F811  (fixtures are imported by their names)
"""The description of the API: true in every rule, example and code, and a page that anyone can read."""

import copy
import dataclasses
import html.parser
import itertools
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import falcon.inspect
import pytest

import checkout
import money
from backstage import end_time, poll
from description import DESCRIPTION, SCHEMAS, followed, validator
from local.sandbox import Sandbox
from merchant import Merchant, merchant  # noqa: F401  # fixtures
from shop import ORDER, ROOT, SECRET_KEY, Server, Shop, open_shop, sandbox, shop  # noqa: F401  # fixtures
from test_notifications import deliver, give_back
from web import outbox
from web.errors import PROBLEMS

RETURN_URL_ORIGINS = "https://shop.example.com"
ALL_CURRENCIES = ",".join(money.CURRENCIES)


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in DESCRIPTION["paths"].items():
        for method, operation in methods.items():
            yield path, method.upper(), operation


def responses() -> Iterator[tuple[int, dict[str, Any]]]:
    for *_, operation in operations():
        for status, response in operation["responses"].items():
            yield int(status), followed(response)
    yield 405, DESCRIPTION["components"]["responses"]["MethodNotAllowed"]


# The description and the server


TOKENS = {
    "API_TOKEN": "open-sesame-0123",
    "ADMIN_TOKEN": "the-owner-0123456789",
    "METRICS_TOKEN": "count-0123456789",
}


# schemathesis knows of no 403 for a request without Authorization, which says that nobody has a token.
@pytest.mark.parametrize(
    ("tokens", "but"),
    [(TOKENS, []), ({}, ["--exclude-checks", "missing_required_header"])],
    ids=["with tokens", "without"],
)
def test_the_server_keeps_what_the_description_promises(
    database_url: str, sandbox: Sandbox, tmp_path: Path, tokens: dict[str, str], but: list[str]
) -> None:
    """schemathesis, with all its checks: some 2,000 requests, right ones and wrong ones. See schemathesis.toml."""
    how = {"CURRENCIES": ALL_CURRENCIES, "PAY_FORM": "on", "THREADS": "16", "RUN_WORKER": "0"}
    how["RETURN_URL_ORIGINS"] = RETURN_URL_ORIGINS
    with Server(database_url, sandbox, tmp_path, **tokens, **how) as server:
        program = Path(sys.executable).with_name("st")
        done = subprocess.run(
            [
                *(program, "--config-file", ROOT / "tests/schemathesis.toml", "--no-color"),
                *("run", f"{server.url}/api/v1/openapi.json", "--checks", "all", "--seed", "1"),
                *("--warnings", "off"),  # where few of the ids are known, and no one has a token
                *but,
            ],
            cwd=tmp_path,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(tmp_path),
                "PYTHONPATH": str(ROOT / "tests"),
                "SCHEMATHESIS_HOOKS": "schemathesis_hooks",
                "PAYSTACK_SECRET_KEY": SECRET_KEY,
                "RETURN_URL_ORIGINS": RETURN_URL_ORIGINS,
                **TOKENS,
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No issues found" in done.stdout
    assert f"Tested: {len(list(operations())) - 1}" in done.stdout  # all but the one that gave the description


def test_each_route_of_the_app_is_described_with_its_methods_and_no_other(shop: Shop) -> None:
    routes = {
        route.path.replace("payment_id", "id").replace(":int", ""): {
            method.method for method in route.methods if not method.internal and method.method != "HEAD"
        }
        for route in falcon.inspect.inspect_routes(shop.app)
        if not route.path.endswith((".css", ".js", ".svg"))  # what pages are made of
    }
    described = {path: {method.upper() for method in methods} for path, methods in DESCRIPTION["paths"].items()}
    assert described == routes


def test_each_code_is_described_with_its_status_and_no_other() -> None:
    assert SCHEMAS["Problem"]["properties"]["code"]["enum"] == list(PROBLEMS)
    described: dict[str, int] = {}
    for status, response in responses():
        for part in response.get("content", {}).get("application/json", {}).get("schema", {}).get("allOf", []):
            for code in part.get("properties", {}).get("code", {}).get("enum", []):
                described[code] = status
        for code in re.findall(r"`(link_\w+)`", response["description"]):  # on pages for people
            described[code] = status
    assert described == {code: status for code, (status, _) in PROBLEMS.items()}


def test_each_example_of_an_error_says_what_the_server_says() -> None:
    seen = set()
    for status, response in responses():
        for name, example in response.get("content", {}).get("application/json", {}).get("examples", {}).items():
            problem = example["value"]
            assert (name, (status, problem["message"])) == (problem["code"], PROBLEMS[problem["code"]])
            seen.add(name)
    assert seen == {code for code in PROBLEMS if not code.startswith("link_")}


def test_each_example_keeps_the_rules() -> None:
    checked = 0
    contents = [response["content"] for _, response in responses() if "content" in response]
    hooks = [methods["post"] for methods in DESCRIPTION["webhooks"].values()]
    contents += [
        op["requestBody"]["content"] for op in [*(op for *_, op in operations()), *hooks] if "requestBody" in op
    ]
    for content in contents:
        for body in content.values():
            shown = [each["value"] for each in body.get("examples", {}).values()]
            for example in [*shown, *([body["example"]] if "example" in body else [])]:
                validator(body["schema"]).validate(example)
                checked += 1
    assert checked > 20


def test_each_example_of_a_payment_can_be_sent_as_it_is(open_shop: Callable[..., Shop]) -> None:
    shop = open_shop(RETURN_URL_ORIGINS=RETURN_URL_ORIGINS)
    content = DESCRIPTION["paths"]["/api/v1/payments"]["post"]["requestBody"]["content"]["application/json"]
    for example in content["examples"].values():
        assert shop.post(json.dumps(example["value"])).status_code == 201


def test_its_fields_are_those_that_are_read(shop: Shop) -> None:
    names = [each.name.removesuffix("_minor") for each in dataclasses.fields(checkout.Order)]
    assert [*SCHEMAS["NewPayment"]["properties"], "source"] == names
    errors = shop.post(json.dumps({name: [] for name in SCHEMAS["NewPayment"]["properties"]})).json["errors"]
    assert "is not a field here" not in str(errors)
    missing = shop.post("{}").json["errors"]
    assert sorted(SCHEMAS["NewPayment"]["required"]) == sorted(missing)


def test_its_currencies_are_those_that_are_taken() -> None:
    asked = SCHEMAS["NewPayment"]["properties"]["currency"]["pattern"]
    assert re.findall("[A-Z]{3}", re.sub("[a-z\\W]", "", asked)) == list(money.CURRENCIES)
    assert SCHEMAS["Payment"]["properties"]["currency"]["enum"] == list(money.CURRENCIES)


VALUES: dict[str, list[object]] = {
    "customer_name": [
        *("", " ", "J", " J ", "x" * 100, "x" * 101, " " * 50 + "x" * 100 + " " * 50, "\u3000J\u3000", "\u3000"),
        *("a\nb", "a\x00b", "a\tb", "\x7f", "a\u2028b", "a\u202eb", "a\u2066b", "a\u2069", "Ünal 😀", "\u00ad"),
        *("\u3164", "\u200b J\u200e", "\u202aJ\u202c", " \u202aJ\u202c ", "J\u200dJ", 5, None, []),
    ],
    "customer_email": [
        *("john@example.com", "a@b.c", "john@example", "@example.com", "john@", "john", "a@b@c.d", "a@.c", "a@b.", ""),
        *("a@b..c", "a b@c.d", "a@b c.d", "a\u00a0@c.d", "a@b.c\n", "a\u202e@c.d", f"{'x' * 242}@example.com", None, 5),
        *(f"{'x' * 243}@example.com", "ü@exämple.com", "a..b@c.d"),
        *("a@b.c\u200b", "\ufeffa@b.c", "a\u200b@b.c", "a@b\ufeff.c", f"{'x' * 242}@example.com\u200b", " a@b.c"),
    ],
    "customer_phone": [
        *("+234 801 234 5678", "1234567", "123456", "1" * 15, "1" * 16, "(0801) 234-5678", "[080]1.234.5678", "", "+"),
        *("++2348012345", "+-2348012345", "-+2348012345", "234+8012345", "080123456a", "٠٨٠١٢٣٤٥٦٧", "08012345 "),
        *("0801\u00a02345678", "0801\t2345678", 8012345678, None),
        *(
            "\u202a+2348012345678\u202c",
            "tel:+234-801",
            "Tel: 0801\u20112345678",
            "x tel:08012345678",
            "0801tel:2345678",
        ),
        *("(tel:08012345678", "0801\u22122345678\uff0d"),
    ],
    "location": ["", "Lagos", "x" * 120, "x" * 121, "a\r", None],
    "description": ["", " ", None, "x" * 200, "x" * 201, " " + "x" * 200 + " ", "a\nb", 5],
    "metadata": [
        *(
            None,
            {},
            [],
            [[]],
            "x",
            {"a": "b"},
            {"a": 1},
            {"a": 1.5},
            {"a": True},
            {"a": []},
            {"a": None},
            {"a": {"b": "c"}},
            {"": ""},
            {"a": "x" * 500},
        ),
        *({"a": "x" * 501}, {str(n): "" for n in range(20)}, {str(n): "" for n in range(21)}, {"a\n": ""}),
        *({"a": "\u2028"}, {"ü": "😀"}),
    ],
    "return_url": [
        *(None, "", f"{RETURN_URL_ORIGINS}/x", RETURN_URL_ORIGINS, f"{RETURN_URL_ORIGINS}/{'x' * 1975}", "/x", "x", 5),
        *(f"{RETURN_URL_ORIGINS}/{'x' * 1976}", f"{RETURN_URL_ORIGINS}/a b", f"{RETURN_URL_ORIGINS}/ü"),
        *(f"{RETURN_URL_ORIGINS}/\\x", "https://", "ftp://x.example"),
    ],
    "expires_in": [60, 60.0, 59, 86400, 86401, 0, -60, 60.5, "60", "soon", True, [], None],
    "currency": [*money.CURRENCIES, None, "", "ngn", "Ghs", "NGNN", "EUR", 5],
    "amount": [
        *(
            50,
            49,
            "50",
            "49.99",
            "50.0",
            "50.00",
            "50.001",
            "50.000",
            "50.0010",
            "050",
            ".5",
            "5.",
            "+50",
            "-50",
            " 50",
            "",
            "50,00",
            "1e2",
        ),
        *(999999999999, 1000000000000, "999999999999.99", "1000000000000", 50.5, 1.25, None, True, [], {}, "٥٠"),
    ],
    "zebedee": ["x", None],
}


def test_what_the_schema_takes_the_server_takes_and_the_other_way_round(open_shop: Callable[..., Shop]) -> None:
    shop = open_shop(RETURN_URL_ORIGINS=RETURN_URL_ORIGINS, CURRENCIES=ALL_CURRENCIES)
    schema = validator(SCHEMAS["NewPayment"])
    for name, values in VALUES.items():
        for value in values:
            order = {**ORDER, name: value, **({"amount": 1000} if name == "currency" else {})}
            is_valid = schema.is_valid(order)
            answer = shop.post(json.dumps(order))
            assert (answer.status_code == 201) == is_valid, f"{name} {value!r}: {answer.text}"
            assert is_valid or list(answer.json["errors"]) == [name]


@pytest.mark.parametrize("currency", [*money.CURRENCIES, None])
def test_amounts_are_described_for_each_currency(open_shop: Callable[..., Shop], currency: str | None) -> None:
    shop = open_shop(CURRENCIES=ALL_CURRENCIES)
    schema = validator(SCHEMAS["NewPayment"])
    least = money.render(money.CURRENCIES[currency or "NGN"].minimum_minor, currency or "NGN")
    amounts = [least, str(float(least) - 0.01), "0.05", "0.1", "0.10", "1", "1.5", "1.50", "2", "2.99", "3", "9", "10"]
    amounts += [
        "49",
        "50",
        "99",
        "100",
        "100.5",
        "100.55",
        "100.555",
        "100.0",
        "100.000",
        "999999999999",
        "999999999999.99",
        "0",
    ]
    for text in amounts:
        for value in (text, json.loads(text)):
            order = {**ORDER, "amount": value, "currency": currency}
            answer = shop.post(json.dumps(order))
            assert (answer.status_code == 201) == schema.is_valid(order), f"{value!r} {currency}: {answer.text}"


@pytest.mark.parametrize(
    ("key", "is_valid"),
    [
        *(
            (key, True)
            for key in ("k", "x" * 255, "!#$%&'()*+-./:;<=>?@[]^_`{|}~\\", '"k"', '"a,b"', '"a\\"b"', '"\\\\"')
        ),
        *((key, False) for key in ("", "a b", "x" * 256, 'a"b', "a,b", '""', '"a', 'a"', '"a b"', "ü", '"\\a"')),
    ],
)
def test_keys_are_described_as_they_are_read(shop: Shop, key: str, is_valid: bool) -> None:
    schema = DESCRIPTION["components"]["parameters"]["IdempotencyKey"]["schema"]
    assert validator(schema).is_valid(key) == is_valid
    assert (shop.create(key).status_code == 201) == is_valid


def test_payments_in_each_state_are_described(shop: Shop) -> None:
    schema = validator(SCHEMAS["Payment"])
    seen = set()
    for told in payments_of_all_states(shop):
        schema.validate(told)
        seen.add(told["status"])
    assert seen == set(SCHEMAS["Status"]["enum"])
    known = shop.sql("SELECT s FROM unnest(%s::text[]) s WHERE payment_rank(s) IS NULL", SCHEMAS["Status"]["enum"])
    assert known == []


def payments_of_all_states(shop: Shop) -> Iterator[dict[str, Any]]:
    yield shop.created()
    for email in ("john@example.com", "underpaid@example.com"):
        payment = shop.created(customer_email=email)
        shop.pay(payment["reference"])
        yield shop.get(payment["id"])
    for amount in (1000, 5000):
        payment = shop.created()
        shop.pay(payment["reference"])
        give_back(shop, payment["reference"], amount)
        yield shop.get(payment["id"])
    for decline in (False, True):
        payment = shop.created()
        if decline:
            shop.sandbox.decline(payment["reference"])
            poll(shop)
            yield shop.get(payment["id"])
        end_time(shop.database_url, payment["id"])
        poll(shop)
        yield shop.get(payment["id"])


def test_a_payment_against_its_description_is_found_out() -> None:
    """What the schema of answers is worth: each of these would be a bug."""
    example = DESCRIPTION["paths"]["/api/v1/payments/{id}"]["get"]["responses"]["200"]["content"]
    payment = example["application/json"]["example"]["payment"]
    schema = validator(SCHEMAS["Payment"])
    assert schema.is_valid(payment)
    for wrong in (
        *(
            {"checkout_url": "https://checkout.paystack.com/x"},
            {"paid_at": None},
            {"status": "pending"},
            {"status": "paid"},
        ),
        *({"amount": "50.00"}, {"amount": 0}, {"id": "PAY-123"}, {"customer_phone": "1234567"}, {"currency": "ngn"}),
        *({"created_at": "2026-01-31T12:00:00+01:00"}, {"mode": None}, {"refunded_amount": -1}),
    ):
        assert not schema.is_valid({**payment, **wrong}), wrong
    for name in payment:
        assert not schema.is_valid({other: value for other, value in payment.items() if other != name})


def test_the_headers_of_answers_are_described(open_shop: Callable[..., Shop]) -> None:
    shop = open_shop(API_TOKEN="open-sesame-0123", RATE_LIMIT="1/hour", METRICS_TOKEN="count-0123456789")
    bearer = {"Authorization": "Bearer open-sesame-0123"}
    created = shop.create("one", bearer)
    path, client = f"/api/v1/payments/{created.json['payment']['id']}", shop.client
    create, read = (
        DESCRIPTION["paths"]["/api/v1/payments"]["post"],
        DESCRIPTION["paths"]["/api/v1/payments/{id}"],
    )
    answers = [
        (create, created),
        (create, shop.create("one", bearer)),
        (create, shop.create("one", bearer, amount=51)),
        (create, shop.create()),
        (create, shop.create()),
        (read["get"], client.simulate_get(path, headers={"Prefer": "wait=0", **bearer})),
        (read["get"], client.simulate_get(path + "X", headers=bearer)),
        (
            DESCRIPTION["paths"]["/metrics"]["get"],
            client.simulate_get("/metrics", headers={"Authorization": "Bearer count-0123456789"}),
        ),
        (DESCRIPTION["paths"]["/docs"]["get"], client.simulate_get("/docs")),
        (
            {"responses": {"405": DESCRIPTION["components"]["responses"]["MethodNotAllowed"]}},
            client.simulate_delete(path),
        ),
    ]
    assert [answer.status_code for _, answer in answers] == [201, 201, 422, 401, 429, 200, 404, 200, 200, 405]
    for operation, answer in answers:
        described = {
            name.lower(): followed(header)
            for name, header in followed(operation["responses"][str(answer.status_code)])["headers"].items()
        }
        own = {"content-type", "content-length"}
        assert {name for name in answer.headers if name not in own} <= set(described)
        for name, header in described.items():
            assert name in answer.headers or not header.get("required")
            if name in answer.headers:
                validator(header["schema"]).validate(answer.headers[name])


def test_notifications_are_described(open_shop: Callable[..., Shop], merchant: Merchant) -> None:
    shop = open_shop(**merchant.settings)
    hook = DESCRIPTION["webhooks"]["notification"]["post"]
    schema = validator(hook["requestBody"]["content"]["application/json"]["schema"])
    for _ in payments_of_all_states(shop):
        pass
    shop.sandbox.charge_elsewhere("PG-" + "0" * 26)
    shop.deliver("PG-" + "0" * 26)
    deliver(shop)
    for told in merchant.received:
        schema.validate(told.json)
        for parameter in hook["parameters"]:
            validator(parameter["schema"]).validate(told.headers[parameter["name"]])
    schema.validate(json.loads(outbox.body_of_test()))
    assert set(SCHEMAS["Notification"]["properties"]["type"]["enum"]) == {*merchant.types, "test"}


def test_all_kinds_of_incidents_are_described(shop: Shop) -> None:
    (row,) = shop.sql(
        "SELECT pg_get_constraintdef(oid) AS text FROM pg_constraint WHERE conname = 'incident_kind_is_known'"
    )
    described = SCHEMAS["Notification"]["properties"]["data"]["properties"]["incident"]["properties"]["kind"]["enum"]
    assert set(described) == set(re.findall(r"'(\w+)'", row["text"]))


# How it is served


def test_the_description_is_served_as_it_is(shop: Shop) -> None:
    answer = shop.client.simulate_get("/api/v1/openapi.json")
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.text == (ROOT / "web/static/openapi.json").read_text()
    assert shop.client.simulate_get("/api/v1/openapi.json/").text == answer.text


def test_below_a_path_the_description_leads_there(open_shop: Callable[..., Shop]) -> None:
    client = open_shop(PUBLIC_URL="https://example.com/till/").client
    described = client.simulate_get("/api/v1/openapi.json").json
    assert described == {**copy.deepcopy(DESCRIPTION), "servers": [{"url": "/till/"}]}
    assert 'href="/till/static/docs.css?' in client.simulate_get("/docs").text


# The page


class Parsed(html.parser.HTMLParser):
    """The elements of a page; those that are not closed where they should be are `unclosed`."""

    EMPTY = ("meta", "link", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.unclosed: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open.pop() != tag:
            self.unclosed.append(tag)

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture
def page(shop: Shop) -> Parsed:
    answer = shop.client.simulate_get("/docs")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"].startswith("text/html")
    return Parsed(answer.text)


def test_the_page_is_made_of_the_description() -> None:
    render = runpy.run_path(str(ROOT / "docs/render.py"))
    made = render["Page"](render["read"]()).render()
    assert (ROOT / "web/static/docs.html").read_text() == made, "out of date: python docs/render.py"


@pytest.mark.programs
def test_an_example_of_the_page_works_as_pasted(database_url: str, sandbox: Sandbox, tmp_path: Path) -> None:
    with Server(database_url, sandbox, tmp_path) as server:
        page = Parsed(server.request("GET", "/docs").text)
        example = page.words[page.words.index("curl http") :]
        pasted = example[: example.index("}'") + 2]
        assert pasted.startswith(f"curl {server.url}/api/v1/payments ")
        done = subprocess.run(["bash", "-euc", pasted], capture_output=True, text=True, check=True, timeout=30)
    assert json.loads(done.stdout)["status"] == "success"


def test_the_examples_of_the_page_have_the_address_of_public_url(open_shop: Callable[..., Shop]) -> None:
    words = Parsed(open_shop(PUBLIC_URL="https://shop.example.org/till/").client.simulate_get("/docs").text).words
    addresses = set(re.findall(r"curl (https?://\S+?)/api/v1", words))
    assert addresses == {"https://shop.example.org/till"}


def test_the_page_tells_of_each_operation_field_and_code(page: Parsed) -> None:
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    for path, _, operation in operations():
        assert operation["operationId"] in ids
        assert path in page.words
    for word in (
        *SCHEMAS["NewPayment"]["properties"],
        *SCHEMAS["Payment"]["properties"],
        *SCHEMAS["Refund"]["properties"],
        *SCHEMAS["Incident"]["properties"],
        *PROBLEMS,
        "webhook-signature",
    ):
        assert word in page.words, word


def test_each_link_in_the_page_leads_somewhere(page: Parsed) -> None:
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    for tag, attributes in page.elements:
        if tag == "a":
            target = str(attributes["href"])
            assert target.startswith("https://") or target.removeprefix("#") in ids


def test_the_page_is_whole(page: Parsed) -> None:
    assert page.unclosed == page.open == []
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_the_page_loads_its_stylesheet_and_nothing_else(shop: Shop, page: Parsed) -> None:
    loaded = [
        (tag, attributes.get("src") or attributes.get("href"))
        for tag, attributes in page.elements
        if tag not in ("a",) and ("src" in attributes or "href" in attributes)
    ]
    [(tag, address)] = loaded
    assert (tag, str(address).partition("?")[0]) == ("link", "/static/docs.css")
    assert not [tag for tag, _ in page.elements if tag in ("script", "style", "iframe", "img", "base", "object")]
    assert not [attributes for _, attributes in page.elements if any(name.startswith("on") for name in attributes)]
    assert not [attributes for _, attributes in page.elements if "style" in attributes]
    stylesheet = shop.client.simulate_get(str(address))
    assert stylesheet.headers["Content-Type"] == "text/css"
    assert not re.search(r"url\(|@import|//", stylesheet.text)


def test_the_policy_of_the_page_forbids_everything_inline(shop: Shop) -> None:
    policy = shop.client.simulate_get("/docs").headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
