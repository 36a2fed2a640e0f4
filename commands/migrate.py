"""bring the schema of the database to this version"""

import argparse
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg

import db
from commands import Environment


def run(_: argparse.Namespace, env: Environment, url: str) -> int:
    numbers = migrate(url)
    print(f"ran migration {', '.join(map(str, numbers))}" if numbers else "the schema is up to date")
    return 0


SCHEMA = Path(__file__).parent.with_name("schema.sql")


def migrate(url: str) -> list[int]:
    """Bring the schema at `url` to this version and return the numbers of the migrations that were run.

    Each block of schema.sql is a transaction of its own that gives up a lock it cannot have soon, so that it holds up
    nobody who works, and is tried again. Two at once take turns. Raises db.DatabaseUnavailable.
    """
    try:
        with psycopg.connect(url, **db.connection_defaults(url)) as conn:
            db.check_session(conn)
            conn.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
            conn.execute("SELECT set_config('lock_timeout', '2s', false)")
            return [number for number, block in migrations() if _migrate_one(conn, number, block)]
    except psycopg.Error as error:
        raise db.DatabaseUnavailable(db.cause_of(error)) from error


def migrations() -> Iterator[tuple[int, str]]:
    """The numbered blocks of schema.sql."""
    parts = re.split(r"^-- migration ([0-9]+): .*$", SCHEMA.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for number, block in zip(parts[1::2], parts[2::2], strict=True):
        yield int(number), block


def _migrate_one(conn: psycopg.Connection[Any], number: int, block: str) -> bool:
    """Run one migration unless the database has it. The advisory lock lives as long as the transaction, which is all
    that a pooler in transaction mode grants."""
    for attempt in range(30):
        try:
            with conn.transaction():
                conn.execute("SELECT pg_advisory_xact_lock(hashtext('paygate'), hashtext(current_schema()))")
                # What the functions of schema.sql keep as theirs: our schema, and temporary tables last.
                conn.execute(
                    "SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true)"
                    " WHERE current_schema() IS NOT NULL"
                )
                conn.execute(
                    "CREATE TABLE IF NOT EXISTS migrations (number integer PRIMARY KEY, run_at timestamptz NOT NULL)"
                )
                taken = conn.execute(
                    "INSERT INTO migrations VALUES (%(number)s, clock_timestamp()) ON CONFLICT DO NOTHING",
                    {"number": number},
                )
                if taken.rowcount == 0:
                    return False
                conn.execute(block.encode())
                conn.execute(
                    "INSERT INTO secrets (value) VALUES (%(value)s) ON CONFLICT DO NOTHING",
                    {"value": secrets.token_bytes(32)},
                )
                return True
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
            time.sleep(min(1.0, 0.1 * 2**attempt))
    raise db.DatabaseUnavailable(f"migration {number} waited in vain for a lock")
