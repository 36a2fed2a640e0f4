"""Signed payment links: their members, how they are signed and read."""

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self
from urllib.parse import urlencode

import db
import money
from settings import Settings
from web import orders

LINK_MEMBERS = ("amount", "currency", "description", "order", "expires")

SIGNED = (*LINK_MEMBERS, "signature")
"""The parameters that make a link."""


def was_link(names: Iterable[str]) -> bool:
    """Whether these parameters come from a link, even if a messenger cut it or turned `&` into `&amp;`."""
    return any(name.removeprefix("amp;") in SIGNED or "amount".startswith(name or "-") for name in names)


@dataclass(frozen=True)
class Link:
    """The members of a signed payment link. `expires` is in Unix seconds, as text."""

    amount: str
    currency: str
    description: str = ""
    order: str = ""
    expires: str = ""

    def signature(self, secret: bytes, mode: str) -> str:
        """HMAC-SHA256 over every member and the mode, under a key of its own."""
        key = hmac.new(secret, b"link\0" + mode.encode(), hashlib.sha256).digest()
        message = urlencode([(name, getattr(self, name)) for name in LINK_MEMBERS]).encode()
        return hmac.new(key, message, hashlib.sha256).hexdigest()[:40]

    def address(self, settings: Settings, database: db.Database) -> str:
        """Raises db.Impossible if the links of its order were withdrawn."""
        if self.order and is_withdrawn(database, settings.mode, self.order):
            raise db.Impossible(f"the links of order {self.order} were withdrawn: give it another number")
        return f"{settings.public_url}/pay?{self.query(database.secret(), settings.mode)}"

    def query(self, secret: bytes, mode: str) -> str:
        members = {name: getattr(self, name) for name in LINK_MEMBERS if getattr(self, name)}
        return urlencode({**members, "signature": self.signature(secret, mode)})

    @classmethod
    def asked_for(cls, fields: orders.Fields, settings: Settings, expires: str = "") -> Self:
        """The link that these members ask for. What would keep a customer from paying is in the errors of `fields`."""
        currency = fields.currency(settings.currencies)
        return cls(
            amount=money.render(fields.amount("amount", currency), currency),
            currency=currency,
            description=fields.text("description", most=200, is_required=False),
            order=fields.text("order", most=500, is_required="order" in fields.body),
            expires=expires,
        )

    @classmethod
    def signed(cls, params: Mapping[str, str], secret: bytes, mode: str) -> Self | None:
        """The link in a request's parameters; None if it was not made here, or was changed by a byte."""
        link = cls(**{name: params.get(name, "") for name in LINK_MEMBERS})
        is_ours = hmac.compare_digest(link.signature(secret, mode).encode(), params.get("signature", "").encode())
        return link if is_ours else None

    @property
    def amount_minor(self) -> int | None:
        """In hundredths; None if it is no amount: then the form says so."""
        try:
            return money.parse_part(self.amount, self.currency)
        except ValueError:
            return None

    def is_of(self, payment: db.Payment | None) -> bool:
        """Whether a payment has the price that this link asks for."""
        return payment is not None and (payment.amount_minor, payment.currency) == (self.amount_minor, self.currency)

    @property
    def ends_at(self) -> datetime | None:
        return datetime.fromtimestamp(int(self.expires), UTC) if self.expires else None

    @property
    def is_over(self) -> bool:
        return self.ends_at is not None and datetime.now(UTC) >= self.ends_at


# Withdrawn orders: their links start no payment any more


def withdraw(database: db.Database, mode: str, order: str, operator: str) -> list[db.Payment]:
    """Withdraw every link of an order, and return its unpaid payments: the caller cancels them. The mark is committed
    before the payments are read: see `is_withdrawn`."""
    values = {"mode": mode, "order": order, "digest": digest(order), "operator": operator}
    database.rows(
        """
        INSERT INTO withdrawn_orders (mode, digest, withdrawn_by) VALUES (%(mode)s, %(digest)s, %(operator)s)
        ON CONFLICT DO NOTHING
        """,
        values,
    )
    rows = database.rows(
        """
        SELECT * FROM payments
         WHERE mode = %(mode)s AND metadata ->> 'order' = %(order)s AND source = 'link' AND charge_reference IS NULL
        """,
        values,
    )
    return list(map(db.Payment.of, rows))


def is_withdrawn(database: db.Database, mode: str, order: str) -> bool:
    """Whether an order is withdrawn. Ask after reserving its payment: if the answer is no, the payment may be opened,
    because a later withdrawal finds it."""
    query = "SELECT FROM withdrawn_orders WHERE mode = %(mode)s AND digest = %(digest)s"
    values = {"mode": mode, "digest": digest(order)}
    return bool(database.rows(query, values))


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
