"""Notifications to the merchant's own system, signed as the Standard Webhooks specification says.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import base64
import hashlib
import hmac
import json
import logging
import random
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import calls
import db
from web import shapes

logger = logging.getLogger("paygate")

CALL_SECONDS = 15

LARGEST_ANSWER = 64 * 1024

LEASE_SECONDS = 60

LONGEST_QUIET_SECONDS = 3600

PAUSES_SECONDS = (5, 15, 60, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400)
"""Between two tries, each ±20 %, so that a receiver that comes back does not get all at once."""


@dataclass(frozen=True)
class Notification:
    """A message to the merchant."""

    id: uuid.UUID
    payment_id: str | None
    tries: int
    body: str


class Notifier:
    """The merchant's receiver. With two secrets (an old and a new secret) each body has both signatures."""

    def __init__(self, url: str, secrets: tuple[bytes, ...], within_seconds: float = CALL_SECONDS) -> None:
        self.secrets = secrets
        self.within_seconds = within_seconds
        self.caller = calls.Caller(url, {"Content-Type": "application/json"}, LARGEST_ANSWER)

    def deliver_next(self, database: db.Database, mode: str) -> bool:
        """Deliver the notification that is most overdue; False when none is due."""
        notification = claim_notification(database, mode, LEASE_SECONDS)
        if notification is None:
            return False
        started = time.monotonic()
        outcome, quiet_seconds = self.send(str(notification.id), notification.body)
        pause = None if outcome.startswith("2") else pause_seconds(notification.tries, quiet_seconds)
        database.transaction(finish_notification, notification, outcome, pause)
        ms = (time.monotonic() - started) * 1000
        logger.info("notified", extra={"payment": notification.payment_id, "outcome": outcome, "ms": round(ms, 1)})
        return True

    def send(self, webhook_id: str, body: str) -> tuple[str, float]:
        """Post a body. Returns the outcome (the answer's status, or why there was no answer; any 2xx is a delivery),
        and for how many seconds the receiver asks for quiet."""
        timestamp = str(int(time.time()))
        headers = {
            "webhook-id": webhook_id,
            "webhook-timestamp": timestamp,
            "webhook-signature": " ".join(sign(secret, webhook_id, timestamp, body) for secret in self.secrets),
        }
        try:
            answer = self.caller.call("POST", "", self.within_seconds, body.encode(), headers)
        except calls.Failed as failed:  # the status is enough, even if the body failed
            return str(failed.status or failed), 0
        asked = answer.headers.get("Retry-After", "") if answer.status in (429, 503) else ""
        return str(answer.status), quiet_seconds(asked)


def quiet_seconds(retry_after: str) -> float:
    """The seconds of a Retry-After header, which may be a date (RFC 9110, section 10.2.3); an hour at most."""
    try:
        until = None if retry_after.isdecimal() else parsedate_to_datetime(retry_after)
        seconds = float(retry_after) if until is None else (until - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return 0
    return max(0, min(seconds, LONGEST_QUIET_SECONDS))


def sign(secret: bytes, webhook_id: str, timestamp: str, body: str) -> str:
    digest = hmac.new(secret, f"{webhook_id}.{timestamp}.{body}".encode(), hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


def body_of_test() -> str:
    return f'{{"type": "test", "timestamp": "{shapes.timestamp(datetime.now(UTC))}", "data": {{}}}}'


def pause_seconds(tries: int, least_seconds: float = 0) -> float | None:
    """How long to wait after this many failed tries; None after the last one."""
    if tries > len(PAUSES_SECONDS):
        return None
    pause = PAUSES_SECONDS[tries - 1] * random.uniform(0.8, 1.2)  # noqa: S311  # no secret hangs on it
    return max(pause, least_seconds)


def claim_notification(database: db.Database, mode: str, lease_seconds: float) -> Notification | None:
    """Lease the notification that is most overdue, and count the try. The payment's next notification is not due before
    this one has ended."""
    rows = database.rows(
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
    )
    made = (Notification(row["id"], row["payment_id"], row["tries"], body_of(database, row)) for row in rows)
    return next(made, None)


def body_of(database: db.Database, row: dict[str, Any]) -> str:
    """The body, the same on every try: the payment as it stood when the notification was made."""
    data = {"sequence": str(row["sequence"])}
    for found in database.rows("SELECT * FROM payments WHERE id = %(payment_id)s", row):
        paid_at = row["facts"]["paid_at"]
        payment = db.Payment.of({**found, **row["facts"], "paid_at": paid_at and datetime.fromisoformat(paid_at)})
        data |= {"source": json.dumps(payment.source), "payment": shapes.payment_json(payment, "metadata")}
    for incident in database.rows("SELECT id, kind, subject FROM incidents WHERE id = %(incident_id)s", row):
        data["incident"] = json.dumps(incident)
    members = ", ".join(f'"{name}": {value}' for name, value in data.items())
    return f'{{"type": "{row["type"]}", "timestamp": "{shapes.timestamp(row["made_at"])}", "data": {{{members}}}}}'


def finish_notification(
    conn: db.BoundedConnection, notification: Notification, outcome: str, pause_seconds: float | None
) -> None:
    """Store how a try ended: delivered, to be tried again after `pause_seconds`, or dead. After `delivered` and `dead`
    the payment's next notification is due at once."""
    is_delivered = outcome.startswith("2")
    values = {**vars(notification), "outcome": outcome, "is_delivered": is_delivered, "pause_seconds": pause_seconds}
    # The lock for new notifications: a notification made between the two statements would wait for ever.
    conn.execute("SELECT FROM payments WHERE id = %(payment_id)s FOR UPDATE", values)
    conn.execute(
        """
        UPDATE notifications
           SET last_outcome = %(outcome)s,
               -- Null if it has to wait for an earlier one, which is sent again.
               due_at = CASE WHEN NOT %(is_delivered)s AND due_at IS NOT NULL
                             THEN now() + make_interval(secs => %(pause_seconds)s) END,
               delivered_at = CASE WHEN %(is_delivered)s THEN clock_timestamp() END,
               dead_at = CASE WHEN NOT %(is_delivered)s AND %(pause_seconds)s::float8 IS NULL
                              THEN clock_timestamp() END
         WHERE id = %(id)s AND delivered_at IS NULL
        """,
        values,
    )
    if is_delivered or pause_seconds is None:
        _make_first_due(conn, [], [notification.payment_id])


def send_again(conn: db.BoundedConnection, mode: str, payment_id: str | None) -> int:
    """Send the last notification of a payment again, or (without a payment) all dead notifications in their order; how
    many."""
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
    ids, payment_ids = [row["id"] for row in rows], [row["payment_id"] for row in rows]
    # The lock for making and ending notifications.
    conn.execute("SELECT FROM payments WHERE id = ANY(%s) ORDER BY id FOR UPDATE", [payment_ids])
    conn.execute(
        """
        UPDATE notifications n SET due_at = NULL, tries = 0, delivered_at = NULL, dead_at = NULL
         WHERE id = ANY(%(ids)s)
            -- What comes after one of these waits for it again.
            OR (payment_id = ANY(%(payment_ids)s) AND delivered_at IS NULL AND dead_at IS NULL AND EXISTS (
                SELECT FROM notifications again WHERE again.id = ANY(%(ids)s)
                   AND again.payment_id = n.payment_id AND again.sequence < n.sequence))
        """,
        {"ids": ids, "payment_ids": payment_ids},
    )
    _make_first_due(conn, ids, payment_ids)
    return len(rows)


def _make_first_due(conn: db.BoundedConnection, ids: list[uuid.UUID], payment_ids: list[str | None]) -> None:
    """Make due now: each payment's first notification that is neither delivered nor dead, and each of these `ids` that
    has no payment."""
    conn.execute(
        """
        UPDATE notifications SET due_at = now()
         WHERE due_at IS NULL AND id IN (
            SELECT DISTINCT ON (coalesce(payment_id, id::text)) id FROM notifications
             WHERE (payment_id = ANY(%(payment_ids)s) OR id = ANY(%(ids)s))
               AND delivered_at IS NULL AND dead_at IS NULL
             ORDER BY coalesce(payment_id, id::text), sequence)
        """,
        {"ids": ids, "payment_ids": payment_ids},
    )
