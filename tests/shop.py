"""A shop for the tests of the whole service: paygate's app on a database of its own, and a stand-in for the provider.

    from shop import open_shop, sandbox, shop  # noqa: F401  # fixtures

The app is driven in the process (`Shop`) or as gunicorn over a socket (`Server`); the provider is always asked over a
real socket.
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
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
from sandbox import Sandbox

ROOT = Path(__file__).resolve().parent.parent
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


class Server:
    """paygate as it is served: gunicorn with its workers, over a socket. `log` is the file of all that it prints.

    It runs in `folder`, where no `.env` is, with nothing of this process's environment.
    """

    def __init__(self, database_url: str, sandbox: Sandbox, folder: Path, **env: str) -> None:
        self.database_url = database_url
        self.sandbox = sandbox
        self.folder = folder
        self.log = folder / "log"
        self.port = int(env.get("PORT") or free_port())
        self.url = f"http://127.0.0.1:{self.port}"
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "PYTHONPATH": str(ROOT),
            "WEB_CONCURRENCY": "1",
            "THREADS": "8",
            **environment(database_url, sandbox, **env),
            "PORT": str(self.port),
        }

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", "--config", ROOT / "gunicorn.conf.py", "paygate:create_app()"],
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.wait_until_ready()

    def wait_until_ready(self, within_seconds: float = 20) -> None:
        deadline = time.monotonic() + within_seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.request("GET", "/readyz", timeout_seconds=2).status_code == 200:
                    return
            assert self.process.poll() is None, f"gunicorn ended:\n{self.log.read_text()}"
            time.sleep(0.05)
        raise AssertionError(f"gunicorn does not get ready:\n{self.log.read_text()}")

    def stop(self, within_seconds: float = 10) -> int:
        """Its exit status. Whatever is left of it then is killed."""
        self.process.terminate()
        try:
            return self.process.wait(within_seconds)
        finally:
            self.kill()

    def kill(self) -> None:
        """All its processes at once, without a word, as a crash of the machine would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: dict[str, str] | None = None,
        timeout_seconds: float = 15,
    ) -> "Reply":
        """One request on a connection of its own; `body` may be an iterable of bytes, which is sent chunked."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_seconds)
        try:
            connection.request(method, path, body, headers or {})  # type: ignore[arg-type]
            answer = connection.getresponse()
            return Reply(answer.status, dict(answer.getheaders()), answer.read().decode())
        finally:
            connection.close()

    def create(self, key: str | None = None, headers: dict[str, str] | None = None, **fields: object) -> "Reply":
        with_key = {"Idempotency-Key": key} if key is not None else {}
        return self.request("POST", PAYMENTS, json.dumps({**ORDER, **fields}), {**JSON, **with_key, **(headers or {})})

    def sql(self, statement: str, *values: object) -> list[dict[str, Any]]:
        return query(self.database_url, statement, *values)


class Reply:
    """An answer of a Server, with the names that falcon.testing.Result has."""

    def __init__(self, status_code: int, headers: dict[str, str], text: str) -> None:
        self.status_code = status_code
        self.headers = {name.lower(): value for name, value in headers.items()}
        self.text = text

    @property
    def json(self) -> Any:
        return json.loads(self.text)


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until(done: Callable[[], object], within_seconds: float = 10) -> None:
    deadline = time.monotonic() + within_seconds
    while not done():
        assert time.monotonic() < deadline, f"not within {within_seconds} s"
        time.sleep(0.02)
