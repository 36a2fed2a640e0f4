"""What is measured: each service with how it is started, what is asked of it, and the rows that its answers leave."""

import hashlib
import hmac
import http.client
import itertools
import json
import random
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, LiteralString
from urllib.parse import urlsplit

import psycopg

from bench import load
from bench.machine import PROJECT

SECRET_KEY = "sk_test_0123456789abcdef"  # noqa: S105  # the sandbox's
ORDER = {
    "customer_name": "John Doe",
    "customer_email": "john@example.com",
    "customer_phone": "+234 801 234 5678",
    "amount": 50.0,
    "location": "Lagos",
}
JSON = {"Content-Type": "application/json"}
POST, GET, WEBHOOK, WEBHOOK_ONE = "POST", "GET", "webhook", "webhook of one statement"


@dataclass
class Subject:
    """A service on a database of its own. `counts` are SELECTs of one number, by kind of work: one row an answer."""

    name: str
    arguments: list[str]
    database_url: str
    counts: dict[str, LiteralString]
    python: str = sys.executable
    unpaid: list[tuple[str, str]] = field(default_factory=list)
    """Ids and references of payments that no event has come for."""
    known: list[str] = field(default_factory=list)

    def count(self, kind: str) -> int:
        statement = self.counts.get(kind)
        if statement is None:
            return 0
        with psycopg.connect(self.database_url) as conn:
            row = conn.execute(statement).fetchone()
        return int(row[0]) if row else 0

    def learn(self, replies: list[load.Reply]) -> None:
        """Keep the payments that POSTs have opened, for the GETs and webhooks to come."""
        for reply in replies:
            if reply.status == 201:
                payment = json.loads(reply.body)["payment"]
                self.unpaid.append((payment["id"], payment["reference"]))
                self.known.append(payment["id"])


PAYGATE_COUNTS: dict[str, LiteralString] = {
    POST: "SELECT count(*) FROM idempotency_keys k JOIN payments p ON p.id = k.payment_id"
    " WHERE answer_status = 201 AND checkout_url IS NOT NULL",
    WEBHOOK: "SELECT count(*) FROM provider_events e JOIN payments p ON p.id = e.payment_id"
    " JOIN charges c ON c.payment_id = p.id WHERE e.outcome = 'applied' AND p.status = 'completed'",
}
FLOOR_COUNTS: dict[str, LiteralString] = {
    POST: "SELECT count(*) FROM idempotency_keys k JOIN payments p ON p.id = k.payment_id"
    " WHERE answer IS NOT NULL AND checkout_url IS NOT NULL",
    WEBHOOK: "SELECT count(*) FROM charges c JOIN payments p ON p.id = c.payment_id WHERE status = 'completed'",
    WEBHOOK_ONE: "SELECT count(*) FROM charges c JOIN payments p ON p.id = c.payment_id WHERE status = 'completed'",
}
DJANGO_COUNTS: dict[str, LiteralString] = {
    POST: "SELECT count(*) FROM payments WHERE checkout_url <> ''",
    WEBHOOK: "SELECT count(*) FROM djpaystack_paystackwebhookevent e"
    " JOIN payments p ON p.reference = e.data->'data'->>'reference'"
    " JOIN djpaystack_paystacktransaction t ON t.reference = p.reference"
    " WHERE e.processed AND t.status = 'success' AND p.status = 'completed'",
}


def paygate_arguments() -> list[str]:
    return [f"--config={PROJECT / 'gunicorn.conf.py'}", "paygate:create_app()"]


def floor_arguments(env: dict[str, str], folder: Path) -> list[str]:
    """The floor with paygate's own gunicorn settings, without its hooks and what these import."""
    program = (
        "import json, runpy, sys\n"
        "values = runpy.run_path(sys.argv[1])\n"
        "plain = {name: value for name, value in values.items() if isinstance(value, str | int | list | None)}\n"
        "print(json.dumps({name: value for name, value in plain.items() if name.islower() and name[0] != '_'}))\n"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program, PROJECT / "gunicorn.conf.py"],
        cwd=folder,
        env={"PYTHONPATH": str(PROJECT), **env},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    config = folder / "floor_gunicorn.py"
    config.write_text("".join(f"{name} = {value!r}\n" for name, value in json.loads(printed).items()))
    return [f"--config={config}", "bench.floor:create_app()"]


def django_arguments(floor: list[str]) -> list[str]:
    """The Django app with the floor's gunicorn settings."""
    return [floor[0], "bench.django_app.wsgi:application"]


def migrate_django(python: str, env: dict[str, str]) -> None:
    subprocess.run(
        [python, "-m", "django", "migrate", "--verbosity=0"],
        cwd=PROJECT,
        env={"DJANGO_SETTINGS_MODULE": "bench.django_app.settings", **env},
        check=True,
    )


def plain_settings(config: str) -> dict[str, Any]:
    """The gunicorn settings that a generated file holds."""
    return {name: value for name, value in runpy.run_path(config).items() if not name.startswith("__")}


# Requests


class Requests:
    """Makes the requests, each with a key, an event or an id of its own."""

    def __init__(self, seed: int, sandbox_url: str) -> None:
        self.random = random.Random(seed)  # noqa: S311  # the same order for the same seed
        self.numbers = itertools.count(1)
        self.run = f"bench-{seed}"
        self.event = example_event(sandbox_url)

    def posts(self) -> Iterator[bytes]:
        """Without end."""
        body = json.dumps(ORDER).encode()
        for number in self.numbers:
            yield load.request("POST", "/api/v1/payments", body, {**JSON, "Idempotency-Key": f"{self.run}-{number}"})

    def gets(self, known: list[str], number: int) -> Iterator[bytes]:
        for payment_id in self.random.choices(known[-2000:], k=number):
            yield load.request("GET", f"/api/v1/payments/{payment_id}")

    def webhooks(
        self, references: list[str], path: str = "/api/v1/webhooks/paystack", **changes: object
    ) -> Iterator[bytes]:
        """A signed `charge.success` for each reference, as the sandbox would send it, but for `changes`."""
        for reference in references:
            data = {**self.event, "id": self.event["id"] + next(self.numbers), "reference": reference, **changes}
            body = json.dumps({"event": "charge.success", "data": data}, separators=(",", ":")).encode()
            signature = hmac.new(SECRET_KEY.encode(), body, hashlib.sha512).hexdigest()
            yield load.request("POST", path, body, {**JSON, "X-Paystack-Signature": signature})


def example_event(sandbox_url: str) -> dict[str, Any]:
    """The data of an event: a paid transaction of this amount, as the sandbox tells it."""
    opening = {"reference": "EXAMPLE", "email": ORDER["customer_email"], "amount": 5000, "currency": "NGN"}
    ask(sandbox_url, "POST", "/transaction/initialize", opening)
    ask(sandbox_url, "POST", "/_sandbox/pay", {"reference": "EXAMPLE"})
    data: dict[str, Any] = ask(sandbox_url, "GET", "/transaction/verify/EXAMPLE")["data"]
    return data


def ask(url: str, method: str, path: str, body: object = None) -> Any:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    try:
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {**JSON, "Authorization": f"Bearer {SECRET_KEY}"})
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()
