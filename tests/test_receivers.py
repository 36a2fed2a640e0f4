# ruff: noqa: F811  (fixtures are imported by their names)
"""What a receiver of notifications may do, and how often it is told."""

import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from backstage import seconds_of, worker_of
from merchant import Answer, Merchant, drip, flood, hang, merchant, reset, status  # noqa: F401
from shop import Shop, open_shop, sandbox, wait_until  # noqa: F401
from test_notifications import deliver, give_back, kill_off, let_pass, paid, rows, shop  # noqa: F401
from web import outbox

# What a receiver may do


@pytest.mark.parametrize("code", [200, 201, 202, 204, 299])
def test_any_2xx_is_a_delivery(shop: Shop, merchant: Merchant, code: int) -> None:
    merchant.usual = status(code)
    paid(shop)
    assert deliver(shop) == 1
    let_pass(shop, 86400)
    assert deliver(shop) == 0
    assert rows(shop)[0]["last_outcome"] == str(code)


def test_a_try_that_ends_after_another_delivered_takes_nothing_back(shop: Shop, merchant: Merchant) -> None:
    """Its lease ran out while it stood still."""
    paid(shop)
    database = shop.app.database
    late = outbox.claim_notification(database, "test", 60)
    shop.sql("UPDATE notifications SET due_at = now()")
    quick = outbox.claim_notification(database, "test", 60)
    assert late is not None and quick is not None and late.id == quick.id
    database.transaction(outbox.finish_notification, quick, "200", None)
    database.transaction(outbox.finish_notification, late, "time-out", 5)
    (row,) = rows(shop)
    assert (row["delivered_at"] is not None, row["due_at"], row["last_outcome"]) == (True, None, "200")


@pytest.mark.parametrize("code", [400, 401, 404, 409, 410, 429, 500, 502, 503])
def test_any_other_status_is_tried_again(shop: Shop, merchant: Merchant, code: int) -> None:
    merchant.answers.append(status(code))
    paid(shop)
    assert deliver(shop) == 1
    assert rows(shop)[0]["last_outcome"] == str(code)
    let_pass(shop, 10)
    assert deliver(shop) == 1
    assert rows(shop)[0]["delivered_at"] is not None


@pytest.mark.parametrize(
    ("code", "header", "seconds"),
    [
        *((429, "600", 600), (503, "86400", 3600), (503, "1", 5), (500, "600", 5), (429, "soon", 5), (429, "-9", 5)),
        *((503, "Wed, 21 Oct 2099 07:28:00 GMT", 3600), (429, "Wed, 21 Oct 2015 07:28:00 GMT", 5)),
    ],
)
def test_a_receiver_that_asks_for_quiet_gets_it_an_hour_at_most(
    shop: Shop, merchant: Merchant, code: int, header: str, seconds: int
) -> None:
    merchant.answers.append(status(code, b"", **{"Retry-After": header}))
    paid(shop)
    assert deliver(shop) == 1
    let_pass(shop, seconds * 0.75)
    assert deliver(shop) == 0
    let_pass(shop, seconds * 0.5)
    assert deliver(shop) == 1


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_tried_again(shop: Shop, merchant: Merchant, code: int) -> None:
    with Merchant() as elsewhere:
        merchant.answers.append(status(code, Location=elsewhere.url))
        paid(shop)
        deliver(shop)
        assert elsewhere.received == []
    let_pass(shop, 10)
    deliver(shop)
    assert len(merchant.received) == 2
    assert rows(shop)[0]["delivered_at"] is not None


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (reset, "unreachable"),
        (hang(threading.Event()), "time-out"),
        (drip(), "time-out"),
        (drip(b"HTTP/1.1 503 Whatever\r\nContent-Length: 100000\r\n\r\n"), "503"),
        (status(999, b"\0" * 70000), "999"),
        (lambda connection: connection.sendall(b"\0\xff garbage"), "unreachable"),
        (lambda connection: connection.sendall(b"HTTP/1.1 500"), "500"),
    ],
    ids=["resets", "hangs", "drips", "drips-its-body", "is-strange", "sends-garbage", "breaks-off"],
)
def test_a_receiver_that_gives_no_good_answer_costs_its_time_and_is_tried_again(
    shop: Shop, merchant: Merchant, answer: Answer, outcome: str
) -> None:
    merchant.answers.append(answer)
    paid(shop)
    notifier = outbox.Notifier(merchant.url, shop.settings.notify_secrets, within_seconds=0.4)
    is_due, seconds = seconds_of(lambda: notifier.deliver_next(shop.app.database, "test"))
    assert is_due
    assert seconds < 9
    assert rows(shop)[0]["last_outcome"] == outcome
    let_pass(shop, 10)
    assert deliver(shop) == 1
    assert rows(shop)[0]["delivered_at"] is not None


@pytest.mark.parametrize("code", [200, 500])
def test_of_an_answer_of_10_gb_only_the_status_counts(shop: Shop, merchant: Merchant, code: int) -> None:
    sent: list[int] = []
    merchant.answers.append(flood(code, sent))
    paid(shop)
    assert seconds_of(lambda: deliver(shop))[1] < 3
    assert rows(shop)[0]["last_outcome"] == str(code)
    assert sent[0] < 20 * 1024**2
    assert (rows(shop)[0]["delivered_at"] is not None) == (code == 200)


def test_a_delivery_whose_answers_body_never_comes_is_a_delivery(shop: Shop, merchant: Merchant) -> None:
    merchant.answers.append(drip(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"))
    paid(shop)
    notifier = outbox.Notifier(merchant.url, shop.settings.notify_secrets, within_seconds=0.4)
    notifier.deliver_next(shop.app.database, "test")
    assert rows(shop)[0]["delivered_at"] is not None


def test_a_receiver_that_is_away_is_tried_again(open_shop: Callable[..., Shop], merchant: Merchant) -> None:
    with Merchant() as gone:
        pass
    shop = open_shop(**{**merchant.settings, "NOTIFY_URL": gone.url})
    paid(shop)
    assert deliver(shop) == 1
    assert rows(shop)[0]["last_outcome"] == "refused"
    let_pass(shop, 10)
    assert deliver(open_shop(**merchant.settings)) == 1
    assert merchant.types == ["payment.completed"]


def test_three_deliveries_that_hang_delay_no_other_payments(shop: Shop, merchant: Merchant) -> None:
    release = threading.Event()
    merchant.answers.extend([hang(release)] * 3)
    for _ in range(3):
        paid(shop)
    worker = worker_of(shop)
    worker.interval_seconds = 0.1
    worker.start()
    try:
        wait_until(lambda: len(merchant.received) == 3)
        for count in range(4, 9):
            paid(shop)
            wait_until(lambda count=count: len(merchant.received) == count, within_seconds=20)  # type: ignore[misc]
    finally:
        release.set()
        worker.stop()
    wait_until(lambda: all(row["delivered_at"] for row in rows(shop)), within_seconds=20)


# How often


def test_tries_are_spread_over_four_days_and_then_end(shop: Shop, merchant: Merchant) -> None:
    merchant.usual = status(500)
    paid(shop)
    pauses = []
    while (row := rows(shop)[0])["dead_at"] is None:
        let_pass(shop, 10 * 86400)
        assert deliver(shop) == 1
        (after,) = shop.sql("SELECT extract(epoch FROM due_at - now())::float8 AS seconds FROM notifications")
        pauses.append(after["seconds"])
        assert len(pauses) < 20
    assert pauses.pop() is None
    minute, hour = 60, 3600
    regular = [5, 15, minute, 5 * minute, 30 * minute, 2 * hour, 5 * hour, 10 * hour, 14 * hour, 20 * hour, 24 * hour]
    assert len(pauses) == len(regular)
    for pause, seconds in zip(pauses, regular, strict=True):
        assert 0.8 * seconds - 3 <= pause <= 1.2 * seconds
    assert row["tries"] == len(merchant.received) == 12
    assert deliver(shop) == 0


def test_two_receivers_that_come_back_are_not_met_by_all_at_once(shop: Shop, merchant: Merchant) -> None:
    merchant.usual = status(500)
    for _ in range(10):
        paid(shop)
    deliver(shop)
    dues = [row["due_at"] for row in rows(shop)]
    assert max(dues) - min(dues) > timedelta(seconds=0.5)


def test_after_one_that_was_never_taken_the_next_is_sent_at_once(shop: Shop, merchant: Merchant) -> None:
    merchant.answers.append(status(500))
    reference = paid(shop)["reference"]
    give_back(shop, reference, 1000)
    kill_off(shop)
    first, second = rows(shop)
    assert first["dead_at"] is not None
    assert second["delivered_at"] is not None
    assert merchant.types == ["payment.completed", "payment.partially_refunded"]


@pytest.mark.usefixtures("elsewhere")
def test_a_date_until_which_a_receiver_wants_quiet_is_one_of_utc() -> None:
    until = datetime.now(UTC) + timedelta(minutes=10)
    assert outbox.quiet_seconds(f"{until:%a, %d %b %Y %H:%M:%S} GMT") == pytest.approx(600, abs=30)
    made = json.loads(outbox.body_of_test())["timestamp"]
    assert abs(datetime.fromisoformat(made) - datetime.now(UTC)) < timedelta(minutes=1)


@pytest.mark.parametrize(
    ("asked", "seconds"), [("0", 0), ("3599", 3599), ("3600", 3600), ("3601", 3600), ("86400", 3600), ("-1", 0)]
)
def test_a_receiver_is_given_quiet_for_an_hour_at_most(asked: str, seconds: float) -> None:
    assert outbox.quiet_seconds(asked) == seconds


def test_after_the_last_of_its_pauses_a_notification_is_given_up() -> None:
    pauses = [outbox.pause_seconds(tries) for tries in range(1, 13)]
    assert pauses[-1] is None
    assert None not in pauses[:-1]
    assert sum(pause or 0 for pause in pauses) > 2.5 * 86400
