"""What the services do with what goes wrong, asked of each: a cheap request is no merit where money gets lost."""

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import LiteralString

import psycopg

from bench import load, subjects
from bench.machine import Server
from bench.subjects import WEBHOOK, Requests, Subject

FOUND_SECONDS = 20
DISK_FULL = """
CREATE FUNCTION disk_full() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN RAISE EXCEPTION 'no space left on device' USING ERRCODE = 'disk_full'; END $$;
CREATE TRIGGER disk_full BEFORE UPDATE ON payments FOR EACH ROW EXECUTE FUNCTION disk_full();
"""


@dataclass(frozen=True)
class Asker:
    """Asks one service, which runs as it does by default."""

    server: Server
    subject: Subject
    requests: Requests
    sandbox_url: str

    def ask_all(self) -> dict[str, bool]:
        promises: dict[str, Callable[[], bool]] = {
            "an order sent again with its key is one payment": self.same_key,
            "a forged event is refused": self.forged,
            "an event that comes twice counts once": self.twice,
            "an event that failed is applied when it comes again": self.again,
            "less money than the price is not taken as paid": self.too_little,
            "a payment whose event never comes is found": self.never_comes,
        }
        return {name: keeps() for name, keeps in promises.items()}

    def same_key(self) -> bool:
        order = next(self.requests.posts())
        first, second = self.send(order), self.send(order)
        return first.status == second.status == 201 and first.body == second.body

    def forged(self) -> bool:
        payment_id, reference = self.open()
        event = next(self.requests.webhooks([reference]))
        refused = self.send(event.replace(b'"status":"success"', b'"status":"SUCCESS"')).status in (400, 401, 403)
        return refused and self.is_in("pending", payment_id)

    def twice(self) -> bool:
        payment_id, reference = self.open()
        event = next(self.requests.webhooks([reference]))
        before = self.subject.count(WEBHOOK)
        return (
            [self.send(event).status for _ in range(2)] == [200, 200]
            and self.subject.count(WEBHOOK) == before + 1
            and self.is_in("completed", payment_id)
        )

    def again(self) -> bool:
        """The first time the disk is full where the payment is written."""
        payment_id, reference = self.open()
        event = next(self.requests.webhooks([reference]))
        self.execute(DISK_FULL)
        self.send(event)
        self.execute("DROP FUNCTION disk_full CASCADE")
        self.send(event)
        return self.is_in("completed", payment_id)

    def too_little(self) -> bool:
        payment_id, reference = self.open()
        self.send(next(self.requests.webhooks([reference], amount=4900)))
        return not self.is_in("completed", payment_id)

    def never_comes(self) -> bool:
        payment_id, reference = self.open()
        subjects.ask(self.sandbox_url, "POST", "/_sandbox/pay", {"reference": reference})
        ends = time.monotonic() + FOUND_SECONDS
        while not self.is_in("completed", payment_id):
            if time.monotonic() > ends:
                return False
            time.sleep(0.5)
        return True

    def open(self) -> tuple[str, str]:
        payment = json.loads(self.send(next(self.requests.posts())).body)["payment"]
        return payment["id"], payment["reference"]

    def is_in(self, status: str, payment_id: str) -> bool:
        payment = json.loads(self.send(next(self.requests.gets([payment_id], 1))).body)["payment"]
        return bool(payment["status"] == status)

    def send(self, request: bytes) -> load.Reply:
        return load.send(self.server.port, itertools.repeat(request, 1), 1)[0]

    def execute(self, statement: LiteralString) -> None:
        with psycopg.connect(self.subject.database_url) as conn:
            conn.execute(statement)
