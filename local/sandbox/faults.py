"""What goes wrong on demand: the faults of the API and of webhooks, whom they meet, and how the API's are sent."""

import asyncio
import random
import time
from collections import Counter
from dataclasses import InitVar, dataclass, field
from typing import Any

from local.sandbox.ledger import SandboxError
from local.sandbox.wire import ENDPOINTS, Answer, Json, encode, send, send_huge, send_slowly

# The faults with which the thing asked for happens, and those with which it does not.
FAULTS = dict.fromkeys(
    (
        *("lost-answer", "slow", "time-out", "garbage", "truncated", "huge", "drip", "drip-body"),
        *("status-string", "status-missing", "no-data", "foreign-url", "http-url", "no-url", "other-reference"),
        *("stale", "empty-list", "lagging-list"),
    ),
    True,
) | dict.fromkeys(
    (
        *("lost-request", "time-out-before", "429", "429-retry-after", "500", "502", "503", "invalid-key"),
        *("redirect", "not-found", "answer"),
    ),
    False,
)
WEBHOOK_FAULTS = ("lost", "late", "double", "reordered", "forged")
GATEWAY_PAGE = (
    b"<html><head><title>502 Bad Gateway</title></head><body><center><h1>502 Bad Gateway</h1></center></body></html>"
)


@dataclass
class Fault:
    endpoint: str
    name: str
    times: int | None = None  # how many calls it still meets; None: all
    lasts: InitVar[float | None] = None
    probability: float = 1.0
    seed: InitVar[int] = 0
    prefix: str = ""
    effect: bool | None = None  # None: as FAULTS says
    options: Json = field(default_factory=dict)

    def __post_init__(self, lasts: float | None, seed: int) -> None:
        self.ends_at = float("inf") if lasts is None else time.monotonic() + lasts
        self.dice = random.Random(seed)  # noqa: S311 (a seed repeats the run)

    def meets(self, endpoint: str, reference: str) -> bool:
        return (
            (self.endpoint == endpoint or (self.endpoint == "*" and endpoint != "webhook"))
            and reference.startswith(self.prefix)
            and time.monotonic() < self.ends_at
            and (self.probability >= 1 or self.dice.random() < self.probability)
        )

    def seconds(self, default: float) -> float:
        return float(self.options.get("seconds", default))


class Faults:
    """Those that are set, and how often each was met. Used under the sandbox's lock."""

    def __init__(self) -> None:
        self.pending: list[Fault] = []
        self.met: Counter[str] = Counter()

    def add(self, fault: Fault) -> None:
        known = WEBHOOK_FAULTS if fault.endpoint == "webhook" else FAULTS
        if fault.name not in known:
            raise SandboxError(f"no fault {fault.name!r} for {fault.endpoint}; there is {', '.join(known)}")
        if fault.endpoint not in ("webhook", "*", *ENDPOINTS):
            raise SandboxError(f"no endpoint {fault.endpoint!r}; there is {', '.join(ENDPOINTS)}")
        self.pending.append(fault)

    def meeting(self, endpoint: str, reference: str) -> Fault | None:
        for fault in self.pending:
            if fault.meets(endpoint, reference):
                self.met[f"{endpoint} {fault.name}"] += 1
                if fault.times is not None:
                    fault.times -= 1
                    if fault.times == 0:
                        self.pending.remove(fault)
                return fault
        return None


def asked_for(email: str, endpoint: str, is_first: bool) -> Fault | None:
    """The fault that the customer's e-mail asks for, at the first call for a reference or at each."""
    name = email.partition("@")[0].partition("+")[0].lower()
    aimed = next((prefix for prefix in ("verify", "refund") if name.startswith(f"{prefix}-")), "initialize")
    name = name.removeprefix(f"{aimed}-")
    always, name = name.endswith("-always"), name.removesuffix("-always")
    effect, name = True if name.endswith("-after") else None, name.removesuffix("-after")
    return Fault(aimed, name, effect=effect) if name in FAULTS and aimed == endpoint and (always or is_first) else None


async def send_faulty(
    writer: asyncio.StreamWriter, fault: Fault, answer: Answer, unknown: Answer, elsewhere: str
) -> bool:
    """What the fault makes of `answer`; `unknown` says that there is no such reference, redirects lead `elsewhere`."""
    match fault.name:
        case "lost-request" | "lost-answer":
            return False
        case "time-out-before":
            await asyncio.sleep(fault.seconds(30))
            return False
        case "time-out":
            await asyncio.sleep(fault.seconds(30))
            return await send(writer, answer)
        case "truncated":
            writer.write(encode(answer)[:-8])
            await writer.drain()
            return False
        case "huge":
            return await send_huge(writer, int(fault.options.get("size", 64 << 20)))
        case "drip" | "drip-body":
            head, end, body = encode(answer).partition(b"\r\n\r\n")
            at_once = head + end if fault.name == "drip-body" else b""
            return await send_slowly(writer, at_once, body if at_once else head + end + body, fault.seconds(1))
    return await send(writer, misshapen(fault, answer, unknown, elsewhere))


def misshapen(fault: Fault, answer: Answer, unknown: Answer, elsewhere: str) -> Answer:
    """What the fault makes of an answer that is sent in the ordinary way."""
    options, body = fault.options, answer.body if isinstance(answer.body, dict) else {}
    data = body["data"] if isinstance(body.get("data"), dict) else {}
    match fault.name:
        case "429" | "429-retry-after":
            after = {} if fault.name == "429" else {"Retry-After": str(options.get("retry_after", 1))}
            return Answer(429, {"status": False, "message": "Too many requests"}, after)
        case "500":
            return Answer(500, {"status": False, "message": "An error occurred", "type": "api_error"})
        case "502":
            return Answer(502, GATEWAY_PAGE, {"Content-Type": "text/html"})
        case "503":
            return Answer(503, b"")
        case "invalid-key":
            return Answer(401, {"status": False, "message": "Invalid key"})
        case "not-found":
            return unknown
        case "garbage":
            return Answer(200, b"\x00\xff{]status: true")
        case "redirect":
            return Answer(302, b"", {"Location": options.get("url", elsewhere)})
        case "status-string":
            return Answer(answer.status, {**body, "status": "false"})
        case "status-missing":
            return Answer(answer.status, {name: value for name, value in body.items() if name != "status"})
        case "no-data":
            return Answer(answer.status, {**body, "data": None})
        case "foreign-url" | "http-url" | "no-url" | "other-reference":
            return Answer(answer.status, {**body, "data": misdirected(fault, data)})
        case "answer":
            content = options.get("body", {})
            return Answer(options.get("status", 200), text_or_json(content), options.get("headers", {}))
    return answer


def misdirected(fault: Fault, data: Json) -> Json:
    """The data of initialize (or another endpoint) with a URL or a reference that is not to be trusted."""
    code = data.get("access_code", "")
    match fault.name:
        case "foreign-url":
            return {
                **data,
                "authorization_url": fault.options.get("url", f"https://checkout.paystack.com.example.com/{code}"),
            }
        case "http-url":
            return {**data, "authorization_url": f"http://checkout.paystack.com/{code}"}
        case "no-url":
            return {name: value for name, value in data.items() if name != "authorization_url"}
    return {**data, "reference": f"{data.get('reference', '')}-other"}


def text_or_json(content: Any) -> Json | bytes:
    return content if isinstance(content, dict) else str(content).encode()
