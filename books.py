"""What an operator reads: payments, the story of one, ours against the provider's, the proof, the report.

Nothing here changes a row. Rows are streamed from the server, so that memory stays flat for any number of them.
"""

import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

from markupsafe import Markup
from psycopg import sql

import db
import money

Row = dict[str, Any]
Watch = Callable[[Iterator[Any], int], Iterable[Any]]
"""Hands things on and shows how far it is; the int is how many there will be."""

PAGES = Path(__file__).with_name("pages")
EXPORTED = ("customer_phone", "location", "metadata")
"""What an export has besides the members that GET gives out."""
EXPORT_HEADER = (
    *("id", "customer_name", "customer_email", "amount", "status", "currency", "reference", "checkout_url"),
    *("status_reason", "mode", "created_at", "paid_at", "refunded_amount", *EXPORTED),
)


class Refused(Exception):
    """A command cannot be carried out: the line that says why."""


@contextmanager
def one_moment(conn: db.BoundedConnection) -> Iterator[None]:
    """A transaction in which everything is read as it stood at one moment."""
    with conn.transaction():
        conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        # A cursor is read to its end here: plan for that, not for the first rows.
        conn.execute("SELECT set_config('cursor_tuple_fraction', '1', true)")
        yield


def stream(conn: db.BoundedConnection, query: str, values: Row | None = None) -> Iterator[Row]:
    """The rows of a query, a few thousand at a time."""
    with conn.transaction(), conn.cursor(name="books") as cursor:
        cursor.itersize = 2000
        cursor.execute(sql.SQL(query), values)
        yield from cursor


def only(conn: db.BoundedConnection, query: str, values: Row | None = None) -> Row:
    """The one row of a query."""
    return conn.execute(sql.SQL(query), values).fetchone() or {}


# Payments


def payments(
    conn: db.BoundedConnection,
    mode: str,
    *,
    status: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    email: str | None = None,
    limit: int | None = None,
) -> Iterator[db.Payment]:
    """The payments of a mode, newest first; `until` is exclusive, `limit` None means all."""
    rows = stream(
        conn,
        """
        SELECT * FROM payments
         WHERE mode = %(mode)s AND (%(status)s::text IS NULL OR status = %(status)s)
           AND (%(since)s::timestamptz IS NULL OR created_at >= %(since)s)
           AND (%(until)s::timestamptz IS NULL OR created_at < %(until)s)
           AND (%(email)s::text IS NULL OR lower(customer_email) = lower(%(email)s))
         ORDER BY created_at DESC, id LIMIT %(limit)s
        """,
        {"mode": mode, "status": status, "since": since, "until": until, "email": email, "limit": limit},
    )
    return map(db.Payment.of, rows)


def payment_named(conn: db.BoundedConnection, name: str) -> db.Payment | None:
    """The payment of an id or of one of its references, in either mode."""
    reference = db.REFERENCE_PATTERN.fullmatch(name)
    row = only(
        conn,
        "SELECT * FROM payments WHERE id = %(name)s OR reference = %(base)s",
        {"name": name, "base": reference[1] if reference else None},
    )
    return db.Payment.of(row) if row else None


def payments_of(conn: db.BoundedConnection, email: str) -> Iterator[str]:
    """The ids of a customer's payments, of both modes."""
    query = "SELECT id FROM payments WHERE lower(customer_email) = lower(%(email)s) ORDER BY id"
    return (row["id"] for row in stream(conn, query, {"email": email}))


CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def plain(text: str) -> str:
    """Text for a terminal: what would break the line, move the cursor or turn the direction is written out."""
    return CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def cell(text: str) -> str:
    """Text for a spreadsheet, which would run what begins so: quoted, unless it is a number."""
    is_run = text.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠"))
    return f"'{text}" if is_run and not money.NUMBER.fullmatch(text) else text


def cells(payment: db.Payment) -> list[str]:
    """An export's members as cells: a string's own text, nothing for null, anything else as JSON."""
    members = payment.members(*EXPORTED)
    texts = [members[name] for name in EXPORT_HEADER]
    return [cell(json.loads(text)) if text.startswith('"') else "" if text == "null" else text for text in texts]


# The story of a payment

STORY = """
SELECT at, actor AS who, 'change' AS what, to_jsonb(e) AS facts
  FROM payment_events e WHERE payment_id = %(id)s
UNION ALL
-- After the opening that was stored with it: the trail's row is written when that statement ends.
SELECT greatest(answered_at, (SELECT at + interval '1 us' FROM payment_events
                               WHERE payment_id = %(id)s AND why = 'opened')),
       'api', 'answer', jsonb_build_object('status', answer_status)
  FROM idempotency_keys WHERE payment_id = %(id)s
UNION ALL
SELECT looked_at, 'worker', 'look', '{}' FROM payments WHERE id = %(id)s
UNION ALL
SELECT look_at, 'worker', 'next look', '{}' FROM payments WHERE id = %(id)s
UNION ALL
SELECT received_at, 'provider', 'event', jsonb_build_object(
       'name', name, 'reference', reference, 'outcome', outcome, 'deliveries', deliveries)
  FROM provider_events WHERE reference = ANY(%(references)s)
UNION ALL
SELECT recorded_at, source, 'charge', to_jsonb(c) FROM charges c WHERE reference = ANY(%(references)s)
UNION ALL
SELECT created_at, made_by, 'refund', to_jsonb(r) FROM refunds r WHERE payment_id = %(id)s
UNION ALL
SELECT processed_at, 'provider', 'processed', to_jsonb(r) FROM refunds r WHERE payment_id = %(id)s
UNION ALL
SELECT opened_at, 'paygate', 'incident', to_jsonb(i) FROM incidents i WHERE payment_id = %(id)s
UNION ALL
SELECT closed_at, closed_by, 'closed', to_jsonb(i) FROM incidents i WHERE payment_id = %(id)s
UNION ALL
SELECT coalesce(delivered_at, dead_at, made_at), 'worker', 'notification', jsonb_build_object(
       'type', type, 'tries', tries, 'last_outcome', last_outcome,
       'state', CASE WHEN delivered_at IS NOT NULL THEN 'delivered' WHEN dead_at IS NOT NULL THEN 'given up'
                     ELSE 'on its way' END)
  FROM notifications WHERE payment_id = %(id)s
"""

CHANGES = {
    "reserved": "payment of {amount} asked for",
    "opened": "checkout page opened as {reference}",
    "next_reference": "an answer of the provider was lost: the checkout goes on as {reference}",
    "refused": "the provider refuses it",
    "declined": "a card was declined; the customer may try again",
    "time_over": "its time is over",
    "charge": "paid: {charged}",
    "mismatch": "money came that does not match the price: {charged}; a person must decide",
    "refund": "given back so far: {refunded}",
    "refund_failed": "a refund failed after all; given back so far: {refunded}",
    "accepted": "accepted as paid: {charged}",
    "erased": "the personal data were erased",
    "by_hand": "changed by hand in the database",
}
INCIDENTS = {
    "second_charge": "paid a second time, as {subject}: give it back with `refund {subject}`",
    "unknown_reference": "money came as {subject}, which is unknown here: was the database restored from a backup?",
    "mismatch": "what was paid is not the price: `resolve {payment_id} accept` or `reject`",
    "references_used_up": "every try to open a checkout was lost: let the customer start another payment",
    "dispute": "the customer's bank disputes {subject}: answer in Paystack's dashboard",
    "chargeback": "{subject} went back without refunds that add up to it, as after a lost dispute",
    "refund_failed": "refund {subject} failed: `refund` it again, or pay it back in another way",
    "refund_needs_attention": "refund {subject} waits for bank details: give them in Paystack's dashboard",
    "refund_not_final": "refund {subject} is not final after 30 days: ask Paystack's support",
    "refund_not_made": "refund {subject} was never made: `refund` it again if it is still owed",
    "refund_revived": "refund {subject} was made after all: was it made a second time meanwhile?",
    "refunded_too_much": "more of {subject} was given back than had come",
}


def story(conn: db.BoundedConnection, payment: db.Payment) -> Iterator[Row]:
    """What happened to a payment, in order: `at`, `who`, `what`, the `facts` and a `text` for people."""
    values = {"id": payment.id, "references": db.references_of(payment.reference)}
    for row in stream(conn, f"SELECT * FROM ({STORY}) AS story WHERE at IS NOT NULL ORDER BY at", values):  # noqa: S608  # ours
        yield {**row, "text": tell(payment, row["what"], row["facts"]), "facts": with_amounts(payment, row["facts"])}


def with_amounts(payment: db.Payment, facts: Row) -> Row:
    """Facts for a program: amounts in major units, nothing internal."""
    currency, kept = facts.get("currency", payment.currency), {}
    for name, value in facts.items():
        if name.endswith("_minor"):
            kept[name.removesuffix("_minor")] = None if value is None else money.render(value, currency)
        elif name not in ("payment_id", "mode", "look_at", "hash"):
            kept[name] = value
    return kept


def tell(payment: db.Payment, what: str, facts: Row) -> str:
    def amount(name: str) -> str:
        currency = facts.get("currency", payment.currency)
        return f"{money.render(facts[name] or 0, currency)} {currency}"

    match what:
        case "change":
            text = CHANGES[facts["why"]].format(
                amount=amount("amount_minor"),
                charged=amount("charged_minor"),
                refunded=amount("refunded_minor"),
                reference=facts["reference"],
            )
            return text if facts["from_status"] == facts["to_status"] else f"{text} → {facts['to_status']}"
        case "answer":
            return f"the request was answered ({facts['status']})"
        case "look":
            return "asked the provider about it, last"
        case "next look":
            return "will ask the provider about it next"
        case "event":
            times = f", {facts['deliveries']} times" if facts["deliveries"] > 1 else ""
            return f"event {facts['name']} for {facts['reference']}: {facts['outcome']}{times}"
        case "charge":
            fees = f", fees {amount('fees_minor')}" if facts["fees_minor"] is not None else ""
            return f"{amount('amount_minor')} came as {facts['reference']}{fees}{more_than_price(payment, facts)}"
        case "refund":
            because = f": {facts['refused_because']}" if facts["refused_because"] else ""
            reason = f" ({facts['reason']})" if facts["reason"] else ""
            where = "in the dashboard" if facts["origin"] == "dashboard" else "asked for"
            refund = f"refund {facts['id']} of {amount('amount_minor')} {where}{reason}"
            return f"{refund}; it is {facts['status'].replace('_', ' ')}{because}"
        case "processed":
            return f"refund {facts['id']} of {amount('amount_minor')} was paid out"
        case "incident":
            return f"incident {facts['id']}: {describe(facts)}"
        case "closed":
            return f"incident {facts['id']} closed" + (f": {facts['close_reason']}" if facts["close_reason"] else "")
        case "notification":
            outcome = f", {facts['last_outcome']}" if facts["last_outcome"] else ""
            return f"notification {facts['type']}: {facts['state']} (tries: {facts['tries']}{outcome})"
    return what


def more_than_price(payment: db.Payment, charge: Row) -> str:
    more = charge["amount_minor"] - payment.amount_minor
    if charge["currency"] != payment.currency or more <= 0:
        return ""
    return f"; {money.render(more, payment.currency)} {payment.currency} more than the price"


def describe(incident: Row) -> str:
    return INCIDENTS[incident["kind"]].format(**incident)


def open_incidents(conn: db.BoundedConnection, mode: str) -> Iterator[Row]:
    query = "SELECT * FROM incidents WHERE mode = %(mode)s AND closed_at IS NULL ORDER BY opened_at, id"
    return stream(conn, query, {"mode": mode})


# The proof


class Proof:
    """The books as they stand at one moment: every break of a rule, and the checkpoint over all audit rows."""

    def __init__(self, conn: db.BoundedConnection, watch: Watch, against: tuple[int, str] | None = None) -> None:
        self.conn = conn
        self.watch = watch
        self.against = against
        self.counts = {"payments": 0, "audit rows": 0}
        self.checkpoint = ""
        """`N:HASH`: SHA-256 over the lines `id hash` of all audit rows up to number N, in their order."""

    def breaks(self) -> Iterator[str]:
        """A line for each break, with the payment's id where it is of one."""
        last = last_settled_event(self.conn)
        with one_moment(self.conn):
            count = only(self.conn, "SELECT count(*) AS rows FROM payment_events")["rows"]
            yield from self.broken_trails(count)
            for broken, query in self.watch(iter(RULES.items()), len(RULES)):
                for row in stream(self.conn, query):
                    yield f"{row['subject']}: {broken}"
            yield from self.broken_checkpoint(last, count)

    def broken_trails(self, count: int) -> Iterator[str]:
        rows = self.watch(stream(self.conn, TRAILS), count)
        for payment_id, trail in itertools.groupby(rows, key=lambda row: row["payment_id"]):
            self.counts["payments"] += 1
            for broken in broken_trail(self.count(trail)):
                yield f"{payment_id}: {broken}"

    def count(self, trail: Iterable[Row]) -> Iterator[Row]:
        for row in trail:
            self.counts["audit rows"] += 1
            yield row

    def broken_checkpoint(self, last: int, count: int) -> Iterator[str]:
        known, hash_then = self.against or (last, None)
        if known > last:
            yield f"checkpoint {known}: the newest audit row is {last}: later ones were removed"
        digest, hash_at_known = hashlib.sha256(), None
        query = "SELECT id, hash FROM payment_events WHERE id <= %(last)s ORDER BY id"
        for row in self.watch(stream(self.conn, query, {"last": last}), count):
            if row["id"] > known and hash_at_known is None:
                hash_at_known = digest.hexdigest()
            digest.update(f"{row['id']} {row['hash']}\n".encode())
        if known <= last and hash_then not in (None, hash_at_known or digest.hexdigest()):
            yield f"checkpoint {known}: an audit row up to number {known} was changed, removed or put in"
        self.checkpoint = f"{last}:{digest.hexdigest()}"


def last_settled_event(conn: db.BoundedConnection, within_seconds: float = 30) -> int:
    """The number of the newest audit row, once no transaction can write one below it any more. Raises Refused.

    Numbers are taken before the commit; but whoever has taken one holds the writers' lock on the table until its end.
    """
    last = int(only(conn, "SELECT coalesce(max(id), 0) AS last FROM payment_events")["last"])
    deadline, waited_for = time.monotonic() + within_seconds, _writers(conn)
    while waited_for:
        if time.monotonic() > deadline:
            raise Refused(f"a transaction has been writing for {within_seconds:g} s: end it (see pg_locks)")
        time.sleep(0.05)
        waited_for &= _writers(conn)
    return last


def _writers(conn: db.BoundedConnection) -> set[str]:
    rows = conn.execute(
        """
        SELECT virtualtransaction FROM pg_locks
         WHERE relation = 'payment_events'::regclass AND mode = 'RowExclusiveLock' AND granted
           AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        """
    )
    return {row["virtualtransaction"] for row in rows}


TRAILS = """
SELECT e.*, p.id IS NULL AS is_gone, p.status AS row_to_status, p.amount_minor AS row_amount_minor,
       p.currency AS row_currency, p.mode AS row_mode, p.charged_minor AS row_charged_minor,
       p.refunded_minor AS row_refunded_minor,
       coalesce(p.charge_reference, p.reference || CASE WHEN p.attempt > 1 THEN '-' || p.attempt ELSE '' END)
       AS row_reference
  FROM payment_events e LEFT JOIN payments p ON p.id = e.payment_id
 ORDER BY e.payment_id, e.n
"""
TRAILED = ("to_status", "amount_minor", "currency", "mode", "reference", "charged_minor", "refunded_minor")


def broken_trail(trail: Iterable[Row]) -> Iterator[str]:
    """The breaks in the audit rows of one payment, and of its own row with the last of them."""
    before: Row = {"n": 0, "hash": "", "to_status": None}
    is_sound = True
    for row in trail:
        was_sound, is_sound, missing = is_sound, False, row["n"] - before["n"] - 1
        if missing:
            yield f"audit row {before['n'] + 1} is missing" + (f", and {missing - 1} more" if missing > 1 else "")
        elif row["hash"] != event_hash(before["hash"], row):
            yield f"audit row {row['n']} was changed or put in"
        elif was_sound and not may_follow(before, row):
            yield f"audit row {row['n']} cannot stand where it does"
        else:
            is_sound = True
        before = row
    if before["is_gone"]:
        yield "its row is gone"
    elif is_sound and (differing := [name for name in TRAILED if before[f"row_{name}"] != before[name]]):
        pairs = ", ".join(f"{name} {before[f'row_{name}']} for {before[name]}" for name in differing)
        yield f"its row is not what its last audit row says: {pairs}"


def event_hash(previous_hash: str, event: Row) -> str:
    """The hash that an audit row must have; computed here, apart from the database's own function."""
    lines = (
        previous_hash,
        event["payment_id"],
        event["n"],
        event["at"].isoformat(timespec="microseconds").replace("+00:00", "Z"),
        event["actor"],
        event["why"],
        event["from_status"] or "",
        event["to_status"],
        event["amount_minor"],
        event["currency"],
        event["mode"],
        event["reference"],
        event["charged_minor"],
        event["refunded_minor"],
    )
    return hashlib.sha256("\n".join(map(str, lines)).encode()).hexdigest()


RANKS = {"pending": 0, "failed": 1, "expired": 1, "review": 2, **{status: 3 + n for n, status in enumerate(db.PAID)}}


def may_follow(before: Row, row: Row) -> bool:
    if before["n"] == 0:
        return row["from_status"] is None and (row["to_status"], row["why"]) == ("pending", "reserved")
    same = all(row[name] == before[name] for name in ("amount_minor", "currency", "mode"))
    stays, rises = row["to_status"] == before["to_status"], rank(row["to_status"]) > rank(before["to_status"])
    return same and (stays or rises) and row["from_status"] == before["to_status"]


def rank(status: str) -> int:
    return RANKS.get(status, -1)


RULES = {
    "has no audit row": """
        SELECT id AS subject FROM payments p WHERE NOT EXISTS (SELECT FROM payment_events WHERE payment_id = p.id)
    """,
    "has no idempotency key of its mode": """
        SELECT id AS subject FROM payments p
         WHERE NOT EXISTS (SELECT FROM idempotency_keys WHERE payment_id = p.id AND mode = p.mode)
    """,
    "is gone, but its key or its money is here": """
        SELECT payment_id AS subject FROM (
               SELECT payment_id FROM idempotency_keys UNION SELECT payment_id FROM charges
                UNION SELECT payment_id FROM refunds) AS kept
         WHERE NOT EXISTS (SELECT FROM payments WHERE id = payment_id)
    """,
    "has no charge that pays it, and nobody accepted it": """
        SELECT p.id AS subject FROM payments p LEFT JOIN charges c ON c.reference = p.charge_reference
         WHERE p.status IN ('completed', 'partially_refunded', 'refunded') AND p.accepted_by IS NULL
           AND NOT (p.status = 'refunded' AND p.charged_minor > 0 AND p.refunded_minor >= p.charged_minor)
           AND (c.mode, c.currency, coalesce(c.requested_minor, p.amount_minor), c.amount_minor >= p.amount_minor)
               IS DISTINCT FROM (p.mode, p.currency, p.amount_minor, true)
    """,
    "was accepted, but no audit row says so": """
        SELECT id AS subject FROM payments p
         WHERE accepted_by IS NOT NULL AND NOT EXISTS (
               SELECT FROM payment_events WHERE payment_id = p.id AND why = 'accepted' AND actor = p.accepted_by)
    """,
    "is not paid but has a time of payment, or the other way round": """
        SELECT id AS subject FROM payments
         WHERE (status IN ('completed', 'partially_refunded', 'refunded')) <> (paid_at IS NOT NULL)
    """,
    "its paid sum is not that of its charge": """
        SELECT p.id AS subject FROM payments p LEFT JOIN charges c ON c.reference = p.charge_reference
         WHERE p.charge_reference IS NOT NULL
           AND (c.payment_id, c.amount_minor) IS DISTINCT FROM (p.id, p.charged_minor)
    """,
    "has a charge that is not of its mode or not of its references": """
        SELECT DISTINCT p.id AS subject FROM charges c JOIN payments p ON p.id = c.payment_id
         WHERE c.mode <> p.mode OR left(c.reference, 29) <> p.reference
    """,
    "was paid twice, and nobody was told": """
        SELECT DISTINCT p.id AS subject FROM charges c JOIN payments p ON p.id = c.payment_id
         WHERE c.reference IS DISTINCT FROM p.charge_reference AND NOT EXISTS (
               SELECT FROM incidents WHERE kind = 'second_charge' AND subject = c.reference)
    """,
    "its refunded sum is not that of its processed refunds": """
        SELECT p.id AS subject
          FROM payments p LEFT JOIN (
               SELECT charge_reference, sum(amount_minor) AS minor FROM refunds WHERE status = 'processed'
                GROUP BY charge_reference) r ON r.charge_reference = p.charge_reference
         WHERE p.refunded_minor <> coalesce(r.minor, 0)
    """,
    "more of a charge was given back than had come, and nobody was told": """
        SELECT c.payment_id AS subject
          FROM refunds r JOIN charges c ON c.reference = r.charge_reference
         WHERE r.status NOT IN ('refused', 'failed', 'not_made')
         GROUP BY c.reference
        HAVING sum(r.amount_minor) > c.amount_minor AND NOT EXISTS (
               SELECT FROM incidents WHERE kind = 'refunded_too_much' AND subject = c.reference)
    """,
    "has a refund that is not of its charge's payment, mode and currency": """
        SELECT DISTINCT r.payment_id AS subject FROM refunds r JOIN charges c ON c.reference = r.charge_reference
         WHERE (r.payment_id, r.mode, r.currency) <> (c.payment_id, c.mode, c.currency)
    """,
    "more than one checkout page was opened to the customer": """
        SELECT payment_id AS subject FROM payment_events WHERE why = 'opened' GROUP BY payment_id HAVING count(*) > 1
    """,
    "its answer gave out another checkout page": """
        SELECT p.id AS subject FROM payments p JOIN idempotency_keys k ON k.payment_id = p.id
         WHERE k.answer_status = 201 AND p.erased_at IS NULL
           AND position('"checkout_url": ' || coalesce(to_json(p.checkout_url)::text, 'null') IN k.answer) = 0
    """,
    "an event was applied, but its charge is missing": """
        SELECT DISTINCT payment_id AS subject FROM provider_events e
         WHERE outcome = 'applied' AND NOT EXISTS (SELECT FROM charges WHERE reference = e.reference)
    """,
    "a guard of the database is switched off": """
        SELECT tgrelid::regclass::text || '.' || tgname AS subject FROM pg_trigger
         WHERE NOT tgisinternal AND tgenabled = 'D' AND tgrelid IN (
               'payments'::regclass, 'payment_events'::regclass, 'charges'::regclass, 'refunds'::regclass,
               'idempotency_keys'::regclass, 'incidents'::regclass, 'secrets'::regclass)
    """,
}
"""What must hold besides the trails; each query names the subjects for which it does not."""


# Ours against the provider's

LISTED = """
CREATE TEMPORARY TABLE listed_charges (
    reference text, amount_minor bigint, currency text, fees_minor bigint) ON COMMIT DROP;
CREATE TEMPORARY TABLE listed_refunds (
    provider_id bigint, reference text, charge_id bigint, amount_minor bigint, status text) ON COMMIT DROP
"""

DIFFERENCES = """
WITH theirs AS (
    SELECT DISTINCT ON (reference) * FROM listed_charges
     WHERE reference ~ '^PG-[0-9A-HJKMNP-TV-Z]{26}(-[2-9])?$'
), theirs_back AS (
    SELECT DISTINCT ON (l.provider_id) l.*, c.reference AS ours, c.payment_id, c.currency
      FROM listed_refunds l JOIN charges c
        ON c.reference = l.reference OR (l.reference IS NULL AND c.provider_id = l.charge_id)
     WHERE c.mode = %(mode)s
)
SELECT p.id AS payment, t.reference, 'paid, but unknown here' AS difference, t.amount_minor AS there,
       NULL::bigint AS here, t.currency
  FROM theirs t LEFT JOIN payments p ON p.reference = left(t.reference, 29)
 WHERE NOT EXISTS (SELECT FROM charges c WHERE c.reference = t.reference AND c.mode = %(mode)s)
UNION ALL
SELECT c.payment_id, c.reference, 'paid here, but not there', NULL, c.amount_minor, c.currency
  FROM charges c JOIN payments p ON p.id = c.payment_id
 WHERE c.mode = %(mode)s AND p.created_at >= %(since)s AND c.recorded_at < %(begun)s
   AND NOT EXISTS (SELECT FROM theirs t WHERE t.reference = c.reference)
UNION ALL
SELECT p.id, p.charge_reference, p.status || ' here, without a charge', NULL, p.amount_minor, p.currency
  FROM payments p
 WHERE p.mode = %(mode)s AND p.created_at >= %(since)s
   AND p.status IN ('completed', 'partially_refunded', 'refunded')
   AND NOT EXISTS (SELECT FROM charges c WHERE c.reference = p.charge_reference)
UNION ALL
SELECT c.payment_id, c.reference, 'another ' || CASE WHEN t.currency <> c.currency THEN 'currency: ' || t.currency
                                                     ELSE 'amount' END, t.amount_minor, c.amount_minor, c.currency
  FROM theirs t JOIN charges c USING (reference)
 WHERE c.mode = %(mode)s AND (t.amount_minor, t.currency) <> (c.amount_minor, c.currency)
UNION ALL
SELECT c.payment_id, c.reference, 'other fees', t.fees_minor, c.fees_minor, c.currency
  FROM theirs t JOIN charges c USING (reference)
 WHERE c.mode = %(mode)s AND t.fees_minor <> c.fees_minor
UNION ALL
SELECT b.payment_id, b.ours, 'refund ' || b.provider_id || ' (' || b.status || ') unknown here', b.amount_minor, NULL,
       b.currency
  FROM theirs_back b
 WHERE NOT EXISTS (SELECT FROM refunds r WHERE r.mode = %(mode)s AND r.provider_id = b.provider_id)
UNION ALL
SELECT r.payment_id, r.charge_reference, 'refund ' || r.id || ' is ' || b.status || ' there, ' || r.status || ' here',
       b.amount_minor, r.amount_minor, r.currency
  FROM theirs_back b JOIN refunds r ON r.provider_id = b.provider_id AND r.mode = %(mode)s
 WHERE (b.amount_minor, b.status) <> (r.amount_minor, r.status)
UNION ALL
SELECT r.payment_id, r.charge_reference, 'refund ' || r.id || ' (' || r.status || ') not there', NULL, r.amount_minor,
       r.currency
  FROM refunds r
 WHERE r.mode = %(mode)s AND r.created_at >= %(since)s AND r.created_at < %(begun)s
   AND r.status NOT IN ('unanswered', 'refused', 'not_made')
   AND NOT EXISTS (SELECT FROM listed_refunds l WHERE l.provider_id = r.provider_id)
 ORDER BY reference, difference
"""


def differences(
    conn: db.BoundedConnection,
    mode: str,
    since: datetime,
    charges: Iterable[money.Charge],
    refunds: Iterable[money.Refund],
) -> Iterator[Row]:
    """Where the provider's lists (complete, from `since` on) and our books differ.

    The lists go into temporary tables as they come, page after page. What we learned after the listing began is left
    out, for it may not be on a page that was read before.
    """
    with conn.transaction():
        # The tables are filled for as long as the provider takes.
        begun = only(conn, "SELECT now() AS begun, set_config('statement_timeout', '0', true)")["begun"]
        conn.execute(sql.SQL(LISTED))
        with conn.cursor().copy("COPY listed_charges FROM STDIN") as copy:
            for charge in charges:
                copy.write_row((charge.reference, charge.amount_minor, charge.currency, charge.fees_minor))
        with conn.cursor().copy("COPY listed_refunds FROM STDIN") as copy:
            for each in refunds:
                facts = (each.provider_id, each.charge_reference, each.charge_provider_id)
                copy.write_row((*facts, each.amount_minor, each.status))
        conn.execute("ANALYZE listed_charges, listed_refunds")
        yield from stream(conn, DIFFERENCES, {"mode": mode, "since": since, "begun": begun})


# The report

REPORT = """
WITH moved AS (
    SELECT (coalesce(c.paid_at, c.recorded_at) AT TIME ZONE 'UTC')::date AS day, c.currency, c.payment_id,
           (c.reference = p.charge_reference)::int AS payments, c.amount_minor AS gross,
           coalesce(c.fees_minor, 0) AS fees, 0::bigint AS refunds, p.location
      FROM charges c JOIN payments p ON p.id = c.payment_id
     WHERE c.mode = %(mode)s AND coalesce(c.paid_at, c.recorded_at) >= %(since)s
       AND coalesce(c.paid_at, c.recorded_at) < %(until)s
    UNION ALL
    SELECT (r.processed_at AT TIME ZONE 'UTC')::date, r.currency, r.payment_id, 0, 0, 0, r.amount_minor, p.location
      FROM refunds r JOIN payments p ON p.id = r.payment_id
     WHERE r.mode = %(mode)s AND r.status = 'processed'
       AND r.processed_at >= %(since)s AND r.processed_at < %(until)s
)
SELECT CASE WHEN GROUPING(day) = 0 THEN 'day' WHEN GROUPING(location) = 0 THEN 'location' ELSE 'total' END AS by,
       coalesce(day::text, location, 'total') AS key, currency,
       coalesce(sum(payments), 0)::bigint AS payments, coalesce(sum(gross), 0)::bigint AS gross,
       coalesce(sum(fees), 0)::bigint AS fees, coalesce(sum(refunds), 0)::bigint AS refunds,
       coalesce(sum(gross) - sum(fees) - sum(refunds), 0)::bigint AS net
  FROM moved
 GROUP BY GROUPING SETS ((currency, day), (currency, location), (currency))
 ORDER BY currency, GROUPING(day), GROUPING(location), day, gross DESC, location
"""
SUMS = ("gross", "fees", "refunds", "net")


def report(conn: db.BoundedConnection, mode: str, since: datetime, until: datetime) -> Iterator[Row]:
    """Money by day (of the payment, of the refund; UTC), by location and in all, for each currency: sums in hundredths.

    Gross is every charge, a second one too; refunds are the processed ones; `payments` are those whose charge came.
    """
    return stream(conn, REPORT, {"mode": mode, "since": since, "until": until})


MOST_LOCATIONS = 12
CHART_WIDTH, CHART_HEIGHT, TOP = 720, 165, 15


def report_page(rows: Iterable[Row], mode: str, since: datetime, until: datetime, made_at: datetime) -> str:
    """The report as one page that loads nothing. Beyond the largest locations the rest is one row."""
    page = Markup((PAGES / "report.html").read_text(encoding="utf-8"))  # noqa: S704  # a file of ours
    style = Markup((PAGES / "report.css").read_text(encoding="utf-8"))  # noqa: S704  # likewise
    last = until - timedelta(microseconds=1)
    sections = [
        _section(currency, list(_largest(group)), since.date(), last.date())
        for currency, group in itertools.groupby(rows, key=lambda row: row["currency"])
    ]
    return page.format(
        style=style,
        period=f"{since:%Y-%m-%d} to {last:%Y-%m-%d}",
        test=Markup('<p class="test">TEST: no real money</p>') if mode == "test" else "",
        sections=Markup("").join(sections) or Markup("<p>No money moved in this time.</p>"),
        made_at=f"{made_at:%Y-%m-%d %H:%M} UTC",
    )


def _largest(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows of one currency, but only its largest locations, and one row for the others."""
    rest: Row = {"by": "location", "key": "others", "payments": 0, **dict.fromkeys(SUMS, 0)}
    seen = 0
    for row in rows:
        seen += row["by"] == "location"
        if row["by"] == "location" and seen > MOST_LOCATIONS:
            rest |= {name: rest[name] + row[name] for name in ("payments", *SUMS)} | {"currency": row["currency"]}
        else:
            yield row
    if seen > MOST_LOCATIONS:
        yield rest


def _section(currency: str, rows: list[Row], first: date, last: date) -> Markup:
    days, locations = ([row for row in rows if row["by"] == by] for by in ("day", "location"))
    total = next(row for row in rows if row["by"] == "total")
    cards = Markup("").join(
        Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(name, value)
        for name, value in [("payments", f"{total['payments']:,}"), *((name, _sum(total, name)) for name in SUMS)]
    )
    return Markup(
        '<section><h2>{currency}</h2><dl>{cards}</dl>{chart}<div class="tables">{days}{locations}</div></section>'
    ).format(
        currency=currency,
        cards=cards,
        chart=_chart(days, currency, first, last),
        days=_table("day", [*days, total]),
        locations=_table("location", locations),
    )


def _table(by: str, rows: list[Row]) -> Markup:
    head = Markup("").join(Markup("<th>{}</th>").format(name) for name in (by, "payments", *SUMS))
    body = Markup("").join(
        Markup("<tr class={}><td>{}</td>{}</tr>").format(
            row["by"],
            row["key"],
            Markup("").join(Markup("<td>{}</td>").format(_sum(row, name)) for name in ("payments", *SUMS)),
        )
        for row in rows
    )
    return Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(head, body)


def _sum(row: Row, name: str) -> str:
    if name == "payments":
        return f"{row['payments']:,}"
    whole, point, part = money.render(row[name], row["currency"]).partition(".")
    return f"{int(whole):,}{point}{part}" if int(whole) else f"{whole}{point}{part}"


def _chart(days: list[Row], currency: str, first: date, last: date) -> Markup:
    """A bar a day of what came (gross), in SVG; days without money are gaps."""
    gross = {date.fromisoformat(row["key"]): row for row in days}
    count = (last - first).days + 1
    highest = max([row["gross"] for row in days] + [1])
    step = CHART_WIDTH / count
    every = -(-count // 16)
    bars, labels = [], []
    for n in range(count):
        day, x = first + timedelta(days=n), n * step
        if n % every == 0:
            text = f"{day:%d}" if count <= 31 else f"{day:%d %b}"
            labels.append(Markup('<text x="{:.1f}" y="{}">{}</text>').format(x + step / 2, CHART_HEIGHT + 14, text))
        if day in gross:
            height = gross[day]["gross"] * (CHART_HEIGHT - TOP) / highest
            bars.append(
                Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>').format(
                    x + step * 0.1, CHART_HEIGHT - height, step * 0.8, height, f"{day}: {_sum(gross[day], 'gross')}"
                )
            )
    return Markup(
        '<svg viewBox="0 0 {width} {height}" role="img" aria-label="Gross by day">'
        '<path d="M0 {top}H{width}M0 {base}H{width}"/><text class="top" y="{above}">{most}</text>{bars}{labels}</svg>'
    ).format(
        width=CHART_WIDTH,
        height=CHART_HEIGHT + 20,
        base=CHART_HEIGHT,
        top=TOP,
        above=TOP - 4,
        most=_sum({"most": highest, "currency": currency}, "most"),
        bars=Markup("").join(bars),
        labels=Markup("").join(labels),
    )


# The health of the database


def health(conn: db.BoundedConnection, mode: str) -> Row:
    """What `doctor` needs to know, in one row: versions, clock, the age of due work, what waits for a person."""
    return only(
        conn,
        """
        SELECT current_setting('server_version') AS version, (SELECT max(number) FROM migrations) AS migration,
               clock_timestamp() AS clock,
               (SELECT extract(epoch FROM now() - min(look_at))::float8 FROM payments
                 WHERE mode = %(mode)s AND look_at <= now()) AS look_seconds,
               (SELECT extract(epoch FROM now() - min(look_at))::float8 FROM refunds
                 WHERE mode = %(mode)s AND look_at <= now()) AS refund_seconds,
               (SELECT extract(epoch FROM now() - min(received_at))::float8 FROM provider_events
                 WHERE mode = %(mode)s AND retry_at IS NOT NULL) AS event_seconds,
               (SELECT extract(epoch FROM now() - min(due_at))::float8 FROM notifications
                 WHERE mode = %(mode)s AND due_at <= now()) AS notification_seconds,
               (SELECT count(*) FROM notifications WHERE mode = %(mode)s AND dead_at IS NOT NULL) AS dead,
               (SELECT count(*) FROM incidents WHERE mode = %(mode)s AND closed_at IS NULL) AS incidents,
               (SELECT count(*) FILTER (WHERE actor = 'webhook') = 0 AND count(*) > 0
                  FROM (SELECT actor FROM payment_events WHERE mode = %(mode)s AND why IN ('charge', 'mismatch')
                         ORDER BY id DESC LIMIT 5) AS last_few
               ) AS is_deaf
        """,
        {"mode": mode},
    )
