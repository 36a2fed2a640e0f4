"""Money back: asked for once, found, adopted, given up.

Paystack's refunds have no idempotency, so paygate sends the refund of a row only once. It first commits the row under
the payment's lock, and then sends the row's id as the merchant's note. The life of a row:

    state             who writes it, when
    unanswered        `begin`, before the one call. Without an answer it stays so, counts as spent, and is looked for
    refused           `end_sending`: Paystack did not take it, or it was too late to send it. The amount is free
    pending, processing, needs-attention
                      `apply_refund`: Paystack's word, from our call, a poll, a list or an import. Counts as spent
    processed         `apply_refund`: paid out. Only `failed` can follow, if the bank returns the money
    failed            `apply_refund`: the amount is free. Only `processed` can follow, if Paystack says so later
    not_made          `give_up`: a complete list does not have it, 30 minutes or more after our call ended. The amount
                      is free. If a refused or not_made refund is listed later, it is revived: an incident opens

A refund made in Paystack's dashboard is adopted from the list, but not while a refund of ours on that charge is
unanswered. A refund event makes no row; it makes the payment due for an import. The payment follows the processed
refunds of its own charge. Calls to Paystack hold no database connection.
"""

import logging
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Self

import db
import money
import paystack
from db import BoundedConnection, Database, Payment

logger = logging.getLogger("paygate")
MINUTE, HOUR, DAY = 60, 3600, 86400
POLLS_SECONDS = (MINUTE, 2 * MINUTE, 5 * MINUTE, 15 * MINUTE, 31 * MINUTE, HOUR, 2 * HOUR, 6 * HOUR, 12 * HOUR)
"""When an open refund is polled, counted from its creation; then daily until day 30."""
NOT_MADE_AFTER_SECONDS = 30 * MINUTE
FREE_AGAIN = ("refused", "failed", "not_made")
"""States of a refund that gave nothing back. In every other state its amount counts as spent."""


@dataclass(frozen=True)
class Refund:
    id: str
    charge_reference: str
    payment_id: str
    mode: str
    provider_id: Decimal | None
    amount_minor: int
    currency: str
    status: str
    made_by: str
    reason: str | None
    refused_because: str | None
    created_at: datetime
    sent_at: datetime | None
    processed_at: datetime | None

    @classmethod
    def of(cls, row: dict[str, Any]) -> Self:
        return cls(*[row[each.name] for each in fields(cls)])


class RefundAsked(Exception):
    """The same refund was asked for before; `is_recent`: within the last 24 hours."""

    def __init__(self, refund: Refund, is_recent: bool) -> None:
        super().__init__(f"refund {refund.id} was asked for before")
        self.refund, self.is_recent = refund, is_recent


@dataclass(frozen=True)
class RefundableCharge:
    """A charge, the amount already spent on refunds, and the amount that may still be given back."""

    payment: Payment
    reference: str
    currency: str
    spent_minor: int
    left_minor: int


@dataclass(frozen=True)
class RefundDue:
    """A refund that is due for a poll, and its ages by the database's clock."""

    refund: Refund
    charge_provider_id: int | None
    charged_at: datetime
    age_seconds: float
    sent_seconds: float
    """Since our call ended. A call without an end counts as ended two minutes after it began."""

    def may_be(self, listed: money.Refund | paystack.Unreadable) -> bool:
        """Whether the listed refund may be of the same charge, or has our note."""
        if listed.note == self.refund.id or listed.charge_reference == self.refund.charge_reference:
            return True
        ids = {listed.charge_provider_id, self.charge_provider_id}
        return listed.charge_reference is None and (None in ids or len(ids) == 1)


@dataclass(frozen=True)
class Request:
    """A refund that an operator asks for. `target`: a payment's id means its own charge; a reference means that charge.
    `amount`: in major units, such as `10.00`; None means the whole rest."""

    target: str
    amount: str | None
    made_by: str
    reason: str | None = None
    again: bool = False
    """Whether to refund again, though the same refund was asked for within 24 hours."""
    rejects: bool = False
    """Whether it ends a review: refused unless the payment is in review."""
    key: str | None = None
    """Its Idempotency-Key: one refund for ever."""

    def amount_minor(self, currency: str) -> int | None:
        try:
            # A charge may have hundredths of a whole currency: an underpayment, or fees that the customer bore.
            return None if self.amount is None else money.parse_part(self.amount, currency, decimals=2)
        except ValueError as error:
            raise db.Impossible(f"the amount {error}") from None


def refund(database: Database, gateway: paystack.Gateway, request: Request) -> Refund:
    """Give money back: commit the refund, send it once, and return it with the provider's answer (`unanswered`: it will
    be looked for, and never sent again). A key that came before raises RefundAsked with its refund as it stands now.
    Raises db.Impossible, db.KeyReused, DatabaseUnavailable.
    """
    return send(database, gateway, begin(database, gateway.mode, request))


def send(database: Database, gateway: paystack.Gateway, begun: Refund) -> Refund:
    """Send a refund that was begun: once, and only while nobody can have given it up. This process may have been frozen
    since `begin`: the row is read again, and that counts towards the call's time."""
    deadline = time.monotonic() + gateway.timeout_seconds
    if not begin_sending(database, begun):
        return database.transaction(end_sending, begun, refused_because="it was too late to send it; ask for it again")
    charge, amount_minor = begun.charge_reference, begun.amount_minor
    try:
        answer = gateway.refund(charge, amount_minor, begun.currency, begun.id, deadline - time.monotonic())
    except paystack.Unavailable:
        return database.transaction(end_sending, begun)
    if isinstance(answer, paystack.Refused):
        return database.transaction(end_sending, begun, refused_because=answer.reason)
    ours = replace(answer, charge_reference=charge, note=begun.id)
    return database.transaction(apply_refund, gateway.mode, ours, begun.made_by) or begun


def plan(conn: BoundedConnection, mode: str, request: Request) -> tuple[RefundableCharge, int]:
    """The charge and the amount that `begin` would give back. Writes nothing; raises the same errors."""
    charge = lock_refundable(conn, mode, request.target)
    return charge, _decide(conn, charge, request)


def begin(database: Database, mode: str, request: Request) -> Refund:
    """Commit a refund under the payment's lock, before it is sent. Raises the same errors as `refund`."""
    key = secrets.token_bytes(32) if request.key is None else request.key.encode()
    refund_id = db.derived_name("RF", database.secret(), mode, key)

    def work(conn: BoundedConnection) -> Refund:
        charge = lock_refundable(conn, mode, request.target)
        made = conn.execute("SELECT * FROM refunds WHERE id = %(id)s", {"id": refund_id}).fetchone()
        if made is not None:  # by this key; or by us, if the reply to our COMMIT was lost
            is_of_amount = request.amount_minor(charge.currency) in (None, made["amount_minor"])
            if made["charge_reference"] != charge.reference or not is_of_amount:
                raise db.KeyReused
            return Refund.of(made)
        row = conn.execute(
            """
            INSERT INTO refunds (id, charge_reference, payment_id, mode, amount_minor, currency, status, origin,
                                 made_by, reason, poll_at)
            VALUES (%(id)s, %(charge_reference)s, %(payment_id)s, %(mode)s, %(amount_minor)s, %(currency)s,
                    'unanswered', 'paygate', %(made_by)s, %(reason)s, clock_timestamp() + interval '1 min')
            ON CONFLICT (id) DO NOTHING
            RETURNING *
            """,
            {
                **vars(request),
                **{"id": refund_id, "payment_id": charge.payment.id, "mode": mode, "currency": charge.currency},
                **{"charge_reference": charge.reference, "amount_minor": _decide(conn, charge, request)},
            },
        ).fetchone()
        if row is None:  # the same key for another payment, at the same moment
            raise db.KeyReused
        return Refund.of(row)

    return database.transaction(work)


def _decide(conn: BoundedConnection, charge: RefundableCharge, request: Request) -> int:
    """The amount to give back. Raises db.Impossible, RefundAsked."""
    if request.rejects and charge.payment.status != "review":
        raise db.Impossible(f"{charge.payment.id} is {charge.payment.status}: there is nothing to reject")
    amount = request.amount_minor(charge.currency) or charge.left_minor
    if request.key is None:
        _refuse_a_repetition(conn, charge, amount, request.again)
    if amount > charge.left_minor or charge.left_minor == 0:
        left = money.readable(charge.left_minor, charge.currency)
        raise db.Impossible(f"only {left} of {charge.reference} can still be given back")
    return amount


def lock_refundable(conn: BoundedConnection, mode: str, target: str) -> RefundableCharge:
    """Lock the payment that `target` names, and read its charge. Raises db.Impossible."""
    base = db.base_of(target)
    row = conn.execute(
        "SELECT * FROM payments WHERE mode = %(mode)s AND (id = %(target)s OR reference = %(base)s) FOR UPDATE",
        {"mode": mode, "target": target, "base": base},
    ).fetchone()
    if row is None:
        raise db.Impossible(f"there is no {mode} payment {target}")
    payment = Payment.of(row)
    reference = target if base else payment.charge_reference
    charge = conn.execute("SELECT * FROM charges WHERE reference = %(reference)s", {"reference": reference}).fetchone()
    if charge is None:
        raise db.Impossible(f"no money has come for {target}: the payment is {payment.status}")
    spent_minor = _sums(conn, reference)["spent_minor"]
    left_minor = max(0, _limit_minor(payment, reference, charge["amount_minor"]) - spent_minor)
    return RefundableCharge(payment, charge["reference"], charge["currency"], spent_minor, left_minor)


def _sums(conn: BoundedConnection, reference: str | None) -> dict[str, Any]:
    """The sums of a charge: what came, what of it is spent on refunds, and what was given back."""
    return db.only_row(
        conn,
        """
        SELECT (SELECT amount_minor FROM charges WHERE reference = %(reference)s) AS charged_minor,
               coalesce(sum(amount_minor) FILTER (WHERE NOT status = ANY(%(free)s)), 0)::bigint AS spent_minor,
               coalesce(sum(amount_minor) FILTER (WHERE status = 'processed'), 0)::bigint AS given_back_minor
          FROM refunds WHERE charge_reference = %(reference)s
        """,
        {"reference": reference, "free": list(FREE_AGAIN)},
    )


def _limit_minor(payment: Payment, reference: str | None, charged_minor: int) -> int:
    """How much of a charge may go back: the whole of it; but of the charge that pays its payment, the price at most."""
    is_own_and_paid = reference == payment.charge_reference and payment.is_paid
    was_rejected = payment.status_reason is not None and payment.accepted_by is None
    return payment.due_back_minor if is_own_and_paid and not was_rejected else charged_minor


def _refuse_a_repetition(conn: BoundedConnection, charge: RefundableCharge, amount_minor: int, again: bool) -> None:
    """Raises RefundAsked for the same amount of the same charge within 24 hours. If nothing is left of the charge, a
    request for the whole rest repeats the last refund, at any time."""
    row = conn.execute(
        """
        SELECT *, created_at > clock_timestamp() - interval '24 hours' AS is_recent FROM refunds
         WHERE charge_reference = %(reference)s AND NOT status = ANY(%(free)s)
           AND ((%(nothing_is_left)s AND %(amount_minor)s IN (0, amount_minor))
                OR (NOT %(again)s AND amount_minor = %(amount_minor)s
                    AND created_at > clock_timestamp() - interval '24 hours'))
         ORDER BY amount_minor = %(amount_minor)s DESC, created_at DESC LIMIT 1
        """,
        {
            **{"reference": charge.reference, "free": list(FREE_AGAIN), "nothing_is_left": charge.left_minor == 0},
            **{"again": again, "amount_minor": amount_minor},
        },
    ).fetchone()
    if row is not None:
        raise RefundAsked(Refund.of(row), row["is_recent"])


def begin_sending(database: Database, refund: Refund) -> bool:
    """Whether to send a refund now: its row is unanswered, and much younger than a row that is given up. Under the
    payment's lock, so only one request sends it. Raises RefundAsked if another request has sent it."""
    ours: datetime | None = None  # the row has it at our second try, if the reply to our first COMMIT was lost

    def work(conn: BoundedConnection) -> bool:
        nonlocal ours
        _lock_payment(conn, refund.payment_id)
        current = Refund.of(db.only_row(conn, "SELECT * FROM refunds WHERE id = %(id)s", vars(refund)))
        if current.sent_at not in (None, ours) or current.provider_id is not None:
            raise RefundAsked(current, is_recent=True)
        statement = """
            UPDATE refunds SET sent_at = coalesce(sent_at, clock_timestamp())
             WHERE id = %(id)s AND status = 'unanswered' AND created_at > clock_timestamp() - interval '1 min'
            RETURNING sent_at
            """
        row = conn.execute(statement, vars(refund)).fetchone()
        ours = row and row["sent_at"]
        return row is not None

    return database.transaction(work)


def end_sending(conn: BoundedConnection, refund: Refund, *, refused_because: str | None = None) -> Refund:
    """Store that our one call has ended: refused, or without an answer. Then the refund is looked for."""
    statement = """
        UPDATE refunds
           SET send_ended_at = clock_timestamp(), refused_because = %(refused_because)s,
               -- A failover may have lost that it was sent: then it would be sent again.
               sent_at = coalesce(sent_at, CASE WHEN %(refused_because)s::text IS NULL THEN clock_timestamp() END),
               status = CASE WHEN status = 'unanswered' AND %(refused_because)s::text IS NOT NULL THEN 'refused'
                             ELSE status END,
               poll_at = CASE WHEN %(refused_because)s::text IS NULL THEN poll_at END
         WHERE id = %(id)s
        RETURNING *
        """
    _lock_payment(conn, refund.payment_id)  # first, as everywhere: a refusal writes to the payment's trail
    return Refund.of(db.only_row(conn, statement, {"id": refund.id, "refused_because": refused_because}))


def poll_due(database: Database, gateway: paystack.Gateway, limit: int) -> int:
    """Poll the due refunds, and return how many were due. An error of a single refund delays no other refund. Raises
    paystack.Unavailable and Misconfigured."""
    dues = claim_due(database, gateway.mode, limit, limit * gateway.timeout_seconds + MINUTE)
    for due in dues:
        if due.refund.provider_id is not None:
            try:
                database.transaction(apply_refund, gateway.mode, gateway.refund_of_id(due.refund.provider_id), "worker")
            except (paystack.Unavailable, paystack.Misconfigured) as error:
                if isinstance(error, paystack.Unavailable) and error.retry_after_seconds is not None:
                    raise
                logger.warning("refund_not_answered", extra={"reference": due.refund.charge_reference})
            database.transaction(finish_poll, due.refund, next_poll_seconds(due.age_seconds))
    sought = [due for due in dues if due.refund.provider_id is None]
    if sought:
        _look_for_unanswered(database, gateway, sought)
    return len(dues)


def _look_for_unanswered(database: Database, gateway: paystack.Gateway, sought: list[RefundDue]) -> None:
    """Look for the refunds without an answer in one complete list of the account's refunds since their charges."""
    since = min(due.charged_at for due in sought) - timedelta(days=1)
    try:
        rows = [each for each in gateway.refunds(since) if any(due.may_be(each) for due in sought)]
    except (paystack.Unavailable, paystack.Misconfigured):
        for due in sought:  # whose polls are over: an incident says so, list or not
            if next_poll_seconds(due.age_seconds) is None:
                database.transaction(finish_poll, due.refund, None)
        raise
    listed = [each for each in rows if isinstance(each, money.Refund)]
    unreadable = [each for each in rows if isinstance(each, paystack.Unreadable)]
    for each in listed:
        database.transaction(apply_refund, gateway.mode, each, "worker")
    for due in sought:
        is_listed = any(each.note == due.refund.id for each in listed) or any(map(due.may_be, unreadable))
        if due.refund.status == "unanswered" and due.sent_seconds >= NOT_MADE_AFTER_SECONDS and not is_listed:
            database.transaction(give_up, due.refund, listed)
        database.transaction(finish_poll, due.refund, next_poll_seconds(due.age_seconds))


def next_poll_seconds(age_seconds: float) -> float | None:
    """In how many seconds to poll an open refund of this age; None after 30 days."""
    if age_seconds >= 30 * DAY:
        return None
    return next((age - age_seconds for age in POLLS_SECONDS if age > age_seconds), DAY)


def claim_due(database: Database, mode: str, limit: int, lease_seconds: float) -> list[RefundDue]:
    """Lease the refunds that are most overdue for a poll."""
    rows = database.rows(
        """
        WITH due AS (
            SELECT id FROM refunds WHERE mode = %(mode)s AND poll_at <= now()
             ORDER BY poll_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED
        )
        UPDATE refunds r SET poll_at = now() + make_interval(secs => %(lease_seconds)s)
          FROM due, charges c
         WHERE r.id = due.id AND c.reference = r.charge_reference
        RETURNING r.*, c.provider_id AS charge_provider_id, least(c.paid_at, c.recorded_at, r.created_at) AS charged_at,
                  extract(epoch FROM now() - r.created_at)::float8 AS age_seconds,
                  extract(epoch FROM now() - coalesce(
                      r.send_ended_at, coalesce(r.sent_at, r.created_at) + '2 min'))::float8 AS sent_seconds
        """,
        {"mode": mode, "limit": limit, "lease_seconds": lease_seconds},
    )
    return [RefundDue(Refund.of(row), *[row[each.name] for each in fields(RefundDue)[1:]]) for row in rows]


def finish_poll(conn: BoundedConnection, refund: Refund, next_seconds: float | None) -> None:
    """Set the time of the next poll. If the refund is still open when its polls end, an incident opens."""
    _lock_payment(conn, refund.payment_id)
    row = conn.execute(
        """
        UPDATE refunds SET poll_at = now() + make_interval(secs => %(next_seconds)s)
         WHERE id = %(id)s AND status NOT IN ('processed', 'failed', 'refused') RETURNING status
        """,
        {"id": refund.id, "next_seconds": next_seconds},
    ).fetchone()
    if row is not None and next_seconds is None and row["status"] != "not_made":
        db.open_incident(conn, refund.mode, "refund_not_final", refund.id, refund.payment_id)


def give_up(conn: BoundedConnection, refund: Refund, listed: Iterable[money.Refund]) -> None:
    """Free the amount of a refund that a complete list, fetched long after our call, does not have. The listed refunds
    are recorded in the same transaction, so that a refund that took the amount is not overlooked."""
    _lock_payment(conn, refund.payment_id)
    given_up = conn.execute(
        "UPDATE refunds SET status = 'not_made' WHERE id = %(id)s AND status = 'unanswered'", {"id": refund.id}
    )
    if given_up.rowcount:
        db.open_incident(conn, refund.mode, "refund_not_made", refund.id, refund.payment_id)
    for each in listed:
        apply_refund(conn, refund.mode, each, "worker")


def _lock_payment(conn: BoundedConnection, payment_id: str) -> Payment:
    """Always before its refunds: an incident about a refund locks the payment too, to number the notification."""
    return Payment.of(db.only_row(conn, "SELECT * FROM payments WHERE id = %(id)s FOR UPDATE", {"id": payment_id}))


def apply_refund(conn: BoundedConnection, mode: str, listed: money.Refund, actor: str) -> Refund | None:
    """Record a refund as the provider lists it, and update its payment. Safe to repeat.

    The reference, the refund's id or the transaction's id names the charge; the note only if none of these does. We
    know the refund by the provider's id, or by its note (`send` writes it into the answer to our call). Any other
    refund was made in the dashboard and is adopted, but not while a refund of ours on that charge is unanswered: it
    might be ours.
    None if there is nothing to record, or not yet.
    """
    charge = conn.execute(
        """
        SELECT reference, payment_id, currency AS charged_currency FROM charges
         WHERE mode = %(mode)s AND reference = coalesce(
               %(charge_reference)s,
               (SELECT charge_reference FROM refunds WHERE mode = %(mode)s AND provider_id = %(provider_id)s),
               (SELECT reference FROM charges WHERE mode = %(mode)s AND provider_id = %(charge_provider_id)s LIMIT 1),
               (SELECT c.reference FROM refunds r JOIN charges c ON c.reference = r.charge_reference
                 WHERE r.mode = %(mode)s AND r.id = %(note)s
                   AND (c.provider_id IS NULL OR %(charge_provider_id)s::bigint IS NULL)))
        """,
        {**vars(listed), "mode": mode},
    ).fetchone()
    if charge is None or listed.amount_minor == 0:
        return None
    payment = _lock_payment(conn, charge["payment_id"])
    known = conn.execute(
        """
        SELECT * FROM refunds
         WHERE charge_reference = %(reference)s
           AND (provider_id = %(provider_id)s OR (provider_id IS NULL AND id = %(note)s))
         ORDER BY provider_id NULLS LAST LIMIT 1
        """,
        {**vars(listed), **charge},
    ).fetchone()
    known = known or _adopt_refund(conn, mode, charge, listed)
    if known is None:
        return None
    refund = _update_refund(conn, Refund.of(known), listed)
    _tell_of_refund(conn, payment, Refund.of(known), refund, actor)
    if refund.charge_reference == payment.charge_reference:
        _follow_refunds(conn, payment, actor)
    return refund


def _adopt_refund(
    conn: BoundedConnection, mode: str, charge: dict[str, Any], listed: money.Refund
) -> dict[str, Any] | None:
    return conn.execute(
        """
        INSERT INTO refunds (id, charge_reference, payment_id, mode, provider_id, amount_minor, currency, status,
                             origin, made_by)
        -- Our id is in its note: its row was lost. It keeps the id, so that a repetition with the key finds it.
        SELECT CASE WHEN %(note)s ~ '^RF-[0-9A-HJKMNP-TV-Z]{26}$' AND NOT EXISTS (
                  SELECT FROM refunds WHERE id = %(note)s) THEN %(note)s ELSE %(id)s END, %(reference)s, %(payment_id)s,
               %(mode)s, %(provider_id)s, %(amount_minor)s, %(currency)s, 'pending', 'dashboard', 'provider'
         WHERE %(currency)s = %(charged_currency)s -- else it cannot be summed; `reconcile` reports it
           AND NOT EXISTS (SELECT FROM refunds WHERE charge_reference = %(reference)s AND status = 'unanswered')
        RETURNING *
        """,
        {**vars(listed), **charge, "id": db.derived_name("RF", secrets.token_bytes(32), mode, b""), "mode": mode},
    ).fetchone()


def _update_refund(conn: BoundedConnection, known: Refund, listed: money.Refund) -> Refund:
    """Take over the provider's word. `processed` and `failed` stay, whatever an older answer says, until the provider
    says the other word of the two. The amount is the provider's first amount, in the currency of the charge."""
    is_settled = known.status in ("processed", "failed")
    status = listed.status if not is_settled or listed.status in ("processed", "failed") else known.status
    takes_amount = known.provider_id is None and listed.currency == known.currency
    amount_minor = listed.amount_minor if takes_amount else known.amount_minor
    row = db.only_row(
        conn,
        """
        UPDATE refunds
           SET provider_id = %(provider_id)s, amount_minor = %(amount_minor)s, status = %(status)s,
               refused_because = NULL,
               processed_at = CASE WHEN %(status)s = 'processed' THEN coalesce(processed_at, clock_timestamp())
                                   ELSE processed_at END,
               poll_at = CASE WHEN %(status)s NOT IN ('processed', 'failed')
                              THEN coalesce(poll_at, clock_timestamp() + interval '1 min') END
         WHERE id = %(id)s
        RETURNING *
        """,
        {**vars(listed), "id": known.id, "amount_minor": amount_minor, "status": status},
    )
    return Refund.of(row)


def _tell_of_refund(conn: BoundedConnection, payment: Payment, before: Refund, refund: Refund, actor: str) -> None:
    """Open the incidents that a refund causes, and close the incidents that it ends."""
    news = [f"refund_{refund.status.replace('-', '_')}"] if refund.status in ("failed", "needs-attention") else []
    if before.status in ("refused", "not_made"):
        news.append("refund_revived")
        db.close_ended(conn, actor, refund.id, "refund_not_made")
    for kind in news if refund.status != before.status else []:
        db.reopen_incidents(conn, [kind], refund.id)
        db.open_incident(conn, refund.mode, kind, refund.id, refund.payment_id)
    if refund.status in ("processed", "failed"):
        db.close_ended(conn, actor, refund.id, "refund_needs_attention", "refund_not_final")
    if refund.status == "processed":
        db.close_ended(conn, actor, refund.id, "refund_failed")
    reference, sums = refund.charge_reference, _sums(conn, refund.charge_reference)
    charged_minor, spent_minor = sums["charged_minor"], sums["spent_minor"]
    ends_by_it = ["second_charge", "paid_after_cancel", *(["mismatch"] if payment.accepted_by is None else [])]
    if spent_minor > charged_minor:
        db.open_incident(conn, refund.mode, "refunded_too_much", reference, refund.payment_id, cause=str(spent_minor))
    if sums["given_back_minor"] >= _limit_minor(payment, reference, charged_minor):
        db.close_ended(conn, actor, reference, *ends_by_it)
    elif (before.status, refund.status) == ("processed", "failed"):
        db.reopen_incidents(conn, ends_by_it, reference)


def _follow_refunds(conn: BoundedConnection, payment: Payment, actor: str) -> None:
    """Make a payment's refunded sum and status match the processed refunds of its own charge. The sum may fall, if a
    refund fails later; the status never falls. A payment leaves review only when the whole charge was given back."""
    refunded = _sums(conn, payment.charge_reference)["given_back_minor"]
    if refunded == payment.refunded_minor:
        return
    status = payment.status
    if refunded >= _limit_minor(payment, payment.charge_reference, payment.charged_minor):
        status = "refunded"
    elif refunded > 0 and status == "completed":
        status = "partially_refunded"
    conn.execute(
        """
        UPDATE payments SET refunded_minor = %(refunded_minor)s, status = %(status)s
         WHERE id = %(id)s AND changed_by(%(actor)s, %(why)s)
        """,
        {
            **{"id": payment.id, "refunded_minor": refunded, "status": status, "actor": actor},
            "why": "refund" if refunded > payment.refunded_minor else "refund_failed",
        },
    )
