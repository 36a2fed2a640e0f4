"""paygate's JSON: one shape of a payment, in answers, notifications and exports."""

import json
from datetime import UTC, datetime
from json.encoder import encode_basestring
from typing import TYPE_CHECKING

import money
from db import Payment

if TYPE_CHECKING:  # commands that only read the database start without an HTTP client
    from refunds import Refund


def payment_json(payment: Payment, *others: str) -> str:
    """A payment as a JSON object, with `others` of its fields for exports and notifications."""
    return json_object(payment_members(payment, *others))


def payment_members(payment: Payment, *others: str) -> dict[str, str]:
    """The members of a payment's JSON, each as JSON. Amounts have the currency's decimals; `json` would write 50.00 as
    50.0."""
    return {
        "id": as_json(payment.id),
        "customer_name": as_json(payment.customer_name),
        "customer_email": as_json(payment.customer_email),
        "amount": money.render(payment.amount_minor, payment.currency),
        "status": as_json(payment.status),
        "currency": as_json(payment.currency),
        "reference": as_json(payment.current_reference),
        "checkout_url": as_json(payment.open_checkout_url),
        "status_reason": as_json(payment.status_reason),
        "mode": as_json(payment.mode),
        "created_at": as_json(timestamp(payment.created_at)),
        "paid_at": as_json(timestamp(payment.paid_at)),
        "refunded_amount": money.render(payment.refunded_minor, payment.refunded_currency),
        **{name: json.dumps(getattr(payment, name), ensure_ascii=False) for name in others},
    }


def refund_json(refund: "Refund", **others: str) -> str:
    """A refund as a JSON object, with `others` that are JSON already."""
    texts = ("currency", "status", "refused_because", "made_by", "reason")
    members = {
        "id": as_json(refund.id),
        "payment": as_json(refund.payment_id),
        "reference": as_json(refund.charge_reference),
        "amount": money.render(refund.amount_minor, refund.currency),
        **{name: as_json(getattr(refund, name)) for name in texts},
        **{name: as_json(timestamp(getattr(refund, name))) for name in ("created_at", "processed_at")},
    }
    return json_object(members | others)


def as_json(text: str | None) -> str:
    return "null" if text is None else encode_basestring(text)


def json_object(members: dict[str, str]) -> str:
    """An object of members that are JSON already."""
    return "{" + ", ".join(f'"{name}": {value}' for name, value in members.items()) + "}"


def timestamp(moment: datetime | None) -> str | None:
    return None if moment is None else moment.astimezone(UTC).isoformat()[:19] + "Z"
