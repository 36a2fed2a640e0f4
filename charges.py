"""Money that came: a charge completes its payment, in whatever way we learn of the charge.

Paystack tells us by a signed event. If the event is lost, a poll finds the charge: the worker verifies the references
of each payment that is due, and still verifies them, rarely, for a year after the payment's time ended. If polls fail
too, the daily list of the provider's transactions has the charge. A repeated POST may also find it. All ways end in
`apply_charge`, which may safely run twice. A paid payment is verified a few times more (`VERIFIED_DAYS`), to find a
chargeback if its event was lost.

An event is stored and applied in one transaction, before the 200. If applying it fails, the event is stored alone as
`received`, and the worker applies it. Calls to the provider hold no database connection.
"""

import hashlib
import logging
from datetime import UTC, datetime, timedelta

import db
import money
import paystack
import refunds
from db import BoundedConnection, Database, DatabaseUnavailable, Payment
from refunds import DAY, MINUTE

logger = logging.getLogger("paygate")


# Events


def receive_event(database: Database, gateway: paystack.Gateway, body: bytes) -> str | None:
    """Store a signed webhook and apply it, in one transaction. Returns its reference, if the reference is ours.

    If applying it fails, for whatever reason, the event is stored alone, and the worker applies it. Raises
    DatabaseUnavailable if the event could not be stored.
    """
    event = paystack.read_event(body, gateway.mode)
    if not _store_and_apply(database, gateway.mode, event, body):
        database.run(lambda conn: store_event(conn, gateway.mode, event, body, "received"))
    return event.reference if event is not None and db.base_of(event.reference) else None


def apply_due_events(database: Database, gateway: paystack.Gateway, limit: int) -> int:
    """Apply the events that could not be applied before; how many were tried."""
    bodies = claim_events(database, gateway.mode, limit)
    for body in bodies:
        _store_and_apply(database, gateway.mode, paystack.read_event(body, gateway.mode), body)
    return len(bodies)


def _store_and_apply(database: Database, mode: str, event: paystack.Event | None, body: bytes) -> bool:
    """False if an error of ours prevented it."""

    def work(conn: BoundedConnection) -> None:
        outcome = apply_event(conn, mode, event) if event else note_unreadable(conn, mode, body)
        store_event(conn, mode, event, body, outcome)

    try:
        database.transaction(work)
    except DatabaseUnavailable:
        raise
    except Exception as error:  # even a bug must not lose the event: it is kept, and tried again
        logger.error("event_not_applied", exc_info=error)
        return False
    return True


def apply_event(conn: BoundedConnection, mode: str, event: paystack.Event) -> str:
    """Apply an event, and return its outcome.

    `applied`: it told of a charge, and the charge is stored. `noted`: it names a reference of our form, and may make us
    poll or open an incident. `foreign`: it belongs to another shop on the account. `other_mode`: a test event for a
    live key, or the other way round.
    """
    if event.reference is None or not db.REFERENCE_PATTERN.fullmatch(event.reference):
        return "foreign"
    if event.mode not in (mode, None):
        return "other_mode"
    if event.charge is not None:
        return "applied" if apply_charge(conn, event.charge, "webhook") else "noted"
    payment = lock_payment(conn, mode, event.reference)
    payment_id = payment.id if payment else None
    if event.name.startswith("charge.dispute."):
        db.open_incident(conn, mode, "dispute", event.reference, payment_id, cause=event.dispute)
        if event.is_won:
            db.close_ended(conn, "webhook", event.reference, "dispute", cause=event.dispute)
    elif event.name == "charge.success":
        db.open_incident(conn, mode, "unreadable_event", event.reference, payment_id)
    if payment is not None and event.name.startswith("refund."):
        # An event may come before the answer to our own call, and may have no id. So it makes no row; it makes us poll.
        await_refunds(conn, payment.id)
    elif payment is not None and event.name in ("charge.success", "charge.dispute.resolve"):
        # Money came, but the event cannot be read; or the money may have gone. The poll verifies it.
        conn.execute("UPDATE payments SET poll_at = now() WHERE id = %(id)s", {"id": payment.id})
    return "noted"


def note_unreadable(conn: BoundedConnection, mode: str, body: bytes) -> str:
    """`no_event`: the body is signed, but is no event. It opens incidents, and each payment that it names is polled."""
    named = {match[0] for match in db.REFERENCE_PATTERN.finditer(body.decode("latin-1"))}
    for subject in sorted(named) or [hashlib.sha256(body).hexdigest()]:
        payment = lock_payment(conn, mode, subject)
        db.open_incident(conn, mode, "unreadable_event", subject, payment.id if payment else None)
        if payment is not None:
            await_refunds(conn, payment.id)
    return "no_event"


def store_event(conn: BoundedConnection, mode: str, event: paystack.Event | None, body: bytes, outcome: str) -> None:
    """Store an event with its outcome. If it came before, the delivery is counted, and a handled event keeps its
    outcome.

    The body of another shop's event is not stored. Once handled, an event's body is not stored if its payment has been
    erased. The payment's lock orders this against an erasure.
    """
    reference = event.reference if event else None
    is_ours = outcome in ("received", "applied", "noted", "other_mode")
    conn.execute(
        """
        INSERT INTO provider_events AS e (mode, digest, name, reference, payment_id, body, outcome, retry_at)
        SELECT %(mode)s, %(digest)s, %(name)s, %(reference)s,
               CASE WHEN %(outcome)s IN ('received', 'applied', 'noted') AND p.mode = %(mode)s THEN p.id END,
               CASE WHEN %(outcome)s = 'received' OR p.erased_at IS NULL THEN %(body)s::text END,
               %(outcome)s, CASE WHEN %(outcome)s = 'received' THEN clock_timestamp() END
          FROM (SELECT) AS one LEFT JOIN payments p ON p.reference = %(base)s
        ON CONFLICT (mode, digest) DO UPDATE
           SET deliveries = e.deliveries + 1,
               outcome = CASE WHEN excluded.outcome = 'received' THEN e.outcome ELSE excluded.outcome END,
               payment_id = coalesce(e.payment_id, excluded.payment_id),
               retry_at = CASE WHEN excluded.outcome = 'received' THEN e.retry_at END,
               body = CASE WHEN excluded.body IS NOT NULL THEN e.body END
        """,
        {
            "mode": mode,
            "digest": hashlib.sha256(body).digest(),
            "name": event.name if event else None,
            "reference": reference,
            "base": db.base_of(reference),
            "body": body.decode() if is_ours else None,
            "outcome": outcome,
        },
        prepare=True,
    )


def claim_events(database: Database, mode: str, limit: int) -> list[bytes]:
    """Lease events that could not be applied, for a minute; their bodies."""
    rows = database.rows(
        """
        WITH due AS (
            SELECT id FROM provider_events WHERE mode = %(mode)s AND retry_at <= now()
             ORDER BY retry_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED
        )
        UPDATE provider_events e SET retry_at = now() + interval '1 min' FROM due WHERE e.id = due.id
        RETURNING e.body
        """,
        {"mode": mode, "limit": limit},
    )
    return [row["body"].encode() for row in rows]


# Charges


def apply_charge(conn: BoundedConnection, charge: money.Charge, actor: str) -> bool:
    """Record that money came and move its payment on. Safe to repeat; a repetition may add the fees. False if no
    payment of this mode has the reference: then an incident opens.

    The first charge of a payment is its own: the payment is `completed` if the charge pays it, else in `review`, and an
    incident opens. Each further charge is stored and opens an incident; the payment stays as it is.
    """
    payment = lock_payment(conn, charge.mode, charge.reference)
    if payment is None:
        db.open_incident(conn, charge.mode, "unknown_reference", charge.reference)
        return False
    conn.execute(
        """
        INSERT INTO charges (reference, payment_id, mode, provider_id, amount_minor, requested_minor, fees_minor,
                             currency, channel, paid_at, source)
        VALUES (%(reference)s, %(payment_id)s, %(mode)s, %(provider_id)s, %(amount_minor)s, %(requested_minor)s,
                %(fees_minor)s, %(currency)s, %(channel)s,
                -- Clocks differ by so much at most. Any other time is an error of the provider's.
                CASE WHEN %(paid_at)s::timestamptz BETWEEN %(created_at)s::timestamptz - interval '1 day'
                                                       AND clock_timestamp() + interval '10 min'
                     THEN %(paid_at)s::timestamptz END,
                %(actor)s)
        ON CONFLICT (reference) DO UPDATE SET fees_minor = excluded.fees_minor
         WHERE charges.fees_minor IS NULL AND excluded.fees_minor IS NOT NULL AND charges.currency = excluded.currency
        """,
        {**vars(charge), "payment_id": payment.id, "created_at": payment.created_at, "actor": actor},
        prepare=True,
    )
    if actor != "webhook":  # which had nobody to tell of the payment
        db.close_ended(conn, actor, charge.reference, "unknown_reference")
    if payment.charge_reference is None:
        _follow_charge(conn, payment, charge, actor)
    elif payment.charge_reference != charge.reference:
        db.open_incident(conn, charge.mode, "second_charge", charge.reference, payment.id)
        return True
    if charge.is_reversed:
        await_refunds(conn, payment.id, is_reversed=True)
    elif actor == "worker":  # an event may be older than the reversal; an answer to our own call is not
        end_reversal(conn, payment.id, charge.reference)
    return True


def lock_payment(conn: BoundedConnection, mode: str, reference: str) -> Payment | None:
    """The payment of this mode that has `reference` as one of its nine, under its lock."""
    return db.read_payment(conn, LOCK_PAYMENT, {"mode": mode, "base": db.base_of(reference)})


LOCK_PAYMENT = f"""
    SELECT {", ".join(db.PAYMENT_COLUMNS)} FROM payments WHERE reference = %(base)s AND mode = %(mode)s FOR UPDATE
    """.encode()  # noqa: S608  # the names are ours


def _follow_charge(conn: BoundedConnection, payment: Payment, charge: money.Charge, actor: str) -> None:
    is_paid = charge.pays(payment.amount_minor, payment.currency)
    if not is_paid:
        db.open_incident(conn, payment.mode, "mismatch", charge.reference, payment.id)
    conn.execute(
        """
        UPDATE payments
           SET status = %(status)s, status_reason = %(status_reason)s, charge_reference = %(reference)s,
               charged_minor = %(amount_minor)s, charged_currency = %(currency)s,
               poll_at = CASE WHEN refunds_awaited_since IS NOT NULL THEN now()
                              ELSE now() + make_interval(secs => %(verify_seconds)s) END
         WHERE id = %(id)s AND changed_by(%(actor)s, %(why)s)
        """,
        {
            **vars(charge),
            "id": payment.id,
            "status": "completed" if is_paid else "review",
            "status_reason": None if is_paid else _difference(charge, payment),
            "verify_seconds": next_verify_seconds(0),
            "actor": actor,
            "why": "charge" if is_paid else "mismatch",
        },
        prepare=True,
    )
    if payment.expires_at < datetime.now(UTC):  # the incident opens a day later at the earliest
        db.close_ended(conn, actor, payment.id, "never_ended")
    if payment.cancelled_at is not None:
        db.open_incident(conn, payment.mode, "paid_after_cancel", charge.reference, payment.id)
    order = (payment.metadata or {}).get("order")
    if order is not None and payment.source == "link":
        _tell_of_order_paid_twice(conn, payment, charge, order)


def _tell_of_order_paid_twice(conn: BoundedConnection, payment: Payment, charge: money.Charge, order: str) -> None:
    """Open an incident if another payment of the order is paid: an ended payment's page stays open, and a link can be
    made again, so one order may be paid on two pages."""
    # If two charges come at the same moment, the second waits here, and then sees the first.
    conn.execute(
        "SELECT pg_advisory_xact_lock(hashtext('order ' || %(mode)s), hashtext(%(order)s))",
        {"mode": payment.mode, "order": order},
    )
    other = conn.execute(
        """
        SELECT FROM payments
         WHERE mode = %(mode)s AND source = 'link' AND metadata->>'order' = %(order)s AND id <> %(id)s
           AND charge_reference IS NOT NULL AND status <> 'refunded'
         LIMIT 1
        """,
        {"mode": payment.mode, "order": order, "id": payment.id},
    ).fetchone()
    if other is not None:
        db.open_incident(conn, payment.mode, "second_charge", charge.reference, payment.id)


def _difference(charge: money.Charge, payment: Payment) -> str:
    """Why a charge does not pay for its payment, for the person who reviews it."""
    asked = payment.amount_minor if charge.requested_minor is None else charge.requested_minor
    return (
        f"paid {money.readable(charge.amount_minor, charge.currency)}, "
        f"asked at {money.readable(asked, charge.currency)}, "
        f"the price is {money.readable(payment.amount_minor, payment.currency)}"
    )


def accept(
    database: Database, payment: Payment, operator: str, reason: str, *, currency: str | None, dry_run: bool = False
) -> None:
    """End a review: the charge counts as the payment. If the charge and the price differ in currency, `currency` must
    name the charge's. Raises db.Impossible, also if a refund of the charge is open or made."""

    def work(conn: BoundedConnection) -> None:
        charge = refunds.lock_refundable(conn, payment.mode, payment.id)
        if charge.payment.status == "completed" and charge.payment.accepted_by == operator:
            return  # the reply to our COMMIT was lost
        if charge.payment.status != "review":
            raise db.Impossible(f"{payment.id} is {charge.payment.status}: there is nothing to accept")
        if charge.currency != (currency or payment.currency):
            raise db.Impossible(
                f"{charge.reference} came in {charge.currency}, the price is in {payment.currency}: "
                f"--currency {charge.currency} accepts it"
            )
        if charge.spent_minor:
            raise db.Impossible(f"a refund of {charge.reference} is open or made: it cannot be accepted")
        if dry_run:
            return
        conn.execute(
            """
            UPDATE payments SET status = 'completed', accepted_by = %(operator)s
             WHERE id = %(id)s AND changed_by(%(operator)s, 'accepted')
            """,
            {"id": payment.id, "operator": operator},
        )
        db.close_ended(conn, operator, charge.reference, "mismatch", reason=reason)

    database.transaction(work)


# Money that goes back without a refund of ours


IMPORTS_SECONDS = (5, 10, 20, 40, MINUTE, 2 * MINUTE, 5 * MINUTE, 10 * MINUTE, 30 * MINUTE)
"""When refunds are imported, counted from the provider's first word of them; the last time after 30 minutes."""


VERIFIED_DAYS = (1, 7, 30, 90, 150)
"""When a paid payment is verified again, counted from its charge, to find a chargeback if its event was lost. A
cardholder may dispute for about 120 days (the rule of Visa and Mastercard), and the banks take some weeks."""


def import_refunds(database: Database, gateway: paystack.Gateway, payment: Payment, asked_at: datetime) -> None:
    """Record the listed refunds of a paid payment. Raises paystack.Unavailable and Misconfigured."""
    listed = gateway.refunds(payment.created_at - timedelta(days=1))
    for each in (row for row in listed if isinstance(row, money.Refund)):
        if (each.charge_reference or payment.reference).startswith(payment.reference):
            database.transaction(refunds.apply_refund, gateway.mode, each, "worker")
    finish_poll_of_paid(database, payment, asked_at)


def finish_poll_of_paid(database: Database, payment: Payment, asked_at: datetime, *, is_answered: bool = True) -> None:
    """Set the time of the next poll: an import while awaited refunds are missing, else the next of VERIFIED_DAYS. A
    refund that the provider first spoke of after `asked_at` may be too young for this list. If the imports end, and the
    refunds of a reversed charge do not add up to it, it is a chargeback: an incident opens."""

    def work(conn: BoundedConnection) -> None:
        row = db.only_row(
            conn,
            """
            SELECT reversed_at, extract(epoch FROM now() - refunds_awaited_since)::float8 AS awaited_seconds,
                   coalesce(refunds_awaited_since <= %(asked_at)s, true) AS was_told_before,
                   extract(epoch FROM now() - coalesce(c.recorded_at, p.created_at))::float8 AS charge_seconds,
                   (SELECT sum(amount_minor) FROM refunds r
                     WHERE r.charge_reference = p.charge_reference AND NOT r.status = ANY(%(free)s)) AS refunded_minor
              FROM payments p LEFT JOIN charges c ON c.reference = p.charge_reference
             WHERE p.id = %(id)s FOR UPDATE OF p
            """,
            {"id": payment.id, "free": list(refunds.FREE_AGAIN), "asked_at": asked_at},
        )
        adds_up = (row["refunded_minor"] or 0) >= payment.charged_minor
        is_awaited = row["awaited_seconds"] is not None
        found = _found(conn, payment) if is_awaited and not row["reversed_at"] else []
        is_missing = not (adds_up if row["reversed_at"] else row["was_told_before"] and found and all(found))
        import_seconds = next_import_seconds(row["awaited_seconds"]) if is_awaited and is_missing else None
        subject = payment.charge_reference or payment.id
        if import_seconds is None and row["reversed_at"] and is_missing and is_answered:
            cause = str(row["reversed_at"])
            db.open_incident(conn, payment.mode, "chargeback", subject, payment.id, cause=cause)
        elif import_seconds is None and is_missing and None in found:
            db.open_incident(conn, payment.mode, "unreadable_refund", subject, payment.id)
        verify_seconds = next_verify_seconds(row["charge_seconds"], is_answered=is_answered)
        conn.execute(
            """
            UPDATE payments
               SET poll_at = CASE WHEN poll_at <= now() THEN poll_at -- an event has made it due meanwhile
                                  ELSE now() + make_interval(secs => coalesce(%(import_seconds)s::float8,
                                                                              %(verify_seconds)s)) END,
                   refunds_awaited_since = CASE WHEN %(import_seconds)s::float8 IS NOT NULL
                                                THEN refunds_awaited_since END
             WHERE id = %(id)s
            """,
            {"id": payment.id, "import_seconds": import_seconds, "verify_seconds": verify_seconds},
        )

    database.transaction(work)


def _found(conn: BoundedConnection, payment: Payment) -> list[bool | None]:
    """For each event that told of a refund, whether our rows have the refund with a status at least as late; None if
    they do not have it at all. An event without an id may be about any refund of its amount: then all of these must be
    as late."""
    told = conn.execute(
        """
        SELECT body FROM provider_events
         WHERE mode = %(mode)s AND reference = ANY(%(references)s) AND name LIKE 'refund.%%' AND body IS NOT NULL
        """,
        {"mode": payment.mode, "references": db.references_of(payment.reference)},
    ).fetchall()
    events = [paystack.read_event(row["body"].encode(), payment.mode) for row in told]
    return [event is not None and _is_known(conn, event) for event in events]


def _is_known(conn: BoundedConnection, event: paystack.Event) -> bool | None:
    known: bool | None = db.only_row(
        conn,
        """
        SELECT bool_and(coalesce(array_position(%(words)s, status), 0) >= array_position(%(words)s, %(status)s))
               AS is_known
          FROM refunds
         WHERE charge_reference = %(reference)s AND status NOT IN ('refused', 'not_made')
           AND CASE WHEN %(refund_id)s::numeric IS NULL THEN amount_minor = %(refund_minor)s
                    ELSE provider_id = %(refund_id)s END
        """,
        {**vars(event), "status": event.name.removeprefix("refund."), "words": list(paystack.REFUND_WORDS)},
    )["is_known"]
    return known


def next_verify_seconds(age_seconds: float, *, is_answered: bool = True) -> float | None:
    """In how many seconds to verify a payment whose charge has this age; None after the last time. Without an answer a
    day later at most, also for a week after the last time: later the key may be of an account that does not know the
    payment."""
    seconds = next((days * DAY - age_seconds for days in VERIFIED_DAYS if days * DAY > age_seconds), None)
    if not is_answered and age_seconds < (VERIFIED_DAYS[-1] + 7) * DAY:
        return min(seconds or DAY, DAY)
    return seconds


def next_import_seconds(awaited_seconds: float) -> float | None:
    """In how many seconds to import again, if the provider spoke of refunds this long ago; None after half an hour."""
    return next((age - awaited_seconds for age in IMPORTS_SECONDS if age > awaited_seconds), None)


def await_refunds(conn: BoundedConnection, payment_id: str, *, is_reversed: bool = False) -> None:
    """The provider spoke of a refund: import the payment's refunds now, and again until they are listed. A refund's
    event may be quicker than its charge's event: then the next poll finds the charge first.

    `is_reversed`: the whole charge goes back. A repetition changes nothing until `end_reversal`.
    """
    conn.execute(
        """
        UPDATE payments
           SET poll_at = now(), refunds_awaited_since = now(),
               reversed_at = CASE WHEN %(is_reversed)s THEN now() ELSE reversed_at END
         WHERE id = %(id)s AND NOT (reversed_at IS NOT NULL AND %(is_reversed)s)
        """,
        {"id": payment_id, "is_reversed": is_reversed},
    )


def end_reversal(conn: BoundedConnection, payment_id: str, reference: str) -> None:
    """The provider says that the charge stands: its refund failed, or the merchant won the dispute. Another reversal
    may follow."""
    ended = conn.execute(
        "UPDATE payments SET reversed_at = NULL WHERE id = %(id)s AND reversed_at IS NOT NULL", {"id": payment_id}
    )
    if ended.rowcount:
        db.close_ended(conn, "worker", reference, "chargeback")
