# ruff: noqa: F811  (fixtures are imported by their names)
"""As it is served, over a socket: what clients do to connections, and what the log says of it all."""

import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict

from answers import guarded, problem
from commands.migrate import migrate
from conftest import Server as DatabaseServer
from conftest import url_of
from local.sandbox import Sandbox
from shop import (  # noqa: F401  # fixtures
    CARD,
    JSON,
    ORDER,
    PAYMENTS,
    SECRET_KEY,
    WEBHOOK,
    Reply,
    Server,
    query,
    raw,
    sandbox,
    sign,
    wait_until,
)

# As it is served, over a socket


@pytest.fixture(scope="session")
def served(server: DatabaseServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """gunicorn with one process of 6 threads and the worker; its provider sends webhooks."""
    name = f"served_{secrets.token_hex(8)}"
    url = url_of(dataclasses.replace(server, password=server.password or "sesame"), name)
    maintenance_url = url_of(server, server.maintenance_dbname)
    query(maintenance_url, f"CREATE DATABASE {name}")
    migrate(url)
    settings = {"THREADS": "6", "LOG_LEVEL": "DEBUG", "WORKER_INTERVAL": "0.2"}
    try:
        with (
            Sandbox(SECRET_KEY) as sandbox,
            Server(url, sandbox, tmp_path_factory.mktemp("served"), **settings) as gunicorn,
        ):
            sandbox.configure(webhook_url=gunicorn.url + WEBHOOK)
            yield gunicorn
    finally:
        query(maintenance_url, f"DROP DATABASE {name} WITH (FORCE)")


def payment_of(served: Server, answer: Reply) -> str:
    """The status of the payment in an answer, as it stands now."""
    reply = served.request("GET", f"{PAYMENTS}/{answer.json['payment']['id']}")
    guarded(reply)
    return str(reply.json["payment"]["status"])


def test_a_payment_is_completed_by_its_webhook_over_the_wire(served: Server) -> None:
    answer = served.create()
    guarded(answer)
    served.sandbox.pay(answer.json["payment"]["reference"])
    assert served.sandbox.wait_for_webhooks()
    assert payment_of(served, answer) == "completed"


def test_a_read_has_the_worker_find_soon_what_no_webhook_told(served: Server) -> None:
    answer = served.create(customer_email="lost-webhook@example.com")
    payment = answer.json["payment"]
    served.sql("UPDATE payments SET poll_at = now() + interval '1 hour' WHERE id = %s", payment["id"])
    served.sandbox.pay(payment["reference"])
    wait_until(lambda: payment_of(served, answer) == "completed", within_seconds=15)


def test_a_slash_at_the_end_is_not_answered_by_a_redirect(served: Server) -> None:
    answer = served.request("POST", f"{PAYMENTS}/", json.dumps(ORDER), JSON)
    assert answer.status_code == 201
    path = f"{PAYMENTS}/{answer.json['payment']['id']}"
    assert served.request("GET", f"{path}/").status_code == served.request("GET", path).status_code == 200


def test_a_chunked_payment_arrives(served: Server) -> None:
    body = raw().encode()
    assert served.request("POST", PAYMENTS, [body[:10], body[10:]], JSON).status_code == 201
    problem(served.request("POST", PAYMENTS, [b" " * 1024] * 17, JSON), 413, "payload_too_large")


def test_a_chunked_webhook_arrives(served: Server) -> None:
    answer = served.create(customer_email="lost-webhook@example.com")
    reference = answer.json["payment"]["reference"]
    served.sandbox.pay(reference)
    body, headers = served.sandbox.event(reference)
    assert served.request("POST", WEBHOOK, [body[:10], body[10:]], headers).status_code == 200
    assert payment_of(served, answer) == "completed"
    problem(served.request("POST", WEBHOOK, [body, b" "], headers), 401, "invalid_signature")
    largest = [b" " * 1024] * 257
    problem(served.request("POST", WEBHOOK, largest, sign(b"".join(largest))), 413, "payload_too_large")


def test_two_idempotency_keys_are_a_bad_request(served: Server) -> None:
    for one, other in (("a", "b"), ('"a"', '"b"'), ("a", "a")):
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
        connection.putrequest("POST", PAYMENTS)
        body = raw().encode()
        for name, value in (("Idempotency-Key", one), ("Idempotency-Key", other), ("Content-Length", len(body))):
            connection.putheader(name, value)
        connection.putheader("Content-Type", "application/json")
        connection.endheaders(body)
        answer = connection.getresponse()
        reply = Reply(
            answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read().decode()
        )
        connection.close()
        problem(reply, 400, "invalid_idempotency_key")


def send(served: Server, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    connection.sendall(data)
    return connection


def read(connection: socket.socket) -> Reply:
    """The next answer on a connection."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read().decode())


@pytest.mark.parametrize(
    "data",
    [
        b"payment please\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nno header\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: many\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /" + b"x" * 10_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_http_is_answered_like_every_error(served: Server, data: bytes) -> None:
    with send(served, data) as connection:
        answer = read(connection)
    assert 400 <= answer.status_code < 500
    problem(answer, answer.status_code, "bad_request")


def test_a_body_that_was_not_read_is_not_taken_for_the_next_request(served: Server) -> None:
    smuggled = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    post = b"POST /api/v1/payments HTTP/1.1\r\nHost: x\r\n"
    plain = post + b"Content-Type: text/plain\r\nContent-Length: %d\r\n\r\n%b" % (len(smuggled), smuggled)
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(smuggled), smuggled)
    chunked = post + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
    last = b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    for request, status in ((plain, b"415"), (chunked, b"400")):
        with send(served, request + last) as connection, connection.makefile("rb") as answers:
            statuses = re.findall(rb"HTTP/1.1 (\d+)", answers.read())
        assert statuses in ([status, b"404"], [status])  # to close the connection is safe too


def test_a_client_that_waits_for_a_word_before_it_sends_its_body_gets_it(served: Server) -> None:
    head = f"POST {PAYMENTS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw())}\r\n"
    with send(served, f"{head}Expect: 100-continue\r\n\r\n".encode()) as connection:
        assert connection.recv(65536).startswith(b"HTTP/1.1 100 ")
        connection.sendall(raw().encode())
        assert read(connection).status_code == 201


HALF_SENT = {
    "nothing": b"",
    "line": b"POST /api/v1/paym",
    "headers": b"POST /api/v1/payments HTTP/1.1\r\nHost: localhost\r\nContent-Ty",
    "payment": b"POST /api/v1/payments HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b'Content-Length: 100\r\n\r\n{"amount": 5',
    "event": b"POST /api/v1/webhooks/paystack HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{",
    "chunk": b"POST /api/v1/webhooks/paystack HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n64\r\n{",
}


def answer_status(connection: socket.socket) -> int | None:
    """The status that a connection is answered with; None where it is closed without an answer."""
    data = connection.recv(65536)
    return int(data.split(b" ")[1]) if data else None


def test_half_sent_requests_on_as_many_sockets_as_there_are_threads_stop_nobody(served: Server) -> None:
    """They wait without a thread, and end."""
    with contextlib.ExitStack() as stack:
        connections = {name: stack.enter_context(send(served, data)) for name, data in HALF_SENT.items()}
        time.sleep(0.2)
        started = time.monotonic()
        assert served.create().status_code == 201
        assert time.monotonic() - started < 10
        statuses = {name: answer_status(connections[name]) for name in ("payment", "event", "chunk")}
    assert all(status is None or 400 <= status < 500 for status in statuses.values()), statuses


@pytest.mark.parametrize("half", ["payment", "event", "chunk"])
def test_a_body_that_ends_early_is_the_clients_error(served: Server, half: str) -> None:
    with send(served, HALF_SENT[half]) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert answer_status(connection) in (400, 401)


def test_a_stopping_server_finishes_what_it_has_begun(database_url: str, sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.fault("initialize", "slow", seconds=1)
    with Server(database_url, sandbox, tmp_path) as gunicorn, concurrent.futures.ThreadPoolExecutor() as pool:
        request = pool.submit(gunicorn.create)
        wait_until(lambda: sandbox.calls("initialize") == 1)
        assert gunicorn.stop() == 0
        assert request.result().status_code == 201


# Logs

SHIBBOLETH: dict[str, Any] = {
    "customer_name": "Zebedee Ọlá-Quux",
    "customer_email": "zebedee.quux@mail.example",
    "customer_phone": "+2348099887766",
    "location": "Umzimkulu Corner",
    "description": "Purple wombat",
    "metadata": {"order": "wombat-7781"},
}
HUSHED = ("zebedee", "quux", "99887766", "umzimkulu", "wombat", "sesame", CARD, SECRET_KEY, "shibboleth")


def provoke(served: Server) -> None:
    """Payments, events and errors of each kind, all of them about one customer."""
    bearer = {"Authorization": "Bearer sesame"}
    answer = served.create("zebedee-key", bearer, **SHIBBOLETH)
    assert answer.status_code == 201
    payment = answer.json["payment"]
    assert served.create("zebedee-key", **SHIBBOLETH).status_code == 201
    assert served.create("zebedee-key", **{**SHIBBOLETH, "location": "Umzimkulu"}).status_code == 422
    for broken in ({"amount": "zebedee"}, {"zebedee": "quux"}, {"description": CARD}, {"customer_email": "zebedee"}):
        assert served.create(**{**SHIBBOLETH, **broken}).status_code == 422
    for body, headers in (
        ('{"customer_name": "zebedee', JSON),
        ("customer_name=zebedee", {"Content-Type": "text/zebedee"}),
        (raw(), {**JSON, "Content-Encoding": "zebedee"}),
        (raw(), {**JSON, "Idempotency-Key": "zebedee quux"}),
        (raw().ljust(20_000), {**JSON, "X-Request-Id": "zebedee quux"}),
    ):
        assert 400 <= served.request("POST", PAYMENTS, body, headers).status_code < 500
    for path in (f"{PAYMENTS}/zebedee.quux@mail.example", "/pay/zebedee?reference=quux", "/zebedee?quux=wombat"):
        assert served.request("GET", path).status_code == 404
    assert served.request("ZEBEDEE", PAYMENTS).status_code in (400, 405)
    assert served.request("GET", f"/pay/{payment['id']}").status_code == 200
    for raw_request in (
        b"zebedee quux\r\n\r\n",
        b"GET /zebedee HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nzebedee quux\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: zebedee\r\n\r\n",
        b"GET / HTTP/1.1\r\nZebe(dee: quux\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: zebedee\r\n\r\n",
        b"GET /" + b"zebedee" * 2000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nX-Zebedee: " + b"quux" * 5000 + b"\r\n\r\n",
    ):
        with send(served, raw_request) as connection:
            connection.recv(65536)
    # Events
    served.sandbox.pay(payment["reference"])
    assert served.sandbox.wait_for_webhooks()
    event, headers = served.sandbox.event(payment["reference"])
    assert b"zebedee" in event
    assert served.request("POST", WEBHOOK, event, sign(event, "sk_test_shibboleth")).status_code == 401
    for signed in (b"zebedee", b'{"event": "zebedee", "data": {"reference": "quux"}}'):
        assert served.request("POST", WEBHOOK, signed, sign(signed)).status_code == 200
    # The provider
    refusal = {"status": False, "message": "Invalid Email Address Passed: zebedee.quux@mail.example"}
    served.sandbox.fault("initialize", "answer", effect=False, status=400, body=refusal)
    assert served.create(**SHIBBOLETH).status_code == 422
    served.sandbox.fault("initialize", "answer", effect=False, status=403, body={"message": "zebedee"})
    assert served.create(**SHIBBOLETH).status_code == 502
    for fault in ("502", "garbage", "lost-answer", "truncated", "redirect", "foreign-url"):
        served.sandbox.fault("initialize", fault, times=2)
        assert served.create(**SHIBBOLETH).status_code in (201, 503)
        served.sandbox.clear_faults()
    # The database
    served.sql("ALTER TABLE payments ADD CONSTRAINT broken CHECK (customer_name NOT LIKE 'Zebedee%%') NOT VALID")
    assert served.create(**SHIBBOLETH).status_code == 500
    assert served.request("POST", WEBHOOK, event, headers).status_code == 200
    served.sql("ALTER TABLE payments DROP CONSTRAINT broken")


def take_the_database_away(served: Server, while_away: Callable[[], None]) -> None:
    name = str(conninfo_to_dict(served.database_url)["dbname"])
    with_others = served.database_url.replace(name, "postgres")
    query(with_others, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
    try:
        query(with_others, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", name)
        while_away()
    finally:
        query(with_others, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
        served.wait_until_ready()


def test_nobodys_data_and_no_secret_is_in_any_line_of_the_log(served: Server) -> None:
    provoke(served)

    def fail() -> None:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            requests = [
                pool.submit(served.create, **SHIBBOLETH),
                pool.submit(served.request, "GET", "/pay/PAY-ZEBEDEE0123456789ABCDEFGH"),
                pool.submit(served.request, "GET", "/readyz"),
            ]
            assert {request.result().status_code for request in requests} <= {404, 503}

    take_the_database_away(served, fail)
    text = served.log.read_text()
    for event in (
        "POST /api/v1/payments",
        "unexpected",
        "database_unavailable",
        "provider_refuses_us",
        "database_away",
    ):
        assert event in text, f"no {event}: the test provokes less than it means to"
    leaks = [line for line in text.splitlines() if any(word in line.lower() for word in HUSHED)]
    assert not leaks, "\n".join(leaks)


def test_each_line_of_the_log_is_json_with_known_members(served: Server) -> None:
    served.create()
    for line in served.log.read_text().splitlines():
        assert line.startswith("{"), line
        members = set(json.loads(line))
        assert {"at", "level", "event"} <= members
        assert members <= {"at", "level", "event", "payment", "reference", "ms", "outcome", "request_id"}
