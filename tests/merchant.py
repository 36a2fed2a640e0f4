"""A merchant's own system: it takes notifications on loopback, and answers as a test tells it to.

    from merchant import merchant  # noqa: F401  # fixture

What it received is verified, whenever a test reads it, by the Standard Webhooks project's own library.
"""

import base64
import contextlib
import http.client
import json
import socket
import socketserver
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import standardwebhooks

SECRET = "whsec_" + base64.b64encode(b"a secret of the test's own, 32 b").decode()
OTHER_SECRET = "whsec_" + base64.b64encode(b"the secret that replaces it, 32b").decode()
Answer = Callable[[socket.socket], None]


@dataclass(frozen=True)
class Received:
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.body))

    @property
    def payment(self) -> dict[str, Any]:
        return dict(self.json["data"]["payment"])


class Merchant:
    """A receiver at `url`. `answers` are those to the next notifications, `usual` that to all others."""

    def __init__(self) -> None:
        self.answers: deque[Answer] = deque()
        self.usual: Answer = status(204)
        self.secrets: tuple[str, ...] = (SECRET,)
        self.settings = {"NOTIFY_SECRET": SECRET}
        self._received: list[Received] = []
        merchant = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                path = self.rfile.readline().split()[1].decode()
                headers = {name.lower(): value for name, value in http.client.parse_headers(self.rfile).items()}
                body = self.rfile.read(int(headers["content-length"]))
                merchant._received.append(Received(path, headers, body))
                answer = merchant.answers.popleft() if merchant.answers else merchant.usual
                with contextlib.suppress(OSError):
                    answer(self.connection)

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/paygate"
        self.settings["NOTIFY_URL"] = self.url

    def __enter__(self) -> "Merchant":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def received(self) -> list[Received]:
        """All that came, in its order, each verified with each of the merchant's `secrets`."""
        received = list(self._received)
        for each in received:
            for secret in self.secrets:
                standardwebhooks.Webhook(secret).verify(each.body, each.headers)
        return received

    @property
    def types(self) -> list[str]:
        return [each.json["type"] for each in self.received]


@pytest.fixture
def merchant() -> Iterator[Merchant]:
    with Merchant() as receiver:
        yield receiver


# Answers


def status(code: int, body: bytes = b"", **headers: str) -> Answer:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"HTTP/1.1 {code} Whatever\r\n{lines}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return lambda connection: connection.sendall(head.encode() + body)


def hang(until: threading.Event) -> Answer:
    """No answer for as long as the test likes, then one that it was taken."""

    def answer(connection: socket.socket) -> None:
        until.wait(30)
        status(204)(connection)

    return answer


def drip(head: bytes = b"") -> Answer:
    """`head` at once, then a byte twenty times a second, for as long as somebody reads: 10 s at most."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(200):
            connection.sendall(b"H")
            threading.Event().wait(0.05)

    return answer


def flood(code: int, sent: list[int]) -> Answer:
    """10 GB, as fast as they are read; `sent` tells how much of it was."""

    def answer(connection: socket.socket) -> None:
        chunk, size = b"x" * 65536, 10 * 1024**3
        connection.sendall(f"HTTP/1.1 {code} Whatever\r\nContent-Length: {size}\r\n\r\n".encode())
        for at in range(0, size, len(chunk)):
            sent[:] = [at]
            connection.sendall(chunk)

    return answer


def reset(connection: socket.socket) -> None:
    """The connection is torn down without an answer."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
