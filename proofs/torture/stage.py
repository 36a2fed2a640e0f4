"""The real thing, on this machine: a private PostgreSQL behind a relay, the sandbox, two gunicorns and a receiver."""

import base64
import contextlib
import http.client
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import psycopg.rows

from commands.migrate import migrate
from local import embedded, serving
from local.receiver import Receiver, status
from local.relay import Relay
from local.serving import Process, Reply, Server, children_of, free_port

SECRET_KEY = "sk_test_torture0123456789"  # noqa: S105  # the sandbox's
ADMIN_TOKEN = "the-owner-of-the-torture"  # noqa: S105  # this stage's own
NOTIFY_SECRET = "whsec_" + base64.b64encode(b"the merchant's own secret, 32 by").decode()
OK = status(204)
"""How the receiver answers what it takes."""
LEASE_SECONDS = 3
TTL_SECONDS = 36
PAGE_ROWS = 30
"""On a page of the provider's lists: fewer than paygate asks for."""
DISK_MEGABYTES = 4096
THREADS = 16
Json = dict[str, Any]


def ask(
    port: int,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
    wait: float = 30,
) -> Reply:
    """One request; status 0 where no answer came."""
    begun = time.monotonic()
    try:
        return serving.ask(port, method, path, body, headers, wait)
    except (OSError, http.client.HTTPException) as error:
        return Reply(0, {}, type(error).__name__, time.monotonic() - begun)


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
        migrate(database_url or self.cluster.url)
        self.database_url = database_url or self.relay.url
        self.receiver = stack.enter_context(Receiver())
        self.receiver.usual = OK
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
            "ADMIN_TOKEN": ADMIN_TOKEN,
            "WEB_CONCURRENCY": "2",
            "THREADS": str(threads),
            "DB_POOL": "6",
            "NOTIFY_URL": self.receiver.url,
            "NOTIFY_SECRET": NOTIFY_SECRET,
            **env,
        }
        self.instances = [
            Server(folder / name, {**self.env, "PORT": str(port)}) for name, port in zip("ab", ports, strict=False)
        ]
        options = [f"--port={ports[2]}", f"--data={folder / 'ledger'}", "--refund-seconds=0.5"]
        options += [f"--webhook-url={self.webhook_url}", f"--page-cap={PAGE_ROWS}"]
        options += ["--retry-seconds", "1", "3", "8", "20"]
        key = {"PAYSTACK_SECRET_KEY": SECRET_KEY}
        self.sandbox = Process(folder / "sandbox", ["-m", "local.sandbox", *options], key, ports[2])
        self.provider_faults: list[Json] = []
        self.met: Counter[str] = Counter()
        """The provider's faults that calls and events have met, of sandboxes that were ended since."""
        for process in (self.sandbox, *self.instances):
            stack.callback(process.kill)
            process.start()
        self.wait_until_ready()

    def start_database(self, stack: contextlib.ExitStack) -> str:
        """A private server, its relay, and where we reach it past that."""
        self.disk = small_disk(self.folder / "disk", stack)
        self.cluster = embedded.Cluster((self.disk or self.folder) / "postgres")
        stack.callback(self.cluster.stop)
        self.cluster.start()
        for line in ("max_wal_size = '512MB'", "log_min_messages = 'fatal'"):
            with psycopg.connect(self.cluster.superuser_url, autocommit=True) as conn:
                conn.execute(f"ALTER SYSTEM SET {line}".encode())
        self.cluster.restart()
        self.relay = stack.enter_context(Relay(self.cluster.url))
        return self.cluster.superuser_url

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
        return reply.json["result"] if reply.status_code == 200 else None

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
        """Straight to the server, past the relay and paygate's roles."""
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
