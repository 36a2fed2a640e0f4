# ruff: noqa: F811  (fixtures are imported by their names)
"""What Prometheus is told, and the rules and the dashboard that are made of it."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from backstage import end_time, poll, seconds_of, worker_of
from merchant import Merchant, merchant, status  # noqa: F401
from shop import ROOT, Shop, open_shop, sandbox  # noqa: F401
from web import metrics

TOKEN = {"METRICS_TOKEN": "count-0123456789"}
BEARER = {"Authorization": "Bearer count-0123456789"}


@pytest.fixture
def shop(open_shop: Callable[..., Shop]) -> Shop:
    return open_shop(**TOKEN)


def scrape(shop: Shop) -> dict[str, float]:
    """Each sample by its name and labels, as they are written."""
    answer = shop.client.simulate_get("/metrics", headers=BEARER)
    assert answer.status_code == 200
    samples = [line.rpartition(" ") for line in answer.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in samples}


def payments(shop: Shop) -> dict[str, float]:
    """How many there are of each status, in test mode."""
    pattern = re.compile(r'paygate_payments\{mode="test",status="(\w+)"\}')
    return {found[1]: value for name, value in scrape(shop).items() if (found := pattern.fullmatch(name))}


def promtool(*arguments: str | Path, given: str | None = None) -> str:
    """What promtool prints; it must find nothing to complain of."""
    program = shutil.which("promtool")
    assert program is not None, "promtool is missing: apt-get install prometheus"
    done = subprocess.run([program, *arguments], input=given, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# Who may read


def test_without_a_token_there_are_no_metrics(open_shop: Callable[..., Shop]) -> None:
    for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer None"}):
        answer = open_shop().client.simulate_get("/metrics", headers=headers)
        assert (answer.status_code, answer.json["code"]) == (404, "not_found")


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "count-0123456789",
        "Bearer",
        "Bearer count-012345678",
        "Bearer count-01234567890",
        "Basic count-0123456789",
    ],
)
def test_only_who_bears_the_token_is_told(shop: Shop, given: str | None) -> None:
    answer = shop.client.simulate_get("/metrics", headers={"Authorization": given} if given is not None else {})
    assert (answer.status_code, answer.json["code"]) == (401, "unauthorized")
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert "paygate_" not in answer.text


# What is told


def test_payments_are_counted_by_what_has_become_of_them(shop: Shop) -> None:
    for _ in range(3):
        shop.created()
    for _ in range(2):
        shop.pay(shop.created()["reference"])
    shop.pay(shop.created(customer_email="underpaid@example.com")["reference"])
    end_time(shop.database_url, shop.created()["id"])
    poll(shop)
    assert payments(shop) == {"pending": 3, "review": 1, "completed": 2, "expired": 1}


def test_open_payments_count_however_old_they_are_and_ended_ones_for_a_day(shop: Shop) -> None:
    shop.created()
    shop.pay(shop.created()["reference"])
    with psycopg.connect(shop.database_url) as conn:
        conn.execute("SET session_replication_role = replica")
        conn.execute("UPDATE payments SET created_at = created_at - interval '3 days'")
        conn.execute("UPDATE payment_events SET at = at - interval '23 hours'")
    assert payments(shop) == {"pending": 1, "completed": 1}
    with psycopg.connect(shop.database_url) as conn:
        conn.execute("SET session_replication_role = replica")
        conn.execute("UPDATE payment_events SET at = at - interval '2 hours'")
    assert payments(shop) == {"pending": 1}


def test_test_and_live_payments_are_told_apart(open_shop: Callable[..., Shop], shop: Shop) -> None:
    live = open_shop(**TOKEN, PAYSTACK_SECRET_KEY="sk_live_0123456789abcdef", PUBLIC_URL="https://pay.example.com")
    live.sandbox.configure(secret_key="sk_live_0123456789abcdef")
    live.created()
    live.sandbox.configure(secret_key="sk_test_0123456789abcdef")
    for _ in range(2):
        shop.created()
    for each, mode, pending in ((shop, "test", 2), (live, "live", 1)):
        told = scrape(each)
        assert told[f'paygate_payments{{mode="{mode}",status="pending"}}'] == pending
        assert all(f'mode="{mode}"' in name for name in told), "the other mode's would be overdue for ever"


def test_every_process_says_the_same(open_shop: Callable[..., Shop], shop: Shop) -> None:
    other = open_shop(**TOKEN)
    for each in (shop, other, other):
        each.pay(each.created()["reference"])
    shop.created()
    assert scrape(shop) == scrape(other)


def test_money_that_a_look_found_counts_as_late_after_a_minute_and_a_webhook_never(shop: Shop) -> None:
    name = 'paygate_payments_found_late{mode="test"}'
    for late, by_look in ((0, False), (0, True), (300, False)):
        payment = shop.created()
        shop.sandbox.pay(payment["reference"])
        shop.sandbox.backdate(payment["reference"], late)
        if by_look:
            poll(shop)
        else:
            shop.deliver(payment["reference"])
    assert payments(shop) == {"completed": 3}
    assert scrape(shop)[name] == 0
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    shop.sandbox.backdate(payment["reference"], 90)
    poll(shop)
    assert scrape(shop)[name] == 1


def test_the_age_of_the_most_overdue_look_is_told(shop: Shop) -> None:
    assert scrape(shop)['paygate_oldest_due_poll_seconds{mode="test"}'] == 0
    for _ in range(3):
        shop.created()
    assert scrape(shop)['paygate_oldest_due_poll_seconds{mode="test"}'] == 0
    shop.sql("UPDATE payments SET poll_at = now() - interval '100 s'")
    shop.sql("UPDATE payments SET poll_at = now() - interval '400 s' WHERE id = (SELECT min(id) FROM payments)")
    assert 400 <= scrape(shop)['paygate_oldest_due_poll_seconds{mode="test"}'] < 410
    while worker_of(shop).poll() == 0:
        pass
    assert scrape(shop)['paygate_oldest_due_poll_seconds{mode="test"}'] == 0


def test_the_time_of_the_last_look_that_got_an_answer_is_told(shop: Shop) -> None:
    name = 'paygate_last_answered_poll_timestamp_seconds{mode="test"}'
    shop.created()
    assert name not in scrape(shop)
    shop.sandbox.fault("verify", "500", times=None)
    poll(shop)
    assert name not in scrape(shop)
    shop.sandbox.clear_faults()
    poll(shop)
    answered = scrape(shop)[name]
    assert abs(answered - time.time()) < 5
    shop.sandbox.fault("verify", "500", times=None)
    poll(shop)
    assert scrape(shop)[name] == answered


def test_incidents_are_told_by_kind_while_they_are_open(shop: Shop) -> None:
    for _ in range(2):
        shop.pay(shop.created(customer_email="underpaid@example.com")["reference"])
    reference = shop.created()["reference"]
    shop.pay(reference)
    shop.sandbox.charge_elsewhere(f"{reference}-2", amount=5000)
    shop.deliver(f"{reference}-2")
    told = {name: value for name, value in scrape(shop).items() if name.startswith("paygate_incidents_open")}
    assert told == {
        'paygate_incidents_open{mode="test",kind="mismatch"}': 2,
        'paygate_incidents_open{mode="test",kind="second_charge"}': 1,
    }
    shop.sql("UPDATE incidents SET closed_at = now(), closed_by = 'john'")
    assert not [name for name in scrape(shop) if name.startswith("paygate_incidents_open")]


def test_notifications_are_told_while_they_wait_and_once_they_are_dead(
    open_shop: Callable[..., Shop], merchant: Merchant
) -> None:
    shop = open_shop(**TOKEN, **merchant.settings)
    merchant.usual = status(500)
    due, dead = 'paygate_oldest_due_notification_seconds{mode="test"}', 'paygate_notifications_dead{mode="test"}'
    shop.pay(shop.created()["reference"])
    shop.sql("UPDATE notifications SET due_at = now() - interval '400 s', tries = 11")
    told = scrape(shop)
    assert 400 <= told[due] < 410
    assert told[dead] == 0
    worker_of(shop).notify()
    told = scrape(shop)
    assert (told[due], told[dead]) == (0, 1)


def test_nobodys_data_is_told(shop: Shop) -> None:
    for email in ("zebedee@example.com", "underpaid+zebedee@example.com"):
        payment = shop.created(customer_name="Zebedee", customer_email=email, location="Zebedee")
        shop.pay(payment["reference"])
    text = shop.client.simulate_get("/metrics", headers=BEARER).text
    for word in ("zebedee", "@", "pay-", "pg-"):
        assert word not in text.lower()


def test_counting_200_000_payments_takes_no_longer_than_counting_those_of_a_day(shop: Shop) -> None:
    """8,000 of three months here, which suffices to see whether a table is read from end to end."""
    with psycopg.connect(shop.database_url, autocommit=True) as conn:
        conn.execute("SET session_replication_role = replica")
        for statement in FILL:
            conn.execute(statement)
        conn.execute("VACUUM ANALYZE payments, payment_events, notifications")
        before = reads(conn)
        seconds = min(seconds_of(lambda: scrape(shop))[1] for _ in range(3))
        time.sleep(1.2)
        scrape(shop)  # a backend reports once a second at most, at the end of a transaction
        after = reads(conn)
    assert seconds < 9
    rows = {table: (after[table] - before[table]) / 4 for table in after}
    assert rows["payments"] < 1000
    assert rows["payment_events"] < 6000
    assert rows["notifications"] < 100


FILL = [
    """
    INSERT INTO payments (id, mode, status, amount_minor, currency, reference, charge_reference, charged_minor,
                          customer_name, customer_email, customer_phone, location, source, created_at, expires_at,
                          paid_at)
    SELECT 'PAY-' || lpad(n::text, 26, '0'), 'test', CASE WHEN paid THEN 'completed' ELSE 'pending' END, 5000, 'NGN',
           'PG-' || lpad(n::text, 26, '0'), CASE WHEN paid THEN 'PG-' || lpad(n::text, 26, '0') END,
           CASE WHEN paid THEN 5000 ELSE 0 END, 'John Doe', 'john@example.com', '2348012345678', 'Lagos', 'api',
           at, at + interval '1 day', CASE WHEN paid THEN at END
      FROM (SELECT n, n % 200 > 0 AS paid, now() - n * interval '975 s' AS at FROM generate_series(1, 8000) n) made
    """,
    """
    INSERT INTO payment_events (payment_id, n, at, actor, why, from_status, to_status, amount_minor, currency, mode,
                                reference, charged_minor, refunded_minor, digest, hash)
    SELECT id, n, created_at + n * interval '1 s', 'webhook', 'charge', 'pending',
           CASE n WHEN 3 THEN status ELSE 'pending' END, 5000, 'NGN', 'test', reference, 0, 0, sha256(''), sha256('')
      FROM payments, generate_series(1, 3) n ORDER BY 3
    """,
    """
    INSERT INTO notifications (mode, type, payment_id, sequence, facts, delivered_at)
    SELECT 'test', 'payment.completed', id, 1, '{}', now() FROM payments WHERE status = 'completed'
    """,
]


def reads(conn: psycopg.Connection[Any]) -> dict[str, int]:
    """How many rows of each table have been read, by whatever way."""
    rows = conn.execute("SELECT relname, seq_tup_read + idx_tup_fetch FROM pg_stat_user_tables").fetchall()
    return {name: int(read or 0) for name, read in rows}


# What Prometheus and Grafana make of it


@pytest.mark.programs
def test_the_text_is_what_prometheus_reads(open_shop: Callable[..., Shop], merchant: Merchant) -> None:
    shop = open_shop(**TOKEN, **merchant.settings)
    for email in ("john@example.com", "underpaid@example.com"):
        shop.pay(shop.created(customer_email=email)["reference"])
    shop.created()
    poll(shop)
    answer = shop.client.simulate_get("/metrics", headers=BEARER)
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert promtool("check", "metrics", given=answer.text) == ""
    told = {name.partition("{")[0] for name in scrape(shop)}
    assert told == set(metrics.METRICS)


@pytest.mark.programs
def test_the_alerts_are_rules_that_prometheus_takes() -> None:
    promtool("check", "rules", ROOT / "docs/alerts.yml")


@pytest.mark.programs
def test_each_alert_speaks_when_it_should_and_keeps_quiet_else() -> None:
    promtool("test", "rules", ROOT / "tests/alerts_test.yml")
    named = set(re.findall(r"alert: (\w+)", (ROOT / "docs/alerts.yml").read_text()))
    proved = re.findall(r"alertname: (\w+)\n +exp_alerts", (ROOT / "tests/alerts_test.yml").read_text())
    assert set(proved) == named


@pytest.mark.programs
def test_the_dashboard_shows_each_metric_in_queries_that_prometheus_takes(tmp_path: Path) -> None:
    dashboard = json.loads((ROOT / "docs/grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert set(re.findall(r"paygate_\w+", " ".join(queries))) == set(metrics.METRICS)
    rules = [{"record": f"panel:query{n}", "expr": expr.replace("$mode", "live")} for n, expr in enumerate(queries)]
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # JSON is YAML
    promtool("check", "rules", "--lint=none", path)


def test_alerts_and_dashboard_name_metrics_that_there_are() -> None:
    text = (ROOT / "docs/alerts.yml").read_text()
    expressions = re.sub(r"(?m)^ *(summary|description):.*", "", text)
    assert set(re.findall(r"paygate_\w+", expressions)) <= set(metrics.METRICS)
