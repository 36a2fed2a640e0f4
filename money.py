"""Amounts of money and charges, always exact: no float anywhere.

`amount_minor` is always an int in hundredths (kobo, pesewa, cent), for every currency. Paystack counts XOF in
hundredths too, though people use none (https://paystack.com/docs/api/#supported-currency).
"""

import decimal
import re
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal


@dataclass(frozen=True)
class Currency:
    decimals: int
    minimum_minor: int
    """Paystack's smallest payment (https://support.paystack.com, "minimum transaction amount")."""


CURRENCIES = {
    "NGN": Currency(decimals=2, minimum_minor=50_00),
    "GHS": Currency(decimals=2, minimum_minor=10),
    "KES": Currency(decimals=2, minimum_minor=3_00),
    "ZAR": Currency(decimals=2, minimum_minor=1_00),
    "USD": Currency(decimals=2, minimum_minor=2_00),
    "XOF": Currency(decimals=0, minimum_minor=1_00),
}


@dataclass(frozen=True)
class Charge:
    """Money that came, by the provider's word: the amount that the customer paid, and the amount that we asked for, if
    known. They differ if the customer bears the fees, or if something is wrong.
    """

    reference: str
    mode: str
    provider_id: int | None
    amount_minor: int
    requested_minor: int | None
    fees_minor: int | None
    currency: str
    channel: str | None
    paid_at: datetime | None
    is_reversed: bool = False
    """Whether the provider says that it goes back, or went back: as a refund or as a chargeback."""

    def pays(self, amount_minor: int, currency: str) -> bool:
        """Whether it was asked at exactly this amount and currency, and paid in full."""
        asked = amount_minor if self.requested_minor is None else self.requested_minor
        return self.currency == currency and asked == amount_minor and self.amount_minor >= amount_minor


@dataclass(frozen=True)
class Refund:
    """Money that goes back, as the provider lists it. `note` is the sender's text: our id, if we sent it."""

    provider_id: int
    """Up to 64 bits without a sign."""
    charge_reference: str | None
    charge_provider_id: int | None
    amount_minor: int
    currency: str
    status: str
    note: str | None


DIGITS_BEFORE_POINT = 12
PLAIN_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?", re.ASCII)
NUMBER = re.compile(PLAIN_DECIMAL.pattern + "([eE][+-]?[0-9]+)?", re.ASCII)


def parse(text: str, currency: str) -> int:
    """Like `parse_part`, for the amount of a payment: it must reach the currency's minimum."""
    amount_minor = parse_part(text, currency)
    minimum_minor = CURRENCIES[currency].minimum_minor
    if amount_minor < minimum_minor:
        raise ValueError(f"must be at least {readable(minimum_minor, currency)}")
    return amount_minor


def parse_part(text: str, currency: str, decimals: int | None = None) -> int:
    """The amount written in `text` (major units, a JSON number or a plain decimal) as `amount_minor`.

    Raises ValueError with a message for the sender: not a number, not above 0, too many digits, or more decimals than
    the currency has (or `decimals`). Never rounds; zeros at the end do not count as decimals.
    """
    decimals = decimals_of(currency) if decimals is None else decimals
    try:
        # Decimal alone would also take 5_000, NaN and the digits of every script.
        amount = Decimal(text if NUMBER.fullmatch(text) else "")
    except decimal.InvalidOperation:
        raise ValueError("must be an amount such as 50 or 50.00") from None
    _, digits, exponent = amount.as_tuple()
    if amount <= 0:
        raise ValueError("must be greater than 0")
    # No computing before its size is known: int() of 1e999999999 takes minutes.
    if amount.adjusted() >= DIGITS_BEFORE_POINT:
        raise ValueError(f"must have at most {DIGITS_BEFORE_POINT} digits before the point")
    zeros = next(n for n, digit in enumerate(reversed(digits)) if digit)  # at the end, as in 1000.0: no decimals
    if isinstance(exponent, int) and -exponent - zeros > decimals:
        if decimals == 0:
            raise ValueError(f"must be a whole amount in {currency}")
        raise ValueError(f"must have at most {decimals} decimals in {currency}")
    return int(amount * 100)


def readable(amount_minor: int, currency: str) -> str:
    """An amount for people: `NGN 1,250.00`, `XOF 5,000`."""
    return f"{currency} {grouped(amount_minor, currency)}"


def grouped(amount_minor: int, currency: str) -> str:
    """Like `render`, with commas between the thousands."""
    whole, point, hundredths = render(abs(amount_minor), currency).partition(".")
    return f"{'-' if amount_minor < 0 else ''}{int(whole):,}{point}{hundredths}"


def render(amount_minor: int, currency: str) -> str:
    """`amount_minor` in major units, with the currency's decimals: `50.00`, `-3.10`; XOF `500`.

    A currency that is not ours (a charge may have any currency), and an amount of XOF that is not whole, get two
    decimals.
    """
    sign = "-" if amount_minor < 0 else ""
    whole, hundredths = divmod(abs(amount_minor), 100)
    return f"{sign}{whole}" if decimals_of(currency) == 0 and hundredths == 0 else f"{sign}{whole}.{hundredths:02d}"


def decimals_of(currency: str) -> int:
    return CURRENCIES[currency].decimals if currency in CURRENCIES else 2
