"""gunicorn's settings, read by `gunicorn 'paygate:create_app()'` in this folder; all of them from the environment."""

import resource
import socket
import sys
from typing import Any

import gunicorn.glogging

import settings
import worker
from web import log

try:
    paygate_settings = settings.load()
except settings.Invalid as error:
    sys.exit(f"paygate: {error}")

host = f"[{paygate_settings.host}]" if ":" in paygate_settings.host else paygate_settings.host
bind = [f"{host}:{paygate_settings.port}"]
workers = paygate_settings.web_concurrency
threads = paygate_settings.threads
# A stopping process finishes its requests: a call to the provider and its retry, at most.
graceful_timeout = int(1.5 * paygate_settings.paystack_timeout_seconds) + 5
# No server in front is assumed to be there; X-Forwarded-* is not gunicorn's business.
forwarded_allow_ips = ""
# gunicorn would make a control socket under $HOME, which a read-only container has not.
control_socket_disable = True


class Log(gunicorn.glogging.Logger):  # type: ignore[misc]  # gunicorn has no types
    """No access log: our middleware logs each request, without personal data. gunicorn takes `logconfig_dict` for an
    access log, and would prepare a line for each request: that costs a tenth of a GET."""

    access_log_enabled = False


logger_class = Log
logconfig_dict = log.configuration(paygate_settings.log_level)

# Only a complete request gets a thread; see web/sockets.py.
worker_class = "web.sockets.Worker"
# Longer than platforms' routers keep an idle connection (Heroku: 90 s). If we closed it first, a request sent at that
# moment would be lost, and a router does not repeat a POST.
keepalive = 95

# Each connection is a file. We take as many files as the machine allows, and fewer connections: the connections to the
# provider and the database, and the log, are files too.
most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
if most_files == resource.RLIM_INFINITY:
    most_files = 10_240
resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
worker_connections = max(32, min(4000, most_files - 2 * threads - paygate_settings.db_pool - 64))


def when_ready(server: Any) -> None:
    """Give each socket room for our longest answer, so that a client that does not read holds no thread."""
    for listener in server.LISTENERS:
        listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 256 * 1024)


def post_worker_init(process: Any) -> None:
    """Start the background loops in this process, on the app's own pool."""
    app = process.wsgi
    if paygate_settings.trusted_proxies == 0:  # else all connections are the proxy's
        process.most_of_one_address = worker_connections // 4
    if paygate_settings.run_worker:
        process.background = worker.Worker(app.settings, app.database, app.gateway)
        process.background.start()


def worker_exit(server: Any, process: Any) -> None:
    if hasattr(process, "background"):
        process.background.stop()
    if hasattr(process, "wsgi"):  # else it could not be loaded, and says so
        process.wsgi.database.close()
