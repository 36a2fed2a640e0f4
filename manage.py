"""paygate's command line.

On this machine:
  python manage.py runserver               all of it, with a database and a stand-in for Paystack
  python manage.py migrate                 bring the schema of DATABASE_URL to this version
  python manage.py test                    run the tests

From day to day:
  python manage.py doctor                  what is wrong, and what to do about it
  python manage.py list --status review    what waits for a decision
  python manage.py show PAY-…              the whole story of one payment
  python manage.py refund PAY-…            give money back

At the end of the month:
  python manage.py reconcile               ours against Paystack's lists
  python manage.py report --format html    gross, fees, refunds, net
  python manage.py audit                   the proof that the books are whole

Without DATABASE_URL a command uses the embedded database, and what a running `runserver` uses. The exit status is 0
when it is done, 1 when it was refused or something was found wanting, 2 for wrong usage. More about each command:
python manage.py COMMAND --help
"""

import argparse
import difflib
import errno
import fcntl
import importlib
import importlib.util
import io
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
from typing import IO, NoReturn, Self

import embedded

try:
    import commands
    import db
    import settings
    from books import Refused
except ModuleNotFoundError as missing:
    sys.exit(f"manage.py: {missing.name} is not installed: pip install -r requirements.txt, or call .venv/bin/python")

FOLDER = Path(__file__).resolve().parent
STATE = FOLDER / ".paygate"
RUNNING = STATE / "running.json"
"""What a running `runserver` uses, for commands in other shells. It holds a lock on the file as long as it runs."""
SHARED_NAMES = ("DATABASE_URL", "PAYSTACK_SECRET_KEY", "PAYSTACK_URL", "HOST", "PORT", "PUBLIC_URL")
READY_SECONDS, STOP_SECONDS, PAUSE_SECONDS = 60, 5, 0.1
EXAMPLE = (
    '{"customer_name": "John Doe", "customer_email": "john@example.com", "customer_phone": "+234 801 234 5678", '
    '"amount": 50, "location": "Lagos"}'
)


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = commands.Parser(
        prog="manage.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    to = parser.add_subparsers(metavar="COMMAND", title="commands", required=True)
    own: dict[str, Callable[[argparse.Namespace], None]] = {"runserver": runserver, "migrate": migrate, "test": test}
    for name, run in own.items():
        commands.add_command(to, name, run)
    commands.register(to)
    if not words or words[0] not in to.choices:
        # The HTTP client that these need takes a while to load: a list or an audit does not wait for it.
        importlib.import_module("provider_commands").register(to)
    refuse_unknown(words[:1], list(to.choices))
    arguments, rest = parser.parse_known_args(words)
    if rest and arguments.run is not test:
        to.choices[words[0]].error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that lacks a character is no reason to stop
    try:
        if words[0] in own:
            arguments.run(arguments)
            return 0
        with commands.without_log(), database(env := environment()) as (url, _):
            status: int = arguments.run(arguments, env, url)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as interruption:
        return refuse(f"interrupted{': ' if interruption.args else ''}{interruption}", 130)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return refuse(f"{error.filename or 'the system'}: {error.strerror or error}")
    except db.Unavailable as error:
        return refuse(f"the database cannot be used: {error}")
    except (Refused, settings.Invalid, embedded.EmbeddedError) as error:
        return refuse(str(error) or type(error).__name__)


def refuse(line: str, status: int = 1) -> int:
    commands.complain(line)
    return status


def refuse_unknown(words: list[str], known: list[str]) -> None:
    for word in words:
        if word not in known and not word.startswith("-"):
            nearest = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
            hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(known)}"
            refuse(f"there is no command {word}: {hint}")
            sys.exit(2)


def migrate(_: argparse.Namespace) -> None:
    """bring the schema of the database to this version"""
    with database(environment()) as (url, _cluster):
        numbers = db.migrate(url)
    print(f"ran migration {', '.join(map(str, numbers))}" if numbers else "the schema is up to date")


def test(arguments: argparse.Namespace) -> NoReturn:
    """run the tests; whatever follows goes to pytest"""
    if importlib.util.find_spec("pytest") is None:
        raise Refused("pytest is not installed: pip install -r requirements-dev.txt")
    os.chdir(FOLDER)
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *arguments.rest])  # noqa: S606


def environment() -> dict[str, str]:
    """The environment and `.env`, and for what they leave open, what a `runserver` uses that runs here."""
    env = settings.environment(FOLDER / ".env")
    running = read_running()
    if "PAYSTACK_SECRET_KEY" in env:
        running.pop("PAYSTACK_URL", None)  # the sandbox's: another account's key does not belong there
    return {**running, **env}


@contextmanager
def database(env: dict[str, str]) -> Iterator[tuple[str, embedded.Cluster | None]]:
    """The database's URL; where none is configured that of the embedded one, which runs meanwhile."""
    if "DATABASE_URL" in env:
        yield settings.database_url(env), None
        return
    embedded.forget_libpq()
    with embedded.database(STATE / "postgres") as cluster:
        yield cluster.url, cluster


def runserver(_: argparse.Namespace) -> None:
    """run all of it on this machine: database, schema, server and worker, and a sandbox where no provider is set"""
    begun = time.monotonic()
    embedded.make_folder(STATE)
    with ExitStack() as stack:
        try:
            note = stack.enter_context(claim_running())
            env = {"PAY_FORM": "on", **settings.environment(FOLDER / ".env")}
            is_sandbox = "PAYSTACK_SECRET_KEY" not in env and settings.is_loopback(env.get("HOST", "127.0.0.1"))
            if is_sandbox:
                env["PAYSTACK_SECRET_KEY"] = sandbox_key()
            values = settings.load({"DATABASE_URL": "postgresql://", **env})
            port = free_port(values.host, [values.port])
            if is_sandbox:
                env["PAYSTACK_URL"] = f"http://127.0.0.1:{free_port('127.0.0.1', range(port + 1, port + 10))}"
            shared = {name: env[name] for name in SHARED_NAMES if name in env}
            env["DATABASE_URL"], cluster = stack.enter_context(database(env))
            db.migrate(env["DATABASE_URL"])
            children = stack.enter_context(Children({**os.environ, **env}, cluster))
            if is_sandbox:
                children.start("sandbox", *sandbox_arguments(env["PAYSTACK_URL"], values))
            children.start("gunicorn", "-m", "gunicorn", "paygate:create_app()")
            children.wait_until(lambda: is_ready(values), READY_SECONDS)
            note.write(json.dumps(shared).encode())
            note.flush()
            print(f"paygate is ready at {values.public_url} ({time.monotonic() - begun:.1f} s); Ctrl-C ends it")
            welcome(values, env["PAYSTACK_URL"] if is_sandbox else None, cluster)
            has_terminal = os.isatty(0)
            # make, where it leads the session (`ssh -t host make run`), hands the hang-up on to nobody.
            children.wait_until(lambda: has_terminal and not os.isatty(0))
        except KeyboardInterrupt:
            print("stopping", flush=True)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)


def welcome(values: settings.Settings, sandbox: str | None, cluster: embedded.Cluster | None) -> None:
    headers = ["Content-Type: application/json", "Idempotency-Key: try-$(date +%s)"]
    if values.api_token:
        headers.append("Authorization: Bearer $API_TOKEN")
    options = " ".join(f'-H "{header}"' for header in headers)
    lines = {
        "a page": f"{values.public_url}/pay" if values.pay_form else None,
        "a request": f"curl {options} -d '{EXAMPLE}' {local_url(values)}/api/v1/payments",
        "provider": f"the sandbox at {sandbox}: no real money" if sandbox else values.paystack_url,
        "data": str(cluster.home) if cluster else "where DATABASE_URL says",
        "log": str(log_of("gunicorn")),
    }
    for name, line in lines.items():
        if line is not None:
            print(f"  {name:10} {line}", flush=True)


def is_ready(values: settings.Settings) -> bool:
    import http.client  # a tenth of the start of every other command

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
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(values.host, values.host)  # noqa: S104
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
                cwd=FOLDER,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                start_new_session=True,
                preexec_fn=embedded.end_with_us(signal.SIGTERM),  # noqa: PLW1509 (there are no threads yet)
            )

    def wait_until(self, done: Callable[[], bool], within_seconds: float = math.inf) -> None:
        """Raises Refused when the time is over, or a child or the database has ended."""
        deadline = time.monotonic() + within_seconds
        while not done():
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise Refused(f"{name} ended with status {process.returncode}: {last_line(log_of(name))}")
            if self.cluster is not None and not self.cluster.is_running():
                raise Refused(f"the database ended: {last_line(self.cluster.log)}")
            if time.monotonic() > deadline:
                raise Refused(f"not ready after {within_seconds:g} s: {last_line(log_of('gunicorn'))}")
            time.sleep(PAUSE_SECONDS)

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
    return STATE / f"{name}.log"


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines()
    return f"{lines[-1] if lines else 'without a word'} (log: {path})"


@contextmanager
def claim_running() -> Iterator[IO[bytes]]:
    """The file RUNNING, empty and locked. Raises Refused where another `runserver` has it."""
    with embedded.open_own(RUNNING) as note:
        for _ in range(10):  # a command that reads it holds it for a moment
            with suppress(BlockingIOError):
                fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(PAUSE_SECONDS)
        else:
            raise Refused("runserver runs in this folder already: end it first")
        note.truncate(0)
        yield note
        note.truncate(0)


def read_running() -> dict[str, str]:
    """What `claim_running` holds; {} where no `runserver` runs, also where it was killed."""
    with suppress(FileNotFoundError), RUNNING.open("rb") as note:
        try:
            fcntl.flock(note, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return dict(json.loads(note.read() or b"{}"))
    return {}


def free_port(host: str, ports: Sequence[int]) -> int:
    """The first of `ports` that nobody listens on. Raises Refused."""
    for port in ports:
        try:
            socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise Refused(f"cannot listen on {host}, port {port}: {error.strerror}") from error
        else:
            return port
    raise Refused(f"port {ports[-1]} is in use: end what uses it, or set PORT to another, as in PORT=8080")


def sandbox_key() -> str:
    """The sandbox's secret key, made once and kept, as its ledger is."""
    path = STATE / "sandbox" / "secret-key"
    embedded.make_folder(path.parent, 0o700)
    with embedded.open_own(path) as file:
        if file.tell() == 0:
            file.write(f"sk_test_{secrets.token_hex(20)}".encode())
    return path.read_text()


def sandbox_arguments(url: str, values: settings.Settings) -> list[str]:
    webhook_url = f"{local_url(values)}/api/v1/webhooks/paystack"
    arguments = ["sandbox.py", f"--port={url.rpartition(':')[2]}", f"--data={STATE / 'sandbox'}"]
    name = [f"--merchant={values.merchant_name}"] if values.merchant_name else []
    return [*arguments, f"--webhook-url={webhook_url}", *name]


if __name__ == "__main__":
    sys.exit(main())
