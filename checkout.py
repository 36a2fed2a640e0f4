"""Open a checkout: one key, one payment, at most one checkout URL.

A request runs two short transactions, and holds no database connection while it waits for the provider:

    reserve   insert the key, with a lease and a random token, and its payment. The request that loses the race reads
              the winner's row.
    walk      initialize PG-x at the provider, then PG-x-2 … PG-x-9. If a reference exists at Paystack already, an
              earlier request opened it, and its URL is lost. Then verify it, and go on to the next reference if nobody
              has paid.
    settle    while the token is still ours, store the result: the URL, a refusal, or a change that came meanwhile.

If the process dies after reserve, or between Paystack's answer and settle, the lease runs out. The next request with
the same key takes the lease over, finds the reference in use, and walks on. Nobody ever gets the lost URL. Without such
a request the worker polls the payment until its time ends.
A request that stops on an error releases the lease and stores how far the walk came, and a repetition goes on there.
"""

import hashlib
import hmac
import json
import secrets
import threading
import time
import unicodedata
import uuid
from dataclasses import dataclass, replace
from typing import Any

from psycopg.types.json import Jsonb

import charges
import db
import money
import paystack
from db import BoundedConnection, Database, DatabaseUnavailable, Payment
from settings import Settings

SHORTEST_CALL_SECONDS = 1


class UsedUp(Exception):
    """All nine references of a payment were tried; a person must look."""


class Busy(Exception):
    """This process is opening as many payments as it can at once. Nothing was reserved."""


class InFlight(Exception):
    """Another request holds the lease of this key, for `seconds` at most."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


@dataclass(frozen=True)
class Order:
    """What a customer wants to pay, valid in every field. `amount_minor` in hundredths."""

    customer_name: str
    customer_email: str
    customer_phone: str
    amount_minor: int
    location: str
    currency: str
    description: str | None = None
    metadata: dict[str, str] | None = None
    return_url: str | None = None
    expires_in: int | None = None
    """Seconds until its time ends; None for the usual time."""
    source: str = "api"

    def fingerprint(self) -> bytes:
        """SHA-256 over the fields that are set. One é, written as one character or as two, gives one hash."""
        present = {name: value for name, value in vars(self).items() if value not in (None, {})}
        composed = json.loads(unicodedata.normalize("NFC", json.dumps(present, ensure_ascii=False)))
        return hashlib.sha256(json.dumps(composed, sort_keys=True).encode()).digest()


@dataclass(frozen=True)
class Reservation:
    """A payment, and the lease to open its checkout, counted from `taken_at` (monotonic seconds)."""

    payment: Payment
    key: bytes
    token: uuid.UUID
    taken_at: float
    reference_exists: bool = False
    is_over: bool = False
    """Whether the payment's time has ended."""
    answer: str | None = None
    """The answer of a finished request, as in `Settled`; else None."""


@dataclass(frozen=True)
class Settled:
    """The answer to a request and its repetitions: `answer` is `payment` (as it stands now), `payment_expired`, or the
    field that the provider refused; the payment's status_reason says why."""

    payment: Payment
    answer: str
    is_replay: bool = False


@dataclass(frozen=True)
class Checkout:
    """Where payments are started. `slots`: how many threads may wait for the provider at once. If the provider hangs,
    the other threads still serve reads and webhooks."""

    database: Database
    gateway: paystack.Gateway
    settings: Settings
    slots: threading.BoundedSemaphore

    def budget_seconds(self) -> float:
        """For how long after taking a lease we may call the provider: one call and a half, and never past the lease."""
        return min(1.5 * self.gateway.timeout_seconds + 1, self.settings.lease_seconds - 1)


def key_of(text: str | None) -> bytes:
    """The stored form of an Idempotency-Key. Without a key: random bytes, which no client's key hashes to."""
    return secrets.token_bytes(32) if text is None else hashlib.sha256(text.encode("ascii")).digest()


def start(checkout: Checkout, key: bytes, order: Order) -> Settled:
    """Start the payment of `key`, or go on with a payment that a crash or a fault left behind. Without a free slot, a
    key that has its answer is still answered.

    Raises Busy, what `open_checkout` raises, KeyReused, InFlight, DatabaseUnavailable.
    """
    if not checkout.slots.acquire(blocking=False):
        found = find_reservation(checkout, key, order)
        if found is None or found.answer is None:
            raise Busy
        return Settled(found.payment, found.answer, is_replay=True)
    try:
        reservation = reserve(checkout, key, order)
        if reservation.answer is not None:
            return Settled(reservation.payment, reservation.answer, is_replay=True)
        return open_checkout(checkout, reservation)
    finally:
        checkout.slots.release()


# Reserve


def reserve(checkout: Checkout, key: bytes, order: Order) -> Reservation:
    """Take the lease of `key` and, the first time, make its payment. Committed before any call to the provider.

    Raises db.KeyReused, InFlight, DatabaseUnavailable.
    """
    mode, secret = checkout.gateway.mode, checkout.database.secret()
    token, taken_at = uuid.uuid4(), time.monotonic()
    values = {
        **vars(order),
        "metadata": Jsonb(order.metadata) if order.metadata is not None else None,
        "mode": mode,
        "key": key,
        "fingerprint": order.fingerprint(),
        "token": token,
        "id": db.derived_name("PAY", secret, mode, key),
        "reference": db.derived_name("PG", secret, mode, key),
        "lease_seconds": checkout.settings.lease_seconds,
        "ttl_seconds": order.expires_in or checkout.settings.payment_ttl_seconds,
    }

    def work(conn: BoundedConnection) -> Reservation:
        made = db.read_payment(conn, MAKE_KEY_AND_PAYMENT, values)
        if made is not None:
            return Reservation(made, key, token, taken_at)
        # The statement that lost the race cannot see the winner's row: its snapshot is older. A second statement can.
        found = _read_key(conn, values, taken_at)
        if found is not None and found.answer is None and found.token != token:
            if not _take_over(conn, values):
                raise InFlight(checkout.settings.lease_seconds)
            found = _read_key(conn, values, taken_at)
        if found is None:
            raise DatabaseUnavailable("the key was lost while it was read")
        return found

    return checkout.database.run(work)


def find_reservation(checkout: Checkout, key: bytes, order: Order) -> Reservation | None:
    """The reservation of a key that came before, without taking a lease. Raises KeyReused, InFlight."""
    values = {"mode": checkout.gateway.mode, "key": key, "fingerprint": order.fingerprint(), "token": None}
    return checkout.database.run(lambda conn: _read_key(conn, values, time.monotonic()))


# Returns the new payment, and no row if the key exists already. One statement, so one round trip and one commit.
#
# ON CONFLICT names no target: the payment's id is made from the key and unique too. Of two requests at the same
# moment, the loser may meet the winner in either index.
MAKE_KEY_AND_PAYMENT = f"""
    WITH taken AS (
        INSERT INTO idempotency_keys (mode, key, fingerprint, payment_id, token, leased_until)
        VALUES (%(mode)s, %(key)s, %(fingerprint)s, %(id)s, %(token)s,
                clock_timestamp() + make_interval(secs => %(lease_seconds)s))
        ON CONFLICT DO NOTHING
        RETURNING payment_id
    )
    INSERT INTO payments (id, mode, amount_minor, currency, reference, customer_name, customer_email,
                          customer_phone, location, description, metadata, return_url, source,
                          expires_at, poll_at)
    SELECT payment_id, %(mode)s, %(amount_minor)s, %(currency)s, %(reference)s, %(customer_name)s,
           %(customer_email)s, %(customer_phone)s, %(location)s, %(description)s, %(metadata)s, %(return_url)s,
           %(source)s, clock_timestamp() + make_interval(secs => %(ttl_seconds)s),
           clock_timestamp() + interval '5 s'
      FROM taken WHERE changed_by(%(source)s, 'reserved')
    RETURNING {", ".join(db.PAYMENT_COLUMNS)}
    """.encode()  # noqa: S608  # the names are ours


def _read_key(conn: BoundedConnection, values: dict[str, Any], taken_at: float) -> Reservation | None:
    row = conn.execute(
        """
        SELECT p.*, k.fingerprint, k.token, k.reference_exists, k.answer,
               extract(epoch FROM k.leased_until - clock_timestamp())::float8 AS lease_left_seconds,
               p.expires_at <= clock_timestamp() AS is_over
          FROM idempotency_keys k JOIN payments p ON p.id = k.payment_id
         WHERE k.mode = %(mode)s AND k.key = %(key)s
        """,
        values,
    ).fetchone()
    if row is None:
        return None
    if not hmac.compare_digest(row["fingerprint"], values["fingerprint"]):
        raise db.KeyReused
    if row["answer"] is None and row["token"] != values["token"] and (row["lease_left_seconds"] or 0) > 0:
        raise InFlight(row["lease_left_seconds"])
    return Reservation(
        Payment.of(row), values["key"], row["token"], taken_at, row["reference_exists"], row["is_over"], row["answer"]
    )


def _take_over(conn: BoundedConnection, values: dict[str, Any]) -> bool:
    """Take a lease that has run out or was released. False if another request was quicker."""
    taken = conn.execute(
        """
        UPDATE idempotency_keys
           SET token = %(token)s, leased_until = clock_timestamp() + make_interval(secs => %(lease_seconds)s)
         WHERE mode = %(mode)s AND key = %(key)s AND answer IS NULL
           AND (leased_until IS NULL OR leased_until <= clock_timestamp())
        """,
        values,
    )
    return taken.rowcount == 1


# Walk


def open_checkout(checkout: Checkout, reservation: Reservation) -> Settled:
    """Open the checkout of a reserved payment, or go on from where an earlier request stopped, and settle.

    Raises paystack.Unavailable, UsedUp, paystack.Misconfigured (each with the lease released, so the same key can go on
    at once), InFlight, DatabaseUnavailable.
    """
    walk = Walk(checkout, reservation)
    try:
        outcome = walk.to_an_outcome()
    except BaseException as stop:
        release_lease(checkout.database, reservation, attempt=walk.attempt, reference_exists=walk.reference_exists)
        if isinstance(stop, UsedUp):
            of, kind = reservation.payment, "references_used_up"
            checkout.database.transaction(lambda conn: db.open_incident(conn, of.mode, kind, of.id, of.id))
        raise
    if isinstance(outcome, money.Charge):
        checkout.database.transaction(charges.apply_charge, outcome, reservation.payment.source)
    return checkout.database.transaction(settle, reservation, outcome, walk.attempt)


Outcome = paystack.Opened | paystack.Refused | money.Charge | None
"""What a walk comes to; None if the payment needs no checkout any more."""


class Walk:
    """The way along the references of a payment, until the provider says something that can be settled."""

    def __init__(self, checkout: Checkout, reservation: Reservation) -> None:
        self.checkout = checkout
        self.payment = reservation.payment
        self.is_over = reservation.is_over
        self.attempt = reservation.payment.attempt
        self.reference_exists = reservation.reference_exists
        self.deadline = reservation.taken_at + checkout.budget_seconds()

    def to_an_outcome(self) -> Outcome:
        if self.payment.status != "pending" or self.is_over:
            return None
        while True:
            outcome = self._verify() if self.reference_exists else self._initialize()
            match outcome:
                case paystack.Opened() | paystack.Refused() | money.Charge():
                    return outcome
                case paystack.Duplicate():
                    self.reference_exists = True
                case paystack.Unpaid():
                    if self.attempt == db.LAST_ATTEMPT:
                        raise UsedUp
                    self.attempt += 1
                    self.reference_exists = False
                case paystack.NotFound():
                    self.reference_exists = False
                    raise paystack.Unavailable("not found")
                case paystack.UnderWay():
                    raise paystack.Unavailable("under way")

    def _initialize(self) -> paystack.Opened | paystack.Duplicate | paystack.Refused:
        """Without an answer, try once more with the same reference, unless the provider asks us to wait."""
        try:
            return self._initialize_once()
        except paystack.Unavailable as unknown:
            if unknown.retry_after_seconds is not None or self._left_seconds() < SHORTEST_CALL_SECONDS:
                raise
        return self._initialize_once()

    def _initialize_once(self) -> paystack.Opened | paystack.Duplicate | paystack.Refused:
        reference = db.reference_of_attempt(self.payment.reference, self.attempt)
        page_url = f"{self.checkout.settings.public_url}/pay/{self.payment.id}"
        return self.checkout.gateway.initialize(self.payment, reference, page_url, self._call_seconds())

    def _verify(self) -> money.Charge | paystack.Unpaid | paystack.UnderWay | paystack.NotFound:
        reference = db.reference_of_attempt(self.payment.reference, self.attempt)
        return self.checkout.gateway.verify(reference, self._call_seconds())

    def _left_seconds(self) -> float:
        return self.deadline - time.monotonic()

    def _call_seconds(self) -> float:
        """How long the next call may take. Raises paystack.Unavailable if too little time is left."""
        left = self._left_seconds()
        if left < SHORTEST_CALL_SECONDS:
            raise paystack.Unavailable("no time left")
        return min(self.checkout.gateway.timeout_seconds, left)


# Release, settle


def release_lease(database: Database, reservation: Reservation, *, attempt: int, reference_exists: bool) -> None:
    """End our lease, so that the same key can go on at once. Does nothing if the lease is no longer ours."""
    database.rows(
        """
        WITH ours AS (
            UPDATE idempotency_keys SET leased_until = NULL, reference_exists = %(reference_exists)s
             WHERE mode = %(mode)s AND key = %(key)s AND token = %(token)s AND answer IS NULL
            RETURNING payment_id
        )
        UPDATE payments SET attempt = %(attempt)s FROM ours
         WHERE id = payment_id AND attempt < %(attempt)s AND changed_by(%(source)s, 'next_reference')
        """,
        {**_lease(reservation), "attempt": attempt, "reference_exists": reference_exists},
    )


def settle(conn: BoundedConnection, reservation: Reservation, outcome: Outcome, attempt: int = 1) -> Settled:
    """Under the payment's lock, store the walk's outcome, at this attempt, and the answer to the key.

    A pending payment gets its checkout URL, or fails because it was refused. A payment that was paid or ended meanwhile
    stays as it is. If the key has its answer already, the URL is forgotten. Raises InFlight if another request has
    taken the lease over, DatabaseUnavailable.
    """
    row = conn.execute(LOCK_KEY_AND_PAYMENT, _lease(reservation), prepare=True).fetchone()
    if row is None:
        raise DatabaseUnavailable("the key was lost while its checkout was opened")
    payment = Payment.of(row)
    if row["answer"] is not None:
        return Settled(payment, row["answer"])
    if row["token"] != reservation.token:
        raise InFlight(1)
    if payment.status == "pending" and payment.checkout_url is None:
        match outcome:
            case paystack.Opened(checkout_url=url):
                opened = replace(payment, checkout_url=url, attempt=max(payment.attempt, attempt))
                payment = _store_outcome(conn, opened, "opened")
            case paystack.Refused(reason=reason):
                refused = replace(payment, status="failed", status_reason=reason)
                payment = _store_outcome(conn, refused, "refused")
    if isinstance(outcome, paystack.Refused) and payment.status == "failed":
        answer = outcome.field
    else:
        is_answered = payment.checkout_url is not None or payment.status not in db.UNPAID
        answer = "payment" if is_answered else "payment_expired"
    _store_answer(conn, reservation, answer, is_opened=isinstance(outcome, paystack.Opened))
    return Settled(payment, answer)


LOCK_KEY_AND_PAYMENT = f"""
    SELECT k.token, k.answer, {", ".join(f"p.{name}" for name in db.PAYMENT_COLUMNS)}
      FROM idempotency_keys k JOIN payments p ON p.id = k.payment_id
     WHERE k.mode = %(mode)s AND k.key = %(key)s
       FOR UPDATE
    """.encode()  # noqa: S608  # the names are ours


def _store_outcome(conn: BoundedConnection, payment: Payment, why: str) -> Payment:
    """Store a payment as the walk's outcome leaves it. It was read in this transaction, under its lock."""
    conn.execute(
        """
        UPDATE payments
           SET checkout_url = %(checkout_url)s, attempt = %(attempt)s,
               status = %(status)s, status_reason = %(status_reason)s
         WHERE id = %(id)s AND changed_by(%(source)s, %(why)s)
        """,
        {**vars(payment), "why": why},
        prepare=True,
    )
    return payment


def _store_answer(conn: BoundedConnection, reservation: Reservation, answer: str, *, is_opened: bool) -> None:
    conn.execute(
        """
        UPDATE idempotency_keys
           SET leased_until = NULL, reference_exists = reference_exists OR %(is_opened)s,
               answer = %(answer)s, answered_at = clock_timestamp()
         WHERE mode = %(mode)s AND key = %(key)s
        """,
        {**_lease(reservation), "answer": answer, "is_opened": is_opened},
        prepare=True,
    )


def _lease(reservation: Reservation) -> dict[str, Any]:
    payment = reservation.payment
    return {"mode": payment.mode, "key": reservation.key, "token": reservation.token, "source": payment.source}


# Give up


def cancel(conn: BoundedConnection, payment: Payment, operator: str) -> Payment:
    """Give up an order: its checkout is not given out any more, and it ends at the next poll that finds it unpaid. Safe
    to repeat. Money that still comes counts, and opens an incident. Raises db.Impossible, DatabaseUnavailable."""
    row = conn.execute(
        """
        UPDATE payments
           SET cancelled_at = coalesce(cancelled_at, now()), expires_at = least(expires_at, now()),
               poll_at = now(), wanted_at = now()
         WHERE id = %(id)s AND charge_reference IS NULL AND changed_by(%(operator)s, 'cancelled')
        RETURNING *
        """,
        {"id": payment.id, "operator": operator},
    ).fetchone()
    if row is None:
        raise db.Impossible(f"money has come for {payment.id}: it can be refunded, not cancelled")
    return Payment.of(row)
