# ruff: noqa: F811, S608  (fixtures are imported by their names; the SQL is written here)
"""What the database itself refuses, whoever asks, and what it writes down by itself."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import psycopg.rows
import pytest

from backstage import Psql, end_time, initialize_before, payment_id, poll, psql, references, trail  # noqa: F401
from invariants import RANKS, check_books, check_trail
from shop import Shop, open_shop, sandbox, shop  # noqa: F401  # fixtures


def charge_row(payment: dict[str, Any], **others: object) -> dict[str, Any]:
    """A charge that pays for `payment`, but for `others`."""
    names = "reference", "mode", "amount_minor", "currency"
    row = {name: payment[name] for name in names}
    return {**row, "payment_id": payment["id"], "requested_minor": payment["amount_minor"], "source": "test", **others}


def insert(psql: Psql, table: str, row: dict[str, Any]) -> None:
    columns, values = ", ".join(row), ", ".join(f"%({name})s" for name in row)
    psql.execute(f"INSERT INTO {table} ({columns}) VALUES ({values})".encode(), row)


def refund_row(psql: Psql, **others: object) -> dict[str, Any]:
    """A refund of the one charge that there is, as it was asked for, but for `others`."""
    charge = psql.execute("SELECT reference AS charge_reference, payment_id, mode, currency FROM charges").fetchone()
    assert charge is not None
    asked = {
        "id": f"RF-{'0' * 26}",
        "amount_minor": 1000,
        "status": "unanswered",
        "origin": "paygate",
        "made_by": "ada",
    }
    return {**charge, **asked, **others}


def payment_row(psql: Psql, payment_id: str) -> dict[str, Any]:
    row = psql.execute("SELECT * FROM payments WHERE id = %s", [payment_id]).fetchone()
    assert row is not None
    return row


def move(psql: Psql, payment_id: str, status: str) -> None:
    """Set a status with all that belongs to it, so that nothing but its place on the line can be wrong."""
    psql.execute(
        """
        UPDATE payments
           SET status = %(status)s,
               paid_at = CASE WHEN payment_rank(%(status)s) >= 3 THEN coalesce(paid_at, now()) END,
               charge_reference = CASE WHEN payment_rank(%(status)s) >= 2 THEN reference ELSE charge_reference END,
               charged_minor = CASE WHEN payment_rank(%(status)s) >= 2 THEN amount_minor ELSE charged_minor END,
               refunded_minor = CASE %(status)s WHEN 'partially_refunded' THEN 1
                                                WHEN 'refunded' THEN amount_minor ELSE refunded_minor END
         WHERE id = %(id)s
        """,
        {"id": payment_id, "status": status},
    )


# What is refused


def refuses(psql: Psql, words: str, statement: str) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match=words):
        psql.execute(statement.encode())


def test_the_state_of_a_payment_rises_and_never_falls(psql: Psql, payment_id: str) -> None:
    insert(psql, "charges", charge_row(payment_row(psql, payment_id)))
    for before, after in itertools.permutations(RANKS, 2):
        rises = RANKS[after] > RANKS[before] and (before, after) != ("review", "partially_refunded")
        with psql.transaction(force_rollback=True):
            if before != "pending":
                move(psql, payment_id, before)
            if rises:
                move(psql, payment_id, after)
                assert payment_row(psql, payment_id)["status"] == after
            else:
                with pytest.raises(psycopg.errors.CheckViolation, match="a payment only rises"):
                    move(psql, payment_id, after)


def test_what_a_payment_asks_for_never_changes(psql: Psql, payment_id: str) -> None:
    changes = {
        "id": "'PAY-00000000000000000000000000'",
        "mode": "'live'",
        "amount_minor": "amount_minor - 1",
        "currency": "'USD'",
        "reference": "'PG-00000000000000000000000000'",
        "source": "'link'",
        "created_at": "created_at - interval '1 day'",
    }
    for column, value in changes.items():
        refuses(psql, "never changes", f"UPDATE payments SET {column} = {value}")


def test_a_checkout_url_is_never_replaced(psql: Psql, payment_id: str) -> None:
    for url in ("'https://checkout.paystack.com/other'", "NULL"):
        refuses(psql, "a payment keeps its page", f"UPDATE payments SET checkout_url = {url}")


def test_an_erased_payment_stays_erased(psql: Psql, payment_id: str) -> None:
    psql.execute("UPDATE payments SET erased_at = now()")
    for moment in ("NULL", "now() + interval '1 s'"):
        refuses(psql, "a payment keeps its page", f"UPDATE payments SET erased_at = {moment}")


def test_a_payment_never_goes_back_to_an_earlier_reference(psql: Psql, payment_id: str) -> None:
    psql.execute("UPDATE payments SET attempt = 3")
    refuses(psql, "a payment only rises", "UPDATE payments SET attempt = 2")
    refuses(psql, "attempt_is_1_to_9", "UPDATE payments SET attempt = 10")


def test_a_payment_follows_its_own_charge_for_ever(shop: Shop, psql: Psql) -> None:
    shop.pay(shop.created()["reference"])
    for change in (
        "charge_reference = reference || '-2'",
        "charge_reference = NULL",
        "charged_minor = 1",
        "charged_currency = 'USD'",
    ):
        refuses(psql, "a payment keeps its page", f"UPDATE payments SET {change}")


def test_completed_needs_a_charge_that_pays_it(shop: Shop, psql: Psql, payment_id: str) -> None:
    """Asked at exactly its amount, in its currency and mode, paid in full, and as much as the payment says."""
    payment = payment_row(psql, payment_id)
    wrong: list[dict[str, Any]] = [
        {"payment_id": shop.created()["id"]},
        {"mode": "live"},
        {"currency": "USD"},
        {"requested_minor": 4999},
        {"requested_minor": 5001, "amount_minor": 5001},
        {"amount_minor": 4999},
        {"amount_minor": 5001},  # the payment will say that it was 5000
        {"reference": payment["reference"] + "-2"},
    ]
    for difference in wrong:
        for status in ("completed", "partially_refunded"):
            with psql.transaction(force_rollback=True):
                insert(psql, "charges", charge_row(payment, **difference))
                with pytest.raises(psycopg.errors.CheckViolation, match="no charge that pays it"):
                    move(psql, payment_id, status)
    insert(psql, "charges", charge_row(payment))
    move(psql, payment_id, "completed")


def test_completed_without_such_a_charge_needs_a_recorded_acceptance(psql: Psql, payment_id: str) -> None:
    insert(psql, "charges", charge_row(payment_row(psql, payment_id), amount_minor=4000))
    psql.execute("UPDATE payments SET status = 'review', charge_reference = reference, charged_minor = 4000")
    refuses(psql, "no charge that pays it", "UPDATE payments SET status = 'completed', paid_at = now()")
    psql.execute("UPDATE payments SET status = 'completed', paid_at = now(), accepted_by = 'operator:ada'")


def test_from_review_a_payment_is_refunded_once_the_whole_charge_went_back(psql: Psql, payment_id: str) -> None:
    insert(psql, "charges", charge_row(payment_row(psql, payment_id), amount_minor=4000))
    psql.execute("UPDATE payments SET status = 'review', charge_reference = reference, charged_minor = 4000")
    insert(psql, "refunds", refund_row(psql, amount_minor=3999, status="processed", provider_id=1, processed_at="now"))
    insert(psql, "refunds", refund_row(psql, id=f"RF-{'1' * 26}", amount_minor=1, status="pending", provider_id=2))
    refunded = "UPDATE payments SET status = 'refunded', paid_at = now(), refunded_minor = 4000"
    refuses(psql, "no charge that pays it", refunded)
    psql.execute("UPDATE refunds SET status = 'processed', processed_at = now()")
    psql.execute(refunded)
    psql.execute("UPDATE payments SET status = 'refunded', refunded_minor = 3999")  # one of them failed after all


def test_money_that_never_came_is_never_refunded(psql: Psql, payment_id: str) -> None:
    """Nor what came for a payment that has not been reviewed."""
    refunded = "UPDATE payments SET status = 'refunded', paid_at = now(), charge_reference = reference"
    refuses(psql, "no charge that pays it", refunded)
    insert(psql, "charges", charge_row(payment_row(psql, payment_id), amount_minor=4000))
    insert(psql, "refunds", refund_row(psql, amount_minor=4000, status="processed", provider_id=1, processed_at="now"))
    refuses(psql, "no charge that pays it", f"{refunded}, charged_minor = 4000, refunded_minor = 4000")


@pytest.mark.parametrize("column, value", [("provider_id", "2"), ("amount_minor", "999"), ("currency", "'USD'")])
def test_what_a_refund_gives_back_stands_once_the_provider_took_it(
    shop: Shop, psql: Psql, column: str, value: str
) -> None:
    shop.pay(shop.created()["reference"])
    insert(psql, "refunds", refund_row(psql))
    psql.execute("UPDATE refunds SET status = 'pending', provider_id = 1, amount_minor = 998")
    refuses(psql, "a refund stays what it is", f"UPDATE refunds SET {column} = {value}")


def test_an_incident_is_not_closed_by_nobody(psql: Psql) -> None:
    psql.execute("INSERT INTO incidents (mode, kind, subject) VALUES ('test', 'dispute', 'x')")
    refuses(psql, "a_closed_incident_names_who", "UPDATE incidents SET closed_at = now(), closed_by = ''")


def test_a_new_payment_cannot_be_born_completed_nor_refunded(psql: Psql, payment_id: str) -> None:
    payment = payment_row(psql, payment_id)
    names = "mode", "amount_minor", "currency", "customer_name", "customer_email", "customer_phone", "location"
    born = {name: payment[name] for name in (*names, "source", "expires_at", "created_at")}
    born |= {"id": "PAY-00000000000000000000000000", "reference": "PG-00000000000000000000000000"}
    born |= {"status": "completed", "paid_at": payment["created_at"], "charge_reference": born["reference"]}
    for moved in ({}, {"status": "refunded", "refunded_minor": payment["amount_minor"]}):
        with pytest.raises(psycopg.errors.CheckViolation, match="no charge that pays it"):
            insert(psql, "payments", {**born, "charged_minor": payment["amount_minor"], **moved})


def test_no_row_that_money_hangs_on_is_removed(shop: Shop, psql: Psql) -> None:
    shop.pay(shop.created()["reference"])
    insert(psql, "refunds", refund_row(psql))
    insert(psql, "withdrawn_orders", {"mode": "test", "digest": b"x" * 32, "withdrawn_by": "operator:ada"})
    for table in (
        *("refunds", "payments", "idempotency_keys", "charges", "payment_events", "secrets"),
        "withdrawn_orders",
    ):
        for statement in ("DELETE FROM", "TRUNCATE"):
            cascade = " CASCADE" if statement == "TRUNCATE" else ""
            refuses(psql, "is refused", f"{statement} {table}{cascade}")
        assert psql.execute(f"SELECT count(*) FROM {table}".encode()).fetchone() != {"count": 0}


def test_an_audit_row_a_charge_and_the_secret_never_change(shop: Shop, psql: Psql) -> None:
    shop.pay(shop.created()["reference"])
    for change in (
        "payment_events SET why = 'by_hand'",
        "payment_events SET at = now()",
        "payment_events SET hash = sha256('')",
        "charges SET amount_minor = 1",
        "charges SET payment_id = 'PAY-00000000000000000000000000'",
        "secrets SET value = sha256('')",
        "withdrawn_orders SET digest = sha256('')",
    ):
        refuses(psql, "is refused", f"UPDATE {change}")


def test_a_refund_stays_what_it_is_and_is_answered_once(shop: Shop, psql: Psql) -> None:
    shop.pay(shop.created()["reference"])
    insert(psql, "refunds", refund_row(psql))
    for change in (
        "id = 'RF-00000000000000000000000001'",
        "charge_reference = charge_reference || '-2'",
        "payment_id = 'PAY-00000000000000000000000000'",
        "mode = 'live'",
        "origin = 'dashboard'",
        "created_at = created_at - interval '1 day'",
    ):
        refuses(psql, "a refund stays what it is", f"UPDATE refunds SET {change}")
    psql.execute("UPDATE refunds SET provider_id = 7, status = 'pending'")
    for change in ("provider_id = 8", "provider_id = NULL, status = 'refused'"):
        refuses(psql, "a refund stays what it is", f"UPDATE refunds SET {change}")
    refuses(psql, "a refund stays what it is", "UPDATE refunds SET status = 'unanswered'")


NO_SUCH = {
    "key_has_a_payment": """
        INSERT INTO idempotency_keys (mode, key, fingerprint, payment_id, token)
        SELECT mode, sha256(key), fingerprint, 'PAY-' || repeat('0', 26), token FROM idempotency_keys LIMIT 1
    """,
    "charge_has_a_payment": """
        INSERT INTO charges (reference, payment_id, mode, amount_minor, currency, source)
        VALUES ('PG-' || repeat('0', 26), 'PAY-' || repeat('0', 26), 'test', 1, 'NGN', 'webhook')
    """,
    "refund_has_a_charge": """
        INSERT INTO refunds (id, charge_reference, payment_id, mode, amount_minor, currency, status, origin, made_by)
        SELECT 'RF-' || repeat('1', 26), 'PG-' || repeat('0', 26), payment_id, mode, 1, currency, status, origin, 'ada'
          FROM refunds
    """,
}
BROKEN_RULES = {
    **NO_SUCH,
    "secrets_is_one_row": "INSERT INTO secrets (the_only_row, value) VALUES (false, sha256(''))",
    "mode_is_test_or_live": "UPDATE payments SET mode = 'sandbox'",
    "status_is_known": "UPDATE payments SET status = 'paid' WHERE status = 'pending'",
    "amount_is_positive": "UPDATE payments SET amount_minor = 0",
    "reference_is_used_once": "UPDATE payments SET reference = (SELECT min(reference) FROM payments)",
    "reference_is_pg_and_26_of_base32": "UPDATE payments SET reference = 'PG-1' WHERE status = 'pending'",
    "attempt_is_1_to_9": "UPDATE payments SET attempt = 0",
    "refunded_is_not_negative": "UPDATE payments SET refunded_minor = -1 WHERE status = 'completed'",
    "completed_has_paid_at": "UPDATE payments SET paid_at = NULL WHERE status = 'completed'",
    "money_came_has_a_charge": "UPDATE payments SET status = 'review' WHERE status = 'pending'",
    "charged_is_of_a_charge": "UPDATE payments SET charged_minor = 1 WHERE status = 'pending'",
    "refunded_is_of_a_charge": "UPDATE payments SET refunded_minor = 1 WHERE status = 'pending'",
    "answer_is_known": "UPDATE idempotency_keys SET answer = '503'",
    "an_answer_has_its_time": "UPDATE idempotency_keys SET answer = NULL",
    "charge_reference_is_ours": "UPDATE charges SET reference = 'T685312322670591'",
    "charged_amount_is_not_negative": "UPDATE charges SET amount_minor = -1",
    "refunded_amount_is_positive": "UPDATE refunds SET amount_minor = 0",
    "refund_status_is_known": "UPDATE refunds SET status = 'done', provider_id = 7",
    "the_provider_names_what_it_took": "UPDATE refunds SET status = 'pending'",
    "processed_has_its_time": "UPDATE refunds SET status = 'processed', provider_id = 7",
    "refund_is_recorded_once": """
        INSERT INTO refunds (id, charge_reference, payment_id, mode, amount_minor, currency, status, origin, made_by,
                             provider_id)
        SELECT 'RF-' || repeat(n::text, 26), charge_reference, payment_id, mode, 1, currency, status, origin, 'ada', 7
          FROM refunds, generate_series(1, 2) n
    """,
    "an_event_is_stored_once": """
        INSERT INTO provider_events (mode, digest, outcome) SELECT mode, digest, 'noted' FROM provider_events
    """,
    "only_a_received_event_is_retried": "UPDATE provider_events SET retry_at = now()",
    "a_thing_opens_one_incident": """
        INSERT INTO incidents (mode, kind, subject) VALUES ('test', 'dispute', 'x'), ('test', 'dispute', 'x')
    """,
    "a_closed_incident_names_who": """
        INSERT INTO incidents (mode, kind, subject, closed_at) VALUES ('test', 'dispute', 'x', now())
    """,
    "notifications_are_numbered": """
        INSERT INTO notifications (mode, type, payment_id, sequence, facts)
        SELECT mode, 'x', id, 1, '{}' FROM payments, generate_series(1, 2)
    """,
    "an_ended_notification_is_not_due": """
        INSERT INTO notifications (mode, type, sequence, facts, due_at, dead_at)
        VALUES ('test', 'x', 1, '{}', now(), now())
    """,
    "actor_is_known": "UPDATE payment_events SET actor = 'nobody'",
    "why_is_known": "UPDATE payment_events SET why = 'because'",
    "payment_events_are_numbered": "UPDATE payment_events SET n = 1",
}


def test_each_rule_of_a_row_holds_by_itself_where_every_guard_is_switched_off(shop: Shop, psql: Psql) -> None:
    shop.pay(shop.created()["reference"])
    shop.created()
    insert(psql, "refunds", refund_row(psql))
    for rule, statement in BROKEN_RULES.items():
        with psql.transaction(force_rollback=True):
            if rule not in NO_SUCH:  # foreign keys are triggers too
                psql.execute("SET LOCAL session_replication_role = replica")
            with pytest.raises(psycopg.errors.IntegrityError) as refused:
                psql.execute(statement.encode())
            assert refused.value.diag.constraint_name == rule


def test_a_key_has_one_payment_and_a_payment_one_key(psql: Psql, payment_id: str) -> None:
    with pytest.raises(psycopg.errors.UniqueViolation, match="payment_has_one_key"):
        psql.execute(
            """
            INSERT INTO idempotency_keys (mode, key, fingerprint, payment_id, token)
            SELECT mode, sha256(key), fingerprint, payment_id, token FROM idempotency_keys
            """
        )


# The audit trail


def test_the_trail_says_who_changed_a_payment_and_why(shop: Shop, psql: Psql) -> None:
    payment = shop.created()
    shop.pay(payment["reference"])
    assert [(row["actor"], row["why"], row["from_status"], row["to_status"]) for row in trail(psql, payment["id"])] == [
        ("api", "reserved", None, "pending"),
        ("api", "opened", "pending", "pending"),
        ("webhook", "charge", "pending", "completed"),
    ]
    last = trail(psql, payment["id"])[-1]
    assert (last["amount_minor"], last["currency"], last["mode"], last["reference"]) == (
        *(5000, "NGN", "test"),
        payment["reference"],
    )
    assert (last["charged_minor"], last["refunded_minor"]) == (5000, 0)


def last_change(psql: Psql, payment_id: str) -> tuple[str, str, str]:
    last = trail(psql, payment_id)[-1]
    return last["actor"], last["why"], last["to_status"]


def test_the_trail_names_every_reason(shop: Shop, psql: Psql) -> None:
    provider = shop.sandbox
    declined = shop.created()
    provider.decline(declined["reference"])
    poll(shop)
    assert last_change(psql, declined["id"]) == ("worker", "declined", "pending")
    end_time(shop.database_url, declined["id"])
    poll(shop)
    assert last_change(psql, declined["id"]) == ("worker", "time_over", "failed")
    underpaid = shop.created(customer_email="underpaid@example.com")
    shop.pay(underpaid["reference"])
    assert last_change(psql, underpaid["id"]) == ("webhook", "mismatch", "review")

    words = {"status": False, "message": "Invalid Email Address Passed"}
    provider.fault("initialize", "answer", effect=False, status=400, body=words)
    assert shop.create().status_code == 422
    (refused,) = psql.execute("SELECT id FROM payments WHERE status_reason = %s", [words["message"]]).fetchall()
    assert last_change(psql, refused["id"]) == ("api", "refused", "failed")

    provider.fault("initialize", "lost-request", times=2)
    assert shop.create(key="one").status_code == 503
    (walked,) = psql.execute("SELECT id, reference FROM payments WHERE checkout_url IS NULL AND status = 'pending'")
    for reference in references(walked["reference"]):
        initialize_before(provider, reference)
    assert shop.create(key="one").status_code == 503
    moved, incident = trail(psql, walked["id"])[-2:]
    assert (moved["actor"], moved["why"]) == ("api", "next_reference")
    assert (incident["actor"], incident["why"]) == ("paygate", "noted")  # paygate itself opened it
    check_books(shop.database_url)


def test_the_hashes_of_a_trail_can_be_computed_again_by_anybody(shop: Shop, psql: Psql) -> None:
    for _ in range(3):
        shop.pay(shop.created(customer_name="Жанна O'Neill")["reference"])
    shop.created()
    assert len(check_books(shop.database_url)) == 4


def test_a_change_behind_the_triggers_back_is_found(shop: Shop, psql: Psql) -> None:
    shop.pay(shop.created()["reference"])
    check_books(shop.database_url)
    psql.execute("SET session_replication_role = replica")  # what only a superuser may do
    for change, undoing in (
        ("charged_minor = charged_minor + 1 WHERE n = 2", "charged_minor = charged_minor - 1 WHERE n = 2"),
        ("at = at + interval '1 us' WHERE n = 1", "at = at - interval '1 us' WHERE n = 1"),
        ("actor = 'worker' WHERE n = 3", "actor = 'webhook' WHERE n = 3"),
        ("n = 4 WHERE n = 3", "n = 3 WHERE n = 4"),
    ):
        psql.execute(f"UPDATE payment_events SET {change}".encode())
        with pytest.raises(AssertionError):
            check_books(shop.database_url)
        psql.execute(f"UPDATE payment_events SET {undoing}".encode())
        check_books(shop.database_url)


def test_a_change_in_psql_is_written_down_as_the_database_users(psql: Psql, payment_id: str) -> None:
    changes = {
        "status_reason": "'because'",
        "attempt": "2",
        "expires_at": "expires_at + interval '1 s'",
        "customer_name": "'Jane'",
        "customer_email": "'jane@example.com'",
        "customer_phone": "'1234567'",
        "location": "'Accra'",
        "description": "'Shoes'",
        "metadata": "'{}'",
        "return_url": "'https://shop.example.com'",
        "accepted_by": "'operator:ada'",
        "status": "'expired'",
    }
    for n, (column, value) in enumerate(changes.items(), start=3):
        psql.execute(f"UPDATE payments SET {column} = {value}".encode())
        last = trail(psql, payment_id)[-1]
        assert (last["n"], last["actor"], last["why"]) == (n, f"operator:{psql.info.user}", "by_hand"), column
    check_trail(trail(psql, payment_id))


def test_each_change_but_of_when_to_look_leaves_a_row(shop: Shop, psql: Psql) -> None:
    paid = shop.created()
    shop.pay(paid["reference"])
    shop.sandbox.fault("initialize", "lost-request", times=2)
    assert shop.create(key="one").status_code == 503
    of_paid = {"refunded_minor": "1", "accepted_by": "'operator:ada'", "paid_at": "now()"}
    of_unopened = {
        **{"status": "'failed'", "status_reason": "'x'", "attempt": "2", "checkout_url": "'x'", "expires_at": "now()"},
        **dict.fromkeys(("customer_name", "customer_email", "customer_phone", "location", "description"), "'x'"),
        **{"metadata": "'{}'", "return_url": "'x'", "erased_at": "now()", "salt": "gen_random_uuid()"},
    }
    for status, changes in (("completed", of_paid), ("pending", of_unopened)):
        (payment,) = psql.execute("SELECT id FROM payments WHERE status = %s", [status]).fetchall()
        for column, value in changes.items():
            with psql.transaction(force_rollback=True):
                before = len(trail(psql, payment["id"]))
                psql.execute(f"UPDATE payments SET {column} = {value} WHERE id = %s".encode(), [payment["id"]])
                assert len(trail(psql, payment["id"])) == before + 1, column


def test_when_to_look_next_leaves_no_trail(psql: Psql, payment_id: str) -> None:
    psql.execute("UPDATE payments SET poll_at = now(), polled_at = now()")
    assert len(trail(psql, payment_id)) == 2


def test_changes_at_once_do_not_fork_a_trail(shop: Shop, psql: Psql, payment_id: str) -> None:
    begin = threading.Barrier(20)

    def change(number: int) -> None:
        with psycopg.connect(shop.database_url, autocommit=True) as conn:
            begin.wait(10)
            conn.execute("UPDATE payments SET location = %s", [f"Lagos {number}"])

    with ThreadPoolExecutor(20) as threads:
        list(threads.map(change, range(20)))
    assert len(trail(psql, payment_id)) == 22
    check_trail(trail(psql, payment_id))


def test_an_actor_that_is_not_on_the_list_is_refused(psql: Psql, payment_id: str) -> None:
    for setting, value in (("actor", "nobody"), ("actor", "operator:a\nb"), ("why", "just so")):
        with pytest.raises(psycopg.errors.CheckViolation, match=f"{setting}_is_known"), psql.transaction():
            psql.execute("SELECT set_config(%s, %s, true)", [f"paygate.{setting}", value])
            psql.execute("UPDATE payments SET location = 'Accra'")
