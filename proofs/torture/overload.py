"""More than a service can take: a provider that hangs, readers who wait, floods and garbage.

Each scenario returns what it measured in one line; what must not be goes to the findings.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress

from local.serving import children_of
from proofs.torture.corpus import ORDER, requests
from proofs.torture.faults import frozen
from proofs.torture.people import PAYMENTS, Findings
from proofs.torture.stage import Stage, ask

QUICK_SECONDS = 0.5
JSON = {"Content-Type": "application/json"}


async def talk(port: int, request: bytes, within_seconds: float, *, ends: bool = False) -> tuple[int, float]:
    """The status of the first answer to raw bytes, 0 where none came, and how long it took. `ends`: says that no more
    will come, so that nobody waits for the rest of a half request."""
    begun = time.monotonic()
    status = 0
    with suppress(OSError, ValueError, IndexError, TimeoutError):
        async with asyncio.timeout(within_seconds):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(request)
                if ends:
                    writer.write_eof()
                status = int((await reader.readline()).split()[1])
                with suppress(OSError):
                    await reader.read(65536)
            finally:
                writer.close()
    return status, time.monotonic() - begun


def raw(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def order(key: str) -> bytes:
    return raw("POST", PAYMENTS, ORDER, Content_Type="application/json", Idempotency_Key=key)


class Overload:
    def __init__(self, stage: Stage, findings: Findings, seed: int) -> None:
        self.stage, self.findings, self.seed = stage, findings, seed
        self.port = stage.ports[0]
        made = ask(self.port, "POST", PAYMENTS, ORDER, JSON)
        self.payment = made.json["payment"]
        self.stage.control("hold_webhooks")
        self.stage.control("pay", reference=self.payment["reference"])
        delivery = self.stage.control("deliveries", reference=self.payment["reference"])[0]
        self.hook = raw(
            "POST",
            "/api/v1/webhooks/paystack",
            delivery["body"].encode(),
            Content_Type="application/json",
            x_paystack_signature=delivery["signature"],
        )

    def run(self, is_chosen: Callable[[str], bool]) -> None:
        for scenario in (
            self.provider_hangs,
            self.readers_wait,
            self.forged_flood,
            self.garbage,
            self.database_frozen,
        ):
            if is_chosen(scenario.__name__.replace("_", " ")):
                self.try_out(scenario)

    def try_out(self, scenario: Callable[[], Coroutine[None, None, str]]) -> None:
        workers = children_of(self.stage.instances[0].pid)
        print(f"  {scenario.__name__.replace('_', ' ')}: {asyncio.run(scenario())}", flush=True)
        if children_of(self.stage.instances[0].pid) != workers:
            self.findings.add("wrong", f"{scenario.__name__}: a worker was lost")
        self.stage.control("clear_faults")

    async def measure(
        self, seconds: float, name: str, limit: float = QUICK_SECONDS, *, posts: bool = False, hooks: bool = True
    ) -> str:
        """GETs and webhooks all the while; their slowest hundredth must be quicker than the limit."""
        seen: dict[str, list[float]] = {"GET": [], "webhook": [], "POST": []}
        statuses: Counter[str] = Counter()

        async def one(kind: str, request: bytes) -> None:
            status, took = await talk(self.port, request, 15)
            seen[kind].append(took)
            statuses[f"{kind} {status}"] += 1

        tasks = []
        deadline, number = time.monotonic() + seconds, 0
        while time.monotonic() < deadline:
            number += 1
            tasks.append(asyncio.create_task(one("GET", raw("GET", f"{PAYMENTS}/{self.payment['id']}"))))
            if hooks:
                tasks.append(asyncio.create_task(one("webhook", self.hook)))
            if posts:
                tasks.append(asyncio.create_task(one("POST", order(f"{name.replace(' ', '-')}-{number}-{self.seed}"))))
            await asyncio.sleep(0.05)
        await asyncio.gather(*tasks)
        line = []
        for kind, times in seen.items():
            if times:
                times.sort()
                p99 = times[int(len(times) * 0.99)]
                line.append(f"{kind} p50 {times[len(times) // 2] * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms")
                if kind != "POST" and p99 > limit:
                    self.findings.add("wrong", f"{name}: {kind} p99 is {p99:.2f} s")
        bad = {what: count for what, count in statuses.items() if what.split()[1] not in ("200", "201")}
        if bad and not name.startswith("database"):
            self.findings.add("wrong", f"{name}: {bad}")
        return "; ".join(line) + (f"; {dict(bad)}" if bad else "")

    async def provider_hangs(self) -> str:
        self.stage.control("fault", endpoint="initialize", name="time-out", times=None, seconds=60)
        posts = [asyncio.create_task(talk(self.port, order(f"hang-{self.seed}-{n}"), 60)) for n in range(500)]
        await asyncio.sleep(1)
        line = await self.measure(12, "provider hangs")
        answers = await asyncio.gather(*posts)
        statuses = Counter(status for status, _ in answers)
        slowest = max(took for _, took in answers)
        if set(statuses) != {503} or slowest > 30:
            self.findings.add("wrong", f"provider hangs: {dict(statuses)}, the slowest after {slowest:.1f} s")
        return f"500 POSTs {dict(statuses)}, slowest {slowest:.1f} s; {line}"

    async def readers_wait(self) -> str:
        pending = ask(self.port, "POST", PAYMENTS, ORDER, JSON).json["payment"]["id"]
        wait = raw("GET", f"{PAYMENTS}/{pending}", Prefer="wait=15")
        readers = [asyncio.create_task(talk(self.port, wait, 60)) for _ in range(1000)]
        await asyncio.sleep(3)
        line = await self.measure(8, "readers wait", posts=True)
        answers = await asyncio.gather(*readers)
        statuses = Counter(status for status, _ in answers)
        if set(statuses) != {200}:
            self.findings.add("wrong", f"readers wait: {dict(statuses)}")
        long = sum(took > 10 for _, took in answers)
        return f"1000 readers {dict(statuses)}, {long} of them held; {line}"

    async def forged_flood(self) -> str:
        small = raw("POST", "/api/v1/webhooks/paystack", b"{}", x_paystack_signature="0" * 128)
        large = raw("POST", "/api/v1/webhooks/paystack", b"x" * 250_000, x_paystack_signature="0" * 128)
        gate, statuses = asyncio.Semaphore(20), Counter[int]()

        async def forge(request: bytes) -> None:
            async with gate:
                status, _ = await talk(self.port, request, 15)
                statuses[status] += 1

        begun = time.monotonic()
        tasks = [asyncio.create_task(forge(large if n % 10 == 0 else small)) for n in range(5000)]
        line = await self.measure(5, "forged flood", 2)
        await asyncio.gather(*tasks)
        if set(statuses) != {401}:
            self.findings.add("wrong", f"forged flood: {dict(statuses)}")
        return f"5000 in {time.monotonic() - begun:.0f} s {dict(statuses)}; {line}"

    async def garbage(self) -> str:
        """A raw request is answered or not, but never by a 5xx other than 503."""
        gate, statuses = asyncio.Semaphore(48), Counter[int]()

        async def throw(request: bytes) -> None:
            async with gate:
                status, _ = await talk(self.port, request, 8, ends=True)
                statuses[status] += 1
                if status >= 500 and status != 503:
                    self.findings.add("wrong", f"garbage: {status} for {request[:300]!r}")

        await asyncio.gather(*(throw(request) for request in requests(self.seed, 10_000)))
        line = await self.measure(3, "after garbage")
        return f"10000 requests {dict(sorted(statuses.items()))}; {line}"

    async def database_frozen(self) -> str:
        """The database stands still: /healthz says that the process lives, /readyz within 2 s that it is not ready."""
        slow: list[float] = []
        ready: list[float] = []
        with frozen(self.stage.server_pids):
            load = asyncio.create_task(self.measure(8, "database frozen", 20, posts=True, hooks=True))
            await asyncio.sleep(1)
            for _ in range(8):
                slow.append((await talk(self.port, raw("GET", "/healthz"), 15))[1])
                ready.append((await talk(self.port, raw("GET", "/readyz"), 15))[1])
                await asyncio.sleep(0.2)
            line = await load
        begun = time.monotonic()
        while ask(self.port, "GET", "/readyz").status_code != 200 and time.monotonic() - begun < 30:
            await asyncio.sleep(0.1)
        if max(slow) > 2.5 or sorted(slow)[len(slow) // 2] > QUICK_SECONDS:  # once, while those who were first wait
            self.findings.add("wrong", f"database frozen: /healthz took {max(slow):.1f} s")
        if max(ready) > 2.5:
            self.findings.add("wrong", f"database frozen: /readyz took {max(ready):.1f} s")
        recovered = time.monotonic() - begun
        return f"healthz {max(slow):.2f} s, readyz {max(ready):.2f} s at most; ready {recovered:.1f} s after; {line}"
