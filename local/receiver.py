"""A merchant's own system: it takes notifications on loopback, and answers as it is told to."""

import contextlib
import http.client
import json
import socket
import socketserver
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

Answer = Callable[[socket.socket], None]


@dataclass(frozen=True)
class Received:
    path: str
    headers: dict[str, str]
    body: bytes
    answer: Answer

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.body))

    @property
    def payment(self) -> dict[str, Any]:
        return dict(self.json["data"]["payment"])


class Receiver:
    """A receiver at `url`. `answers` are those to the next notifications, `usual` that to all others; `came` is what
    came, in its order, whoever signed it."""

    def __init__(self) -> None:
        self.answers: deque[Answer] = deque()
        self.usual: Answer = status(204)
        self.came: list[Received] = []
        receiver = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                path = self.rfile.readline().split()[1].decode()
                headers = {name.lower(): value for name, value in http.client.parse_headers(self.rfile).items()}
                body = self.rfile.read(int(headers["content-length"]))
                answer = receiver.answers.popleft() if receiver.answers else receiver.usual
                receiver.came.append(Received(path, headers, body, answer))
                with contextlib.suppress(OSError):
                    answer(self.connection)

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/paygate"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def status(code: int, body: bytes = b"", **headers: str) -> Answer:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"HTTP/1.1 {code} Whatever\r\n{lines}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return lambda connection: connection.sendall(head.encode() + body)


def hang(until: threading.Event) -> Answer:
    """No answer for as long as one likes, 30 s at most, then one that it was taken."""

    def answer(connection: socket.socket) -> None:
        until.wait(30)
        status(204)(connection)

    return answer
