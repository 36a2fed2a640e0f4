"""Paystack's API: who asks for what, and what is answered. Everything here runs under the sandbox's lock."""

import base64
import contextlib
import json
import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from local.sandbox import shapes
from local.sandbox.controls import Controls
from local.sandbox.faults import Fault, asked_for
from local.sandbox.fees import CURRENCIES
from local.sandbox.ledger import UNPAID, WIDE, Dispute, Ledger, Refund, Transaction, iso, now, parse_time
from local.sandbox.webhooks import Delivery
from local.sandbox.wire import Answer, Json, Refused, Request, parse_body, route

Row = TypeVar("Row", Transaction, Refund, Dispute)


@dataclass
class Call:
    """A request to the API whose key was right."""

    endpoint: str
    argument: str  # what the path names
    query: dict[str, str]
    body: Json
    reference: str = ""  # of the transaction that it is about, where it is about one
    fault: Fault | None = None
    delivery: Delivery | None = None  # a webhook that must have been tried before the answer is sent

    def as_seen(self, transaction: Transaction) -> Transaction:
        """The transaction, or with the fault "stale" what it was before anyone paid."""
        if self.fault is None or self.fault.name != "stale":
            return transaction
        return replace(transaction, status="abandoned", gateway_response=UNPAID, paid=0, fees=None, paid_at=None)

    def hidden_after(self) -> str | None:
        """The time after which a list shows nothing yet, where a fault says so."""
        match self.fault:
            case Fault(name="empty-list"):
                return ""
            case Fault(name="lagging-list"):
                return now(seconds=-self.fault.seconds(3))
        return None


def receive(controls: Controls, request: Request) -> Call:
    """Who asks for what, counted; and the fault that this call meets."""
    if request.headers.get("authorization") != f"Bearer {controls.settings.secret_key}":
        step = "Ensure that you provide the correct authorization key for the request"
        raise Refused(401, "Invalid key", "invalid_Key", step=step)  # their spelling
    endpoint, argument = route(request)
    call = Call(endpoint, argument, request.query, parse_body(request))
    transaction = subject(controls.ledger, call)
    call.reference = transaction.reference if transaction else str(call.body.get("reference", argument))
    controls.call_counts[endpoint, call.reference] += 1
    controls.last_requests.append({"endpoint": endpoint, "argument": argument, "query": call.query, "body": call.body})
    email = transaction.email if transaction else str(call.body.get("email", ""))
    is_first = controls.call_counts[endpoint, call.reference] == 1
    call.fault = controls.faults.meeting(endpoint, call.reference) or asked_for(email, endpoint, is_first)
    return call


def subject(ledger: Ledger, call: Call) -> Transaction | None:
    match call.endpoint:
        case "verify":
            return ledger.transactions.get(call.argument)
        case "fetch-transaction" | "transaction-disputes":
            return ledger.by_id.get(int(call.argument))
        case "refund":
            return ledger.named(call.body.get("transaction"))
        case "fetch-refund":
            refund = ledger.refunds.get(int(call.argument))
            return ledger.transactions[refund.reference] if refund else None
    return None


def initialize(controls: Controls, call: Call) -> Answer:
    order = checked_order(controls, call.body)
    reference = order["reference"] or secrets.token_hex(5)
    if reference in controls.ledger.transactions:
        step = "Try and create the Transaction or Charge with a new reference"
        raise Refused(400, "Duplicate Transaction Reference", "duplicate_reference", step=step)
    transaction = controls.open_transaction(**{**order, "reference": reference})
    if transaction.habit in ("paid-at-once", "webhook-first"):
        controls.pay(reference)
        if transaction.habit == "webhook-first" and controls.settings.webhook_url:
            call.delivery = controls.webhooks.deliveries[-1]
    data = {
        "authorization_url": f"{controls.origin}/checkout/{transaction.access_code}",
        "access_code": transaction.access_code,
        "reference": reference,
    }
    return Answer(200, {"status": True, "message": "Authorization URL created", "data": data})


def checked_order(controls: Controls, body: Json) -> Json:
    """What initialize was sent, in Paystack's order of complaints."""
    email, currency = body.get("email"), body.get("currency") or controls.settings.currencies[0]
    if not email:
        raise Refused(400, "Email Address is required", "missing_params", step="Provide all required params")
    if not isinstance(email, str) or not re.fullmatch(r"[^@\s]+@[^@\s.]+(\.[^@\s.]+)+", email) or len(email) > 254:
        raise Refused(400, "Invalid Email Address Passed", "invalid_email_address")
    if currency not in controls.settings.currencies:
        raise Refused(400, "Currency not supported by merchant", "unsupported_currency")
    amount = whole_number(body.get("amount"))
    if amount is None or amount < 1:
        raise Refused(400, "Invalid Amount Sent", "invalid_amount")
    if amount < CURRENCIES[currency][0]:
        raise Refused(400, "Amount cannot be less than the minimum of this currency", "invalid_amount")
    reference = body.get("reference")
    if reference is not None and not re.fullmatch(r"[A-Za-z0-9.=-]+", str(reference)):
        message = "Invalid transaction reference. Only -,., = and alphanumeric characters allowed"
        raise Refused(400, message, "invalid_reference")
    return {
        "email": email,
        "amount": amount,
        "currency": currency,
        "reference": reference,
        "callback_url": body.get("callback_url"),
        "metadata": parsed_metadata(body.get("metadata")),
    }


def verify(controls: Controls, call: Call) -> Answer:
    transaction = controls.ledger.transactions.get(call.argument)
    if transaction is None:
        raise unknown_reference(controls)
    data = shapes.charge(controls.ledger, call.as_seen(transaction))
    return Answer(200, {"status": True, "message": "Verification successful", "data": data})


def fetch_transaction(controls: Controls, call: Call) -> Answer:
    transaction = controls.ledger.by_id.get(int(call.argument))
    if transaction is None:
        raise unknown_reference(controls)
    data = shapes.fetched_charge(controls.ledger, call.as_seen(transaction))
    return Answer(200, {"status": True, "message": "Transaction retrieved", "data": data})


def list_transactions(controls: Controls, call: Call) -> Answer:
    query = call.query
    rows = [call.as_seen(row) for row in within(reversed(controls.ledger.by_id.values()), query, call.hidden_after())]
    if "status" in query:
        rows = [row for row in rows if controls.ledger.state(row) == query["status"]]
    if "amount" in query:
        rows = [row for row in rows if str(row.paid or row.amount) == query["amount"]]
    meta: Json
    size = page_size(controls, query, "perPage", "per_page")
    if query.get("use_cursor") == "true":
        page, meta = cursor_page(rows, query, size)
    else:
        page, meta = numbered_page(rows, query, size)
        meta["total_volume"] = sum(row.paid for row in rows)
    data = [shapes.listed_charge(controls.ledger, row) for row in page]
    return Answer(200, {"status": True, "message": "Transactions retrieved", "data": data, "meta": meta})


def refund(controls: Controls, call: Call) -> Answer:
    body, transaction = call.body, controls.ledger.named(call.body.get("transaction"))
    if not body.get("transaction"):
        raise Refused(400, "Transaction reference or id is required", "missing_params")
    if transaction is None:
        raise unknown_reference(controls)
    amount = whole_number(body["amount"]) if body.get("amount") is not None else controls.ledger.left(transaction)
    if transaction.status != "success":
        raise Refused(400, "Transaction has not been paid and cannot be refunded", "invalid_params")
    if controls.ledger.left(transaction) < 1:
        raise Refused(400, "Transaction has been fully reversed", "transaction_reversed", "api_error")
    if amount is None or amount < 1:
        raise Refused(400, "Invalid Amount Sent", "invalid_amount")
    if amount > controls.ledger.left(transaction):
        raise Refused(400, "Refund amount cannot be more than what is left of the transaction", "invalid_amount")
    if body.get("currency") not in (None, transaction.currency):
        raise Refused(400, "Refund currency must be the transaction's", "invalid_params")
    refund = controls.make_refund(transaction, amount, body.get("merchant_note"), body.get("customer_note"), "api")
    data = {name: value for name, value in shapes.refund(controls.ledger, refund).items() if name != "customer"}
    data |= {
        "transaction": shapes.refunded_charge(controls.ledger, transaction),
        "channel": None,
        "fully_deducted": False,
    }
    data |= {"expected_at": now(days=7), "updatedAt": refund.created_at}
    return Answer(200, {"status": True, "message": "Refund has been queued for processing", "data": data})


def list_refunds(controls: Controls, call: Call) -> Answer:
    rows = within(reversed(controls.ledger.refunds.values()), call.query, call.hidden_after())
    page, meta = numbered_page(rows, call.query, page_size(controls, call.query, "perPage"))
    meta |= {"perPage": str(meta["perPage"]), "failedRefundCount": sum(row.status == "failed" for row in rows)}
    data = [shapes.refund(controls.ledger, row) for row in page]
    return Answer(200, {"status": True, "message": "Refunds retrieved", "data": data, "meta": meta})


def fetch_refund(controls: Controls, call: Call) -> Answer:
    refund = controls.ledger.refunds.get(int(call.argument))
    if refund is None:
        raise Refused(404, "Refund not found", "refund_not_found")
    return Answer(200, {"status": True, "message": "Refund retrieved", "data": shapes.refund(controls.ledger, refund)})


def list_disputes(controls: Controls, call: Call) -> Answer:
    rows = within(reversed(controls.ledger.disputes.values()), call.query, call.hidden_after())
    if "status" in call.query:
        rows = [row for row in rows if row.status == call.query["status"]]
    if "transaction" in call.query:
        rows = [row for row in rows if str(row.transaction_id) == call.query["transaction"]]
    page, meta = numbered_page(rows, call.query, page_size(controls, call.query, "perPage"))
    data = [shapes.dispute(controls.ledger, row) for row in page]
    return Answer(200, {"status": True, "message": "Disputes retrieved", "data": data, "meta": meta})


def fetch_dispute(controls: Controls, call: Call) -> Answer:
    dispute = controls.ledger.disputes.get(int(call.argument))
    if dispute is None:
        raise Refused(404, "Dispute not found", "dispute_not_found")
    return Answer(
        200, {"status": True, "message": "Dispute retrieved", "data": shapes.dispute(controls.ledger, dispute)}
    )


def transaction_disputes(controls: Controls, call: Call) -> Answer:
    """One dispute although the path says disputes: so does the published description."""
    found = [row for row in controls.ledger.disputes.values() if str(row.transaction_id) == call.argument]
    if not found:
        raise Refused(404, "Dispute not found", "dispute_not_found")
    data = {
        **shapes.dispute(controls.ledger, found[-1]),
        "merchant_transaction_reference": found[-1].reference,
        "integration": shapes.INTEGRATION,
        "created_by": 1,
    }
    return Answer(200, {"status": True, "message": "Dispute retrieved successfully", "data": data})


def session_timeout(controls: Controls, call: Call) -> Answer:
    message = "Payment session timeout retrieved"
    if call.body:
        seconds = whole_number(call.body.get("timeout"))
        if seconds is None or seconds < 0:
            raise Refused(400, "timeout must be a number of seconds", "invalid_params")
        controls.ledger.keep_session_timeout(seconds)
        message = "Payment session timeout updated"
    data = {"payment_session_timeout": controls.ledger.session_timeout_seconds}
    return Answer(200, {"status": True, "message": message, "data": data})


def unknown_reference(controls: Controls) -> Refused:
    step = "Ensure that you're passing the correct reference for this integration"
    return Refused(
        controls.settings.not_found_status, "Transaction reference not found.", "transaction_not_found", step=step
    )


ANSWERS: dict[str, Callable[[Controls, Call], Answer]] = {
    "initialize": initialize,
    "verify": verify,
    "list-transactions": list_transactions,
    "fetch-transaction": fetch_transaction,
    "refund": refund,
    "list-refunds": list_refunds,
    "fetch-refund": fetch_refund,
    "list-disputes": list_disputes,
    "fetch-dispute": fetch_dispute,
    "transaction-disputes": transaction_disputes,
    "session-timeout": session_timeout,
}


def whole_number(value: object) -> int | None:
    """An amount as JSON integer or digits; everything else, 10.5 and true too, is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return int(value) if isinstance(value, str) and value.isdecimal() else None


def parsed_metadata(value: Any) -> Any:
    """Metadata may be sent as an object or as JSON in a string."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return value


def within(rows: Iterable[Row], query: dict[str, str], hidden_after: str | None) -> list[Row]:
    """The rows from `from` to `to`, both included."""
    try:
        since = iso(parse_time(query["from"])) if "from" in query else ""
        until = iso(parse_time(query["to"])) if "to" in query else "9"
    except ValueError:
        raise Refused(400, "from and to must be ISO 8601 dates", "invalid_params") from None
    if hidden_after is not None:
        until = min(until, hidden_after)
    return [row for row in rows if since <= row.created_at <= until]


def page_size(controls: Controls, query: dict[str, str], *names: str) -> int:
    """As asked by one of `names`, 50 without; never above the cap."""
    size = whole_number(next((query[name] for name in names if name in query), "50"))
    if not size:
        raise Refused(400, f"{names[0]} must be a number above 0", "invalid_params")
    return min(size, controls.settings.page_cap)


def numbered_page(rows: list[Row], query: dict[str, str], size: int) -> tuple[list[Row], Json]:
    number = whole_number(query.get("page", "1"))
    if not number:
        raise Refused(400, "page must be a number above 0", "invalid_params")
    start = (number - 1) * size
    meta: Json = {"total": len(rows), "skipped": start, "perPage": size, "page": number}
    return rows[start : start + size], meta | {"pageCount": -(-len(rows) // size)}


def cursor_page(rows: list[Transaction], query: dict[str, str], size: int) -> tuple[list[Transaction], Json]:
    """The rows, newest first, below the one that the cursor names: new ones do not shift what is still to come."""
    try:
        below = int(base64.urlsafe_b64decode(query["next"])) if query.get("next") else WIDE
    except ValueError:
        raise Refused(400, "Invalid cursor", "invalid_params") from None
    left = [row for row in rows if row.id % WIDE < below]
    page = left[:size]
    following = base64.urlsafe_b64encode(str(page[-1].id % WIDE).encode()).decode() if len(left) > size else None
    return page, {"next": following, "previous": None, "perPage": size}
