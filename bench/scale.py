"""What more processes cost: `make bench-scale`, or `make bench-scale ARGS=--quick`.

paygate with 1, 2 and 4 processes, and as two instances of one process each, on databases of one PostgreSQL. Clients,
service, provider's sandbox and database share the processors of one machine, so requests a second would say little.
What counts is the processor's time for 1,000 requests, of paygate and of the database: what stays the same with more
processes can be had from more machines.

In a last round that is not measured, the database is asked every 10 ms what its busy connections wait for.
"""

import argparse
import contextlib
import os
import secrets
import signal
import statistics
import sys
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import psycopg

from bench import load, machine
from bench.__main__ import CONNECTIONS, PLAIN, Bench, Void
from bench.machine import Server
from bench.report import CONTROL_MARGIN, Sample, print_table
from bench.subjects import GET, POST, WEBHOOK, Subject

KINDS = (POST, GET, WEBHOOK)
LEAST_ROUNDS = 4
ROUNDS, QUICK_ROUNDS = 8, 4
SAMPLE_SECONDS = 0.01


@dataclass(frozen=True)
class Fleet:
    """One or several instances of paygate on one database."""

    name: str
    subject: Subject
    servers: list[Server]

    def cpu_seconds(self) -> float:
        return sum(server.cpu_seconds() for server in self.servers)

    def send(self, requests: list[bytes], kind: str) -> list[load.Reply]:
        """To all instances at once, as a load balancer in front of them would."""
        count = len(self.servers)

        def send_to(number: int) -> list[load.Reply]:
            port, connections = self.servers[number].port, CONNECTIONS // count
            return load.send(port, iter(requests[number::count]), connections, keep=kind == POST)

        with ThreadPoolExecutor(count) as threads:
            return [reply for replies in threads.map(send_to, range(count)) for reply in replies]


class Scale:
    def __init__(self, stack: contextlib.ExitStack, options: argparse.Namespace) -> None:
        self.options = options
        self.bench = Bench(stack, options)
        self.fleets = [
            self.fleet(stack, "1 process", [1]),
            self.fleet(stack, "2 processes", [2]),
            self.fleet(stack, "4 processes", [4]),
            self.fleet(stack, "2 instances of 1", [1, 1]),
            self.fleet(stack, "control: 1 process", [1]),
        ]

    def fleet(self, stack: contextlib.ExitStack, name: str, processes: list[int]) -> Fleet:
        """Each number is an instance's WEB_CONCURRENCY."""
        subject = self.bench.paygate_subject("".join(filter(str.isalnum, name)))
        servers = [
            stack.enter_context(self.bench.serving(subject, WEB_CONCURRENCY=str(each), RUN_WORKER="0"))
            for each in processes
        ]
        return Fleet(name, subject, servers)

    def run_rounds(self) -> dict[tuple[str, str], list[Sample]]:
        """All samples, by kind of work and name of the fleet, one a round."""
        samples = defaultdict(list)
        for number in range(self.options.rounds + 1):  # the first one warms up
            for kind in KINDS:
                for fleet in self.bench.random.sample(self.fleets, len(self.fleets)):
                    sample = self.work(fleet, kind)
                    if number:
                        samples[kind, fleet.name].append(sample)
        return samples

    def work(self, fleet: Fleet, kind: str) -> Sample:
        send = partial(fleet.send, kind=kind)
        return self.bench.measure(fleet.subject, kind, self.options.requests, send, fleet.cpu_seconds)

    def connections(self, fleet: Fleet) -> int:
        """How many the fleet has opened."""
        with psycopg.connect(fleet.subject.database_url, application_name="bench") as conn:
            row = conn.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = %s",
                ("paygate",),
            ).fetchone()
        return int(row[0]) if row else 0

    def watch(self, fleet: Fleet, kind: str) -> Counter[str]:
        """What the database's connections do while `kind` is done: how often each was seen, by what it waited for."""
        seen: Counter[str] = Counter()
        over = threading.Event()
        with psycopg.connect(fleet.subject.database_url, autocommit=True) as conn:

            def look() -> None:
                while not over.wait(SAMPLE_SECONDS):
                    for (state,) in conn.execute(WAITS):
                        seen[state] += 1

            thread = threading.Thread(target=look)
            thread.start()
            try:
                self.work(fleet, kind)
            finally:
                over.set()
                thread.join()
        return seen


WAITS = """
    SELECT CASE WHEN state LIKE 'idle in transaction%' THEN 'paygate, inside a transaction'
                WHEN wait_event IS NULL THEN 'nothing: it computes'
                WHEN wait_event ILIKE '%wal%' THEN 'the log on disk'
                WHEN wait_event_type = 'Lock' THEN 'another''s lock on a row'
                WHEN wait_event_type = 'Client' THEN 'paygate, inside a statement'
                ELSE 'other' END
      FROM pg_stat_activity
     WHERE datname = current_database() AND pid <> pg_backend_pid() AND state <> 'idle'
"""


def report(scale: Scale, samples: dict[tuple[str, str], list[Sample]]) -> list[str]:
    """Print the tables, and return what makes the run void."""
    rows = [["seconds of CPU for 1,000", *(f"{who} {kind}" for who in ("paygate", "DB") for kind in KINDS), "DB conns"]]
    for fleet in scale.fleets:
        service = [statistics.median(each.cpu_seconds for each in samples[kind, fleet.name]) for kind in KINDS]
        database = [statistics.median(each.database_seconds for each in samples[kind, fleet.name]) for kind in KINDS]
        rows.append([fleet.name, *(f"{each:.3f}" for each in service + database), str(scale.connections(fleet))])
    print_table(rows)
    print("Medians of the rounds. The control is a second service of 1 process: what it differs by is noise.\n")
    waits = [["connections at work wait for", *KINDS]]
    fleet = scale.fleets[2]
    seen = {kind: scale.watch(fleet, kind) for kind in KINDS}
    for state in sorted(set().union(*seen.values()), key=lambda state: -sum(each[state] for each in seen.values())):
        waits.append([state, *(f"{seen[kind][state] / max(1, seen[kind].total()):.0%}" for kind in KINDS)])
    print_table(waits)
    print(f"Of {fleet.name}, by {sum(each.total() for each in seen.values())} sightings.")
    void = []
    for kind in KINDS:
        ones, controls = samples[kind, scale.fleets[0].name], samples[kind, scale.fleets[-1].name]
        ratio = statistics.median(a.cpu_seconds / b.cpu_seconds for a, b in zip(controls, ones, strict=True))
        if abs(ratio - 1) > CONTROL_MARGIN:
            void.append(f"{kind}: the control is at {ratio:.2f} of what it repeats")
    return void


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer requests: less exact, in about two minutes")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000), help="of the order (random)")
    parser.add_argument("--rounds", type=int, help=f"at least {LEAST_ROUNDS}")
    parser.add_argument("--requests", type=int, help="POSTs of one service in one round")
    parser.add_argument("--threads", type=int, default=64, help="THREADS (64)")
    parser.set_defaults(**PLAIN)
    options = parser.parse_args()
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    options.requests = options.requests or (200 if options.quick else 800)
    if options.rounds < LEAST_ROUNDS or options.requests < 100:
        parser.error(f"fewer than {LEAST_ROUNDS} rounds of 100 requests say nothing")
    return options


def main() -> int:
    if sys.platform != "linux":
        sys.exit("bench: it reads the processor's time from Linux's /proc")
    options = parse_options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        print(f"seed {options.seed}; {machine.describe()}; load before it {os.getloadavg()[0]:.2f}")
        print(
            f"{options.rounds} rounds of {options.requests} POSTs, {3 * options.requests} GETs, {options.requests}"
            f" webhooks by {CONNECTIONS} connections; {options.threads} threads and a pool of 8 in each process;"
            " no worker\n",
            flush=True,
        )
        try:
            scale = Scale(stack, options)
            void = report(scale, scale.run_rounds())
        except (Void, load.LoadError, machine.NotReady) as error:
            void = [str(error)]
        except KeyboardInterrupt:
            return 130
    print(f"\n{time.monotonic() - begun:.0f} s in all")
    for reason in void:
        print(f"VOID: {reason}")
    return 1 if void else 0


if __name__ == "__main__":
    sys.exit(main())
