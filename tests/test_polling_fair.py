# ruff: noqa: F811  (fixtures are imported by their names)
"""However many payments a stranger makes or touches, everybody else's are polled in time."""

import time
from typing import Any

import pytest

import worker
from backstage import poll_all, second_of_two, slow_process, worker_of
from shop import PAYMENTS, Shop, open_shop, sandbox, shop, wait_until  # noqa: F401

STRANGER, CUSTOMER = "198.51.100.7", "203.0.113.9"


@pytest.fixture
def strangers(shop: Shop) -> list[dict[str, Any]]:
    """Open payments that have been due for a while: more of them than are polled at once."""
    made = [shop.created() for _ in range(12)]
    shop.sql("UPDATE payments SET poll_at = now() - interval '10 min'")
    return made


def touch(shop: Shop, path: str, address: str) -> None:
    assert shop.client.simulate_get(path, remote_addr=address).status_code == 200


def wait_until_wanted(shop: Shop, payments: list[dict[str, Any]]) -> None:
    ids = [payment["id"] for payment in payments]
    query = "SELECT id FROM payments WHERE id = ANY(%s) AND wanted_at IS NULL AND polled_at IS NULL"
    wait_until(lambda: not shop.sql(query, ids))


def calls_until_polled(shop: Shop, payment: dict[str, Any]) -> int:
    """How many polls it takes until this payment is polled."""
    poller = worker_of(shop)
    for number in range(1, 100):
        assert poller.poll() == 0
        if shop.sandbox.calls("verify", payment["reference"]):
            return number
    raise AssertionError("it is never polled")


@pytest.mark.parametrize("path", [PAYMENTS + "/{id}", "/pay/{id}", "/pay/{id}?reference={reference}"])
def test_a_payment_that_somebody_asks_for_is_polled_before_those_that_nobody_touched(
    shop: Shop, strangers: list[dict[str, Any]], path: str
) -> None:
    payment = shop.created()
    touch(shop, path.format(**payment), CUSTOMER)
    wait_until_wanted(shop, [payment])
    assert calls_until_polled(shop, payment) == 1


def test_who_asks_for_many_payments_does_not_delay_who_asks_for_one(shop: Shop) -> None:
    many = [shop.created() for _ in range(30)]
    payment = shop.created()
    begun = time.monotonic()
    for each in many:
        touch(shop, f"/pay/{each['id']}", STRANGER)
    touch(shop, f"/pay/{payment['id']}", CUSTOMER)
    wait_until_wanted(shop, [*many, payment])
    turns = shop.sql("SELECT id FROM payments ORDER BY wanted_at")
    before = [row["id"] for row in turns].index(payment["id"])
    assert before <= 2 + (time.monotonic() - begun), "an address has a turn a second"


def test_a_customer_who_comes_back_goes_before_the_turn_of_a_shop_that_asks_for_all_its_payments(shop: Shop) -> None:
    many = [shop.created() for _ in range(30)]
    for each in many:
        touch(shop, f"{PAYMENTS}/{each['id']}", STRANGER)
    wait_until_wanted(shop, many)
    query = "SELECT id, wanted_at FROM payments ORDER BY wanted_at DESC LIMIT 1"
    (last,) = shop.sql(query)
    touch(shop, f"/pay/{last['id']}", CUSTOMER)
    wait_until(lambda: shop.sql(query)[0]["id"] != last["id"])


def test_who_asks_for_many_payments_while_nobody_else_asks_waits_for_no_turn(shop: Shop) -> None:
    many = [shop.created() for _ in range(8)]
    shop.sql("UPDATE payments SET poll_at = now() + interval '1 h'")
    for each in many:
        touch(shop, f"/pay/{each['id']}", STRANGER)
    wait_until_wanted(shop, many)
    poll_all(shop)
    assert [shop.sandbox.calls("verify", each["reference"]) for each in many] == [1] * 8


def test_what_falls_due_now_is_polled_before_a_backlog_and_the_backlog_from_its_end_too(
    shop: Shop, strangers: list[dict[str, Any]]
) -> None:
    payment, oldest = shop.created(), strangers[5]
    shop.sql("UPDATE payments SET poll_at = now() WHERE id = %s", payment["id"])
    shop.sql("UPDATE payments SET poll_at = now() - interval '1 h' WHERE id = %s", oldest["id"])
    assert calls_until_polled(shop, payment) == 1
    assert calls_until_polled(shop, oldest) <= 4


def test_touching_payments_without_end_does_not_hold_up_those_that_nobody_touches(
    shop: Shop, strangers: list[dict[str, Any]]
) -> None:
    payment = shop.created()
    shop.sql("UPDATE payments SET wanted_at = now() WHERE id <> %s", payment["id"])
    shop.sql("UPDATE payments SET poll_at = now() WHERE id = %s", payment["id"])
    assert calls_until_polled(shop, payment) <= 2


def test_a_payment_that_was_paid_while_somebody_waited_is_not_polled(shop: Shop) -> None:
    payment = shop.created()
    touch(shop, f"/pay/{payment['id']}", CUSTOMER)
    wait_until_wanted(shop, [payment])
    shop.pay(payment["reference"])
    poll_all(shop)
    assert shop.sandbox.calls("verify") == 0


@pytest.mark.parametrize("order", worker.ORDERS)
def test_a_payment_is_polled_by_one_worker_at_a_time(shop: Shop, order: str) -> None:
    shop.created()
    shop.sql("UPDATE payments SET poll_at = now(), wanted_at = now()")
    with slow_process(shop) as database:
        assert worker.claim_due(database, "test", 60, order) is not None
        assert worker.claim_due(shop.app.database, "test", 60, order) is None


def test_a_daily_job_is_done_by_one_worker(shop: Shop) -> None:
    assert worker.claim_job(shop.app.database, "prune", "test", 60)
    shop.sql("UPDATE jobs SET due_at = now()")
    assert not second_of_two(
        shop,
        lambda database: worker.claim_job(database, "prune", "test", 60),
        lambda database: worker.claim_job(database, "prune", "test", 60),
    )
