# ruff: noqa: F811  (fixtures are imported by their names)
"""Slow, silent and many clients over real sockets: a thread is for a request that is there."""

import contextlib
import hashlib
import hmac
import http.client
import json
import re
import resource
import runpy
import secrets
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shop
from commands.migrate import migrate
from conftest import Server as DatabaseServer
from conftest import url_of
from local.sandbox import Sandbox
from shop import ROOT, SECRET_KEY, WEBHOOK, Reply, Server, query, sandbox  # noqa: F401

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
HOOK = b"POST /api/v1/webhooks/paystack HTTP/1.1\r\nHost: x\r\n"
WAIT_SECONDS = 8  # less than what a client may take for a request: a thread that waited for it would be too late
FILES, PLACES = 152, 64  # as many connections does a process with 8 threads take where it may open so many files


@pytest.fixture
def serve(database_url: str, sandbox: Sandbox, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Starts a server of one process without the worker."""
    with contextlib.ExitStack() as stack:
        yield lambda **env: stack.enter_context(
            Server(database_url, sandbox, tmp_path, **{"RUN_WORKER": "0", "THREADS": "2", **env})
        )


@pytest.fixture(scope="module")
def served(server: DatabaseServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that only ask."""
    name, maintenance_url = f"sockets_{secrets.token_hex(8)}", url_of(server, server.maintenance_dbname)
    url = url_of(server, name)
    query(maintenance_url, f"CREATE DATABASE {name}")
    migrate(url)
    try:
        with (
            Sandbox(SECRET_KEY) as provider,
            Server(url, provider, tmp_path_factory.mktemp("sockets"), RUN_WORKER="0", THREADS="2") as each,
        ):
            yield each
    finally:
        query(maintenance_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started from here on may open FILES files, and cannot raise that."""
    popen: Any = subprocess.Popen

    def limited(*arguments: Any, preexec_fn: Callable[[], object] | None = None, **options: Any) -> Any:
        def prepare() -> None:
            if preexec_fn is not None:
                preexec_fn()
            resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))

        return popen(*arguments, preexec_fn=prepare, **options)  # the limit is the point

    monkeypatch.setattr(subprocess, "Popen", limited)


Serve = Callable[..., Server]


class Clients:
    """Connections of this test's own, closed with it."""

    def __init__(self) -> None:
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> "Clients":
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def dial(self, server: Server, data: bytes = b"", source: str = "127.0.0.1") -> socket.socket:
        address = ("127.0.0.1", server.port)
        client = self.stack.enter_context(socket.create_connection(address, 20, source_address=(source, 0)))
        client.sendall(data)
        return client


@pytest.fixture
def clients() -> Iterator[Clients]:
    with Clients() as each:
        yield each


def read(client: socket.socket) -> Reply:
    """The next answer on a connection."""
    answer = http.client.HTTPResponse(client)
    answer.begin()
    return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read().decode())


def status(client: socket.socket) -> int | None:
    """The status of the answer that ends a connection; None where it ends without one."""
    with contextlib.suppress(ConnectionResetError), client.makefile("rb") as answer:
        data = answer.read()
        return int(data.split(b" ")[1]) if data else None
    return None


def sign(event: bytes) -> str:
    return hmac.new(SECRET_KEY.encode(), event, hashlib.sha512).hexdigest()


def worker_of(server: Server) -> int:
    """The one process that serves."""
    assert server.process is not None
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    assert len(children) == 1
    return int(children[0])


def assert_serves(server: Server) -> None:
    """Those who bring a whole request get their answer."""
    event = b'{"event": "none", "data": {}}'
    for method, path, body, headers in (
        ("GET", "/healthz", None, {}),
        ("GET", "/readyz", None, {}),
        ("POST", WEBHOOK, event, {"x-paystack-signature": sign(event)}),
    ):
        assert server.request(method, path, body, headers, timeout_seconds=WAIT_SECONDS).status_code == 200


def errors_of(server: Server) -> list[str]:
    return [line for line in server.log.read_text().splitlines() if json.loads(line)["level"] == "ERROR"]


def test_slow_and_silent_clients_hold_no_thread_and_end(serve: Serve, clients: Clients) -> None:
    """Ten of each kind for two threads, and a byte of each now and then."""
    server = serve()
    kinds = {
        "silent": (b"", None),
        "head": (b"GET /healthz HTTP/1.1\r\nX-Slow: ", 408),
        "body": (HOOK + b"Content-Length: 1000\r\n\r\n", 408),
        "payment": (
            b"POST /api/v1/payments HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n",
            408,
        ),
        "chunks": (HOOK + b"Transfer-Encoding: chunked\r\n\r\n400\r\n", 408),
        "size": (HOOK + b"Transfer-Encoding: chunked\r\n\r\n5;", 408),
    }
    begun = time.monotonic()
    opened = {name: [clients.dial(server, data) for _ in range(10)] for name, (data, _) in kinds.items()}
    for _ in range(3):
        assert_serves(server)
        for name in opened.keys() - {"silent", "payment"}:
            for client in opened[name]:
                client.sendall(b"x")
        time.sleep(0.5)
    statuses = {name: {status(client) for client in each} for name, each in opened.items()}
    assert statuses == {name: {expected} for name, (_, expected) in kinds.items()}
    assert time.monotonic() - begun < 60
    assert not errors_of(server)


def test_clients_that_do_not_read_their_answer_hold_no_thread(serve: Serve, clients: Clients) -> None:
    server = serve()
    for _ in range(10):
        client = clients.stack.enter_context(socket.socket())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", server.port))
        client.sendall(b"GET /api/v1/openapi.json HTTP/1.1\r\nHost: x\r\n\r\n")
    begun = time.monotonic()
    assert_serves(server)
    assert time.monotonic() - begun < 20  # with two threads and 5 seconds for each of ten it would be 25
    assert not errors_of(server)


def test_idle_connections_are_kept_and_cost_no_thread(serve: Serve, clients: Clients) -> None:
    server = serve()
    idle = [clients.dial(server, HEALTH) for _ in range(20)]
    assert {read(client).status_code for client in idle} == {200}
    time.sleep(3)  # gunicorn's own default is 2
    assert_serves(server)
    for client in idle:
        client.sendall(HEALTH)
        assert read(client).status_code == 200


def test_a_connection_is_kept_longer_than_the_routers_of_platforms_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in shop.environment("postgresql://localhost/none", Sandbox(SECRET_KEY, port=9)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        values = runpy.run_path(str(ROOT / "gunicorn.conf.py"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert values["keepalive"] > 90


def test_a_stopping_server_does_not_wait_for_idle_and_slow_clients(serve: Serve, clients: Clients) -> None:
    server = serve(PAYSTACK_TIMEOUT="60")  # it would give requests 95 s
    kept = clients.dial(server, HEALTH)
    assert read(kept).status_code == 200
    clients.dial(server)
    clients.dial(server, HOOK)
    clients.dial(server, HOOK + b"Content-Length: 10\r\n\r\n1")
    assert server.stop(within_seconds=20) == 0


# How many there may be


def test_when_no_file_is_left_for_a_connection_the_process_goes_on(serve: Serve, clients: Clients) -> None:
    server = serve()
    process = worker_of(server)
    open_now = len(list(Path(f"/proc/{process}/fd").iterdir()))
    resource.prlimit(process, resource.RLIMIT_NOFILE, (open_now + 20, open_now + 20))
    opened = [clients.dial(server) for _ in range(60)]
    assert server.request("GET", "/healthz", timeout_seconds=WAIT_SECONDS).status_code == 200
    assert status(opened[0]) == 503
    assert worker_of(server) == process
    assert "no_files_left" in server.log.read_text()


@pytest.mark.usefixtures("few_files")
def test_connections_are_fewer_than_the_files_that_may_be_open(serve: Serve, clients: Clients) -> None:
    server = serve(TRUSTED_PROXIES="1", THREADS="8")
    process = worker_of(server)
    opened = [clients.dial(server, b"GET") for _ in range(3 * PLACES)]
    refused = read(opened[0])
    assert (refused.status_code, refused.headers["connection"]) == (503, "close")
    assert (refused.json["code"], refused.headers["retry-after"]) == ("busy", "1")
    assert server.request("GET", "/readyz", timeout_seconds=WAIT_SECONDS).status_code == 200
    opened[-1].sendall(HEALTH[3:])
    assert read(opened[-1]).status_code == 200
    assert worker_of(server) == process
    assert "no_files_left" not in server.log.read_text()


@pytest.mark.usefixtures("few_files")
def test_one_address_has_a_part_of_the_connections_and_takes_no_others_place(serve: Serve, clients: Clients) -> None:
    server = serve(THREADS="8")
    other = clients.dial(server, b"GET", source="127.0.0.2")
    many = [clients.dial(server, b"GET") for _ in range(2 * PLACES)]
    other.sendall(HEALTH[3:])
    assert read(other).status_code == 200
    many[-1].sendall(HEALTH[3:])
    assert read(many[-1]).status_code == 200
    kept = PLACES // 4
    assert {status(client) for client in many[:-kept]} == {503}


@pytest.mark.usefixtures("few_files")
def test_behind_a_proxy_all_connections_may_come_from_one_address(serve: Serve, clients: Clients) -> None:
    server = serve(TRUSTED_PROXIES="1", THREADS="8")
    many = [clients.dial(server, b"GET") for _ in range(PLACES - 4)]
    for client in many:
        client.sendall(HEALTH[3:])
    assert {read(client).status_code for client in many} == {200}


# Where a request ends


def test_requests_sent_at_once_are_answered_one_after_the_other(served: Server, clients: Clients) -> None:
    event = b"Content-Length: 2\r\n\r\n{}"
    chunked = b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    last = b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    client = clients.dial(served, HEALTH * 20 + HOOK + event + HOOK + chunked + HEALTH + last)
    with client.makefile("rb") as answers:
        found = re.findall(rb"HTTP/1.1 (\d+) ", answers.read())
    assert found == [b"200"] * 20 + [b"401", b"401", b"200", b"404"]


@pytest.mark.parametrize("framing", ["length", "chunks", "chunks-and-trailers"])
def test_a_body_may_come_byte_by_byte(served: Server, clients: Clients, framing: str) -> None:
    event = b'{"event": "none", "data": {}}'
    head = HOOK + b"x-paystack-signature: " + sign(event).encode() + b"\r\n"
    if framing == "length":
        request = head + b"Content-Length: %d\r\n\r\n" % len(event) + event
    else:
        chunks = b"".join(b"%X;a=b\r\n%b\r\n" % (len(part), part) for part in (event[:3], event[3:]))
        trailers = b"X-Trailer: y\r\n" if framing.endswith("trailers") else b""
        request = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n" + trailers + b"\r\n"
    client = clients.dial(served)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in request:
        client.sendall(bytes([byte]))
    assert read(client).status_code == 200
    client.sendall(HEALTH)
    assert read(client).status_code == 200


@pytest.mark.parametrize(
    "framing",
    [
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Content-Length: %024d\r\n" % len(HEALTH),
        b"Content-Length: +%d\r\n" % len(HEALTH),
        b"Content-Length : %d\r\n" % len(HEALTH),
        b"Content-Length: %d\r\nContent-Length: 0\r\n" % len(HEALTH),
        b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n",
    ],
)
def test_what_follows_an_unclear_end_is_never_taken_for_a_request(
    served: Server, clients: Clients, framing: bytes
) -> None:
    client = clients.dial(served, HOOK + framing + b"\r\n" + HEALTH)
    with client.makefile("rb") as answers:
        assert answers.read().count(b"HTTP/1.1 ") == 1


HEADERS = {"json": b"Content-Type: application/json\r\n", "text": b"Content-Type: text/plain\r\n"}


@pytest.mark.parametrize("length", [10, 20_000, 300_000, 400_000])
@pytest.mark.parametrize(
    ("line", "headers", "expected"),
    [
        (b"POST /api/v1/payments", HEADERS["text"], {415}),
        (b"POST /api/v1/payments", HEADERS["json"], {400, 413}),
        (b"POST /api/v1/webhooks/paystack", b"", {401, 413}),
        (b"POST /nowhere", b"", {404}),
        (b"DELETE /api/v1/payments", b"", {405}),
    ],
)
def test_an_answer_says_truly_whether_the_connection_goes_on(
    served: Server, clients: Clients, line: bytes, headers: bytes, expected: set[int], length: int
) -> None:
    """Also one that was made without reading the body."""
    client = clients.dial(served, line + b" HTTP/1.1\r\nHost: x\r\n" + headers + b"Content-Length: %d\r\n\r\n" % length)
    with contextlib.suppress(ConnectionError):
        client.sendall(b"x" * length)
    assert_says_truly(client, expected, is_long=length > 60_000)


def test_what_is_far_too_long_is_refused_before_it_comes(served: Server, clients: Clients) -> None:
    client = clients.dial(served, HOOK + b"Content-Length: 400000\r\n\r\n")
    assert_says_truly(client, {413}, is_long=True)


def assert_says_truly(client: socket.socket, expected: set[int], *, is_long: bool) -> None:
    answer = read(client)
    assert answer.status_code in expected
    assert answer.headers["connection"] == ("close" if is_long else "keep-alive")
    if is_long:
        assert client.recv(1) == b""
    else:
        client.sendall(HEALTH)
        assert read(client).status_code == 200
