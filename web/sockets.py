"""The worker that serves: only a complete request gets a thread.

gunicorn's gthread worker gives each connection to a thread, and the thread waits for the head and the body. If all
threads wait for slow clients, the process stops; and each connection that ends may hold up the accepting thread for 2
seconds. Here one polling thread receives requests without waiting, and ends connections too. It only looks for the end
of a request; gunicorn's parser reads its content.
"""

import contextlib
import errno
import io
import logging
import math
import re
import secrets
import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from http import HTTPStatus
from typing import Any

from gunicorn.http.errors import ParseException
from gunicorn.http.parser import RequestParser
from gunicorn.workers.gthread import TConn, ThreadWorker

from web import guard, log
from web.errors import HEADERS, Problem

logger = logging.getLogger("paygate")

REQUEST_SECONDS = 10
"""For a head, and again for a body."""
ANSWER_SECONDS = 5
CLOSING_SECONDS = 2
MOST_HEAD = 32 * 1024
MOST_BODY = 320 * 1024
"""An event of 256 KiB, and the framing of its chunks. A longer body is refused unread."""
MOST_UNREAD = 64 * 1024
"""gunicorn discards up to so many bytes of a body that the app has not read. With more, it closes the connection."""
MOST_BUFFERED = 64 * 1024 * 1024
FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

FRAMING = re.compile(rb"\r\n(content-length|transfer-encoding)[ \t]*:[ \t]*([^\r\n]*)", re.IGNORECASE)
EXPECTS = re.compile(rb"[^\r\n]* HTTP/1\.1\r\n(?:.*\r\n)?expect:[ \t]*100-continue", re.IGNORECASE | re.DOTALL)
CHUNK_SIZE = re.compile(rb"([0-9a-f]{1,8})[^\r\n]*\r\n", re.IGNORECASE)


class Connection(TConn):  # type: ignore[misc]  # gunicorn has no types
    """A client's connection: the received bytes, and where the request in them ends.

    gunicorn's parser reads from it in a thread: only received bytes, and never the socket.
    """

    def __init__(self, cfg: Any, sock: socket.socket, client: Any, server: Any) -> None:
        super().__init__(cfg, sock, client, server)
        self.initialized = True  # TConn.init() would make a parser that reads from the socket
        self.parser = RequestParser(cfg, self, client)
        self.network = guard.network(client[0]) if isinstance(client, tuple) else ""
        self.received = bytearray()
        self.request = io.BytesIO()
        self.deadline = 0.0
        self.is_closing = self.is_late = False
        self.begin()

    def begin(self) -> None:
        """Start with the next request."""
        self.searched = self.head = 0
        self.at = 0  # up to where its chunks have been followed
        self.length: int | None = 0
        self.can_go_on = True

    def recv(self, size: int) -> bytes:
        """The next bytes of the request; empty at the end of the received bytes. Raises TimeoutError if the request
        came too late."""
        data = self.request.read(size)
        if not data:
            self.can_go_on = False  # the parser wants more bytes than we saw: the next request's beginning is unknown
            if self.is_late:
                raise TimeoutError
        return data

    def has_head(self) -> bool:
        if self.head == 0:
            end = self.received.find(b"\r\n\r\n", max(0, self.searched - 3))
            self.searched = len(self.received)
            if end < 0:
                return False
            self.head = self.at = end + 4
            self.read_framing()
        return True

    def read_framing(self) -> None:
        """Read the body's length; `length` is None for a body in chunks. If the framing is unclear, the parser refuses
        it, and the connection ends."""
        match FRAMING.findall(self.received, 0, self.head):
            case []:
                self.length = 0
            case [(name, value)] if name.lower() == b"content-length" and re.fullmatch(rb"[0-9]{1,9}[ \t]*", value):
                self.length = int(value)
                self.can_go_on = self.length <= MOST_UNREAD
            case [(name, value)] if name.lower() == b"transfer-encoding" and value.strip().lower() == b"chunked":
                self.length = None
            case _:
                self.length, self.can_go_on = 0, False

    def end(self) -> int | None:
        """Where the request ends; None if more bytes are to come."""
        end = self.end_of_chunks() if self.length is None else self.head + self.length
        if end is not None and end <= len(self.received):
            return end
        is_too_long = max(self.length or 0, len(self.received) - self.head) > MOST_BODY
        return self.cut() if is_too_long else None

    def end_of_chunks(self) -> int | None:
        while found := CHUNK_SIZE.match(self.received, self.at):
            size = int(found[1], 16)
            if size == 0:
                end = self.received.find(b"\r\n\r\n", found.end() - 2)
                self.can_go_on = end - self.head <= MOST_UNREAD
                return end + 4 if end >= 0 else None
            if found.end() + size + 2 > len(self.received):
                return None
            self.at = found.end() + size + 2
        # A size that is not complete yet, or is no size.
        return self.cut() if b"\r\n" in self.received[self.at :] else None

    def cut(self) -> int:
        """End the request at the received bytes; do not wait for the rest."""
        self.can_go_on = False
        return len(self.received)

    def say(self, answer: bytes) -> None:
        """Send without waiting. A client that does not take the answer does not need it."""
        with contextlib.suppress(OSError):
            self.sock.send(answer)

    @property
    def is_spent(self) -> bool:
        """Whether the parser has read the request to its end, and no further."""
        return self.can_go_on and not self.request.read(1) and not self.parser.unreader.buf.getvalue()


class Worker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """gunicorn's worker with threads, but it waits for its clients in the poller."""

    most_of_one_address: int | None = None
    """How many connections one address may have; None behind proxies, which bring all connections."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.waiting: dict[Connection, None] = {}
        """The connections in the poller, the oldest first."""
        self.of_address: Counter[str] = Counter()
        self.buffered = 0
        self.looked_at, self.stops_at = 0.0, math.inf

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Wake waiting readers at once when SIGTERM asks the process to end."""
        if self.booted:
            self.wsgi.readers.stop()
        super().handle_exit(sig, frame)

    def accept(self, listener: socket.socket) -> None:
        """Take a connection. Without a free file gunicorn's own method would end the process, with all its requests."""
        try:
            sock, client = listener.accept()
        except OSError as error:
            if error.errno in FULL:
                logger.warning("no_files_left", extra={"outcome": len(self.waiting)})
                if not self.make_room(lambda _: True):
                    time.sleep(0.05)
            elif error.errno not in (errno.EAGAIN, errno.ECONNABORTED):
                raise
            return
        conn = Connection(self.cfg, sock, client, listener.getsockname())
        self.nr_conns += 1
        self.of_address[conn.network] += 1
        if self.has_room(conn):
            self.wait(conn, REQUEST_SECONDS)
            self.receive(conn)
        else:
            self.turn_away(conn)

    def has_room(self, conn: Connection) -> bool:
        """Whether a new connection may stay, maybe instead of the connection that has waited longest."""
        if self.most_of_one_address is not None and self.of_address[conn.network] > self.most_of_one_address:
            return self.make_room(lambda each: each.network == conn.network)
        # One less than gunicorn's limit: there it stops accepting, and nobody would get an answer.
        return self.nr_conns < self.worker_connections or self.make_room(lambda _: True)

    def make_room(self, is_meant: Callable[[Connection], bool]) -> bool:
        oldest = next(filter(is_meant, self.waiting), None)
        if oldest is not None:
            self.turn_away(oldest)
        return oldest is not None

    def turn_away(self, conn: Connection) -> None:
        if not conn.is_closing:
            conn.say(raw(Problem("busy", "There are too many connections; try again.", retry_after_seconds=1)))
        self.end(conn)

    def wait(self, conn: Connection, seconds: float) -> None:
        conn.sock.setblocking(False)
        conn.deadline = time.monotonic() + seconds
        self.waiting[conn] = None
        self.poller.register(conn.sock, selectors.EVENT_READ, partial(self.receive, conn))

    def leave(self, conn: Connection) -> None:
        if conn in self.waiting:
            del self.waiting[conn]
            self.poller.unregister(conn.sock)
            self.buffered -= len(conn.received)

    def receive(self, conn: Connection, _sock: object = None) -> None:
        if conn not in self.waiting:  # another connection's turn in this round has ended it
            return
        try:
            data = conn.sock.recv(64 * 1024)
        except BlockingIOError:
            return
        except OSError:
            self.end(conn)
            return
        if conn.is_closing:
            conn.searched += len(data)
            if not data or conn.searched > MOST_UNREAD:
                self.end(conn)
        elif data:
            conn.received += data
            self.buffered += len(data)
            self.look(conn)
        elif conn.head:
            self.hand_over(conn, conn.cut())
        else:
            self.end(conn)

    def look(self, conn: Connection) -> None:
        """Hand over a complete request; after the head, start the time for the body."""
        had_head = conn.head > 0
        if conn.has_head():
            if (end := conn.end()) is not None:
                self.hand_over(conn, end)
                return
            if not had_head:
                conn.deadline = time.monotonic() + REQUEST_SECONDS
                if EXPECTS.match(conn.received, 0, conn.head):
                    conn.say(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif len(conn.received) > MOST_HEAD:
            self.refuse(conn, Problem("bad_request", "The headers are too long."))
        elif len(conn.received) and conn.deadline > (deadline := time.monotonic() + REQUEST_SECONDS):
            conn.deadline = deadline  # it was kept alive, and is now within a request
        if self.buffered > MOST_BUFFERED:
            self.make_room(lambda each: len(each.received) > 0)

    def hand_over(self, conn: Connection, end: int) -> None:
        """Let a thread answer the bytes up to `end`."""
        self.leave(conn)
        conn.request = io.BytesIO(bytes(conn.received[:end]))
        del conn.received[:end]
        self.enqueue_req(conn)

    def handle_request(self, req: Any, conn: Connection) -> Any:
        """Answer, in a thread. gunicorn's own method would wait for ever for a client that does not read, and log an
        error for each client that has gone."""
        conn.sock.settimeout(ANSWER_SECONDS)
        if not conn.can_go_on:
            req.force_close()
        try:
            return super().handle_request(req, conn)
        except OSError:
            raise StopIteration from None

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: Exception) -> None:
        """Answer bytes that are no HTTP like every error, and quote none of them."""
        if req is None and isinstance(exc, ParseException):
            logger.info("no_http", extra={"outcome": type(exc).__name__})
            client.send(raw(Problem("bad_request")), socket.MSG_DONTWAIT)
        else:
            super().handle_error(req, client, addr, exc)

    def finish_request(self, conn: Connection, fs: "Future[Any]") -> None:
        if fs.cancelled() or fs.exception() or not fs.result() or not conn.is_spent:
            self.linger(conn)
            return
        conn.begin()
        self.wait(conn, self.cfg.keepalive)
        self.buffered += len(conn.received)
        self.look(conn)

    def refuse(self, conn: Connection, problem: Problem) -> None:
        """Answer without a thread, if the bytes are no request."""
        conn.say(raw(problem))
        self.linger(conn)

    def linger(self, conn: Connection) -> None:
        """End a connection so that its client can read the answer (RFC 9112, section 9.6): it closes first, within
        CLOSING_SECONDS. gunicorn would wait for that in the one thread that accepts."""
        self.leave(conn)
        conn.received.clear()
        conn.begin()
        conn.is_closing = True
        try:
            conn.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.end(conn)
        else:
            self.wait(conn, CLOSING_SECONDS)

    def end(self, conn: Connection) -> None:
        self.leave(conn)
        self.nr_conns -= 1
        self.of_address[conn.network] -= 1
        if not self.of_address[conn.network]:
            del self.of_address[conn.network]
        conn.close()

    def murder_pending(self) -> None:
        """End connections that have waited too long; gunicorn calls this in each round. A stopping process waits for
        CLOSING_SECONDS at most."""
        now = time.monotonic()
        if not self.alive:
            self.stops_at = min(self.stops_at, now + CLOSING_SECONDS)
        if now < self.looked_at + 0.2:
            return
        self.looked_at = now
        for conn in [each for each in self.waiting if min(each.deadline, self.stops_at) <= now]:
            if conn.head:
                conn.is_late = True
                self.hand_over(conn, conn.cut())
            elif conn.received:
                self.refuse(conn, Problem("request_timeout", "The request did not come in time."))
            else:
                self.end(conn)


def raw(problem: Problem) -> bytes:
    """An answer that needs no thread, with the headers of every answer."""
    log.request_id.set(secrets.token_hex(16))
    body = problem.to_json().encode()
    headers = {
        "Connection": "close",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "X-Request-Id": log.request_id.get(),
        **HEADERS,
        **problem.headers,
    }
    log.request_id.set(None)
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}\r\n{lines}\r\n".encode() + body
