"""The checkout page: the customer pays, is declined, or walks away."""

from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from local.sandbox.controls import CUSTOMERS, Controls
from local.sandbox.faults import FAULTS
from local.sandbox.fees import money, with_fees
from local.sandbox.ledger import Ledger, Transaction, parse_time
from local.sandbox.wire import Answer, Request

HERE = Path(__file__).parent
STATIC = {  # by their paths; the icon has two, because some ask for it without a page
    "/sandbox.css": ("checkout.css", "text/css"),
    "/favicon.svg": ("favicon.svg", "image/svg+xml"),
    "/favicon.ico": ("favicon.svg", "image/svg+xml"),
}
# No `form-action`: a browser applies it to the redirects after the form as well, and where a shop sends its customer on
# from callback_url is not known here.
POLICY = "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; frame-ancestors 'none'"
TEMPLATES = Environment(
    loader=FileSystemLoader(HERE / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def checkout(controls: Controls, request: Request) -> Answer:
    with controls.lock:
        transaction = controls.ledger.by_code.get(request.path.removeprefix("/checkout/"))
        if transaction is None:
            return note(404, "Payment not found", "This link leads to no payment.")
        if request.method == "GET":
            return show(controls, transaction)
        if request.method != "POST":
            return Answer(405, b"", {"Allow": "GET, POST"})
        choice = dict(parse_qsl(request.body.decode("latin-1"))).get("do")
        if choice == "cancel":
            return leave(transaction)
        if transaction.status != "success" and not is_expired(controls.ledger, transaction):
            try_card(controls, transaction, choice)
        # A second press of the button, or a reload, ends where the first did and pays nothing.
        paid = transaction.status == "success"
        return see_other(returning(transaction) if paid else None, request.path)


def try_card(controls: Controls, transaction: Transaction, choice: str | None) -> None:
    first = transaction.tries == 0
    if choice == "decline" or transaction.habit == "declines" or (transaction.habit == "decline" and first):
        controls.decline(transaction.reference)
    elif choice == "pay":
        controls.pay(transaction.reference)


def leave(transaction: Transaction) -> Answer:
    if transaction.status == "success":
        return see_other(returning(transaction), request_path(transaction))
    if url := giving_up(transaction):
        return see_other(url, url)
    return note(200, "You left the payment", "Nothing was paid.", request_path(transaction), "Back to the payment")


def show(controls: Controls, transaction: Transaction) -> Answer:
    merchant = controls.settings.merchant
    if transaction.status == "success":
        text = f"{transaction.email} paid {money(transaction.currency, transaction.paid)}."
        return note(200, "Payment successful", text, returning(transaction), f"Return to {merchant}")
    if is_expired(controls.ledger, transaction):
        text = "Go back to the shop to start again."
        return note(410, "Payment session expired", text, giving_up(transaction), f"Return to {merchant}")
    bears = controls.settings.fees_by_customer or transaction.habit == "pays-fees"
    total = with_fees(transaction.currency, transaction.amount) if bears else transaction.amount
    declined = transaction.gateway_response if transaction.status == "failed" else None
    amount = money(transaction.currency, total)
    return document(
        200,
        "checkout.html",
        title=f"{'Card declined. ' if declined else ''}Pay {amount} to {merchant}",
        merchant=merchant,
        amount=amount,
        is_long=total >= 10**9,
        fees=money(transaction.currency, total - transaction.amount) if bears else None,
        email=transaction.email,
        declined=declined,
        here=request_path(transaction),
        reference=transaction.reference,
        customers=CUSTOMERS,
        faults=sorted(FAULTS),
    )


def is_expired(ledger: Ledger, transaction: Transaction) -> bool:
    age = datetime.now(UTC) - parse_time(transaction.created_at)
    return 0 < ledger.session_timeout_seconds < age.total_seconds()


def note(status: int, title: str, text: str, url: str | None = None, button: str = "") -> Answer:
    return document(status, "note.html", title=title, text=text, url=url, button=button)


def document(status: int, template: str, **values: object) -> Answer:
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": POLICY,
        "Cache-Control": "no-store",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return Answer(status, TEMPLATES.get_template(template).render(values).encode(), headers)


def static(path: str) -> Answer:
    """One of STATIC."""
    name, content_type = STATIC[path]
    return Answer(200, (HERE / "static" / name).read_bytes(), {"Content-Type": content_type})


def see_other(url: str | None, otherwise: str) -> Answer:
    return Answer(303, b"", {"Location": url or otherwise, "Cache-Control": "no-store"})


def request_path(transaction: Transaction) -> str:
    return f"/checkout/{transaction.access_code}"


def returning(transaction: Transaction) -> str | None:
    """Where the customer goes after paying: callback_url with both names of the reference, as Paystack adds them."""
    url = web_url(transaction.callback_url)
    if url is None:
        return None
    parts = urlsplit(url)
    named = urlencode({"trxref": transaction.reference, "reference": transaction.reference})
    return urlunsplit(parts._replace(query=f"{parts.query}&{named}" if parts.query else named))


def giving_up(transaction: Transaction) -> str | None:
    """Where the shop wants customers who walk away."""
    return web_url(transaction.metadata.get("cancel_action")) if isinstance(transaction.metadata, dict) else None


def web_url(value: object) -> str | None:
    """An address that may stand in a Location header, made ASCII."""
    if not isinstance(value, str) or urlsplit(value).scheme not in ("http", "https"):
        return None
    return quote(value, safe=":/?#[]@!$&'()*+,;=%~")
