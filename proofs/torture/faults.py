"""What is broken, when and for how long, drawn from a seed. Two lanes at once: processes, and the database."""

import random
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psycopg

from local.receiver import hang, status
from local.serving import Server, children_of, send
from proofs.torture.people import Findings
from proofs.torture.stage import DISK_MEGABYTES, OK, Stage

API_FAULTS = (
    *("lost-request", "lost-answer", "slow", "time-out", "time-out-before", "429", "429-retry-after", "500", "502"),
    *("503", "garbage", "truncated", "drip", "drip-body", "redirect", "status-string", "status-missing", "no-data"),
)
PROVIDER_FAULTS: dict[str, tuple[str, ...]] = {
    "initialize": (*API_FAULTS, "foreign-url", "http-url", "no-url", "other-reference"),
    "verify": (*API_FAULTS, "not-found", "stale", "other-reference"),
    "refund": API_FAULTS,
    "list-transactions": (*API_FAULTS, "empty-list", "lagging-list", "stale"),
    "list-refunds": (*API_FAULTS, "lagging-list"),
    "fetch-refund": (*API_FAULTS, "not-found"),
    "webhook": ("lost", "late", "double", "reordered", "forged"),
}
LOG_OF_FAULTS = "faults.log"


class Faults:
    """Draws one fault after the other from the seed, in two lanes, until it is told to stop."""

    def __init__(self, stage: Stage, findings: Findings, seed: int, *, only: str = "", brisk: bool = False) -> None:
        self.stage, self.findings, self.seed = stage, findings, seed
        self.brisk = brisk
        self.injected: Counter[str] = Counter()
        self.recovery_seconds: dict[str, float] = defaultdict(float)
        self.left_out: list[str] = []
        self.stopping = threading.Event()
        self.begun = time.monotonic()
        processes = [
            *(self.kill_worker, self.kill_master, self.kill_instance, self.kill_everything, self.freeze_worker),
            *(self.freeze_instance, self.restart_in_turn, self.reload, self.kill_provider, self.freeze_provider),
            *(self.refuse_key, self.break_receiver),
        ]
        database = [
            *(self.kill_database, self.kill_backend, self.restart_database, self.freeze_database, self.lock_database),
            *(self.use_connections_up, self.make_read_only, self.end_connections),
            *(self.slow_network, self.cut_network, self.silence_network),
            *([self.fill_disk] if stage.disk else []),
        ]
        if stage.disk is None:
            self.left_out.append("fill disk: no file system can be mounted here")
        chosen = [word.strip() for word in only.split(",") if word.strip()]
        self.lanes = [
            {name: fault for name, fault in named.items() if not chosen or any(word in name for word in chosen)}
            for named in ({each.__name__.replace("_", " "): each for each in lane} for lane in (processes, database))
        ]
        self.threads = [
            threading.Thread(target=self.run, args=(lane, random.Random(f"{seed} lane {number}")), daemon=True)
            for number, lane in enumerate(self.lanes)
            if lane
        ]

    def start(self) -> None:
        """The provider's small faults meet a third of all calls and events, all the time."""
        dice = random.Random(f"{self.seed} provider")
        self.stage.provider_faults = [
            {
                "endpoint": endpoint,
                "name": name,
                "probability": 0.4 / len(names),
                "seed": dice.randrange(10**6),
                "seconds": 2,
            }
            for endpoint, names in PROVIDER_FAULTS.items()
            for name in names
        ]
        for fault in self.stage.provider_faults:
            self.stage.control("fault", **fault)
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        self.stopping.set()
        for thread in self.threads:
            thread.join(120)

    def run(self, lane: dict[str, Callable[[random.Random], None]], dice: random.Random) -> None:
        while not self.stopping.is_set():
            name = dice.choice(list(lane))
            self.note(f"{name} …")
            try:
                lane[name](dice)
            except (OSError, psycopg.Error, TimeoutError, subprocess.SubprocessError) as error:
                self.note(f"{name}: {type(error).__name__}: {error}")
            self.injected[name] += 1
            seconds = self.until_ready()
            self.recovery_seconds[name] = max(self.recovery_seconds[name], seconds)
            self.note(f"{name} is over, ready after {seconds:.1f} s")
            self.stopping.wait(dice.uniform(0.2, 1.5) if self.brisk else dice.uniform(0.5, 4))

    def note(self, line: str) -> None:
        with (self.stage.folder / LOG_OF_FAULTS).open("a") as log:
            log.write(f"{time.strftime('%H:%M:%S')} {time.monotonic() - self.begun:8.2f} {line}\n")

    def until_ready(self) -> float:
        begun = time.monotonic()
        while time.monotonic() - begun < 60 and not all(each.is_ready() for each in self.stage.instances):
            time.sleep(0.1)
        return time.monotonic() - begun

    def wait(self, dice: random.Random, least: float, most: float) -> None:
        seconds = dice.uniform(least, most)
        self.stopping.wait(min(seconds, least + 2) if self.brisk else seconds)

    # Processes

    def kill_worker(self, dice: random.Random) -> None:
        if workers := children_of(dice.choice(self.stage.instances).pid):
            send([dice.choice(workers)], signal.SIGKILL)

    def kill_master(self, dice: random.Random) -> None:
        """Its workers find themselves alone and end; a supervisor starts it again when the port is free."""
        instance = dice.choice(self.stage.instances)
        orphans = children_of(instance.pid)
        send([instance.pid], signal.SIGKILL)
        if instance.process is not None:
            instance.process.wait()
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in orphans) and time.monotonic() < deadline:
            time.sleep(0.05)
        if any(Path(f"/proc/{pid}").exists() for pid in orphans):
            self.findings.add("stuck", f"workers {orphans} outlive their master by 30 s")
        instance.kill()
        instance.start()

    def kill_instance(self, dice: random.Random) -> None:
        instance = dice.choice(self.stage.instances)
        instance.kill()
        self.wait(dice, 0, 3)
        instance.start()

    def kill_everything(self, dice: random.Random) -> None:
        self.stage.note_met()
        for process in (*self.stage.instances, self.stage.sandbox):
            process.kill()
        self.wait(dice, 0, 3)
        self.stage.start_sandbox()
        for instance in self.stage.instances:
            instance.start()

    def freeze_worker(self, dice: random.Random) -> None:
        """For longer than a lease; a payment's lock may be held meanwhile."""
        if workers := children_of(dice.choice(self.stage.instances).pid):
            with frozen([dice.choice(workers)]):
                self.wait(dice, 4, 13)

    def freeze_instance(self, dice: random.Random) -> None:
        with frozen(dice.choice(self.stage.instances).pids):
            self.wait(dice, 4, 13)

    def restart_in_turn(self, dice: random.Random) -> None:
        for instance in self.stage.instances:
            self.restart(instance)
            self.until_ready()

    def restart(self, instance: Server) -> None:
        try:
            instance.stop(30)
        except subprocess.TimeoutExpired:
            self.findings.add("stuck", f"instance {instance.folder.name} did not end within 30 s of SIGTERM")
        instance.start()

    def reload(self, dice: random.Random) -> None:
        send([dice.choice(self.stage.instances).pid], signal.SIGHUP)
        self.wait(dice, 1, 4)

    def kill_provider(self, dice: random.Random) -> None:
        self.stage.note_met()
        self.stage.sandbox.kill()
        self.wait(dice, 0, 4)
        self.stage.start_sandbox()

    def freeze_provider(self, dice: random.Random) -> None:
        with frozen(self.stage.sandbox.pids):
            self.wait(dice, 2, 15)

    def refuse_key(self, dice: random.Random) -> None:
        self.stage.control("fault", endpoint="*", name="invalid-key", lasts=dice.uniform(0.5, 3))
        self.wait(dice, 1, 3)

    def break_receiver(self, dice: random.Random) -> None:
        """It answers 500, closes without an answer, or hangs."""
        self.stage.receiver.usual = dice.choice((status(500), lambda connection: None, hang(threading.Event())))
        self.wait(dice, 1, 10)
        self.stage.receiver.usual = OK

    # The database and the network to it

    def kill_database(self, dice: random.Random) -> None:
        send(self.stage.server_pids[: dice.choice((1, 100))], signal.SIGKILL)
        self.wait(dice, 0, 3)
        self.stage.cluster.start()

    def kill_backend(self, dice: random.Random) -> None:
        """PostgreSQL then restarts by itself, through crash recovery."""
        backends = self.stage.sql("SELECT pid FROM pg_stat_activity WHERE application_name = 'paygate'")
        if backends:
            send([dice.choice(backends)["pid"]], signal.SIGKILL)

    def restart_database(self, dice: random.Random) -> None:
        self.stage.cluster.stop()
        self.wait(dice, 0, 3)
        self.stage.cluster.start()

    def freeze_database(self, dice: random.Random) -> None:
        with frozen(self.stage.server_pids):
            self.wait(dice, 3, dice.choice((6, 12, 45)))

    def lock_database(self, dice: random.Random) -> None:
        table = dice.choice(("payments", "idempotency_keys", "charges", "payment_events", "provider_events"))
        with psycopg.connect(self.stage.admin_url) as conn:
            conn.execute("SET lock_timeout = '20s'")
            conn.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE".encode())
            self.wait(dice, 2, 20)
            conn.rollback()

    def use_connections_up(self, dice: random.Random) -> None:
        """Those that paygate has are ended too, and taken by somebody else before it can have them back."""
        with ExitStack() as stack:
            first = stack.enter_context(psycopg.connect(self.stage.admin_url, autocommit=True))
            for _ in range(3):
                with suppress(psycopg.OperationalError):
                    for _ in range(100):
                        stack.enter_context(psycopg.connect(self.stage.admin_url))
                first.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'paygate'"
                )
            self.wait(dice, 2, 8)

    def make_read_only(self, dice: random.Random) -> None:
        self.stage.sql("ALTER SYSTEM SET default_transaction_read_only = on")
        self.stage.sql("SELECT pg_reload_conf()")
        self.wait(dice, 1, 8)
        with psycopg.connect(self.stage.admin_url, autocommit=True) as conn:
            conn.execute("SET default_transaction_read_only = off")
            conn.execute("ALTER SYSTEM RESET default_transaction_read_only")
            conn.execute("SELECT pg_reload_conf()")

    def fill_disk(self, dice: random.Random) -> None:
        """The file system is made as small as what is on it. PostgreSQL may well end; then it is started again."""
        assert self.stage.disk is not None
        used = shutil.disk_usage(self.stage.disk).used
        resize(self.stage.disk, f"{used // 1024 + 256}k")
        try:
            self.wait(dice, 2, 8)
        finally:
            resize(self.stage.disk, f"{DISK_MEGABYTES}m")
        self.stage.cluster.start()

    def end_connections(self, _: random.Random) -> None:
        self.stage.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'paygate'",
        )

    def slow_network(self, dice: random.Random) -> None:
        self.stage.relay.delay_seconds = dice.choice((0.02, 0.1, 0.4, 1.5))
        self.wait(dice, 2, 8)
        self.stage.relay.mend()

    def cut_network(self, dice: random.Random) -> None:
        self.stage.relay.is_down = True
        self.stage.relay.cut()
        self.wait(dice, 0, 6)
        self.stage.relay.mend()

    def silence_network(self, dice: random.Random) -> None:
        """Either the bytes that were held back arrive after all, or the connections turn out to be dead."""
        self.stage.relay.flows.clear()
        self.wait(dice, 3, 15)
        if dice.random() < 0.5:
            self.stage.relay.cut()
        self.stage.relay.mend()

    def mend_all(self) -> None:
        """Whatever state the faults have left behind."""
        if self.stage.disk is not None:
            resize(self.stage.disk, f"{DISK_MEGABYTES}m")
        self.stage.relay.mend()
        self.stage.receiver.usual = OK
        send([*self.stage.server_pids, *self.stage.sandbox.pids], signal.SIGCONT)
        for instance in self.stage.instances:
            send(instance.pids, signal.SIGCONT)
        self.stage.cluster.start()
        self.stage.provider_faults = []
        self.stage.note_met()
        self.stage.control("clear_faults")
        for process in (self.stage.sandbox, *self.stage.instances):
            process.start()
        self.stage.wait_until_ready(60)


@contextmanager
def frozen(pids: list[int]) -> Iterator[None]:
    send(pids, signal.SIGSTOP)
    try:
        yield
    finally:
        send(pids, signal.SIGCONT)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True, capture_output=True)  # noqa: S607
