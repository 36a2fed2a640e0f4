# ruff: noqa: F811  (fixtures are imported by their names)
"""Opening a checkout, whatever the provider answers and whoever else is at it."""

import contextlib
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import charges
import checkout
import money
import paystack
from answers import without_request_id
from backstage import (
    age,
    at_once,
    end_leases,
    incidents,
    initialize_before,
    lose_all_rows,
    meanwhile,
    poll,
    references,
    second_of_two,
    seconds_of,
)
from invariants import check_books, only_payment
from local.sandbox import Sandbox
from shop import PAYMENTS, Server, Shop, open_shop, sandbox, shop, wait_until  # noqa: F401  # fixtures


def disclosed(text: str) -> str:
    """The checkout URL that an answer gives out."""
    return str(json.loads(text)["payment"]["checkout_url"])


def refused_by_provider(shop: Shop, key: str) -> str:
    """A payment that could not be opened because the provider was away: its first reference."""
    shop.sandbox.fault("initialize", "lost-request", times=2)
    assert shop.create(key=key).status_code == 503
    return str(only_payment(shop)["reference"])


def opened_at_last(shop: Shop, key: str) -> dict[str, Any]:
    """The payment, after as many tries as a client may need whose provider ends connections when it likes."""
    answers = [shop.create(key=key)]
    while answers[-1].status_code == 503 and len(answers) < 4:
        assert int(answers[-1].headers["Retry-After"]) >= 1
        assert "payment" not in answers[-1].json
        answers.append(shop.create(key=key))
    assert answers[-1].status_code == 201, [answer.text for answer in answers]
    assert shop.create(key=key).text == answers[-1].text
    return dict(answers[-1].json["payment"])


# One key, one payment


def test_a_payment_is_reserved_opened_and_settled(shop: Shop) -> None:
    answer = shop.create(key="one")
    assert answer.status_code == 201
    payment = only_payment(shop)
    assert (payment["id"], payment["reference"]) == (answer.json["payment"]["id"], answer.json["payment"]["reference"])
    assert disclosed(answer.text) == payment["checkout_url"]
    (asked,) = shop.sandbox.requests()
    assert (asked["endpoint"], asked["body"]["amount"]) == ("initialize", 5000)
    assert asked["body"]["callback_url"].endswith(f"/pay/{payment['id']}")


def test_a_finished_request_is_answered_again_with_the_payment_as_it_stands(shop: Shop) -> None:
    first = shop.create(key="one")
    unpaid = shop.create(key="one")
    assert (unpaid.status_code, unpaid.text) == (201, first.text)
    assert "Idempotent-Replayed" not in first.headers
    shop.pay(first.json["payment"]["reference"])
    again = shop.create(key="one", amount="50.00")
    assert again.status_code == 201
    assert again.json["payment"] == shop.get(first.json["payment"]["id"])
    assert (again.json["payment"]["status"], again.json["payment"]["checkout_url"]) == ("completed", None)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.headers["Location"] == first.headers["Location"]
    assert shop.sandbox.calls("initialize") == 1
    assert only_payment(shop)["status"] == "completed"


def test_a_key_in_flight_is_answered_409_and_with_another_order_422(shop: Shop) -> None:
    shop.sandbox.fault("initialize", "time-out", seconds=0.7)
    with meanwhile(lambda: shop.create(key="one")) as first:
        wait_until(lambda: shop.sandbox.calls("initialize") == 1)
        assert shop.create(key="one", amount=51).status_code == 422
        second = shop.create(key="one")
        assert (second.status_code, second.json["code"]) == (409, "request_in_flight")
        assert int(second.headers["Retry-After"]) >= 1
        assert first().status_code == 201
    assert shop.create(key="one").text == first().text
    assert shop.sandbox.calls("initialize") == 1


def test_a_lease_that_is_over_is_taken_over(open_shop: Callable[..., Shop]) -> None:
    """The first request hangs for ever, as if its process had died."""
    shop = open_shop(LEASE_SECONDS="3", PAYSTACK_TIMEOUT="10")
    shop.sandbox.fault("initialize", "time-out-before", seconds=30)
    with meanwhile(lambda: shop.create(key="one")) as first:
        wait_until(lambda: shop.sandbox.calls("initialize") == 1)
        assert shop.create(key="one").status_code == 409
        end_leases(shop.database_url)
        second = shop.create(key="one")
        assert second.status_code == 201
        assert first().status_code == 503
    assert shop.create(key="one").text == second.text
    assert only_payment(shop)["attempt"] == 1


def test_64_equal_requests_at_once_are_one_payment(database_url: str, sandbox: Sandbox, tmp_path: Path) -> None:
    sizes = {"WEB_CONCURRENCY": "2", "THREADS": "96", "RUN_WORKER": "0"}
    with Server(database_url, sandbox, tmp_path, **sizes) as server:
        for number in range(20):
            key = f"order-{number}"
            answers = at_once([partial(server.create, key=key)] * 64)
            assert {answer.status_code for answer in answers} <= {201, 409}
            assert len({answer.text for answer in answers if answer.status_code == 201}) == 1
            replays = at_once([partial(server.create, key=key)] * 64)
            assert {(answer.status_code, answer.text) for answer in replays} == {
                (201, next(answer.text for answer in answers if answer.status_code == 201))
            }
    payments = check_books(database_url)
    assert len(payments) == 20
    assert {sandbox.calls("initialize", payment["reference"]) for payment in payments} == {1}
    assert sandbox.calls("initialize") == 20


# Ids and references


def test_the_same_key_after_its_rows_were_lost_meets_its_old_transaction(shop: Shop) -> None:
    before = shop.created(key="one")
    lose_all_rows(shop)
    after = shop.created(key="one")
    assert (after["id"], after["reference"]) == (before["id"], f"{before['reference']}-2")
    lose_all_rows(shop)
    shop.sandbox.pay(before["reference"])
    found = shop.created(key="one")
    assert (found["reference"], found["status"], found["checkout_url"]) == (before["reference"], "completed", None)


def test_ids_without_a_key_are_random_and_another_installations_are_others(
    shop: Shop, open_shop: Callable[..., Shop]
) -> None:
    payments = [shop.created(), shop.created(), shop.created(key="one")]
    lose_all_rows(shop)
    shop.sql("SET session_replication_role = replica; UPDATE secrets SET value = sha256('another')")
    payments.append(open_shop().created(key="one"))
    for name in ("id", "reference"):
        assert len({payment[name][4:] for payment in payments}) == 4
    assert not {payment["id"][4:] for payment in payments} & {payment["reference"][3:] for payment in payments}


def test_a_key_used_in_test_mode_starts_anew_in_live_mode(shop: Shop, database_url: str) -> None:
    in_test = shop.created(key="one")
    live_key = "sk_live_0123456789abcdef"
    with (
        Sandbox(secret_key=live_key) as live_sandbox,
        Shop(database_url, live_sandbox, PAYSTACK_SECRET_KEY=live_key, PUBLIC_URL="https://pay.example.com") as live,
    ):
        in_live = live.created(key="one", amount=70)
        assert in_live["mode"] == "live"
        assert in_live["id"] != in_test["id"]
        assert in_live["reference"] != in_test["reference"]
        assert shop.create(key="one").json["payment"]["id"] == in_test["id"]
    assert {payment["mode"] for payment in check_books(database_url)} == {"test", "live"}


# References that exist already


@pytest.mark.parametrize("existing", [1, 2, 8])
def test_references_that_exist_unpaid_are_passed_over(shop: Shop, existing: int) -> None:
    walk = references(refused_by_provider(shop, "one"))
    for reference in walk[:existing]:
        initialize_before(shop.sandbox, reference)
    answer = shop.create(key="one")
    assert answer.status_code == 201
    assert answer.json["payment"]["reference"] == walk[existing] == f"{walk[0]}-{existing + 1}"
    assert [shop.sandbox.calls("verify", reference) for reference in walk] == [1] * existing + [0] * (9 - existing)
    assert shop.sandbox.calls("initialize", walk[existing]) == 1
    shop.pay(walk[0])  # a reference names its payment, each of the nine
    assert only_payment(shop)["status"] == "completed"


def test_references_used_up_are_an_incident_and_lose_no_money(shop: Shop) -> None:
    walk = references(refused_by_provider(shop, "one"))
    for reference in walk:
        initialize_before(shop.sandbox, reference)
    for _ in range(2):
        answer = shop.create(key="one")
        assert (answer.status_code, answer.json["code"]) == (503, "references_used_up")
        assert int(answer.headers["Retry-After"]) >= 1
    assert incidents(shop) == [("references_used_up", only_payment(shop)["id"])]
    assert sum(shop.sandbox.calls("initialize", reference) for reference in walk) == 2 + 9 + 9
    shop.pay(walk[4])
    answer = shop.create(key="one")
    assert (answer.status_code, answer.json["payment"]["status"]) == (201, "completed")
    assert only_payment(shop)["charge_reference"] == walk[4]


def test_a_duplicate_is_known_by_its_words_alone(shop: Shop) -> None:
    reference = refused_by_provider(shop, "one")
    initialize_before(shop.sandbox, reference)
    words = {"status": False, "message": "Duplicate Transaction Reference"}
    shop.sandbox.fault("initialize", "answer", status=400, body=words)
    assert opened_at_last(shop, "one")["reference"] == f"{reference}-2"
    assert shop.sandbox.calls("initialize", reference) == 2 + 1 + 1


@pytest.mark.parametrize("word", ["success", "reversed", "reversal pending"])
def test_a_duplicate_that_is_paid_ends_the_request(shop: Shop, word: str) -> None:
    reference = refused_by_provider(shop, "one")
    initialize_before(shop.sandbox, reference)
    shop.sandbox.pay(reference)
    shop.sandbox.alter(reference, status=word)
    answer = shop.create(key="one")
    payment = answer.json["payment"]
    assert (answer.status_code, payment["status"], payment["checkout_url"]) == (201, "completed", None)
    assert without_request_id(shop.create(key="one")) == without_request_id(answer)
    assert only_payment(shop)["charge_reference"] == reference


@pytest.mark.parametrize("word", ["ongoing", "pending", "processing", "queued", "a new word"])
def test_a_duplicate_on_which_the_customer_is_acting_is_waited_for(shop: Shop, word: str) -> None:
    reference = refused_by_provider(shop, "one")
    initialize_before(shop.sandbox, reference)
    shop.sandbox.alter(reference, status=word)
    assert shop.create(key="one").status_code == 503
    assert shop.create(key="one").status_code == 503
    assert shop.sandbox.calls("initialize", reference) == 2 + 1 + 1  # known to exist, it is only asked about
    shop.sandbox.alter(reference, status="failed")
    assert shop.create(key="one").json["payment"]["reference"] == f"{reference}-2"


def test_a_reference_known_to_exist_is_verified_and_not_initialized_again(shop: Shop) -> None:
    reference = refused_by_provider(shop, "one")
    initialize_before(shop.sandbox, reference)
    opened = shop.sandbox.calls("initialize", reference)
    faults = ["500", "502", "garbage", "lost-answer", "truncated", "no-data", "status-string", "429", "other-reference"]
    for fault in faults:
        shop.sandbox.fault("verify", fault)
        answer = shop.create(key="one")
        assert (answer.status_code, answer.json["code"]) == (503, "provider_unavailable"), fault
    assert shop.sandbox.calls("initialize", reference) == opened + 1
    assert shop.create(key="one").json["payment"]["reference"] == f"{reference}-2"
    assert shop.sandbox.calls("initialize", reference) == opened + 1


def test_a_duplicate_that_cannot_be_found_is_asked_about_again(shop: Shop) -> None:
    """The provider's own copies may be behind one another for a moment."""
    reference = refused_by_provider(shop, "one")
    initialize_before(shop.sandbox, reference)
    shop.sandbox.fault("verify", "not-found", times=2)
    assert [shop.create(key="one").status_code for _ in range(3)] == [503, 503, 201]
    assert only_payment(shop)["attempt"] == 2


def test_each_retry_gets_further_while_one_call_fits_the_budget(open_shop: Callable[..., Shop]) -> None:
    shop = open_shop(PAYSTACK_TIMEOUT="2", LEASE_SECONDS="3")
    reference = refused_by_provider(shop, "one")
    initialize_before(shop.sandbox, reference)
    shop.sandbox.configure(latency_seconds=1.05)
    calls = shop.sandbox.calls("initialize", reference)
    assert [shop.create(key="one").status_code for _ in range(3)] == [503, 503, 201]
    assert shop.sandbox.calls("initialize", reference) == calls + 1
    assert shop.sandbox.calls("verify", reference) == 1
    assert only_payment(shop)["attempt"] == 2


# Answers that say nothing

QUICK_FAULTS = [
    *("lost-request", "lost-answer", "500", "502", "503", "garbage", "truncated", "huge", "redirect"),
    *("status-string", "status-missing", "no-data", "foreign-url", "http-url", "no-url", "other-reference"),
]
WAITING_FAULTS = ["429", "429-retry-after"]


@pytest.mark.parametrize("fault", QUICK_FAULTS + WAITING_FAULTS)
def test_an_unknown_answer_costs_nothing_with_the_same_key(shop: Shop, fault: str) -> None:
    """Whether the call took effect or not, once or twice: one payment, and one URL, at which it can be paid."""
    for has_effect in (False, True):
        for times in (1, 2):
            calls = shop.sandbox.calls("initialize")
            shop.sandbox.fault("initialize", fault, times=times, effect=has_effect, size=5 << 20)
            payment = opened_at_last(shop, f"{has_effect}-{times}")
            assert payment["reference"].endswith("-2") == has_effect
            assert payment["checkout_url"].startswith(f"{shop.sandbox.url}/checkout/")
            assert shop.sandbox.calls("initialize") - calls <= times + (2 if has_effect else 1)
            shop.pay(payment["reference"])
            assert shop.get(payment["id"])["status"] == "completed"
    check_books(shop.database_url)
    assert shop.sandbox.calls("elsewhere") == 0


def test_an_unknown_answer_is_asked_for_once_more_in_the_same_request(shop: Shop) -> None:
    shop.sandbox.fault("initialize", "lost-request")
    assert shop.created(key="one")["reference"] == only_payment(shop)["reference"]
    assert shop.sandbox.calls("initialize") == 2
    shop.sandbox.fault("initialize", "lost-request", times=None)
    assert shop.create(key="two").status_code == 503
    assert shop.sandbox.calls("initialize") == 4


def test_who_is_asked_to_wait_is_told_how_long(shop: Shop) -> None:
    shop.sandbox.fault("initialize", "429-retry-after", retry_after=17)
    answer = shop.create(key="one")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "17")
    assert shop.sandbox.calls("initialize") == 1
    shop.sandbox.fault("initialize", "429")
    assert (shop.create(key="two").status_code, shop.sandbox.calls("initialize")) == (503, 2)
    opened_at_last(shop, "one")


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, {"status": False, "message": "Invalid key"}),
        (403, {"status": False, "message": "Your IP address is not allowed to make this call", "type": "api_error"}),
        (400, {"status": False, "message": "Currency not supported by merchant", "code": "unsupported_currency"}),
        (400, {"status": False, "message": "Merchant may not accept payments", "code": "inactive_merchant"}),
    ],
)
def test_a_refusal_of_our_own_set_up_is_502_and_uses_nothing_up(
    shop: Shop, caplog: pytest.LogCaptureFixture, status: int, body: dict[str, Any]
) -> None:
    shop.sandbox.fault("initialize", "answer", effect=False, status=status, body=body)
    answer = shop.create(key="one")
    assert (answer.status_code, answer.json["code"]) == (502, "provider_misconfigured")
    assert int(answer.headers["Retry-After"]) >= 1
    assert any(record.levelname == "ERROR" for record in caplog.records)
    assert opened_at_last(shop, "one")["reference"] == only_payment(shop)["reference"]
    assert shop.sandbox.calls("initialize") == 2


@pytest.mark.parametrize(
    ("message", "field", "shown"),
    [
        ("Invalid Email Address Passed", "customer_email", "Invalid Email Address Passed"),
        ("Invalid Email john@example.com Passed", "customer_email", "Invalid Email Passed"),  # never a person's address
        ("Invalid Amount Sent", "amount", "Invalid Amount Sent"),
    ],
)
def test_a_customer_whom_the_provider_refuses_is_told_so_once_and_for_all(
    shop: Shop, message: str, field: str, shown: str
) -> None:
    body = {"status": False, "message": message, "type": "validation_error"}
    shop.sandbox.fault("initialize", "answer", effect=False, status=400, body=body)
    answer = shop.create(key="one")
    assert (answer.status_code, answer.json["code"]) == (422, "provider_refused")
    assert answer.json["errors"] == {field: [shown]}
    again = shop.create(key="one")
    assert (again.status_code, again.headers["Idempotent-Replayed"]) == (422, "true")
    assert without_request_id(again) == without_request_id(answer)
    assert shop.sandbox.calls("initialize") == 1
    payment = shop.get(only_payment(shop)["id"])
    assert (payment["status"], payment["status_reason"], payment["checkout_url"]) == ("failed", shown, None)


def test_a_customer_refused_at_a_later_reference_by_a_retry_keeps_that_one(shop: Shop) -> None:
    walk = references(refused_by_provider(shop, "one"))
    initialize_before(shop.sandbox, walk[0])
    shop.sandbox.fault("initialize", "lost-request", times=2, prefix=walk[1])
    assert shop.create(key="one").status_code == 503
    body = {"status": False, "message": "Invalid Email Address Passed", "type": "validation_error"}
    shop.sandbox.fault("initialize", "answer", effect=False, status=400, body=body, prefix=walk[1])
    assert shop.create(key="one").json["code"] == "provider_refused"
    payment = shop.get(only_payment(shop)["id"])
    assert (payment["status"], payment["reference"]) == ("failed", walk[1])


# How long it may take


@pytest.mark.parametrize("fault", ["time-out", "time-out-before", "drip", "drip-body"])
def test_a_provider_that_hangs_ends_a_request_in_time(open_shop: Callable[..., Shop], fault: str) -> None:
    shop = open_shop(PAYSTACK_TIMEOUT="1")
    shop.sandbox.fault("initialize", fault, times=None, seconds=20)
    answer, took_seconds = seconds_of(lambda: shop.create(key="one"))
    assert (answer.status_code, answer.json["code"]) == (503, "provider_unavailable")
    assert took_seconds < 1.5 * 1 + 1 + 0.4
    assert shop.sandbox.calls("initialize") == 2
    assert shop.sql("SELECT leased_until FROM idempotency_keys") == [{"leased_until": None}]
    shop.sandbox.clear_faults()
    assert opened_at_last(shop, "one")["reference"].endswith("-2") == (fault != "time-out-before")
    only_payment(shop)


def test_no_call_begins_with_less_than_a_second_left(open_shop: Callable[..., Shop]) -> None:
    """The lease of 3 seconds allows 2 for the provider, and the first call takes more than one of them."""
    shop = open_shop(PAYSTACK_TIMEOUT="10", LEASE_SECONDS="3")
    shop.sandbox.fault("initialize", "time-out-before", times=None, seconds=1.1)
    assert shop.create(key="one").status_code == 503
    assert shop.sandbox.calls("initialize") == 1


def test_no_call_outlasts_the_lease(open_shop: Callable[..., Shop]) -> None:
    shop = open_shop(PAYSTACK_TIMEOUT="10", LEASE_SECONDS="3")
    shop.sandbox.fault("initialize", "time-out-before", times=None, seconds=20)
    answer, took_seconds = seconds_of(lambda: shop.create(key="one"))
    assert answer.status_code == 503
    assert took_seconds < 9


def sockets_of(pid: str) -> int:
    count = 0
    for each in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            count += str(each.readlink()).startswith("socket:")
    return count


def test_a_provider_that_hangs_stops_neither_reads_nor_webhooks_nor_replays(
    database_url: str, sandbox: Sandbox, tmp_path: Path
) -> None:
    """Three of the four threads wait for the provider, and others want to."""
    sizes = {"WEB_CONCURRENCY": "1", "THREADS": "4", "RUN_WORKER": "0", "PAYSTACK_TIMEOUT": "2"}
    with Server(database_url, sandbox, tmp_path, **sizes) as server:
        finished = server.create(key="finished")
        payment = finished.json["payment"]
        sandbox.pay(payment["reference"])
        body, headers = sandbox.event(payment["reference"])
        sandbox.fault("initialize", "time-out-before", times=None, seconds=30)
        hanging = [partial(server.create, key=f"hangs-{number}") for number in range(3)]
        with meanwhile(lambda: at_once(hanging)) as hung:
            wait_until(lambda: sandbox.calls("initialize") == 4)
            begun, number = time.monotonic(), 0
            while time.monotonic() - begun < 1:
                number += 1
                refused = server.create(key=f"more-{number}")
                assert (refused.status_code, refused.json["code"]) == (503, "busy")
                assert int(refused.headers["retry-after"]) >= 1
                assert server.create(key="finished").text == finished.text
                assert server.create(key="hangs-0").status_code == 409
                assert server.request("GET", f"{PAYMENTS}/{payment['id']}").status_code == 200
            assert server.request("POST", "/api/v1/webhooks/paystack", body, headers).status_code == 200
            assert server.request("GET", f"{PAYMENTS}/{payment['id']}").json["payment"]["status"] == "completed"
            assert sandbox.calls("initialize") == 4
            assert {answer.status_code for answer in hung()} == {503}
        sandbox.clear_faults()
        assert server.create(key="more-1").status_code == 201
        assert server.create(key="hangs-0").status_code == 201
    check_books(database_url)


# Two at one payment


def test_a_webhook_before_the_answer_of_initialize_is_believed(shop: Shop) -> None:
    shop.sandbox.fault("initialize", "time-out", seconds=0.8)
    with meanwhile(lambda: shop.create(key="one")) as answer:
        wait_until(shop.sandbox.transactions)
        reference = shop.sandbox.transactions()[0]["reference"]
        shop.pay(reference)
        assert only_payment(shop)["status"] == "completed"
        payment = answer().json["payment"]
    assert answer().status_code == 201
    assert (payment["status"], payment["checkout_url"], payment["reference"]) == ("completed", None, reference)
    assert shop.create(key="one").text == answer().text
    assert only_payment(shop)["checkout_url"] is None


def test_money_before_the_answer_of_initialize_is_found_later(shop: Shop) -> None:
    payment = shop.created(customer_email="paid-at-once@example.com")
    assert (payment["status"], payment["checkout_url"] is None) == ("pending", False)
    poll(shop)
    assert shop.get(payment["id"])["status"] == "completed"


def test_who_lost_the_lease_throws_its_url_away_and_answers_as_the_winner(shop: Shop) -> None:
    shop.sandbox.fault("initialize", "time-out", seconds=0.8)
    with meanwhile(lambda: shop.create(key="one")) as slow:
        wait_until(shop.sandbox.transactions)
        end_leases(shop.database_url)
        quick = shop.create(key="one")
        assert quick.status_code == 201
        assert quick.json["payment"]["reference"].endswith("-2")
        assert (slow().status_code, slow().text) == (201, quick.text)
    urls = {row["checkout_url"] for row in shop.sql("SELECT checkout_url FROM payments")}
    assert urls == {disclosed(quick.text)}
    only_payment(shop)


def test_who_lost_the_lease_to_one_that_is_still_at_it_answers_409(shop: Shop) -> None:
    shop.sandbox.fault("initialize", "time-out", seconds=0.8)
    with meanwhile(lambda: shop.create(key="one")) as slow:
        wait_until(shop.sandbox.transactions)
        end_leases(shop.database_url)
        shop.sandbox.fault("verify", "time-out", seconds=1.2)
        with meanwhile(lambda: shop.create(key="one")) as winner:
            assert (slow().status_code, slow().json["code"]) == (409, "request_in_flight")
            assert shop.sql("SELECT checkout_url FROM payments") == [{"checkout_url": None}]
            assert winner().status_code == 201
    assert shop.create(key="one").text == winner().text
    only_payment(shop)


def test_who_lost_the_lease_gives_nothing_back(shop: Shop) -> None:
    """Its late failure ends neither the winner's lease nor what the winner has learned."""
    shop.sandbox.fault("initialize", "time-out-before", seconds=0.6)
    shop.sandbox.fault("initialize", "500")
    with meanwhile(lambda: shop.create(key="one")) as slow:
        wait_until(lambda: shop.sandbox.calls("initialize") == 1)
        end_leases(shop.database_url)
        shop.sandbox.clear_faults()
        shop.sandbox.fault("initialize", "time-out", seconds=1.6)
        with meanwhile(lambda: shop.create(key="one")) as winner:
            wait_until(lambda: shop.sandbox.calls("initialize") == 2)
            shop.sandbox.fault("initialize", "429")
            assert slow().status_code == 503
            assert shop.create(key="one").status_code == 409
            assert winner().status_code == 201
    assert only_payment(shop)["attempt"] == 1


def test_a_retry_of_a_payment_that_was_paid_meanwhile_asks_nobody(shop: Shop) -> None:
    reference = refused_by_provider(shop, "one")
    initialize_before(shop.sandbox, reference)
    shop.pay(reference)
    answer = shop.create(key="one")
    payment = answer.json["payment"]
    assert (answer.status_code, payment["status"], payment["checkout_url"]) == (201, "completed", None)
    assert without_request_id(shop.create(key="one")) == without_request_id(answer)
    assert (shop.sandbox.calls("initialize"), shop.sandbox.calls("verify")) == (2 + 1, 0)


def test_a_retry_after_the_time_is_over_gets_no_checkout(shop: Shop) -> None:
    reference = refused_by_provider(shop, "one")
    age(shop.database_url, None, 25 * 3600)
    answer = shop.create(key="one")
    assert (answer.status_code, answer.json["code"]) == (422, "payment_expired")
    assert without_request_id(shop.create(key="one")) == without_request_id(answer)
    assert shop.sandbox.calls("initialize", reference) == 2
    poll(shop)
    assert only_payment(shop)["status"] == "expired"


def test_a_retry_after_the_payment_ended_gets_no_checkout(shop: Shop) -> None:
    reference = refused_by_provider(shop, "one")
    age(shop.database_url, None, 25 * 3600)
    poll(shop)
    assert only_payment(shop)["status"] == "expired"
    answer = shop.create(key="one")
    assert (answer.status_code, answer.json["code"]) == (422, "payment_expired")
    assert without_request_id(shop.create(key="one")) == without_request_id(answer)
    assert shop.sandbox.calls("initialize", reference) == 2


def test_money_that_comes_while_the_answer_is_stored_gives_out_no_url(shop: Shop) -> None:
    order = checkout.Order("Jane Doe", "jane@example.com", "+2348012345678", 5000, "Lagos", "NGN")
    reserved = checkout.reserve(shop.app.office, checkout.key_of("one"), order)
    shop.sandbox.charge_elsewhere(reserved.payment.reference, amount=5000)
    charge = shop.app.gateway.verify(reserved.payment.reference, 10)
    assert isinstance(charge, money.Charge)
    settled = second_of_two(
        shop,
        lambda database: database.transaction(charges.apply_charge, charge, "webhook"),
        lambda database: database.transaction(
            checkout.settle, reserved, paystack.Opened("https://checkout.paystack.com/x")
        ),
    )
    assert (settled.payment.status, settled.payment.checkout_url) == ("completed", None)
