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
from typing import Any, Concatenate, ParamSpec, TypeVar

import psycopg
import psycopg.rows
import pytest
import requests

import db
import worker
from local import embedded
from local.sandbox import Sandbox
from shop import SECRET_KEY, Shop, query, wait_until

P = ParamSpec("P")
T = TypeVar("T")
Psql = psycopg.Connection[dict[str, Any]]


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


@contextmanager
def slow_process(shop: Shop) -> Iterator[db.Database]:
    """The database of a process that is slow: whatever is done in it is committed at the end of the block."""
    rows = psycopg.rows.dict_row
    with db.BoundedConnection.connect(shop.database_url, application_name="paygate", row_factory=rows) as conn:
        if shop.settings.notify_url is not None:
            conn.execute("SELECT set_config('paygate.notify', 'on', true)")
        yield OneTransaction(conn, shop.app.database.secret())


class OneTransaction(db.Database):
    """A database in which all that is run belongs to one transaction of the caller's."""

    def __init__(self, conn: db.BoundedConnection, secret: bytes) -> None:
        self.conn, self._secret = conn, secret

    def run(self, work: Callable[[db.BoundedConnection], T], within_seconds: float = 5) -> T:
        return work(self.conn)

    def transaction(
        self, work: Callable[Concatenate[db.BoundedConnection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        return work(self.conn, *args, **kwargs)


def second_of_two(
    shop: Shop, first: Callable[[db.Database], object], second: Callable[[db.Database], T], *, leaves: str | None = None
) -> T:
    """The result of `second`, where `first` has been done a moment before and is not committed yet: it has to wait,
    and holds no row of the table that it `leaves`, which comes later in the order of locks."""
    with ThreadPoolExecutor(1) as threads:
        with slow_process(shop) as database:
            first(database)
            result = threads.submit(second, shop.app.database)
            wait_until(lambda: result.done() or somebody_waits(shop))
            assert not result.done(), "it did not wait"
            if leaves is not None:
                shop.sql(f"SELECT FROM {leaves} FOR UPDATE NOWAIT")
        return result.result(30)


def somebody_waits(shop: Shop) -> bool:
    """Whether a transaction waits for a lock of another."""
    query = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    return bool(shop.sql(query))


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
    query(database_url, "UPDATE payments SET poll_at = now() WHERE poll_at IS NOT NULL")


# The worker and the provider


def refuse_charges(shop: Shop, when: str = "true") -> None:
    """As if applying a charge met a bug: the database refuses to take it."""
    shop.sql(
        f"""
        CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'a bug'; END $$;
        CREATE TRIGGER a_bug BEFORE INSERT ON charges FOR EACH ROW WHEN ({when}) EXECUTE FUNCTION fail()
        """
    )


def worker_of(shop: Shop, polls_per_second: float = 1000) -> worker.Worker:
    """A worker, and one in a hurry: the sandbox may be flooded."""
    made = worker.Worker(shop.settings, shop.app.database, shop.app.gateway)
    made.pace.gap_seconds = 1 / polls_per_second
    return made


def poll(shop: Shop) -> None:
    """The worker's looking, with everything due."""
    make_due(shop.database_url)
    poll_all(shop)


def poll_all(shop: Shop) -> None:
    """The worker's looking, until nothing is due."""
    poller = worker_of(shop)
    for _ in range(2000):
        if poller.poll() > 0:
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


# The database


def incidents(shop: Shop) -> list[tuple[str, str]]:
    return [(row["kind"], row["subject"]) for row in shop.sql("SELECT kind, subject FROM incidents ORDER BY id")]


def lose_all_rows(shop: Shop) -> None:
    """As after a failover to a standby that had not heard of them yet. The secret is older, and stays."""
    tables = [row["tablename"] for row in shop.sql("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]
    lost = [f"DELETE FROM {name};" for name in tables if name not in ("secrets", "migrations")]  # noqa: S608
    shop.sql("SET session_replication_role = replica; " + " ".join(lost))


@pytest.fixture
def psql(database_url: str) -> Iterator[Psql]:
    """Somebody with the database's password and no manners."""
    with psycopg.connect(database_url, autocommit=True, row_factory=psycopg.rows.dict_row) as conn:
        yield conn


@pytest.fixture
def payment_id(shop: Shop) -> str:
    return str(shop.created()["id"])


def trail(psql: Psql, payment_id: str) -> list[dict[str, Any]]:
    return psql.execute("SELECT * FROM payment_events WHERE payment_id = %s ORDER BY n", [payment_id]).fetchall()
