# ruff: noqa: F811  (fixtures are imported by their names)
"""A terminal is asked before money moves; Ctrl-C and bars."""

import contextlib
import os
import pty
import re
import select
import signal
import termios
import time
from collections.abc import Callable, Iterator

import psycopg
import pytest

from local.sandbox import Sandbox
from shop import Shop, open_shop, sandbox, shop, wait_until  # noqa: F401  # fixtures
from till import Till, open_till, paid, till  # noqa: F401  # fixtures


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, till: Till, *words: str) -> None:
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 100))
        self.process = till.start(*words, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)
        self.screen = ""

    def read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self.master], [], [], seconds)
        if ready:
            with contextlib.suppress(OSError):  # EIO: the other side is closed
                self.screen += (text := os.read(self.master, 65536).decode(errors="replace"))
                return bool(text)
        return False

    def until(self, words: str, within_seconds: float = 15) -> None:
        deadline = time.monotonic() + within_seconds
        while words not in self.screen:
            self.read(0.1)
            assert time.monotonic() < deadline, self.screen

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self, within_seconds: float = 15) -> int:
        """The exit status, once it has ended by itself."""
        deadline = time.monotonic() + within_seconds
        while self.process.poll() is None:
            self.read(0.05)
            assert time.monotonic() < deadline, self.screen
        while self.read(0.05):
            pass
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)
        os.close(self.master)


@pytest.fixture
def terminal(till: Till) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(*words: str) -> Terminal:
        opened.append(Terminal(till, *words))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.close()


def test_a_terminal_is_asked_and_no_means_nothing(
    shop: Shop, sandbox: Sandbox, terminal: Callable[..., Terminal]
) -> None:
    payment = paid(shop)
    asked = terminal("refund", payment["id"], "--amount", "20")
    asked.until(f"Give back NGN 20.00 of {payment['reference']} to John Doe <john@example.com>? [y/N]")
    asked.type("n\n")
    assert asked.end() == 1
    assert "nothing was done" in asked.screen
    assert (sandbox.calls("refund"), shop.sql("SELECT * FROM refunds")) == (0, [])


def test_a_terminal_is_asked_and_yes_does_it(shop: Shop, sandbox: Sandbox, terminal: Callable[..., Terminal]) -> None:
    payment = paid(shop)
    asked = terminal("refund", payment["id"])
    asked.until("[y/N]")
    asked.type("y\n")
    assert asked.end() == 0
    assert f"manage.py show {payment['id']}" in asked.screen.replace("'", "")  # a folder with a space is quoted
    assert sandbox.calls("refund") == 1


def test_yes_asks_nothing(shop: Shop, sandbox: Sandbox, till: Till, terminal: Callable[..., Terminal]) -> None:
    payment = paid(shop)
    assert terminal("refund", payment["id"], "--yes").end() == 0
    assert sandbox.calls("refund") == 1


def test_erase_asks_too(shop: Shop, terminal: Callable[..., Terminal]) -> None:
    payment = paid(shop)
    asked = terminal("erase", payment["id"])
    asked.until("This cannot be undone. [y/N]")
    asked.type("\n")
    assert asked.end() == 1
    assert shop.get(payment["id"])["customer_name"] == "John Doe"


def test_the_confirmed_amount_is_the_one_given_back(
    shop: Shop, sandbox: Sandbox, till: Till, terminal: Callable[..., Terminal]
) -> None:
    """While one operator thinks, another gives a part back: what was confirmed cannot be given back any more."""
    payment = paid(shop)
    asked = terminal("refund", payment["id"])
    asked.until("Give back NGN 50.00")
    till.did("refund", payment["id"], "--amount", "20")
    asked.type("y\n")
    assert asked.end() == 1
    assert "only NGN 30.00" in asked.screen
    assert [refund["amount"] for refund in sandbox.refunds()] == [2000]


def test_ctrl_c_at_the_question_does_nothing(shop: Shop, sandbox: Sandbox, terminal: Callable[..., Terminal]) -> None:
    payment = paid(shop)
    asked = terminal("refund", payment["id"])
    asked.until("[y/N]")
    asked.process.send_signal(signal.SIGINT)
    assert asked.end() == 130
    assert "manage.py: interrupted" in asked.screen
    assert "Traceback" not in asked.screen
    assert sandbox.calls("refund") == 0


def test_ctrl_c_while_the_provider_thinks_says_where_to_look(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    sandbox.fault("refund", "time-out")
    process = till.start("refund", payment["id"], "--yes")
    wait_until(sandbox.refunds, 40)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=15)
    assert (process.returncode, out) == (130, "")
    assert len(err.splitlines()) == 1, err
    assert f"never asked for twice: manage.py show {payment['id']}" in err
    assert "asked for already" in till.did("refund", payment["id"])


@pytest.mark.parametrize("name", ["reconcile", "audit", "sync"])
def test_ctrl_c_in_the_middle_is_one_line(shop: Shop, sandbox: Sandbox, till: Till, name: str) -> None:
    payment = paid(shop)
    sandbox.fault("*", "time-out-before", times=None)
    waits = "SELECT 1 AS n FROM pg_stat_activity WHERE query LIKE '%pg_locks%' AND pid <> pg_backend_pid()"
    with psycopg.connect(till.database_url) as slow:  # the audit waits for whoever writes
        slow.execute("UPDATE payments SET status_reason = 'slow' WHERE id = %s", (payment["id"],))
        process = till.start(name, *([payment["id"]] if name == "sync" else []))
        if name == "audit":
            wait_until(lambda: till.sql(waits), 40)
        else:
            wait_until(lambda: sandbox.calls("verify") + sandbox.calls("list-transactions"), 40)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        slow.rollback()
    assert (process.returncode, err) == (130, "manage.py: interrupted\n")
    till.did("audit")


def test_a_bar_shows_how_far_it_is_on_a_terminal_alone(
    shop: Shop, sandbox: Sandbox, till: Till, terminal: Callable[..., Terminal]
) -> None:
    for _ in range(150):
        sandbox.charge_elsewhere()
    sandbox.configure(latency_seconds=0.8)
    shown = terminal("reconcile")
    assert shown.end() == 0
    assert re.search(r"\d+ charges \[", shown.screen)
    hidden = till.shell("reconcile")
    assert (hidden.status, hidden.err.count("\n")) == (0, 1)
    assert hidden.err.startswith("next: ")
