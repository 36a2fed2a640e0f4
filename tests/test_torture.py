"""The torture in its short form, and what it found, each as small as it can be had."""

import contextlib
import functools
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import checkout
import commands
import db
import paystack
from backstage import at_once, frozen, meanwhile
from commands.migrate import migrate
from local import embedded
from local.sandbox import Sandbox
from proofs.torture import people, verdict
from relay import Relay
from settings import Settings
from shop import ROOT, Server, Shop, open_shop, sandbox, shop, wait_until  # noqa: F401  # fixtures
from till import Till, open_till, paid, till  # noqa: F401  # fixtures


def test_nothing_is_lost_doubled_stuck_or_wrong_while_everything_breaks(tmp_path: Path) -> None:
    """`make torture` is the same for as long as you like."""
    run = subprocess.run(
        [sys.executable, "-m", "proofs.torture", "--seed", "7", "--minutes", "0.5", "--brisk", "--shoppers", "4"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_time_that_the_torture_lets_pass_breaks_no_trail(shop: Shop, till: Till) -> None:  # noqa: F811
    """It once moved the date of a refund that was still open, and blamed paygate when `audit` saw that."""
    till.did("refund", paid(shop)["id"])
    verdict.let_time_pass(shop.sql)
    till.did("audit")


def test_a_refund_of_the_torture_stands_still_before_its_call(shop: Shop, till: Till) -> None:  # noqa: F811
    payment = paid(shop)
    program, words = people.FROZEN_REFUND, ("refund", payment["id"], "--yes")
    command = [sys.executable, *program, *words]
    env = {"PATH": os.environ["PATH"], **till.env}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=env, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        refund_id = process.stdout.readline().strip()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        assert shop.sql("SELECT id, status FROM refunds") == [{"id": refund_id, "status": "unanswered"}]
        assert shop.sandbox.calls("refund") == 0
        printed, _ = process.communicate(timeout=30)
    assert f"refund {refund_id}" in printed
    assert shop.sandbox.calls("refund") == 1


REVERSED = "PAY-1  PG-1: reversed there, more than its refunds (NGN 50.00 there, NGN 0.00 here)"
FEES = "PAY-2  PG-2: other fees (NGN 1.00 there, NGN 2.00 here)"


@pytest.mark.parametrize(
    ("lines", "taken_back", "wrong"),
    [
        ([], set(), []),
        ([REVERSED, "next: python manage.py sync PAY-1", "manage.py: differences since 2026-10-30: 1"], {"PG-1"}, []),
        ([REVERSED, "manage.py: differences since 2026-10-30: 1"], set(), [REVERSED]),
        ([REVERSED, FEES, "manage.py: differences since 2026-10-30: 2"], {"PG-1"}, [FEES]),
        ([], {"PG-1"}, ["nothing about PG-1, which went back to its bank"]),
    ],
)
def test_what_a_bank_took_back_is_a_difference_and_anything_else_is_a_fault(
    lines: list[str], taken_back: set[str], wrong: list[str]
) -> None:
    found = verdict.unexpected_differences(lines, taken_back)
    assert [line for line in found if "differences since" not in line] == wrong


def test_a_process_that_stood_still_in_a_transaction_goes_on_with_a_new_connection(database_url: str) -> None:
    """PostgreSQL ends such a transaction (idle_in_transaction_session_timeout), so that its locks are free again."""
    with db.Database(database_url, 2) as database:
        stood_still: list[bool] = []

        def work(conn: db.BoundedConnection) -> int:
            if not stood_still:
                conn.execute("SET LOCAL idle_in_transaction_session_timeout = '50ms'")
                time.sleep(0.3)
                stood_still.append(True)
            row = conn.execute("SELECT 42 AS answer").fetchone()
            assert row is not None
            return int(row["answer"])

        assert database.transaction(work) == 42


def test_requests_with_one_key_at_the_same_moment_meet_each_other_and_no_error(database_url: str) -> None:
    """The key and the payment's id, which is made from it, are both unique: the loser may hit either of the two."""
    order = checkout.Order("Jane Doe", "jane@example.com", "+2348012345678", 5000, "Lagos", "NGN")

    def reserve(opener: checkout.Checkout, key: bytes) -> bool:
        try:
            checkout.reserve(opener, key, order)
        except checkout.InFlight:
            return False
        return True

    with db.Database(database_url, 4) as database:
        gateway = paystack.Gateway(("sk_test_x",), "http://127.0.0.1:9", 1, "test")
        values = Settings(database_url="", paystack_secret_keys=gateway.keys, public_url="")
        opener = checkout.Checkout(database, gateway, values, threading.BoundedSemaphore(4))
        for number in range(200):
            key = checkout.key_of(f"key-{number}")
            took = at_once([functools.partial(reserve, opener, key)] * 4)
            assert sorted(took) == [False, False, False, True]


def test_two_errors_at_once_from_a_pooler_whose_server_crashed_are_a_lost_connection(database_url: str) -> None:
    """pgbouncer passes the server's last words on and adds its own: psycopg takes that for an error of its own."""
    with db.Database(database_url, 2) as database:
        tries = []

        def work(conn: db.BoundedConnection) -> str:
            tries.append(1)
            if len(tries) == 1:
                raise psycopg.InternalError("received 2 results from command 'COMMIT'")
            return "done"

        assert database.transaction(work) == "done"

        def break_down(conn: db.BoundedConnection) -> None:
            conn.execute("DO $$ BEGIN RAISE EXCEPTION 'a bug' USING ERRCODE = 'XX000'; END $$")

        with pytest.raises(psycopg.InternalError):  # and no request to try again
            database.transaction(break_down)


def message(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("!i", 4 + len(content)) + content


FATAL = message(b"E", b"SFATAL\0VFATAL\0C57P01\0Mterminating connection\0\0")
BESIDES = message(b"E", b"SERROR\0Mserver conn crashed?\0\0")
READY = message(b"Z", b"I")


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(READY, id="nothing"),
        pytest.param(FATAL + BESIDES + READY, id="two-errors"),
        pytest.param(message(b"C", b"ROLLBACK\0") + READY, id="rolled-back"),
        pytest.param(message(b"C", b"COMMIT\0") + FATAL + READY, id="commit-and-an-error"),
    ],
)
def test_what_is_not_the_answer_to_a_commit_is_taken_for_a_lost_connection(database_url: str, said: bytes) -> None:
    """The work is run again."""
    with Relay(database_url) as relay, db.Database(relay.url, 1) as database:
        told = [said]
        relay.retell = lambda data: told.pop() if told and b"COMMIT\0" in data else data
        tries = iter((1, 2))
        assert database.transaction(lambda conn: next(tries)) == 2


def test_what_a_commit_is_refused_for_is_read_in_the_encoding_of_the_url(database_url: str) -> None:
    def break_a_rule(conn: db.BoundedConnection) -> None:
        conn.execute('CREATE TEMPORARY TABLE stock (n integer CONSTRAINT "Größe" UNIQUE DEFERRABLE INITIALLY DEFERRED)')
        conn.execute("INSERT INTO stock VALUES (1), (1)")

    with (
        db.Database(f"{database_url}&client_encoding=latin1", 1) as database,
        pytest.raises(psycopg.errors.UniqueViolation, match="Größe"),
    ):
        database.transaction(break_a_rule)


def parameter(name: str, value: str) -> bytes:
    """A message by which the server tells of a setting (ParameterStatus)."""
    return message(b"S", f"{name}\0{value}\0".encode())


def test_a_pooler_that_takes_the_promoted_primary_for_a_standby_is_not_believed(database_url: str) -> None:
    """pgbouncer, whose first connection was made a moment too early, says so until it is reloaded."""
    with Relay(database_url) as relay:
        is_primary, is_standby = parameter("in_hot_standby", "off"), parameter("in_hot_standby", "on")
        relay.retell = lambda data: data.replace(is_primary, is_standby)
        with pytest.raises(psycopg.OperationalError, match="session is read-only"):
            psycopg.connect(relay.url, target_session_attrs="read-write")
        with db.Database(relay.url, 1) as database:
            assert db.is_ready(database)
        with commands.reading(relay.url) as conn:
            conn.execute("SELECT 1")


def test_a_server_that_takes_no_writes_is_no_primary_by_its_own_word(database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute(f'ALTER DATABASE "{conn.info.dbname}" SET default_transaction_read_only = on'.encode())
    with db.Database(database_url, 1) as database, pytest.raises(db.DatabaseUnavailable):
        db.is_ready(database)


@pytest.fixture
def served(database_url: str, sandbox: Sandbox, tmp_path: Path) -> Iterator[Server]:  # noqa: F811
    """One process with four threads."""
    with Server(database_url, sandbox, tmp_path, THREADS="4") as server:
        yield server


def seconds_of_health(server: Server) -> float:
    begun = time.monotonic()
    assert server.request("GET", "/healthz").status_code == 200
    return time.monotonic() - begun


def test_clients_that_never_close_their_connection_hold_up_nobody(served: Server) -> None:
    """Each of them may take 2 seconds to read its answer; nobody waits for that."""
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", served.port), 10))
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.1 200"
        assert seconds_of_health(served) < 1


def test_a_byte_now_and_then_ends_after_the_time_of_a_request(served: Server) -> None:
    """As many such clients as there are threads; each stays within the time-out of a single read."""
    head = b"POST /api/v1/webhooks/paystack HTTP/1.1\r\nHost: x\r\n"
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", served.port), 10)) for _ in range(4)]
        for client in clients[:2]:
            client.sendall(head + b"X-Slow: ")
        for client in clients[2:]:
            client.sendall(head + b"Content-Length: 100\r\n\r\n")
        stopping = threading.Event()

        def drip() -> None:
            while not stopping.wait(1):
                for client in clients:
                    with contextlib.suppress(OSError):
                        client.sendall(b"x")

        with meanwhile(drip):
            try:
                assert seconds_of_health(served) < 14
            finally:
                stopping.set()


def test_a_transfer_encoding_that_nobody_knows_is_the_clients_error(served: Server) -> None:
    with socket.create_connection(("127.0.0.1", served.port), 10) as client:
        client.sendall(b"POST /api/v1/payments HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: zipped\r\n\r\n0\r\n\r\n")
        answer = client.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"code": "bad_request"' in answer


def test_while_the_database_says_nothing_most_are_refused_at_once_and_all_served_after(
    cluster: embedded.Cluster,
) -> None:
    """Or each thread of a process would soon wait for it, and none be left to say that the process lives."""
    migrate(cluster.url)
    with db.Database(cluster.url, 2) as database:
        assert db.is_ready(database)
        with frozen(cluster):
            with pytest.raises(db.DatabaseUnavailable):
                db.is_ready(database)

            def ask() -> float:
                begun = time.monotonic()
                with pytest.raises(db.DatabaseUnavailable):
                    db.find_payment(database, "PAY-00000000000000000000000000")
                return time.monotonic() - begun

            waited = sorted(at_once([ask] * 10))
            assert waited[7] < 0.5
            assert 4 < waited[9] < 7
        wait_until(lambda: is_found_missing(database), 10)
        assert all(at_once([lambda: is_found_missing(database)] * 10))


def is_found_missing(database: db.Database) -> bool:
    """Whether the database answers that there is no such payment."""
    try:
        return db.find_payment(database, "PAY-00000000000000000000000000") is None
    except db.DatabaseUnavailable:
        return False


def test_a_request_whose_rows_a_failover_has_lost_is_told_to_try_again(shop: Shop) -> None:  # noqa: F811
    """With asynchronous replication: the same key then makes the payment anew, under its old id and reference."""
    lose = """
        SET session_replication_role = replica;
        DELETE FROM idempotency_keys; DELETE FROM payment_events; DELETE FROM payments
    """
    initialize = shop.app.gateway.initialize

    def lose_then_initialize(*arguments: Any) -> Any:
        shop.sql(lose)
        return initialize(*arguments)

    shop.app.gateway.initialize = lose_then_initialize  # type: ignore[assignment,method-assign]
    answer = shop.create(key="lost")
    assert (answer.status_code, answer.json["code"]) == (503, "database_unavailable")
    assert "retry-after" in answer.headers
    shop.app.gateway.initialize = initialize  # type: ignore[method-assign]
    again = shop.create(key="lost")
    assert again.status_code == 201
    assert again.json["payment"]["reference"].endswith("-2")
