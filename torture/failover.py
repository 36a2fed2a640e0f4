"""`python -m torture.failover`: PostgreSQL under Patroni on this machine, and paygate on it while the primary changes.

Installs what it needs and says so: etcd and pgbouncer from Debian, Patroni from PyPI in an environment of its own.
"""

import argparse
import json
import os
import pwd
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import venv
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psycopg

import embedded
from torture import verdict
from torture.faults import frozen
from torture.people import Findings, People
from torture.stage import Stage, ask, children_of, free_port, send, temporary_folder

HOME = Path("/var/lib/paygate-failover") if os.geteuid() == 0 else Path.home() / ".cache" / "paygate-failover"
PATRONI = "patroni[etcd3]==4.1.5", "psycopg[binary]"
TTL_SECONDS = 20
LONGEST_SECONDS = 30
"""Without writes, at most: Patroni's shortest ttl, its round, and the time to promote."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m torture.failover", description=__doc__)
    parser.add_argument("--nodes", type=int, default=3, choices=(2, 3))
    parser.add_argument("--switchovers", type=int, default=10, metavar="N")
    parser.add_argument("--kills", type=int, default=10, metavar="N")
    parser.add_argument("--freezes", type=int, default=1, metavar="N", help="of 45 s")
    parser.add_argument("--asynchronous", action="store_true", help="what was lost is counted, and must be found")
    parser.add_argument("--pgbouncer", action="store_true", help="between, in transaction mode")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", metavar="DIR", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        install(pgbouncer=options.pgbouncer)
        return run(options)
    except KeyboardInterrupt:
        print("interrupted: nothing was judged", flush=True)
        return 130


def install(*, pgbouncer: bool) -> None:
    for program, package in {"etcd": "etcd-server", **({"pgbouncer": "pgbouncer"} if pgbouncer else {})}.items():
        if shutil.which(program) is None:
            print(f"installing {package} (apt-get)", flush=True)
            subprocess.run(["apt-get", "update", "-q"], check=True, stdout=subprocess.DEVNULL)  # noqa: S607
            subprocess.run(["apt-get", "install", "-qy", package], check=True, stdout=subprocess.DEVNULL)  # noqa: S607
    if not (HOME / "venv" / "bin" / "patroni").exists():
        print(f"installing {' and '.join(PATRONI)} (pip) in {HOME / 'venv'}", flush=True)
        embedded.make_folder(HOME, 0o755)
        venv.create(HOME / "venv", with_pip=True)
        subprocess.run([HOME / "venv" / "bin" / "pip", "install", "-q", *PATRONI], check=True)


def run(options: argparse.Namespace) -> int:
    dice = random.Random(options.seed)
    events = ["switchover"] * options.switchovers + ["kill"] * options.kills + ["freeze"] * options.freezes
    dice.shuffle(events)
    findings = Findings()
    with ExitStack() as stack:
        folder = options.keep.absolute() if options.keep else stack.enter_context(temporary_folder())
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o711)
        rig = Rig(folder, stack, options.nodes, synchronous=not options.asynchronous, pgbouncer=options.pgbouncer)
        rig.wait_until_reachable()
        stage = Stage(folder, stack, database_url=rig.url)
        people = People(stage, findings, options.seed)
        people.start(6, operators=1)
        writes = Writes(findings)
        writes.start()
        time.sleep(5)
        print("event      without writes", flush=True)
        for event in events:
            writes.begin()
            rig.do(event, dice)
            rig.wait_until_whole()
            time.sleep(3)
            gap = writes.longest()
            print(f"  {event:10} {gap:6.1f} s", flush=True)
            if gap > LONGEST_SECONDS:
                findings.add("stuck", f"{event}: {gap:.1f} s without writes")
        writes.stop()
        people.stop()
        stage.wait_until_ready(60)
        rest_seconds = verdict.come_to_rest(stage, people, findings)
        verdict.judge(stage, people, findings)
        acknowledged = sum(sale.id is not None for sale in people.sales)
        print(f"\n{len(events)} events, {acknowledged:,} payments acknowledged, at rest after {rest_seconds:.0f} s")
        for kind in Findings.KINDS:
            print(f"  {kind:10} {len(findings.found[kind]):6}")
        for kind in Findings.KINDS:
            for what in findings.found[kind][:25]:
                print(f"{kind}: {what}")
    return 1 if any(findings.found.values()) else 0


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


class Rig:
    """etcd, and the nodes: PostgreSQL, Patroni and, where asked for, a pgbouncer each."""

    def __init__(self, folder: Path, stack: ExitStack, nodes: int, *, synchronous: bool, pgbouncer: bool) -> None:
        self.folder = folder / "cluster"
        self.folder.mkdir()
        self.uid = server_uid()
        os.chown(self.folder, self.uid, -1)
        self.binaries = embedded.Cluster(folder / "binaries").binaries
        self.etcd_port, peer_port = free_port(), free_port()
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
        self.synchronous = synchronous
        self.nodes = [Node(self, number) for number in range(1, nodes + 1)]
        for node in self.nodes:
            stack.callback(node.kill)
            node.start(stack)
        self.wait_until_whole(120)
        ports = [self.start_pgbouncer(stack)] if pgbouncer else [node.port for node in self.nodes]
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        self.url = f"postgresql://postgres@{hosts}/postgres?sslmode=disable"

    def start(self, stack: ExitStack, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        is_other = self.uid != os.geteuid()
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={"PATH": os.environ["PATH"], "HOME": str(self.folder), "LC_ALL": "C.UTF-8"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=self.uid if is_other else None,
                start_new_session=True,
            )
        stack.callback(kill_group, process)
        return process

    def start_pgbouncer(self, stack: ExitStack) -> int:
        """One for all, led to the primary as confd or a callback of Patroni's does it: its file is written anew and
        read again whenever another node leads."""
        port = free_port()
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

        leader = self.primary or self.nodes[0]
        lead_to(leader)
        os.chown(path, self.uid, -1)
        process = self.start(stack, "pgbouncer", [shutil.which("pgbouncer") or "/usr/sbin/pgbouncer", str(path)])
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

    def wait_until_whole(self, within_seconds: float = 180) -> None:
        """One primary, and all the others streaming from it."""
        deadline = time.monotonic() + within_seconds
        while True:
            members = next(filter(None, (node.cluster() for node in self.nodes)), [])
            roles = sorted(member["role"] for member in members)
            states = {member["state"] for member in members if member["role"] != "leader"}
            leads = roles.count("leader") == 1 and len(roles) == len(self.nodes)
            has_sync = not self.synchronous or any(role == "sync_standby" for role in roles)
            if leads and states <= {"streaming"} and has_sync:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"the cluster does not become whole: {members}; see {self.folder}")
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

    def do(self, event: str, dice: random.Random) -> None:
        primary = self.primary
        assert primary is not None
        match event:
            case "switchover":
                body = json.dumps({"leader": primary.name}).encode()
                reply = ask(primary.rest_port, "POST", "/switchover", body, {"Content-Type": "application/json"})
                if reply.status != 200:
                    print(f"switchover: {reply.status} {reply.text}", flush=True)
            case "kill":
                primary.kill()
                time.sleep(dice.uniform(1, 3) + TTL_SECONDS)
                primary.restart()
            case "freeze":
                with frozen(primary.pids):
                    time.sleep(45)


class Node:
    def __init__(self, rig: Rig, number: int) -> None:
        self.rig = rig
        self.name = f"node{number}"
        self.port, self.rest_port = free_port(), free_port()
        self.data = rig.folder / self.name
        self.config = rig.folder / f"{self.name}.json"
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
        os.chown(self.config, rig.uid, -1)

    def start(self, stack: ExitStack) -> None:
        self.stack = stack
        self.process = self.rig.start(stack, self.name, [str(HOME / "venv" / "bin" / "patroni"), str(self.config)])

    def restart(self) -> None:
        self.start(self.stack)

    @property
    def pids(self) -> list[int]:
        """Patroni, the postmaster and all of its children."""
        found = [self.process.pid, *children_of(self.process.pid)]
        with suppress(OSError, ValueError, IndexError):
            postmaster = int((self.data / "postmaster.pid").read_text().splitlines()[0])
            found += [postmaster, *children_of(postmaster)]
        return found

    def kill(self) -> None:
        """As when the machine dies."""
        send(self.pids, signal.SIGKILL)
        self.process.wait()

    def is_primary(self) -> bool:
        return ask(self.rest_port, "GET", "/primary", timeout=2).status == 200

    def cluster(self) -> list[dict[str, Any]]:
        reply = ask(self.rest_port, "GET", "/cluster", timeout=2)
        return list(reply.json["members"]) if reply.status == 200 else []


def kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGCONT)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def server_uid() -> int:
    """PostgreSQL refuses to run as root, and initdb as a user without a name."""
    if os.geteuid():
        return os.geteuid()
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name).pw_uid
    raise psycopg.OperationalError("no user to run PostgreSQL as")


if __name__ == "__main__":
    sys.exit(main())
