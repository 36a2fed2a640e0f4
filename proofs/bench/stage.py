"""What the benchmarks run on: one PostgreSQL, the sandbox as the provider, and services that get the same requests."""

import contextlib
import hashlib
import hmac
import itertools
import json
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import psycopg.sql

from local import embedded
from local.serving import Process, Server, ask, children_of, free_port
from proofs.bench.load import Answer, Request, send

SECRET_KEY = "sk_test_0123456789abcdef"  # noqa: S105  # the sandbox's
PAYMENTS, JSON = "/api/v1/payments", {"Content-Type": "application/json"}
ORDER = {
    "customer_name": "John Doe",
    "customer_email": "john@example.com",
    "customer_phone": "+234 801 234 5678",
    "amount": 50.0,
    "location": "Lagos",
}
POST, GET, WEBHOOK = KINDS = ("POST", "GET", "webhook")
LIST = "list"
"""A page of the back office's list, which paygate alone has."""
ADMIN_TOKEN = "the-owner-of-the-bench"  # noqa: S105  # this stage's own
OWNER = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
CONNECTIONS = 16


class Void(Exception):
    """The run says nothing, and why."""


class Subject:
    """A service on a database of its own, with the payments that it has opened."""

    def __init__(self, name: str, url: str, server: Server) -> None:
        self.name, self.url, self.server = name, url, server
        self.unpaid: list[str] = []
        self.known: list[str] = []


class Stage:
    def __init__(self, stack: contextlib.ExitStack, seed: int) -> None:
        self.stack, self.seed = stack, seed
        self.random = random.Random(seed)  # noqa: S311  # printed, to be run again
        self.numbers = itertools.count(1)
        # On a disk, as a database is: /tmp is in memory on many machines.
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="paygate-bench-", dir="/var/tmp")))
        self.folder.chmod(0o711)  # where we are root, the database's user has to pass
        self.cluster = stack.enter_context(embedded.database(self.folder / "postgres"))
        port, key = free_port(), {"PAYSTACK_SECRET_KEY": SECRET_KEY}
        sandbox = Process(self.folder / "sandbox", ["-m", "local.sandbox", f"--port={port}"], key, port)
        self.sandbox = stack.enter_context(sandbox)
        self.event = self.example_event()

    def create_database(self, name: str) -> str:
        """Its URL."""
        with psycopg.connect(self.cluster.superuser_url, autocommit=True) as conn:
            conn.execute(psycopg.sql.SQL("CREATE DATABASE {} OWNER paygate").format(psycopg.sql.Identifier(name)))
        return self.cluster.url.replace("/postgres?", f"/{name}?")

    def env(self, url: str) -> dict[str, str]:
        return {
            "DATABASE_URL": url,
            "PAYSTACK_SECRET_KEY": SECRET_KEY,
            "PAYSTACK_URL": f"http://127.0.0.1:{self.sandbox.port}",
            "ADMIN_TOKEN": ADMIN_TOKEN,
        }

    # The provider

    def control_sandbox(self, method: str, path: str, body: object = None) -> Any:
        content = None if body is None else json.dumps(body)
        key = {"Authorization": f"Bearer {SECRET_KEY}"}
        return ask(self.sandbox.port, method, path, content, {**JSON, **key}).json

    def example_event(self) -> dict[str, Any]:
        """The data of an event: a paid transaction of this amount, as the sandbox tells it."""
        deadline = time.monotonic() + 20
        while True:  # until it listens
            with contextlib.suppress(OSError):
                order = {"reference": "EXAMPLE", "email": ORDER["customer_email"], "amount": 5000, "currency": "NGN"}
                self.control_sandbox("POST", "/transaction/initialize", order)
                self.control_sandbox("POST", "/_sandbox/pay", {"reference": "EXAMPLE"})
                return dict(self.control_sandbox("GET", "/transaction/verify/EXAMPLE")["data"])
            if time.monotonic() > deadline:
                raise Void(f"the sandbox does not start: {self.sandbox.log.read_text()}")
            time.sleep(0.1)

    # Requests

    def posts(self) -> Iterator[Request]:
        """Without end, each with a key of its own."""
        body = json.dumps(ORDER).encode()
        for number in self.numbers:
            yield Request("POST", PAYMENTS, body, {**JSON, "Idempotency-Key": f"bench-{self.seed}-{number}"})

    def webhook(self, reference: str) -> Request:
        """A signed `charge.success`, as the sandbox would send it."""
        data = {**self.event, "id": self.event["id"] + next(self.numbers), "reference": reference}
        body = json.dumps({"event": "charge.success", "data": data}, separators=(",", ":")).encode()
        signature = hmac.new(SECRET_KEY.encode(), body, hashlib.sha512).hexdigest()
        return Request("POST", "/api/v1/webhooks/paystack", body, {**JSON, "X-Paystack-Signature": signature})

    def requests(self, subject: Subject, kind: str, number: int) -> list[Request]:
        """Made before the clock runs."""
        match kind:
            case "POST":
                return list(itertools.islice(self.posts(), number))
            case "GET":
                chosen = self.random.choices(subject.known[-2000:], k=3 * number)
                return [Request("GET", f"{PAYMENTS}/{payment_id}", None, {}) for payment_id in chosen]
            case "list":
                return [Request("GET", f"{PAYMENTS}?limit=20", None, OWNER)] * number
        return [self.webhook(subject.unpaid.pop(0)) for _ in range(number)]

    def work(self, subject: Subject, kind: str, number: int) -> tuple[float, float]:
        """The processor's seconds for 1,000 requests, of the service and of the database."""
        requests = self.requests(subject, kind, number)
        pids = subject.server.pid, self.cluster.pid or 0
        before = [cpu_seconds(pid) for pid in pids]
        answers = send(subject.server.port, requests, CONNECTIONS)
        time.sleep(1.2 if kind == GET else 0.1)  # a reader's wish to know soon is told to the worker once a second
        service, database = (cpu_seconds(pid) - seconds for pid, seconds in zip(pids, before, strict=True))
        check_statuses(subject, kind, answers, {201 if kind == POST else 200})
        if kind == POST:
            for answer in answers:
                payment = json.loads(answer.body)["payment"]
                subject.unpaid.append(payment["reference"])
                subject.known.append(payment["id"])
        return service / len(answers) * 1000, database / len(answers) * 1000


def check_statuses(subject: Subject, kind: str, answers: list[Answer], expected: set[int]) -> None:
    statuses = Counter(answer.status for answer in answers)
    if not set(statuses) <= expected:
        other = next(answer.body[:300] for answer in answers if answer.status not in expected)
        raise Void(f"{subject.name}, {kind}: {dict(statuses)}; {other!r}")


def tree(pid: int) -> list[int]:
    return [pid, *(each for child in children_of(pid) for each in tree(child))]


def cpu_seconds(pid: int) -> float:
    """What a process and its descendants have used, also those that have ended and been waited for."""
    total = 0.0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            # The process's own clock counts in ns, /proc/PID/stat in 10 ms. linux/posix-timers.h: MAKE_PROCESS_CPUCLOCK
            total += time.clock_gettime((~each << 3) | 2)
            words = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            total += (int(words[13]) + int(words[14])) / os.sysconf("SC_CLK_TCK")  # cutime, cstime
    return total
