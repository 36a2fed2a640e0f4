"""gunicorn's settings, read by `gunicorn 'paygate:create_app()'` in this folder; all of them from the environment."""

import signal
import socket
import struct
import uuid
from typing import Any

import gunicorn.util

import log
import settings
import worker
from errors import Problem

paygate_settings = settings.load()

bind = [f"{paygate_settings.host}:{paygate_settings.port}"]
workers = paygate_settings.web_concurrency
worker_class = "gthread"
threads = paygate_settings.threads
# A stopping process finishes its requests: a call to the provider and its retry, at most.
graceful_timeout = int(1.5 * paygate_settings.paystack_timeout_seconds) + 5
# No server in front is assumed to be there; X-Forwarded-* is not gunicorn's business.
forwarded_allow_ips = ""
# gunicorn would make a control socket under $HOME, which a read-only container has not.
control_socket_disable = True
accesslog = None  # our middleware logs each request, without what could be somebody's data
logconfig_dict = log.configuration(paygate_settings.log_level)

SOCKET_TIMEOUT_SECONDS = 5


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
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers.items()), "", body]
    gunicorn.util.write_nonblock(client, "\r\n".join(lines).encode())


gunicorn.util.write_error = write_error


def when_ready(server: Any) -> None:
    """A client that sends half a request would hold its thread for ever, and as many such clients as there are threads
    the whole process: accepted sockets inherit these time-outs from the listening ones."""
    seconds = struct.pack("ll", SOCKET_TIMEOUT_SECONDS, 0)
    for listener in server.LISTENERS:
        listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
        listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)


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
    process.wsgi.database.close()
