"""The customer at the pages: gets them, reads their HTML (`Page`), fills forms in and sends them.

Every page that a test asks for is read by `Page`, which checks what holds for all of them. How they look and behave in
a browser is in `browser/`.
"""

import re
import time
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urlencode

import pytest
from falcon.testing import Result

from shop import ORDER, OpenShop, Shop
from web.languages import CODES
from web.links import Link

TYPED = {**ORDER, "customer_phone": "0801 234 5678", "amount": "50"}
VOID = {"br", "img", "input", "link", "meta", "path"}
NOWHERE = "/pay/PAY-00000000000000000000000000"


@pytest.fixture
def counter(open_shop: OpenShop) -> Shop:
    """A shop with the free form and a name."""
    return open_shop(PAY_FORM="on", MERCHANT_NAME="Example Shop")


class Page(HTMLParser):
    """A page, after all that holds for every page has been checked."""

    def __init__(self, answer: Result, status: int = 200) -> None:
        super().__init__()
        assert answer.status_code == status, answer.text
        self.answer = answer
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(answer.text)
        assert self.open == [], "every element is closed"
        self.check_headers()
        self.check_structure()
        self.check_what_is_loaded()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def check_headers(self) -> None:
        headers = self.answer.headers
        assert headers["content-type"].startswith("text/html")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "Accept-Language" in headers["vary"]
        policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["base-uri"] == policy["frame-ancestors"] == "'none'"
        assert "https://checkout.paystack.com" in policy["form-action"].split()

    def check_structure(self) -> None:
        assert self.answer.text.startswith("<!doctype html>\n")
        assert self.language in CODES
        assert self.find("meta", name="viewport")
        assert "noindex" in self.find("meta", name="robots")["content"]
        assert self.title
        assert len(self.all("h1")) == len(self.all("main")) == 1
        ids = [attrs["id"] for _, attrs in self.elements if "id" in attrs]
        assert len(ids) == len(set(ids)), "an id is one element's"
        for _, attrs in self.elements:
            assert set(attrs.get("aria-describedby", "").split()) <= set(ids)
        for attrs in (*self.all("input"), *self.all("select")):
            assert attrs.get("type") == "hidden" or self.find("label", **{"for": attrs["id"]}), attrs

    def check_what_is_loaded(self) -> None:
        """Nothing inline, and nothing from another host."""
        assert not self.all("style")
        assert not any(name == "style" or name.startswith("on") for _, attrs in self.elements for name in attrs)
        loaded = [
            attrs for tag, attrs in self.elements if tag in ("link", "script", "img", "iframe", "object", "embed")
        ]
        assert len(loaded) == 3
        assert all(re.match(r"(/\w+)?/static/paygate\.", attrs.get("src") or attrs["href"]) for attrs in loaded)

    def all(self, tag: str, **attrs: str) -> list[dict[str, str]]:
        return [each for name, each in self.elements if name == tag and attrs.items() <= each.items()]

    def find(self, tag: str, **attrs: str) -> dict[str, str]:
        """The one element of this kind with these attributes."""
        [found] = self.all(tag, **attrs)
        return found

    def of(self, tag: str) -> str:
        """The text that stands directly in elements of this kind."""
        return " ".join(text for within, text in self.texts if within == tag)

    @property
    def language(self) -> str:
        return self.find("html")["lang"]

    @property
    def title(self) -> str:
        return self.of("title")

    @property
    def heading(self) -> str:
        return self.of("h1")

    @property
    def text(self) -> str:
        return " ".join(text for _, text in self.texts)

    @property
    def links(self) -> list[str]:
        return [attrs["href"] for attrs in self.all("a")]

    @property
    def facts(self) -> dict[str, str]:
        """The rows of the receipt; what stands in rows of one name stands together."""
        rows: dict[str, list[str]] = {}
        for tag, text in self.texts:
            if tag == "dt":
                values = rows.setdefault(text, [])
            elif rows and tag in ("dd", "time"):
                values.append(text)
        return {name: " ".join(values) for name, values in rows.items()}

    @property
    def fields(self) -> dict[str, str]:
        """The form's fields and what is in them, as a browser would send it."""
        return {attrs["name"]: attrs["value"] for attrs in self.all("input")}

    def described(self, name: str) -> str:
        """What is read out with a field."""
        ids = self.find("input", name=name).get("aria-describedby", "").split()
        return " ".join(
            text for id_ in ids for text in re.findall(rf'id="{id_}">(.*?)</p>', self.answer.text, re.DOTALL)
        )

    @property
    def is_live(self) -> bool:
        """Whether it looks for news, with a script and without."""
        is_refreshed = bool(self.all("meta", **{"http-equiv": "refresh"}))
        assert is_refreshed == bool(self.find("main")["data-refresh"])
        return is_refreshed


def get(shop: Shop, path: str, query: str = "", **headers: str) -> Result:
    return shop.client.simulate_get(path, query_string=query, headers=headers)


def form(shop: Shop, query: str = "") -> Page:
    return Page(get(shop, "/pay", query))


def post(shop: Shop, fields: dict[str, Any] | str, **headers: str) -> Result:
    body = fields if isinstance(fields, str) else urlencode(fields)
    sent = {"Content-Type": "application/x-www-form-urlencoded", **headers}
    return shop.client.simulate_post("/pay", body=body, headers=sent)


def send(shop: Shop, page: Page, **typed: Any) -> Result:
    """Send a form as it stands, with TYPED where it has a field for it, or what is given."""
    fields = page.fields
    return post(shop, {name: typed.get(name, value or TYPED.get(name, "")) for name, value in fields.items()})


def went_to(answer: Result) -> str:
    assert answer.status_code == 303, answer.text
    assert answer.headers["cache-control"] == "no-store"
    return answer.headers["location"]


def payments(shop: Shop) -> list[dict[str, Any]]:
    return shop.sql("SELECT * FROM payments ORDER BY created_at")


def only_payment(shop: Shop) -> dict[str, Any]:
    [payment] = payments(shop)
    return payment


def link(shop: Shop, **members: str) -> str:
    """The query of a signed link."""
    made = Link(**{"amount": "75.00", "currency": "NGN", "description": "A hat", **members})
    return made.query(shop.app.database.secret(), shop.settings.mode)


def in_an_hour() -> str:
    return str(int(time.time()) + 3600)


def payment_page(shop: Shop, payment: dict[str, Any], query: str = "") -> Page:
    return Page(get(shop, f"/pay/{payment['id']}", query))


def page_of(shop: Shop, payment_id: str, parameters: str = "") -> Result:
    return shop.client.simulate_get(f"/pay/{payment_id}", query_string=parameters)
