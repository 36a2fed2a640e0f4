"""The plans of the statements that really run, told by the server: its auto_explain writes each one into its log.

So nothing here repeats a statement of the service, and what a trigger or a foreign key does besides is seen too.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

SETTINGS = {
    "session_preload_libraries": "auto_explain",
    "auto_explain.log_min_duration": "0",
    "auto_explain.log_format": "json",
    "auto_explain.log_nested_statements": "on",
}
COUNTING = {"auto_explain.log_analyze": "on", "auto_explain.log_timing": "off"}
"""How many rows each step of a plan has read, too. It costs the statements time."""
LOGGED = re.compile(r"LOG:  duration: ([0-9.]+) ms  plan:\n((?:\t.*\n)+)")


@dataclass(frozen=True)
class Statement:
    """A statement that was executed. `ms` is its execution, without parsing and planning."""

    text: str
    ms: float
    plan: dict[str, Any]

    def steps(self) -> Iterator[dict[str, Any]]:
        """The steps of its plan, as EXPLAIN (FORMAT JSON) names them."""
        yield from _steps(self.plan)

    def rows_read(self, step: dict[str, Any]) -> float:
        """How many rows of its table a step has read, those that it passed over too. Needs COUNTING."""
        passed = sum(rows for name, rows in step.items() if name.startswith("Rows Removed by"))
        return float((step["Actual Rows"] + passed) * step["Actual Loops"])


def _steps(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for each in plan.get("Plans", []):
        yield from _steps(each)


def explained(url: str, settings: dict[str, str]) -> str:
    """`url` with these settings for every connection that is made with it; their user must be a superuser."""
    options = " ".join(f"-c {name}={value}" for name, value in settings.items())
    return f"{url}&options={quote(options, safe='')}"


@contextmanager
def watch(log: Path) -> Iterator[list[Statement]]:
    """The statements whose plans are written into the server's `log` while the block runs; filled in at its end."""
    found: list[Statement] = []
    begins = log.stat().st_size
    yield found
    with log.open("rb") as lines:
        lines.seek(begins)
        text = lines.read().decode(errors="replace")
    for ms, written in LOGGED.findall(text):
        told = json.loads(written)
        found.append(Statement(told["Query Text"], float(ms), told["Plan"]))
