"""The operator at work: commands of manage.py, run in this process or as a process of their own.

from till import Till, till  # noqa: F401  # a fixture

done = till.run("refund", payment_id, "--amount", "10.00")
assert done.status == 0, done.err
"""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import manage
from local import machine
from local.sandbox import Sandbox
from shop import ROOT, Shop, environment, query


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit status and what it printed."""

    status: int
    out: str
    err: str


class Till:
    """Commands on one database and one provider. Nothing of this process's environment reaches them."""

    def __init__(self, database_url: str, sandbox: Sandbox, folder: Path, **env: str) -> None:
        self.database_url = database_url
        self.sandbox = sandbox
        self.folder = folder
        self.env = {"OPERATOR": "ada", **environment(database_url, sandbox, **env)}

    def run(self, *words: str, **env: str) -> Done:
        """In this process, which is quick. Whoever gives money back or erases here is sure: --yes."""
        words = (*words, "--yes") if words[:1] and words[0] in ("refund", "erase", "resolve") else words
        out, err = io.StringIO(), io.StringIO()
        with (
            changed_environment({**self.env, **env}),
            patch.object(machine, "RUNNING", self.folder / "running.json"),  # not what a `make run` beside us wrote
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                status = manage.main(words)
            except SystemExit as end:
                status = int(end.code or 0)
        return Done(status, out.getvalue(), err.getvalue())

    def did(self, *words: str, **env: str) -> str:
        """What a command printed that must end with status 0."""
        done = self.run(*words, **env)
        assert done.status == 0, done
        return done.out

    def start(self, *words: str, python: tuple[str, ...] = (), **kinds: Any) -> subprocess.Popen[str]:
        """As a process of its own, without a terminal."""
        environ = {"PATH": os.environ["PATH"], "HOME": str(self.folder), **self.env, **kinds.pop("env", {})}
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **kinds}
        return subprocess.Popen(
            [sys.executable, *python, str(ROOT / "manage.py"), *words],
            cwd=self.folder,
            env=environ,
            text=True,
            **streams,
        )

    def shell(self, *words: str, within_seconds: float = 30, **kinds: Any) -> Done:
        with self.start(*words, **kinds) as process:
            try:
                out, err = process.communicate(timeout=within_seconds)
            finally:
                process.kill()
        return Done(process.returncode, out, err)

    def sql(self, statement: str, *values: object) -> list[dict[str, Any]]:
        return query(self.database_url, statement, *values)


@contextlib.contextmanager
def changed_environment(env: dict[str, str]) -> Iterator[None]:
    kept = dict(os.environ)
    os.environ.clear()
    os.environ.update({name: kept[name] for name in ("PATH", "TZ") if name in kept} | env)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


@pytest.fixture
def open_till(
    database_url: str, sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Till]:
    monkeypatch.setattr(manage, "FOLDER", tmp_path)  # where no .env is
    return lambda **env: Till(database_url, sandbox, tmp_path, **env)


@pytest.fixture
def till(open_till: Callable[..., Till]) -> Till:
    return open_till()


def paid(shop: Shop, **fields: object) -> dict[str, Any]:
    """A payment whose money came and whose webhook arrived."""
    payment = shop.created(**fields)
    shop.pay(payment["reference"])
    return payment
