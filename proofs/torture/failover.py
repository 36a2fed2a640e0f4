"""`make failover`: PostgreSQL under Patroni on this machine, and paygate on it while the primary changes.

It needs etcd (Debian's etcd-server), and pgbouncer where asked for; Patroni it installs from requirements/failover.txt
into an environment of its own. Exit status: 0 all is well, 1 something was found,
2 nothing could be judged, 130 interrupted.
"""

import argparse
import os
import pwd
import random
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psycopg

from local import embedded
from local.serving import ROOT, children_of, send
from proofs.torture import verdict
from proofs.torture.patroni import CUT_SECONDS, ENVIRONMENT, FREEZE_SECONDS, HOME, NODES, PATH, WHOLE_SECONDS, Rig
from proofs.torture.people import Findings, People
from proofs.torture.stage import Stage, temporary_folder

LOCK = ROOT / "requirements/failover.txt"
LONGEST_SECONDS = 30
"""Without writes, at most, not counting that time: Patroni's shortest ttl, its round, and the time to promote."""
INSTALL_SECONDS, START_SECONDS, REST_SECONDS = 900, 180, 600
"""How long each part may take before the run is given up. On an idle machine: 60, 15, 10 and 10."""


Gaps = dict[str, list[tuple[float, bool]]]
"""Of each event: the seconds without a payment acknowledged, and whether another node became the primary."""


class Missing(Exception):
    """What the run needs is not here: one line that says what to do."""


class TooLong(BaseException):
    """The run does not come to an end. No Exception, which whatever it meets would take for an error of its own."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m proofs.torture.failover", description=__doc__)
    parser.add_argument("--switchovers", type=int, default=10, metavar="N")
    parser.add_argument("--kills", type=int, default=10, metavar="N")
    parser.add_argument("--freezes", type=int, default=1, metavar="N", help=f"of {FREEZE_SECONDS} s")
    parser.add_argument(
        "--asynchronous",
        action="store_true",
        help="which loses what it has acknowledged: that is counted, and all money must be found",
    )
    parser.add_argument("--pgbouncer", action="store_true", help="between, in transaction mode")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", metavar="DIR", type=Path, help="keep logs and data here")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    signal.signal(signal.SIGALRM, give_up)
    try:
        signal.alarm(INSTALL_SECONDS)
        user = server_user()
        for program, package in {
            "etcd": "etcd-server",
            **({"pgbouncer": "pgbouncer"} if options.pgbouncer else {}),
        }.items():
            if shutil.which(program, path=PATH) is None:
                raise Missing(f"there is no {program}: apt-get install {package}")
        install_patroni(user)
        events = options.switchovers + options.kills + options.freezes
        signal.alarm(START_SECONDS + events * (FREEZE_SECONDS + WHOLE_SECONDS) + REST_SECONDS)
        return run(options, user)
    except KeyboardInterrupt:
        print("interrupted: nothing was judged", flush=True)
        return 130
    except (Missing, TooLong, OSError, psycopg.Error, subprocess.SubprocessError, embedded.EmbeddedError) as error:
        print(f"make failover: nothing was judged: {error}", flush=True)
        return 2
    finally:
        kill_children()


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Once: what follows is the end of all that was started, and nobody interrupts that."""
    be_deaf()
    raise KeyboardInterrupt


def give_up(number: int, frame: FrameType | None) -> NoReturn:
    be_deaf()
    raise TooLong("it does not come to an end")


def kill_children() -> None:
    """What a thread that nobody waits for has just started: an operator's command."""
    for _ in range(20):
        if not (pids := children_of(os.getpid())):
            break
        send(pids, signal.SIGKILL)
        time.sleep(0.05)


def be_deaf() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)


# What it needs


def server_user() -> dict[str, Any]:
    """Whom etcd, Patroni and PostgreSQL run as, for Popen: PostgreSQL refuses root, and initdb who has no name."""
    if sys.platform != "linux":
        raise Missing("it runs on Linux alone")
    if os.geteuid():
        return {}
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise Missing("there is no user to run PostgreSQL as, which refuses root: add one called postgres")


def install_patroni(user: dict[str, Any]) -> None:
    """As .ci/setup does it: without the mark of a complete installation we begin anew."""
    embedded.make_folder(HOME, 0o755)
    complete = ENVIRONMENT / LOCK.name
    patroni = str(ENVIRONMENT / "bin" / "patroni")
    if complete.exists() and complete.read_bytes() == LOCK.read_bytes() and can(user, patroni, "--version"):
        return
    print(f"installing {LOCK.name} (pip) in {ENVIRONMENT}", flush=True)
    # Ours may lie where the server's user cannot go, below /root say; the system's never does.
    pythons = (str(Path(sys.base_prefix, "bin", "python3")), "/usr/bin/python3")
    new_enough = "import sys, venv; sys.exit(sys.version_info < (3, 11))"
    python = next((python for python in pythons if can(user, python, "-c", new_enough)), None)
    if python is None:
        raise Missing(f"PostgreSQL's user can run no Python of 3.11 or newer: not {' and not '.join(pythons)}")
    subprocess.run([python, "-m", "venv", "--clear", ENVIRONMENT], check=True, umask=0o022)
    pip: list[str | Path] = [
        ENVIRONMENT / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-input",
        "--require-hashes",
    ]
    subprocess.run([*pip, "--requirement", LOCK], check=True, umask=0o022)
    if not can(user, patroni, "--version"):
        raise Missing(f"PostgreSQL's user cannot run {patroni}")
    shutil.copyfile(LOCK, complete)


def can(user: dict[str, Any], *command: str) -> bool:
    """Whether that user can run `command`, with success."""
    with suppress(OSError):
        return subprocess.run(command, cwd="/", capture_output=True, check=False, **user).returncode == 0
    return False


# The run


def run(options: argparse.Namespace, user: dict[str, Any]) -> int:
    dice = random.Random(options.seed)
    events = ["switchover"] * options.switchovers + ["kill"] * options.kills + ["freeze"] * options.freezes
    dice.shuffle(events)
    mode = "asynchronous" if options.asynchronous else "synchronous"
    print(f"{len(events)} events on {NODES} nodes, {mode} replication, seed {options.seed}", flush=True)
    findings = Findings()
    gaps: Gaps = defaultdict(list)
    with ExitStack() as stack:
        folder = options.keep.absolute() if options.keep else stack.enter_context(temporary_folder())
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o711)
        try:
            rig = Rig(folder, stack, user, synchronous=not options.asynchronous, pooled=options.pgbouncer)
            rig.wait_until_reachable()
            stage = Stage(folder, stack, database_url=rig.url)
            stage.admin_url = rig.direct_url
            people = People(stage, findings, options.seed)
            stack.callback(people.stopping.set)
            people.start(6, operators=1)
            time.sleep(5)
            break_it(rig, events, dice, findings, gaps)
            people.stop()
            print("all events are over: coming to rest", flush=True)
            stage.wait_until_ready(60)
            rest_seconds = verdict.come_to_rest(stage, people, findings)
            verdict.judge(stage, people, findings)
            failures = (
                inexcusable(stage, findings)
                if options.asynchronous
                else [what for found in findings.found.values() for what in found]
            )
        except (TooLong, OSError, psycopg.Error, subprocess.SubprocessError, embedded.EmbeddedError):
            show_logs(folder)
            raise
        finally:
            be_deaf()
    report(people, findings, gaps, rest_seconds)
    for line in failures if options.asynchronous else []:
        print(f"not to be excused by asynchronous replication: {line}", flush=True)
    return 1 if failures else 0


def break_it(rig: Rig, events: list[str], dice: random.Random, findings: Findings, gaps: Gaps) -> None:
    writes = Writes(findings)
    writes.start()
    for number, event in enumerate(events, 1):
        before = rig.wait_for_primary()
        writes.begin()
        rig.do(event, before, dice)
        rig.wait_until_whole()
        time.sleep(3)
        gap, has_moved = writes.longest(), rig.wait_for_primary() is not before
        gaps[event].append((gap, has_moved))
        stayed = "" if has_moved else ", and the primary stayed where it was"
        clock = time.strftime("%H:%M:%S")
        print(f"{clock} {number:3}/{len(events)} {event:10} {gap:5.1f} s without writes{stayed}", flush=True)
        if gap > LONGEST_SECONDS + (CUT_SECONDS if event == "kill" else 0):
            findings.add("stuck", f"{event}: {gap:.1f} s without writes")
    writes.stop()


def inexcusable(stage: Stage, findings: Findings) -> list[str]:
    """Of asynchronous replication, which loses rows: what is stuck, and money that `reconcile` does not name. And that
    nothing was lost: each killed primary had kept something to itself, so the verdict would not see a loss."""
    named = "\n".join(verdict.run_command(stage, "reconcile"))
    truth = verdict.Truth(stage)
    unnamed = [
        f"{reference} is paid, unknown here, and not named by reconcile"
        for reference, transaction in truth.transactions.items()
        if transaction["status"] == "success" and reference.startswith("PG-")
        if reference[:29] not in truth.by_reference and reference not in named
    ]
    return [*findings.found["stuck"], *unnamed, *([] if findings.found["lost"] else ["nothing was lost"])]


def report(people: People, findings: Findings, gaps: Gaps, rest_seconds: float) -> None:
    """Two tables in Markdown, and then whatever was found."""
    print("\n| event | times | the primary changed | seconds without writes, median | at most |")
    print("|---|---|---|---|---|")
    names = {
        "kill": f"primary cut off for 1 to {CUT_SECONDS} s, then killed",
        "freeze": f"primary frozen for {FREEZE_SECONDS} s",
    }
    for event, found in sorted(gaps.items()):
        seconds, moves = [gap for gap, _ in found], sum(has_moved for _, has_moved in found)
        middle, most = statistics.median(seconds), max(seconds)
        print(f"| {names.get(event, event)} | {len(found)} | {moves} | {middle:.1f} | {most:.1f} |")
    acknowledged = sum(sale.id is not None for sale in people.sales)
    counts = [len(people.sales), acknowledged, *(len(findings.found[kind]) for kind in Findings.KINDS)]
    print("\n| payments started | acknowledged | lost | doubled | stuck | wrong | chains broken |")
    print("|---|---|---|---|---|---|---|")
    print(f"| {' | '.join(f'{count:,}' for count in counts)} |")
    print(f"\nat rest after {rest_seconds:.0f} s; {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}")
    for kind in Findings.KINDS:
        for what in findings.found[kind][:25]:
            print(f"{kind}: {what}")
    sys.stdout.flush()


def show_logs(folder: Path) -> None:
    """The last words of all that ran, for the folder may be gone in a moment."""
    for log in sorted((*folder.glob("cluster/*.log"), *folder.glob("*/log"))):
        print(f"{log.relative_to(folder)}:")
        for line in log.read_text(errors="replace").splitlines()[-6:]:
            print(f"  {line[:300]}")


class Writes:
    """The longest time in which no payment was acknowledged."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.stopping = threading.Event()
        self.gap = 0.0
        self.last = time.monotonic()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self.stopping.set()
        self.thread.join()

    def begin(self) -> None:
        self.gap, self.last = 0.0, time.monotonic()

    def longest(self) -> float:
        return max(self.gap, time.monotonic() - self.last)

    def watch(self) -> None:
        seen = 0
        while not self.stopping.wait(0.02):
            count = self.findings.counts["POST 201"]
            if count != seen:
                now = time.monotonic()
                self.gap, self.last, seen = max(self.gap, now - self.last), now, count


if __name__ == "__main__":
    sys.exit(main())
