"""A local stand-in for Paystack: its API, its checkout page and its webhooks, with faults on demand.

For the demo, the tests and the benchmark; paygate itself never imports it. It answers what the published description
says, keeps a ledger, and listens and sends on loopback only. In a shell:

    python sandbox.py --secret-key sk_test_x --port 8010 --data DIR --webhook-url http://127.0.0.1:8000/api/v1/webhooks/paystack

or in a test, where every control is a method (seconds are floats, amounts are subunits):

    with Sandbox(secret_key="sk_test_x", webhook_url=url) as sandbox:
        sandbox.fault("initialize", "lost-answer", times=2)
        sandbox.pay(reference)
        assert sandbox.calls("initialize", reference) == 3

Customers
    The part of the e-mail before the @ (up to a +) chooses what happens to that customer's payments:

    decline                  the first card is declined ("Insufficient Funds"), the next one works
    declines                 every card is declined
    underpaid, overpaid      one naira, cedi, rand … less, or more, than asked for is paid
    other-currency           the same number is paid in another currency
    pays-fees                the customer bears the fees: more is paid than asked for
    paid-at-once             paid before initialize has answered
    webhook-first            the same, and the webhook is delivered before initialize answers
    live-domain              answers and events say "live" (with a live key: "test")
    no-requested-amount      answers and events lack requested_amount
    metadata-string, metadata-empty, metadata-zero, metadata-null
                             metadata comes back as a JSON string, as "", 0 or null
    lost-webhook, late-webhook, double-webhook, reordered-webhook
                             what becomes of each of its events
    refund-fails             its refunds end failed
    refund-fails-late        processed, and failed after all
    refund-stuck             stay pending
    refund-needs-attention   wait for the customer's bank details
    FAULT, verify-FAULT, refund-FAULT
                             one of the faults below meets the first initialize, verify or refund of each reference;
                             FAULT-always meets each call

Faults of the API
    lost-request             the connection is closed, nothing has happened
    lost-answer              it has happened, the connection is closed
    slow                     `seconds` (3) go by, then it happens and is answered
    time-out                 it happens, the answer comes after `seconds` (30)
    time-out-before          the connection is closed after `seconds` (30), nothing has happened
    429, 429-retry-after     too many requests, without and with Retry-After (`retry_after`, 1)
    500, 502, 503            an error as JSON, as a gateway's HTML, as nothing at all
    invalid-key              401
    garbage                  200 with bytes that are not JSON
    truncated                the body ends before its Content-Length
    huge                     a body of `size` (64 MiB)
    drip, drip-body          one byte a second (`seconds`), headers and body or the body alone
    redirect                 302 to `url` (another host name of this sandbox; calls("elsewhere") counts who follows)
    status-string            "status": "false"
    status-missing           no "status"
    no-data                  "data": null
    foreign-url, http-url, no-url
                             initialize gives a checkout at another host (`url`), without TLS, none
    other-reference          the answer bears another reference
    not-found                verify and fetch: unknown (for a while, with `times` or `lasts`)
    stale                    verify and lists: as before anyone paid
    empty-list               lists: nothing yet
    lagging-list             lists: without what is younger than `seconds` (3)
    answer                   exactly this `status`, `headers` and `body`

    sandbox.fault(endpoint, name, times=1, lasts=None, probability=1.0, seed=0, prefix="", effect=None, **options):
    `times` None means always, `lasts` ends it after so many seconds, `prefix` limits it to references that begin so,
    `effect` True or False says whether the thing happens although the answer is this one. In an e-mail, FAULT-after is
    the same as effect=True: 500-after@example.com. Endpoints: initialize, verify, list-transactions, fetch-transaction,
    refund, list-refunds, fetch-refund, list-disputes, fetch-dispute, transaction-disputes, session-timeout, or *.

Faults of webhooks
    lost                     never sent
    late                     sent after `seconds` (3)
    double                   sent twice at once
    reordered                sent after the next event, at the latest after `seconds` (3)
    forged                   sent with a wrong signature

    sandbox.fault("webhook", "late", seconds=1)

Controls
    Each method below is also POST /_sandbox/METHOD with its arguments as a JSON object (Content-Type:
    application/json), from this machine and not from a web page; the answer is {"result": …}. The last line's are read
    by GET too. `python sandbox.py --help` prints this text.

    pay, decline, charge_elsewhere, alter, backdate      what customers and other shops do to transactions
    move_refund, dashboard_refund                        what becomes of refunds
    dispute, remind_dispute, resolve_dispute
    send_event, forge_event, hold_webhooks, release_webhooks
    fault, clear_faults, configure
    transactions, refunds, disputes, deliveries, webhooks_due, calls, faults_met, requests
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import fcntl
import hashlib
import hmac
import ipaddress
import json
import os
import random
import re
import secrets
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import InitVar, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from http.client import responses
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from markupsafe import Markup

Json = dict[str, Any]
Row = TypeVar("Row", "Transaction", "Refund", "Dispute")

# Subunits: the smallest amount taken, and the fees of a local card: basis points, a flat part, the cap.
CURRENCIES = {
    "NGN": (5000, 150, 10000, 200000),
    "GHS": (10, 195, 0, None),
    "ZAR": (100, 290, 100, None),
    "KES": (300, 290, 0, None),
    "USD": (200, 390, 0, None),
    "XOF": (100, 320, 0, None),
}
FLAT_FEE_FROM = {"NGN": 250000}  # below this the flat part is waived

# When an event that was not answered by exactly 200 is sent again, in each mode.
RETRY_SECONDS = {"live": (180.0,) * 4 + (3600.0,) * 72, "test": (3600.0,) * 10}

CARD: Json = {
    **{"authorization_code": "AUTH_8dfhjjdt", "bin": "408408", "last4": "4081", "exp_month": "12", "exp_year": "2030"},
    **{"channel": "card", "card_type": "visa", "brand": "visa", "bank": "TEST BANK", "country_code": "NG"},
    **{"reusable": True, "signature": "SIG_yEXu7dLBeqG0kU7g95Ke"},
    **dict.fromkeys(("account_name", "receiver_bank_account_number", "receiver_bank")),
}
SAME_IN_EVERY_CHARGE: Json = {
    **dict.fromkeys(("receipt_number", "message", "fees_split", "plan", "order_id", "pos_transaction_data")),
    **dict.fromkeys(("source", "fees_breakdown", "connect")),
    **{"split": {}, "plan_object": {}, "subaccount": {}, "channel": "card", "ip_address": "127.0.0.1"},
}
SOURCE = {"source": "merchant_api", "type": "api", "identifier": None}
INTEGRATION = 463433
UNPAID = "The transaction was not completed"
GATEWAY_PAGE = (
    b"<html><head><title>502 Bad Gateway</title></head><body><center><h1>502 Bad Gateway</h1></center></body></html>"
)
CSS = Path(__file__).with_name("sandbox_pages") / "checkout.css"
PAGE_LIMIT = 100
BODY_LIMIT = 1 << 20
IDLE_SECONDS = 300


# What the sandbox knows


@dataclass
class Transaction:
    """One checkout. `status` is abandoned, failed or success; what refunds make of it is worked out when asked."""

    id: int
    reference: str
    access_code: str
    email: str
    amount: int  # asked for
    currency: str  # asked for, then paid in
    callback_url: str | None
    metadata: Any
    domain: str
    created_at: str
    status: str = "abandoned"
    gateway_response: str = UNPAID
    paid: int = 0
    fees: int | None = None
    paid_at: str | None = None
    tries: int = 0
    altered: Json = field(default_factory=dict)  # members that answers and events show instead
    without: list[str] = field(default_factory=list)  # members that they lack

    @property
    def habit(self) -> str:
        """The customer's part of the e-mail that chooses what happens."""
        return self.email.partition("@")[0].partition("+")[0].lower()


@dataclass
class Refund:
    id: int
    reference: str
    transaction_id: int
    amount: int
    currency: str
    domain: str
    merchant_note: str
    customer_note: str
    refunded_by: str
    created_at: str
    status: str = "pending"
    refunded_at: str | None = None


@dataclass
class Dispute:
    id: int
    reference: str
    transaction_id: int
    amount: int
    currency: str
    domain: str
    created_at: str
    updated_at: str
    status: str = "awaiting-merchant-feedback"
    resolution: str | None = None
    resolved_at: str | None = None


@dataclass
class Fault:
    endpoint: str
    name: str
    times: int | None = None  # how many calls it still meets; None: all
    lasts: InitVar[float | None] = None
    probability: float = 1.0
    seed: InitVar[int] = 0
    prefix: str = ""
    effect: bool | None = None  # None: as FAULTS says
    options: Json = field(default_factory=dict)

    def __post_init__(self, lasts: float | None, seed: int) -> None:
        self.ends_at = float("inf") if lasts is None else time.monotonic() + lasts
        self.dice = random.Random(seed)  # noqa: S311

    def meets(self, endpoint: str, reference: str) -> bool:
        return (
            (self.endpoint == endpoint or (self.endpoint == "*" and endpoint != "webhook"))
            and reference.startswith(self.prefix)
            and time.monotonic() < self.ends_at
            and (self.probability >= 1 or self.dice.random() < self.probability)
        )

    def seconds(self, default: float) -> float:
        return float(self.options.get("seconds", default))


@dataclass
class Delivery:
    """One webhook and how it went: `answers` holds an HTTP status or an error's name for each try."""

    event: str
    reference: str
    body: bytes
    signature: str
    fault: Fault | None
    answers: list[int | str] = field(default_factory=list)


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass
class Call:
    """A request to the API whose key was right."""

    endpoint: str
    argument: str  # what the path names
    query: dict[str, str]
    body: Json
    reference: str = ""  # of the transaction that it is about, where it is about one
    fault: Fault | None = None
    delivery: Delivery | None = None  # a webhook that must have been tried before the answer is sent

    def as_seen(self, transaction: Transaction) -> Transaction:
        """The transaction, or with the fault "stale" what it was before anyone paid."""
        if self.fault is None or self.fault.name != "stale":
            return transaction
        return replace(transaction, status="abandoned", gateway_response=UNPAID, paid=0, fees=None, paid_at=None)

    def hidden_after(self) -> str | None:
        """The time after which a list shows nothing yet, where a fault says so."""
        match self.fault:
            case Fault(name="empty-list"):
                return ""
            case Fault(name="lagging-list"):
                return now(seconds=-self.fault.seconds(3))
        return None


@dataclass
class Answer:
    status: int
    body: Json | bytes
    headers: dict[str, str] = field(default_factory=dict)


class Refused(Exception):
    """A request that Paystack turns down: carries the answer."""

    def __init__(self, status: int, message: str, code: str, kind: str = "validation_error", step: str = "") -> None:
        super().__init__(message)
        body = {
            "status": False,
            "message": message,
            "meta": {"nextStep": step or "Ensure that the value(s) you're passing are correct."},
            "type": kind,
            "code": code,
        }
        self.answer = Answer(status, body)


class SandboxError(Exception):
    """A control was used in a way that makes no sense."""


# The faults with which the thing asked for happens, and those with which it does not.
FAULTS = dict.fromkeys(
    (
        *("lost-answer", "slow", "time-out", "garbage", "truncated", "huge", "drip", "drip-body"),
        *("status-string", "status-missing", "no-data", "foreign-url", "http-url", "no-url", "other-reference"),
        *("stale", "empty-list", "lagging-list"),
    ),
    True,
) | dict.fromkeys(
    (
        *("lost-request", "time-out-before", "429", "429-retry-after", "500", "502", "503", "invalid-key"),
        *("redirect", "not-found", "answer"),
    ),
    False,
)
WEBHOOK_FAULTS = ("lost", "late", "double", "reordered", "forged")

# How far a refund goes by itself, by the customer.
REFUND_PATHS = {
    "refund-fails": ("processing", "failed"),
    "refund-fails-late": ("processing", "processed", "failed"),
    "refund-stuck": (),
    "refund-needs-attention": ("processing", "needs-attention"),
}
CUSTOMERS = (
    *("decline", "declines", "underpaid", "overpaid", "other-currency", "pays-fees", "paid-at-once", "webhook-first"),
    *("live-domain", "no-requested-amount"),
    *("metadata-string", "metadata-empty", "metadata-zero", "metadata-null"),
    *("lost-webhook", "late-webhook", "double-webhook", "reordered-webhook"),
    *REFUND_PATHS,
)
REFUND_STATES = ("pending", "processing", "processed", "failed", "needs-attention")
SETTINGS = (
    *("secret_key", "merchant", "currencies", "fees_by_customer", "not_found_status", "latency_seconds"),
    *("refund_seconds", "refund_events_with_id", "webhook_url", "webhook_timeout_seconds", "retry_seconds"),
)
READINGS = (  # by GET too
    *("transactions", "refunds", "disputes", "deliveries", "webhooks_due", "calls", "faults_met", "requests"),
)
CONTROLS = (
    *("pay", "decline", "charge_elsewhere", "alter", "backdate"),
    *("move_refund", "dashboard_refund", "dispute", "remind_dispute", "resolve_dispute"),
    *("send_event", "forge_event", "hold_webhooks", "release_webhooks"),
    *("fault", "clear_faults", "configure"),
    *READINGS,
)


class Journal:
    """The ledger on disk: one line for each object as it stands after a change, written before the answer is sent.

    One write() of a whole line survives a kill -9 of this process; a power cut is not the concern of a sandbox.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "ledger.jsonl"
        self.lock = (folder / "ledger.lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.close()
            raise SandboxError(f"another sandbox is using {folder}") from None
        self.file = -1

    def read(self) -> Iterator[tuple[str, Json]]:
        if self.path.exists():
            for line in self.path.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n"):  # a kill in the middle of a write leaves half a line, which nobody was told of
                    kind, members = json.loads(line)
                    yield kind, members

    def rewrite(self, rows: Iterable[tuple[str, Json]]) -> None:
        """Start the file anew with `rows`, so that it does not grow with every change for ever."""
        fresh = self.path.with_suffix(".new")
        with fresh.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        fresh.replace(self.path)
        self.file = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def write(self, kind: str, members: Json) -> None:
        line = (json.dumps((kind, members)) + "\n").encode()
        while line:
            line = line[os.write(self.file, line) :]

    def close(self) -> None:
        os.close(self.file)
        self.lock.close()


class Ledger:
    """What is true at the provider, and how Paystack words it."""

    def __init__(self, folder: Path | None) -> None:
        self.transactions: dict[str, Transaction] = {}
        self.by_id: dict[int, Transaction] = {}
        self.by_code: dict[str, Transaction] = {}
        self.refunds: dict[int, Refund] = {}
        self.refunds_of: dict[str, list[Refund]] = {}
        self.disputes: dict[int, Dispute] = {}
        self.session_timeout_seconds = 0
        self.journal = Journal(folder) if folder else None
        if self.journal is not None:
            self._load(self.journal)

    def _load(self, journal: Journal) -> None:
        kinds = {"Transaction": Transaction, "Refund": Refund, "Dispute": Dispute}
        latest = {(kind, members.get("id")): (kind, members) for kind, members in journal.read()}
        for kind, members in latest.values():
            if kind in kinds:
                self._index(kinds[kind](**members))
            else:
                self.session_timeout_seconds = members["session_timeout_seconds"]
        journal.rewrite(latest.values())

    def keep(self, row: Transaction | Refund | Dispute) -> None:
        self._index(row)
        if self.journal is not None:
            self.journal.write(type(row).__name__, vars(row))

    def keep_session_timeout(self, seconds: int) -> None:
        self.session_timeout_seconds = seconds
        if self.journal is not None:
            self.journal.write("Settings", {"session_timeout_seconds": seconds})

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()
            self.journal = None

    def _index(self, row: Transaction | Refund | Dispute) -> None:
        match row:
            case Transaction():
                self.transactions[row.reference] = self.by_id[row.id] = self.by_code[row.access_code] = row
            case Refund():
                if row.id not in self.refunds:
                    self.refunds_of.setdefault(row.reference, []).append(row)
                self.refunds[row.id] = row
            case Dispute():
                self.disputes[row.id] = row

    def known(self, reference: str) -> Transaction:
        if reference not in self.transactions:
            raise SandboxError(f"no transaction {reference!r}")
        return self.transactions[reference]

    def named(self, name: object) -> Transaction | None:
        """A transaction by its reference or its id, as POST /refund takes both."""
        text = str(name)
        return self.transactions.get(text) or (self.by_id.get(int(text)) if text.isdecimal() else None)

    def refund_named(self, refund: int | str) -> Refund:
        """A refund by its id, or the last one of a reference."""
        rows = [self.refunds[refund]] if refund in self.refunds else self.refunds_of.get(str(refund), [])
        if not rows:
            raise SandboxError(f"no refund {refund!r}")
        return rows[-1]

    def tell(self, transaction: Transaction) -> Json:
        """A transaction for the controls: as it is kept, with what its refunds make of it."""
        return {**vars(transaction), "state": self.state(transaction), "left": self.left(transaction)}

    def state(self, transaction: Transaction) -> str:
        """Paystack's word: refunds turn success into reversed, by way of "reversal-pending"."""
        if "status" in transaction.altered:
            return str(transaction.altered["status"])
        if transaction.status != "success":
            return transaction.status
        refunds = self.refunds_of.get(transaction.reference, [])
        if sum(refund.amount for refund in refunds if refund.status == "processed") >= transaction.paid:
            return "reversed"
        return "success" if self.left(transaction) > 0 else "reversal-pending"

    def left(self, transaction: Transaction) -> int:
        """What can still be refunded: a failed refund frees its amount."""
        refunds = self.refunds_of.get(transaction.reference, [])
        return transaction.paid - sum(refund.amount for refund in refunds if refund.status != "failed")

    def charge(self, transaction: Transaction, **members: Any) -> Json:
        """A transaction as verify and charge.success show it; `members` are what other answers show otherwise."""
        paid = transaction.status == "success"
        data: Json = {
            **SAME_IN_EVERY_CHARGE,
            "id": transaction.id,
            "domain": transaction.domain,
            "status": self.state(transaction),
            "reference": transaction.reference,
            "amount": transaction.paid if paid else transaction.amount,
            "requested_amount": transaction.amount,
            "currency": transaction.currency,
            "fees": transaction.fees,
            "gateway_response": transaction.gateway_response,
            "metadata": "" if transaction.metadata is None else transaction.metadata,
            "log": checkout_log(transaction),
            "authorization": CARD if paid else {},
            "customer": customer(transaction.email),
            **dict.fromkeys(("paid_at", "paidAt"), transaction.paid_at),
            **dict.fromkeys(("created_at", "createdAt", "transaction_date"), transaction.created_at),
            **members,
            **transaction.altered,
        }
        return {name: value for name, value in data.items() if name not in transaction.without}

    def listed_charge(self, transaction: Transaction) -> Json:
        card: Json = CARD if transaction.status == "success" else {**dict.fromkeys(CARD), "reusable": False}
        source = {**SOURCE, "entry_point": "transaction_initialize"}
        return self.charge(transaction, authorization=card, plan={}, source=source, metadata=transaction.metadata)

    def fetched_charge(self, transaction: Transaction) -> Json:
        person = customer(transaction.email, metadata={}, nobody="")
        return self.charge(transaction, plan={}, source=SOURCE, customer=person, helpdesk_link=None)

    def refunded_charge(self, transaction: Transaction) -> Json:
        """The transaction inside the answer to POST /refund, where half of it is missing."""
        card = {"exp_month": None, "exp_year": None, "account_name": None}
        person = {"international_format_phone": None}
        nobody = {"currency": None}
        return self.charge(transaction, plan={}, authorization=card, customer=person, subaccount=nobody)

    def refund(self, refund: Refund) -> Json:
        transaction, processed = self.transactions[refund.reference], refund.status == "processed"
        return {
            **dict.fromkeys(("dispute", "settlement", "bank_reference", "session_id")),
            "integration": INTEGRATION,
            "id": refund.id,
            "transaction": refund.transaction_id,
            "transaction_reference": refund.reference,
            "transaction_amount": transaction.paid,
            "domain": refund.domain,
            "currency": refund.currency,
            "amount": refund.amount,
            "deducted_amount": refund.amount if processed else 0,
            "fully_deducted": int(processed),
            "status": refund.status,
            "createdAt": refund.created_at,
            "refunded_at": refund.refunded_at,
            "refunded_by": refund.refunded_by,
            "initiated_by": refund.refunded_by,
            "customer_note": refund.customer_note,
            "merchant_note": refund.merchant_note,
            "reason": "",
            "customer": customer(transaction.email, metadata="", nobody=""),
            "refund_type": "full" if refund.amount == transaction.paid else "partial",
            "refund_channel": "card",
            "collect_account_number": refund.status == "needs-attention",
        }

    def dispute(self, dispute: Dispute) -> Json:
        transaction = self.transactions[dispute.reference]
        step = {"status": dispute.status, "by": transaction.email, "createdAt": dispute.created_at}
        claim = {"sender": transaction.email, "body": "I did not make this payment", "createdAt": dispute.created_at}
        return {
            **dict.fromkeys(("transaction_reference", "evidence", "attachments", "note")),
            "id": dispute.id,
            "refund_amount": dispute.amount,
            "currency": dispute.currency,
            "status": dispute.status,
            "resolution": dispute.resolution,
            "domain": dispute.domain,
            "transaction": self.charge(transaction, plan={}),
            "category": "fraud",
            "customer": customer(transaction.email, metadata="", nobody=""),
            "bin": CARD["bin"],
            "last4": CARD["last4"],
            "dueAt": iso(parse_time(dispute.created_at) + timedelta(days=2)),
            "resolvedAt": dispute.resolved_at,
            "history": [step],
            "messages": [claim],
            "createdAt": dispute.created_at,
            "updatedAt": dispute.updated_at,
        }


class Sandbox:
    """The stand-in. Its methods may be called from any thread, those in CONTROLS from any process by HTTP."""

    def __init__(
        self,
        secret_key: str,
        webhook_url: str | None = None,
        data: str | os.PathLike[str] | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        public_url: str | None = None,
        merchant: str = "Example Shop",
        retry_seconds: Sequence[float] | None = None,
        refund_seconds: float | None = None,
    ) -> None:
        """`refund_seconds` is how long a refund stays in each state; None leaves it pending until move_refund."""
        if not is_loopback(host):
            raise SandboxError(f"the sandbox listens on loopback only, not on {host}")
        self.secret_key = secret_key
        self.host, self.port, self.public_url = host, port, public_url
        self.merchant = merchant
        self.latency_seconds = 0.0
        self.retry_seconds = retry_seconds
        self.webhook_timeout_seconds = 30.0
        self.refund_seconds = refund_seconds
        self.currencies: Sequence[str] = tuple(CURRENCIES)
        self.not_found_status = 400  # 404 has been seen too
        self.refund_events_with_id = False
        self.fees_by_customer = False
        self.webhook_url: str | None = None
        self.configure(webhook_url=webhook_url)

        # Everything below is read and changed under the lock: by requests on the loop's thread, by callers on theirs.
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.ledger = Ledger(Path(data) if data else None)
        self._faults: list[Fault] = []
        self._calls: Counter[tuple[str, str]] = Counter()
        self._met: Counter[str] = Counter()
        self._requests: deque[Json] = deque(maxlen=1000)
        self._deliveries: deque[Delivery] = deque(maxlen=20_000)
        self._held: list[Delivery] | None = None
        self._untried = 0
        self._lagging = False

        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # Starting and stopping

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def start(self) -> Self:
        self._thread = threading.Thread(target=self._run, name="sandbox", daemon=True)
        self._thread.start()
        if not self._ready.wait(10):
            raise SandboxError("the sandbox did not start within 10 seconds")
        if self._failure is not None:
            raise self._failure
        return self

    def stop(self) -> None:
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(5)
            self._thread = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            asyncio.run(self.serve())
        except OSError as error:  # the port is in use: start() tells its caller
            self._failure = error
            self._ready.set()

    async def serve(self, when_ready: Callable[[], None] = lambda: None) -> None:
        """Listen until stopped. One thread and one event loop: a sleeping answer costs a timer, not a thread."""
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._slots = asyncio.Semaphore(32)
        self._overtaken = asyncio.Event()
        # A plain function for a callback: a coroutine would be a task of asyncio's own, which complains when cancelled.
        server = await asyncio.start_server(
            lambda reader, writer: self._begin(self._converse(reader, writer)), self.host, self.port, backlog=1024
        )
        self.port = server.sockets[0].getsockname()[1]
        for refund in self.ledger.refunds.values():
            self._process_later(refund)
        self._ready.set()
        when_ready()
        try:
            await self._stopping.wait()
        finally:
            server.close()
            for task in self._tasks:  # or one would go on for a moment, and answer what the closed ledger does not keep
                task.cancel()
            with self.lock:
                self._loop = None
                self.ledger.close()
        # What has begun since is cancelled by asyncio.run.

    # Talking HTTP. A hand-made server, because its faults need the socket and a benchmark needs it to be cheap.

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request after the other until the client goes or a fault ends the connection."""
        try:
            while True:
                try:
                    request = await read_request(reader)
                except ValueError as error:
                    await send(writer, Answer(400, {"status": False, "message": str(error)}))
                    return
                if not await self._respond(request, writer):
                    return
        except (OSError, EOFError, asyncio.LimitOverrunError):
            pass  # the client has gone, or was too slow or too long
        finally:
            writer.close()

    async def _respond(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False when the connection is to be closed."""
        if request.path.startswith("/_sandbox/"):
            peer = str(writer.get_extra_info("peername")[0])
            return await send(writer, self._control(request, peer), request)
        if request.path.startswith("/checkout/"):
            return await send(writer, self._checkout(request), request)
        match request.path:
            case "/sandbox.css":
                return await send(writer, Answer(200, CSS.read_bytes(), {"Content-Type": "text/css"}), request)
            case "/favicon.ico":
                return await send(writer, Answer(204, b""), request)
            case "/elsewhere":  # where the fault "redirect" leads
                self._calls["elsewhere", ""] += 1
                return await send(writer, Answer(200, {"status": True, "message": "Elsewhere", "data": {}}), request)
        return await self._api(request, writer)

    async def _api(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        try:
            with self.lock:
                call = self._receive(request)
        except Refused as refused:
            return await send(writer, refused.answer, request)
        fault = call.fault
        happens = fault is None or (FAULTS[fault.name] if fault.effect is None else fault.effect)
        wait = self.latency_seconds + (fault.seconds(3) if fault is not None and fault.name == "slow" else 0)
        if wait:
            await asyncio.sleep(wait)
        answer = Answer(200, {"status": True, "message": "", "data": {}})
        if happens:
            with self.lock:
                try:
                    answer = ENDPOINTS[call.endpoint](self, call)
                except Refused as refused:
                    answer = refused.answer
        if call.delivery is not None:
            await self._first_try(call.delivery)
        if fault is not None:
            return await self._send_faulty(writer, fault, answer)
        return await send(writer, answer, request)

    def _receive(self, request: Request) -> Call:
        """Who asks for what, counted; and the fault that this call meets."""
        if request.headers.get("authorization") != f"Bearer {self.secret_key}":
            step = "Ensure that you provide the correct authorization key for the request"
            raise Refused(401, "Invalid key", "invalid_Key", step=step)  # their spelling
        endpoint, argument = route(request)
        call = Call(endpoint, argument, request.query, parse_body(request))
        transaction = self._subject(call)
        call.reference = transaction.reference if transaction else str(call.body.get("reference", argument))
        self._calls[endpoint, call.reference] += 1
        self._requests.append({"endpoint": endpoint, "argument": argument, "query": call.query, "body": call.body})
        call.fault = self._fault_for(endpoint, call.reference) or self._habitual_fault(call, transaction)
        return call

    def _subject(self, call: Call) -> Transaction | None:
        match call.endpoint:
            case "verify":
                return self.ledger.transactions.get(call.argument)
            case "fetch-transaction" | "transaction-disputes":
                return self.ledger.by_id.get(int(call.argument))
            case "refund":
                return self.ledger.named(call.body.get("transaction"))
            case "fetch-refund":
                refund = self.ledger.refunds.get(int(call.argument))
                return self.ledger.transactions[refund.reference] if refund else None
        return None

    # Faults

    def _fault_for(self, endpoint: str, reference: str) -> Fault | None:
        for fault in self._faults:
            if fault.meets(endpoint, reference):
                self._met[f"{endpoint} {fault.name}"] += 1
                if fault.times is not None:
                    fault.times -= 1
                    if fault.times == 0:
                        self._faults.remove(fault)
                return fault
        return None

    def _habitual_fault(self, call: Call, transaction: Transaction | None) -> Fault | None:
        """The fault that the customer's e-mail asks for, at the first call for a reference or at each."""
        email = transaction.email if transaction else str(call.body.get("email", ""))
        name = email.partition("@")[0].partition("+")[0].lower()
        aimed = next((prefix for prefix in ("verify", "refund") if name.startswith(f"{prefix}-")), "initialize")
        name = name.removeprefix(f"{aimed}-")
        always, name = name.endswith("-always"), name.removesuffix("-always")
        effect, name = True if name.endswith("-after") else None, name.removesuffix("-after")
        if name in FAULTS and aimed == call.endpoint and (always or self._calls[call.endpoint, call.reference] == 1):
            return Fault(aimed, name, effect=effect)
        return None

    async def _send_faulty(self, writer: asyncio.StreamWriter, fault: Fault, answer: Answer) -> bool:
        match fault.name:
            case "lost-request" | "lost-answer":
                return False
            case "time-out-before":
                await asyncio.sleep(fault.seconds(30))
                return False
            case "time-out":
                await asyncio.sleep(fault.seconds(30))
                return await send(writer, answer)
            case "truncated":
                writer.write(encode(answer)[:-8])
                await writer.drain()
                return False
            case "huge":
                return await send_huge(writer, int(fault.options.get("size", 64 << 20)))
            case "drip" | "drip-body":
                return await send_slowly(writer, encode(answer), fault)
        return await send(writer, self._misshapen(fault, answer))

    def _misshapen(self, fault: Fault, answer: Answer) -> Answer:
        """What the fault makes of an answer that is sent in the ordinary way."""
        options, body = fault.options, answer.body if isinstance(answer.body, dict) else {}
        data = body["data"] if isinstance(body.get("data"), dict) else {}
        match fault.name:
            case "429" | "429-retry-after":
                after = {} if fault.name == "429" else {"Retry-After": str(options.get("retry_after", 1))}
                return Answer(429, {"status": False, "message": "Too many requests"}, after)
            case "500":
                return Answer(500, {"status": False, "message": "An error occurred", "type": "api_error"})
            case "502":
                return Answer(502, GATEWAY_PAGE, {"Content-Type": "text/html"})
            case "503":
                return Answer(503, b"")
            case "invalid-key":
                return Answer(401, {"status": False, "message": "Invalid key"})
            case "not-found":
                return self._unknown_reference().answer
            case "garbage":
                return Answer(200, b"\x00\xff{]status: true")
            case "redirect":
                elsewhere = f"http://localhost:{self.port}/elsewhere"
                return Answer(302, b"", {"Location": options.get("url", elsewhere)})
            case "status-string":
                return Answer(answer.status, {**body, "status": "false"})
            case "status-missing":
                return Answer(answer.status, {name: value for name, value in body.items() if name != "status"})
            case "no-data":
                return Answer(answer.status, {**body, "data": None})
            case "foreign-url" | "http-url" | "no-url" | "other-reference":
                return Answer(answer.status, {**body, "data": misdirected(fault, data)})
            case "answer":
                content = options.get("body", {})
                return Answer(options.get("status", 200), text_or_json(content), options.get("headers", {}))
        return answer

    # The endpoints, called under the lock

    def _initialize(self, call: Call) -> Answer:
        order = self._checked_order(call.body)
        reference = order["reference"] or secrets.token_hex(5)
        if reference in self.ledger.transactions:
            step = "Try and create the Transaction or Charge with a new reference"
            raise Refused(400, "Duplicate Transaction Reference", "duplicate_reference", step=step)
        transaction = self._open(**{**order, "reference": reference})
        if transaction.habit in ("paid-at-once", "webhook-first"):
            self.pay(reference)
            if transaction.habit == "webhook-first" and self.webhook_url:
                call.delivery = self._deliveries[-1]
        data = {
            "authorization_url": f"{self.public_url or self.url}/checkout/{transaction.access_code}",
            "access_code": transaction.access_code,
            "reference": reference,
        }
        return Answer(200, {"status": True, "message": "Authorization URL created", "data": data})

    def _checked_order(self, body: Json) -> Json:
        """What initialize was sent, in Paystack's order of complaints."""
        email, currency = body.get("email"), body.get("currency") or self.currencies[0]
        if not email:
            raise Refused(400, "Email Address is required", "missing_params", step="Provide all required params")
        if not isinstance(email, str) or not re.fullmatch(r"[^@\s]+@[^@\s.]+(\.[^@\s.]+)+", email) or len(email) > 254:
            raise Refused(400, "Invalid Email Address Passed", "invalid_email_address")
        if currency not in self.currencies:
            raise Refused(400, "Currency not supported by merchant", "unsupported_currency")
        amount = whole_number(body.get("amount"))
        if amount is None or amount < 1:
            raise Refused(400, "Invalid Amount Sent", "invalid_amount")
        if amount < CURRENCIES[currency][0]:
            raise Refused(400, "Amount cannot be less than the minimum of this currency", "invalid_amount")
        reference = body.get("reference")
        if reference is not None and not re.fullmatch(r"[A-Za-z0-9.=-]+", str(reference)):
            message = "Invalid transaction reference. Only -,., = and alphanumeric characters allowed"
            raise Refused(400, message, "invalid_reference")
        return {
            "email": email,
            "amount": amount,
            "currency": currency,
            "reference": reference,
            "callback_url": body.get("callback_url"),
            "metadata": parsed_metadata(body.get("metadata")),
        }

    def _open(
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
            domain=self.mode,
            created_at=now(),
        )
        match transaction.habit:
            case "live-domain":
                transaction.altered = {"domain": "test" if self.mode == "live" else "live"}
            case "no-requested-amount":
                transaction.without = ["requested_amount"]
            case "metadata-string":
                transaction.altered = {"metadata": json.dumps(metadata)}
            case "metadata-empty" | "metadata-zero" | "metadata-null":
                shapes = {"metadata-empty": "", "metadata-zero": 0, "metadata-null": None}
                transaction.altered = {"metadata": shapes[transaction.habit]}
        self.ledger.keep(transaction)
        return transaction

    def _verify(self, call: Call) -> Answer:
        transaction = self.ledger.transactions.get(call.argument)
        if transaction is None:
            raise self._unknown_reference()
        data = self.ledger.charge(call.as_seen(transaction))
        return Answer(200, {"status": True, "message": "Verification successful", "data": data})

    def _fetch_transaction(self, call: Call) -> Answer:
        transaction = self.ledger.by_id.get(int(call.argument))
        if transaction is None:
            raise self._unknown_reference()
        data = self.ledger.fetched_charge(call.as_seen(transaction))
        return Answer(200, {"status": True, "message": "Transaction retrieved", "data": data})

    def _unknown_reference(self) -> Refused:
        step = "Ensure that you're passing the correct reference for this integration"
        return Refused(self.not_found_status, "Transaction reference not found.", "transaction_not_found", step=step)

    def _list_transactions(self, call: Call) -> Answer:
        query = call.query
        rows = [call.as_seen(row) for row in within(reversed(self.ledger.by_id.values()), query, call.hidden_after())]
        if "status" in query:
            rows = [row for row in rows if self.ledger.state(row) == query["status"]]
        if "amount" in query:
            rows = [row for row in rows if str(row.paid or row.amount) == query["amount"]]
        meta: Json
        if query.get("use_cursor") == "true":
            page, meta = cursor_page(rows, query)
        else:
            page, meta = numbered_page(rows, query)
            meta["total_volume"] = sum(row.paid for row in rows)
        data = [self.ledger.listed_charge(row) for row in page]
        return Answer(200, {"status": True, "message": "Transactions retrieved", "data": data, "meta": meta})

    def _refund(self, call: Call) -> Answer:
        body, transaction = call.body, self.ledger.named(call.body.get("transaction"))
        if not body.get("transaction"):
            raise Refused(400, "Transaction reference or id is required", "missing_params")
        if transaction is None:
            raise self._unknown_reference()
        amount = whole_number(body["amount"]) if body.get("amount") is not None else self.ledger.left(transaction)
        if transaction.status != "success":
            raise Refused(400, "Transaction has not been paid and cannot be refunded", "invalid_params")
        if self.ledger.left(transaction) < 1:
            raise Refused(400, "Transaction has been fully reversed", "transaction_reversed", "api_error")
        if amount is None or amount < 1:
            raise Refused(400, "Invalid Amount Sent", "invalid_amount")
        if amount > self.ledger.left(transaction):
            raise Refused(400, "Refund amount cannot be more than what is left of the transaction", "invalid_amount")
        if body.get("currency") not in (None, transaction.currency):
            raise Refused(400, "Refund currency must be the transaction's", "invalid_params")
        refund = self._make_refund(transaction, amount, body.get("merchant_note"), body.get("customer_note"), "api")
        data = {name: value for name, value in self.ledger.refund(refund).items() if name != "customer"}
        data |= {"transaction": self.ledger.refunded_charge(transaction), "channel": None, "fully_deducted": False}
        data |= {"expected_at": now(days=7), "updatedAt": refund.created_at}
        return Answer(200, {"status": True, "message": "Refund has been queued for processing", "data": data})

    def _list_refunds(self, call: Call) -> Answer:
        rows = within(reversed(self.ledger.refunds.values()), call.query, call.hidden_after())
        page, meta = numbered_page(rows, call.query)
        meta |= {"perPage": str(meta["perPage"]), "failedRefundCount": sum(row.status == "failed" for row in rows)}
        data = [self.ledger.refund(row) for row in page]
        return Answer(200, {"status": True, "message": "Refunds retrieved", "data": data, "meta": meta})

    def _fetch_refund(self, call: Call) -> Answer:
        refund = self.ledger.refunds.get(int(call.argument))
        if refund is None:
            raise Refused(404, "Refund not found", "refund_not_found")
        return Answer(200, {"status": True, "message": "Refund retrieved", "data": self.ledger.refund(refund)})

    def _list_disputes(self, call: Call) -> Answer:
        rows = within(reversed(self.ledger.disputes.values()), call.query, call.hidden_after())
        if "status" in call.query:
            rows = [row for row in rows if row.status == call.query["status"]]
        if "transaction" in call.query:
            rows = [row for row in rows if str(row.transaction_id) == call.query["transaction"]]
        page, meta = numbered_page(rows, call.query)
        data = [self.ledger.dispute(row) for row in page]
        return Answer(200, {"status": True, "message": "Disputes retrieved", "data": data, "meta": meta})

    def _fetch_dispute(self, call: Call) -> Answer:
        dispute = self.ledger.disputes.get(int(call.argument))
        if dispute is None:
            raise Refused(404, "Dispute not found", "dispute_not_found")
        return Answer(200, {"status": True, "message": "Dispute retrieved", "data": self.ledger.dispute(dispute)})

    def _transaction_disputes(self, call: Call) -> Answer:
        """One dispute although the path says disputes: so does the published description."""
        found = [row for row in self.ledger.disputes.values() if str(row.transaction_id) == call.argument]
        if not found:
            raise Refused(404, "Dispute not found", "dispute_not_found")
        data = {
            **self.ledger.dispute(found[-1]),
            "merchant_transaction_reference": found[-1].reference,
            "integration": INTEGRATION,
            "created_by": 1,
        }
        return Answer(200, {"status": True, "message": "Dispute retrieved successfully", "data": data})

    def _session_timeout(self, call: Call) -> Answer:
        message = "Payment session timeout retrieved"
        if call.body:
            seconds = whole_number(call.body.get("timeout"))
            if seconds is None or seconds < 0:
                raise Refused(400, "timeout must be a number of seconds", "invalid_params")
            self.ledger.keep_session_timeout(seconds)
            message = "Payment session timeout updated"
        data = {"payment_session_timeout": self.ledger.session_timeout_seconds}
        return Answer(200, {"status": True, "message": message, "data": data})

    # Controls: what customers, banks and the dashboard do

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
            bears = habit == "pays-fees" or self.fees_by_customer if fees_by_customer is None else fees_by_customer
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
            self._emit("charge.success", transaction, self.ledger.charge(transaction))
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
            self._open(reference, email, amount, currency, None, metadata)
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

    def dashboard_refund(self, reference: str, amount: int | None = None, merchant_note: str | None = None) -> Json:
        """A refund that somebody makes in Paystack's dashboard: of what is left, or of `amount`, more too."""
        with self.lock:
            transaction = self.ledger.known(reference)
            if transaction.status != "success":
                raise SandboxError(f"{reference} is not paid")
            amount = self.ledger.left(transaction) if amount is None else amount
            return vars(self._make_refund(transaction, amount, merchant_note, None, "dashboard"))

    def _make_refund(self, transaction: Transaction, amount: int, note: Any, shown: Any, by: str) -> Refund:
        text = f"Refund for transaction {transaction.reference} by {transaction.email}"
        refund = Refund(
            id=15_581_137 + len(self.ledger.refunds),
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
        self._emit("refund.pending", transaction, self._refund_event(refund))
        self._process_later(refund)
        return refund

    def move_refund(self, refund: int | str, status: str) -> Json:
        """A refund, by its id or as the last one of a reference, becomes `status`; the event tells of it."""
        with self.lock:
            row = self.ledger.refund_named(refund)
            if status not in REFUND_STATES:
                raise SandboxError(f"a refund is never {status!r}, but one of {', '.join(REFUND_STATES)}")
            row.status = status
            row.refunded_at = now() if status == "processed" else None
            self.ledger.keep(row)
            self._emit(f"refund.{status}", self.ledger.transactions[row.reference], self._refund_event(row))
            return dict(vars(row))

    def _refund_event(self, refund: Refund) -> Json:
        """Without id and note unless the setting says so, the amount a string in the early events, as published."""
        early = refund.status in ("pending", "processing")
        data: Json = {
            "status": refund.status,
            "transaction_reference": refund.reference,
            "refund_reference": None,
            "amount": str(refund.amount) if early else refund.amount,
            "currency": refund.currency,
            "processor": "instant-transfer",
            "customer": {
                "first_name": None,
                "last_name": None,
                "email": self.ledger.transactions[refund.reference].email,
            },
            "integration": INTEGRATION,
            "domain": refund.domain,
        }
        if self.refund_events_with_id:
            data |= {"id": refund.id, "merchant_note": refund.merchant_note}
        return data

    def _process_later(self, refund: Refund) -> None:
        if self.refund_seconds is not None:
            self._spawn(self._process, refund)

    async def _process(self, refund: Refund) -> None:
        """Lead a refund to its end by itself, from wherever it stands after a restart."""
        path = REFUND_PATHS.get(self.ledger.transactions[refund.reference].habit, ("processing", "processed"))
        for status in path[path.index(refund.status) + 1 :] if refund.status in path else path:
            before = refund.status
            await asyncio.sleep(self.refund_seconds or 0)
            if refund.status != before:  # somebody else has moved it
                return
            self.move_refund(refund.id, status)

    def dispute(self, reference: str, amount: int | None = None) -> Json:
        """The customer's bank disputes the charge, or `amount` of it."""
        with self.lock:
            transaction = self.ledger.known(reference)
            dispute = Dispute(
                id=2867 + len(self.ledger.disputes),
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
        self._emit(f"charge.dispute.{what}", self.ledger.transactions[dispute.reference], self.ledger.dispute(dispute))
        return dict(vars(dispute))

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
        """Let the next `times` calls of an endpoint (or events, for "webhook") meet a fault; the module lists them."""
        known = WEBHOOK_FAULTS if endpoint == "webhook" else FAULTS
        if name not in known:
            raise SandboxError(f"no fault {name!r} for {endpoint}; there is {', '.join(known)}")
        if endpoint not in ("webhook", "*", *ENDPOINTS):
            raise SandboxError(f"no endpoint {endpoint!r}; there is {', '.join(ENDPOINTS)}")
        with self.lock:
            if lasts is not None or probability < 1:
                times = None  # what lasts a while, or comes by chance, is not used up by its first call
            self._faults.append(Fault(endpoint, name, times, lasts, probability, seed, prefix, effect, options))

    def clear_faults(self) -> None:
        with self.lock:
            self._faults.clear()

    def configure(self, **settings: Any) -> None:
        """Change one of: secret_key, merchant, currencies, fees_by_customer, not_found_status (400 or 404),
        latency_seconds (of each answer of the API), refund_seconds, refund_events_with_id, webhook_url,
        webhook_timeout_seconds, retry_seconds (a list: when an unanswered event is sent again)."""
        for name, value in settings.items():
            if name not in SETTINGS:
                raise SandboxError(f"no setting {name!r}; there is {', '.join(SETTINGS)}")
            if name == "webhook_url" and value is not None and not is_loopback(urlsplit(value).hostname or ""):
                raise SandboxError(f"the sandbox sends webhooks to loopback only, not to {value}")
            setattr(self, name, value)

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
            rows = [row for row in self._deliveries if reference in (None, row.reference)]
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

    def calls(self, endpoint: str, reference: str | None = None) -> int:
        """How many requests with the right key came for an endpoint, or for one reference there."""
        with self.lock:
            if reference is not None:
                return self._calls[endpoint, reference]
            return sum(count for (name, _), count in self._calls.items() if name == endpoint)

    def faults_met(self) -> dict[str, int]:
        """How many calls and events have met each fault, by "ENDPOINT NAME"."""
        with self.lock:
            return dict(self._met)

    def requests(self) -> list[Json]:
        """The last 1,000 of them, with their query and body."""
        with self.lock:
            return list(self._requests)

    # Webhooks

    def send_event(self, reference: str, event: str = "charge.success", **members: Any) -> Json:
        """Send an event (again), as the ledger stands now, with `members` instead of its own."""
        with self.lock:
            return self._emit(event, self.ledger.known(reference), self._event_data(reference, event) | members)

    def forge_event(self, reference: str, event: str = "charge.success", **members: Any) -> Json:
        """Send what looks like an event, also of an unpaid transaction, with a signature made by another key."""
        with self.lock:
            data = self._event_data(reference, event) | {"status": "success"} | members
            return self._emit(event, self.ledger.known(reference), data, "forged")

    def event(self, reference: str, event: str = "charge.success", **members: Any) -> tuple[bytes, dict[str, str]]:
        """An event's body and headers, for a test that delivers it itself."""
        with self.lock:
            body = event_body(event, self._event_data(reference, event) | members)
        return body, {"Content-Type": "application/json", "x-paystack-signature": sign(body, self.secret_key)}

    def _event_data(self, reference: str, event: str) -> Json:
        if event.startswith("refund."):
            return self._refund_event(
                replace(self.ledger.refund_named(reference), status=event.removeprefix("refund."))
            )
        if event.startswith("charge.dispute."):
            return self.ledger.dispute([row for row in self.ledger.disputes.values() if row.reference == reference][-1])
        return self.ledger.charge(self.ledger.known(reference))

    def hold_webhooks(self) -> None:
        """Keep all events back until release_webhooks."""
        with self.lock:
            self._held = self._held or []

    def release_webhooks(self, seed: int | None = None) -> None:
        """Send what was held back, in its order or, with a seed, shuffled."""
        with self.lock:
            held, self._held = self._held or [], None
            if seed is not None:
                random.Random(seed).shuffle(held)  # noqa: S311
            for delivery in held:
                self._dispatch(delivery)

    def webhooks_due(self) -> int:
        """How many events are to be sent and have not been tried yet."""
        with self.lock:
            return self._untried

    def wait_for_webhooks(self, timeout_seconds: float = 5.0) -> bool:
        """Wait until each event that is to be sent has been tried once; False when that takes too long."""
        with self.changed:
            return self.changed.wait_for(lambda: self._untried == 0, timeout_seconds)

    @property
    def mode(self) -> str:
        return "live" if self.secret_key.startswith("sk_live_") else "test"

    def _emit(self, event: str, transaction: Transaction, data: Json, fault_name: str | None = None) -> Json:
        # A forged event stays one, whatever else may meet events at the moment.
        fault = None if fault_name == "forged" else self._fault_for("webhook", transaction.reference)
        if fault is None and fault_name is None and transaction.habit.endswith("-webhook"):
            fault_name = transaction.habit.removesuffix("-webhook")
        if fault is None and fault_name in WEBHOOK_FAULTS:
            fault = Fault("webhook", fault_name)
        body = event_body(event, data)
        key = self.secret_key if fault is None or fault.name != "forged" else f"{self.secret_key}-another"
        delivery = Delivery(event, transaction.reference, body, sign(body, key), fault)
        self._deliveries.append(delivery)
        if self._held is None:
            self._dispatch(delivery)
        else:
            self._held.append(delivery)
        return json.loads(body)  # type: ignore[no-any-return]

    def _dispatch(self, delivery: Delivery) -> None:
        if self.webhook_url is None or self._loop is None or (delivery.fault and delivery.fault.name == "lost"):
            return
        self._untried += 1
        self._spawn(self._deliver, delivery)

    def _spawn(self, work: Callable[[Any], Coroutine[Any, Any, None]], subject: object) -> None:
        """Run `work(subject)` on the loop, from whatever thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(lambda: self._begin(work(subject)))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)  # or it might be collected before its end
        task.add_done_callback(self._tasks.discard)

    async def _deliver(self, delivery: Delivery) -> None:
        """Send an event until it is answered by exactly 200, or the schedule ends."""
        fault = delivery.fault
        if fault is not None and fault.name == "late":
            await asyncio.sleep(fault.seconds(3))
        if fault is not None and fault.name == "reordered" and not self._lagging:
            self._lagging = True  # one at a time, or two would wait for each other
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._overtaken.wait(), fault.seconds(3))
            self._lagging = False
        for wait in (0.0, *(RETRY_SECONDS[self.mode] if self.retry_seconds is None else self.retry_seconds)):
            await asyncio.sleep(wait)
            copies = 2 if fault is not None and fault.name == "double" and not delivery.answers else 1
            answers = await asyncio.gather(*(self._post(delivery) for _ in range(copies)))
            with self.changed:
                self._untried -= not delivery.answers
                delivery.answers.extend(answers)
                self.changed.notify_all()
            self._overtaken.set()
            self._overtaken = asyncio.Event()
            if 200 in answers:
                return

    async def _post(self, delivery: Delivery) -> int | str:
        """One try, on a connection of its own: the answer's status, or the name of what went wrong."""
        url = urlsplit(self.webhook_url or "")
        head = (
            f"POST {url.path or '/'} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(delivery.body)}\r\nx-paystack-signature: {delivery.signature}\r\n"
            "User-Agent: paystack-sandbox\r\nConnection: close\r\n\r\n"
        )
        try:
            async with self._slots, asyncio.timeout(self.webhook_timeout_seconds):
                reader, writer = await asyncio.open_connection(url.hostname, url.port or 80)
                try:
                    writer.write(head.encode() + delivery.body)
                    status = int((await reader.readline()).split()[1])
                    await reader.read(65536)  # the rest, so that the other side does not see a reset
                    return status
                finally:
                    writer.close()
        except (OSError, ValueError, IndexError) as error:
            return type(error).__name__

    async def _first_try(self, delivery: Delivery) -> None:
        """Wait, five seconds at most, until a webhook has been tried."""
        for _ in range(1000):
            if delivery.answers:
                return
            await asyncio.sleep(0.005)

    # Controls over HTTP, out of reach of web pages

    def _control(self, request: Request, peer: str) -> Answer:
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
            result = getattr(self, name)(**arguments)
        except (SandboxError, TypeError, ValueError, KeyError) as error:
            return Answer(400, {"error": str(error)})
        return Answer(200, {"result": result})

    # The checkout page

    def _checkout(self, request: Request) -> Answer:
        with self.lock:
            transaction = self.ledger.by_code.get(request.path.removeprefix("/checkout/"))
            if transaction is None:
                return page(404, "Payment not found", Markup("<p>This link leads to no payment.</p>"))
            if request.method == "GET":
                return self._show(transaction)
            if request.method != "POST":
                return Answer(405, b"", {"Allow": "GET, POST"})
            choice = dict(parse_qsl(request.body.decode("latin-1"))).get("do")
            if choice == "cancel":
                return self._leave(transaction)
            if transaction.status != "success" and not self._expired(transaction):
                self._try_card(transaction, choice)
            # A second press of the button, or a reload, ends where the first did and pays nothing.
            paid = transaction.status == "success"
            return see_other(returning(transaction) if paid else None, request.path)

    def _try_card(self, transaction: Transaction, choice: str | None) -> None:
        first = transaction.tries == 0
        if choice == "decline" or transaction.habit == "declines" or (transaction.habit == "decline" and first):
            self.decline(transaction.reference)
        elif choice == "pay":
            self.pay(transaction.reference)

    def _leave(self, transaction: Transaction) -> Answer:
        if transaction.status == "success":
            return see_other(returning(transaction), request_path(transaction))
        if url := giving_up(transaction):
            return see_other(url, url)
        text = Markup('<p>Nothing was paid.</p><p><a class="button" href="{}">Back to the payment</a></p>')
        return page(200, "You left the payment", text.format(request_path(transaction)))

    def _expired(self, transaction: Transaction) -> bool:
        age = datetime.now(UTC) - parse_time(transaction.created_at)
        return 0 < self.ledger.session_timeout_seconds < age.total_seconds()

    def _show(self, transaction: Transaction) -> Answer:
        here = request_path(transaction)
        if transaction.status == "success":
            text = Markup("<p>{} paid {}.</p>").format(transaction.email, money(transaction.currency, transaction.paid))
            return page(200, "Payment successful", text + back(returning(transaction), self.merchant))
        if self._expired(transaction):
            return page(
                410,
                "Payment session expired",
                Markup("<p>Go back to the shop to start again.</p>") + back(giving_up(transaction), self.merchant),
            )
        bears = self.fees_by_customer or transaction.habit == "pays-fees"
        total = with_fees(transaction.currency, transaction.amount) if bears else transaction.amount
        title, declined, fees = f"Pay {money(transaction.currency, total)} to {self.merchant}", Markup(), Markup()
        if transaction.status == "failed":
            title, declined = f"Card declined. {title}", DECLINED.format(transaction.gateway_response)
        if bears:
            fees = Markup('<p class="fees">of which {} are fees</p>').format(
                money(transaction.currency, total - transaction.amount)
            )
        text = CHECKOUT.format(
            merchant=self.merchant,
            amount=money(transaction.currency, total),
            size=Markup(' class="long"') if total >= 10**9 else "",
            fees=fees,
            email=transaction.email,
            declined=declined,
            here=here,
            reference=transaction.reference,
        )
        return document(200, title, text)


ENDPOINTS: dict[str, Callable[[Sandbox, Call], Answer]] = {
    "initialize": Sandbox._initialize,
    "verify": Sandbox._verify,
    "list-transactions": Sandbox._list_transactions,
    "fetch-transaction": Sandbox._fetch_transaction,
    "refund": Sandbox._refund,
    "list-refunds": Sandbox._list_refunds,
    "fetch-refund": Sandbox._fetch_refund,
    "list-disputes": Sandbox._list_disputes,
    "fetch-dispute": Sandbox._fetch_dispute,
    "transaction-disputes": Sandbox._transaction_disputes,
    "session-timeout": Sandbox._session_timeout,
}
ROUTES = [
    ("POST", re.compile(r"/transaction/initialize()"), "initialize"),
    ("GET", re.compile(r"/transaction/verify/(.+)"), "verify"),
    ("GET", re.compile(r"/transaction()"), "list-transactions"),
    ("GET", re.compile(r"/transaction/(\d{1,18})"), "fetch-transaction"),
    ("POST", re.compile(r"/refund()"), "refund"),
    ("GET", re.compile(r"/refund()"), "list-refunds"),
    ("GET", re.compile(r"/refund/(\d{1,18})"), "fetch-refund"),
    ("GET", re.compile(r"/dispute()"), "list-disputes"),
    ("GET", re.compile(r"/dispute/(\d{1,18})"), "fetch-dispute"),
    ("GET", re.compile(r"/dispute/transaction/(\d{1,18})"), "transaction-disputes"),
    ("GET", re.compile(r"/integration/payment_session_timeout()"), "session-timeout"),
    ("PUT", re.compile(r"/integration/payment_session_timeout()"), "session-timeout"),
]


def route(request: Request) -> tuple[str, str]:
    """The endpoint and what the path names; a slash at the end makes no difference."""
    path = request.path.rstrip("/")
    for method, pattern, endpoint in ROUTES:
        if method == request.method and (match := pattern.fullmatch(path)):
            return endpoint, match[1]
    raise Refused(404, "Entity not found", "not_found")


# HTTP


async def read_request(reader: asyncio.StreamReader) -> Request:
    """ValueError for what is not HTTP or too large, EOFError (IncompleteReadError) when the client has gone."""
    async with asyncio.timeout(IDLE_SECONDS):
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head[:-4].decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        length = int(headers.get("content-length", 0))
        if not 0 <= length <= BODY_LIMIT or "transfer-encoding" in headers:
            raise ValueError("a body of at most 1 MiB with its Content-Length")
        body = await reader.readexactly(length) if length else b""
    path, _, query = target.partition("?")
    return Request(method, unquote(path), dict(parse_qsl(query)), headers, body)


def parse_body(request: Request) -> Json:
    if not request.body:
        return {}
    try:
        body = json.loads(request.body)
    except ValueError:
        raise Refused(400, "Invalid JSON", "invalid_json") from None
    if not isinstance(body, dict):
        raise Refused(400, "Invalid JSON", "invalid_json")
    return body


def encode(answer: Answer) -> bytes:
    is_json = isinstance(answer.body, dict)
    body = json.dumps(answer.body, separators=(",", ":")).encode() if isinstance(answer.body, dict) else answer.body
    headers = {"Content-Type": "application/json" if is_json else "text/plain", "Content-Length": str(len(body))}
    headers["Date"] = formatdate(usegmt=True)
    lines = "".join(f"{name}: {value}\r\n" for name, value in (headers | answer.headers).items())
    return f"HTTP/1.1 {answer.status} {responses.get(answer.status, '')}\r\n{lines}\r\n".encode("latin-1") + body


async def send(writer: asyncio.StreamWriter, answer: Answer, request: Request | None = None) -> bool:
    """Send an answer; False when the connection ends with it, as it does after a fault."""
    if request is None:
        answer = replace(answer, headers={**answer.headers, "Connection": "close"})
    writer.write(encode(answer))
    await writer.drain()
    return request is not None and request.headers.get("connection", "").lower() != "close"


async def send_slowly(writer: asyncio.StreamWriter, raw: bytes, fault: Fault) -> bool:
    """A byte a second, which no time-out between two reads ever ends."""
    head, body = raw.split(b"\r\n\r\n", 1)
    if fault.name == "drip-body":
        writer.write(head + b"\r\n\r\n")
        raw = body
    for byte in raw:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(fault.seconds(1))
    return False


async def send_huge(writer: asyncio.StreamWriter, size: int) -> bool:
    """Valid JSON of `size` bytes, made as it goes."""
    start, end, part = b'{"status": true, "message": "', b'", "data": {}}', b"a" * 65536
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % size + start)
    left = size - len(start) - len(end)
    while left > 0:
        writer.write(part[:left])
        await writer.drain()
        left -= len(part)
    writer.write(end)
    await writer.drain()
    return False


def came_from_here(request: Request, peer: str) -> bool:
    """A program on this machine sent it: no proxy, no page of another site, no name that was made to point here."""
    host = request.headers.get("host", "")
    return (
        is_loopback(peer)
        and is_loopback(urlsplit(f"//{host}").hostname or "")
        and request.headers.get("origin") in (None, f"http://{host}")
        and request.headers.get("sec-fetch-site") in (None, "none", "same-origin")
        and not {"forwarded", "x-forwarded-for", "x-forwarded-host"} & request.headers.keys()
    )


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def sign(body: bytes, key: str) -> str:
    return hmac.new(key.encode(), body, hashlib.sha512).hexdigest()


def event_body(event: str, data: Json) -> bytes:
    return json.dumps({"event": event, "data": data}, separators=(",", ":"), ensure_ascii=False).encode()


def misdirected(fault: Fault, data: Json) -> Json:
    """The data of initialize (or another endpoint) with a URL or a reference that is not to be trusted."""
    code = data.get("access_code", "")
    match fault.name:
        case "foreign-url":
            return {
                **data,
                "authorization_url": fault.options.get("url", f"https://checkout.paystack.com.example.com/{code}"),
            }
        case "http-url":
            return {**data, "authorization_url": f"http://checkout.paystack.com/{code}"}
        case "no-url":
            return {name: value for name, value in data.items() if name != "authorization_url"}
    return {**data, "reference": f"{data.get('reference', '')}-other"}


def text_or_json(content: Any) -> Json | bytes:
    return content if isinstance(content, dict) else str(content).encode()


# Values


def now(**later: float) -> str:
    return iso(datetime.now(UTC) + timedelta(**later))


def iso(moment: datetime) -> str:
    """As Paystack writes it; in one form, so that texts sort as moments do."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03}Z"


def parse_time(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def whole_number(value: object) -> int | None:
    """An amount as JSON integer or digits; everything else, 10.5 and true too, is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return int(value) if isinstance(value, str) and value.isdecimal() else None


def parsed_metadata(value: Any) -> Any:
    """Metadata may be sent as an object or as JSON in a string."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


def fee(currency: str, amount: int) -> int:
    """What Paystack keeps of a payment, in subunits, rounded up."""
    _, points, flat, cap = CURRENCIES.get(currency, CURRENCIES["NGN"])
    if amount < FLAT_FEE_FROM.get(currency, 0):
        flat = 0
    kept = -(-amount * points // 10000) + flat
    return min(kept, cap) if cap is not None else kept


def with_fees(currency: str, amount: int) -> int:
    """What a customer who bears the fees pays, so that `amount` is left."""
    total = amount
    while total != amount + fee(currency, total):
        total = amount + fee(currency, total)
    return total


def money(currency: str, amount: int) -> str:
    return f"{currency}\N{NO-BREAK SPACE}{amount // 100:,}.{amount % 100:02}"


def customer(email: str, metadata: Any = None, nobody: str | None = None) -> Json:
    """The customer as Paystack knows him; `nobody` is what stands for the names that he has not given."""
    digest = hashlib.sha256(email.encode()).hexdigest()
    return {
        "id": int(digest[:7], 16),
        "first_name": nobody,
        "last_name": nobody,
        "email": email,
        "customer_code": f"CUS_{digest[:15]}",
        "phone": nobody,
        "metadata": metadata,
        "risk_action": "default",
        "international_format_phone": nobody,
    }


def checkout_log(transaction: Transaction) -> Json | None:
    """What the customer did on the page."""
    if not transaction.tries:
        return None
    paid = transaction.status == "success"
    return {
        "start_time": int(parse_time(transaction.created_at).timestamp()),
        "time_spent": 9 * transaction.tries,
        "attempts": transaction.tries,
        "errors": transaction.tries - paid,
        "success": paid,
        "mobile": False,
        "input": [],
        "history": [{"type": "action", "message": "Attempted to pay with card", "time": 7}],
    }


# Lists


def within(rows: Iterable[Row], query: dict[str, str], hidden_after: str | None) -> list[Row]:
    """The rows from `from` to `to`, both included."""
    try:
        since = iso(parse_time(query["from"])) if "from" in query else ""
        until = iso(parse_time(query["to"])) if "to" in query else "9"
    except ValueError:
        raise Refused(400, "from and to must be ISO 8601 dates", "invalid_params") from None
    if hidden_after is not None:
        until = min(until, hidden_after)
    return [row for row in rows if since <= row.created_at <= until]


def page_size(query: dict[str, str]) -> int:
    size = whole_number(query.get("perPage", query.get("per_page", "50")))
    if not size:
        raise Refused(400, "perPage must be a number above 0", "invalid_params")
    return min(size, PAGE_LIMIT)


def numbered_page(rows: list[Row], query: dict[str, str]) -> tuple[list[Row], Json]:
    size, number = page_size(query), whole_number(query.get("page", "1"))
    if not number:
        raise Refused(400, "page must be a number above 0", "invalid_params")
    start = (number - 1) * size
    meta: Json = {"total": len(rows), "skipped": start, "perPage": size, "page": number}
    return rows[start : start + size], meta | {"pageCount": -(-len(rows) // size)}


def cursor_page(rows: list[Transaction], query: dict[str, str]) -> tuple[list[Transaction], Json]:
    """The rows, newest first, below the one that the cursor names: new ones do not shift what is still to come."""
    size = page_size(query)
    try:
        below = int(base64.urlsafe_b64decode(query["next"])) if query.get("next") else None
    except ValueError:
        raise Refused(400, "Invalid cursor", "invalid_params") from None
    left = [row for row in rows if below is None or row.id < below]
    page = left[:size]
    following = base64.urlsafe_b64encode(str(page[-1].id).encode()).decode() if len(left) > size else None
    return page, {"next": following, "previous": None, "perPage": size}


# Pages. No `form-action` in the policy: a browser applies it to the redirects after the form as well, and where a shop
# sends its customer on from callback_url is not known here.

POLICY = "default-src 'none'; style-src 'self'; base-uri 'none'; frame-ancestors 'none'"
DOCUMENT = Markup(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title} (TEST)</title>
<link rel="stylesheet" href="/sandbox.css">
</head>
<body>
<div class="test" role="banner"><strong>TEST</strong> Sandbox: no real money moves.</div>
{text}
</body>
</html>
"""
)
CHECKOUT = Markup(
    """<main>
<header>
<p class="merchant">{merchant}</p>
<h1{size}>{amount}</h1>{fees}
<p class="email">{email}</p>
</header>{declined}
<form method="post" action="{here}">
<h2>Choose a test card</h2>
<button name="do" value="pay" class="pay">Pay {amount} <small>with card 4084 0840 8408 4081</small></button>
<button name="do" value="decline">Try a card that is declined <small>with card 4084 0800 0000 5408</small></button>
<button name="do" value="cancel" class="quiet">Cancel and go back</button>
</form>
<footer>Reference {reference}</footer>
</main>"""
)
DECLINED = Markup(
    """
<p class="declined" role="alert"><strong>Declined: {}.</strong> Nothing was paid. You can try another card.</p>"""
)


def document(status: int, title: str, text: Markup, headers: dict[str, str] | None = None) -> Answer:
    safe = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": POLICY,
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return Answer(status, DOCUMENT.format(title=title, text=text).encode(), safe | (headers or {}))


def page(status: int, title: str, text: Markup) -> Answer:
    return document(status, title, Markup('<main class="note"><h1>{}</h1>{}</main>').format(title, text))


def see_other(url: str | None, otherwise: str) -> Answer:
    return Answer(303, b"", {"Location": url or otherwise, "Cache-Control": "no-store"})


def request_path(transaction: Transaction) -> str:
    return f"/checkout/{transaction.access_code}"


def returning(transaction: Transaction) -> str | None:
    """Where the customer goes after paying: callback_url with both names of the reference, as Paystack adds them."""
    url = web_url(transaction.callback_url)
    if url is None:
        return None
    parts = urlsplit(url)
    named = urlencode({"trxref": transaction.reference, "reference": transaction.reference})
    return urlunsplit(parts._replace(query=f"{parts.query}&{named}" if parts.query else named))


def giving_up(transaction: Transaction) -> str | None:
    """Where the shop wants customers who walk away."""
    return web_url(transaction.metadata.get("cancel_action")) if isinstance(transaction.metadata, dict) else None


def back(url: str | None, merchant: str) -> Markup:
    return Markup('<p><a class="button" href="{}">Return to {}</a></p>').format(url, merchant) if url else Markup()


def web_url(value: object) -> str | None:
    """An address that may stand in a Location header, made ASCII."""
    if not isinstance(value, str) or urlsplit(value).scheme not in ("http", "https"):
        return None
    return quote(value, safe=":/?#[]@!$&'()*+,;=%~")


# The command


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1", help="a loopback address (127.0.0.1)")
    parser.add_argument("--port", type=int, default=0, help="0, the default, takes a free one")
    parser.add_argument("--secret-key", default=os.environ.get("PAYSTACK_SECRET_KEY"), help="or $PAYSTACK_SECRET_KEY")
    parser.add_argument("--webhook-url", help="where events go, on loopback; without it none are sent")
    parser.add_argument("--public-url", help="the origin of checkout pages, where it is not this address")
    parser.add_argument("--data", metavar="DIR", help="keep the ledger here; without it in memory")
    parser.add_argument("--merchant", default="Example Shop", help="the name on the checkout page")
    parser.add_argument("--latency-seconds", type=float, default=0.0, help="how long each answer of the API takes")
    parser.add_argument("--refund-seconds", type=float, default=2.0, help="how long a refund stays in each state (2)")
    parser.add_argument(
        "--retry-seconds", type=float, nargs="+", metavar="S", help="when unanswered events are sent again"
    )
    options = parser.parse_args()
    if not options.secret_key:
        parser.error("--secret-key is missing")
    try:
        sandbox = Sandbox(
            options.secret_key,
            options.webhook_url,
            options.data,
            host=options.host,
            port=options.port,
            public_url=options.public_url,
            merchant=options.merchant,
            retry_seconds=options.retry_seconds,
            refund_seconds=options.refund_seconds,
        )
        sandbox.configure(latency_seconds=options.latency_seconds)
        asyncio.run(serve_until_told(sandbox))
    except (OSError, SandboxError) as error:
        sys.exit(f"sandbox: {error}")


async def serve_until_told(sandbox: Sandbox) -> None:
    loop, here = asyncio.get_running_loop(), asyncio.current_task()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, here.cancel if here else sandbox.stop)

    def say() -> None:
        sys.stdout.write(f"sandbox ready on {sandbox.url}\n")
        sys.stdout.flush()

    with contextlib.suppress(asyncio.CancelledError):
        await sandbox.serve(say)


if __name__ == "__main__":
    main()
