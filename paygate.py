"""The payment gateway's HTTP API: `gunicorn 'paygate:create_app()'`.

The app, its resources, then how requests are read and answers written.
"""

import functools
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

import falcon
from falcon.constants import HTTP_METHODS
from gunicorn.http.errors import ParseException

import checkout
import db
import limits
import log
import orders
import pages
import paystack
import settings as configuration
from errors import PROBLEMS, Problem
from readers import Readers
from settings import Settings

LARGEST_PAYMENT_BODY = 16 * 1024
LARGEST_EVENT_BODY = 256 * 1024
LONGEST_WAIT_SECONDS = 30


class Paygate(falcon.App[falcon.Request, falcon.Response]):
    """The WSGI app, with what it is made of at hand for gunicorn's hooks."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(middleware=[EveryAnswer(settings), *cors(settings.cors_origins)])
        self.settings = settings
        self.database = db.Database(settings.database_url, settings.db_pool, notifies=settings.notify_url is not None)
        self.gateway = paystack.Gateway(
            settings.paystack_secret_keys, settings.paystack_url, settings.paystack_timeout_seconds, settings.mode
        )
        self.readers = Readers(self.database, most_waiting=max(1, settings.threads // 8))


def create_app(settings: Settings | None = None) -> Paygate:
    """Everything that serves, built from `settings` (default: the environment); importing builds nothing."""
    settings = settings or configuration.load()
    app = Paygate(settings)
    app.database.open()
    desk = checkout.Desk(
        database=app.database,
        gateway=app.gateway,
        pay_url=settings.public_url + "/pay/",
        lease_seconds=settings.lease_seconds,
        ttl_seconds=settings.payment_ttl_seconds,
        slots=threading.BoundedSemaphore(settings.slots),
        render=answer_of,
    )
    rate_limit = limits.RateLimit(*settings.rate_limit) if settings.rate_limit else None
    guard = limits.Guard(settings.api_token, rate_limit, limits.Clients(settings.trusted_proxies))
    app.req_options.strip_url_path_trailing_slash = True
    app.set_error_serializer(render_http_error)
    app.add_error_handler(Exception, functools.partial(on_error, pages.ProblemPage(settings)))
    app.add_route("/api/v1/payments", Payments(settings, desk, guard))
    app.add_route("/api/v1/payments/{payment_id}", PaymentById(app.database, app.readers))
    app.add_route("/api/v1/webhooks/paystack", PaystackWebhook(app.database, app.gateway))
    app.add_route("/pay", pages.PayForm(settings, desk, guard))
    app.add_route("/pay/{payment_id}", pages.PaymentPage(settings, app.database, app.readers))
    app.add_route("/paygate.css", pages.Asset("paygate.css", "text/css"))
    app.add_route("/paygate.js", pages.Asset("paygate.js", "text/javascript"))
    app.add_route("/paygate.svg", pages.Asset("paygate.svg", "image/svg+xml"))
    app.add_route("/api/v1/openapi.json", Description("openapi.json", falcon.MEDIA_JSON, settings.public_url))
    app.add_route("/docs", Description("docs.html", falcon.MEDIA_HTML, settings.public_url))
    app.add_route("/docs.css", Description("docs.css", "text/css; charset=utf-8", settings.public_url))
    app.add_route("/healthz", Health())
    app.add_route("/readyz", Readiness(app.database))
    app.add_route("/metrics", Metrics(app.database, settings.metrics_token))
    return app


# Resources


class Payments:
    """POST /api/v1/payments: start a payment, or go on with one that a crash or a fault left behind."""

    def __init__(self, settings: Settings, desk: checkout.Desk, guard: limits.Guard) -> None:
        self.settings = settings
        self.desk = desk
        self.guard = guard

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        self.guard.check_token(req)
        order = orders.parse_order(read_json(req), self.settings)
        key = parse_idempotency_key(req, self.settings.require_idempotency_key)
        answer, is_replay = checkout.start(self.desk, db.key_of(key), order)
        render_json(resp, answer.body)
        resp.status = answer.status
        if answer.status == HTTPStatus.CREATED:
            resp.location = f"{self.settings.public_url}/api/v1/payments/{answer.payment_id}"
        if is_replay:
            resp.set_header("Idempotent-Replayed", "true")


class PaymentById:
    """GET /api/v1/payments/{id}: the payment as it stands, or once it has changed. Whoever knows its id may read it."""

    def __init__(self, database: db.Database, readers: Readers) -> None:
        self.database = database
        self.readers = readers

    def on_get(self, req: falcon.Request, resp: falcon.Response, payment_id: str) -> None:
        payment = self.find(payment_id)
        self.readers.note(payment)
        seconds = parse_wait(req)
        if seconds is not None and self.readers.wait(payment, seconds):
            payment = self.find(payment_id)
            resp.set_header("Preference-Applied", f"wait={seconds}")
        render_json(resp, envelope(payment, "Payment details retrieved successfully."))

    def find(self, payment_id: str) -> db.Payment:
        payment = db.find_payment(self.database, payment_id)
        if payment is None:
            raise Problem("not_found", "There is no such payment.")
        return payment


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
        render_json(resp, '{"status": "success", "message": "Event received."}')


class Description:
    """GET /api/v1/openapi.json and /docs, and its stylesheet: how to talk to us, the same text for everybody."""

    def __init__(self, name: str, media_type: str, public_url: str) -> None:
        self.media_type = media_type
        # Where a proxy serves us below a path, that is where the API and the stylesheet are.
        base = urlsplit(public_url).path
        self.text = re.sub(r'"/(docs\.css)?"', rf'"{base}/\1"', (pages.PAGES / name).read_text(encoding="utf-8"))

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.content_type = self.media_type
        resp.text = self.text


class Health:
    """GET /healthz: 200 while the process lives, whatever has become of the database."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        render_json(resp, '{"status": "success", "message": "Alive."}')


class Readiness:
    """GET /readyz: 200 when the database can be written and its schema serves this code; within 2 seconds."""

    def __init__(self, database: db.Database) -> None:
        self.database = database

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        if not db.is_ready(self.database):
            raise Problem("database_unavailable", retry_after_seconds=2)
        render_json(resp, '{"status": "success", "message": "Ready."}')


class Metrics:
    """GET /metrics: what the database knows, in Prometheus' text format, so that every process says the same."""

    def __init__(self, database: db.Database, token: str | None) -> None:
        self.database = database
        self.token = token

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        if self.token is None:
            raise Problem("not_found")
        limits.check_bearer(req, self.token)
        resp.content_type = "text/plain; version=0.0.4; charset=utf-8"
        resp.text = render_metrics(db.metrics(self.database))


# Reading requests


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
    return orders.parse_json(read_body(req.bounded_stream.read, length))


def read_event_body(req: falcon.Request) -> bytes:
    """The raw body, chunked too. Raises Problem."""
    if (req.content_length or 0) > LARGEST_EVENT_BODY:
        raise Problem("payload_too_large", f"An event is at most {LARGEST_EVENT_BODY} bytes.")
    stream = req.stream if req.content_length is None else req.bounded_stream
    body = read_body(stream.read, LARGEST_EVENT_BODY + 1, at_least=req.content_length or 0)
    if len(body) > LARGEST_EVENT_BODY:
        raise Problem("payload_too_large", f"An event is at most {LARGEST_EVENT_BODY} bytes.")
    return body


def read_body(read: Callable[[int], bytes], most: int, at_least: int | None = None) -> bytes:
    """Up to `most` bytes of a body; `at_least` so many (default: all). Raises Problem."""
    try:
        body = read(most)
    except BlockingIOError:  # the accepted socket's time-out, see gunicorn.conf.py
        raise Problem("request_timeout") from None
    except (OSError, ParseException):  # a connection that was cut, chunks that are none
        raise Problem("bad_request") from None
    if len(body) < (most if at_least is None else at_least):
        raise Problem("bad_request", "The body is shorter than its Content-Length.")
    return body


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


PREFERRED_WAIT = re.compile(r"(?:^|,)\s*wait\s*=\s*\"?([0-9]++)\"?\s*(?=$|[,;])", re.ASCII | re.IGNORECASE)


def parse_wait(req: falcon.Request) -> int | None:
    """The seconds of `Prefer: wait=N` (RFC 7240, section 4.3), 30 at most; None without one, or for a malformed one."""
    found = PREFERRED_WAIT.search(req.get_header("Prefer") or "")
    return min(int(found[1].lstrip("0")[:3] or 0), LONGEST_WAIT_SECONDS) if found else None


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


def render_json(resp: falcon.Response, body: str) -> None:
    resp.content_type = falcon.MEDIA_JSON
    resp.text = body


def envelope(payment: db.Payment, message: str) -> str:
    return f'{{"payment": {payment.to_json()}, "status": "success", "message": "{message}"}}'


class EveryAnswer:
    """What every answer carries, and the one line that is logged of it."""

    SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)

    def __init__(self, settings: Settings) -> None:
        self.page_policy = (
            "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self'; img-src 'self'; "
            "base-uri 'none'; frame-ancestors 'none'; "
            f"form-action 'self' {paystack.CHECKOUT_ORIGIN}"
        )
        if settings.paystack_url != configuration.PAYSTACK_URL:
            self.page_policy += f" {configuration.origin(settings.paystack_url)}"

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        given = req.get_header("X-Request-Id") or ""
        log.request_id.set(given if self.SANE_REQUEST_ID.fullmatch(given) else secrets.token_hex(16))
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
        # The route and not the path: a path may hold whatever somebody typed, and so may a method.
        log.event(
            f"{req.method if req.method in HTTP_METHODS else '(no method)'} {req.uri_template or '(no route)'}",
            outcome=int(resp.status_code),
            ms=(time.monotonic() - req.context.started) * 1000,
        )


METRICS = {
    "paygate_incidents_open": "Incidents that wait for a person, by kind.",
    "paygate_last_answered_look_timestamp_seconds": "When the provider last answered a look.",
    "paygate_notifications_dead": "Notifications that the merchant's receiver never took.",
    "paygate_oldest_due_look_seconds": "How long the most overdue look has been due.",
    "paygate_oldest_due_notification_seconds": "How long the most overdue notification has been due.",
    "paygate_payments": "Payments by status: open ones, and those that came to their status in the last day.",
    "paygate_payments_found_late": "Payments of the last day that a look found, over a minute after they were paid.",
}


def render_metrics(rows: list[dict[str, Any]]) -> str:
    """Prometheus' text exposition format; the rows of one name stand together."""
    lines: list[str] = []
    for name, text in METRICS.items():
        lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge"]
        for row in rows:
            if row["name"] == name:
                label = f',{"kind" if name == "paygate_incidents_open" else "status"}="{row["status"]}"'
                lines.append(f'{name}{{mode="{row["mode"]}"{label if row["status"] else ""}}} {row["value"]:.15g}')
    return "\n".join(lines) + "\n"


def cors(origins: tuple[str, ...]) -> list[Any]:
    """For shops whose pages call us from the browser; nothing where CORS_ORIGINS is not set."""
    shown = ["Idempotent-Replayed", "Location", "Preference-Applied", "Retry-After", "X-Request-Id"]
    return [falcon.CORSMiddleware(allow_origins=origins, expose_headers=shown)] if origins else []


# Errors


def on_error(
    page: pages.ProblemPage, req: falcon.Request, resp: falcon.Response, error: Exception, params: dict[str, Any]
) -> None:
    """Answer with the problem that an exception amounts to: a page for the customer's pages, else JSON."""
    problem = problem_of(error)
    resp.status = problem.status
    resp.set_headers(problem.headers)
    if req.path == "/pay" or req.path.startswith("/pay/"):
        pages.show(resp, page.render(req, problem))
    else:
        render_json(resp, problem.to_json())


def problem_of(error: Exception) -> Problem:
    match error:
        case Problem():
            return error
        case db.KeyReused():
            return Problem("idempotency_key_reused")
        case db.InFlight(seconds=seconds):
            return Problem("request_in_flight", retry_after_seconds=min(seconds, 5))
        case db.Unavailable():
            log.event("database_unavailable", level=logging.WARNING, outcome=str(error))
            return Problem("database_unavailable", retry_after_seconds=2)
        case checkout.Busy():
            return Problem("busy", retry_after_seconds=1)
        case checkout.Unanswered(retry_after_seconds=seconds):
            return Problem("provider_unavailable", retry_after_seconds=seconds)
        case checkout.UsedUp():
            return Problem("references_used_up", retry_after_seconds=600)
        case paystack.Misconfigured():
            log.event("provider_refuses_us", level=logging.ERROR)
            return Problem("provider_misconfigured", retry_after_seconds=60)
    log.failure("unexpected", error)
    return Problem("internal_error")


def render_http_error(req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError) -> None:
    """An error that Falcon found itself (no route, a wrong method, a malformed header), in the shape of ours.

    Falcon has set its status and headers (Allow) already.
    """
    status = HTTPStatus(error.status_code)
    code = next((code for code, (known, _) in PROBLEMS.items() if known == status), "bad_request")
    render_json(resp, Problem(code).to_json())
