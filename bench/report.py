"""What was measured, as tables, with the goals."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.machine import Memory
from bench.subjects import GET, POST, WEBHOOK, WEBHOOK_ONE

CONTROL_MARGIN = 0.15

GOALS = {POST: 1.1, GET: 1.25, WEBHOOK: 1.25}
DATABASE_GOAL = 1.5
ACCEPTED_GOAL, MEMORY_GOAL_MIB, START_GOAL_SECONDS = 0.9, 130, 0.5


@dataclass(frozen=True)
class Sample:
    """One subject doing one kind of work, once. Seconds of the processor are for 1,000 requests."""

    cpu_seconds: float
    database_seconds: float
    latencies_ms: list[float]


@dataclass(frozen=True)
class SlowRun:
    """One subject with a provider that takes its time."""

    accepted_per_second: float
    refused_per_second: float
    cpu_seconds: float
    latencies_ms: list[float]
    memory: Memory


Samples = dict[tuple[str, str], list[Sample]]
"""By kind of work and name of the subject, one a round."""
Statements = dict[tuple[str, str], int]
"""By the same: how many statements one request sends to the database."""

TITLES = {"floor": "floor", "paygate": "paygate", "django": "Django"}


def print_requests(samples: Samples, statements: Statements) -> list[str]:
    """What requests cost. Returns what makes the run void."""
    django = (POST, "django") in samples
    header = ["CPU, s for 1,000", "floor", "paygate", "paygate ÷ floor", "goal"]
    rows = [[*header, *(["Django", "Django ÷ floor", "Django ÷ paygate"] if django else []), "control ÷ floor"]]
    void = []
    for kind in (POST, GET, WEBHOOK):
        for title, goal, spent in (
            (kind, GOALS[kind], spent_on(samples, kind, lambda sample: sample.cpu_seconds)),
            (f"{kind}, its database", DATABASE_GOAL, spent_on(samples, kind, lambda sample: sample.database_seconds)),
        ):
            paygate, control = ratios(spent["paygate"], spent["floor"]), ratios(spent["control"], spent["floor"])
            rows.append(
                [
                    title,
                    f"{statistics.median(spent['floor']):.3f}",
                    f"{statistics.median(spent['paygate']):.3f}",
                    spread(paygate),
                    verdict(statistics.median(paygate), goal),
                    *(against(spent) if django else []),
                    spread(control),
                ]
            )
            if title == kind and abs(statistics.median(control) - 1) > CONTROL_MARGIN:
                void.append(f"{kind}: the control is at {statistics.median(control):.2f} of the floor")
    least = [sample.cpu_seconds for sample in samples[WEBHOOK_ONE, "floor"]]
    ours = [sample.cpu_seconds for sample in samples[WEBHOOK, "paygate"]]
    beside = [f"{statistics.median(least):.3f}", f"{statistics.median(ours):.3f}", spread(ratios(ours, least))]
    rows.append(["webhook, floor with one statement", *beside, *[""] * (5 if django else 2)])
    print_table(rows)
    print("The median of the rounds; ratios round by round (lowest and highest round).\n")
    print_latencies(samples, statements)
    return void


def print_latencies(samples: Samples, statements: Statements) -> None:
    names = [name for name in TITLES if (POST, name) in samples]
    rows = [
        ["p50, p99 in ms; statements", *(TITLES[name] for name in names)],
        *(
            [
                kind,
                *(
                    f"{percentile(latencies(samples[kind, name]), 0.5):.1f},"
                    f" {percentile(latencies(samples[kind, name]), 0.99):.1f}; {statements[kind, name]}"
                    for name in names
                ),
            ]
            for kind in (POST, GET, WEBHOOK)
        ),
    ]
    print_table(rows)
    print()


def print_rest(slow: dict[str, SlowRun], load: str, capacity: float, starts: dict[str, list[float]]) -> None:
    """While the provider is slow, after that, and at the start. `capacity` is what paygate's slots could take."""
    share = slow["paygate"].accepted_per_second / capacity
    rss, start = slow["paygate"].memory.rss, statistics.median(starts["paygate"])
    rows = [
        ["", *(TITLES[name] for name in slow), "goal"],
        [
            f"accepted POSTs/s, {load}",
            *(f"{run.accepted_per_second:.0f}" for run in slow.values()),
            f"{ACCEPTED_GOAL:g} of {capacity:.0f} {'met' if share >= ACCEPTED_GOAL else 'missed'} ({share:.2f})",
        ],
        ["told to come back, 503/s", *(f"{run.refused_per_second:.0f}" for run in slow.values()), ""],
        ["p50, p99 of the accepted, ms", *(tail(run.latencies_ms) for run in slow.values()), ""],
        ["CPU, s for 1,000 accepted", *(f"{run.cpu_seconds:.3f}" for run in slow.values()), ""],
        [
            "RSS of all processes after that, MiB",
            *(f"{run.memory.rss:.0f}" for run in slow.values()),
            verdict(rss, MEMORY_GOAL_MIB),
        ],
        ["PSS, MiB", *(f"{run.memory.pss:.0f}" for run in slow.values()), ""],
        [
            "from gunicorn to the first 200, s",
            *(
                f"{statistics.median(starts[name]):.2f} ({min(starts[name]):.2f}–{max(starts[name]):.2f})"
                for name in slow
            ),
            verdict(start, START_GOAL_SECONDS),
        ],
    ]
    print_table(rows)
    print()


def print_promises(promises: dict[str, dict[str, bool]]) -> list[str]:
    """What each does with what goes wrong. Returns what paygate got wrong."""
    rows = [
        ["what goes wrong", *(TITLES[name] for name in promises)],
        *(
            [promise, *("yes" if kept[promise] else "no" for kept in promises.values())]
            for promise in promises["paygate"]
        ),
    ]
    print_table(rows)
    if "django" in promises:
        print(
            "The Django app does what paystack-django's documentation shows, and no more: it writes a payment once,"
            "\nafter Paystack's answer, keeps no audit trail, and never asks Paystack again (a command of the package"
            "\nreads Paystack's list into a table of the package, when somebody runs it). It has an admin site, and"
            "\ncould call more of Paystack than paygate does."
        )
    return [f"paygate: no longer so: {promise}" for promise, kept in promises["paygate"].items() if not kept]


def spent_on(samples: Samples, kind: str, seconds: Callable[[Sample], float]) -> dict[str, list[float]]:
    """By subject, round by round."""
    return {name: [seconds(sample) for sample in found] for (each, name), found in samples.items() if each == kind}


def ratios(some: list[float], others: list[float]) -> list[float]:
    """Round by round, so that what the machine does besides falls on both."""
    return [one / other for one, other in zip(some, others, strict=True)]


def against(spent: dict[str, list[float]]) -> list[str]:
    """The Django app's, and it against the floor and paygate."""
    return [
        f"{statistics.median(spent['django']):.3f}",
        *(f"{statistics.median(ratios(spent['django'], spent[name])):.1f}" for name in ("floor", "paygate")),
    ]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def tail(latencies_ms: list[float]) -> str:
    ordered = sorted(latencies_ms)
    return f"{ordered[len(ordered) // 2]:.0f}, {ordered[len(ordered) * 99 // 100]:.0f}"


def latencies(samples: Iterable[Sample]) -> list[float]:
    """Of the requests of all rounds, in ms."""
    return [ms for sample in samples for ms in sample.latencies_ms]


def percentile(latencies_ms: Iterable[float], share: float) -> float:
    ordered = sorted(latencies_ms)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def verdict(value: float, goal: float) -> str:
    return f"{goal:g} {'met' if value <= goal else 'missed'}"


def print_table(rows: list[list[str]]) -> None:
    """As Markdown, aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
