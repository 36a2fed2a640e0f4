"""The background loops: they complete a payment when its webhook never comes.

They run as threads of each web process, or alone (`manage.py worker`). Leases in the database keep two loops from the
same task, so any number of them may run.
"""

import copy
import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import charges
import db
import money
import paystack
import refunds
from db import BoundedConnection, Database, DatabaseUnavailable, Payment
from refunds import DAY, HOUR, MINUTE
from settings import Settings
from web import outbox

logger = logging.getLogger("paygate")

BATCH = 20
POLLERS = 4
"""Polls at once. If an answer takes 0.4 s, that is ten calls a second: the pace's limit."""

POLLS_PER_SECOND = 10
"""For all loops of a process, so no flood follows a long outage: two processes poll 100,000 payments in 83 minutes."""

PRUNING_BATCH, PRUNING_PAUSE_SECONDS = 250, 0.05

LISTED_DAYS = 4

AWAY = (db.DatabaseUnavailable, paystack.Unavailable, paystack.Misconfigured)


class Worker:
    """The loops and the threads that they run in."""

    def __init__(self, settings: Settings, database: db.Database, gateway: paystack.Gateway) -> None:
        self.interval_seconds = settings.worker_interval_seconds
        self.retention_days = settings.retention_days
        self.database = database
        self.pace = paystack.Pace(POLLS_PER_SECOND)
        self.gateway = copy.copy(gateway)
        self.gateway.pace = self.pace
        self.notifier = outbox.Notifier(settings.notify_url, settings.notify_secrets) if settings.notify_url else None
        self.stopping = threading.Event()
        self.turns = itertools.cycle(TURNS)
        self.loops: tuple[Callable[[], float], ...] = (
            *[self.poll] * POLLERS,
            self.poll_refunds,
            self.apply_events,
            self.apply_lists,
            self.prune,
            # A receiver that hangs on one payment's notification must not delay the others.
            *[self.notify] * (4 if self.notifier else 0),
        )
        self.threads = [
            threading.Thread(target=self.repeat, args=(loop,), name=loop.__name__, daemon=True) for loop in self.loops
        ]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def stop(self, within_seconds: float = 5) -> None:
        """Ask the loops to end, and wait for them; not longer, even if a call to the provider is under way."""
        self.stopping.set()
        deadline = time.monotonic() + within_seconds
        for thread in self.threads:
            thread.join(max(0, deadline - time.monotonic()))

    def run_once(self) -> list[str]:
        """Do all that is due, and return a line for each loop that failed, or whose last call to the provider did. A
        failed loop stops no other loop."""
        failed = []
        # Each loop once: a second poller would wait for as long as the provider has asked for quiet.
        for loop in dict.fromkeys(self.loops):
            self.gateway.failure = ""
            try:
                while loop() == 0 and not self.stopping.is_set():
                    pass
                if self.gateway.failure:
                    raise paystack.Unavailable(self.gateway.failure)
            except AWAY as error:
                failed.append(f"{loop.__name__}: {str(error) or 'misconfigured'}")
            except Exception as error:  # the outermost loop, as in `repeat`
                logger.error(f"worker_{loop.__name__}", exc_info=error)
                failed.append(f"{loop.__name__}: {type(error).__name__}")
        return failed

    def repeat(self, loop: Callable[[], float]) -> None:
        """Run `loop` until we stop, with the pauses that it asks for. Errors are logged, and the loop tries again."""
        while not self.stopping.is_set():
            try:
                pause_seconds = loop()
            except AWAY as error:
                logger.info(f"worker_{loop.__name__}", extra={"outcome": str(error) or "misconfigured"})
                asked_seconds = self.pace.quiet_seconds() if isinstance(error, paystack.Unavailable) else 0
                pause_seconds = asked_seconds or self.interval_seconds
            except Exception as error:  # the outermost loop: a bug in one round must not end the polling
                logger.error(f"worker_{loop.__name__}", exc_info=error)
                pause_seconds = max(self.interval_seconds, 1)
            self.stopping.wait(pause_seconds)

    def poll(self) -> float:
        """Poll a due payment; how many seconds to pause before the next poll."""
        if seconds := self.pace.quiet_seconds():
            return seconds
        return 0 if poll_next(self.database, self.gateway, next(self.turns)) else self.interval_seconds

    def apply_events(self) -> float:
        """Apply a batch of events that could not be applied before."""
        applied = charges.apply_due_events(self.database, self.gateway, BATCH)
        return 0 if applied == BATCH else self.interval_seconds

    def notify(self) -> float:
        """Deliver one notification that is due."""
        if self.notifier is not None and self.notifier.deliver_next(self.database, self.gateway.mode):
            return 0
        return self.interval_seconds

    def poll_refunds(self) -> float:
        """Poll a batch of due refunds."""
        if seconds := self.pace.quiet_seconds():
            return seconds
        polled = refunds.poll_due(self.database, self.gateway, BATCH)
        return 0 if polled == BATCH else self.interval_seconds

    def apply_lists(self) -> float:
        """Look for our charges and refunds in the provider's lists."""
        return self.pace.quiet_seconds() or self.daily("apply_lists", lambda: apply_lists(self.database, self.gateway))

    def prune(self) -> float:
        """After RETENTION_DAYS empty handled events and remove delivered notifications, batch by batch."""
        return self.daily("prune", self.prune_all)

    def prune_all(self) -> int:
        """How many rows were pruned. The pauses are for the requests: without pauses, a backlog made
        them 1.5 times as slow."""
        total = pruned = prune(self.database, self.retention_days, PRUNING_BATCH)
        while pruned >= PRUNING_BATCH and not self.stopping.wait(PRUNING_PAUSE_SECONDS):
            total += (pruned := prune(self.database, self.retention_days, PRUNING_BATCH))
        return total

    def daily(self, name: str, work: Callable[[], int]) -> float:
        """Do `work` once a day, in one process only; if it fails, again after an hour."""
        job = (name, self.gateway.mode)
        if claim_job(self.database, *job, HOUR):
            done = work()
            finish_job(self.database, *job, DAY)
            logger.info(name, extra={"outcome": done})
        return max(self.interval_seconds, 60)


def prune(database: db.Database, older_than_days: float, limit: int) -> int:
    """Remove older bodies of handled events and older delivered notifications, in both modes, at most `limit` of each;
    how many were removed."""
    pruned = database.only_row(
        """
        WITH events AS (
            UPDATE provider_events SET body = NULL WHERE id = ANY(ARRAY(
                SELECT id FROM provider_events
                 WHERE body IS NOT NULL AND outcome <> 'received'
                   AND received_at < now() - make_interval(secs => %(seconds)s)
                 ORDER BY received_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED))
            RETURNING 1
        ), gone AS (
            DELETE FROM notifications WHERE id = ANY(ARRAY(
                SELECT id FROM notifications
                 WHERE delivered_at < now() - make_interval(secs => %(seconds)s)
                 ORDER BY delivered_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED))
            RETURNING payment_id
        ), noted AS (
            UPDATE payments SET pruned = pruned + gone.count
              FROM (SELECT payment_id, count(*) FROM gone GROUP BY payment_id) AS gone WHERE id = payment_id
        )
        SELECT (SELECT count(*) FROM events) + (SELECT count(*) FROM gone) AS count
        """,
        {"seconds": older_than_days * 86400, "limit": limit},
    )
    return int(pruned["count"])


# Jobs that one process does for all


def claim_job(database: Database, name: str, mode: str, lease_seconds: float) -> bool:
    """Lease a job for `lease_seconds`, if it is due; whether it is ours."""
    claimed = database.rows(
        """
        INSERT INTO jobs (mode, name, due_at)
        VALUES (%(mode)s, %(name)s, now() + make_interval(secs => %(lease_seconds)s))
        ON CONFLICT (mode, name) DO UPDATE SET due_at = excluded.due_at WHERE jobs.due_at <= now()
        RETURNING true
        """,
        {"mode": mode, "name": name, "lease_seconds": lease_seconds},
    )
    return bool(claimed)


def days_since_job(database: Database, name: str, mode: str) -> float:
    """How many days ago a job was last done. If it was never done: the age of the first payment."""
    row = database.only_row(
        """
        SELECT extract(epoch FROM now() - coalesce(
                   (SELECT done_at FROM jobs WHERE mode = %(mode)s AND name = %(name)s),
                   (SELECT created_at FROM payments WHERE mode = %(mode)s ORDER BY created_at LIMIT 1),
                   now()))::float8 / 86400 AS days
        """,
        {"mode": mode, "name": name},
    )
    return float(row["days"])


def finish_job(database: Database, name: str, mode: str, next_seconds: float | None) -> None:
    """Note that a job was done just now, and when it is due next (None: never; only the time is kept)."""
    database.rows(
        """
        INSERT INTO jobs (mode, name, due_at, done_at)
        VALUES (%(mode)s, %(name)s, now() + make_interval(secs => %(next_seconds)s), now())
        ON CONFLICT (mode, name) DO UPDATE SET due_at = excluded.due_at, done_at = excluded.done_at
        """,
        {"mode": mode, "name": name, "next_seconds": next_seconds},
    )


# Polling payments


POLLS_SECONDS = (5, 10, 20, 40, MINUTE, 2 * MINUTE, 5 * MINUTE, 10 * MINUTE)
"""When an unpaid payment is polled, counted from its reservation; then every 30 minutes until its time ends."""


@dataclass(frozen=True)
class Due:
    """A payment to poll, as it was read at `asked_at`, by the database's clock."""

    payment: Payment
    is_opened: bool
    """Whether the current reference is known to exist at the provider."""
    refunds_awaited_since: datetime | None
    """When the provider spoke of refunds that it has not listed yet."""
    asked_at: datetime

    @classmethod
    def of(cls, row: dict[str, Any]) -> "Due":
        return cls(Payment.of(row), row["is_opened"], row["refunds_awaited_since"], row["asked_at"])


def poll_next(database: Database, gateway: paystack.Gateway, turn: tuple[str, ...]) -> bool:
    """Poll the first due payment that an order in `turn` (of TURNS) finds; False if no payment is due. One payment at a
    time, so that no lease runs out meanwhile.
    """
    lease_seconds = db.LAST_ATTEMPT * gateway.timeout_seconds + MINUTE
    found = (claim_due(database, gateway.mode, lease_seconds, order) for order in turn)
    due = next(filter(None, found), None)
    if due is None:
        return False
    try:
        poll(database, gateway, due)
    except paystack.Misconfigured:
        logger.error("provider_refuses_us", extra={"payment": due.payment.id})
    except paystack.Unavailable:
        pass  # its lease ends soon; if the provider asked us to wait, `Pace` makes all loops wait
    except DatabaseUnavailable:
        raise
    except Exception as error:  # a payment that cannot be polled must not delay the others
        logger.error("poll_failed", exc_info=error, extra={"payment": due.payment.id})
    return True


def poll(database: Database, gateway: paystack.Gateway, due: Due) -> None:
    """Ask the provider about a payment, and store the answer. Raises paystack.Unavailable, Misconfigured."""
    outcome = verify_references(database, gateway, due)
    if due.payment.charge_reference is not None and due.refunds_awaited_since is not None:
        charges.import_refunds(database, gateway, due.payment, due.asked_at)
    elif due.payment.charge_reference is not None:
        charges.finish_poll_of_paid(database, due.payment, due.asked_at, is_answered=outcome != "no_answer")


def verify_references(database: Database, gateway: paystack.Gateway, due: Due) -> str:
    """Verify each reference up to a payment's current reference; `paid`, `unpaid` or `no_answer`.

    Raises paystack.Unavailable if the provider asks us to wait: a paid payment keeps its lease then, and is soon due.
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
            if unknown.retry_after_seconds is not None:
                wait = unknown
                break
            continue
        except paystack.Misconfigured:
            logger.error("provider_refuses_us", extra={"reference": reference})
            is_answered = False
            continue
        match verdict:
            case money.Charge() as charge:
                database.transaction(charges.apply_charge, charge, "worker")
                is_paid = True
            case paystack.Unpaid(declined=reason):
                declined = reason or declined
            case paystack.NotFound():
                # "Not found" is no answer for a reference that was opened: its transaction exists.
                is_answered = is_answered and attempt == payment.attempt and not due.is_opened
            case paystack.UnderWay():
                is_answered = False
    outcome = "paid" if is_paid else "unpaid" if is_answered else "no_answer"
    if outcome != "no_answer":
        finish_job(database, "poll", gateway.mode, None)
    ms = round((time.monotonic() - started) * 1000, 1)
    logger.info("polled", extra={"payment": payment.id, "outcome": outcome, "ms": ms})
    if not is_paid:
        age_seconds = (due.asked_at - payment.created_at).total_seconds()
        over_seconds = (due.asked_at - payment.expires_at).total_seconds()
        ends = is_answered and payment.status == "pending" and over_seconds >= 0
        database.transaction(
            finish_poll,
            payment,
            next_seconds=next_poll_seconds(age_seconds, over_seconds, "expired" if ends else payment.status),
            ends=ends,
            declined=f"last try declined: {declined}" if declined else None,
        )
    if wait is not None:
        raise wait
    return outcome


def next_poll_seconds(age_seconds: float, over_seconds: float, status: str) -> float | None:
    """In how many seconds to poll an unpaid payment of this age, `over_seconds` after its time ended (negative before).

    None a year after its time ended, unless it is still pending. The age alone decides, so a poll that somebody asked
    for changes nothing.
    """
    if status != "pending" and over_seconds >= 365 * DAY:
        return None
    if over_seconds >= 30 * DAY:
        return _until_next(over_seconds - 30 * DAY, 7 * DAY)
    if status != "pending" or over_seconds >= DAY:
        return _until_next(over_seconds, DAY)
    if over_seconds >= 0:
        return _until_next(over_seconds, 30 * MINUTE)
    next_age = next((age for age in POLLS_SECONDS if age > age_seconds), None)
    regular = _until_next(age_seconds - POLLS_SECONDS[-1], 30 * MINUTE) if next_age is None else next_age - age_seconds
    return min(regular, -over_seconds)


def _until_next(seconds: float, every_seconds: float) -> float:
    """How long until the next whole multiple of `every_seconds`."""
    return every_seconds - seconds % every_seconds


# A payment whose key was lost may have been opened.
DUE_COLUMNS = "p.*, coalesce(k.reference_exists, true) AS is_opened, now() AS asked_at"


# now() and not clock_timestamp(): an index serves a comparison only with a stable value.
ORDERS = {
    "wanted": "p.wanted_at IS NOT NULL AND p.charge_reference IS NULL ORDER BY p.wanted_at",
    "newest": "p.poll_at <= now() ORDER BY p.poll_at DESC",
    "oldest": "p.poll_at <= now() ORDER BY p.poll_at",
}


TURNS = (("wanted", "newest"), ("newest", "wanted"), ("wanted", "newest"), ("oldest", "wanted"))
"""The orders in which a process's polls take payments, one after the other. They matter when more payments are due than
the pace allows, for example when a stranger leaves thousands open. Half of the polls are for payments that somebody
waits for. A quarter takes the payment that fell due last, so that new payments are polled in time while the backlog
waits. A quarter takes the payment that has been due longest, so that no payment waits for ever."""


def claim_due(database: Database, mode: str, lease_seconds: float, order: str) -> Due | None:
    """Lease the first payment by one of the ORDERS. Payments whose checkout is being opened are skipped."""
    values = {"mode": mode, "lease_seconds": lease_seconds}
    return next(map(Due.of, database.rows(CLAIMS[order], values)), None)


CLAIMS = {
    name: f"""
    WITH due AS (
        SELECT p.id FROM payments p
         -- OFFSET 0: looked up for each payment. With thousands due, a join would read all keys to find one.
         WHERE NOT EXISTS (SELECT FROM idempotency_keys k
                            WHERE k.payment_id = p.id AND k.answer IS NULL AND k.leased_until > now()
                           OFFSET 0)
           AND p.mode = %(mode)s AND {order} LIMIT 1 FOR UPDATE OF p SKIP LOCKED
    )
    UPDATE payments p
       SET poll_at = now() + make_interval(secs => %(lease_seconds)s), polled_at = now(), wanted_at = NULL,
           poll_leased_until = now() + make_interval(secs => %(lease_seconds)s)
      FROM due LEFT JOIN idempotency_keys k ON k.payment_id = due.id
     WHERE p.id = due.id
    RETURNING {DUE_COLUMNS}
    """  # noqa: S608  # ours
    for name, order in ORDERS.items()
}


def finish_poll(
    conn: BoundedConnection, payment: Payment, *, next_seconds: float | None, ends: bool, declined: str | None
) -> None:
    """Store the result of a poll without money: the time of the next poll, and a pending payment's last decline or end.
    A payment ends as `failed` if any poll has seen a decline. A payment that is pending a day after its time opens an
    incident. Does nothing if money has come meanwhile.
    """
    left = conn.execute(
        """
        UPDATE payments
           SET poll_at = CASE WHEN poll_at <= now() THEN poll_at -- an event has made it due meanwhile
                              ELSE now() + make_interval(secs => %(next_seconds)s) END,
               poll_leased_until = NULL,
               status = CASE WHEN status <> 'pending' OR NOT %(ends)s THEN status
                             WHEN coalesce(%(declined)s, status_reason) IS NULL THEN 'expired' ELSE 'failed' END,
               status_reason = CASE WHEN status = 'pending' THEN coalesce(%(declined)s, status_reason)
                                    ELSE status_reason END
         WHERE id = %(id)s AND charge_reference IS NULL AND changed_by('worker', %(why)s)
        RETURNING status, expires_at <= now() - interval '1 day' AS is_long_over
        """,
        {
            "id": payment.id,
            "next_seconds": next_seconds,
            "ends": ends,
            "declined": declined,
            "why": "time_over" if ends else "declined",
        },
    ).fetchone()
    if left and left["status"] != "pending":
        db.close_ended(conn, "worker", payment.id, "never_ended")
    elif left and left["is_long_over"]:
        db.open_incident(conn, payment.mode, "never_ended", payment.id, payment.id)


def apply_lists(database: Database, gateway: paystack.Gateway) -> int:
    """Apply each listed charge and refund with one of our references; how many there were. So a payment is found
    without a webhook and without its own poll.

    The list begins LISTED_DAYS before the last run, also after a long outage or a restored backup. Raises
    paystack.Unavailable and Misconfigured.
    """
    days = LISTED_DAYS + days_since_job(database, "apply_lists", gateway.mode)
    since, found = datetime.now(UTC) - timedelta(days=days), 0
    for charge in gateway.transactions(since):
        if isinstance(charge, money.Charge) and db.REFERENCE_PATTERN.fullmatch(charge.reference):
            database.transaction(charges.apply_charge, charge, "worker")
            found += 1
    for listed in gateway.refunds(since):
        if isinstance(listed, paystack.Unreadable):
            note_unreadable(database, gateway.mode, listed)
        elif listed.charge_reference is None or db.REFERENCE_PATTERN.fullmatch(listed.charge_reference):
            database.transaction(refunds.apply_refund, gateway.mode, listed, "worker")
            found += 1
    return found


def note_unreadable(database: Database, mode: str, row: paystack.Unreadable) -> None:
    """Open an incident for a listed row that cannot be read, if it may be ours."""
    logger.warning("refund_not_read", extra={"reference": row.charge_reference})
    if may_be_ours(database, mode, row):
        subject = row.charge_reference or row.note or str(row.charge_provider_id or "an unnamed charge")
        query = "SELECT id FROM payments WHERE mode = %(mode)s AND reference = %(base)s"
        ids = [each["id"] for each in database.rows(query, {"mode": mode, "base": db.base_of(row.charge_reference)})]
        kind, payment_id = "unreadable_refund", next(iter(ids), None)
        database.transaction(lambda conn: db.open_incident(conn, mode, kind, subject, payment_id))


def may_be_ours(database: Database, mode: str, row: paystack.Unreadable) -> bool:
    """Whether the row's reference, note or transaction's id is ours, or it has neither reference nor id. While we have
    a charge whose id is unknown, a row with only an id may be of this charge."""
    found = database.only_row(
        """
        SELECT EXISTS (SELECT FROM payments WHERE mode = %(mode)s AND reference = %(base)s)
            OR EXISTS (SELECT FROM refunds WHERE mode = %(mode)s AND id = %(note)s)
            OR EXISTS (SELECT FROM charges WHERE mode = %(mode)s AND (provider_id = %(charge_provider_id)s
                       OR (provider_id IS NULL AND %(charge_reference)s::text IS NULL))) AS is_ours
        """,
        {**vars(row), "mode": mode, "base": db.base_of(row.charge_reference)},
    )
    return (row.charge_reference is None and row.charge_provider_id is None) or bool(found["is_ours"])
