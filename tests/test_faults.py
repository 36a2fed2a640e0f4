# ruff: noqa: F811  (fixtures are imported by their names)
"""What is left when a process is killed, the database goes away or freezes, or the provider does: nothing lost, nothing
doubled, and nothing to clean up."""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from backstage import at_once, end_leases, fresh_seed, frozen, meanwhile, poll, seconds_of
from commands.migrate import migrate
from invariants import check_books
from local import embedded
from local.sandbox import Sandbox
from relay import Moment, Relay
from shop import PAYMENTS, WEBHOOK, Reply, Server, Shop, free_port, open_shop, query, sandbox, shop, wait_until  # noqa: F401

ALONE = {"RUN_WORKER": "0"}
COMMIT = b"COMMIT\0"  # and not that of READ COMMITTED


@pytest.fixture
def relay(database_url: str) -> Iterator[Relay]:
    with Relay(database_url) as relay:
        yield relay


@pytest.fixture
def doomed(relay: Relay, sandbox: Sandbox, tmp_path: Path) -> Iterator[Server]:
    """A server that the test kills; `shop` is another one, on the same database."""
    with Server(relay.url, sandbox, tmp_path, **ALONE, PAYSTACK_TIMEOUT="20") as server:
        yield server


@contextlib.contextmanager
def in_background(work: Callable[[], object]) -> Iterator[None]:
    """A client that gets no answer, as its server dies."""

    def run() -> None:
        with contextlib.suppress(OSError, Exception):
            work()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join(20)


# A process is killed


def killed_while_opening(doomed: Server, reached: Callable[[], object], over: threading.Event | None = None) -> None:
    with in_background(lambda: doomed.create(key="one")):
        reached()
        doomed.kill()
        if over is not None:
            over.set()


def opened_again(shop: Shop, first: dict[str, Any] | None = None) -> dict[str, Any]:
    """The same key after the lease of the dead has run out: one payment, one URL given out, paid once."""
    if query(shop.database_url, "SELECT key FROM idempotency_keys WHERE answered_at IS NULL AND leased_until > now()"):
        in_flight = shop.create(key="one")
        assert (in_flight.status_code, in_flight.json["code"]) == (409, "request_in_flight")
        end_leases(shop.database_url)
    answer = shop.create(key="one")
    assert answer.status_code == 201, answer.text
    payment: dict[str, Any] = answer.json["payment"]
    assert shop.create(key="one").text == answer.text
    (row,) = check_books(shop.database_url)
    assert row["checkout_url"] == payment["checkout_url"]
    shop.pay(payment["reference"])
    assert shop.get(payment["id"])["status"] == "completed"
    check_books(shop.database_url)
    return payment


def test_killed_before_the_reservation_is_on_disk(doomed: Server, relay: Relay, shop: Shop) -> None:
    moment = relay.before(b"John Doe")
    killed_while_opening(doomed, moment.wait, moment.over)
    assert check_books(shop.database_url) == []
    assert not opened_again(shop)["reference"].endswith("-2")
    assert shop.sandbox.calls("initialize") == 1


def test_killed_after_the_reservation(doomed: Server, relay: Relay, shop: Shop) -> None:
    moment = relay.after(b"John Doe")
    killed_while_opening(doomed, moment.wait, moment.over)
    assert len(check_books(shop.database_url)) == 1
    assert not opened_again(shop)["reference"].endswith("-2")
    assert shop.sandbox.calls("initialize") == 1


def test_killed_before_the_provider_has_heard(doomed: Server, shop: Shop) -> None:
    shop.sandbox.fault("initialize", "time-out-before", seconds=30)
    killed_while_opening(doomed, lambda: wait_until(lambda: shop.sandbox.calls("initialize")))
    assert not opened_again(shop)["reference"].endswith("-2")
    assert shop.sandbox.calls("initialize") == 2


def test_killed_before_the_provider_has_answered(doomed: Server, shop: Shop) -> None:
    shop.sandbox.fault("initialize", "time-out", seconds=30)
    killed_while_opening(doomed, lambda: wait_until(shop.sandbox.transactions))
    assert opened_again(shop)["reference"].endswith("-2")
    assert shop.sandbox.calls("initialize") == 3


def test_killed_before_the_providers_answer_is_on_disk(doomed: Server, relay: Relay, shop: Shop) -> None:
    moment = relay.before(b"/checkout/")
    killed_while_opening(doomed, moment.wait, moment.over)
    assert opened_again(shop)["reference"].endswith("-2")
    assert shop.sandbox.calls("initialize") == 3


def test_killed_before_the_client_has_the_answer(doomed: Server, relay: Relay, shop: Shop) -> None:
    moment = relay.after(b"COMMIT")
    killed_while_opening(doomed, moment.wait, moment.over)
    assert not opened_again(shop)["reference"].endswith("-2")
    assert shop.sandbox.calls("initialize") == 1


def test_the_lease_of_the_dead_runs_out_by_itself(
    database_url: str, sandbox: Sandbox, tmp_path: Path, open_shop: Callable[..., Shop]
) -> None:
    shop = open_shop(LEASE_SECONDS="3")
    sandbox.fault("initialize", "time-out", seconds=30)
    with Server(database_url, sandbox, tmp_path, **ALONE, LEASE_SECONDS="3") as server:
        killed_while_opening(server, lambda: wait_until(sandbox.transactions))
    answers, took_seconds = seconds_of(lambda: list(until_not_409(shop)))
    assert answers[0].status_code == 409
    assert (answers[-1].status_code, took_seconds < 15) == (201, True)
    check_books(database_url)


def until_not_409(shop: Shop) -> Iterator[Any]:
    for _ in range(100):
        answer = shop.create(key="one")
        yield answer
        if answer.status_code != 409:
            return
        time.sleep(0.05)


def test_a_payment_whose_client_never_comes_back_is_looked_after(doomed: Server, relay: Relay, shop: Shop) -> None:
    """Killed with the money's transaction open; the customer had no URL, and yet somebody paid."""
    moment = relay.before(b"/checkout/")
    killed_while_opening(doomed, moment.wait, moment.over)
    (row,) = check_books(shop.database_url)
    shop.sandbox.pay(row["reference"])
    end_leases(shop.database_url)
    poll(shop)
    (row,) = check_books(shop.database_url)
    assert row["status"] == "completed"
    answer = shop.create(key="one")
    assert (answer.status_code, answer.json["payment"]["status"]) == (201, "completed")


def killed_while_hearing(doomed: Server, moment: Moment, body: bytes, headers: dict[str, str]) -> None:
    with in_background(lambda: doomed.request("POST", WEBHOOK, body, headers)):
        moment.wait()
        doomed.kill()
        moment.over.set()


@pytest.mark.parametrize("words", [b"charge.success", COMMIT], ids=["stored", "committed"])
def test_killed_before_a_webhook_is_on_disk(doomed: Server, relay: Relay, shop: Shop, words: bytes) -> None:
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    killed_while_hearing(doomed, relay.before(words), *shop.sandbox.event(payment["reference"]))
    assert shop.sql("SELECT * FROM provider_events") == []
    assert shop.get(payment["id"])["status"] == "pending"
    assert shop.deliver(payment["reference"]).status_code == 200
    assert shop.get(payment["id"])["status"] == "completed"
    check_books(shop.database_url)


def test_killed_before_a_webhook_is_answered(doomed: Server, relay: Relay, shop: Shop) -> None:
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    killed_while_hearing(doomed, relay.after(COMMIT), *shop.sandbox.event(payment["reference"]))
    completed = shop.get(payment["id"])
    assert completed["status"] == "completed"
    trail = shop.sql("SELECT * FROM payment_events")
    assert shop.deliver(payment["reference"]).status_code == 200
    assert shop.get(payment["id"]) == completed
    assert shop.sql("SELECT * FROM payment_events") == trail
    assert shop.sql("SELECT deliveries, outcome FROM provider_events") == [{"deliveries": 2, "outcome": "applied"}]
    assert len(shop.sql("SELECT * FROM charges")) == 1
    check_books(shop.database_url)


# The reply to a commit is lost


@pytest.fixture
def relayed(relay: Relay, open_shop: Callable[..., Shop]) -> Shop:
    return open_shop(DATABASE_URL=relay.url)


def lose_reply(relay: Relay, words: bytes) -> Moment:
    moment = relay.after(words)
    moment.over.set()
    return moment


@pytest.mark.parametrize("words", [b"John Doe", b"/checkout/"], ids=["reserve", "settle"])
def test_a_payment_whose_commits_reply_is_lost_goes_on_in_the_same_request(
    relay: Relay, relayed: Shop, words: bytes
) -> None:
    relayed.created()
    moment = lose_reply(relay, words)
    answer = relayed.create(key="one")
    moment.wait()
    assert answer.status_code == 201
    assert relayed.create(key="one").text == answer.text
    assert relayed.sandbox.calls("initialize", answer.json["payment"]["reference"]) == 1
    assert len(check_books(relayed.database_url)) == 2


def test_a_webhook_whose_commits_reply_is_lost_is_applied_once(relay: Relay, relayed: Shop) -> None:
    payment = relayed.created()
    relayed.sandbox.pay(payment["reference"])
    moment = lose_reply(relay, COMMIT)
    assert relayed.deliver(payment["reference"]).status_code == 200
    moment.wait()
    assert relayed.get(payment["id"])["status"] == "completed"
    assert [row["why"] for row in relayed.sql("SELECT why FROM payment_events")] == ["reserved", "opened", "charge"]
    check_books(relayed.database_url)


def test_a_network_that_ends_all_connections_costs_no_request(relay: Relay, relayed: Shop) -> None:
    for _ in range(5):
        payment = relayed.created()
        at_once([partial(relayed.get, payment["id"])] * 8)
        relay.cut()
    assert len(check_books(relayed.database_url)) == 5


# The database goes away


class Till:
    """Clients that go on for ever with the same key until they have an answer, and remember each that they got."""

    def __init__(self, server: Server, sandbox: Sandbox, seed: int) -> None:
        self.server = server
        self.sandbox = sandbox
        self.seed = seed
        self.answers: list[tuple[float, str, Reply]] = []
        """With the moment when each was asked for."""
        self.made: list[dict[str, Any]] = []
        self.closing = threading.Event()

    @contextlib.contextmanager
    def open(self, clients: int) -> Iterator[None]:
        threads = [threading.Thread(target=self.serve, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.closing.set()
            for thread in threads:
                thread.join(60)

    def serve(self, number: int) -> None:
        chance = random.Random(self.seed + number)  # noqa: S311
        for order in range(10_000):
            if self.closing.is_set():
                return
            self.sell(f"{number}-{order}", is_paid=chance.random() < 0.5)

    def sell(self, key: str, *, is_paid: bool) -> None:
        payment = self.insist("POST", lambda: self.server.create(key=key), 201).json["payment"]
        self.made.append(payment)
        if is_paid:
            self.sandbox.pay(payment["reference"])
            body, headers = self.sandbox.event(payment["reference"])
            self.insist("webhook", lambda: self.server.request("POST", WEBHOOK, body, headers), 200)
            told = self.insist("GET", lambda: self.server.request("GET", f"{PAYMENTS}/{payment['id']}"), 200)
            assert told.json["payment"]["status"] == "completed"

    def insist(self, name: str, ask: Callable[[], Reply], good: int) -> Reply:
        for _ in range(200):
            at, answer = time.monotonic(), ask()
            self.answers.append((at, name, answer))
            if answer.status_code == good:
                return answer
            time.sleep(0.05)
        raise AssertionError(f"{name} is never answered by {good}")

    def refusals(self) -> set[tuple[str, int, bool]]:
        return {
            (name, answer.status_code, "retry-after" in answer.headers)
            for _, name, answer in self.answers
            if answer.status_code not in (200, 201)
        }


@pytest.fixture
def own(cluster: embedded.Cluster) -> embedded.Cluster:
    """A cluster of this test's own with the schema in it."""
    migrate(cluster.url)
    return cluster


def restart(cluster: embedded.Cluster) -> None:
    cluster.restart()


def crash(cluster: embedded.Cluster) -> None:
    assert cluster.pid is not None
    os.kill(cluster.pid, signal.SIGKILL)
    time.sleep(0.2)
    cluster.start()


@pytest.mark.parametrize("going_away", [restart, crash])
def test_the_database_goes_away_under_load_and_nothing_is_lost(
    own: embedded.Cluster, sandbox: Sandbox, tmp_path: Path, going_away: Callable[[embedded.Cluster], None]
) -> None:
    seed = fresh_seed()
    with Server(own.url, sandbox, tmp_path, **ALONE, LEASE_SECONDS="3") as server:
        till = Till(server, sandbox, seed)
        with till.open(clients=6):
            for _ in range(2):
                time.sleep(0.6)
                going_away(own)
            server.wait_until_ready()
            back = time.monotonic()
            time.sleep(5)
        statuses = [(at - back, answer.status_code) for at, _, answer in till.answers if at > back]
        assert {status for _, status in statuses} <= {200, 201, 409}, "an error after the database was back"
        # A lease that could not be released has run out by now.
        assert {status for seconds, status in statuses if seconds > 4} in ({200, 201}, {201}), (
            "a lease is held for good"
        )
        away = {(name, 503, True) for name in ("POST", "webhook", "GET")}
        assert till.refusals() <= {*away, ("POST", 409, True)}
        made = {payment["id"]: payment["checkout_url"] for payment in till.made}
    rows = {row["id"]: row for row in check_books(own.url)}
    assert {payment_id: rows[payment_id]["checkout_url"] for payment_id in made} == made
    paid = {transaction["reference"] for transaction in sandbox.transactions() if transaction["status"] == "success"}
    assert {row["charge_reference"] for row in rows.values() if row["status"] == "completed"} == paid


def test_an_idle_service_meets_a_restarted_database_without_an_error(
    own: embedded.Cluster, sandbox: Sandbox, tmp_path: Path
) -> None:
    with Server(own.url, sandbox, tmp_path, **ALONE, THREADS="16") as server:
        assert {answer.status_code for answer in at_once([server.create] * 10)} == {201}
        own.restart()
        answers, took_seconds = seconds_of(lambda: at_once([server.create] * 10))
        assert {answer.status_code for answer in answers} == {201}
        assert took_seconds < 20


def test_a_service_whose_database_is_away_starts_and_says_so(
    own: embedded.Cluster, sandbox: Sandbox, open_shop: Callable[..., Shop]
) -> None:
    own.stop()
    shop = open_shop(DATABASE_URL=own.url)
    assert shop.client.simulate_get("/healthz").status_code == 200
    event = sandbox.event(sandbox.charge_elsewhere()["reference"])
    asks = [lambda: shop.client.simulate_get("/readyz"), shop.create, lambda: shop.webhook(*event)]
    for answer, took_seconds in at_once([partial(seconds_of, ask) for ask in asks]):
        assert (answer.status_code, "Retry-After" in answer.headers) == (503, True)
        assert took_seconds < 20
    assert sandbox.calls("initialize") == 0
    own.start()
    wait_until(lambda: shop.client.simulate_get("/readyz").status_code == 200, 15)
    assert shop.create().status_code == 201


# The database freezes


def test_a_frozen_database_costs_errors_in_bounded_time_and_nothing_after(
    own: embedded.Cluster, sandbox: Sandbox, tmp_path: Path
) -> None:
    with Server(own.url, sandbox, tmp_path, **ALONE, THREADS="24") as server:
        finished = server.create(key="finished")
        payment = finished.json["payment"]
        sandbox.pay(payment["reference"])
        body, headers = sandbox.event(payment["reference"])
        asks: dict[str, Callable[[], Reply]] = {
            "a new payment": lambda: server.create(key="new"),
            "a replay": lambda: server.create(key="finished"),
            "a read": lambda: server.request("GET", f"{PAYMENTS}/{payment['id']}"),
            "a webhook": lambda: server.request("POST", WEBHOOK, body, headers),
            "readyz": lambda: server.request("GET", "/readyz"),
            "healthz": lambda: server.request("GET", "/healthz"),
        }
        with frozen(own):
            works = [partial(seconds_of, ask) for ask in asks.values()]
            answers = dict(zip(asks, at_once(works), strict=True))
        for name, (answer, took_seconds) in answers.items():
            good = name == "healthz"
            assert answer.status_code == (200 if good else 503), name
            assert took_seconds < {"healthz": 1, "readyz": 2}.get(name, 6.5), name
            assert good or "retry-after" in answer.headers, name
        wait_until(lambda: server.request("GET", "/readyz").status_code == 200, 15)
        # The reservation was on its way to the server, which may have made it when it woke up, for nobody.
        assert asks["a new payment"]().status_code in (201, 409)
        end_leases(own.url)
        assert [answer.status_code for answer in at_once(list(asks.values()))] == [201, 201, 200, 200, 200, 200]
        assert asks["a replay"]().json["payment"]["id"] == finished.json["payment"]["id"]
        assert asks["a read"]().json["payment"]["status"] == "completed"
    assert len(check_books(own.url)) == 2


def test_a_frozen_database_leaves_threads_for_those_who_do_not_need_it(
    own: embedded.Cluster, sandbox: Sandbox, tmp_path: Path
) -> None:
    """More ask than there are threads. If each thread waited for 5 s, so would whoever needs no database."""
    with Server(own.url, sandbox, tmp_path, **ALONE, THREADS="24") as server:
        path = f"{PAYMENTS}/{server.create().json['payment']['id']}"
        with frozen(own), meanwhile(lambda: at_once([lambda: server.request("GET", path)] * 110)) as reads:
            time.sleep(0.5)  # they are there
            answer, took_seconds = seconds_of(lambda: server.request("GET", "/healthz"))
            assert {read.status_code for read in reads()} == {503}
        assert answer.status_code == 200
        assert took_seconds < 3


def test_a_database_that_freezes_before_the_answer_is_stored_gives_out_one_url(
    own: embedded.Cluster, sandbox: Sandbox, open_shop: Callable[..., Shop]
) -> None:
    """The settling statement is on its way, and may take effect once the server wakes up: the client tries again."""
    shop = open_shop(DATABASE_URL=own.url)
    shop.created()
    sandbox.fault("initialize", "time-out", seconds=0.5)
    with meanwhile(lambda: shop.create(key="one")) as answer:
        wait_until(lambda: sandbox.calls("initialize") == 2)
        with frozen(own):
            assert answer().status_code == 503
    wait_until(lambda: shop.client.simulate_get("/readyz").status_code == 200, 15)
    end_leases(own.url)
    retried = shop.create(key="one")
    assert retried.status_code == 201
    assert shop.create(key="one").text == retried.text
    assert len(check_books(own.url)) == 2


def test_a_locked_row_costs_a_webhook_a_503_and_not_its_event(shop: Shop) -> None:
    """Somebody's psql has the payment's row and goes for coffee."""
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    with psycopg.connect(shop.database_url) as coffee:
        coffee.execute("SELECT FROM payments FOR UPDATE")
        answer, took_seconds = seconds_of(lambda: shop.deliver(payment["reference"]))
        assert (answer.status_code, "Retry-After" in answer.headers) == (503, True)
        assert took_seconds < 20
    assert shop.deliver(payment["reference"]).status_code == 200
    assert shop.get(payment["id"])["status"] == "completed"
    check_books(shop.database_url)


# The provider goes away


def test_the_provider_away_costs_new_payments_alone(database_url: str, sandbox: Sandbox) -> None:
    with Shop(database_url, sandbox) as before:
        paid = before.created(key="paid")
        finished = before.create(key="finished")
        sandbox.pay(paid["reference"])
        event = sandbox.event(paid["reference"])
    with Shop(database_url, sandbox, PAYSTACK_URL=f"http://127.0.0.1:{free_port()}") as shop:
        answer, took_seconds = seconds_of(lambda: shop.create(key="one"))
        assert (answer.status_code, answer.json["code"]) == (503, "provider_unavailable")
        assert "Retry-After" in answer.headers
        assert took_seconds < 9
        assert shop.create(key="finished").text == finished.text
        assert shop.webhook(*event).status_code == 200
        assert shop.get(paid["id"])["status"] == "completed"
        poll(shop)
        assert shop.client.simulate_get("/readyz").status_code == 200
    with Shop(database_url, sandbox) as after:
        assert after.create(key="one").status_code == 201
    assert len(check_books(database_url)) == 3


def test_a_payment_goes_its_whole_way_through_a_provider_that_fails_half_the_time(
    open_shop: Callable[..., Shop], sandbox: Sandbox
) -> None:
    seed = fresh_seed()
    shop = open_shop(PAYSTACK_TIMEOUT="1")
    for number, fault in enumerate(("500", "lost-answer", "lost-request", "429", "garbage")):
        sandbox.fault("*", fault, probability=0.15, seed=seed + number)
    for number in range(12):
        answers = [shop.create(key=f"order-{number}")]
        while answers[-1].status_code == 503 and len(answers) < 60:
            answers.append(shop.create(key=f"order-{number}"))
        assert {answer.status_code for answer in answers} <= {201, 503}
        assert answers[-1].status_code == 201
        sandbox.pay(answers[-1].json["payment"]["reference"])
    for _ in range(60):
        poll(shop)
        if {row["status"] for row in check_books(shop.database_url)} == {"completed"}:
            return
    raise AssertionError("not every payment has been found")
