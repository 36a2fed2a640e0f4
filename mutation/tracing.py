"""A plugin of pytest (`-p mutation.tracing`) that writes down which lines each test runs, and how long it takes.

Only what runs in the test's own process is seen, in any of its threads; not the gunicorn that a test starts.
"""

import json
import os
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path

import coverage
import pytest

from mutation import TRACE_FOLDER


class Tracing:
    def __init__(self, target: Path, root: Path) -> None:
        self.target = target
        self.root = root
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()
        self.coverage = coverage.Coverage(data_file=None, include=[str(root / "*.py")], config_file=False)
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self.coverage.switch_context(item.nodeid)
        try:
            return (yield)
        finally:
            self.coverage.switch_context("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if not report.passed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = {
            Path(file).name: {line: tests for line, tests in data.contexts_by_lineno(file).items() if any(tests)}
            for file in data.measured_files()
        }
        found = {"seconds": self.seconds, "failed": sorted(self.failed), "lines": lines}
        (self.target / f"{os.environ.get('PYTEST_XDIST_WORKER', 'main')}.json").write_text(json.dumps(found))


def pytest_configure(config: pytest.Config) -> None:
    # Of a run with xdist the workers alone run tests.
    if config.getoption("numprocesses", None) is None:
        config.pluginmanager.register(Tracing(Path(os.environ[TRACE_FOLDER]), config.rootpath), "mutation-tracing")
