"""What a customer wants to pay, read from JSON or from a form: each rule of each field, all errors at once."""

import difflib
import hashlib
import hmac
import json
import re
import time
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self
from urllib.parse import urlencode

import db
import money
import settings as configuration
from errors import Problem
from settings import Settings


def parse_json(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(
            body.decode("utf-8"),
            parse_int=Number,
            parse_float=Number,
            parse_constant=refuse_constant,
            object_pairs_hook=members_once,
        )
    except RecursionError:
        raise Problem("invalid_json", "The JSON is nested too deeply.") from None
    except json.JSONDecodeError as error:
        message = f"The body is not JSON: line {error.lineno}, column {error.colno}."
        raise Problem("invalid_json", message) from None
    except UnicodeDecodeError:
        raise Problem("invalid_json", "The body is not UTF-8.") from None
    except ValueError as error:
        raise Problem("invalid_json", str(error)) from None
    if not isinstance(content, dict):
        raise Problem("invalid_json", "The body must be a JSON object.")
    return content


class Number(str):
    """A JSON number as it was written: a float would change it, and int() of thousands of digits takes long."""

    __slots__ = ()


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON.")


def members_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json keeps the last of two equal members, other parsers the first: whom the two would let through is refused."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("A member stands twice in one object.")
    return members


def parse_order(body: dict[str, Any], settings: Settings) -> db.Order:
    """The order in a request's members. Raises Problem with the errors of all fields at once."""
    fields = Fields(body)
    currency = fields.currency(settings.currencies)
    order = db.Order(
        customer_name=fields.text("customer_name", most=100),
        customer_email=fields.email("customer_email"),
        customer_phone=fields.phone("customer_phone"),
        amount_minor=fields.amount("amount", currency),
        location=fields.text("location", most=120),
        currency=currency,
        description=fields.text("description", most=200, is_required=False) or None,
        metadata=fields.metadata("metadata"),
        return_url=fields.url("return_url", settings.return_url_origins) or None,
    )
    fields.refuse_unknown()
    if fields.errors:
        raise Problem("invalid_fields", errors=fields.errors)
    return order


FIELDS = (
    "customer_name",
    "customer_email",
    "customer_phone",
    "amount",
    "location",
    "currency",
    "description",
    "metadata",
    "return_url",
)
PLAIN_PHONE = re.compile(r"\+?[0-9]{7,15}", re.ASCII)
PHONE_PUNCTUATION = re.compile(r"[ .()\[\]-]")
BIDI_OVERRIDES = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
DIGIT_GROUPS = re.compile(r"[0-9]+(?:[ -]+[0-9]+)*", re.ASCII)
CARD_NUMBER = re.compile(r"(?:222[1-9]|22[3-9]|2[3-6]|27[01]|2720|3[47]|[456])[0-9]*", re.ASCII)


class Fields:
    """The members of one order, read one by one; what is wrong with each is gathered in `errors`."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body
        self.errors: dict[str, list[str]] = {}

    def refuse(self, name: str, message: str) -> None:
        self.errors.setdefault(name, []).append(message)

    def string(self, name: str, *, is_required: bool = True) -> str:
        """A JSON string without characters that have no place in a line of text; empty where it is absent, null or
        refused."""
        value = self.body.get(name)
        if value is None:
            if is_required:
                self.refuse(name, "is required")
        elif not isinstance(value, str) or isinstance(value, Number):
            self.refuse(name, "must be a string")
        elif not is_line(value):
            self.refuse(name, "must not contain control characters, line breaks or direction overrides")
        elif not value.strip() and is_required:
            self.refuse(name, "must not be empty")
        else:
            return value
        return ""

    def text(self, name: str, *, most: int, is_required: bool = True) -> str:
        value = self.string(name, is_required=is_required).strip()
        if len(value) > most:
            self.refuse(name, f"must have at most {most} characters")
        if holds_card_number(value):
            self.refuse(name, "must not contain a card number")
        return value

    def email(self, name: str) -> str:
        value = self.string(name)
        local, at, domain = value.partition("@")
        labels = domain.split(".")
        is_address = local and at and "@" not in domain and len(labels) > 1 and all(labels)
        if value and (not is_address or any(character.isspace() for character in value)):
            self.refuse(name, "must be an e-mail address such as john@example.com")
        if len(value) > 254:
            self.refuse(name, "must have at most 254 characters")
        return value

    def phone(self, name: str) -> str:
        value = self.string(name)
        digits = PHONE_PUNCTUATION.sub("", value)
        if value and not PLAIN_PHONE.fullmatch(digits):
            self.refuse(name, "must have 7 to 15 digits, with an optional leading +")
        return digits

    def currency(self, currencies: tuple[str, ...]) -> str:
        """The currency, or the default one where it is absent or wrong."""
        value = self.string("currency", is_required=False)
        if value in currencies:
            return value
        if value or self.body.get("currency") == "":
            self.refuse("currency", f"must be one of {', '.join(currencies)}")
        return currencies[0]

    def amount(self, name: str, currency: str) -> int:
        """In hundredths; 0 where it is refused."""
        value = self.body.get(name)
        if value is None:
            self.refuse(name, "is required")
        elif not isinstance(value, str):
            self.refuse(name, 'must be a number, or a decimal string such as "50.00"')
        elif not isinstance(value, Number) and not money.PLAIN_DECIMAL.fullmatch(value):
            self.refuse(name, "must be an amount such as 50 or 50.00")
        else:
            try:
                return money.parse(value, currency)
            except ValueError as error:
                self.refuse(name, str(error))
        return 0

    def metadata(self, name: str) -> dict[str, str] | None:
        value = self.body.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(name, "must be an object")
            return None
        if any(not isinstance(text, str) or isinstance(text, Number) for text in value.values()):
            self.refuse(name, "must have strings as its values")
            return None
        members = {str(key): str(text) for key, text in value.items()}
        if len(members) > 20:
            self.refuse(name, "must have at most 20 members")
        if any(len(text) > 500 for text in members.values()):
            self.refuse(name, "must have values of at most 500 characters")
        if not all(is_line(text) for item in members.items() for text in item):
            self.refuse(name, "must not contain control characters, line breaks or direction overrides")
        elif len(json.dumps(members, ensure_ascii=False).encode()) > 4096:
            self.refuse(name, "must be at most 4096 bytes as JSON")
        if any(holds_card_number(text) for item in members.items() for text in item):
            self.refuse(name, "must not contain a card number")
        return members

    def url(self, name: str, origins: tuple[str, ...]) -> str:
        value = self.string(name, is_required=False)
        if not value:
            return value
        if len(value) > 2000 or not value.isascii() or " " in value or configuration.origin(value) is None:
            self.refuse(name, "must be an absolute URL of at most 2000 ASCII characters")
        elif configuration.origin(value) not in origins:
            self.refuse(name, "must be at an origin that this service allows (RETURN_URL_ORIGINS)")
        return value

    def refuse_unknown(self) -> None:
        for name in self.body:
            if name not in FIELDS:
                closest = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0)[0]
                shown = "".join(c if is_line(c) else "?" for c in name[:50])
                self.refuse(shown, f"is not a field of a payment; the closest one is {closest}")


def is_line(text: str) -> bool:
    """Whether `text` has no control character, line break, lone surrogate or bidirectional override."""
    return (text.isascii() and text.isprintable()) or not any(
        unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in BIDI_OVERRIDES for character in text
    )


def holds_card_number(text: str) -> bool:
    """Whether some of the groups of digits in `text`, read together, are a card number that passes the Luhn check.

    Time stamps and order numbers pass that check one time in ten: hence the prefixes of the card schemes.
    """
    for run in DIGIT_GROUPS.findall(text):
        groups = re.split(r"[ -]+", run)
        for first in range(len(groups)):
            digits = ""
            for group in groups[first:]:
                digits += group
                if len(digits) > 19:
                    break
                if len(digits) >= 13 and CARD_NUMBER.fullmatch(digits) and passes_luhn(digits):
                    return True
    return False


def passes_luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B."""
    doubled = [int(digit) * (1 + position % 2) for position, digit in enumerate(reversed(digits))]
    return sum(number - 9 if number > 9 else number for number in doubled) % 10 == 0


LINK_MEMBERS = ("amount", "currency", "description", "order", "expires")


@dataclass(frozen=True)
class Link:
    """What a signed payment link fixes. `expires` is in Unix seconds, as text."""

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

    def query(self, secret: bytes, mode: str) -> str:
        members = {name: getattr(self, name) for name in LINK_MEMBERS if getattr(self, name)}
        return urlencode({**members, "signature": self.signature(secret, mode)})

    @classmethod
    def signed(cls, params: Mapping[str, str], secret: bytes, mode: str) -> Self | None:
        """The link in a request's parameters; None when it was not made here, or has been changed by a byte."""
        link = cls(**{name: params.get(name, "") for name in LINK_MEMBERS})
        is_ours = hmac.compare_digest(link.signature(secret, mode).encode(), params.get("signature", "").encode())
        return link if is_ours else None

    def problems(self, settings: Settings) -> dict[str, list[str]]:
        """What is wrong with a link that is being made, by its members: whatever would keep a customer from paying."""
        fields = Fields({**asdict(self), "description": self.description or None})
        fields.amount("amount", fields.currency(settings.currencies))
        fields.text("description", most=200, is_required=False)
        fields.text("order", most=500, is_required=False)
        if self.expires and not re.fullmatch("[0-9]{1,11}", self.expires, re.ASCII):
            fields.refuse("expires", "must be in Unix seconds")
        return fields.errors

    @property
    def amount_minor(self) -> int | None:
        """In hundredths; None for what is no amount, which the form says then."""
        try:
            return money.parse_part(self.amount, self.currency)
        except ValueError:
            return None

    def is_of(self, payment: db.Payment | None) -> bool:
        """Whether a payment has the price that this link asks for."""
        return payment is not None and (payment.amount_minor, payment.currency) == (self.amount_minor, self.currency)

    @property
    def is_over(self) -> bool:
        return bool(self.expires) and time.time() >= int(self.expires)
