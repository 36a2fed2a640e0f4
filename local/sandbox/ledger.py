"""What is true at the provider: transactions, refunds and disputes, in memory and, where told to, in a file."""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from local.sandbox.wire import Json

UNPAID = "The transaction was not completed"
WIDE = 1 << 63  # what the ids of the customer "wide-id" are above; the bits below it count on as those of others do


class SandboxError(Exception):
    """A control was used in a way that makes no sense."""


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
    is_charged_back: bool = False
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
    altered: Json = field(default_factory=dict)  # members that answers show instead
    without: list[str] = field(default_factory=list)  # members that they lack


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
    """All rows, by each name that they are asked for."""

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
        refunded = sum(refund.amount for refund in refunds if refund.status == "processed")
        if transaction.is_charged_back or refunded >= transaction.paid:
            return "reversed"
        return "success" if self.left(transaction) > 0 else "reversal-pending"

    def left(self, transaction: Transaction) -> int:
        """What can still be refunded: a failed refund frees its amount."""
        if transaction.is_charged_back:
            return 0
        refunds = self.refunds_of.get(transaction.reference, [])
        return transaction.paid - sum(refund.amount for refund in refunds if refund.status != "failed")


def now(**later: float) -> str:
    return iso(datetime.now(UTC) + timedelta(**later))


def iso(moment: datetime) -> str:
    """As Paystack writes it; in one form, so that texts sort as moments do."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03}Z"


def parse_time(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
