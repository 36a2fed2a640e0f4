"""run all of it on this machine: database, schema, server and worker, and a sandbox where no provider is set"""

import argparse
import errno
import fcntl
import http.client
import json
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Self

import settings
from local import embedded, machine

READY_SECONDS, STOP_SECONDS = 60, 5
SHARED_NAMES = ("DATABASE_URL", "PAYSTACK_SECRET_KEY", "PAYSTACK_URL", "HOST", "PORT", "PUBLIC_URL")

EXAMPLE = (
    '{"customer_name": "John Doe", "customer_email": "john@example.com", "customer_phone": "+234 801 234 5678", '
    '"amount": 50, "location": "Lagos"}'
)


def run(_: argparse.Namespace) -> int:
    begun = time.monotonic()
    embedded.make_folder(machine.STATE)
    with ExitStack() as stack:
        try:
            note = stack.enter_context(claim_running())
            env = {"PAY_FORM": "on", **settings.environment(machine.FOLDER / ".env")}
            is_sandbox = "PAYSTACK_SECRET_KEY" not in env
            if is_sandbox and not settings.is_loopback(host := env.get("HOST", "127.0.0.1")):
                raise settings.Invalid(
                    f"HOST={host} lets others in, and the sandbox is for this machine alone: leave HOST out and "
                    "forward the port (ssh -L 8000:127.0.0.1:8000), or set PAYSTACK_SECRET_KEY and PUBLIC_URL"
                )
            if is_sandbox:
                env["PAYSTACK_SECRET_KEY"] = kept("sandbox/secret-key", lambda: f"sk_test_{secrets.token_hex(20)}")
            own_token = None
            if "ADMIN_TOKEN" not in env:
                own_token = env["ADMIN_TOKEN"] = kept("admin-token", lambda: secrets.token_hex(16))
            values = settings.load({"DATABASE_URL": "postgresql://", **env})
            port = free_port(values.host, [values.port])
            if is_sandbox:
                env["PAYSTACK_URL"] = f"http://127.0.0.1:{free_port('127.0.0.1', range(port + 1, port + 10))}"
            shared = {name: env[name] for name in SHARED_NAMES if name in env}
            env["DATABASE_URL"], cluster = stack.enter_context(machine.database(env))
            migrate({**os.environ, **env})
            children = stack.enter_context(Children({**os.environ, **env}, cluster))
            if is_sandbox:
                children.start("sandbox", *sandbox_arguments(env["PAYSTACK_URL"], values))
            children.start("gunicorn", "-m", "gunicorn", "paygate:create_app()")
            children.wait_until(lambda: is_ready(values), READY_SECONDS)
            note.write(json.dumps(shared).encode())
            note.flush()
            print(f"paygate is ready at {values.public_url} ({time.monotonic() - begun:.1f} s); Ctrl-C ends it")
            welcome(values, env["PAYSTACK_URL"] if is_sandbox else None, cluster, own_token)
            has_terminal = os.isatty(0)
            # make, where it leads the session (`ssh -t host make run`), hands the hang-up on to nobody.
            children.wait_until(lambda: has_terminal and not os.isatty(0))
        except KeyboardInterrupt:
            print("stopping", flush=True)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
    return 0


def migrate(env: dict[str, str]) -> None:
    """In a process of its own: what it imports is the product's. Raises settings.Invalid."""
    command = [sys.executable, "manage.py", "migrate"]
    done = subprocess.run(command, cwd=machine.FOLDER, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise settings.Invalid(done.stderr.strip().removeprefix("manage.py: "))


def welcome(
    values: settings.Settings, sandbox: str | None, cluster: embedded.Cluster | None, own_token: str | None
) -> None:
    headers = ["Content-Type: application/json", "Idempotency-Key: try-$(date +%s)"]
    if values.api_token:
        headers.append("Authorization: Bearer $API_TOKEN")
    options = " ".join(f'-H "{header}"' for header in headers)
    lines = {
        "a page": f"{values.public_url}/pay" if values.pay_form else None,
        "the desk": f"{values.public_url}/desk",
        "its token": own_token,
        "a request": f"curl {options} -d '{EXAMPLE}' {local_url(values)}/api/v1/payments",
        "provider": f"the sandbox at {sandbox}: no real money" if sandbox else values.paystack_url,
        "data": str(cluster.home) if cluster else "where DATABASE_URL says",
        "log": str(log_of("gunicorn")),
    }
    for name, line in lines.items():
        if line is not None:
            print(f"  {name:10} {line}", flush=True)


def is_ready(values: settings.Settings) -> bool:
    connection = http.client.HTTPConnection(local_url(values).removeprefix("http://"), timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def local_url(values: settings.Settings) -> str:
    """Where this machine reaches the server: a HOST that means every address is none to connect to."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(values.host, values.host)  # noqa: S104 (nothing binds here)
    return f"http://{f'[{host}]' if ':' in host else host}:{values.port}"


class Children:
    """The processes of `runserver`: where one ends, all do. The terminal's Ctrl-C reaches us, and we end them."""

    def __init__(self, env: dict[str, str], cluster: embedded.Cluster | None) -> None:
        self.env = env
        self.cluster = cluster
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def start(self, name: str, *arguments: str) -> None:
        with embedded.open_own(log_of(name)) as log_file:
            self.processes[name] = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=machine.FOLDER,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                start_new_session=True,
                preexec_fn=embedded.end_with_us(signal.SIGTERM),  # noqa: PLW1509 (there are no threads yet)
            )

    def wait_until(self, done: Callable[[], bool], within_seconds: float = math.inf) -> None:
        """Raises settings.Invalid when the time is over, or a child or the database has ended."""
        deadline = time.monotonic() + within_seconds
        while not done():
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise settings.Invalid(f"{name} ended with status {process.returncode}: {last_line(log_of(name))}")
            if self.cluster is not None and not self.cluster.is_running():
                raise settings.Invalid(f"the database ended: {last_line(self.cluster.log)}")
            if time.monotonic() > deadline:
                raise settings.Invalid(f"not ready after {within_seconds:g} s: {last_line(log_of('gunicorn'))}")
            time.sleep(machine.PAUSE_SECONDS)

    def __exit__(self, *_: object) -> None:
        """The server ends before what it asks."""
        for process in reversed(self.processes.values()):
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # gunicorn's workers too, where it was killed itself
            process.wait()


def log_of(name: str) -> Path:
    return machine.STATE / f"{name}.log"


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines()
    return f"{lines[-1] if lines else 'without a word'} (log: {path})"


@contextmanager
def claim_running() -> Iterator[IO[bytes]]:
    """The file RUNNING, empty and locked. Raises settings.Invalid where another `runserver` has it."""
    with embedded.open_own(machine.RUNNING) as note:
        for _ in range(10):  # a command that reads it holds it for a moment
            with suppress(BlockingIOError):
                fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(machine.PAUSE_SECONDS)
        else:
            raise settings.Invalid("runserver runs in this folder already: end it first")
        note.truncate(0)
        yield note
        note.truncate(0)


def free_port(host: str, ports: Sequence[int]) -> int:
    """The first of `ports` that nobody listens on. Raises settings.Invalid."""
    for port in ports:
        try:
            socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise settings.Invalid(f"cannot listen on {host}, port {port}: {error.strerror}") from error
        else:
            return port
    raise settings.Invalid(f"port {ports[-1]} is in use: end what uses it, or set PORT to another, as in PORT=8080")


def kept(name: str, make: Callable[[], str]) -> str:
    """A secret of this machine's, made once and kept beside the data: nobody else can read it."""
    path = machine.STATE / name
    embedded.make_folder(path.parent, 0o700)
    with embedded.open_own(path) as file:
        if file.tell() == 0:
            file.write(make().encode())
    return path.read_text()


def sandbox_arguments(url: str, values: settings.Settings) -> list[str]:
    webhook_url = f"{local_url(values)}/api/v1/webhooks/paystack"
    arguments = ["-m", "local.sandbox", f"--port={url.rpartition(':')[2]}", f"--data={machine.STATE / 'sandbox'}"]
    name = [f"--merchant={values.merchant_name}"] if values.merchant_name else []
    return [*arguments, f"--webhook-url={webhook_url}", *name]
