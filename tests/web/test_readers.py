# ruff: noqa: F811  (fixtures are imported by their names)
"""Those who read a payment: `Prefer: wait` holds an answer until there is news, and reading makes the worker look."""

import time
from collections.abc import Callable
from pathlib import Path

import falcon.testing
import pytest
from psycopg.conninfo import conninfo_to_dict

from backstage import at_once, end_time, meanwhile, poll, seconds_of, worker_of
from local.sandbox import Sandbox
from shop import PAYMENTS, Server, Shop, open_shop, query, sandbox, shop, wait_until  # noqa: F401


def wait_for(shop: Shop, payment_id: str, prefer: str) -> tuple[falcon.testing.Result, float]:
    """The answer to a GET with `Prefer`, and how many seconds it took."""
    headers = {"Prefer": prefer}
    return seconds_of(lambda: shop.client.simulate_get(f"{PAYMENTS}/{payment_id}", headers=headers))


# The wait


def test_an_answer_is_held_until_the_payment_is_paid(shop: Shop) -> None:
    payment = shop.created()
    with meanwhile(lambda: wait_for(shop, payment["id"], "wait=20")) as waited:
        time.sleep(0.5)
        shop.pay(payment["reference"])
        answer, seconds = waited()
    assert answer.json["payment"]["status"] == "completed"
    assert answer.headers["Preference-Applied"] == "wait=20"
    assert 0.5 <= seconds < 15


def test_an_answer_is_held_until_the_payment_has_failed(shop: Shop) -> None:
    payment = shop.created()
    shop.sandbox.decline(payment["reference"])
    end_time(shop.database_url, payment["id"])
    with meanwhile(lambda: wait_for(shop, payment["id"], "wait=20")) as waited:
        poll(shop)
        answer, seconds = waited()
    assert answer.json["payment"]["status"] == "failed"
    assert seconds < 15


def test_an_answer_comes_after_the_time_that_was_asked_for(shop: Shop) -> None:
    answer, seconds = wait_for(shop, shop.created()["id"], "wait=1")
    assert answer.json["payment"]["status"] == "pending"
    assert answer.headers["Preference-Applied"] == "wait=1"
    assert 1 <= seconds < 15


def test_who_waits_for_no_time_is_answered_at_once(shop: Shop) -> None:
    answer, seconds = wait_for(shop, shop.created()["id"], "wait=0")
    assert answer.headers["Preference-Applied"] == "wait=0"
    assert seconds < 15


def test_of_a_payment_that_has_come_to_an_end_there_is_nothing_to_wait_for(shop: Shop) -> None:
    """The change that a client waits for may have been a moment before its request."""
    payment = shop.created()
    shop.pay(payment["reference"])
    answer, seconds = wait_for(shop, payment["id"], "wait=20")
    assert answer.json["payment"]["status"] == "completed"
    assert "Preference-Applied" not in answer.headers
    assert seconds < 15


@pytest.mark.parametrize("prefer", ["wait=31", "wait=99999999999", "wait=" + "9" * 5000, "wait=0000000000031"])
def test_above_30_seconds_it_is_30(shop: Shop, prefer: str) -> None:
    payment = shop.created()
    with meanwhile(lambda: wait_for(shop, payment["id"], prefer)) as waited:
        wait_until(lambda: shop.app.readers.waiting)
        shop.app.readers.stop()
        answer, _ = waited()
    assert answer.headers["Preference-Applied"] == "wait=30"


@pytest.mark.parametrize(
    "prefer",
    ["wait=0", "WAIT = 0", 'wait="0"', "wait=000", "respond-async, wait=0", "wait=0; x=y, z", "foo=bar,wait=0,"],
)
def test_the_preference_may_be_written_in_every_way_that_rfc_7240_allows(shop: Shop, prefer: str) -> None:
    assert wait_for(shop, shop.created()["id"], prefer)[0].headers["Preference-Applied"] == "wait=0"


@pytest.mark.parametrize(
    "prefer",
    ["", "wait", "wait=", "wait=-5", "wait=5.5", "wait=5s", "wait=five", "await=5", "foo; wait=5", "wait=５", "wait 5"],
)
def test_a_malformed_preference_is_ignored(shop: Shop, prefer: str) -> None:
    headers = {"Prefer": prefer.encode().decode("latin-1")}
    answer, seconds = seconds_of(
        lambda: shop.client.simulate_get(f"{PAYMENTS}/{shop.created()['id']}", headers=headers)
    )
    assert answer.status_code == 200
    assert "Preference-Applied" not in answer.headers
    assert seconds < 4.5


def test_waiting_for_a_payment_that_there_is_not_is_404_at_once(shop: Shop) -> None:
    answer, seconds = wait_for(shop, "PAY-" + "0" * 26, "wait=20")
    assert answer.status_code == 404
    assert seconds < 15


# Many who wait


def test_one_query_a_second_serves_all_who_wait(open_shop: Callable[..., Shop]) -> None:
    shop = open_shop(THREADS="400")
    payments = [shop.created() for _ in range(5)]
    wait_until(lambda: shop.app.readers.thread is None, within_seconds=5)
    before = transactions(shop)
    answers = at_once([lambda n=n: wait_for(shop, payments[n % 5]["id"], "wait=2")[0] for n in range(50)])  # type: ignore[misc]
    assert {answer.headers["Preference-Applied"] for answer in answers} == {"wait=2"}
    reads = 2 * len(answers)
    assert transactions(shop) - before <= reads + 10


def transactions(shop: Shop) -> int:
    """How many the database has committed; what backends have not reported yet is waited for."""
    time.sleep(1.2)
    statement = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
    return int(shop.sql(statement)[0]["xact_commit"])


def test_each_who_waits_is_told_of_his_own_payment(open_shop: Callable[..., Shop]) -> None:
    shop = open_shop(THREADS="100")
    paid, unpaid = shop.created(), shop.created()
    with (
        meanwhile(lambda: wait_for(shop, paid["id"], "wait=20")) as first,
        meanwhile(lambda: wait_for(shop, unpaid["id"], "wait=2")) as second,
    ):
        wait_until(lambda: len(shop.app.readers.waiting) == 2)
        shop.pay(paid["reference"])
        assert first()[0].json["payment"]["status"] == "completed"
        answer, seconds = second()
    assert answer.json["payment"]["status"] == "pending"
    assert seconds >= 2


def test_one_too_many_is_answered_at_once_and_payments_are_never_starved(
    database_url: str, sandbox: Sandbox, tmp_path: Path
) -> None:
    """16 threads, of which 2 may wait; 30 readers come."""
    with Server(database_url, sandbox, tmp_path, THREADS="16", RUN_WORKER="0") as server:
        path = f"{PAYMENTS}/{server.create().json['payment']['id']}"

        def read() -> tuple[dict[str, str], float]:
            answer, seconds = seconds_of(lambda: server.request("GET", path, headers={"Prefer": "wait=4"}))
            assert answer.status_code == 200
            return answer.headers, seconds

        with meanwhile(lambda: at_once([read] * 30)) as reads:
            time.sleep(0.7)
            creations = [seconds_of(server.create) for _ in range(10)]
        assert {answer.status_code for answer, _ in creations} == {201}
        assert sum(seconds for _, seconds in creations) < 3
        held = [seconds for headers, seconds in reads() if headers.get("preference-applied") == "wait=4"]
        assert len(held) == 2
        assert min(held) >= 4
        assert max(seconds for headers, seconds in reads() if "preference-applied" not in headers) < 3.5


def test_a_place_that_was_waited_in_is_free_again(shop: Shop) -> None:
    payment = shop.created()
    for _ in range(3 * shop.app.readers.most_waiting):
        assert wait_for(shop, payment["id"], "wait=0")[0].headers["Preference-Applied"] == "wait=0"


def test_a_stop_ends_all_waits_at_once(database_url: str, sandbox: Sandbox, tmp_path: Path) -> None:
    with Server(database_url, sandbox, tmp_path, THREADS="16") as server:
        path = f"{PAYMENTS}/{server.create().json['payment']['id']}"
        read = lambda: server.request("GET", path, headers={"Prefer": "wait=30"}, timeout_seconds=40)  # noqa: E731
        with meanwhile(lambda: at_once([read] * 2)) as answers:
            time.sleep(1)
            status, seconds = seconds_of(server.stop)
            assert {answer.status_code for answer in answers()} == {200}
        assert status == 0
        assert seconds < 15


def test_who_comes_after_the_stop_does_not_wait(shop: Shop) -> None:
    payment = shop.created()
    shop.app.readers.stop()
    answer, seconds = wait_for(shop, payment["id"], "wait=20")
    assert answer.status_code == 200
    assert seconds < 15


def test_waiting_outlasts_a_restart_of_the_database(shop: Shop) -> None:
    payment = shop.created()
    with meanwhile(lambda: wait_for(shop, payment["id"], "wait=20")) as waited:
        wait_until(lambda: shop.app.readers.waiting)
        shop.sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        shop.pay(payment["reference"])
        answer, seconds = waited()
    assert answer.json["payment"]["status"] == "completed"
    assert seconds < 15


@pytest.mark.parametrize("fault", ["it refuses us", "a statement fails"])
def test_waiting_outlasts_a_database_that_serves_nothing_for_a_while(shop: Shop, fault: str) -> None:
    payment = shop.created()
    name = conninfo_to_dict(shop.database_url)["dbname"]
    elsewhere = shop.database_url.replace(f"/{name}?", "/postgres?")
    with meanwhile(lambda: wait_for(shop, payment["id"], "wait=20")) as waited:
        wait_until(lambda: shop.app.readers.waiting)
        if fault == "it refuses us":
            query(elsewhere, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
            query(elsewhere, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", name)
            time.sleep(2.5)
            query(elsewhere, f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
        else:
            shop.sql("ALTER TABLE payments RENAME TO away")
            time.sleep(2.5)
            shop.sql("ALTER TABLE away RENAME TO payments")
        wait_until(lambda: shop.client.simulate_get("/readyz").status_code == 200)
        shop.pay(payment["reference"])
        answer, seconds = waited()
    assert answer.json["payment"]["status"] == "completed"
    assert seconds < 15


# The look that a reader causes


@pytest.mark.parametrize("path", [PAYMENTS + "/{}", "/pay/{}"])
def test_reading_a_payment_that_is_not_paid_makes_the_worker_look_soon(shop: Shop, path: str) -> None:
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    assert worker_of(shop).poll() > 0
    assert shop.sandbox.calls("verify") == 0
    shop.client.simulate_get(path.format(payment["id"]))
    assert shop.sandbox.calls("verify") == 0
    wait_until(lambda: is_due(shop, payment["id"]), within_seconds=20)
    worker_of(shop).poll()
    assert shop.get(payment["id"])["status"] == "completed"


def is_due(shop: Shop, payment_id: str) -> bool:
    return bool(shop.sql("SELECT wanted_at IS NOT NULL AS due FROM payments WHERE id = %s", payment_id)[0]["due"])


def test_readers_cause_one_look_in_5_seconds(shop: Shop) -> None:
    payment = shop.created()
    shop.get(payment["id"])
    wait_until(lambda: is_due(shop, payment["id"]), within_seconds=20)
    worker_of(shop).poll()
    assert shop.sandbox.calls("verify") == 1
    shop.get(payment["id"])
    time.sleep(1.3)
    assert not is_due(shop, payment["id"])
    shop.sql("UPDATE payments SET polled_at = polled_at - interval '5 s'")
    shop.get(payment["id"])
    wait_until(lambda: is_due(shop, payment["id"]), within_seconds=20)


def test_reading_a_paid_payment_causes_no_look(shop: Shop) -> None:
    payment = shop.created()
    shop.pay(payment["reference"])
    shop.get(payment["id"])
    time.sleep(1.3)
    assert not is_due(shop, payment["id"])


def test_reading_a_payment_that_ended_unpaid_finds_money_that_came_late(shop: Shop) -> None:
    payment = shop.created()
    end_time(shop.database_url, payment["id"])
    poll(shop)
    shop.sandbox.pay(payment["reference"])
    shop.sql("UPDATE payments SET polled_at = polled_at - interval '5 s'")
    assert shop.get(payment["id"])["status"] == "expired"
    wait_until(lambda: is_due(shop, payment["id"]), within_seconds=20)
    worker_of(shop).poll()
    assert shop.get(payment["id"])["status"] == "completed"
