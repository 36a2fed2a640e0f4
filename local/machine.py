"""What runs on this machine: the embedded database, and what a running `runserver` uses."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import settings
from local import embedded

FOLDER = Path(__file__).resolve().parent.parent
STATE = FOLDER / ".paygate"
RUNNING = STATE / "running.json"
"""What a running `runserver` uses, for commands in other shells. It holds a lock on the file as long as it runs."""
PAUSE_SECONDS = 0.1


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


def read_running() -> dict[str, str]:
    """What `runserver` wrote into RUNNING; {} where none runs, also where it was killed."""
    with suppress(FileNotFoundError), RUNNING.open("rb") as note:
        try:
            fcntl.flock(note, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return dict(json.loads(note.read() or b"{}"))
    return {}
