"""A merchant's own system: it takes notifications on loopback, and answers as a test tells it to.

    from merchant import merchant  # noqa: F401  # fixture

What it received is verified, whenever a test reads it, by the Standard Webhooks project's own library.
"""

import base64
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
import standardwebhooks

from local.receiver import Answer, Received, Receiver, hang, status

__all__ = ["Answer", "Received", "hang", "status"]  # for those that import them from here

SECRET = "whsec_" + base64.b64encode(b"a secret of the test's own, 32 b").decode()
OTHER_SECRET = "whsec_" + base64.b64encode(b"the secret that replaces it, 32b").decode()


class Merchant(Receiver):
    """A receiver that knows its secrets: `settings` are those of a paygate that notifies it."""

    def __init__(self) -> None:
        super().__init__()
        self.secrets: tuple[str, ...] = (SECRET,)
        self.settings = {"NOTIFY_SECRET": SECRET, "NOTIFY_URL": self.url}

    @property
    def received(self) -> list[Received]:
        """All that came, in its order, each verified with each of the merchant's `secrets`."""
        received = list(self.came)
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
