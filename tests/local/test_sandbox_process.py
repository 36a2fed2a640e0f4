# ruff: noqa: F811  (fixtures are imported by their names)
"""The sandbox as a process: what it keeps, how it ends, how much it carries."""

import asyncio
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests

from local.sandbox import Sandbox, SandboxError
from sandbox_client import KEY, call, fields, initialize, paid, refund, sandbox, verified, without_a_proxy  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]


def started(folder: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "local.sandbox", "--secret-key", KEY, "--data", str(folder), *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    ready = process.stdout.readline()
    match = re.fullmatch(r"sandbox ready on (http://127\.0\.0\.1:\d+)\n", ready)
    assert match, ready
    return process, match[1]


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_ended_at_any_moment_it_loses_nothing_that_was_answered(tmp_path: Path, ending: signal.Signals) -> None:
    process, url = started(tmp_path)
    headers = {"Authorization": f"Bearer {KEY}"}
    answered: list[str] = []

    def hammer(lane: int) -> None:
        for number in range(1000):
            reference = f"PG-{lane}-{number}"
            order = {"email": "john@example.com", "amount": 500000, "reference": reference}
            try:
                answer = requests.post(f"{url}/transaction/initialize", json=order, headers=headers, timeout=5)
            except requests.RequestException:
                return
            assert answer.status_code == 200
            answered.append(reference)

    lanes = [threading.Thread(target=hammer, args=(lane,)) for lane in range(4)]
    for thread in lanes:
        thread.start()
    while len(answered) < 40:
        time.sleep(0.01)
    control_url = f"{url}/_sandbox/pay"
    assert requests.post(control_url, json={"reference": answered[0]}, timeout=5).status_code == 200
    made = requests.post(f"{url}/refund", json={"transaction": answered[0]}, headers=headers, timeout=5).json()["data"]
    process.send_signal(ending)
    process.wait(5)
    for thread in lanes:
        thread.join(5)

    with Sandbox(KEY, data=tmp_path) as again:
        assert set(answered) <= {row["reference"] for row in again.transactions()}
        assert verified(again, answered[0])["status"] == "reversal-pending"
        assert [row["id"] for row in again.refunds()] == [made["id"]]
        assert initialize(again, answered[1]).json()["code"] == "duplicate_reference"
        assert initialize(again, "PG-new").status_code == 200
        with pytest.raises(SandboxError, match="another sandbox"):
            Sandbox(KEY, data=tmp_path)
    ids = [row["id"] for row in again.transactions()]
    assert len(set(ids)) == len(ids)


def test_the_whole_ledger_is_kept_and_half_a_line_is_no_harm(tmp_path: Path) -> None:
    with Sandbox(KEY, data=tmp_path) as first:
        paid(first, metadata=fields("A1"))
        dispute = first.dispute("PG-1")
        first.alter("PG-1", domain="live")
        first.reverse("PG-1")
        call(first, "PUT", "/integration/payment_session_timeout", json={"timeout": 600})
    ledger = tmp_path / "ledger.jsonl"
    with ledger.open("a") as file:
        file.write('["Transaction", {"id": 1, "refer')
    for _ in range(2):
        with Sandbox(KEY, data=tmp_path) as again:
            assert again.transactions() == first.transactions()
            assert again.transactions()[0]["state"] == "reversed"
            assert [row["id"] for row in again.disputes()] == [dispute["id"]]
            path = "/integration/payment_session_timeout"
            assert call(again, "GET", path).json()["data"] == {"payment_session_timeout": 600}
            again.decline(initialize(again, f"PG-{time.monotonic_ns()}").json()["data"]["reference"])
            first = again
    assert ledger.read_text().count("\n") == 6  # one for each of the four rows at the start, two for changes since


def test_an_open_refund_goes_on_after_a_restart(tmp_path: Path) -> None:
    with Sandbox(KEY, data=tmp_path) as first:
        paid(first)
        refund(first)
        first.move_refund("PG-1", "processing")
    with Sandbox(KEY, data=tmp_path, refund_seconds=0.02) as again:
        end = time.monotonic() + 2
        while again.refunds()[0]["status"] != "processed" and time.monotonic() < end:
            time.sleep(0.01)
        assert verified(again)["status"] == "reversed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_within_a_second(tmp_path: Path, number: signal.Signals) -> None:
    process, url = started(tmp_path, "--latency-seconds", "20")
    port = int(url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port)) as idle, socket.create_connection(("127.0.0.1", port)) as asking:
        asking.sendall(f"GET /transaction HTTP/1.1\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode())
        time.sleep(0.1)
        begun = time.monotonic()
        process.send_signal(number)
        assert process.wait(2) == 0
        assert time.monotonic() - begun < 1
        assert idle.recv(1) == b""


def test_a_port_in_use_and_a_foreign_address_are_one_line_each(tmp_path: Path, sandbox: Sandbox) -> None:
    for options in (["--port", str(sandbox.port)], ["--host", "0.0.0.0"], ["--webhook-url", "http://example.com"]):  # noqa: S104
        command = [sys.executable, "-m", "local.sandbox", "--secret-key", KEY, *options]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10, check=False)
        assert ended.returncode == 1
        assert ended.stderr.startswith("sandbox: ") and ended.stderr.count("\n") == 1
    with pytest.raises(OSError, match="in use"):
        Sandbox(KEY, port=sandbox.port).start()


def test_256_kept_connections_wait_side_by_side(sandbox: Sandbox) -> None:
    sandbox.configure(latency_seconds=0.3)

    async def customer(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", sandbox.port)
        for _ in range(2):
            writer.write(f"GET /refund HTTP/1.1\r\nAuthorization: Bearer {KEY}\r\nX-N: {number}\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            length = re.search(rb"Content-Length: (\d+)", head)
            assert length
            await reader.readexactly(int(length[1]))
        writer.close()

    async def crowd() -> None:
        await asyncio.gather(*(customer(number) for number in range(256)))

    begun = time.monotonic()
    asyncio.run(crowd())
    assert 0.6 <= time.monotonic() - begun < 2.5
