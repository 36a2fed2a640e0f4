"""Programs that run beside us, started, killed and started again; and paygate among them, as it is served."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from local import embedded

ROOT = Path(__file__).resolve().parent.parent


class NotReadyError(Exception):
    """Its last words."""


@dataclass(frozen=True)
class Reply:
    """An answer over HTTP, with the names that falcon.testing.Result has; the names of its headers in lower case."""

    status_code: int
    headers: dict[str, str]
    text: str
    seconds: float = 0

    @property
    def json(self) -> Any:
        return json.loads(self.text)


def ask(
    port: int,
    method: str,
    path: str,
    body: str | bytes | Iterable[bytes] | None = None,
    headers: dict[str, str] | None = None,
    timeout_seconds: float = 15,
) -> Reply:
    """One request on a connection of its own; `body` may be an iterable of bytes, which is sent chunked."""
    begun = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_seconds)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        text = answer.read().decode("utf-8", "replace")
        given = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(answer.status, given, text, time.monotonic() - begun)
    finally:
        connection.close()


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def children_of(pid: int) -> list[int]:
    """Those that any of its threads has started. Threads, and the process itself, may end meanwhile."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += [int(each) for each in thread.read_text().split()]
    return found


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class Process:
    """It runs in `folder`, where no `.env` is, with nothing of our environment. `log` has all that it prints."""

    def __init__(self, folder: Path, arguments: list[str], env: dict[str, str], port: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.arguments, self.port = folder, arguments, port
        self.log = folder / "log"
        self.env = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(ROOT), **env}
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.RLock()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Does nothing while it runs."""
        with self.lock, self.log.open("ab") as log:
            if self.process is not None and self.process.poll() is None:
                return
            # It would end with the thread that started it, and only the main one lasts as long as we do.
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

    def stop(self, within_seconds: float = 10) -> int:
        """Its exit status. Whatever is left of it then is killed, and TimeoutExpired raised."""
        with self.lock:
            if self.process is None:
                return 0
            send(self.pids, signal.SIGCONT)
            self.process.terminate()
            try:
                return self.process.wait(within_seconds)
            finally:
                self.kill()

    def kill(self) -> None:
        """All its processes at once, without a word, as a crash of the machine would."""
        with self.lock:
            if self.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
                self.process.wait(10)


class Server(Process):
    """gunicorn, over a socket; PORT is taken from `env` or free. `arguments` are another app's than paygate's."""

    def __init__(self, folder: Path, env: dict[str, str], arguments: list[str] | None = None) -> None:
        port = int(env.get("PORT") or free_port())
        app = arguments or ["--config", str(ROOT / "gunicorn.conf.py"), "paygate:create_app()"]
        super().__init__(folder, ["-m", "gunicorn", *app], {**env, "PORT": str(port)}, port)
        self.url = f"http://127.0.0.1:{port}"

    def __enter__(self) -> Self:
        self.start()
        self.wait_until_ready()
        return self

    def is_ready(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return ask(self.port, "GET", "/readyz", timeout_seconds=2).status_code == 200
        return False

    def wait_until_ready(self, within_seconds: float = 20) -> None:
        deadline = time.monotonic() + within_seconds
        while not self.is_ready():
            if self.process is None or self.process.poll() is not None or time.monotonic() > deadline:
                raise NotReadyError(f"gunicorn does not get ready:\n{self.log.read_text()}")
            time.sleep(0.05)

    def request(
        self,
        method: str,
        path: str,
        body: str | bytes | Iterable[bytes] | None = None,
        headers: dict[str, str] | None = None,
        timeout_seconds: float = 15,
    ) -> Reply:
        return ask(self.port, method, path, body, headers, timeout_seconds)
