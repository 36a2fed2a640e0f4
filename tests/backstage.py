"""What tests do behind paygate's back: let time pass, let the worker do a round, do many things at once."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import requests

import embedded
import worker
from sandbox import Sandbox
from shop import SECRET_KEY, Shop, query

T = TypeVar("T")


def at_once(works: Sequence[Callable[[], T]], within_seconds: float = 60) -> list[T]:
    """The results of `works`, begun at the same moment in a thread each."""
    begin = threading.Barrier(len(works))

    def run(work: Callable[[], T]) -> T:
        begin.wait(10)
        return work()

    with ThreadPoolExecutor(len(works)) as threads:
        return [future.result(within_seconds) for future in [threads.submit(run, work) for work in works]]


@contextmanager
def meanwhile(work: Callable[[], T]) -> Iterator[Callable[[], T]]:
    """Run `work` in a thread while the block runs; what is given waits for its result."""
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(work)
        yield lambda: future.result(60)


def fresh_seed() -> int:
    """The seed of a test that leaves something to chance. It is printed: TEST_SEED=… runs the same again."""
    seed = int(os.environ.get("TEST_SEED") or random.SystemRandom().randrange(10**9))
    print(f"TEST_SEED={seed}")
    return seed


def seconds_of(work: Callable[[], T]) -> tuple[T, float]:
    begun = time.monotonic()
    return work(), time.monotonic() - begun


# Time


def end_leases(database_url: str) -> None:
    """As if the leases of all keys had run out: whoever held one may be dead, or only slow."""
    query(database_url, "UPDATE idempotency_keys SET leased_until = clock_timestamp() WHERE leased_until IS NOT NULL")


def end_time(database_url: str, payment_id: str) -> None:
    """As if the time to pay it (PAYMENT_TTL_HOURS) had just ended."""
    query(database_url, "UPDATE payments SET expires_at = now() WHERE id = %s", payment_id)


def age(database_url: str, payment_id: str | None, seconds: float) -> None:
    """As if a payment (None: all) had been made, and its time had ended, `seconds` earlier. Leaves no audit row."""
    with psycopg.connect(database_url) as conn:
        conn.execute("SET session_replication_role = replica")
        conn.execute(
            """
            UPDATE payments
               SET created_at = created_at - make_interval(secs => %(seconds)s),
                   expires_at = expires_at - make_interval(secs => %(seconds)s)
             WHERE %(id)s::text IS NULL OR id = %(id)s
            """,
            {"id": payment_id, "seconds": seconds},
        )


def make_due(database_url: str) -> None:
    """As if the next look at each payment were due now."""
    query(database_url, "UPDATE payments SET look_at = now() WHERE look_at IS NOT NULL")


# The worker and the provider


def worker_of(shop: Shop, looks_per_second: float = 1000) -> worker.Worker:
    """A worker, and one in a hurry: the sandbox may be flooded."""
    made = worker.Worker(shop.settings, shop.app.database, shop.app.gateway)
    made.pace = worker.Pace(looks_per_second)
    return made


def look(shop: Shop) -> None:
    """The worker's looking, with everything due."""
    make_due(shop.database_url)
    look_at_all(shop)


def look_at_all(shop: Shop) -> None:
    """The worker's looking, until nothing is due."""
    looker = worker_of(shop)
    for _ in range(2000):
        if looker.look() > 0:
            return
    raise AssertionError("the worker finds no end")


def initialize_before(sandbox: Sandbox, reference: str, **order: Any) -> None:
    """Open a transaction under `reference`, as a request of ours would whose answer was lost."""
    body = {"reference": reference, "email": "john@example.com", "amount": 5000, "currency": "NGN", **order}
    answer = requests.post(
        f"{sandbox.url}/transaction/initialize",
        json=body,
        headers={"Authorization": f"Bearer {SECRET_KEY}"},
        timeout=5,
    )
    assert answer.status_code == 200, answer.text


def references(payment_reference: str) -> list[str]:
    """All nine references of a payment."""
    return [payment_reference, *(f"{payment_reference}-{attempt}" for attempt in range(2, 10))]


@contextmanager
def frozen(cluster: embedded.Cluster) -> Iterator[None]:
    """The server takes no step, as one whose host has died behind a switch that lives: no reset, no refusal."""
    postmaster = cluster.pid
    assert postmaster is not None
    os.kill(postmaster, signal.SIGSTOP)
    children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
    processes = [postmaster, *map(int, children)]
    try:
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGSTOP)
        yield
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)
