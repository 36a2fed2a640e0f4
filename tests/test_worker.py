# ruff: noqa: F811  (fixtures are imported by their names; the SQL is written here)
"""The background loops: a payment is found with no webhook at all, no silence ends it, and nothing is done twice."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import worker
from backstage import (
    age,
    at_once,
    end_time,
    initialize_before,
    make_due,
    meanwhile,
    poll,
    poll_all,
    refuse_charges,
    seconds_of,
    worker_of,
)
from invariants import check_books
from local.sandbox import Sandbox
from shop import ROOT, Shop, environment, open_shop, query, sandbox, shop, wait_until  # noqa: F401

MINUTE, HOUR, DAY = 60, 3600, 86400
TTL = 24 * HOUR


def seconds_to_the_next_poll(shop: Shop, payment_id: str) -> float | None:
    (row,) = shop.sql(
        "SELECT extract(epoch FROM poll_at - now())::float8 AS seconds FROM payments WHERE id = %s", payment_id
    )
    seconds: float | None = row["seconds"]
    return seconds


@contextmanager
def working(shop: Shop, **settings: str) -> Iterator[worker.Worker]:
    """The worker's threads, as a web process runs them."""
    background = worker_of(shop, worker.POLLS_PER_SECOND)
    background.start()
    try:
        yield background
    finally:
        background.stop()


# What is found


def test_a_payment_whose_webhook_never_comes_is_found(open_shop: Callable[..., Shop]) -> None:
    """By its first look, five seconds after it was made, with nobody's help."""
    shop = open_shop(WORKER_INTERVAL="0.1")
    payment = shop.created(customer_email="lost-webhook@example.com")
    shop.sandbox.pay(payment["reference"])
    shop.sandbox.fault("list-transactions", "empty-list", times=None)
    made = time.monotonic()
    with working(shop):
        wait_until(lambda: shop.sql("SELECT status FROM payments") == [{"status": "completed"}], 8)
    assert time.monotonic() - made > 3
    assert shop.sandbox.calls("verify") == 1
    assert seconds_to_the_next_poll(shop, payment["id"]) == pytest.approx(DAY, abs=10), "only its chargeback is left"
    check_books(shop.database_url)


def test_every_reference_up_to_the_one_reached_is_verified(shop: Shop) -> None:
    for paid in (0, 1):
        shop.sandbox.fault("initialize", "lost-answer")
        payment = shop.created(key=f"order-{paid}")
        first, second = payment["reference"].removesuffix("-2"), payment["reference"]
        shop.sandbox.pay((first, second)[paid])
        poll(shop)
        assert shop.get(payment["id"])["reference"] == (first, second)[paid]
        assert [shop.sandbox.calls("verify", reference) for reference in (first, second)] == [2, 1]
    assert {row["status"] for row in check_books(shop.database_url)} == {"completed"}


def test_a_payment_that_is_being_opened_is_left_alone_until_its_lease_is_over(shop: Shop) -> None:
    shop.sandbox.fault("initialize", "time-out", seconds=0.6)
    with meanwhile(lambda: shop.create(key="one")) as answer:
        wait_until(shop.sandbox.transactions)
        poll(shop)
        assert shop.sandbox.calls("verify") == 0
        assert answer().status_code == 201
    poll(shop)
    assert shop.sandbox.calls("verify") == 1


def test_the_daily_list_finds_a_charge_without_its_look(shop: Shop) -> None:
    shop.sandbox.fault("initialize", "lost-answer")
    payment = shop.created(key="one")
    shop.sandbox.pay(payment["reference"].removesuffix("-2"))
    shop.sandbox.charge_elsewhere("T000000000000001")
    shop.sandbox.charge_elsewhere("PG-0123456789ABCDEFGHJKMNPQRS")
    shop.sql("UPDATE payments SET poll_at = now() + interval '1 year'")
    at_once([worker_of(shop).run_once] * 4)
    assert shop.get(payment["id"])["status"] == "completed"
    assert shop.sql("SELECT kind, subject FROM incidents") == [
        {"kind": "unknown_reference", "subject": "PG-0123456789ABCDEFGHJKMNPQRS"}
    ]
    assert shop.sandbox.calls("list-transactions") == 1, "one process lists for all"
    worker_of(shop).run_once()
    assert shop.sandbox.calls("list-transactions") == 1, "once a day"
    shop.sql("UPDATE jobs SET due_at = now()")
    worker_of(shop).run_once()
    assert shop.sandbox.calls("list-transactions") == 2
    check_books(shop.database_url)


def test_a_list_of_many_pages_is_read_to_its_end(shop: Shop) -> None:
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    for _ in range(205):
        shop.sandbox.charge_elsewhere()
    shop.sql("UPDATE payments SET poll_at = now() + interval '1 year'")
    worker_of(shop).run_once()
    assert shop.get(payment["id"])["status"] == "completed"
    assert shop.sandbox.calls("list-transactions") == 3


def test_an_event_whose_first_handling_failed_is_applied_later(shop: Shop) -> None:
    """Whatever made it fail: here the database refuses the charge for a while."""
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    refuse_charges(shop)
    assert [shop.deliver(payment["reference"]).status_code for _ in range(2)] == [200, 200]
    assert shop.sql("SELECT outcome, deliveries, body IS NOT NULL AS whole FROM provider_events") == [
        {"outcome": "received", "deliveries": 2, "whole": True}
    ]
    assert shop.get(payment["id"])["status"] == "pending"
    worker_of(shop).apply_events()  # too early
    shop.sql("DROP TRIGGER a_bug ON charges")
    shop.sql("UPDATE provider_events SET retry_at = now()")
    worker_of(shop).apply_events()
    assert shop.get(payment["id"])["status"] == "completed"
    assert shop.sql("SELECT outcome, retry_at FROM provider_events") == [{"outcome": "applied", "retry_at": None}]
    assert shop.sandbox.calls("verify") == 0
    check_books(shop.database_url)


def test_a_repeated_event_whose_first_handling_failed_is_handled(shop: Shop) -> None:
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    refuse_charges(shop)
    assert shop.deliver(payment["reference"]).status_code == 200
    shop.sql("DROP TRIGGER a_bug ON charges")
    assert shop.deliver(payment["reference"]).status_code == 200
    assert shop.get(payment["id"])["status"] == "completed"
    check_books(shop.database_url)


# What a silence means


@pytest.mark.parametrize(("declined", "ended"), [(False, "expired"), (True, "failed")])
def test_a_payment_ends_right_after_an_answer_that_it_is_unpaid(shop: Shop, declined: bool, ended: str) -> None:
    payment = shop.created()
    if declined:
        shop.sandbox.decline(payment["reference"])
    poll(shop)
    before = shop.get(payment["id"])
    assert before["status"] == "pending"
    assert before["status_reason"] == ("last try declined: Insufficient Funds" if declined else None)
    assert before["checkout_url"] is not None, "the customer may try again on the same page"
    end_time(shop.database_url, payment["id"])
    poll(shop)
    after = shop.get(payment["id"])
    assert (after["status"], after["status_reason"]) == (ended, before["status_reason"])
    assert after["checkout_url"] is None
    last = shop.sql("SELECT actor, why, from_status, to_status FROM payment_events ORDER BY n DESC LIMIT 1")
    assert last == [{"actor": "worker", "why": "time_over", "from_status": "pending", "to_status": ended}]
    check_books(shop.database_url)


@pytest.mark.parametrize("silence", ["500", "lost-answer", "garbage", "not-found", "429", "invalid-key", "ongoing"])
def test_no_answer_keeps_a_payment_pending_after_its_time(open_shop: Callable[..., Shop], silence: str) -> None:
    """Its transaction exists, for we gave its URL out: that it cannot be found is no answer either."""
    shop = open_shop(PAYSTACK_TIMEOUT="1")
    payment = shop.created()
    if silence == "ongoing":
        shop.sandbox.alter(payment["reference"], status="ongoing")
    else:
        shop.sandbox.fault("verify", silence)
    end_time(shop.database_url, payment["id"])
    poll(shop)
    assert shop.get(payment["id"])["status"] == "pending"
    assert seconds_to_the_next_poll(shop, payment["id"]) == pytest.approx(30 * MINUTE, abs=5)
    shop.sandbox.alter(payment["reference"], status="abandoned")
    poll(shop)
    assert shop.get(payment["id"])["status"] == "expired"
    check_books(shop.database_url)


def test_an_answer_of_the_other_mode_is_none(shop: Shop) -> None:
    payment = shop.created(customer_email="live-domain@example.com")
    shop.sandbox.pay(payment["reference"])
    end_time(shop.database_url, payment["id"])
    poll(shop)
    assert shop.get(payment["id"])["status"] == "pending"
    assert shop.sql("SELECT * FROM charges") == []


def test_a_reference_that_was_never_opened_and_is_not_found_is_unpaid(shop: Shop) -> None:
    shop.sandbox.fault("initialize", "lost-request", times=2)
    assert shop.create(key="one").status_code == 503
    (payment,) = check_books(shop.database_url)
    end_time(shop.database_url, payment["id"])
    poll(shop)
    assert shop.sandbox.calls("verify", payment["reference"]) == 1
    assert shop.get(payment["id"])["status"] == "expired"


def test_a_first_reference_that_existed_and_is_not_found_is_no_answer(shop: Shop) -> None:
    shop.sandbox.fault("initialize", "lost-answer")
    payment = shop.created(key="one")
    first = payment["reference"].removesuffix("-2")
    shop.sandbox.fault("verify", "not-found", prefix=first)
    end_time(shop.database_url, payment["id"])
    poll(shop)
    assert shop.get(payment["id"])["status"] == "pending"


def test_a_first_reference_that_is_not_found_is_no_answer_when_the_next_was_never_opened(shop: Shop) -> None:
    shop.sandbox.fault("initialize", "lost-request", times=2)
    assert shop.create(key="one").status_code == 503
    (payment,) = check_books(shop.database_url)
    initialize_before(shop.sandbox, payment["reference"])
    shop.sandbox.fault("initialize", "lost-request", times=2, prefix=f"{payment['reference']}-2")
    assert shop.create(key="one").status_code == 503
    shop.sandbox.fault("verify", "not-found", prefix=payment["reference"])
    end_time(shop.database_url, payment["id"])
    poll(shop)
    assert shop.get(payment["id"])["status"] == "pending"
    poll(shop)
    assert shop.get(payment["id"])["status"] == "expired"


def test_money_that_comes_while_the_provider_is_asked_is_not_overwritten(shop: Shop) -> None:
    """The answer says abandoned, and is on its way while the customer pays."""
    payment = shop.created()
    end_time(shop.database_url, payment["id"])
    shop.sandbox.fault("verify", "time-out", seconds=0.5)
    with meanwhile(lambda: poll(shop)) as looked:
        wait_until(lambda: shop.sandbox.calls("verify") == 1)
        shop.pay(payment["reference"])
        looked()
    assert shop.get(payment["id"])["status"] == "completed"
    assert seconds_to_the_next_poll(shop, payment["id"]) == pytest.approx(DAY, abs=10), "only its chargeback is left"
    check_books(shop.database_url)


# When it looks


AGES = st.floats(0, 3 * DAY)


@settings(deadline=None)
@given(age_seconds=AGES, ttl_seconds=st.floats(0.5, 365 * DAY))
def test_the_next_look_at_a_pending_payment_is_never_in_the_past_nor_past_its_end(
    age_seconds: float, ttl_seconds: float
) -> None:
    over_seconds = age_seconds - ttl_seconds
    wait_seconds = worker.next_poll_seconds(age_seconds, over_seconds, "pending")
    assert wait_seconds is not None
    assert 0 < wait_seconds <= (30 * MINUTE if over_seconds < DAY else DAY) + 1e-6
    if over_seconds < 0:
        assert wait_seconds <= -over_seconds or wait_seconds < 1


@settings(deadline=None)
@given(over_seconds=st.floats(0, 366 * DAY), status=st.sampled_from(["failed", "expired"]))
def test_an_ended_payment_is_polled_for_a_year_and_then_no_more(over_seconds: float, status: str) -> None:
    wait_seconds = worker.next_poll_seconds(TTL + over_seconds, over_seconds, status)
    if over_seconds >= 365 * DAY:
        assert wait_seconds is None
    else:
        assert wait_seconds is not None
        assert 0 < wait_seconds <= (DAY if over_seconds < 30 * DAY else 7 * DAY)


def regular_looks(until_seconds: float) -> list[float]:
    """The ages at which a payment is looked at when nobody asks for more."""
    looks, age_seconds, status = [], 0.0, "pending"
    while age_seconds < until_seconds:
        wait_seconds = worker.next_poll_seconds(age_seconds, age_seconds - TTL, status)
        assert wait_seconds is not None
        age_seconds += wait_seconds
        status = "pending" if age_seconds < TTL else "expired"
        looks.append(age_seconds)
    return looks


def test_the_regular_looks_are_those_of_the_page() -> None:
    first = [5, 10, 20, 40, MINUTE, 2 * MINUTE, 5 * MINUTE, 10 * MINUTE]
    looks = regular_looks(TTL + 45 * DAY)
    assert looks[:8] == pytest.approx(first)
    assert looks[8:11] == pytest.approx([40 * MINUTE, 70 * MINUTE, 100 * MINUTE])
    assert pytest.approx(TTL) in looks
    after = [look - TTL for look in looks if look > TTL + 1]
    assert after[:30] == pytest.approx([day * DAY for day in range(1, 31)])
    assert after[30:32] == pytest.approx([37 * DAY, 44 * DAY])


@settings(deadline=None)
@given(data=st.data())
def test_a_look_that_somebody_asked_for_moves_no_regular_one(data: st.DataObject) -> None:
    regular = regular_looks(TTL + 40 * DAY)
    before = data.draw(st.integers(0, len(regular) - 2))
    begin, end = regular[before], regular[before + 1]
    asked = data.draw(st.floats(begin + 0.01, end - 0.01))
    status = "pending" if asked < TTL else "expired"
    wait_seconds = worker.next_poll_seconds(asked, asked - TTL, status)
    assert wait_seconds is not None
    assert asked + wait_seconds == pytest.approx(end, abs=0.5)


def test_a_reader_makes_the_worker_look_soon_but_at_most_once_in_five_seconds(open_shop: Callable[..., Shop]) -> None:
    shop = open_shop(WORKER_INTERVAL="0.05")
    payment = shop.created()
    shop.sql("UPDATE payments SET poll_at = now() + interval '1 hour'")
    shop.sql("INSERT INTO jobs (mode, name, due_at) VALUES ('test', 'none', now())")
    with working(shop):
        time.sleep(0.3)
        assert shop.sandbox.calls("verify") == 0
        for _ in range(20):
            shop.get(payment["id"])
        wait_until(lambda: shop.sandbox.calls("verify") == 1, 15)
        for _ in range(12):
            shop.get(payment["id"])
            time.sleep(0.2)
        assert shop.sandbox.calls("verify") == 1
        shop.sql("UPDATE payments SET polled_at = polled_at - interval '5 s'")
        shop.sandbox.pay(payment["reference"])
        shop.get(payment["id"])
        wait_until(lambda: shop.get(payment["id"])["status"] == "completed", 15)


@pytest.mark.parametrize("ended", ["failed", "expired"])
def test_a_reader_of_an_ended_payment_makes_the_worker_look_too(shop: Shop, ended: str) -> None:
    payment = shop.created()
    if ended == "failed":
        shop.sandbox.decline(payment["reference"])
    age(shop.database_url, None, 500 * DAY)
    poll(shop)
    assert seconds_to_the_next_poll(shop, payment["id"]) is None
    shop.sandbox.pay(payment["reference"])
    shop.sql("UPDATE payments SET polled_at = now() - interval '1 day'")
    assert shop.get(payment["id"])["status"] == ended
    wait_until(lambda: shop.sql("SELECT id FROM payments WHERE wanted_at IS NOT NULL"), 15)
    poll(shop)
    assert shop.get(payment["id"])["status"] == "completed"


def test_a_reader_makes_the_worker_look_once_the_lease_of_one_that_died_is_over(shop: Shop) -> None:
    payment = shop.created()
    shop.sql("UPDATE payments SET poll_at = now() + interval '1 hour', poll_leased_until = now() + interval '1 hour'")

    def is_soon() -> bool:
        shop.get(payment["id"])
        return shop.sql("SELECT wanted_at IS NOT NULL AS is_due FROM payments") == [{"is_due": True}]

    assert not is_soon()
    time.sleep(1.3)  # until the reader has been told of
    assert not is_soon()
    shop.sql("UPDATE payments SET poll_leased_until = now()")
    wait_until(is_soon, 15)


# Nothing twice, nobody waits for another


def test_two_workers_never_look_at_one_payment_at_once(shop: Shop) -> None:
    for _ in range(24):
        shop.created()
    age(shop.database_url, None, HOUR)  # so that none is due again before the end
    make_due(shop.database_url)
    shop.sandbox.configure(latency_seconds=0.02)
    at_once([lambda: poll_all(shop)] * 6)
    calls = [shop.sandbox.calls("verify", row["reference"]) for row in shop.sql("SELECT reference FROM payments")]
    assert calls == [1] * 24


def test_a_reader_does_not_send_a_second_worker_after_the_first(open_shop: Callable[..., Shop]) -> None:
    """The first one's look has taken longer than the five seconds after which a reader may ask again."""
    shop = open_shop(PAYSTACK_TIMEOUT="10")
    payment = shop.created()
    make_due(shop.database_url)
    shop.sandbox.fault("verify", "time-out", seconds=2.5)
    with meanwhile(worker_of(shop).poll) as looked:
        wait_until(lambda: shop.sandbox.calls("verify") == 1)
        shop.sql("UPDATE payments SET polled_at = polled_at - interval '6 s'")
        shop.get(payment["id"])
        time.sleep(1.3)  # until the reader has been told of
        worker_of(shop).poll()
        assert shop.sandbox.calls("verify") == 1, "two look at one payment at once"
        looked()


def test_no_lease_of_a_look_runs_out_while_the_provider_hangs(open_shop: Callable[..., Shop]) -> None:
    """What one worker has taken, it has looked at before another may take it, though each call takes all its time."""
    shop = open_shop(PAYSTACK_TIMEOUT="10")
    for _ in range(25):
        shop.created()
    make_due(shop.database_url)
    shop.sandbox.fault("verify", "time-out-before", times=None, seconds=0.3)
    with meanwhile(worker_of(shop).poll):
        wait_until(lambda: shop.sandbox.calls("verify") == 1)
        (taken,) = shop.sql(
            """
            SELECT count(*) AS payments, min(extract(epoch FROM poll_at - now()))::float8 AS lease_seconds
              FROM payments WHERE poll_at > now()
            """
        )
        shop.sandbox.clear_faults()
    assert taken["payments"] * shop.settings.paystack_timeout_seconds <= taken["lease_seconds"] + 1


def test_a_provider_that_asks_for_a_pause_gets_it_and_then_goes_on_with_all(open_shop: Callable[..., Shop]) -> None:
    shop = open_shop(WORKER_INTERVAL="0.05")
    payments = [shop.created() for _ in range(3)]
    for payment in payments:
        shop.sandbox.pay(payment["reference"])
    shop.sandbox.fault("list-transactions", "empty-list", times=None)
    shop.sandbox.fault("verify", "429-retry-after", retry_after=3)
    make_due(shop.database_url)
    with working(shop):
        wait_until(lambda: shop.sandbox.calls("verify") >= 1)
        time.sleep(0.5)  # a call that was on its way when the provider asked may still arrive
        heard = shop.sandbox.calls("verify")
        time.sleep(1.5)
        assert shop.sandbox.calls("verify") == heard <= 2, "one of the lookers did not hear of it"
        wait_until(lambda: len(shop.sql("SELECT id FROM payments WHERE status = 'completed'")) >= 2, 15)


def test_a_provider_is_not_flooded_after_an_outage(open_shop: Callable[..., Shop]) -> None:
    """With all due at once a process asks ten times a second: what fell due last first, a fourth oldest first."""
    shop = open_shop(WORKER_INTERVAL="0.05")
    payments = [shop.created() for _ in range(40)]
    shop.sandbox.fault("list-transactions", "empty-list", times=None)
    for number, payment in enumerate(payments):
        shop.sql(
            "UPDATE payments SET poll_at = now() - make_interval(secs => %s) WHERE id = %s", 90 - number, payment["id"]
        )
    with working(shop):
        wait_until(lambda: shop.sandbox.calls("verify") >= 5)
        first = shop.sandbox.calls("verify")
        time.sleep(1)
        in_a_second = shop.sandbox.calls("verify") - first
    assert 4 <= in_a_second <= 11
    ids = [payment["id"] for payment in payments]
    looked = {row["id"] for row in shop.sql("SELECT id FROM payments WHERE polled_at IS NOT NULL")}
    oldest = len(looked) // 4
    assert looked == {*ids[:oldest], *ids[oldest - len(looked) :]}


def test_a_provider_that_hangs_holds_up_one_look_and_not_all(open_shop: Callable[..., Shop]) -> None:
    shop = open_shop(WORKER_INTERVAL="0.05", PAYSTACK_TIMEOUT="10")
    payments = [shop.created() for _ in range(4)]
    for payment in payments:
        shop.sandbox.pay(payment["reference"])
    shop.sandbox.fault("list-transactions", "empty-list", times=None)
    shop.sandbox.fault("verify", "time-out-before", times=1, seconds=8)
    make_due(shop.database_url)
    with working(shop):
        wait_until(lambda: len(shop.sql("SELECT id FROM payments WHERE status = 'completed'")) == 3, 7)


def test_what_is_done_once_does_not_wait_for_a_provider_that_asks_for_quiet(shop: Shop) -> None:
    for _ in range(3):
        shop.created()
    make_due(shop.database_url)
    shop.sandbox.fault("verify", "429-retry-after", times=None, retry_after=10)
    _, seconds = seconds_of(worker_of(shop).run_once)
    assert seconds < 9
    assert shop.sandbox.calls("verify") == 1


def test_a_worker_touches_payments_of_its_own_mode_only(shop: Shop, database_url: str) -> None:
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    make_due(database_url)
    live_key = "sk_live_0123456789abcdef"
    with (
        Sandbox(secret_key=live_key) as live_sandbox,
        Shop(database_url, live_sandbox, PAYSTACK_SECRET_KEY=live_key, PUBLIC_URL="https://pay.example.com") as live,
    ):
        worker_of(live).run_once()
        assert live_sandbox.calls("verify") == 0
    assert shop.get(payment["id"])["status"] == "pending"
    poll(shop)
    assert shop.get(payment["id"])["status"] == "completed"


def test_one_payment_that_cannot_be_stored_holds_up_no_other(open_shop: Callable[..., Shop]) -> None:
    """A look that fails by an error of ours, here of the first payment due, for whatever reason."""
    shop = open_shop(WORKER_INTERVAL="0.1")
    payments = [shop.created() for _ in range(3)]
    for payment in payments:
        shop.sandbox.pay(payment["reference"])
    refuse_charges(shop, f"NEW.payment_id = '{payments[0]['id']}'")
    shop.sql("UPDATE payments SET poll_at = created_at")
    background = worker_of(shop)
    rounds = threading.Thread(target=background.repeat, args=(background.poll,))
    rounds.start()
    try:
        wait_until(lambda: len(shop.sql("SELECT id FROM payments WHERE status = 'completed'")) == 2, 15)
    finally:
        background.stopping.set()
        rounds.join(5)


def test_a_worker_that_stops_stops_at_once(shop: Shop) -> None:
    with working(shop) as background:
        begun = time.monotonic()
        background.stop()
        assert time.monotonic() - begun < 1
        assert not any(thread.is_alive() for thread in background.threads)


# Alone, as a process


def manage(shop: Shop, *arguments: str) -> "subprocess.Popen[str]":
    env = environment(shop.database_url, shop.sandbox, WORKER_INTERVAL="0.1")
    return subprocess.Popen(
        [sys.executable, str(ROOT / "manage.py"), *arguments],
        env={"PATH": os.environ["PATH"], **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_the_worker_alone_completes_a_paid_payment(shop: Shop) -> None:
    payment = shop.created(customer_email="lost-webhook@example.com")
    shop.sandbox.pay(payment["reference"])
    make_due(shop.database_url)
    process = manage(shop, "worker")
    try:
        wait_until(lambda: shop.sql("SELECT status FROM payments") == [{"status": "completed"}], 15)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
    finally:
        process.kill()
        process.wait(10)
    check_books(shop.database_url)


@pytest.mark.parametrize("fault", ["invalid-key", "500", "429-retry-after"])
def test_what_could_not_be_asked_is_a_failure_of_what_is_done_once(shop: Shop, fault: str) -> None:
    shop.created()
    worker_of(shop).run_once()
    make_due(shop.database_url)
    shop.sandbox.fault("verify", fault, times=None)
    (line,) = worker_of(shop).run_once()
    assert line == ("poll: the key is refused" if fault == "invalid-key" else "poll: no answer")


def test_worker_once_does_what_is_due_and_ends(shop: Shop) -> None:
    payments = [shop.created() for _ in range(25)]
    for payment in payments:
        shop.sandbox.pay(payment["reference"])
    not_due = shop.created()
    make_due(shop.database_url)
    shop.sql("UPDATE payments SET poll_at = now() + interval '1 hour' WHERE id = %s", not_due["id"])
    shop.sandbox.fault("list-transactions", "empty-list", times=None)
    process = manage(shop, "worker", "--once")
    try:
        printed, _ = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait(10)
    assert process.returncode == 0, printed
    states: list[dict[str, Any]] = check_books(shop.database_url)
    assert sum(state["status"] == "completed" for state in states) == 25
    assert shop.sandbox.calls("verify", not_due["reference"]) == 0
