"""After an outage: `make bench-drain`, or `make bench-drain ARGS=--quick`.

100,000 payments are due for a look and 100,000 notifications wait, at the same time. One `manage.py worker` drains them
for a while, and stands still for a while, turn by turn; meanwhile a web process of its own takes new payments. Shown is
at what rate the two queues shrink, whether the oldest went first, how often the provider was asked in the busiest
second, that nobody asks it while it wants quiet, and what a new payment costs with and without all that.
"""

import argparse
import contextlib
import secrets
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import psycopg

import worker
from bench import load, machine, subjects
from bench.__main__ import PLAIN, Bench, Void
from bench.machine import Server
from bench.report import percentile, print_table
from bench.subjects import Subject
from torture.receiver import NOTIFY_SECRET, Receiver

CONNECTIONS = 4
QUIET_SECONDS = 5
LEAST_NOTIFICATIONS_PER_SECOND = 40
MOST_CPU_RATIO = 1.2

# Payments whose time is over and whose checkout was never opened: a look finds that they do not exist at the provider,
# and ends them. Each has a notification that nobody has taken yet.
FILL = """
WITH made AS (
    INSERT INTO payments (id, mode, amount_minor, currency, reference, customer_name, customer_email, customer_phone,
                          location, source, created_at, expires_at, look_at, notified)
    SELECT 'PAY-' || upper(left(md5('payment ' || n), 26)), 'test', 5000, 'NGN',
           'PG-' || upper(left(md5('reference ' || n), 26)), 'John Doe', 'john@example.com', '+2348012345678', 'Lagos',
           'api', now() - interval '1 day' - interval '1 s' * n, now() - interval '1 h',
           now() - interval '1 min' - interval '1 ms' * n, 1
      FROM generate_series(1, %(count)s) AS n
    RETURNING id, look_at
), keys AS (
    INSERT INTO idempotency_keys (mode, key, fingerprint, payment_id, token)
    SELECT 'test', sha256(convert_to('key ' || id, 'UTF8')), sha256(convert_to(id, 'UTF8')), id, gen_random_uuid()
      FROM made
)
INSERT INTO notifications (mode, type, payment_id, sequence, facts, made_at, due_at)
SELECT 'test', 'payment.pending', id, 1,
       '{"status": "pending", "status_reason": null, "attempt": 1, "checkout_url": null, "charge_reference": null,
         "charged_minor": 0, "refunded_minor": 0, "paid_at": null}', look_at, look_at
  FROM made
"""


@dataclass
class Phase:
    """Some seconds of new payments, with the worker at work or not."""

    cpu_seconds: list[float] = field(default_factory=list)
    """Of the web process, for 1,000 POSTs."""
    latencies_ms: list[float] = field(default_factory=list)


class Drain:
    def __init__(self, stack: contextlib.ExitStack, options: argparse.Namespace) -> None:
        self.options = options
        self.bench = Bench(stack, options)
        self.receiver = stack.enter_context(Receiver())
        self.subject: Subject = self.bench.paygate_subject("drain")
        with psycopg.connect(self.subject.database_url) as conn:
            conn.execute(FILL, {"count": options.count})
        with psycopg.connect(self.subject.database_url, autocommit=True) as conn:
            conn.execute("VACUUM ANALYZE")
        self.env = {
            **self.bench.env,
            "DATABASE_URL": self.subject.database_url,
            "NOTIFY_URL": self.receiver.url,
            "NOTIFY_SECRET": NOTIFY_SECRET,
        }
        self.server: Server = stack.enter_context(self.bench.serving(self.subject, RUN_WORKER="0", WEB_CONCURRENCY="1"))
        self.draining_seconds = 0.0
        self.most_calls = 0

    @contextlib.contextmanager
    def draining(self) -> Iterator[None]:
        """With a worker that has begun to look."""
        with (self.bench.folder / "worker.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, machine.PROJECT / "manage.py", "worker"],
                cwd=self.bench.folder,
                env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(machine.PROJECT), **self.env},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            before = self.done()
            wait_until(lambda: self.done() > before)
            yield
        finally:
            process.terminate()
            process.wait(30)

    def run(self) -> tuple[Phase, Phase]:
        quiet, busy = Phase(), Phase()
        self.take_payments(Phase(), seconds=2)  # warms up
        for _ in range(self.options.rounds):
            self.take_payments(quiet, self.options.seconds)
            with self.draining(), self.counting_calls():
                self.take_payments(busy, self.options.seconds)
        return quiet, busy

    def take_payments(self, phase: Phase, seconds: float) -> None:
        """As many as one at a time on a few connections makes."""
        before = self.server.cpu_seconds()
        replies = load.send(
            self.server.port,
            self.bench.requests.posts(),
            CONNECTIONS,
            until=time.monotonic() + seconds,
        )
        if {reply.status for reply in replies} != {201}:
            raise Void(f"POST: {sorted({reply.status for reply in replies})}")
        phase.cpu_seconds.append((self.server.cpu_seconds() - before) / len(replies) * 1000)
        phase.latencies_ms += [reply.ms for reply in replies]

    @contextlib.contextmanager
    def counting_calls(self) -> Iterator[None]:
        """Notes the busiest second at the provider, and for how long that was watched."""
        is_over = threading.Event()
        seen: list[tuple[float, int]] = []

        def watch() -> None:
            while not is_over.wait(0.1):
                seen.append((time.monotonic(), self.verify_calls()))

        thread = threading.Thread(target=watch)
        started = time.monotonic()
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()
            self.draining_seconds += time.monotonic() - started
        for at, count in seen:
            later = [other - count for moment, other in seen if at <= moment <= at + 1]
            self.most_calls = max(self.most_calls, *later)

    def verify_calls(self) -> int:
        return int(subjects.ask(self.bench.sandbox_url, "GET", "/_sandbox/calls?endpoint=verify")["result"])

    def done(self) -> int:
        return self.number("SELECT count(*) FROM payments WHERE looked_at IS NOT NULL")

    def number(self, statement: str) -> int:
        with psycopg.connect(self.subject.database_url) as conn:
            row = conn.execute(statement.encode()).fetchone()
        return int(row[0] or 0) if row else 0

    def overtaken(self) -> tuple[int, int]:
        """How many that were due long before the last one that was done still wait: looks, and notifications."""
        return (
            self.number(
                """
                SELECT count(*) FROM payments
                 WHERE looked_at IS NULL AND created_at < now() - interval '1 h'
                   AND created_at < (SELECT max(created_at) FROM payments
                                      WHERE looked_at IS NOT NULL AND created_at < now() - interval '1 h')
                                    - interval '60 s'
                """
            ),
            self.number(
                """
                SELECT count(*) FROM notifications
                 WHERE type = 'payment.pending' AND delivered_at IS NULL
                   AND made_at < (SELECT max(made_at) FROM notifications
                                   WHERE type = 'payment.pending' AND delivered_at IS NOT NULL) - interval '60 ms'
                """
            ),
        )

    def calls_while_quiet(self) -> int:
        """How often the provider is asked after a 429 that asks for QUIET_SECONDS, until these are over."""
        with self.draining():
            fault = {"endpoint": "verify", "name": "429-retry-after", "retry_after": QUIET_SECONDS}
            subjects.ask(self.bench.sandbox_url, "POST", "/_sandbox/fault", fault)
            time.sleep(1)  # until it is met, and what was under way at that moment has come
            calls = self.verify_calls()
            time.sleep(QUIET_SECONDS - 2)
            return self.verify_calls() - calls


def wait_until(is_true: Callable[[], bool], within_seconds: float = 30) -> None:
    deadline = time.monotonic() + within_seconds
    while not is_true():
        if time.monotonic() > deadline:
            raise Void("the worker does nothing")
        time.sleep(0.05)


def report(drain: Drain, quiet: Phase, busy: Phase) -> list[str]:
    """Print the table, and return what misses its goal."""
    # What a worker did before its first second was counted is left out of neither: it is a fraction of a percent.
    looks = drain.done() / drain.draining_seconds
    delivered = drain.number("SELECT count(*) FROM notifications WHERE delivered_at IS NOT NULL")
    notified = delivered / drain.draining_seconds
    overtaken = drain.overtaken()
    calls = drain.calls_while_quiet()
    cpu = statistics.median(busy.cpu_seconds) / statistics.median(quiet.cpu_seconds)
    print_table(
        [
            ["", "a second", f"{drain.options.count:,} take", "overtaken"],
            ["looks", f"{looks:.1f}", duration(drain.options.count / looks), str(overtaken[0])],
            ["notifications", f"{notified:.1f}", duration(drain.options.count / notified), str(overtaken[1])],
        ]
    )
    print(
        f"\nBy one process. The provider was asked {drain.most_calls} times in its busiest second (at most"
        f" {worker.LOOKS_PER_SECOND}), and {calls} times while it wanted {QUIET_SECONDS} s of quiet.\n"
    )
    print_table(
        [
            ["new payments", "p50, ms", "p99, ms", "CPU for 1,000, s"],
            *(
                [
                    name,
                    f"{percentile(phase.latencies_ms, 0.5):.1f}",
                    f"{percentile(phase.latencies_ms, 0.99):.1f}",
                    f"{statistics.median(phase.cpu_seconds):.3f}",
                ]
                for name, phase in (("the worker stands still", quiet), ("while it drains", busy))
            ),
        ]
    )
    print(f"\nCPU of the web process while it drains: {cpu:.2f} of what it is else.")
    return [
        text
        for text, is_missed in {
            "the provider was asked too often": drain.most_calls > worker.LOOKS_PER_SECOND + 1,
            "looks are slower than their pace": looks < 0.8 * worker.LOOKS_PER_SECOND,
            "notifications are slow": notified < LEAST_NOTIFICATIONS_PER_SECOND,
            "not the oldest first": overtaken != (0, 0),
            "the provider was not left in peace": calls > 0,
            "new payments cost more": cpu > MOST_CPU_RATIO,
        }.items()
        if is_missed
    ]


def duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench.drain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="20,000 of each, for half a minute")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000))
    parser.set_defaults(**PLAIN)
    options = parser.parse_args()
    options.count = 20_000 if options.quick else 100_000
    options.rounds, options.seconds = (2, 8) if options.quick else (5, 20)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        try:
            drain = Drain(stack, options)
            missed = report(drain, *drain.run())
        except (Void, load.LoadError, machine.NotReady) as error:
            print(f"VOID: {error}")
            return 1
        except KeyboardInterrupt:
            return 130
    for text in missed:
        print(f"MISSED: {text}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
