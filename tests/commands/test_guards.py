# ruff: noqa: F811, S608  (fixtures are imported by their names; the SQL is written here)
"""No caller's own tables, names or rights go round the guards of the database."""

import re
from collections.abc import Iterator

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

import commands
from backstage import worker_of
from commands import guards
from shop import ROOT, Shop, open_shop, sandbox, shop  # noqa: F401  # fixtures

TABLES = ("payments", "charges", "refunds", "incidents", "payment_events", "idempotency_keys")
ROLE = "paygate_clerk"
NOTIFY = {"NOTIFY_URL": "http://127.0.0.1:9/", "NOTIFY_SECRET": "whsec_" + "QUFB" * 11}


@pytest.fixture
def clerk(shop: Shop) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """A role that may read and write the rows of our tables, and make temporary ones, as PUBLIC may."""
    with psycopg.connect(shop.database_url, autocommit=True) as conn:
        conn.execute(f"CREATE ROLE {ROLE} LOGIN".encode())
        conn.execute(f"GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA public TO {ROLE}".encode())
        try:
            with psycopg.connect(make_conninfo(shop.database_url, user=ROLE), autocommit=True) as theirs:
                yield theirs
        finally:
            conn.execute(f"DROP OWNED BY {ROLE}; DROP ROLE {ROLE}".encode())


def test_a_temporary_table_of_charges_pays_for_nothing(
    shop: Shop, clerk: psycopg.Connection[tuple[object, ...]]
) -> None:
    payment = shop.created()
    clerk.execute("CREATE TEMPORARY TABLE charges AS SELECT * FROM public.charges")
    clerk.execute(
        """
        INSERT INTO charges (reference, payment_id, mode, amount_minor, requested_minor, currency, source)
        SELECT reference, id, mode, amount_minor, amount_minor, currency, 'worker' FROM payments
        """
    )
    with pytest.raises(psycopg.errors.CheckViolation, match="has no charge that pays it"):
        clerk.execute(
            """
            UPDATE payments SET status = 'completed', paid_at = now(), charge_reference = reference,
                                charged_minor = amount_minor
            """
        )
    assert shop.get(payment["id"])["status"] == "pending"


@pytest.mark.parametrize("table", TABLES)
def test_no_temporary_table_swallows_the_trail(
    shop: Shop, clerk: psycopg.Connection[tuple[object, ...]], table: str
) -> None:
    payment = shop.created()
    clerk.execute(f"CREATE TEMPORARY TABLE {table} AS SELECT * FROM public.{table}".encode())
    clerk.execute("UPDATE public.payments SET customer_email = 'eve@example.com'")
    trail = shop.sql("SELECT actor, why FROM payment_events WHERE payment_id = %s ORDER BY n", payment["id"])
    assert trail[-1] == {"actor": f"operator:{ROLE}", "why": "by_hand"}
    with commands.reading(shop.database_url) as conn:
        assert list(guards.broken(conn)) == []


def test_every_function_looks_names_up_in_its_schema_and_among_temporary_tables_last(shop: Shop) -> None:
    """But those whose names were looked up when they were made."""
    functions = shop.sql(
        """
        SELECT proname AS name, proconfig AS config FROM pg_proc
         WHERE pronamespace = 'public'::regnamespace AND pg_get_function_sqlbody(oid) IS NULL
        """
    )
    assert {row["name"] for row in functions} >= {"write_payment_event", "guard_completion", "payment_digest"}
    for function in functions:
        assert "search_path=public, pg_temp" in (function["config"] or []), function["name"]


def test_who_may_make_no_schema_is_told_that_the_guards_were_not_compared(
    shop: Shop, clerk: psycopg.Connection[tuple[object, ...]]
) -> None:
    with commands.reading(make_conninfo(shop.database_url, user=ROLE)) as conn:
        (line,) = guards.broken(conn)
    assert line.startswith("the guards cannot be compared")


def test_the_role_that_serves_needs_no_more_than_the_page_on_deployment_grants_it(shop: Shop) -> None:
    grants = re.search(r"```sql\n(GRANT .*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL)
    assert grants is not None
    url, role = make_conninfo(shop.database_url), "paygate_service"
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(f"CREATE ROLE {role} LOGIN; REVOKE TEMPORARY ON DATABASE {conn.info.dbname} FROM PUBLIC".encode())
        try:
            conn.execute(grants[1].encode())
            with Shop(re.sub("//[^@]*@", f"//{role}@", shop.database_url), shop.sandbox, **NOTIFY) as service:
                payment = service.created()
                service.pay(payment["reference"])
                assert service.get(payment["id"])["status"] == "completed"
                worker_of(service).run_once()
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    service.sql("UPDATE secrets SET value = sha256('')")
        finally:
            conn.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())


def test_what_an_owner_adds_beside_our_tables_is_no_break(shop: Shop) -> None:
    shop.sql("CREATE TABLE notes (payment_id text); CREATE INDEX mine ON payments (location)")
    shop.sql("CREATE VIEW takings AS SELECT sum(charged_minor) FROM payments; CREATE SCHEMA other")
    with commands.reading(shop.database_url) as conn:
        assert list(guards.broken(conn)) == []
        assert conn.execute("SELECT FROM pg_namespace WHERE nspname LIKE 'paygate_expected%'").fetchone() is None
