"""Whether the millionth payment costs what the first did: `make bench-growth`.

The same work on databases that hold 10 thousand and a million payments (`--quick`: 100 thousand in place of the
million; `--full`: 5 million too, which takes 18 GB of disk), written by tests/history.py. They differ in what lies
behind them; the trade of today is the same in each.

Everything must cost at most 1.2 times what it costs at the smallest: requests, look-ups, and, for each row that is
there, what reads everything (audit). The quotient is the median of the rounds' own quotients. The status is 1 where a
goal is missed.

Everything is done in turn on each database, in random order, so that what the machine does besides falls on all. Their
server's autovacuum is off meanwhile: it would fall on one by chance.
"""

import argparse
import contextlib
import io
import os
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest import mock
from urllib.parse import urlencode

import psycopg
from falcon.testing import TestClient
from tqdm import tqdm

import charges
import db
import manage
import paygate
import refunds
import settings
import worker
from commands.migrate import migrate
from local.serving import ROOT, Server
from proofs.bench.stage import GET, KINDS, OWNER, PAYMENTS, SECRET_KEY, Stage, Subject, Void
from web import outbox

sys.path.append(str(ROOT / "tests"))
import history
import plans

SMALL, MIDDLE, LARGE, HUGE = 10_000, 100_000, 1_000_000, 5_000_000
TODAY = 1_000
BYTES_OF_A_PAYMENT, BYTES_BESIDES = 3_400, 2_000_000_000
"""What the databases take on disk, and the server's log of writes, to tell before the fill whether there is room."""
GOAL, NOTHING = 1.2, 0.1
"""How much more the largest may need than the smallest. A difference of 0.1 ms is no miss: nobody would feel it."""
DISK, DISK_GOAL_BYTES = "a paid payment on disk, bytes", 2_300
A_PAID_PAYMENT = {"payments": 1, "idempotency_keys": 1, "payment_events": 3, "charges": 1}
"""The rows that it leaves: reserved, opened and paid. (Its webhook's row loses its body in time.)"""
CLAIMS: dict[str, Callable[[db.Database], object]] = {
    "polls": lambda database: any(worker.claim_due(database, "test", 60, order) for order in worker.ORDERS),
    "refunds": lambda database: refunds.claim_due(database, "test", limit=20, lease_seconds=60),
    "events": lambda database: charges.claim_events(database, "test", limit=20),
    "notifications": lambda database: outbox.claim_notification(database, "test", lease_seconds=60),
}
# Memory is the process's own: what the system tells of an ended child begins with what its parent had.
AUDIT = """
import sys, manage
status = manage.main(["audit"])
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
sys.exit(status)
"""
Figures = dict[str, dict[int, list[float]]]
"""By what was measured and the number of payments, one a round."""


class Ledger(Subject):
    """A database with a history of so many payments, and paygate on it."""

    def __init__(self, payments: int, url: str, server: Server) -> None:
        super().__init__(f"{payments:,} payments", url, server)
        self.payments = payments

    def execute(self, statement: str) -> tuple[Any, ...]:
        with psycopg.connect(self.url) as conn:
            return conn.execute(statement.encode()).fetchone() or ()


Work = Callable[[Ledger], dict[str, float]]


class Growth(Stage):
    def __init__(self, stack: contextlib.ExitStack, options: argparse.Namespace) -> None:
        super().__init__(stack, options.seed)
        self.options = options
        self.found: Figures = defaultdict(lambda: defaultdict(list))
        for statement in ("ALTER SYSTEM SET autovacuum = off", "SELECT pg_reload_conf()"):
            with psycopg.connect(self.cluster.superuser_url, autocommit=True) as conn:
                conn.execute(statement.encode())
        self.ledgers = [self.fill(payments) for payments in options.sizes]
        with psycopg.connect(self.cluster.superuser_url, autocommit=True) as conn:
            conn.execute("CHECKPOINT")

    def fill(self, payments: int) -> Ledger:
        url = self.create_database(f"payments_{payments}")
        migrate(url)
        begun, body = time.monotonic(), (self.webhook("EXAMPLE").body or b"").decode()
        with tqdm(total=payments, unit=" payments", disable=None, leave=False) as bar:
            for written in history.fill(superuser(url), payments, today=TODAY, body=body):
                bar.update(written - bar.n)
        print(f"{payments:,} payments written in {time.monotonic() - begun:.0f} s", flush=True)
        env = {**self.env(url), "WEB_CONCURRENCY": "1", "RATE_LIMIT": "off", "RUN_WORKER": "0"}
        server = Server(self.folder / f"paygate-{payments}", {**env, "METRICS_TOKEN": SECRET_KEY})
        return Ledger(payments, url, self.stack.enter_context(server))

    def run(self) -> Figures:
        self.measure([disk], rounds=1, warm_up=0)
        for name, claim in CLAIMS.items():
            with contextlib.ExitStack() as stack:
                self.measure([self.claiming(name, claim, stack)], rounds=50)
        self.measure([*map(self.commanding, LOOK_UPS), metrics], rounds=31)
        with contextlib.ExitStack() as stack:
            apps = {ledger.payments: self.explained(ledger, stack) for ledger in self.ledgers}
            self.measure([self.listing(name, apps) for name in LISTS], rounds=31)
        self.measure([self.audit], rounds=self.options.audits, warm_up=0)
        self.measure([self.requesting(kind) for kind in KINDS], rounds=self.options.rounds)
        return self.found

    def measure(self, works: list[Work], rounds: int, warm_up: int = 1) -> None:
        for number in range(-warm_up, rounds):
            for work in works:
                for ledger in self.random.sample(self.ledgers, len(self.ledgers)):
                    for name, value in work(ledger).items():
                        if number >= 0:
                            self.found[name][ledger.payments].append(value)

    def some(self, ledger: Ledger) -> int:
        """The number of any payment of its history."""
        return self.random.randint(1, ledger.payments)

    def claiming(self, name: str, claim: Callable[[db.Database], object], stack: contextlib.ExitStack) -> Work:
        """The server's own time of a claim, told by the server itself."""
        databases = {
            ledger.payments: stack.enter_context(db.Database(plans.explained(superuser(ledger.url), plans.SETTINGS), 1))
            for ledger in self.ledgers
        }

        def work(ledger: Ledger) -> dict[str, float]:
            with plans.watch(self.cluster.log) as statements:
                if claim(databases[ledger.payments]):
                    raise Void(f"{name} on {ledger.name}: something was due")
            return {f"claim of {name} with nothing due, ms in the server": sum(each.ms for each in statements)}

        return work

    def commanding(self, name: str) -> Work:
        """An operator's command, with all that is round it but the start of Python."""

        def work(ledger: Ledger) -> dict[str, float]:
            words, marks, printed = LOOK_UPS[name], self.marks(ledger), io.StringIO()
            with (
                mock.patch.dict(os.environ, self.env(ledger.url)),
                contextlib.redirect_stdout(printed),
                contextlib.redirect_stderr(printed),
            ):
                begun = time.perf_counter()
                status = manage.main([marks.get(word, word) for word in words])
                ms = (time.perf_counter() - begun) * 1000
            if status > (1 if words[0] == "erase" else 0):  # it also says of which payments it must keep the data
                raise Void(f"{name} on {ledger.name}: {printed.getvalue()[-500:]}")
            return {f"{name}, ms": ms}

        return work

    def marks(self, ledger: Ledger) -> dict[str, str]:
        """What stands in a look-up for any payment of the history."""
        number = self.some(ledger)
        return {
            "ID": history.payment_id(number),
            "EMAIL": history.email(number, ledger.payments),
            "ORDER": f"order-{number}",
            "A_YEAR_AGO": f"{datetime.now(UTC) - timedelta(days=365):%Y-%m-%d}",
        }

    def explained(self, ledger: Ledger, stack: contextlib.ExitStack) -> TestClient:
        """The app in this process, whose plans the server tells, and the rows that they read."""
        url = plans.explained(superuser(ledger.url), plans.SETTINGS | plans.COUNTING)
        app = paygate.create_app(settings.load(self.env(url)))
        stack.callback(app.database.close)
        return TestClient(app)

    def listing(self, name: str, apps: dict[int, TestClient]) -> Work:
        """A page of the back office's list."""

        def work(ledger: Ledger) -> dict[str, float]:
            query, marks = LISTS[name], self.marks(ledger)
            params = {field: marks.get(value, value) for field, value in query.items()}
            reply = ledger.server.request("GET", f"{PAYMENTS}?{urlencode(params)}", headers=OWNER)
            with plans.watch(self.cluster.log) as statements:
                again = apps[ledger.payments].simulate_get(PAYMENTS, params=params, headers=OWNER)
            if not reply.status_code == again.status_code == 200 or not reply.json["payments"]:
                raise Void(f"the list, {name}, on {ledger.name}: {reply.status_code} {reply.text[:500]}")
            steps = [(each, step) for each in statements for step in each.steps() if "Relation Name" in step]
            rows = sum(each.rows_read(step) for each, step in steps)
            return {
                f"API's list, {name}, ms": reply.seconds * 1000,
                f"API's list, {name}, rows that its plan reads": rows,
            }

        return work

    def audit(self, ledger: Ledger) -> dict[str, float]:
        (rows,) = ledger.execute("SELECT count(*) FROM payment_events")
        begun = time.monotonic()
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **self.env(ledger.url)}
        done = subprocess.run(
            [sys.executable, "-c", AUDIT], cwd=self.folder, env=env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Void(f"audit on {ledger.name}: {(done.stdout + done.stderr)[-500:]}")
        return {
            "audit, µs for each audit row": (time.monotonic() - begun) / rows * 1_000_000,
            "audit, MiB at most": int(done.stdout.split()[-1]) / 1024,
        }

    def requesting(self, kind: str) -> Work:
        def work(ledger: Ledger) -> dict[str, float]:
            if kind == GET:  # of any payment ever made, not of the latest alone
                ledger.known = [history.payment_id(self.some(ledger)) for _ in range(2000)]
            service, database = self.work(ledger, kind, self.options.requests)
            return {f"{kind}, CPU ms": service + database, f"{kind}, the database's CPU ms": database}

        return work


LOOK_UPS = {
    "list": ["list"],
    "list --until a year ago": ["list", "--until", "A_YEAR_AGO"],
    "list --email": ["list", "--email", "EMAIL"],
    "show": ["show", "ID"],
    "erase --email --dry-run": ["erase", "--dry-run", "--email", "EMAIL"],
}
LISTS = {
    "first page": {},
    "a page deep in": {"after": "ID"},
    "refunded": {"status": "refunded"},
    "of a customer": {"email": "EMAIL"},
    "of an order": {"order": "ORDER"},
}


def superuser(url: str) -> str:
    return url.replace("//paygate@", "//postgres@")


def metrics(ledger: Ledger) -> dict[str, float]:
    reply = ledger.server.request("GET", "/metrics", headers={"Authorization": f"Bearer {SECRET_KEY}"})
    if reply.status_code != 200:
        raise Void(f"/metrics on {ledger.name}: {reply.status_code}")
    return {"/metrics, ms": reply.seconds * 1000}


def disk(ledger: Ledger) -> dict[str, float]:
    """The bytes of the rows, with their part of the indexes and of TOAST."""
    total = 0.0
    for table, rows in A_PAID_PAYMENT.items():
        (each,) = ledger.execute(f"SELECT pg_total_relation_size('{table}')::float8 / count(*) FROM {table}")  # noqa: S608  # ours
        total += rows * each
    return {DISK: total}


def report(found: Figures, sizes: list[int]) -> list[str]:
    """Print the table of medians, and return the goals that were missed."""
    missed = []
    print(f"\n| | {' | '.join(f'{size:,}' for size in sizes)} | last ÷ first |\n|{'---|' * (len(sizes) + 2)}")
    for what, values in found.items():
        medians = [statistics.median(values[size]) for size in sizes]
        pairs = zip(values[sizes[0]], values[sizes[-1]], strict=True)
        ratio = statistics.median(last / first for first, last in pairs)
        print(
            f"| {what} | {' | '.join(f'{median:,.{0 if median >= 100 else 3}f}' for median in medians)} | {ratio:.2f} |"
        )
        if ratio > GOAL and medians[-1] - medians[0] > NOTHING:
            missed.append(f"{what}: {ratio:.2f} times, the goal is {GOAL:g}")
        if what == DISK and medians[-1] > DISK_GOAL_BYTES:
            missed.append(f"{what}: {medians[-1]:,.0f}, the goal is {DISK_GOAL_BYTES:,}")
    return missed


def main() -> int:
    if sys.platform != "linux":
        sys.exit("bench-growth: it reads the processor's time from Linux's /proc")
    parser = argparse.ArgumentParser(
        prog="make bench-growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="10 and 100 thousand payments, in a few minutes")
    size.add_argument("--full", action="store_true", help="5 million payments too")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000), help="of the order (random)")
    options = parser.parse_args()
    options.sizes = [SMALL, MIDDLE] if options.quick else [SMALL, LARGE, *([HUGE] if options.full else [])]
    options.rounds, options.requests, options.audits = (6, 150, 1) if options.quick else (12, 300, 2)
    needed = sum(options.sizes) * BYTES_OF_A_PAYMENT + BYTES_BESIDES
    free = shutil.disk_usage("/var/tmp").free  # noqa: S108  # only asked how much room is there
    if free < needed:
        sys.exit(f"bench-growth: /var/tmp has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"seed {options.seed}; {os.cpu_count()} cores, load before it {os.getloadavg()[0]:.2f}", flush=True)
    with contextlib.ExitStack() as stack:
        try:
            missed = report(Growth(stack, options).run(), options.sizes)
        except Void as error:
            print(f"VOID: {error}")
            return 1
        except KeyboardInterrupt:
            return 130
    for each in missed:
        print(f"MISSED: {each}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
