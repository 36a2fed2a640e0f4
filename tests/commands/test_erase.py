# ruff: noqa: F811  (fixtures are imported by their names)
"""A person's data are erased: nothing is left of them, and the books stay whole."""

from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

import db
import refunds
from backstage import poll, refuse_charges, second_of_two, worker_of
from commands import erase
from ledger import checkpoint_of
from local.sandbox import Sandbox
from money_back import incidents, settle
from shop import Shop, open_shop, sandbox, shop  # noqa: F401  # fixtures
from till import Till, open_till, paid, till  # noqa: F401  # fixtures

PERSON: dict[str, Any] = {
    "customer_name": "Ngozi Okonkwo-Test",
    "customer_email": "ngozi.okonkwo@example.com",
    "customer_phone": "+2349087654321",
    "location": "Umuahia North 17",
    "description": "a blue dress for Ngozi",
    "metadata": {"gift": "for Chidera"},
}
TRACES = ("Ngozi", "ngozi", "9087654321", "Umuahia", "blue dress", "Chidera", "secretly")


def traces(till: Till) -> list[str]:
    """Every table that holds something of the person, wherever it stands in a row."""
    tables = till.sql(
        "SELECT c.oid::regclass::text AS name FROM pg_class c WHERE relkind = 'r' AND relnamespace ="
        " current_schema()::regnamespace"
    )
    found = []
    for table in (row["name"] for row in tables):
        for row in till.sql(f"SELECT to_jsonb(t)::text AS text FROM {table} t"):  # noqa: S608
            found += [f"{table}: {trace}" for trace in TRACES if trace in row["text"]]
    return found


@pytest.fixture
def person(shop: Shop, sandbox: Sandbox, till: Till) -> dict[str, Any]:
    """A payment with data of a person in every place that there is, and all of it settled."""
    payment = shop.created(**PERSON)
    shop.pay(payment["reference"], amount=4000)  # in review
    till.did("resolve", payment["id"], "reject", "--reason", "Ngozi paid secretly too little")
    settle(shop, sandbox, payment["reference"])
    sandbox.dispute(payment["reference"])
    assert shop.deliver(payment["reference"], "charge.dispute.create").status_code == 200
    till.did("resolve", "--incident", "2", "--reason", "Ngozi called secretly")
    assert len({each.partition(":")[0] for each in traces(till)}) >= 4
    return payment


def test_after_erase_no_table_holds_the_person(shop: Shop, till: Till, person: dict[str, Any]) -> None:
    before = till.did("audit")
    assert "erased" in till.did("erase", person["id"])
    assert traces(till) == []
    till.did("audit", "--against", checkpoint_of(before))
    (left,) = till.sql("SELECT description, metadata, return_url FROM payments WHERE id = %s", person["id"])
    assert left == {"description": "erased", "metadata": None, "return_url": None}
    told = shop.get(person["id"])
    assert (told["customer_name"], told["customer_email"]) == ("erased", "erased")
    assert (told["amount"], told["status"], told["refunded_amount"]) == (50, "refunded", 40)
    assert "the personal data were erased" in till.did("show", person["id"])
    assert "erased before" in till.did("erase", person["id"])


def test_nobody_can_try_out_on_an_old_digest_who_it_was(shop: Shop, till: Till) -> None:
    """All else is known: the whole row as it was, and what is in it since."""
    payment = shop.created(**PERSON)
    guess = "SELECT to_jsonb(p) AS payment, encode(k.fingerprint, 'hex') AS print FROM payments p, idempotency_keys k"
    (known,) = till.sql(guess)
    with psycopg.connect(shop.database_url) as conn:
        assert digest_of(conn, known) in digests(conn)
    shop.pay(payment["reference"])
    till.did("erase", payment["id"])
    (left,) = till.sql(guess)
    known["payment"] |= {"salt": left["payment"]["salt"]}
    with psycopg.connect(shop.database_url) as conn:
        conn.execute("UPDATE idempotency_keys SET fingerprint = decode(%s, 'hex')", (known["print"],))
        assert digest_of(conn, known) not in digests(conn)
        conn.rollback()


def digest_of(conn: psycopg.Connection[Any], known: dict[str, Any]) -> bytes:
    """The digest of a payment's row as it is guessed."""
    query = "SELECT payment_digest(jsonb_populate_record(NULL::payments, %s))"
    row = conn.execute(query, (Jsonb(known["payment"]),)).fetchone()
    assert row is not None
    return bytes(row[0])


def digests(conn: psycopg.Connection[Any]) -> list[bytes]:
    return [bytes(digest) for (digest,) in conn.execute("SELECT digest FROM payment_events")]


def test_a_retry_after_erase_reveals_and_changes_nothing(shop: Shop, till: Till) -> None:
    payment = shop.created(key="order-1", **PERSON)
    shop.pay(payment["reference"])
    till.did("erase", payment["id"])
    answer = shop.create(key="order-1", **PERSON)
    assert (answer.status_code, answer.json["code"]) == (422, "idempotency_key_reused")
    assert traces(till) == []


def test_later_events_of_an_erased_payment_leave_no_trace(
    shop: Shop, sandbox: Sandbox, till: Till, person: dict[str, Any]
) -> None:
    till.did("erase", person["id"])
    sandbox.dashboard_refund(person["reference"], 500)
    for event, members in (
        ("charge.success", {}),
        ("refund.pending", {}),
        ("charge.dispute.remind", {}),
        ("charge.success", {"domain": "live"}),
        ("subscription.create", {}),
    ):
        if event == "charge.dispute.remind":
            sandbox.remind_dispute(sandbox.disputes()[0]["id"])
        assert shop.deliver(person["reference"], event, **members).status_code == 200
    poll(shop)
    assert traces(till) == []
    assert till.run("audit").status == 0


def test_what_is_still_needed_is_not_erased(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    pending, ended, refunding = shop.created(**PERSON), shop.created(**PERSON), paid(shop, **PERSON)
    settled = paid(shop, **PERSON)
    till.sql(
        "UPDATE payments SET status = 'expired', expires_at = now() - interval '29 days' WHERE id = %s", ended["id"]
    )
    till.did("refund", refunding["id"])
    for payment, words in ((pending, "may still be paid"), (ended, "late money"), (refunding, "is under way")):
        done = till.run("erase", payment["id"])
        assert (done.status, words in done.err) == (1, True), done
    done = till.run("erase", "--email", PERSON["customer_email"].upper())
    assert done.status == 1
    assert [line.split(":")[0] for line in done.out.splitlines()] == [settled["id"]]
    for payment in (pending, ended, refunding):
        assert payment["id"] in done.err

    till.sql("UPDATE payments SET expires_at = now() - interval '31 days' WHERE id = %s", ended["id"])
    settle(shop, sandbox, refunding["reference"])
    for payment in (ended, refunding):
        till.did("erase", payment["id"])
    assert till.run("erase", "--email", "nobody@example.com").status == 1


def test_nothing_is_erased_while_an_event_is_still_to_be_applied(shop: Shop, till: Till) -> None:
    payment = paid(shop, **PERSON)
    second = payment["reference"] + "-2"
    shop.sandbox.charge_elsewhere(second)
    refuse_charges(shop)
    assert shop.deliver(second).status_code == 200
    done = till.run("erase", payment["id"])
    assert (done.status, "has not been applied" in done.err) == (1, True), done
    shop.sql("DROP TRIGGER a_bug ON charges")
    shop.sql("UPDATE provider_events SET retry_at = now() WHERE retry_at IS NOT NULL")
    worker_of(shop).apply_events()
    assert incidents(shop) == ["second_charge"]


def test_dry_run_erases_nothing(shop: Shop, till: Till, person: dict[str, Any]) -> None:
    before = traces(till)
    assert "would be erased" in till.did("erase", person["id"], "--dry-run")
    assert traces(till) == before


def test_the_reason_of_a_refusal_is_erased(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    sandbox.fault(
        "initialize", "answer", status=400, body={"status": False, "message": "Invalid Email ngozi@example.com passed"}
    )
    assert shop.create(**PERSON).status_code == 422
    (payment,) = till.sql("SELECT id FROM payments")
    till.sql("UPDATE payments SET expires_at = now() - interval '31 days'")
    till.did("erase", payment["id"])
    assert traces(till) == []


def test_a_refund_that_is_asked_for_at_the_same_moment_keeps_the_person(shop: Shop) -> None:
    payment = paid(shop, **PERSON)
    request = refunds.Request(payment["id"], None, "operator:ada")
    with pytest.raises(db.Impossible, match="is under way"):
        second_of_two(
            shop,
            lambda database: refunds.begin(database, "test", request),
            lambda database: erase.erase_payment(database, payment["id"], "operator:grace"),
        )


def test_who_erases_waits_for_the_key_before_he_takes_the_payment(shop: Shop) -> None:
    """In the order of all that take both, or each of two may wait for the other."""
    payment = paid(shop)
    lock_keys = "SELECT FROM idempotency_keys FOR UPDATE"
    assert second_of_two(
        shop,
        lambda database: database.run(lambda conn: conn.execute(lock_keys)),
        lambda database: erase.erase_payment(database, payment["id"], "operator:grace"),
        leaves="payments",
    )


def test_what_is_written_of_the_person_after_an_erasure_is_erased_by_the_next(
    shop: Shop, sandbox: Sandbox, till: Till
) -> None:
    payment = paid(shop, **PERSON)
    till.did("erase", payment["id"])
    till.did("refund", payment["id"], "--amount", "10.00", "--reason", "Ngozi secretly called")
    assert till.run("erase", payment["id"]).status == 1, "the refund is under way"
    settle(shop, sandbox, payment["reference"])
    sandbox.dispute(payment["reference"])
    assert shop.deliver(payment["reference"], "charge.dispute.create").status_code == 200
    till.did("resolve", "--incident", "1", "--reason", "Ngozi called secretly")
    assert traces(till) != []
    for _ in range(2):
        assert "has been erased before" in till.did("erase", payment["id"], "--by", "grace")
    assert traces(till) == []
    rows = till.sql("SELECT count(*) AS n FROM payment_events WHERE actor = 'operator:grace'")
    assert rows == [{"n": 2}], "the refund's and the incident's, once"
    till.did("audit")


def test_no_address_is_nobodys(shop: Shop, till: Till) -> None:
    paid(shop)
    refused = till.run("erase", "--email", "", "--yes")
    assert (refused.status, "no payment of" in refused.err) == (1, True)
