# ruff: noqa: F811  (fixtures are imported by their names)
"""What an operator reads: lists that harm nobody, whole stories, the proof, the comparison and the report."""

import csv
import io
import json
import re
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from html.parser import HTMLParser
from typing import Any

import psycopg
import pytest
from psycopg import sql

import books
import db
import worker
from backstage import look, meanwhile, seconds_of, worker_of
from sandbox import Sandbox
from shop import Shop, open_shop, sandbox, shop, wait_until  # noqa: F401  # fixtures
from test_refunds import settle
from till import Done, Till, open_till, paid, till  # noqa: F401  # fixtures

HARMFUL = {
    "formula": "=HYPERLINK(1)",
    "plus": "+1+1",
    "minus": "-2+3",
    "at": "@SUM(A1)",
    "wide": "＝1+1",
    "quotes": 'John "Johnny" O\'Doe, Jr; x',
    "emoji": "John 👩‍👧 Doe ✔",
    "arabic": "محمد علي",
    "hebrew": "יוחנן דו",
}
UNSTORABLE = {  # no request brings these in, but an import by SQL may
    "tab": "\tJohn\tDoe",
    "lines": "John\r\nDoe",
    "escape": "John \x1b[2J\x1b]0;title\x07 Doe",
    "override": "John \u202eeoD",
}


def as_superuser(till: Till, statement: str, *values: object) -> None:
    """As somebody who may do everything and leaves no trace: no trigger fires, no key is checked."""
    with psycopg.connect(till.database_url) as conn:
        conn.execute("SET session_replication_role = replica")
        conn.execute(sql.SQL(statement), values)


# Lists


def test_the_list_is_newest_first_and_of_one_mode(shop: Shop, till: Till) -> None:
    ids = [shop.created()["id"] for _ in range(3)]
    out = till.did("list")
    assert re.findall(r"PAY-\w{26}", out)[:3] == ids[::-1]
    live = till.did("list", PAYSTACK_SECRET_KEY="sk_live_0123456789abcdef")
    assert "PAY-" not in live


def test_the_list_is_chosen_by_status_customer_and_time(shop: Shop, till: Till) -> None:
    first, second = paid(shop), shop.created(customer_email="Jane@Example.com")

    def listed(*words: str) -> list[str]:
        return [payment["id"] for payment in json.loads(till.did("list", "--json", *words))]

    assert listed("--status", "completed") == [first["id"]]
    assert listed("--email", "jane@example.COM") == [second["id"]]
    assert listed("--limit", "1") == [second["id"]]
    assert listed("--limit", "0") == [second["id"], first["id"]]
    today = datetime.now(UTC).date()
    assert listed("--since", str(today)) == [second["id"], first["id"]]
    assert listed("--until", str(today)) == []
    assert listed("--since", f"{today + timedelta(days=1)}") == []
    assert listed("--status", "refunded") == []


def names_told(till: Till) -> dict[str, list[str]]:
    table = till.did("list", "--limit", "0")
    rows = list(csv.DictReader(io.StringIO(till.did("list", "--limit", "0", "--format", "csv"), newline="")))
    return {
        "table": [line.split(" NGN  ")[1] for line in table.splitlines() if "NGN" in line],
        "csv": [row["customer_name"] for row in rows],
        "json": [row["customer_name"] for row in json.loads(till.did("list", "--limit", "0", "--json"))],
    }


def test_every_name_comes_through_table_csv_and_json_unharmed_and_harmless(shop: Shop, till: Till) -> None:
    for name in HARMFUL.values():
        shop.created(customer_name=name)
    for name in UNSTORABLE.values():
        payment = shop.created()
        as_superuser(till, "UPDATE payments SET customer_name = %s WHERE id = %s", name, payment["id"])
    names = [*HARMFUL.values(), *UNSTORABLE.values()][::-1]
    told = names_told(till)
    assert told["json"] == names
    assert [name.removeprefix("'") for name in told["csv"]] == names
    assert not any(re.match(r"[=+\-@\t\r\n＝＋－＠]", name) for name in told["csv"])
    assert all(name.isprintable() or set(name) & set("\u200d") for name in told["table"])
    assert [line.partition(" <")[0] for line in told["table"]] == [books.plain(name) for name in names]
    assert "\\u001b[2J" in books.plain(UNSTORABLE["escape"])


def test_csv_has_the_members_of_get_and_the_rest_as_its_header(shop: Shop, till: Till) -> None:
    payment = paid(shop, metadata={"order": "7", "sku": "=1"}, location="Lagos")
    (row,) = csv.DictReader(io.StringIO(till.did("list", "--format", "csv")))
    told = shop.get(payment["id"])
    assert list(row) == [*told, "customer_phone", "location", "metadata"]
    assert (row["amount"], row["refunded_amount"], row["status_reason"]) == ("50.00", "0.00", "")
    assert json.loads(row["metadata"]) == {"order": "7", "sku": "=1"}
    (exported,) = json.loads(till.did("list", "--json"))
    assert {name: exported[name] for name in told} == told
    assert exported["metadata"] == {"order": "7", "sku": "=1"}


def test_an_empty_list_is_still_what_a_program_can_read(till: Till) -> None:
    assert json.loads(till.did("list", "--json")) == []
    assert till.did("list", "--format", "csv").count("\n") == 1


# The story


def test_show_tells_the_whole_story_in_order(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"], "--amount", "20", "--reason", "one item", "--by", "Grace")
    settle(shop, sandbox, payment["reference"])
    out = till.did("show", payment["id"])
    steps = (
        "payment of 50.00 NGN asked for → pending",
        "checkout page opened",
        "the request was answered (201)",
        "event charge.success",
        "50.00 NGN came as",
        "paid: 50.00 NGN → completed",
        "of 20.00 NGN asked for (one item)",
        "event refund.processed",
        "was paid out",
        "given back so far: 20.00 NGN → partially_refunded",
    )
    places = [out.find(step) for step in steps]
    assert -1 not in places, steps[places.index(-1)]
    assert places == sorted(places)
    assert "operator:Grace" in out
    assert out.startswith(f"{payment['id']}: 50.00 NGN, partially refunded (TEST)")


def test_show_for_a_program_is_json(shop: Shop, till: Till) -> None:
    payment = paid(shop)
    told = json.loads(till.did("show", payment["reference"], "--json"))
    assert told["payment"]["customer_phone"] == "+2348012345678"
    assert [each["what"] for each in told["timeline"]][-1] == "change"
    assert [each["at"] for each in told["timeline"]] == sorted(each["at"] for each in told["timeline"])
    (charge,) = [each["facts"] for each in told["timeline"] if each["what"] == "charge"]
    assert (charge["amount"], charge["currency"]) == ("50.00", "NGN")


def test_show_finds_a_payment_by_any_of_its_references_in_either_mode(shop: Shop, till: Till) -> None:
    payment = shop.created()
    live = "sk_live_0123456789abcdef"
    for name in (payment["id"], payment["reference"], f"{payment['reference']}-4"):
        assert payment["id"] in till.did("show", name, PAYSTACK_SECRET_KEY=live)


@pytest.mark.parametrize("kind", sorted(books.INCIDENTS))
def test_every_incident_says_what_it_is_and_can_be_closed(shop: Shop, till: Till, kind: str) -> None:
    payment = paid(shop)
    till.sql(
        "INSERT INTO incidents (mode, kind, subject, payment_id) VALUES ('test', %s, 'SUBJECT', %s)",
        *(kind, payment["id"]),
    )
    done = till.run("doctor")
    assert done.status == 1
    (line,) = [line for line in done.out.splitlines() if line.startswith("BAD")]
    assert "incident 1" in line
    assert line.partition("incident 1")[2].strip() in till.did("show", payment["id"])
    till.did("resolve", "--incident", "1", "--reason", "seen to it")
    assert "seen to it" in till.did("show", payment["id"])
    assert till.run("doctor").status == 0
    assert till.run("resolve", "--incident", "1", "--reason", "twice").status == 1


# The proof


@pytest.fixture
def ledger(shop: Shop, sandbox: Sandbox, till: Till) -> list[dict[str, Any]]:
    """Payments in many states: paid, refunded, in review, pending, paid in other ways."""
    payments = [
        paid(shop),
        paid(shop, customer_email="pays-fees@example.com"),
        paid(shop, customer_email="underpaid@example.com"),
        shop.created(),
        paid(shop, amount=70),
    ]
    till.did("refund", payments[4]["id"], "--amount", "30")
    settle(shop, sandbox, payments[4]["reference"])
    return payments


def checkpoint_of(out: str) -> str:
    found = re.search(r"^checkpoint (\d+:[0-9a-f]{64})$", out, re.MULTILINE)
    assert found is not None, out
    return found[1]


def test_whole_books_are_whole_and_give_a_checkpoint(till: Till, ledger: list[dict[str, Any]]) -> None:
    out = till.did("audit")
    assert out.startswith("whole (payments: 5, audit rows: 15)")
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
                                    reference, charged_minor, refunded_minor, hash)
        SELECT payment_id, n + 1, at, actor, why, to_status, to_status, amount_minor, currency, mode, reference,
               charged_minor, refunded_minor, hash
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
        {"has no charge that pays it", "its paid sum", "an event was applied"},
    ),
    "a charge made smaller": (
        "UPDATE charges SET amount_minor = 100 WHERE payment_id = %s",
        {"has no charge that pays it", "its paid sum"},
    ),
    "a charge in another currency": (
        "UPDATE charges SET currency = 'GHS' WHERE payment_id = %s",
        {"has no charge that pays it"},
    ),
    "a charge of the other mode": (
        "UPDATE charges SET mode = 'live' WHERE payment_id = %s",
        {"has no charge that pays it", "not of its mode"},
    ),
    "a removed key": ("DELETE FROM idempotency_keys WHERE payment_id = %s", {"has no idempotency key"}),
    "another checkout page": (
        "UPDATE payments SET checkout_url = 'https://checkout.example.com/other' WHERE id = %s",
        {"its answer gave out another"},
    ),
    "a time of payment taken away": (
        "ALTER TABLE payments DROP CONSTRAINT completed_has_paid_at;"
        " UPDATE payments SET paid_at = NULL WHERE id = '{}'",
        {"is not paid but has a time"},
    ),
    "an acceptance without a record": (
        "UPDATE payments SET accepted_by = 'operator:nobody' WHERE id = %s",
        {"was accepted, but no audit row"},
    ),
    "a second charge that nobody was told of": (
        """
        INSERT INTO charges (reference, payment_id, mode, amount_minor, currency, source)
        SELECT reference || '-2', id, mode, amount_minor, currency, 'worker' FROM payments WHERE id = %s
        """,
        {"was paid twice, and nobody was told"},
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
        {"was paid twice, and nobody was told"},
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
        {"has a refund that is not of its charge's"},
    ),
    "a refund that was never made": (
        """
        INSERT INTO refunds (id, charge_reference, payment_id, mode, provider_id, amount_minor, currency, status,
                             origin, made_by, processed_at)
        SELECT 'RF-0123456789ABCDEFGHJKMNPQRS', charge_reference, id, mode, 1, amount_minor * 2, currency, 'processed',
               'dashboard', 'provider', now() FROM payments WHERE id = %s
        """,
        {"its refunded sum", "more of a charge was given back"},
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
    forged["hash"] = books.event_hash(last["hash"], forged)
    names = [name for name in forged if name != "id"]
    columns, places = ", ".join(names), ", ".join(["%s"] * len(names))
    values = [forged[name] for name in names]
    as_superuser(till, f"INSERT INTO payment_events ({columns}) VALUES ({places})", *values)  # noqa: S608
    done = till.run("audit")
    broken = [line for line in done.out.splitlines() if line.startswith("PAY-")]
    assert (done.status, broken) == (1, [f"{victim}: more than one checkout page was opened to the customer"])


def test_a_guard_that_is_switched_off_is_named(till: Till, ledger: list[dict[str, Any]]) -> None:
    till.sql("ALTER TABLE payments DISABLE TRIGGER a_payment_only_rises")
    done = till.run("audit")
    assert (done.status, "payments.a_payment_only_rises: a guard" in done.out) == (1, True)


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
    with psycopg.connect(till.database_url) as slow, db.reading(till.database_url) as conn:
        slow.execute("UPDATE payments SET status_reason = 'slow' WHERE id = %s", (payment["id"],))
        with pytest.raises(books.Refused, match="a transaction has been writing"):
            books.last_settled_event(conn, within_seconds=0.2)


def test_the_hash_computed_here_is_the_databases(till: Till, ledger: list[dict[str, Any]]) -> None:
    rows = till.sql("SELECT e.*, lag(hash) OVER (PARTITION BY payment_id ORDER BY n) AS before FROM payment_events e")
    assert all(row["hash"] == books.event_hash(row["before"] or "", row) for row in rows)


# Ours against the provider's


def test_books_that_agree_have_no_difference(till: Till, ledger: list[dict[str, Any]]) -> None:
    assert "no difference" in till.did("reconcile")
    assert till.did("reconcile", "--format", "csv") == "payment,reference,difference,there,here,currency\n"


def differing(till: Till, *words: str) -> list[dict[str, str]]:
    done = till.run("reconcile", "--format", "csv", *words)
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert done.status == (1 if rows else 0), done
    return rows


def test_a_charge_that_our_database_lost_is_found(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment, kept = paid(shop), paid(shop)
    lost = f"PG-{'0' * 26}"
    sandbox.charge_elsewhere(lost, amount=7000)
    sandbox.charge_elsewhere(amount=9000)  # another shop's on the same account
    as_superuser(till, "DELETE FROM charges WHERE payment_id = %s", payment["id"])
    rows = {(row["payment"], row["reference"], row["difference"]) for row in differing(till)}
    assert rows == {
        (payment["id"], payment["reference"], "paid, but unknown here"),
        (payment["id"], payment["reference"], "completed here, without a charge"),
        ("", lost, "paid, but unknown here"),
    }
    assert kept["id"] not in till.run("reconcile").out


def test_a_webhook_that_is_still_missing_is_a_difference_until_sync(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = shop.created()
    sandbox.pay(payment["reference"])
    (row,) = differing(till)
    assert (row["payment"], row["there"], row["here"]) == (payment["id"], "50.00", "")
    assert "is completed" in till.did("sync", payment["id"])
    assert differing(till) == []


def test_a_completed_that_the_provider_does_not_know_is_found(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    sandbox.ledger.transactions[payment["reference"]].status = "abandoned"
    (row,) = differing(till)
    assert (row["payment"], row["difference"]) == (payment["id"], "paid here, but not there")


@pytest.mark.parametrize(
    ("members", "difference"),
    [({"amount": 4000}, "another amount"), ({"currency": "GHS"}, "another currency: GHS"), ({"fees": 1}, "other fees")],
)
def test_other_amounts_currencies_and_fees_are_found(
    shop: Shop, sandbox: Sandbox, till: Till, members: dict[str, Any], difference: str
) -> None:
    payment = paid(shop)
    sandbox.alter(payment["reference"], **members)
    (row,) = differing(till)
    assert (row["payment"], row["difference"]) == (payment["id"], difference)


def test_refunds_that_differ_are_found(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    unknown, moved, missing = paid(shop), paid(shop), paid(shop)
    sandbox.dashboard_refund(unknown["reference"], 1000)
    for payment in (moved, missing):
        till.did("refund", payment["id"])
    sandbox.ledger.refund_named(moved["reference"]).status = "processed"
    refund = sandbox.ledger.refund_named(missing["reference"])
    del sandbox.ledger.refunds[refund.id]
    told = {row["payment"]: row["difference"] for row in differing(till)}
    assert told[unknown["id"]].endswith("(pending) unknown here")
    assert told[moved["id"]].endswith("is processed there, pending here")
    assert told[missing["id"]].endswith("(pending) not there")


def test_what_the_other_mode_did_is_no_difference(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    """A provider numbers the refunds of each mode apart: the same number is another refund."""
    ours, others = paid(shop), paid(shop)
    for payment in (ours, others):
        till.did("refund", payment["id"])
    sandbox.alter(others["reference"], domain="live")
    sandbox.ledger.refunds.pop(sandbox.ledger.refund_named(others["reference"]).id)
    (number,) = till.sql("SELECT provider_id FROM refunds WHERE payment_id = %s", ours["id"])
    for table in ("payments", "idempotency_keys", "charges", "refunds"):
        column = "id" if table == "payments" else "payment_id"
        as_superuser(till, f"UPDATE {table} SET mode = 'live' WHERE {column} = %s", others["id"])  # noqa: S608
    as_superuser(
        till,
        "UPDATE refunds SET provider_id = %s, amount_minor = 1 WHERE payment_id = %s",
        number["provider_id"],
        others["id"],
    )
    assert differing(till) == []


def test_reconcile_reads_page_after_page(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    for _ in range(230):
        sandbox.charge_elsewhere()
    assert differing(till) == []
    assert sandbox.calls("list-transactions") >= 3
    sandbox.fault("list-transactions", "garbage", seed=10, probability=0.5)  # the second page
    done = till.run("reconcile")
    assert (done.status, "Paystack gave no answer" in done.err, payment["id"] in done.out) == (1, True, False)


def test_what_happens_while_the_lists_are_read_is_no_difference(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    sandbox.fault("list-refunds", "slow", seconds=3)
    with meanwhile(lambda: till.shell("reconcile", within_seconds=60)) as done:
        wait_until(lambda: sandbox.calls("list-refunds"), 40)  # the transactions have been read
        payment = paid(shop)
    assert done().status == 0, done()
    sandbox.ledger.transactions[payment["reference"]].status = "abandoned"
    assert len(differing(till)) == 1


def test_since_leaves_older_payments_out(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    sandbox.ledger.transactions[payment["reference"]].status = "abandoned"
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).date()
    assert differing(till, "--since", str(tomorrow)) == []


# The report


def report_rows(till: Till, *words: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(till.did("report", "--format", "csv", *words))))


def test_totals_tie_to_the_charges_to_the_last_kobo(shop: Shop, sandbox: Sandbox, open_shop: Any, till: Till) -> None:
    many = open_shop(CURRENCIES="NGN,GHS,XOF")
    places = ["Lagos", "Accra", "=Abidjan", "Kano"]
    orders = [(f"{50 + n}.{n:02d}", "NGN") for n in range(1, 18)] + [("0.10", "GHS"), ("3.33", "GHS"), ("500", "XOF")]
    for n, (amount, currency) in enumerate(orders):
        payment = many.created(amount=amount, currency=currency, location=places[n % 4])
        many.pay(payment["reference"], fees_by_customer=n % 3 == 0)
        if n % 5 == 0:
            till.did("refund", payment["id"])
            settle(many, sandbox, payment["reference"])
    shop.created()  # nobody has paid it
    rows = report_rows(till)
    for currency in ("NGN", "GHS", "XOF"):
        (came,) = shop.sql(
            "SELECT sum(amount_minor)::int AS gross, sum(fees_minor)::int AS fees, count(*)::int AS payments,"
            " (SELECT coalesce(sum(amount_minor), 0)::int FROM refunds WHERE status = 'processed' AND currency = %s)"
            " AS refunds FROM charges WHERE currency = %s",
            *(currency, currency),
        )
        came["net"] = came["gross"] - came["fees"] - came["refunds"]
        for by in ("day", "location", "total"):
            of = [row for row in rows if (row["by"], row["currency"]) == (by, currency)]
            for name in ("gross", "fees", "refunds", "net"):
                assert sum(Decimal(row[name]) for row in of) * 100 == came[name], (by, currency, name)
            assert sum(int(row["payments"]) for row in of) == came["payments"]
    assert {row["key"] for row in rows if row["by"] == "location"} == {"Lagos", "Accra", "'=Abidjan", "Kano"}


def test_the_report_counts_by_the_day_of_the_payment_and_of_the_refund(
    shop: Shop, sandbox: Sandbox, till: Till
) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"])
    settle(shop, sandbox, payment["reference"])
    as_superuser(till, "UPDATE charges SET paid_at = '2026-01-31T23:59:59Z'")
    as_superuser(till, "UPDATE refunds SET processed_at = '2026-02-01T00:00:00Z'")
    january = {row["by"]: row for row in report_rows(till, "--since", "2026-01", "--until", "2026-02")}
    assert (january["day"]["key"], january["total"]["gross"], january["total"]["refunds"]) == (
        "2026-01-31",
        "50.00",
        "0.00",
    )
    february = {row["by"]: row for row in report_rows(till, "--since", "2026-02", "--until", "2026-03")}
    assert (february["total"]["gross"], february["total"]["refunds"], february["total"]["net"]) == (
        "0.00",
        "50.00",
        "-50.00",
    )
    assert "no money moved" in till.did("report", "--since", "2025-01", "--until", "2025-02")
    assert "2026-01-01 to 2026-01-31 (TEST)" in till.did("report", "--since", "2026-01", "--until", "2026-02")


class Page(HTMLParser):
    """What an HTML page holds; `errors` are tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.errors: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "img", "br", "path"):
            self.open.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.errors.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "dd", "h1", "span"):
            self.cells.append(data)


def test_the_html_report_is_one_page_that_loads_nothing(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    place = '<script src="https://evil.example.com/x.js">&amp;</script>'
    payment = paid(shop, amount="1234567.89", location=place)
    text = till.did("report", "--format", "html")
    page = Page(text)
    assert page.errors == [] and page.open == []
    assert not [each for each in page.attributes if each[1] in ("src", "href", "onload", "style")]
    assert "url(" not in text and "@import" not in text and "<script" not in text
    assert place in page.cells
    assert "1,234,567.89" in page.cells
    assert page.attributes.count(("svg", "role", "img")) == 1
    assert len([each for each in page.attributes if each[:2] == ("rect", "height")]) == 1
    assert payment["id"] not in text and "John" not in text


def test_a_report_of_many_locations_names_the_largest_and_adds_up_the_others(shop: Shop, till: Till) -> None:
    for n in range(books.MOST_LOCATIONS + 3):
        paid(shop, amount=100 + n, location=f"Town {n}")
    page = Page(till.did("report", "--format", "html"))
    towns = [cell for cell in page.cells if cell.startswith("Town")]
    assert towns == [f"Town {n}" for n in range(books.MOST_LOCATIONS + 2, 2, -1)]
    assert page.cells[page.cells.index("others") + 2] == "303.00"


# Privacy

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
    assert len({each.partition(":")[0] for each in traces(till)}) >= 5
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
    look(shop)
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


def test_pruning_removes_old_bodies_and_delivered_notifications_and_nothing_else(
    open_shop: Callable[..., Shop], till: Till
) -> None:
    shop = open_shop(RETENTION_DAYS="30")
    old, new = paid(shop), paid(shop)
    failed_body, _ = shop.sandbox.event(new["reference"], "charge.success", id=1)
    shop.sql(
        "UPDATE provider_events SET received_at = now() - interval '31 days' WHERE reference = %s", old["reference"]
    )
    shop.sql(
        "INSERT INTO provider_events (mode, digest, name, reference, body, outcome, retry_at, received_at)"
        " VALUES ('test', sha256('x'), 'charge.success', %s, %s, 'received', now() + interval '1 h',"
        " now() - interval '40 days')",
        *(old["reference"], failed_body.decode()),
    )
    for days, delivered in ((31, True), (29, True), (31, False)):
        shop.sql(
            "INSERT INTO notifications (mode, type, sequence, facts, made_at, delivered_at, dead_at) SELECT 'test',"
            " 'payment.completed', 1, '{}', at, CASE WHEN %s THEN at END, CASE WHEN NOT %s THEN at END"
            " FROM (SELECT now() - make_interval(days => %s) AS at) AS aged",
            *(delivered, delivered, days),
        )
    worker_of(shop).prune()
    kept = shop.sql("SELECT outcome, reference, body IS NOT NULL AS kept FROM provider_events ORDER BY id")
    assert [(row["outcome"], row["kept"]) for row in kept] == [
        ("applied", False),
        ("applied", True),
        ("received", True),
    ]
    left = shop.sql("SELECT dead_at IS NOT NULL AS dead FROM notifications ORDER BY made_at")
    assert [row["dead"] for row in left] == [True, False]
    till.did("audit")
    # It is done once a day, whatever else runs.
    shop.sql("UPDATE provider_events SET received_at = now() - interval '31 days'")
    worker_of(shop).prune()
    assert shop.sql("SELECT count(*) AS n FROM provider_events WHERE body IS NOT NULL")[0]["n"] == 2


def deliver_long_ago(shop: Shop, number: int) -> None:
    shop.sql(
        "INSERT INTO notifications (mode, type, sequence, facts, delivered_at)"
        " SELECT 'test', 'payment.completed', 1, '{}', now() - interval '100 days' FROM generate_series(1, %s)",
        number,
    )


def test_pruning_a_backlog_leaves_pauses_for_the_requests(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "PRUNING_PAUSE_SECONDS", 0.5)  # longer than the work itself may take
    backlog = 2 * worker.PRUNING_BATCH + 1
    deliver_long_ago(shop, backlog)
    pruned, seconds = seconds_of(worker_of(shop).prune_all)
    assert (pruned, shop.sql("SELECT 1 AS n FROM notifications")) == (backlog, [])
    assert seconds > 1


def test_pruning_a_backlog_ends_after_a_batch_when_the_service_stops(shop: Shop) -> None:
    deliver_long_ago(shop, 2 * worker.PRUNING_BATCH)
    pruner = worker_of(shop)
    pruner.stopping.set()
    assert pruner.prune_all() == worker.PRUNING_BATCH


def test_pruned_notifications_leave_the_numbers_going_on(open_shop: Callable[..., Shop], till: Till) -> None:
    shop = open_shop(NOTIFY_URL="http://127.0.0.1:9/", NOTIFY_SECRET="whsec_" + "QUFB" * 11)
    payment = paid(shop)
    shop.sql("UPDATE notifications SET due_at = NULL, delivered_at = now() - interval '100 days'")
    worker_of(shop).prune()
    assert shop.sql("SELECT 1 AS n FROM notifications") == []
    shop.sandbox.dashboard_refund(payment["reference"], 1000)
    settle(shop, shop.sandbox, payment["reference"])
    assert [row["sequence"] for row in shop.sql("SELECT sequence FROM notifications")] == [2]
