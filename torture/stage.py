"""The real thing, on this machine: a private PostgreSQL behind a proxy, the sandbox, two gunicorns and a receiver."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import psycopg.rows

import db
import embedded
from torture.proxy import Proxy
from torture.receiver import NOTIFY_SECRET, Receiver

ROOT = Path(__file__).resolve().parent.parent
SECRET_KEY = "sk_test_torture0123456789"  # noqa: S105  # the sandbox's
LEASE_SECONDS = 3
TTL_SECONDS = 36
DISK_MEGABYTES = 4096
THREADS = 16
Json = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """An answer over HTTP; status 0 where none came."""

    status: int
    headers: dict[str, str]
    text: str
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(self.text)


def ask(
    port: int,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
    timeout: float = 30,
) -> Reply:
    """One request on a connection of its own."""
    begun = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        text = answer.read().decode("utf-8", "replace")
        given = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(answer.status, given, text, time.monotonic() - begun)
    except (OSError, http.client.HTTPException) as error:
        return Reply(0, {}, type(error).__name__, time.monotonic() - begun)
    finally:
        connection.close()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def children_of(pid: int) -> list[int]:
    """Those that any of its threads has started."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(each) for each in thread.read_text().split()]
    return found


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class Process:
    """A program that is started, killed and started again; `log` keeps all that it prints."""

    def __init__(self, name: str, folder: Path, arguments: list[str], env: dict[str, str], port: int) -> None:
        self.name, self.arguments, self.port = name, arguments, port
        self.folder = folder / name
        self.folder.mkdir()
        self.log = self.folder / "log"
        self.env = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "PYTHONPATH": str(ROOT), **env}
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.RLock()

    def start(self) -> None:
        with self.lock, self.log.open("ab") as log:
            if self.process is not None and self.process.poll() is None:
                return
            # It ends with the thread that started it, and only the main one lasts as long as we do.
            is_main = threading.current_thread() is threading.main_thread()
            self.process = subprocess.Popen(
                [sys.executable, *self.arguments],
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=embedded.end_with_us(signal.SIGKILL) if is_main else None,  # noqa: PLW1509 (prctl alone)
            )

    @property
    def pid(self) -> int:
        return self.process.pid if self.process else 0

    @property
    def pids(self) -> list[int]:
        """The process and its children."""
        return [self.pid, *children_of(self.pid)] if self.process else []

    def kill(self) -> None:
        """All of it at once, without a word."""
        with self.lock:
            if self.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
                self.process.wait()

    def terminate(self, within_seconds: float) -> bool:
        """Ask it to end; False when it had to be killed."""
        with self.lock:
            if self.process is None:
                return True
            send(self.pids, signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(within_seconds)
            except subprocess.TimeoutExpired:
                return False
            finally:
                self.kill()
            return True

    def is_ready(self) -> bool:
        return ask(self.port, "GET", "/readyz", timeout=5).status == 200


class Stage:
    """Everything that runs. `instances` are the two gunicorns; `sandbox` the provider; `cluster` the database."""

    def __init__(
        self,
        folder: Path,
        stack: contextlib.ExitStack,
        *,
        threads: int = THREADS,
        database_url: str | None = None,
        **env: str,
    ) -> None:
        """With a `database_url` that database is used, and no faults can be made in it from here."""
        self.folder = folder
        self.disk: Path | None = None
        """The database's own file system, where one could be mounted."""
        self.admin_url = database_url or self.start_database(stack)
        db.migrate(self.admin_url)
        self.database_url = database_url or (
            f"postgresql://paygate@127.0.0.1:{self.proxy.port}/postgres?sslmode=disable"
        )
        self.receiver = stack.enter_context(Receiver())
        ports = [free_port() for _ in range(3)]
        self.webhook_url = f"http://127.0.0.1:{ports[0]}/api/v1/webhooks/paystack"
        self.env = {
            "DATABASE_URL": self.database_url,
            "PAYSTACK_SECRET_KEY": SECRET_KEY,
            "PAYSTACK_URL": f"http://127.0.0.1:{ports[2]}",
            "PAYSTACK_TIMEOUT": "1",
            "LEASE_SECONDS": str(LEASE_SECONDS),
            "PAYMENT_TTL_HOURS": str(TTL_SECONDS / 3600),
            "WORKER_INTERVAL": "0.5",
            "RATE_LIMIT": "off",
            "WEB_CONCURRENCY": "2",
            "THREADS": str(threads),
            "DB_POOL": "6",
            "NOTIFY_URL": self.receiver.url,
            "NOTIFY_SECRET": NOTIFY_SECRET,
            **env,
        }
        gunicorn = ["-m", "gunicorn", "--config", str(ROOT / "gunicorn.conf.py"), "paygate:create_app()"]
        self.instances = [
            Process(name, folder, gunicorn, {**self.env, "PORT": str(port)}, port)
            for name, port in zip(("a", "b"), ports, strict=False)
        ]
        options = [f"--port={ports[2]}", f"--data={folder / 'ledger'}", "--refund-seconds=0.5"]
        options += [f"--webhook-url={self.webhook_url}", "--retry-seconds", "1", "3", "8", "20"]
        self.sandbox = Process(
            "sandbox", folder, [str(ROOT / "sandbox.py"), *options], {"PAYSTACK_SECRET_KEY": SECRET_KEY}, ports[2]
        )
        self.provider_faults: list[Json] = []
        self.met: Counter[str] = Counter()
        """The provider's faults that calls and events have met, of sandboxes that were ended since."""
        for process in (self.sandbox, *self.instances):
            stack.callback(process.kill)
            process.start()
        self.wait_until_ready()

    def start_database(self, stack: contextlib.ExitStack) -> str:
        """A private server, its proxy, and where we reach it past that."""
        self.disk = small_disk(self.folder / "disk", stack)
        self.cluster = embedded.Cluster((self.disk or self.folder) / "postgres")
        stack.callback(self.cluster.stop)
        self.cluster.start()
        for line in ("max_connections = 60", "max_wal_size = '512MB'", "log_min_messages = 'fatal'"):
            with psycopg.connect(self.cluster.url, autocommit=True) as conn:
                conn.execute(f"ALTER SYSTEM SET {line}".encode())
        self.cluster.restart()
        self.proxy = stack.enter_context(Proxy(self.cluster.sockets / embedded.SOCKET))
        return self.cluster.url

    @property
    def command_env(self) -> dict[str, str]:
        """The environment of an operator's commands."""
        return {**self.instances[0].env, "PORT": "8000"}

    @property
    def ports(self) -> list[int]:
        return [instance.port for instance in self.instances]

    def wait_until_ready(self, within_seconds: float = 30) -> None:
        deadline = time.monotonic() + within_seconds
        while not (
            all(each.is_ready() for each in self.instances) and self.control("calls", endpoint="verify") is not None
        ):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not ready within {within_seconds:g} s; see the logs in {self.folder}")
            time.sleep(0.1)

    # The provider

    def control(self, method: str, **arguments: Any) -> Any:
        """What a control of the sandbox returns; None where it does not answer or refuses."""
        reply = ask(
            self.sandbox.port,
            "POST",
            f"/_sandbox/{method}",
            json.dumps(arguments).encode(),
            {"Content-Type": "application/json"},
        )
        return reply.json["result"] if reply.status == 200 else None

    def start_sandbox(self) -> None:
        self.sandbox.start()
        deadline = time.monotonic() + 10
        while self.control("calls", endpoint="verify") is None and time.monotonic() < deadline:
            time.sleep(0.05)
        for fault in self.provider_faults:
            self.control("fault", **fault)

    def note_met(self) -> None:
        """Before a sandbox is ended: how many of its faults were met."""
        self.met.update(self.control("faults_met") or {})

    # The database

    def sql(self, statement: str, *values: object) -> list[Json]:
        """Straight to the server, past the proxy and paygate's roles."""
        with psycopg.connect(
            self.admin_url,
            autocommit=True,
            row_factory=psycopg.rows.dict_row,
            connect_timeout=10,
            target_session_attrs="read-write",
        ) as conn:
            cursor = conn.execute(statement.encode(), values or None)
            return cursor.fetchall() if cursor.description else []

    @property
    def server_pids(self) -> list[int]:
        pid = self.cluster.pid or 0
        return [pid, *children_of(pid)] if pid else []


def small_disk(folder: Path, stack: contextlib.ExitStack) -> Path | None:
    """A file system of its own that can be made full; None where we may not mount one."""
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        return None
    options = f"size={DISK_MEGABYTES}m,mode=0711"
    if subprocess.run([mount, "-t", "tmpfs", "-o", options, "torture", folder], check=False).returncode:
        return None
    stack.callback(lambda: subprocess.run(["umount", "-l", folder], check=False))  # noqa: S607
    return folder


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="paygate-torture-"))
    folder.chmod(0o711)  # the database's user has to pass
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
