"""paygate's command line. Each command ends with status 0 when it is done, 1 when it was refused, 2 for wrong usage."""

import argparse
import difflib
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

import embedded

try:
    import db
    import log
    import paystack
    import settings
    import worker
except ModuleNotFoundError as missing:
    sys.exit(f"manage.py: {missing.name} is not installed: pip install -r requirements.txt, or make setup")

FOLDER = Path(__file__).resolve().parent
STATE = FOLDER / ".paygate"
RUNNING = STATE / "running.json"
"""What a running `runserver` uses, for commands in other shells. It holds a lock on the file as long as it runs."""
SHARED_NAMES = ("DATABASE_URL", "PAYSTACK_SECRET_KEY", "PAYSTACK_URL", "HOST", "PORT", "PUBLIC_URL")
READY_SECONDS, STOP_SECONDS, PAUSE_SECONDS = 60, 5, 0.1
EXAMPLE = {
    "customer_name": "John Doe",
    "customer_email": "john@example.com",
    "customer_phone": "+234 801 234 5678",
    "amount": 50,
    "location": "Lagos",
}


class Refused(Exception):
    """The command cannot be carried out: the line that says why."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="manage.py", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, run in {"runserver": runserver, "migrate": migrate, "worker": run_worker, "test": test}.items():
        commands.add_parser(name, help=run.__doc__, description=run.__doc__, allow_abbrev=False).set_defaults(run=run)
    commands.choices["worker"].add_argument("--once", action="store_true", help="do what is due, and end")
    refuse_unknown(sys.argv[1:], list(commands.choices))
    arguments, rest = parser.parse_known_args()
    if rest and arguments.run is not test:
        commands.choices[sys.argv[1]].error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except (
        Refused,
        settings.Invalid,
        embedded.EmbeddedError,
        db.Unavailable,
        paystack.Unavailable,
        paystack.Misconfigured,
    ) as refusal:
        return say(str(refusal))
    except OSError as error:
        return say(f"{error.filename or 'the system'}: {error.strerror or error}")
    return 0


def say(line: str) -> int:
    print(f"manage.py: {line}", file=sys.stderr)
    return 1


def refuse_unknown(words: list[str], commands: list[str]) -> None:
    if words and not words[0].startswith("-") and words[0] not in commands:
        nearest = difflib.get_close_matches(words[0], commands, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(commands)}"
        print(f"manage.py: there is no command {words[0]}: {hint}", file=sys.stderr)
        sys.exit(2)


def migrate(_: argparse.Namespace) -> None:
    """bring the schema of the database to this version"""
    with database(environment()) as (url, _cluster):
        numbers = db.migrate(url)
    print(f"ran migration {', '.join(map(str, numbers))}" if numbers else "the schema is up to date")


def run_worker(arguments: argparse.Namespace) -> None:
    """look after payments in the background: lost webhooks, late money, ends"""
    env = environment()
    if "PAYSTACK_SECRET_KEY" not in env:
        raise Refused("no PAYSTACK_SECRET_KEY is set, and no sandbox runs here: start python manage.py runserver first")
    with database(env) as (url, _):
        values = settings.load({**env, "DATABASE_URL": url})
        log.configure(values.log_level)
        gateway = paystack.Gateway(
            values.paystack_secret_keys, values.paystack_url, values.paystack_timeout_seconds, values.mode
        )
        with db.Database(values.database_url, values.db_pool) as pool:
            loops = worker.Worker(values, pool, gateway)
            if arguments.once:
                loops.run_once()
                return
            loops.start()
            try:
                threading.Event().wait()
            except KeyboardInterrupt:
                loops.stop()


def test(arguments: argparse.Namespace) -> NoReturn:
    """run the tests; what follows goes to pytest"""
    if importlib.util.find_spec("pytest") is None:
        raise Refused("pytest is not installed: pip install -r requirements-dev.txt, or make setup")
    os.chdir(FOLDER)
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *arguments.rest])


def environment() -> dict[str, str]:
    """The environment and `.env`, and for what they leave open, what a `runserver` that runs here uses."""
    env = settings.environment(FOLDER / ".env")
    running = read_running()
    if "PAYSTACK_SECRET_KEY" in env:
        running.pop("PAYSTACK_URL", None)  # the sandbox's, and the key is not
    return {**running, **env}


@contextmanager
def database(env: dict[str, str]) -> Iterator[tuple[str, embedded.Cluster | None]]:
    """The database's URL; where none is configured the embedded one's, which runs meanwhile."""
    if "DATABASE_URL" in env:
        yield settings.database_url(env), None
        return
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]  # PGOPTIONS, PGHOSTADDR and the like are meant for another server
    with embedded.database(STATE / "postgres") as cluster:
        yield cluster.url, cluster


def runserver(_: argparse.Namespace) -> None:
    """run all of it on this machine: database, schema, server and worker, and a sandbox where no provider is set"""
    begun = time.monotonic()
    env = settings.environment(FOLDER / ".env")
    embedded.make_folder(STATE)
    with ExitStack() as stack:
        try:
            note = stack.enter_context(claim_running())
            sandbox = "PAYSTACK_SECRET_KEY" not in env and settings.is_loopback(env.get("HOST", "127.0.0.1"))
            if sandbox:
                env["PAYSTACK_SECRET_KEY"] = sandbox_key()
            values = settings.load({"DATABASE_URL": "postgresql://", **env})
            refuse_taken(values.host, values.port)
            if sandbox:
                env["PAYSTACK_URL"] = f"http://127.0.0.1:{free_port(values.port + 1)}"
            shared = {name: env[name] for name in SHARED_NAMES if name in env}
            env["DATABASE_URL"], cluster = stack.enter_context(database(env))
            db.migrate(env["DATABASE_URL"])
            children = stack.enter_context(Children({**os.environ, **env}, cluster))
            if sandbox:
                children.start("sandbox", *sandbox_arguments(env["PAYSTACK_URL"], values))
            children.start("gunicorn", "-m", "gunicorn", "paygate:create_app()")
            while not answers(values, "/readyz"):
                children.refuse_dead(time.monotonic() - begun)
                time.sleep(0.05)
            note.write(json.dumps(shared).encode())
            note.flush()
            welcome(values, sandbox=env["PAYSTACK_URL"] if sandbox else None, cluster=cluster, began=begun)
            while True:
                children.refuse_dead()
                time.sleep(0.2)
        except KeyboardInterrupt:
            print("stopping", flush=True)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)


class Children:
    """The processes of `runserver`, which end together. The terminal's Ctrl-C reaches us alone, who end them in order."""

    def __init__(self, env: dict[str, str], cluster: embedded.Cluster | None) -> None:
        self.env = env
        self.cluster = cluster
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def start(self, name: str, *arguments: str) -> None:
        with embedded.open_own(log_of(name)) as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=FOLDER,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=embedded.end_with_us(signal.SIGTERM),  # noqa: PLW1509 (we have one thread)
            )

    def refuse_dead(self) -> None:
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise Refused(f"{name} ended with status {process.returncode}: {last_line(log_of(name))}")
        if self.cluster is not None and self.cluster.pid is None:
            raise Refused(f"the database ended: {last_line(self.cluster.log)}")

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for process in self.processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0, deadline - time.monotonic()))
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # gunicorn's workers too, should it have been killed itself
            process.wait()


def log_of(name: str) -> Path:
    return STATE / f"{name}.log"


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return f"{lines[-1] if lines else 'without a word'} (log: {log})"


@contextmanager
def claim_running() -> Iterator[IO[bytes]]:
    """The file RUNNING, empty and locked. Raises Refused where another `runserver` has it."""
    with embedded.open_own(RUNNING) as note:
        for _ in range(10):  # a command that reads it holds it for a moment
            with suppress(BlockingIOError):
                fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.05)
        else:
            raise Refused("runserver is running here already: end it first, or use a copy of the folder")
        note.truncate(0)
        yield note
        note.truncate(0)


def read_running() -> dict[str, str]:
    """What `claim_running` holds, {} where no `runserver` runs, also where one was killed."""
    with suppress(FileNotFoundError), RUNNING.open("rb") as note:
        try:
            fcntl.flock(note, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return dict(json.loads(note.read() or b"{}"))
    return {}


def refuse_taken(host: str, port: int) -> None:
    try:
        free_port(host, port, port)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise Refused(f"cannot listen on {host}, port {port}: {error.strerror}") from error
        raise Refused(f"port {port} is in use: end what uses it, or set PORT to another, as in PORT=8080") from error


def free_port(host: str, first: int, last: int) -> int:
    """The first port from `first` to `last` that nobody listens on."""
    for port in range(first, last + 1):
        ...


def sandbox_key() -> str:
    """The sandbox's secret key, made once and kept: its ledger and our webhooks' signatures depend on it."""
    embedded.make_folder(STATE / "sandbox", 0o700)
    with embedded.open_own(STATE / "sandbox" / "secret-key") as file:
        if file.tell() == 0:
            file.write(f"sk_test_{secrets.token_hex(20)}".encode())
    return (STATE / "sandbox" / "secret-key").read_text()


def sandbox_arguments(url: str, values: settings.Settings) -> list[str]:
    webhook_url = f"{local_url(values)}/api/v1/webhooks/paystack"
    where = ["--port", url.rpartition(":")[2], "--data", str(STATE / "sandbox"), "--webhook-url", webhook_url]
    return ["sandbox.py", *where, *(["--merchant", values.merchant_name] if values.merchant_name else [])]


def welcome(values: settings.Settings, sandbox: str | None, cluster: embedded.Cluster | None, seconds: float) -> str:
    token = """ -H "Authorization: Bearer $API_TOKEN\"""" if values.api_token else ""
    key = """ -H "Idempotency-Key: try-$(date +%s)\""""
    json_type = " -H 'Content-Type: application/json'"
    lines = {
        "a page": example_page(values) if sandbox else None,
        "a request": f"curl{token}{key}{json_type} -d '{json.dumps(EXAMPLE)}' {local_url(values)}/api/v1/payments",
        "provider": f"a sandbox at {sandbox}: no real money, until PAYSTACK_SECRET_KEY is set"
        if sandbox
        else values.paystack_url,
        "database": f"embedded PostgreSQL, data in {cluster.home}" if cluster else "as DATABASE_URL says",
        "log": str(log_of("gunicorn")),
    }
    shown = [f"  {name:10} {line}" for name, line in lines.items() if line]
    return "\n".join([f"paygate is ready at {values.public_url} ({seconds:.1f} s); Ctrl-C ends it", *shown])
