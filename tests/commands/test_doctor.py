# ruff: noqa: F811  (fixtures are imported by their names)
"""`doctor`: what is wrong and what to do about it."""

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from local.sandbox import Sandbox
from shop import Shop, free_port, open_shop, sandbox, shop  # noqa: F401  # fixtures
from till import Till, open_till, paid, till  # noqa: F401  # fixtures


@pytest.mark.usefixtures("elsewhere")
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

    shop.sql("UPDATE payments SET poll_at = now() - interval '10 min'")
    (finding,) = bad(till)
    assert "10 minutes" in finding["text"] and "worker" in finding["todo"]
    shop.sql("UPDATE payments SET poll_at = NULL")
    shop.sql("INSERT INTO notifications (mode, type, sequence, facts, dead_at) VALUES ('test', 'x', 1, '{}', now())")
    (finding,) = bad(till)
    assert "notify --dead" in finding["todo"]


def about(till: Till, name: str, **env: str) -> dict[str, str] | None:
    found = json.loads(till.run("doctor", "--json", **env).out)
    return next((finding for finding in found if finding["about"] == name), None)


def test_doctor_says_that_the_lists_were_not_read_for_days(till: Till) -> None:
    done = "INSERT INTO jobs (mode, name, done_at) VALUES ('test', 'apply_lists', now() - make_interval(hours => %s))"
    till.sql(done, 47)
    assert about(till, "work") is None
    till.sql("DELETE FROM jobs")
    till.sql(done, 49)
    late = about(till, "work")
    assert late and late["text"] == "the daily look at Paystack's lists waiting for 60 minutes"


def test_doctor_says_what_a_shop_that_goes_live_has_forgotten(till: Till, tmp_path: Path) -> None:
    live = {"PAYSTACK_SECRET_KEY": "sk_live_0123456789abcdef", "PUBLIC_URL": "https://pay.example.com"}
    names = {"MERCHANT_NAME": "Example", "MERCHANT_CONTACT": "+234 801 234 5678", "TRUSTED_PROXIES": "1"}
    for name, value in {**names, "API_TOKEN": "0123456789abcdef"}.items():
        assert about(till, name, **live)
        assert about(till, name, **live, **{name: value}) is None
    token = about(till, "API_TOKEN", **live)
    assert token and "nobody can guess" in token["todo"]
    never = about(till, "backup")
    assert never and never["text"] == "none was made here"
    till.did("backup", str(tmp_path))
    assert about(till, "backup") is None
    till.sql("UPDATE jobs SET done_at = now() - interval '4 days' WHERE name = 'backup'")
    old = about(till, "backup")
    assert old and old["text"] == "the last was 4 days ago"


@pytest.mark.usefixtures("elsewhere")
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


@pytest.mark.parametrize(("seconds", "is_late"), [(280, False), (310, True)])
def test_what_waits_for_more_than_five_minutes_is_late(shop: Shop, till: Till, seconds: int, is_late: bool) -> None:
    shop.created()
    shop.sql("UPDATE payments SET poll_at = now() - make_interval(secs => %s)", seconds)
    assert [finding["about"] for finding in bad(till)] == ["work"] * is_late


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, None), (8, None), (-8, None), (30, "behind Paystack's"), (-30, "ahead of Paystack's")]
)
def test_a_clock_may_be_off_by_ten_seconds(sandbox: Sandbox, till: Till, seconds: int, words: str | None) -> None:
    at = datetime.now(UTC) + timedelta(seconds=seconds)
    body = {"status": True, "message": "", "data": {"payment_session_timeout": 3600}}
    date = {"Date": f"{at:%a, %d %b %Y %H:%M:%S} GMT"}
    sandbox.fault("session-timeout", "answer", body=body, headers=date)
    found = bad(till)
    assert len(found) == bool(words)
    assert all(str(words) in finding["text"] for finding in found)


@pytest.mark.parametrize(("days", "is_noted"), [(2.9, False), (3.1, True)])
def test_a_backup_is_old_after_three_days(till: Till, days: float, is_noted: bool) -> None:
    till.sql("INSERT INTO jobs (mode, name, due_at, done_at) VALUES ('test', 'backup', NULL, now())")
    till.sql("UPDATE jobs SET done_at = now() - make_interval(secs => %s)", days * 86400)
    assert (about(till, "backup") is not None) is is_noted
