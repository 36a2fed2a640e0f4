"""Processes: what they use of the processor and of memory, and servers, started and stopped. Linux only."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
READY_SECONDS = 30


class NotReady(Exception):
    """A process did not start: its last words."""


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += tree(int(child))
    return found


def cpu_seconds(pid: int) -> float:
    """What a process and its descendants have used, user and system, also those that have ended and been waited for."""
    return sum(_own_seconds(each) + _ended_seconds(each) for each in tree(pid))


def _own_seconds(pid: int) -> float:
    """From the process's own clock, which counts in ns; /proc/PID/stat counts in 10 ms."""
    with contextlib.suppress(OSError):
        # linux/posix-timers.h: MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED)
        return time.clock_gettime((~pid << 3) | 2)
    return 0.0


def _ended_seconds(pid: int) -> float:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[13]) + int(words[14])) / os.sysconf("SC_CLK_TCK")  # cutime, cstime
    return 0.0


@dataclass(frozen=True)
class Memory:
    """Of all processes together, in MiB. Shared pages are counted in `rss` by each, in `pss` once."""

    rss: float
    pss: float


def memory(pid: int) -> Memory:
    rss = pss = 0
    for each in tree(pid):
        for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == "Rss":
                rss += int(rest.split()[0])
            elif name == "Pss":
                pss += int(rest.split()[0])
    return Memory(rss / 1024, pss / 1024)


@dataclass(frozen=True)
class Server:
    """A gunicorn that answers."""

    name: str
    port: int
    pid: int
    ready_seconds: float
    """From its start to the first 200."""

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.pid)


@contextlib.contextmanager
def serving(
    name: str, arguments: list[str], env: dict[str, str], folder: Path, python: str = sys.executable
) -> Iterator[Server]:
    """Run gunicorn with these arguments, in a folder where no .env is. It prints to `NAME.log` there."""
    port = free_port()
    log = folder / f"{name}.log"
    with log.open("ab") as output:
        begun = time.monotonic()
        process = subprocess.Popen(
            [python, "-m", "gunicorn", *arguments, f"--bind=127.0.0.1:{port}"],
            cwd=folder,
            env={"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(PROJECT), **env, "PORT": str(port)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        while not _is_ready(port):
            if process.poll() is not None or time.monotonic() - begun > READY_SECONDS:
                raise NotReady(f"{name} does not get ready:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.002)
        yield Server(name, port, process.pid, time.monotonic() - begun)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def describe() -> str:
    """The machine, on one line."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "unknown processor",
    )
    python = ".".join(map(str, sys.version_info[:3]))
    return f"{os.cpu_count()} × {model}, Linux {os.uname().release}, Python {python}"
