# ruff: noqa: F811  (fixtures are imported by their names)
"""What a restore takes out of a backup, and what a backup holds whatever the defaults are."""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from commands import backup
from shop import Shop, open_shop, query, sandbox, shop  # noqa: F401  # fixtures
from test_backup import empty_database, manage  # noqa: F401  # fixtures

Manage = Callable[..., subprocess.CompletedProcess[str]]
OWNER = "paygate_owner"


@pytest.fixture
def owned_database(database_url: str, empty_database: str) -> Iterator[str]:
    """The URL of an empty database, as the role that owns it and is no superuser."""
    name = conninfo_to_dict(empty_database)["dbname"]
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute(f"CREATE ROLE {OWNER} LOGIN; ALTER DATABASE {name} OWNER TO {OWNER}".encode())
        try:
            yield re.sub("//[^@]*@", f"//{OWNER}@", empty_database)
        finally:
            conn.execute(f"ALTER DATABASE {name} OWNER TO CURRENT_USER".encode())
            with psycopg.connect(empty_database, autocommit=True) as theirs:
                theirs.execute(f"DROP OWNED BY {OWNER}".encode())
            conn.execute(f"DROP ROLE {OWNER}".encode())


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Where the server's user may write."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


def test_nothing_in_a_backup_runs_but_its_rows_come_back(
    shop: Shop, empty_database: str, manage: Manage, tmp_path: Path, open_folder: Path
) -> None:
    """A view that is filled by a command, a function that a constraint calls, a trigger, a table of another's."""
    paid = shop.created()
    shop.pay(paid["reference"])
    ran = open_folder / "ran"
    shop.sql(
        f"""
        CREATE FUNCTION run() RETURNS integer LANGUAGE plpgsql AS $$
        BEGIN
            COPY (SELECT 1) TO PROGRAM 'cat > {ran}';
            RETURN 1;
        END
        $$;
        CREATE FUNCTION run_too() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM public.run(); RETURN NEW; END';
        CREATE MATERIALIZED VIEW leak AS SELECT public.run() AS n;
        CREATE TABLE more (n integer DEFAULT public.run() CHECK (public.run() = n));
        INSERT INTO more DEFAULT VALUES;
        CREATE TRIGGER more BEFORE INSERT ON payments FOR EACH ROW EXECUTE FUNCTION run_too();
        """
    )
    dump = tmp_path / "paygate.dump"
    assert manage(shop.database_url, "backup", str(dump)).returncode == 1  # the trigger is none of schema.sql
    assert ran.exists()
    ran.unlink()
    restored = manage(empty_database, "restore", str(dump))
    assert restored.returncode == 0, restored.stdout + restored.stderr
    assert not ran.exists()
    assert query(empty_database, "SELECT to_regclass('leak') AS leak, to_regclass('more') AS more") == [
        {"leak": None, "more": None}
    ]
    everything = "SELECT * FROM payments"
    assert query(empty_database, everything) == query(shop.database_url, everything)


def test_who_owns_the_database_and_is_no_superuser_restores_it_whole_and_goes_on(
    shop: Shop, owned_database: str, manage: Manage, tmp_path: Path
) -> None:
    paid = shop.created()
    shop.pay(paid["reference"])
    dump = tmp_path / "paygate.dump"
    assert manage(shop.database_url, "backup", str(dump)).returncode == 0
    restored = manage(owned_database, "restore", str(dump))
    assert restored.returncode == 0, restored.stdout + restored.stderr
    with Shop(owned_database, shop.sandbox) as again:
        assert again.get(paid["id"])["status"] == "completed"
        again.pay(again.created()["reference"])
    assert manage(owned_database, "audit").returncode == 0


def test_a_file_without_our_tables_is_refused_and_nothing_is_made(
    shop: Shop, empty_database: str, manage: Manage, tmp_path: Path
) -> None:
    dump = tmp_path / "paygate.dump"
    assert manage(shop.database_url, "backup", str(dump)).returncode == 0
    dump.write_bytes(b"no dump at all")
    refused = manage(empty_database, "restore", str(dump))
    assert (refused.returncode, refused.stderr.startswith("manage.py: pg_restore: ")) == (1, True), refused.stderr
    dump.unlink()
    subprocess.run(
        [backup.program("pg_dump"), "--format=custom", "--table=migrations", f"--file={dump}", shop.database_url],
        check=True,
    )
    refused = manage(empty_database, "restore", str(dump))
    assert (refused.returncode, "there is no table secrets in it" in refused.stderr) == (1, True), refused.stderr
    assert query(empty_database, "SELECT to_regclass('payments') AS payments") == [{"payments": None}]


def test_names_in_every_script_are_in_a_backup_whatever_encoding_the_defaults_name(
    shop: Shop, empty_database: str, manage: Manage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop.created(customer_name="Жанна Ọlá 山田")
    name = conninfo_to_dict(shop.database_url)["dbname"]
    shop.sql(f"ALTER DATABASE \"{name}\" SET client_encoding = 'LATIN1'")
    shop.sql(f"ALTER ROLE CURRENT_USER IN DATABASE \"{name}\" SET client_encoding = 'LATIN1'")
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    dump = tmp_path / "paygate.dump"
    made = manage(shop.database_url, "backup", str(dump), PGCLIENTENCODING="LATIN1")
    assert made.returncode == 0, made.stderr
    restored = manage(empty_database, "restore", str(dump), PGCLIENTENCODING="LATIN1")
    assert restored.returncode == 0, restored.stderr
    monkeypatch.delenv("PGCLIENTENCODING")
    assert query(empty_database, "SELECT customer_name FROM payments") == [{"customer_name": "Жанна Ọlá 山田"}]


def test_no_secret_of_the_url_is_on_a_command_line(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "pg_dump"
    fake.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/line\necho "$PGPASSWORD" > {tmp_path}/password\n'
        f'stat -c %a "$PGSERVICEFILE" > {tmp_path}/mode\ncp "$PGSERVICEFILE" {tmp_path}/service\n'
    )
    fake.chmod(0o755)
    monkeypatch.setattr(backup, "program", lambda name: str(fake))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    url = make_conninfo(shop.database_url, password="s3cret", sslpassword="s3cret too")
    backup.write(url, tmp_path / "x.dump", "1:0")
    assert "s3cret" not in (tmp_path / "line").read_text()
    assert (tmp_path / "password").read_text() == "s3cret\n"
    assert (tmp_path / "mode").read_text() == "600\n"
    service = (tmp_path / "service").read_text()
    assert "\nsslpassword=s3cret too\n" in service
    assert "password=s3cret\n" not in service
    assert list(tmp_path.glob("paygate-service-*")) == []
