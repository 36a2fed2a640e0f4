"""The pages: home, the payment and its receipt, and the problem. They work without JavaScript.

`templates/` has their looks, `texts/` their words; this file chooses the page.
"""

import hashlib
import re
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import falcon
from markupsafe import Markup

import db
import money
from settings import Settings, is_loopback
from web import html, languages, log
from web.errors import Problem
from web.readers import Readers

STATIC = Path(__file__).with_name("static")
VERSION = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(STATIC.iterdir()))).hexdigest()[:8]
"""Part of each static file's address, so that browsers may keep the file."""


class Templates:
    """The pages' templates in each language, with the values that all of them need, loaded before the first request."""

    def __init__(self, settings: Settings) -> None:
        self.languages = {code: languages.Language(code, settings.timezone) for code in languages.CODES}
        self.environments = {code: html.templates() for code in languages.CODES}
        for code, env in self.environments.items():
            language = self.languages[code]
            merchant = settings.merchant_name or language.texts["merchant"]
            env.filters.update(error=language.error, moment=language.moment, money=language.money)
            env.globals.update(
                base=settings.base_path,
                currencies=settings.currencies,
                is_whole=all(money.decimals_of(code) == 0 for code in settings.currencies),
                language=code,
                merchant=merchant,
                mode=settings.mode,
                questions=questions(language.texts, merchant, settings.merchant_contact or ""),
                refresh_seconds=None,
                texts=language.texts,
                version=VERSION,
            )
            for name in env.list_templates(["html"]):
                env.get_template(name)

    def show(self, req: falcon.Request, resp: falcon.Response, name: str, **values: Any) -> None:
        """Answer with a page, in the language that the reader likes best."""
        resp.content_type = falcon.MEDIA_HTML
        resp.append_header("Vary", "Accept-Language")
        resp.text = self.environments[self.language(req).code].get_template(name).render(**values)

    def language(self, req: falcon.Request) -> languages.Language:
        return self.languages[languages.preferred(req.get_header("Accept-Language") or "")]


def questions(texts: dict[str, Any], merchant: str, contact: str) -> Markup:
    """Where to ask, with a link to MERCHANT_CONTACT: a page, an e-mail address or a phone number."""
    said: Markup = texts["questions_to" if contact else "questions"]
    number = "tel:" + re.sub("[^0-9+]", "", contact)
    url = contact if ":" in contact else f"mailto:{contact}" if "@" in contact else number
    return said.format(merchant=merchant, url=url, contact=contact.removeprefix("https://"))


class Home:
    """GET /: tells a browser what this is and where to go. Other clients get 404."""

    def __init__(self, settings: Settings, templates: Templates) -> None:
        self.settings = settings
        self.templates = templates

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        if "text/html" not in req.accept:  # not client_accepts(): `*/*` is an API's client
            raise Problem("not_found")
        url = self.settings.paystack_url
        sandbox_url = url if is_loopback(urlsplit(url).hostname or "") else None
        self.templates.show(req, resp, "home.html", pay_form=self.settings.pay_form, sandbox_url=sandbox_url)


def desk(settings: Settings, templates: Templates) -> str:
    """GET /desk: the owner's page. It holds nothing: its script asks the API, with the token that the owner types."""
    page = templates.environments["en"].get_template("desk.html")
    return page.render(is_open=settings.admin_token is not None, shop=settings.merchant_name)


class PaymentPage:
    """GET /pay/{id}: the price and the merchant, the way to the checkout, the live status, the receipt.

    It shows no customer's name, e-mail or phone. Paystack sends the customer back here; that proves no payment.
    """

    def __init__(self, templates: Templates, readers: Readers) -> None:
        self.templates = templates
        self.readers = readers

    def on_get(self, req: falcon.Request, resp: falcon.Response, payment_id: str) -> None:
        payment = self.readers.find(payment_id, req)
        self.readers.note(payment, req)
        is_back = "reference" in req.params or "trxref" in req.params
        shop_url = with_query(payment.return_url, payment=payment.id) if payment.return_url else None
        if shop_url and is_back:
            raise see_other(shop_url)
        if payment.open_checkout_url and "go" in req.params:  # a double click, and the payment is open now
            raise see_other(payment.open_checkout_url)
        state = state_of(payment, is_back=is_back)
        is_live = payment.status == "pending" and state != "cancelled" and req.params.get("refresh") != "off"
        self.templates.show(
            req,
            resp,
            "payment.html",
            payment=payment,
            charge=find_charge(self.readers.database, payment.charge_reference) if payment.charge_reference else [],
            state=state,
            shop_url=shop_url,
            mode=payment.mode,
            refresh_seconds=(2 if state == "opening" else 5) if is_live else None,
        )


def state_of(payment: db.Payment, *, is_back: bool) -> str:
    """The state that a payment's page shows: its status, or a finer state that the customer needs.

    `is_back`: Paystack has sent the customer back, maybe after a payment, so a decline that we know of is older.
    """
    due_back = payment.due_back_minor if payment.status == "refunded" else 1
    match payment.status:
        case "pending" | "failed" | "expired" if payment.cancelled_at:
            return "cancelled"
        case "pending" if payment.checkout_url is None:
            return "opening"
        case "pending" if is_back:
            return "confirming"
        case "pending" if payment.status_reason:
            return "declined"
        case "completed" if payment.accepted_by:
            return "accepted"
        case "partially_refunded" | "refunded" if payment.refunded_minor < due_back:
            return "refund_failed"
    return payment.status


def find_charge(database: db.Database, reference: str | None) -> list[dict[str, Any]]:
    """The charge, with a row for each of its refunds, or one row without refunds; no row without a charge.

    A refund counts only once the provider has confirmed it: a refund that we only asked for may never be made.
    """
    return database.rows(
        """
        SELECT c.channel, coalesce(c.paid_at, c.recorded_at) AS came_at, r.amount_minor AS refunded_minor,
               r.currency, r.status = 'processed' AS is_processed, coalesce(r.processed_at, r.created_at) AS at
          FROM charges c
          LEFT JOIN refunds r ON r.charge_reference = c.reference
                             AND r.status IN ('pending', 'processing', 'needs-attention', 'processed')
         WHERE c.reference = %(reference)s
         ORDER BY is_processed DESC, at
        """,
        {"reference": reference},
    )


def show_problem(templates: Templates, req: falcon.Request, resp: falcon.Response, problem: Problem) -> None:
    """Show an error to a browser: a page, or the form again if sending it once more may help."""
    is_ours = problem.status >= HTTPStatus.INTERNAL_SERVER_ERROR
    notice = "not_started" if is_ours and req.method == "POST" else "not_shown" if is_ours else problem.code
    send_again = req.context.get("send_again")
    if send_again and (is_ours or notice == "rate_limited"):
        send_again(notice)
        return
    templates.show(
        req,
        resp,
        "problem.html",
        notice=notice,
        request_id=log.request_id.get() if is_ours else None,
        refresh_seconds=5 if notice == "not_shown" else None,
    )


def with_query(url: str, **members: str) -> str:
    """`url` with more members in its query, before its fragment."""
    parts = urlsplit(url)
    query = "&".join(part for part in (parts.query, urlencode(members)) if part)
    return parts._replace(query=query).geturl()


def see_other(url: str) -> falcon.HTTPSeeOther:
    """To raise: the browser goes on to `url`, in which odd characters are percent-encoded."""
    return falcon.HTTPSeeOther(falcon.uri.encode_check_escaped(url))
