# ruff: noqa: F811  (fixtures are imported by their names)
"""Leases, and what is due, are judged by the database's clock: here it is an hour ahead of ours, or behind."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any
from urllib.parse import quote, urlsplit

import psycopg
import pytest

import charges
import checkout
import db
import refunds
import worker
from backstage import refuse_charges
from commands import doctor, erase, sync
from commands.migrate import migrate
from local.sandbox import Sandbox
from shop import Shop, sandbox  # noqa: F401  # fixtures
from till import paid
from web import outbox, readers

NOTIFY = {"NOTIFY_URL": "http://127.0.0.1:9/", "NOTIFY_SECRET": "whsec_" + "QUFB" * 11}
CLOCK = """
CREATE FUNCTION public.now() RETURNS timestamptz LANGUAGE sql STABLE
    RETURN pg_catalog.now() + interval '{offset}';
CREATE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql VOLATILE
    RETURN pg_catalog.clock_timestamp() + interval '{offset}';
DO $$
DECLARE
    statement text;
BEGIN
    FOR statement IN
        SELECT format('ALTER TABLE %s ALTER %I SET DEFAULT public.clock_timestamp()', attrelid::regclass, attname)
          FROM pg_attribute JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
         WHERE pg_get_expr(adbin, adrelid) = 'clock_timestamp()'
        UNION ALL
        SELECT format('ALTER FUNCTION %s SET search_path = public, pg_catalog', oid::regprocedure)
          FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND proconfig IS NOT NULL
    LOOP
        EXECUTE statement;
    END LOOP;
END
$$
"""
"""Found before PostgreSQL's own clock: by the search_path of the URL, of each function, as each column's default."""


@pytest.fixture(params=["1 hour", "-1 hour"])
def shop(database_url: str, sandbox: Sandbox, request: pytest.FixtureRequest) -> Iterator[Shop]:
    name = f"clock_{secrets.token_hex(4)}"
    with closing(psycopg.connect(database_url, autocommit=True)) as conn:
        conn.execute(f"CREATE DATABASE {name} TEMPLATE template0".encode())
        url = urlsplit(database_url)._replace(path=f"/{name}").geturl()
        migrate(url)
        with psycopg.connect(url) as inside:
            inside.execute(CLOCK.format(offset=request.param).encode())
        with Shop(f"{url}&options={quote('-csearch_path=public,pg_catalog', safe='')}", sandbox, **NOTIFY) as shop:
            yield shop
        conn.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def one_of_each(shop: Shop) -> None:
    """A row of each kind that a worker claims."""
    payment = paid(shop)
    refunds.begin(shop.app.database, "test", refunds.Request(payment["id"], "10.00", "operator:ada"))
    other = shop.created()
    shop.sandbox.pay(other["reference"])
    refuse_charges(shop)
    shop.deliver(other["reference"])
    shop.sql("INSERT INTO jobs (mode, name, due_at) VALUES ('test', 'prune', now())")


CLAIMS: dict[str, tuple[str, Callable[[db.Database], object]]] = {
    "payments": ("poll_at", lambda database: worker.claim_due(database, "test", 60, "oldest")),
    "refunds": ("poll_at", lambda database: refunds.claim_due(database, "test", 20, 60)),
    "provider_events": ("retry_at", lambda database: charges.claim_events(database, "test", 20)),
    "notifications": ("due_at", lambda database: outbox.claim_notification(database, "test", 60)),
    "jobs": ("due_at", lambda database: worker.claim_job(database, "prune", "test", 60)),
}


@pytest.mark.parametrize("table", CLAIMS)
def test_what_is_due_is_claimed_when_it_is_due_and_again_when_the_lease_is_over(shop: Shop, table: str) -> None:
    one_of_each(shop)
    column, claim = CLAIMS[table]

    def due_in(seconds: float) -> None:
        statement = f"UPDATE {table} SET {column} = now() + make_interval(secs => %s) WHERE {column} IS NOT NULL"  # noqa: S608
        shop.sql(statement, seconds)

    due_in(60)
    assert not claim(shop.app.database)
    due_in(-1)
    assert claim(shop.app.database)
    for _ in range(5):  # the other rows
        claim(shop.app.database)
    assert not claim(shop.app.database)
    (lease,) = shop.sql(
        f"SELECT extract(epoch FROM min({column}) - now())::float8 AS seconds FROM {table}"  # noqa: S608
    )
    assert 30 < lease["seconds"] <= 60


# Keys


ORDER = checkout.Order("Jane Doe", "jane@example.com", "+2348012345678", 5000, "Lagos", "NGN")


def lease(shop: Shop) -> Any:
    statement = "SELECT extract(epoch FROM leased_until - now())::float8 AS seconds FROM idempotency_keys"
    return shop.sql(statement)[0]["seconds"]


def test_a_key_is_taken_over_when_its_lease_is_over(shop: Shop) -> None:
    key = checkout.key_of("one")
    for _ in range(2):
        checkout.reserve(shop.app.office, key, ORDER)
        assert 50 < lease(shop) <= 60
        with pytest.raises(checkout.InFlight):
            checkout.reserve(shop.app.office, key, ORDER)
        shop.sql("UPDATE idempotency_keys SET leased_until = now() - interval '1 s'")


def test_a_payment_under_a_lease_is_not_polled_and_after_it_is(shop: Shop) -> None:
    checkout.reserve(shop.app.office, checkout.key_of("one"), ORDER)
    shop.sql("UPDATE payments SET poll_at = now()")
    assert worker.claim_due(shop.app.database, "test", 60, "oldest") is None
    shop.sql("UPDATE idempotency_keys SET leased_until = now()")
    assert worker.claim_due(shop.app.database, "test", 60, "oldest") is not None


def test_the_time_of_a_payment_is_over_by_the_databases_clock(shop: Shop) -> None:
    key = checkout.key_of("one")
    reserved = checkout.reserve(shop.app.office, key, ORDER)
    (left,) = shop.sql("SELECT extract(epoch FROM expires_at - now())::float8 AS seconds FROM payments")
    assert left["seconds"] == pytest.approx(86400, abs=60)
    for seconds, is_over in ((60, False), (-1, True)):
        checkout.release_lease(shop.app.database, reserved, attempt=1, reference_exists=False)
        shop.sql("UPDATE payments SET expires_at = now() + make_interval(secs => %s)", seconds)
        reserved = checkout.reserve(shop.app.office, key, ORDER)
        assert reserved.is_over is is_over
    found = {"id": reserved.payment.id}
    due = shop.app.database.run(lambda conn: db.only_row(conn, sync.FIND, found))
    past = [(due["asked_at"] - due[since]).total_seconds() for since in ("expires_at", "created_at")]
    assert past == [pytest.approx(1, abs=5), pytest.approx(0, abs=30)]


# Polls that somebody asked for


def test_a_reader_makes_a_payment_due_by_the_databases_clock(shop: Shop) -> None:
    payment = shop.created()
    for polled, leased, is_wanted in ((4, -1, False), (6, 30, False), (6, -1, True)):
        shop.sql(
            "UPDATE payments SET wanted_at = NULL, polled_at = now() - make_interval(secs => %s),"
            " poll_leased_until = now() + make_interval(secs => %s)",
            *(polled, leased),
        )
        readers.poll_soon(shop.app.database, "test", {payment["id"]: 0.0}, [])
        assert shop.sql("SELECT wanted_at <= now() AS is_wanted FROM payments") == [{"is_wanted": is_wanted or None}]


# Refunds


def begun(shop: Shop) -> refunds.Refund:
    request = refunds.Request(paid(shop)["id"], "10.00", "operator:ada")
    return refunds.begin(shop.app.database, "test", request)


def make_older(shop: Shop, table: str, seconds: float, column: str = "created_at") -> None:
    shop.sql(
        f"SET session_replication_role = replica; UPDATE {table} SET {column} = now() - interval '{seconds} s'"  # noqa: S608
    )


def test_a_refund_is_sent_within_a_minute(shop: Shop) -> None:
    refund = begun(shop)
    for seconds, is_sent in ((65, False), (50, True)):
        make_older(shop, "refunds", seconds)
        assert refunds.begin_sending(shop.app.database, refund) is is_sent


def test_a_refund_is_asked_for_again_within_a_day(shop: Shop) -> None:
    request = refunds.Request(begun(shop).payment_id, "10.00", "operator:ada")
    make_older(shop, "refunds", 86400 - 60)
    with pytest.raises(refunds.RefundAsked) as asked:
        shop.app.database.transaction(refunds.plan, "test", request)
    assert asked.value.is_recent
    make_older(shop, "refunds", 86400 + 60)
    shop.app.database.transaction(refunds.plan, "test", request)


def test_the_ages_of_a_refund_are_by_the_databases_clock(shop: Shop) -> None:
    begun(shop)
    make_older(shop, "refunds", 600)
    shop.sql("UPDATE refunds SET poll_at = now()")
    (due,) = refunds.claim_due(shop.app.database, "test", 20, 60)
    assert due.age_seconds == pytest.approx(600, abs=30)
    assert due.sent_seconds == pytest.approx(480, abs=30)
    shop.app.database.transaction(refunds.finish_poll, due.refund, 300)
    assert shop.sql("SELECT poll_at > now() + interval '4 min' AS is_later FROM refunds") == [{"is_later": True}]


# What is looked at, kept and told


def test_the_ages_of_what_is_awaited_are_by_the_databases_clock(shop: Shop) -> None:
    stood = db.find_payment(shop.app.database, paid(shop)["id"])
    assert stood is not None
    shop.app.database.run(lambda conn: charges.await_refunds(conn, stood.id))
    for seconds, is_awaited in ((1700, True), (1900, False)):
        shop.sql(
            "UPDATE payments SET refunds_awaited_since = now() - make_interval(secs => %s),"
            " poll_at = now() + interval '1 min'",
            seconds,
        )
        charges.finish_poll_of_paid(shop.app.database, stood, stood.created_at)
        rows = shop.sql("SELECT refunds_awaited_since IS NOT NULL AS is_awaited FROM payments")
        assert rows == [{"is_awaited": is_awaited}]
    (verified,) = shop.sql("SELECT extract(epoch FROM poll_at - now())::float8 AS seconds FROM payments")
    assert verified["seconds"] == pytest.approx(86400, abs=60)


def test_what_is_pruned_erased_and_late_is_so_by_the_databases_clock(shop: Shop) -> None:
    payment = shop.created()
    shop.sql("UPDATE payments SET status = 'expired', poll_at = NULL")
    deliver = "INSERT INTO notifications (mode, type, sequence, facts, delivered_at) VALUES ('test', 'x', 1, '{}', "
    shop.sql(f"{deliver} now() - interval '30 days' + interval '1 min')")
    make_older(shop, "payments", 30 * 86400 - 60, "expires_at")
    assert worker.prune(shop.app.database, 30, 250) == 0
    with pytest.raises(db.Impossible):
        erase.erase_payment(shop.app.database, payment["id"], "operator:ada")
    shop.sql("UPDATE notifications SET delivered_at = now() - interval '30 days' - interval '1 min'")
    make_older(shop, "payments", 30 * 86400 + 60, "expires_at")
    assert worker.prune(shop.app.database, 30, 250) == 1
    shop.sql("UPDATE payments SET pruned = 0")
    assert erase.erase_payment(shop.app.database, payment["id"], "operator:ada")


def test_a_job_is_as_long_ago_as_the_database_says(shop: Shop) -> None:
    worker.finish_job(shop.app.database, "apply_lists", "test", 86400)
    assert worker.days_since_job(shop.app.database, "apply_lists", "test") == pytest.approx(0, abs=0.01)
    assert shop.sql("SELECT due_at > now() + interval '23 hours' AS is_later FROM jobs") == [{"is_later": True}]


def test_a_notification_is_tried_again_after_its_pause(shop: Shop) -> None:
    paid(shop)
    sent = outbox.claim_notification(shop.app.database, "test", 60)
    assert sent is not None
    shop.app.database.transaction(outbox.finish_notification, sent, "500", 300)
    (pause,) = shop.sql("SELECT extract(epoch FROM due_at - now())::float8 AS seconds FROM notifications")
    assert pause["seconds"] == pytest.approx(300, abs=30)
    shop.app.database.transaction(outbox.send_again, "test", sent.payment_id)
    assert outbox.claim_notification(shop.app.database, "test", 60) is not None


def test_doctor_counts_what_waits_by_the_databases_clock(shop: Shop) -> None:
    one_of_each(shop)
    shop.sql("UPDATE payments SET poll_at = now() - interval '10 min'")
    shop.sql("UPDATE refunds SET poll_at = now() - interval '10 min'")
    shop.sql("UPDATE notifications SET due_at = now() - interval '10 min' WHERE due_at IS NOT NULL")
    health = shop.app.database.only_row(doctor.HEALTH, {"mode": "test"})
    for name in ("poll_seconds", "refund_seconds", "notification_seconds"):
        assert health[name] == pytest.approx(600, abs=30)
    assert health["event_seconds"] == pytest.approx(0, abs=30)
