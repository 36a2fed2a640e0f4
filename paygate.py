"""The payment gateway's HTTP API: `gunicorn 'paygate:create_app()'`.

The app, its resources, then how requests are read and answers written.
"""

import html
import logging
import re
import secrets
import threading
import time
from http import HTTPStatus
from typing import Any

import falcon
from falcon.constants import HTTP_METHODS

import charges
import checkout
import db
import paystack
from settings import Settings, load
from web import bodies, form, log, metrics, office, orders, pages, shapes
from web.errors import HEADERS, PROBLEMS, Problem
from web.guard import Guard
from web.readers import Readers

logger = logging.getLogger("paygate")

LARGEST_EVENT_BODY = 256 * 1024
LONGEST_WAIT_SECONDS = 30
STATIC_PATH = "/static"


class Paygate(falcon.App[falcon.Request, falcon.Response]):
    """The WSGI app; gunicorn's hooks use its parts."""

    def __init__(self, settings: Settings) -> None:
        self.gateway = paystack.Gateway(
            settings.paystack_secret_keys, settings.paystack_url, settings.paystack_timeout_seconds, settings.mode
        )
        super().__init__(middleware=[EveryAnswer(settings, self.gateway), *cors(settings.cors_origins)])
        self.settings = settings
        self.database = db.Database(settings.database_url, settings.db_pool, notifies=settings.notify_url is not None)
        slots = threading.BoundedSemaphore(settings.slots)
        guard = Guard(settings)
        self.office = office.Office(self.database, self.gateway, settings, slots, guard)
        self.readers = Readers(self.database, settings.mode, guard, most_waiting=max(1, settings.threads // 8))
        self.templates = pages.Templates(settings)

    def __call__(self, env: dict[str, Any], start_response: Any) -> Any:
        if env["REQUEST_METHOD"] == "WEBSOCKET":  # Falcon refuses it before EveryAnswer has seen the request
            env["REQUEST_METHOD"] = "UNKNOWN"
        return super().__call__(env, start_response)

    def add_route(self, uri_template: str, resource: Any, **how: Any) -> None:
        """Answers HEAD wherever GET is; Falcon leaves the body out."""
        if hasattr(resource, "on_get"):
            resource.on_head = resource.on_get
        super().add_route(uri_template, resource, **how)

    def on_error(self, req: falcon.Request, resp: falcon.Response, error: Exception, params: dict[str, Any]) -> None:
        """Answer an exception with its Problem: a page for the customer's pages, else JSON."""
        problem = problem_of(error)
        resp.status = problem.status
        resp.set_headers(problem.headers)
        if req.path == "/pay" or req.path.startswith("/pay/"):
            pages.show_problem(self.templates, req, resp, problem)
        else:
            resp.content_type = falcon.MEDIA_JSON
            resp.text = problem.to_json()


def create_app(settings: Settings | None = None) -> Paygate:
    """Build the whole app from `settings` (default: the environment). Importing this module builds nothing."""
    settings = settings or load()
    app = Paygate(settings)
    app.database.open()
    app.req_options.strip_url_path_trailing_slash = True
    app.set_error_serializer(render_http_error)
    app.add_error_handler(Exception, app.on_error)
    app.add_route("/api/v1/payments", Payments(app.office))
    app.add_route("/api/v1/payments/{payment_id}", PaymentById(app.readers))
    app.add_route("/api/v1/payments/{payment_id}/refunds", office.Refunds(app.office))
    app.add_route("/api/v1/payments/{payment_id}/refunds/{refund_id}", office.RefundById(app.office))
    app.add_route("/api/v1/payments/{payment_id}/cancel", office.Cancel(app.office))
    app.add_route("/api/v1/payments/{payment_id}/resolve", office.Resolve(app.office))
    app.add_route("/api/v1/payments/{payment_id}/events", office.Events(app.office))
    app.add_route("/api/v1/incidents", office.Incidents(app.office))
    app.add_route("/api/v1/incidents/{number:int}/close", office.CloseIncident(app.office))
    app.add_route("/api/v1/links", office.Links(app.office))
    app.add_route("/api/v1/links/withdraw", office.Withdraw(app.office))
    app.add_route("/api/v1/report", office.Report(app.office))
    app.add_route("/api/v1/webhooks/paystack", PaystackWebhook(app.office))
    app.add_route("/", pages.Home(settings, app.templates))
    app.add_route("/desk", Text(pages.desk(settings, app.templates), falcon.MEDIA_HTML))
    app.add_route("/pay", form.PayForm(app.templates, app.office))
    app.add_route("/pay/{payment_id}", pages.PaymentPage(app.templates, app.readers))
    app.add_route("/api/v1/openapi.json", Text(description("openapi.json", settings), falcon.MEDIA_JSON))
    app.add_route("/docs", Text(description("docs.html", settings), falcon.MEDIA_HTML))
    app.add_static_route(STATIC_PATH, pages.STATIC)
    app.add_route("/healthz", Text('{"status": "success", "message": "Alive."}', falcon.MEDIA_JSON))
    app.add_route("/readyz", Readiness(app.database))
    app.add_route("/metrics", metrics.Metrics(app.office))
    return app


# Resources


class Payments:
    """POST /api/v1/payments: start a payment, or go on with a payment that a crash or a fault left behind. GET: the
    owner's list."""

    def __init__(self, back_office: office.Office) -> None:
        self.office = back_office

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        office.list_payments(self.office, req, resp)

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        settings = self.office.settings
        self.office.guard.check_token(req)
        order = orders.parse_order(bodies.read_json(req), settings)
        key = checkout.key_of(bodies.idempotency_key(req, settings.require_idempotency_key))
        req.context.payment = db.payment_id_of(self.office.database, settings.mode, key)
        render_settled(resp, checkout.start(self.office, key, order), settings.public_url)


class PaymentById:
    """GET /api/v1/payments/{id}: the payment as it stands, or after a change. Without API_TOKEN, anyone who knows the
    id may read it."""

    def __init__(self, readers: Readers) -> None:
        self.readers = readers

    def on_get(self, req: falcon.Request, resp: falcon.Response, payment_id: str) -> None:
        self.readers.guard.check_reader(req)
        payment = self.readers.find(payment_id, req)
        self.readers.note(payment, req)
        seconds = parse_wait(req)
        if seconds is not None and self.readers.wait(payment, seconds):
            payment = self.readers.find(payment_id, req)
            resp.set_header("Preference-Applied", f"wait={seconds}")
        office.answer(resp, "Payment details retrieved successfully.", payment=shapes.payment_json(payment))


class PaystackWebhook:
    """POST /api/v1/webhooks/paystack: stores and applies an event before the 200. Paystack repeats it until a 200."""

    def __init__(self, back_office: office.Office) -> None:
        self.office = back_office

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        body = bodies.read(req, LARGEST_EVENT_BODY, "An event")
        if not self.office.gateway.is_signed(body, req.get_header("x-paystack-signature") or ""):
            raise Problem("invalid_signature")
        req.context.reference = charges.receive_event(self.office.database, self.office.gateway, body)
        office.answer(resp, "Event received.")


class Text:
    """GET /desk, /docs, /api/v1/openapi.json, and /healthz, which is 200 while the process lives: the same text for
    everybody, even without the database."""

    def __init__(self, text: str, media_type: str) -> None:
        self.text = text
        self.media_type = media_type

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.content_type = self.media_type
        resp.text = self.text


def description(name: str, settings: Settings) -> str:
    """How to talk to this server."""
    base_path = settings.base_path
    text = (pages.STATIC / name).read_text(encoding="utf-8")
    text = text.replace('"url": "/"', f'"url": "{base_path}/"')
    text = text.replace("curl https://pay.example.com/", f"curl {html.escape(settings.public_url)}/")
    return text.replace('"/static/docs.css"', f'"{base_path}/static/docs.css?{pages.VERSION}"')


class Readiness:
    """GET /readyz: 200 if the database can be written and its schema fits this code; within 2 seconds."""

    def __init__(self, database: db.Database) -> None:
        self.database = database

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        if not db.is_ready(self.database):
            raise Problem("database_unavailable", retry_after_seconds=2)
        office.answer(resp, "Ready.")


# Reading requests


PREFERRED_WAIT = re.compile(r"(?:^|,)\s*wait\s*=\s*\"?([0-9]++)\"?\s*(?=$|[,;])", re.ASCII | re.IGNORECASE)


def parse_wait(req: falcon.Request) -> int | None:
    """The seconds of `Prefer: wait=N` (RFC 7240, section 4.3), 30 at most; None if it is missing or malformed."""
    found = PREFERRED_WAIT.search(req.get_header("Prefer") or "")
    return min(int(found[1].lstrip("0")[:3] or 0), LONGEST_WAIT_SECONDS) if found else None


# Writing answers


def render_settled(resp: falcon.Response, settled: checkout.Settled, public_url: str) -> None:
    """Answer with the payment as it stands, or raise the Problem with which its request ended."""
    payment, headers = settled.payment, {"Idempotent-Replayed": "true"} if settled.is_replay else {}
    if settled.answer == "payment_expired":
        raise Problem("payment_expired", headers=headers)
    if settled.answer != "payment":
        raise Problem("provider_refused", errors={settled.answer: [payment.status_reason or ""]}, headers=headers)
    resp.status = HTTPStatus.CREATED
    resp.location = f"{public_url}/api/v1/payments/{payment.id}"
    resp.set_headers(headers)
    office.answer(resp, "Payment initiated successfully.", payment=shapes.payment_json(payment))


class EveryAnswer:
    """The headers and the log line of every answer."""

    RANDOM_ID = re.compile(r"(?=.*[A-Fa-f])[0-9A-Fa-f-]{16,64}", re.ASCII)
    """Hexadecimal digits or a UUID. Any other text may be somebody's name or number, and is not logged."""

    def __init__(self, settings: Settings, gateway: paystack.Gateway) -> None:
        self.has_cors = bool(settings.cors_origins)
        self.page_policy = (
            "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self'; img-src 'self'; "
            "base-uri 'none'; frame-ancestors 'none'; "
            f"form-action 'self' {' '.join(sorted(gateway.checkout_origins))}"
        )

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        given = req.get_header("X-Request-Id") or ""
        log.request_id.set(given if self.RANDOM_ID.fullmatch(given) else secrets.token_hex(16))
        req.context.started = time.monotonic()
        resp.set_headers(HEADERS)

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, resource: object, req_succeeded: bool
    ) -> None:
        resp.set_header("X-Request-Id", log.request_id.get() or "")
        if self.has_cors:  # the headers depend on the origin
            resp.append_header("Vary", "Origin")
        if (resp.content_type or "").startswith("text/html"):
            resp.set_header("Content-Security-Policy", self.page_policy)
        is_static = req_succeeded and req.path.startswith(STATIC_PATH + "/")
        if is_static:  # its address changes with its content
            resp.set_header("Cache-Control", "public, max-age=86400")
        # The route and not the path: a client may have typed anything into a path or a method.
        route = req.uri_template or (STATIC_PATH if is_static else "(no route)")
        method = req.method if req.method in HTTP_METHODS else "(no method)"
        ms = round((time.monotonic() - req.context.started) * 1000, 1)
        named = {name: getattr(req.context, name, None) for name in ("payment", "reference")}
        logger.info(f"{method} {route}", extra={**named, "outcome": int(resp.status_code), "ms": ms})


def cors(origins: tuple[str, ...]) -> list[Any]:
    """For shops whose pages call us from the browser; empty if CORS_ORIGINS is not set."""
    shown = ["Idempotent-Replayed", "Location", "Preference-Applied", "Retry-After", "X-Request-Id"]
    return [falcon.CORSMiddleware(allow_origins=origins, expose_headers=shown)] if origins else []


# Errors


def problem_of(error: Exception) -> Problem:
    match error:
        case Problem():
            return error
        case db.KeyReused():
            return Problem("idempotency_key_reused")
        case db.Impossible():
            return Problem("not_possible", f"{str(error)[:1].upper()}{str(error)[1:]}.")
        case checkout.InFlight(seconds=seconds):
            return Problem("request_in_flight", retry_after_seconds=min(seconds, 5))
        case db.DatabaseUnavailable():
            logger.warning("database_unavailable", extra={"outcome": str(error)})
            return Problem("database_unavailable", retry_after_seconds=2)
        case checkout.Busy():
            return Problem("busy", retry_after_seconds=1)
        case paystack.Unavailable(retry_after_seconds=seconds):
            logger.warning("provider_unavailable", extra={"outcome": str(error)})
            return Problem("provider_unavailable", retry_after_seconds=seconds or 1)
        case checkout.UsedUp():
            return Problem("references_used_up", retry_after_seconds=600)
        case paystack.Misconfigured():
            logger.error("provider_refuses_us")
            return Problem("provider_misconfigured", retry_after_seconds=60)
    logger.error("unexpected", exc_info=error)
    return Problem("internal_error")


def render_http_error(req: falcon.Request, resp: falcon.Response, error: falcon.HTTPError) -> None:
    """Answer an error that Falcon found itself (no route, a wrong method, a malformed header) in our shape.

    Falcon has set its status and headers (Allow) already.
    """
    status = HTTPStatus(error.status_code)
    code = next((code for code, (known, _) in PROBLEMS.items() if known == status), "bad_request")
    resp.text = Problem(code).to_json()
