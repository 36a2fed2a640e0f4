"""Every SQL statement and the connection pool: plain functions, plain values in and out.

Locks are always taken in the order key, payment, charge, so that no two transactions wait for each other.
"""

import base64
import hashlib
import hmac
import json
import re
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

import psycopg
import psycopg.rows
from psycopg.types.json import Jsonb
from psycopg_pool import ConnectionPool, PoolTimeout

import money

T = TypeVar("T")

SCHEMA = Path(__file__).with_name("schema.sql")
NEEDED_MIGRATION = 1
"""The oldest schema that serves this code. Migrations only add, so every newer one serves it too."""

ID_PATTERN = re.compile(r"PAY-[0-9A-HJKMNP-TV-Z]{26}", re.ASCII)
REFERENCE_PATTERN = re.compile(r"(PG-[0-9A-HJKMNP-TV-Z]{26})(?:-([2-9]))?", re.ASCII)
CROCKFORD = bytes.maketrans(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", b"0123456789ABCDEFGHJKMNPQRSTVWXYZ")
LAST_ATTEMPT = 9

PAID = ("completed", "partially_refunded", "refunded")
UNPAID = ("pending", "failed", "expired")


class Unavailable(Exception):
    """The database is away, busy or no longer the primary. What was under way may be written or not: try again."""


class KeyReused(Exception):
    """This idempotency key came before with another order."""


class InFlight(Exception):
    """Another request holds the lease of this key, for `seconds` at most."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class BoundedConnection(psycopg.Connection[Any]):
    """A connection on which nothing waits past `deadline` (monotonic), whatever has become of the server.

    A frozen server or a dead host behind a live switch would hang it for ever: neither `statement_timeout` nor
    keepalives nor `tcp_user_timeout` end that wait. A connection that timed out is of no more use and is closed.
    """

    deadline: float | None = None

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        if timeout is None:
            timeout = 5 if self.deadline is None else max(0.0, self.deadline - time.monotonic())
        try:
            return super().wait(gen, interval, timeout)
        except psycopg.errors._WaitTimeout as error:
            self.pgconn.finish()
            raise Frozen from error


class Frozen(psycopg.OperationalError):
    """The server did not answer in time."""


class Database:
    """The pool of connections to one database, and how a transaction is run on it."""

    def __init__(self, url: str, pool_size: int) -> None:
        self.pool: ConnectionPool[BoundedConnection] = ConnectionPool(
            url,
            connection_class=BoundedConnection,
            # No prepared statements: behind pgbouncer the next one may reach another server connection.
            kwargs={"autocommit": True, "prepare_threshold": None, **connection_defaults(url)},
            configure=_configure,
            min_size=1,
            max_size=pool_size,
            open=False,
            # How long a lost connection is replaced in the background, with growing pauses, before the next request
            # that needs it tries at once.
            reconnect_timeout=2,
        )
        self.generation = 0
        self.lock = threading.Lock()
        self._secret: bytes | None = None

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Start connecting, without waiting for it: a service whose database is away starts, and says so in /readyz."""
        self.pool.open(wait=False)

    def close(self) -> None:
        self.pool.close(timeout=2)

    def run(self, work: Callable[[BoundedConnection], T], within_seconds: float = 5) -> T:
        """The result of `work`, which must be safe to run again when its commit's reply was lost. Raises Unavailable.

        There is no check of a connection before its use: that would cost each request a round trip, and turns a restart
        of the database into time-outs. The first error on a dead connection drains the pool once, and the work is run
        again on a new one.
        """
        deadline = time.monotonic() + within_seconds
        for retry in (True, False):
            generation = self.generation
            try:
                with self.pool.connection(timeout=deadline - time.monotonic()) as conn:
                    conn.deadline = deadline
                    return work(conn)
            except (psycopg.OperationalError, psycopg.errors.ReadOnlySqlTransaction) as error:
                if not retry or not _is_worth_a_retry(error):
                    raise Unavailable(type(error).__name__) from error
                if not isinstance(error, psycopg.errors.SerializationFailure | psycopg.errors.DeadlockDetected):
                    self._drain(generation)
        raise AssertionError("the second try returns or raises")

    def transaction(self, actor: str, why: str, work: Callable[[BoundedConnection], T]) -> T:
        """As `run`, in one transaction whose changes of payments the audit trail puts down to `actor` and `why`."""

        def in_transaction(conn: BoundedConnection) -> T:
            with conn.transaction():
                set_actor(conn, actor, why)
                return work(conn)

        return self.run(in_transaction)

    def secret(self) -> bytes:
        """The random row that `migrate` made, from which ids and references are derived. It never changes."""
        if self._secret is None:
            self._secret = self.run(lambda conn: _one(conn, "SELECT value FROM secrets"))["value"]
        return self._secret

    def _drain(self, generation: int) -> None:
        """Close the idle connections, unless another thread has since: those that it made are good."""
        with self.lock:
            if generation == self.generation:
                self.generation += 1
                self.pool.drain()


def connection_defaults(url: str) -> dict[str, Any]:
    """What every connection to `url` uses unless the URL itself says otherwise."""
    given = psycopg.conninfo.conninfo_to_dict(url)
    defaults = {
        # A demoted primary is not written to; of several hosts the primary is found.
        "target_session_attrs": "read-write",
        "connect_timeout": 4,
        "application_name": "paygate",
    }
    return {name: value for name, value in defaults.items() if name not in given}


def _configure(conn: BoundedConnection) -> None:
    """Whatever the role's defaults are: the isolation level that the statements here are written for, and an end, a
    little before ours, to what the server does for a request that has given up."""
    conn.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
    conn.execute(
        """
        SELECT set_config('default_transaction_isolation', 'read committed', false),
               set_config('synchronous_commit', CASE current_setting('synchronous_commit') WHEN 'off' THEN 'on'
                          ELSE current_setting('synchronous_commit') END, false),
               set_config('statement_timeout', '4500ms', false),
               set_config('idle_in_transaction_session_timeout', '10s', false),
               set_config('TimeZone', 'UTC', false)
        """
    )
    conn.row_factory = psycopg.rows.dict_row


def _is_worth_a_retry(error: psycopg.Error) -> bool:
    """Whether the connection is dead, its server no longer the primary, or the transaction lost to another one."""
    if error.sqlstate is None:
        return not isinstance(error, PoolTimeout | Frozen)
    return error.sqlstate.startswith(("08", "57P0", "40")) or error.sqlstate == "25006"


def set_actor(conn: psycopg.Connection[Any], actor: str, why: str) -> None:
    """Name who changes payments, and why, for the rest of the transaction (which is what pgbouncer keeps together)."""
    conn.execute(
        "SELECT set_config('paygate.actor', %(actor)s, true), set_config('paygate.why', %(why)s, true)",
        {"actor": actor, "why": why},
    )


# Payments


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
    source: str = "api"

    def fingerprint(self) -> bytes:
        """SHA-256 over the fields that are there, however the request wrote them."""
        present = {name: value for name, value in asdict(self).items() if value is not None}
        return hashlib.sha256(json.dumps(present, sort_keys=True).encode()).digest()


@dataclass(frozen=True)
class Payment:
    id: str
    mode: str
    status: str
    status_reason: str | None
    amount_minor: int
    currency: str
    reference: str
    """The first of its references; `current_reference` is the one that it has reached."""
    attempt: int
    checkout_url: str | None
    charge_reference: str | None
    charged_minor: int
    refunded_minor: int
    customer_name: str
    customer_email: str
    customer_phone: str
    location: str
    description: str | None
    metadata: dict[str, str] | None
    return_url: str | None
    source: str
    created_at: datetime
    expires_at: datetime
    paid_at: datetime | None

    @classmethod
    def of(cls, row: dict[str, Any]) -> Self:
        """The payment in a row that holds its columns, and maybe others."""
        return cls(*[row[name] for name in PAYMENT_COLUMNS])

    @property
    def current_reference(self) -> str:
        return self.charge_reference or reference_of_attempt(self.reference, self.attempt)

    @property
    def is_paid(self) -> bool:
        return self.status in PAID

    def to_json(self) -> str:
        """The one JSON form, for answers, notifications and exports: amounts as numbers with the currency's decimals,
        which `json` cannot write (it writes 50.00 as 50.0)."""
        members = {
            "id": json.dumps(self.id),
            "customer_name": json.dumps(self.customer_name, ensure_ascii=False),
            "customer_email": json.dumps(self.customer_email, ensure_ascii=False),
            "amount": money.render(self.amount_minor, self.currency),
            "status": json.dumps(self.status),
            "currency": json.dumps(self.currency),
            "reference": json.dumps(self.current_reference),
            "checkout_url": json.dumps(self.checkout_url if self.status == "pending" else None),
            "status_reason": json.dumps(self.status_reason, ensure_ascii=False),
            "mode": json.dumps(self.mode),
            "created_at": json.dumps(timestamp(self.created_at)),
            "paid_at": json.dumps(timestamp(self.paid_at)),
            "refunded_amount": money.render(self.refunded_minor, self.currency),
        }
        return "{" + ", ".join(f'"{name}": {value}' for name, value in members.items()) + "}"


PAYMENT_COLUMNS = tuple(each.name for each in fields(Payment))


def timestamp(moment: datetime | None) -> str | None:
    return None if moment is None else f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def reference_of_attempt(reference: str, attempt: int) -> str:
    return reference if attempt == 1 else f"{reference}-{attempt}"


def _name(prefix: str, secret: bytes, mode: str, key: bytes) -> str:
    """`PAY-…` or `PG-…`: 130 bits as Crockford base32, the same for the same key, so that a retry after rows were lost
    meets its old transaction. Each purpose and mode has values of its own."""
    digest = hmac.new(secret, b"\0".join([prefix.encode(), mode.encode(), key]), hashlib.sha256).digest()
    return f"{prefix}-{base64.b32encode(digest).translate(CROCKFORD)[:26].decode()}"


def find_payment(database: Database, payment_id: str) -> Payment | None:
    row = database.run(
        lambda conn: conn.execute("SELECT * FROM payments WHERE id = %(id)s", {"id": payment_id}).fetchone()
    )
    return Payment.of(row) if row else None


# Keys: reserve, give back, settle


@dataclass(frozen=True)
class Answer:
    """The answer of a finished request, kept as it was sent. `status` is HTTP's."""

    status: int
    body: str
    payment_id: str


@dataclass(frozen=True)
class Reservation:
    """A payment and the lease to open its checkout, counted from `taken_at` (monotonic seconds); or, with `answer`,
    what a finished request was answered."""

    payment: Payment
    key: bytes
    token: uuid.UUID
    taken_at: float
    reference_exists: bool = False
    is_over: bool = False
    """Whether the payment's time has ended."""
    answer: Answer | None = None


def key_of(text: str | None) -> bytes:
    """The stored form of an Idempotency-Key. Without one: random bytes, which no client's key hashes to."""
    return secrets.token_bytes(32) if text is None else hashlib.sha256(text.encode("ascii")).digest()


def reserve(
    database: Database, *, mode: str, key: bytes, order: Order, lease_seconds: float, ttl_seconds: float
) -> Reservation:
    """Take the lease of `key` and, the first time that it comes, make its payment. Committed before anything is asked
    of the provider.

    Raises KeyReused, InFlight, Unavailable.
    """
    secret, token, taken_at = database.secret(), uuid.uuid4(), time.monotonic()
    values = {
        **asdict(order),
        "metadata": Jsonb(order.metadata) if order.metadata is not None else None,
        "mode": mode,
        "key": key,
        "fingerprint": order.fingerprint(),
        "token": token,
        "id": _name("PAY", secret, mode, key),
        "reference": _name("PG", secret, mode, key),
        "lease_seconds": lease_seconds,
        "ttl_seconds": ttl_seconds,
    }

    def work(conn: BoundedConnection) -> Reservation:
        row = _insert_key_and_payment(conn, values)
        if row is not None:
            return Reservation(Payment.of(row), key, token, taken_at)
        # The statement that lost the race cannot see the winner's row: its snapshot is older. A second one can.
        found = _read_key(conn, values, taken_at)
        if found is not None and found.answer is None and found.token != token:
            if not _take_over(conn, values):
                raise InFlight(lease_seconds)
            found = _read_key(conn, values, taken_at)
        if found is None:
            raise Unavailable("the key was lost while it was read")
        return found

    return database.run(work)


def find_reservation(database: Database, *, mode: str, key: bytes, order: Order) -> Reservation | None:
    """What `reserve` would answer a key that is finished, without taking a lease. Raises KeyReused, InFlight."""
    values = {"mode": mode, "key": key, "fingerprint": order.fingerprint(), "token": None}
    return database.run(lambda conn: _read_key(conn, values, time.monotonic()))


def _insert_key_and_payment(conn: BoundedConnection, values: dict[str, Any]) -> dict[str, Any] | None:
    """One statement, so one round trip and one commit. No row where the key is there already."""
    return conn.execute(
        """
        WITH actor AS MATERIALIZED (
            SELECT set_config('paygate.actor', %(source)s, true), set_config('paygate.why', 'reserved', true)
        ), taken AS (
            INSERT INTO idempotency_keys (mode, key, fingerprint, payment_id, token, leased_until)
            SELECT %(mode)s, %(key)s, %(fingerprint)s, %(id)s, %(token)s,
                   clock_timestamp() + make_interval(secs => %(lease_seconds)s)
              FROM actor
            ON CONFLICT (mode, key) DO NOTHING
            RETURNING payment_id
        )
        INSERT INTO payments (id, mode, amount_minor, currency, reference, customer_name, customer_email,
                              customer_phone, location, description, metadata, return_url, source,
                              expires_at, look_at)
        SELECT payment_id, %(mode)s, %(amount_minor)s, %(currency)s, %(reference)s, %(customer_name)s,
               %(customer_email)s, %(customer_phone)s, %(location)s, %(description)s, %(metadata)s, %(return_url)s,
               %(source)s, clock_timestamp() + make_interval(secs => %(ttl_seconds)s),
               clock_timestamp() + interval '5 s'
          FROM taken
        RETURNING *
        """,
        values,
    ).fetchone()


def _read_key(conn: BoundedConnection, values: dict[str, Any], taken_at: float) -> Reservation | None:
    row = conn.execute(
        """
        SELECT p.*, k.fingerprint, k.token, k.reference_exists, k.answer_status, k.answer,
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
        raise KeyReused
    answer = None
    if row["answer"] is not None:
        answer = Answer(row["answer_status"], row["answer"], row["id"])
    elif row["token"] != values["token"] and (row["lease_left_seconds"] or 0) > 0:
        raise InFlight(row["lease_left_seconds"])
    return Reservation(
        Payment.of(row), values["key"], row["token"], taken_at, row["reference_exists"], row["is_over"], answer
    )


def _take_over(conn: BoundedConnection, values: dict[str, Any]) -> bool:
    """Take a lease that is over or was given back. False when another request was quicker."""
    taken = conn.execute(
        """
        UPDATE idempotency_keys
           SET token = %(token)s, leased_until = clock_timestamp() + make_interval(secs => %(lease_seconds)s)
         WHERE mode = %(mode)s AND key = %(key)s AND answered_at IS NULL
           AND (leased_until IS NULL OR leased_until <= clock_timestamp())
        """,
        values,
    )
    return taken.rowcount == 1


def give_back(database: Database, reservation: Reservation, *, attempt: int, reference_exists: bool) -> None:
    """End our lease, so that the same key can go on at once where we stopped. Nothing when it is no longer ours."""
    database.run(
        lambda conn: conn.execute(
            """
            WITH actor AS MATERIALIZED (
                SELECT set_config('paygate.actor', %(source)s, true), set_config('paygate.why', 'next_reference', true)
            ), ours AS (
                UPDATE idempotency_keys SET leased_until = NULL, reference_exists = %(reference_exists)s
                  FROM actor
                 WHERE mode = %(mode)s AND key = %(key)s AND token = %(token)s AND answered_at IS NULL
                RETURNING payment_id
            )
            UPDATE payments SET attempt = %(attempt)s FROM ours WHERE id = payment_id AND attempt < %(attempt)s
            """,
            {**_lease(reservation), "attempt": attempt, "reference_exists": reference_exists},
        )
    )


def settle_checkout(database: Database, reservation: Reservation, payment: Payment, answer: Answer) -> bool:
    """Store the URL and attempt of `payment` and the answer that gives them out, if nothing has happened meanwhile.

    One statement. False when the lease is no longer ours or the payment no longer pending: see `settle`.
    """
    settled = database.run(
        lambda conn: conn.execute(
            """
            WITH actor AS MATERIALIZED (
                SELECT set_config('paygate.actor', %(source)s, true), set_config('paygate.why', 'opened', true)
            ), ours AS MATERIALIZED (
                SELECT k.payment_id FROM idempotency_keys k, actor
                 WHERE mode = %(mode)s AND key = %(key)s AND token = %(token)s AND answered_at IS NULL
                   FOR UPDATE OF k
            ), opened AS (
                UPDATE payments SET checkout_url = %(checkout_url)s, attempt = %(attempt)s
                  FROM ours
                 WHERE id = payment_id AND status = 'pending' AND checkout_url IS NULL
                RETURNING id
            )
            UPDATE idempotency_keys
               SET leased_until = NULL, reference_exists = true, answered_at = clock_timestamp(),
                   answer_status = %(answer_status)s, answer = %(answer)s
              FROM opened
             WHERE mode = %(mode)s AND key = %(key)s
            """,
            {
                **_lease(reservation),
                "checkout_url": payment.checkout_url,
                "attempt": payment.attempt,
                "answer_status": answer.status,
                "answer": answer.body,
            },
        )
    )
    return settled.rowcount == 1


def settle(
    database: Database,
    reservation: Reservation,
    render: Callable[[Payment], Answer],
    *,
    checkout_url: str | None = None,
    attempt: int = 1,
    refusal: str | None = None,
) -> Answer:
    """Read the payment under its lock and store, as the answer of its key, what is true then.

    A pending payment gets `checkout_url` or fails by `refusal`; one that was paid or ended meanwhile is answered as it
    stands. When the answer is there already, that one is returned and `checkout_url` is forgotten. Raises InFlight when
    another request has taken the lease over, Unavailable.
    """

    def work(conn: BoundedConnection) -> Answer:
        key = _one(
            conn,
            "SELECT * FROM idempotency_keys WHERE mode = %(mode)s AND key = %(key)s FOR UPDATE",
            _lease(reservation),
        )
        if key["answer"] is not None:
            return Answer(key["answer_status"], key["answer"], key["payment_id"])
        if key["token"] != reservation.token:
            raise InFlight(1)
        payment = Payment.of(
            _one(conn, "SELECT * FROM payments WHERE id = %(id)s FOR UPDATE", {"id": key["payment_id"]})
        )
        if payment.status == "pending" and payment.checkout_url is None and (checkout_url or refusal):
            set_actor(conn, payment.source, "opened" if checkout_url else "refused")
            payment = Payment.of(
                _one(
                    conn,
                    """
                    UPDATE payments
                       SET checkout_url = %(checkout_url)s, attempt = greatest(attempt, %(attempt)s),
                           status = CASE WHEN %(refusal)s::text IS NULL THEN status ELSE 'failed' END,
                           status_reason = %(refusal)s
                     WHERE id = %(id)s
                    RETURNING *
                    """,
                    {"id": payment.id, "checkout_url": checkout_url, "attempt": attempt, "refusal": refusal},
                )
            )
        answer = render(payment)
        conn.execute(
            """
            UPDATE idempotency_keys
               SET leased_until = NULL, answered_at = clock_timestamp(), answer_status = %(status)s, answer = %(body)s
             WHERE mode = %(mode)s AND key = %(key)s
            """,
            {**_lease(reservation), "status": answer.status, "body": answer.body},
        )
        return answer

    return database.transaction(reservation.payment.source, "opened", work)


def _lease(reservation: Reservation) -> dict[str, Any]:
    payment = reservation.payment
    return {"mode": payment.mode, "key": reservation.key, "token": reservation.token, "source": payment.source}


# Charges and events


def apply_charge(conn: BoundedConnection, charge: money.Charge, actor: str) -> Payment | None:
    """Record that money came and move its payment on, in the caller's transaction. Safe to repeat.

    The first charge of a payment is its own: `completed` when it pays for it, else `review` and an incident. Every
    other one opens an incident and changes nothing. None when no payment of this mode has the reference: an incident
    too.
    """
    base = REFERENCE_PATTERN.fullmatch(charge.reference)
    row = conn.execute(
        """
        WITH payment AS MATERIALIZED (
            SELECT * FROM payments WHERE reference = %(base)s AND mode = %(mode)s FOR UPDATE
        ), recorded AS (
            INSERT INTO charges (reference, payment_id, mode, provider_id, amount_minor, requested_minor, fees_minor,
                                 currency, channel, paid_at, source)
            SELECT %(reference)s, id, mode, %(provider_id)s, %(amount_minor)s, %(requested_minor)s, %(fees_minor)s,
                   %(currency)s, %(channel)s, %(paid_at)s, %(source)s
              FROM payment
            ON CONFLICT (reference) DO NOTHING
        )
        SELECT * FROM payment
        """,
        {**asdict(charge), "base": base[1] if base else None, "source": actor},
    ).fetchone()
    if row is None:
        open_incident(conn, charge.mode, "unknown_reference", charge.reference)
        return None
    payment = Payment.of(row)
    if payment.charge_reference == charge.reference:
        return payment
    if payment.charge_reference is not None:
        open_incident(conn, payment.mode, "second_charge", charge.reference, payment.id)
        return payment
    is_paid = charge.pays(payment.amount_minor, payment.currency)
    if not is_paid:
        open_incident(conn, payment.mode, "mismatch", charge.reference, payment.id)
    set_actor(conn, actor, "charge" if is_paid else "mismatch")
    row = _one(
        conn,
        """
        UPDATE payments
           SET status = %(status)s, status_reason = %(status_reason)s, charge_reference = %(reference)s,
               charged_minor = %(amount_minor)s, look_at = NULL,
               paid_at = CASE WHEN %(is_paid)s THEN coalesce(%(paid_at)s, clock_timestamp()) END
         WHERE id = %(id)s
        RETURNING *
        """,
        {
            **asdict(charge),
            "id": payment.id,
            "is_paid": is_paid,
            "status": "completed" if is_paid else "review",
            "status_reason": None if is_paid else _difference(charge, payment),
        },
    )
    return Payment.of(row)


def _difference(charge: money.Charge, payment: Payment) -> str:
    """Why a charge does not pay for its payment, for the person who reviews it."""
    asked = payment.amount_minor if charge.requested_minor is None else charge.requested_minor
    return (
        f"paid {money.render(charge.amount_minor, charge.currency)} {charge.currency}, "
        f"asked at {money.render(asked, charge.currency)} {charge.currency}, "
        f"the price is {money.render(payment.amount_minor, payment.currency)} {payment.currency}"
    )


def note_charge(database: Database, charge: money.Charge, actor: str) -> None:
    """`apply_charge` in a transaction of its own."""
    database.transaction(actor, "charge", lambda conn: apply_charge(conn, charge, actor))


def open_incident(conn: BoundedConnection, mode: str, kind: str, subject: str, payment_id: str | None = None) -> None:
    """Note what a person must look at, once for each subject."""
    conn.execute(
        """
        INSERT INTO incidents (mode, kind, subject, payment_id)
        VALUES (%(mode)s, %(kind)s, %(subject)s, %(payment_id)s)
        ON CONFLICT (kind, subject) DO NOTHING
        """,
        {"mode": mode, "kind": kind, "subject": subject, "payment_id": payment_id},
    )


def note_incident(database: Database, payment: Payment, kind: str) -> None:
    """Open an incident about a whole payment."""
    database.run(lambda conn: open_incident(conn, payment.mode, kind, payment.id, payment.id))


def payment_of(conn: BoundedConnection, reference: str) -> str | None:
    """The id of the payment that a reference names, any of its nine."""
    base = REFERENCE_PATTERN.fullmatch(reference)
    row = conn.execute(
        "SELECT id FROM payments WHERE reference = %(base)s", {"base": base[1] if base else None}
    ).fetchone()
    return row["id"] if row else None


@dataclass(frozen=True)
class Delivery:
    """A signed webhook to be stored. `body` is None for what is not ours."""

    mode: str
    body_digest: bytes
    outcome: str
    name: str | None = None
    reference: str | None = None
    body: str | None = None


def record_event(conn: BoundedConnection, delivery: Delivery) -> int:
    """Store a webhook, once for each different body, and return its id. One that was handled keeps its outcome."""
    row = _one(
        conn,
        """
        INSERT INTO provider_events (mode, digest, name, reference, body, outcome, retry_at)
        VALUES (%(mode)s, %(body_digest)s, %(name)s, %(reference)s, %(body)s, %(outcome)s,
                CASE WHEN %(outcome)s = 'received' THEN clock_timestamp() END)
        ON CONFLICT (mode, digest) DO UPDATE SET deliveries = provider_events.deliveries + 1
        RETURNING id
        """,
        asdict(delivery),
    )
    return int(row["id"])


def mark_event(conn: BoundedConnection, event_id: int, outcome: str, payment_id: str | None) -> None:
    """Store that an event has been handled: `applied`, or `noted` where it only made something else happen."""
    conn.execute(
        """
        UPDATE provider_events
           SET outcome = %(outcome)s, retry_at = NULL, payment_id = %(payment_id)s,
               applied_at = CASE WHEN %(outcome)s = 'applied' THEN coalesce(applied_at, clock_timestamp()) END
         WHERE id = %(id)s AND outcome IN ('received', 'applied', 'noted')
        """,
        {"id": event_id, "outcome": outcome, "payment_id": payment_id},
    )


def claim_events(database: Database, mode: str, limit: int) -> list[str]:
    """The bodies of events whose handling failed, for a minute ours alone."""
    rows = database.run(
        lambda conn: conn.execute(
            """
            WITH due AS (
                SELECT id FROM provider_events WHERE mode = %(mode)s AND retry_at <= now()
                 ORDER BY retry_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED
            )
            UPDATE provider_events e SET retry_at = now() + interval '1 min' FROM due WHERE e.id = due.id
            RETURNING e.body
            """,
            {"mode": mode, "limit": limit},
        ).fetchall()
    )
    return [row["body"] for row in rows]


# Looking


@dataclass(frozen=True)
class Due:
    """A payment to ask the provider about, ours alone for a while, and how old it is by the database's clock."""

    payment: Payment
    is_opened: bool
    """Whether the reference reached is known to exist at the provider."""
    age_seconds: float
    over_seconds: float
    """Since its time ended; negative before."""


def claim_due(database: Database, mode: str, limit: int, lease_seconds: float) -> list[Due]:
    """The payments most overdue for a look, skipping those whose checkout is being opened at this moment."""
    # now() and not clock_timestamp(): the index serves the comparison with a stable value only.
    rows = database.run(
        lambda conn: conn.execute(
            """
            WITH due AS (
                SELECT p.id FROM payments p
                 WHERE p.mode = %(mode)s AND p.look_at <= now()
                   AND NOT EXISTS (SELECT FROM idempotency_keys k
                                    WHERE k.payment_id = p.id AND k.answered_at IS NULL AND k.leased_until > now())
                 ORDER BY p.look_at LIMIT %(limit)s FOR UPDATE OF p SKIP LOCKED
            )
            UPDATE payments p SET look_at = now() + make_interval(secs => %(lease_seconds)s), looked_at = now()
              FROM due JOIN idempotency_keys k ON k.payment_id = due.id
             WHERE p.id = due.id
            RETURNING p.*, k.reference_exists,
                      extract(epoch FROM now() - p.created_at)::float8 AS age_seconds,
                      extract(epoch FROM now() - p.expires_at)::float8 AS over_seconds
            """,
            {"mode": mode, "limit": limit, "lease_seconds": lease_seconds},
        ).fetchall()
    )
    return [Due(Payment.of(row), row["reference_exists"], row["age_seconds"], row["over_seconds"]) for row in rows]


def finish_look(
    database: Database, payment_id: str, *, next_seconds: float | None, status: str | None, status_reason: str | None
) -> None:
    """Store what a look without money found: when to look next, and for a pending payment its end or its last decline.

    Nothing when money has come meanwhile.
    """

    def work(conn: BoundedConnection) -> None:
        if status is not None:
            set_actor(conn, "worker", "time_over")
        conn.execute(
            """
            UPDATE payments
               SET look_at = now() + make_interval(secs => %(next_seconds)s),
                   status = CASE WHEN status = 'pending' THEN coalesce(%(status)s, status) ELSE status END,
                   status_reason = CASE WHEN status = 'pending' THEN coalesce(%(status_reason)s, status_reason)
                                        ELSE status_reason END
             WHERE id = %(id)s AND charge_reference IS NULL
            """,
            {"id": payment_id, "next_seconds": next_seconds, "status": status, "status_reason": status_reason},
        )

    database.transaction("worker", "declined", work)


def ask_to_look(database: Database, payment_ids: Iterable[str]) -> None:
    """Make unpaid payments due for a look now, each at most once in 5 seconds. Their regular looks stay as they are:
    when to look next is reckoned from a payment's age."""
    database.run(
        lambda conn: conn.execute(
            """
            UPDATE payments SET look_at = now()
             WHERE id = ANY(%(ids)s) AND charge_reference IS NULL AND (look_at IS NULL OR look_at > now())
               AND (looked_at IS NULL OR looked_at <= now() - interval '5 s')
            """,
            {"ids": list(payment_ids)},
        )
    )


def claim_job(database: Database, name: str, mode: str, lease_seconds: float) -> bool:
    """Whether a job is due and now ours, for `lease_seconds`."""
    claimed = database.run(
        lambda conn: conn.execute(
            """
            INSERT INTO jobs (mode, name, due_at)
            VALUES (%(mode)s, %(name)s, now() + make_interval(secs => %(lease_seconds)s))
            ON CONFLICT (mode, name) DO UPDATE SET due_at = excluded.due_at WHERE jobs.due_at <= now()
            """,
            {"mode": mode, "name": name, "lease_seconds": lease_seconds},
        )
    )
    return claimed.rowcount == 1


def finish_job(database: Database, name: str, mode: str, next_seconds: float) -> None:
    database.run(
        lambda conn: conn.execute(
            """
            UPDATE jobs SET due_at = now() + make_interval(secs => %(next_seconds)s)
             WHERE mode = %(mode)s AND name = %(name)s
            """,
            {"mode": mode, "name": name, "next_seconds": next_seconds},
        )
    )


# The schema


def is_ready(database: Database) -> bool:
    """Whether the database can be written and its schema serves this code, within 1.5 s. Raises Unavailable."""
    row = database.run(
        lambda conn: _one(
            conn,
            """
            SELECT NOT pg_is_in_recovery() AND current_setting('transaction_read_only') = 'off' AS writable,
                   (SELECT max(number) FROM migrations) AS migration
            """,
        ),
        within_seconds=1.5,
    )
    return bool(row["writable"]) and (row["migration"] or 0) >= NEEDED_MIGRATION


def migrate(url: str) -> list[int]:
    """Bring the schema at `url` to this version and return the numbers of the migrations that were run.

    Each block of schema.sql is a transaction of its own that gives up a lock it cannot have soon, so that it holds up
    nobody who works, and is tried again. Two at once take turns. Raises Unavailable.
    """
    try:
        with psycopg.connect(url, autocommit=True, prepare_threshold=None, **connection_defaults(url)) as conn:
            conn.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
            conn.execute("SELECT set_config('lock_timeout', '2s', false)")
            return [number for number, block in migrations() if _migrate_one(conn, number, block)]
    except psycopg.OperationalError as error:
        raise Unavailable(" ".join(str(error).split())) from error


def migrations() -> Iterator[tuple[int, str]]:
    """The numbered blocks of schema.sql."""
    parts = re.split(r"^-- migration ([0-9]+): .*$", SCHEMA.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for number, block in zip(parts[1::2], parts[2::2], strict=True):
        yield int(number), block


def _migrate_one(conn: psycopg.Connection[Any], number: int, block: str) -> bool:
    """Run one migration unless the database has it. The advisory lock lives as long as the transaction, which is all
    that a pooler in transaction mode grants."""
    for attempt in range(30):
        try:
            with conn.transaction():
                conn.execute("SELECT pg_advisory_xact_lock(hashtext('paygate'), hashtext(current_schema()))")
                conn.execute(
                    "CREATE TABLE IF NOT EXISTS migrations (number integer PRIMARY KEY, run_at timestamptz NOT NULL)"
                )
                taken = conn.execute(
                    "INSERT INTO migrations VALUES (%(number)s, clock_timestamp()) ON CONFLICT DO NOTHING",
                    {"number": number},
                )
                if taken.rowcount == 0:
                    return False
                conn.execute(block.encode())
                conn.execute(
                    "INSERT INTO secrets (value) VALUES (%(value)s) ON CONFLICT DO NOTHING",
                    {"value": secrets.token_bytes(32)},
                )
                return True
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
            time.sleep(min(1.0, 0.1 * 2**attempt))
    raise Unavailable(f"migration {number} waited in vain for a lock")


def _one(conn: psycopg.Connection[Any], query: str, values: dict[str, Any] | None = None) -> dict[str, Any]:
    """The one row that a statement returns."""
    row: dict[str, Any] | None = conn.execute(query.encode(), values).fetchone()
    if row is None:
        raise LookupError("a statement that returns one row returned none")
    return row
