"""How a transaction runs, and the parts that all promises share: payments, ids, incidents, the schema.

Each transaction locks first the key, then the payment, so that no two transactions deadlock.
"""

import base64
import hashlib
import hmac
import logging
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, ClassVar, Concatenate, ParamSpec, Self, TypeVar

import psycopg
import psycopg.rows
from psycopg.pq import TransactionStatus
from psycopg_pool import ConnectionPool, PoolTimeout

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger("paygate")

NO_SCHEMA = "it has no tables yet: run python manage.py migrate"
NEEDED_MIGRATION = 1
"""The oldest schema that this code can use. Migrations only add, so it can use every newer schema too."""

ID_PATTERN = re.compile(r"PAY-[0-9A-HJKMNP-TV-Z]{26}", re.ASCII)
REFERENCE_PATTERN = re.compile(r"(PG-[0-9A-HJKMNP-TV-Z]{26})(?:-([2-9]))?", re.ASCII)
CROCKFORD = bytes.maketrans(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", b"0123456789ABCDEFGHJKMNPQRSTVWXYZ")
LAST_ATTEMPT = 9

PAID = ("completed", "partially_refunded", "refunded")
UNPAID = ("pending", "failed", "expired")


class DatabaseUnavailable(Exception):
    """The database is away, busy or no longer the primary. The write may have happened or not: try again."""


class Impossible(Exception):
    """What is asked for contradicts what is stored. The message is for the operator."""


class KeyReused(Exception):
    """This idempotency key came before with another request."""


class BoundedConnection(psycopg.Connection[Any]):
    """A connection on which nothing waits past `deadline` (monotonic), whatever happens to the server.

    With a frozen server, or a dead host behind a live switch, a plain connection hangs for ever: `statement_timeout`,
    keepalives and `tcp_user_timeout` do not end that wait. A connection that timed out is useless, and is closed.
    """

    deadline: float | None = None
    patience_seconds: float = 5
    """How long a single wait may take without a deadline."""
    failure: ClassVar[str] = ""
    """The last logged reason why this process could not connect; empty after a connection."""

    @classmethod
    def note(cls, failure: str) -> None:
        """Log why there is no connection: once, and again when the reason changes."""
        if failure not in ("", cls.failure):
            logger.error("database_away", extra={"outcome": failure})
        cls.failure = failure

    @classmethod
    def connect(cls, conninfo: str = "", **kwargs: Any) -> Self:
        try:
            return cls._connect_to_primary(conninfo, **kwargs)
        except psycopg.Error as error:
            cls.note(cause_of(error))
            raise

    @classmethod
    def _connect_to_primary(cls, conninfo: str, **kwargs: Any) -> Self:
        """Connect, and ask a server that seems to be a standby whether it is a standby.

        pgbouncer tells every client the state that its own first connection saw. If that connection was made while the
        server was being promoted, pgbouncer reports a standby for ever after, and libpq, which looks for a primary,
        believes it: https://github.com/pgbouncer/pgbouncer/issues/859
        """
        try:
            return super().connect(conninfo, **kwargs)
        except psycopg.OperationalError as error:
            if kwargs.get("target_session_attrs") != "read-write" or "session is read-only" not in str(error):
                raise
            conn = super().connect(conninfo, **{**kwargs, "target_session_attrs": "any"})
            with suppress(psycopg.Error):
                if conn.execute("SELECT WHERE current_setting('transaction_read_only') = 'on'").fetchone() is None:
                    return conn
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

    def forget_prepared(self, error: psycopg.Error) -> None:
        """Clean up after an error. If a statement's first use fails, psycopg forgets it and the server keeps it: 77 kB
        for each order that a full disk refuses. If the server does not know a prepared statement, another server
        prepared it: there is a pooler, and this connection prepares no more statements."""
        if error.sqlstate in ("26000", "42P05"):
            self.prepare_threshold = None
        elif self.prepare_threshold is not None and self.info.transaction_status == TransactionStatus.IDLE:
            with suppress(psycopg.Error):
                self.execute("DEALLOCATE ALL")


class Frozen(psycopg.OperationalError):
    """The server did not answer in time."""


RETRIED = ("25006", "25P03", "25P04", "26000", "42P05")
"""Not the primary any more; a transaction that the server ended, as for a process that starved; a statement prepared
elsewhere, which the server lacks or has twice."""
SILENT = (PoolTimeout, Frozen, psycopg.errors.QueryCanceled)
"""The errors of a database that does not answer in time."""
IMPATIENT_SECONDS = 1.5


class Database:
    """The pool of connections to one database, and how a transaction runs on it.

    `notifies`: changes make notifications to the merchant.
    """

    def __init__(self, url: str, pool_size: int, *, notifies: bool = False) -> None:
        self.notifies = notifies
        self.pool: ConnectionPool[BoundedConnection] = ConnectionPool(
            url,
            connection_class=BoundedConnection,
            kwargs=connection_defaults(url),
            configure=configure,
            min_size=1,
            max_size=pool_size,
            open=False,
            # For so long the pool replaces a lost connection in the background, with growing pauses. After that the
            # next request that needs the connection tries at once.
            reconnect_timeout=2,
        )
        self.generation = 0
        self.lock = threading.Lock()
        self.is_silent = False
        """Whether the last call to the database got no answer."""
        self.patient = threading.BoundedSemaphore(pool_size)
        self._secret: bytes | None = None

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Start to connect, and do not wait: without its database the service still starts, and says so in /readyz."""
        self.pool.open(wait=False)

    def close(self) -> None:
        self.pool.close(timeout=2)

    def run(self, work: Callable[[BoundedConnection], T], within_seconds: float = 5) -> T:
        """The result of `work`. `work` must be safe to run again, because its commit's reply may be lost. Raises
        DatabaseUnavailable.

        No connection is checked before its use: a check would cost each request a round trip, and would turn a restart
        of the database into time-outs. Instead, the first error on a dead connection drains the pool once, and the work
        runs again on a new connection.

        While the database does not answer, only as many threads as there are connections wait for it. The others give
        up after IMPATIENT_SECONDS; once its silence is known, at once. Else all threads would soon wait here, and none
        could say that the process lives.
        """
        is_patient = self.patient.acquire(blocking=False)
        try:
            if self.is_silent and not is_patient:
                raise DatabaseUnavailable("silent")
            return self._run(work, within_seconds, within_seconds if is_patient else IMPATIENT_SECONDS)
        finally:
            if is_patient:
                self.patient.release()

    def _run(self, work: Callable[[BoundedConnection], T], within_seconds: float, patience_seconds: float) -> T:
        """`patience_seconds`: how long to wait for a connection at most."""
        deadline = time.monotonic() + within_seconds
        for retry in (True, False):
            generation = self.generation
            try:
                # Not `with pool.connection()`: it would commit once more, and that costs a seventh of a GET.
                conn = self.pool.getconn(timeout=min(patience_seconds, deadline - time.monotonic()))
                try:
                    conn.deadline = deadline
                    result = work(conn)
                except psycopg.Error as error:
                    conn.forget_prepared(error)
                    raise
                finally:
                    self.pool.putconn(conn)
            except (psycopg.errors.UndefinedTable, psycopg.errors.InsufficientPrivilege) as error:
                is_empty = isinstance(error, psycopg.errors.UndefinedTable)
                raise DatabaseUnavailable(NO_SCHEMA if is_empty else cause_of(error)) from error
            except psycopg.Error as error:
                if not _is_gone(error):
                    raise
                self.is_silent = self.is_silent or isinstance(error, SILENT)
                if not retry or not _is_worth_a_retry(error):
                    raise DatabaseUnavailable(type(error).__name__) from error
                if error.sqlstate not in ("40001", "40P01", "26000", "42P05"):
                    self._drain(generation)
            else:
                self.is_silent = False
                return result
        raise AssertionError("the second try returns or raises")

    def rows(self, query: str, values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """The rows of one statement, which must be safe to run again. Raises DatabaseUnavailable."""

        def work(conn: BoundedConnection) -> list[dict[str, Any]]:
            cursor = conn.execute(query.encode(), values)
            return [] if cursor.description is None else cursor.fetchall()

        return self.run(work)

    def only_row(self, query: str, values: dict[str, Any] | None = None) -> dict[str, Any]:
        return self.run(lambda conn: only_row(conn, query, values))

    def transaction(self, work: Callable[Concatenate[BoundedConnection, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Like `run`, in one transaction: the result of `work`, called with the connection and these arguments. Each
        change that the trail records names who makes it and why."""

        def in_transaction(conn: BoundedConnection) -> T:
            conn.execute("BEGIN")
            try:
                if self.notifies:
                    conn.execute("SELECT set_config('paygate.notify', 'on', true)")
                result = work(conn, *args, **kwargs)
            except BaseException:
                if conn.info.transaction_status != TransactionStatus.UNKNOWN:  # the connection lives
                    conn.rollback()
                raise
            # Not `with conn.transaction()`: it takes any answer to its COMMIT for a commit, also ROLLBACK.
            if conn.execute("COMMIT").statusmessage != "COMMIT":
                raise psycopg.InternalError("an error was overlooked: nothing was written")
            return result

        return self.run(in_transaction)

    def secret(self) -> bytes:
        """The random secret that `migrate` made. Ids and references are derived from it, and it never changes."""
        if self._secret is None:
            self._secret = self.only_row("SELECT value FROM secrets")["value"]
        return self._secret

    def _drain(self, generation: int) -> None:
        """Close the idle connections, unless another thread has done so since: its new connections are good."""
        with self.lock:
            if generation == self.generation:
                self.generation += 1
                self.pool.drain()


def connection_defaults(url: str) -> dict[str, Any]:
    """The parameters of every connection to `url`, unless the URL itself sets them."""
    given = psycopg.conninfo.conninfo_to_dict(url)
    defaults = {
        "autocommit": True,
        "prepare_threshold": None,  # unless `configure` finds that it may be
        # Finds the primary among several hosts, and writes to no demoted primary.
        "target_session_attrs": "read-write",
        "connect_timeout": 4,
        "client_encoding": "utf8",
        "application_name": "paygate",
    }
    return {name: value for name, value in defaults.items() if name not in given}


def cause_of(error: psycopg.Error) -> str:
    """The error in one line, for the log and the operator: the words of libpq and the server hold no password."""
    words = " ".join(str(error).partition("\n")[0].split()) or type(error).__name__
    return f"{words} (SQLSTATE {error.sqlstate})" if error.sqlstate else words


def check_session(conn: psycopg.Connection[Any]) -> None:
    """Raises DatabaseUnavailable if the database cannot hold every name (LATIN1 and the like), or if the search_path of
    the URL's `options` is not in force.

    A pooler may ignore the options (pgbouncer with `ignore_startup_parameters = options` does so silently). Then one
    business would see another business's payments."""
    if (encoding := conn.info.parameter_status("server_encoding")) != "UTF8":
        message = f"its encoding is {encoding}: make one with CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
        raise DatabaseUnavailable(message)
    named = re.findall(r"(?i)search[_-]path=((?:\\.|\S)+)", conn.info.options)
    if named:
        in_force = str(conn.cursor(row_factory=psycopg.rows.scalar_row).execute("SHOW search_path").fetchone())
        if _plain(in_force) != _plain(named[-1]):
            message = f"its search_path is {in_force}, not {named[-1]} as in the URL: a pooler ignores options"
            raise DatabaseUnavailable(message)


def _plain(search_path: str) -> str:
    """Without spaces, quotes and backslashes: two equal paths may differ in these."""
    return re.sub(r'[\s"\\]', "", search_path)


def configure(conn: BoundedConnection) -> None:
    """Check a new connection, and set the defaults that our statements need."""
    try:
        check_session(conn)
        _set_defaults(conn)
    except (DatabaseUnavailable, psycopg.Error) as error:
        conn.note(str(error) if isinstance(error, DatabaseUnavailable) else cause_of(error))
        raise
    conn.note("")


def _set_defaults(conn: BoundedConnection) -> None:
    """Set our defaults, whatever the role's defaults are: the isolation level that our statements need, and a time-out
    on the server a little before ours, so that it stops work for a request that has given up.

    Statements with `prepare=True` are prepared only if the server process that took the connection also answers it.
    That saves a quarter of the database's work for a payment. Behind a pooler another process may answer each
    transaction: it may not know the statement, or know another statement by that name. Most poolers give out their own
    process numbers, because they need them to cancel requests
    (https://www.postgresql.org/docs/current/protocol-flow.html, "Canceling Requests in Progress"). pgagroal passes on
    the server's numbers, and is noticed by the first error: see forget_prepared.
    """
    conn.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
    conn.row_factory = psycopg.rows.dict_row
    server = only_row(
        conn,
        """
        SELECT set_config('default_transaction_isolation', 'read committed', false),
               set_config('synchronous_commit', CASE current_setting('synchronous_commit') WHEN 'off' THEN 'on'
                          ELSE current_setting('synchronous_commit') END, false),
               set_config('statement_timeout', '4500ms', false),
               set_config('idle_in_transaction_session_timeout', '10s', false),
               -- How we read times and numbers.
               set_config('TimeZone', 'UTC', false), set_config('DateStyle', 'ISO', false),
               set_config('extra_float_digits', '1', false),
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
"""A threshold so high that psycopg prepares only marked statements. Marked statements find their rows by a unique key,
so their plan stays right while the tables grow. They name their columns, so a migration's new column changes
nothing."""


def _is_gone(error: psycopg.Error) -> bool:
    """Whether the server is away, or RETRIED. pgbouncer reports a crashed server by errors without an sqlstate."""
    is_internal = isinstance(error, psycopg.InternalError) and error.sqlstate is None
    return isinstance(error, psycopg.OperationalError) or error.sqlstate in RETRIED or is_internal


def _is_worth_a_retry(error: psycopg.Error) -> bool:
    """Whether the connection is dead, its server no longer the primary, or the transaction lost to another one."""
    if error.sqlstate is None:
        return not isinstance(error, PoolTimeout | Frozen)
    return error.sqlstate.startswith(("08", "57P0", "40")) or error.sqlstate in RETRIED


def only_row(conn: psycopg.Connection[Any], query: str, values: dict[str, Any] | None = None) -> dict[str, Any]:
    """The one row that a statement returns. Raises DatabaseUnavailable if there is no row: then a failover has lost it,
    and a client that tries again with the same key begins anew."""
    row: dict[str, Any] | None = conn.execute(query.encode(), values).fetchone()
    if row is None:
        raise DatabaseUnavailable("a row that was written is gone")
    return row


@dataclass(frozen=True)
class Payment:
    id: str
    mode: str
    status: str
    status_reason: str | None
    amount_minor: int
    currency: str
    reference: str
    """The first reference; `current_reference` is the reference of the charge or of the latest attempt."""
    attempt: int
    checkout_url: str | None
    charge_reference: str | None
    charged_minor: int
    charged_currency: str | None
    """The currency of its charge, and so of its refunds."""
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
    cancelled_at: datetime | None

    @classmethod
    def of(cls, row: dict[str, Any]) -> Self:
        """The payment in a row that has its columns, and maybe other columns."""
        return cls(*[row[name] for name in PAYMENT_COLUMNS])

    @property
    def current_reference(self) -> str:
        return self.charge_reference or reference_of_attempt(self.reference, self.attempt)

    @property
    def open_checkout_url(self) -> str | None:
        """The URL where the customer can pay; None unless the payment is pending and not cancelled."""
        return self.checkout_url if self.status == "pending" and self.cancelled_at is None else None

    @property
    def is_paid(self) -> bool:
        return self.status in PAID

    @property
    def refunded_currency(self) -> str:
        return self.charged_currency or self.currency

    @property
    def due_back_minor(self) -> int:
        """The sum that makes it wholly refunded: its price, or its charge if that is less or in another currency."""
        is_of_price = self.refunded_currency == self.currency
        return min(self.amount_minor, self.charged_minor) if is_of_price else self.charged_minor


PAYMENT_COLUMNS = tuple(each.name for each in fields(Payment))


def reference_of_attempt(reference: str, attempt: int) -> str:
    return reference if attempt == 1 else f"{reference}-{attempt}"


def references_of(reference: str) -> list[str]:
    """All nine references that a payment may have."""
    return [reference_of_attempt(reference, attempt) for attempt in range(1, LAST_ATTEMPT + 1)]


def base_of(reference: str | None) -> str | None:
    """The first reference of the payment with this reference; None if the reference is not ours."""
    ours = REFERENCE_PATTERN.fullmatch(reference or "")
    return ours[1] if ours else None


def derived_name(prefix: str, secret: bytes, mode: str, key: bytes) -> str:
    """`PAY-…`, `PG-…` or `RF-…`: 130 bits as Crockford base32. Equal keys give equal names, so a retry after rows were
    lost meets its old transaction. Each prefix and mode has its own names."""
    digest = hmac.new(secret, b"\0".join([prefix.encode(), mode.encode(), key]), hashlib.sha256).digest()
    return f"{prefix}-{base64.b32encode(digest[:20]).translate(CROCKFORD)[:26].decode()}"


def payment_id_of(database: Database, mode: str, key: bytes) -> str:
    """The id that the payment of `key` has, or will have."""
    return derived_name("PAY", database.secret(), mode, key)


def find_payment(database: Database, payment_id: str) -> Payment | None:
    """The payment with this id; None if the id is unknown or is no id."""
    if not ID_PATTERN.fullmatch(payment_id):
        return None
    return database.run(lambda conn: read_payment(conn, FIND_PAYMENT, {"id": payment_id}))


FIND_PAYMENT = f"SELECT {', '.join(PAYMENT_COLUMNS)} FROM payments WHERE id = %(id)s".encode()  # noqa: S608  # ours


def read_payment(conn: BoundedConnection, query: bytes, values: dict[str, Any]) -> Payment | None:
    """The payment in the row of a prepared statement that returns PAYMENT_COLUMNS; None without a row. Most requests
    run it: no dict is made between the row and the payment."""
    return conn.cursor(row_factory=MAKE_PAYMENT).execute(query, values, prepare=True).fetchone()


MAKE_PAYMENT = psycopg.rows.args_row(Payment)


# Incidents: things that a person must look at


def open_incident(
    conn: BoundedConnection, mode: str, kind: str, subject: str, payment_id: str | None = None, *, cause: str = ""
) -> None:
    """Open an incident, once for each subject and cause. A message that comes again opens no incident, even if the
    incident was closed. If the thing itself happens again: see `reopen_incidents`."""
    conn.execute(
        """
        INSERT INTO incidents (mode, kind, subject, cause, payment_id)
        SELECT %(mode)s, %(kind)s, %(subject)s, %(cause)s, %(payment_id)s
         WHERE NOT EXISTS (SELECT FROM incidents
                            WHERE kind = %(kind)s AND subject = %(subject)s AND cause = %(cause)s)
        ON CONFLICT DO NOTHING
        """,
        {"mode": mode, "kind": kind, "subject": subject, "payment_id": payment_id, "cause": cause},
    )


def reopen_incidents(conn: BoundedConnection, kinds: list[str], subject: str) -> None:
    """Open closed incidents again, because they happened again or their reason came back."""
    conn.execute(
        """
        INSERT INTO incidents (mode, kind, subject, cause, payment_id)
        SELECT DISTINCT mode, kind, subject, cause, payment_id FROM incidents
         WHERE subject = %(subject)s AND kind = ANY(%(kinds)s)
        ON CONFLICT DO NOTHING
        """,
        {"kinds": kinds, "subject": subject},
    )


def close_ended(
    conn: BoundedConnection, actor: str, subject: str, *kinds: str, reason: str | None = None, cause: str | None = None
) -> None:
    """Close the open incidents of these kinds about `subject` (and with this `cause`), because their reason is gone."""
    conn.execute(
        """
        UPDATE incidents SET closed_at = clock_timestamp(), closed_by = %(actor)s, close_reason = %(reason)s
         WHERE subject = %(subject)s AND kind = ANY(%(kinds)s) AND closed_at IS NULL
           AND cause = coalesce(%(cause)s, cause)
        """,
        {"actor": actor, "kinds": list(kinds), "subject": subject, "reason": reason, "cause": cause},
    )


def close_incident(conn: BoundedConnection, number: int, operator: str, reason: str) -> bool:
    """Close an incident; False if no open incident has this number. An equal close within the last minute
    counts as this call, whose reply was lost."""
    values = {"number": number, "operator": operator, "reason": reason}
    # The payment's lock comes first, as everywhere: the change writes the operator into the payment's trail.
    conn.execute(
        """
        SELECT FROM payments
         WHERE id = (SELECT payment_id FROM incidents WHERE id = %(number)s) AND changed_by(%(operator)s, 'noted')
           FOR UPDATE
        """,
        values,
    )
    closed = conn.execute(
        """
        UPDATE incidents SET closed_at = clock_timestamp(), closed_by = %(operator)s, close_reason = %(reason)s
         WHERE id = %(number)s
           AND (closed_at IS NULL OR closed_by = %(operator)s AND close_reason = %(reason)s
                                     AND closed_at > clock_timestamp() - interval '1 min')
        """,
        values,
    )
    return closed.rowcount == 1


def is_ready(database: Database) -> bool:
    """Whether the database can be written and its schema serves this code, within 1.5 s. Raises DatabaseUnavailable."""
    query = """
        SELECT NOT pg_is_in_recovery() AND current_setting('transaction_read_only') = 'off' AS writable,
               (SELECT max(number) FROM migrations) AS migration
        """
    row = database.run(lambda conn: only_row(conn, query), within_seconds=1.5)
    return bool(row["writable"]) and (row["migration"] or 0) >= NEEDED_MIGRATION
