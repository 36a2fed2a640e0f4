"""Tries mutants: in a scratch copy of the tree, against the tests that run its lines, on a PostgreSQL of its own."""

import gc
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import psycopg.sql
import pytest

from mutation import TRACE_FOLDER

ROOT = Path(__file__).resolve().parent.parent
TESTS: dict[str, tuple[str, ...]] = {
    "db.py": (
        *("db", "neighbours", "checkout", "refunds", "worker", "notifications", "paygate", "books", "commands"),
        *("metrics", "schemas", "faults"),
    ),
    "checkout.py": ("checkout", "refunds", "worker", "paygate", "metrics", "stateful", "faults"),
    "paystack.py": ("paystack", "checkout", "refunds", "paygate"),
    "money.py": ("money", "paygate", "checkout"),
    "orders.py": ("paygate", "link", "guard"),
    "worker.py": ("worker", "delivery", "notifications", "backup", "faults"),
    "notifications.py": ("notifications", "delivery"),
    "paygate.py": ("paygate", "guard", "checkout", "readers"),
    "books.py": ("books", "refunds", "commands"),
    "schema.sql": ("db", "books", "notifications", "refunds", "checkout", "paygate", "worker", "commands"),
}
"""The tests of a module by their files, its own first: what is tried after the tests whose own process runs a line, for
the lines outside functions and those that only a gunicorn runs which a test has started."""
TRACED = sorted({f"tests/test_{name}.py" for names in TESTS.values() for name in names})
PYTEST = ("-q", "-p", "no:cacheprovider", "-p", "no:schemathesis", "--hypothesis-seed=0")
for needed in (
    "falcon.testing",
    "hypothesis.strategies",
    "jsonschema",
    "psycopg_pool",
    "requests",
    "tqdm",
    "dotenv",
):
    importlib.import_module(needed)  # once, and not in each of the processes that are forked
BUDGET_SECONDS = 120
"""How long the tests of one mutant may be expected to take: of more tests, as many as that allows are run."""


def copy_tree(target: Path) -> None:
    """What git knows of the tree, and what is new in it."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


@dataclass
class Trace:
    """Which tests run which line, and how long each takes."""

    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[int, int]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(int)))
    """By file and line: a bit for each test, in the order of `seconds`. Each mutant's process is a fork of this one, so
    what is kept here should be small."""
    failed: set[str] = field(default_factory=set)

    @classmethod
    def made(cls, folder: Path, tree: Path) -> "Trace":
        """Run every test once; or read what such a run has left in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        if not list(folder.glob("*.json")):
            # xdist's workers write a file each.
            command = [sys.executable, "-m", "pytest", *PYTEST, "-p", "mutation.tracing", "--numprocesses=2", *TRACED]
            subprocess.run(command, cwd=tree, env={**os.environ, TRACE_FOLDER: str(folder)}, check=False)
        trace = cls()
        for path in folder.glob("*.json"):
            found = json.loads(path.read_text(encoding="utf-8"))
            trace.seconds |= found["seconds"]
            trace.failed |= set(found["failed"])
            bits = {test: 1 << number for number, test in enumerate(trace.seconds)}
            for file, lines in found["lines"].items():
                for line, tests in lines.items():
                    trace.lines[file][int(line)] |= sum(bits[test] for test in tests if test in bits)
        return trace

    def tests_for(self, file: str, first: int, last: int) -> list[str]:
        """The tests that run one of these lines, then the others of its files, which may run it in another process.

        First come those of the file that has most of them, and of a file the quickest.
        """
        mask = 0
        for line in range(first, last + 1):
            mask |= self.lines[file].get(line, 0)
        running = {test for number, test in enumerate(self.seconds) if mask >> number & 1}
        share = Counter(test.split("::")[0] for test in running)
        files = [f"tests/test_{name}.py" for name in TESTS[file]]
        tests = running | {test for test in self.seconds if test.split("::")[0] in files}

        def order(test: str) -> tuple[bool, int, int, float]:
            home = test.split("::")[0]
            return test not in running, -share[home], files.index(home) if home in files else 99, self.seconds[test]

        return sorted(tests - self.failed, key=order)

    def within(self, tests: Iterable[str], budget_seconds: float) -> tuple[list[str], float]:
        """As many of the tests as there is time for, and how long they take."""
        chosen: list[str] = []
        total = 0.0
        for test in tests:
            if chosen and total + self.seconds[test] > budget_seconds:
                continue
            total += self.seconds[test]
            chosen.append(test)
        return chosen, total


@dataclass(frozen=True)
class Verdict:
    outcome: str
    """`caught`, `timed out` (caught too: something waits for ever) or `survived`."""
    seconds: float
    tests: int


class Bench:
    """A scratch copy of the tree and a database server, for one mutant at a time."""

    def __init__(self, tree: Path, url: str, trace: Trace, budget_seconds: float) -> None:
        self.tree = tree
        self.url = url
        self.trace = trace
        self.budget_seconds = budget_seconds

    def try_mutant(self, file: str, text: str, first: int, last: int) -> Verdict:
        tests, expected = self.trace.within(self.trace.tests_for(file, first, last), self.budget_seconds)
        whole = (self.tree / file).read_text(encoding="utf-8")
        try:
            self.write(file, text)
            return self.run(tests, 60 + 6 * expected)
        finally:
            self.write(file, whole)

    def write(self, file: str, text: str) -> None:
        (self.tree / file).write_text(text, encoding="utf-8")
        # A change within the second that leaves the size as it was would go unseen.
        for compiled in (self.tree / "__pycache__").glob(f"{Path(file).stem}.*"):
            compiled.unlink()

    def control(self) -> str | None:
        """What is wrong where tests do not pass on the whole tree as they stand; None where all is well."""
        tests, expected = self.trace.within(self.trace.tests_for("schema.sql", 0, 0), self.budget_seconds / 6)
        if self.run(tests, 60 + 6 * expected).outcome == "survived":
            return None
        return (self.tree / "output.txt").read_text(encoding="utf-8")

    def run(self, tests: list[str], within_seconds: float) -> Verdict:
        (self.tree / "chosen.txt").write_text("\n".join(tests), encoding="utf-8")
        begun = time.monotonic()
        # A fork of us has all that pytest and the tests import but our own modules, which it imports anew.
        gc.freeze()  # or the first collection there would copy all of our memory
        process = multiprocessing.get_context("fork").Process(target=self.pytest)
        process.start()
        process.join(within_seconds)
        outcome = {None: "timed out", 0: "survived", 5: "not tried"}.get(process.exitcode, "caught")
        with suppress(ProcessLookupError):
            os.killpg(process.ident or 0, signal.SIGKILL)  # what a test has started and its end has not reached
        process.join()
        if outcome != "survived":
            self.drop_databases()
        return Verdict(outcome, time.monotonic() - begun, len(tests))

    def pytest(self) -> None:
        """In a process of its own: end with pytest's status."""
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.chdir(self.tree)
        os.environ["TEST_DATABASE_URL"] = self.url
        with (self.tree / "output.txt").open("w", encoding="utf-8") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None) or ""
            if file.startswith(str(ROOT)) and ".venv" not in file:
                del sys.modules[name]
        sys.path[:] = [str(self.tree), *(each for each in sys.path if each not in ("", str(ROOT)))]
        os._exit(pytest.main([*PYTEST, "-x", "-p", "no:xdist", "@chosen.txt"]))

    def drop_databases(self) -> None:
        """Those of an interrupted run: the next one makes them anew."""
        with psycopg.connect(self.url, autocommit=True) as conn:
            for (name,) in conn.execute("SELECT datname FROM pg_database WHERE datname LIKE 'paygate%'").fetchall():
                drop = psycopg.sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(psycopg.sql.Identifier(name))
                with suppress(psycopg.Error):
                    conn.execute(
                        psycopg.sql.SQL("ALTER DATABASE {} IS_TEMPLATE false").format(psycopg.sql.Identifier(name))
                    )
                conn.execute(drop)

    def takes(self, schema: str) -> str | None:
        """Why no database can be made with this schema; None where one can."""
        whole = (self.tree / "schema.sql").read_text(encoding="utf-8")
        with psycopg.connect(self.url, autocommit=True) as conn:
            conn.execute("CREATE DATABASE paygate_try")
        try:
            (self.tree / "schema.sql").write_text(schema, encoding="utf-8")
            url = self.url.replace("/postgres?", "/paygate_try?")
            done = subprocess.run(
                [sys.executable, "-c", "import sys, db; db.migrate(sys.argv[1])", url],
                cwd=self.tree,
                capture_output=True,
                text=True,
                check=False,
            )
            return done.stderr.strip().splitlines()[-1] if done.returncode else None
        finally:
            (self.tree / "schema.sql").write_text(whole, encoding="utf-8")
            self.drop_databases()
