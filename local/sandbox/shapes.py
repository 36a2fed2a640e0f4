"""How Paystack words what is in the ledger, in answers and in events."""

import hashlib
from datetime import timedelta
from typing import Any

from local.sandbox.ledger import Dispute, Ledger, Refund, Transaction, iso, parse_time
from local.sandbox.wire import Json

CARD: Json = {
    **{"authorization_code": "AUTH_8dfhjjdt", "bin": "408408", "last4": "4081", "exp_month": "12", "exp_year": "2030"},
    **{"channel": "card", "card_type": "visa", "brand": "visa", "bank": "TEST BANK", "country_code": "NG"},
    **{"reusable": True, "signature": "SIG_yEXu7dLBeqG0kU7g95Ke"},
    **dict.fromkeys(("account_name", "receiver_bank_account_number", "receiver_bank")),
}
SAME_IN_EVERY_CHARGE: Json = {
    **dict.fromkeys(("receipt_number", "message", "fees_split", "plan", "order_id", "pos_transaction_data")),
    **dict.fromkeys(("source", "fees_breakdown", "connect")),
    **{"split": {}, "plan_object": {}, "subaccount": {}, "channel": "card", "ip_address": "127.0.0.1"},
}
SOURCE = {"source": "merchant_api", "type": "api", "identifier": None}
INTEGRATION = 463433


def charge(ledger: Ledger, transaction: Transaction, **members: Any) -> Json:
    """A transaction as verify and charge.success show it; `members` are what other answers show otherwise."""
    paid = transaction.status == "success"
    data: Json = {
        **SAME_IN_EVERY_CHARGE,
        "id": transaction.id,
        "domain": transaction.domain,
        "status": ledger.state(transaction),
        "reference": transaction.reference,
        "amount": transaction.paid if paid else transaction.amount,
        "requested_amount": transaction.amount,
        "currency": transaction.currency,
        "fees": transaction.fees,
        "gateway_response": transaction.gateway_response,
        "metadata": "" if transaction.metadata is None else transaction.metadata,
        "log": checkout_log(transaction),
        "authorization": CARD if paid else {},
        "customer": customer(transaction.email),
        **dict.fromkeys(("paid_at", "paidAt"), transaction.paid_at),
        **dict.fromkeys(("created_at", "createdAt", "transaction_date"), transaction.created_at),
        **members,
        **transaction.altered,
    }
    return {name: value for name, value in data.items() if name not in transaction.without}


def charge_event(ledger: Ledger, transaction: Transaction) -> Json:
    """What charge.success carries: the answer to verify, for some customers before the fees are known."""
    return charge(ledger, transaction, **({"fees": None} if transaction.habit == "null-fees" else {}))


def listed_charge(ledger: Ledger, transaction: Transaction) -> Json:
    card: Json = CARD if transaction.status == "success" else {**dict.fromkeys(CARD), "reusable": False}
    source = {**SOURCE, "entry_point": "transaction_initialize"}
    return charge(ledger, transaction, authorization=card, plan={}, source=source, metadata=transaction.metadata)


def fetched_charge(ledger: Ledger, transaction: Transaction) -> Json:
    person = customer(transaction.email, metadata={}, nobody="")
    return charge(ledger, transaction, plan={}, source=SOURCE, customer=person, helpdesk_link=None)


def refunded_charge(ledger: Ledger, transaction: Transaction) -> Json:
    """The transaction inside the answer to POST /refund, where half of it is missing."""
    card = {"exp_month": None, "exp_year": None, "account_name": None}
    person = {"international_format_phone": None}
    nobody = {"currency": None}
    return charge(ledger, transaction, plan={}, authorization=card, customer=person, subaccount=nobody)


def refund(ledger: Ledger, refund: Refund) -> Json:
    transaction, processed = ledger.transactions[refund.reference], refund.status == "processed"
    data: Json = {
        **dict.fromkeys(("dispute", "settlement", "bank_reference", "session_id")),
        "integration": INTEGRATION,
        "id": refund.id,
        "transaction": refund.transaction_id,
        "transaction_reference": refund.reference,
        "transaction_amount": transaction.paid,
        "domain": refund.domain,
        "currency": refund.currency,
        "amount": refund.amount,
        "deducted_amount": refund.amount if processed else 0,
        "fully_deducted": int(processed),
        "status": refund.status,
        "createdAt": refund.created_at,
        "refunded_at": refund.refunded_at,
        "refunded_by": refund.refunded_by,
        "initiated_by": refund.refunded_by,
        "customer_note": refund.customer_note,
        "merchant_note": refund.merchant_note,
        "reason": "",
        "customer": customer(transaction.email, metadata="", nobody=""),
        "refund_type": "full" if refund.amount == transaction.paid else "partial",
        "refund_channel": "card",
        "collect_account_number": refund.status == "needs-attention",
        **refund.altered,
    }
    return {name: value for name, value in data.items() if name not in refund.without}


def dispute(ledger: Ledger, dispute: Dispute) -> Json:
    transaction = ledger.transactions[dispute.reference]
    step = {"status": dispute.status, "by": transaction.email, "createdAt": dispute.created_at}
    claim = {"sender": transaction.email, "body": "I did not make this payment", "createdAt": dispute.created_at}
    return {
        **dict.fromkeys(("transaction_reference", "evidence", "attachments", "note")),
        "id": dispute.id,
        "refund_amount": dispute.amount,
        "currency": dispute.currency,
        "status": dispute.status,
        "resolution": dispute.resolution,
        "domain": dispute.domain,
        "transaction": charge(ledger, transaction, plan={}),
        "category": "fraud",
        "customer": customer(transaction.email, metadata="", nobody=""),
        "bin": CARD["bin"],
        "last4": CARD["last4"],
        "dueAt": iso(parse_time(dispute.created_at) + timedelta(days=2)),
        "resolvedAt": dispute.resolved_at,
        "history": [step],
        "messages": [claim],
        "createdAt": dispute.created_at,
        "updatedAt": dispute.updated_at,
    }


def refund_event(ledger: Ledger, refund: Refund, with_id: bool) -> Json:
    """Without id and note unless `with_id`, the amount a string in the early events, as published."""
    early = refund.status in ("pending", "processing")
    data: Json = {
        "status": refund.status,
        "transaction_reference": refund.reference,
        "refund_reference": None,
        "amount": str(refund.amount) if early else refund.amount,
        "currency": refund.currency,
        "processor": "instant-transfer",
        "customer": {
            "first_name": None,
            "last_name": None,
            "email": ledger.transactions[refund.reference].email,
        },
        "integration": INTEGRATION,
        "domain": refund.domain,
    }
    if with_id:
        data |= {"id": refund.id, "merchant_note": refund.merchant_note}
    return data


def customer(email: str, metadata: Any = None, nobody: str | None = None) -> Json:
    """The customer as Paystack knows him; `nobody` is what stands for the names that he has not given."""
    digest = hashlib.sha256(email.encode()).hexdigest()
    return {
        "id": int(digest[:7], 16),
        "first_name": nobody,
        "last_name": nobody,
        "email": email,
        "customer_code": f"CUS_{digest[:15]}",
        "phone": nobody,
        "metadata": metadata,
        "risk_action": "default",
        "international_format_phone": nobody,
    }


def checkout_log(transaction: Transaction) -> Json | None:
    """What the customer did on the page."""
    if not transaction.tries:
        return None
    paid = transaction.status == "success"
    return {
        "start_time": int(parse_time(transaction.created_at).timestamp()),
        "time_spent": 9 * transaction.tries,
        "attempts": transaction.tries,
        "errors": transaction.tries - paid,
        "success": paid,
        "mobile": False,
        "input": [],
        "history": [{"type": "action", "message": "Attempted to pay with card", "time": 7}],
    }
