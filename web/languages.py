"""The languages of the customer's pages: the reader's preferred language, and how it writes money, dates and errors.

The pages' words are in `texts/`, a table for each language.
"""

import re
import tomllib
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

from markupsafe import Markup

import money

TEXTS = Path(__file__).with_name("texts")
CODES = ("en", "fr")
"""The first language is for readers who prefer another language."""

MOST_RANGES = 20
RANGE = re.compile(r"\s*(\*|[a-z]{1,8})(?:-[a-z0-9]{1,8})*\s*(?:;\s*q=([01](?:\.[0-9]{0,3})?)\s*)?", re.ASCII | re.I)


def preferred(header: str) -> str:
    """The language in CODES that an Accept-Language header prefers (RFC 9110, section 12.5.4); of equals the first."""
    matches = filter(None, map(RANGE.fullmatch, header.split(",", MOST_RANGES)))
    ranges = [(match[1].lower(), float(match[2] or 1)) for match in matches]
    named = {tag for tag, _ in ranges}
    for tag, quality in sorted(ranges, key=lambda each: -each[1]):
        for code in CODES:
            if quality > 0 and (tag == code or (tag == "*" and code not in named)):
                return code
    return CODES[0]


class Language:
    """A language, for the templates of its pages. Dates are in `zone`."""

    def __init__(self, code: str, zone: tzinfo) -> None:
        self.code, self.zone = code, zone
        self.texts = typeset(tomllib.loads((TEXTS / f"{code}.toml").read_text(encoding="utf-8")))
        errors: dict[str, Markup] = self.texts["errors"]
        self.errors = {as_pattern(words): said for words, said in errors.items()}

    def money(self, amount_minor: int, currency: str) -> str:
        return self.sum(money.readable(amount_minor, currency))

    def sum(self, readable: str) -> str:
        """A sum from `money.readable`, with spaces that break no line."""
        currency, _, number = readable.partition(" ")
        marks = str.maketrans({",": self.texts["between_thousands"], ".": self.texts["before_decimals"]})
        written: Markup = self.texts["money"]
        return written.format(currency=self.texts["signs"].get(currency, currency), number=number.translate(marks))

    def moment(self, at: datetime) -> str:
        there = at.astimezone(self.zone)
        month = self.texts["months"][there.month - 1]
        written: Markup = self.texts["moment"]
        return written.format(day=there.day, month=month, year=there.year, time=f"{there:%H:%M}", zone=f"{there:%Z}")

    def error(self, message: str) -> str:
        """A field's error in this language, from the API's message; Paystack's words stay as they are."""
        for words, said in self.errors.items():
            if found := words.fullmatch(message):
                parts = found.groupdict()
                return said.format(**parts | {"least": self.sum(parts.get("least", ""))})
        return message

    def plain(self, amount: str) -> str:
        """A typed amount with a point before its decimals, if this language has a comma: `1 500,50`. Two digits after a
        comma are never thousands."""
        is_comma = self.texts["before_decimals"] == ","
        return re.sub(r",(?=[0-9]{1,2}(?![0-9]))", ".", amount) if is_comma else amount


def as_pattern(words: str) -> re.Pattern[str]:
    """A pattern that matches a message of these words, with a group for each open part."""
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(words)))


def typeset(text: Any) -> Any:
    """A table's texts as HTML, without a line break before : ; ? ! or inside « »."""
    match text:
        case dict():
            return {name: typeset(each) for name, each in text.items()}
        case list():
            return [typeset(each) for each in text]
    return Markup(re.sub(r" (?=[:;?!»])|(?<=«) ", "\u00a0", text))  # noqa: S704  # ours
