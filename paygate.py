"""The payment gateway's HTTP API: `gunicorn 'paygate:create_app()'`.

Resources, then how requests are read, how answers are written, and the one shape of every error.
"""

import difflib
import hmac
import json
import logging
import re
import threading
import time
import unicodedata
import uuid
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import falcon
from markupsafe import Markup

import checkout
import db
import log
import money
import paystack
import settings as configuration
from settings import Settings

LARGEST_PAYMENT_BODY = 16 * 1024
LARGEST_EVENT_BODY = 256 * 1024
PAGES = Path(__file__).with_name("pages")


class Paygate(falcon.App[falcon.Request, falcon.Response]):
    """The WSGI app, with what it is made of at hand for gunicorn's hooks."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(middleware=[EveryAnswer(settings)])
        self.settings = settings
        self.database = db.Database(settings.database_url, settings.db_pool)
        self.gateway = paystack.Gateway(
            settings.paystack_secret_keys, settings.paystack_url, settings.paystack_timeout_seconds, settings.mode
        )


def create_app(settings: Settings | None = None) -> Paygate:
    """Everything that serves, built from `settings` (default: the environment); importing builds nothing."""
    settings = settings or configuration.load()
    app = Paygate(settings)
    app.database.open()
    desk = checkout.Desk(app.database, app.gateway, settings.public_url + "/pay/", settings.lease_seconds, answer_of)
    readers = Readers(app.database)
    app.req_options.strip_url_path_trailing_slash = True
    app.set_error_serializer(render_http_error)
    app.add_error_handler(Exception, on_problem)
    app.add_route("/api/v1/payments", Payments(settings, desk))
    app.add_route("/api/v1/payments/{payment_id}", PaymentById(app.database, readers))
    app.add_route("/api/v1/webhooks/paystack", PaystackWebhook(app.database, app.gateway))
    app.add_route("/pay/{payment_id}", PayPage(app.database, readers, settings.merchant_name))
    app.add_route("/paygate.css", Stylesheet())
    app.add_route("/healthz", Health())
    app.add_route("/readyz", Readiness(app.database))
    return app


# Resources


class Payments:
    """POST /api/v1/payments: start a payment, or go on with one that a crash or a fault left behind."""

    def __init__(self, settings: Settings, desk: checkout.Desk) -> None:
        self.settings = settings
        self.desk = desk
        self.slots = threading.BoundedSemaphore(settings.slots)

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        check_api_token(req, self.settings.api_token)
        order = parse_order(read_json(req), self.settings)
        key = db.key_of(parse_idempotency_key(req, self.settings.require_idempotency_key))
        # A provider that hangs may hold the slots' threads and no more: the others serve reads and webhooks.
        if self.slots.acquire(blocking=False):
            try:
                answer, is_replayed = self.start(key, order)
            finally:
                self.slots.release()
        else:
            answer, is_replayed = self.replay(key, order), True
        render_answer(resp, answer, is_replayed=is_replayed)

    def start(self, key: bytes, order: db.Order) -> tuple[db.Answer, bool]:
        reservation = db.reserve(
            self.desk.database,
            mode=self.settings.mode,
            key=key,
            order=order,
            lease_seconds=self.settings.lease_seconds,
            ttl_seconds=self.settings.payment_ttl_seconds,
        )
        if reservation.answer is not None:
            return reservation.answer, True
        return checkout.open_checkout(self.desk, reservation), False

    def replay(self, key: bytes, order: db.Order) -> db.Answer:
        found = db.find_reservation(self.desk.database, mode=self.settings.mode, key=key, order=order)
        if found is None or found.answer is None:
            raise Problem("busy", retry_after_seconds=1)
        return found.answer


class PaymentById:
    """GET /api/v1/payments/{id}: the payment as it stands. Whoever knows its id may read it."""

    def __init__(self, database: db.Database, readers: "Readers") -> None:
        self.database = database
        self.readers = readers

    def on_get(self, req: falcon.Request, resp: falcon.Response, payment_id: str) -> None:
        payment = find_payment(self.database, payment_id)
        self.readers.note(payment)
        resp.content_type = falcon.MEDIA_JSON
        resp.text = envelope(payment, "Payment details retrieved successfully.")


class PaystackWebhook:
    """POST /api/v1/webhooks/paystack: stored and applied before the 200, the one answer that ends its repetitions."""

    def __init__(self, database: db.Database, gateway: paystack.Gateway) -> None:
        self.database = database
        self.gateway = gateway

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        body = read_event_body(req)
        if not self.gateway.is_signed(body, req.get_header("x-paystack-signature") or ""):
            raise Problem("invalid_signature")
        checkout.hear(self.database, self.gateway, body)
        resp.content_type = falcon.MEDIA_JSON
        resp.text = '{"status": "success", "message": "Event received."}'


class PayPage:
    """GET /pay/{id}: what is paid and to whom, the way to the checkout, the live status. For the customer's eyes."""

    def __init__(self, database: db.Database, readers: "Readers", merchant_name: str | None) -> None:
        self.database = database
        self.readers = readers
        self.merchant_name = merchant_name
        self.page = Markup((PAGES / "payment.html").read_text(encoding="utf-8"))  # noqa: S704  # a file of ours
        self.missing_page = (PAGES / "missing.html").read_text(encoding="utf-8")

    def on_get(self, req: falcon.Request, resp: falcon.Response, payment_id: str) -> None:
        resp.content_type = falcon.MEDIA_HTML
        try:
            payment = find_payment(self.database, payment_id)
        except Problem as problem:
            resp.status = problem.status
            resp.text = self.missing_page
            return
        self.readers.note(payment)
        if payment.return_url and ("reference" in req.params or "trxref" in req.params):
            resp.status = HTTPStatus.SEE_OTHER
            resp.location = with_query(payment.return_url, payment=payment.id)
            return
        resp.text = render_page(self.page, payment, self.merchant_name)


class Stylesheet:
    """GET /paygate.css: the one stylesheet of the pages, so that their policy can forbid inline styles."""

    def __init__(self) -> None:
        self.css = (PAGES / "paygate.css").read_text(encoding="utf-8")

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.content_type = "text/css; charset=utf-8"
        resp.cache_control = ["public", "max-age=3600"]
        resp.text = self.css


class Health:
    """GET /healthz: 200 while the process lives, whatever has become of the database."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.content_type = falcon.MEDIA_JSON
        resp.text = '{"status": "success", "message": "Alive."}'


class Readiness:
    """GET /readyz: 200 when the database can be written and its schema serves this code; within 2 seconds."""

    def __init__(self, database: db.Database) -> None:
        self.database = database

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        if not db.is_ready(self.database):
            raise Problem("database_unavailable", retry_after_seconds=2)
        resp.content_type = falcon.MEDIA_JSON
        resp.text = '{"status": "success", "message": "Ready."}'


class Readers:
    """Whoever reads a payment that is not paid wants to know now: the worker is told to look at it soon.

    A read only notes the id; one statement a second makes all that were noted due.
    """

    def __init__(self, database: db.Database) -> None:
        self.database = database
        self.noted: set[str] = set()
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None

    def note(self, payment: db.Payment) -> None:
        if payment.status in db.UNPAID:
            with self.lock:
                self.noted.add(payment.id)
                if self.thread is None:
                    self.thread = threading.Thread(target=self.tell, name="readers", daemon=True)
                    self.thread.start()

    def tell(self) -> None:
        """Runs while there is something to tell."""
        while True:
            time.sleep(1)
            with self.lock:
                ids, self.noted = self.noted, set()
                if not ids:
                    self.thread = None
                    return
            try:
                db.ask_to_look(self.database, ids)
            except db.Unavailable as error:
                log.event("readers_not_told", outcome=str(error))


# Reading requests


def check_api_token(req: falcon.Request, api_token: str | None) -> None:
    if api_token is None:
        return
    scheme, _, given = (req.get_header("Authorization") or "").partition(" ")
    is_right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), api_token.encode())
    if not is_right or scheme.lower() != "bearer":
        raise Problem("unauthorized", headers={"WWW-Authenticate": "Bearer"})


def read_json(req: falcon.Request) -> dict[str, Any]:
    """The JSON object in the request's body, each number in it as the text that was written. Raises Problem."""
    if (req.content_type or "").partition(";")[0].strip().lower() != falcon.MEDIA_JSON:
        raise Problem("unsupported_media_type", "Send the payment as JSON, with Content-Type: application/json.")
    if (req.get_header("Content-Encoding") or "identity").lower() != "identity":
        raise Problem("unsupported_media_type", "Send the body as it is, without Content-Encoding.")
    length = req.content_length
    if length is None:  # chunked bodies too: Falcon reads them as empty
        raise Problem("length_required")
    if length > LARGEST_PAYMENT_BODY:
        raise Problem("payload_too_large", f"A payment is at most {LARGEST_PAYMENT_BODY} bytes.")
    body = req.bounded_stream.read(length)
    if len(body) != length:
        raise Problem("invalid_json", "The body is shorter than its Content-Length.")
    return parse_json(body)


def parse_json(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(
            body.decode("utf-8"),
            parse_int=Number,
            parse_float=Number,
            parse_constant=refuse_constant,
            object_pairs_hook=members_once,
        )
    except RecursionError:
        raise Problem("invalid_json", "The JSON is nested too deeply.") from None
    except json.JSONDecodeError as error:
        message = f"The body is not JSON: line {error.lineno}, column {error.colno}."
        raise Problem("invalid_json", message) from None
    except UnicodeDecodeError:
        raise Problem("invalid_json", "The body is not UTF-8.") from None
    except ValueError as error:
        raise Problem("invalid_json", str(error)) from None
    if not isinstance(content, dict):
        raise Problem("invalid_json", "The body must be a JSON object.")
    return content


class Number(str):
    """A JSON number as it was written: a float would change it, and int() of thousands of digits takes long."""

    __slots__ = ()


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON.")


def members_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json keeps the last of two equal members, other parsers the first: whom the two would let through is refused."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("A member stands twice in one object.")
    return members


def read_event_body(req: falcon.Request) -> bytes:
    """The raw body, chunked too. Raises Problem."""
    if (req.content_length or 0) > LARGEST_EVENT_BODY:
        raise Problem("payload_too_large", f"An event is at most {LARGEST_EVENT_BODY} bytes.")
    stream = req.stream if req.content_length is None else req.bounded_stream
    body = stream.read(LARGEST_EVENT_BODY + 1)
    if len(body) > LARGEST_EVENT_BODY:
        raise Problem("payload_too_large", f"An event is at most {LARGEST_EVENT_BODY} bytes.")
    return bytes(body)


VISIBLE_ASCII = re.compile(r"[!-~]{1,255}", re.ASCII)
QUOTED_KEY = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\]){1,510})"', re.ASCII)


def parse_idempotency_key(req: falcon.Request, is_required: bool) -> str | None:
    """The Idempotency-Key, bare or as a quoted string (draft-ietf-httpapi-idempotency-key-header): the two are one key.

    A comma in a bare key is refused, for so two headers arrive.
    """
    header = req.get_header("Idempotency-Key")
    if header is None:
        if is_required:
            raise Problem("idempotency_key_required")
        return None
    quoted = QUOTED_KEY.fullmatch(header)
    key = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else header
    if not VISIBLE_ASCII.fullmatch(key) or (not quoted and re.search(r'[",]', key)):
        raise Problem("invalid_idempotency_key")
    return key


def parse_order(body: dict[str, Any], settings: Settings) -> db.Order:
    """The order in a request's members. Raises Problem with the errors of all fields at once."""
    fields = Fields(body)
    currency = fields.currency(settings.currencies)
    order = db.Order(
        customer_name=fields.text("customer_name", most=100),
        customer_email=fields.email("customer_email"),
        customer_phone=fields.phone("customer_phone"),
        amount_minor=fields.amount("amount", currency),
        location=fields.text("location", most=120),
        currency=currency,
        description=fields.text("description", most=200, is_required=False) or None,
        metadata=fields.metadata("metadata"),
        return_url=fields.url("return_url", settings.return_url_origins) or None,
    )
    fields.refuse_unknown()
    if fields.errors:
        raise Problem("invalid_fields", errors=fields.errors)
    return order


FIELDS = (
    "customer_name",
    "customer_email",
    "customer_phone",
    "amount",
    "location",
    "currency",
    "description",
    "metadata",
    "return_url",
)
PLAIN_PHONE = re.compile(r"\+?[0-9]{7,15}", re.ASCII)
PHONE_PUNCTUATION = re.compile(r"[ .()\[\]-]")
BIDI_OVERRIDES = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
DIGIT_GROUPS = re.compile(r"[0-9]+(?:[ -]+[0-9]+)*", re.ASCII)
CARD_NUMBER = re.compile(r"(?:222[1-9]|22[3-9]|2[3-6]|27[01]|2720|3[47]|[456])[0-9]*", re.ASCII)


class Fields:
    """The members of one order, read one by one; what is wrong with each is gathered in `errors`."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body
        self.errors: dict[str, list[str]] = {}

    def refuse(self, name: str, message: str) -> None:
        self.errors.setdefault(name, []).append(message)

    def string(self, name: str, *, is_required: bool = True) -> str:
        """A JSON string without characters that have no place in a line of text; empty where it is absent, null or
        refused."""
        value = self.body.get(name)
        if value is None:
            if is_required:
                self.refuse(name, "is required")
        elif not isinstance(value, str) or isinstance(value, Number):
            self.refuse(name, "must be a string")
        elif not is_line(value):
            self.refuse(name, "must not contain control characters, line breaks or direction overrides")
        elif not value.strip() and is_required:
            self.refuse(name, "must not be empty")
        else:
            return value
        return ""

    def text(self, name: str, *, most: int, is_required: bool = True) -> str:
        value = self.string(name, is_required=is_required).strip()
        if len(value) > most:
            self.refuse(name, f"must have at most {most} characters")
        if holds_card_number(value):
            self.refuse(name, "must not contain a card number")
        return value

    def email(self, name: str) -> str:
        value = self.string(name)
        local, at, domain = value.partition("@")
        labels = domain.split(".")
        is_address = local and at and "@" not in domain and len(labels) > 1 and all(labels)
        if value and (not is_address or any(character.isspace() for character in value)):
            self.refuse(name, "must be an e-mail address such as john@example.com")
        if len(value) > 254:
            self.refuse(name, "must have at most 254 characters")
        return value

    def phone(self, name: str) -> str:
        value = self.string(name)
        digits = PHONE_PUNCTUATION.sub("", value)
        if value and not PLAIN_PHONE.fullmatch(digits):
            self.refuse(name, "must have 7 to 15 digits, with an optional leading +")
        return digits

    def currency(self, currencies: tuple[str, ...]) -> str:
        """The currency, or the default one where it is absent or wrong."""
        value = self.string("currency", is_required=False)
        if value in currencies:
            return value
        if value or self.body.get("currency") == "":
            self.refuse("currency", f"must be one of {', '.join(currencies)}")
        return currencies[0]

    def amount(self, name: str, currency: str) -> int:
        """In hundredths; 0 where it is refused."""
        value = self.body.get(name)
        if value is None:
            self.refuse(name, "is required")
        elif not isinstance(value, str):
            self.refuse(name, 'must be a number, or a decimal string such as "50.00"')
        elif not isinstance(value, Number) and not money.PLAIN_DECIMAL.fullmatch(value):
            self.refuse(name, "must be an amount such as 50 or 50.00")
        else:
            try:
                return money.parse(value, currency)
            except ValueError as error:
                self.refuse(name, str(error))
        return 0

    def metadata(self, name: str) -> dict[str, str] | None:
        value = self.body.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(name, "must be an object")
            return None
        if any(not isinstance(text, str) or isinstance(text, Number) for text in value.values()):
            self.refuse(name, "must have strings as its values")
            return None
        members = {str(key): str(text) for key, text in value.items()}
        if len(members) > 20:
            self.refuse(name, "must have at most 20 members")
        if any(len(text) > 500 for text in members.values()):
            self.refuse(name, "must have values of at most 500 characters")
        if not all(is_line(text) for item in members.items() for text in item):
            self.refuse(name, "must not contain control characters, line breaks or direction overrides")
        elif len(json.dumps(members, ensure_ascii=False).encode()) > 4096:
            self.refuse(name, "must be at most 4096 bytes as JSON")
        if any(holds_card_number(text) for item in members.items() for text in item):
            self.refuse(name, "must not contain a card number")
        return members

    def url(self, name: str, origins: tuple[str, ...]) -> str:
        value = self.string(name, is_required=False)
        if not value:
            return value
        if len(value) > 2000 or not value.isascii() or " " in value or configuration.origin(value) is None:
            self.refuse(name, "must be an absolute URL of at most 2000 ASCII characters")
        elif configuration.origin(value) not in origins:
            self.refuse(name, "must be at an origin that this service allows (RETURN_URL_ORIGINS)")
        return value

    def refuse_unknown(self) -> None:
        for name in self.body:
            if name not in FIELDS:
                closest = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0)[0]
                shown = "".join(c if is_line(c) else "?" for c in name[:50])
                self.refuse(shown, f"is not a field of a payment; the closest one is {closest}")


def is_line(text: str) -> bool:
    """Whether `text` has no control character, line break, lone surrogate or bidirectional override."""
    return (text.isascii() and text.isprintable()) or not any(
        unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in BIDI_OVERRIDES for character in text
    )


def holds_card_number(text: str) -> bool:
    """Whether some of the groups of digits in `text`, read together, are a card number that passes the Luhn check.

    Time stamps and order numbers pass that check one time in ten: hence the prefixes of the card schemes.
    """
    for run in DIGIT_GROUPS.findall(text):
        groups = re.split(r"[ -]+", run)
        for first in range(len(groups)):
            digits = ""
            for group in groups[first:]:
                digits += group
                if len(digits) > 19:
                    break
                if len(digits) >= 13 and CARD_NUMBER.fullmatch(digits) and passes_luhn(digits):
                    return True
    return False


def passes_luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B."""
    doubled = [int(digit) * (1 + position % 2) for position, digit in enumerate(reversed(digits))]
    return sum(number - 9 if number > 9 else number for number in doubled) % 10 == 0


def find_payment(database: db.Database, payment_id: str) -> db.Payment:
    """Raises Problem, the same for an id that is unknown and one that is malformed."""
    payment = db.find_payment(database, payment_id) if db.ID_PATTERN.fullmatch(payment_id) else None
    if payment is None:
        raise Problem("not_found", "There is no such payment.")
    return payment


# Writing answers


def answer_of(payment: db.Payment, refused: paystack.Refused | None) -> db.Answer:
    """The answer that ends a request: the payment as it stands, or why there is none."""
    if refused is not None:
        problem = Problem("provider_refused", errors={refused.field: [refused.reason]})
    elif payment.is_paid or payment.status == "review" or payment.checkout_url is not None:
        return db.Answer(201, envelope(payment, "Payment initiated successfully."), payment.id)
    else:
        problem = Problem("payment_expired")
    return db.Answer(problem.status, problem.to_json(), payment.id)


def envelope(payment: db.Payment, message: str) -> str:
    return f'{{"payment": {payment.to_json()}, "status": "success", "message": "{message}"}}'


def render_answer(resp: falcon.Response, answer: db.Answer, *, is_replayed: bool) -> None:
    resp.status = answer.status
    resp.content_type = falcon.MEDIA_JSON
    resp.text = answer.body
    if answer.status == 201:
        resp.location = f"/api/v1/payments/{answer.payment_id}"
    if is_replayed:
        resp.set_header("Idempotent-Replayed", "true")


STATUS_LINES = {
    "pending": "Waiting for your payment",
    "failed": "This payment failed",
    "expired": "This payment has ended unpaid",
    "review": "Your payment has arrived and is being checked",
    "completed": "Paid",
    "partially_refunded": "Paid, a part was given back",
    "refunded": "Paid and given back",
}


def render_page(page: Markup, payment: db.Payment, merchant_name: str | None) -> str:
    pays = payment.status == "pending" and payment.checkout_url
    return page.format(
        refresh=Markup('<meta http-equiv="refresh" content="5">') if payment.status == "pending" else "",
        test=Markup('<p class="test">TEST: no money moves here</p>') if payment.mode == "test" else "",
        merchant=merchant_name or "the merchant",
        amount=money.render(payment.amount_minor, payment.currency),
        currency=payment.currency,
        description=payment.description or "",
        status=payment.status,
        status_line=STATUS_LINES[payment.status],
        reason=payment.status_reason if payment.status in ("pending", "failed") and payment.status_reason else "",
        button=Markup('<p><a class="button" href="{}">Pay now</a></p>').format(payment.checkout_url) if pays else "",
        reference=payment.current_reference,
        moment=f"{payment.paid_at or payment.created_at:%d %B %Y, %H:%M} UTC",
    )


def with_query(url: str, **members: str) -> str:
    """`url` with more members in its query, before its fragment."""
    parts = urlsplit(url)
    query = "&".join(part for part in (parts.query, urlencode(members)) if part)
    return parts._replace(query=query).geturl()


class EveryAnswer:
    """What every answer carries, and the one line that is logged of it."""

    SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)

    def __init__(self, settings: Settings) -> None:
        self.page_policy = (
            "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; frame-ancestors 'none'; "
            f"form-action 'self' {paystack.CHECKOUT_ORIGIN}"
        )
        if settings.paystack_url != configuration.PAYSTACK_URL:
            self.page_policy += f" {configuration.origin(settings.paystack_url)}"

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        given = req.get_header("X-Request-Id") or ""
        log.request_id.set(given if self.SANE_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex)
        req.context.started = time.monotonic()
        resp.set_header("Cache-Control", "no-store")

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, resource: object, req_succeeded: bool
    ) -> None:
        resp.set_header("X-Request-Id", log.request_id.get() or "")
        resp.set_header("X-Content-Type-Options", "nosniff")
        resp.set_header("Referrer-Policy", "no-referrer")
        if (resp.content_type or "").startswith("text/html"):
            resp.set_header("Content-Security-Policy", self.page_policy)
        # The route and not the path: a path may hold whatever somebody typed.
        log.event(
            f"{req.method} {req.uri_template or '(no route)'}",
            outcome=int(resp.status_code),
            ms=(time.monotonic() - req.context.started) * 1000,
        )


# Errors

PROBLEMS = {
    "invalid_json": (400, "The body is not valid JSON."),
    "invalid_idempotency_key": (400, "Send one Idempotency-Key of 1 to 255 visible ASCII characters."),
    "idempotency_key_required": (400, "Send an Idempotency-Key header: the same one when you try again."),
    "bad_request": (400, "The request is malformed."),
    "unauthorized": (401, "Send the API token as Authorization: Bearer TOKEN."),
    "invalid_signature": (401, "The signature does not match the body."),
    "not_found": (404, "There is nothing at this address."),
    "method_not_allowed": (405, "This method is not allowed here; see the Allow header."),
    "request_in_flight": (409, "A request with this Idempotency-Key is being worked on; try again."),
    "length_required": (411, "Send a Content-Length."),
    "payload_too_large": (413, "The body is too large."),
    "unsupported_media_type": (415, "Send JSON."),
    "invalid_fields": (422, "Some fields are invalid."),
    "idempotency_key_reused": (422, "This Idempotency-Key came before with another payment."),
    "provider_refused": (422, "The payment provider refuses this payment."),
    "payment_expired": (422, "The time of this payment has ended; start another one with a new Idempotency-Key."),
    "internal_error": (500, "Something went wrong here. It has been logged."),
    "provider_misconfigured": (502, "The payment provider refuses this service's set-up; the operator must mend it."),
    "provider_unavailable": (503, "The payment provider gave no answer; try again with the same Idempotency-Key."),
    "references_used_up": (503, "This payment could not be opened; the operator has been told."),
    "busy": (503, "Too many payments are being opened; try again with the same Idempotency-Key."),
    "database_unavailable": (503, "The database is away; try again, with the same Idempotency-Key if you sent one."),
}


class Problem(Exception):
    """An error for the client: one of PROBLEMS, maybe with a message of its own."""

    def __init__(
        self,
        code: str,
        message: str | None = None,
        *,
        errors: dict[str, list[str]] | None = None,
        retry_after_seconds: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(code)
        self.code = code
        self.status, self.message = PROBLEMS[code][0], message or PROBLEMS[code][1]
        self.errors = errors
        self.headers = dict(headers or {})
        if retry_after_seconds is not None:
            self.headers["Retry-After"] = str(max(1, round(retry_after_seconds)))

    def to_json(self) -> str:
        body = {
            "status": "error",
            "code": self.code,
            "message": self.message,
            "errors": self.errors,
            "request_id": log.request_id.get(),
        }
        return json.dumps({name: value for name, value in body.items() if value is not None}, ensure_ascii=False)


def render_problem(resp: falcon.Response, problem: Problem) -> None:
    resp.status = problem.status
    resp.content_type = falcon.MEDIA_JSON
    resp.text = problem.to_json()
    resp.set_headers(problem.headers)


def on_problem(req: falcon.Request, resp: falcon.Response, error: Exception, params: dict[str, Any]) -> None:
    """Answer with the problem that an exception of ours amounts to."""
    match error:
        case Problem() as problem:
            pass
        case db.KeyReused():
            problem = Problem("idempotency_key_reused")
        case db.InFlight(seconds=seconds):
            problem = Problem("request_in_flight", retry_after_seconds=min(seconds, 5))
        case db.Unavailable():
            log.event("database_unavailable", outcome=str(error))
            problem = Problem("database_unavailable", retry_after_seconds=2)
        case checkout.Unanswered(retry_after_seconds=seconds):
            problem = Problem("provider_unavailable", retry_after_seconds=seconds)
        case checkout.UsedUp():
            problem = Problem("references_used_up", retry_after_seconds=600)
        case paystack.Misconfigured():
            log.event("provider_refuses_us", level=logging.ERROR)
            problem = Problem("provider_misconfigured", retry_after_seconds=60)
        case _:
            log.failure("unexpected", error)
            problem = Problem("internal_error")
    render_problem(resp, problem)


def render_http_error(req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError) -> None:
    """An error that Falcon found itself (no route, a wrong method, a malformed header), in the shape of ours.

    Falcon has set its status and headers (Allow) already.
    """
    code = next((code for code, (status, _) in PROBLEMS.items() if status == error.status_code), "bad_request")
    resp.content_type = falcon.MEDIA_JSON
    resp.text = Problem(code).to_json()
