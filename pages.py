"""The customer's pages: the form, the payment, the receipt. Plain HTML that works without JavaScript."""

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

import falcon
from markupsafe import Markup

import checkout
import db
import money
import orders
from errors import Problem
from limits import Guard
from readers import Readers
from settings import Settings

PAGES = Path(__file__).with_name("pages")
LARGEST_FORM = 16 * 1024

STATUS_LINES = {
    "pending": "Waiting for your payment",
    "failed": "This payment failed",
    "expired": "This payment has ended unpaid",
    "review": "Your payment has arrived and is being checked",
    "completed": "Paid",
    "partially_refunded": "Paid, and a part was given back",
    "refunded": "Paid, and given back",
}
FORM_FIELDS = {
    # name: (label, type, autocomplete, inputmode)
    "customer_name": ("Your name", "text", "name", "text"),
    "customer_email": ("E-mail", "email", "email", "email"),
    "customer_phone": ("Phone", "tel", "tel", "tel"),
    "location": ("City or town", "text", "address-level2", "text"),
}


def template(name: str) -> Markup:
    """A page of ours. Whatever is put in its places is escaped, unless it is Markup itself."""
    return Markup((PAGES / name).read_text(encoding="utf-8"))  # noqa: S704


class PaymentPage:
    """GET /pay/{id}: what is paid and to whom, the way to the checkout, the live status, the receipt.

    It shows nobody's name, e-mail or phone. Paystack sends the customer back here, which proves nothing.
    """

    def __init__(self, database: db.Database, readers: Readers, merchant_name: str | None) -> None:
        self.database = database
        self.readers = readers
        self.merchant_name = merchant_name
        self.page = template("payment.html")

    def on_get(self, req: falcon.Request, resp: falcon.Response, payment_id: str) -> None:
        payment = db.find_payment(self.database, payment_id)
        if payment is None:
            raise Problem("not_found", "There is no payment at this address. Check the link that you were given.")
        self.readers.note(payment)
        if payment.return_url and ("reference" in req.params or "trxref" in req.params):
            see_other(resp, with_query(payment.return_url, payment=payment.id))
            return
        resp.content_type = falcon.MEDIA_HTML
        resp.text = self.render(payment)

    def render(self, payment: db.Payment) -> str:
        moment = payment.paid_at or payment.created_at
        button = Markup('<p><a class="button" href="{}">Pay now</a></p>')
        return self.page.format(
            refresh=Markup('<meta http-equiv="refresh" content="5">') if payment.status == "pending" else "",
            test=test_banner(payment.mode),
            merchant=self.merchant_name or "the merchant",
            amount=money.render(payment.amount_minor, payment.currency),
            currency=payment.currency,
            description=payment.description or "",
            status=payment.status,
            status_line=STATUS_LINES[payment.status],
            reason=(payment.status_reason or "") if payment.status in ("pending", "failed") else "",
            button=button.format(payment.open_checkout_url) if payment.open_checkout_url else "",
            reference=payment.current_reference,
            moment=f"{moment:%d %B %Y, %H:%M} UTC",
        )


class PayForm:
    """GET and POST /pay: a payment without a site of one's own, by the rules of the API and with its errors.

    A signed link fixes what is paid. A hidden key makes a double click one payment; with an order it is the link that
    makes it one, and whoever opens it again is shown that payment.
    """

    def __init__(self, settings: Settings, desk: checkout.Desk, guard: Guard) -> None:
        self.settings = settings
        self.desk = desk
        self.guard = guard
        self.page = template("form.html")

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        link = self.link({name: value for name, value in req.params.items() if isinstance(value, str)})
        if link is not None and link.order and self.payment_of(self.key(link, {})) is not None:
            see_other(resp, self.page_of(self.key(link, {})))
            return
        self.show(resp, link, {"key": new_key()}, {})

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        self.guard.check_rate(req)
        fields = read_form(req)
        link = self.link(fields)
        key = self.key(link, fields)
        try:
            answer, _ = checkout.start(self.desk, key, self.order(link, fields))
        except Problem as problem:
            if problem.errors is None:
                raise
            self.show(resp, link, fields, problem.errors)
            return
        except db.InFlight:  # a double click: the page of the one payment has its button in a moment
            see_other(resp, self.page_of(key))
            return
        except db.KeyReused:
            if link is not None and link.order:
                see_other(resp, self.page_of(key))
            else:  # the back button, and something was changed
                notice = "You changed something: send it again to start another payment."
                self.show(resp, link, {**fields, "key": new_key()}, {"": [notice]})
            return
        if answer.status != HTTPStatus.CREATED:
            refused = json.loads(answer.body)
            errors = refused.get("errors") or {"": [refused["message"]]}
            self.show(resp, link, {**fields, "key": new_key()}, errors)
            return
        payment = db.find_payment(self.desk.database, answer.payment_id)
        see_other(resp, (payment and payment.open_checkout_url) or self.page_of(key))

    def link(self, params: Mapping[str, str]) -> orders.Link | None:
        """The signed link that a request bears; None for the free form. Raises Problem."""
        if "signature" not in params:
            if not self.settings.pay_form:
                raise Problem("not_found")
            return None
        link = orders.Link.signed(params, self.desk.database.secret(), self.settings.mode)
        if link is None:
            raise Problem("link_refused")
        if link.is_over and not (link.order and self.payment_of(self.key(link, {}))):
            raise Problem("link_over")
        return link

    def key(self, link: orders.Link | None, fields: Mapping[str, str]) -> bytes:
        """The idempotency key: the order's, for a link with one, else the form's hidden one. The NUL keeps them apart
        from every key that the API takes."""
        text = f"order\0{link.order}" if link is not None and link.order else f"form\0{fields.get('key') or new_key()}"
        return hashlib.sha256(text.encode()).digest()

    def payment_of(self, key: bytes) -> db.Payment | None:
        return db.find_payment(self.desk.database, db.payment_id_of(self.desk.database, self.settings.mode, key))

    def page_of(self, key: bytes) -> str:
        return f"/pay/{db.payment_id_of(self.desk.database, self.settings.mode, key)}"

    def order(self, link: orders.Link | None, fields: Mapping[str, str]) -> db.Order:
        """The order that was typed, with what a link fixes. Raises Problem with the errors of its fields."""
        body: dict[str, object] = {name: fields[name].strip() for name in (*FORM_FIELDS, "amount") if name in fields}
        if len(self.settings.currencies) > 1 and fields.get("currency"):
            body["currency"] = fields["currency"]
        if link is not None:
            body |= {"amount": link.amount, "currency": link.currency, "description": link.description or None}
            body["metadata"] = {"order": link.order} if link.order else None
        order = orders.parse_order(body, self.settings)
        return replace(order, source="form" if link is None else "link")

    def show(
        self, resp: falcon.Response, link: orders.Link | None, fields: Mapping[str, str], errors: dict[str, list[str]]
    ) -> None:
        """The form, with what was typed and each error beside its field."""
        if errors:
            resp.status = HTTPStatus.UNPROCESSABLE_ENTITY
        names = FORM_FIELDS if link is not None else {**FORM_FIELDS, "amount": ("Amount", "text", "off", "decimal")}
        hidden = {"key": fields.get("key") or new_key()}
        if link is not None:
            hidden |= {name: getattr(link, name) for name in orders.LINK_MEMBERS if getattr(link, name)}
            hidden["signature"] = link.signature(self.desk.database.secret(), self.settings.mode)
        resp.content_type = falcon.MEDIA_HTML
        resp.text = self.page.format(
            test=test_banner(self.settings.mode),
            merchant=self.settings.merchant_name or "the merchant",
            fixed=Markup("<h1>{} <span>{}</span></h1><p>{}</p>").format(link.amount, link.currency, link.description)
            if link is not None
            else "",
            hidden=joined(
                Markup('<input type="hidden" name="{}" value="{}">').format(*item) for item in hidden.items()
            ),
            problems=joined(
                Markup('<p class="reason" role="alert">{}</p>').format(text) for text in unplaced(errors, names)
            ),
            inputs=joined(field_of(name, fields.get(name, ""), errors.get(name, [])) for name in names),
            currency=self.currency_input(fields) if link is None else "",
        )

    def currency_input(self, fields: Mapping[str, str]) -> Markup:
        codes = self.settings.currencies
        if len(codes) == 1:
            return Markup('<p class="small">in {}</p>').format(codes[0])
        option = Markup("<option{}>{}</option>")
        options = joined(
            option.format(Markup(" selected") if fields.get("currency") == code else "", code) for code in codes
        )
        return Markup(
            '<p><label for="currency">Currency</label><select id="currency" name="currency">{}</select></p>'
        ).format(options)


INPUT = """<p><label for="{name}">{label}</label>
<input id="{name}" name="{name}" type="{kind}" autocomplete="{autocomplete}" inputmode="{inputmode}" value="{value}"
 required{described}>{message}</p>"""


def field_of(name: str, value: str, errors: list[str]) -> Markup:
    """A labelled input with its errors, tied together for those who cannot see them beside each other."""
    label, kind, autocomplete, inputmode = {**FORM_FIELDS, "amount": ("Amount", "text", "off", "decimal")}[name]
    described = Markup(' aria-invalid="true" aria-describedby="{}-error"').format(name) if errors else ""
    message = (
        Markup('<span class="reason" id="{}-error">{} {}</span>').format(name, label, "; ".join(errors))
        if errors
        else ""
    )
    return Markup(INPUT).format(  # noqa: S704  # a text of ours
        name=name,
        label=label,
        kind=kind,
        autocomplete=autocomplete,
        inputmode=inputmode,
        value=value,
        described=described,
        message=message,
    )


def unplaced(errors: dict[str, list[str]], names: Iterable[str]) -> list[str]:
    """The errors that have no field in the form to stand beside."""
    return [f"{name} {text}".strip() for name, texts in errors.items() if name not in names for text in texts]


def joined(parts: Iterable[Markup]) -> Markup:
    return Markup("\n").join(parts)


def test_banner(mode: str) -> Markup:
    return Markup('<p class="test">TEST: no money moves here</p>') if mode == "test" else Markup("")


class Stylesheet:
    """GET /paygate.css: the one stylesheet of the pages, so that their policy can forbid inline styles."""

    def __init__(self) -> None:
        self.css = (PAGES / "paygate.css").read_text(encoding="utf-8")

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.content_type = "text/css; charset=utf-8"
        resp.set_header("Cache-Control", "public, max-age=3600")
        resp.text = self.css


def render_problem(problem: Problem) -> str:
    """An error as a page, for whoever came with a browser."""
    return template("problem.html").format(message=problem.message)


def read_form(req: falcon.Request) -> dict[str, str]:
    """The fields of a posted form. Raises Problem."""
    if (req.content_type or "").partition(";")[0].strip().lower() != falcon.MEDIA_URLENCODED:
        raise Problem("unsupported_media_type", "Send the form as a browser does.")
    length = req.content_length
    if length is None:
        raise Problem("length_required")
    if length > LARGEST_FORM:
        raise Problem("payload_too_large")
    try:
        return dict(
            parse_qsl(req.bounded_stream.read(length).decode("utf-8"), keep_blank_values=True, max_num_fields=50)
        )
    except ValueError:
        raise Problem("bad_request") from None


def new_key() -> str:
    return secrets.token_urlsafe(18)


def see_other(resp: falcon.Response, url: str) -> None:
    resp.status = HTTPStatus.SEE_OTHER
    resp.location = url


def with_query(url: str, **members: str) -> str:
    """`url` with more members in its query, before its fragment."""
    parts = urlsplit(url)
    query = "&".join(part for part in (parts.query, urlencode(members)) if part)
    return parts._replace(query=query).geturl()
