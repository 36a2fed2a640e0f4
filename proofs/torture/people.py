"""Clients, customers and operators, and what each of them saw: the model that the service is measured against."""

import heapq
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import urlsplit

import psycopg

from local.serving import ROOT, Reply
from proofs.torture.stage import ADMIN_TOKEN, TTL_SECONDS, Json, Stage, ask

PAYMENTS = "/api/v1/payments"
Command = subprocess.Popen[str]
T = TypeVar("T")
RANKS = {"pending": 0, "failed": 1, "expired": 1, "review": 2, "completed": 3, "partially_refunded": 4, "refunded": 5}
LASTING = ("id", "customer_name", "customer_email", "amount", "currency", "mode", "created_at")
EXPECTED = {409, 502, 503}
"""What a client may be told while something is broken: always with the time after which to try again."""
HABITS = """
    jane=40 decline=6 declines=3 underpaid=2 overpaid=2 other-currency=1 pays-fees=4 paid-at-once=4
    webhook-first=4 no-requested-amount=2 metadata-string=2 wide-id=4 wide-metadata=4 null-fees=6
    lost-webhook=6 late-webhook=4 double-webhook=4
    reordered-webhook=4 refund-fails=2 refund-fails-late=2 refund-stuck=1 refund-needs-attention=1
    verify-lost-answer=2 refund-lost-answer=3 refund-lost-request=3 refund-500=2 refund-garbage=2
"""
"""What the sandbox does for a customer of this name, and how many of them there are."""
FROZEN_REFUND = (
    "-c",
    """
import sys, manage, refunds
begin = refunds.begin
def begin_and_stand_still(*arguments):
    begun = begin(*arguments)
    print(begun.id, flush=True)
    sys.stdin.read()
    return begun
refunds.begin = begin_and_stand_still
raise SystemExit(manage.main())
""",
)
"""It stands still until its input ends. A signal that stops it could come after the one that lets it go on."""
CUSTOMERS = {name: int(weight) for name, _, weight in (each.partition("=") for each in HABITS.split())}


@dataclass
class Sale:
    """One payment as its client and its customer know it."""

    key: str
    order: Json
    id: str | None = None
    reference: str | None = None
    told: set[str] = field(default_factory=set)
    """What the answers said that never changes."""
    ids: set[str] = field(default_factory=set)
    urls: set[str] = field(default_factory=set)
    refused: str | None = None
    rank: int = 0
    status: str = "pending"
    cancel_status: int = 0
    """How its cancel was answered: 200, 422 where money had come first, or 404 where it was lost."""

    @property
    def is_answered(self) -> bool:
        return self.id is not None or self.refused is not None


@dataclass
class KeyedRefund:
    """A refund that the back office's API is asked for. Its reason is its Idempotency-Key, to be found by it."""

    key: str
    sale: Sale
    amount: str | None
    ids: set[str] = field(default_factory=set)
    statuses: set[int] = field(default_factory=set)
    """Of the answers that say how it stands: 201, 202, 422; or 404, which a payment that was lost gets."""

    @property
    def is_answered(self) -> bool:
        return not self.statuses.isdisjoint((201, 404, 422))


class Findings:
    """What was found to be untrue, by kind; and what is only counted."""

    KINDS = ("lost", "doubled", "stuck", "wrong", "broken")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.found: dict[str, list[str]] = defaultdict(list)
        self.counts: Counter[str] = Counter()
        self.slowest: dict[str, float] = defaultdict(float)

    def add(self, kind: str, what: str) -> None:
        with self.lock:
            self.found[kind].append(what)

    def count(self, what: str, seconds: float = 0) -> None:
        with self.lock:
            self.counts[what] += 1
            self.slowest[what] = max(self.slowest[what], seconds)


class People:
    """Everybody at once, in threads, until they are told to stop."""

    def __init__(self, stage: Stage, findings: Findings, seed: int) -> None:
        self.stage, self.findings, self.seed = stage, findings, seed
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self.sales: list[Sale] = []
        self.later: list[tuple[float, int, Callable[[], None]]] = []
        self.refunds: list[Json] = []
        self.given_up: list[str] = []
        """Refunds whose command has not sent them yet."""
        self.keyed: list[KeyedRefund] = []
        self.numbers = iter(range(10**9))
        self.threads: list[threading.Thread] = []

    def start(self, shoppers: int, operators: int) -> None:
        works = (
            [("shopper", self.shop)] * shoppers + [("operator", self.operate)] * operators + [("later", self.do_later)]
        )
        for number, (name, work) in enumerate(works):
            dice = random.Random(f"{self.seed} {name} {number}")
            self.threads.append(threading.Thread(target=self.go_on, args=(work, dice), name=name, daemon=True))
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join(90)

    def go_on(self, work: Callable[[random.Random], None], dice: random.Random) -> None:
        while not self.stopping.is_set():
            try:
                work(dice)
            except Exception as error:  # a mistake of ours: shown, and not taken for one of the service's
                self.findings.add("wrong", f"the simulator itself: {type(error).__name__}: {error}")
                time.sleep(1)

    # Clients

    def shop(self, dice: random.Random) -> None:
        """One client and one customer, from the first request to whatever becomes of the payment."""
        sale = self.new_sale(dice)
        if dice.random() < 0.15:  # two of them at once
            twice(self.create, sale, dice)
        else:
            self.create(sale, dice, dice.choice((1, 3, 12, 12, 12)))
        if sale.id is None:
            return
        self.poll(sale, dice)
        chance = dice.random()
        if chance < 0.2:
            self.create(sale, dice, 3)  # a client that never got to see its answer
        if chance < 0.04:
            self.reuse_key(sale, dice)
        self.be_customer(sale, dice)
        for _ in range(dice.randrange(3)):
            self.poll(sale, dice, wait=dice.choice((0, 0, 0, 1)))
        if dice.random() < 0.3:
            self.plan(dice.uniform(1, 20), lambda: self.poll(sale, dice))
        if sale.rank >= RANKS["completed"]:
            self.be_bank(sale, dice)
        self.stopping.wait(dice.uniform(0, 0.15))

    def new_sale(self, dice: random.Random) -> Sale:
        with self.lock:
            number = next(self.numbers)
        habit = dice.choices(list(CUSTOMERS), list(CUSTOMERS.values()))[0]
        order = {
            "customer_name": "Jane Doe",
            "customer_email": f"{habit}+{self.seed}x{number}@example.com",
            "customer_phone": "+2348012345678",
            "amount": f"{dice.randrange(5000, 10_000_000) / 100:.2f}",
            "location": "Lagos",
            "metadata": {"order": str(number)},
        }
        sale = Sale(f"sale-{self.seed}-{number}", order)
        with self.lock:
            self.sales.append(sale)
        return sale

    def create(self, sale: Sale, dice: random.Random, tries: int) -> None:
        """POST until there is an answer that ends it, or the client has had enough."""
        for _ in range(tries):
            reply = ask(
                dice.choice(self.stage.ports),
                "POST",
                PAYMENTS,
                json.dumps(sale.order).encode(),
                {"Content-Type": "application/json", "Idempotency-Key": sale.key},
            )
            if self.note_answer(sale, reply) or self.stopping.is_set():
                return
            time.sleep(dice.uniform(0.05, 0.6))

    def note_answer(self, sale: Sale, reply: Reply) -> bool:
        """Whether the answer ends the request."""
        self.findings.count(f"POST {reply.status_code or 'no answer'}", reply.seconds)
        if reply.status_code == 0:
            return False
        if reply.status_code == 201:
            payment = reply.json["payment"]
            with self.lock:
                sale.id, sale.reference = payment["id"], payment["reference"]
                sale.ids.add(payment["id"])
                sale.told.add(json.dumps([payment[name] for name in LASTING]))
                if payment["checkout_url"]:
                    sale.urls.add(payment["checkout_url"])
            if not str(reply.headers.get("location")).endswith(f"{PAYMENTS}/{payment['id']}"):
                self.findings.add("wrong", f"{sale.key}: Location {reply.headers.get('location')}")
            if f'"amount": {sale.order["amount"]}, ' not in reply.text:
                self.findings.add("wrong", f"{sale.key}: asked for {sale.order['amount']}, answered {reply.text[:300]}")
            return True
        if reply.status_code == 422 and reply.json["code"] in ("payment_expired", "provider_refused"):
            sale.refused = reply.json["code"]
            if sale.id is not None:
                self.findings.add("doubled", f"{sale.key}: 201 and then 422 {reply.text[:200]}")
            return True
        if reply.status_code not in EXPECTED or "retry-after" not in reply.headers:
            self.findings.add("wrong", f"{sale.key}: POST answered {reply.status_code} {reply.text[:300]}")
        return False

    def reuse_key(self, sale: Sale, dice: random.Random) -> None:
        body = json.dumps({**sale.order, "location": "Abuja"}).encode()
        headers = {"Content-Type": "application/json", "Idempotency-Key": sale.key}
        reply = ask(dice.choice(self.stage.ports), "POST", PAYMENTS, body, headers)
        self.findings.count(f"POST of another order with the key {reply.status_code or 'no answer'}")
        if reply.status_code not in (0, 422, 503):
            self.findings.add("wrong", f"{sale.key} used for another order: {reply.status_code} {reply.text[:200]}")

    def poll(self, sale: Sale, dice: random.Random, wait: int = 0) -> None:
        """GET: what was acknowledged is there, and its state never falls behind what somebody has seen before."""
        before, was_cancelled = sale.rank, sale.cancel_status == 200
        reply = ask(
            dice.choice(self.stage.ports),
            "GET",
            f"{PAYMENTS}/{sale.id}",
            headers={"Prefer": f"wait={wait}"} if wait else {},
        )
        self.findings.count(f"GET {reply.status_code or 'no answer'}", max(0.0, reply.seconds - wait))
        if reply.status_code == 200:
            status = reply.json["payment"]["status"]
            if was_cancelled and reply.json["payment"]["checkout_url"]:
                self.findings.add("wrong", f"{sale.id} was cancelled, and its checkout is given out")
            if RANKS[status] < before:
                self.findings.add("wrong", f"{sale.id} fell to {status} from rank {before}")
            with self.lock:
                if RANKS[status] >= sale.rank:
                    sale.rank, sale.status = RANKS[status], status
        elif reply.status_code == 404:
            self.findings.add("lost", f"{sale.id}, acknowledged, is not found")
        elif reply.status_code not in (0, 503) or (reply.status_code and "retry-after" not in reply.headers):
            self.findings.add("wrong", f"GET {sale.id} answered {reply.status_code} {reply.text[:300]}")

    # Customers

    def be_customer(self, sale: Sale, dice: random.Random) -> None:
        chance = dice.random()
        if not sale.urls:
            return
        if chance < 0.70:
            self.pay(sale)
        elif chance < 0.80:
            self.plan(dice.uniform(TTL_SECONDS, TTL_SECONDS + 20), lambda: self.pay(sale))  # late
        elif chance < 0.86:
            self.stage.control("decline", reference=sale.reference)
        elif chance < 0.90:
            self.stage.control("decline", reference=sale.reference)
            self.plan(dice.uniform(1, 30), lambda: self.pay(sale))
        elif chance > 0.93:
            if chance < 0.95:
                self.pay(sale)  # the cancel and the news of the money meet
            self.cancel(sale, dice)
            if chance > 0.97:  # the checkout was open already
                self.plan(dice.uniform(0, 15), lambda: self.pay(sale))
        if chance < 0.03:
            self.pay(sale)  # the button pressed twice
        elif chance < 0.06:  # by another way: a reference that no URL was given out for
            self.stage.control("charge_elsewhere", reference=f"{(sale.reference or '')[:29]}-9", amount=500000)
        elif 0.9 < chance < 0.93:
            self.stage.control("forge_event", reference=sale.reference)

    def pay(self, sale: Sale) -> None:
        """At the provider's own page; a customer whose card is declined tries once more."""
        path = urlsplit(next(iter(sale.urls))).path
        for _ in range(2):
            ask(self.stage.sandbox.port, "POST", path, b"do=pay", {"Content-Type": "application/x-www-form-urlencoded"})

    # The customer's bank

    def be_bank(self, sale: Sale, dice: random.Random) -> None:
        """It takes the money back, and no event tells of it; or disputes it, sometimes again after it has lost."""
        chance = dice.random()
        if chance < 0.03 and self.stage.control("reverse", reference=sale.reference):
            self.findings.count("charge reversed without an event")
        elif 0.03 < chance < 0.09 and (first := self.stage.control("dispute", reference=sale.reference)):
            self.findings.count("charge disputed")
            if chance < 0.06:
                self.stage.control("resolve_dispute", dispute=first["id"], resolution="declined")
                self.stage.control("dispute", reference=sale.reference)
                self.findings.count("charge disputed again")

    def plan(self, seconds: float, work: Callable[[], None]) -> None:
        with self.lock:
            heapq.heappush(self.later, (time.monotonic() + seconds, next(self.numbers), work))

    def do_later(self, _: random.Random) -> None:
        with self.lock:
            is_due = bool(self.later) and self.later[0][0] <= time.monotonic()
            work = heapq.heappop(self.later)[2] if is_due else None
        if work is not None:
            work()
        else:
            self.stopping.wait(0.1)

    # Operators

    def operate(self, dice: random.Random) -> None:
        """A refund by the API, by the command line in a process of its own that is sometimes killed, or in the
        dashboard."""
        with self.lock:
            paid = [sale for sale in self.sales[-400:] if sale.rank >= 3]
            reviewed = [sale for sale in self.sales[-400:] if sale.status == "review"]
        if not paid:
            self.stopping.wait(0.5)
            return
        if reviewed and dice.random() < 0.15:
            decision = dice.choice(("accept", "accept", "reject"))
            self.command(dice, "resolve", str(dice.choice(reviewed).id), decision, "--reason", "seen")
            return
        sale = dice.choice(paid)
        if dice.random() < 0.05:
            self.stage.control("dashboard_refund", reference=sale.reference, amount=dice.randrange(100, 5000))
            return
        if dice.random() < 0.1:
            self.refund_frozen(sale, dice)
            return
        amount = dice.choice((None, "10.00", f"{float(sale.order['amount']) / 2:.2f}"))
        if dice.random() < 0.6:
            self.refund_by_key(sale, amount, dice)
            return
        for _ in range(dice.choice((1, 1, 1, 2))):  # an impatient one asks again
            self.refund(sale, amount, dice)
        self.stopping.wait(dice.uniform(0.2, 1.5))

    def refund_by_key(self, sale: Sale, amount: str | None, dice: random.Random) -> None:
        with self.lock:
            refund = KeyedRefund(f"refund-{self.seed}-{next(self.numbers)}", sale, amount)
            self.keyed.append(refund)
        if dice.random() < 0.2:
            twice(self.ask_refund, refund, dice)
        else:
            self.ask_refund(refund, dice, dice.choice((1, 3, 12, 12)))
        if not refund.is_answered or dice.random() < 0.3:  # or its answer never got to be seen
            self.plan(dice.uniform(1, 20), lambda: self.ask_refund(refund, dice, 3))
        self.stopping.wait(dice.uniform(0.1, 0.5))

    def ask_refund(self, refund: KeyedRefund, dice: random.Random, tries: int) -> None:
        """POST until an answer says how it stands: 202 asks to come back later."""
        body = {"reason": refund.key, "by": "torture", **({"amount": refund.amount} if refund.amount else {})}
        for _ in range(tries):
            was_made = 201 in refund.statuses
            reply = self.ask_office(dice, f"{refund.sale.id}/refunds", body, refund.key)
            if reply.status_code in (201, 202):
                with self.lock:
                    refund.ids.add(reply.json["refund"]["id"])
            if reply.status_code in (201, 202, 404, 422):
                refund.statuses.add(reply.status_code)
                if was_made and reply.status_code != 201:
                    self.findings.add("wrong", f"{refund.key}: 201 and then {reply.status_code} {reply.text[:300]}")
                return
            if self.stopping.is_set():
                return
            time.sleep(dice.uniform(0.05, 0.6))

    def cancel(self, sale: Sale, dice: random.Random) -> None:
        for _ in range(12):
            reply = self.ask_office(dice, f"{sale.id}/cancel", {"by": "torture"})
            if reply.status_code in (200, 404, 422):
                sale.cancel_status = reply.status_code
                return
            if self.stopping.is_set():
                return
            time.sleep(dice.uniform(0.05, 0.6))

    def ask_office(self, dice: random.Random, path: str, body: Json, key: str | None = None) -> Reply:
        """POST to the back office. Any answer but a decision must be one of those after which to try again."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {ADMIN_TOKEN}"}
        headers |= {"Idempotency-Key": key} if key else {}
        reply = ask(dice.choice(self.stage.ports), "POST", f"{PAYMENTS}/{path}", json.dumps(body).encode(), headers)
        status, what = reply.status_code, path.partition("/")[2]
        self.findings.count(f"{what} by the API: {status or 'no answer'}", reply.seconds)
        is_refusal = status == 422 and reply.json["code"] in ("not_possible", "provider_refused")
        is_retry = status in EXPECTED and "retry-after" in reply.headers
        if status == 404:
            self.findings.add("lost", f"POST {path}: the payment, acknowledged, is not found")
        elif status not in (0, 200, 201, 202) and not is_refusal and not is_retry:
            self.findings.add("wrong", f"POST {path} answered {status} {reply.text[:300]}")
        return reply

    def refund(self, sale: Sale, amount: str | None, dice: random.Random) -> None:
        part = ["--amount", amount] if amount else []
        printed, status = self.command(dice, "refund", str(sale.id), *part, "--json")
        told = json.loads(printed) if printed.endswith("}\n") else None
        if told is not None:
            with self.lock:
                self.refunds.append(told)
            self.findings.count(f"refund {'asked for already' if told['is_repetition'] else told['status']}")
        elif status == 1:
            self.findings.count("refund impossible")

    def refund_frozen(self, sale: Sale, dice: random.Random) -> None:
        """The command stands still between its commit and its call until a poll has given its refund up. Then another
        command asks for as much again, and the first goes on."""
        process = self.start_command("refund", str(sale.id), "--amount", "10.00", "--again", program=FROZEN_REFUND)
        try:
            refund_id = process.stdout.readline().strip() if process.stdout else ""
            if refund_id.startswith("RF-") and self.is_given_up(refund_id):
                self.given_up.append(refund_id)
                self.findings.count("refund frozen until it was given up")
                self.refund(sale, "10.00", dice)
        finally:
            _, complaint = process.communicate(timeout=60)  # It closes the command's input.
        self.note_end("refund, frozen", process.returncode, complaint)

    def is_given_up(self, refund_id: str) -> bool:
        """Whether a poll gives the refund up within half a minute, as if the command had stood still for an hour."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not self.stopping.is_set():
            with suppress(psycopg.Error):  # the database is broken too
                # It has not been sent: only the poll is to find that it was, long ago.
                (refund,) = self.stage.sql(
                    """
                    UPDATE refunds
                       SET sent_at = CASE WHEN status = 'unanswered' THEN now() - interval '1 hour' END,
                           poll_at = CASE WHEN status = 'unanswered' THEN now() ELSE poll_at END
                     WHERE id = %s
                    RETURNING status
                    """,
                    refund_id,
                )
                if refund["status"] == "not_made":
                    return True
            self.stopping.wait(1)
        return False

    def command(self, dice: random.Random, name: str, *arguments: str) -> tuple[str, int]:
        """What a command prints, and its status. One in ten is killed somewhere on its way."""
        process = self.start_command(name, *arguments)
        try:
            printed, complaint = process.communicate(timeout=dice.uniform(0.4, 1.5) if dice.random() < 0.1 else 60)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            printed, complaint = process.communicate()
        self.note_end(name, process.returncode, complaint)
        return printed, process.returncode

    def start_command(self, name: str, *arguments: str, program: Sequence[str] = ("manage.py",)) -> Command:
        return subprocess.Popen(
            [sys.executable, *program, name, *arguments, "--yes", "--by", "torture"],
            cwd=ROOT,
            env=self.stage.command_env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def note_end(self, name: str, status: int, complaint: str) -> None:
        self.findings.count(f"{name}: {'killed' if status < 0 else f'status {status}'}")
        if status not in (0, 1, -signal.SIGKILL) or "Traceback" in complaint:
            self.findings.add("wrong", f"{name} ended with {status}: {complaint[-500:]}")


def twice(ask: Callable[[T, random.Random, int], None], about: T, dice: random.Random) -> None:
    """Two who ask with one key at once."""
    twin = threading.Thread(target=ask, args=(about, random.Random(dice.random()), 8))
    twin.start()
    ask(about, dice, 8)
    twin.join()
