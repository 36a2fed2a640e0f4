"""The load: kept-alive connections that send one request after the other, to 127.0.0.1 and nowhere else.

A client of our own, because each answer must be seen: its status, its body, and the 503s that ask to come back later.
One thread and one event loop; it ends by itself when the requests are used up or the time is over.
"""

import heapq
import selectors
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

ANSWER_SECONDS = 30
"""No answer for so long ends the run."""


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes
    sent_at: float
    answered_at: float

    @property
    def ms(self) -> float:
        return (self.answered_at - self.sent_at) * 1000

    @property
    def is_busy(self) -> bool:
        """The bulkhead's own 503: all slots for the provider are taken."""
        return self.status == 503 and b'"code": "busy"' in self.body


class LoadError(Exception):
    """A connection was refused or dropped, or an answer did not come."""


def request(method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def send(
    port: int, requests: Iterator[bytes], connections: int, *, until: float | None = None, keep: bool = True
) -> list[Reply]:
    """Send `requests` over so many connections and return the replies, in the order in which they came.

    None is begun after `until` (monotonic); every one that was begun is waited for. A busy service is asked again after
    its Retry-After by the same connection. Without `keep`, bodies of successes are not kept. Raises LoadError.
    """
    with selectors.DefaultSelector() as selector:
        return Load(selector, port, requests, until, keep).run(connections)


@dataclass(order=True)
class Client:
    """One connection. Ordered by when it may send again."""

    resumes_at: float
    connection: socket.socket = field(compare=False)
    received: bytes = field(default=b"", compare=False)
    sent_at: float = field(default=0.0, compare=False)


class Load:
    def __init__(
        self, selector: selectors.BaseSelector, port: int, requests: Iterator[bytes], until: float | None, keep: bool
    ) -> None:
        self.selector = selector
        self.port = port
        self.requests = requests
        self.until = until
        self.keep = keep
        self.replies: list[Reply] = []
        self.resting: list[Client] = []
        self.under_way = 0

    def run(self, connections: int) -> list[Reply]:
        clients = [Client(0.0, self._connect()) for _ in range(connections)]
        try:
            for client in clients:
                self._send_next(client)
            last_answer = time.monotonic()
            while self.under_way or self.resting:
                now = time.monotonic()
                while self.resting and self.resting[0].resumes_at <= now:
                    self._send_next(heapq.heappop(self.resting))
                wait = min(self.resting[0].resumes_at - now, 1.0) if self.resting else 1.0
                ready = self.selector.select(max(0.0, wait))
                for key, _ in ready:
                    self._receive(key.data)
                if ready:
                    last_answer = now
                elif self.under_way and now - last_answer > ANSWER_SECONDS:
                    raise LoadError(f"no answer for {ANSWER_SECONDS} s")
        finally:
            for client in clients:
                client.connection.close()
        return self.replies

    def _connect(self) -> socket.socket:
        try:
            connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        except OSError as error:
            raise LoadError(f"no connection: {error}") from error
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def _send_next(self, client: Client) -> None:
        if self.until is not None and time.monotonic() >= self.until:
            return
        content = next(self.requests, None)
        if content is None:
            return
        client.received = b""
        client.sent_at = time.monotonic()
        try:
            client.connection.sendall(content)
        except OSError as error:
            raise LoadError(f"a connection was dropped: {error}") from error
        self.selector.register(client.connection, selectors.EVENT_READ, client)
        self.under_way += 1

    def _receive(self, client: Client) -> None:
        try:
            content = client.connection.recv(65536)
        except OSError as error:
            raise LoadError(f"a connection was dropped: {error}") from error
        if not content:
            raise LoadError("a connection was closed without an answer")
        client.received += content
        head, separator, body = client.received.partition(b"\r\n\r\n")
        if not separator:
            return
        head = head.lower()
        if len(body) < int(_header(head, b"content-length") or 0):
            return
        self.selector.unregister(client.connection)
        self.under_way -= 1
        status = int(head[9:12])
        kept = body if self.keep or status >= 300 else b""
        reply = Reply(status, kept, client.sent_at, time.monotonic())
        self.replies.append(reply)
        if _header(head, b"connection") == b"close":
            client.connection.close()
            client.connection = self._connect()
        if reply.is_busy:
            client.resumes_at = time.monotonic() + float(_header(head, b"retry-after") or 1)
            heapq.heappush(self.resting, client)
        else:
            self._send_next(client)


def _header(head: bytes, name: bytes) -> bytes | None:
    """A header's value in a lower-cased head."""
    _, found, rest = head.partition(b"\r\n" + name + b":")
    return rest.partition(b"\r\n")[0].strip() if found else None
