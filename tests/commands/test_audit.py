# ruff: noqa: F811  (fixtures are imported by their names)
"""The proof: what was tampered with is named, and nothing else."""

import threading
import time
from datetime import timedelta
from typing import Any

import psycopg
import pytest

import commands
from commands import audit
from ledger import as_superuser, checkpoint_of, ledger  # noqa: F401  # fixtures
from local.sandbox import Sandbox
from shop import Shop, open_shop, sandbox, shop, wait_until  # noqa: F401  # fixtures
from till import Done, Till, open_till, paid, till  # noqa: F401  # fixtures


def test_whole_books_are_whole_and_give_a_checkpoint(till: Till, ledger: list[dict[str, Any]]) -> None:
    out = till.did("audit")
    assert out.startswith("whole (payments: 5, audit rows: 19)")
    assert till.did("audit", "--against", checkpoint_of(out))
    assert checkpoint_of(till.did("audit")) == checkpoint_of(out)


def test_a_checkpoint_still_holds_after_more_has_happened(shop: Shop, till: Till, ledger: list[dict[str, Any]]) -> None:
    checkpoint = checkpoint_of(till.did("audit"))
    paid(shop)
    out = till.did("audit", "--against", checkpoint)
    assert checkpoint_of(out) != checkpoint


def test_an_empty_database_is_whole(till: Till) -> None:
    checkpoint = checkpoint_of(till.did("audit"))
    assert checkpoint.startswith("0:")
    till.did("audit", "--against", checkpoint)


PROVES = "is not what its last audit row proves"

TAMPERED = {
    "a changed amount": (
        "UPDATE payments SET amount_minor = amount_minor - 100 WHERE id = %s",
        {"amount_minor 4900 for 5000", "has no charge that pays it"},
    ),
    "a forged completed": (
        """
        UPDATE payments SET status = 'completed', paid_at = now(), charge_reference = reference, charged_minor = 5000
         WHERE id = %s
        """,
        {"to_status completed for pending", "has no charge that pays it", "its paid sum"},
    ),
    "a changed audit row": (
        "UPDATE payment_events SET actor = 'worker' WHERE payment_id = %s AND n = 2",
        {"row 2 was"},
    ),
    "a changed audit row that changes the state": (
        "UPDATE payment_events SET to_status = 'failed' WHERE payment_id = %s AND n = 2",
        {"row 2 was"},
    ),
    "the time of an audit row": (
        "UPDATE payment_events SET at = at + interval '1 us' WHERE payment_id = %s AND n = 1",
        {"row 1 was"},
    ),
    "a removed audit row": ("DELETE FROM payment_events WHERE payment_id = %s AND n = 2", {"row 2 is missing"}),
    "two removed audit rows": (
        "DELETE FROM payment_events WHERE payment_id = %s AND n < 3",
        {"row 1 is missing, and 1 more"},
    ),
    "the first audit row": ("DELETE FROM payment_events WHERE payment_id = %s AND n = 1", {"row 1 is missing"}),
    "the last audit row removed": (
        "DELETE FROM payment_events WHERE payment_id = %s AND n = 3",
        {"is not what its last audit row says"},
    ),
    "all audit rows removed": ("DELETE FROM payment_events WHERE payment_id = %s", {"has no audit row"}),
    "an inserted audit row": (
        """
        INSERT INTO payment_events (payment_id, n, at, actor, why, from_status, to_status, amount_minor, currency, mode,
                                    reference, charged_minor, refunded_minor, digest, hash)
        SELECT payment_id, n + 1, at, actor, why, to_status, to_status, amount_minor, currency, mode, reference,
               charged_minor, refunded_minor, digest, hash
          FROM payment_events WHERE payment_id = %s ORDER BY n DESC LIMIT 1
        """,
        {"row 4 was"},
    ),
    "a removed payment": ("DELETE FROM payments WHERE id = %s", {"its row is gone", "is gone, but its key"}),
    "a payment removed with its audit rows": (
        "WITH trail AS (DELETE FROM payment_events WHERE payment_id = %s RETURNING payment_id)"
        " DELETE FROM payments WHERE id IN (SELECT payment_id FROM trail)",
        {"is gone, but its key or its money is here"},
    ),
    "a removed charge": (
        "DELETE FROM charges WHERE payment_id = %s",
        {"has no charge that pays it", "its paid sum", "an event was applied", PROVES},
    ),
    "a charge made smaller": (
        "UPDATE charges SET amount_minor = 100 WHERE payment_id = %s",
        {"has no charge that pays it", "its paid sum", PROVES},
    ),
    "a charge in another currency": (
        "UPDATE charges SET currency = 'GHS' WHERE payment_id = %s",
        {"has no charge that pays it", PROVES},
    ),
    "a charge of the other mode": (
        "UPDATE charges SET mode = 'live' WHERE payment_id = %s",
        {"has no charge that pays it", "not of its mode", PROVES},
    ),
    "a removed key": ("DELETE FROM idempotency_keys WHERE payment_id = %s", {"has no idempotency key", PROVES}),
    "another checkout page": (
        "UPDATE payments SET checkout_url = 'https://checkout.example.com/other' WHERE id = %s",
        {PROVES},
    ),
    "a time of payment taken away": (
        "ALTER TABLE payments DROP CONSTRAINT completed_has_paid_at;"
        " UPDATE payments SET paid_at = NULL WHERE id = '{}'",
        {PROVES},
    ),
    "an acceptance without a record": (
        "UPDATE payments SET accepted_by = 'operator:nobody' WHERE id = %s",
        {"was accepted, but no audit row", PROVES},
    ),
    "a second charge that nobody was told of": (
        """
        INSERT INTO charges (reference, payment_id, mode, amount_minor, currency, source)
        SELECT reference || '-2', id, mode, amount_minor, currency, 'worker' FROM payments WHERE id = %s
        """,
        {"was paid twice, and nobody was told", PROVES},
    ),
    "a second charge of which nobody was told but another thing": (
        """
        WITH second AS (
            INSERT INTO charges (reference, payment_id, mode, amount_minor, currency, source)
            SELECT reference || '-2', id, mode, amount_minor, currency, 'worker' FROM payments WHERE id = %s
            RETURNING *
        )
        INSERT INTO incidents (mode, kind, subject, payment_id)
        SELECT mode, 'mismatch', reference, payment_id FROM second
        """,
        {"was paid twice, and nobody was told", PROVES},
    ),
    "a charge of another payment's reference": (
        """
        INSERT INTO charges (reference, payment_id, mode, amount_minor, currency, source)
        SELECT 'PG-' || repeat('0', 26), id, mode, amount_minor, currency, 'worker' FROM payments WHERE id = %s
        """,
        {"was paid twice, and nobody was told", "not of its references"},
    ),
    "a refund of the other mode": (
        "UPDATE refunds SET mode = 'live' WHERE payment_id = %s",
        {"has a refund that is not of its charge's", PROVES},
    ),
    "a refund that was never made": (
        """
        INSERT INTO refunds (id, charge_reference, payment_id, mode, provider_id, amount_minor, currency, status,
                             origin, made_by, processed_at)
        SELECT 'RF-0123456789ABCDEFGHJKMNPQRS', charge_reference, id, mode, 1, amount_minor * 2, currency, 'processed',
               'dashboard', 'provider', now() FROM payments WHERE id = %s
        """,
        {"its refunded sum", "more of a charge was given back", PROVES},
    ),
}


@pytest.mark.parametrize("change", ["why = 'charge'", "from_status = 'pending'", "to_status = 'expired'"])
def test_a_trail_begins_with_the_reservation_of_a_pending_payment(
    till: Till, ledger: list[dict[str, Any]], change: str
) -> None:
    """Whoever forges the beginning, and makes the chain whole again, tells another story than the service does."""
    victim = ledger[0]["id"]
    as_superuser(till, f"UPDATE payment_events SET {change} WHERE payment_id = %s AND n = 1", victim)  # noqa: S608  # ours
    for n in (1, 2, 3):
        as_superuser(till, REHASH, victim, n)
    done = till.run("audit")
    assert (done.status, "audit row 1 cannot stand where it does" in done.out) == (1, True)


@pytest.mark.parametrize("what", TAMPERED)
def test_audit_names_what_was_tampered_with_and_nothing_else(
    till: Till, ledger: list[dict[str, Any]], what: str
) -> None:
    statement, findings = TAMPERED[what]
    victim = ledger[{"a forged completed": 3, "a refund of the other mode": 4}.get(what, 0)]["id"]
    if "{}" in statement:
        as_superuser(till, statement.format(victim))
    else:
        as_superuser(till, statement, victim)
    done = till.run("audit")
    assert done.status == 1
    broken = [line for line in done.out.splitlines() if line.startswith("PAY-")]
    assert all(line.startswith(victim) for line in broken), done.out
    assert len(broken) == len(findings), done.out
    for finding in findings:
        assert any(finding in line for line in broken), (finding, done.out)


def test_a_second_checkout_page_is_found_though_its_audit_row_is_sound(
    till: Till, ledger: list[dict[str, Any]]
) -> None:
    victim = ledger[0]["id"]
    last = till.sql("SELECT * FROM payment_events WHERE payment_id = %s ORDER BY n DESC LIMIT 1", victim)[0]
    forged = {**last, "n": 4, "why": "opened", "from_status": "completed", "at": last["at"] + timedelta(seconds=1)}
    forged["hash"] = audit.audit_row_hash(last["hash"], forged)
    names = [name for name in forged if name != "id"]
    columns, places = ", ".join(names), ", ".join(["%s"] * len(names))
    values = [forged[name] for name in names]
    as_superuser(till, f"INSERT INTO payment_events ({columns}) VALUES ({places})", *values)  # noqa: S608
    done = till.run("audit")
    broken = [line for line in done.out.splitlines() if line.startswith("PAY-")]
    assert (done.status, broken) == (1, [f"{victim}: more than one checkout page was opened to the customer"])


def test_what_changes_beside_a_payment_is_noted_in_its_trail(till: Till, ledger: list[dict[str, Any]]) -> None:
    (incident,) = till.sql("SELECT id, payment_id FROM incidents WHERE kind = 'mismatch'")
    trail = "SELECT actor, why, from_status = to_status AS stays FROM payment_events WHERE payment_id = %s ORDER BY n"
    assert {"actor": "paygate", "why": "noted", "stays": True} in till.sql(trail, incident["payment_id"])
    till.did("resolve", "--incident", str(incident["id"]), "--reason", "seen", "--by", "Grace")
    last = till.sql(trail, incident["payment_id"])[-1]
    assert last == {"actor": "operator:Grace", "why": "noted", "stays": True}
    till.did("audit")


def test_a_guard_that_is_switched_off_is_named(till: Till, ledger: list[dict[str, Any]]) -> None:
    till.sql("ALTER TABLE payments DISABLE TRIGGER a_payment_only_rises")
    done = till.run("audit")
    assert (done.status, "payments.a_payment_only_rises: a guard of the database is switched off" in done.out) == (
        1,
        True,
    )


REHASH = """
    UPDATE payment_events e SET hash = payment_event_hash(
        (SELECT hash FROM payment_events p WHERE p.payment_id = e.payment_id AND p.n = e.n - 1), e)
     WHERE payment_id = %s AND n = %s
"""


def test_a_forger_who_knows_the_hash_is_found_against_the_checkpoint(till: Till, ledger: list[dict[str, Any]]) -> None:
    """The last row and the payment's own are changed, and the chain is made whole again."""
    checkpoint, victim = checkpoint_of(till.did("audit")), ledger[0]["id"]
    as_superuser(till, "UPDATE payment_events SET actor = 'worker' WHERE payment_id = %s AND n = 3", victim)
    as_superuser(till, REHASH, victim, 3)
    till.did("audit")
    done = till.run("audit", "--against", checkpoint)
    assert (done.status, "was changed, removed or put in" in done.out) == (1, True)


def test_a_payment_removed_without_a_trace_is_found_against_the_checkpoint(
    till: Till, ledger: list[dict[str, Any]]
) -> None:
    checkpoint, victim = checkpoint_of(till.did("audit")), ledger[4]["id"]
    tables = ("payment_events", "idempotency_keys", "refunds", "charges", "incidents", "provider_events")
    for table in tables:
        as_superuser(till, f"DELETE FROM {table} WHERE payment_id = %s", victim)  # noqa: S608
    as_superuser(till, "DELETE FROM payments WHERE id = %s", victim)
    till.did("audit")
    done = till.run("audit", "--against", checkpoint)
    assert (done.status, "checkpoint" in done.out) == (1, True)


def test_a_checkpoint_of_another_database_is_no_checkpoint(till: Till, ledger: list[dict[str, Any]]) -> None:
    done = till.run("audit", "--against", f"1000000:{'0' * 64}")
    assert (done.status, "later ones were removed" in done.out) == (1, True)


def test_no_transaction_in_flight_slips_below_the_checkpoint(shop: Shop, till: Till) -> None:
    """One that has taken its number and not committed yet would be missing from the checkpoint, and look put in."""
    first, second = shop.created(), shop.created()
    slow = psycopg.connect(till.database_url)
    slow.execute("UPDATE payments SET status_reason = 'slow' WHERE id = %s", (first["id"],))
    till.sql("UPDATE payments SET status_reason = 'quick' WHERE id = %s", second["id"])
    audited: list[Done] = []
    thread = threading.Thread(target=lambda: audited.append(till.shell("audit")))
    thread.start()
    waits = "SELECT 1 AS n FROM pg_stat_activity WHERE query LIKE '%pg_locks%' AND pid <> pg_backend_pid()"
    wait_until(lambda: till.sql(waits), 40)
    till.sql("UPDATE payments SET status_reason = 'later' WHERE id = %s", second["id"])  # not below it any more
    time.sleep(0.3)
    assert audited == []
    slow.commit()
    slow.close()
    thread.join(40)
    assert audited[0].status == 0, audited
    till.did("audit", "--against", checkpoint_of(audited[0].out))


def test_a_transaction_that_never_ends_stops_the_audit_with_a_line(
    shop: Shop, till: Till, monkeypatch: pytest.MonkeyPatch
) -> None:
    payment = shop.created()
    with psycopg.connect(till.database_url) as slow, commands.reading(till.database_url) as conn:
        slow.execute("UPDATE payments SET status_reason = 'slow' WHERE id = %s", (payment["id"],))
        with pytest.raises(commands.Refused, match="a transaction has been writing"):
            audit.newest_audit_row(conn, within_seconds=0.2)


def test_the_hash_computed_here_is_the_databases(till: Till, ledger: list[dict[str, Any]]) -> None:
    rows = till.sql("SELECT e.*, lag(hash) OVER (PARTITION BY payment_id ORDER BY n) AS before FROM payment_events e")
    assert all(row["hash"] == audit.audit_row_hash(row["before"] or b"", row) for row in rows)


def test_unknown_money_that_cannot_be_read_was_told_of(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    paid(shop)
    unknown = f"PG-{'0' * 26}"
    sandbox.charge_elsewhere(unknown)
    assert shop.deliver(unknown, amount=None).status_code == 200
    till.did("audit")
