"""PostgreSQL under Patroni on this machine, whose primary is switched, killed and frozen."""

import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from string import Template
from typing import Any

import psycopg

from local import embedded
from local.serving import children_of, free_port, send
from proofs.torture.faults import frozen
from proofs.torture.stage import ask

HOME = Path("/var/lib/paygate-failover") if os.geteuid() == 0 else Path.home() / ".cache" / "paygate-failover"
ENVIRONMENT = HOME / "venv"
PATH = os.pathsep.join((os.environ["PATH"], "/usr/local/sbin", "/usr/sbin"))  # where Debian's pgbouncer is
NODES, TTL_SECONDS = 3, 20
CUT_SECONDS, FREEZE_SECONDS, WHOLE_SECONDS = 7, 45, 120


class Rig:
    """etcd, and the nodes: PostgreSQL and Patroni; where asked for, one pgbouncer before all of them."""

    def __init__(
        self, folder: Path, stack: ExitStack, user: dict[str, Any], *, synchronous: bool, pooled: bool
    ) -> None:
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
        self.synchronous = synchronous
        self.nodes = [Node(self, number) for number in range(1, NODES + 1)]
        for node in self.nodes:
            stack.callback(node.kill)
            node.start(stack)
        self.wait_until_whole()
        self.direct_url = url_of(node.port for node in self.nodes)
        self.url = url_of([self.start_pgbouncer(stack)]) if pooled else self.direct_url

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
            path.write_text(template("pgbouncer.ini", server_port=node.port, port=port))

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
        values = {"rest_port": self.rest_port, "port": self.port, "etcd_port": rig.etcd_port, "ttl": TTL_SECONDS}
        synchronous = json.dumps(rig.synchronous)
        folders = {"folder": rig.folder, "binaries": rig.binaries}
        self.config.write_text(template("patroni.json", name=self.name, synchronous=synchronous, **values, **folders))
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
                raise TimeoutError(f"no switchover: {reply.status_code} {reply.text}")
            time.sleep(0.5)

    def wal_senders(self) -> list[int]:
        with psycopg.connect(f"postgresql://postgres@127.0.0.1:{self.port}/postgres", connect_timeout=4) as conn:
            return [row[0] for row in conn.execute("SELECT pid FROM pg_stat_replication")]

    def is_primary(self) -> bool:
        return ask(self.rest_port, "GET", "/primary", wait=2).status_code == 200

    def cluster(self) -> list[dict[str, Any]]:
        reply = ask(self.rest_port, "GET", "/cluster", wait=2)
        return list(reply.json["members"]) if reply.status_code == 200 else []


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


def template(file: str, **values: object) -> str:
    return Template(Path(__file__).with_name(file).read_text()).substitute(values)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
