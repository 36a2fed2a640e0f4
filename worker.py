"""The background loops: what makes a payment complete when its webhook never comes.

They run as threads of each web process, or alone (`manage.py worker`). Leases in the database keep two from doing one
thing, so any number of them may run.
"""

import threading
import time
from collections.abc import Callable

import checkout
import db
import log
import notifications
import paystack
from settings import Settings

BATCH = 20
LOOKERS = 4
"""A provider that hangs holds one look; and one that takes a third of a second is asked ten times a second."""
LOOKS_PER_SECOND = 10
"""Of a process. So a long outage ends without a flood: two processes look at 100,000 payments in 83 minutes."""
PRUNING_BATCH, PRUNING_PAUSE_SECONDS = 250, 0.05
DAILY_SECONDS, DAILY_LEASE_SECONDS = 86400, 3600
LISTED_DAYS = 4


class Worker:
    """The loops and the threads that they run in."""

    def __init__(self, settings: Settings, database: db.Database, gateway: paystack.Gateway) -> None:
        self.interval_seconds = settings.worker_interval_seconds
        self.retention_days = settings.retention_days
        self.database = database
        self.gateway = gateway
        self.notifier = (
            notifications.Notifier(settings.notify_url, settings.notify_secrets) if settings.notify_url else None
        )
        self.stopping = threading.Event()
        self.pace = Pace(LOOKS_PER_SECOND)
        self.loops: tuple[Callable[[], float], ...] = (
            *[self.look] * LOOKERS,
            self.look_at_refunds,
            self.apply_events,
            self.apply_lists,
            self.prune,
            # A receiver that hangs holds one delivery; three of them delay no other payment's.
            *[self.notify] * (4 if self.notifier else 0),
        )
        self.threads = [
            threading.Thread(target=self.repeat, args=(loop,), name=loop.__name__, daemon=True) for loop in self.loops
        ]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def stop(self, within_seconds: float = 5) -> None:
        """Ask the loops to end and wait for them; a call to the provider that is under way is not waited for longer."""
        self.stopping.set()
        deadline = time.monotonic() + within_seconds
        for thread in self.threads:
            thread.join(max(0, deadline - time.monotonic()))

    def run_once(self) -> None:
        """Do all that is due, and return. Raises db.Unavailable, paystack.Unavailable, paystack.Misconfigured."""
        # Each once: a second looker would wait for as long as the provider has asked for quiet.
        for loop in dict.fromkeys(self.loops):
            while loop() == 0 and not self.stopping.is_set():
                pass

    def repeat(self, loop: Callable[[], float]) -> None:
        """Run `loop` until we stop, pausing for as long as it says. Whatever goes wrong is logged, and tried again."""
        while not self.stopping.is_set():
            try:
                pause_seconds = loop()
            except (db.Unavailable, paystack.Unavailable, paystack.Misconfigured) as error:
                log.event(f"worker_{loop.__name__}", outcome=str(error) or "misconfigured")
                asked_seconds = error.retry_after_seconds if isinstance(error, paystack.Unavailable) else None
                pause_seconds = asked_seconds or self.interval_seconds
            except Exception as error:  # the outermost loop: a bug in one round must not end the looking
                log.failure(f"worker_{loop.__name__}", error)
                pause_seconds = max(self.interval_seconds, 1)
            self.stopping.wait(pause_seconds)

    def look(self) -> float:
        """Look at the payment most overdue; how many seconds to pause before the next."""
        if not self.pace.wait(self.stopping):
            return self.interval_seconds
        try:
            return 0 if checkout.look_at_due(self.database, self.gateway) else self.interval_seconds
        except paystack.Unavailable as asked:
            self.pace.hold(asked.retry_after_seconds or self.interval_seconds)
            return self.interval_seconds

    def apply_events(self) -> float:
        """Apply a batch of events whose first handling failed."""
        applied = checkout.apply_due_events(self.database, self.gateway, BATCH)
        return 0 if applied == BATCH else self.interval_seconds

    def notify(self) -> float:
        """Deliver one notification that is due."""
        if self.notifier is not None and self.notifier.deliver_next(self.database, self.gateway.mode):
            return 0
        return self.interval_seconds

    def look_at_refunds(self) -> float:
        """Ask about a batch of refunds that are due."""
        looked = checkout.look_at_refunds(self.database, self.gateway, BATCH)
        return 0 if looked == BATCH else self.interval_seconds

    def apply_lists(self) -> float:
        """Look for our charges and refunds in the provider's lists, of all the time since that was done last: after a
        long outage, or a restored backup, too."""

        def apply() -> int:
            missed_days = db.days_since_job(self.database, "apply_lists", self.gateway.mode)
            return checkout.apply_lists(self.database, self.gateway, days=LISTED_DAYS + missed_days)

        return self.daily("apply_lists", apply)

    def prune(self) -> float:
        """Remove what RETENTION_DAYS says, batch by batch."""
        return self.daily("prune", self.prune_all)

    def prune_all(self) -> int:
        """How many rows that were. The pauses are for the requests, which a backlog pruned at a stretch made half as
        slow again."""
        total = pruned = self.prune_some()
        while pruned >= PRUNING_BATCH and not self.stopping.wait(PRUNING_PAUSE_SECONDS):
            total += (pruned := self.prune_some())
        return total

    def prune_some(self) -> int:
        return db.prune(self.database, self.gateway.mode, self.retention_days, PRUNING_BATCH)

    def daily(self, name: str, work: Callable[[], int]) -> float:
        """Do `work` once a day, in one process of all; when it fails, again in an hour."""
        job = (name, self.gateway.mode)
        if db.claim_job(self.database, *job, DAILY_LEASE_SECONDS):
            done = work()
            db.finish_job(self.database, *job, DAILY_SECONDS)
            log.event(name, outcome=done)
        return max(self.interval_seconds, 60)


class Pace:
    """At most so many a second, of all threads together, and none while the other side has asked for quiet."""

    def __init__(self, per_second: float) -> None:
        self.gap_seconds = 1 / per_second
        self.lock = threading.Lock()
        self.next_at = 0.0

    def wait(self, stopping: threading.Event) -> bool:
        """Wait until it is the caller's turn, which is over then. False when we stop first."""
        while not stopping.is_set():
            with self.lock:
                now = time.monotonic()
                if now >= self.next_at:
                    self.next_at = now + self.gap_seconds
                    return True
                seconds = self.next_at - now
            stopping.wait(seconds)
        return False

    def hold(self, seconds: float) -> None:
        with self.lock:
            self.next_at = max(self.next_at, time.monotonic() + seconds)
