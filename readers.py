"""Readers of payments that are not paid yet: they want to know soon, and some wait for it."""

import threading
import time

import db
import log


class Readers:
    """Tells the worker which payments are being read, and the waiting readers when a status has changed.

    A read only notes the id; one thread asks the database once a second, for all readers of the process at once. It
    lives while there are readers.
    """

    def __init__(self, database: db.Database, most_waiting: int) -> None:
        self.database = database
        self.most_waiting = most_waiting
        self.noted: set[str] = set()
        self.waiting: dict[Waiter, str] = {}
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None
        self.is_stopping = False

    def note(self, payment: db.Payment) -> None:
        """Have the worker look at the payment soon, unless it is paid."""
        if payment.status in db.UNPAID:
            with self.lock:
                self.noted.add(payment.id)
                self._run()

    def wait(self, payment: db.Payment, seconds: float) -> bool:
        """Wait until a pending payment has another status, `seconds` at most. False, at once, for one that has it
        already, and when too many wait."""
        if payment.status != "pending":
            return False
        waiter = Waiter(payment.id)
        with self.lock:
            if self.is_stopping or len(self.waiting) >= self.most_waiting:
                return False
            self.waiting[waiter] = payment.status
            self._run()
        if not self.is_stopping:  # stop() lets those go whom it finds
            waiter.event.wait(seconds)
        with self.lock:
            self.waiting.pop(waiter, None)
        return True

    def stop(self) -> None:
        """Let all who wait go, and let nobody wait any more. Takes no lock: it is called in a signal's handler."""
        self.is_stopping = True
        for waiter in list(self.waiting):
            waiter.event.set()

    def _run(self) -> None:
        if self.thread is None:
            self.thread = threading.Thread(target=self._ask, name="readers", daemon=True)
            self.thread.start()

    def _ask(self) -> None:
        while True:
            time.sleep(1)
            with self.lock:
                noted, self.noted = self.noted, set()
                waiting = dict(self.waiting)
                if not noted and not waiting:
                    self.thread = None
                    return
            try:
                statuses = db.look_soon(self.database, noted, {waiter.payment_id for waiter in waiting})
            except db.Unavailable as error:
                log.event("readers_not_served", outcome=str(error))
                continue
            except Exception as error:  # the outermost loop: those who wait must not wait in vain from now on
                log.failure("readers_not_served", error)
                continue
            for waiter, status in waiting.items():
                if statuses.get(waiter.payment_id, status) != status:
                    waiter.event.set()


class Waiter:
    """One reader who waits."""

    def __init__(self, payment_id: str) -> None:
        self.payment_id = payment_id
        self.event = threading.Event()
