"""Whether the millionth payment costs what the first did: `make bench-growth`.

The same work on databases that hold 10 thousand and a million payments (`--full`: 5 million too, which takes 23 GB of
disk; `--quick`: 10 and 100 thousand, in about two minutes), made by bench/history.py. They differ in what lies behind
them; the trade of today is the same in each.

Requests and look-ups must cost the same at every size: at most 1.2 times what they cost at the smallest. What reads
everything (audit) or a month (report, reconcile) may take as much longer as there are more rows, and no more memory.
The status is 1 where a goal is missed.

Everything is done in turn on each database, in random order, so that what the machine does besides falls on all. Their
server's autovacuum is off meanwhile: it would fall on one by chance. What is measured again at the end is how it is
just before autovacuum comes, as late as the tables' settings let it.
"""

import argparse
import contextlib
import http.server
import io
import itertools
import json
import os
import random
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import psycopg
from tqdm import tqdm

import db
import embedded
import manage
from bench import history, load, machine, plans, subjects
from bench.__main__ import CONNECTIONS, Void, sandbox
from bench.report import print_table
from bench.subjects import GET, POST, WEBHOOK

SMALL, MIDDLE, LARGE, HUGE = 10_000, 100_000, 1_000_000, 5_000_000
TODAY = 1_000
BYTES_OF_A_PAYMENT, BYTES_BESIDES = 3_400, 2_000_000_000
"""What the databases take on disk, and the server's log of writes, to tell before the fill whether there is room."""

GOAL = 1.2
NOTHING_MS = 0.1
"""What nobody would feel, and no clock tells apart, is no miss."""
IDLE_CLAIM_GOAL_MS = 1.0
PAID_GOAL_BYTES = 2_500
A_PAID_PAYMENT = {"payments": 1, "idempotency_keys": 1, "payment_events": 3, "charges": 1, "provider_events": 1}
"""The rows that one leaves: reserved, opened and paid, by one webhook (whose body is pruned in time)."""
DUE = 10
"""How much is made due where a claim is to find something: more than it takes."""
METRICS_TOKEN = "growth"  # noqa: S105  # of a server on 127.0.0.1


@dataclass
class Ledger:
    """A database with a history of so many payments."""

    payments: int
    url: str
    random: random.Random
    unpaid: list[str] = field(default_factory=list)
    """References that no event has come for."""
    database: db.Database = field(init=False)

    def __post_init__(self) -> None:
        self.database = db.Database(self.url, 1)

    @property
    def name(self) -> str:
        return f"{self.payments:,}"

    def some(self) -> int:
        """The number of any payment of its history."""
        return self.random.randint(1, self.payments)

    def execute(self, statement: str, **values: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.url, autocommit=True) as conn:
            cursor = conn.execute(statement.encode(), values)
            return cursor.fetchall() if cursor.description else []


@dataclass(frozen=True)
class Cost:
    """The processor's time for one request, on average."""

    server_ms: float
    database_ms: float


@dataclass(frozen=True)
class Reading:
    """A command that reads much: how long it took, its largest memory, and how many rows it had to read."""

    seconds: float
    memory_mib: float
    rows: int


Work = Callable[[Ledger], object]


class Growth:
    def __init__(self, stack: contextlib.ExitStack, options: argparse.Namespace) -> None:
        self.options = options
        self.random = random.Random(options.seed)  # noqa: S311  # printed, to be run again
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="paygate-growth-", dir="/var/tmp")))
        self.folder.chmod(0o711)  # where we are root, the database's user has to pass
        self.cluster = stack.enter_context(embedded.database(self.folder / "postgres"))
        self.sandbox_url = stack.enter_context(sandbox(self.folder))
        self.requests = subjects.Requests(options.seed, self.sandbox_url)
        self.env = {
            "PAYSTACK_SECRET_KEY": subjects.SECRET_KEY,
            "PAYSTACK_URL": self.sandbox_url,
            "WEB_CONCURRENCY": "1",
            "RATE_LIMIT": "off",
            "RUN_WORKER": "0",
            "METRICS_TOKEN": METRICS_TOKEN,
        }
        body = json.dumps({"event": "charge.success", "data": self.requests.event}, separators=(",", ":"))
        self.ledgers = [self.fill(payments, body) for payments in options.sizes]
        with psycopg.connect(self.cluster.url, autocommit=True) as conn:
            conn.execute("ALTER SYSTEM SET autovacuum = off")
            conn.execute("SELECT pg_reload_conf()")
            conn.execute("CHECKPOINT")
        for ledger in self.ledgers:
            ledger.database.open()
            stack.callback(ledger.database.close)

    def fill(self, payments: int, body: str) -> Ledger:
        name = f"payments_{payments}"
        with psycopg.connect(self.cluster.url, autocommit=True) as conn:
            conn.execute(psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(name)))
        url = self.cluster.url.replace("/postgres?", f"/{name}?")
        db.migrate(url)
        begun = time.monotonic()
        with tqdm(total=payments, unit=" payments", disable=None, leave=False) as bar:
            for written in history.fill(url, payments, today=TODAY, body=body):
                bar.update(written - bar.n)
        print(f"{payments:,} payments written in {time.monotonic() - begun:.0f} s", flush=True)
        return Ledger(payments, url, random.Random(self.options.seed))  # noqa: S311  # likewise

    def in_turn(self) -> list[Ledger]:
        return self.random.sample(self.ledgers, len(self.ledgers))

    # Requests

    def run_requests(self) -> dict[tuple[str, int], list[Cost]]:
        found: dict[tuple[str, int], list[Cost]] = defaultdict(list)
        with contextlib.ExitStack() as stack:
            servers = {ledger.payments: stack.enter_context(self.serving(ledger)) for ledger in self.ledgers}
            for number in range(self.options.rounds + 1):
                for kind in (POST, GET, WEBHOOK):
                    for ledger in self.in_turn():
                        cost = self.work(servers[ledger.payments], ledger, kind)
                        if number:  # the first is for warming up
                            found[kind, ledger.payments].append(cost)
        return found

    @contextlib.contextmanager
    def serving(self, ledger: Ledger) -> Iterator[machine.Server]:
        arguments = subjects.paygate_arguments()
        env = {**self.env, "DATABASE_URL": ledger.url}
        with machine.serving(f"paygate-{ledger.payments}", arguments, env, self.folder) as server:
            yield server

    def work(self, server: machine.Server, ledger: Ledger, kind: str) -> Cost:
        requests = self.prepare(ledger, kind)
        database = self.cluster.pid or 0
        server_before, database_before = server.cpu_seconds(), machine.cpu_seconds(database)
        replies = load.send(server.port, iter(requests), CONNECTIONS, keep=kind == POST)
        time.sleep(1.2 if kind == GET else 0.1)  # a reader's wish to know soon is told to the worker once a second
        cost = Cost(
            (server.cpu_seconds() - server_before) / len(replies) * 1000,
            (machine.cpu_seconds(database) - database_before) / len(replies) * 1000,
        )
        if wrong := [reply for reply in replies if reply.status != (201 if kind == POST else 200)]:
            raise Void(f"{kind} on {ledger.name}: {len(wrong)} answers like {wrong[0].status} {wrong[0].body[:300]!r}")
        if kind == POST:
            ledger.unpaid += [json.loads(reply.body)["payment"]["reference"] for reply in replies]
        return cost

    def prepare(self, ledger: Ledger, kind: str) -> list[bytes]:
        number = self.options.requests
        match kind:
            case "POST":
                return list(itertools.islice(self.requests.posts(), number))
            case "GET":  # of any payment ever made, not of the latest alone
                return list(
                    self.requests.gets([history.payment_id(ledger.some()) for _ in range(2 * number)], 2 * number)
                )
        paid, ledger.unpaid = ledger.unpaid[:number], ledger.unpaid[number:]
        return list(self.requests.webhooks(paid))

    # Look-ups

    def run_lookups(self) -> dict[tuple[str, int], list[float]]:
        """Milliseconds of each piece of work, done through paygate's own functions, with all that is round it."""
        found: dict[tuple[str, int], list[float]] = defaultdict(list)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.environment())
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            for name, (prepare, work) in LOOKUPS.items():
                # What takes a fraction of a millisecond needs many.
                for number in range(self.options.lookups * (1 if "due" not in name else 5) + 1):
                    for ledger in self.in_turn():
                        os.environ["DATABASE_URL"] = ledger.url
                        if prepare:
                            prepare(ledger)
                        begun = time.perf_counter()
                        work(ledger)
                        if number:
                            found[name, ledger.payments].append((time.perf_counter() - begun) * 1000)
        return found

    @contextlib.contextmanager
    def environment(self) -> Iterator[None]:
        before = dict(os.environ)
        os.environ.update(self.env)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def idle_claims(self) -> dict[tuple[str, int], float]:
        """The server's own time of each claim that finds nothing due, in milliseconds: the median of many."""
        found = {}
        for ledger in self.ledgers:
            with db.Database(plans.explained(ledger.url, plans.SETTINGS), 1) as database:
                for name, claim in CLAIMS.items():
                    with plans.watch(self.cluster.log) as statements:
                        for _ in range(50):
                            if claim(database):
                                raise Void(f"{name} on {ledger.name}: something was due")
                    found[name, ledger.payments] = statistics.median(statement.ms for statement in statements)
        return found

    def run_metrics(self) -> dict[tuple[str, int], list[float]]:
        found: dict[tuple[str, int], list[float]] = defaultdict(list)
        request = load.request("GET", "/metrics", headers={"Authorization": f"Bearer {METRICS_TOKEN}"})
        with contextlib.ExitStack() as stack:
            servers = {ledger.payments: stack.enter_context(self.serving(ledger)) for ledger in self.ledgers}
            for number in range(self.options.lookups + 1):
                for ledger in self.in_turn():
                    (reply,) = load.send(servers[ledger.payments].port, iter([request]), 1)
                    if reply.status != 200:
                        raise Void(f"/metrics on {ledger.name}: {reply.status}")
                    if number:
                        found["/metrics", ledger.payments].append(reply.ms)
        return found

    def time_starts(self) -> dict[tuple[str, int], list[float]]:
        found: dict[tuple[str, int], list[float]] = defaultdict(list)
        for _ in range(self.options.starts):
            for ledger in self.in_turn():
                with self.serving(ledger) as server:
                    found["start-up", ledger.payments].append(server.ready_seconds * 1000)
        return found

    # What reads much

    def run_readings(self) -> dict[tuple[str, int], list[Reading]]:
        month = datetime.now(UTC) - timedelta(days=30)
        since = f"{month:%Y-%m-%d}"
        found: dict[tuple[str, int], list[Reading]] = defaultdict(list)
        for _ in range(self.options.readings):
            for ledger in self.in_turn():
                events = int(ledger.execute("SELECT count(*) FROM payment_events")[0][0])
                charges = int(
                    ledger.execute("SELECT count(*) FROM charges WHERE recorded_at >= %(since)s", since=month)[0][0]
                )
                for words, rows in (
                    (("audit",), events),
                    (("report", "--since", since), charges),
                    (("reconcile", "--since", since), charges),
                ):
                    found[words[0], ledger.payments].append(self.read(ledger, words, rows))
        return found

    def read(self, ledger: Ledger, words: tuple[str, ...], rows: int) -> Reading:
        """One command in a process of its own."""
        with Provider(ledger) as provider, tempfile.TemporaryFile() as printed:
            begun = time.monotonic()
            process = subprocess.Popen(
                [sys.executable, machine.PROJECT / "manage.py", *words],
                cwd=self.folder,
                env={
                    "PATH": os.environ["PATH"],
                    **self.env,
                    "DATABASE_URL": ledger.url,
                    "PAYSTACK_URL": provider.url,
                },
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
            )
            peak_kib = 0
            while process.poll() is None:
                # Not wait4's ru_maxrss: that of a child begins with what its parent had.
                peak_kib = max(peak_kib, peak_memory_kib(process.pid))
                time.sleep(0.005)
            seconds = time.monotonic() - begun
            if process.returncode:
                printed.seek(0)
                raise Void(f"{' '.join(words)} on {ledger.name}: {printed.read()[-500:].decode()}")
        return Reading(seconds, peak_kib / 1024, rows)

    # Just before autovacuum comes

    def run_worn(self) -> dict[tuple[str, int], list[float]]:
        """The server's own time, in milliseconds, of what reads where dead or new rows pile up."""
        found: dict[tuple[str, int], list[float]] = defaultdict(list)
        with contextlib.ExitStack() as stack:
            databases = {}
            for ledger in self.ledgers:
                wear(ledger)
                url = plans.explained(ledger.url, plans.SETTINGS)
                databases[ledger.payments] = stack.enter_context(db.Database(url, 1))
            for number in range(31):
                for name, work in WORN.items():
                    for ledger in self.in_turn():
                        with plans.watch(self.cluster.log) as statements:
                            work(databases[ledger.payments])
                        if number:  # the first meets the dead rows that the next ones pass over
                            found[name, ledger.payments].append(max(statement.ms for statement in statements))
        return found

    # Bytes on disk

    def bytes_on_disk(self) -> dict[tuple[str, int], tuple[float, float, int]]:
        """Of each table: bytes of a row in it (its TOAST too) and in its indexes, and how many rows it has."""
        found = {}
        for ledger in self.ledgers:
            for table in (*A_PAID_PAYMENT, "notifications", "refunds", "incidents"):
                ((heap, indexes, rows),) = ledger.execute(
                    f"SELECT pg_table_size('{table}'), pg_indexes_size('{table}'), count(*) FROM {table}"  # noqa: S608  # ours
                )
                found[table, ledger.payments] = heap / max(1, rows), indexes / max(1, rows), rows
        return found


def peak_memory_kib(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return 0


CLAIMS: dict[str, Callable[[db.Database], object]] = {
    "claim_due": lambda database: db.claim_due(database, "test", 1, 60),
    "claim_notification": lambda database: db.claim_notification(database, "test", 60),
    "claim_refunds": lambda database: db.claim_refunds(database, "test", 20, 60),
    "claim_events": lambda database: db.claim_events(database, "test", 20),
}


WORN: dict[str, Callable[[db.Database], object]] = {"claim_due": CLAIMS["claim_due"], "/metrics": db.metrics}


def wear(ledger: Ledger) -> None:
    """Vacuum, and then as many looks and new audit rows as there may be until autovacuum comes. No `audit` after it."""
    looks = rows_until_vacuum(ledger, "payments", "autovacuum_vacuum") // 3
    rows = rows_until_vacuum(ledger, "payment_events", "autovacuum_vacuum_insert")
    with psycopg.connect(ledger.url, autocommit=True) as conn:
        conn.execute("SET session_replication_role = replica")
        conn.execute("UPDATE payments SET look_at = now() + interval '1 day' WHERE look_at < now() + interval '1 h'")
        conn.execute("VACUUM (ANALYZE, INDEX_CLEANUP ON) payments, payment_events")
        conn.execute(
            """
            CREATE TEMPORARY TABLE looked AS
            SELECT id, row_number() OVER (ORDER BY look_at) * interval '1 ms' AS later
              FROM payments WHERE look_at IS NOT NULL ORDER BY look_at LIMIT %(looks)s
            """,
            {"looks": looks},
        )
        # Due, leased while the provider is asked, and due again some time: each leaves the one before it dead.
        for at in ("now() - interval '1 day'", "now() - interval '23 h'", "now() + interval '1 day'"):
            conn.execute(f"UPDATE payments p SET look_at = {at} + later FROM looked l WHERE l.id = p.id".encode())  # noqa: S608  # ours
        conn.execute(
            """
            INSERT INTO payment_events (payment_id, n, at, actor, why, from_status, to_status, amount_minor, currency,
                                        mode, reference, charged_minor, refunded_minor, hash)
            SELECT payment_id, n + 1000, now() - interval '2 days', actor, why, from_status, to_status, amount_minor,
                   currency, mode, reference, charged_minor, refunded_minor, hash
              FROM payment_events ORDER BY id LIMIT %(rows)s
            """,
            {"rows": rows},
        )


def rows_until_vacuum(ledger: Ledger, table: str, setting: str) -> int:
    """How many rows may die, or be new, until autovacuum looks after a table."""
    ((rows,),) = ledger.execute(
        """
        WITH chosen AS (
            SELECT option_name, option_value FROM pg_class, pg_options_to_table(reloptions)
             WHERE oid = %(table)s::regclass
        ), names (threshold, scale) AS (VALUES (%(setting)s || '_threshold', %(setting)s || '_scale_factor'))
        SELECT coalesce((SELECT option_value FROM chosen WHERE option_name = threshold),
                        current_setting(threshold))::float8
             + coalesce((SELECT option_value FROM chosen WHERE option_name = scale), current_setting(scale))::float8
             * (SELECT reltuples FROM pg_class WHERE oid = %(table)s::regclass)
          FROM names
        """,
        table=table,
        setting=setting,
    )
    return int(rows)


def make_payments_due(ledger: Ledger) -> None:
    ids = [history.payment_id(ledger.payments - n) for n in range(4 * DUE)]
    ledger.execute("UPDATE payments SET look_at = now() WHERE id = ANY(%(ids)s) AND look_at IS NOT NULL", ids=ids)


def make_notifications_due(ledger: Ledger) -> None:
    ids = [history.payment_id(ledger.payments - TODAY - n) for n in range(DUE)]
    ledger.execute(
        "UPDATE notifications SET due_at = now(), delivered_at = NULL WHERE payment_id = ANY(%(ids)s)", ids=ids
    )


def make_refunds_due(ledger: Ledger) -> None:
    ledger.execute(
        "UPDATE refunds SET look_at = now() WHERE id IN (SELECT id FROM refunds ORDER BY id LIMIT %(due)s)", due=DUE
    )


def make_events_due(ledger: Ledger) -> None:
    ledger.execute(
        """
        UPDATE provider_events SET outcome = 'received', retry_at = now(), applied_at = NULL
         WHERE id IN (SELECT id FROM provider_events ORDER BY id DESC LIMIT %(due)s)
        """,
        due=DUE,
    )


def claiming(name: str) -> Work:
    return lambda ledger: CLAIMS[name](ledger.database)


def look_soon(ledger: Ledger) -> None:
    """Of today's, which are those that people read: old ones the server would fetch from the disk first."""
    today = range(ledger.payments - TODAY + 1, ledger.payments + 1)
    ids = [history.payment_id(number) for number in ledger.random.sample(today, 20)]
    db.look_soon(ledger.database, ids, ids)


def command(*words: str) -> Work:
    return lambda _: manage.main(words)


def a_year_ago() -> str:
    return f"{datetime.now(UTC) - timedelta(days=365):%Y-%m-%d}"


LOOKUPS: dict[str, tuple[Callable[[Ledger], None] | None, Work]] = {
    **{f"{name}, nothing due": (None, claiming(name)) for name in CLAIMS},
    "look_soon, 20 payments": (None, look_soon),
    "claim_due, some due": (make_payments_due, claiming("claim_due")),
    "claim_notification, some due": (make_notifications_due, claiming("claim_notification")),
    "claim_refunds, some due": (make_refunds_due, claiming("claim_refunds")),
    "claim_events, some due": (make_events_due, claiming("claim_events")),
    "list": (None, command("list")),
    "list --until a year ago": (None, command("list", "--until", a_year_ago())),
    "list --email": (
        None,
        lambda ledger: manage.main(["list", "--email", history.email(ledger.some(), ledger.payments)]),
    ),
    "show": (None, lambda ledger: manage.main(["show", history.payment_id(ledger.some())])),
    "erase --email": (
        None,
        lambda ledger: manage.main(["erase", "--yes", "--email", history.email(ledger.some(), ledger.payments)]),
    ),
    "migrate": (None, lambda ledger: db.migrate(ledger.url)),
}


class Provider:
    """Paystack's lists, as they would be if our books were right: what `reconcile` reads, page after page."""

    QUERIES: ClassVar = {
        "/transaction": """
            SELECT json_build_object('id', provider_id, 'domain', 'test', 'status', 'success', 'reference', reference,
                   'amount', amount_minor, 'requested_amount', requested_minor, 'currency', currency,
                   'fees', fees_minor, 'channel', channel, 'paid_at', paid_at)::text
              FROM charges WHERE recorded_at >= %(since)s
        """,
        "/refund": """
            SELECT json_build_object('id', provider_id, 'domain', 'test', 'status', status, 'transaction_reference',
                   charge_reference, 'amount', amount_minor, 'currency', currency, 'merchant_note', id)::text
              FROM refunds WHERE processed_at >= %(since)s
        """,
    }

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.rows: Iterator[str] = iter(())

    def __enter__(self) -> "Provider":
        provider = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                provider.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if asked["page"] == "1":
            self.rows = self.list(parts.path, asked["from"])
        rows = itertools.islice(self.rows, int(asked["perPage"]))
        body = f'{{"status": true, "message": "", "data": [{", ".join(rows)}]}}'.encode()
        request.send_response(200)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    def list(self, path: str, since: str) -> Iterator[str]:
        with psycopg.connect(self.ledger.url) as conn, conn.cursor(name="provider") as cursor:
            cursor.execute(self.QUERIES[path].encode(), {"since": since})
            for row in cursor:
                yield row[0]


# The report


class Report:
    """The tables, and the goals that were missed."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.missed: list[str] = []

    def compare(self, what: str, values: list[list[float]]) -> list[str]:
        """The median at each size, and how much more the largest needs than the smallest: the median of the rounds'
        ratios, for what the machine does besides falls on a whole round."""
        medians = [statistics.median(each) for each in values]
        ratio = statistics.median(most / least for least, most in zip(values[0], values[-1], strict=True))
        if ratio > GOAL and medians[-1] - medians[0] > NOTHING_MS:
            self.missed.append(f"{what}: {ratio:.2f} times, the goal is {GOAL:g}")
        return [*(f"{median:.2f}" for median in medians), f"{ratio:.2f}"]

    def ratio(self, what: str, values: list[float]) -> str:
        ratio = values[-1] / values[0]
        if ratio > GOAL:
            self.missed.append(f"{what}: {ratio:.2f} times, the goal is {GOAL:g}")
        return f"{ratio:.2f}"

    def header(self, first: str, unit: str) -> list[str]:
        return [first, *(f"{size:,}, {unit}" for size in self.sizes), "ratio"]

    def requests(self, found: dict[tuple[str, int], list[Cost]]) -> None:
        rows = [self.header("CPU of a request", "ms")]
        for kind in (POST, GET, WEBHOOK):
            costs = [found[kind, size] for size in self.sizes]
            together = [[cost.server_ms + cost.database_ms for cost in each] for each in costs]
            rows.append([kind, *self.compare(kind, together)])
            alone = [[cost.database_ms for cost in each] for each in costs]
            rows.append([f"{kind}, the database alone", *self.compare(f"{kind}, the database alone", alone)])
        print_table(rows)
        print()

    def lookups(self, found: dict[tuple[str, int], list[float]]) -> None:
        rows = [self.header("one after the other", "ms")]
        for name in dict.fromkeys(name for name, _ in found):
            rows.append([name, *self.compare(name, [found[name, size] for size in self.sizes])])
        print_table(rows)
        print()

    def idle_claims(self, found: dict[tuple[str, int], float]) -> None:
        rows = [[*self.header("nothing due, in the server alone", "ms")[:-1], "goal"]]
        for name in CLAIMS:
            values = [found[name, size] for size in self.sizes]
            if max(values) >= IDLE_CLAIM_GOAL_MS:
                self.missed.append(f"{name} with nothing due: {max(values):.2f} ms")
            rows.append([name, *(f"{value:.3f}" for value in values), f"under {IDLE_CLAIM_GOAL_MS:g}"])
        print_table(rows)
        print()

    def worn(self, found: dict[tuple[str, int], list[float]]) -> None:
        rows = [self.header("just before autovacuum, in the server alone", "ms")]
        for name in WORN:
            values = [found[name, size] for size in self.sizes]
            rows.append([name, *self.compare(f"{name} just before autovacuum", values)])
        print_table(rows)
        print()

    def readings(self, found: dict[tuple[str, int], list[Reading]]) -> None:
        rows = [["at a stretch", *(f"{size:,}" for size in self.sizes), "ratio of a row", "of memory"]]
        for name in dict.fromkeys(name for name, _ in found):
            each = [min(found[name, size], key=lambda reading: reading.seconds) for size in self.sizes]
            cells = [f"{one.seconds:.1f} s, {one.memory_mib:.0f} MiB, {one.rows:,} rows" for one in each]
            a_row = self.ratio(f"{name}, a row", [one.seconds / one.rows for one in each])
            memory = self.ratio(f"{name}, memory", [one.memory_mib for one in each])
            rows.append([name, *cells, a_row, memory])
        print_table(rows)
        print()

    def disk(self, found: dict[tuple[str, int], tuple[float, float, int]]) -> None:
        rows = [["bytes of a row, table + indexes (rows for one payment)", *(f"{size:,}" for size in self.sizes)]]
        for table in dict.fromkeys(table for table, _ in found):
            cells = []
            for size in self.sizes:
                heap, indexes, count = found[table, size]
                cells.append(f"{heap:.0f} + {indexes:.0f} ({count / size:.3f})")
            rows.append([table, *cells])
        paid = [
            sum(
                number * sum(found[table, size][:2])
                for table, number in A_PAID_PAYMENT.items()
                if table != "provider_events"
            )
            for size in self.sizes
        ]
        events = [sum(found["provider_events", size][:2]) for size in self.sizes]
        everything = [
            sum((heap + indexes) * count for (_, of), (heap, indexes, count) in found.items() if of == size) / size
            for size in self.sizes
        ]
        rows.append(["a paid payment with its key, audit rows and charge", *(f"{value:.0f}" for value in paid)])
        rows.append(["… and its webhook", *(f"{one + other:.0f}" for one, other in zip(paid, events, strict=True))])
        rows.append(["all there is, for each payment", *(f"{value:.0f}" for value in everything)])
        if paid[-1] > PAID_GOAL_BYTES:
            self.missed.append(f"a paid payment takes {paid[-1]:.0f} bytes, the goal is {PAID_GOAL_BYTES:,}")
        print_table(rows)
        print()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench-growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="10 and 100 thousand payments, in about two minutes")
    size.add_argument("--full", action="store_true", help="5 million payments too")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000), help="of the order (random)")
    options = parser.parse_args()
    options.sizes = [SMALL, MIDDLE] if options.quick else [SMALL, LARGE, *([HUGE] if options.full else [])]
    options.rounds, options.requests = (6, 150) if options.quick else (12, 300)
    options.lookups, options.starts, options.readings = 31, *((3, 1) if options.quick else (5, 2))
    return options


def main() -> int:
    if sys.platform != "linux":
        sys.exit("bench-growth: it reads the processor's time from Linux's /proc")
    options = parse_options()
    needed = sum(options.sizes) * BYTES_OF_A_PAYMENT + BYTES_BESIDES
    free = shutil.disk_usage("/var/tmp").free  # noqa: S108  # only asked how much room is there
    if free < needed:
        sys.exit(f"bench-growth: /var/tmp has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begun = time.monotonic()
    report = Report(options.sizes)
    with contextlib.ExitStack() as stack:
        try:
            print(f"seed {options.seed}; {machine.describe()}; load before it {os.getloadavg()[0]:.2f}", flush=True)
            growth = Growth(stack, options)
            print()
            report.disk(growth.bytes_on_disk())
            report.idle_claims(growth.idle_claims())
            report.lookups(growth.run_lookups() | growth.run_metrics() | growth.time_starts())
            report.readings(growth.run_readings())
            report.requests(growth.run_requests())
            report.worn(growth.run_worn())
        except (Void, load.LoadError, machine.NotReady) as error:
            print(f"VOID: {error}")
            return 1
        except KeyboardInterrupt:
            return 130
    print(f"{time.monotonic() - begun:.0f} s in all")
    for missed in report.missed:
        print(f"MISSED: {missed}")
    return 1 if report.missed else 0


if __name__ == "__main__":
    sys.exit(main())
