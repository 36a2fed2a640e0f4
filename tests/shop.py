"""A shop for the tests of the whole service: paygate's app on a database of its own, and a stand-in for the provider.

    from shop import open_shop, sandbox, shop  # noqa: F401  # fixtures

The app is driven in the process (`Shop`) or as gunicorn over a socket (`Server`); the provider is always asked over a
real socket.
"""

import contextlib
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import falcon.testing
import psycopg
import psycopg.rows
import pytest

import paygate
import settings
from local import serving
from local.sandbox import Sandbox
from local.serving import ROOT, Reply, free_port

__all__ = ["ROOT", "Reply", "free_port"]  # for those that import them from here
SECRET_KEY = "sk_test_0123456789abcdef"
PAYMENTS, WEBHOOK = "/api/v1/payments", "/api/v1/webhooks/paystack"
JSON = {"Content-Type": "application/json"}
ORDER: dict[str, Any] = {
    "customer_name": "John Doe",
    "customer_email": "john@example.com",
    "customer_phone": "+234 801 234 5678",
    "amount": 50,
    "location": "Lagos",
}
CARD = "4084084084084081"
LIVE = {"PAYSTACK_SECRET_KEY": "sk_live_0123456789abcdef", "PUBLIC_URL": "https://pay.example.com"}
UNKNOWN_ID = "PAY-0123456789ABCDEFGHJKMNPQRS"


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(secret_key=SECRET_KEY) as provider:
        yield provider


@pytest.fixture
def open_shop(database_url: str, sandbox: Sandbox) -> Iterator[Callable[..., "Shop"]]:
    """Opens shops on one database and one provider: `open_shop(API_TOKEN="…")`."""
    with contextlib.ExitStack() as stack:
        yield lambda **env: stack.enter_context(Shop(database_url, sandbox, **env))


@pytest.fixture
def shop(open_shop: Callable[..., "Shop"]) -> "Shop":
    return open_shop()


@pytest.fixture
def live(database_url: str) -> Iterator["Shop"]:
    """A shop on the same database, with live keys. Its provider numbers charges and refunds as the other one does."""
    with Sandbox(secret_key=LIVE["PAYSTACK_SECRET_KEY"]) as provider, Shop(database_url, provider, **LIVE) as shop:
        yield shop


def environment(database_url: str, sandbox: Sandbox, **env: str) -> dict[str, str]:
    needed = {"DATABASE_URL": database_url, "PAYSTACK_SECRET_KEY": SECRET_KEY, "PAYSTACK_URL": sandbox.url}
    return {**needed, "RATE_LIMIT": "off", **env}


def query(database_url: str, statement: str, *values: object) -> list[dict[str, Any]]:
    """The rows that a statement returns, as dicts; [] for one that returns none."""
    with psycopg.connect(database_url, autocommit=True, row_factory=psycopg.rows.dict_row) as conn:
        cursor = conn.execute(statement, values or None)
        return cursor.fetchall() if cursor.description else []


class Shop:
    """The app in this process, without a server or a worker. Any of the environment's names may be given."""

    def __init__(self, database_url: str, sandbox: Sandbox, **env: str) -> None:
        self.database_url = database_url
        self.sandbox = sandbox
        self.settings = settings.load(environment(database_url, sandbox, **env))
        self.app = paygate.create_app(self.settings)
        self.client = falcon.testing.TestClient(self.app)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.app.database.close()

    def create(
        self, key: str | None = None, headers: dict[str, str] | None = None, **fields: object
    ) -> falcon.testing.Result:
        """POST a payment: ORDER with `fields` instead of its own; a field that is `...` is left out."""
        order = {name: value for name, value in {**ORDER, **fields}.items() if value is not ...}
        with_key = {"Idempotency-Key": key} if key is not None else {}
        return self.post(json.dumps(order), {**with_key, **(headers or {})})

    def post(self, body: str | bytes, headers: dict[str, str] | None = None) -> falcon.testing.Result:
        """POST exactly this body, as JSON unless `headers` say otherwise."""
        return self.client.simulate_post(PAYMENTS, body=body, headers={**JSON, **(headers or {})})

    def created(self, **fields: Any) -> dict[str, Any]:
        """A new payment, as its 201 tells it."""
        answer = self.create(**fields)
        assert answer.status_code == 201, answer.text
        return dict(answer.json["payment"])

    def get(self, payment_id: str) -> dict[str, Any]:
        answer = self.client.simulate_get(f"{PAYMENTS}/{payment_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json["payment"])

    def pay(self, reference: str, **how: Any) -> None:
        """The customer pays and the provider's event arrives."""
        self.sandbox.pay(reference, **how)
        answer = self.deliver(reference)
        assert answer.status_code == 200, answer.text

    def deliver(self, reference: str, event: str = "charge.success", **members: Any) -> falcon.testing.Result:
        """A signed event about a transaction that the sandbox knows, as its ledger stands now."""
        return self.webhook(*self.sandbox.event(reference, event, **members))

    def webhook(self, body: bytes, headers: dict[str, str] | None = None) -> falcon.testing.Result:
        return self.client.simulate_post(WEBHOOK, body=body, headers=headers or {})

    def sql(self, statement: str, *values: object) -> list[dict[str, Any]]:
        return query(self.database_url, statement, *values)


class Server(serving.Server):
    """paygate as it is served, on a database and a provider of the test's."""

    def __init__(self, database_url: str, sandbox: Sandbox, folder: Path, **env: str) -> None:
        self.database_url = database_url
        self.sandbox = sandbox
        threads = {"WEB_CONCURRENCY": "1", "THREADS": "8"}
        super().__init__(folder, {**threads, **environment(database_url, sandbox, **env)})

    def start(self) -> None:
        super().start()
        self.wait_until_ready()

    def create(self, key: str | None = None, headers: dict[str, str] | None = None, **fields: object) -> Reply:
        with_key = {"Idempotency-Key": key} if key is not None else {}
        return self.request("POST", PAYMENTS, json.dumps({**ORDER, **fields}), {**JSON, **with_key, **(headers or {})})

    def sql(self, statement: str, *values: object) -> list[dict[str, Any]]:
        return query(self.database_url, statement, *values)


def wait_until(done: Callable[[], object], within_seconds: float = 30) -> None:
    deadline = time.monotonic() + within_seconds
    while not done():
        assert time.monotonic() < deadline, f"not within {within_seconds} s"
        time.sleep(0.02)


OpenShop = Callable[..., Shop]


@pytest.fixture(scope="module")
def counter() -> Iterator[Shop]:
    """A shop whose database and provider are away: what it answers, it answers by itself, before it asks anyone."""
    with closed_shop() as shop:
        yield shop


def closed_shop(**env: str) -> Shop:
    nowhere = "postgresql://keeper:opensesame@127.0.0.1:9/vault"
    return Shop(nowhere, Sandbox(secret_key=SECRET_KEY, port=9), **env)


def raw(**members: str) -> str:
    """ORDER as JSON, with `members` written exactly so."""
    order = {**{name: json.dumps(value) for name, value in ORDER.items()}, **members}
    return "{" + ", ".join(f'"{name}": {value}' for name, value in order.items()) + "}"


def count(shop: Shop | Server, table: str) -> int:
    return int(shop.sql(f"SELECT count(*) AS n FROM {table}")[0]["n"])  # noqa: S608


def sign(body: bytes, key: str = SECRET_KEY) -> dict[str, str]:
    return {"x-paystack-signature": hmac.new(key.encode(), body, hashlib.sha512).hexdigest()}
