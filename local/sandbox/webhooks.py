"""Events: written once, signed, sent until they are answered, and what became of each."""

import asyncio
import contextlib
import hashlib
import hmac
import json
import random
import threading
from collections import deque
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from local.sandbox.background import Background
from local.sandbox.faults import WEBHOOK_FAULTS, Fault, Faults
from local.sandbox.ledger import Transaction
from local.sandbox.settings import Settings
from local.sandbox.wire import Json

# When an event that was not answered by exactly 200 is sent again, in each mode.
RETRY_SECONDS = {"live": (180.0,) * 4 + (3600.0,) * 72, "test": (3600.0,) * 10}


@dataclass
class Delivery:
    """One webhook and how it went: `answers` holds an HTTP status or an error's name for each try."""

    event: str
    reference: str
    body: bytes
    signature: str
    fault: Fault | None
    answers: list[int | str] = field(default_factory=list)


class Webhooks:
    """Used under the sandbox's lock; `changed` is a condition on it. What is async runs on the loop."""

    def __init__(
        self, settings: Settings, faults: Faults, background: Background, changed: threading.Condition
    ) -> None:
        self.settings, self.faults, self.background, self.changed = settings, faults, background, changed
        self.deliveries: deque[Delivery] = deque(maxlen=20_000)
        self.held: list[Delivery] | None = None
        self.untried = 0
        self._lagging = False

    def begin(self) -> None:
        """Called on the loop, before anything is sent."""
        self._slots = asyncio.Semaphore(32)
        self._overtaken = asyncio.Event()

    def hold(self) -> None:
        """Keep all events back until they are released."""
        self.held = self.held or []

    def release(self, seed: int | None = None) -> None:
        """Send what was held back, in its order or, with a seed, shuffled."""
        held, self.held = self.held or [], None
        if seed is not None:
            random.Random(seed).shuffle(held)  # noqa: S311 (a seed repeats the run)
        for delivery in held:
            self._dispatch(delivery)

    def emit(self, event: str, transaction: Transaction, data: Json, fault_name: str | None = None) -> Json:
        # A forged event stays one, whatever else may meet events at the moment.
        fault = None if fault_name == "forged" else self.faults.meeting("webhook", transaction.reference)
        if fault is None and fault_name is None and transaction.habit.endswith("-webhook"):
            fault_name = transaction.habit.removesuffix("-webhook")
        if fault is None and fault_name in WEBHOOK_FAULTS:
            fault = Fault("webhook", fault_name)
        body = event_body(event, data)
        key = self.settings.secret_key + ("-another" if fault is not None and fault.name == "forged" else "")
        delivery = Delivery(event, transaction.reference, body, sign(body, key), fault)
        self.deliveries.append(delivery)
        if self.held is None:
            self._dispatch(delivery)
        else:
            self.held.append(delivery)
        sent: Json = json.loads(body)
        return sent

    def _dispatch(self, delivery: Delivery) -> None:
        is_lost = delivery.fault is not None and delivery.fault.name == "lost"
        if self.settings.webhook_url is not None and self.background.loop is not None and not is_lost:
            self.untried += 1
            self.background.spawn(self._deliver, delivery)

    async def _deliver(self, delivery: Delivery) -> None:
        """Send an event until it is answered by exactly 200, or the schedule ends."""
        fault = delivery.fault
        if fault is not None and fault.name == "late":
            await asyncio.sleep(fault.seconds(3))
        if fault is not None and fault.name == "reordered" and not self._lagging:
            self._lagging = True  # one at a time, or two would wait for each other
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._overtaken.wait(), fault.seconds(3))
            self._lagging = False
        again = self.settings.retry_seconds
        for wait in (0.0, *(RETRY_SECONDS[self.settings.mode] if again is None else again)):
            await asyncio.sleep(wait)
            copies = 2 if fault is not None and fault.name == "double" and not delivery.answers else 1
            answers = await asyncio.gather(*(self._post(delivery) for _ in range(copies)))
            with self.changed:
                self.untried -= not delivery.answers
                delivery.answers.extend(answers)
                self.changed.notify_all()
            self._overtaken.set()
            self._overtaken = asyncio.Event()
            if 200 in answers:
                return

    async def _post(self, delivery: Delivery) -> int | str:
        """One try, on a connection of its own: the answer's status, or the name of what went wrong."""
        url = urlsplit(self.settings.webhook_url or "")
        head = (
            f"POST {url.path or '/'} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(delivery.body)}\r\nx-paystack-signature: {delivery.signature}\r\n"
            "User-Agent: paystack-sandbox\r\nConnection: close\r\n\r\n"
        )
        try:
            async with self._slots, asyncio.timeout(self.settings.webhook_timeout_seconds):
                reader, writer = await asyncio.open_connection(url.hostname, url.port or 80)
                try:
                    writer.write(head.encode() + delivery.body)
                    status = int((await reader.readline()).split()[1])
                    await reader.read(65536)  # the rest, so that the other side does not see a reset
                    return status
                finally:
                    writer.close()
        except (OSError, ValueError, IndexError) as error:
            return type(error).__name__

    async def first_try(self, delivery: Delivery) -> None:
        """Wait, five seconds at most, until a webhook has been tried."""
        for _ in range(1000):
            if delivery.answers:
                return
            await asyncio.sleep(0.005)


def event_body(event: str, data: Json) -> bytes:
    return json.dumps({"event": event, "data": data}, separators=(",", ":"), ensure_ascii=False).encode()


def sign(body: bytes, key: str) -> str:
    return hmac.new(key.encode(), body, hashlib.sha512).hexdigest()
