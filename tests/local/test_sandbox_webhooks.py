# ruff: noqa: F811  (fixtures are imported by their names)
"""The sandbox's events are signed, sent again, and late, lost or doubled when told to."""

import hashlib
import hmac
import json
import time

from local.sandbox import Sandbox, webhooks
from sandbox_client import KEY, Shop, initialize, paid, refund, shop, told, verified, without_a_proxy  # noqa: F401


def test_webhooks_are_signed_over_their_raw_body(told: Sandbox, shop: Shop) -> None:
    paid(told, email="zoë@example.com")
    assert shop.heard(1) == ["charge.success"]
    body, signature = shop.raw[0]
    assert signature == hmac.new(KEY.encode(), body, hashlib.sha512).hexdigest()
    assert json.loads(body)["data"] == verified(told)


def test_a_webhook_is_sent_again_until_it_is_answered_by_exactly_200(told: Sandbox, shop: Shop) -> None:
    shop.answers = [500, 302, 201, 200]
    paid(told)
    shop.heard(4)
    time.sleep(0.1)
    assert told.deliveries("PG-1")[0]["answers"] == [500, 302, 201, 200]
    assert len({body for body, _ in shop.raw}) == 1


def test_a_webhook_is_sent_again_when_the_answer_takes_too_long(told: Sandbox, shop: Shop) -> None:
    told.configure(webhook_timeout_seconds=0.1, retry_seconds=[0.05])
    shop.delay = 0.3
    paid(told)
    shop.heard(2)
    time.sleep(0.2)
    assert told.deliveries()[0]["answers"] == ["TimeoutError", "TimeoutError"]


def test_paystacks_schedule_of_retries_is_the_default() -> None:
    assert webhooks.RETRY_SECONDS["test"] == (3600.0,) * 10
    assert sum(webhooks.RETRY_SECONDS["live"]) == 4 * 180 + 72 * 3600


def test_webhook_faults_do_what_they_say(told: Sandbox, shop: Shop) -> None:
    for number, name in enumerate(("lost", "double", "forged")):
        told.fault("webhook", name, prefix=f"PG-{number}")
        paid(told, f"PG-{number}")
        assert told.wait_for_webhooks()
    assert [event["data"]["reference"] for event in shop.events] == ["PG-1", "PG-1", "PG-2"]
    body, signature = shop.raw[2]
    assert signature != hmac.new(KEY.encode(), body, hashlib.sha512).hexdigest()


def test_a_late_webhook_comes_late(told: Sandbox, shop: Shop) -> None:
    told.fault("webhook", "late", seconds=0.2)
    begun = time.monotonic()
    paid(told)
    shop.heard(1)
    assert 0.2 <= shop.times[0] - begun < 1


def test_a_reordered_webhook_comes_after_the_next(told: Sandbox, shop: Shop) -> None:
    paid(told, email="reordered-webhook@example.com")
    refund(told)
    assert shop.heard(2) == ["refund.pending", "charge.success"]


def test_held_webhooks_are_released_shuffled_by_a_seed(told: Sandbox, shop: Shop) -> None:
    told.hold_webhooks()
    for number in range(8):
        paid(told, f"PG-{number}")
    assert told.wait_for_webhooks() and not shop.events
    told.release_webhooks(seed=1)
    shop.heard(8)
    assert sorted(event["data"]["reference"] for event in shop.events) == [f"PG-{number}" for number in range(8)]


def test_an_event_can_be_sent_again_changed_or_handed_over(told: Sandbox, shop: Shop) -> None:
    paid(told)
    told.send_event("PG-1", domain="live")
    told.forge_event("PG-1")
    shop.heard(3)
    assert sorted(event["data"]["domain"] for event in shop.events) == ["live", "test", "test"]
    body, headers = told.event("PG-1", amount=1)
    assert json.loads(body)["data"]["amount"] == 1
    assert headers["x-paystack-signature"] == hmac.new(KEY.encode(), body, hashlib.sha512).hexdigest()


def test_another_key_may_take_over(told: Sandbox, shop: Shop) -> None:
    initialize(told)
    told.configure(secret_key="sk_test_next")
    assert initialize(told, "PG-2").status_code == 401
    told.pay("PG-1")
    shop.heard(1)
    body, signature = shop.raw[0]
    assert signature == hmac.new(b"sk_test_next", body, hashlib.sha512).hexdigest()
