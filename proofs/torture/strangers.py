"""What strangers send: slow, silent and dear requests, payments left open, more connections than files.

The first three go to paygate itself, and to it behind the documented nginx and Caddy where these programs are at hand.
"""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

from local.serving import ROOT, Process, Server, children_of, free_port
from proofs.torture.corpus import ORDER
from proofs.torture.overload import JSON, order, raw, talk
from proofs.torture.people import PAYMENTS, Findings
from proofs.torture.stage import Stage, ask

STRANGER = "127.0.0.66"
MOST_SECONDS = 1.0
"""Within which everybody else is answered."""
FOUND_SECONDS = 15
DEAR_SECONDS = 0.010
FILES = 1024
WITH_FILES = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[1])))
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""A program that may open so many files becomes the one that follows."""
DRIPS: dict[str, tuple[bytes, bytes]] = {
    "slow heads": (b"GET /healthz HTTP/1.1\r\nHost: x\r\n", b"X-Slow: x\r\n"),
    "slow bodies": (
        b"POST /api/v1/payments HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9000\r\n\r\n",
        b"{",
    ),
    "silent sockets": (b"", b""),
}
"""What a client sends at once, and then every 3 seconds."""
NUMBERS = {"slow heads": 600, "slow bodies": 300, "silent sockets": 800}
DEAR = {
    "2,000 unknown members": json.dumps({f"{n:x}": 0 for n in range(2000)}, separators=(",", ":")),
    "digits where a card number is sought": json.dumps({**json.loads(ORDER), "description": "4 1" * 5300}),
}


class Strangers:
    def __init__(self, stage: Stage, findings: Findings, stack: ExitStack, hook: bytes, share: float) -> None:
        """`share`: of the numbers above, for a short run."""
        self.stage, self.findings, self.stack, self.hook, self.share = stage, findings, stack, hook, share
        self.rows: list[tuple[str, str, str]] = []
        self.port = stage.ports[0]

    def run(self, is_chosen: Callable[[str], bool]) -> None:
        proxies: dict[str, tuple[int, int]] = {}
        for what in filter(is_chosen, DRIPS):
            proxies = proxies or start_proxies(self.stage, self.stack)
            for where, (port, paygate) in {"paygate": (self.port, self.port), **proxies}.items():
                asyncio.run(self.drip(what, where, port, paygate))
        for part in (self.dear_requests, self.open_payments, self.more_connections_than_files):
            if is_chosen(part.__name__.replace("_", " ")):
                part()
        print("\n| what strangers send | to | what everybody else gets |\n|---|---|---|")
        for row in self.rows:
            print("| " + " | ".join(row) + " |")

    def tell(self, what: str, where: str, found: str) -> None:
        self.rows.append((what, where, found))
        print(f"  {what}, {where}: {found}", flush=True)

    def some(self, number: int) -> int:
        return max(1, int(number * self.share))

    # Slow and silent

    async def drip(self, what: str, where: str, port: int, paygate: int) -> None:
        number = self.some(NUMBERS[what])
        async with clients(port, number, *DRIPS[what]):
            slowest, most = await self.watch(port, paygate, 12)
        if slowest > MOST_SECONDS:
            self.findings.add("wrong", f"{what} at {where}: an answer took {slowest:.2f} s")
        if most == 0 or (where != "paygate" and most > number / 4):
            self.findings.add("wrong", f"{what} at {where}: paygate had {most} connections")
        self.tell(f"{number} {what}", where, f"slowest answer {slowest * 1000:.0f} ms; paygate had {most} connections")

    async def watch(
        self, port: int, paygate: int, seconds: float, allowed: tuple[int, ...] = (200,)
    ) -> tuple[float, int]:
        """The slowest answer to somebody else, and how many connections paygate had at once."""
        requests = [raw("GET", "/healthz"), raw("GET", "/readyz"), self.hook]
        slowest, most, deadline = 0.0, 0, time.monotonic() + seconds
        while time.monotonic() < deadline:
            most = max(most, connections_of(paygate))
            answers = await asyncio.gather(*(talk(port, each, 30) for each in requests))
            slowest = max(slowest, *(took for _, took in answers))
            if any(status not in allowed for status, _ in answers):
                self.findings.add("wrong", f"port {port}: {[status for status, _ in answers]} among strangers")
            await asyncio.sleep(0.1)
        return slowest, most

    # Dear

    def dear_requests(self) -> None:
        pids = children_of(self.stage.instances[0].pid)
        for what, body in DEAR.items():
            number = self.some(60)
            begun, sizes = seconds_of(pids), []
            for _ in range(number):
                reply = ask(self.port, "POST", PAYMENTS, body.encode(), JSON)
                sizes.append(len(reply.text))
                if reply.status_code != 422:
                    self.findings.add("wrong", f"{what}: answered {reply.status_code}")
            each = (seconds_of(pids) - begun) / number
            if each > DEAR_SECONDS:
                self.findings.add("wrong", f"{what}: {each * 1000:.1f} ms of processor each")
            self.tell(
                f"POSTs of {len(body):,} bytes: {what}",
                "paygate",
                f"{each * 1000:.1f} ms of processor each, {max(sizes):,} bytes back",
            )

    # Payments left open

    def open_payments(self) -> None:
        number = self.some(1500)
        asyncio.run(self.open_many(number))
        self.stage.sql("UPDATE payments SET poll_at = now() WHERE status = 'pending'")
        verified = self.stage.control("calls", endpoint="verify")
        found: dict[str, float] = {}
        for how in ("came back", "did not come back"):
            payment = self.pay_without_webhook()
            if how == "came back":
                ask(self.port, "GET", f"/pay/{payment['id']}?reference={payment['reference']}")
            begun, query = time.monotonic(), "SELECT 1 FROM payments WHERE id = %s AND status = 'completed'"
            while not self.stage.sql(query, payment["id"]) and time.monotonic() < begun + 120:
                time.sleep(0.05)
            found[how] = time.monotonic() - begun
            if found[how] > FOUND_SECONDS:
                self.findings.add("wrong", f"open payments: money whose customer {how} found after {found[how]:.0f} s")
        calls = (self.stage.control("calls", endpoint="verify") - verified) / sum(found.values())
        told = "; ".join(f"found after {seconds:.1f} s if the customer {how}" for how, seconds in found.items())
        self.tell(f"{number} open payments, and a lost webhook", "paygate", f"{told}; {calls:.0f} verifies a second")

    async def open_many(self, number: int) -> None:
        gate, key = asyncio.Semaphore(16), time.time_ns()

        async def one(each: int) -> None:
            async with gate:
                status, _ = await talk(self.port, order(f"open-{key}-{each}"), 60)
                if status != 201:
                    self.findings.add("wrong", f"open payments: a POST answered {status}")

        await asyncio.gather(*(one(each) for each in range(number)))

    def pay_without_webhook(self) -> dict[str, str]:
        body = json.dumps({**json.loads(ORDER), "customer_email": "lost-webhook@example.com"}).encode()
        payment: dict[str, str] = ask(self.port, "POST", PAYMENTS, body, JSON).json["payment"]
        self.stage.control("pay", reference=payment["reference"])
        return payment

    # Files

    def more_connections_than_files(self) -> None:
        """An instance of its own that may open 1,024 files, and connections of many strangers."""
        server = Server(self.stage.folder / "few-files", self.stage.env)
        server.arguments = ["-c", WITH_FILES, str(FILES), sys.executable, *server.arguments]
        with server:
            asyncio.run(self.too_many(server, self.some(2400)))

    async def too_many(self, server: Server, number: int) -> None:
        workers = children_of(server.pid)
        async with clients(server.port, number, b"", b"", addresses=16):
            slowest, most = await self.watch(server.port, server.port, 5, (200, 503))
        if children_of(server.pid) != workers:
            self.findings.add("wrong", "more connections than files: a worker was lost")
        self.tell(
            f"{number} connections where {FILES} files may be open",
            "paygate",
            f"slowest answer {slowest * 1000:.0f} ms; paygate had {most} connections",
        )


def connections_of(port: int) -> int:
    """How many established connections a local server has."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "01" for line in lines)


def seconds_of(pids: list[int]) -> float:
    """Of the processor, that these processes have used."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(each[11]) + int(each[12]) for each in fields) / os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def clients(port: int, number: int, first: bytes, then: bytes, addresses: int = 1) -> AsyncIterator[None]:
    """So many of a stranger's clients, that come again when they are sent away."""

    async def one(address: str) -> None:
        while True:
            with suppress(OSError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0))
                try:
                    writer.write(first)
                    is_open = True
                    while is_open:
                        with suppress(TimeoutError):
                            async with asyncio.timeout(3):
                                is_open = await reader.read(65536) != b""
                        writer.write(then)
                finally:
                    writer.transport.abort()
            await asyncio.sleep(0.5)

    head, _, last = STRANGER.rpartition(".")
    tasks = [asyncio.create_task(one(f"{head}.{int(last) + n % addresses}")) for n in range(number)]
    await asyncio.sleep(2)
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# The documented proxies


def start_proxies(stage: Stage, stack: ExitStack) -> dict[str, tuple[int, int]]:
    """Those at hand, each in front of an instance of its own: by name, where it listens and where paygate does."""
    env = {**stage.env, "TRUSTED_PROXIES": "1"}
    found = {}
    for name, configured in (("nginx", configured_nginx), ("caddy", configured_caddy)):
        if shutil.which(name) is None:
            print(f"  {name} is not at hand: left out", flush=True)
            continue
        paygate = stack.enter_context(Server(stage.folder / f"behind-{name}", env))
        folder, port = stage.folder / name, free_port()
        folder.mkdir()
        command, its_env = configured(folder, port, paygate.port)
        proxy = stack.enter_context(Process(folder, ["-c", WITH_FILES, "8192", *command], its_env, port))
        deadline = time.monotonic() + 10
        while ask(port, "GET", "/readyz", headers={"Host": "x"}).status_code != 200:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} does not get ready:\n{proxy.log.read_text()}")
            time.sleep(0.1)
        found[name] = port, paygate.port
    return found


def configured_nginx(folder: Path, port: int, paygate: int) -> tuple[list[str], dict[str, str]]:
    """As docs/deploy.md has it, without TLS."""
    [block] = re.findall(r"```nginx\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL)
    block = re.sub(r"server \{\n    listen 80;.*?\n\}\n", "", block, flags=re.DOTALL)
    block = re.sub(r"^ *ssl_.*\n", "", block, flags=re.MULTILINE)
    block = block.replace("127.0.0.1:8000", f"127.0.0.1:{paygate}")
    block = block.replace("listen 443 ssl http2", f"listen 127.0.0.1:{port}")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off;\npid {folder}/pid;\nerror_log stderr;\n"
        f"events {{ worker_connections 4096; }}\nhttp {{\n{paths}{block}}}\n"
    )
    return ["nginx", "-e", "stderr", "-c", str(config)], {}


def configured_caddy(folder: Path, port: int, paygate: int) -> tuple[list[str], dict[str, str]]:
    """docs/deploy/Caddyfile, without TLS; for one older than 2.7, such as Debian's, as docs/deploy.md says."""
    env = {
        "PUBLIC_URL": f"http://x:{port}",  # as the Host of all that is sent
        "PAYGATE": f"127.0.0.1:{paygate}",
        "CADDY_ADMIN": f"127.0.0.1:{free_port()}",
        "XDG_DATA_HOME": str(folder),
        "XDG_CONFIG_HOME": str(folder),
    }
    config = folder / "Caddyfile"
    text = (ROOT / "docs" / "deploy" / "Caddyfile").read_text()
    version = subprocess.run(["caddy", "version"], check=True, capture_output=True, text=True).stdout  # noqa: S607
    if version.lstrip("v").startswith(("2.4", "2.5", "2.6")):
        text = re.sub(r"request_buffers \w+", "buffer_requests", text)
    config.write_text(text.replace("{\n", "{\n\tdefault_bind 127.0.0.1\n", 1))
    return ["caddy", "run", "--adapter", "caddyfile", "--config", str(config)], env
