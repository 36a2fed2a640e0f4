"""Every SQL statement and the connection pool: plain functions, plain values in and out.

Locks are always taken in the order key, payment, charge, so that no two transactions wait for each other.
"""

import base64
import functools
import hashlib
import hmac
import json
import re
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any, Self, TypeVar

import psycopg
import psycopg.generators
import psycopg.rows
import psycopg.sql
from psycopg.pq import ExecStatus, TransactionStatus
from psycopg.pq.abc import PGresult
from psycopg.types.json import Jsonb
from psycopg_pool import ConnectionPool, PoolTimeout

import money

T = TypeVar("T")

SCHEMA = Path(__file__).with_name("schema.sql")
NO_SCHEMA = "it has no tables yet: run python manage.py migrate"
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
    patience_seconds: float = 5
    """How long a single wait may take where there is no deadline."""
    is_notifying = False

    @classmethod
    def connect(cls, conninfo: str = "", **kwargs: Any) -> Self:
        """As usual; but a server that seems to be a standby is asked itself.

        pgbouncer tells every client what its own first connection was told. Where that one was made while the server
        was being promoted, that is a standby for ever after, and libpq, which is to find a primary, believes it:
        https://github.com/pgbouncer/pgbouncer/issues/859
        """
        try:
            return super().connect(conninfo, **kwargs)
        except psycopg.OperationalError as error:
            if kwargs.get("target_session_attrs") != "read-write" or "session is read-only" not in str(error):
                raise
            conn = super().connect(conninfo, **{**kwargs, "target_session_attrs": "any"})
            try:
                if conn.execute("SELECT WHERE current_setting('transaction_read_only') = 'on'").fetchone() is None:
                    return conn
            except BaseException:
                conn.close()
                raise
            conn.close()
            raise

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        if timeout is None:
            timeout = self.patience_seconds if self.deadline is None else max(0.0, self.deadline - time.monotonic())
        try:
            return super().wait(gen, interval, timeout)
        except psycopg.errors._WaitTimeout as error:
            self.pgconn.finish()
            raise Frozen from error

    def command(self, statements: bytes) -> bytes | None:
        """Run statements that have no values and whose rows nobody reads; what the server says of the last one. As
        psycopg sends its own BEGIN and COMMIT: without a cursor, which is half of what they cost us."""
        with self.lock:
            self.pgconn.send_query(statements)
            results: list[PGresult] = self.wait(psycopg.generators.execute(self.pgconn))
        for result in results:
            if result.status == ExecStatus.FATAL_ERROR:  # of two, the first tells what came about
                raise psycopg.errors.error_from_result(result, self.info.encoding)
        if not results:
            raise psycopg.InternalError("the server was ready again without a result")
        return results[-1].command_status

    def forget_prepared(self, error: psycopg.Error) -> None:
        """After an error: a statement whose first use failed is forgotten by psycopg and kept by the server, 77 kB for
        each order that a full disk refuses. A server that does not know what psycopg prepared is not the one that it
        was prepared at: there is a pooler after all, and nothing more is prepared on this connection."""
        if error.sqlstate in ("26000", "42P05"):
            self.prepare_threshold = None
        elif self.prepare_threshold is not None and self.info.transaction_status == TransactionStatus.IDLE:
            with suppress(psycopg.Error):
                self.command(b"BEGIN; DEALLOCATE ALL")
                self.rollback()  # psycopg forgets too


class Frozen(psycopg.OperationalError):
    """The server did not answer in time."""


SILENT = (PoolTimeout, Frozen, psycopg.errors.QueryCanceled)
"""What is raised by a database that takes all the time there is."""


class Database:
    """The pool of connections to one database, and how a transaction is run on it.

    `notifies`: the merchant is told of what changes, so the database is to note it.
    """

    def __init__(self, url: str, pool_size: int, *, notifies: bool = False) -> None:
        self.notifies = notifies
        self.pool: ConnectionPool[BoundedConnection] = ConnectionPool(
            url,
            connection_class=BoundedConnection,
            # Nothing is prepared unless _configure finds that it may be.
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
        self.is_silent = False
        """Whether the last to hear from the database waited in vain."""
        self.probes = threading.BoundedSemaphore(pool_size)
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

        While the database says nothing, as many as there are connections wait for it; all others are refused at once.
        Or soon each thread of a server would wait here, and none be left to say that the process lives.
        """
        if not self.is_silent:
            return self._run(work, within_seconds)
        if not self.probes.acquire(blocking=False):
            raise Unavailable("silent")
        try:
            return self._run(work, within_seconds)
        finally:
            self.probes.release()

    def _run(self, work: Callable[[BoundedConnection], T], within_seconds: float) -> T:
        deadline = time.monotonic() + within_seconds
        for retry in (True, False):
            generation = self.generation
            try:
                # Not `with pool.connection()`: its commit of what has been committed is a seventh of a GET.
                conn = self.pool.getconn(timeout=deadline - time.monotonic())
                try:
                    conn.deadline, conn.is_notifying = deadline, self.notifies
                    result = work(conn)
                except psycopg.Error as error:
                    conn.forget_prepared(error)
                    raise
                finally:
                    self.pool.putconn(conn)
            except (psycopg.OperationalError, psycopg.InternalError) as error:
                if not _is_gone(error):
                    raise
                self.is_silent = self.is_silent or isinstance(error, SILENT)
                if not retry or not _is_worth_a_retry(error):
                    raise Unavailable(type(error).__name__) from error
                if not isinstance(error, psycopg.errors.SerializationFailure | psycopg.errors.DeadlockDetected):
                    self._drain(generation)
            except psycopg.errors.UndefinedTable as error:
                raise Unavailable(NO_SCHEMA) from error
            else:
                self.is_silent = False
                return result
        raise AssertionError("the second try returns or raises")

    def transaction(self, actor: str, why: str, work: Callable[[BoundedConnection], T]) -> T:
        """As `run`, in one transaction whose changes of payments the audit trail puts down to `actor` and `why`."""

        def in_transaction(conn: BoundedConnection) -> T:
            # BEGIN and the names in one round trip.
            conn.command(_begin(actor, why, is_notifying=conn.is_notifying))
            try:
                result = work(conn)
            except BaseException:
                if conn.info.transaction_status != TransactionStatus.UNKNOWN:  # the connection lives
                    conn.rollback()
                raise
            if conn.command(b"COMMIT") != b"COMMIT":
                raise psycopg.InternalError("a failed statement was overlooked: nothing was written")
            return result

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


READING_SECONDS = 600
"""How long one statement of a report may take: of a million payments they take seconds."""


@contextmanager
def reading(url: str) -> Iterator[BoundedConnection]:
    """A connection for one who reads much, in transactions of its own. Raises Unavailable, also while it is used."""
    try:
        with closing(
            BoundedConnection.connect(
                url,
                autocommit=True,
                prepare_threshold=None,
                row_factory=psycopg.rows.dict_row,
                **connection_defaults(url),
            )
        ) as conn:
            conn.patience_seconds = READING_SECONDS
            check_search_path(conn)
            conn.execute(
                """
                SELECT set_config('statement_timeout', %(ms)s, false), set_config('TimeZone', 'UTC', false),
                       set_config('idle_in_transaction_session_timeout', '0', false),
                       set_config('enable_seqscan', 'on', false)
                """,
                {"ms": str(READING_SECONDS * 1000)},
            )
            yield conn
    except psycopg.errors.UndefinedTable as error:
        raise Unavailable(NO_SCHEMA) from error
    except psycopg.Error as error:  # a role without the right to read is no reason for a traceback
        raise Unavailable(" ".join(str(error).split())) from error


def connection_defaults(url: str) -> dict[str, Any]:
    """What every connection to `url` uses unless the URL itself says otherwise."""
    given = psycopg.conninfo.conninfo_to_dict(url)
    defaults = {
        # A demoted primary is not written to; of several hosts the primary is found.
        "target_session_attrs": "read-write",
        "connect_timeout": 4,
        "client_encoding": "utf8",
        "application_name": "paygate",
    }
    return {name: value for name, value in defaults.items() if name not in given}


def check_search_path(conn: psycopg.Connection[Any]) -> None:
    """Raises Unavailable unless the search_path that the URL's `options` name is in force. A pooler may ignore them
    (pgbouncer with `ignore_startup_parameters = options` does, without a word), and one business would find itself
    among another's payments."""
    named = re.findall(r"(?i)search[_-]path=((?:\\.|\S)+)", conn.info.options)
    if named:
        in_force = str(conn.cursor(row_factory=psycopg.rows.scalar_row).execute("SHOW search_path").fetchone())
        if _plain(in_force) != _plain(named[-1]):
            raise Unavailable(f"its search_path is {in_force}, not {named[-1]} as in the URL: a pooler ignores options")


def _plain(search_path: str) -> str:
    """Without the spaces, quotes and backslashes in which two that mean the same may differ."""
    return re.sub(r'[\s"\\]', "", search_path)


def _configure(conn: BoundedConnection) -> None:
    """Whatever the role's defaults are: the isolation level that the statements here are written for, and an end, a
    little before ours, to what the server does for a request that has given up.

    What `prepare=True` marks is prepared, which halves the database's work for a payment, where the server's process is
    the one that answered the connection. Behind a pooler another one may answer each transaction, and it would not know
    the statement, or know another of that name. Most poolers give out numbers of their own, for they must know whom a
    client means who cancels (https://www.postgresql.org/docs/current/protocol-flow.html, "Canceling Requests in
    Progress"); pgagroal, which passes the server's on, is noticed by the first error: see forget_prepared.
    """
    check_search_path(conn)
    conn.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
    conn.row_factory = psycopg.rows.dict_row
    server = _one(
        conn,
        """
        SELECT set_config('default_transaction_isolation', 'read committed', false),
               set_config('synchronous_commit', CASE current_setting('synchronous_commit') WHEN 'off' THEN 'on'
                          ELSE current_setting('synchronous_commit') END, false),
               set_config('statement_timeout', '4500ms', false),
               set_config('idle_in_transaction_session_timeout', '10s', false),
               set_config('TimeZone', 'UTC', false),
               -- A plan that was made when a table had a few rows is kept while it comes to have thousands.
               set_config('enable_seqscan', 'off', false),
               -- Before 18 a scan that has no other way is then so dear that it is compiled: 50 ms for a row.
               set_config('jit', 'off', false),
               pg_backend_pid() AS pid
        """,
    )
    if server["pid"] == conn.info.backend_pid:
        conn.prepare_threshold = NEVER_UNMARKED


NEVER_UNMARKED = 2**31
"""As a threshold: no statement that is not marked is run so often that psycopg prepares it. Those that are find their
rows by a unique key, so that their plan stays right however the tables grow, and name their columns, so that one that a
migration adds changes nothing for them."""


def _is_gone(error: psycopg.Error) -> bool:
    """Whether the server is away, no longer the primary, or has ended the connection. Some of that is no
    OperationalError: the end of a transaction that a stopped or starved process of ours has left open (25P03, 25P04),
    and without an sqlstate, from psycopg, the two errors with which pgbouncer tells of a server that crashed."""
    return isinstance(error, psycopg.OperationalError) or error.sqlstate in (None, "25006", "25P03", "25P04")


def _is_worth_a_retry(error: psycopg.Error) -> bool:
    """Whether the connection is dead, its server no longer the primary, or the transaction lost to another one."""
    if error.sqlstate is None:
        return not isinstance(error, PoolTimeout | Frozen)
    return error.sqlstate.startswith(("08", "57P0", "40")) or error.sqlstate in ("25006", "25P03", "25P04")


@functools.lru_cache(maxsize=64)
def _begin(actor: str, why: str, *, is_notifying: bool) -> bytes:
    """Begin a transaction and name who changes payments, and why, as `set_actor` does: two statements without
    parameters are one message."""
    return (
        psycopg.sql.SQL(
            "BEGIN; SELECT set_config('paygate.actor', {}, true), set_config('paygate.why', {}, true),"
            " set_config('paygate.notify', {}, true)"
        )
        .format(actor, why, "on" if is_notifying else "off")
        .as_bytes(None)
    )


def set_actor(conn: BoundedConnection, actor: str, why: str) -> None:
    """Name who changes payments, and why, for the rest of the transaction (which is what pgbouncer keeps together)."""
    conn.execute(
        """
        SELECT set_config('paygate.actor', %(actor)s, true), set_config('paygate.why', %(why)s, true),
               set_config('paygate.notify', %(notify)s, true)
        """,
        {"actor": actor, "why": why, "notify": "on" if conn.is_notifying else "off"},
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
        present = {name: value for name, value in vars(self).items() if value is not None}
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
    accepted_by: str | None
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
    def open_checkout_url(self) -> str | None:
        """Where the customer can pay; None unless pending."""
        return self.checkout_url if self.status == "pending" else None

    @property
    def is_paid(self) -> bool:
        return self.status in PAID

    def to_json(self, *others: str) -> str:
        """The one JSON form, for answers, notifications and exports (which have `others` of its fields too)."""
        return json_object(self.members(*others))

    def members(self, *others: str) -> dict[str, str]:
        """The members of the JSON form, each as JSON: amounts as numbers with the currency's decimals, which `json`
        cannot write (it writes 50.00 as 50.0)."""
        return {
            "id": as_json(self.id),
            "customer_name": as_json(self.customer_name),
            "customer_email": as_json(self.customer_email),
            "amount": money.render(self.amount_minor, self.currency),
            "status": as_json(self.status),
            "currency": as_json(self.currency),
            "reference": as_json(self.current_reference),
            "checkout_url": as_json(self.open_checkout_url),
            "status_reason": as_json(self.status_reason),
            "mode": as_json(self.mode),
            "created_at": as_json(timestamp(self.created_at)),
            "paid_at": as_json(timestamp(self.paid_at)),
            "refunded_amount": money.render(self.refunded_minor, self.currency),
            **{name: json.dumps(getattr(self, name), ensure_ascii=False) for name in others},
        }


PAYMENT_COLUMNS = tuple(each.name for each in fields(Payment))


def as_json(text: str | None) -> str:
    return "null" if text is None else encode_basestring(text)


def json_object(members: dict[str, str]) -> str:
    """An object of members that are JSON already."""
    return "{" + ", ".join(f'"{name}": {value}' for name, value in members.items()) + "}"


def timestamp(moment: datetime | None) -> str | None:
    return None if moment is None else moment.astimezone(UTC).isoformat()[:19] + "Z"


def reference_of_attempt(reference: str, attempt: int) -> str:
    return reference if attempt == 1 else f"{reference}-{attempt}"


def references_of(reference: str) -> list[str]:
    """All the references that a payment may ever have."""
    return [reference_of_attempt(reference, attempt) for attempt in range(1, LAST_ATTEMPT + 1)]


def _name(prefix: str, secret: bytes, mode: str, key: bytes) -> str:
    """`PAY-…` or `PG-…`: 130 bits as Crockford base32, the same for the same key, so that a retry after rows were lost
    meets its old transaction. Each purpose and mode has values of its own."""
    digest = hmac.new(secret, b"\0".join([prefix.encode(), mode.encode(), key]), hashlib.sha256).digest()
    return f"{prefix}-{base64.b32encode(digest).translate(CROCKFORD)[:26].decode()}"


def payment_id_of(database: Database, mode: str, key: bytes) -> str:
    """The id that the payment of `key` has, or will have."""
    return _name("PAY", database.secret(), mode, key)


def _random_id(prefix: str) -> str:
    return _name(prefix, secrets.token_bytes(32), "", b"")


def find_payment(database: Database, payment_id: str) -> Payment | None:
    """The payment of an id; None for one that is unknown, and for what is no id."""
    if not ID_PATTERN.fullmatch(payment_id):
        return None

    return database.run(
        lambda conn: (
            conn.cursor(row_factory=MAKE_PAYMENT).execute(FIND_PAYMENT, {"id": payment_id}, prepare=True).fetchone()
        )
    )


# Most requests are this one: only what is needed, and no dict between the row and the payment.
FIND_PAYMENT = f"SELECT {', '.join(PAYMENT_COLUMNS)} FROM payments WHERE id = %(id)s".encode()  # noqa: S608  # ours
MAKE_PAYMENT = psycopg.rows.args_row(Payment)


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
        **vars(order),
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
        made = _insert_key_and_payment(conn, values)
        if made is not None:
            return Reservation(made, key, token, taken_at)
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


def _insert_key_and_payment(conn: BoundedConnection, values: dict[str, Any]) -> Payment | None:
    """The payment, or None where the key is there already. One statement, so one round trip and one commit.

    Its conflict has no target: the payment's id is made from the key and unique too, and of two requests at the same
    moment the loser may meet the winner in either index.
    """
    return conn.cursor(row_factory=MAKE_PAYMENT).execute(MAKE_KEY_AND_PAYMENT, values, prepare=True).fetchone()


MAKE_KEY_AND_PAYMENT = f"""
    WITH actor AS MATERIALIZED (
        SELECT set_config('paygate.actor', %(source)s, true), set_config('paygate.why', 'reserved', true)
    ), taken AS (
        INSERT INTO idempotency_keys (mode, key, fingerprint, payment_id, token, leased_until)
        SELECT %(mode)s, %(key)s, %(fingerprint)s, %(id)s, %(token)s,
               clock_timestamp() + make_interval(secs => %(lease_seconds)s)
          FROM actor
        ON CONFLICT DO NOTHING
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
    RETURNING {", ".join(PAYMENT_COLUMNS)}
    """.encode()  # noqa: S608  # the names are ours


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
                 -- No join, and pending in words that match no index: the planner would walk all payments for this one.
                 WHERE id = (SELECT payment_id FROM ours) AND payment_rank(status) = 0 AND checkout_url IS NULL
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
            prepare=True,
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
               SET leased_until = NULL, reference_exists = reference_exists OR %(opened)s,
                   answered_at = clock_timestamp(), answer_status = %(status)s, answer = %(body)s
             WHERE mode = %(mode)s AND key = %(key)s
            """,
            {**_lease(reservation), "opened": bool(checkout_url), "status": answer.status, "body": answer.body},
        )
        return answer

    return database.transaction(reservation.payment.source, "opened", work)


def _lease(reservation: Reservation) -> dict[str, Any]:
    payment = reservation.payment
    return {"mode": payment.mode, "key": reservation.key, "token": reservation.token, "source": payment.source}


# Charges and events


@dataclass(frozen=True)
class Delivery:
    """A signed webhook to be stored. `body` is None for what is not ours.

    `outcome` is what has become of it when the transaction ends: `applied` (which is `noted` where no payment has its
    reference), or `noted` where it only makes something else happen, or `received`: still to be handled.
    """

    mode: str
    body_digest: bytes
    outcome: str
    name: str | None = None
    reference: str | None = None
    body: str | None = None


@dataclass(frozen=True)
class Bill:
    """What a charge is held against: what a payment asks for, and the charge that it follows already."""

    id: str
    mode: str
    amount_minor: int
    currency: str
    charge_reference: str | None


MAKE_BILL = psycopg.rows.args_row(Bill)


def apply_charge(conn: BoundedConnection, charge: money.Charge, actor: str, delivery: Delivery | None = None) -> None:
    """Record that money came and move its payment on, in the caller's transaction (for `charge`). Safe to repeat.

    The first charge of a payment is its own: `completed` when it pays for it, else `review` and an incident. Every
    other one opens an incident and changes nothing; one whose reference no payment of this mode has, too. `delivery`:
    the webhook that told of it, stored with it.
    """
    bill = record(conn, charge.mode, charge.reference, actor, charge=charge, delivery=delivery)
    if bill is None:
        open_incident(conn, charge.mode, "unknown_reference", charge.reference)
        return
    if bill.charge_reference is None:
        _follow_charge(conn, bill, charge, actor)
    elif bill.charge_reference != charge.reference:
        open_incident(conn, bill.mode, "second_charge", charge.reference, bill.id)
        return
    if charge.is_reversed:
        await_refunds(conn, bill.id, is_reversed=True)


def record(
    conn: BoundedConnection,
    mode: str,
    reference: str | None,
    actor: str,
    *,
    charge: money.Charge | None = None,
    delivery: Delivery | None = None,
) -> Bill | None:
    """Store what came about a reference, a charge or a webhook or both, each once, and lock the payment that it names
    (any of its nine): its bill, or None where none of this mode has it. One statement, so one round trip.

    A webhook that comes again is counted, and one that was handled keeps its outcome. Of an erased payment its body is
    not kept once it is handled; the lock lets an erasure be seen here, or see this event.
    """
    base = REFERENCE_PATTERN.fullmatch(reference or "")
    found = conn.cursor(row_factory=MAKE_BILL)
    found.execute(
        """
        WITH payment AS MATERIALIZED (
            SELECT id, mode, amount_minor, currency, charge_reference, erased_at FROM payments
             WHERE reference = %(base)s FOR UPDATE
        ), charged AS (
            INSERT INTO charges (reference, payment_id, mode, provider_id, amount_minor, requested_minor, fees_minor,
                                 currency, channel, paid_at, source)
            SELECT %(reference)s, id, mode, %(provider_id)s, %(amount_minor)s, %(requested_minor)s, %(fees_minor)s,
                   %(currency)s, %(channel)s, %(paid_at)s, %(actor)s
              FROM payment WHERE mode = %(mode)s AND %(has_charge)s
            ON CONFLICT (reference) DO NOTHING
        ), handled AS MATERIALIZED (
            SELECT CASE WHEN %(outcome)s = 'applied' AND ours.id IS NULL THEN 'noted' ELSE %(outcome)s END AS outcome,
                   ours.id, (SELECT erased_at FROM payment) AS erased_at
              FROM (SELECT) AS one LEFT JOIN payment AS ours ON ours.mode = %(mode)s
             WHERE %(has_delivery)s
        ), delivered AS (
            INSERT INTO provider_events AS e (mode, digest, name, reference, payment_id, body, outcome, applied_at,
                                              retry_at)
            SELECT %(mode)s, %(body_digest)s, %(name)s, %(reference)s,
                   CASE WHEN outcome IN ('applied', 'noted') THEN id END,
                   CASE WHEN outcome = 'received' OR erased_at IS NULL THEN %(body)s::text END,
                   outcome,
                   CASE WHEN outcome = 'applied' THEN clock_timestamp() END,
                   CASE WHEN outcome = 'received' THEN clock_timestamp() END
              FROM handled
            ON CONFLICT (mode, digest) DO UPDATE
               SET deliveries = e.deliveries + 1,
                   outcome = CASE WHEN excluded.outcome = 'received' THEN e.outcome ELSE excluded.outcome END,
                   payment_id = coalesce(e.payment_id, excluded.payment_id),
                   applied_at = CASE WHEN excluded.outcome = 'received' THEN e.applied_at
                                     WHEN excluded.outcome = 'applied' THEN coalesce(e.applied_at, clock_timestamp())
                                END,
                   retry_at = CASE WHEN excluded.outcome = 'received' THEN e.retry_at END,
                   body = CASE WHEN excluded.body IS NOT NULL THEN e.body END
        )
        SELECT id, mode, amount_minor, currency, charge_reference FROM payment
        """,
        {
            **(NO_CHARGE if charge is None else vars(charge)),
            **(NO_DELIVERY if delivery is None else vars(delivery)),
            "mode": mode,
            "reference": reference,
            "base": base[1] if base else None,
            "actor": actor,
            "has_charge": charge is not None,
            "has_delivery": delivery is not None,
        },
        prepare=True,
    )
    bill = found.fetchone()
    return bill if bill is not None and bill.mode == mode else None


NO_CHARGE = dict.fromkeys(each.name for each in fields(money.Charge))
NO_DELIVERY = dict.fromkeys(each.name for each in fields(Delivery))


def _follow_charge(conn: BoundedConnection, bill: Bill, charge: money.Charge, actor: str) -> None:
    is_paid = charge.pays(bill.amount_minor, bill.currency)
    if not is_paid:
        open_incident(conn, bill.mode, "mismatch", charge.reference, bill.id)
        set_actor(conn, actor, "mismatch")
    conn.execute(
        """
        UPDATE payments
           SET status = %(status)s, status_reason = %(status_reason)s, charge_reference = %(reference)s,
               charged_minor = %(amount_minor)s,
               look_at = CASE WHEN refunds_awaited_since IS NOT NULL THEN now() END,
               paid_at = CASE WHEN %(is_paid)s THEN coalesce(%(paid_at)s, clock_timestamp()) END
         WHERE id = %(id)s
        """,
        {
            **vars(charge),
            "id": bill.id,
            "is_paid": is_paid,
            "status": "completed" if is_paid else "review",
            "status_reason": None if is_paid else _difference(charge, bill),
        },
        prepare=True,
    )


def _difference(charge: money.Charge, bill: Bill) -> str:
    """Why a charge does not pay for its payment, for the person who reviews it."""
    asked = bill.amount_minor if charge.requested_minor is None else charge.requested_minor
    return (
        f"paid {money.render(charge.amount_minor, charge.currency)} {charge.currency}, "
        f"asked at {money.render(asked, charge.currency)} {charge.currency}, "
        f"the price is {money.render(bill.amount_minor, bill.currency)} {bill.currency}"
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


def close_ended(conn: BoundedConnection, actor: str, kinds: list[str], subject: str, reason: str | None = None) -> None:
    """Close the open incidents of these kinds about `subject`: what they are about has come to its end."""
    conn.execute(
        """
        UPDATE incidents SET closed_at = clock_timestamp(), closed_by = %(actor)s, close_reason = %(reason)s
         WHERE subject = %(subject)s AND kind = ANY(%(kinds)s) AND closed_at IS NULL
        """,
        {"actor": actor, "kinds": kinds, "subject": subject, "reason": reason},
    )


def note_incident(database: Database, payment: Payment, kind: str) -> None:
    """Open an incident about a whole payment."""
    database.transaction(
        payment.source, "by_hand", lambda conn: open_incident(conn, payment.mode, kind, payment.id, payment.id)
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


def find_due(database: Database, payment: Payment) -> Due:
    """A payment to ask about because somebody wants to know now."""
    row = database.run(
        lambda conn: _one(
            conn,
            """
            SELECT p.*, k.reference_exists,
                   extract(epoch FROM now() - p.created_at)::float8 AS age_seconds,
                   extract(epoch FROM now() - p.expires_at)::float8 AS over_seconds
              FROM payments p JOIN idempotency_keys k ON k.payment_id = p.id WHERE p.id = %(id)s
            """,
            {"id": payment.id},
        )
    )
    return Due(Payment.of(row), row["reference_exists"], row["age_seconds"], row["over_seconds"])


def claim_due(database: Database, mode: str, limit: int, lease_seconds: float) -> list[Due]:
    """The payments most overdue for a look, skipping those whose checkout is being opened at this moment."""
    # now() and not clock_timestamp(): the index serves the comparison with a stable value only.
    rows = database.run(
        lambda conn: conn.execute(
            """
            WITH due AS (
                SELECT p.id FROM payments p
                 WHERE p.mode = %(mode)s AND p.look_at <= now()
                   -- OFFSET 0: asked of each payment, no join. With thousands due a join would read all keys for one.
                   AND NOT EXISTS (SELECT FROM idempotency_keys k
                                    WHERE k.payment_id = p.id AND k.answered_at IS NULL AND k.leased_until > now()
                                   OFFSET 0)
                 ORDER BY p.look_at LIMIT %(limit)s FOR UPDATE OF p SKIP LOCKED
            )
            UPDATE payments p
               SET look_at = now() + make_interval(secs => %(lease_seconds)s), looked_at = now(),
                   look_leased_until = now() + make_interval(secs => %(lease_seconds)s)
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
               SET look_at = now() + make_interval(secs => %(next_seconds)s), look_leased_until = NULL,
                   status = CASE WHEN status = 'pending' THEN coalesce(%(status)s, status) ELSE status END,
                   status_reason = CASE WHEN status = 'pending' THEN coalesce(%(status_reason)s, status_reason)
                                        ELSE status_reason END
             WHERE id = %(id)s AND charge_reference IS NULL
            """,
            {"id": payment_id, "next_seconds": next_seconds, "status": status, "status_reason": status_reason},
        )

    database.transaction("worker", "declined", work)


def look_now(conn: BoundedConnection, payment_id: str) -> None:
    """Make an unpaid payment due for a look."""
    conn.execute(
        "UPDATE payments SET look_at = now() WHERE id = %(id)s AND charge_reference IS NULL", {"id": payment_id}
    )


def look_soon(database: Database, noted: Iterable[str], waited_for: Iterable[str]) -> dict[str, str]:
    """Make the unpaid ones of the `noted` payments due for a look now, each at most once in 5 seconds, and return the
    status of each one `waited_for`. Regular looks stay as they are: they are reckoned from a payment's age."""
    rows = database.run(
        lambda conn: conn.execute(
            """
            WITH due AS (
                UPDATE payments SET look_at = now()
                 WHERE id = ANY(%(noted)s) AND charge_reference IS NULL AND (look_at IS NULL OR look_at > now())
                   AND (looked_at IS NULL OR looked_at <= now() - interval '5 s')
                   AND (look_leased_until IS NULL OR look_leased_until <= now())
            )
            SELECT id, status FROM payments WHERE id = ANY(%(waited_for)s)
            """,
            {"noted": list(noted), "waited_for": list(waited_for)},
        ).fetchall()
    )
    return {row["id"]: row["status"] for row in rows}


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


def days_since_job(database: Database, name: str, mode: str) -> float:
    """How long ago a job was done last; 0 where it never was."""
    row = database.run(
        lambda conn: conn.execute(
            """
            SELECT extract(epoch FROM now() - done_at)::float8 / 86400 AS days FROM jobs
             WHERE mode = %(mode)s AND name = %(name)s AND done_at IS NOT NULL
            """,
            {"mode": mode, "name": name},
        ).fetchone()
    )
    return float(row["days"]) if row else 0.0


def finish_job(database: Database, name: str, mode: str, next_seconds: float | None) -> None:
    """Note that a job was done just now, and when it is due next (None: it is not one that falls due)."""
    database.run(
        lambda conn: conn.execute(
            """
            INSERT INTO jobs (mode, name, due_at, done_at)
            VALUES (%(mode)s, %(name)s, now() + make_interval(secs => %(next_seconds)s), now())
            ON CONFLICT (mode, name) DO UPDATE SET due_at = excluded.due_at, done_at = excluded.done_at
            """,
            {"mode": mode, "name": name, "next_seconds": next_seconds},
        )
    )


# Refunds


FREE_AGAIN = ("refused", "failed", "not_made")
"""A refund in one of these gave nothing back; every other one counts as spent."""


@dataclass(frozen=True)
class Refund:
    id: str
    charge_reference: str
    payment_id: str
    mode: str
    provider_id: int | None
    amount_minor: int
    currency: str
    status: str
    origin: str
    made_by: str
    refused_because: str | None
    created_at: datetime

    @classmethod
    def of(cls, row: dict[str, Any]) -> Self:
        return cls(*[row[each.name] for each in fields(cls)])


class RefundImpossible(Exception):
    """There is no charge to refund, or not so much of it left; the message says it to the operator."""


class RefundAsked(Exception):
    """This refund has been asked for before; `is_recent` within the last 24 hours."""

    def __init__(self, refund: Refund, is_recent: bool) -> None:
        super().__init__(refund.id)
        self.refund = refund
        self.is_recent = is_recent


@dataclass(frozen=True)
class Refundable:
    """A charge under its lock, with what may be given back of it and what has been."""

    payment: Payment
    reference: str
    currency: str
    limit_minor: int
    spent_minor: int

    @property
    def left_minor(self) -> int:
        return max(0, self.limit_minor - self.spent_minor)


def plan_refund(
    database: Database,
    mode: str,
    target: str,
    *,
    amount_minor: Callable[[str], int] | None = None,
    again: bool = False,
    rejecting: bool = False,
) -> tuple[Refundable, int]:
    """The charge and the amount that `begin_refund` would give back, writing nothing. Raises what it raises."""

    def work(conn: BoundedConnection) -> tuple[Refundable, int]:
        charge = lock_refundable(conn, mode, target)
        return charge, _decide_refund(conn, charge, amount_minor, again, rejecting)

    return database.run(work)


def begin_refund(
    database: Database,
    mode: str,
    target: str,
    *,
    amount_minor: Callable[[str], int] | None = None,
    again: bool = False,
    rejecting: bool = False,
    made_by: str,
    reason: str | None = None,
) -> Refund:
    """Commit the refund that is about to be asked for, under its charge's lock.

    `target` is a payment's id (its own charge) or a charge's reference; `amount_minor` reads the amount in the charge's
    currency, default all that is left. `rejecting`: only of a payment in review. Raises RefundImpossible, RefundAsked,
    Unavailable.
    """
    refund_id = _random_id("RF")

    def work(conn: BoundedConnection) -> Refund:
        charge = lock_refundable(conn, mode, target)
        made = conn.execute("SELECT * FROM refunds WHERE id = %(id)s", {"id": refund_id}).fetchone()
        if made is not None:  # the commit's reply was lost; only under the lock it is certain that it has ended
            return Refund.of(made)
        amount = _decide_refund(conn, charge, amount_minor, again, rejecting)
        return Refund.of(
            _one(
                conn,
                """
                INSERT INTO refunds (id, charge_reference, payment_id, mode, amount_minor, currency, status, origin,
                                     made_by, reason, look_at)
                VALUES (%(id)s, %(charge_reference)s, %(payment_id)s, %(mode)s, %(amount_minor)s, %(currency)s,
                        'unanswered', 'paygate', %(made_by)s, %(reason)s, clock_timestamp() + interval '1 min')
                RETURNING *
                """,
                {
                    "id": refund_id,
                    "charge_reference": charge.reference,
                    "payment_id": charge.payment.id,
                    "mode": mode,
                    "amount_minor": amount,
                    "currency": charge.currency,
                    "made_by": made_by,
                    "reason": reason,
                },
            )
        )

    return database.transaction(made_by, "refund", work)


def _decide_refund(
    conn: BoundedConnection,
    charge: Refundable,
    amount_minor: Callable[[str], int] | None,
    again: bool,
    rejecting: bool,
) -> int:
    if rejecting and charge.payment.status != "review":
        raise RefundImpossible(f"{charge.payment.id} is {charge.payment.status}: there is nothing to reject")
    amount = charge.left_minor if amount_minor is None else amount_minor(charge.currency)
    _refuse_a_repetition(conn, charge, amount, again)
    if amount > charge.left_minor or charge.left_minor == 0:
        left = money.render(charge.left_minor, charge.currency)
        raise RefundImpossible(f"only {left} {charge.currency} of {charge.reference} can still be given back")
    return amount


def lock_refundable(conn: BoundedConnection, mode: str, target: str) -> Refundable:
    """Lock a payment and the charge that `target` means. Raises RefundImpossible."""
    reference = REFERENCE_PATTERN.fullmatch(target)
    row = conn.execute(
        "SELECT * FROM payments WHERE mode = %(mode)s AND (id = %(target)s OR reference = %(base)s) FOR UPDATE",
        {"mode": mode, "target": target, "base": reference[1] if reference else None},
    ).fetchone()
    if row is None:
        raise RefundImpossible(f"there is no {mode} payment {target}")
    payment = Payment.of(row)
    charge = conn.execute(
        """
        SELECT c.*, (SELECT coalesce(sum(r.amount_minor), 0)::bigint FROM refunds r
                      WHERE r.charge_reference = c.reference AND NOT r.status = ANY(%(free)s)) AS spent_minor
          FROM charges c WHERE c.reference = %(reference)s
        """,
        {"reference": target if reference else payment.charge_reference, "free": list(FREE_AGAIN)},
    ).fetchone()
    if charge is None:
        raise RefundImpossible(f"no money has come for {target}: the payment is {payment.status}")
    is_own_and_paid = charge["reference"] == payment.charge_reference and payment.is_paid
    limit_minor = charge["amount_minor"]
    if is_own_and_paid and charge["currency"] == payment.currency:
        limit_minor = min(limit_minor, payment.amount_minor)
    return Refundable(payment, charge["reference"], charge["currency"], limit_minor, charge["spent_minor"])


def _refuse_a_repetition(conn: BoundedConnection, charge: Refundable, amount_minor: int, again: bool) -> None:
    """Raises RefundAsked for the same amount of the same charge within 24 hours, or at any time where nothing is left.

    All that is left, of a charge of which nothing is, repeats whatever took it.
    """
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
            "reference": charge.reference,
            "free": list(FREE_AGAIN),
            "nothing_is_left": charge.left_minor == 0,
            "again": again,
            "amount_minor": amount_minor,
        },
    ).fetchone()
    if row is not None:
        raise RefundAsked(Refund.of(row), row["is_recent"])


def end_sending(database: Database, refund_id: str, *, refused_because: str | None = None) -> Refund:
    """Store that our one call has ended: refused, or without an answer, which leaves it to be looked for."""
    row = database.run(
        lambda conn: _one(
            conn,
            """
            UPDATE refunds
               SET send_ended_at = clock_timestamp(), refused_because = %(refused_because)s,
                   status = CASE WHEN status = 'unanswered' AND %(refused_because)s::text IS NOT NULL THEN 'refused'
                                 ELSE status END,
                   look_at = CASE WHEN %(refused_because)s::text IS NULL THEN look_at END
             WHERE id = %(id)s
            RETURNING *
            """,
            {"id": refund_id, "refused_because": refused_because},
        )
    )
    return Refund.of(row)


def note_refund(
    database: Database, mode: str, listed: money.Refund, actor: str, ours: str | None = None
) -> Refund | None:
    """`apply_refund` in a transaction of its own."""
    return database.transaction(actor, "refund", lambda conn: apply_refund(conn, mode, listed, actor, ours))


def apply_refund(
    conn: BoundedConnection, mode: str, listed: money.Refund, actor: str, ours: str | None = None
) -> Refund | None:
    """Record a refund as the provider lists it, and what it makes of its payment. Safe to repeat.

    It is known by the provider's id, or is one of ours by its note (or as `ours`, for the answer to our own call). Any
    other one was made in the dashboard and is adopted, but not while a refund of ours on that charge is unanswered: it
    might be that one. None when it is not, or not yet, ours to record.
    """
    charge = conn.execute(
        """
        SELECT reference, payment_id FROM charges
         WHERE mode = %(mode)s AND reference = coalesce(
               %(charge_reference)s,
               (SELECT charge_reference FROM refunds
                 WHERE mode = %(mode)s AND (provider_id = %(provider_id)s OR id = %(note)s) LIMIT 1),
               (SELECT reference FROM charges WHERE mode = %(mode)s AND provider_id = %(charge_provider_id)s LIMIT 1))
        """,
        {**vars(listed), "mode": mode},
    ).fetchone()
    if charge is None or listed.amount_minor == 0:
        return None
    payment = Payment.of(
        _one(conn, "SELECT * FROM payments WHERE id = %(payment_id)s FOR UPDATE", {"payment_id": charge["payment_id"]})
    )
    known = conn.execute(
        """
        SELECT * FROM refunds
         WHERE charge_reference = %(reference)s
           AND (provider_id = %(provider_id)s OR (provider_id IS NULL AND id = %(ours)s))
         ORDER BY provider_id NULLS LAST LIMIT 1
        """,
        {**charge, "provider_id": listed.provider_id, "ours": ours or listed.note},
    ).fetchone()
    if known is None:
        known = _adopt_refund(conn, mode, charge, listed)
    if known is None:
        return None
    refund = _update_refund(conn, Refund.of(known), listed)
    _note_refund_incidents(conn, Refund.of(known), refund, actor)
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
        SELECT %(id)s, %(reference)s, %(payment_id)s, %(mode)s, %(provider_id)s, %(amount_minor)s, %(currency)s,
               'pending', 'dashboard', 'provider'
         WHERE NOT EXISTS (SELECT FROM refunds WHERE charge_reference = %(reference)s AND status = 'unanswered')
        RETURNING *
        """,
        {**vars(listed), **charge, "id": _random_id("RF"), "mode": mode},
    ).fetchone()


def _update_refund(conn: BoundedConnection, known: Refund, listed: money.Refund) -> Refund:
    """Take over what the provider says. What was processed or has failed stays so, whatever an older answer says, until
    the provider says the other of the two."""
    is_settled = known.status in ("processed", "failed")
    status = listed.status if not is_settled or listed.status in ("processed", "failed") else known.status
    row = _one(
        conn,
        """
        UPDATE refunds
           SET provider_id = %(provider_id)s, amount_minor = %(amount_minor)s, status = %(status)s,
               send_ended_at = CASE WHEN origin = 'paygate' THEN coalesce(send_ended_at, clock_timestamp()) END,
               processed_at = CASE WHEN %(status)s = 'processed' THEN coalesce(processed_at, clock_timestamp())
                                   ELSE processed_at END,
               look_at = CASE WHEN %(status)s NOT IN ('processed', 'failed')
                              THEN coalesce(look_at, clock_timestamp() + interval '1 min') END
         WHERE id = %(id)s
        RETURNING *
        """,
        {"id": known.id, "provider_id": listed.provider_id, "amount_minor": listed.amount_minor, "status": status},
    )
    return Refund.of(row)


def _note_refund_incidents(conn: BoundedConnection, before: Refund, refund: Refund, actor: str) -> None:
    """Open what a person must look at in a refund, and close what has come to its end by it."""
    if before.status in ("refused", "not_made"):
        open_incident(conn, refund.mode, "refund_revived", refund.id, refund.payment_id)
        close_ended(conn, actor, ["refund_not_made"], refund.id)
    if refund.status == "failed":
        open_incident(conn, refund.mode, "refund_failed", refund.id, refund.payment_id)
    if refund.status == "needs-attention":
        open_incident(conn, refund.mode, "refund_needs_attention", refund.id, refund.payment_id)
    if refund.status in ("processed", "failed"):
        close_ended(conn, actor, ["refund_needs_attention", "refund_not_final"], refund.id)
    if refund.status == "processed":
        close_ended(conn, actor, ["refund_failed"], refund.id)
    totals = _one(
        conn,
        """
        SELECT c.amount_minor AS charged,
               coalesce(sum(r.amount_minor) FILTER (WHERE NOT r.status = ANY(%(free)s)), 0) AS spent,
               coalesce(sum(r.amount_minor) FILTER (WHERE r.status = 'processed'), 0) AS given_back
          FROM charges c JOIN refunds r ON r.charge_reference = c.reference
         WHERE c.reference = %(reference)s
         GROUP BY c.reference
        """,
        {"reference": refund.charge_reference, "free": list(FREE_AGAIN)},
    )
    if totals["spent"] > totals["charged"]:
        open_incident(conn, refund.mode, "refunded_too_much", refund.charge_reference, refund.payment_id)
    if totals["given_back"] >= totals["charged"]:
        close_ended(conn, actor, ["second_charge", "mismatch"], refund.charge_reference)


def _follow_refunds(conn: BoundedConnection, payment: Payment, actor: str) -> None:
    """Bring a payment's refunded sum and status in line with the processed refunds of its own charge. The sum may fall,
    when a refund fails after all; the status never does. From review only the whole charge given back leads on."""
    refunded = _one(
        conn,
        """
        SELECT coalesce(sum(amount_minor), 0)::bigint AS minor FROM refunds
         WHERE charge_reference = %(charge_reference)s AND status = 'processed'
        """,
        {"charge_reference": payment.charge_reference},
    )["minor"]
    if refunded == payment.refunded_minor:
        return
    status = payment.status
    if status == "review":
        status = "refunded" if refunded >= payment.charged_minor else status
    elif refunded >= min(payment.amount_minor, payment.charged_minor):
        status = "refunded"
    elif refunded > 0 and status == "completed":
        status = "partially_refunded"
    set_actor(conn, actor, "refund" if refunded > payment.refunded_minor else "refund_failed")
    conn.execute(
        """
        UPDATE payments
           SET refunded_minor = %(refunded_minor)s, status = %(status)s,
               paid_at = CASE WHEN %(status)s = 'review' THEN NULL ELSE coalesce(paid_at, clock_timestamp()) END
         WHERE id = %(id)s
        """,
        {"id": payment.id, "refunded_minor": refunded, "status": status},
    )


def await_refunds(conn: BoundedConnection, payment_id: str, *, is_reversed: bool = False) -> None:
    """Make a payment due for a look at its refunds, and for more until they are listed: the provider spoke of one. The
    event of a refund may be quicker than that of its charge: then the next look finds the charge first.

    `is_reversed`: the whole charge is on its way back; said once for each payment.
    """
    conn.execute(
        """
        UPDATE payments
           SET look_at = now(), refunds_awaited_since = now(), is_reversed = is_reversed OR %(is_reversed)s
         WHERE id = %(id)s AND NOT (is_reversed AND %(is_reversed)s)
        """,
        {"id": payment_id, "is_reversed": is_reversed},
    )


@dataclass(frozen=True)
class RefundDue:
    """A refund to ask the provider about, and its ages by the database's clock."""

    refund: Refund
    charge_provider_id: int | None
    charged_at: datetime
    age_seconds: float
    sent_seconds: float
    """Since our call ended; a call that never came to its end is given two minutes."""

    def may_be(self, listed: money.Refund) -> bool:
        """Whether the provider lists a refund of the same charge, or one with our note."""
        if listed.note == self.refund.id or listed.charge_reference == self.refund.charge_reference:
            return True
        return listed.charge_reference is None and listed.charge_provider_id == self.charge_provider_id


def claim_refunds(database: Database, mode: str, limit: int, lease_seconds: float) -> list[RefundDue]:
    """The refunds most overdue for a look."""
    rows = database.run(
        lambda conn: conn.execute(
            """
            WITH due AS (
                SELECT id FROM refunds WHERE mode = %(mode)s AND look_at <= now()
                 ORDER BY look_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED
            )
            UPDATE refunds r SET look_at = now() + make_interval(secs => %(lease_seconds)s)
              FROM due, charges c
             WHERE r.id = due.id AND c.reference = r.charge_reference
            RETURNING r.*, c.provider_id AS charge_provider_id, least(c.paid_at, c.recorded_at) AS charged_at,
                      extract(epoch FROM now() - r.created_at)::float8 AS age_seconds,
                      extract(epoch FROM now() - coalesce(r.send_ended_at, r.created_at + interval '2 min'))::float8
                          AS sent_seconds
            """,
            {"mode": mode, "limit": limit, "lease_seconds": lease_seconds},
        ).fetchall()
    )
    facts = ("charge_provider_id", "charged_at", "age_seconds", "sent_seconds")
    return [RefundDue(Refund.of(row), *[row[name] for name in facts]) for row in rows]


def finish_refund_look(database: Database, refund: Refund, next_seconds: float | None) -> None:
    """Fix when to look at a refund next; one that is not final when the looks end opens an incident."""

    def work(conn: BoundedConnection) -> None:
        _lock_payment(conn, refund.payment_id)
        row = conn.execute(
            """
            UPDATE refunds SET look_at = now() + make_interval(secs => %(next_seconds)s)
             WHERE id = %(id)s AND status NOT IN ('processed', 'failed', 'refused')
            RETURNING status
            """,
            {"id": refund.id, "next_seconds": next_seconds},
        ).fetchone()
        if row is not None and next_seconds is None and row["status"] != "not_made":
            open_incident(conn, refund.mode, "refund_not_final", refund.id, refund.payment_id)

    database.transaction("worker", "refund", work)


def give_refund_up(database: Database, refund: Refund, listed: Iterable[money.Refund]) -> None:
    """A complete listing, fetched long after our call ended, does not hold this refund: its amount is free again.

    In the same transaction what is listed is recorded, so that nothing that took the amount is overlooked.
    """

    def work(conn: BoundedConnection) -> None:
        _lock_payment(conn, refund.payment_id)
        given_up = conn.execute(
            "UPDATE refunds SET status = 'not_made' WHERE id = %(id)s AND status = 'unanswered'", {"id": refund.id}
        )
        if given_up.rowcount:
            open_incident(conn, refund.mode, "refund_not_made", refund.id, refund.payment_id)
        for each in listed:
            apply_refund(conn, refund.mode, each, "worker")

    database.transaction("worker", "refund", work)


def _lock_payment(conn: BoundedConnection, payment_id: str) -> None:
    """Before its refunds are touched: an incident about one locks the payment too, to number what is told of it."""
    conn.execute("SELECT FROM payments WHERE id = %(id)s FOR UPDATE", {"id": payment_id})


def finish_awaiting(database: Database, payment: Payment, next_seconds: Callable[[float], float | None]) -> None:
    """After a look at a paid payment's refunds: look again while they are awaited (`next_seconds` of the time since),
    or be done. A reversed charge whose refunds do not add up to it by then is a chargeback: an incident."""

    def work(conn: BoundedConnection) -> None:
        row = _one(
            conn,
            """
            SELECT is_reversed, extract(epoch FROM now() - refunds_awaited_since)::float8 AS awaited_seconds,
                   (SELECT sum(amount_minor) FROM refunds r
                     WHERE r.charge_reference = p.charge_reference AND NOT r.status = ANY(%(free)s)) AS refunded_minor
              FROM payments p WHERE id = %(id)s FOR UPDATE
            """,
            {"id": payment.id, "free": list(FREE_AGAIN)},
        )
        adds_up = (row["refunded_minor"] or 0) >= payment.charged_minor
        seconds = None
        if row["awaited_seconds"] is not None and not (row["is_reversed"] and adds_up):
            seconds = next_seconds(row["awaited_seconds"])
            if seconds is None and row["is_reversed"]:
                open_incident(conn, payment.mode, "chargeback", payment.charge_reference or payment.id, payment.id)
        conn.execute(
            """
            UPDATE payments
               SET look_at = now() + make_interval(secs => %(seconds)s),
                   refunds_awaited_since = CASE WHEN %(seconds)s::float8 IS NOT NULL THEN refunds_awaited_since END
             WHERE id = %(id)s
            """,
            {"id": payment.id, "seconds": seconds},
        )

    database.transaction("worker", "refund", work)


# What an operator decides


def accept(database: Database, payment: Payment, operator: str, reason: str) -> None:
    """End a review: the charge counts as the payment. Raises RefundImpossible while a refund of it is open or made."""

    def work(conn: BoundedConnection) -> None:
        charge = lock_refundable(conn, payment.mode, payment.id)
        if charge.payment.status != "review":
            raise RefundImpossible(f"{payment.id} is {charge.payment.status}: there is nothing to accept")
        if charge.spent_minor:
            raise RefundImpossible(f"a refund of {charge.reference} is open or made: it cannot be accepted any more")
        conn.execute(
            """
            UPDATE payments SET status = 'completed', accepted_by = %(operator)s, paid_at = clock_timestamp()
             WHERE id = %(id)s
            """,
            {"id": payment.id, "operator": operator},
        )
        close_ended(conn, operator, ["mismatch"], charge.reference, reason)

    database.transaction(operator, "accepted", work)


def close_incident(database: Database, number: int, operator: str, reason: str) -> bool:
    """False when no open incident has this number."""
    closed = database.run(
        lambda conn: conn.execute(
            """
            UPDATE incidents SET closed_at = clock_timestamp(), closed_by = %(operator)s, close_reason = %(reason)s
             WHERE id = %(number)s AND closed_at IS NULL
            """,
            {"number": number, "operator": operator, "reason": reason},
        )
    )
    return closed.rowcount == 1


# Privacy


class MustBeKept(Exception):
    """The personal data of a payment are still needed; the message says what for."""


def erase(database: Database, payment_id: str, operator: str, *, dry_run: bool = False) -> bool:
    """Overwrite a payment's personal data wherever they are stored; the money facts and the audit trail stay whole.
    False when that has been done before. Raises MustBeKept.

    The answer of its key goes too, and the fingerprint becomes random: the order could be guessed from it.
    """

    def work(conn: BoundedConnection) -> bool:
        conn.execute("SELECT FROM idempotency_keys WHERE payment_id = %(id)s FOR UPDATE", {"id": payment_id})
        payment = _one(conn, "SELECT * FROM payments WHERE id = %(id)s FOR UPDATE", {"id": payment_id})
        if payment["erased_at"] is not None:
            return False
        _refuse_to_erase(conn, payment)
        if not dry_run:
            _erase(conn, payment)
        return True

    return database.transaction(operator, "erased", work)


def _refuse_to_erase(conn: BoundedConnection, payment: dict[str, Any]) -> None:
    row = _one(
        conn,
        """
        SELECT %(expires_at)s > now() - interval '30 days' AS is_recent,
               (SELECT min(id) FROM refunds WHERE payment_id = %(id)s
                   AND status IN ('unanswered', 'pending', 'processing', 'needs-attention')) AS refund_id,
               EXISTS (SELECT FROM provider_events
                        WHERE reference = ANY(%(references)s) AND outcome = 'received') AS is_to_be_applied
        """,
        {**payment, "references": references_of(payment["reference"])},
    )
    if payment["status"] == "pending":
        raise MustBeKept(f"{payment['id']} is pending: it may still be paid")
    if payment["status"] in UNPAID and row["is_recent"]:
        raise MustBeKept(f"{payment['id']} ended unpaid less than 30 days ago: late money may still come")
    if row["refund_id"] is not None:
        raise MustBeKept(f"refund {row['refund_id']} of {payment['id']} is under way")
    if row["is_to_be_applied"]:
        raise MustBeKept(f"an event of {payment['id']} has not been applied yet")


def _erase(conn: BoundedConnection, payment: dict[str, Any]) -> None:
    values = {
        "id": payment["id"],
        "references": references_of(payment["reference"]),
        "fingerprint": secrets.token_bytes(32),
        "set_reason": payment["status"] == "failed",  # what the provider said of the customer; other reasons are ours
    }
    for statement in (
        """
        UPDATE payments
           SET customer_name = 'erased', customer_email = 'erased', customer_phone = 'erased', location = 'erased',
               description = CASE WHEN description IS NOT NULL THEN 'erased' END, metadata = NULL, return_url = NULL,
               status_reason = CASE WHEN %(set_reason)s THEN 'erased' ELSE status_reason END,
               erased_at = clock_timestamp()
         WHERE id = %(id)s
        """,
        """
        UPDATE idempotency_keys
           SET fingerprint = %(fingerprint)s, answer = CASE WHEN answer IS NOT NULL THEN 'erased' END
         WHERE payment_id = %(id)s
        """,
        """
        UPDATE refunds
           SET reason = CASE WHEN reason IS NOT NULL THEN 'erased' END,
               refused_because = CASE WHEN refused_because IS NOT NULL THEN 'erased' END
         WHERE payment_id = %(id)s
        """,
        """
        UPDATE incidents SET close_reason = 'erased' WHERE payment_id = %(id)s AND close_reason IS NOT NULL
        """,
        """
        UPDATE notifications SET facts = facts || '{"status_reason": "erased"}'
         WHERE payment_id = %(id)s AND facts ->> 'status' = 'failed'
        """,
        """
        UPDATE provider_events SET body = 'erased' WHERE reference = ANY(%(references)s) AND body IS NOT NULL
        """,
    ):
        conn.execute(statement, values)


def prune(database: Database, mode: str, older_than_days: float, limit: int) -> int:
    """Remove the bodies of handled events and the delivered notifications that are older, at most `limit` of each; how
    many that were."""
    pruned = database.run(
        lambda conn: _one(
            conn,
            """
            WITH events AS (
                UPDATE provider_events SET body = NULL WHERE id = ANY(ARRAY(
                    SELECT id FROM provider_events
                     WHERE mode = %(mode)s AND body IS NOT NULL AND outcome <> 'received'
                       AND received_at < now() - make_interval(secs => %(seconds)s)
                     ORDER BY received_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED))
                RETURNING 1
            ), gone AS (
                DELETE FROM notifications WHERE id = ANY(ARRAY(
                    SELECT id FROM notifications
                     WHERE mode = %(mode)s AND delivered_at < now() - make_interval(secs => %(seconds)s)
                     ORDER BY delivered_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED))
                RETURNING 1
            )
            SELECT (SELECT count(*) FROM events) + (SELECT count(*) FROM gone) AS count
            """,
            {"mode": mode, "seconds": older_than_days * 86400, "limit": limit},
        )
    )
    return int(pruned["count"])


# Notifications


@dataclass(frozen=True)
class Notification:
    """One thing to tell the merchant, with the payment as it stood when it happened."""

    id: uuid.UUID
    type: str
    sequence: int
    made_at: datetime
    tries: int
    payment: Payment | None
    incident: dict[str, Any] | None


def claim_notification(database: Database, mode: str, lease_seconds: float) -> Notification | None:
    """The notification most overdue, ours alone for a while; its try is counted. A later one of the same payment is not
    due before this one has ended."""

    def work(conn: BoundedConnection) -> Notification | None:
        row = conn.execute(
            """
            WITH due AS (
                SELECT id FROM notifications WHERE mode = %(mode)s AND due_at <= now()
                 ORDER BY due_at LIMIT 1 FOR UPDATE SKIP LOCKED
            )
            UPDATE notifications n SET tries = tries + 1, due_at = now() + make_interval(secs => %(lease_seconds)s)
              FROM due WHERE n.id = due.id
            RETURNING n.*
            """,
            {"mode": mode, "lease_seconds": lease_seconds},
        ).fetchone()
        return _notification(conn, row) if row is not None else None

    return database.run(work)


def _notification(conn: BoundedConnection, row: dict[str, Any]) -> Notification:
    payment = conn.execute("SELECT * FROM payments WHERE id = %(payment_id)s", row).fetchone()
    incident = conn.execute("SELECT id, kind, subject FROM incidents WHERE id = %(incident_id)s", row).fetchone()
    facts = dict(row["facts"])
    if facts["paid_at"] is not None:
        facts["paid_at"] = datetime.fromisoformat(facts["paid_at"])
    return Notification(
        id=row["id"],
        type=row["type"],
        sequence=row["sequence"],
        made_at=row["made_at"],
        tries=row["tries"],
        payment=Payment.of({**payment, **facts}) if payment else None,
        incident=incident,
    )


def finish_notification(
    database: Database, notification: Notification, outcome: str, *, is_delivered: bool, pause_seconds: float | None
) -> None:
    """Store how a try ended: delivered, to be tried again after `pause_seconds`, or dead. When it is over, the next one
    of the payment is due at once."""
    values = {
        "id": notification.id,
        "payment_id": notification.payment.id if notification.payment else None,
        "outcome": outcome,
        "is_delivered": is_delivered,
        "pause_seconds": pause_seconds,
    }

    def work(conn: BoundedConnection) -> None:
        # The lock under which notifications are made: none can be made between the two statements, and wait for ever.
        conn.execute("SELECT FROM payments WHERE id = %(payment_id)s FOR UPDATE", values)
        conn.execute(
            """
            UPDATE notifications
               SET last_outcome = %(outcome)s,
                   due_at = CASE WHEN NOT %(is_delivered)s THEN now() + make_interval(secs => %(pause_seconds)s) END,
                   delivered_at = CASE WHEN %(is_delivered)s THEN clock_timestamp() END,
                   dead_at = CASE WHEN NOT %(is_delivered)s AND %(pause_seconds)s::float8 IS NULL
                                  THEN clock_timestamp() END
             WHERE id = %(id)s AND delivered_at IS NULL
            """,
            values,
        )
        if is_delivered or pause_seconds is None:
            conn.execute(
                """
                UPDATE notifications SET due_at = now()
                 WHERE due_at IS NULL AND id = (
                    SELECT id FROM notifications
                     WHERE payment_id = %(payment_id)s AND delivered_at IS NULL AND dead_at IS NULL
                     ORDER BY sequence LIMIT 1)
                """,
                values,
            )

    database.transaction("worker", "by_hand", work)


def send_again(database: Database, mode: str, payment_id: str | None) -> int:
    """Have the last notification of a payment sent again, or (without one) all dead ones, in their order; how many."""

    def work(conn: BoundedConnection) -> int:
        rows = conn.execute(
            """
            SELECT id, payment_id FROM notifications
             WHERE %(payment_id)s::text IS NULL AND mode = %(mode)s AND dead_at IS NOT NULL
            UNION ALL
            (SELECT id, payment_id FROM notifications WHERE mode = %(mode)s AND payment_id = %(payment_id)s
              ORDER BY sequence DESC LIMIT 1)
            """,
            {"mode": mode, "payment_id": payment_id},
        ).fetchall()
        values = {"ids": [row["id"] for row in rows], "payment_ids": [row["payment_id"] for row in rows]}
        # The lock under which notifications are made and ended.
        conn.execute("SELECT FROM payments WHERE id = ANY(%(payment_ids)s) ORDER BY id FOR UPDATE", values)
        conn.execute(
            """
            UPDATE notifications SET due_at = NULL, tries = 0, delivered_at = NULL, dead_at = NULL
             WHERE id = ANY(%(ids)s)
            """,
            values,
        )
        conn.execute(
            """
            UPDATE notifications SET due_at = now()
             WHERE due_at IS NULL AND id IN (
                SELECT DISTINCT ON (coalesce(payment_id, id::text)) id FROM notifications
                 WHERE (payment_id = ANY(%(payment_ids)s) OR id = ANY(%(ids)s))
                   AND delivered_at IS NULL AND dead_at IS NULL
                 ORDER BY coalesce(payment_id, id::text), sequence)
            """,
            values,
        )
        return len(rows)

    return database.transaction("worker", "by_hand", work)


# Metrics


def metrics(database: Database) -> list[dict[str, Any]]:
    """What there is to watch, as rows of `name`, `mode`, `status` (or null) and `value`."""
    return database.run(
        lambda conn: conn.execute(
            """
            WITH modes (mode) AS (VALUES ('test'), ('live')), today AS (
                SELECT * FROM payment_events WHERE at > now() - interval '1 day'
            )
            SELECT 'paygate_payments' AS name, mode, status, count(*)::float8 AS value
              FROM payments WHERE status IN ('pending', 'review') GROUP BY mode, status
            UNION ALL
            SELECT 'paygate_payments', mode, to_status, count(*)
              FROM today
             WHERE to_status NOT IN ('pending', 'review') AND to_status IS DISTINCT FROM from_status
             GROUP BY mode, to_status
            UNION ALL
            SELECT 'paygate_payments_found_late', mode, NULL,
                   (SELECT count(*) FROM today e JOIN charges c USING (reference)
                     WHERE e.mode = modes.mode AND e.why = 'charge' AND e.actor = 'worker'
                       AND c.recorded_at - c.paid_at > interval '1 min')
              FROM modes
            UNION ALL
            SELECT 'paygate_oldest_due_look_seconds', mode, NULL,
                   coalesce(extract(epoch FROM now() - (SELECT min(look_at) FROM payments p
                                                         WHERE p.mode = modes.mode AND look_at <= now())), 0)
              FROM modes
            UNION ALL
            SELECT 'paygate_oldest_due_notification_seconds', mode, NULL,
                   coalesce(extract(epoch FROM now() - (SELECT min(due_at) FROM notifications n
                                                         WHERE n.mode = modes.mode AND due_at <= now())), 0)
              FROM modes
            UNION ALL
            SELECT 'paygate_notifications_dead', mode, NULL,
                   (SELECT count(*) FROM notifications n WHERE n.mode = modes.mode AND dead_at IS NOT NULL)
              FROM modes
            UNION ALL
            SELECT 'paygate_incidents_open', mode, kind, count(*)
              FROM incidents WHERE closed_at IS NULL GROUP BY mode, kind
            UNION ALL
            SELECT 'paygate_last_answered_look_timestamp_seconds', mode, NULL, extract(epoch FROM done_at)
              FROM jobs WHERE name = 'look' AND done_at IS NOT NULL
             ORDER BY 1, 2, 3
            """
        ).fetchall()
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
            check_search_path(conn)
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
    """The one row that a statement returns. Raises Unavailable where there is none: a failover has lost what was
    written, and whoever tries again with the same key begins anew."""
    row: dict[str, Any] | None = conn.execute(query.encode(), values).fetchone()
    if row is None:
        raise Unavailable("a row that was written is gone")
    return row
