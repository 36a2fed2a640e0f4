"""An environment of its own for what paygate is compared with: nothing of it enters paygate's."""

import re
import shutil
import subprocess
import sys

from bench.machine import PROJECT

FOLDER = PROJECT / ".venv-bench"
LOCK = PROJECT / "requirements-bench.txt"
INSTALLED = FOLDER / "installed"
"""The Python and the lock of the last complete installation: without them we begin anew, as .ci/setup does."""


class NotInstalled(Exception):
    """Why the comparison cannot be had here."""


def python() -> str:
    """The interpreter that has requirements-bench.txt. Installs them when they are missing or out of step; raises
    NotInstalled."""
    interpreter = FOLDER / "bin" / "python"
    wanted = f"{sys.version}\n{LOCK.read_text()}"
    if not (INSTALLED.exists() and INSTALLED.read_text() == wanted):
        print(f"installing {LOCK.name} into {FOLDER.name}, once", file=sys.stderr, flush=True)
        shutil.rmtree(FOLDER, ignore_errors=True)
        pip = [str(interpreter), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        _run([sys.executable, "-m", "venv", str(FOLDER)])
        _run([*pip, "--quiet", "--retries", "2", "--require-hashes", "-r", str(LOCK)])
        INSTALLED.write_text(wanted)
    return str(interpreter)


def describe() -> str:
    """What is compared, with versions."""
    pins = dict(re.findall(r"^([a-z-]+)==(\S+)", LOCK.read_text(), re.MULTILINE))
    return ", ".join(f"{name} {pins[name]}" for name in ("django", "djangorestframework", "paystack-django"))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise NotInstalled(f"{LOCK.name} cannot be installed: {' '.join(last)}")
