"""What the merchant's own system is told, signed as the Standard Webhooks specification says.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import base64
import hashlib
import hmac
import json
import random
import time
from datetime import UTC, datetime

import calls
import db
import log

CALL_SECONDS = 15
LARGEST_ANSWER = 64 * 1024
LEASE_SECONDS = 60
PAUSES_SECONDS = (5, 15, 60, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400)
"""Between one try and the next, each ±20 % so that a receiver that comes back is not met by all at once."""


class Notifier:
    """The merchant's receiver. With two secrets each body bears both signatures, while one replaces the other."""

    def __init__(self, url: str, secrets: tuple[bytes, ...], within_seconds: float = CALL_SECONDS) -> None:
        self.secrets = secrets
        self.within_seconds = within_seconds
        self.caller = calls.Caller(url, {"Content-Type": "application/json", "User-Agent": "paygate"})

    def deliver_next(self, database: db.Database, mode: str) -> bool:
        """Deliver the notification that is most overdue; False when none is due."""
        notification = db.claim_notification(database, mode, LEASE_SECONDS)
        if notification is None:
            return False
        started = time.monotonic()
        outcome = self.send(str(notification.id), body_of(notification))
        is_delivered = outcome.startswith("2")
        pause = None if is_delivered else pause_seconds(notification.tries)
        db.finish_notification(database, notification, outcome, is_delivered=is_delivered, pause_seconds=pause)
        ms = (time.monotonic() - started) * 1000
        payment_id = notification.payment.id if notification.payment else None
        log.event("notified", payment=payment_id, outcome=outcome, ms=ms)
        return True

    def send(self, webhook_id: str, body: str) -> str:
        """Post a body; its outcome: the answer's status, or why there was none. Any 2xx is a delivery."""
        timestamp = str(int(time.time()))
        headers = {
            "webhook-id": webhook_id,
            "webhook-timestamp": timestamp,
            "webhook-signature": " ".join(sign(secret, webhook_id, timestamp, body) for secret in self.secrets),
        }
        try:
            response, _ = self.caller.call("POST", "", self.within_seconds, LARGEST_ANSWER, body.encode(), headers)
        except calls.Failed as failed:  # nobody needs an answer's body: its status says all
            return str(failed.status or failed)
        return str(response.status)


def sign(secret: bytes, webhook_id: str, timestamp: str, body: str) -> str:
    digest = hmac.new(secret, f"{webhook_id}.{timestamp}.{body}".encode(), hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


def body_of(notification: db.Notification) -> str:
    """The body, the same on every try: the payment as it stood when the notification was made."""
    data = {"sequence": str(notification.sequence)}
    if notification.payment is not None:
        payment = notification.payment
        data |= {"source": json.dumps(payment.source), "payment": payment.to_json("metadata")}
    if notification.incident is not None:
        data["incident"] = json.dumps(notification.incident)
    members = ", ".join(f'"{name}": {value}' for name, value in data.items())
    timestamp = db.timestamp(notification.made_at)
    return f'{{"type": "{notification.type}", "timestamp": "{timestamp}", "data": {{{members}}}}}'


def body_of_test() -> str:
    return f'{{"type": "test", "timestamp": "{db.timestamp(datetime.now(UTC))}", "data": {{}}}}'


def pause_seconds(tries: int) -> float | None:
    """How long to wait after this many failed tries; None after the last one."""
    if tries > len(PAUSES_SECONDS):
        return None
    return PAUSES_SECONDS[tries - 1] * random.uniform(0.8, 1.2)  # noqa: S311  # no secret hangs on it
