"""gunicorn's settings, read by `gunicorn 'paygate:create_app()'` in this folder; all of them from the environment."""

import errno
import signal
import socket
import struct
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gunicorn.glogging
import gunicorn.http.unreader
import gunicorn.util
import gunicorn.workers.gthread

import log
import settings
import worker
from errors import Problem

try:
    paygate_settings = settings.load()
except settings.Invalid as error:
    sys.exit(f"paygate: {error}")

host = f"[{paygate_settings.host}]" if ":" in paygate_settings.host else paygate_settings.host
bind = [f"{host}:{paygate_settings.port}"]
workers = paygate_settings.web_concurrency
worker_class = "gthread"
threads = paygate_settings.threads
# A stopping process finishes its requests: a call to the provider and its retry, at most.
graceful_timeout = int(1.5 * paygate_settings.paystack_timeout_seconds) + 5
# No server in front is assumed to be there; X-Forwarded-* is not gunicorn's business.
forwarded_allow_ips = ""
# gunicorn would make a control socket under $HOME, which a read-only container has not.
control_socket_disable = True


class Log(gunicorn.glogging.Logger):  # type: ignore[misc]  # gunicorn has no types
    """Without an access log: our middleware logs each request, without what could be somebody's data. gunicorn takes
    `logconfig_dict` for one, and would prepare a line of it for each request: a tenth of what a GET costs."""

    access_log_enabled = False


logger_class = Log
logconfig_dict = log.configuration(paygate_settings.log_level)

SOCKET_TIMEOUT_SECONDS, REQUEST_SECONDS = 5, 10
MOST_CLOSING = 64


def write_error(client: socket.socket, status: int, reason: str, _quoting_the_request: str) -> None:
    """What gunicorn answers to what is no HTTP, in the shape of every error."""
    log.request_id.set(uuid.uuid4().hex)
    body = Problem("bad_request").to_json()
    headers = {
        "Connection": "close",
        "Content-Type": "application/json",
        "Content-Length": len(body),
        "X-Request-Id": log.request_id.get(),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    if status >= 500:  # 501 for a Transfer-Encoding that nobody knows: the client's mistake, not ours
        status, reason = 400, "Bad Request"
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers.items()), "", body]
    gunicorn.util.write_nonblock(client, "\r\n".join(lines).encode())


gunicorn.util.write_error = write_error
wait_and_close = gunicorn.util.close_graceful
closing_threads = ThreadPoolExecutor(MOST_CLOSING, thread_name_prefix="closing")
closing = threading.BoundedSemaphore(MOST_CLOSING)


def close_aside(client: socket.socket) -> None:
    """End a connection without waiting for its client. gunicorn gives each one 2 seconds to close its side too, so that
    it can read the answer, and waits in the one thread that accepts all others: sixteen clients that do not close would
    have the process taken for dead. More than MOST_CLOSING at once are not waited for."""
    if not closing.acquire(blocking=False):
        wait_and_close(client, timeout=0)
        return
    # An object of its own: nobody else can close its descriptor while it is read from, and give it to another client.
    closing_threads.submit(linger, socket.socket(fileno=client.detach()))


def linger(client: socket.socket) -> None:
    try:
        wait_and_close(client)
    finally:
        closing.release()


gunicorn.util.close_graceful = close_aside


read_chunk = gunicorn.http.unreader.SocketUnreader.chunk


def read_chunk_in_time(reader: Any, size_hint: int | None = None) -> bytes:
    """Reads a request's head, and then its body, in REQUEST_SECONDS each: a client that sends a byte now and then stays
    within the time-out of a single read for ever."""
    if getattr(reader, "deadline", None) is None:
        reader.deadline = time.monotonic() + REQUEST_SECONDS
    if time.monotonic() > reader.deadline:
        raise BlockingIOError(errno.EAGAIN, "the request's time is over")
    chunk: bytes = read_chunk(reader, size_hint)
    return chunk


gunicorn.http.unreader.SocketUnreader.chunk = read_chunk_in_time


accept = gunicorn.workers.gthread.ThreadWorker.accept


def accept_in_turn(process: Any, listener: Any) -> None:
    """Accept a connection, unless a process with fewer is quicker: the more one has, the longer it waits, 2 ms at most.
    Else the first to wake takes nearly all, and as long as these are kept alive the other processes have little to do:
    of 256 clients one of two processes had 19, and their bulkheads let 0.63 of the payments through that they could."""
    if workers > 1:
        time.sleep(min(2e-3, process.nr_conns * 20e-6))
    accept(process, listener)


gunicorn.workers.gthread.ThreadWorker.accept = accept_in_turn


def pre_request(process: Any, request: Any) -> None:
    """The head has been read: the time of the body begins with it."""
    request.unreader.deadline = None


def post_request(process: Any, request: Any, environ: dict[str, Any], response: Any) -> None:
    """What comes next on this connection is another request."""
    request.unreader.deadline = None


def when_ready(server: Any) -> None:
    """A client that sends half a request would hold its thread for ever, and as many such clients as there are threads
    the whole process: accepted sockets inherit these time-outs from the listening ones."""
    seconds = struct.pack("ll", SOCKET_TIMEOUT_SECONDS, 0)
    for listener in server.LISTENERS:
        listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
        listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        if hasattr(socket, "TCP_DEFER_ACCEPT") and listener.sock.family != socket.AF_UNIX:
            # A connection that says nothing is not handed to a thread.
            listener.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, SOCKET_TIMEOUT_SECONDS)


def post_worker_init(process: Any) -> None:
    """Start the background loops in this process, on the app's own pool, and let waiting readers go at once when the
    process is asked to end."""
    app = process.wsgi
    end = signal.getsignal(signal.SIGTERM)

    def let_readers_go(number: int, frame: Any) -> None:
        app.readers.stop()
        if callable(end):
            end(number, frame)

    signal.signal(signal.SIGTERM, let_readers_go)
    if paygate_settings.run_worker:
        process.background = worker.Worker(app.settings, app.database, app.gateway)
        process.background.start()


def worker_exit(server: Any, process: Any) -> None:
    if hasattr(process, "background"):
        process.background.stop()
    if hasattr(process, "wsgi"):  # else it could not be loaded, and says so
        process.wsgi.database.close()
