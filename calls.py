"""Calls to another host that end in time, whatever the other side does."""

import contextlib
import functools
import http.client
import io
import select
import socket
import ssl
import time
from typing import Any
from urllib.parse import quote, urlsplit

import certifi

MOST_KEPT = 256


class Failed(Exception):
    """No whole answer: `time-out`, `unreachable` or `too large`. The call may or may not have taken effect.

    `status` is that of an answer whose head came, if it did.
    """

    def __init__(self, why: str, status: int | None) -> None:
        super().__init__(why)
        self.status = status


class Caller:
    """Calls one host, keeps its connections and uses them again. Safe to share between threads.

    http.client as it is: a call through requests costs four times the processor's time, half of a whole payment's, and
    looks for a .netrc, which replaces our Authorization header, for proxies in the environment and for cookies.
    """

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        parts = urlsplit(url)
        self.host = parts.hostname or ""
        # Always with a port: without one http.client takes the last group of an IPv6 address for it.
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.target = quote(parts.path + ("?" + parts.query if parts.query else ""), safe="/%?&=:@!$'()*+,;~")
        self.headers = headers
        # Whom to trust is the same on every machine, and not up to the environment.
        self.tls = ssl.create_default_context(cafile=certifi.where()) if parts.scheme == "https" else None
        self.kept: list[http.client.HTTPConnection] = []

    def call(
        self,
        method: str,
        path: str,
        within_seconds: float,
        largest: int,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """One call of the URL with `path` added, `within_seconds` in all, and its answer of at most `largest` bytes.

        Redirects are not followed, and nothing is sent twice. Raises Failed.
        """
        deadline, status = time.monotonic() + within_seconds, None
        with contextlib.ExitStack() as unless_kept:
            try:
                connection = self._kept_connection() or self._new_connection()
                unless_kept.callback(connection.close)
                # http.client has no public way to bound its connecting or its reading: these two are its own hooks.
                if connection.sock is None:
                    connection._create_connection = functools.partial(_connect, deadline)  # type: ignore[attr-defined]  # a hook
                    connection.connect()
                connection.response_class = functools.partial(_timed_response, deadline)  # type: ignore[assignment]  # a hook
                connection.sock.settimeout(_left(deadline))
                connection.request(method, self.target + path or "/", body, {**self.headers, **(headers or {})})
                response = unless_kept.enter_context(connection.getresponse())
                status = response.status
                content = response.read(largest + 1)
                if response.length and len(content) <= largest:
                    raise http.client.IncompleteRead(content, response.length)
            # ValueError: a host that is no name, a chunk of a negative length
            except (http.client.HTTPException, OSError, ValueError) as error:
                raise Failed("time-out" if isinstance(error, TimeoutError) else "unreachable", status) from error
            # After a 1xx that http.client does not know (103), the answer itself is still to come.
            if response.isclosed() and not response.will_close and status >= 200 and len(self.kept) < MOST_KEPT:
                unless_kept.pop_all()
                self.kept.append(connection)
        if len(content) > largest:
            raise Failed("too large", status)
        return response, content

    def _kept_connection(self) -> http.client.HTTPConnection | None:
        """The connection used last that the other side has not closed, or spoiled by words that nobody asked for."""
        while self.kept:
            try:
                connection = self.kept.pop()
            except IndexError:  # another thread was quicker
                return None
            if connection.sock is not None and not _has_input(connection.sock):
                return connection
            connection.close()
        return None

    def _new_connection(self) -> http.client.HTTPConnection:
        if self.tls is None:
            return http.client.HTTPConnection(self.host, self.port)
        return http.client.HTTPSConnection(self.host, self.port, context=self.tls)


def _has_input(sock: socket.socket) -> bool:
    if isinstance(sock, ssl.SSLSocket) and sock.pending():  # received, deciphered and not read
        return True
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _connect(deadline: float, address: tuple[str, int], *_: object) -> socket.socket:
    """As socket.create_connection, which gives all the time there is to each address of a host; here they share it."""
    found = [str(where[0]) for _, _, _, _, where in socket.getaddrinfo(*address, type=socket.SOCK_STREAM)]
    for untried, host in zip(range(len(found), 0, -1), found, strict=True):
        try:
            sock = socket.create_connection((host, address[1]), _left(deadline) / untried)
        except OSError:
            if untried == 1:
                raise
        else:
            sock.settimeout(_left(deadline))
            return sock
    raise OSError("a name without an address")


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the call's time is over")
    return left


# A socket's time-out is for one read: an answer of one byte a second, in its headers or its body, never ends. Here each
# read gets what is left until the deadline of the call.
def _timed_response(deadline: float, sock: socket.socket, **options: Any) -> http.client.HTTPResponse:
    return http.client.HTTPResponse(_TimedSocket(sock, deadline), **options)  # type: ignore[arg-type]  # it asks for makefile() alone


class _TimedSocket(io.RawIOBase):
    """The reading side of a socket, as far as HTTPResponse needs one."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self.sock = sock
        self.deadline = deadline
        # Of an answer with "Connection: close" http.client closes the connection before it has been read; the socket
        # lives on while a file of it is open.
        self.file = sock.makefile("rb", buffering=0)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self.sock.settimeout(_left(self.deadline))
        return self.file.readinto(buffer)

    def close(self) -> None:
        self.file.close()
        super().close()
