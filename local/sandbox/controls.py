"""What customers, banks, the dashboard and tests do to the sandbox: every control is a method, and a path over HTTP."""

import asyncio
import json
import secrets
import threading
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from local.sandbox import shapes
from local.sandbox.background import Background
from local.sandbox.faults import Fault, Faults
from local.sandbox.fees import fee, with_fees
from local.sandbox.ledger import WIDE, Dispute, Ledger, Refund, SandboxError, Transaction, iso, now, parse_time
from local.sandbox.settings import Settings
from local.sandbox.webhooks import Webhooks, event_body, sign
from local.sandbox.wire import Answer, Json, Request, came_from_here

# How far a refund goes by itself, by the customer.
REFUND_PATHS = {
    "refund-fails": ("processing", "failed"),
    "refund-fails-late": ("processing", "processed", "failed"),
    "refund-stuck": (),
    "refund-needs-attention": ("processing", "needs-attention"),
}
CUSTOMERS = {
    "decline": "The first card is declined; the next one works.",
    "declines": "Every card is declined.",
    "underpaid": "Pays 1.00 less than the price.",
    "overpaid": "Pays 1.00 more than the price.",
    "other-currency": "Pays the same number in another currency.",
    "pays-fees": "Pays Paystack's fees on top of the price.",
    "paid-at-once": "Has paid before initialize answers.",
    "webhook-first": "Has paid, and the webhook comes, before initialize answers.",
    "lost-webhook": "Paystack never sends the webhook.",
    "late-webhook": "The webhook comes 3 seconds late.",
    "double-webhook": "The webhook comes twice at once.",
    "reordered-webhook": "The webhook comes after the next one.",
    "forged-webhook": "The webhook comes with a wrong signature.",
    "refund-fails": "A refund fails.",
    "refund-fails-late": "A refund is processed, and fails after all.",
    "refund-stuck": "A refund stays pending.",
    "refund-needs-attention": "A refund waits for the customer's bank details.",
    "live-domain": 'Answers and events say "live"; with a live key, "test".',
    "no-requested-amount": "Answers and events lack requested_amount.",
    "null-fees": 'The event says "fees": null; verify and lists know the fees.',
    "wide-id": "Ids need more than 63 bits.",
    "wide-metadata": "The metadata come back with an integer of 23 digits.",
    "metadata-string": "The metadata come back as a JSON string.",
    "metadata-empty": 'The metadata come back as "".',
    "metadata-zero": "The metadata come back as 0.",
    "metadata-null": "The metadata come back as null.",
}
"""By the part of the e-mail before the @, with what happens to that customer's payments."""
REFUND_STATES = ("pending", "processing", "processed", "failed", "needs-attention")
READINGS = (  # by GET too
    *("transactions", "refunds", "disputes", "deliveries", "webhooks_due", "calls", "faults_met", "requests"),
)
CONTROLS = (
    *("pay", "decline", "reverse", "charge_elsewhere", "alter", "backdate"),
    *("move_refund", "dashboard_refund", "foreign_refund", "alter_refund"),
    *("dispute", "remind_dispute", "resolve_dispute"),
    *("send_event", "forge_event", "hold_webhooks", "release_webhooks"),
    *("fault", "clear_faults", "configure"),
    *READINGS,
)


class Controls:
    """Its methods may be called from any thread, those in CONTROLS from any process on this machine by HTTP."""

    def __init__(self, settings: Settings, data: Path | None) -> None:
        self.settings = settings
        # Everything below is read and changed under the lock: by requests on the loop's thread, by callers on theirs.
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.ledger = Ledger(data)
        self.faults = Faults()
        self.background = Background()
        self.webhooks = Webhooks(settings, self.faults, self.background, self.changed)
        self.call_counts: Counter[tuple[str, str]] = Counter()
        self.last_requests: deque[Json] = deque(maxlen=1000)
        self.origin = ""  # of checkout pages, known once the server listens

    @property
    def secret_key(self) -> str:
        return self.settings.secret_key

    def pay(
        self,
        reference: str,
        amount: int | None = None,
        currency: str | None = None,
        fees_by_customer: bool | None = None,
    ) -> Json:
        """The customer pays, late too; `amount` and `currency` when not what was asked for. Sends charge.success."""
        with self.lock:
            transaction = self.ledger.known(reference)
            if transaction.status == "success":
                raise SandboxError(f"{reference} is paid already")
            asked, habit = transaction.amount, transaction.habit
            bears = fees_by_customer
            if bears is None:
                bears = habit == "pays-fees" or self.settings.fees_by_customer
            if amount is None:
                amount = with_fees(transaction.currency, asked) if bears else asked
                amount += {"underpaid": -100, "overpaid": 100}.get(habit, 0)
            if habit == "other-currency" and currency is None:
                currency = "GHS" if transaction.currency == "NGN" else "NGN"
            transaction.status, transaction.gateway_response = "success", "Successful"
            transaction.currency = currency or transaction.currency
            transaction.paid, transaction.paid_at = amount, now()
            transaction.fees = amount - asked if bears and amount > asked else fee(transaction.currency, amount)
            transaction.tries += 1
            self.ledger.keep(transaction)
            self.webhooks.emit("charge.success", transaction, shapes.charge_event(self.ledger, transaction))
            return self.ledger.tell(transaction)

    def decline(self, reference: str, reason: str = "Insufficient Funds") -> Json:
        """A card is declined. No event tells of it, and the customer may try again."""
        with self.lock:
            transaction = self.ledger.known(reference)
            if transaction.status == "success":
                raise SandboxError(f"{reference} is paid already")
            transaction.status, transaction.gateway_response = "failed", reason
            transaction.tries += 1
            self.ledger.keep(transaction)
            return self.ledger.tell(transaction)

    def reverse(self, reference: str) -> Json:
        """The customer's bank takes the money back: the charge is reversed. No refund and no event tell of it."""
        with self.lock:
            transaction = self.ledger.known(reference)
            if transaction.status != "success":
                raise SandboxError(f"{reference} is not paid")
            transaction.is_charged_back = True
            self.ledger.keep(transaction)
            return self.ledger.tell(transaction)

    def charge_elsewhere(
        self,
        reference: str | None = None,
        amount: int = 500000,
        currency: str = "NGN",
        email: str = "shopper@example.com",
        metadata: Any = None,
    ) -> Json:
        """A paid transaction that nobody initialized here: another shop's on the same account, or one of a lost row."""
        with self.lock:
            reference = reference or f"T{secrets.randbelow(10**15):015}"
            if reference in self.ledger.transactions:
                raise SandboxError(f"{reference} is there already")
            self.open_transaction(reference, email, amount, currency, None, metadata)
            return self.pay(reference)

    def alter(self, reference: str, without: Sequence[str] = (), **members: Any) -> Json:
        """From now on answers and events about the transaction show `members` instead, and lack those in `without`."""
        with self.lock:
            transaction = self.ledger.known(reference)
            transaction.altered.update(members)
            transaction.without.extend(without)
            self.ledger.keep(transaction)
            return self.ledger.tell(transaction)

    def backdate(self, reference: str, seconds: float) -> Json:
        """Make the transaction and its refunds older."""
        with self.lock:
            transaction = self.ledger.known(reference)
            rows: list[Transaction | Refund] = [transaction, *self.ledger.refunds_of.get(reference, [])]
            for row in rows:
                row.created_at = iso(parse_time(row.created_at) - timedelta(seconds=seconds))
                self.ledger.keep(row)
            if transaction.paid_at is not None:
                transaction.paid_at = iso(parse_time(transaction.paid_at) - timedelta(seconds=seconds))
                self.ledger.keep(transaction)
            return self.ledger.tell(transaction)

    def open_transaction(
        self, reference: str, email: str, amount: int, currency: str, callback_url: Any, metadata: Any
    ) -> Transaction:
        transaction = Transaction(
            id=4_099_260_516 + len(self.ledger.by_id),  # too large for 32 bits, as Paystack's are
            reference=reference,
            access_code=secrets.token_hex(8),
            email=email,
            amount=amount,
            currency=currency,
            callback_url=callback_url,
            metadata=metadata,
            domain=self.settings.mode,
            created_at=now(),
        )
        match transaction.habit:
            case "wide-id":
                transaction.id += WIDE
            case "wide-metadata":
                known = metadata if isinstance(metadata, dict) else {}
                transaction.altered = {"metadata": {**known, "wide": 12345678901234567890123}}
            case "live-domain":
                transaction.altered = {"domain": "test" if self.settings.mode == "live" else "live"}
            case "no-requested-amount":
                transaction.without = ["requested_amount"]
            case "metadata-string":
                transaction.altered = {"metadata": json.dumps(metadata)}
            case "metadata-empty" | "metadata-zero" | "metadata-null":
                shapes = {"metadata-empty": "", "metadata-zero": 0, "metadata-null": None}
                transaction.altered = {"metadata": shapes[transaction.habit]}
        self.ledger.keep(transaction)
        return transaction

    def move_refund(self, refund: int | str, status: str) -> Json:
        """A refund, by its id or as the last one of a reference, becomes `status`; the event tells of it."""
        with self.lock:
            row = self.ledger.refund_named(refund)
            if status not in REFUND_STATES:
                raise SandboxError(f"a refund is never {status!r}, but one of {', '.join(REFUND_STATES)}")
            row.status = status
            row.refunded_at = now() if status == "processed" else None
            self.ledger.keep(row)
            self._tell_of_refund(row)
            return dict(vars(row))

    def dashboard_refund(self, reference: str, amount: int | None = None, merchant_note: str | None = None) -> Json:
        """A refund that somebody makes in Paystack's dashboard: of what is left, or of `amount`, more too."""
        with self.lock:
            transaction = self.ledger.known(reference)
            if transaction.status != "success":
                raise SandboxError(f"{reference} is not paid")
            amount = self.ledger.left(transaction) if amount is None else amount
            return vars(self.make_refund(transaction, amount, merchant_note, None, "dashboard"))

    def foreign_refund(self, without: Sequence[str] = (), **members: Any) -> Json:
        """A refund of another shop's charge on the same account. Its `amount` is null, unless `members` say otherwise;
        answers show `members` instead of its own, and lack those in `without`."""
        with self.lock:
            charge = self.ledger.known(self.charge_elsewhere()["reference"])
            refund = self.make_refund(charge, charge.paid, None, None, "dashboard")
            return self.alter_refund(refund.id, without, **{"amount": None, **members})

    def alter_refund(self, refund: int | str, without: Sequence[str] = (), **members: Any) -> Json:
        """From now on answers about the refund show `members` instead, and lack those in `without`."""
        with self.lock:
            row = self.ledger.refund_named(refund)
            row.altered.update(members)
            row.without.extend(without)
            self.ledger.keep(row)
            return dict(vars(row))

    def make_refund(self, transaction: Transaction, amount: int, note: Any, shown: Any, by: str) -> Refund:
        text = f"Refund for transaction {transaction.reference} by {transaction.email}"
        refund = Refund(
            id=15_581_137 + len(self.ledger.refunds) + wide(transaction),
            reference=transaction.reference,
            transaction_id=transaction.id,
            amount=amount,
            currency=transaction.currency,
            domain=transaction.domain,
            merchant_note=text if note is None else str(note),
            customer_note=text if shown is None else str(shown),
            refunded_by=f"{by}@example.com",
            created_at=now(),
        )
        self.ledger.keep(refund)
        self._tell_of_refund(refund)
        self.process_later(refund)
        return refund

    def _tell_of_refund(self, refund: Refund) -> None:
        data = shapes.refund_event(self.ledger, refund, self.settings.refund_events_with_id)
        self.webhooks.emit(f"refund.{refund.status}", self.ledger.transactions[refund.reference], data)

    def process_later(self, refund: Refund) -> None:
        if self.settings.refund_seconds is not None:
            self.background.spawn(self._process, refund)

    async def _process(self, refund: Refund) -> None:
        """Lead a refund to its end by itself, from wherever it stands after a restart."""
        path = REFUND_PATHS.get(self.ledger.transactions[refund.reference].habit, ("processing", "processed"))
        for status in path[path.index(refund.status) + 1 :] if refund.status in path else path:
            before = refund.status
            await asyncio.sleep(self.settings.refund_seconds or 0)
            if refund.status != before:  # somebody else has moved it
                return
            self.move_refund(refund.id, status)

    def dispute(self, reference: str, amount: int | None = None) -> Json:
        """The customer's bank disputes the charge, or `amount` of it."""
        with self.lock:
            transaction = self.ledger.known(reference)
            dispute = Dispute(
                id=2867 + len(self.ledger.disputes) + wide(transaction),
                reference=reference,
                transaction_id=transaction.id,
                amount=transaction.paid if amount is None else amount,
                currency=transaction.currency,
                domain=transaction.domain,
                created_at=now(),
                updated_at=now(),
            )
            self.ledger.keep(dispute)
            return self._tell_of_dispute(dispute, "create")

    def remind_dispute(self, dispute: int) -> Json:
        with self.lock:
            return self._tell_of_dispute(self.ledger.disputes[dispute], "remind")

    def resolve_dispute(self, dispute: int, resolution: str = "merchant-accepted") -> Json:
        with self.lock:
            row = self.ledger.disputes[dispute]
            row.status, row.resolution, row.resolved_at, row.updated_at = "resolved", resolution, now(), now()
            self.ledger.keep(row)
            return self._tell_of_dispute(row, "resolve")

    def _tell_of_dispute(self, dispute: Dispute, what: str) -> Json:
        self.webhooks.emit(
            f"charge.dispute.{what}", self.ledger.transactions[dispute.reference], shapes.dispute(self.ledger, dispute)
        )
        return dict(vars(dispute))

    def send_event(self, reference: str, event: str = "charge.success", **members: Any) -> Json:
        """Send an event (again), as the ledger stands now, with `members` instead of its own."""
        with self.lock:
            return self.webhooks.emit(event, self.ledger.known(reference), self._event_data(reference, event) | members)

    def forge_event(self, reference: str, event: str = "charge.success", **members: Any) -> Json:
        """Send what looks like an event, also of an unpaid transaction, with a signature made by another key."""
        with self.lock:
            data = self._event_data(reference, event) | {"status": "success"} | members
            return self.webhooks.emit(event, self.ledger.known(reference), data, "forged")

    def event(self, reference: str, event: str = "charge.success", **members: Any) -> tuple[bytes, dict[str, str]]:
        """An event's body and headers, for a test that delivers it itself."""
        with self.lock:
            body = event_body(event, self._event_data(reference, event) | members)
        return body, {"Content-Type": "application/json", "x-paystack-signature": sign(body, self.settings.secret_key)}

    def _event_data(self, reference: str, event: str) -> Json:
        if event.startswith("refund."):
            row = replace(self.ledger.refund_named(reference), status=event.removeprefix("refund."))
            return shapes.refund_event(self.ledger, row, self.settings.refund_events_with_id)
        if event.startswith("charge.dispute."):
            return shapes.dispute(
                self.ledger, [row for row in self.ledger.disputes.values() if row.reference == reference][-1]
            )
        return shapes.charge_event(self.ledger, self.ledger.known(reference))

    def hold_webhooks(self) -> None:
        """Keep all events back until release_webhooks."""
        with self.lock:
            self.webhooks.hold()

    def release_webhooks(self, seed: int | None = None) -> None:
        """Send what was held back, in its order or, with a seed, shuffled."""
        with self.lock:
            self.webhooks.release(seed)

    def fault(
        self,
        endpoint: str,
        name: str,
        times: int | None = 1,
        lasts: float | None = None,
        probability: float = 1.0,
        seed: int = 0,
        prefix: str = "",
        effect: bool | None = None,
        **options: Any,
    ) -> None:
        """Let the next `times` calls of an endpoint (or events, for "webhook") meet a fault; the help lists them."""
        if lasts is not None or probability < 1:
            times = None  # what lasts a while, or comes by chance, is not used up by its first call
        with self.lock:
            self.faults.add(Fault(endpoint, name, times, lasts, probability, seed, prefix, effect, options))

    def clear_faults(self) -> None:
        with self.lock:
            self.faults.pending.clear()

    def configure(self, **settings: Any) -> None:
        """Change one of: secret_key, merchant, currencies, fees_by_customer, not_found_status (400 or 404),
        latency_seconds (of each answer of the API), refund_seconds, refund_events_with_id, webhook_url,
        webhook_timeout_seconds, retry_seconds (a list: when an unanswered event is sent again), page_cap (rows on a
        page of a list at most, whatever is asked for)."""
        self.settings.change(**settings)

    def transactions(self) -> list[Json]:
        with self.lock:
            return [self.ledger.tell(row) for row in self.ledger.by_id.values()]

    def refunds(self, reference: str | None = None) -> list[Json]:
        with self.lock:
            return [dict(vars(row)) for row in self.ledger.refunds.values() if reference in (None, row.reference)]

    def disputes(self) -> list[Json]:
        with self.lock:
            return [dict(vars(row)) for row in self.ledger.disputes.values()]

    def deliveries(self, reference: str | None = None) -> list[Json]:
        """Each event so far, sent or not: its body, signature and the answers that it got."""
        with self.lock:
            rows = [row for row in self.webhooks.deliveries if reference in (None, row.reference)]
            return [
                {
                    "event": row.event,
                    "reference": row.reference,
                    "body": row.body.decode(),
                    "signature": row.signature,
                    "fault": row.fault.name if row.fault else None,
                    "answers": list(row.answers),
                }
                for row in rows
            ]

    def webhooks_due(self) -> int:
        """How many events are to be sent and have not been tried yet."""
        with self.lock:
            return self.webhooks.untried

    def wait_for_webhooks(self, timeout_seconds: float = 5.0) -> bool:
        """Wait until each event that is to be sent has been tried once; False when that takes too long."""
        with self.changed:
            return self.changed.wait_for(lambda: self.webhooks.untried == 0, timeout_seconds)

    def calls(self, endpoint: str, reference: str | None = None) -> int:
        """How many requests with the right key came for an endpoint, or for one reference there."""
        with self.lock:
            if reference is not None:
                return self.call_counts[endpoint, reference]
            return sum(count for (name, _), count in self.call_counts.items() if name == endpoint)

    def faults_met(self) -> dict[str, int]:
        """How many calls and events have met each fault, by "ENDPOINT NAME"."""
        with self.lock:
            return dict(self.faults.met)

    def requests(self) -> list[Json]:
        """The last 1,000 of them, with their query and body."""
        with self.lock:
            return list(self.last_requests)


def wide(transaction: Transaction) -> int:
    """What the ids of a transaction's refunds and disputes are raised by."""
    return WIDE if transaction.id >= WIDE else 0


def control(controls: Controls, request: Request, peer: str) -> Answer:
    name = request.path.removeprefix("/_sandbox/")
    reading = request.method == "GET" and name in READINGS
    if not came_from_here(request, peer):
        return Answer(403, {"error": "controls are for programs on this machine"})
    if name not in CONTROLS or not (reading or request.method == "POST"):
        return Answer(404, {"error": f"no control {name!r}; there is {', '.join(CONTROLS)}"})
    if not reading and request.headers.get("content-type", "").partition(";")[0] != "application/json":
        return Answer(415, {"error": "send application/json"})
    try:
        arguments = request.query if reading else json.loads(request.body or b"{}")
        result = getattr(controls, name)(**arguments)
    except (SandboxError, TypeError, ValueError, KeyError) as error:
        return Answer(400, {"error": str(error)})
    return Answer(200, {"result": result})
