"""Paystack's REST API, as far as paygate needs it: typed outcomes of initialize, verify and list, and signed events.

Nothing that Paystack sends is believed before it has been read here: by the HTTP status first, then `status is true`,
then the members that are needed (https://paystack.com/docs/api/). What cannot be read is `Unavailable`: no answer.
"""

import email.utils
import hashlib
import hmac
import http.client
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import calls
from money import Charge, Refund
from settings import PAYSTACK_URL, origin

CHECKOUT_ORIGIN = "https://checkout.paystack.com"
LARGEST_ANSWER = 4 * 1024 * 1024
PER_PAGE = 100
MOST_PAGES = 100_000


class Unavailable(Exception):
    """No answer that says what happened: the call may or may not have taken effect."""

    def __init__(self, outcome: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(outcome)
        self.outcome = outcome
        self.retry_after_seconds = retry_after_seconds

    @property
    def asked_to_wait(self) -> bool:
        return self.retry_after_seconds is not None


class Misconfigured(Exception):
    """Paystack refuses our key or our account's set-up: nothing that a customer or a retry can mend."""


@dataclass(frozen=True)
class Opened:
    checkout_url: str


@dataclass(frozen=True)
class Duplicate:
    """The reference has been initialized before; the URL of that call cannot be had again."""


@dataclass(frozen=True)
class Refused:
    """Paystack takes no payment of this customer or amount."""

    field: str
    reason: str


@dataclass(frozen=True)
class Unpaid:
    """Nobody has paid. `declined` is the provider's word for the last try, if there was one."""

    declined: str | None


@dataclass(frozen=True)
class NotFound:
    pass


@dataclass(frozen=True)
class UnderWay:
    """The customer is acting, or a word that we do not know: neither paid nor unpaid."""


@dataclass(frozen=True)
class RefundRefused:
    """Paystack did not take the refund: nothing was given back, nor will be."""

    reason: str


@dataclass(frozen=True)
class Event:
    """A signed webhook. `mode` is None where it does not say; `charge` is set for a readable `charge.success` alone."""

    name: str
    reference: str | None
    mode: str | None
    charge: Charge | None


class Gateway:
    """Paystack, or whatever stands at `url` in its place. Safe to share between threads.

    `mode` is that of the keys; an answer of the other mode is no answer.
    """

    def __init__(self, keys: tuple[str, ...], url: str, timeout_seconds: float, mode: str) -> None:
        self.keys = keys
        self.url = url
        self.timeout_seconds = timeout_seconds
        self.mode = mode
        self.checkout_origins = {CHECKOUT_ORIGIN}
        if url != PAYSTACK_URL:
            self.checkout_origins.add(origin(url) or CHECKOUT_ORIGIN)
        self.caller = calls.Caller(
            url,
            {"Authorization": f"Bearer {keys[0]}", "Accept": "application/json", "Content-Type": "application/json"},
        )

    def initialize(
        self,
        *,
        reference: str,
        email: str,
        amount_minor: int,
        currency: str,
        callback_url: str,
        metadata: dict[str, str],
        within_seconds: float,
    ) -> Opened | Duplicate | Refused:
        """Open a transaction under `reference`. Raises Unavailable and Misconfigured.

        https://paystack.com/docs/api/transaction/#initialize
        """
        status, answer = self._call(
            "POST",
            "/transaction/initialize",
            within_seconds,
            {
                "reference": reference,
                "email": email,
                "amount": amount_minor,
                "currency": currency,
                "callback_url": callback_url,
                "metadata": metadata,
            },
        )
        if status == 200:
            data = _data(answer)
            url = data.get("authorization_url")
            if data.get("reference") != reference or not isinstance(url, str) or not self._is_checkout(url):
                raise Unavailable("unreadable")
            return Opened(url)
        code, message = _complaint(answer)
        if code == "duplicate_reference" or ("duplicate" in message.lower() and "reference" in message.lower()):
            return Duplicate()
        if status == 400 and (field := _field_named(message)):
            # Shown to the customer and kept: without an address that it may quote.
            return Refused(field, " ".join(word for word in message.split() if "@" not in word))
        raise Misconfigured

    def verify(self, reference: str, within_seconds: float) -> Charge | Unpaid | UnderWay | NotFound:
        """What has become of `reference`. Raises Unavailable and Misconfigured.

        https://paystack.com/docs/api/transaction/#verify
        """
        status, answer = self._call("GET", f"/transaction/verify/{reference}", within_seconds)
        if status == 200:
            data = _data(answer)
            if data.get("reference") != reference or data.get("domain", self.mode) != self.mode:
                raise Unavailable("unreadable")
            return read_transaction(data, self.mode)
        code, message = _complaint(answer)
        if status in (400, 404) and (code == "transaction_not_found" or "not found" in message.lower()):
            return NotFound()
        raise Misconfigured

    def transactions(self, since: datetime) -> Iterator[Charge]:
        """Every charge of our mode among the account's transactions from `since` on.

        Raises Unavailable and Misconfigured. https://paystack.com/docs/api/transaction/#list
        """
        for row in self._pages("/transaction", since):
            try:
                transaction = read_transaction(row, self.mode)
            except Unavailable:
                continue  # one row that cannot be read hides no other; its own look will say so
            if isinstance(transaction, Charge):
                yield transaction

    def refund(self, reference: str, amount_minor: int, currency: str, note: str) -> Refund | RefundRefused:
        """Ask for a refund of the charge `reference`. Never to be repeated: Paystack would make a second one.

        Raises Unavailable when nobody knows. https://paystack.com/docs/api/refund/#create
        """
        status, answer = self._call(
            "POST",
            "/refund",
            self.timeout_seconds,
            {"transaction": reference, "amount": amount_minor, "currency": currency, "merchant_note": note},
        )
        if status == 200:
            made = read_refund(_data(answer))
            if made.charge_reference not in (None, reference):
                raise Unavailable("unreadable")
            return made
        if status in (400, 401, 403, 404):
            return RefundRefused(_complaint(answer)[1] or f"HTTP {status}")
        raise Unavailable(str(status))

    def refund_of_id(self, provider_id: int) -> Refund:
        """A refund as it stands. Raises Unavailable and Misconfigured. https://paystack.com/docs/api/refund/#fetch"""
        status, answer = self._call("GET", f"/refund/{provider_id}", self.timeout_seconds)
        if status != 200:
            raise Misconfigured
        refund = read_refund(_data(answer))
        if refund.provider_id != provider_id:
            raise Unavailable("unreadable")
        return refund

    def refunds(self, since: datetime) -> Iterator[Refund]:
        """Every refund of the account from `since` on; it cannot be asked for those of one transaction.

        Raises Unavailable and Misconfigured: a listing that ends without them is complete, so a row that cannot be read
        makes it none. https://paystack.com/docs/api/refund/#list
        """
        for row in self._pages("/refund", since):
            yield read_refund(row)

    def session_timeout(self) -> tuple[int | None, datetime | None]:
        """For how many seconds a checkout page takes payments (0: for ever), and what time it is there, where told.

        Raises Unavailable and Misconfigured. https://paystack.com/docs/api/integration/#fetch-timeout
        """
        response, answer = self._ask("GET", "/integration/payment_session_timeout", self.timeout_seconds)
        if response.status != 200:
            raise Misconfigured
        try:
            moment = email.utils.parsedate_to_datetime(response.headers["Date"])
        except (KeyError, ValueError):
            moment = None
        return _subunits(_data(answer).get("payment_session_timeout")), moment

    def _pages(self, path: str, since: datetime) -> Iterator[dict[str, Any]]:
        """The rows of a list in our mode, page after page."""
        for page in range(1, MOST_PAGES + 1):
            query = f"?perPage={PER_PAGE}&page={page}&from={since.astimezone(UTC):%Y-%m-%dT%H:%M:%S.000Z}"
            status, answer = self._call("GET", path + query, self.timeout_seconds)
            if status != 200:
                raise Misconfigured
            rows = answer.get("data")
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise Unavailable("unreadable")
            yield from (row for row in rows if row.get("domain", self.mode) == self.mode)
            if len(rows) < PER_PAGE:
                return
        raise Unavailable("too long")

    def is_signed(self, body: bytes, signature: str) -> bool:
        """Whether one of our keys made `signature` over the raw `body`, compared in constant time.

        https://paystack.com/docs/payments/webhooks/#signature-validation
        """
        given = signature.encode("latin-1", "replace")
        made = [hmac.new(key.encode(), body, hashlib.sha512).hexdigest().encode() for key in self.keys]
        return any(hmac.compare_digest(each, given) for each in made)

    def _is_checkout(self, url: str) -> bool:
        """A customer is sent to nothing but Paystack's checkout, or the stand-in's own."""
        return url.isascii() and url.isprintable() and " " not in url and origin(url) in self.checkout_origins

    def _call(
        self, method: str, path: str, within_seconds: float, body: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        response, answer = self._ask(method, path, within_seconds, body)
        return response.status, answer

    def _ask(
        self, method: str, path: str, within_seconds: float, body: dict[str, Any] | None = None
    ) -> tuple[http.client.HTTPResponse, dict[str, Any]]:
        """One call, `within_seconds` in all, and the JSON object in its answer, for 200 and for a 4xx that says why.

        Raises Unavailable for everything else: the network, 429, 5xx, a redirect, an answer that is not JSON.
        """
        try:
            sent = None if body is None else json.dumps(body).encode()
            response, content = self.caller.call(method, path, within_seconds, LARGEST_ANSWER, sent)
        except calls.Failed as failed:
            raise Unavailable(str(failed)) from failed
        status = response.status
        if status == 429:
            raise Unavailable("429", _retry_after(response.headers.get("Retry-After", "")))
        if status != 200 and not 400 <= status < 500:
            raise Unavailable(str(status))
        answer = _json(content)
        if not isinstance(answer, dict) or (status == 200 and answer.get("status") is not True):
            raise Unavailable("unreadable")
        return response, answer


def read_event(body: bytes, mode: str) -> Event | None:
    """The event in a signed `body`; None when it is none.

    `mode` stands in where an event does not say its own, as in Paystack's older samples.
    """
    content = _json(body)
    data = content.get("data") if isinstance(content, dict) else None
    name = content.get("event") if isinstance(content, dict) else None
    if not isinstance(name, str) or not name.isprintable() or len(name) > 100 or not isinstance(data, dict):
        return None
    transaction = data.get("transaction")
    references = (
        data.get("reference"),
        data.get("transaction_reference"),
        transaction.get("reference") if isinstance(transaction, dict) else None,
    )
    reference = next((each for each in references if isinstance(each, str) and each.isprintable()), None)
    domain = data.get("domain")
    charge = None
    if name == "charge.success":
        try:
            charge = read_transaction(data, mode)
        except Unavailable:
            charge = None
    return Event(
        name=name,
        reference=reference[:200] if reference else None,
        mode=domain if isinstance(domain, str) else None,
        charge=charge if isinstance(charge, Charge) else None,
    )


def read_transaction(data: dict[str, Any], mode: str) -> Charge | Unpaid | UnderWay:
    """What a transaction object says, from verify, the list or `charge.success`. Raises Unavailable if unreadable.

    Money came with `success`, and with each word that begins with `revers`: a refund under way or done
    (https://paystack.com/docs/payments/verify-payments/, https://support.paystack.com, "transaction statuses").
    """
    word = data.get("status")
    if word == "success" or (isinstance(word, str) and word.lower().startswith("revers")):
        amount_minor = _subunits(data.get("amount"))
        reference, currency = data.get("reference"), data.get("currency")
        requested_minor = _subunits(data.get("requested_amount"))
        if amount_minor is None or not isinstance(reference, str) or not isinstance(currency, str):
            raise Unavailable("unreadable")
        if requested_minor is None and data.get("requested_amount") is not None:
            raise Unavailable("unreadable")
        channel = data.get("channel")
        return Charge(
            reference=reference,
            mode=mode,
            provider_id=_subunits(data.get("id")),
            amount_minor=amount_minor,
            requested_minor=requested_minor,
            fees_minor=_subunits(data.get("fees")),
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
    """What a refund object says, from our own call, the list or a fetch. Raises Unavailable if unreadable.

    `transaction` is an object, an id or, in newer answers, beside `transaction_reference`.
    """
    transaction = data.get("transaction")
    members = transaction if isinstance(transaction, dict) else {"id": transaction}
    reference = data.get("transaction_reference") or members.get("reference")
    provider_id, amount_minor = _subunits(data.get("id")), _subunits(data.get("amount"))
    status, currency, note = data.get("status"), data.get("currency"), data.get("merchant_note")
    if provider_id is None or amount_minor is None or not isinstance(status, str) or not isinstance(currency, str):
        raise Unavailable("unreadable")
    return Refund(
        provider_id=provider_id,
        charge_reference=reference if isinstance(reference, str) else None,
        charge_provider_id=_subunits(members.get("id")),
        amount_minor=amount_minor,
        currency=_one_line(currency)[:10],
        # A word that we do not know is a refund under way.
        status=status if status in REFUND_WORDS else "processing",
        note=note if isinstance(note, str) else None,
    )


REFUND_WORDS = ("pending", "processing", "needs-attention", "processed", "failed")


def _data(answer: dict[str, Any]) -> dict[str, Any]:
    data = answer.get("data")
    if not isinstance(data, dict):
        raise Unavailable("unreadable")
    return data


def _complaint(answer: dict[str, Any]) -> tuple[str, str]:
    """Code and message of a 4xx; either may be missing."""
    code, message = answer.get("code"), answer.get("message")
    return code if isinstance(code, str) else "", _one_line(message) if isinstance(message, str) else ""


def _field_named(message: str) -> str | None:
    """The field of ours that a 400 complains of; "Currency not supported by merchant" is about our account."""
    words = message.lower()
    if "email" in words or "e-mail" in words:
        return "customer_email"
    return "amount" if "amount" in words and "currency" not in words else None


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:200]


def _json(content: bytes) -> Any:
    """JSON that may come from anyone who can stand between us and Paystack; None when it is none."""
    try:
        return DECODE(content.decode())
    except (ValueError, RecursionError):
        return None


def _bounded_integer(digits: str) -> int:
    if len(digits) > 18:
        raise ValueError("no number of Paystack's has that many digits")
    return int(digits)


DECODE = json.JSONDecoder(parse_int=_bounded_integer).decode
"""json.loads with an option would make a decoder for each answer."""


def _subunits(value: object) -> int | None:
    """A whole, not negative number; some of Paystack's events write it as a string."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value, re.ASCII):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _time(value: object) -> datetime | None:
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else None
        return moment.astimezone(UTC) if moment is not None and moment.tzinfo is not None else None
    except (ValueError, OverflowError):  # the last for the year 9999, in a time zone of the west
        return None


def _retry_after(header: str) -> float:
    """The seconds of a Retry-After header, a minute at most: one odd answer must not stop the looking for a day."""
    return min(float(header), 60.0) if re.fullmatch(r"[0-9]{1,5}", header, re.ASCII) else 1.0
