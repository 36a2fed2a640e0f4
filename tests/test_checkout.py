# ruff: noqa: F811  (fixtures are imported by their names)
"""Opening a checkout, whatever the provider answers and whoever else is at it; what becomes of money that comes."""

import contextlib
import http.client
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from backstage import (
    age,
    at_once,
    end_leases,
    initialize_before,
    look,
    meanwhile,
    references,
    seconds_of,
    worker_of,
)
from invariants import check_books
from sandbox import Sandbox
from shop import PAYMENTS, SECRET_KEY, Server, Shop, open_shop, query, sandbox, shop, wait_until  # noqa: F401


def only_payment(shop: Shop) -> dict[str, Any]:
    """The one payment that there is, as its row stands, after the books have been checked."""
    (payment,) = check_books(shop.database_url)
    return payment


def incidents(shop: Shop) -> list[tuple[str, str]]:
    return [(row["kind"], row["subject"]) for row in shop.sql("SELECT kind, subject FROM incidents ORDER BY id")]


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


def test_a_finished_request_is_answered_again_as_it_was(shop: Shop) -> None:
    first = shop.create(key="one")
    shop.pay(first.json["payment"]["reference"])
    again = shop.create(key="one", amount="50.00")
    assert (again.status_code, again.text) == (201, first.text)
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


def lose_all_rows(shop: Shop) -> None:
    """As after a failover to a standby that had not heard of them yet. The secret is older, and stays."""
    tables = [row["tablename"] for row in shop.sql("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]
    lost = [f"DELETE FROM {name};" for name in tables if name not in ("secrets", "migrations")]  # noqa: S608
    shop.sql("SET session_replication_role = replica; " + " ".join(lost))


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
    assert shop.create(key="one").text == answer.text
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
    ("message", "field"),
    [("Invalid Email Address Passed", "customer_email"), ("Invalid Amount Sent", "amount")],
)
def test_a_customer_whom_the_provider_refuses_is_told_so_once_and_for_all(shop: Shop, message: str, field: str) -> None:
    body = {"status": False, "message": message, "type": "validation_error"}
    shop.sandbox.fault("initialize", "answer", effect=False, status=400, body=body)
    answer = shop.create(key="one")
    assert (answer.status_code, answer.json["code"]) == (422, "provider_refused")
    assert answer.json["errors"] == {field: [message]}
    again = shop.create(key="one")
    assert (again.status_code, again.text, again.headers["Idempotent-Replayed"]) == (422, answer.text, "true")
    assert shop.sandbox.calls("initialize") == 1
    payment = shop.get(only_payment(shop)["id"])
    assert (payment["status"], payment["status_reason"], payment["checkout_url"]) == ("failed", message, None)


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
    answer, took_seconds = seconds_of(lambda: shop.create(key="one"))
    assert answer.status_code == 503
    assert shop.sandbox.calls("initialize") == 1
    assert took_seconds < 1.7


def test_no_call_outlasts_the_lease(open_shop: Callable[..., Shop]) -> None:
    shop = open_shop(PAYSTACK_TIMEOUT="10", LEASE_SECONDS="3")
    shop.sandbox.fault("initialize", "time-out-before", times=None, seconds=20)
    answer, took_seconds = seconds_of(lambda: shop.create(key="one"))
    assert answer.status_code == 503
    assert took_seconds < 2.5


@pytest.mark.skipif(sys.platform != "linux", reason="counts the sockets of a process in Linux's /proc")
def test_clients_that_keep_their_connections_are_shared_out_among_the_processes(
    database_url: str, sandbox: Sandbox, tmp_path: Path
) -> None:
    """Else one process has its bulkhead full while another has little to do."""
    sizes = {"WEB_CONCURRENCY": "2", "THREADS": "16", "RUN_WORKER": "0"}
    with Server(database_url, sandbox, tmp_path, **sizes) as server, contextlib.ExitStack() as stack:
        master = server.process.pid
        processes = Path(f"/proc/{master}/task/{master}/children").read_text().split()
        before = [sockets_of(pid) for pid in processes]
        clients = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=10) for _ in range(120)]
        for client in clients:
            stack.callback(client.close)
            client.request("GET", "/healthz")
        for client in clients:
            client.getresponse().read()
        assert min(sockets_of(pid) - had for pid, had in zip(processes, before, strict=True)) >= 30


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
    look(shop)
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
    assert shop.create(key="one").text == answer.text
    assert (shop.sandbox.calls("initialize"), shop.sandbox.calls("verify")) == (2 + 1, 0)


def test_a_retry_after_the_time_is_over_gets_no_checkout(shop: Shop) -> None:
    reference = refused_by_provider(shop, "one")
    age(shop.database_url, None, 25 * 3600)
    answer = shop.create(key="one")
    assert (answer.status_code, answer.json["code"]) == (422, "payment_expired")
    assert shop.create(key="one").text == answer.text
    assert shop.sandbox.calls("initialize", reference) == 2
    look(shop)
    assert only_payment(shop)["status"] == "expired"


def test_a_retry_after_the_payment_ended_gets_no_checkout(shop: Shop) -> None:
    reference = refused_by_provider(shop, "one")
    age(shop.database_url, None, 25 * 3600)
    look(shop)
    assert only_payment(shop)["status"] == "expired"
    answer = shop.create(key="one")
    assert (answer.status_code, answer.json["code"]) == (422, "payment_expired")
    assert shop.create(key="one").text == answer.text
    assert shop.sandbox.calls("initialize", reference) == 2


# Money that comes


def two_references(shop: Shop) -> tuple[str, str]:
    """A payment of which a first answer was lost: both its transactions can be paid."""
    shop.sandbox.fault("initialize", "lost-answer")
    second = shop.created(key="one")["reference"]
    return second.removesuffix("-2"), second


@pytest.mark.parametrize("customer", ["john", "overpaid", "pays-fees", "no-requested-amount", "metadata-string"])
def test_a_payment_paid_in_full_is_completed(shop: Shop, customer: str) -> None:
    payment = shop.created(customer_email=f"{customer}@example.com")
    shop.pay(payment["reference"])
    told = shop.get(payment["id"])
    assert (told["status"], told["checkout_url"], told["amount"]) == ("completed", None, 50.0)
    assert told["paid_at"] is not None
    row = only_payment(shop)
    assert (row["charged_minor"] > 5000) == (customer in ("overpaid", "pays-fees"))
    assert incidents(shop) == []


@pytest.mark.parametrize(
    ("customer", "altered"),
    [
        ("underpaid", {}),
        ("other-currency", {}),
        ("john", {"requested_amount": 4000, "amount": 4000}),
        ("john", {"requested_amount": 6000, "amount": 6000}),
        ("no-requested-amount", {"amount": 4999}),
    ],
)
def test_money_that_differs_from_the_price_is_put_before_a_person(
    shop: Shop, customer: str, altered: dict[str, Any]
) -> None:
    payment = shop.created(customer_email=f"{customer}@example.com")
    shop.sandbox.pay(payment["reference"])
    shop.sandbox.alter(payment["reference"], **altered)
    for _ in range(2):
        assert shop.deliver(payment["reference"]).status_code == 200
        told = shop.get(payment["id"])
        assert (told["status"], told["paid_at"]) == ("review", None)
        assert "the price is 50.00 NGN" in told["status_reason"]
    assert incidents(shop) == [("mismatch", payment["reference"])]
    look(shop)
    assert only_payment(shop)["status"] == "review"


def test_an_event_of_the_other_mode_is_stored_and_not_applied(shop: Shop) -> None:
    payment = shop.created(customer_email="live-domain@example.com")
    shop.pay(payment["reference"])
    look(shop)
    assert only_payment(shop)["status"] == "pending"
    assert shop.sql("SELECT outcome, body IS NULL AS bare FROM provider_events") == [
        {"outcome": "other_mode", "bare": False}
    ]
    assert shop.sql("SELECT * FROM charges") == []


@pytest.mark.parametrize("first", [0, 1])
def test_a_second_charge_opens_an_incident_and_changes_nothing_else(shop: Shop, first: int) -> None:
    both = two_references(shop)
    own, other = both[first], both[1 - first]
    shop.pay(own)
    before = only_payment(shop)
    shop.pay(other)
    shop.deliver(other)
    shop.deliver(own)
    assert only_payment(shop) == before
    assert before["charge_reference"] == own
    assert incidents(shop) == [("second_charge", other)]
    assert len(shop.sql("SELECT * FROM charges")) == 2


def test_a_whole_second_charge_does_not_complete_a_payment_under_review(shop: Shop) -> None:
    first, second = two_references(shop)
    shop.pay(first, amount=4000)
    shop.pay(second)
    assert only_payment(shop)["status"] == "review"
    assert incidents(shop) == [("mismatch", first), ("second_charge", second)]


@pytest.mark.parametrize("ended", ["failed", "expired"])
def test_money_that_comes_late_counts(shop: Shop, ended: str) -> None:
    payment = shop.created()
    if ended == "failed":
        shop.sandbox.decline(payment["reference"])
    age(shop.database_url, None, 25 * 3600)
    look(shop)
    assert shop.get(payment["id"])["status"] == ended
    shop.pay(payment["reference"])
    told = shop.get(payment["id"])
    assert (told["status"], told["status_reason"]) == ("completed", None)
    only_payment(shop)


@pytest.mark.parametrize("word", ["reversed", "reversal pending"])
def test_reversed_means_that_money_came(shop: Shop, word: str) -> None:
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    shop.sandbox.alter(payment["reference"], status=word)
    look(shop)
    assert only_payment(shop)["status"] == "completed"


def test_an_event_of_money_that_cannot_be_read_makes_us_ask_at_once(shop: Shop) -> None:
    payment, other = shop.created(), shop.created()
    shop.sandbox.pay(payment["reference"])
    shop.sandbox.pay(other["reference"])
    shop.sql("UPDATE payments SET look_at = now() + interval '1 day'")
    assert shop.deliver(payment["reference"], amount="much").status_code == 200
    worker_of(shop).look()
    assert [shop.get(each["id"])["status"] for each in (payment, other)] == ["completed", "pending"]
    before = check_books(shop.database_url)
    shop.deliver(payment["reference"], amount="more")
    assert check_books(shop.database_url) == before


def test_money_for_a_reference_of_ours_that_nobody_knows_is_an_incident(shop: Shop) -> None:
    lost = "PG-0123456789ABCDEFGHJKMNPQRS"
    for reference in (lost, f"{lost}-3"):
        shop.sandbox.charge_elsewhere(reference)
        for _ in range(2):
            assert shop.deliver(reference).status_code == 200
    assert incidents(shop) == [("unknown_reference", lost), ("unknown_reference", f"{lost}-3")]
    assert shop.sql("SELECT DISTINCT outcome, deliveries FROM provider_events") == [
        {"outcome": "noted", "deliveries": 2}
    ]


def test_an_event_that_came_before_its_payment_was_known_is_applied_when_it_comes_again(shop: Shop) -> None:
    """Seen is not handled: the rows were lost, the event came, and then the customer's shop tried again."""
    reference = shop.created(key="one")["reference"]
    lose_all_rows(shop)
    shop.sandbox.pay(reference)
    assert shop.deliver(reference).status_code == 200
    shop.sandbox.fault("initialize", "lost-request", times=2)
    assert shop.create(key="one").status_code == 503
    shop.deliver(reference)
    assert only_payment(shop)["status"] == "completed"


def test_another_shops_money_on_the_same_account_is_not_ours(shop: Shop) -> None:
    shop.sandbox.charge_elsewhere("T000000000000001")
    assert shop.deliver("T000000000000001").status_code == 200
    assert shop.sql("SELECT outcome, reference, body FROM provider_events") == [
        {"outcome": "foreign", "reference": "T000000000000001", "body": None}
    ]
    assert incidents(shop) == []


def test_a_dispute_is_put_before_a_person(shop: Shop) -> None:
    payment = shop.created()
    shop.pay(payment["reference"])
    shop.sandbox.dispute(payment["reference"])
    for event in ("charge.dispute.create", "charge.dispute.remind"):
        assert shop.deliver(payment["reference"], event).status_code == 200
    assert incidents(shop) == [("dispute", payment["reference"])]
    assert only_payment(shop)["status"] == "completed"
    assert shop.deliver(payment["reference"], "charge.dispute.resolve").status_code == 200
    assert shop.sql("SELECT kind, closed_by FROM incidents") == [{"kind": "dispute", "closed_by": "webhook"}]
    assert shop.sql("SELECT refunds_awaited_since FROM payments") == [{"refunds_awaited_since": None}]
