"""prove that the books are whole

Computes every payment's chain of audit rows anew. Compares the newest row with the payment, its charges, refunds,
incidents and kept events. Checks every rule between them, and the guards of the database against schema.sql. Prints a
line for each break, and a checkpoint. Keep the checkpoint outside of the database: with it, --against proves later that
nothing before it was changed or removed.

Run it as the owner of the tables, who may create a schema: audit makes a copy of the guards, and rolls it back.

examples:
  python manage.py audit
  python manage.py audit --against 1042:5d41402abc4b2a76b9719d911017c5925d41402abc4b2a76b9719d911017c592
"""

import argparse
import hashlib
import itertools
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

import commands
import db
from commands import Parser, guards


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--against", type=commands.checkpoint, metavar="N:HASH", help="a checkpoint printed earlier")


def run(arguments: argparse.Namespace, env: commands.Environment, url: str) -> int:
    with commands.reading(url) as conn:
        proof = Proof(conn, arguments.against)
        status = proof.tell()
    if status == 0:
        commands.print_next(f"audit --against {proof.checkpoint}")
    return status


class Proof:
    """The books as they stand at one moment: every break of a rule, and the checkpoint over all audit rows."""

    def __init__(self, conn: db.BoundedConnection, against: tuple[int, str] | None = None) -> None:
        self.conn = conn
        self.against = against
        self.counts = {"payments": 0, "audit rows": 0}
        self.checkpoint = ""
        """`N:HASH`: SHA-256 over the lines `id hash` of all audit rows up to number N, in their order."""

    def tell(self) -> int:
        """Print a line for each break, whether the books are whole, and the checkpoint; the exit status."""
        breaks = 0
        for line in self.breaks():
            tqdm.write(commands.plain(line))
            breaks += 1
        counted = ", ".join(f"{name}: {count:,}" for name, count in self.counts.items())
        print(f"{f'BROKEN, places: {breaks:,}' if breaks else 'whole'} ({counted})")
        print(f"checkpoint {self.checkpoint}")
        return commands.complain(f"broken places in the books: {breaks:,}") if breaks else 0

    def breaks(self) -> Iterator[str]:
        """A line for each break, with the payment's id where it is of one."""
        last = newest_audit_row(self.conn)
        yield from guards.broken(self.conn)
        with self.conn.transaction():
            self.conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")  # all as of one moment
            # A cursor is read to its end here: plan for that, not for the first rows.
            self.conn.execute("SELECT set_config('cursor_tuple_fraction', '1', true)")
            count = db.only_row(self.conn, "SELECT count(*) AS rows FROM payment_events")["rows"]
            self.counts["audit rows"] = count
            yield from self.broken_trails(count)
            yield from self.broken_names()
            for broken, query in commands.watch(iter(RULES.items()), len(RULES)):
                for row in commands.stream(self.conn, query):
                    yield f"{row['subject']}: {broken}"
            yield from self.broken_checkpoint(last, count)

    def broken_trails(self, count: int) -> Iterator[str]:
        rows = commands.watch(commands.stream(self.conn, TRAILS), count)
        for payment_id, trail in itertools.groupby(rows, key=lambda row: row["payment_id"]):
            self.counts["payments"] += 1
            for broken in broken_trail(trail):
                yield f"{payment_id}: {broken}"

    def broken_names(self) -> Iterator[str]:
        """Ids and references are what the secret and the key make."""
        row = self.conn.execute("SELECT value FROM secrets").fetchone()
        secret = row["value"] if row else b""
        for row in commands.watch(commands.stream(self.conn, KEYS), self.counts["payments"]):
            made = [db.derived_name(prefix, secret, row["mode"], row["key"]) for prefix in ("PAY", "PG")]
            if made != [row["id"], row["reference"]]:
                yield f"{row['id']}: its id and reference are not what the secret and its key make"

    def broken_checkpoint(self, last: int, count: int) -> Iterator[str]:
        known, hash_then = self.against or (last, None)
        if known > last:
            yield f"checkpoint {known}: the newest audit row is {last}: later ones were removed"
        digest, hash_at_known = hashlib.sha256(), None
        query = "SELECT id, hash FROM payment_events WHERE id <= %(last)s ORDER BY id"
        for row in commands.watch(commands.stream(self.conn, query, {"last": last}), count):
            if row["id"] > known and hash_at_known is None:
                hash_at_known = digest.hexdigest()
            digest.update(f"{row['id']} {row['hash'].hex()}\n".encode())
        if known <= last and hash_then not in (None, hash_at_known or digest.hexdigest()):
            yield f"checkpoint {known}: an audit row up to number {known} was changed, removed or put in"
        self.checkpoint = f"{last}:{digest.hexdigest()}"


def newest_audit_row(conn: db.BoundedConnection, within_seconds: float = 30) -> int:
    """The number of the newest audit row, once no transaction can write one below it any more. Raises Refused.

    Numbers are taken before the commit; but whoever has taken one holds the writers' lock on the table until its end.
    """
    last = int(db.only_row(conn, "SELECT coalesce(max(id), 0) AS last FROM payment_events")["last"])
    deadline, waited_for = time.monotonic() + within_seconds, _writers(conn)
    while waited_for:
        if time.monotonic() > deadline:
            raise commands.Refused(f"a transaction has been writing for {within_seconds:g} s: end it (see pg_locks)")
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
       AS row_reference,
       CASE WHEN p.id IS NOT NULL AND lead(e.n) OVER (PARTITION BY e.payment_id ORDER BY e.n) IS NULL
            THEN payment_digest(p) END AS row_digest
  FROM payment_events e LEFT JOIN payments p ON p.id = e.payment_id
 ORDER BY e.payment_id, e.n
"""

KEYS = "SELECT p.id, p.reference, k.mode, k.key FROM payments p JOIN idempotency_keys k ON k.payment_id = p.id"

TRAILED = ("to_status", "amount_minor", "currency", "mode", "reference", "charged_minor", "refunded_minor")


def broken_trail(trail: Iterable[commands.Row]) -> Iterator[str]:
    """The breaks in the audit rows of one payment, and of its own row with the last of them."""
    before: commands.Row = {"n": 0, "hash": b"", "to_status": None}
    is_sound = True
    for row in trail:
        was_sound, is_sound, missing = is_sound, False, row["n"] - before["n"] - 1
        if missing:
            yield f"audit row {before['n'] + 1} is missing" + (f", and {missing - 1} more" if missing > 1 else "")
        elif row["hash"] != audit_row_hash(before["hash"], row):
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
    elif is_sound and before["row_digest"] != before["digest"]:
        yield "it, or a charge, refund, incident, order or kept event of it, is not what its last audit row proves"


def audit_row_hash(previous_hash: bytes, event: commands.Row) -> bytes:
    """The hash that an audit row must have; computed here, apart from the database's own function."""
    lines = (
        previous_hash.hex(),
        event["payment_id"],
        event["n"],
        event["at"].isoformat(timespec="microseconds").replace("+00:00", "Z"),
        event["actor"],
        event["why"],
        event["from_status"] or "",
        *(event[name] for name in TRAILED),
        event["digest"].hex(),
    )
    return hashlib.sha256("\n".join(map(str, lines)).encode()).digest()


RANKS = {"pending": 0, "failed": 1, "expired": 1, "review": 2, **{status: 3 + n for n, status in enumerate(db.PAID)}}


def may_follow(before: commands.Row, row: commands.Row) -> bool:
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
           AND NOT EXISTS (SELECT FROM payment_events e  -- rejected; that refund may have failed after all
                            WHERE e.payment_id = p.id AND (e.from_status, e.to_status) = ('review', 'refunded')
                              AND e.charged_minor > 0 AND e.refunded_minor >= e.charged_minor)
           AND (c.mode, c.currency, coalesce(c.requested_minor, p.amount_minor), c.amount_minor >= p.amount_minor)
               IS DISTINCT FROM (p.mode, p.currency, p.amount_minor, true)
    """,
    "was accepted, but no audit row says so": """
        SELECT id AS subject FROM payments p
         WHERE accepted_by IS NOT NULL AND NOT EXISTS (
               SELECT FROM payment_events WHERE payment_id = p.id AND why = 'accepted' AND actor = p.accepted_by)
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
    "was answered, but has neither a checkout page nor money; or was refused a page, and has one": """
        SELECT p.id AS subject FROM payments p JOIN idempotency_keys k ON k.payment_id = p.id
         WHERE (k.answer = 'payment' AND p.checkout_url IS NULL AND p.charge_reference IS NULL)
            OR (k.answer <> 'payment' AND p.checkout_url IS NOT NULL)
    """,
    "an event was applied, but its charge is missing or of another payment": """
        SELECT DISTINCT coalesce(c.payment_id, e.payment_id) AS subject
          FROM provider_events e LEFT JOIN charges c USING (reference)
         WHERE outcome = 'applied' AND (c.payment_id = e.payment_id) IS NOT TRUE
    """,
    "money came for it, no payment has it, and nobody was told": """
        SELECT DISTINCT reference AS subject FROM provider_events e
         WHERE outcome = 'noted' AND name = 'charge.success'
           AND NOT EXISTS (SELECT FROM payments WHERE reference = left(e.reference, 29) AND mode = e.mode)
           AND NOT EXISTS (SELECT FROM incidents
                            WHERE kind IN ('unknown_reference', 'unreadable_event') AND subject = e.reference)
    """,
    "is pending, and nobody will ask about it": """
        SELECT id AS subject FROM payments WHERE status = 'pending' AND poll_at IS NULL
    """,
    "a refund of it is open, and nobody will ask about it": """
        SELECT DISTINCT payment_id AS subject FROM refunds r
         WHERE status NOT IN ('processed', 'failed', 'refused', 'not_made') AND poll_at IS NULL
           AND NOT EXISTS (SELECT FROM incidents WHERE kind = 'refund_not_final' AND subject = r.id)
    """,
    "a notification of it is gone": """
        SELECT p.id AS subject
          FROM payments p LEFT JOIN (
               SELECT payment_id, count(*) AS kept FROM notifications GROUP BY payment_id) n ON n.payment_id = p.id
         WHERE p.notified <> p.pruned + coalesce(n.kept, 0)
    """,
    "its notification tells what no audit row does": """
        SELECT DISTINCT payment_id AS subject FROM notifications n
         WHERE payment_id IS NOT NULL AND NOT EXISTS (
               SELECT FROM payment_events e
                WHERE e.payment_id = n.payment_id AND e.mode = n.mode AND e.to_status = facts ->> 'status'
                  AND e.charged_minor = (facts ->> 'charged_minor')::bigint
                  AND e.refunded_minor = (facts ->> 'refunded_minor')::bigint)
    """,
    "its notification waits for none before it, and is not due": """
        SELECT DISTINCT payment_id AS subject FROM notifications n
         WHERE coalesce(due_at, delivered_at, dead_at) IS NULL AND NOT EXISTS (
               SELECT FROM notifications WHERE payment_id = n.payment_id AND sequence < n.sequence
                  AND delivered_at IS NULL AND dead_at IS NULL)
    """,
    "a daily job is put off": """
        SELECT DISTINCT name AS subject FROM jobs WHERE due_at > now() + interval '25 hours'
    """,
}
"""What must hold besides the trails; each query names the subjects for which it does not."""
