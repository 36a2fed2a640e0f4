# ruff: noqa: F811  (fixtures are imported by their names)
"""What is pruned when it is old, what is kept, and that nobody waits for it."""

from collections.abc import Callable

import pytest

import worker
from backstage import seconds_of, slow_process, worker_of
from money_back import settle
from shop import Shop, open_shop, sandbox, shop  # noqa: F401  # fixtures
from till import Till, open_till, paid, till  # noqa: F401  # fixtures


def test_pruning_removes_old_bodies_and_delivered_notifications_and_nothing_else(
    open_shop: Callable[..., Shop], till: Till
) -> None:
    shop = open_shop(RETENTION_DAYS="30")
    old, new = paid(shop), paid(shop)
    failed_body, _ = shop.sandbox.event(new["reference"], "charge.success", id=1)
    shop.sql(
        "UPDATE provider_events SET received_at = now() - interval '31 days' WHERE reference = %s", old["reference"]
    )
    shop.sql(
        "INSERT INTO provider_events (mode, digest, name, reference, body, outcome, retry_at, received_at)"
        " VALUES ('test', sha256('x'), 'charge.success', %s, %s, 'received', now() + interval '1 h',"
        " now() - interval '40 days')",
        *(old["reference"], failed_body.decode()),
    )
    for days, delivered in ((31, True), (29, True), (31, False)):
        shop.sql(
            "INSERT INTO notifications (mode, type, sequence, facts, made_at, delivered_at, dead_at) SELECT 'test',"
            " 'payment.completed', 1, '{}', at, CASE WHEN %s THEN at END, CASE WHEN NOT %s THEN at END"
            " FROM (SELECT now() - make_interval(days => %s) AS at) AS aged",
            *(delivered, delivered, days),
        )
    worker_of(shop).prune()
    kept = shop.sql("SELECT outcome, reference, body IS NOT NULL AS kept FROM provider_events ORDER BY id")
    assert [(row["outcome"], row["kept"]) for row in kept] == [
        ("applied", False),
        ("applied", True),
        ("received", True),
    ]
    left = shop.sql("SELECT dead_at IS NOT NULL AS dead FROM notifications ORDER BY made_at")
    assert [row["dead"] for row in left] == [True, False]
    till.did("audit")
    # It is done once a day, whatever else runs.
    shop.sql("UPDATE provider_events SET received_at = now() - interval '31 days'")
    worker_of(shop).prune()
    assert shop.sql("SELECT count(*) AS n FROM provider_events WHERE body IS NOT NULL")[0]["n"] == 2


def deliver_long_ago(shop: Shop, number: int) -> None:
    shop.sql(
        "INSERT INTO notifications (mode, type, sequence, facts, delivered_at)"
        " SELECT 'test', 'payment.completed', 1, '{}', now() - interval '100 days' FROM generate_series(1, %s)",
        number,
    )


def test_pruning_a_backlog_leaves_pauses_for_the_requests(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "PRUNING_PAUSE_SECONDS", 0.5)  # longer than the work itself may take
    backlog = 2 * worker.PRUNING_BATCH + 1
    deliver_long_ago(shop, backlog)
    pruned, seconds = seconds_of(worker_of(shop).prune_all)
    assert (pruned, shop.sql("SELECT 1 AS n FROM notifications")) == (backlog, [])
    assert seconds > 1


def test_pruning_a_backlog_ends_after_a_batch_when_the_service_stops(shop: Shop) -> None:
    deliver_long_ago(shop, 2 * worker.PRUNING_BATCH)
    pruner = worker_of(shop)
    pruner.stopping.set()
    assert pruner.prune_all() == worker.PRUNING_BATCH


def test_pruned_notifications_leave_the_numbers_going_on(open_shop: Callable[..., Shop], till: Till) -> None:
    shop = open_shop(NOTIFY_URL="http://127.0.0.1:9/", NOTIFY_SECRET="whsec_" + "QUFB" * 11)
    payment = paid(shop)
    shop.sql("UPDATE notifications SET due_at = NULL, delivered_at = now() - interval '100 days'")
    worker_of(shop).prune()
    assert shop.sql("SELECT 1 AS n FROM notifications") == []
    shop.sandbox.dashboard_refund(payment["reference"], 1000)
    settle(shop, shop.sandbox, payment["reference"])
    assert [row["sequence"] for row in shop.sql("SELECT sequence FROM notifications")] == [2]


def test_two_that_prune_at_the_same_moment_prune_each_row_once(shop: Shop) -> None:
    paid(shop)
    shop.sql("UPDATE provider_events SET received_at = now() - interval '100 days'")
    deliver_long_ago(shop, 3)
    with slow_process(shop) as database:
        assert worker.prune(database, 30, 250) == 4
        assert worker.prune(shop.app.database, 30, 250) == 0
