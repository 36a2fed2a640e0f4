"""Backup and restore: what comes back is whole, and paygate finds what has happened since."""

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from backstage import make_due, worker_of
from commands import backup
from invariants import check_books
from ledger import as_superuser
from local.sandbox import Sandbox
from shop import ROOT, Shop, environment, open_shop, sandbox, shop  # noqa: F401  # fixtures
from till import Till, open_till, till  # noqa: F401  # fixtures


@pytest.fixture
def empty_database(database_url: str) -> Iterator[str]:
    """The URL of a database beside the test's own, without any table."""
    name = "paygate_restored"
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute(f"CREATE DATABASE {name} TEMPLATE template0".encode())
        before, _, after = database_url.partition(f"/{conn.info.dbname}?")
        try:
            yield f"{before}/{name}?{after}"
        finally:
            conn.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def manage(sandbox: Sandbox, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:  # noqa: F811
    def run(database_url: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "manage.py"), *arguments],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **environment(database_url, sandbox), **env},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def test_what_is_restored_is_whole_and_what_happened_since_is_found(
    shop: Shop,  # noqa: F811
    open_shop: Callable[..., Shop],  # noqa: F811
    empty_database: str,
    manage: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    paid, pending = shop.created(key="paid"), shop.created(key="pending")
    shop.pay(paid["reference"])
    dump = tmp_path / "paygate.dump"
    made = manage(shop.database_url, "backup", str(dump))
    assert made.returncode == 0, made.stderr
    checkpoint = backup.checkpoint_of(dump).read_text().strip()
    assert checkpoint in made.stdout

    # What the restored database will know nothing of.
    shop.pay(pending["reference"])
    lost = shop.created(key="lost")
    shop.pay(lost["reference"])
    assert manage(shop.database_url, "refund", paid["id"], "--amount", "20.00", "--yes").returncode == 0
    shop.sandbox.move_refund(paid["reference"], "processed")

    restored = manage(empty_database, "restore", str(dump))
    assert restored.returncode == 0, restored.stderr
    assert checkpoint in restored.stdout
    again = Shop(empty_database, shop.sandbox)
    with again:
        assert again.get(pending["id"])["status"] == "pending"
        assert again.create(key="pending").json["payment"]["checkout_url"] == pending["checkout_url"]
        answer = again.create(key="lost")
        assert (answer.status_code, answer.json["payment"]["id"]) == (201, lost["id"])
        assert answer.json["payment"]["status"] == "completed"
        make_due(empty_database)
        worker_of(again).run_once()
        assert again.get(pending["id"])["status"] == "completed"
        assert (again.get(paid["id"])["status"], again.get(paid["id"])["refunded_amount"]) == ("partially_refunded", 20)
    check_books(empty_database)
    for command in (["reconcile"], ["audit", "--against", checkpoint]):
        run = manage(empty_database, *command)
        assert run.returncode == 0, run.stdout + run.stderr


def test_a_backup_a_day_keeps_the_newest_and_touches_nothing_else(
    shop: Shop,  # noqa: F811
    till: Till,  # noqa: F811
    tmp_path: Path,
) -> None:
    payment = shop.created()
    folder = tmp_path / "backups"
    folder.mkdir()
    mine = ["paygate.dump", "paygate-2020-01-01.dump", "notes-2020-01-01T000000Z.dump"]
    old = [f"paygate-2020-01-0{day}T000000Z.dump" for day in range(1, 6)]
    for name in [*mine, *old, *(f"{name}.checkpoint" for name in old)]:
        (folder / name).write_text("")
    till.did("backup", str(folder), "--keep", "3")
    new = [path.name for path in folder.glob("paygate-2???-*Z.dump") if path.name not in old]
    assert len(new) == 1
    kept = [*old[-2:], *new]
    assert {path.name for path in folder.iterdir()} == {*mine, *kept, *(f"{name}.checkpoint" for name in kept)}
    assert till.run("backup", str(folder / "x.dump"), "--keep", "3").status == 1
    as_superuser(till, "UPDATE payments SET amount_minor = 1 WHERE id = %s", payment["id"])
    assert till.run("backup", str(folder), "--keep", "1").status == 1  # broken books replace no whole ones
    assert set(kept) < {path.name for path in folder.iterdir()}


def test_a_dump_that_is_not_there_is_named(till: Till) -> None:  # noqa: F811
    assert till.run("restore", "nope.dump").err == "manage.py: nope.dump is not there\n"


def test_a_row_that_was_changed_in_the_backup_is_found(
    shop: Shop,  # noqa: F811
    empty_database: str,
    manage: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    shop.created()
    dump = tmp_path / "paygate.dump"
    assert manage(shop.database_url, "backup", str(dump)).returncode == 0
    other = backup.checkpoint_of(dump)
    number, _, digest = other.read_text().strip().partition(":")
    other.write_text(f"{number}:{digest[::-1]}\n")
    restored = manage(empty_database, "restore", str(dump))
    assert restored.returncode == 1
    assert f"checkpoint {number}: " in restored.stdout


def test_nobody_else_may_read_a_backup(
    shop: Shop,  # noqa: F811
    manage: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    dump = tmp_path / "paygate.dump"
    assert manage(shop.database_url, "backup", str(dump)).returncode == 0
    for path in (dump, backup.checkpoint_of(dump)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("there_already", ["paygate.dump", "paygate.dump.checkpoint"])
def test_a_backup_is_never_overwritten(
    there_already: str,
    shop: Shop,  # noqa: F811
    manage: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    (tmp_path / there_already).write_text("older")
    refused = manage(shop.database_url, "backup", str(tmp_path / "paygate.dump"))
    assert (refused.returncode, "is there already" in refused.stderr) == (1, True)
    assert (tmp_path / there_already).read_text() == "older"


def test_a_backup_that_fails_leaves_nothing(
    shop: Shop,  # noqa: F811
    manage: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    shop.sql("ALTER TABLE payments RENAME TO elsewhere")  # so that reading the books fails
    assert manage(shop.database_url, "backup", str(tmp_path / "paygate.dump")).returncode == 1
    shop.sql("ALTER TABLE elsewhere RENAME TO payments")
    refused = manage(shop.database_url, "backup", str(tmp_path / "missing" / "paygate.dump"))
    assert refused.returncode == 1
    assert [path.name for path in tmp_path.iterdir() if "dump" in path.name] == []


def test_nothing_is_restored_over_what_is_there(
    shop: Shop,  # noqa: F811
    manage: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    kept = shop.created()
    dump = tmp_path / "paygate.dump"
    assert manage(shop.database_url, "backup", str(dump)).returncode == 0
    refused = manage(shop.database_url, "restore", str(dump))
    assert (refused.returncode, "not empty" in refused.stderr) == (1, True)
    assert shop.get(kept["id"])["status"] == "pending"


def test_after_a_long_outage_the_lists_of_all_that_time_are_read(shop: Shop) -> None:  # noqa: F811
    """A charge of ten days ago, of a payment whose own looks have ended, is found all the same."""
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    shop.sandbox.backdate(payment["reference"], 10 * 86400)
    shop.sql("UPDATE payments SET poll_at = NULL")
    shop.sql("INSERT INTO jobs (mode, name, due_at, done_at) VALUES ('test', 'apply_lists', now(), now())")
    worker_of(shop).apply_lists()
    assert shop.get(payment["id"])["status"] == "pending"
    shop.sql("UPDATE jobs SET due_at = now(), done_at = now() - interval '9 days' WHERE name = 'apply_lists'")
    worker_of(shop).apply_lists()
    assert shop.get(payment["id"])["status"] == "completed"
