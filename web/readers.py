"""Readers of unpaid payments: they want news soon, and some wait for it."""

import logging
import threading
import time
from collections.abc import Iterable, Mapping

import falcon

import db
from web.errors import Problem
from web.guard import Guard, network

logger = logging.getLogger("paygate")

TURN_SECONDS, LONGEST_TURN_SECONDS = 1.0, 600.0
"""Each address has one turn a second, a tenth of a process's polls. Its other payments are polled when nobody else's
turn is due."""


class Readers:
    """Tells the worker which payments are read, and tells waiting readers when a status has changed.

    A read only notes the id. One thread asks the database once a second, for all readers of the process at once. The
    thread lives while there are readers.
    """

    def __init__(self, database: db.Database, mode: str, guard: Guard, most_waiting: int) -> None:
        self.database = database
        self.mode = mode
        self.guard = guard
        self.most_waiting = most_waiting
        self.noted: dict[str, float] = {}
        self.turns: dict[str, float] = {}
        """When an address that asked for several payments lately has its next turn (monotonic)."""
        self.waiting: dict[threading.Event, str] = {}
        """The payment whose new status each reader waits for."""
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None
        self.is_stopping = False

    def find(self, payment_id: str, req: falcon.Request) -> db.Payment:
        """The payment with this id, which the log's line of `req` will name. Raises Problem."""
        payment = db.find_payment(self.database, payment_id)
        if payment is None:
            raise Problem("not_found", "There is no such payment.")
        req.context.payment = payment.id
        return payment

    def note(self, payment: db.Payment, req: falcon.Request) -> None:
        """Let the worker poll the payment soon, if it is unpaid."""
        if payment.status in db.UNPAID:
            address, now = network(self.guard.address(req)), time.monotonic()
            with self.lock:
                if payment.id not in self.noted:
                    self.noted[payment.id] = turn = max(self.turns.get(address, now), now)
                    self.turns[address] = min(turn + TURN_SECONDS, now + LONGEST_TURN_SECONDS)
                self._run()

    def wait(self, payment: db.Payment, seconds: float) -> bool:
        """Wait until a pending payment has another status, `seconds` at most. False, at once, if the payment is not
        pending, or if too many readers wait."""
        if payment.status != "pending":
            return False
        news = threading.Event()
        with self.lock:
            if self.is_stopping or len(self.waiting) >= self.most_waiting:
                return False
            self.waiting[news] = payment.id
            self._run()
        if not self.is_stopping:  # stop() may have come before this reader was in `waiting`
            news.wait(seconds)
        with self.lock:
            self.waiting.pop(news, None)
        return True

    def stop(self) -> None:
        """Wake all waiting readers, and let nobody wait any more. Takes no lock, because a signal handler calls it."""
        self.is_stopping = True
        for news in list(self.waiting):
            news.set()

    def _run(self) -> None:
        if self.thread is None:
            self.thread = threading.Thread(target=self._ask, name="readers", daemon=True)
            self.thread.start()

    def _ask(self) -> None:
        while True:
            time.sleep(1)
            with self.lock:
                now = time.monotonic()
                noted, self.noted = {name: max(0.0, turn - now) for name, turn in self.noted.items()}, {}
                self.turns = {address: turn for address, turn in self.turns.items() if turn > now}
                waiting = dict(self.waiting)
                if not noted and not waiting:
                    self.thread = None
                    return
            try:
                statuses = poll_soon(self.database, self.mode, noted, set(waiting.values()))
            except db.DatabaseUnavailable as error:
                logger.info("readers_not_served", extra={"outcome": str(error)})
                continue
            except Exception as error:  # the outermost loop: an error must not end it while readers wait
                logger.error("readers_not_served", exc_info=error)
                continue
            for news, payment_id in waiting.items():
                if statuses.get(payment_id, "pending") != "pending":
                    news.set()


def poll_soon(
    database: db.Database, mode: str, noted: Mapping[str, float], waited_for: Iterable[str]
) -> dict[str, str]:
    """Make unpaid payments due soon, before payments that nobody waits for, each at most once in 5 seconds. `noted`
    maps the payments to the seconds until their turns. Returns the statuses of the payments in `waited_for`. Regular
    polls stay as they are: they are counted from a payment's age."""
    rows = database.rows(
        """
        WITH wanted AS (
            UPDATE payments p SET wanted_at = now() + make_interval(secs => n.seconds)
              FROM unnest(%(noted)s::text[], %(seconds)s::float8[]) AS n (id, seconds)
             WHERE p.id = n.id AND mode = %(mode)s AND charge_reference IS NULL
               AND (wanted_at IS NULL OR wanted_at > now() + make_interval(secs => n.seconds))
               AND (polled_at IS NULL OR polled_at <= now() - interval '5 s')
               AND (poll_leased_until IS NULL OR poll_leased_until <= now())
        )
        SELECT id, status FROM payments WHERE id = ANY(%(waited_for)s)
        """,
        {
            "mode": mode,
            "noted": list(noted),
            "seconds": list(noted.values()),
            "waited_for": list(waited_for),
        },
    )
    return {row["id"]: row["status"] for row in rows}
