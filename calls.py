"""Calls to another host that end in time, whatever the other side does.

The library requests has time-outs for single waits. A silent name server, a host with many dead addresses and an answer
of one byte a second outlast them. Here all waits of a call end at the call's one deadline.
"""

import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from socket import SOCK_STREAM, getaddrinfo, socket
from typing import Any
from urllib.parse import urlsplit

from requests import PreparedRequest
from requests.adapters import HTTPAdapter
from requests.utils import DEFAULT_CA_BUNDLE_PATH
from urllib3 import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError

from settings import VERSION

MOST_KEPT = 256
WORDS = {TimeoutError: "time-out", ssl.SSLError: "TLS", ConnectionRefusedError: "refused"}


class Failed(Exception):
    """No whole answer: `name` (not resolved), `refused`, `TLS`, `time-out`, `too large` or `unreachable`.

    The call may or may not have taken effect. `status`: the answer's status, if its head came.
    """

    def __init__(self, why: str, status: int | None = None) -> None:
        super().__init__(why)
        self.status = status


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    content: bytes


class Caller:
    """Calls one host, keeps its connections and uses them again. An answer has at most `largest` bytes.

    Safe to share between threads: a call changes nothing in the adapter, and its pool is made for threads. There is no
    Session around the adapter. A Session takes an Authorization header from a .netrc and proxies from the environment,
    keeps cookies, and reads the whole body of a redirect, however long it is.
    """

    def __init__(self, url: str, headers: Mapping[str, str], largest: int) -> None:
        self.url = url
        self.headers = {"User-Agent": f"paygate/{VERSION}", "Accept-Encoding": "identity", **headers}
        self.largest = largest
        self.adapter = _Adapter(url)

    def call(
        self, method: str, path: str, within_seconds: float, body: bytes | None = None, headers: Mapping[str, str] = {}
    ) -> Answer:
        """One call of the URL with `path` added, `within_seconds` in all. Raises Failed.

        No redirect is followed, nothing is sent twice, and no content is decoded.
        """
        deadline.set(time.monotonic() + within_seconds)
        request, status = PreparedRequest(), None
        try:
            request.prepare(method, self.url + path, {**self.headers, **headers}, data=body)
            with self.adapter.send(request, stream=True, timeout=within_seconds) as response:
                status = response.status_code
                if status < 200:  # the real answer comes later; the exception closes the connection
                    raise Failed("unreachable", status)
                content = response.raw.read(self.largest + 1, decode_content=False)
                if len(content) > self.largest:
                    raise Failed("too large", status)
                if response.raw.length_remaining:
                    raise Failed("unreachable", status)
        # ValueError: a chunk of a negative length
        except (OSError, HTTPError, ValueError) as error:
            raise Failed(_word(error), status) from error
        return Answer(status, response.headers, content)


def _word(error: BaseException | None) -> str:
    """The word for the first error, below all errors that wrap it."""
    while error is not None:
        for kind, word in WORDS.items():
            if isinstance(error, kind):
                return word
        error = error.__context__
    return "unreachable"


class _Adapter(HTTPAdapter):
    """Sends to the connections of one host, which know the deadline."""

    def __init__(self, url: str) -> None:
        super().__init__()
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        if parts.scheme == "https":
            # The certificates are read here, once. requests reads them for each new connection, in 27 ms.
            context = ssl.create_default_context(cafile=DEFAULT_CA_BUNDLE_PATH)
            context.sslsocket_class = _TLSSocket
            self.pool: HTTPConnectionPool = HTTPSConnectionPool(host, port, maxsize=MOST_KEPT, ssl_context=context)
            self.pool.ConnectionCls = _TLSConnection
        else:
            self.pool = HTTPConnectionPool(host, port, maxsize=MOST_KEPT)
            self.pool.ConnectionCls = _Connection

    def get_connection_with_tls_context(self, *_: object, **__: object) -> HTTPConnectionPool:
        return self.pool

    def cert_verify(self, *_: object) -> None:
        pass


class _Connection(HTTPConnection):
    server_hostname: str | None

    def connect(self) -> None:
        """Try one address after the other. They share the time; urllib3 alone would give each address all of it."""
        name = self.server_hostname = self.host
        addresses = _addresses(name)
        try:
            for untried, self.host in zip(range(len(addresses), 0, -1), addresses, strict=True):
                self.timeout = _left() / (untried + 1)  # a part for each address, and a part for the TLS handshake
                try:
                    super().connect()
                    break
                except (ConnectTimeoutError, NewConnectionError):
                    if untried == 1:
                        raise
        finally:
            self.host = name
        if not isinstance(self.sock, ssl.SSLSocket):
            self.sock = _Socket(fileno=self.sock.detach())

    @property
    def is_connected(self) -> bool:
        """Whether the other side has neither closed the connection nor sent unexpected bytes."""
        # The operating system does not see bytes that TLS has deciphered and nobody has read.
        return super().is_connected and not (isinstance(self.sock, ssl.SSLSocket) and self.sock.pending())


class _TLSConnection(_Connection, HTTPSConnection):
    pass


class _Socket(socket):
    def recv_into(self, *args: Any) -> int:
        self.settimeout(_left())
        return super().recv_into(*args)

    def sendall(self, *args: Any) -> None:
        self.settimeout(_left())
        super().sendall(*args)


class _TLSSocket(_Socket, ssl.SSLSocket):
    pass


deadline: ContextVar[float] = ContextVar("deadline")
"""The deadline of this thread's call; the connection may be older than the call."""


def _left() -> float:
    left = deadline.get() - time.monotonic()
    if left <= 0:
        raise TimeoutError("the call's time is over")
    return left


lookups: dict[str, tuple[threading.Thread, list[str]]] = {}
lock = threading.Lock()


def _addresses(name: str) -> list[str]:
    """The addresses of `name`. getaddrinfo takes as long as it likes, so a thread of its own calls it.

    Calls at the same time share one thread for each name. So a silent name server holds only this thread, delays no
    other name, and does not keep the process from ending.
    """
    with lock:
        thread, found = lookups.get(name, (None, []))
        if thread is None or not thread.is_alive():
            found = []
            thread = threading.Thread(target=_look_up, args=(name, found), daemon=True)
            thread.start()
            lookups[name] = thread, found
    thread.join(_left())
    if not found:
        raise Failed("name")
    return found


def _look_up(name: str, found: list[str]) -> None:
    with suppress(OSError, UnicodeError):
        found += [str(where[0]) for *_, where in getaddrinfo(name, None, type=SOCK_STREAM)]
