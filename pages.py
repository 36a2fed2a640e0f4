"""The customer's pages: the payment and its receipt, the form, the problem. Plain HTML that works without JavaScript.

What they look like and say is in `pages/`; here is which page is shown, and when a payment is started.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import falcon
from markupsafe import Markup

import checkout
import db
import log
import money
import orders
from errors import Problem
from limits import Guard
from readers import Readers
from settings import Settings

PAGES = Path(__file__).with_name("pages")
LARGEST_FORM = 16 * 1024
SIGNED = (*orders.LINK_MEMBERS, "signature")
"""The fields of a form that a link fixes."""
MOST_TRIES = 10
"""How many payments of one order may come to nothing before its link starts no other."""


class PaymentPage:
    """GET /pay/{id}: what is paid and to whom, the way to the checkout, the live status, the receipt.

    It shows nobody's name, e-mail or phone. Paystack sends the customer back here, which proves nothing.
    """

    def __init__(self, settings: Settings, database: db.Database, readers: Readers) -> None:
        self.database = database
        self.readers = readers
        self.frame = Frame(settings)
        self.blocks = read_blocks("payment.html")

    def on_get(self, req: falcon.Request, resp: falcon.Response, payment_id: str) -> None:
        payment = db.find_payment(self.database, payment_id)
        if payment is None:
            raise Problem("not_found")
        self.readers.note(payment)
        is_back = "reference" in req.params or "trxref" in req.params
        if payment.return_url and is_back:
            see_other(resp, with_query(payment.return_url, payment=payment.id))
        elif payment.open_checkout_url and "go" in req.params:  # a double click, and the payment is open now
            see_other(resp, payment.open_checkout_url)
        else:
            is_live = payment.status == "pending" and req.params.get("refresh") != "off"
            show(resp, self.page(payment, state_of(payment, is_back=is_back), is_live=is_live))

    def page(self, payment: db.Payment, state: str, *, is_live: bool) -> Markup:
        words = {
            "amount": readable(payment.amount_minor, payment.currency),
            "base": self.frame.base,
            "checkout_url": payment.open_checkout_url,
            "description": payment.description or "",
            "merchant": self.frame.merchant,
            "reason": (payment.status_reason or "").removeprefix("last try declined: "),
            "refunded": readable(payment.refunded_minor, payment.currency),
            "shop_url": with_query(payment.return_url, payment=payment.id) if payment.return_url else "",
        }
        title, said = titled(self.blocks[state].format(**words))
        content = self.blocks["payment"].format(
            **words,
            state=state,
            said=said,
            next=joined(self.blocks[name].format(**words) for name in self.next(payment, state)),
            foot=joined(self.blocks[name].format(**words) for name in foot_of(payment, is_live=is_live)),
            facts=joined(self.blocks["fact"].format(name=name, value=value) for name, value in facts_of(payment)),
        )
        seconds = 2 if state == "opening" else 5
        return self.frame.page(title, content, payment.mode, refresh_seconds=seconds if is_live else None)

    def next(self, payment: db.Payment, state: str) -> list[str]:
        """The blocks below what is said of the state: what the customer can do."""
        if payment.status in ("failed", "expired"):
            return [f"again_{payment.source}", "late"]
        return [f"{state}_next"] if f"{state}_next" in self.blocks else []


def state_of(payment: db.Payment, *, is_back: bool) -> str:
    """The block of a payment's page: its status, and what the customer needs to know besides.

    `is_back`: Paystack has sent the customer back, as it does after a payment: a decline that we know of is older.
    """
    due_back = min(payment.amount_minor, payment.charged_minor) if payment.status == "refunded" else 1
    match payment.status:
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


def foot_of(payment: db.Payment, *, is_live: bool) -> list[str]:
    """The blocks below the receipt."""
    is_there = {
        "shop": payment.return_url and payment.status != "pending",
        "print": payment.is_paid,
        "live": is_live,
    }
    return [name for name, is_shown in is_there.items() if is_shown]


def facts_of(payment: db.Payment) -> list[tuple[str, object]]:
    """What stands on a receipt, or on a note of what is to be paid.

    A charge that was not as asked for may be in another currency, which is not known here: its sums stay out of it.
    """
    reference = ("Reference", payment.current_reference)
    if payment.status == "pending":
        return [("Pay until", time_element(payment.expires_at)), reference]
    if not payment.is_paid:
        return [("Started on", time_element(payment.created_at)), reference]
    names = {"Price": payment.amount_minor}
    if payment.status_reason is None:
        has_fees = payment.charged_minor > payment.amount_minor
        names = {**names, "Paid, with fees": payment.charged_minor} if has_fees else {"Paid": payment.charged_minor}
        if payment.status != "completed":
            names["Refunded"] = payment.refunded_minor
    sums = [(name, readable(amount_minor, payment.currency)) for name, amount_minor in names.items()]
    return [*sums, ("Paid on", time_element(payment.paid_at or payment.created_at)), reference]


@dataclass(frozen=True)
class Form:
    """The form as it came or is shown: by which link, what was typed (and the hidden key), and what is wrong: by field,
    or as a notice (the name of a block).

    `is_started`: its payment is there, with what was typed then, and only has to be opened.
    """

    link: orders.Link | None
    typed: Mapping[str, str]
    errors: Mapping[str, list[str]] = field(default_factory=dict)
    notice: str | None = None
    is_started: bool = False

    @property
    def order(self) -> str:
        """The order that its link is for; empty without one."""
        return self.link.order if self.link else ""

    def anew(self, **changes: Any) -> "Form":
        """What was typed, to start another payment with."""
        return replace(self, typed={**self.typed, "key": new_key()}, **changes)


@dataclass(frozen=True)
class Try:
    """The idempotency key of a form, and the payment that it has started, if it has."""

    key: bytes
    payment: db.Payment | None = None

    @property
    def status(self) -> str | None:
        return self.payment.status if self.payment else None

    @property
    def is_open(self) -> bool:
        """Whether the customer has a page to go on with, and nothing is left to be done here."""
        return self.payment is not None and (self.status != "pending" or self.payment.checkout_url is not None)


class PayForm:
    """GET and POST /pay: a payment without a site of one's own, by the rules of the API and with its errors.

    A signed link fixes what is paid. A hidden key makes a double click one payment, and the Back button too, for the
    browser keeps the page. With an order it is the link that makes it one, and whoever opens it again is shown it.
    """

    def __init__(self, settings: Settings, desk: checkout.Desk, guard: Guard) -> None:
        self.settings = settings
        self.desk = desk
        self.guard = guard
        self.view = FormPage(settings)

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        params = {name: value for name, value in req.params.items() if isinstance(value, str)}
        link = self.link(params)
        form = Form(link, {"key": new_key(), **{name: params.get(name, "") for name in SIGNED if link}})
        current, notice = self.current_try(form)
        if current.is_open:
            see_other(resp, self.address(current.key))
            return
        show(resp, self.view.page(replace(form, notice=notice, is_started=current.payment is not None)))
        # Kept for the Back button alone, with its key and what is typed into it; asked for again, it is made anew.
        resp.set_header("Cache-Control", "private, no-cache")

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        fields = read_form(req)
        form = Form(self.link(fields), {**fields, "key": fields.get("key") or new_key()})
        # Whatever is in the way from here on: to send the form once more is safe, and what was typed is not lost.
        req.context.send_again = lambda notice: self.view.page(replace(form, notice=notice))
        self.guard.check_rate(req)
        current, _ = self.current_try(form)
        if current.payment and current.is_open:
            see_other(resp, current.payment.open_checkout_url or self.address(current.key))
            return
        try:
            order = order_of(current.payment) if current.payment else self.order(form)
            answer, _ = checkout.start(self.desk, current.key, order)
        except Problem as problem:
            self.refuse(resp, replace(form, errors=problem.errors or {}))
        except db.InFlight:  # a double click: the page of the one payment goes on as soon as that is open
            see_other(resp, self.address(current.key) + "?go=on")
        except db.KeyReused:
            if form.order:  # somebody was quicker with the same link
                see_other(resp, self.address(current.key))
            else:  # the Back button, and something was changed
                self.refuse(resp, form.anew(notice="changed"))
        else:
            self.go_on(resp, form, answer)

    def go_on(self, resp: falcon.Response, form: Form, answer: db.Answer) -> None:
        """To the checkout, or to the form again where the payment has come to nothing."""
        if answer.status == HTTPStatus.CREATED:
            payment = db.find_payment(self.desk.database, answer.payment_id)
            url = payment.open_checkout_url if payment else None
            see_other(resp, url or f"{self.view.frame.base}/pay/{answer.payment_id}")
        elif errors := json.loads(answer.body).get("errors"):  # the provider's
            self.refuse(resp, form.anew(errors=errors))
        else:
            self.refuse(resp, form.anew(notice="over"))

    def refuse(self, resp: falcon.Response, form: Form) -> None:
        resp.status = HTTPStatus.UNPROCESSABLE_ENTITY
        show(resp, self.view.page(form))

    def link(self, params: Mapping[str, str]) -> orders.Link | None:
        """The signed link that a request bears; None for the free form. Raises Problem."""
        if "signature" not in params:
            if not self.settings.pay_form:
                raise Problem("not_found")
            return None
        link = orders.Link.signed(params, self.desk.database.secret(), self.settings.mode)
        if link is None:
            raise Problem("link_refused")
        return link

    def current_try(self, form: Form) -> tuple[Try, str | None]:
        """The try to go on with, and what the customer is told about an earlier one.

        An order whose payment came to nothing may be tried again while its link lasts, and so may one that was started
        at another price; but money that came for any of its tries counts before all. Raises Problem.
        """
        tries = self.tries(form.order) if form.order else [Try(digest(f"form\0{form.typed['key']}"))]
        paid = [each for each in tries if each.status not in (None, *db.UNPAID)]
        pending = [each for each in tries if each.status == "pending" and form.link and form.link.is_of(each.payment)]
        chosen = (paid or pending or tries)[-1]
        if chosen.payment is None and form.link and form.link.is_over:
            raise Problem("link_over")
        has_ended = chosen.payment is None and any(each.status in ("failed", "expired") for each in tries)
        return chosen, "ended_before" if has_ended else None

    def tries(self, order: str) -> list[Try]:
        """The tries to pay an order, in their turn, and the next one, unless there were too many.

        The NULs in what is hashed, here and for the form's own keys, keep them apart from every key of the API.
        """
        tries: list[Try] = []
        for number in range(MOST_TRIES):
            key = digest(f"order\0{order}" + (f"\0{number}" if number else ""))
            tries.append(Try(key, db.find_payment(self.desk.database, self.id_of(key))))
            if tries[-1].payment is None:
                break
        return tries

    def order(self, form: Form) -> db.Order:
        """The order that was typed, with what a link fixes. Raises Problem with the errors of its fields."""
        names = [field.name for field in (*self.view.amount, *CUSTOMER)]
        body: dict[str, object] = {name: form.typed[name].strip() for name in names if form.typed.get(name)}
        if (link := form.link) is not None:
            body |= {"amount": link.amount, "currency": link.currency, "description": link.description or None}
            body["metadata"] = {"order": link.order} if link.order else None
        order = orders.parse_order(body, self.settings)
        return replace(order, source="form" if link is None else "link")

    def id_of(self, key: bytes) -> str:
        return db.payment_id_of(self.desk.database, self.settings.mode, key)

    def address(self, key: bytes) -> str:
        return f"{self.view.frame.base}/pay/{self.id_of(key)}"


def order_of(payment: db.Payment) -> db.Order:
    """The order that a payment was made of."""
    return db.Order(**{each.name: getattr(payment, each.name) for each in fields(db.Order)})


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def new_key() -> str:
    return secrets.token_urlsafe(18)


def read_form(req: falcon.Request) -> dict[str, str]:
    """The fields of a posted form. Raises Problem."""
    if (req.content_type or "").partition(";")[0].strip().lower() != falcon.MEDIA_URLENCODED:
        raise Problem("unsupported_media_type", "Send the form as a browser does.")
    length = req.content_length
    if length is None:
        raise Problem("length_required")
    if length > LARGEST_FORM:
        raise Problem("payload_too_large")
    body = req.bounded_stream.read(length)
    try:
        if len(body) != length:
            raise ValueError("the connection was lost")
        return dict(parse_qsl(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=50))
    except ValueError:
        raise Problem("bad_request") from None


@dataclass(frozen=True)
class Field:
    """An input of the form, by the API's name."""

    name: str
    label: str
    kind: str
    inputmode: str
    autocomplete: str
    most: int
    hint: str = ""


CUSTOMER = (
    Field("customer_name", "Your name", "text", "text", "name", 100),
    Field("customer_email", "E-mail", "email", "email", "email", 254),
    Field("customer_phone", "Phone", "tel", "tel", "tel", 40),
    Field("location", "City or town", "text", "text", "address-level2", 120),
)
CURRENCY_NAMES = {
    "NGN": "Nigerian naira",
    "GHS": "Ghanaian cedi",
    "KES": "Kenyan shilling",
    "ZAR": "South African rand",
    "USD": "US dollar",
    "XOF": "West African CFA franc",
}


class FormPage:
    """How the form is shown."""

    def __init__(self, settings: Settings) -> None:
        self.frame = Frame(settings)
        self.blocks = {**read_blocks("form.html"), **read_blocks("problem.html")}
        self.currencies = settings.currencies
        self.mode = settings.mode
        label = "Amount" if len(self.currencies) > 1 else f"Amount in {self.currencies[0]}"
        is_whole = all(money.decimals_of(code) == 0 for code in self.currencies)
        hint = "Digits only, such as 1500" + ("" if is_whole else " or 1500.50")
        currency = Field("currency", "Currency", "select", "", "transaction-currency", 3)
        self.amount = (Field("amount", label, "text", "decimal", "transaction-amount", 20, hint), currency)
        """What a link fixes."""

    def page(self, form: Form) -> Markup:
        """The form with what was typed, each error beside its field, and all of them, or a notice, above.

        It is sent to another address than its own: what is sent to an address makes a browser forget the page that it
        keeps of it. A link's members are in both, so that the address stays the link.
        """
        title, heading = titled(self.heading(form.link))
        shown = self.fields(form)
        content = self.blocks["form"].format(
            base=self.frame.base,
            query=urlencode({"sent": "on", **{name: form.typed[name] for name in hidden_in(form) if name != "key"}}),
            heading=heading,
            summary=self.summary(form, shown),
            hidden=joined(self.blocks["hidden"].format(name=name, value=form.typed[name]) for name in hidden_in(form)),
            fields=joined(self.input(field, form) for field in shown),
        )
        return self.frame.page(Markup("Error: ") + title if form.errors else title, content, self.mode)

    def heading(self, link: orders.Link | None) -> Markup:
        if link is None:
            return self.blocks["free"].format(merchant=self.frame.merchant)
        moment = time_element(datetime.fromtimestamp(int(link.expires), UTC)) if link.expires else None
        return self.blocks["link"].format(
            merchant=self.frame.merchant,
            amount=readable(link.amount_minor, link.currency) if link.amount_minor else link.amount,
            description=link.description,
            order=self.blocks["order"].format(order=link.order) if link.order else "",
            expires=self.blocks["expires"].format(moment=moment) if moment else "",
        )

    def fields(self, form: Form) -> tuple[Field, ...]:
        """The inputs that a form needs."""
        if form.is_started:
            return ()
        if form.link is not None:
            return CUSTOMER
        return (*(self.amount if len(self.currencies) > 1 else self.amount[:1]), *CUSTOMER)

    def summary(self, form: Form, shown: Iterable[Field]) -> Markup:
        notice = form.notice or ("invalid" if form.errors else "started" if form.is_started else None)
        if notice is None:
            return Markup()
        heading, text = titled(self.blocks[notice])
        labels = {field.name: field.label for field in shown}
        names = sorted(form.errors, key=[*labels, *form.errors].index)
        items = joined(
            self.blocks["item" if name in labels else "plain_item"].format(
                name=name, text=sentence(labels.get(name, name), form.errors[name])
            )
            for name in names
        )
        return self.blocks["summary"].format(notice=notice, heading=heading, text=text, items=items)

    def input(self, field: Field, form: Form) -> Markup:
        """A labelled input, tied to its hint and its errors for those who cannot see them beside each other."""
        value, errors = form.typed.get(field.name, ""), form.errors.get(field.name, [])
        hint = self.blocks["hint"].format(name=field.name, text=field.hint) if field.hint else ""
        problem = self.blocks["problem"].format(name=field.name, text=sentence(field.label, errors)) if errors else ""
        ids = " ".join(
            f"{field.name}-{kind}" for kind, is_there in {"hint": hint, "problem": problem}.items() if is_there
        )
        described = Markup(' aria-describedby="{}"').format(ids) if ids else ""
        options = joined(
            self.blocks["option"].format(
                code=code, words=CURRENCY_NAMES[code], selected=Markup(" selected") if code == value else ""
            )
            for code in (self.currencies if field.kind == "select" else ())
        )
        return self.blocks["select" if options else "field"].format(
            **asdict(field) | {"hint": hint},
            value=value,
            problem=problem,
            options=options,
            described=described + (Markup(' aria-invalid="true"') if errors else ""),
        )


def sentence(label: str, errors: list[str]) -> str:
    """`Amount must be greater than 0`; what the provider says begins with a capital and stands by itself."""
    text = "; ".join(errors)
    return f"{label} {text}" if text[:1].islower() else f"{label}: {text}"


def hidden_in(form: Form) -> list[str]:
    """What goes with a form unseen: its key, and what its link fixes, with the signature."""
    return ["key", *(name for name in SIGNED if form.link and form.typed.get(name))]


class ProblemPage:
    """An error for whoever came with a browser: a page, or the form again where sending it once more is what helps."""

    def __init__(self, settings: Settings) -> None:
        self.frame = Frame(settings)
        self.mode = settings.mode
        self.blocks = read_blocks("problem.html")

    def render(self, req: falcon.Request, problem: Problem) -> Markup:
        is_ours = problem.status >= HTTPStatus.INTERNAL_SERVER_ERROR
        name = "not_started" if is_ours and req.method == "POST" else "not_shown" if is_ours else problem.code
        send_again = req.context.get("send_again")
        if send_again and (is_ours or name == "rate_limited"):
            return Markup("{}").format(send_again(name))
        title, text = titled(self.blocks.get(name, self.blocks["not_understood"]))
        code = f"Error {log.request_id.get()}" if is_ours else ""
        content = self.blocks["problem_page"].format(heading=title, text=text, code=code)
        return self.frame.page(title, content, self.mode, refresh_seconds=5 if name == "not_shown" else None)


class Asset:
    """GET /paygate.css and /paygate.js: files, so that the pages' policy can forbid everything inline."""

    def __init__(self, name: str, media_type: str) -> None:
        self.media_type = f"{media_type}; charset=utf-8"
        self.content = (PAGES / name).read_text(encoding="utf-8")

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.content_type = self.media_type
        resp.text = self.content
        resp.set_header("Cache-Control", "public, max-age=86400")  # its address changes with it


# Templates


class Frame:
    """What every page is set in. `base` is the path of PUBLIC_URL: where a proxy serves us below one."""

    def __init__(self, settings: Settings) -> None:
        self.base = urlsplit(settings.public_url).path
        self.merchant = settings.merchant_name or "the merchant"
        self.blocks = read_blocks("frame.html")
        files = b"".join((PAGES / name).read_bytes() for name in ("paygate.css", "paygate.js"))
        self.version = hashlib.sha256(files).hexdigest()[:8]

    def page(self, title: Markup, content: Markup, mode: str, *, refresh_seconds: int | None = None) -> Markup:
        """A whole page. With `refresh_seconds` it looks for news: its script does, or else it loads itself again."""
        return self.blocks["page"].format(
            base=self.base,
            version=self.version,
            title=title,
            refresh=self.blocks["refresh"].format(seconds=refresh_seconds) if refresh_seconds else "",
            refresh_seconds=refresh_seconds or "",
            banner=self.blocks["test"] if mode == "test" else "",
            content=content,
        )


def read_blocks(name: str) -> dict[str, Markup]:
    """The blocks of a template file, each under a comment with its name. What is put in a block's places is escaped,
    unless it is Markup itself. A block that is a page of its own, or a notice, begins with its title."""
    parts = re.split(r"^<!-- (\w+) -->\n", (PAGES / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {block: Markup(text.rstrip() + "\n") for block, text in zip(parts[1::2], parts[2::2], strict=True)}  # noqa: S704


def titled(block: Markup) -> tuple[Markup, Markup]:
    """The title of a block, and the rest."""
    title, _, content = block.partition("</title>\n")
    return title.removeprefix("<title>"), content


def joined(parts: Iterable[Markup]) -> Markup:
    return Markup().join(parts)


def readable(amount_minor: int, currency: str) -> str:
    """An amount for people: `NGN 1,234.50`, `XOF 5,000`, with a space at which no line is broken."""
    whole, point, decimals = money.render(amount_minor, currency).partition(".")
    return f"{currency}\u00a0{int(whole):,}{point}{decimals}"


def time_element(moment: datetime) -> Markup:
    """A moment in UTC, which the script writes as the reader's own clock shows it."""
    utc = moment.astimezone(UTC)
    return Markup('<time datetime="{:%Y-%m-%dT%H:%M:%SZ}">{} {:%B %Y, %H:%M} UTC</time>').format(utc, utc.day, utc)


def show(resp: falcon.Response, page: Markup) -> None:
    resp.content_type = falcon.MEDIA_HTML
    resp.text = page


def see_other(resp: falcon.Response, url: str) -> None:
    resp.status = HTTPStatus.SEE_OTHER
    resp.location = url


def with_query(url: str, **members: str) -> str:
    """`url` with more members in its query, before its fragment."""
    parts = urlsplit(url)
    query = "&".join(part for part in (parts.query, urlencode(members)) if part)
    return parts._replace(query=query).geturl()
