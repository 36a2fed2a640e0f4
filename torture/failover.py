"""`python -m torture.failover`: PostgreSQL under Patroni on this machine, and paygate on it while the primary changes.

Installs what it needs and says so: etcd and pgbouncer from Debian (as root; others are told what is missing), Patroni
from requirements-failover.txt in an environment of its own. Exit status: 0 all is well, 1 something was found,
2 nothing could be judged, 130 interrupted.
"""

import argparse
import fcntl
import json
import os
import pwd
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import psycopg

import embedded
from torture import verdict
from torture.faults import frozen
from torture.people import Findings, People
from torture.stage import ROOT, Stage, ask, children_of, free_port, send, temporary_folder

HOME = Path("/var/lib/paygate-failover") if os.geteuid() == 0 else Path.home() / ".cache" / "paygate-failover"
ENVIRONMENT = HOME / "venv"
LOCK = ROOT / "requirements-failover.txt"
PATH = os.pathsep.join((os.environ["PATH"], "/usr/local/sbin", "/usr/sbin"))  # where Debian's pgbouncer is
TTL_SECONDS = 20
CUT_SECONDS = 7
LONGEST_SECONDS = 30
"""Without writes, at most, not counting that time: Patroni's shortest ttl, its round, and the time to promote."""
FREEZE_SECONDS = 45
INSTALL_SECONDS, START_SECONDS, WHOLE_SECONDS, REST_SECONDS = 900, 180, 120, 600
"""How long each part may take before the run is given up. On an idle machine: 60, 15, 10 and 10."""


class Missing(Exception):
    """What the run needs is not here: one line that says what to do."""


class TooLong(BaseException):
    """The run does not come to an end. No Exception, which whatever it meets would take for an error of its own."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m torture.failover", description=__doc__)
    parser.add_argument("--nodes", type=int, default=3, choices=(2, 3))
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
        install(user, pgbouncer=options.pgbouncer)
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


def install(user: dict[str, Any], *, pgbouncer: bool) -> None:
    wanted = {"etcd": "etcd-server", **({"pgbouncer": "pgbouncer"} if pgbouncer else {})}
    packages = [package for program, package in wanted.items() if shutil.which(program, path=PATH) is None]
    if packages and (os.geteuid() or shutil.which("apt-get") is None):
        raise Missing(f"it needs {' and '.join(packages)}: apt-get install {' '.join(packages)}, as root")
    if packages:
        print(f"installing {' and '.join(packages)} (apt-get)", flush=True)
        for arguments in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
            subprocess.run(
                ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=120", *arguments],  # noqa: S607
                env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
                check=True,
                stdout=subprocess.DEVNULL,
            )
    embedded.make_folder(HOME, 0o755)
    with embedded.open_own(HOME / "install.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        install_patroni(user)


def install_patroni(user: dict[str, Any]) -> None:
    """As .ci/setup does it: without the mark of a complete installation we begin anew."""
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
    subprocess.run([python, "-m", "venv", "--clear", "--without-pip", ENVIRONMENT], check=True, umask=0o022)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", ENVIRONMENT / "bin" / "python", "install", "--quiet"),
            *("--disable-pip-version-check", "--no-input", "--require-hashes", "--requirement", LOCK),
        ],
        check=True,
        umask=0o022,
    )
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
    print(f"{len(events)} events on {options.nodes} nodes, {mode} replication, seed {options.seed}", flush=True)
    findings, gaps = Findings(), Gaps()
    with ExitStack() as stack:
        folder = options.keep.absolute() if options.keep else stack.enter_context(temporary_folder())
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o711)
        try:
            rig = Rig(folder, stack, user, options)
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


def break_it(rig: "Rig", events: list[str], dice: random.Random, findings: Findings, gaps: "Gaps") -> None:
    writes = Writes(findings)
    writes.start()
    for number, event in enumerate(events, 1):
        before = rig.wait_for_primary()
        writes.begin()
        rig.do(event, before, dice)
        rig.wait_until_whole()
        time.sleep(3)
        gap, has_moved = writes.longest(), rig.wait_for_primary() is not before
        gaps.add(event, gap, has_moved=has_moved)
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


class Gaps:
    """Of each kind of event, how long no payment was acknowledged, and how often another node became the primary."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.moves: dict[str, int] = defaultdict(int)

    def add(self, event: str, seconds: float, *, has_moved: bool) -> None:
        self.seconds[event].append(seconds)
        self.moves[event] += has_moved


def report(people: People, findings: Findings, gaps: Gaps, rest_seconds: float) -> None:
    """Two tables in Markdown, and then whatever was found."""
    print("\n| event | times | the primary changed | seconds without writes, median | at most |")
    print("|---|---|---|---|---|")
    names = {
        "kill": f"primary cut off for 1 to {CUT_SECONDS} s, then killed",
        "freeze": f"primary frozen for {FREEZE_SECONDS} s",
    }
    for event, seconds in sorted(gaps.seconds.items()):
        middle, most = statistics.median(seconds), max(seconds)
        print(f"| {names.get(event, event)} | {len(seconds)} | {gaps.moves[event]} | {middle:.1f} | {most:.1f} |")
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


# The cluster


class Rig:
    """etcd, and the nodes: PostgreSQL and Patroni; where asked for, one pgbouncer before all of them."""

    def __init__(self, folder: Path, stack: ExitStack, user: dict[str, Any], options: argparse.Namespace) -> None:
        self.folder = folder / "cluster"
        self.folder.mkdir()
        self.user = user
        self.give(self.folder)
        self.binaries = embedded.Cluster(folder / "binaries").binaries
        self.etcd_port, peer_port = lasting_port(), lasting_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.start(
            stack,
            "etcd",
            [
                *("etcd", f"--data-dir={self.folder / 'etcd'}", "--unsafe-no-fsync"),
                *(f"--listen-client-urls=http://127.0.0.1:{self.etcd_port}",),
                *(f"--advertise-client-urls=http://127.0.0.1:{self.etcd_port}",),
                *(f"--listen-peer-urls=http://127.0.0.1:{peer_port}",),
            ],
        )
        time.sleep(1)
        self.synchronous = not options.asynchronous
        self.nodes = [Node(self, number) for number in range(1, options.nodes + 1)]
        for node in self.nodes:
            stack.callback(node.kill)
            node.start(stack)
        self.wait_until_whole()
        self.direct_url = url_of(node.port for node in self.nodes)
        self.url = url_of([self.start_pgbouncer(stack)]) if options.pgbouncer else self.direct_url

    def give(self, path: Path) -> None:
        if self.user:
            os.chown(path, self.user["user"], self.user["group"])

    def start(self, stack: ExitStack, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={"PATH": PATH, "HOME": str(self.folder), "LC_ALL": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=embedded.end_with_us(signal.SIGTERM),  # noqa: PLW1509 (it only calls prctl)
                **self.user,
            )
        stack.callback(kill_group, process)
        self.processes[name] = process
        return process

    def start_pgbouncer(self, stack: ExitStack) -> int:
        """One for all, led to the primary as confd or a callback of Patroni's does it: its file is written anew and
        read again whenever another node leads."""
        port = lasting_port()
        path = self.folder / "pgbouncer.ini"

        def lead_to(node: Node) -> None:
            path.write_text(
                f"""[databases]
postgres = host=127.0.0.1 port={node.port} dbname=postgres user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
auth_type = any
pool_mode = transaction
max_client_conn = 200
default_pool_size = 20
server_login_retry = 1
server_connect_timeout = 4
query_wait_timeout = 5
unix_socket_dir =
ignore_startup_parameters = extra_float_digits,options
"""
            )

        leader = self.wait_for_primary()
        lead_to(leader)
        self.give(path)
        process = self.start(stack, "pgbouncer", ["pgbouncer", str(path)])
        stopping = threading.Event()
        stack.callback(stopping.set)

        def follow(led_to: Node) -> None:
            while not stopping.wait(0.5):
                primary = self.primary
                if primary is not None and primary is not led_to:
                    led_to = primary
                    lead_to(primary)
                    process.send_signal(signal.SIGHUP)

        threading.Thread(target=follow, args=(leader,), daemon=True).start()
        return port

    @property
    def primary(self) -> "Node | None":
        return next((node for node in self.nodes if node.is_primary()), None)

    def wait_for_primary(self) -> "Node":
        deadline = time.monotonic() + 60
        while (primary := self.primary) is None:
            if time.monotonic() > deadline:
                raise TimeoutError("the cluster has no primary")
            time.sleep(0.2)
        return primary

    def wait_until_whole(self) -> None:
        """One primary, and all the others streaming from it."""
        deadline = time.monotonic() + WHOLE_SECONDS
        while True:
            members = next(filter(None, (node.cluster() for node in self.nodes)), [])
            leaders = [
                node for node in self.nodes for each in members if (each["name"], each["role"]) == (node.name, "leader")
            ]
            states = {member["state"] for member in members if member["role"] != "leader"}
            has_sync = not self.synchronous or any(member["role"] == "sync_standby" for member in members)
            is_complete = len(members) == len(self.nodes) and states <= {"streaming"} and has_sync
            if is_complete and len(leaders) == 1 and leaders[0].is_primary():
                return
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise ChildProcessError(f"{name} has ended by itself, with status {process.returncode}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"the cluster does not become whole: {members}")
            time.sleep(0.5)

    def wait_until_reachable(self) -> None:
        """By the way that paygate goes."""
        deadline = time.monotonic() + 20
        while True:
            try:
                psycopg.connect(self.url, connect_timeout=4).close()
                return
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def do(self, event: str, primary: "Node", dice: random.Random) -> None:
        match event:
            case "switchover":
                primary.switch()
            case "kill":
                # A machine that dies falls silent before: what it commits in that time, no standby hears of. For longer
                # than a request waits, too: one that gives up must not make a commit count that only this machine has.
                send(primary.wal_senders(), signal.SIGSTOP)
                time.sleep(dice.uniform(1, CUT_SECONDS))
                primary.kill()
                time.sleep(dice.uniform(1, 3) + TTL_SECONDS)
                primary.restart()
            case "freeze":
                with frozen(primary.pids):
                    time.sleep(FREEZE_SECONDS)


class Node:
    def __init__(self, rig: Rig, number: int) -> None:
        self.rig = rig
        self.name = f"node{number}"
        self.port, self.rest_port = lasting_port(), lasting_port()
        self.data = rig.folder / self.name
        self.config = rig.folder / f"{self.name}.json"
        self.process: subprocess.Popen[bytes] | None = None
        user = {"username": "postgres", "password": "unused"}
        self.config.write_text(
            json.dumps(
                {
                    "scope": "paygate",
                    "name": self.name,
                    "restapi": {
                        "listen": f"127.0.0.1:{self.rest_port}",
                        "connect_address": f"127.0.0.1:{self.rest_port}",
                    },
                    "etcd3": {"hosts": f"127.0.0.1:{rig.etcd_port}"},
                    "bootstrap": {
                        "dcs": {
                            "ttl": TTL_SECONDS,
                            "loop_wait": 2,
                            "retry_timeout": 5,
                            "synchronous_mode": rig.synchronous,
                            "maximum_lag_on_failover": 1 << 30,  # whatever is lost: it is to be seen
                            "postgresql": {
                                "use_pg_rewind": True,
                                "parameters": {"max_connections": 100, "wal_keep_size": "256MB"},
                            },
                        },
                        "initdb": [{"encoding": "UTF8"}, {"locale": "C"}, "data-checksums"],
                    },
                    "postgresql": {
                        "listen": f"127.0.0.1:{self.port}",
                        "connect_address": f"127.0.0.1:{self.port}",
                        "data_dir": str(self.data),
                        "bin_dir": str(rig.binaries),
                        "pgpass": str(rig.folder / f"{self.name}.pgpass"),
                        "authentication": {"superuser": user, "replication": user, "rewind": user},
                        "parameters": {"unix_socket_directories": str(rig.folder)},
                        "pg_hba": [
                            "local all all trust",
                            "host all all 127.0.0.1/32 trust",
                            "host replication all 127.0.0.1/32 trust",
                        ],
                    },
                }
            )
        )
        rig.give(self.config)

    def start(self, stack: ExitStack) -> None:
        self.stack = stack
        self.process = self.rig.start(stack, self.name, [str(ENVIRONMENT / "bin" / "patroni"), str(self.config)])

    def restart(self) -> None:
        self.start(self.stack)

    @property
    def pids(self) -> list[int]:
        """Patroni, the postmaster and all that they have started."""
        found = [self.process.pid] if self.process is not None and self.process.poll() is None else []
        with suppress(OSError, ValueError, IndexError):
            postmaster = int((self.data / "postmaster.pid").read_text().splitlines()[0])
            # The file of one that was killed stays, and its number may be somebody else's by now.
            if os.fsencode(self.data) in Path(f"/proc/{postmaster}/cmdline").read_bytes():
                found.append(postmaster)
        for pid in found:
            found += [child for child in children_of(pid) if child not in found]
        return found

    def kill(self) -> None:
        """As when the machine dies. More than once, for one of them may just have started another."""
        for _ in range(100):
            if not (pids := self.pids):
                return
            send(pids, signal.SIGKILL)
            if self.process is not None:
                self.process.wait()
            time.sleep(0.05)
        raise ChildProcessError(f"{self.name} cannot be killed: {pids}")

    def switch(self) -> None:
        """Make another node the primary."""
        deadline = time.monotonic() + 60
        body = json.dumps({"leader": self.name}).encode()
        while self.is_primary():
            reply = ask(self.rest_port, "POST", "/switchover", body, {"Content-Type": "application/json"})
            if time.monotonic() > deadline:
                raise TimeoutError(f"no switchover: {reply.status} {reply.text}")
            time.sleep(0.5)

    def wal_senders(self) -> list[int]:
        with psycopg.connect(f"postgresql://postgres@127.0.0.1:{self.port}/postgres", connect_timeout=4) as conn:
            return [row[0] for row in conn.execute("SELECT pid FROM pg_stat_replication")]

    def is_primary(self) -> bool:
        return ask(self.rest_port, "GET", "/primary", timeout=2).status == 200

    def cluster(self) -> list[dict[str, Any]]:
        reply = ask(self.rest_port, "GET", "/cluster", timeout=2)
        return list(reply.json["members"]) if reply.status == 200 else []


def url_of(ports: Iterable[int]) -> str:
    return f"postgresql://postgres@{','.join(f'127.0.0.1:{port}' for port in ports)}/postgres?sslmode=disable"


def lasting_port() -> int:
    """A port below those of outgoing connections: none takes it while its server is down for a while."""
    least = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(100):
        port = random.randrange(10_000, max(least, 10_001))
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    return free_port()


def kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
