# ruff: noqa: F811  (fixtures are imported by their names)
"""What the merchant's own system is told: each change, in order, until it was taken, whatever its receiver does.

Everything that it received is verified by the Standard Webhooks project's own library (see `merchant`).
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import standardwebhooks

import money
import refunds
from backstage import at_once, end_time, make_due, poll, second_of_two, slow_process, worker_of
from local.sandbox import Sandbox
from merchant import OTHER_SECRET, SECRET, Answer, Merchant, drip, flood, hang, merchant, reset, status  # noqa: F401
from shop import Server, Shop, open_shop, sandbox, wait_until  # noqa: F401
from till import Till, open_till  # noqa: F401
from web import outbox


@pytest.fixture
def shop(open_shop: Callable[..., Shop], merchant: Merchant) -> Shop:
    return open_shop(**merchant.settings)


def deliver(shop: Shop) -> int:
    """Let the worker deliver all that is due; how many tries that were."""
    worker = worker_of(shop)
    for tries in range(100):
        if worker.notify() != 0:
            return tries
    raise AssertionError("it does not end")


def paid(shop: Shop, **fields: Any) -> dict[str, Any]:
    """A payment that has been paid; nobody has been told yet."""
    payment = shop.created(**fields)
    shop.pay(payment["reference"])
    return payment


def give_back(shop: Shop, reference: str, amount: int) -> None:
    """A refund is made in the provider's dashboard, is processed, and the worker hears of it."""
    shop.sandbox.dashboard_refund(reference, amount)
    shop.sandbox.move_refund(reference, "processed")
    assert shop.deliver(reference, "refund.processed").status_code == 200  # which makes a look due
    worker_of(shop).poll()


def let_pass(shop: Shop, seconds: float) -> None:
    """As if so much time had passed for everything that is to be sent."""
    shop.sql("UPDATE notifications SET due_at = due_at - make_interval(secs => %s)", seconds)


def kill_off(shop: Shop) -> None:
    """As if all that is due had been tried in vain to the end."""
    shop.sql("UPDATE notifications SET tries = 11 WHERE due_at IS NOT NULL")
    let_pass(shop, 10 * 86400)
    deliver(shop)


def rows(shop: Shop | Server) -> list[dict[str, Any]]:
    return shop.sql("SELECT * FROM notifications ORDER BY payment_id, sequence")


# What is told


def test_a_payment_that_is_paid_is_told_as_get_tells_it_with_its_metadata(shop: Shop, merchant: Merchant) -> None:
    payment = paid(shop, metadata={"order": "1001"}, customer_name='Jöhn "Doe"', amount="50.50")
    assert deliver(shop) == 1
    (told,) = merchant.received
    now = shop.client.simulate_get(f"/api/v1/payments/{payment['id']}")
    assert list(told.payment) == [*now.json["payment"], "metadata"]
    assert told.payment == {**now.json["payment"], "metadata": {"order": "1001"}}
    assert b'"amount": 50.50,' in told.body
    assert list(told.json) == ["type", "timestamp", "data"]
    assert told.json["type"] == "payment.completed"
    assert (told.json["data"]["sequence"], told.json["data"]["source"]) == (1, "api")
    made = datetime.fromisoformat(told.json["timestamp"])
    assert timedelta() <= datetime.now(UTC) - made < timedelta(seconds=30)


def test_the_creation_of_a_payment_is_not_told(shop: Shop, merchant: Merchant) -> None:
    shop.created()
    assert deliver(shop) == 0
    assert not rows(shop)
    assert not merchant.received


def test_each_refund_is_told_with_the_sum_so_far(shop: Shop, merchant: Merchant) -> None:
    reference = paid(shop)["reference"]
    for amount in (1000, 500, 3500):
        give_back(shop, reference, amount)
    deliver(shop)
    assert [(each.json["type"], each.payment["refunded_amount"]) for each in merchant.received] == [
        ("payment.completed", 0),
        ("payment.partially_refunded", 10),
        ("payment.partially_refunded", 15),
        ("payment.refunded", 50),
    ]
    assert [each.json["data"]["sequence"] for each in merchant.received] == [1, 2, 3, 4]
    assert [each.payment["status"] for each in merchant.received] == [
        each.removeprefix("payment.") for each in merchant.types
    ]


def test_a_refund_that_fails_after_all_is_told_with_the_lower_sum_and_its_incident(
    shop: Shop, merchant: Merchant
) -> None:
    reference = paid(shop)["reference"]
    give_back(shop, reference, 5000)
    shop.sandbox.move_refund(reference, "failed")
    shop.deliver(reference, "refund.failed")
    poll(shop)
    deliver(shop)
    assert merchant.types == ["payment.completed", "payment.refunded", "payment.refunded", "incident.opened"] or (
        merchant.types == ["payment.completed", "payment.refunded", "incident.opened", "payment.refunded"]
    )
    assert merchant.received[-1].payment["refunded_amount"] == 0


def test_a_payment_that_ends_unpaid_is_told_as_expired(shop: Shop, merchant: Merchant) -> None:
    end_time(shop.database_url, shop.created()["id"])
    poll(shop)
    deliver(shop)
    assert merchant.types == ["payment.expired"]
    assert merchant.received[0].payment["checkout_url"] is None


def test_a_payment_that_ends_after_a_declined_try_is_told_as_failed(shop: Shop, merchant: Merchant) -> None:
    payment = shop.created()
    shop.sandbox.decline(payment["reference"])
    end_time(shop.database_url, payment["id"])
    poll(shop)
    deliver(shop)
    assert merchant.types == ["payment.failed"]


def test_a_declined_try_of_a_payment_that_goes_on_is_not_told(shop: Shop, merchant: Merchant) -> None:
    payment = shop.created()
    shop.sandbox.decline(payment["reference"])
    poll(shop)
    assert shop.get(payment["id"])["status_reason"] is not None
    assert deliver(shop) == 0


def test_a_payment_that_the_provider_refuses_is_told_as_failed(shop: Shop, merchant: Merchant) -> None:
    refusal = {"status": False, "message": "Invalid Email Address Passed", "code": "invalid_email"}
    shop.sandbox.fault("initialize", "answer", effect=False, status=400, body=refusal)
    assert shop.create().status_code == 422
    deliver(shop)
    assert merchant.types == ["payment.failed"]


def test_money_that_is_not_the_price_is_told_as_a_review_and_an_incident(shop: Shop, merchant: Merchant) -> None:
    payment = paid(shop, customer_email="underpaid@example.com")
    deliver(shop)
    assert sorted(merchant.types) == ["incident.opened", "payment.review"]
    opened = next(each for each in merchant.received if each.json["type"] == "incident.opened")
    assert opened.json["data"]["incident"]["kind"] == "mismatch"
    assert opened.json["data"]["incident"]["subject"] == payment["reference"]
    assert isinstance(opened.json["data"]["incident"]["id"], int)
    assert opened.payment["id"] == payment["id"]


def test_an_incident_is_told_once_however_often_it_is_seen(shop: Shop, merchant: Merchant) -> None:
    reference = paid(shop)["reference"]
    shop.sandbox.charge_elsewhere(f"{reference}-2", amount=5000)
    for _ in range(3):
        assert shop.deliver(f"{reference}-2").status_code == 200
    deliver(shop)
    assert merchant.types == ["payment.completed", "incident.opened"]
    assert merchant.received[1].json["data"]["incident"]["kind"] == "second_charge"


def test_an_incident_that_belongs_to_no_payment_is_told_without_one(shop: Shop, merchant: Merchant) -> None:
    reference = "PG-" + "0" * 26
    shop.sandbox.charge_elsewhere(reference)
    shop.deliver(reference)
    deliver(shop)
    (told,) = merchant.received
    assert told.json["type"] == "incident.opened"
    assert told.json["data"]["incident"]["kind"] == "unknown_reference"
    assert "payment" not in told.json["data"]


def test_a_repeated_webhook_is_told_once(shop: Shop, merchant: Merchant) -> None:
    reference = paid(shop)["reference"]
    shop.deliver(reference)
    poll(shop)
    deliver(shop)
    assert merchant.types == ["payment.completed"]


def test_a_notification_says_how_things_stood_and_not_how_they_stand(shop: Shop, merchant: Merchant) -> None:
    reference = paid(shop)["reference"]
    give_back(shop, reference, 5000)
    deliver(shop)
    assert [(each.payment["status"], each.payment["refunded_amount"]) for each in merchant.received] == [
        ("completed", 0),
        ("refunded", 50),
    ]


def test_nothing_is_kept_to_be_told_where_nobody_listens(open_shop: Callable[..., Shop], merchant: Merchant) -> None:
    shop = open_shop()
    give_back(shop, paid(shop)["reference"], 1000)
    assert rows(shop) == []
    later = open_shop(**merchant.settings)
    assert deliver(later) == 0


def test_a_change_and_its_notification_are_one_commit(shop: Shop) -> None:
    payment = paid(shop)
    shop.sql("UPDATE payments SET poll_at = NULL")
    (row,) = shop.sql(
        """
        SELECT n.xmin::text AS notification, e.xmin::text AS change
          FROM notifications n JOIN payment_events e USING (payment_id)
         WHERE payment_id = %s AND e.to_status = 'completed'
        """,
        payment["id"],
    )
    assert row["notification"] == row["change"]


def test_a_change_that_is_rolled_back_leaves_nothing_to_be_told(shop: Shop) -> None:
    payment = shop.created()
    shop.sql("ALTER TABLE notifications ADD CONSTRAINT broken CHECK (type <> 'payment.completed')")
    shop.sandbox.pay(payment["reference"])
    shop.deliver(payment["reference"])
    assert shop.get(payment["id"])["status"] == "pending"
    shop.sql("ALTER TABLE notifications DROP CONSTRAINT broken")
    poll(shop)
    assert shop.get(payment["id"])["status"] == "completed"
    assert [row["type"] for row in rows(shop)] == ["payment.completed"]


def test_of_the_other_mode_nothing_is_told(open_shop: Callable[..., Shop], shop: Shop, merchant: Merchant) -> None:
    paid(shop)
    live = open_shop(
        **merchant.settings, PAYSTACK_SECRET_KEY="sk_live_0123456789abcdef", PUBLIC_URL="https://pay.example.com"
    )
    assert deliver(live) == 0
    assert deliver(shop) == 1


# How it is signed


def test_every_try_has_the_same_id_and_body_and_a_time_of_its_own(shop: Shop, merchant: Merchant) -> None:
    merchant.usual = status(500)
    paid(shop)
    for _ in range(2):
        assert deliver(shop) == 1
        time.sleep(1.01)
        let_pass(shop, 3600)
    tries = merchant.received
    assert len({each.id for each in tries}) == len({each.body for each in tries}) == 1
    assert len({each.headers["webhook-timestamp"] for each in tries}) == 2
    assert len({each.headers["webhook-signature"] for each in tries}) == 2
    assert tries[0].headers["content-type"] == "application/json"


def test_each_notification_has_an_id_of_its_own(shop: Shop, merchant: Merchant) -> None:
    for _ in range(3):
        paid(shop)
    deliver(shop)
    assert len({each.id for each in merchant.received}) == 3


def test_while_one_secret_replaces_another_receivers_that_know_either_one_verify(
    open_shop: Callable[..., Shop], merchant: Merchant
) -> None:
    shop = open_shop(NOTIFY_URL=merchant.url, NOTIFY_SECRET=f"{SECRET},{OTHER_SECRET}")
    paid(shop)
    deliver(shop)
    merchant.secrets = (SECRET, OTHER_SECRET)
    (told,) = merchant.received
    assert len(told.headers["webhook-signature"].split(" ")) == 2
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook("whsec_" + "QUJD" * 11).verify(told.body, told.headers)


# In which order


def test_a_later_change_waits_until_the_earlier_one_was_taken_and_follows_at_once(
    shop: Shop, merchant: Merchant
) -> None:
    reference = paid(shop)["reference"]
    give_back(shop, reference, 1000)
    merchant.answers.append(status(503))
    assert deliver(shop) == 1
    give_back(shop, reference, 1000)
    assert deliver(shop) == 0
    let_pass(shop, 10)
    assert deliver(shop) == 3
    assert merchant.types == ["payment.completed", "payment.completed"] + 2 * ["payment.partially_refunded"]
    assert [each.json["data"]["sequence"] for each in merchant.received] == [1, 1, 2, 3]


def test_other_payments_are_told_while_one_waits(shop: Shop, merchant: Merchant) -> None:
    merchant.answers.append(status(500))
    first, second = paid(shop), paid(shop)
    deliver(shop)
    assert [each.payment["id"] for each in merchant.received] == [first["id"], second["id"]]
    assert [row["delivered_at"] is not None for row in rows(shop)].count(True) == 1


def test_changes_while_their_payment_is_being_told_are_told_once_each_and_in_order(
    shop: Shop, merchant: Merchant
) -> None:
    """Changes and the ends of deliveries meet at the payment's row: none can be made between them and wait for ever."""
    references = [paid(shop, amount=1000)["reference"] for _ in range(4)]
    worker = worker_of(shop)
    stop = threading.Event()

    def deliver_on() -> None:
        while not stop.is_set():
            worker.notify()

    def change(reference: str) -> None:
        for _ in range(4):
            give_back(shop, reference, 100)

    threads = [threading.Thread(target=deliver_on) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        at_once([lambda reference=reference: change(reference) for reference in references])  # type: ignore[misc]
        poll(shop)
        wait_until(lambda: all(row["delivered_at"] for row in rows(shop)))
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
    for reference in references:
        told = [each.json["data"] for each in merchant.received if each.payment["reference"] == reference]
        assert [each["sequence"] for each in told] == list(range(1, len(told) + 1))
        assert told[-1]["payment"]["refunded_amount"] == 4


def test_numbers_go_on_after_what_was_delivered_has_been_pruned(shop: Shop, merchant: Merchant) -> None:
    reference = paid(shop)["reference"]
    deliver(shop)
    shop.sql("DELETE FROM notifications")
    give_back(shop, reference, 1000)
    deliver(shop)
    assert [each.json["data"]["sequence"] for each in merchant.received] == [1, 2]


# What the operator may send again


@pytest.fixture
def till(open_till: Callable[..., Till], merchant: Merchant) -> Till:
    return open_till(**merchant.settings)


def test_the_last_notification_of_a_payment_is_sent_again_under_its_id(
    shop: Shop, merchant: Merchant, till: Till
) -> None:
    reference = paid(shop)["reference"]
    give_back(shop, reference, 1000)
    deliver(shop)
    till.did("notify", reference)
    assert deliver(shop) == 1
    assert merchant.types == ["payment.completed"] + 2 * ["payment.partially_refunded"]
    first, again = merchant.received[1:]
    assert (first.id, first.body) == (again.id, again.body)


def test_all_that_were_never_taken_are_sent_again_in_their_order(shop: Shop, merchant: Merchant, till: Till) -> None:
    merchant.usual = status(500)
    references = [paid(shop)["reference"] for _ in range(3)]
    for reference in references:
        for _ in range(2):
            give_back(shop, reference, 1000)
    for _ in range(3):
        kill_off(shop)
    shop.sandbox.charge_elsewhere("PG-" + "0" * 26)
    shop.deliver("PG-" + "0" * 26)
    kill_off(shop)
    assert {row["dead_at"] is not None for row in rows(shop)} == {True}
    assert deliver(shop) == 0
    merchant.usual = status(204)
    before = len(merchant.received)
    assert "10 to be sent again" in till.did("notify", "--dead")
    assert deliver(shop) == 10
    for reference in references:
        told = [each for each in merchant.received[before:] if each.json["data"].get("payment", {})]
        numbers = [each.json["data"]["sequence"] for each in told if each.payment["reference"] == reference]
        assert numbers == [1, 2, 3]
    assert "none was given up" in till.did("notify", "--dead")


def test_one_that_was_given_up_and_is_sent_again_has_all_its_tries_anew(
    shop: Shop, merchant: Merchant, till: Till
) -> None:
    paid(shop)
    merchant.usual = status(500)
    kill_off(shop)
    till.did("notify", "--dead")
    deliver(shop)
    (row,) = rows(shop)
    assert (row["dead_at"], row["due_at"] is not None, row["tries"]) == (None, True, 1)


def test_what_happens_while_one_is_sent_again_waits_for_it(shop: Shop, merchant: Merchant, till: Till) -> None:
    reference = paid(shop)["reference"]
    merchant.answers.append(status(500))
    kill_off(shop)
    give_back(shop, reference, 1000)
    deliver(shop)
    till.did("notify", "--dead")
    give_back(shop, reference, 1000)
    assert sum(row["due_at"] is not None for row in rows(shop)) == 1
    deliver(shop)
    assert [each.json["data"]["sequence"] for each in merchant.received] == [1, 2, 1, 3]


def test_one_that_waits_its_turn_does_not_jump_the_queue(shop: Shop, merchant: Merchant, till: Till) -> None:
    reference = paid(shop)["reference"]
    merchant.answers.append(status(500))
    deliver(shop)
    give_back(shop, reference, 1000)
    till.did("notify", reference)
    assert deliver(shop) == 0
    let_pass(shop, 10)
    deliver(shop)
    assert merchant.types[1:] == ["payment.completed", "payment.partially_refunded"]


def test_a_test_is_sent_at_once_and_its_answer_is_told(merchant: Merchant, till: Till) -> None:
    assert "204" in till.did("notify", "--test")
    (told,) = merchant.received
    assert (told.json["type"], told.json["data"]) == ("test", {})
    merchant.answers.append(status(503))
    refused = till.run("notify", "--test")
    assert (refused.status, refused.out) == (1, "")
    assert refused.err == "manage.py: the receiver at NOTIFY_URL did not take it: 503\n"


def test_what_cannot_be_sent_again_is_said(shop: Shop, till: Till, open_till: Callable[..., Till]) -> None:
    payment = shop.created()
    unheard = till.run("notify", payment["id"])
    assert unheard.status == 1
    assert "nobody was told" in unheard.err
    assert till.run("notify", "PAY-0").status == 1
    assert till.run("notify").status == 2
    assert till.run("notify", "--dead", payment["id"]).status == 2
    deaf = open_till().run("notify", "--dead")
    assert (deaf.status, deaf.err) == (1, "manage.py: no NOTIFY_URL is set: nobody is told of anything\n")


def test_what_the_operator_does_is_told_too(shop: Shop, merchant: Merchant, till: Till) -> None:
    payment = paid(shop, customer_email="underpaid@example.com")
    deliver(shop)
    till.did("resolve", payment["id"], "accept", "--reason", "close enough")
    deliver(shop)
    assert merchant.types[-1] == "payment.completed"


# When the worker dies


def test_what_a_killed_worker_was_sending_is_sent_again_under_its_id(
    database_url: str, sandbox: Sandbox, merchant: Merchant, tmp_path: Path
) -> None:
    release = threading.Event()
    merchant.answers.append(hang(release))
    env = {**merchant.settings, "WORKER_INTERVAL": "0.1"}
    with Server(database_url, sandbox, tmp_path, **env) as server:
        payment = server.create().json["payment"]
        sandbox.pay(payment["reference"])
        event, headers = sandbox.event(payment["reference"])
        assert server.request("POST", "/api/v1/webhooks/paystack", event, headers).status_code == 200
        wait_until(lambda: len(merchant.received) == 1)
        server.kill()
        release.set()
        assert rows(server)[0]["delivered_at"] is None
        server.start()
        time.sleep(0.5)
        assert len(merchant.received) == 1, "its lease is still alive"
        server.sql("UPDATE notifications SET due_at = due_at - interval '61 s'")
        wait_until(lambda: rows(server)[0]["delivered_at"] is not None)
    first, second = merchant.received
    assert (first.id, first.body) == (second.id, second.body)


@pytest.mark.parametrize("seed", [1])
def test_no_change_is_lost_while_workers_are_killed_again_and_again(
    database_url: str, sandbox: Sandbox, merchant: Merchant, tmp_path: Path, seed: int
) -> None:
    """Ten payments, while gunicorn's worker process is killed every moment: each is told at least once, in order."""
    chance = random.Random(seed)  # noqa: S311
    env = {**merchant.settings, "WORKER_INTERVAL": "0.05"}
    with Server(database_url, sandbox, tmp_path, **env) as server:
        payments = [server.create().json["payment"] for _ in range(10)]
        for payment in payments:
            sandbox.pay(payment["reference"])
        for _ in range(4):
            make_due(database_url)
            time.sleep(chance.uniform(0.05, 0.3))
            for worker in children(server.pid):
                os.kill(worker, signal.SIGKILL)
            server.wait_until_ready()
            server.sql("UPDATE notifications SET due_at = due_at - interval '61 s'")
        make_due(database_url)
        wait_until(lambda: len(rows(server)) == 10 and all(row["delivered_at"] for row in rows(server)))
    assert {each.payment["id"] for each in merchant.received} == {payment["id"] for payment in payments}


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# Two at the same moment


def test_a_notification_is_sent_by_one_worker_at_a_time(shop: Shop) -> None:
    paid(shop)
    with slow_process(shop) as database:
        assert outbox.claim_notification(database, "test", 60) is not None
        assert outbox.claim_notification(shop.app.database, "test", 60) is None


def refund_of(shop: Shop, payment: dict[str, Any]) -> money.Refund:
    """A refund that is processed at the provider; nobody here has heard of it."""
    shop.sandbox.dashboard_refund(payment["reference"], 1000)
    return shop.app.gateway.refund_of_id(shop.sandbox.move_refund(payment["reference"], "processed")["id"])


def test_a_change_while_the_one_before_it_ends_is_told(shop: Shop) -> None:
    refund = refund_of(shop, paid(shop))
    sent = outbox.claim_notification(shop.app.database, "test", 60)
    assert sent is not None
    second_of_two(
        shop,
        lambda database: database.transaction(refunds.apply_refund, "test", refund, "worker"),
        lambda database: database.transaction(outbox.finish_notification, sent, "204", None),
    )
    assert deliver(shop) == 1
    assert all(row["delivered_at"] for row in rows(shop))


def test_a_change_while_the_one_before_it_is_sent_again_waits_for_it(shop: Shop) -> None:
    payment = paid(shop)
    refund = refund_of(shop, payment)
    deliver(shop)
    second_of_two(
        shop,
        lambda database: database.transaction(outbox.send_again, "test", payment["id"]),
        lambda database: database.transaction(refunds.apply_refund, "test", refund, "worker"),
    )
    assert [row["due_at"] is not None for row in rows(shop)] == [True, False]


def test_a_dead_one_that_is_sent_again_is_not_overtaken(shop: Shop, merchant: Merchant, till: Till) -> None:
    reference = paid(shop)["reference"]
    merchant.answers += [status(500), status(500), status(500)]
    kill_off(shop)
    give_back(shop, reference, 1000)
    deliver(shop)  # the second, which fails
    till.did("notify", "--dead")
    deliver(shop)  # the first, which fails again
    let_pass(shop, 10)
    deliver(shop)
    assert [each.json["data"]["sequence"] for each in merchant.received] == [1, 2, 1, 1, 2]


def test_one_that_fails_while_an_earlier_one_is_sent_again_waits_for_it(shop: Shop, till: Till) -> None:
    reference = paid(shop)["reference"]
    shop.sql("UPDATE notifications SET dead_at = now(), due_at = NULL")
    give_back(shop, reference, 1000)
    second = outbox.claim_notification(shop.app.database, "test", 60)
    assert second is not None
    till.did("notify", "--dead")
    shop.app.database.transaction(outbox.finish_notification, second, "500", 5)
    assert [row["due_at"] is not None for row in rows(shop)] == [True, False]
