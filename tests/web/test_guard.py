# ruff: noqa: F811  (fixtures are imported by their names)
"""Who may ask, how often and from where: the token, the rate limit, proxies in front, shops that call from pages."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import falcon.testing
import pytest

import paygate
import settings
from backstage import at_once
from local.sandbox import Sandbox
from shop import JSON, ORDER, PAYMENTS, WEBHOOK, Server, Shop, open_shop, sandbox, shop, wait_until  # noqa: F401
from web import guard

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
INVALID = "{}"  # costs no database and no provider


@pytest.fixture
def gate() -> Iterator[Callable[..., "Gate"]]:
    """Opens apps without a database: what is guarded here ends before one is asked."""
    gates: list[Gate] = []

    def open_gate(**env: str) -> Gate:
        gates.append(Gate(**env))
        return gates[-1]

    yield open_gate
    for each in gates:
        each.app.database.close()


class Gate:
    def __init__(self, **env: str) -> None:
        needed = {
            "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
            "PAYSTACK_SECRET_KEY": "sk_test_0123456789abcdef",
        }
        self.app = paygate.create_app(settings.load({**needed, **env}))
        self.client = falcon.testing.TestClient(self.app)

    def post(
        self, address: str = "203.0.113.7", path: str = PAYMENTS, body: str = INVALID, **headers: str
    ) -> falcon.testing.Result:
        given = {**JSON, **{name.replace("_", "-"): value for name, value in headers.items()}}
        return self.client.simulate_post(path, body=body, headers=given, remote_addr=address)

    def statuses(self, count: int, **how: Any) -> list[int]:
        return [self.post(**how).status_code for _ in range(count)]


OpenGate = Callable[..., Gate]


# RATE_LIMIT


def test_of_one_address_no_more_payments_are_taken_than_the_limit_allows(gate: OpenGate) -> None:
    closed = gate(RATE_LIMIT="5/minute")
    assert closed.statuses(7) == [422] * 5 + [429] * 2
    answer = closed.post()
    assert answer.json["code"] == "rate_limited"
    assert 1 <= int(answer.headers["Retry-After"]) <= 12


def test_each_address_has_a_limit_of_its_own(gate: OpenGate) -> None:
    closed = gate(RATE_LIMIT="2/minute")
    assert closed.statuses(3, address="203.0.113.7") == [422, 422, 429]
    assert closed.statuses(3, address="203.0.113.8") == [422, 422, 429]


def test_after_the_time_that_was_told_the_next_one_passes(gate: OpenGate) -> None:
    closed = gate(RATE_LIMIT="2/second")
    assert closed.statuses(3) == [422, 422, 429]
    time.sleep(float(closed.post().headers["Retry-After"]))
    assert closed.post().status_code == 422


def test_the_allowance_comes_back_evenly_and_never_above_the_limit(gate: OpenGate) -> None:
    closed = gate(RATE_LIMIT="4/second")
    assert closed.statuses(5) == [422] * 4 + [429]
    time.sleep(0.55)
    assert closed.statuses(3) == [422, 422, 429]
    time.sleep(1.3)
    assert closed.statuses(5) == [422] * 4 + [429]


def test_many_at_once_are_counted_one_by_one(gate: OpenGate) -> None:
    closed = gate(RATE_LIMIT="20/hour")
    answers = at_once([lambda: closed.post().status_code] * 60)
    assert (answers.count(422), answers.count(429)) == (20, 40)


def test_the_limit_is_300_a_minute_unless_told_otherwise(gate: OpenGate) -> None:
    answers = gate().statuses(310)
    assert answers[:300] == [422] * 300
    assert 429 in answers[300:]


def test_it_can_be_switched_off(gate: OpenGate) -> None:
    assert set(gate(RATE_LIMIT="off").statuses(400)) == {422}


def test_forms_count_as_payments(gate: OpenGate) -> None:
    closed = gate(RATE_LIMIT="2/minute", PAY_FORM="on")
    forms = [
        closed.client.simulate_post("/pay", body="amount=50", headers=FORM, remote_addr="203.0.113.7") for _ in range(3)
    ]
    assert forms[2].status_code == 429
    assert forms[2].headers["Content-Type"].startswith("text/html")
    assert int(forms[2].headers["Retry-After"]) >= 1
    assert closed.post().status_code == 429


def test_reads_and_webhooks_are_never_limited(gate: OpenGate) -> None:
    closed = gate(RATE_LIMIT="1/hour")
    assert closed.statuses(2) == [422, 429]
    assert set(closed.statuses(20, path=WEBHOOK)) == {401}
    assert {closed.client.simulate_get("/healthz").status_code for _ in range(20)} == {200}


def test_who_is_limited_costs_neither_the_database_nor_the_provider(open_shop: Callable[..., Shop]) -> None:
    shop = open_shop(RATE_LIMIT="1/hour")
    assert [shop.create(key=str(n)).status_code for n in range(3)] == [201, 429, 429]
    assert shop.sandbox.calls("initialize") == 1
    assert len(shop.sql("SELECT id FROM payments")) == 1


def test_a_key_that_was_limited_is_as_good_as_new(open_shop: Callable[..., Shop]) -> None:
    shop = open_shop(RATE_LIMIT="1/second")
    assert [shop.create(key=key).status_code for key in ("one", "two")] == [201, 429]
    time.sleep(1)
    assert shop.create(key="two").status_code == 201


@pytest.mark.parametrize(
    ("first", "second", "are_one"),
    [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("::ffff:203.0.113.7", "::ffff:203.0.113.8", False),
        ("::ffff:203.0.113.7", "203.0.113.7", True),
        ("fe80::1%eth0", "fe80::1%eth1", True),
        ("203.0.113.7:50000", "203.0.113.7:50001", True),
        ("[2001:db8::1]:50000", "2001:db8::1", True),
        ("", "203.0.113.7", False),
        ("unknown", "203.0.113.7", False),
    ],
)
def test_a_customer_is_an_ipv4_address_or_an_ipv6_network(
    gate: OpenGate, first: str, second: str, are_one: bool
) -> None:
    closed = gate(RATE_LIMIT="1/hour", TRUSTED_PROXIES="1")
    assert closed.post(X_Forwarded_For=first).status_code == 422
    assert closed.post(X_Forwarded_For=second).status_code == (429 if are_one else 422)


def test_however_many_addresses_ask_only_the_latest_are_remembered() -> None:
    limit = guard.RateLimit(1, 3600)
    for number in range(guard.MOST_ADDRESSES + 100):
        assert limit.seconds_to_wait(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}") == 0
        assert limit.seconds_to_wait("203.0.113.7") == 0 if number == 0 else limit.seconds_to_wait("203.0.113.7") > 0
    assert len(limit.buckets) == guard.MOST_ADDRESSES


# API_TOKEN


def test_a_valid_token_is_not_limited_and_a_wrong_one_is(gate: OpenGate) -> None:
    closed = gate(RATE_LIMIT="3/hour", API_TOKEN="open-sesame-0123")
    assert set(closed.statuses(10, Authorization="Bearer open-sesame-0123")) == {422}
    assert closed.statuses(4, Authorization="Bearer open-simsim-0123") == [401, 401, 401, 429]
    assert closed.statuses(1) == [429]
    assert closed.statuses(1, Authorization="Bearer open-sesame-0123") == [422]


def test_without_the_token_nothing_is_stored_and_the_provider_not_asked(open_shop: Callable[..., Shop]) -> None:
    shop = open_shop(API_TOKEN="open-sesame-0123")
    for given in ({}, {"Authorization": "Bearer open-simsim-0123"}, {"Authorization": "Basic b3Blbi1zZXNhbWU="}):
        answer = shop.create(headers=given)
        assert (answer.status_code, answer.json["code"]) == (401, "unauthorized")
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert "open-sesame-0123" not in answer.text
    assert shop.sandbox.requests() == shop.sql("SELECT id FROM payments") == []
    assert shop.create(headers={"Authorization": "bearer open-sesame-0123"}).status_code == 201


def test_the_token_of_the_metrics_opens_no_payments(gate: OpenGate) -> None:
    closed = gate(API_TOKEN="open-sesame-0123", METRICS_TOKEN="count-0123456789")
    assert closed.post(Authorization="Bearer count-0123456789").status_code == 401
    assert (
        closed.client.simulate_get("/metrics", headers={"Authorization": "Bearer open-sesame-0123"}).status_code == 401
    )


# TRUSTED_PROXIES


def test_who_trusts_no_proxy_is_not_fooled_by_a_forwarded_address(gate: OpenGate) -> None:
    closed = gate(RATE_LIMIT="2/hour")
    answers = [closed.post(X_Forwarded_For=f"198.51.100.{n}").status_code for n in range(4)]
    assert answers == [422, 422, 429, 429]


def test_behind_a_proxy_each_customer_has_a_limit_of_his_own(gate: OpenGate) -> None:
    closed = gate(RATE_LIMIT="1/hour", TRUSTED_PROXIES="1")
    assert [closed.post(X_Forwarded_For=f"198.51.100.{n}").status_code for n in range(4)] == [422] * 4
    assert closed.post(X_Forwarded_For="198.51.100.0").status_code == 429


def test_what_a_customer_writes_before_the_hops_that_are_trusted_changes_nothing(gate: OpenGate) -> None:
    closed = gate(RATE_LIMIT="1/hour", TRUSTED_PROXIES="1")
    answers = [closed.post(X_Forwarded_For=f"10.0.0.{n}, 198.51.100.7").status_code for n in range(3)]
    assert answers == [422, 429, 429]
    two = gate(RATE_LIMIT="1/hour", TRUSTED_PROXIES="2")
    answers = [two.post(X_Forwarded_For=f"10.0.0.{n}, 198.51.100.7,203.0.113.{n}").status_code for n in range(3)]
    assert answers == [422, 429, 429]


def test_a_request_that_came_past_the_proxies_counts_for_its_own_address(gate: OpenGate) -> None:
    closed = gate(RATE_LIMIT="1/hour", TRUSTED_PROXIES="2")
    answers = [closed.post(X_Forwarded_For=f"10.0.0.{n}").status_code for n in range(2)]
    assert answers == [422, 429]
    assert gate(RATE_LIMIT="1/hour", TRUSTED_PROXIES="2").statuses(2) == [422, 429]


def test_two_headers_are_read_as_one_list(database_url: str, sandbox: Sandbox, tmp_path: Path) -> None:
    with Server(database_url, sandbox, tmp_path, RATE_LIMIT="1/hour", TRUSTED_PROXIES="1", RUN_WORKER="0") as server:

        def post(*forwarded: str) -> bytes:
            lines = "".join(f"X-Forwarded-For: {each}\r\n" for each in forwarded)
            with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
                connection.sendall(
                    f"POST {PAYMENTS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{lines}"
                    "Content-Length: 2\r\nConnection: close\r\n\r\n{}".encode()
                )
                return connection.recv(12)

        assert post("10.0.0.1", "198.51.100.7").endswith(b"422")
        assert post("10.0.0.2", "198.51.100.7").endswith(b"429")


def test_forwarded_addresses_that_nobody_trusts_are_warned_of_once(
    database_url: str, sandbox: Sandbox, tmp_path: Path
) -> None:
    with Server(database_url, sandbox, tmp_path, RATE_LIMIT="100/minute", RUN_WORKER="0") as server:
        for n in range(3):
            headers = {**JSON, "X-Forwarded-For": f"198.51.100.{n}"}
            assert server.request("POST", PAYMENTS, INVALID, headers).status_code == 422
        lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    warnings = [line for line in lines if line["event"] == "forwarded_addresses_ignored"]
    assert [line["level"] for line in warnings] == ["WARNING"]
    assert "TRUSTED_PROXIES" in warnings[0]["outcome"]
    assert "198.51.100" not in str(lines)


# CORS_ORIGINS

SHOP = "https://shop.example.com"


def preflight(gate: Gate, origin: str, method: str = "POST", path: str = PAYMENTS) -> falcon.testing.Result:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "content-type,idempotency-key,prefer",
    }
    return gate.client.simulate_options(path, headers=headers)


@pytest.mark.parametrize(("method", "path"), [("POST", PAYMENTS), ("GET", PAYMENTS + "/PAY-0")])
def test_a_shop_that_is_allowed_may_call_from_its_pages(gate: OpenGate, method: str, path: str) -> None:
    answer = preflight(gate(CORS_ORIGINS=f"{SHOP},http://localhost:3000"), SHOP, method, path)
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == SHOP
    assert method in answer.headers["Access-Control-Allow-Methods"]
    assert answer.headers["Access-Control-Allow-Headers"] == "content-type,idempotency-key,prefer"
    assert "Access-Control-Allow-Credentials" not in answer.headers


def test_its_pages_can_read_what_an_answer_says(gate: OpenGate) -> None:
    closed = gate(CORS_ORIGINS=SHOP)
    answer = closed.post(Origin=SHOP)
    assert answer.headers["Access-Control-Allow-Origin"] == SHOP
    shown = answer.headers["Access-Control-Expose-Headers"].split(", ")
    assert shown == ["Idempotent-Replayed", "Location", "Preference-Applied", "Retry-After", "X-Request-Id"]


def test_errors_can_be_read_too(gate: OpenGate) -> None:
    closed = gate(CORS_ORIGINS=SHOP, API_TOKEN="open-sesame-0123", RATE_LIMIT="1/hour")
    for status in (401, 429):
        answer = closed.post(Origin=SHOP)
        assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (status, SHOP)
    missing = closed.client.simulate_get("/nowhere", headers={"Origin": SHOP})
    assert (missing.status_code, missing.headers["Access-Control-Allow-Origin"]) == (404, SHOP)


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example.com", "http://shop.example.com", f"{SHOP}.evil.example.com", f"{SHOP}:8443", "null"],
)
def test_other_origins_may_not(gate: OpenGate, origin: str) -> None:
    closed = gate(CORS_ORIGINS=SHOP)
    for answer in (preflight(closed, origin), closed.post(Origin=origin)):
        assert not [name for name in answer.headers if name.lower().startswith("access-control-")]


def test_where_no_origin_is_allowed_none_is(gate: OpenGate) -> None:
    for answer in (preflight(gate(), SHOP), gate().post(Origin=SHOP)):
        assert not [name for name in answer.headers if name.lower().startswith("access-control-")]


# What every answer carries


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/healthz", 200),
        ("GET", "/api/v1/openapi.json", 200),
        ("GET", "/docs", 200),
        ("GET", "/metrics", 404),
        ("GET", "/nowhere", 404),
        ("DELETE", PAYMENTS, 405),
        ("POST", PAYMENTS, 415),
        ("POST", WEBHOOK, 401),
        ("GET", "/readyz", 503),
        ("GET", "/pay/PAY-0", 404),
        ("OPTIONS", PAYMENTS, 200),
    ],
)
def test_every_answer_is_kept_by_nobody_and_taken_for_nothing_else(
    gate: OpenGate, method: str, path: str, status: int
) -> None:
    answer = gate().client.simulate_request(method, path)
    assert answer.status_code == status
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["X-Request-Id"]
    assert (status == 405) == ("Allow" in answer.headers and method != "OPTIONS")
