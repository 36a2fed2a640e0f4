"""Open a checkout, hear an event, look at a payment: what paygate does with a payment and its provider.

No database connection is held while the provider is asked.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import db
import log
import money
import paystack

SHORTEST_CALL_SECONDS = 1
MINUTE, HOUR, DAY = 60, 3600, 86400

LOOKS_SECONDS = (5, 10, 20, 40, MINUTE, 2 * MINUTE, 5 * MINUTE, 10 * MINUTE)
"""When a payment is looked at, counted from its reservation; then every 30 minutes until its time ends."""

REFUND_LOOKS_SECONDS = (MINUTE, 2 * MINUTE, 5 * MINUTE, 15 * MINUTE, 31 * MINUTE, HOUR, 2 * HOUR, 6 * HOUR, 12 * HOUR)
"""When a refund that is not final is asked for again, counted from its making; then daily for 30 days."""

NOT_MADE_AFTER_SECONDS = 30 * MINUTE


class Unanswered(Exception):
    """The provider gave no answer in time. The lease is given back: the same key goes on where this request stopped."""

    def __init__(self, retry_after_seconds: float = 1) -> None:
        super().__init__(retry_after_seconds)
        self.retry_after_seconds = retry_after_seconds


class UsedUp(Exception):
    """All nine references of a payment were tried; a person must look."""


class Busy(Exception):
    """As many payments are being opened as this process opens at once. Nothing was reserved."""


Render = Callable[[db.Payment, paystack.Refused | None], db.Answer]
"""Writes the answer of a finished request: the payment as it stands, or why the provider refused it."""


@dataclass(frozen=True)
class Desk:
    """Where payments are started. `pay_url` is the customer's page, without the id.

    `slots` is how many threads may wait for the provider at once: one that hangs holds these and no more, and the
    others serve reads and webhooks.
    """

    database: db.Database
    gateway: paystack.Gateway
    pay_url: str
    lease_seconds: float
    ttl_seconds: float
    slots: threading.BoundedSemaphore
    render: Render

    def budget_seconds(self) -> float:
        """How long after taking a lease the provider may be asked: one call and a half, and never past the lease."""
        return min(1.5 * self.gateway.timeout_seconds + 1, self.lease_seconds - 1)


def start(desk: Desk, key: bytes, order: db.Order) -> tuple[db.Answer, bool]:
    """Start the payment of `key`, or go on with one that a crash or a fault left behind; and whether the answer is a
    replay. Without a free slot a finished key is still replayed.

    Raises Busy, what `open_checkout` raises, db.KeyReused, db.InFlight, db.Unavailable.
    """
    if not desk.slots.acquire(blocking=False):
        found = db.find_reservation(desk.database, mode=desk.gateway.mode, key=key, order=order)
        if found is None or found.answer is None:
            raise Busy
        return found.answer, True
    try:
        reservation = db.reserve(
            desk.database,
            mode=desk.gateway.mode,
            key=key,
            order=order,
            lease_seconds=desk.lease_seconds,
            ttl_seconds=desk.ttl_seconds,
        )
        if reservation.answer is not None:
            return reservation.answer, True
        return open_checkout(desk, reservation), False
    finally:
        desk.slots.release()


def open_checkout(desk: Desk, reservation: db.Reservation) -> db.Answer:
    """Open the checkout of a reserved payment, or go on where an earlier request stopped, and store the answer.

    Walks the references PG-x, PG-x-2 … PG-x-9: one that exists already was initialized by a request whose answer was
    lost, and its URL cannot be had again, so it is verified, and an unpaid one is left for the next. Raises Unanswered,
    UsedUp, paystack.Misconfigured (each with the lease given back), db.InFlight, db.Unavailable.
    """
    walk = Walk(desk, reservation)
    try:
        outcome = walk.to_an_outcome()
    except BaseException as stop:
        db.give_back(desk.database, reservation, attempt=walk.attempt, reference_exists=walk.reference_exists)
        if isinstance(stop, UsedUp):
            db.note_incident(desk.database, reservation.payment, "references_used_up")
        raise
    match outcome:
        case paystack.Opened(checkout_url):
            return _settle_opened(desk, reservation, checkout_url, walk.attempt)
        case paystack.Refused(reason=reason) as refused:
            return _settle(desk, reservation, refused, refusal=reason)
        case money.Charge() as charge:
            db.note_charge(desk.database, charge, reservation.payment.source)
    return _settle(desk, reservation, None)


class Walk:
    """The way along the references of a payment, until the provider says something that can be settled."""

    def __init__(self, desk: Desk, reservation: db.Reservation) -> None:
        self.desk = desk
        self.payment = reservation.payment
        self.is_over = reservation.is_over
        self.attempt = reservation.payment.attempt
        self.reference_exists = reservation.reference_exists
        self.deadline = reservation.taken_at + desk.budget_seconds()

    def to_an_outcome(self) -> paystack.Opened | paystack.Refused | money.Charge | None:
        """What to settle; None when there is nothing to open any more."""
        if self.payment.status != "pending" or self.is_over:
            return None
        while self.attempt <= db.LAST_ATTEMPT:
            outcome = self._verify() if self.reference_exists else self._initialize()
            match outcome:
                case paystack.Opened() | paystack.Refused() | money.Charge():
                    return outcome
                case paystack.Duplicate():
                    self.reference_exists = True
                case paystack.Unpaid():
                    self._next_reference()
                case paystack.NotFound():
                    self.reference_exists = False
                    raise Unanswered
                case paystack.UnderWay():
                    raise Unanswered
        raise UsedUp

    def _next_reference(self) -> None:
        if self.attempt == db.LAST_ATTEMPT:
            raise UsedUp
        self.attempt += 1
        self.reference_exists = False

    def _initialize(self) -> paystack.Opened | paystack.Duplicate | paystack.Refused:
        """Once more with the same reference when the first answer is unknown, but not when we were asked to wait."""
        try:
            return self._initialize_once()
        except paystack.Unavailable as unknown:
            if unknown.asked_to_wait or self._left_seconds() < SHORTEST_CALL_SECONDS:
                raise Unanswered(unknown.retry_after_seconds or 1) from unknown
        try:
            return self._initialize_once()
        except paystack.Unavailable as unknown:
            raise Unanswered(unknown.retry_after_seconds or 1) from unknown

    def _initialize_once(self) -> paystack.Opened | paystack.Duplicate | paystack.Refused:
        return self.desk.gateway.initialize(
            reference=db.reference_of_attempt(self.payment.reference, self.attempt),
            email=self.payment.customer_email,
            amount_minor=self.payment.amount_minor,
            currency=self.payment.currency,
            callback_url=self.desk.pay_url + self.payment.id,
            metadata={"payment": self.payment.id, "cancel_action": self.desk.pay_url + self.payment.id},
            within_seconds=self._call_seconds(),
        )

    def _verify(self) -> money.Charge | paystack.Unpaid | paystack.UnderWay | paystack.NotFound:
        reference = db.reference_of_attempt(self.payment.reference, self.attempt)
        try:
            return self.desk.gateway.verify(reference, self._call_seconds())
        except paystack.Unavailable as unknown:
            raise Unanswered(unknown.retry_after_seconds or 1) from unknown

    def _left_seconds(self) -> float:
        return self.deadline - time.monotonic()

    def _call_seconds(self) -> float:
        """How long the next call may take. Raises Unanswered when too little is left to begin one."""
        left = self._left_seconds()
        if left < SHORTEST_CALL_SECONDS:
            raise Unanswered
        return min(self.desk.gateway.timeout_seconds, left)


def _settle_opened(desk: Desk, reservation: db.Reservation, checkout_url: str, attempt: int) -> db.Answer:
    """The usual end in one statement; anything that happened meanwhile is found under the locks of `db.settle`."""
    opened = replace(reservation.payment, checkout_url=checkout_url, attempt=attempt)
    answer = desk.render(opened, None)
    if db.settle_checkout(desk.database, reservation, opened, answer):
        return answer
    return _settle(desk, reservation, None, checkout_url=checkout_url, attempt=attempt)


def _settle(
    desk: Desk,
    reservation: db.Reservation,
    refused: paystack.Refused | None,
    *,
    checkout_url: str | None = None,
    attempt: int = 1,
    refusal: str | None = None,
) -> db.Answer:
    def render(payment: db.Payment) -> db.Answer:
        return desk.render(payment, refused if payment.status == "failed" else None)

    return db.settle(desk.database, reservation, render, checkout_url=checkout_url, attempt=attempt, refusal=refusal)


# Events


def hear(database: db.Database, gateway: paystack.Gateway, body: bytes) -> None:
    """Store a signed webhook and apply it, in one transaction. Raises db.Unavailable when it could not be stored.

    When applying fails, for whatever reason, the event is stored alone, and the worker applies it.
    """
    if not _apply_event(database, gateway, body):
        delivery = _delivery(paystack.read_event(body, gateway.mode), body, gateway.mode)
        database.run(lambda conn: db.record(conn, gateway.mode, delivery.reference, "webhook", delivery=delivery))


def apply_due_events(database: db.Database, gateway: paystack.Gateway, limit: int) -> int:
    """Apply the events whose first handling failed; how many were tried."""
    bodies = db.claim_events(database, gateway.mode, limit)
    for body in bodies:
        _apply_event(database, gateway, body.encode())
    return len(bodies)


def _apply_event(database: db.Database, gateway: paystack.Gateway, body: bytes) -> bool:
    """Store an event and what it changes, in one transaction. False when that failed by an error of ours."""
    event = paystack.read_event(body, gateway.mode)
    delivery = _delivery(event, body, gateway.mode)
    try:
        database.transaction("webhook", "charge", lambda conn: _record_and_apply(conn, delivery, event))
    except db.Unavailable:
        raise
    except Exception as error:  # not even a bug may cost the event: it is kept, and tried again
        log.failure("event_not_applied", error)
        return False
    return True


def _delivery(event: paystack.Event | None, body: bytes, mode: str) -> db.Delivery:
    """How an event is stored: what is not ours by its name, reference and digest only."""
    digest = hashlib.sha256(body).digest()
    if event is None:
        return db.Delivery(mode, digest, "no_event")
    if event.reference is None or not db.REFERENCE_PATTERN.fullmatch(event.reference):
        return db.Delivery(mode, digest, "foreign", event.name, event.reference)
    outcome = "received" if event.mode in (mode, None) else "other_mode"
    return db.Delivery(mode, digest, outcome, event.name, event.reference, body.decode())


def _record_and_apply(conn: db.BoundedConnection, delivery: db.Delivery, event: paystack.Event | None) -> None:
    if event is None or event.reference is None or delivery.outcome != "received":
        db.record(conn, delivery.mode, delivery.reference, "webhook", delivery=delivery)
        return
    if event.charge is not None:
        db.apply_charge(conn, event.charge, "webhook", replace(delivery, outcome="applied"))
        return
    payment = db.record(conn, delivery.mode, event.reference, "webhook", delivery=replace(delivery, outcome="noted"))
    if event.name.startswith("charge.dispute."):
        db.open_incident(conn, delivery.mode, "dispute", event.reference, payment.id if payment else None)
        if event.name == "charge.dispute.resolve":
            db.close_ended(conn, "webhook", ["dispute"], event.reference)
    if event.name.startswith("refund.") and payment is not None:
        # An event may come before the answer to our own call, and without an id: it makes no row, it makes us look.
        db.await_refunds(conn, payment.id)
    elif event.name == "charge.success" and payment is not None:
        db.look_now(conn, payment.id)  # money came, and the event does not say it readably: verify will


# Looking


def look_at_due(database: db.Database, gateway: paystack.Gateway) -> bool:
    """Look at the payment most overdue; False when none is due. One at a time, so that no lease runs out meanwhile.

    Raises paystack.Unavailable when the provider asks us to wait.
    """
    lease_seconds = db.LAST_ATTEMPT * gateway.timeout_seconds + MINUTE
    for due in db.claim_due(database, gateway.mode, 1, lease_seconds):
        try:
            look(database, gateway, due)
        except paystack.Misconfigured:
            log.event("provider_refuses_us", level=logging.ERROR, payment=due.payment.id)
        except paystack.Unavailable as unknown:
            if unknown.asked_to_wait:
                raise
        except db.Unavailable:
            raise
        except Exception as error:  # one payment that cannot be looked at must hold up no other
            log.failure("look_failed", error, payment=due.payment.id)
        return True
    return False


def look(database: db.Database, gateway: paystack.Gateway, due: db.Due) -> None:
    """Ask the provider what has become of a payment, and store it. Raises paystack.Unavailable, Misconfigured."""
    if due.payment.charge_reference is None:
        look_for_charges(database, gateway, due)
    else:
        look_for_refunds(database, gateway, due.payment)


def sync(database: db.Database, gateway: paystack.Gateway, payment: db.Payment) -> bool:
    """Ask about all that is known of a payment, because somebody wants to know now; whether there was an answer.

    Raises paystack.Unavailable, paystack.Misconfigured, db.Unavailable.
    """
    outcome = look_for_charges(database, gateway, db.find_due(database, payment))
    found = db.find_payment(database, payment.id)
    if found is not None and found.charge_reference is not None:
        look_for_refunds(database, gateway, found)
    return outcome != "no_answer"


def look_for_charges(database: db.Database, gateway: paystack.Gateway, due: db.Due) -> str:
    """Ask about every reference up to the one that a payment has reached; `paid`, `unpaid` or `no_answer`.

    Raises paystack.Unavailable, after the next look has been fixed, when the provider asks us to wait.
    """
    payment, declined, is_answered, is_paid = due.payment, None, True, False
    wait: paystack.Unavailable | None = None
    started = time.monotonic()
    for attempt in range(1, payment.attempt + 1):
        reference = db.reference_of_attempt(payment.reference, attempt)
        try:
            verdict = gateway.verify(reference, gateway.timeout_seconds)
        except paystack.Unavailable as unknown:
            is_answered = False
            if unknown.asked_to_wait:
                wait = unknown
                break
            continue
        except paystack.Misconfigured:
            log.event("provider_refuses_us", level=logging.ERROR, reference=reference)
            is_answered = False
            continue
        match verdict:
            case money.Charge() as charge:
                db.note_charge(database, charge, "worker")
                is_paid = True
            case paystack.Unpaid(declined=reason):
                declined = reason or declined
            case paystack.NotFound():
                # Of a reference that was opened this is no answer: its transaction exists.
                is_answered = is_answered and attempt == payment.attempt and not due.is_opened
            case paystack.UnderWay():
                is_answered = False
    outcome = "paid" if is_paid else "unpaid" if is_answered else "no_answer"
    if outcome != "no_answer":
        db.finish_job(database, "look", gateway.mode, None)
    log.event("looked", payment=payment.id, outcome=outcome, ms=(time.monotonic() - started) * 1000)
    if not is_paid:
        ended = _end_of(due, declined) if is_answered else None
        db.finish_look(
            database,
            payment.id,
            next_seconds=next_look_seconds(due.age_seconds, due.over_seconds, ended or payment.status),
            status=ended,
            status_reason=f"last try declined: {declined}" if declined else None,
        )
    if wait is not None:
        raise wait
    return outcome


def _end_of(due: db.Due, declined: str | None) -> str | None:
    """The status of a pending payment whose time is over, once the provider has said that it is unpaid."""
    if due.payment.status != "pending" or due.over_seconds < 0:
        return None
    return "failed" if declined else "expired"


def next_look_seconds(age_seconds: float, over_seconds: float, status: str) -> float | None:
    """When to look next at an unpaid payment of this age, `over_seconds` after its time ended (negative before).

    None a year after its end. It is reckoned from the age alone, so a look that somebody asked for changes nothing.
    """
    if status != "pending":
        if over_seconds >= 365 * DAY:
            return None
        return (
            _until_next(over_seconds, DAY) if over_seconds < 30 * DAY else _until_next(over_seconds - 30 * DAY, 7 * DAY)
        )
    if over_seconds >= 0:
        return _until_next(over_seconds, 30 * MINUTE)
    next_age = next((age for age in LOOKS_SECONDS if age > age_seconds), None)
    regular = _until_next(age_seconds - LOOKS_SECONDS[-1], 30 * MINUTE) if next_age is None else next_age - age_seconds
    return min(regular, -over_seconds)


def _until_next(seconds: float, every_seconds: float) -> float:
    """How long until the next whole multiple of `every_seconds`."""
    return every_seconds - seconds % every_seconds


# Refunds


def refund(
    database: db.Database,
    gateway: paystack.Gateway,
    target: str,
    *,
    amount_minor: Callable[[str], int] | None = None,
    again: bool = False,
    rejecting: bool = False,
    made_by: str,
    reason: str | None = None,
) -> db.Refund:
    """Give money back: commit the refund, ask for it once, and return it with what the provider said.

    `unanswered` is one of the answers: then it is looked for, and never asked for again. Raises db.RefundImpossible,
    db.RefundAsked, db.Unavailable.
    """
    begun = db.begin_refund(
        database,
        gateway.mode,
        target,
        amount_minor=amount_minor,
        again=again,
        rejecting=rejecting,
        made_by=made_by,
        reason=reason,
    )
    try:
        answer = gateway.refund(begun.charge_reference, begun.amount_minor, begun.currency, note=begun.id)
    except paystack.Unavailable:
        return db.end_sending(database, begun.id)
    if isinstance(answer, paystack.RefundRefused):
        return db.end_sending(database, begun.id, refused_because=answer.reason)
    ours = replace(answer, charge_reference=begun.charge_reference)
    return db.note_refund(database, gateway.mode, ours, made_by, ours=begun.id) or begun


def look_at_refunds(database: db.Database, gateway: paystack.Gateway, limit: int) -> int:
    """Ask about the refunds that are due; how many there were. Raises paystack.Unavailable and Misconfigured, but not
    for a single refund: one that is never answered must hold up no other."""
    dues = db.claim_refunds(database, gateway.mode, limit, limit * gateway.timeout_seconds + MINUTE)
    for due in dues:
        if due.refund.provider_id is not None:
            try:
                db.note_refund(database, gateway.mode, gateway.refund_of_id(due.refund.provider_id), "worker")
            except (paystack.Unavailable, paystack.Misconfigured) as error:
                if isinstance(error, paystack.Unavailable) and error.asked_to_wait:
                    raise
                log.event("refund_not_answered", level=logging.WARNING, reference=due.refund.charge_reference)
            db.finish_refund_look(database, due.refund, next_refund_look_seconds(due.age_seconds))
    sought = [due for due in dues if due.refund.provider_id is None]
    if sought:
        _seek(database, gateway, sought)
    return len(dues)


def _seek(database: db.Database, gateway: paystack.Gateway, sought: list[db.RefundDue]) -> None:
    """Look for refunds whose answer we never had, in one complete listing of the account's since their charges."""
    since = min(due.charged_at for due in sought) - timedelta(days=1)
    listed = [each for each in gateway.refunds(since) if any(due.may_be(each) for due in sought)]
    for each in listed:
        db.note_refund(database, gateway.mode, each, "worker")
    for due in sought:
        if due.refund.status == "unanswered" and due.sent_seconds >= NOT_MADE_AFTER_SECONDS:
            db.give_refund_up(database, due.refund, listed)
        db.finish_refund_look(database, due.refund, next_refund_look_seconds(due.age_seconds))


def look_for_refunds(database: db.Database, gateway: paystack.Gateway, payment: db.Payment) -> None:
    """Record the refunds of a paid payment that the provider lists. Raises paystack.Unavailable and Misconfigured."""
    for each in gateway.refunds(since=payment.created_at - timedelta(days=1)):
        if (each.charge_reference or payment.reference).startswith(payment.reference):
            db.note_refund(database, gateway.mode, each, "worker")
    db.finish_awaiting(database, payment, next_awaited_look_seconds)


def next_refund_look_seconds(age_seconds: float) -> float | None:
    """When to ask for a refund again that is not final: at first a minute after it was made, later daily, 30 days."""
    if age_seconds >= 30 * DAY:
        return None
    next_age = next((age for age in REFUND_LOOKS_SECONDS if age > age_seconds), age_seconds + DAY)
    return next_age - age_seconds


def next_awaited_look_seconds(awaited_seconds: float) -> float | None:
    """When to look again for refunds that the provider spoke of but has not listed; None after half an hour."""
    if awaited_seconds >= 30 * MINUTE:
        return None
    next_age = next((age for age in LOOKS_SECONDS if age > awaited_seconds), 30 * MINUTE)
    return next_age - awaited_seconds


# Every day


def apply_lists(database: db.Database, gateway: paystack.Gateway, days: float) -> int:
    """Apply every charge and refund of the last `days` that bears one of our references; how many there were.

    So a payment is found without a webhook and without its own look. Raises paystack.Unavailable and Misconfigured.
    """
    since, found = datetime.now(UTC) - timedelta(days=days), 0
    for charge in gateway.transactions(since):
        if db.REFERENCE_PATTERN.fullmatch(charge.reference):
            db.note_charge(database, charge, "worker")
            found += 1
    for listed in gateway.refunds(since):
        if listed.charge_reference is None or db.REFERENCE_PATTERN.fullmatch(listed.charge_reference):
            db.note_refund(database, gateway.mode, listed, "worker")
            found += 1
    return found
