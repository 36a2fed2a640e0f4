"""bring a backup back into an empty database, and prove that it is whole

Stop paygate first, or give it the new database afterwards. schema.sql makes the tables and their guards anew. restore
reads only the rows of our tables from the file, so nothing in the file can run. Once paygate runs, it finds what
happened at Paystack since the backup; `reconcile` says whether anything is left.

examples:
  DATABASE_URL=postgresql://… python manage.py restore /var/backups/paygate-2026-01-31.dump
"""

import argparse
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import psycopg
from psycopg import sql

import commands
import db
from commands import Parser, Refused, audit, backup
from commands.migrate import migrate, migrations


def add_arguments(parser: Parser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE")


def run(arguments: argparse.Namespace, env: commands.Environment, url: str) -> int:
    against = read(url, arguments.file)
    with commands.reading(url) as conn:
        status = audit.Proof(conn, against).tell()
        last = db.only_row(conn, "SELECT max(at) AS at FROM payment_events")["at"]
    if status == 0:
        commands.print_next(f"reconcile --since {last:%Y-%m-%d}" if last else "doctor")
    return status


OBJECTS = """
    SELECT count(*) AS count FROM pg_class
     WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p', 'f', 'v', 'm')
"""

TABLES = [name for _, block in migrations() for name in re.findall(r"^CREATE TABLE (\w+)", block, re.MULTILINE)]
"""In the order in which they refer to each other."""

COPIED = re.compile(rb"COPY \S+ \(([\w\", ]+)\) FROM stdin;\n", re.ASCII)


def read(url: str, file: Path) -> tuple[int, str]:
    """Restore `file` into the empty database at `url`, and return the checkpoint that was kept beside it. Raises
    Refused.

    What is done once a day is due at once then: it finds what the provider has done since.
    """
    if not file.is_file():
        raise Refused(f"{file} is not there")
    number, _, digest = backup.checkpoint_of(file).read_text().strip().partition(":")
    if not re.fullmatch(r"[0-9]+:[0-9a-f]{64}", f"{number}:{digest}"):
        raise Refused(f"{file} and {backup.checkpoint_of(file).name} are not both a backup of ours")
    list(rows_of(file, "secrets"))  # it can be read, or nothing is begun
    with commands.reading(url) as conn:
        if db.only_row(conn, OBJECTS)["count"]:
            raise Refused("the database is not empty: restore into one that has no tables")
        migrate(url)
        conn.execute("SELECT set_config('statement_timeout', '0', false)")
        conn.patience_seconds = 86400
        try:
            with conn.transaction():
                _load(conn, file)
        except psycopg.Error as error:
            raise Refused(f"{file} is no backup of ours: {' '.join(str(error).split())}") from error
    return int(number), digest


def _load(conn: db.BoundedConnection, file: Path) -> None:
    """Fill our empty tables. The triggers are off in this transaction alone; keys and constraints are checked."""
    for table in map(sql.Identifier, TABLES):
        conn.execute(sql.SQL("ALTER TABLE {} DISABLE TRIGGER USER").format(table))
    conn.execute("DELETE FROM secrets")  # that of the backup takes its place
    for table in commands.watch(iter(TABLES), len(TABLES)):
        rows = rows_of(file, table)
        columns = [sql.Identifier(name.strip(' "')) for name in next(rows).decode().split(",")]
        statement = sql.SQL("COPY {} ({}) FROM STDIN").format(sql.Identifier(table), sql.SQL(", ").join(columns))
        with conn.cursor().copy(statement) as copy:
            for row in rows:
                copy.write(row)
    for table in conn.execute(NUMBERED).fetchall():
        query = sql.SQL("SELECT setval(pg_get_serial_sequence({}, {}), max({})) FROM {}")
        name, column = table["name"], table["column"]
        conn.execute(query.format(name, column, sql.Identifier(column), sql.Identifier(name)))
    conn.execute("UPDATE jobs SET due_at = now()")
    for table in map(sql.Identifier, TABLES):
        conn.execute(sql.SQL("ALTER TABLE {} ENABLE TRIGGER USER").format(table))


NUMBERED = """
    SELECT relname AS name, attname AS column FROM pg_attribute JOIN pg_class c ON c.oid = attrelid
     WHERE relnamespace = current_schema()::regnamespace AND attidentity <> ''
"""


def rows_of(file: Path, table: str) -> Iterator[bytes]:
    """The names of the columns of a table in the backup, and then its rows, as COPY writes them. Raises Refused.

    pg_restore prints the file as SQL; none of that is run, so it may be of another version than the server.
    """
    with backup.running("pg_restore", "--data-only", f"--table={table}", "--file=-", str(file)) as process:
        lines = iter(process.stdout or ())
        columns = next((found[1] for line in lines if (found := COPIED.fullmatch(line))), None)
        if columns is not None:
            yield columns
            yield from itertools.takewhile(lambda line: line != b"\\.\n", lines)
        list(lines)  # to their end: else pg_restore fails
    if columns is None:
        raise Refused(f"{file} is no backup of ours: there is no table {table} in it")
