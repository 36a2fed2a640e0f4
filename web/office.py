"""The back office over HTTP, for the owner of ADMIN_TOKEN. `manage.py` does the same from a shell."""

import json
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from typing import Any

import falcon
import segno

import charges
import checkout
import db
import money
import refunds
from db import Payment
from refunds import Refund
from web import bodies, books, links, shapes, story
from web.errors import Problem
from web.guard import Guard
from web.orders import BLANK, Fields

MOST_ROWS = 100


@dataclass(frozen=True)
class Office(checkout.Checkout):
    """The parts that the resources share: those of a checkout, and the guard."""

    guard: Guard

    def find(self, payment_id: str) -> Payment:
        payment = db.find_payment(self.database, payment_id)
        if payment is None or payment.mode != self.settings.mode:
            raise Problem("not_found", "There is no such payment.")
        return payment

    def rows(self, query: str, **values: object) -> list[dict[str, Any]]:
        values["mode"] = self.settings.mode
        return self.database.rows(query, values)


def owner_only(req: falcon.Request, resp: falcon.Response, resource: Any, params: dict[str, Any]) -> None:
    resource.office.guard.check_admin(req)


class Resource:
    """For the owner only: the token is checked before any responder of a subclass runs."""

    def __init_subclass__(cls) -> None:
        falcon.before(owner_only)(cls)

    def __init__(self, office: Office) -> None:
        self.office = office


# Payments


def list_payments(office: Office, req: falcon.Request, resp: falcon.Response) -> None:
    """GET /api/v1/payments: newest first, a page at a time."""
    office.guard.check_admin(req)
    fields = query(req)
    status = fields.choice("status", *books.STATUSES)
    limit = fields.integer("limit", 1, MOST_ROWS, of=str) or 20
    reference = fields.text("reference", most=40, is_required=False)
    after = fields.text("after", most=40, is_required=False) or None
    filters = {
        **{"status": status, "phone": None, "limit": limit + 1, "after": after},
        **{name: fields.moment(name, office.settings.timezone) for name in ("since", "until")},
        **{name: fields.text(name, most=500, is_required=False) or None for name in ("email", "order")},
        "reference": db.base_of(reference) or reference or None,
    }
    if after is not None and db.find_payment(office.database, after) is None:
        fields.refuse("after", "must be the `next` of an earlier page")
    fields.check()
    found = [Payment.of(row) for row in office.rows(books.PAYMENTS, **filters)]
    shown = array(map(payment_json, found[:limit]))
    answer(resp, "Payments listed.", payments=shown, next=next_of([payment.id for payment in found], limit))


class Cancel(Resource):
    """POST …/cancel: give up an order."""

    def on_post(self, req: falcon.Request, resp: falcon.Response, payment_id: str) -> None:
        fields, operator = command(req)
        fields.check()
        cancelled = self.office.database.transaction(checkout.cancel, self.office.find(payment_id), operator)
        answer(resp, "The order is given up.", payment=payment_json(cancelled))


class Resolve(Resource):
    """POST …/resolve: the end of a review."""

    def on_post(self, req: falcon.Request, resp: falcon.Response, payment_id: str) -> None:
        fields, operator = command(req)
        decision = fields.choice("decision", "accept", "reject", is_required=True)
        reason = fields.text("reason", most=500)
        currency = fields.text("currency", most=3, is_required=False).upper() or None
        fields.check()
        payment, database = self.office.find(payment_id), self.office.database
        if decision == "reject":
            give_back(self.office, resp, refunds.Request(payment.id, None, operator, reason, rejects=True))
        else:
            charges.accept(database, payment, operator, reason, currency=currency)
            answer(resp, "The payment is accepted.", payment=payment_json(self.office.find(payment_id)))


class Events(Resource):
    """GET …/events: the whole story of a payment."""

    def on_get(self, req: falcon.Request, resp: falcon.Response, payment_id: str) -> None:
        payment = self.office.find(payment_id)
        rows = self.office.rows(story.STORY, id=payment.id, references=db.references_of(payment.reference))
        answer(resp, "The payment's story.", events=array(map(story.as_json, story.told(payment, rows))))


# Refunds


class Refunds(Resource):
    """…/refunds: money back. One Idempotency-Key is one refund, for ever."""

    def on_post(self, req: falcon.Request, resp: falcon.Response, payment_id: str) -> None:
        key = bodies.idempotency_key(req, is_required=True)
        fields, operator = command(req)
        payment = self.office.find(payment_id)
        amount = fields.part("amount", payment.refunded_currency)
        reason = fields.text("reason", most=500, is_required=False) or None
        reference = fields.text("reference", most=40, is_required=False)
        if reference and db.base_of(reference) != payment.reference:
            fields.refuse("reference", "must be a reference of this payment")
        fields.check()
        target = reference or payment.id  # a second charge has a reference of its own
        give_back(self.office, resp, refunds.Request(target, amount, operator, reason, key=key))

    def on_get(self, req: falcon.Request, resp: falcon.Response, payment_id: str) -> None:
        answer(resp, "Refunds listed.", refunds=array(map(shapes.refund_json, refunds_of(self.office, payment_id))))


class RefundById(Resource):
    def on_get(self, req: falcon.Request, resp: falcon.Response, payment_id: str, refund_id: str) -> None:
        found = (each for each in refunds_of(self.office, payment_id) if each.id == refund_id)
        refund = next(found, None)
        if refund is None:
            raise Problem("not_found", "There is no such refund.")
        answer(resp, "The refund as it stands.", refund=shapes.refund_json(refund))


def give_back(office: Office, resp: falcon.Response, request: refunds.Request) -> None:
    """201; 202 while nobody knows whether Paystack took the refund. The request takes one of the slots, so that only so
    many threads wait for a provider that hangs. Raises Busy, and Problem if Paystack refuses it."""
    if not office.slots.acquire(blocking=False):
        raise checkout.Busy
    try:
        refund = refunds.refund(office.database, office.gateway, request)
    except refunds.RefundAsked as asked:
        refund = asked.refund
        resp.set_header("Idempotent-Replayed", "true")
    finally:
        office.slots.release()
    if refund.status == "refused":
        raise Problem("provider_refused", errors={"amount": [refund.refused_because or ""]}, headers=dict(resp.headers))
    if refund.status == "not_made":
        raise Problem("not_possible", f"Refund {refund.id} was not made: ask with a new Idempotency-Key.")
    resp.status = HTTPStatus.ACCEPTED if refund.status == "unanswered" else HTTPStatus.CREATED
    answer(resp, "The refund as it stands.", refund=shapes.refund_json(refund))


def refunds_of(office: Office, payment_id: str) -> list[Refund]:
    payment = office.find(payment_id)
    query = "SELECT * FROM refunds WHERE payment_id = %(id)s ORDER BY created_at, id"
    return list(map(Refund.of, office.rows(query, id=payment.id)))


# Incidents


class Incidents(Resource):
    """GET /api/v1/incidents: the newest first."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        fields = query(req)
        status = fields.choice("status", "open", "all") or "open"
        limit = fields.integer("limit", 1, MOST_ROWS, of=str) or 20
        after = fields.integer("after", 1, 10**12 - 1, of=str)
        fields.check()
        found = self.office.rows(INCIDENTS, is_open=status == "open", after=after, limit=limit + 1)
        shown = array(map(incident_json, found[:limit]))
        answer(resp, "Incidents listed.", incidents=shown, next=next_of([row["id"] for row in found], limit))


INCIDENTS = """
SELECT * FROM incidents
 WHERE mode = %(mode)s AND (NOT %(is_open)s OR closed_at IS NULL) AND (%(after)s::bigint IS NULL OR id < %(after)s)
 ORDER BY id DESC LIMIT %(limit)s
"""


class CloseIncident(Resource):
    def on_post(self, req: falcon.Request, resp: falcon.Response, number: int) -> None:
        fields, operator = command(req)
        reason = fields.text("reason", most=500)
        fields.check()
        if not self.office.rows(INCIDENT, number=number):
            raise Problem("not_found", "There is no such incident.")
        if not self.office.database.transaction(db.close_incident, number, operator, reason):
            raise Problem("not_possible", f"Incident {number} is closed already.")
        (row,) = self.office.rows(INCIDENT, number=number)
        answer(resp, "The incident is closed.", incident=incident_json(row))


INCIDENT = "SELECT * FROM incidents WHERE id = %(number)s AND mode = %(mode)s"


def incident_json(row: dict[str, Any]) -> str:
    shown = {name: row[name] for name in ("kind", "subject", "closed_by", "close_reason")}
    times = {name: shapes.timestamp(row[name]) for name in ("opened_at", "closed_at")}
    members = {"id": row["id"], "payment": row["payment_id"], **shown, **times, "what_to_do": story.describe(row)}
    return json.dumps(members, ensure_ascii=False)


# Links


class Links(Resource):
    """POST /api/v1/links: make a signed payment link."""

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        fields, _ = command(req)
        seconds = fields.integer("expires_in", 60, LONGEST_LINK_SECONDS)
        link = links.Link.asked_for(fields, self.office.settings, str(int(time.time()) + seconds) if seconds else "")
        if fields.get("qr") not in (None, True, False):
            fields.refuse("qr", "must be true or false")
        fields.check()
        url = link.address(self.office.settings, self.office.database)
        members = {
            "url": shapes.as_json(url),
            "amount": link.amount,
            **{name: shapes.as_json(getattr(link, name) or None) for name in ("currency", "description", "order")},
            "expires_at": shapes.as_json(shapes.timestamp(link.ends_at)),
        }
        if fields.get("qr"):
            try:
                members["qr_svg"] = shapes.as_json(segno.make_qr(url).svg_inline(scale=4))
            except segno.DataOverflowError:
                fields.refuse("qr", "is too small for this link: shorten its description or its order")
                fields.check()
        resp.status = HTTPStatus.CREATED
        answer(resp, "Share the link.", link=shapes.json_object(members))


LONGEST_LINK_SECONDS = 10 * 366 * 86400


class Withdraw(Resource):
    """POST /api/v1/links/withdraw: an order's links take no payment any more."""

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        fields, operator = command(req)
        order = fields.text("order", most=500)
        fields.check()
        database, cancelled = self.office.database, []
        for payment in links.withdraw(database, self.office.settings.mode, order, operator):
            with suppress(db.Impossible):  # paid meanwhile; the others are still cancelled
                cancelled.append(database.transaction(checkout.cancel, payment, operator))
        payments = array(map(payment_json, cancelled))
        answer(resp, "The links are withdrawn.", order=shapes.as_json(order), payments=payments)


# The report


class Report(Resource):
    """GET /api/v1/report: money by day, by location and in total; of this month by default."""

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        fields, zone = query(req), self.office.settings.timezone
        now = datetime.now(zone)
        since = fields.moment("since", zone) or now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        until = fields.moment("until", zone) or now
        if since >= until:
            fields.refuse("since", "must be before until")
        fields.check()
        rows = self.office.rows(books.REPORT, since=since, until=until, zone=str(zone))
        members = {
            **{"since": shapes.as_json(since.isoformat()), "until": shapes.as_json(until.isoformat())},
            **{"timezone": shapes.as_json(str(zone)), "mode": shapes.as_json(self.office.settings.mode)},
            "rows": array(map(report_row_json, rows)),
        }
        answer(resp, "The report.", report=shapes.json_object(members))


def report_row_json(row: dict[str, Any]) -> str:
    sums = {name: money.render(row[name], row["currency"]) for name in books.SUMS}
    texts = {name: shapes.as_json(row[name]) for name in ("by", "key", "currency")}
    counts = {name: str(row[name]) for name in ("payments", "unknown_fees")}
    return shapes.json_object(texts | counts | sums)


# Reading and answering


def query(req: falcon.Request) -> Fields:
    """The parameters of a list. An empty parameter is refused: it would find every payment."""
    fields = Fields(dict(req.params))
    for name, value in fields.body.items():
        if isinstance(value, str) and not value.strip(BLANK):
            fields.refuse(name, "must not be empty")
    return fields


def command(req: falcon.Request) -> tuple[Fields, str]:
    """The members of a command's body, and who gives the command. Without required members the body may be missing."""
    has_body = req.content_length or req.get_header("Transfer-Encoding")
    fields = Fields(bodies.read_json(req) if has_body else {})
    return fields, f"operator:{fields.text('by', most=100, is_required=False) or 'admin'}"


def payment_json(payment: Payment) -> str:
    members = shapes.payment_members(payment, "customer_phone", "location", "metadata")
    return shapes.json_object({**members, "cancelled_at": shapes.as_json(shapes.timestamp(payment.cancelled_at))})


def array(rows: Iterable[str]) -> str:
    return f"[{', '.join(rows)}]"


def next_of(ids: list[Any], limit: int) -> str:
    """The `after` of the next page; null on the last page."""
    return json.dumps(ids[limit - 1] if len(ids) > limit else None)


def answer(resp: falcon.Response, message: str, **members: str) -> None:
    resp.text = shapes.json_object({**members, "status": '"success"', "message": shapes.as_json(message)})
