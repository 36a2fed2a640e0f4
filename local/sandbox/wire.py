"""HTTP, by hand: the faults need the socket itself, and a benchmark needs a server that costs little."""

import asyncio
import ipaddress
import json
import re
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from http.client import responses
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

Json = dict[str, Any]

BODY_LIMIT = 1 << 20
IDLE_SECONDS = 300
ROUTES = [
    ("POST", re.compile(r"/transaction/initialize()"), "initialize"),
    ("GET", re.compile(r"/transaction/verify/(.+)"), "verify"),
    ("GET", re.compile(r"/transaction()"), "list-transactions"),
    ("GET", re.compile(r"/transaction/(\d{1,20})"), "fetch-transaction"),
    ("POST", re.compile(r"/refund()"), "refund"),
    ("GET", re.compile(r"/refund()"), "list-refunds"),
    ("GET", re.compile(r"/refund/(\d{1,20})"), "fetch-refund"),
    ("GET", re.compile(r"/dispute()"), "list-disputes"),
    ("GET", re.compile(r"/dispute/(\d{1,20})"), "fetch-dispute"),
    ("GET", re.compile(r"/dispute/transaction/(\d{1,20})"), "transaction-disputes"),
    ("GET", re.compile(r"/integration/payment_session_timeout()"), "session-timeout"),
    ("PUT", re.compile(r"/integration/payment_session_timeout()"), "session-timeout"),
]
ENDPOINTS = tuple(dict.fromkeys(endpoint for _, _, endpoint in ROUTES))


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass
class Answer:
    status: int
    body: Json | bytes
    headers: dict[str, str] = field(default_factory=dict)


class Refused(Exception):
    """A request that Paystack turns down: carries the answer."""

    def __init__(self, status: int, message: str, code: str, kind: str = "validation_error", step: str = "") -> None:
        super().__init__(message)
        body = {
            "status": False,
            "message": message,
            "meta": {"nextStep": step or "Ensure that the value(s) you're passing are correct."},
            "type": kind,
            "code": code,
        }
        self.answer = Answer(status, body)


def route(request: Request) -> tuple[str, str]:
    """The endpoint and what the path names; a slash at the end makes no difference."""
    path = request.path.rstrip("/")
    for method, pattern, endpoint in ROUTES:
        if method == request.method and (match := pattern.fullmatch(path)):
            return endpoint, match[1]
    raise Refused(404, "Entity not found", "not_found")


async def read_request(reader: asyncio.StreamReader) -> Request:
    """ValueError for what is not HTTP or too large, EOFError (IncompleteReadError) when the client has gone."""
    async with asyncio.timeout(IDLE_SECONDS):
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head[:-4].decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        length = int(headers.get("content-length", 0))
        if not 0 <= length <= BODY_LIMIT or "transfer-encoding" in headers:
            raise ValueError("a body of at most 1 MiB with its Content-Length")
        body = await reader.readexactly(length) if length else b""
    path, _, query = target.partition("?")
    return Request(method, unquote(path), dict(parse_qsl(query)), headers, body)


def parse_body(request: Request) -> Json:
    if not request.body:
        return {}
    try:
        body = json.loads(request.body)
    except ValueError:
        raise Refused(400, "Invalid JSON", "invalid_json") from None
    if not isinstance(body, dict):
        raise Refused(400, "Invalid JSON", "invalid_json")
    return body


def encode(answer: Answer) -> bytes:
    is_json = isinstance(answer.body, dict)
    body = json.dumps(answer.body, separators=(",", ":")).encode() if isinstance(answer.body, dict) else answer.body
    headers = {"Content-Type": "application/json" if is_json else "text/plain", "Content-Length": str(len(body))}
    headers["Date"] = formatdate(usegmt=True)
    lines = "".join(f"{name}: {value}\r\n" for name, value in (headers | answer.headers).items())
    return f"HTTP/1.1 {answer.status} {responses.get(answer.status, '')}\r\n{lines}\r\n".encode("latin-1") + body


async def send(writer: asyncio.StreamWriter, answer: Answer, request: Request | None = None) -> bool:
    """Send an answer; False when the connection ends with it, as it does after a fault."""
    if request is None:
        answer = replace(answer, headers={**answer.headers, "Connection": "close"})
    writer.write(encode(answer))
    await writer.drain()
    return request is not None and request.headers.get("connection", "").lower() != "close"


async def send_slowly(writer: asyncio.StreamWriter, at_once: bytes, slowly: bytes, seconds: float) -> bool:
    """A byte each so many seconds, which no time-out between two reads ever ends."""
    writer.write(at_once)
    for byte in slowly:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(seconds)
    return False


async def send_huge(writer: asyncio.StreamWriter, size: int) -> bool:
    """Valid JSON of `size` bytes, made as it goes."""
    start, end, part = b'{"status": true, "message": "', b'", "data": {}}', b"a" * 65536
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % size + start)
    left = size - len(start) - len(end)
    while left > 0:
        writer.write(part[:left])
        await writer.drain()
        left -= len(part)
    writer.write(end)
    await writer.drain()
    return False


def came_from_here(request: Request, peer: str) -> bool:
    """A program on this machine sent it: no proxy, no page of another site, no name that was made to point here."""
    host = request.headers.get("host", "")
    return (
        is_loopback(peer)
        and is_loopback(urlsplit(f"//{host}").hostname or "")
        and request.headers.get("origin") in (None, f"http://{host}")
        and request.headers.get("sec-fetch-site") in (None, "none", "same-origin")
        and not {"forwarded", "x-forwarded-for", "x-forwarded-host"} & request.headers.keys()
    )


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
