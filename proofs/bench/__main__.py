"""`make bench`: what a request costs paygate, against the least that such a service must do (floor.py), and against
a Django app that does what the documentation of its packages shows (django_app).

The floor, paygate, the Django app, and the floor once more as a control, do the same work in randomised rounds, on
databases of one PostgreSQL, with the sandbox as the provider in a process of its own. The back office's list, a page of
20, is paygate's alone. What counts is the processor's time for 1,000 requests, of gunicorn with its workers and of the
database: requests a second vary too much. Then paygate takes POSTs from 256 clients while the provider takes 0.3 s.

The run is void, and says so, when the control is more than 15 % off the floor, or when answers and rows do not agree.
"""

import argparse
import contextlib
import importlib.util
import itertools
import os
import secrets
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import psycopg

from commands.migrate import migrate
from local.serving import ROOT, Server, free_port
from proofs.bench import floor
from proofs.bench.load import send
from proofs.bench.stage import GET, KINDS, LIST, POST, WEBHOOK, Stage, Subject, Void, check_statuses, tree

LEAST_ROUNDS = 8
SLOW_SECONDS, SLOW_CONNECTIONS = 0.3, 256
CONTROL_MARGIN = 0.15
DONE = {
    POST: "SELECT count(*) FROM payments WHERE checkout_url IS NOT NULL",
    GET: "SELECT 0",
    LIST: "SELECT 0",
    WEBHOOK: "SELECT count(*) FROM charges c JOIN payments p ON p.id = c.payment_id WHERE p.status = 'completed'",
}
"""How much of each kind of work has left its rows, in paygate's database and in the floor's."""
DONE_BY_DJANGO = {
    **DONE,
    WEBHOOK: "SELECT count(*) FROM djpaystack_paystackwebhookevent e"
    " JOIN payments p ON p.reference = e.data->'data'->>'reference' WHERE e.processed AND p.status = 'completed'",
}
NAMES = ("floor", "paygate", "django", "control")
DJANGO_SETTINGS = {"DJANGO_SETTINGS_MODULE": "proofs.bench.django_app.settings"}
Samples = dict[tuple[str, str], list[tuple[float, float]]]
"""By kind and name, one a round: the seconds of the service and of its database for 1,000 requests."""


class Bench(Stage):
    def __init__(self, stack: contextlib.ExitStack, options: argparse.Namespace) -> None:
        super().__init__(stack, options.seed)
        self.options = options
        # paygate's worker is off: its polls of unpaid payments are no part of the requests.
        self.subjects = [self.serve(name, RUN_WORKER="0") for name in NAMES]

    def serve(self, name: str, **more: str) -> Subject:
        url, arguments = self.create_database(name), None
        env = {
            **self.env(url),
            "WEB_CONCURRENCY": "2",
            "THREADS": "64",
            "DB_POOL": "8",
            "RATE_LIMIT": "1000000/second",  # all requests come from one address; it is counted, and never over
            "FLOOR_PREPARES": "1" if self.options.floor_prepares else "",
            "PORT": str(free_port()),
            **more,
        }
        plain = ["--worker-class=gthread", "--workers=2", "--threads=64", "--no-control-socket"]
        plain += [f"--bind=127.0.0.1:{env['PORT']}"]
        if name.startswith("paygate"):
            migrate(url)
        elif name == "django":
            env |= {**DJANGO_SETTINGS, "PYTHONPATH": str(ROOT)}
            tables = [sys.executable, "-m", "django", "migrate", "--run-syncdb", "--verbosity=0"]
            subprocess.run(tables, env=env, check=True)
            arguments = [*plain, "django.core.wsgi:get_wsgi_application()"]
        else:
            with psycopg.connect(url) as conn:
                conn.execute(floor.SCHEMA)
            arguments = [*plain, "proofs.bench.floor:create_app()"]
        return Subject(name, url, self.stack.enter_context(Server(self.folder / name, env, arguments)))

    def run_rounds(self) -> Samples:
        """Each kind of work by each subject, in random order. The first round warms up."""
        samples: Samples = defaultdict(list)
        for number in range(self.options.rounds + 1):
            for kind in (*KINDS, LIST):
                subjects = [each for each in self.subjects if kind != LIST or each.name == "paygate"]
                for subject in self.random.sample(subjects, len(subjects)):
                    rows, expected = count(subject, kind), 0 if kind in (GET, LIST) else self.options.requests
                    sample = self.work(subject, kind, self.options.requests)
                    check_rows(subject, kind, count(subject, kind) - rows, expected)
                    if number:
                        samples[kind, subject.name].append(sample)
        return samples

    def run_slow_provider(self) -> str:
        """As many POSTs as get through, in a process with its worker, as it runs by default."""
        subject = self.serve("paygate_slow")
        self.control_sandbox("POST", "/_sandbox/configure", {"latency_seconds": SLOW_SECONDS})
        begins = time.monotonic() + 2  # until every connection is at work
        ends = begins + self.options.slow_seconds
        answers = send(subject.server.port, self.posts(), SLOW_CONNECTIONS, ends)
        accepted = [answer for answer in answers if answer.status == 201]
        check_statuses(subject, POST, answers, {201, 503})
        check_rows(subject, POST, count(subject, POST), len(accepted))
        within = sorted(answer.ms for answer in accepted if begins <= answer.came_at < ends)
        return (
            f"{SLOW_CONNECTIONS} clients, provider at {SLOW_SECONDS:g} s: {len(within) / (ends - begins):.0f} POSTs/s"
            f" accepted of {2 * 48 / SLOW_SECONDS:.0f} that its slots can take, p50 {within[len(within) // 2]:.0f} ms,"
            f" p99 {within[len(within) * 99 // 100]:.0f} ms; {memory_mib(subject.server.pid):.0f} MiB after that"
        )


def count(subject: Subject, kind: str) -> int:
    with psycopg.connect(subject.url) as conn:
        row = conn.execute((DONE_BY_DJANGO if subject.name == "django" else DONE)[kind].encode()).fetchone()
    return int(row[0]) if row else 0


def check_rows(subject: Subject, kind: str, found: int, expected: int) -> None:
    if found != expected:
        raise Void(f"{subject.name}, {kind}: {found} rows for {expected} answers")


def memory_mib(pid: int) -> float:
    """RSS of a process and its descendants."""
    pages = sum(int(Path(f"/proc/{each}/statm").read_text().split()[1]) for each in tree(pid))
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024 / 1024


def report(samples: Samples) -> list[str]:
    """Print the table, and return what makes the run void. A quotient is the median of the rounds' own quotients."""
    void = []
    print(f"| s of CPU for 1,000 | {' | '.join(NAMES[:3])} | paygate ÷ floor | paygate ÷ django | control ÷ floor |")
    print("|---|---|---|---|---|---|---|")
    for kind, (title, part) in itertools.product(KINDS, (("", 0), (", its database", 1))):
        costs = {name: [each[part] for each in samples[kind, name]] for name in NAMES}
        medians = [f"{statistics.median(costs[name]):.2f}" for name in NAMES[:3]]
        ratios = [quotients(costs["paygate"], costs[name]) for name in ("floor", "django")]
        found = [f"{statistics.median(each):.2f} ({min(each):.2f}–{max(each):.2f})" for each in ratios]
        noise = statistics.median(quotients(costs["control"], costs["floor"]))
        print(f"| {' | '.join((kind + title, *medians, *found, f'{noise:.2f}'))} |")
        if not part and abs(noise - 1) > CONTROL_MARGIN:
            void.append(f"{kind}: the control is at {noise:.2f} of the floor")
    for part, title in enumerate((LIST, f"{LIST}, its database")):
        cost = statistics.median(each[part] for each in samples[LIST, "paygate"])
        print(f"| {title} | | {cost:.2f} | | | | |")
    return void


def quotients(some: list[float], others: list[float]) -> list[float]:
    return [one / other for one, other in zip(some, others, strict=True)]


def main() -> int:
    if sys.platform != "linux":
        sys.exit("bench: it reads the processor's time from Linux's /proc")
    if importlib.util.find_spec("djpaystack") is None:
        sys.exit("bench: the Django app is not installed: make bench, or .ci/setup bench")
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer requests: less exact, in three minutes")
    parser.add_argument("--floor-prepares", action="store_true", help="the floor's statements are prepared too")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000), help="of the order (random)")
    parser.add_argument("--rounds", type=int, default=0, help=f"at least {LEAST_ROUNDS}")
    parser.add_argument("--requests", type=int, default=0, help="POSTs of one subject in one round")
    options = parser.parse_args()
    options.rounds = max(options.rounds or (0 if options.quick else 12), LEAST_ROUNDS)
    options.requests = max(options.requests or (200 if options.quick else 800), 100)
    options.slow_seconds = 6 if options.quick else 15
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(
        f"seed {options.seed}, {options.rounds} rounds of {options.requests} POSTs, 3 times the GETs, as many webhooks"
    )
    print(
        f"{os.cpu_count()} cores, load before it {os.getloadavg()[0]:.2f}; 2 processes of 64 threads each\n", flush=True
    )
    with contextlib.ExitStack() as stack:
        try:
            bench = Bench(stack, options)
            void = report(bench.run_rounds())
            print(f"\n{bench.run_slow_provider()}")
        except Void as error:
            void = [str(error)]
        except KeyboardInterrupt:
            return 130
    for reason in void:
        print(f"VOID: {reason}")
    return 1 if void else 0


if __name__ == "__main__":
    sys.exit(main())
