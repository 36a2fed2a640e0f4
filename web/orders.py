"""A customer's order, read from JSON or from a form: the rules of each field, and all errors at once."""

import difflib
import json
import re
import unicodedata
from bisect import bisect_left, bisect_right
from datetime import datetime, tzinfo
from itertools import accumulate
from typing import Any
from urllib.parse import unquote

import checkout
import money
import settings as configuration
from settings import Settings
from web.errors import Problem


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
    if not isinstance(content, dict):
        raise Problem("invalid_json", "The body must be a JSON object.")
    return content


class Number(str):
    """A JSON number as it was written: a float would change it, and int() of thousands of digits takes long."""


class Typed(str):
    """An amount as a person wrote it into a form."""


def refuse_constant(name: str) -> None:
    raise Problem("invalid_json", f"{name} is not JSON.")


def members_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses two equal members: json keeps the last, other parsers the first, so two programs would read two
    orders."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise Problem("invalid_json", "A member stands twice in one object.")
    return members


def parse_order(body: dict[str, Any], settings: Settings) -> checkout.Order:
    """The order in a request's members. Raises Problem with the errors of all fields at once."""
    fields = Fields(body)
    currency = fields.currency(settings.currencies)
    order = checkout.Order(
        customer_name=fields.text("customer_name", most=100),
        customer_email=fields.email("customer_email"),
        customer_phone=fields.phone("customer_phone"),
        amount_minor=fields.amount("amount", currency),
        location=fields.text("location", most=120),
        currency=currency,
        description=fields.text("description", most=200, is_required=False) or None,
        metadata=fields.metadata("metadata"),
        return_url=fields.url("return_url", settings.return_url_origins) or None,
        expires_in=fields.integer("expires_in", 60, int(settings.payment_ttl_seconds)),
    )
    fields.check()
    return order


PLAIN_PHONE = re.compile(r"\+?[0-9]{7,15}", re.ASCII)

INVISIBLE = "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u2800\u3164\ufeff\uffa0" + "".join(
    map(chr, (*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2065), *range(0x2066, 0x2070)))
)
"""Characters that come unseen with text copied from a page or from a phone. Inside a name some have a meaning."""
BLANK = INVISIBLE + "".join(each for each in map(chr, range(0x3001)) if unicodedata.category(each) == "Zs")
INVISIBLE_AT_THE_ENDS, BLANK_AT_THE_ENDS = (re.compile(rf"\A[{each}]+|[{each}]+\Z") for each in (INVISIBLE, BLANK))
INVISIBLE_ANYWHERE = re.compile(f"[{INVISIBLE}]")

PHONE_PUNCTUATION = re.compile(r"(?i:\A\s*tel:)|[\s.()\[\]\-\u2010-\u2015\u2212\ufe58\ufe63\uff0d]")

SIGNS = {"NGN": "₦|N", "GHS": "GH₵|GHC|₵", "KES": "KSh", "ZAR": "R", "USD": r"US\$|\$", "XOF": "F ?CFA|CFA|F"}
"""How people write currencies before or behind an amount; their codes too."""

BIDI_OVERRIDES = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

DIGIT_GROUPS = re.compile(
    r"\d+(?:[\s./\\_\-\u00ad\u2010-\u2015\u2212\u200b-\u200d\u2060\ufeff]+\d+)*"  # hyphens, dashes, unseen characters
)

CARD_NUMBER = re.compile(r"(?:222[1-9]|22[3-9]|2[3-6]|27[01]|2720)|3[47]|[456]", re.ASCII)
"""How card numbers begin. Numbers with a 2 must have 16 digits, because Nigeria's phone numbers begin with 2 too."""

MOST_UNKNOWN = 10
LONGEST_COMPARED = 50


class Fields:
    """The members of one request, read one by one; `errors` gathers what is wrong with each."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body
        self.known: dict[str, None] = {}
        """The names that were read."""
        self.errors: dict[str, list[str]] = {}

    def get(self, name: str) -> Any | None:
        self.known[name] = None
        return self.body.get(name)

    def refuse(self, name: str, message: str) -> None:
        self.errors.setdefault(name, []).append(message)

    def string(self, name: str, *, is_required: bool = True, drops: re.Pattern[str] = INVISIBLE_AT_THE_ENDS) -> str:
        """A JSON string without the matches of `drops`; empty if it is absent, null or refused, for example for
        characters that no line of text has."""
        value = self.get(name)
        if value is None:
            if is_required:
                self.refuse(name, "is required")
        elif not isinstance(value, str) or isinstance(value, Number):
            self.refuse(name, "must be a string")
        elif not is_line(value := drops.sub("", value)):
            self.refuse(name, "must not contain control characters, line breaks or direction overrides")
        elif not value.strip(BLANK) and is_required:
            self.refuse(name, "must not be empty")
        else:
            return value
        return ""

    def text(self, name: str, *, most: int, is_required: bool = True) -> str:
        value = self.string(name, is_required=is_required, drops=BLANK_AT_THE_ENDS)
        if len(value) > most:
            self.refuse(name, f"must have at most {most} characters")
        elif holds_card_number(value):
            self.refuse(name, "must not contain a card number")
        return value

    def email(self, name: str) -> str:
        value = self.string(name)
        local, at, domain = value.partition("@")
        labels = domain.split(".")
        is_address = local and at and "@" not in domain and len(labels) > 1 and all(labels)
        if value and (not is_address or not set(value).isdisjoint(BLANK)):
            self.refuse(name, "must be an e-mail address such as john@example.com")
        if value and len(self.body[name]) > 254:
            self.refuse(name, "must have at most 254 characters")
        elif holds_card_number(value):
            self.refuse(name, "must not contain a card number")
        return value

    def phone(self, name: str) -> str:
        value = self.string(name, drops=INVISIBLE_ANYWHERE)
        digits = PHONE_PUNCTUATION.sub("", value)
        if value and not PLAIN_PHONE.fullmatch(digits):
            self.refuse(name, "must have 7 to 15 digits, with an optional leading +")
        elif len(digits.lstrip("+")) == 15 and holds_card_number(digits):  # longer than such a country's phone numbers
            self.refuse(name, "must not contain a card number")
        return digits

    def currency(self, currencies: tuple[str, ...]) -> str:
        """The currency; the default currency if it is absent or wrong."""
        value = self.string("currency", is_required=False).upper()
        if value in currencies:
            return value
        if value or self.body.get("currency") == "":
            self.refuse("currency", f"must be one of {', '.join(currencies)}")
        return currencies[0]

    def amount(self, name: str, currency: str) -> int:
        """In hundredths; 0 if it is refused."""
        value = self.get(name)
        if value is None:
            self.refuse(name, "is required")
        elif not isinstance(value, str):
            self.refuse(name, 'must be a number, or a decimal string such as "50.00"')
        elif not isinstance(value, Number | Typed) and not money.PLAIN_DECIMAL.fullmatch(value):
            self.refuse(name, "must be an amount such as 50 or 50.00")
        else:
            try:
                return money.parse(typed_amount(value, currency) if isinstance(value, Typed) else value, currency)
            except ValueError as error:
                self.refuse(name, str(error))
        return 0

    def integer(self, name: str, least: int, most: int, of: type[str] = Number) -> int | None:
        """`of`: Number for a JSON number, str for a parameter's text."""
        value = self.get(name)
        if value is None:
            return None
        whole = re.fullmatch(r"([0-9]{1,12})(?:\.0+)?", value, re.ASCII) if isinstance(value, of) else None
        if whole is not None and least <= int(whole[1]) <= most:
            return int(whole[1])
        self.refuse(name, f"must be a whole number from {least} to {most}")
        return None

    def part(self, name: str, currency: str) -> str | None:
        """An amount of any size, in major units; None if it is absent or refused."""
        value = self.get(name)
        is_plain = isinstance(value, Number) or (isinstance(value, str) and money.PLAIN_DECIMAL.fullmatch(value))
        try:
            if value is not None:
                money.parse_part(value if is_plain else "", currency)
        except ValueError as error:
            self.refuse(name, str(error))
            return None
        return value

    def choice(self, name: str, *words: str, is_required: bool = False) -> str | None:
        value = self.string(name, is_required=is_required)
        if value and value not in words:
            self.refuse(name, f"must be one of {', '.join(words)}")
        return value or None

    def moment(self, name: str, zone: tzinfo) -> datetime | None:
        """A day or a month (of `zone`) or an ISO 8601 time."""
        value = self.string(name, is_required=False)
        try:
            at = datetime.fromisoformat(f"{value}-01" if len(value) == len("2026-01") else value) if value else None
            return at and (at.astimezone(zone) if at.tzinfo else at.replace(tzinfo=zone))
        except (ValueError, OverflowError):
            self.refuse(name, "must be a date such as 2026-01-31, or a time such as 2026-01-31T12:00:00Z")
            return None

    def metadata(self, name: str) -> dict[str, str] | None:
        value = self.get(name)
        if value is None:
            return None
        if value == []:  # PHP's way to write an empty object
            return {}
        if not isinstance(value, dict):
            self.refuse(name, "must be an object")
            return None
        if not all(isinstance(text, str | bool) for text in value.values()):
            self.refuse(name, "must have strings, numbers or booleans as its values")
            return None
        members = {key: str(text).lower() if isinstance(text, bool) else str(text) for key, text in value.items()}
        if len(members) > 20:
            self.refuse(name, "must have at most 20 members")
        if any(len(text) > 500 for text in members.values()):
            self.refuse(name, "must have values of at most 500 characters")
        if not all(is_line(text) for item in members.items() for text in item):
            self.refuse(name, "must not contain control characters, line breaks or direction overrides")
        elif len(json.dumps(members, ensure_ascii=False).encode()) > 4096:
            self.refuse(name, "must be at most 4096 bytes as JSON")
        elif any(holds_card_number(text) for item in members.items() for text in item):
            self.refuse(name, "must not contain a card number")
        return members

    def url(self, name: str, origins: tuple[str, ...]) -> str:
        value = self.string(name, is_required=False)
        if not value:
            return value
        if len(value) > 2000 or not value.isascii() or " " in value or configuration.caller_origin(value) is None:
            self.refuse(name, "must be an absolute URL of at most 2000 ASCII characters")
        elif configuration.caller_origin(value) not in origins:
            self.refuse(name, "must be at an origin that this service allows (RETURN_URL_ORIGINS)")
        elif holds_card_number(unquote(value)):
            self.refuse(name, "must not contain a card number")
        return value

    def check(self) -> None:
        """Raises Problem if any member is wrong, or was never read: then it is unknown. Only the first few of these are
        named: comparing a name costs more than reading it."""
        for name in [each for each in self.body if each not in self.known][:MOST_UNKNOWN]:
            message = "is not a field here"
            if len(name) <= LONGEST_COMPARED:
                close = difflib.get_close_matches(name, self.known, n=1, cutoff=0.5)
                message = "; the closest one is ".join([message, *close])
            self.refuse("".join(c if is_line(c) else "?" for c in name[:LONGEST_COMPARED]), message)
        if self.errors:
            raise Problem("invalid_fields", errors=self.errors)


def typed_amount(text: str, currency: str) -> str:
    """`1,500`, `1 500`, `₦1500` or `NGN 1,500.00` as a plain decimal.

    Raises ValueError if the text may mean two amounts: `1,50`, or `1.500`, which is 1500 in half of the world."""
    name = f"(?:{currency}|{SIGNS[currency]})"
    bare = re.sub(rf"(?i)\A{name}\s*|\s*{name}\Z", "", text.strip(BLANK))
    is_clear = re.fullmatch(r"(?:[0-9]{1,3}(?:([,'’\s])[0-9]{3}(?:\1[0-9]{3})*)?|[0-9]+)(?:\.[0-9]+)?", bare)
    if not is_clear or re.fullmatch(r"[0-9]{1,3}\.[0-9]{3}", bare):
        raise ValueError("must be clear: write it like 1500 or 1,500" + (".50" if money.decimals_of(currency) else ""))
    return re.sub(r"[,'’\s]", "", bare)


def is_line(text: str) -> bool:
    """Whether `text` has no control character, line break, lone surrogate or bidirectional override."""
    return (text.isascii() and text.isprintable()) or not any(
        unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in BIDI_OVERRIDES for character in text
    )


def holds_card_number(text: str) -> bool:
    """Whether some groups of digits in `text`, read together, are a card number that passes the Luhn check.

    One in ten time stamps and order numbers passes that check, so the card schemes' prefixes are checked too. Fewer
    than 15 digits after a + are a phone number.
    """
    text = unicodedata.normalize("NFKC", text)
    for run in DIGIT_GROUPS.finditer(text):
        groups = re.findall(r"\d+", run[0])
        digits = "".join(str(int(digit)) for digit in "".join(groups))
        bounds = list(accumulate(map(len, groups), initial=0))
        sums = luhn_sums(digits)
        is_phone = text[run.start() - 1 : run.start()] == "+"
        for start in bounds:
            if not CARD_NUMBER.match(digits, start):
                continue
            least, most = (16, 16) if digits[start] == "2" else (15 if is_phone and start == 0 else 13, 19)
            for end in bounds[bisect_left(bounds, start + least) : bisect_right(bounds, start + most)]:
                if (sums[end % 2][end] - sums[end % 2][start]) % 10 == 0:
                    return True
    return False


def luhn_sums(digits: str) -> list[list[int]]:
    """The sums of ISO/IEC 7812-1, annex B, up to each place, for numbers that end at an even and at an odd place. The
    difference of two sums is the sum of the digits between them.
    """
    values = ("0246813579", "0123456789")  # of a digit that is doubled, and of the next one
    weighed = [[int(values[(place - end) % 2][int(d)]) for place, d in enumerate(digits)] for end in (0, 1)]
    return [list(accumulate(each, initial=0)) for each in weighed]
