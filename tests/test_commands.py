# ruff: noqa: F811  (fixtures are imported by their names)
"""How the commands behave in a shell: one line for what goes wrong, the right status, questions on a terminal alone."""

import contextlib
import json
import os
import pty
import re
import resource
import select
import shlex
import signal
import termios
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from backstage import age
from sandbox import Sandbox
from shop import ROOT, Shop, free_port, open_shop, sandbox, shop, wait_until  # noqa: F401  # fixtures
from till import Till, open_till, paid, till  # noqa: F401  # fixtures

UNKNOWN = "PAY-0123456789ABCDEFGHJKMNPQRS"
COMMANDS = ("list", "show", "audit", "report", "erase", "refund", "sync", "resolve", "reconcile", "doctor", "worker")


# Wrong usage and what is not there


@pytest.mark.parametrize(
    "words",
    [
        "",
        "refnud x",
        "show",
        "show a b",
        "list --statsu review",
        "list --status paid",
        "list --since yesterday",
        "list --since 2026-13-01",
        "list --limit -1",
        "list --limit ten",
        "list --format xml",
        "list extra",
        "report --format json",
        "refund",
        "refund x --amount ten",
        "refund x --amount 5_000",
        "refund x --amount ٥",
        "refund x --amount NaN",
        "refund x --by '  '",
        "refund x --by 'a\nb'",
        "resolve",
        "resolve x accept",
        "resolve x agree --reason y",
        "resolve x --reason y",
        "resolve x accept --incident 1 --reason y",
        "audit --against 5",
        "audit --against 5:abc",
        "erase",
        "erase x --email y@example.com",
        "reconcile --since x",
        "worker --twice",
    ],
)
def test_wrong_usage_is_one_line_and_status_2(till: Till, words: str) -> None:
    done = till.run(*shlex.split(words))
    assert (done.status, done.out) == (2, "")
    assert len(done.err.splitlines()) == 1, done.err


def test_a_mistyped_command_names_the_nearest(till: Till) -> None:
    assert "did you mean refund?" in till.run("refnud").err
    assert "did you mean reconcile?" in till.run("recncile").err
    assert "there are runserver, " in till.run("xyzzy").err


@pytest.mark.parametrize(
    "words",
    [
        f"show {UNKNOWN}",
        "show nonsense",
        "show 'PAY-\x1b[2J'",
        f"refund {UNKNOWN}",
        "refund PG-0123456789ABCDEFGHJKMNPQRS-2",
        f"sync {UNKNOWN}",
        f"resolve {UNKNOWN} accept --reason x",
        f"resolve {UNKNOWN} reject --reason x",
        "resolve --incident 7 --reason x",
        f"erase {UNKNOWN}",
        "erase --email nobody@example.com",
        "report --since 2026-02 --until 2026-01",
    ],
)
def test_what_is_not_there_is_one_line_and_status_1(till: Till, words: str) -> None:
    done = till.run(*shlex.split(words))
    assert (done.status, done.out) == (1, "")
    assert len(done.err.splitlines()) == 1, done.err
    assert "\x1b" not in done.err


EACH = (
    "list",
    f"show {UNKNOWN}",
    "audit",
    "report",
    f"erase {UNKNOWN}",
    f"refund {UNKNOWN}",
    f"sync {UNKNOWN}",
    f"resolve {UNKNOWN} accept --reason x",
    "reconcile",
)


@pytest.mark.parametrize("words", EACH)
def test_a_database_that_is_away_is_one_line_and_status_1(till: Till, words: str) -> None:
    url = f"postgresql://shop:hunter2@127.0.0.1:{free_port()}/shop"
    done = till.run(*words.split(), DATABASE_URL=url)
    assert (done.status, done.out) == (1, "")
    assert len(done.err.splitlines()) == 1, done.err
    assert "the database cannot be used" in done.err
    assert "hunter2" not in done.err


@pytest.mark.parametrize("words", EACH)
def test_a_database_without_the_schema_names_migrate(
    till: Till, postgresql: psycopg.Connection[Any], words: str
) -> None:
    postgresql.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    postgresql.commit()
    done = till.run(*words.split())
    assert (done.status, len(done.err.splitlines())) == (1, 1), done.err
    assert "manage.py migrate" in done.err


@pytest.mark.parametrize("words", [f"refund {UNKNOWN}", f"sync {UNKNOWN}", "reconcile", "worker --once"])
def test_without_a_provider_one_line_names_runserver(till: Till, words: str) -> None:
    done = till.run(*words.split(), PAYSTACK_SECRET_KEY="")
    assert (done.status, len(done.err.splitlines())) == (1, 1), done.err
    assert "runserver" in done.err


def test_the_mode_must_be_known_where_a_database_is_set(till: Till) -> None:
    done = till.run("list", PAYSTACK_SECRET_KEY="")
    assert (done.status, "PAYSTACK_SECRET_KEY" in done.err) == (1, True)


@pytest.mark.parametrize("fault", ["invalid-key", "503", "lost-request"])
def test_a_provider_that_gives_no_answer_is_one_line(shop: Shop, sandbox: Sandbox, till: Till, fault: str) -> None:
    payment = paid(shop)
    sandbox.fault("*", fault, times=None)
    for words in (("sync", payment["id"]), ("reconcile",)):
        done = till.run(*words)
        assert (done.status, len(done.err.splitlines())) == (1, 1), done


# A terminal


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
    asked.until(f"Give back 20.00 NGN of {payment['reference']} to John Doe <john@example.com>? [y/N]")
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
    assert f"next: python manage.py show {payment['id']}" in asked.screen
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
    asked.until("Give back 50.00 NGN")
    till.did("refund", payment["id"], "--amount", "20")
    asked.type("y\n")
    assert asked.end() == 1
    assert "only 30.00 NGN" in asked.screen
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
    process = till.start("refund", payment["id"])
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
    assert (hidden.status, hidden.err) == (0, "")


# Dry runs, operators, reasons


def test_dry_run_gives_nothing_back(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    out = till.did("refund", payment["id"], "--amount", "20", "--dry-run")
    assert out == f"would give back 20.00 NGN of {payment['reference']}; 30.00 NGN would be left\n"
    review = paid(shop, customer_email="underpaid@example.com")
    assert "would give back 49.00" in till.did("resolve", review["id"], "reject", "--reason", "x", "--dry-run")
    assert "would accept" in till.did("resolve", review["id"], "accept", "--reason", "x", "--dry-run")
    assert "would be closed" in till.did("resolve", "--incident", "1", "--reason", "x", "--dry-run")
    assert (sandbox.calls("refund"), shop.sql("SELECT * FROM refunds")) == (0, [])
    assert shop.get(review["id"])["status"] == "review"


@pytest.mark.parametrize(
    ("words", "env", "who"),
    [
        (("--by", "Grace Hopper"), {"OPERATOR": "ada"}, "operator:Grace Hopper"),
        ((), {"OPERATOR": "ada"}, "operator:ada"),
        ((), {"OPERATOR": "", "LOGNAME": "linus"}, "operator:linus"),
    ],
)
def test_the_operator_is_named(shop: Shop, till: Till, words: tuple[str, ...], env: dict[str, str], who: str) -> None:
    payment = paid(shop, customer_email="underpaid@example.com")
    till.did("resolve", payment["id"], "accept", "--reason", "x", *words, **env)
    (event,) = shop.sql("SELECT actor FROM payment_events WHERE why = 'accepted'")
    assert event["actor"] == who


def test_a_user_without_a_name_is_a_number(shop: Shop, till: Till, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 987654)
    payment = paid(shop)
    till.did("refund", payment["id"], OPERATOR="")
    assert [row["made_by"] for row in shop.sql("SELECT made_by FROM refunds")] == ["operator:uid 987654"]


def test_an_operator_that_is_no_name_is_refused(shop: Shop, till: Till) -> None:
    payment = paid(shop)
    done = till.run("refund", payment["id"], OPERATOR="x" * 101)
    assert (done.status, "OPERATOR" in done.err) == (1, True)


def test_the_merchant_is_told_of_what_an_operator_does(open_shop: Callable[..., Shop], open_till: Any) -> None:
    env = {"NOTIFY_URL": "http://127.0.0.1:9/", "NOTIFY_SECRET": "whsec_" + "QUFB" * 11}
    shop, till = open_shop(**env), open_till(**env)
    payment = paid(shop, customer_email="underpaid@example.com")
    till.did("resolve", payment["id"], "accept", "--reason", "x")
    found = shop.created()
    shop.sandbox.pay(found["reference"])
    till.did("sync", found["id"])
    told = shop.sql("SELECT payment_id FROM notifications WHERE type = 'payment.completed' ORDER BY made_at")
    assert [row["payment_id"] for row in told] == [payment["id"], found["id"]]


# sync, doctor, worker


def test_sync_tells_what_has_become_of_a_payment(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = shop.created()
    assert f"{payment['id']} is still pending" in till.did("sync", payment["id"])
    sandbox.decline(payment["reference"])
    assert "last try declined: Insufficient Funds" in till.did("sync", payment["id"])
    sandbox.pay(payment["reference"])
    assert f"{payment['id']} is completed" in till.did("sync", payment["id"])
    sandbox.dashboard_refund(payment["reference"], 1000)
    sandbox.move_refund(payment["reference"], "processed")
    assert "is partially_refunded, 10.00 given back" in till.did("sync", payment["reference"])


def test_sync_says_when_there_was_no_answer(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = shop.created()
    sandbox.fault("verify", "lost-answer")
    done = till.run("sync", payment["id"])
    assert (done.status, "is still pending" in done.out, "no final answer" in done.err) == (1, True, True)


def test_sync_does_not_move_the_regular_looks(shop: Shop, till: Till) -> None:
    payment = shop.created()
    age(shop.database_url, payment["id"], 7 * 60)
    for _ in range(2):
        till.did("sync", payment["id"])
        (row,) = shop.sql("SELECT extract(epoch FROM look_at - created_at)::int AS at FROM payments")
        assert 595 <= row["at"] <= 605


def test_doctor_finds_nothing_bad_in_a_new_shop(shop: Shop, till: Till) -> None:
    out = till.did("doctor")
    assert "/api/v1/webhooks/paystack" in out
    findings = json.loads(till.did("doctor", "--json"))
    assert {finding["state"] for finding in findings} == {"ok", "note"}
    assert {"provider", "clock", "database", "session"} <= {finding["about"] for finding in findings}


def bad(till: Till, **env: str) -> list[dict[str, str]]:
    done = till.run("doctor", "--json", **env)
    found = [finding for finding in json.loads(done.out) if finding["state"] == "BAD"]
    assert done.status == (1 if found else 0)
    assert all(finding["todo"] for finding in found), found
    return found


def test_doctor_says_what_is_wrong_and_what_to_do(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    assert "refuses the key" in bad(till, PAYSTACK_SECRET_KEY="sk_test_another_key")[0]["text"]
    assert "no answer" in bad(till, PAYSTACK_URL=f"http://127.0.0.1:{free_port()}")[0]["text"]
    assert "PUBLIC_URL" in bad(till, HOST="::")[0]["text"]
    assert bad(till, DATABASE_URL=f"postgresql://127.0.0.1:{free_port()}/x")[0]["about"] == "database"

    for payment in [shop.created() for _ in range(5)]:
        sandbox.pay(payment["reference"])
        till.did("sync", payment["id"])
    assert [finding["about"] for finding in bad(till)] == ["webhooks"]
    paid(shop)
    assert bad(till) == []

    shop.sql("UPDATE payments SET look_at = now() - interval '10 min'")
    (finding,) = bad(till)
    assert "10 minutes" in finding["text"] and "worker" in finding["todo"]
    shop.sql("UPDATE payments SET look_at = NULL")
    shop.sql("INSERT INTO notifications (mode, type, sequence, facts, dead_at) VALUES ('test', 'x', 1, '{}', now())")
    (finding,) = bad(till)
    assert "notify --dead" in finding["todo"]


def test_doctor_sees_a_clock_that_is_wrong(till: Till, sandbox: Sandbox) -> None:
    sandbox.fault(
        "session-timeout",
        "answer",
        body={"status": True, "message": "", "data": {"payment_session_timeout": 3600}},
        headers={"Date": f"{datetime.now(UTC) - timedelta(minutes=3):%a, %d %b %Y %H:%M:%S} GMT"},
    )
    (finding,) = bad(till)
    assert re.fullmatch(r"1[78]\d s ahead of Paystack's", finding["text"])


@pytest.mark.parametrize(
    ("seconds", "state", "words"),
    [(0, "note", "never end"), (48 * 3600, "note", "end after 48 hours"), (3600, "ok", "end after 1 hours")],
)
def test_doctor_says_how_long_customers_can_pay(
    shop: Shop, sandbox: Sandbox, till: Till, seconds: int, state: str, words: str
) -> None:
    body = {"status": True, "message": "", "data": {"payment_session_timeout": seconds}}
    sandbox.fault("session-timeout", "answer", body=body)
    (session,) = [each for each in json.loads(till.did("doctor", "--json")) if each["about"] == "session"]
    assert session["state"] == state
    assert words in session["text"]


def test_the_worker_does_what_is_due_and_ends(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = shop.created()
    sandbox.pay(payment["reference"])
    shop.sql("UPDATE payments SET look_at = now()")
    done = till.shell("worker", "--once")
    assert (done.status, done.out) == (0, "")
    assert shop.get(payment["id"])["status"] == "completed"


# Help, start, streams


def test_help_names_every_command(till: Till) -> None:
    out = till.did("--help")
    assert all(re.search(rf"^    {name}\b", out, re.MULTILINE) for name in ("runserver", "migrate", "test", *COMMANDS))
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("name", COMMANDS)
def test_each_commands_help_has_examples_that_are_right_usage(till: Till, name: str) -> None:
    out = till.did(name, "--help")
    examples = re.findall(r"^  python manage\.py (.*)$", out, re.MULTILINE)
    assert examples
    assert max(map(len, out.splitlines())) <= 120
    with psycopg.connect(till.database_url) as conn:
        conn.execute("SELECT 1")
    for example in examples:
        words = shlex.split(example.partition(">")[0])
        assert words[0] == name
        if name != "worker":
            assert till.run(*words).status in (0, 1), example


def test_each_command_names_the_one_that_comes_next(shop: Shop, till: Till) -> None:
    payment = paid(shop)
    for words in (
        ("list",),
        ("show", payment["id"]),
        ("sync", payment["id"]),
        ("refund", payment["id"]),
        ("doctor",),
        ("reconcile",),
        ("report",),
        ("audit",),
    ):
        last = till.did(*words).splitlines()[-1]
        assert last.startswith("next: python manage.py "), words
        following = shlex.split(last.partition(">")[0].removeprefix("next: python manage.py "))
        assert following[0] in COMMANDS


LOADED = "import sys, manage; status = manage.main({words!r}); print(*sorted(sys.modules), file=sys.stderr)"


@pytest.mark.parametrize("words", [["list"], ["audit"], ["report"], ["erase", UNKNOWN], ["show", UNKNOWN]])
def test_what_needs_the_database_alone_loads_no_http_client_and_no_framework(
    shop: Shop, till: Till, words: list[str]
) -> None:
    with till.start("-", python=("-c", LOADED.format(words=words)), env={"PYTHONPATH": str(ROOT)}) as process:
        _, err = process.communicate(timeout=30)
    loaded = set(err.splitlines()[-1].split())
    assert "psycopg" in loaded
    assert not loaded & {"requests", "urllib3", "falcon", "gunicorn", "paystack", "checkout"}


def test_each_command_answers_in_under_half_a_second(shop: Shop, till: Till) -> None:
    """In CPU time, which a busy machine does not stretch as much; the quickest of three."""
    payment = paid(shop)
    for words in ("list", "show {id}", "audit", "report", "sync {id}", "refund {id} --dry-run", "doctor", "--help"):
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            assert till.shell(*words.format(**payment).split()).status == 0
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            if seconds < 0.5:
                break
        else:
            pytest.fail(f"{words}: {seconds} s")


def test_a_reader_who_has_seen_enough_ends_it_quietly(shop: Shop, till: Till) -> None:
    shop.created()
    till.sql(
        """
        INSERT INTO incidents (mode, kind, subject, payment_id)
        SELECT 'test', 'dispute', 'PG-' || n, (SELECT id FROM payments) FROM generate_series(1, 5000) n
        """
    )
    (payment,) = shop.sql("SELECT id FROM payments")
    process = till.start("show", payment["id"])
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(15) == 1
    assert process.stderr is not None
    with process.stderr:
        assert process.stderr.read() == ""


def test_a_list_of_many_stays_flat_in_memory(shop: Shop, till: Till) -> None:
    shop.created()
    till.sql("ALTER TABLE payments DISABLE TRIGGER USER")
    till.sql(
        """
        INSERT INTO payments (id, mode, amount_minor, currency, reference, customer_name, customer_email,
                              customer_phone, location, source, expires_at, description)
        SELECT 'PAY-' || lpad(n::text, 26, '0'), mode, amount_minor, currency, 'PG-' || lpad(n::text, 26, '0'),
               customer_name, customer_email, customer_phone, location, source, expires_at, repeat('x', 2000)
          FROM payments, generate_series(1, 30000) n
        """
    )
    peaks = []
    for limit in ("10", "0"):
        measured = f"import manage, resource, sys; manage.main(['list', '--json', '--limit', '{limit}']);"
        measured += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
        with till.start("-", python=("-c", measured), env={"PYTHONPATH": str(ROOT)}) as process:
            out, err = process.communicate(timeout=60)
        peaks.append(int(err))
    assert out.count("PAY-") == 30001
    assert peaks[1] - peaks[0] < 24_000, peaks  # KiB; the rows alone are 60 MB


def test_a_role_that_may_not_read_is_one_line(till: Till, postgresql: psycopg.Connection[Any]) -> None:
    name = f"reader_{postgresql.info.dbname}"
    postgresql.execute(f'CREATE ROLE "{name}" LOGIN')
    postgresql.commit()
    try:
        done = till.run("list", DATABASE_URL=re.sub(r"//[^@]*@", f"//{name}@", till.database_url))
    finally:
        postgresql.execute(f'DROP ROLE "{name}"')
        postgresql.commit()
    assert (done.status, len(done.err.splitlines())) == (1, 1), done.err
    assert "permission denied" in done.err
