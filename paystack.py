"""Paystack's REST API, as far as paygate needs it: typed outcomes of initialize, verify and list, and signed events.

paygate believes an answer of Paystack only after reading it here: first the HTTP status, then `status is true`, then
the members that it needs (https://paystack.com/docs/api/). An answer that cannot be read is `Unavailable`: no answer.
"""

import email.utils
import hashlib
import hmac
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from urllib.parse import quote

import calls
from db import Payment
from money import Charge, Refund
from settings import PAYSTACK_URL, origin

CHECKOUT_ORIGIN = "https://checkout.paystack.com"
LARGEST_ANSWER = 16 * 1024 * 1024
"""A page of a list: a hundred rows, each with any metadata that another shop on the account sent."""
PER_PAGE = 100
MOST_PAGES = 100_000

LARGEST_BIGINT, LARGEST_ID = 2**63 - 1, 2**64 - 1
"""The largest bigint, and Paystack's largest id. A charge's id that does not fit is left out. A refund needs its id."""


class Unavailable(Exception):
    """No answer that says what happened: the call may or may not have taken effect."""

    def __init__(self, outcome: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(outcome)
        self.retry_after_seconds = retry_after_seconds
        """How long Paystack asked us to wait; None if it did not ask."""


class Misconfigured(Exception):
    """Paystack refuses our key or our account's set-up. Neither the customer nor a retry can mend it."""


@dataclass(frozen=True)
class Opened:
    checkout_url: str


class Duplicate:
    """The reference was initialized before; Paystack does not give that call's URL again."""


@dataclass(frozen=True)
class Refused:
    """Paystack does not take what we asked: a payment by this customer or of this amount, or a refund (then `field` is
    `refund`)."""

    field: str
    reason: str


@dataclass(frozen=True)
class Unpaid:
    """Nobody has paid. `declined`: why the last try was declined, if there was a try."""

    declined: str | None


class NotFound:
    """Paystack does not know the reference."""


class UnderWay:
    """Neither paid nor unpaid: the customer is acting, or we do not know the word."""


@dataclass(frozen=True)
class Unreadable:
    """A row of a list that cannot be read, and the names of its charge."""

    charge_reference: str | None
    charge_provider_id: int | None
    note: str | None


@dataclass(frozen=True)
class Event:
    """A signed webhook. `mode` is None if the event does not say it. `charge` is set only for a readable
    `charge.success`; `refund_id` and `refund_minor` for a refund, if the event names them."""

    name: str
    reference: str | None
    mode: str | None
    charge: Charge | None
    refund_id: int | None = None
    refund_minor: int | None = None
    dispute: str = ""
    """The id of its dispute, if any."""
    is_won: bool = False
    """Whether the merchant won a dispute: the customer's claim was declined. Every other resolution takes the money
    back (https://paystack.com/docs/api/dispute/#resolve)."""


class Pace:
    """At most `per_second` calls a second by all threads together, and no calls while Paystack has asked for quiet."""

    def __init__(self, per_second: float) -> None:
        self.gap_seconds = 1 / per_second
        self.lock = threading.Lock()
        self.next_at = self.quiet_until = 0.0

    def wait(self) -> None:
        """Wait until it is the caller's turn. Raises Unavailable while Paystack has asked for quiet."""
        with self.lock:
            now = time.monotonic()
            turn = max(now, self.next_at)
            self.next_at = turn + self.gap_seconds
        time.sleep(turn - now)
        if seconds := self.quiet_seconds():  # an answer to another thread may have begun it while we waited
            raise Unavailable("429", seconds)

    def hold(self, seconds: float) -> None:
        with self.lock:
            self.quiet_until = max(self.quiet_until, time.monotonic() + seconds)

    def quiet_seconds(self) -> float:
        """For how many seconds no call may be made."""
        return max(0.0, self.quiet_until - time.monotonic())


class Gateway:
    """Paystack, or a stand-in at `url`. Safe to share between threads.

    `mode` is the keys' mode; an answer of the other mode is no answer.
    """

    def __init__(self, keys: tuple[str, ...], url: str, timeout_seconds: float, mode: str) -> None:
        self.keys = keys
        self.url = url
        self.timeout_seconds = timeout_seconds
        self.mode = mode
        self.pace: Pace | None = None
        """For the background loops: each call waits for its turn."""
        self.failure = ""
        """Why the last call failed: no answer, or the key is refused; else empty."""
        self.checkout_origins = {CHECKOUT_ORIGIN}
        if url != PAYSTACK_URL:
            self.checkout_origins.add(origin(url) or CHECKOUT_ORIGIN)
        self.caller = calls.Caller(
            url,
            {"Authorization": f"Bearer {keys[0]}", "Accept": "application/json", "Content-Type": "application/json"},
            LARGEST_ANSWER,
        )

    def initialize(
        self, payment: Payment, reference: str, page_url: str, within_seconds: float
    ) -> Opened | Duplicate | Refused:
        """Open a transaction of a payment under `reference`; the customer comes back to `page_url`. Raises Unavailable
        and Misconfigured.

        https://paystack.com/docs/api/transaction/#initialize
        """
        body = {
            "reference": reference,
            "email": payment.customer_email,
            "amount": payment.amount_minor,
            "currency": payment.currency,
            "callback_url": page_url,
            "metadata": {"payment": payment.id, "cancel_action": page_url},
        }
        response, answer = self._call("POST", "/transaction/initialize", within_seconds, body)
        if response.status == 200:
            data = _data(answer)
            url = data.get("authorization_url")
            if data.get("reference") != reference or not isinstance(url, str) or not self._is_checkout(url):
                raise Unavailable("unreadable")
            return Opened(url)
        code, message = _complaint(answer)
        if code == "duplicate_reference" or ("duplicate" in message.lower() and "reference" in message.lower()):
            return Duplicate()
        if response.status == 400 and (field := _field_named(message)):
            # The customer sees it, and it is stored: so without an e-mail address that Paystack may quote.
            return Refused(field, " ".join(word for word in message.split() if "@" not in word))
        raise Misconfigured

    def verify(self, reference: str, within_seconds: float) -> Charge | Unpaid | UnderWay | NotFound:
        """The state of `reference`. Raises Unavailable and Misconfigured.

        https://paystack.com/docs/api/transaction/#verify
        """
        response, answer = self._call("GET", f"/transaction/verify/{reference}", within_seconds)
        if response.status == 200:
            data = _data(answer)
            if data.get("reference") != reference or data.get("domain", self.mode) != self.mode:
                raise Unavailable("unreadable")
            return read_transaction(data, self.mode)
        code, message = _complaint(answer)
        if response.status in (400, 404) and (code == "transaction_not_found" or "not found" in message.lower()):
            return NotFound()
        raise Misconfigured

    def transactions(self, since: datetime) -> Iterator[Charge | Unreadable]:
        """Each charge of our mode among the account's transactions from `since` on. A row that cannot be read hides no
        other row: if it is ours, its own poll says so.

        Raises Unavailable and Misconfigured. https://paystack.com/docs/api/transaction/#list
        """
        for row in self._pages("/transaction", since):
            try:
                transaction = read_transaction(row, self.mode)
            except Unavailable:
                yield Unreadable(_name(row.get("reference")), _whole(row.get("id")), None)
            else:
                if isinstance(transaction, Charge):
                    yield transaction

    def refund(
        self, reference: str, amount_minor: int, currency: str, note: str, within_seconds: float
    ) -> Refund | Refused:
        """Ask for a refund of the charge `reference`. Never repeat the call: Paystack would make a second refund.

        Raises Unavailable if the outcome is unknown. https://paystack.com/docs/api/refund/#create
        """
        body = {"transaction": reference, "amount": amount_minor, "currency": currency, "merchant_note": note}
        response, answer = self._call("POST", "/refund", within_seconds, body)
        if response.status == 200:
            made = read_refund(_data(answer))
            if made.charge_reference not in (None, reference):
                raise Unavailable("unreadable")
            return made
        if response.status in (400, 401, 403, 404):
            return Refused("refund", _complaint(answer)[1] or f"HTTP {response.status}")
        raise Unavailable(str(response.status))

    def refund_of_id(self, provider_id: int | Decimal) -> Refund:
        """A refund as it stands. Raises Unavailable and Misconfigured. https://paystack.com/docs/api/refund/#fetch"""
        response, answer = self._call("GET", f"/refund/{provider_id}", self.timeout_seconds)
        if response.status != 200:
            raise Misconfigured
        refund = read_refund(_data(answer))
        if refund.provider_id != provider_id:
            raise Unavailable("unreadable")
        return refund

    def refunds(self, since: datetime) -> Iterator[Refund | Unreadable]:
        """Each refund of the account from `since` on. Paystack cannot list the refunds of one transaction alone.

        Raises Unavailable and Misconfigured. A list that ends without an error is complete.
        https://paystack.com/docs/api/refund/#list
        """
        for row in self._pages("/refund", since):
            try:
                yield read_refund(row)
            except Unavailable:
                yield Unreadable(*_charge_of(row))

    def session_timeout(self) -> tuple[int | None, datetime | None]:
        """For how many seconds a checkout page takes payments (0: for ever), and Paystack's time, if it sends it.

        Raises Unavailable and Misconfigured. https://paystack.com/docs/api/integration/#fetch-timeout
        """
        response, answer = self._call("GET", "/integration/payment_session_timeout", self.timeout_seconds)
        if response.status != 200:
            raise Misconfigured
        try:
            moment = email.utils.parsedate_to_datetime(response.headers["Date"])
        except (KeyError, ValueError):
            moment = None
        return _whole(_data(answer).get("payment_session_timeout")), moment

    def _pages(self, path: str, since: datetime) -> Iterator[dict[str, Any]]:
        """The rows of a list in our mode, page after page: as many as its `meta` says, else up to an empty page.

        Paystack may limit the size of a page. New rows on top move other rows to later pages, where they come again.
        """
        size = f"perPage={PER_PAGE}&per_page={PER_PAGE}"  # Paystack's description has both names
        seen, total, place, before = 0, 0, "page=1", None
        for page in range(1, MOST_PAGES + 1):
            query = f"?{size}&{place}&from={since.astimezone(UTC):%Y-%m-%dT%H:%M:%S.000Z}"
            response, answer = self._call("GET", path + query, self.timeout_seconds)
            if response.status != 200:
                raise Misconfigured
            rows, meta = answer.get("data"), answer.get("meta")
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise Unavailable("unreadable")
            if rows and rows == before:
                raise Unavailable("incomplete")
            yield from (row for row in rows if row.get("domain") in (None, self.mode))
            seen, before, meta = seen + len(rows), rows, meta if isinstance(meta, dict) else {}
            total, pages = max(total, _whole(meta.get("total")) or 0), _whole(meta.get("pageCount")) or 0
            cursor = meta.get("next")
            is_last = seen >= total and page >= pages if total or pages else "next" in meta and not cursor
            if is_last or not rows:
                if seen < total:
                    raise Unavailable("incomplete")
                return
            place = f"use_cursor=true&next={quote(cursor, safe='')}" if isinstance(cursor, str) else f"page={page + 1}"
        raise Unavailable("too long")

    def is_signed(self, body: bytes, signature: str) -> bool:
        """Whether one of our keys made `signature` over the raw `body`, compared in constant time.

        https://paystack.com/docs/payments/webhooks/#signature-validation
        """
        given = signature.encode("latin-1", "replace")
        made = [hmac.new(key.encode(), body, hashlib.sha512).hexdigest().encode() for key in self.keys]
        return any(hmac.compare_digest(each, given) for each in made)

    def _is_checkout(self, url: str) -> bool:
        """Whether `url` is at Paystack's checkout, or at the stand-in's. A customer is sent nowhere else."""
        return url.isascii() and url.isprintable() and " " not in url and origin(url) in self.checkout_origins

    def _call(
        self, method: str, path: str, within_seconds: float, body: dict[str, Any] | None = None
    ) -> tuple[calls.Answer, dict[str, Any]]:
        """Make one call, `within_seconds` in all. Returns the answer and its JSON object, for 200 and for a 4xx.

        Raises Unavailable for all other results: a network error, 429, 5xx, a redirect, an answer that is not JSON.
        """
        self.failure = "no answer"
        if self.pace is not None:
            self.pace.wait()
        try:
            sent = None if body is None else json.dumps(body).encode()
            response = self.caller.call(method, path, within_seconds, sent)
        except calls.Failed as failed:
            raise Unavailable(str(failed)) from failed
        status = response.status
        if status == 429:
            seconds = _retry_after(response.headers.get("Retry-After", ""))
            if self.pace is not None:
                self.pace.hold(seconds)
            raise Unavailable("429", seconds)
        if status != 200 and not 400 <= status < 500:
            raise Unavailable(str(status))
        answer = _json(response.content)
        if not isinstance(answer, dict) or (status == 200 and answer.get("status") is not True):
            raise Unavailable("unreadable")
        self.failure = "the key is refused" if status == 401 else ""
        return response, answer


def read_event(body: bytes, mode: str) -> Event | None:
    """The event in a signed `body`; None if the body is no event.

    `mode` is used if the event does not say its mode, as in Paystack's older samples.
    """
    content = _json(body)
    data = content.get("data") if isinstance(content, dict) else None
    name = content.get("event") if isinstance(content, dict) else None
    if not isinstance(name, str) or not name.isprintable() or len(name) > 100 or not isinstance(data, dict):
        return None
    reference = _name(data.get("reference")) or _charge_of(data)[0]
    domain = data.get("domain")
    charge = None
    if name == "charge.success":
        with suppress(Unavailable):
            charge = read_transaction(data, mode)
    return Event(
        name=name,
        reference=reference[:200] if reference else None,
        mode=domain if isinstance(domain, str) else None,
        charge=charge if isinstance(charge, Charge) else None,
        refund_id=_whole(data.get("id"), LARGEST_ID) if name.startswith("refund.") else None,
        refund_minor=_whole(data.get("amount")) if name.startswith("refund.") else None,
        dispute=_one_line(str(data.get("id") or "")) if name.startswith("charge.dispute.") else "",
        is_won=name == "charge.dispute.resolve" and data.get("resolution") == "declined",
    )


def read_transaction(data: dict[str, Any], mode: str) -> Charge | Unpaid | UnderWay:
    """Read a transaction object, from verify, the list or `charge.success`. Raises Unavailable if unreadable.

    Money came if the status is `success`, or begins with `revers`: then a refund is under way or done
    (https://paystack.com/docs/payments/verify-payments/, https://support.paystack.com, "transaction statuses").
    """
    word = data.get("status")
    if word == "success" or (isinstance(word, str) and word.lower().startswith("revers")):
        amount_minor = _whole(data.get("amount"))
        reference, currency = _name(data.get("reference")), data.get("currency")
        requested_minor = _whole(data.get("requested_amount"))
        is_garbled = requested_minor is None and data.get("requested_amount") is not None
        if amount_minor is None or reference is None or not isinstance(currency, str) or is_garbled:
            raise Unavailable("unreadable")
        channel = data.get("channel")
        return Charge(
            reference=reference,
            mode=mode,
            provider_id=_whole(data.get("id")),
            amount_minor=amount_minor,
            requested_minor=requested_minor,
            fees_minor=_whole(data.get("fees")),
            currency=_one_line(currency)[:10],
            channel=_one_line(channel)[:50] if isinstance(channel, str) else None,
            paid_at=_time(data.get("paid_at")),
            is_reversed=word != "success",
        )
    if word == "failed":
        reason = data.get("gateway_response")
        return Unpaid(_one_line(reason) if isinstance(reason, str) and reason.strip() else "Declined")
    return Unpaid(None) if word == "abandoned" else UnderWay()


def read_refund(data: dict[str, Any]) -> Refund:
    """Read a refund object, from our own call, the list or a fetch. Raises Unavailable if unreadable.

    `transaction` is an object or an id; newer answers have `transaction_reference` too.
    """
    reference, charge_provider_id, note = _charge_of(data)
    provider_id, amount_minor = _whole(data.get("id"), LARGEST_ID), _whole(data.get("amount"))
    status, currency = data.get("status"), data.get("currency")
    if provider_id is None or amount_minor is None or not isinstance(status, str) or not isinstance(currency, str):
        raise Unavailable("unreadable")
    return Refund(
        provider_id=provider_id,
        charge_reference=reference,
        charge_provider_id=charge_provider_id,
        amount_minor=amount_minor,
        currency=_one_line(currency)[:10],
        # An unknown word means a refund under way.
        status=status if status in REFUND_WORDS else "processing",
        note=note,
    )


def _charge_of(data: dict[str, Any]) -> tuple[str | None, int | None, str | None]:
    """A refund object's names for its charge: the reference, the transaction's id, and our note."""
    transaction, note = data.get("transaction"), data.get("merchant_note")
    members = transaction if isinstance(transaction, dict) else {"id": transaction}
    reference = _name(data.get("transaction_reference")) or _name(members.get("reference"))
    return reference, _whole(members.get("id")), _one_line(note) if isinstance(note, str) else None


REFUND_WORDS = ("pending", "processing", "needs-attention", "processed", "failed")
"""The states of a refund at Paystack, in their order."""


def _data(answer: dict[str, Any]) -> dict[str, Any]:
    data = answer.get("data")
    if not isinstance(data, dict):
        raise Unavailable("unreadable")
    return data


def _complaint(answer: dict[str, Any]) -> tuple[str, str]:
    """The code and the message of a 4xx; each may be empty."""
    code, message = answer.get("code"), answer.get("message")
    return code if isinstance(code, str) else "", _one_line(message) if isinstance(message, str) else ""


def _field_named(message: str) -> str | None:
    """Our name of the field that a 400 refuses. "Currency not supported by merchant" is about our account."""
    words = message.lower()
    if "email" in words or "e-mail" in words:
        return "customer_email"
    return "amount" if "amount" in words and "currency" not in words else None


def _name(value: object) -> str | None:
    """A reference; None if it is empty, or if no column takes it (NUL, half a character)."""
    return value if isinstance(value, str) and value and value.isprintable() else None


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]


def _json(content: bytes) -> Any:
    """The content as JSON; None if it is no JSON. Anyone between us and Paystack may have written it."""
    try:
        return json.loads(content.decode(), parse_int=_integer)
    except (ValueError, RecursionError):
        return None


def _integer(digits: str) -> int | str:
    """A number, or its text if it is longer than an id. Metadata may hold long numbers, and int() is slow on them and
    fails at last."""
    return int(digits) if len(digits) <= len(str(LARGEST_ID)) else digits


def _whole(value: object, largest: int = LARGEST_BIGINT) -> int | None:
    """A whole number from 0 to `largest`, also as a string, as in some of Paystack's events; else None."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,20}", value, re.ASCII):
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= largest else None


def _time(value: object) -> datetime | None:
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else None
        return moment.astimezone(UTC) if moment is not None and moment.tzinfo is not None else None
    except (ValueError, OverflowError):  # OverflowError: the end of the year 9999 in a western time zone
        return None


def _retry_after(header: str) -> float:
    """The seconds of a Retry-After header: one at least, so we do not ask at once, and a minute at most, so an odd
    answer does not stop polling for a day."""
    return min(max(float(header), 1.0), 60.0) if re.fullmatch(r"[0-9]{1,5}", header, re.ASCII) else 1.0
