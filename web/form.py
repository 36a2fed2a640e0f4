"""The form: payments for a shop without a site, free or by a signed link."""

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl

import falcon

import checkout
import db
from web import bodies, links, orders, pages
from web.errors import Problem
from web.languages import Language
from web.office import Office

LARGEST_FORM = 16 * 1024

TYPED = ("amount", "currency", "customer_name", "customer_email", "customer_phone", "location")
"""The fields that a customer fills in, by the API's names; the first two only if no link fixes them."""

MOST_TRIES = 10
"""After so many payments of one order without money, its link starts no other payment."""


@dataclass(frozen=True)
class Form:
    """The form as it came or is shown: its link, the typed text (with the hidden key), and what is wrong: by field, or
    as a notice (of `texts/`).

    `is_started`: its payment exists, with the text that was typed then, and only its checkout must be opened.
    """

    link: links.Link | None
    typed: Mapping[str, str]
    errors: Mapping[str, list[str]] = field(default_factory=dict)
    notice: str | None = None
    is_started: bool = False

    @property
    def order(self) -> str:
        """The order of its link; empty without an order."""
        return self.link.order if self.link else ""

    def anew(self, **changes: Any) -> "Form":
        """The typed text in a form with a new key, for another payment."""
        return replace(self, typed={**self.typed, "key": new_key()}, **changes)


@dataclass(frozen=True)
class Try:
    """The idempotency key of a form, and the payment that it started, if any."""

    key: bytes
    payment: db.Payment | None = None

    @property
    def state(self) -> str:
        """What the payment's page shows; empty without a payment. The form goes on with a payment that is `opening`."""
        return pages.state_of(self.payment, is_back=False) if self.payment else ""


class PayForm:
    """GET and POST /pay: payments for a shop without a site, by the rules of the API and with its errors.

    A signed link fixes the price. A hidden key makes one payment of a double click, and of the Back button, because the
    browser keeps the page. For a link with an order, the order makes one payment: the link opened again shows it.
    """

    def __init__(self, templates: pages.Templates, office: Office) -> None:
        self.templates = templates
        self.office = office

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        params = {name: value for name, value in req.params.items() if isinstance(value, str)}
        link = self.link(params, req.params)
        form = Form(link, {"key": new_key(), **{name: params.get(name, "") for name in links.SIGNED if link}})
        current, notice = self.current_try(form)
        if current.state not in ("", "opening"):
            raise pages.see_other(self.address(current.key))
        self.show(req, resp, replace(form, notice=notice, is_started=current.payment is not None))
        # Browsers keep the page only for the Back button, with its key and the typed text.
        resp.set_header("Cache-Control", "private, no-cache")

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        fields = read_form(req)
        link = self.link(fields, fields.keys() - {"amount", "currency"})
        form = Form(link, {**fields, "key": fields.get("key") or new_key()})
        # After an error from here on, the form is shown again with the typed text, and may safely be sent again.
        req.context.send_again = lambda notice: self.show(req, resp, replace(form, notice=notice))
        self.office.guard.check_rate(req)
        current, _ = self.current_try(form)
        req.context.payment = self.id_of(current.key)
        if current.payment and current.state != "opening":
            raise pages.see_other(current.payment.open_checkout_url or self.address(current.key))
        try:
            order = order_of(current.payment) if current.payment else self.order(form, self.templates.language(req))
            settled = checkout.start(self.office, current.key, order)
        except Problem as problem:
            self.refuse(req, resp, replace(form, errors=problem.errors or {}))
        except checkout.InFlight:  # a double click: the payment's page goes on as soon as the checkout is open
            raise pages.see_other(self.address(current.key) + "?go=on") from None
        except db.KeyReused:
            if form.order:  # somebody was quicker with the same link
                raise pages.see_other(self.address(current.key)) from None
            # The Back button, and the customer changed the text.
            self.refuse(req, resp, form.anew(notice="changed"))
        else:
            if settled.payment.charge_reference is None and self.is_withdrawn(form):  # meanwhile
                self.office.database.transaction(checkout.cancel, settled.payment, "link")
                raise Problem("link_withdrawn")
            self.go_on(req, resp, form, settled)

    def go_on(self, req: falcon.Request, resp: falcon.Response, form: Form, settled: checkout.Settled) -> None:
        """Lead to the checkout, or to the form again if the payment has failed or expired."""
        payment = settled.payment
        if settled.answer == "payment":
            raise pages.see_other(payment.open_checkout_url or f"{self.office.settings.base_path}/pay/{payment.id}")
        if settled.answer == "payment_expired":
            self.refuse(req, resp, form.anew(notice="over"))
        else:  # the field that the provider refuses
            self.refuse(req, resp, form.anew(errors={settled.answer: [payment.status_reason or ""]}))

    def refuse(self, req: falcon.Request, resp: falcon.Response, form: Form) -> None:
        resp.status = HTTPStatus.UNPROCESSABLE_ENTITY
        self.show(req, resp, form)

    def show(self, req: falcon.Request, resp: falcon.Response, form: Form) -> None:
        """The form with the typed text, each error beside its field. Above: links to these fields, or a notice."""
        fixed = {name: form.typed[name] for name in links.SIGNED if form.link and form.typed.get(name)}
        self.templates.show(req, resp, "form.html", form=form, fixed=fixed)

    def link(self, params: Mapping[str, str], names: Iterable[str]) -> links.Link | None:
        """The signed link in a request's parameters. None for the free form: then no parameter in `names` may be a
        link's. Raises Problem.
        """
        if not links.was_link(names):
            if not self.office.settings.pay_form:
                raise Problem("not_found")
            return None
        link = links.Link.signed(params, self.office.database.secret(), self.office.settings.mode)
        if link is None:
            raise Problem("link_refused")
        return link

    def current_try(self, form: Form) -> tuple[Try, str | None]:
        """The try to go on with, and a notice about an earlier try.

        While its link lasts, an order may be tried again if its payment failed or expired, or has another price, but
        not if it was cancelled. If money came for any try, that try counts before all. Raises Problem.
        """
        tries = self.tries(form.order) if form.order else [Try(links.digest(f"form\0{form.typed['key']}"))]
        paid = [each for each in tries if each.payment and each.payment.status not in db.UNPAID]
        same = [each for each in tries if form.link and form.link.is_of(each.payment)]
        kept = [each for each in same if each.state not in ("failed", "expired")]
        chosen = (paid or kept or tries)[-1]
        if chosen.payment is None and form.link and form.link.is_over:
            raise Problem("link_over")
        if not paid and self.is_withdrawn(form):
            raise Problem("link_withdrawn")
        has_ended = chosen.payment is None and any(each.payment and each.payment.status != "pending" for each in tries)
        return chosen, "ended_before" if has_ended else None

    def is_withdrawn(self, form: Form) -> bool:
        return bool(form.order) and links.is_withdrawn(self.office.database, self.office.settings.mode, form.order)

    def tries(self, order: str) -> list[Try]:
        """The tries to pay an order, in their order, and the next try, unless there were too many.

        The NULs in the hashed text, here and for the form's own keys, keep these keys apart from the API's keys.
        """
        tries: list[Try] = []
        for number in range(MOST_TRIES):
            key = links.digest(f"order\0{order}" + (f"\0{number}" if number else ""))
            tries.append(Try(key, db.find_payment(self.office.database, self.id_of(key))))
            if tries[-1].payment is None:
                break
        return tries

    def order(self, form: Form, language: Language) -> checkout.Order:
        """The typed order, with the fields that a link fixes. Raises Problem with the errors of its fields."""
        body: dict[str, object] = {name: form.typed[name].strip() for name in TYPED if form.typed.get(name)}
        if "amount" in body:
            body["amount"] = orders.Typed(language.plain(form.typed["amount"]))
        if (link := form.link) is not None:
            body |= {"amount": link.amount, "currency": link.currency, "description": link.description or None}
            body["metadata"] = {"order": link.order} if link.order else None
        order = orders.parse_order(body, self.office.settings)
        return replace(order, source="form" if link is None else "link")

    def id_of(self, key: bytes) -> str:
        return db.payment_id_of(self.office.database, self.office.settings.mode, key)

    def address(self, key: bytes) -> str:
        return f"{self.office.settings.base_path}/pay/{self.id_of(key)}"


def order_of(payment: db.Payment) -> checkout.Order:
    """The order of a payment."""
    names = {each.name for each in fields(checkout.Order)} & set(db.PAYMENT_COLUMNS)
    return checkout.Order(**{name: getattr(payment, name) for name in names})


def new_key() -> str:
    return secrets.token_urlsafe(18)


def read_form(req: falcon.Request) -> dict[str, str]:
    """The fields of a posted form. Raises Problem."""
    if (req.content_type or "").partition(";")[0].strip().lower() != falcon.MEDIA_URLENCODED:
        raise Problem("unsupported_media_type", "Send the form as a browser does.")
    body = bodies.read(req, LARGEST_FORM, "A form")
    try:
        return dict(parse_qsl(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=50))
    except ValueError:
        raise Problem("bad_request") from None
