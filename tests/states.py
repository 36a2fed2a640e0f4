"""Payments in each state that the customer's page shows."""

from collections.abc import Callable
from typing import Any

import charges
import checkout
import db
from backstage import end_time, poll, worker_of
from shop import Shop


def paid(shop: Shop, **order: Any) -> dict[str, Any]:
    payment = shop.created(**order)
    shop.pay(payment["reference"])
    return payment


def refunded(shop: Shop, amount: int | None, end: str = "processed", **order: Any) -> dict[str, Any]:
    """A payment of which `amount` (all of it, without one) was given back in the provider's dashboard."""
    payment = paid(shop, **order)
    shop.sandbox.dashboard_refund(payment["reference"], amount)
    for status in {"processed": ["processed"], "failed": ["processed", "failed"]}[end]:
        shop.sandbox.move_refund(payment["reference"], status)
        shop.deliver(payment["reference"], f"refund.{status}")
        poll(shop)
        shop.sql("UPDATE refunds SET poll_at = now() WHERE poll_at IS NOT NULL")
        worker_of(shop).poll_refunds()
    return payment


def declined(shop: Shop) -> dict[str, Any]:
    payment = shop.created()
    shop.sandbox.decline(payment["reference"])
    poll(shop)
    return payment


def ended(shop: Shop, payment: dict[str, Any]) -> dict[str, Any]:
    end_time(shop.database_url, payment["id"])
    poll(shop)
    return payment


def accepted(shop: Shop) -> dict[str, Any]:
    payment = paid(shop, customer_email="underpaid@example.com")
    found = db.find_payment(shop.app.database, payment["id"])
    assert found is not None
    charges.accept(shop.app.database, found, "operator:john", "close enough", currency=None)
    return payment


def cancelled(shop: Shop) -> dict[str, Any]:
    payment = shop.created()
    found = db.find_payment(shop.app.database, payment["id"])
    assert found is not None
    shop.app.database.transaction(checkout.cancel, found, "operator:ada")
    return payment


STATES: dict[str, tuple[Callable[[Shop], dict[str, Any]], str, str]] = {
    # state: (how it comes about, the heading, a word of what happens next)
    "pending": (lambda shop: shop.created(), "Not paid yet", "come back here for your receipt"),
    "declined": (declined, "Your last try was declined", "Insufficient Funds"),
    "failed": (lambda shop: ended(shop, declined(shop)), "This payment did not work", "Insufficient Funds"),
    "expired": (lambda shop: ended(shop, shop.created()), "The time to pay has ended", "Nothing was paid"),
    "cancelled": (cancelled, "This order was cancelled", "Please do not pay for it any more"),
    "review": (
        lambda shop: paid(shop, customer_email="underpaid@example.com"),
        "Your money has arrived and is being checked",
        "do not pay again",
    ),
    "completed": (paid, "Paid", "This page is your receipt"),
    "accepted": (accepted, "Paid", "was accepted"),
    "partially_refunded": (lambda shop: refunded(shop, 2000), "Paid, and partly refunded", "NGN\u00a020.00"),
    "refunded": (lambda shop: refunded(shop, None), "Refunded", "sent back to you"),
    "refund_failed": (lambda shop: refunded(shop, 2000, "failed"), "A refund did not go through", "looks at it"),
}
