"""No request, no background work and no look-up reads a table that grows from end to end: the plans of the statements
that really run, on a database with a history."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

import history
import manage
import plans
import worker
from backstage import worker_of
from commands.migrate import migrate
from local import embedded
from local.sandbox import Sandbox
from office import ADMIN_TOKEN, Office
from shop import SECRET_KEY, Shop, query, wait_until
from web import readers
from web.metrics import FIGURES

GROWING = {"payments", "idempotency_keys", "charges", "refunds", "payment_events", "provider_events", "notifications"}
WATCHED = {**plans.SETTINGS, **plans.COUNTING}
PAYMENTS, TODAY = 20_000, 100
MOST_ROWS = 2000
"""What one step of a plan may read of a table: a batch, the trade of a day, the payments of a customer."""
NOTIFY = {"NOTIFY_URL": "http://127.0.0.1:9/", "NOTIFY_SECRET": "whsec_" + "QUFB" * 11}


@dataclass
class Past:
    """A shop with a history, whose server tells the plan of each statement."""

    cluster: embedded.Cluster
    url: str
    shop: Shop

    def plans_of(self, work: Callable[["Past"], object]) -> list[plans.Statement]:
        with plans.watch(self.cluster.log) as found:
            work(self)
        return found

    def sql(self, statement: str, *values: object) -> None:
        """Behind paygate's back, and unseen."""
        query(self.url, statement, *values)

    def manage(self, *words: str) -> None:
        assert manage.main(words) in (0, 1)


@pytest.fixture(scope="module")
def past() -> Iterator[Past]:
    with ExitStack() as stack:
        cluster = stack.enter_context(embedded.temporary())
        provider = stack.enter_context(Sandbox(secret_key=SECRET_KEY))
        migrate(cluster.superuser_url)
        body = json.dumps({"event": "charge.success", "data": {"reference": "EXAMPLE", "status": "success"}})
        assert max(history.fill(cluster.superuser_url, PAYMENTS, today=TODAY, body=body)) == PAYMENTS
        url = plans.explained(cluster.superuser_url, WATCHED)
        shop = stack.enter_context(Shop(url, provider, ADMIN_TOKEN=ADMIN_TOKEN, **NOTIFY))
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        environment.setenv("DATABASE_URL", url)
        environment.setenv("PAYSTACK_SECRET_KEY", SECRET_KEY)
        environment.setenv("PAYSTACK_URL", provider.url)
        for name, value in NOTIFY.items():
            environment.setenv(name, value)
        yield Past(cluster, cluster.superuser_url, shop)


def scans(statements: list[plans.Statement], most_rows: int = MOST_ROWS) -> list[str]:
    """A line for each step that reads a growing table from end to end, or much of it."""
    found = []
    for statement in statements:
        for step in statement.steps():
            if step.get("Relation Name") in GROWING and "Actual Rows" in step:
                rows = statement.rows_read(step)
                if step["Node Type"] == "Seq Scan" or rows > most_rows:
                    name = f"{step['Node Type']} of {step['Relation Name']}, {rows:.0f} rows"
                    found.append(f"{name}: {' '.join(statement.text.split())}")
    return found


def tables(statements: list[plans.Statement]) -> set[str]:
    return {step["Relation Name"] for each in statements for step in each.steps() if "Relation Name" in step}


# What is done, and the tables that it must be seen to touch


def start_a_payment(past: Past) -> None:
    past.shop.created(key="one")
    assert past.shop.create(key="one").headers["Idempotent-Replayed"] == "true"


def start_a_payment_whose_answer_was_lost(past: Past) -> None:
    past.shop.sandbox.fault("initialize", "lost-answer")
    past.shop.created(key="two")


def start_a_payment_that_is_refused(past: Past) -> None:
    body = {"status": False, "message": "Invalid Email Address Passed", "type": "validation_error"}
    past.shop.sandbox.fault("initialize", "answer", effect=False, status=400, body=body)
    past.shop.create(key="three")


def read_a_payment(past: Past) -> None:
    past.shop.get(history.payment_id(PAYMENTS // 2))


def hear_of_a_charge(past: Past) -> None:
    past.shop.pay(past.shop.created()["reference"])


def hear_of_a_dispute(past: Past) -> None:
    payment = past.shop.created()
    past.shop.pay(payment["reference"])
    past.shop.sandbox.dispute(payment["reference"])
    past.shop.deliver(payment["reference"], "charge.dispute.create")
    past.shop.deliver(payment["reference"], "charge.dispute.resolve")


def ask_soon(past: Past) -> None:
    ids = [history.payment_id(n) for n in range(PAYMENTS - 20, PAYMENTS)]
    readers.poll_soon(past.shop.app.database, "test", dict.fromkeys(ids, 0.0), ids)


def work_with_nothing_due(past: Past) -> None:
    idle = worker_of(past.shop)
    for loop in (idle.poll, idle.poll_refunds, idle.apply_events, idle.notify):
        loop()


def look_at_what_is_due(past: Past) -> None:
    ids = [history.payment_id(n) for n in range(PAYMENTS - TODAY + 1, PAYMENTS)]
    past.sql("UPDATE payments SET poll_at = now() WHERE id = ANY(%s) AND status = 'pending'", ids)
    worker_of(past.shop).poll()


def look_at_refunds_that_are_due(past: Past) -> None:
    past.sql("UPDATE refunds SET poll_at = now() WHERE id IN (SELECT id FROM refunds LIMIT 10)")
    worker_of(past.shop).poll_refunds()


def apply_events_that_are_due(past: Past) -> None:
    past.sql(
        """
        UPDATE provider_events SET outcome = 'received', retry_at = now()
         WHERE id IN (SELECT id FROM provider_events WHERE body IS NOT NULL ORDER BY id DESC LIMIT 10)
        """
    )
    worker_of(past.shop).apply_events()


def notify_of_what_is_due(past: Past) -> None:
    past.sql(
        """
        UPDATE notifications SET due_at = now(), delivered_at = NULL
         WHERE id IN (SELECT id FROM notifications ORDER BY made_at DESC LIMIT 10)
        """
    )
    worker_of(past.shop).notify()


def apply_lists(past: Past) -> None:
    payment = past.shop.created()
    past.shop.sandbox.pay(payment["reference"])
    past.shop.sandbox.dashboard_refund(payment["reference"], 1000)
    worker_of(past.shop).apply_lists()


def prune(past: Past) -> None:
    past.sql(
        """
        UPDATE provider_events SET received_at = now() - interval '100 days'
         WHERE id IN (SELECT id FROM provider_events WHERE body IS NOT NULL ORDER BY received_at LIMIT 50)
        """
    )
    past.sql(
        """
        UPDATE notifications SET delivered_at = now() - interval '100 days'
         WHERE id IN (SELECT id FROM notifications WHERE delivered_at IS NOT NULL ORDER BY delivered_at LIMIT 50)
        """
    )
    worker_of(past.shop).prune()


def give_money_back(past: Past) -> None:
    payment = past.shop.created()
    past.shop.pay(payment["reference"])
    past.manage("refund", payment["id"], "--yes")
    past.manage("refund", f"{payment['reference']}", "--amount", "10.00", "--yes")


def sync_a_payment(past: Past) -> None:
    past.manage("sync", past.shop.created()["id"])


def resolve_a_payment(past: Past) -> None:
    payment = past.shop.created()
    past.shop.pay(payment["reference"], amount=100)
    past.manage("resolve", payment["id"], "accept", "--reason", "the rest in cash", "--yes")


def notify_again(past: Past) -> None:
    past.manage("notify", history.payment_id(PAYMENTS - TODAY * 10))
    past.manage("notify", "--dead")


def erase_a_customer(past: Past) -> None:
    past.manage("erase", "--email", history.email(17, PAYMENTS), "--yes")


def metrics(past: Past) -> None:
    past.shop.app.office.rows(FIGURES)


def command(*words: str) -> Callable[[Past], None]:
    return lambda past: past.manage(*words)


def listed(**params: object) -> Callable[[Past], None]:
    """A page of the back office's list, with something on it."""

    def work(past: Past) -> None:
        assert Office(past.shop).asked("/payments", **params)["payments"]

    return work


@pytest.mark.parametrize(
    ("work", "touched"),
    [
        pytest.param(work, set(touched.split()), id=getattr(work, "__name__", "") if words is None else words)
        for words, work, touched in (
            (None, start_a_payment, "payments idempotency_keys payment_events"),
            (None, start_a_payment_whose_answer_was_lost, "payments idempotency_keys payment_events"),
            (None, start_a_payment_that_is_refused, "payments idempotency_keys notifications"),
            (None, read_a_payment, "payments"),
            (None, hear_of_a_charge, "payments charges provider_events payment_events notifications"),
            (None, hear_of_a_dispute, "payments incidents notifications"),
            (None, ask_soon, "payments"),
            (None, work_with_nothing_due, "payments refunds provider_events notifications"),
            (None, look_at_what_is_due, "payments idempotency_keys"),
            (None, look_at_refunds_that_are_due, "refunds charges"),
            (None, apply_events_that_are_due, "provider_events charges"),
            (None, notify_of_what_is_due, "notifications payments"),
            (None, apply_lists, "charges refunds payments"),
            (None, prune, "provider_events notifications"),
            (None, give_money_back, "refunds charges payments"),
            (None, sync_a_payment, "payments idempotency_keys"),
            (None, resolve_a_payment, "payments incidents refunds"),
            (None, notify_again, "notifications payments"),
            (None, erase_a_customer, "payments idempotency_keys provider_events notifications refunds"),
            (None, metrics, "payments payment_events notifications incidents charges"),
            ("list", command("list"), "payments"),
            ("list --until", command("list", "--until", "2025-06"), "payments"),
            ("list --status review", command("list", "--status", "review"), "payments"),
            ("list --email", command("list", "--email", history.email(5, PAYMENTS)), "payments"),
            ("GET", listed(), "payments"),
            ("GET after", listed(after=history.payment_id(PAYMENTS // 2)), "payments"),
            ("GET status", listed(status="refunded"), "payments"),
            ("GET status after", listed(status="refunded", after=history.payment_id(PAYMENTS // 2)), "payments"),
            ("GET email", listed(email=history.email(5, PAYMENTS)), "payments"),
            ("GET order", listed(order="order-5"), "payments"),
            ("GET reference", listed(reference=history.reference(5)), "payments"),
            ("show ID", command("show", history.payment_id(3)), "payments charges provider_events refunds"),
            ("show REFERENCE", command("show", history.reference(3)), "payments charges provider_events refunds"),
            ("doctor", command("doctor"), "payments refunds notifications payment_events"),
        )
    ],
)
def test_what_is_done_all_day_reads_no_growing_table_from_end_to_end(
    past: Past, work: Callable[[Past], object], touched: set[str]
) -> None:
    seen = past.plans_of(work)
    assert touched <= tables(seen), "its statements were not seen"
    found = scans(seen)
    assert not found, "\n".join(found)


def test_a_look_after_an_outage_reads_one_payment_however_many_are_due(past: Past) -> None:
    try:
        past.sql("UPDATE payments SET poll_at = now(), wanted_at = now() WHERE poll_at IS NOT NULL")
        past.sql("ANALYZE")
        seen = past.plans_of(
            lambda past: [worker.claim_due(past.shop.app.database, "test", 60, order) for order in worker.ORDERS]
        )
    finally:
        past.sql("UPDATE payments SET poll_at = now() + interval '1 day', wanted_at = NULL WHERE poll_at IS NOT NULL")
        past.sql("ANALYZE")
    assert tables(seen) == {"payments", "idempotency_keys"}
    found = scans(seen, most_rows=10)
    assert not found, "\n".join(found)


def test_a_scan_would_be_seen(past: Past) -> None:
    """The same work without an index that it needs."""
    (index,) = query(past.url, "SELECT pg_get_indexdef('payments_due_for_a_poll'::regclass) AS definition")
    query(past.url, "DROP INDEX payments_due_for_a_poll")
    try:
        seen = scans(past.plans_of(work_with_nothing_due))
    finally:
        query(past.url, index["definition"])
    assert {scan.partition(",")[0] for scan in seen} == {"Seq Scan of payments"}


def test_a_shop_that_opens_on_the_day_of_the_sale_has_no_plans_of_a_day_without_customers() -> None:
    """A connection keeps the plans of what is prepared, of triggers and of foreign keys. They are made when it first
    needs them, from what the last ANALYZE saw: a dozen payments, for which to read them all is the quickest way."""
    with (
        embedded.temporary() as cluster,
        Sandbox(secret_key=SECRET_KEY) as provider,
        Shop(plans.explained(cluster.superuser_url, WATCHED), provider, DB_POOL="1") as shop,
    ):
        query(cluster.superuser_url, "ALTER SYSTEM SET autovacuum = off")
        query(cluster.superuser_url, "SELECT pg_reload_conf()")
        migrate(cluster.superuser_url)
        past = Past(cluster, cluster.superuser_url, shop)

        def sell(number: int) -> None:
            for _ in range(number):
                hear_of_a_charge(past)
                shop.get(shop.created()["id"])

        sell(6)
        query(cluster.superuser_url, "VACUUM ANALYZE")
        sell(150)
        wait_until(lambda: shop.app.readers.thread is None)  # it asks about all of them by their ids, at once
        with plans.watch(cluster.log) as seen:
            sell(3)
        found = scans(seen, most_rows=50)
        assert not found, "\n".join(found)
        assert tables(seen) >= {"payments", "idempotency_keys", "charges", "provider_events", "payment_events"}
