"""Measure paygate against the floor and a Django app: `make bench`; ARGS=--quick takes under two minutes.

Every figure comes from one run on one machine. In randomised rounds the floor, paygate, the Django app and the floor
once more, as a control, do the same work on databases of one PostgreSQL, with the sandbox as the provider in a process
of its own. What counts is the processor's time for 1,000 requests, of gunicorn with its workers and of the database;
requests a second vary too much. Then each takes POSTs while the provider is slow, and starts a few times; and paygate
and the Django app are asked what they do with what goes wrong.

The Django app is installed into .venv-bench at the first run. Where that does not work the run goes on without it, and
says so; --quick leaves it out unless --with-django.

The run is void, and says so, when the control is more than 15 % off the floor, when any answer is neither 2xx nor the
bulkhead's 503, when answers and rows differ in number, or when paygate does the wrong thing.
"""

import argparse
import contextlib
import itertools
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg

import db
import embedded
from bench import environment, floor, load, machine, report, subjects
from bench.machine import Server
from bench.promises import Asker
from bench.report import Sample, Samples, SlowRun, Statements
from bench.subjects import GET, POST, WEBHOOK, WEBHOOK_ONE, Requests, Subject

CONNECTIONS = 16
SLOW_PROVIDER_SECONDS = 0.3
SLOW_CONNECTIONS = 256
LEAST_ROUNDS = 8
PLAIN = {"processes": 1, "threads": 64, "django_python": "", "floor_prepares": False}
"""The options that Bench reads, for those who measure something else with it."""


class Void(Exception):
    """The run says nothing, and why."""


class Bench:
    def __init__(self, stack: contextlib.ExitStack, options: argparse.Namespace) -> None:
        self.stack = stack
        self.options = options
        self.random = random.Random(options.seed)  # noqa: S311  # printed, to be run again
        # On a disk, as a database is: /tmp is in memory on many machines.
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="paygate-bench-", dir="/var/tmp")))
        self.folder.chmod(0o711)  # where we are root, the database's user has to pass
        self.cluster = stack.enter_context(embedded.database(self.folder / "postgres"))
        self.cluster_pid = self.cluster.pid or 0
        self.sandbox_url = stack.enter_context(sandbox(self.folder))
        self.requests = Requests(options.seed, self.sandbox_url)
        self.env = {
            "PAYSTACK_SECRET_KEY": subjects.SECRET_KEY,
            "PAYSTACK_URL": self.sandbox_url,
            "WEB_CONCURRENCY": str(options.processes),
            "THREADS": str(options.threads),
            "DB_POOL": "8",
            "RATE_LIMIT": "1000000/second",  # all requests come from one address; it is counted, and never over
            "FLOOR_PREPARES": "1" if options.floor_prepares else "",
        }
        self.bare = subjects.floor_arguments({**self.env, "DATABASE_URL": self.cluster.url}, self.folder)
        self.make: dict[str, Callable[[str], Subject]] = {"floor": self.floor_subject, "paygate": self.paygate_subject}
        if options.django_python:
            self.make["django"] = self.django_subject
        self.subjects = {name: make(name) for name, make in self.make.items()}
        self.floor, self.paygate = self.subjects["floor"], self.subjects["paygate"]
        self.control = self.floor_subject("control")
        self.control.name = "control"
        self.everyone = [*self.subjects.values(), self.control]

    def database(self, name: str) -> str:
        with psycopg.connect(self.cluster.url, autocommit=True) as conn:
            conn.execute(psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(name)))
        return self.cluster.url.replace("/postgres?", f"/{name}?")

    def floor_subject(self, database: str) -> Subject:
        url = self.database(database)
        with psycopg.connect(url) as conn:
            conn.execute(floor.SCHEMA)
        return Subject("floor", self.bare, url, subjects.FLOOR_COUNTS)

    def paygate_subject(self, database: str) -> Subject:
        url = self.database(database)
        db.migrate(url)
        return Subject("paygate", subjects.paygate_arguments(), url, subjects.PAYGATE_COUNTS)

    def django_subject(self, database: str) -> Subject:
        url, python = self.database(database), self.options.django_python
        subjects.migrate_django(python, {**self.env, "DATABASE_URL": url})
        return Subject("django", subjects.django_arguments(self.bare), url, subjects.DJANGO_COUNTS, python)

    @contextlib.contextmanager
    def serving(self, subject: Subject, **env: str) -> Iterator[Server]:
        env = {**self.env, "DATABASE_URL": subject.database_url, **env}
        with machine.serving(subject.name, subject.arguments, env, self.folder, subject.python) as server:
            yield server

    # Rounds

    def run_rounds(self) -> tuple[Samples, Statements]:
        """All rounds, and how many statements each request costs each subject."""
        samples: Samples = defaultdict(list)
        with contextlib.ExitStack() as stack:
            # The background worker is off: its looks at unpaid payments are no part of the requests.
            servers = {
                subject.name: stack.enter_context(self.serving(subject, RUN_WORKER="0")) for subject in self.everyone
            }
            self.work_all(servers, number=100)
            statements = self.count_statements(servers)
            for number in range(1, self.options.rounds + 1):
                if sys.stderr.isatty():
                    print(f"\rround {number} of {self.options.rounds} ", end="", file=sys.stderr, flush=True)
                for key, sample in self.work_all(servers, self.options.requests):
                    samples[key].append(sample)
        return samples, statements

    def work_all(self, servers: dict[str, Server], number: int) -> list[tuple[tuple[str, str], Sample]]:
        """One round: each kind of work by each subject, in random order."""
        found = []
        for kind, doers in (
            (POST, self.everyone),
            (GET, self.everyone),
            (WEBHOOK, self.everyone),
            (WEBHOOK_ONE, [self.floor]),
        ):
            for subject in self.random.sample(doers, len(doers)):
                found.append(((kind, subject.name), self.work(servers[subject.name], subject, kind, number)))
        return found

    def work(self, server: Server, subject: Subject, kind: str, number: int) -> Sample:
        """One kind of work by one subject, see `measure`."""

        def send(requests: list[bytes]) -> list[load.Reply]:
            return load.send(server.port, iter(requests), CONNECTIONS, keep=kind == POST)

        return self.measure(subject, kind, number, send, server.cpu_seconds)

    def measure(
        self,
        subject: Subject,
        kind: str,
        number: int,
        send: Callable[[list[bytes]], list[load.Reply]],
        cpu_seconds: Callable[[], float],
    ) -> Sample:
        """What one kind of work cost: `send` does it, `cpu_seconds` is what whoever does it has used.

        Raises Void when answers and rows do not agree.
        """
        requests, expected, after_seconds = self.prepare(subject, kind, number)
        rows, calls = subject.count(kind), self.provider_calls()
        server_before, database_before = cpu_seconds(), machine.cpu_seconds(self.cluster_pid)
        replies = send(requests)
        time.sleep(after_seconds)
        server_spent = cpu_seconds() - server_before
        database_spent = machine.cpu_seconds(self.cluster_pid) - database_before
        self.check(subject, kind, replies, expected, subject.count(kind) - rows, self.provider_calls() - calls)
        if kind == POST:
            subject.learn(replies)
        return Sample(
            server_spent / len(replies) * 1000, database_spent / len(replies) * 1000, [reply.ms for reply in replies]
        )

    def prepare(self, subject: Subject, kind: str, number: int) -> tuple[list[bytes], int, float]:
        """The requests, made before the clock runs; the status that each must get; and how long what they set off goes
        on after the last answer (a reader's wish to know soon is told to the worker once a second)."""
        match kind:
            case "POST":
                return list(itertools.islice(self.requests.posts(), number)), 201, 0.1
            case "GET":
                return list(self.requests.gets(subject.known, 3 * number)), 200, 1.2
            case "webhook":
                references = [subject.unpaid.pop(0)[1] for _ in range(number)]
                return list(self.requests.webhooks(references)), 200, 0.1
        references = self.seed_floor(subject, number)
        return list(self.requests.webhooks(references, "/api/v1/webhooks/one-statement")), 200, 0.1

    def seed_floor(self, subject: Subject, number: int) -> list[str]:
        """Unpaid payments on the floor's database, without its HTTP."""
        with psycopg.connect(subject.database_url) as conn:
            rows = conn.execute(
                """
                INSERT INTO payments (id, reference, amount_minor, currency, customer_name, customer_email,
                                      customer_phone, location)
                SELECT 'PAY-' || gen_random_uuid(), 'PG-' || gen_random_uuid(), 5000, 'NGN', 'John Doe',
                       'john@example.com', '+2348012345678', 'Lagos'
                  FROM generate_series(1, %s)
                RETURNING reference
                """,
                (number,),
            ).fetchall()
        return [row[0] for row in rows]

    def provider_calls(self) -> int:
        """How many checkouts the provider has been asked to open."""
        return int(subjects.ask(self.sandbox_url, "GET", "/_sandbox/calls?endpoint=initialize")["result"])

    def check(
        self, subject: Subject, kind: str, replies: list[load.Reply], expected: int, rows: int, calls: int
    ) -> None:
        """Raises Void unless every answer is as expected, and has left its row and made its one call."""
        statuses = Counter(reply.status for reply in replies)
        if set(statuses) != {expected}:
            other = next(reply for reply in replies if reply.status != expected)
            raise Void(f"{subject.name}, {kind}: {dict(statuses)}, among them {other.body[:300]!r}")
        if kind in subject.counts and rows != len(replies):
            raise Void(f"{subject.name}, {kind}: {len(replies)} answers, {rows} rows")
        if calls != (len(replies) if kind == POST else 0):
            raise Void(f"{subject.name}, {kind}: {len(replies)} answers, {calls} calls to the provider")

    def count_statements(self, servers: dict[str, Server]) -> Statements:
        """How many statements one request sends to the database, BEGIN and COMMIT counted, by the database's log."""
        self.set_log_statement("all")
        counts = {}
        for kind in (POST, GET, WEBHOOK, WEBHOOK_ONE):
            for subject in self.subjects.values():
                if kind != WEBHOOK_ONE or subject is self.floor:
                    requests, _, _ = self.prepare(subject, kind, 1)
                    begins = self.cluster.log.stat().st_size
                    subject.learn(load.send(servers[subject.name].port, iter(requests[:1]), 1))
                    time.sleep(0.1)
                    logged = self.cluster.log.read_bytes()[begins:].decode(errors="replace")
                    counts[kind, subject.name] = len(re.findall(r"LOG:  (?:statement|execute [^:]*):", logged))
        self.set_log_statement("none")
        for kind in (POST, GET, WEBHOOK):
            if counts[kind, "floor"] > counts[kind, "paygate"]:
                raise Void(f"the floor does more statements than paygate for a {kind}: {counts}")
        return counts

    def set_log_statement(self, value: str) -> None:
        with psycopg.connect(self.cluster.url, autocommit=True) as conn:
            conn.execute(psycopg.sql.SQL("ALTER SYSTEM SET log_statement = {}").format(psycopg.sql.Literal(value)))
            conn.execute("SELECT pg_reload_conf()")
        time.sleep(0.3)

    # A slow provider, memory, the start, what goes wrong

    def run_slow_provider(self, make: Callable[[str], Subject]) -> SlowRun:
        """As many POSTs as get through while each call to the provider takes 0.3 s; as the service runs by default."""
        subject = make(f"slow_{secrets.token_hex(4)}")
        subjects.ask(self.sandbox_url, "POST", "/_sandbox/configure", {"latency_seconds": SLOW_PROVIDER_SECONDS})
        try:
            with self.serving(subject) as server:
                begins = time.monotonic() + 2  # until every connection is at work
                ends = begins + self.options.slow_seconds
                replies = load.send(server.port, self.requests.posts(), SLOW_CONNECTIONS, until=ends)
                used = server.cpu_seconds()
                memory = machine.memory(server.pid)
        finally:
            subjects.ask(self.sandbox_url, "POST", "/_sandbox/configure", {"latency_seconds": 0})
        accepted = [reply for reply in replies if reply.status == 201]
        refused = [reply for reply in replies if reply.is_busy]
        if len(accepted) + len(refused) != len(replies):
            other = next(reply for reply in replies if reply.status != 201 and not reply.is_busy)
            statuses = Counter(reply.status for reply in replies)
            raise Void(f"{subject.name}, slow provider: {statuses}, among them {other.body[:300]!r}")
        if subject.count(POST) != len(accepted):
            raise Void(f"{subject.name}, slow provider: {len(accepted)} answers, {subject.count(POST)} rows")
        within = [reply for reply in accepted if begins <= reply.answered_at < ends]
        return SlowRun(
            accepted_per_second=len(within) / (ends - begins),
            refused_per_second=sum(begins <= reply.answered_at < ends for reply in refused) / (ends - begins),
            cpu_seconds=used / len(accepted) * 1000,
            latencies_ms=[reply.ms for reply in within],
            memory=memory,
        )

    @property
    def capacity_per_second(self) -> float:
        """What paygate's slots for the provider can take while it is slow."""
        slots = max(1, self.options.threads * 3 // 4)
        return float(self.options.processes * slots / SLOW_PROVIDER_SECONDS)

    def time_starts(self) -> dict[str, list[float]]:
        """Seconds from the start of gunicorn to the first 200, with the defaults, on a database that has its schema."""
        found: dict[str, list[float]] = defaultdict(list)
        for _ in range(self.options.starts):
            for subject in self.random.sample(list(self.subjects.values()), len(self.subjects)):
                with self.serving(subject) as server:
                    found[subject.name].append(server.ready_seconds)
        return found

    def ask_promises(self, make: Callable[[str], Subject]) -> dict[str, bool]:
        subject = make(f"promises_{secrets.token_hex(4)}")
        with self.serving(subject) as server:
            return Asker(server, subject, self.requests, self.sandbox_url).ask_all()


@contextlib.contextmanager
def sandbox(folder: Path) -> Iterator[str]:
    """The provider's stand-in, in a process of its own; its address."""
    with (folder / "sandbox.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, machine.PROJECT / "sandbox.py", f"--secret-key={subjects.SECRET_KEY}"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    try:
        line = process.stdout.readline() if process.stdout else ""
        if "ready on" not in line:
            raise machine.NotReady(f"the sandbox does not start: {(folder / 'sandbox.log').read_text()}")
        yield line.split()[-1]
    finally:
        process.terminate()
        process.wait(10)


def print_settings(bench: Bench, options: argparse.Namespace) -> None:
    with psycopg.connect(bench.cluster.url) as conn:
        row = conn.execute(
            "SELECT concat_ws(', ', 'PostgreSQL ' || current_setting('server_version'), 'fsync ' ||"
            " current_setting('fsync'), 'shared_buffers ' || current_setting('shared_buffers'))"
        ).fetchone()
    gunicorn = subjects.plain_settings(bench.floor.arguments[0].partition("=")[2])
    print(f"seed {options.seed}; {machine.describe()}; load before it {os.getloadavg()[0]:.2f}")
    print(
        f"{row[0] if row else ''}; gunicorn: {gunicorn['workers']} processes × {gunicorn['threads']} threads, pool of 8"
    )
    print(
        f"{options.rounds} rounds of {options.requests} POSTs, {3 * options.requests} GETs, {options.requests} webhooks"
        f" by {CONNECTIONS} connections; paygate's worker off in the rounds, on after them; it alone logs requests"
    )
    print(f"paygate prepares its statements; the floor {'does too' if options.floor_prepares else 'does not'}")
    print(f"Django: {options.django_note}\n", flush=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer requests: less exact, in under two minutes")
    django = parser.add_mutually_exclusive_group()
    django.add_argument(
        "--with-django", action="store_true", help="also with --quick; void where it cannot be installed"
    )
    django.add_argument("--without-django", action="store_true", help="paygate and the floor alone")
    parser.add_argument("--floor-prepares", action="store_true", help="the floor's statements are prepared too")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000), help="of the order (random)")
    parser.add_argument("--rounds", type=int, help=f"at least {LEAST_ROUNDS}")
    parser.add_argument("--requests", type=int, help="POSTs of one subject in one round")
    parser.add_argument("--processes", type=int, default=2, help="WEB_CONCURRENCY (2)")
    parser.add_argument("--threads", type=int, default=64, help="THREADS (64)")
    options = parser.parse_args()
    options.rounds = options.rounds or (LEAST_ROUNDS if options.quick else 12)
    options.requests = options.requests or (200 if options.quick else 800)
    options.starts = 3 if options.quick else 7
    options.slow_seconds = 6 if options.quick else 15
    if options.rounds < LEAST_ROUNDS or options.requests < 100:
        parser.error(f"fewer than {LEAST_ROUNDS} rounds of 100 requests say nothing")
    return options


def find_django(options: argparse.Namespace) -> None:
    """Decide whether the Django app takes part, and say why. Raises NotInstalled where it was asked for by name."""
    options.django_python = ""
    options.django_note = "left out (--with-django has it)"
    if options.with_django or not (options.quick or options.without_django):
        try:
            options.django_python = environment.python()
            options.django_note = environment.describe()
        except environment.NotInstalled as error:
            if options.with_django:
                raise
            options.django_note = f"left out: {error}"


def main() -> int:
    if sys.platform != "linux":
        sys.exit("bench: it reads the processor's time from Linux's /proc")
    options = parse_options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        try:
            find_django(options)
            bench = Bench(stack, options)
            print_settings(bench, options)
            samples, statements = bench.run_rounds()
            slow = {name: bench.run_slow_provider(make) for name, make in bench.make.items()}
            starts = bench.time_starts()
            promises = {name: bench.ask_promises(make) for name, make in bench.make.items() if name != "floor"}
        except (Void, environment.NotInstalled, load.LoadError, machine.NotReady) as error:
            print(f"VOID: {error}")
            return 1
        except KeyboardInterrupt:
            return 130
    void = report.print_requests(samples, statements)
    slow_load = f"{SLOW_CONNECTIONS} clients, provider at {SLOW_PROVIDER_SECONDS:g} s"
    report.print_rest(slow, slow_load, bench.capacity_per_second, starts)
    void += report.print_promises(promises)
    print(f"\n{time.monotonic() - begun:.0f} s in all")
    for reason in void:
        print(f"VOID: {reason}")
    return 1 if void else 0


if __name__ == "__main__":
    sys.exit(main())
