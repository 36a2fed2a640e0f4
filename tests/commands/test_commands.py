# ruff: noqa: F811  (fixtures are imported by their names)
"""How the commands behave in a shell: one line for what goes wrong, the right status, who did it, help."""

import os
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

import settings
from local.sandbox import Sandbox
from shop import ROOT, Shop, free_port, open_shop, sandbox, shop  # noqa: F401  # fixtures
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
    for word in ("xyzzy", "version", "payments"):
        assert "there are runserver, " in till.run(word).err
    assert till.did("--version") == f"paygate {settings.VERSION}\n"


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


# Dry runs, operators, reasons


def test_dry_run_gives_nothing_back(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    out = till.did("refund", payment["id"], "--amount", "20", "--dry-run")
    assert out == f"would give back NGN 20.00 of {payment['reference']}; NGN 30.00 would be left\n"
    review = paid(shop, customer_email="underpaid@example.com")
    assert "would give back NGN 49.00" in till.did("resolve", review["id"], "reject", "--reason", "x", "--dry-run")
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
    assert (done.status, "OPERATOR" in done.err) == (2, True)


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


def test_the_worker_does_what_is_due_and_ends(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = shop.created()
    sandbox.pay(payment["reference"])
    shop.sql("UPDATE payments SET poll_at = now()")
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
        done = till.run(*words)
        assert (done.status, "next:" in done.out) == (0, False), words
        following = shlex.split(done.err.splitlines()[-1].partition(">")[0])
        assert (following[0], following[2], following[3] in COMMANDS) == ("next:", "manage.py", True), words


def test_what_comes_next_can_be_pasted(shop: Shop, till: Till, monkeypatch: pytest.MonkeyPatch) -> None:
    payment = paid(shop)

    def follows(*words: str) -> str:
        return till.run(*words).err.splitlines()[-1].removeprefix("next: ")

    folder = Path(sys.executable).parents[2]
    monkeypatch.chdir(folder)
    inside = Path(sys.executable).relative_to(folder)
    assert follows("list") == f"{inside} manage.py show {payment['id']}"
    assert follows("show", payment["id"]) == f"{inside} manage.py list"  # and no refund
    elsewhere = till.shell("list", env={"PATH": f"{Path(sys.executable).parent}:/bin"}).err
    assert shlex.split(elsewhere) == ["next:", "python", str(ROOT / "manage.py"), "show", payment["id"]]
    under = shop.created(customer_email="underpaid@example.com")
    shop.pay(under["reference"])
    assert follows("show", under["id"]).endswith(f'resolve {under["id"]} accept --reason "…"')
    migrated = till.run("list", DATABASE_URL=till.database_url + "&options=-csearch_path%3Dnowhere").err
    assert migrated.endswith(f"run {inside} manage.py migrate\n")


def test_without_a_terminal_nothing_is_given_back_or_erased_unasked(shop: Shop, till: Till) -> None:
    payment, under = paid(shop), shop.created(customer_email="underpaid@example.com")
    shop.pay(under["reference"])
    for words in (
        ("refund", payment["id"]),
        ("erase", payment["id"]),
        ("erase", "--email", "john@example.com"),
        ("resolve", under["id"], "accept", "--reason", "x"),
        ("resolve", under["id"], "reject", "--reason", "x"),
    ):
        done = till.shell(*words)
        assert (done.status, done.out, len(done.err.splitlines())) == (2, "", 1), words
        assert "--yes" in done.err
    assert shop.sql("SELECT * FROM refunds") == []
    assert shop.get(payment["id"])["customer_name"] == "John Doe"
    assert shop.get(under["id"])["status"] == "review"
    assert till.shell("refund", payment["id"], "--yes").status == 0


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


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of the processes that `work` starts; the quickest of three."""
    found = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        work()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


def test_a_command_costs_little_more_than_a_bare_python_with_a_database_driver(shop: Shop, till: Till) -> None:
    """Against that floor, measured beside it: a busy machine stretches both."""
    payment = paid(shop)
    floor = cpu_seconds(lambda: subprocess.run([sys.executable, "-c", "import psycopg"], check=True))
    for most, commands in ((4, ("list", "show {id}", "report")), (8, ("sync {id}", "refund {id} --dry-run", "--help"))):
        for words in commands:
            ratio = cpu_seconds(lambda words=words: till.shell(*words.format(**payment).split())) / floor  # type: ignore[misc]
            assert ratio < most, words


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
        peaks.append(int(err.splitlines()[-1]))
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
