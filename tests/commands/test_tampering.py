# ruff: noqa: S608  (the SQL is written here)
"""Every kind of tampering, each alone, by somebody who may do everything and leaves no trace: `audit` finds it.

What it cannot find stands at the end, and in SECURITY.md.
"""

import itertools
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from psycopg import sql

import charges
import commands
import paystack
from backstage import end_time, initialize_before
from commands import audit
from commands.migrate import migrate
from conftest import Server, url_of
from local.sandbox import Sandbox
from money_back import settle
from shop import SECRET_KEY, Shop
from till import Till, paid

NOTIFY = {"NOTIFY_URL": "http://127.0.0.1:9/", "NOTIFY_SECRET": "whsec_" + "QUFB" * 11}
CUSTOMER = {"customer_name": "Jane Roe", "customer_email": "jane@example.com", "customer_phone": "+234 802 000 0000"}
UNKNOWN = f"PG-{'7' * 26}"
NUMBERS = itertools.count()


@dataclass(frozen=True)
class Books:
    server: Server
    database: str
    ids: dict[str, str]
    checkpoint: tuple[int, str]


def breaks(url: str, against: tuple[int, str] | None = None) -> tuple[list[str], str]:
    """The breaks that an audit names, and its checkpoint."""
    with commands.reading(url) as conn:
        proof = audit.Proof(conn, against)
        return list(proof.breaks()), proof.checkpoint


@pytest.fixture(scope="module")
def books(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Books]:
    """Payments in every state, with all that can be owed, in a database to be copied."""
    with own_database(server) as name, Sandbox(secret_key=SECRET_KEY) as provider:
        url = url_of(server, name)
        migrate(url)
        till = Till(url, provider, tmp_path_factory.mktemp("till"), **NOTIFY)
        with Shop(url, provider, **NOTIFY) as shop:
            ids = fill(shop, till)
        broken, checkpoint = breaks(url)
        assert broken == []
        yield Books(server, name, ids, commands.checkpoint(checkpoint))


def fill(shop: Shop, till: Till) -> dict[str, str]:
    provider = shop.sandbox
    pending, underpaid = shop.created(), paid(shop, customer_email="underpaid@example.com")
    ours, other = paid(shop, metadata={"order": "1"}), paid(shop, metadata={"order": "2"}, **CUSTOMER)
    back, opened, failed, silent, twice = (paid(shop, amount=amount) for amount in (70, 80, 90, 100, 110))
    for payment in (back, opened, failed):
        till.did("refund", payment["id"], "--amount", "30", "--reason", "sent back")
    settle(shop, provider, back["reference"])
    settle(shop, provider, failed["reference"], "failed")
    provider.fault("refund", "lost-request")
    till.run("refund", silent["id"], "--amount", "40")
    second = initialize_and_pay(shop, twice)
    erased = paid(shop, **CUSTOMER)
    till.did("erase", erased["id"], "--yes")
    over = shop.created()
    end_time(shop.database_url, over["id"])
    till.did("sync", over["id"])
    provider.dispute(other["reference"])
    assert shop.deliver(other["reference"], "charge.dispute.create").status_code == 200
    kept = shop.created()
    provider.pay(kept["reference"])
    keep_event(shop, kept["reference"])
    provider.charge_elsewhere(UNKNOWN)
    shop.sql("INSERT INTO withdrawn_orders VALUES ('test', sha256('1'), 'operator:ada')")
    assert shop.deliver(UNKNOWN).status_code == 200
    return {
        name: payment["id"]
        for name, payment in {
            **{"pending": pending, "review": underpaid, "paid": ours, "other": other, "back": back, "open": opened},
            **{"failed": failed, "silent": silent, "twice": twice, "erased": erased, "over": over, "kept": kept},
        }.items()
    } | {"second": second}


def initialize_and_pay(shop: Shop, payment: dict[str, Any]) -> str:
    """A second charge, of the payment's second reference."""
    second = f"{payment['reference']}-2"
    initialize_before(shop.sandbox, second, amount=11000)
    shop.pay(second)
    return second


def keep_event(shop: Shop, reference: str) -> None:
    """An event comes, and cannot be applied yet."""
    body, _ = shop.sandbox.event(reference)
    event = paystack.read_event(body, "test")
    shop.app.database.run(lambda conn: charges.store_event(conn, "test", event, body, "received"))


@contextmanager
def own_database(server: Server, template: str = "template0") -> Iterator[str]:
    name = f"tampered_{next(NUMBERS)}"
    with closing(psycopg.connect(url_of(server, "postgres"), autocommit=True)) as conn:
        conn.execute(f"CREATE DATABASE {name} TEMPLATE {template}".encode())
        try:
            yield name
        finally:
            conn.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def tampered(books: Books, statements: str, *, against: bool = False) -> list[str]:
    """What an audit names in a copy of the books in which this was done with every trigger off."""
    with own_database(books.server, books.database) as name:
        url = url_of(books.server, name)
        with psycopg.connect(url, autocommit=True) as conn:
            conn.execute("SET session_replication_role = replica")
            done = conn.execute(
                sql.SQL(statements.replace("{database}", name)).format(
                    **{role: sql.Literal(named) for role, named in books.ids.items()}
                )
            )
            assert done.rowcount != 0, "it changed nothing"
        return breaks(url, books.checkpoint if against else None)[0]


PAYMENT = {
    "status": "'partially_refunded'", "status_reason": "'x'", "amount_minor": "amount_minor - 1", "currency": "'USD'",
    "mode": "'live'", "reference": "'PG-' || repeat('0', 26)", "attempt": "2", "checkout_url": "'https://example.com'",
    "charge_reference": "reference || '-2'", "charged_minor": "charged_minor - 1", "refunded_minor": "1",
    "accepted_by": "'operator:eve'", "customer_name": "'Eve'", "customer_email": "'eve@example.com'",
    "customer_phone": "'1'", "location": "'Kano'", "description": "'x'", "metadata": """'{{"order": "2"}}'""",
    "return_url": "'https://example.com'", "source": "'form'", "created_at": "created_at - interval '31 days'",
    "expires_at": "expires_at + interval '31 days'", "paid_at": "paid_at - interval '31 days'", "erased_at": "now()",
    "cancelled_at": "now()", "salt": "gen_random_uuid()",
}  # fmt: skip
CHARGE = {
    "reference": "reference || '-3'", "payment_id": "{other}", "mode": "'live'", "provider_id": "1",
    "amount_minor": "amount_minor - 1", "requested_minor": "1", "fees_minor": "0", "currency": "'USD'",
    "channel": "'ussd'", "paid_at": "paid_at - interval '31 days'", "source": "'worker'",
    "recorded_at": "recorded_at - interval '31 days'",
}  # fmt: skip
REFUND = {
    "id": "'RF-' || repeat('0', 26)", "charge_reference": "(SELECT charge_reference FROM payments WHERE id = {paid})",
    "payment_id": "{paid}", "mode": "'live'", "provider_id": "1", "amount_minor": "1", "currency": "'USD'",
    "status": "'not_made'", "origin": "'dashboard'", "made_by": "'operator:eve'", "reason": "'x'",
    "created_at": "created_at - interval '31 days'", "poll_at": "NULL",
}  # fmt: skip
AUDIT_ROW = {
    "payment_id": "{other}, n = 9", "n": "9", "at": "at - interval '31 days'", "actor": "'operator:eve'",
    "why": "'by_hand'",
    "from_status": "'failed'", "to_status": "'review'", "amount_minor": "1", "currency": "'USD'", "mode": "'live'",
    "reference": "'PG-' || repeat('0', 26)", "charged_minor": "1", "refunded_minor": "1", "digest": "sha256('')",
    "hash": "sha256('')",
}  # fmt: skip
SWAPPED = ("customer_name", "customer_email", "customer_phone", "metadata", "created_at")
COPY = """
    CREATE TEMPORARY TABLE copy AS SELECT * FROM {table} WHERE {where};
    UPDATE copy SET {change};
    INSERT INTO {table} {overriding} SELECT * FROM copy
"""


def copied(table: str, where: str, change: str) -> str:
    overriding = "OVERRIDING SYSTEM VALUE" if table in ("incidents", "payment_events", "provider_events") else ""
    return (
        COPY.replace("{table}", table)
        .replace("{where}", where)
        .replace("{change}", change)
        .replace("{overriding}", overriding)
    )


ROWS = {
    **{f"{column} of a payment": f"UPDATE payments SET {column} = {value} WHERE id = {{paid}}"
       for column, value in PAYMENT.items()},
    **{f"{column} swapped between two payments": f"""
        UPDATE payments p SET {column} = o.{column} FROM payments o
         WHERE (p.id, o.id) IN (({{paid}}, {{other}}), ({{other}}, {{paid}}))
       """ for column in SWAPPED},
    "a customer back in an erased payment":
        "UPDATE payments SET customer_name = 'Jane Roe', customer_email = 'jane@example.com' WHERE id = {erased}",
    "an erasure undone": "UPDATE payments SET erased_at = NULL WHERE id = {erased}",
    "a pending payment that ended": "UPDATE payments SET status = 'failed' WHERE id = {pending}",
    "a pending payment that nobody looks at": "UPDATE payments SET poll_at = NULL WHERE id = {pending}",
    "an ended payment that is pending again": "UPDATE payments SET status = 'pending' WHERE id = {over}",
    "a review accepted": "UPDATE payments SET status = 'completed', paid_at = now(), accepted_by = 'operator:ada'"
                         " WHERE id = {review}",
    "a pending payment completed": """
        UPDATE payments SET status = 'completed', paid_at = now(), charge_reference = reference, charged_minor = 5000
         WHERE id = {pending}
    """,
    "a refunded payment made whole": "UPDATE payments SET refunded_minor = 0, status = 'completed' WHERE id = {back}",
    "a removed payment": "DELETE FROM payments WHERE id = {paid}",
    "a payment removed with its trail":
        "DELETE FROM payments WHERE id = {paid}; DELETE FROM payment_events WHERE payment_id = {paid}",
    "a payment put in": copied("payments", "id = {pending}", f"id = 'PAY-{'7' * 26}', reference = '{UNKNOWN}'"),
    "another secret": "UPDATE secrets SET value = sha256('')",
    "no secret": "DELETE FROM secrets",
    "another key": "UPDATE idempotency_keys SET key = sha256('') WHERE payment_id = {paid}",
    "a key of the other mode": "UPDATE idempotency_keys SET mode = 'live' WHERE payment_id = {paid}",
    "another fingerprint": "UPDATE idempotency_keys SET fingerprint = sha256('') WHERE payment_id = {paid}",
    "another answer": "UPDATE idempotency_keys SET answer = 'payment_expired' WHERE payment_id = {paid}",
    "a key of another payment": """
        DELETE FROM idempotency_keys WHERE payment_id = {other};
        UPDATE idempotency_keys SET payment_id = {other} WHERE payment_id = {paid}
    """,
    "a removed key": "DELETE FROM idempotency_keys WHERE payment_id = {paid}",
    **{f"{column} of a charge": f"UPDATE charges SET {column} = {value} WHERE payment_id = {{paid}}"
       for column, value in CHARGE.items()},
    "a removed charge": "DELETE FROM charges WHERE payment_id = {paid}",
    "a removed second charge": "DELETE FROM charges WHERE reference = {second}",
    "a second charge removed with its incident and its event": """
        DELETE FROM charges WHERE reference = {second}; DELETE FROM incidents WHERE subject = {second};
        DELETE FROM provider_events WHERE reference = {second}
    """,
    "a second charge put in": copied("charges", "payment_id = {paid}", "reference = reference || '-5'"),
    **{f"{column} of an open refund": f"UPDATE refunds SET {column} = {value} WHERE payment_id = {{open}}"
       for column, value in REFUND.items()},
    "an open refund removed": "DELETE FROM refunds WHERE payment_id = {open}",
    "an unanswered refund removed": "DELETE FROM refunds WHERE payment_id = {silent}",
    "an unanswered refund refused": "UPDATE refunds SET status = 'refused' WHERE payment_id = {silent}",
    "a processed refund removed": "DELETE FROM refunds WHERE payment_id = {back}",
    "a processed refund that failed": "UPDATE refunds SET status = 'failed' WHERE payment_id = {back}",
    "a refund processed in another month":
        "UPDATE refunds SET processed_at = processed_at - interval '31 days' WHERE payment_id = {back}",
    "a failed refund removed": "DELETE FROM refunds WHERE payment_id = {failed}",
    "a failed refund processed":
        "UPDATE refunds SET status = 'processed', processed_at = now() WHERE payment_id = {failed}",
    "a refund put in": copied("refunds", "payment_id = {open}", "id = 'RF-' || repeat('0', 26), provider_id = 1"),
    "a removed incident of a second charge": "DELETE FROM incidents WHERE subject = {second}",
    "a removed incident of money without a payment": f"DELETE FROM incidents WHERE subject = '{UNKNOWN}'",
    "a removed dispute": "DELETE FROM incidents WHERE payment_id = {other}",
    "an incident closed": "UPDATE incidents SET closed_at = now(), closed_by = 'operator:ada'"
                          " WHERE payment_id = {other}",
    "an incident of another kind": "UPDATE incidents SET kind = 'mismatch' WHERE payment_id = {other}",
    "an incident opened later": "UPDATE incidents SET opened_at = now() WHERE payment_id = {other}",
    "an incident of nobody": "UPDATE incidents SET payment_id = NULL WHERE payment_id = {other}",
    "an incident put in": copied("incidents", "payment_id = {other}", "id = 999, subject = 'x'"),
    "a kept event removed": "DELETE FROM provider_events WHERE outcome = 'received'",
    "a kept event put aside": "UPDATE provider_events SET outcome = 'noted', retry_at = NULL"
                              " WHERE outcome = 'received'",
    "a kept event of nobody": "UPDATE provider_events SET payment_id = NULL WHERE outcome = 'received'",
    "an applied event of another payment":
        "UPDATE provider_events SET payment_id = {other} WHERE payment_id = {paid}",
    "an event applied without a charge": "UPDATE provider_events SET outcome = 'applied', retry_at = NULL"
                                         " WHERE outcome = 'received'",
    "an undelivered notification removed": "DELETE FROM notifications WHERE payment_id = {paid}",
    "a notification of another state":
        "UPDATE notifications SET facts = facts || '{{\"status\": \"refunded\"}}' WHERE payment_id = {paid}",
    "a notification of another sum":
        "UPDATE notifications SET facts = facts || '{{\"charged_minor\": 1}}' WHERE payment_id = {paid}",
    "a notification that is never due": "UPDATE notifications SET due_at = NULL WHERE payment_id = {paid}",
    "a notification to another payment":
        "UPDATE notifications SET payment_id = {pending} WHERE payment_id = {paid}",
    "a daily job put off": "INSERT INTO jobs VALUES ('test', 'apply_lists', now() + interval '1 year', now())",
    **{f"{column} of an audit row": f"UPDATE payment_events SET {column} = {value} WHERE payment_id = {{paid}} AND n=2"
       for column, value in AUDIT_ROW.items()},
    **{f"{name} audit row removed": f"DELETE FROM payment_events WHERE payment_id = {{paid}} AND {which}"
       for name, which in {"the first": "n = 1", "a middle": "n = 2", "the last": "n = 3", "each": "true"}.items()},
    "an audit row put in": copied("payment_events", "payment_id = {paid} AND n = 3", "id = 999, n = 4"),
}  # fmt: skip

GUARDS = {
    "a trigger dropped": "DROP TRIGGER a_payment_only_rises ON payments",
    "a trigger disabled": "ALTER TABLE payments DISABLE TRIGGER a_payment_only_rises",
    "a trigger for replicas alone": "ALTER TABLE payments ENABLE REPLICA TRIGGER a_payment_only_rises",
    "all triggers disabled, foreign keys' too": "ALTER TABLE charges DISABLE TRIGGER ALL",
    "a trigger that never fires": """
        CREATE OR REPLACE TRIGGER a_payment_only_rises BEFORE UPDATE ON payments FOR EACH ROW WHEN (false)
        EXECUTE FUNCTION refuse_change()
    """,
    "a trigger after instead of before": """
        CREATE OR REPLACE TRIGGER a_payment_only_rises AFTER UPDATE ON payments FOR EACH ROW
        EXECUTE FUNCTION refuse_change()
    """,
    "a trigger with another function": """
        CREATE FUNCTION guard_nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
        CREATE OR REPLACE TRIGGER a_payment_only_rises BEFORE UPDATE ON payments FOR EACH ROW
        EXECUTE FUNCTION guard_nothing()
    """,
    "a trigger more": """
        CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
        CREATE TRIGGER more BEFORE INSERT ON payment_events FOR EACH ROW EXECUTE FUNCTION swallow()
    """,
    "an emptied function": "CREATE OR REPLACE FUNCTION guard_completion() RETURNS trigger LANGUAGE plpgsql"
    " SET search_path FROM CURRENT"
    " AS 'BEGIN RETURN NEW; END'",
    "a function's search_path": "ALTER FUNCTION guard_completion() RESET search_path",
    "a function's other search_path": "ALTER FUNCTION guard_completion() SET search_path = pg_temp, public",
    "a function of its owner's rights": "ALTER FUNCTION guard_completion() SECURITY DEFINER",
    "a function more of one name": "CREATE FUNCTION changed_by(text, varchar) RETURNS boolean LANGUAGE sql RETURN true",
    "a function that says each digest is right": "CREATE OR REPLACE FUNCTION payment_digest(payment payments)"
    " RETURNS bytea LANGUAGE sql STABLE AS"
    " 'SELECT digest FROM payment_events WHERE payment_id = payment.id ORDER BY n DESC LIMIT 1'",
    "a rule": "CREATE RULE nothing AS ON INSERT TO payment_events DO INSTEAD NOTHING",
    "a policy": "CREATE POLICY hidden ON payments USING (true)",
    "row security": "ALTER TABLE payments ENABLE ROW LEVEL SECURITY",
    "a constraint dropped": "ALTER TABLE payments DROP CONSTRAINT completed_has_paid_at",
    "a constraint that holds for new rows alone": """
        ALTER TABLE payments DROP CONSTRAINT completed_has_paid_at;
        ALTER TABLE payments ADD CONSTRAINT completed_has_paid_at CHECK (
            (status IN ('completed', 'partially_refunded', 'refunded')) = (paid_at IS NOT NULL)) NOT VALID
    """,
    "a weaker constraint": """
        ALTER TABLE payments DROP CONSTRAINT amount_is_positive;
        ALTER TABLE payments ADD CONSTRAINT amount_is_positive CHECK (amount_minor > -1)
    """,
    "a foreign key dropped": "ALTER TABLE charges DROP CONSTRAINT charge_has_a_payment",
    "a unique key dropped": "ALTER TABLE idempotency_keys DROP CONSTRAINT payment_has_one_key",
    "an index dropped": "DROP INDEX payments_due_for_a_poll",
    "a column that may be null": "ALTER TABLE payments ALTER amount_minor DROP NOT NULL",
    "a column's other default": "ALTER TABLE payments ALTER status SET DEFAULT 'completed'",
    "a column more": "ALTER TABLE charges ADD x integer",
    "a child of a table": "CREATE TABLE more_charges () INHERITS (charges)",
    "a table that a crash empties": "ALTER TABLE notifications SET UNLOGGED",
    "a migration that never ran": "DELETE FROM migrations WHERE number = 1",
    "triggers that never fire in this database": "ALTER DATABASE {database} SET session_replication_role = replica",
    "triggers that never fire for a role": "ALTER ROLE CURRENT_USER IN DATABASE {database}"
    " SET session_replication_role = replica",
    "another's name in the trail": "ALTER DATABASE {database} SET paygate.actor = 'worker'",
    "temporary tables first": "ALTER DATABASE {database} SET search_path = pg_temp, public",
}

REHASHED = """
    UPDATE payment_events e SET hash = payment_event_hash(
        (SELECT hash FROM payment_events p WHERE p.payment_id = e.payment_id AND p.n = e.n - 1), e)
     WHERE payment_id = {paid} AND n = 3
"""
AGAINST = {
    "the last audit row and its hash": f"""
        UPDATE payment_events SET actor = 'worker' WHERE payment_id = {{paid}} AND n = 3; {REHASHED}
    """,
    "a payment, its digest and its hash": f"""
        UPDATE payments SET customer_email = 'eve@example.com' WHERE id = {{paid}};
        UPDATE payment_events SET digest = (SELECT payment_digest(p) FROM payments p WHERE id = {{paid}})
         WHERE payment_id = {{paid}} AND n = 3; {REHASHED}
    """,
    "a payment removed with all that was of it": "; ".join(
        f"DELETE FROM {table} WHERE payment_id = {{paid}}" for table in (
            "notifications", "payment_events", "idempotency_keys", "charges", "incidents", "provider_events")
    ) + "; DELETE FROM payments WHERE id = {paid}",
    "an audit row of another number": """
        CREATE TEMPORARY TABLE copy AS SELECT * FROM payment_events WHERE payment_id = {paid} AND n = 1;
        DELETE FROM payment_events WHERE payment_id = {paid} AND n = 1;
        UPDATE copy SET id = -id;
        INSERT INTO payment_events OVERRIDING SYSTEM VALUE SELECT * FROM copy
    """,
}  # fmt: skip

NOT_FOUND = {
    "a notification marked as delivered": "UPDATE notifications SET due_at = NULL, delivered_at = now()"
    " WHERE payment_id = {paid}",
    "a look put off": "UPDATE payments SET poll_at = now() + interval '1 day' WHERE id = {pending}",
    "the body of a handled event": "UPDATE provider_events SET body = 'x' WHERE payment_id = {paid}",
    "a handled event removed": "DELETE FROM provider_events WHERE payment_id = {paid}",
    "the token of an answered key": "UPDATE idempotency_keys SET token = gen_random_uuid() WHERE payment_id = {paid}",
    "a withdrawn order removed": "DELETE FROM withdrawn_orders",
    "the end of a call": "UPDATE refunds SET send_ended_at = now() - interval '1 day' WHERE payment_id = {open}",
}


@pytest.mark.parametrize("kind", [*ROWS, *GUARDS])
def test_each_kind_of_tampering_is_found(books: Books, kind: str) -> None:
    assert tampered(books, {**ROWS, **GUARDS}[kind]) != []


@pytest.mark.parametrize("kind", AGAINST)
def test_what_a_forger_makes_whole_again_is_found_against_the_checkpoint(books: Books, kind: str) -> None:
    assert tampered(books, AGAINST[kind]) == []
    assert tampered(books, AGAINST[kind], against=True) != []


@pytest.mark.parametrize("kind", NOT_FOUND)
def test_what_no_audit_proves_is_what_the_page_on_security_says(books: Books, kind: str) -> None:
    assert tampered(books, NOT_FOUND[kind], against=True) == []
