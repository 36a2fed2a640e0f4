# ruff: noqa: F811  (fixtures are imported by their names)
"""How a transaction is run: the pool, statements prepared, keys taken at once, the migrations."""

import contextlib
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import psycopg
import psycopg.rows
import pytest

import checkout
import commands
import db
from backstage import Psql, at_once, end_leases, payment_id, psql, trail  # noqa: F401  # fixtures
from commands.migrate import migrate, migrations
from invariants import check_books
from relay import Relay
from shop import PAYMENTS, Shop, open_shop, sandbox, shop  # noqa: F401  # fixtures
from till import Till, open_till, till  # noqa: F401  # fixtures

# The pool


@pytest.fixture
def one_connection(database_url: str) -> Iterator[db.Database]:
    """A pool that gives the same connection to everyone in turn, as a pooler in transaction mode may."""
    with db.Database(database_url, 1) as database:
        yield database


def by_hand(database: db.Database, payment_id: str) -> None:
    database.run(
        lambda conn: conn.execute("UPDATE payments SET location = location || '.' WHERE id = %s", [payment_id])
    )


def test_an_actor_never_leaks_into_the_next_transaction(
    one_connection: db.Database, psql: Psql, payment_id: str
) -> None:
    by_hand(one_connection, payment_id)
    one_connection.transaction(lambda conn: conn.execute("SELECT 1"))
    by_hand(one_connection, payment_id)
    with pytest.raises(ZeroDivisionError):
        one_connection.transaction(lambda conn: 1 / 0)
    by_hand(one_connection, payment_id)
    whose = {(row["actor"], row["why"]) for row in trail(psql, payment_id)[2:]}
    assert whose == {("paygate", "by_hand")}


def change_as(name: str, conn: db.BoundedConnection) -> None:
    conn.execute("UPDATE payments SET location = location || '.' WHERE changed_by(%s, 'accepted')", [name])


def test_an_operator_is_named_in_full_whatever_the_name(
    one_connection: db.Database, psql: Psql, payment_id: str
) -> None:
    for name in ("operator:O'Brien \\ Söhne", "operator:a', true); DELETE FROM charges --", "operator:{} %s $1"):
        one_connection.transaction(partial(change_as, name))
        assert (trail(psql, payment_id)[-1]["actor"], trail(psql, payment_id)[-1]["why"]) == (name, "accepted")


def test_a_transaction_in_which_an_error_was_overlooked_does_not_count_as_done(
    one_connection: db.Database, psql: Psql, payment_id: str
) -> None:
    """PostgreSQL answers its COMMIT with ROLLBACK, and with no error."""

    def careless(conn: db.BoundedConnection) -> str:
        conn.execute("UPDATE payments SET location = 'Accra'")
        with contextlib.suppress(psycopg.Error):
            conn.execute("SELECT 1 / 0")
        return "done"

    with pytest.raises(db.DatabaseUnavailable):
        one_connection.transaction(careless)
    assert psql.execute("SELECT location FROM payments").fetchone() == {"location": "Lagos"}
    by_hand(one_connection, payment_id)


def test_a_payment_request_leaves_no_actor_behind(open_shop: Callable[..., Shop], psql: Psql) -> None:
    shop = open_shop(DB_POOL="1")
    payment_id = shop.created()["id"]
    by_hand(shop.app.database, payment_id)
    assert trail(psql, payment_id)[-1]["actor"] == "paygate"


def statements_prepared(shop: Shop) -> list[str]:
    """On the one connection of a shop, after all that a customer does has been done a few times."""
    for _ in range(12):
        payment = shop.created()
        shop.pay(payment["reference"])
        assert shop.get(payment["id"])["status"] == "completed"
    rows = shop.app.database.run(lambda conn: conn.execute("SELECT statement FROM pg_prepared_statements").fetchall())
    return [row["statement"] for row in rows]


def test_what_each_payment_needs_is_prepared_once(open_shop: Callable[..., Shop]) -> None:
    """And survives a migration that adds to the tables while it serves, and an error."""
    shop = open_shop(DB_POOL="1")
    prepared = statements_prepared(shop)
    assert len(prepared) == len(set(prepared)) == 9
    for table in ("payments", "idempotency_keys", "charges", "provider_events"):
        shop.sql(f"ALTER TABLE {table} ADD COLUMN later text NOT NULL DEFAULT 'x'")
    assert statements_prepared(shop) == prepared
    with pytest.raises(ZeroDivisionError):
        shop.app.database.transaction(lambda conn: 1 / 0)
    assert sorted(statements_prepared(shop)) == sorted(prepared)


def test_orders_that_a_full_disk_refuses_leave_nothing_prepared_on_the_server(open_shop: Callable[..., Shop]) -> None:
    """psycopg forgets a statement whose first use failed. The server would keep one more for each order."""
    shop = open_shop(DB_POOL="1")
    shop.sql(
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = 'disk_full'; END $$
        """
    )
    shop.sql("CREATE TRIGGER disk_is_full BEFORE INSERT ON payments FOR EACH ROW EXECUTE FUNCTION refuse()")
    for _ in range(5):
        assert shop.create().status_code == 503
    rows = shop.app.database.run(lambda conn: conn.execute("SELECT FROM pg_prepared_statements").fetchall())
    assert rows == []
    shop.sql("DROP TRIGGER disk_is_full ON payments")
    assert len(statements_prepared(shop)) == 9


def test_a_pooler_that_passes_for_the_server_is_found_out_by_the_first_error(open_shop: Callable[..., Shop]) -> None:
    """One that gives out the server's own numbers, and then another server that does not know what was prepared."""
    shop = open_shop(DB_POOL="1")
    payment_id = shop.created()["id"]
    assert shop.get(payment_id)
    shop.app.database.run(lambda conn: conn.pgconn.exec_(b"DEALLOCATE ALL"))
    assert shop.get(payment_id)
    assert statements_prepared(shop) == []


def test_nothing_is_prepared_where_a_pooler_may_change_the_server(
    database_url: str, open_shop: Callable[..., Shop]
) -> None:
    """pgbouncer gives its clients numbers of its own, and in transaction mode the next statement may reach another
    connection of the server, which does not know it, or knows another of that name."""

    def renumbered(data: bytes) -> bytes:
        return re.sub(rb"(?<=K\0\0\0\x0c)....", b"\x12\x34\x56\x78", data, flags=re.DOTALL)  # BackendKeyData

    with Relay(database_url) as relay:
        relay.retell = renumbered
        assert statements_prepared(open_shop(DATABASE_URL=relay.url, DB_POOL="1")) == []


def test_the_roles_defaults_are_not_ours(database_url: str, psql: Psql) -> None:
    """A database that is set to serializable, to acknowledge what is not on disk yet, and to compile plans: before
    PostgreSQL 18 it would compile any that has to scan, since we have made that dear."""
    for setting in ("default_transaction_isolation = 'serializable'", "synchronous_commit = 'off'", "jit = 'on'"):
        psql.execute(f"ALTER DATABASE {psql.info.dbname} SET {setting}".encode())

    def shown(conn: psycopg.Connection[Any]) -> list[str]:
        names = "transaction_isolation", "synchronous_commit", "jit"
        return [conn.execute(f"SHOW {name}".encode()).fetchall()[0][name] for name in names]

    with db.Database(database_url, 1) as database:
        assert database.run(shown) == ["read committed", "on", "off"]
        assert database.transaction(shown) == ["read committed", "on", "off"]


def test_a_report_has_time_whatever_the_roles_default_is_and_its_times_are_in_utc(
    database_url: str, psql: Psql
) -> None:
    for setting in (
        "statement_timeout = '50ms'",
        "idle_in_transaction_session_timeout = '50ms'",
        "TimeZone = 'Asia/Tokyo'",
    ):
        psql.execute(f"ALTER DATABASE {psql.info.dbname} SET {setting}".encode())
    with commands.reading(database_url) as conn, conn.transaction():
        conn.execute("SELECT pg_sleep(0.2)")
        time.sleep(0.2)
        assert conn.execute("SHOW TimeZone").fetchall() == [{"TimeZone": "UTC"}]


def test_how_a_database_writes_dates_and_numbers_is_no_concern_of_ours(
    open_shop: Callable[..., Shop], database_url: str, psql: Psql
) -> None:
    for setting in ("datestyle = 'SQL, DMY'", "extra_float_digits = -15", "TimeZone = 'Asia/Tokyo'"):
        psql.execute(f"ALTER DATABASE {psql.info.dbname} SET {setting}".encode())
    shop = open_shop()
    payment = shop.created()
    assert shop.get(payment["id"])["created_at"] == payment["created_at"]

    def read(conn: psycopg.Connection[Any]) -> dict[str, Any]:
        return dict(conn.execute("SELECT created_at, 123456.789::float8 AS number FROM payments").fetchall()[0])

    with commands.reading(database_url) as conn:
        told = read(conn)
    assert told == shop.app.database.run(read)
    assert (told["number"], f"{told['created_at']:%Y-%m-%dT%H:%M:%SZ}") == (123456.789, payment["created_at"])


def take(shop: Shop, key: bytes) -> str:
    order = checkout.Order("John Doe", "john@example.com", "2348012345678", 5000, "Lagos", "NGN")
    try:
        checkout.reserve(shop.app.office, key, order)
    except checkout.InFlight:
        return "in flight"
    return "taken"


def test_of_eight_who_take_a_key_at_once_one_has_it_and_the_others_are_told_so(shop: Shop) -> None:
    """Many keys, for the moment in which the losers can fall over another constraint is short."""
    for number in range(100):
        key = checkout.key_of(f"order-{number}")
        assert sorted(at_once([partial(take, shop, key)] * 8)) == ["in flight"] * 7 + ["taken"]
    assert len(check_books(shop.database_url)) == 100


def test_of_eight_who_find_a_lease_over_one_takes_it_over(shop: Shop) -> None:
    for number in range(20):
        key = checkout.key_of(f"order-{number}")
        assert take(shop, key) == "taken"
        end_leases(shop.database_url)
        assert sorted(at_once([partial(take, shop, key)] * 8)) == ["in flight"] * 7 + ["taken"]


# Migrations


@contextlib.contextmanager
def made_database(database_url: str, how: str = "") -> Iterator[str]:
    name = f"empty_{secrets.token_hex(4)}"
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute(f"CREATE DATABASE {name} TEMPLATE template0 {how}".encode())
        yield urlsplit(database_url)._replace(path=f"/{name}").geturl()
        conn.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def empty_url(database_url: str) -> Iterator[str]:
    """A database with nothing in it."""
    with made_database(database_url) as url:
        yield url


ALL = [number for number, _ in migrations()]


def test_migrating_twice_does_nothing_the_second_time(empty_url: str) -> None:
    assert migrate(empty_url) == ALL
    assert migrate(empty_url) == []


@pytest.mark.parametrize("encoding", ["LATIN1", "WIN1252", "EUC_JP", "SQL_ASCII"])
def test_a_database_that_cannot_hold_every_name_is_refused(
    database_url: str, till: Till, open_shop: Callable[..., Shop], encoding: str
) -> None:
    with made_database(database_url, f"ENCODING '{encoding}' LOCALE 'C'") as url:
        refused = till.run("migrate", DATABASE_URL=url)
        assert (refused.status, len(refused.err.splitlines())) == (1, 1)
        assert f"its encoding is {encoding}" in refused.err
        assert f"BAD   database         its encoding is {encoding}" in till.run("doctor", DATABASE_URL=url).out
        assert open_shop(DATABASE_URL=url).client.simulate_get("/readyz").status_code == 503


def test_a_role_that_may_not_make_tables_is_told_so_in_one_line(
    empty_url: str, till: Till, open_shop: Callable[..., Shop]
) -> None:
    role = f"guest_{secrets.token_hex(4)}"
    url = re.sub(r"//[^@]*@", f"//{role}@", empty_url)
    with psycopg.connect(empty_url, autocommit=True) as conn:
        conn.execute(f"CREATE ROLE {role} LOGIN".encode())
        try:
            refused = till.run("migrate", DATABASE_URL=url)
            assert (refused.status, len(refused.err.splitlines())) == (1, 1)
            assert "DATABASE_URL): permission denied for schema public" in refused.err
            migrate(empty_url)
            assert open_shop(DATABASE_URL=url).create().status_code == 503  # it may not read the tables either
        finally:
            conn.execute(f"DROP ROLE {role}".encode())


def test_several_who_migrate_at_once_take_turns(empty_url: str) -> None:
    begin = threading.Barrier(4)

    def migrate_in_turn(_: int) -> list[int]:
        begin.wait(10)
        return migrate(empty_url)

    with ThreadPoolExecutor(4) as threads:
        ran = list(threads.map(migrate_in_turn, range(4)))
    assert sorted(number for numbers in ran for number in numbers) == ALL
    with psycopg.connect(empty_url) as conn:
        assert conn.execute("SELECT count(*) FROM secrets").fetchone() == (1,)


def test_a_newer_schema_is_left_alone_and_serves(shop: Shop, psql: Psql) -> None:
    psql.execute("INSERT INTO migrations VALUES (999, now())")
    assert migrate(shop.database_url) == []
    assert shop.client.simulate_get("/readyz").status_code == 200


def test_a_database_without_the_schema_is_not_ready_until_it_is_migrated(
    empty_url: str, open_shop: Callable[..., Shop]
) -> None:
    shop = open_shop(DATABASE_URL=empty_url)
    assert shop.client.simulate_get("/readyz").status_code == 503
    migrate(empty_url)
    assert shop.client.simulate_get("/readyz").status_code == 200
