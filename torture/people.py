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
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from torture.stage import ROOT, TTL_SECONDS, Json, Reply, Stage, ask

PAYMENTS = "/api/v1/payments"
RANKS = {"pending": 0, "failed": 1, "expired": 1, "review": 2, "completed": 3, "partially_refunded": 4, "refunded": 5}
EXPECTED = {409, 502, 503}
"""What a client may be told while something is broken: always with the time after which to try again."""
CUSTOMERS = {
    "jane": 40,
    "decline": 6,
    "declines": 3,
    "underpaid": 2,
    "overpaid": 2,
    "other-currency": 1,
    "pays-fees": 4,
    "paid-at-once": 4,
    "webhook-first": 4,
    "no-requested-amount": 2,
    "metadata-string": 2,
    "lost-webhook": 6,
    "late-webhook": 4,
    "double-webhook": 4,
    "reordered-webhook": 4,
    "refund-fails": 2,
    "refund-fails-late": 2,
    "refund-stuck": 1,
    "refund-needs-attention": 1,
    "verify-lost-answer": 2,
    "refund-lost-answer": 3,
    "refund-lost-request": 3,
    "refund-500": 2,
    "refund-garbage": 2,
}


@dataclass
class Sale:
    """One payment as its client and its customer know it."""

    key: str
    order: Json
    id: str | None = None
    reference: str | None = None
    bodies: set[str] = field(default_factory=set)
    ids: set[str] = field(default_factory=set)
    urls: set[str] = field(default_factory=set)
    refused: str | None = None
    rank: int = 0
    status: str = "pending"

    @property
    def is_answered(self) -> bool:
        return self.id is not None or self.refused is not None


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
            twin = threading.Thread(target=self.create, args=(sale, random.Random(dice.random()), 8))
            twin.start()
            self.create(sale, dice, 8)
            twin.join()
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
        self.findings.count(f"POST {reply.status or 'no answer'}", reply.seconds)
        if reply.status == 0:
            return False
        if reply.status == 201:
            payment = reply.json["payment"]
            with self.lock:
                sale.id, sale.reference = payment["id"], payment["reference"]
                sale.ids.add(payment["id"])
                sale.bodies.add(reply.text)
                if payment["checkout_url"]:
                    sale.urls.add(payment["checkout_url"])
            if not str(reply.headers.get("location")).endswith(f"{PAYMENTS}/{payment['id']}"):
                self.findings.add("wrong", f"{sale.key}: Location {reply.headers.get('location')}")
            if f'"amount": {sale.order["amount"]}, ' not in reply.text:
                self.findings.add("wrong", f"{sale.key}: asked for {sale.order['amount']}, answered {reply.text[:300]}")
            return True
        if reply.status == 422 and reply.json["code"] in ("payment_expired", "provider_refused"):
            sale.refused = reply.json["code"]
            if sale.id is not None:
                self.findings.add("doubled", f"{sale.key}: 201 and then 422 {reply.text[:200]}")
            return True
        if reply.status not in EXPECTED or "retry-after" not in reply.headers:
            self.findings.add("wrong", f"{sale.key}: POST answered {reply.status} {reply.text[:300]}")
        return False

    def reuse_key(self, sale: Sale, dice: random.Random) -> None:
        body = json.dumps({**sale.order, "location": "Abuja"}).encode()
        headers = {"Content-Type": "application/json", "Idempotency-Key": sale.key}
        reply = ask(dice.choice(self.stage.ports), "POST", PAYMENTS, body, headers)
        self.findings.count(f"POST of another order with the key {reply.status or 'no answer'}")
        if reply.status not in (0, 422, 503):
            self.findings.add("wrong", f"{sale.key} used for another order: {reply.status} {reply.text[:200]}")

    def poll(self, sale: Sale, dice: random.Random, wait: int = 0) -> None:
        """GET: what was acknowledged is there, and its state never falls behind what somebody has seen before."""
        before = sale.rank
        reply = ask(
            dice.choice(self.stage.ports),
            "GET",
            f"{PAYMENTS}/{sale.id}",
            headers={"Prefer": f"wait={wait}"} if wait else {},
        )
        self.findings.count(f"GET {reply.status or 'no answer'}", max(0.0, reply.seconds - wait))
        if reply.status == 200:
            status = reply.json["payment"]["status"]
            if RANKS[status] < before:
                self.findings.add("wrong", f"{sale.id} fell to {status} from rank {before}")
            with self.lock:
                if RANKS[status] >= sale.rank:
                    sale.rank, sale.status = RANKS[status], status
        elif reply.status == 404:
            self.findings.add("lost", f"{sale.id}, acknowledged, is not found")
        elif reply.status not in (0, 503) or (reply.status and "retry-after" not in reply.headers):
            self.findings.add("wrong", f"GET {sale.id} answered {reply.status} {reply.text[:300]}")

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
        """A refund by the command line, in a process of its own that is sometimes killed; or one in the dashboard."""
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
        amount = dice.choice((None, "10.00", f"{float(sale.order['amount']) / 2:.2f}"))
        for _ in range(dice.choice((1, 1, 1, 2))):  # an impatient one asks again
            self.refund(sale, amount, dice)
        self.stopping.wait(dice.uniform(0.2, 1.5))

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

    def command(self, dice: random.Random, name: str, *arguments: str) -> tuple[str, int]:
        """What a command prints, and its status. One in ten is killed somewhere on its way."""
        process = subprocess.Popen(
            [sys.executable, "manage.py", name, *arguments, "--yes", "--by", "torture"],
            cwd=ROOT,
            env=self.stage.command_env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            printed, complaint = process.communicate(timeout=dice.uniform(0.4, 1.5) if dice.random() < 0.1 else 60)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            printed, complaint = process.communicate()
        self.findings.count(f"{name}: {'killed' if process.returncode < 0 else f'status {process.returncode}'}")
        if process.returncode not in (0, 1, -signal.SIGKILL) or "Traceback" in complaint:
            self.findings.add("wrong", f"{name} {arguments} ended with {process.returncode}: {complaint[-500:]}")
        return printed, process.returncode
