"""A payment's story in words, and what an incident asks of a person."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import db
import money

Row = dict[str, Any]

STORY = """
SELECT * FROM (
SELECT at, actor AS who, 'change' AS what, to_jsonb(e) AS facts
  FROM payment_events e WHERE payment_id = %(id)s AND why <> 'noted'
UNION ALL
-- After the opening that was stored with it: the trail's row is written when that statement ends.
SELECT greatest(answered_at, (SELECT at + interval '1 us' FROM payment_events
                               WHERE payment_id = %(id)s AND why = 'opened')),
       'api', 'answer', jsonb_build_object('answer', answer)
  FROM idempotency_keys WHERE payment_id = %(id)s
UNION ALL
SELECT polled_at, 'worker', 'poll', '{}' FROM payments WHERE id = %(id)s
UNION ALL
SELECT poll_at, 'worker', 'next poll', '{}' FROM payments WHERE id = %(id)s
UNION ALL
SELECT received_at, 'provider', 'event', jsonb_build_object(
       'name', name, 'reference', reference, 'outcome', outcome, 'deliveries', deliveries)
  FROM provider_events WHERE reference = ANY(%(references)s)
UNION ALL
SELECT recorded_at, source, 'charge', to_jsonb(c) FROM charges c WHERE reference = ANY(%(references)s)
UNION ALL
SELECT created_at, made_by, 'refund', to_jsonb(r) FROM refunds r WHERE payment_id = %(id)s
UNION ALL
SELECT processed_at, 'provider', 'processed', to_jsonb(r) FROM refunds r WHERE payment_id = %(id)s
UNION ALL
SELECT opened_at, 'paygate', 'incident', to_jsonb(i) FROM incidents i WHERE payment_id = %(id)s
UNION ALL
SELECT closed_at, closed_by, 'closed', to_jsonb(i) FROM incidents i WHERE payment_id = %(id)s
UNION ALL
SELECT coalesce(delivered_at, dead_at, made_at), 'worker', 'notification', jsonb_build_object(
       'type', type, 'tries', tries, 'last_outcome', last_outcome,
       'state', CASE WHEN delivered_at IS NOT NULL THEN 'delivered' WHEN dead_at IS NOT NULL THEN 'given up'
                     ELSE 'on its way' END)
  FROM notifications WHERE payment_id = %(id)s
) AS story WHERE at IS NOT NULL ORDER BY at
"""
"""The story of the payment with this `id` and these `references`."""

CHANGES = {
    "reserved": "payment of {amount} asked for",
    "opened": "checkout page opened as {reference}",
    "next_reference": "an answer of the provider was lost: the checkout goes on as {reference}",
    "refused": "the provider refuses it",
    "declined": "a card was declined; the customer may try again",
    "time_over": "its time is over",
    "charge": "paid: {charged}",
    "mismatch": "money came that does not match the price: {charged}; a person must decide",
    "refund": "given back so far: {refunded}",
    "refund_failed": "a refund failed after all; given back so far: {refunded}",
    "accepted": "accepted as paid: {charged}",
    "cancelled": "given up: no checkout is given out any more",
    "erased": "the personal data were erased",
    "by_hand": "changed by hand in the database",
}

INCIDENTS = {
    "second_charge": "paid a second time, as {subject}: refund that charge",
    "unknown_reference": "money came as {subject}, which is unknown here: was the database restored from a backup?",
    "mismatch": "what was paid for {payment_id} is not its price: accept it, or reject it and the money goes back",
    "references_used_up": "every try to open a checkout was lost: let the customer start another payment",
    "dispute": "the customer's bank disputes {subject}: answer in Paystack's dashboard; it closes if you win",
    "chargeback": "{subject} went back without refunds that add up to it, as after a lost dispute",
    "refund_failed": "refund {subject} failed: refund again, or pay it back in another way",
    "refund_needs_attention": "refund {subject} waits for bank details: give them in Paystack's dashboard",
    "refund_not_final": "refund {subject} is not final after 30 days: ask Paystack's support",
    "refund_not_made": "refund {subject} was never made: refund again if the money is still owed",
    "refund_revived": "refund {subject} was made after all: was it made a second time meanwhile?",
    "refunded_too_much": "more of {subject} was given back than had come",
    "unreadable_refund": "a refund of {subject} cannot be read or recorded here: look for it in Paystack's dashboard",
    "unreadable_event": "a signed event cannot be read ({subject}): see the webhook log in Paystack's dashboard",
    "paid_after_cancel": "paid as {subject} after the order was given up: fulfil it, or refund it",
    "never_ended": "its time is over, and Paystack does not say that it is unpaid: look for it in the dashboard",
}


def told(payment: db.Payment, rows: Iterable[Row]) -> Iterator[Row]:
    """The rows of `STORY`, in order: `at`, `who`, `what`, the `facts` and a `text` for people."""
    for row in rows:
        yield {**row, "text": tell(payment, row["what"], row["facts"]), "facts": with_amounts(payment, row["facts"])}


def as_json(row: Row) -> str:
    at = row["at"].isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({**row, "at": at}, ensure_ascii=False)


def with_amounts(payment: db.Payment, facts: Row) -> Row:
    """Facts for a program: amounts in major units, nothing internal."""
    kept = {}
    for name, value in facts.items():
        if name.endswith("_minor"):
            amount = None if value is None else money.render(value, currency_of(payment, facts, name))
            kept[name.removesuffix("_minor")] = amount
        elif name not in ("payment_id", "mode", "poll_at", "hash"):
            kept[name] = value
    return kept


def currency_of(payment: db.Payment, facts: Row, name: str) -> str:
    """A sum's currency: money that came or went back is in the charge's currency."""
    is_of_charge = name in ("charged_minor", "refunded_minor")
    return payment.refunded_currency if is_of_charge else str(facts.get("currency", payment.currency))


def tell(payment: db.Payment, what: str, facts: Row) -> str:
    def amount(name: str) -> str:
        return money.readable(facts[name] or 0, currency_of(payment, facts, name))

    match what:
        case "change":
            sums = {name: amount(f"{name}_minor") for name in ("amount", "charged", "refunded")}
            text = CHANGES[facts["why"]].format(**facts | sums)
            return text if facts["from_status"] == facts["to_status"] else f"{text} → {facts['to_status']}"
        case "answer":
            return f"the request was answered ({facts['answer']})"
        case "poll":
            return "asked the provider about it, last"
        case "next poll":
            return "will ask the provider about it next"
        case "event":
            times = f", {facts['deliveries']} times" if facts["deliveries"] > 1 else ""
            return f"event {facts['name']} for {facts['reference']}: {facts['outcome']}{times}"
        case "charge":
            fees = f", fees {amount('fees_minor')}" if facts["fees_minor"] is not None else ""
            more = facts["amount_minor"] - payment.amount_minor if facts["currency"] == payment.currency else 0
            over = f"; {money.readable(more, payment.currency)} more than the price" if more > 0 else ""
            return f"{amount('amount_minor')} came as {facts['reference']}{fees}{over}"
        case "refund":
            because = f": {facts['refused_because']}" if facts["refused_because"] else ""
            reason = f" ({facts['reason']})" if facts["reason"] else ""
            where = "in the dashboard" if facts["origin"] == "dashboard" else "asked for"
            refund = f"refund {facts['id']} of {amount('amount_minor')} {where}{reason}"
            return f"{refund}; it is {facts['status'].replace('_', ' ')}{because}"
        case "processed":
            return f"refund {facts['id']} of {amount('amount_minor')} was paid out"
        case "incident":
            return f"incident {facts['id']}: {describe(facts)}"
        case "closed":
            return f"incident {facts['id']} closed" + (f": {facts['close_reason']}" if facts["close_reason"] else "")
        case "notification":
            outcome = f", {facts['last_outcome']}" if facts["last_outcome"] else ""
            return f"notification {facts['type']}: {facts['state']} (tries: {facts['tries']}{outcome})"
    return what


def describe(incident: Row) -> str:
    return INCIDENTS[incident["kind"]].format(**incident)
