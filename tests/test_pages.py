# ruff: noqa: F811  (fixtures are imported by their names)
"""The customer's pages, by what HTML shows: what each says, what can be done on it, and when a payment begins.

Every page that a test asks for is read by `Page`, which checks what holds for all of them. How they look and behave in
a browser is in `browser/`.
"""

import re
import time
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any
from urllib.parse import parse_qsl, urlencode

import pytest
from falcon.testing import Result

import db
import pages
from backstage import at_once, end_time, look, make_due, meanwhile, worker_of
from orders import Link
from sandbox import Sandbox
from shop import ORDER, SECRET_KEY, Shop, open_shop, sandbox, shop  # noqa: F401

OpenShop = Callable[..., Shop]
LIVE = {"PAYSTACK_SECRET_KEY": "sk_live_0123456789abcdef", "PUBLIC_URL": "https://pay.example.com"}
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
        policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["base-uri"] == policy["frame-ancestors"] == "'none'"
        assert "https://checkout.paystack.com" in policy["form-action"].split()

    def check_structure(self) -> None:
        assert self.answer.text.startswith("<!doctype html>\n")
        assert self.find("html")["lang"] == "en"
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
        assert all(re.match(r"(/\w+)?/paygate\.", attrs.get("src") or attrs["href"]) for attrs in loaded)

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
        """The rows of the receipt; times as they stand in their element."""
        words = [text for tag, text in self.texts if tag in ("dt", "dd", "time")]
        return dict(zip(words[::2], words[1::2], strict=True))

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


# Getting there


def get(shop: Shop, path: str, query: str = "") -> Result:
    return shop.client.simulate_get(path, query_string=query)


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


# The form


def test_without_a_link_there_is_a_form_only_where_it_is_wanted(shop: Shop) -> None:
    assert Page(get(shop, "/pay"), 404).heading == "There is nothing here"
    Page(post(shop, TYPED), 404)
    assert payments(shop) == []


def test_the_form_has_the_api_s_fields_and_says_where_the_card_is_asked_for(counter: Shop) -> None:
    page = form(counter)
    assert page.title == page.heading == "Pay Example Shop"
    assert list(page.fields) == ["key", "amount", "customer_name", "customer_email", "customer_phone", "location"]
    assert page.find("form") == {"method": "post", "action": "/pay?sent=on"}
    assert page.find("input", name="customer_email") | {"type": "email", "autocomplete": "email"} == page.find(
        "input", name="customer_email"
    )
    assert page.find("input", name="customer_phone")["autocomplete"] == "tel"
    assert page.find("input", name="amount")["inputmode"] == "decimal"
    assert "Amount in NGN" in page.of("label")
    assert "Paystack" in page.text
    assert "No real money" in page.text
    assert not page.all("select")


def test_the_form_leads_to_the_checkout(counter: Shop) -> None:
    url = went_to(send(counter, form(counter)))
    payment = only_payment(counter)
    assert url == payment["checkout_url"]
    assert {name: payment[name] for name in ("source", "amount_minor", "currency", "customer_phone")} == {
        "source": "form",
        "amount_minor": 5000,
        "currency": "NGN",
        "customer_phone": "08012345678",
    }


def test_where_there_are_several_currencies_one_is_chosen(open_shop: OpenShop) -> None:
    shop = open_shop(PAY_FORM="on", CURRENCIES="NGN,XOF")
    page = form(shop)
    assert [attrs["value"] for attrs in page.all("option")] == ["NGN", "XOF"]
    assert "West African CFA franc" in page.text
    refused = Page(post(shop, {**TYPED, "currency": "XOF", "amount": "50.5", "key": "one"}), 422)
    assert "selected" in refused.find("option", value="XOF")
    assert refused.described("amount").endswith("Amount must be a whole amount in XOF")
    went_to(post(shop, {**TYPED, "currency": "XOF", "amount": "50", "key": "one"}))
    assert only_payment(shop)["currency"] == "XOF"


def test_a_currency_that_is_not_taken_is_no_other_one(counter: Shop) -> None:
    page = Page(post(counter, {**TYPED, "currency": "USD"}), 422)
    assert "currency must be one of NGN" in page.text
    assert payments(counter) == []


def test_a_whole_currency_is_asked_for_in_whole_amounts(open_shop: OpenShop) -> None:
    page = form(open_shop(PAY_FORM="on", CURRENCIES="XOF"))
    assert page.described("amount") == "Digits only, such as 1500"


def test_each_error_stands_beside_its_field_and_above_with_what_was_typed_kept(counter: Shop) -> None:
    page = Page(send(counter, form(counter), amount="1,500", customer_email="john@", location=" "), 422)
    assert page.title == "Error: Pay Example Shop"
    assert page.fields | {"amount": "1,500", "customer_email": "john@", "customer_name": "John Doe"} == page.fields
    wrong = ["amount", "customer_email", "location"]
    assert [name for name in page.fields if "aria-invalid" in page.find("input", name=name)] == wrong
    assert page.described("amount").endswith("Amount in NGN must be an amount such as 50 or 50.00")
    assert page.described("customer_email") == "E-mail must be an e-mail address such as john@example.com"
    assert page.links == [f"#{name}" for name in wrong]
    summary = page.find("div", role="alert")
    assert summary | {"tabindex": "-1", "autofocus": ""} == summary
    assert went_to(send(counter, page, amount="1500", customer_email="john@example.com", location="Lagos"))
    assert only_payment(counter)["amount_minor"] == 150000


def test_what_was_typed_is_only_text(counter: Shop) -> None:
    evil = '"><script>alert(1)</script> {0.__class__} {merchant} %s &amp;'
    typed = {name: evil + name for name in TYPED}
    page = Page(post(counter, {**typed, "key": evil}), 422)
    assert page.fields == {**typed, "key": evil}
    assert "<script>" not in page.answer.text


@pytest.mark.parametrize("character", ["\0", "\n", "\x7f", "\u202e", "\u2028"])
def test_a_character_that_is_none_of_a_line_is_refused_beside_its_field(counter: Shop, character: str) -> None:
    page = Page(post(counter, {**TYPED, "customer_name": f"John{character}Doe"}), 422)
    assert page.described("customer_name").startswith("Your name must not contain control characters")
    assert payments(counter) == []


def test_a_card_number_is_refused(counter: Shop) -> None:
    page = Page(post(counter, {**TYPED, "location": "4084 0840 8408 4081"}), 422)
    assert page.described("location") == "City or town must not contain a card number"


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        ("customer_name=%ED%A0%80", {}, 400),  # a lone surrogate
        ("customer_name=%FF", {}, 400),
        ("customer_name=%", {}, 422),
        ("&".join(f"x{n}=1" for n in range(60)), {}, 400),
        ("x" * (16 * 1024 + 1), {}, 413),
        ("{}", {"Content-Type": "application/json"}, 415),
        ("", {"Content-Type": ""}, 415),
        ("customer_name=J", {"Content-Length": "5000"}, 400),
        ("", {}, 411),
    ],
)
def test_what_no_browser_sends_is_a_page_and_no_payment(
    counter: Shop, body: str, headers: dict[str, str], status: int
) -> None:
    page = Page(post(counter, body, **headers), status)
    assert page.heading == ("Pay Example Shop" if status == 422 else "This did not work")
    assert payments(counter) == []


def test_the_browser_keeps_the_form_for_its_back_button_and_nothing_else(counter: Shop) -> None:
    assert form(counter).answer.headers["cache-control"] == "private, no-cache"
    assert post(counter, {}).headers["cache-control"] == "no-store"
    assert get(counter, NOWHERE).headers["cache-control"] == "no-store"
    payment = counter.created()
    assert get(counter, f"/pay/{payment['id']}").headers["cache-control"] == "no-store"


# One form, one payment


def test_a_form_sent_twice_is_one_payment(counter: Shop) -> None:
    page = form(counter)
    assert went_to(send(counter, page)) == went_to(send(counter, page))
    assert len(payments(counter)) == counter.sandbox.calls("initialize") == 1


def test_two_forms_are_two_payments(counter: Shop) -> None:
    assert went_to(send(counter, form(counter))) != went_to(send(counter, form(counter)))


@pytest.mark.parametrize("key", [{}, {"key": ""}])
def test_forms_without_a_key_of_their_own_are_payments_of_their_own(counter: Shop, key: dict[str, str]) -> None:
    for name in ("John Doe", "Jane Doe"):
        went_to(post(counter, {**TYPED, **key, "customer_name": name}))
    assert len(payments(counter)) == 2


def test_a_double_click_is_one_payment_and_leads_to_its_checkout(counter: Shop) -> None:
    page = form(counter)
    counter.sandbox.fault("initialize", "slow", seconds=0.5)
    with meanwhile(lambda: send(counter, page)) as first:
        for _ in range(100):
            if counter.sandbox.calls("initialize"):
                break
            time.sleep(0.01)
        address = went_to(send(counter, page))
        payment = only_payment(counter)
        assert address == f"/pay/{payment['id']}?go=on"
        waiting = Page(get(counter, *address.split("?")))
        assert waiting.heading == "Preparing your payment"
        assert waiting.is_live
        url = went_to(first())
    assert went_to(get(counter, *address.split("?"))) == url == only_payment(counter)["checkout_url"]
    counter.pay(payment["reference"])
    assert Page(get(counter, *address.split("?"))).heading == "Paid"


def test_many_clicks_at_once_are_one_payment(counter: Shop) -> None:
    page = form(counter)
    places = {went_to(answer) for answer in at_once([lambda: send(counter, page)] * 8)}
    payment = only_payment(counter)
    assert places <= {payment["checkout_url"], f"/pay/{payment['id']}?go=on"}


def test_back_and_something_changed_is_asked_about_before_it_is_another_payment(counter: Shop) -> None:
    page = form(counter)
    first = went_to(send(counter, page))
    changed = Page(send(counter, page, amount="60"), 422)
    assert "You have changed something" in changed.text
    assert "PAY-" not in changed.answer.text  # whoever has the key need not be who began that payment
    assert changed.fields["amount"] == "60"
    assert changed.fields["key"] != page.fields["key"]
    assert len(payments(counter)) == 1
    assert went_to(send(counter, changed)) != first


def test_back_after_paying_leads_to_the_receipt(counter: Shop) -> None:
    page = form(counter)
    went_to(send(counter, page))
    payment = only_payment(counter)
    counter.pay(payment["reference"])
    assert went_to(send(counter, page)) == f"/pay/{payment['id']}"
    assert len(payments(counter)) == 1


def test_what_the_provider_refuses_can_be_mended_and_sent_again(counter: Shop) -> None:
    page = form(counter)
    refusal = {"status": False, "message": "Invalid Email Address Passed", "code": "invalid_email_address"}
    counter.sandbox.fault("initialize", "answer", effect=False, status=400, body=refusal)
    refused = Page(send(counter, page), 422)
    assert refused.described("customer_email")
    assert refused.fields | {"customer_name": "John Doe"} == refused.fields
    went_to(send(counter, refused, customer_email="jane@example.com"))
    assert [payment["status"] for payment in payments(counter)] == ["failed", "pending"]


def test_while_the_provider_is_away_the_form_can_be_sent_again_as_it_is(counter: Shop) -> None:
    page = form(counter)
    counter.sandbox.fault("initialize", "lost-answer", times=2)
    again = Page(send(counter, page), 503)
    assert int(again.answer.headers["retry-after"]) >= 1
    assert "Nothing was paid" in again.text
    assert again.fields == {**page.fields, **TYPED}
    went_to(send(counter, again))
    assert only_payment(counter)["checkout_url"]


def test_when_too_many_are_opened_at_once_the_form_can_be_sent_again(open_shop: OpenShop) -> None:
    shop = open_shop(PAY_FORM="on", THREADS="2")
    shop.sandbox.fault("initialize", "slow", seconds=0.5)
    with meanwhile(lambda: send(shop, form(shop))) as first:
        for _ in range(100):
            if shop.sandbox.calls("initialize"):
                break
            time.sleep(0.01)
        busy = Page(send(shop, form(shop)), 503)
        went_to(first())
    went_to(send(shop, busy))
    assert len(payments(shop)) == 2


def test_whoever_is_too_quick_waits_with_the_form_filled_in(open_shop: OpenShop) -> None:
    shop = open_shop(PAY_FORM="on", RATE_LIMIT="1/minute")
    went_to(send(shop, form(shop)))
    page = Page(send(shop, form(shop)), 429)
    assert 1 <= int(page.answer.headers["retry-after"]) <= 60
    assert "Too many payments from your network" in page.text
    assert page.fields | TYPED == page.fields
    assert len(payments(shop)) == 1


def test_without_the_database_the_form_is_kept_and_the_payment_s_page_tries_again_by_itself(counter: Shop) -> None:
    page, payment = form(counter), counter.created()
    counter.app.database.close()
    again = Page(send(counter, page), 503)
    assert "Your payment could not be started" in again.text
    assert again.fields == {**page.fields, **TYPED}
    lost = Page(get(counter, f"/pay/{payment['id']}"), 503)
    assert lost.is_live
    assert "Nothing is lost" in lost.text
    assert lost.answer.headers["x-request-id"] in lost.text


def test_a_payment_whose_time_ended_before_it_was_opened_can_be_begun_anew(counter: Shop) -> None:
    page = form(counter)
    counter.sandbox.fault("initialize", "lost-request", times=2)
    Page(send(counter, page), 503)
    end_time(counter.database_url, only_payment(counter)["id"])
    again = Page(send(counter, page), 422)
    assert "The time to pay had ended" in again.text
    assert "Idempotency" not in again.text
    went_to(send(counter, again))


# Links


def test_a_link_fixes_what_is_paid(shop: Shop) -> None:
    query = link(shop, order="1001", expires=in_an_hour())
    page = form(shop, query)
    assert page.find("form")["action"] == "/pay?sent=on&" + query
    assert page.title == "Pay NGN\u00a075.00 to the merchant"
    assert page.heading == "NGN\u00a075.00"
    for text in ("A hat", "Order 1001", "You can pay until"):
        assert text in page.text
    assert page.find("input", name="amount")["type"] == "hidden"
    went_to(send(shop, page))
    payment = only_payment(shop)
    assert (payment["amount_minor"], payment["description"], payment["metadata"], payment["source"]) == (
        *(7500, "A hat"),
        *({"order": "1001"}, "link"),
    )


def changes() -> list[tuple[str, str]]:
    """A link's query with one thing changed, by what it is."""
    made = {"amount": "75.00", "currency": "NGN", "description": "A hat", "order": "1001", "expires": "4102444800"}
    changed: list[tuple[str, str]] = []
    for name, value in made.items():
        others = {"amount": "75.01", "currency": "USD", "expires": "4102444801"}
        changed += [(name, others.get(name, value + " "))]
    return [*changed, ("amount", "75"), ("order", ""), ("expires", ""), ("description", ""), ("signature", "")]


@pytest.mark.parametrize(("name", "value"), changes())
def test_a_link_that_was_changed_is_refused(counter: Shop, name: str, value: str) -> None:
    query = dict(parse_qsl(link(counter, order="1001", expires="4102444800")))
    changed = {**query, name: value}
    assert Page(get(counter, "/pay", urlencode(changed)), 403).heading == "This payment link has been changed"
    Page(post(counter, {**TYPED, **changed}), 403)
    assert payments(counter) == []


def test_a_link_with_a_part_twice_is_refused(counter: Shop) -> None:
    query = link(counter)
    Page(get(counter, "/pay", query + "&amount=1"), 403)
    Page(get(counter, "/pay", "amount=1&" + query), 403)
    Page(post(counter, urlencode({**TYPED}) + f"&{query}&amount=60"), 403)
    went_to(post(counter, urlencode({**TYPED, "amount": "60"}) + f"&{query}"))
    assert only_payment(counter)["amount_minor"] == 7500


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("amount", "1,500"),
        ("amount", ""),
        ("amount", "1.005"),
        ("currency", "USD"),
        ("description", "x" * 201),
        ("order", "4084 0840 8408 4081"),
        ("order", "a\nb"),
        ("expires", "tomorrow"),
    ],
)
def test_what_would_keep_customers_from_paying_is_told_when_a_link_is_made(shop: Shop, member: str, value: str) -> None:
    made = {"amount": "75.00", "currency": "NGN", "description": "A hat", "order": "1001", "expires": in_an_hour()}
    assert Link(**made).problems(shop.settings) == {}
    assert list(Link(**{**made, member: value}).problems(shop.settings)) == [member]


def test_a_part_of_a_signature_is_none(shop: Shop) -> None:
    query = link(shop)
    for signature in ("", "0" * 40, query.rpartition("=")[2][:39], query.rpartition("=")[2].upper(), "é", "\ud800"):
        changed = {**dict(parse_qsl(query)), "signature": signature}
        Page(get(shop, "/pay", urlencode(changed, errors="replace")), 403)


def test_a_link_of_test_mode_is_none_in_live(database_url: str, shop: Shop) -> None:
    query = link(shop)
    with Sandbox(LIVE["PAYSTACK_SECRET_KEY"]) as sandbox, Shop(database_url, sandbox, **LIVE) as live:
        Page(get(live, "/pay", query), 403)


def test_what_messengers_add_to_a_link_does_not_matter(shop: Shop) -> None:
    page = form(shop, link(shop) + "&utm_source=chat&fbclid=x&customer_name=Eve")
    assert page.fields["customer_name"] == ""
    went_to(send(shop, page))


def test_a_link_whose_time_is_over_begins_no_payment(shop: Shop) -> None:
    for order in ("", "1001"):
        query = link(shop, order=order, expires=str(int(time.time()) - 1))
        assert Page(get(shop, "/pay", query), 410).heading == "This payment link has ended"
        Page(post(shop, {**TYPED, **dict(parse_qsl(query))}), 410)
    assert payments(shop) == []


def test_a_link_without_an_order_is_for_everyone(shop: Shop) -> None:
    query = link(shop)
    assert went_to(send(shop, form(shop, query))) != went_to(send(shop, form(shop, query)))
    assert len(payments(shop)) == 2


def test_a_link_in_a_currency_that_is_no_longer_taken_says_so(shop: Shop) -> None:
    query = link(shop, currency="USD")
    page = Page(send(shop, form(shop, query)), 422)
    assert "currency must be one of NGN" in page.text


def test_a_link_with_an_order_is_one_payment_for_whoever_opens_it(shop: Shop) -> None:
    query = link(shop, order="1001")
    mine, yours = form(shop, query), form(shop, query)
    url = went_to(send(shop, mine))
    assert went_to(send(shop, yours, customer_name="Jane Doe", customer_email="jane@example.com")) == url
    payment = only_payment(shop)
    assert went_to(get(shop, "/pay", query)) == f"/pay/{payment['id']}"
    assert shop.sandbox.calls("initialize") == 1
    shop.pay(payment["reference"])
    assert went_to(send(shop, yours)) == went_to(get(shop, "/pay", query)) == f"/pay/{payment['id']}"
    assert "John" not in payment_page(shop, payment).text


def test_an_order_s_link_shows_the_receipt_after_its_own_time(shop: Shop) -> None:
    query = link(shop, order="1001", expires=str(int(time.time()) + 2))
    went_to(send(shop, form(shop, query)))
    time.sleep(2)
    assert went_to(get(shop, "/pay", query)) == f"/pay/{only_payment(shop)['id']}"


def test_two_who_send_an_order_s_link_at_once_have_one_payment(shop: Shop) -> None:
    page = form(shop, link(shop, order="1001"))
    works = [lambda name=name: send(shop, page, customer_name=name) for name in ("John Doe", "Jane Doe") * 4]
    places = {went_to(answer) for answer in at_once(works)}
    payment = only_payment(shop)
    assert places <= {payment["checkout_url"], f"/pay/{payment['id']}", f"/pay/{payment['id']}?go=on"}


def test_an_order_whose_payment_ended_unpaid_can_be_tried_again(shop: Shop) -> None:
    query = link(shop, order="1001")
    went_to(send(shop, form(shop, query)))
    first = only_payment(shop)
    end_time(shop.database_url, first["id"])
    look(shop)
    assert shop.get(first["id"])["status"] == "expired"
    page = form(shop, query)
    assert "Your earlier try ended unpaid" in page.text
    went_to(send(shop, page))
    _, second = payments(shop)
    assert went_to(get(shop, "/pay", query)) == f"/pay/{second['id']}"
    shop.pay(first["reference"])  # late, and it counts
    assert went_to(get(shop, "/pay", query)) == f"/pay/{first['id']}"
    assert len(payments(shop)) == 2


def test_an_order_is_not_tried_again_once_its_link_is_over(shop: Shop) -> None:
    query = link(shop, order="1001", expires=str(int(time.time()) + 2))
    went_to(send(shop, form(shop, query)))
    end_time(shop.database_url, only_payment(shop)["id"])
    look(shop)
    time.sleep(2)
    Page(get(shop, "/pay", query), 410)


def test_an_order_is_not_tried_without_end(shop: Shop) -> None:
    query = link(shop, order="1001")
    for _ in range(pages.MOST_TRIES):
        went_to(send(shop, form(shop, query)))
        shop.sql("UPDATE payments SET status = 'expired'")
    assert went_to(get(shop, "/pay", query)) in {f"/pay/{payment['id']}" for payment in payments(shop)}
    assert len(payments(shop)) == pages.MOST_TRIES


def test_a_corrected_price_is_what_its_link_asks_for(shop: Shop) -> None:
    wrong, right = link(shop, order="1001", amount="750.00"), link(shop, order="1001")
    went_to(send(shop, form(shop, wrong)))
    went_to(send(shop, form(shop, right)))
    first, second = payments(shop)
    assert (first["amount_minor"], second["amount_minor"]) == (75000, 7500)
    assert went_to(get(shop, "/pay", wrong)) == f"/pay/{first['id']}"
    assert went_to(get(shop, "/pay", right)) == f"/pay/{second['id']}"
    shop.pay(second["reference"])
    assert went_to(get(shop, "/pay", wrong)) == f"/pay/{second['id']}"  # the order is paid


def test_an_order_that_could_not_be_opened_goes_on_where_it_stopped(shop: Shop) -> None:
    query = link(shop, order="1001")
    shop.sandbox.fault("initialize", "lost-request", times=2)
    Page(send(shop, form(shop, query)), 503)
    page = form(shop, query)
    assert "You have started this payment before" in page.text
    assert set(page.fields) == {"key", "amount", "currency", "description", "order", "signature"}
    assert went_to(send(shop, page)) == only_payment(shop)["checkout_url"]


# The payment's page


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
        make_due(shop.database_url)
        shop.sql("UPDATE refunds SET look_at = now() WHERE look_at IS NOT NULL")
        worker_of(shop).look()
        worker_of(shop).look_at_refunds()
    return payment


def declined(shop: Shop) -> dict[str, Any]:
    payment = shop.created()
    shop.sandbox.decline(payment["reference"])
    look(shop)
    return payment


def ended(shop: Shop, payment: dict[str, Any]) -> dict[str, Any]:
    end_time(shop.database_url, payment["id"])
    look(shop)
    return payment


def accepted(shop: Shop) -> dict[str, Any]:
    payment = paid(shop, customer_email="underpaid@example.com")
    found = db.find_payment(shop.app.database, payment["id"])
    assert found is not None
    db.accept(shop.app.database, found, "operator:john", "close enough")
    return payment


STATES: dict[str, tuple[Callable[[Shop], dict[str, Any]], str, str]] = {
    # state: (how it comes about, the heading, a word of what happens next)
    "pending": (lambda shop: shop.created(), "Not paid yet", "come back here for your receipt"),
    "declined": (declined, "Your last try was declined", "Insufficient Funds"),
    "failed": (lambda shop: ended(shop, declined(shop)), "This payment did not work", "Insufficient Funds"),
    "expired": (lambda shop: ended(shop, shop.created()), "The time to pay has ended", "Nothing was paid"),
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


@pytest.mark.parametrize("state", STATES)
def test_the_page_says_what_has_become_of_the_money_and_what_happens_next(counter: Shop, state: str) -> None:
    make, heading, word = STATES[state]
    payment = make(counter)
    page = payment_page(counter, payment)
    assert page.heading == heading
    assert "NGN\u00a050.00" in page.title
    assert "Example Shop" in page.title
    assert word in page.text
    assert page.find("div", id="state")["class"] == state
    assert page.find("div", role="status")
    assert page.facts["Reference"] == payment["reference"]
    is_open = state in ("pending", "declined")
    assert page.links[:1] == ([payment["checkout_url"]] if is_open else [])
    assert page.is_live == is_open
    assert bool(page.all("button")) == (
        state in ("completed", "accepted", "partially_refunded", "refunded", "refund_failed")
    )


@pytest.mark.parametrize("state", STATES)
def test_no_page_shows_anybody_s_data(counter: Shop, state: str) -> None:
    make = STATES[state][0]
    text = payment_page(counter, make(counter)).answer.text
    for word in ("John", "Doe", "@", "example.com", "801", "Lagos", "operator"):
        assert word not in text


@pytest.mark.parametrize(
    ("currency", "amount", "shown"),
    [
        ("NGN", "1234567.5", "NGN\u00a01,234,567.50"),
        ("GHS", "999", "GHS\u00a0999.00"),
        ("KES", "1000", "KES\u00a01,000.00"),
        ("ZAR", "999999999999.99", "ZAR\u00a0999,999,999,999.99"),
        ("USD", "2.5", "USD\u00a02.50"),
        ("XOF", "125000", "XOF\u00a0125,000"),
    ],
)
def test_amounts_are_written_for_people(open_shop: OpenShop, currency: str, amount: str, shown: str) -> None:
    shop = open_shop(CURRENCIES="NGN,GHS,KES,ZAR,USD,XOF")
    payment = shop.created(currency=currency, amount=amount)
    page = payment_page(shop, payment)
    assert f"Pay {shown}" in page.of("a")
    shop.pay(payment["reference"])
    assert payment_page(shop, payment).facts["Paid"] == shown
    assert form(shop, link(shop, currency=currency, amount=amount)).heading == shown


def test_a_receipt_says_what_was_paid_with_fees_and_given_back(counter: Shop) -> None:
    plain = payment_page(counter, paid(counter, description="Two bags of rice"))
    assert "Two bags of rice" in plain.text
    assert list(plain.facts) == ["Paid", "Paid on", "Reference"]
    assert re.fullmatch(r"\d{1,2} \w+ \d{4}, \d\d:\d\d UTC", plain.facts["Paid on"])
    assert plain.find("time")["datetime"].endswith("Z")
    fees = payment_page(counter, paid(counter, customer_email="pays-fees@example.com", amount=5000)).facts
    assert fees["Price"] == "NGN\u00a05,000.00"
    assert fees["Paid, with fees"] > fees["Price"]
    back = payment_page(counter, refunded(counter, 2000)).facts
    assert (back["Paid"], back["Refunded"]) == ("NGN\u00a050.00", "NGN\u00a020.00")


def test_sums_that_may_be_in_another_currency_stay_out_of_the_receipt(counter: Shop) -> None:
    payment = paid(counter, customer_email="other-currency@example.com")
    assert payment_page(counter, payment).find("div", id="state")["class"] == "review"
    counter.sandbox.dashboard_refund(payment["reference"])
    counter.sandbox.move_refund(payment["reference"], "processed")
    counter.deliver(payment["reference"], "refund.processed")
    look(counter)
    page = payment_page(counter, payment)
    assert page.heading == "Refunded"
    assert list(page.facts) == ["Price", "Paid on", "Reference"]


def test_who_comes_back_from_the_checkout_is_not_asked_to_pay_again(counter: Shop) -> None:
    payment = declined(counter)  # and then paid with a second card, of which we have not heard yet
    page = payment_page(counter, payment, f"trxref={payment['reference']}&reference={payment['reference']}")
    assert page.heading == "Your payment is being confirmed"
    assert "do not pay twice" in page.text
    assert 'class="button"' not in page.answer.text
    assert page.links[0] == payment["checkout_url"]  # for whoever had not finished
    assert page.is_live


def test_whoever_wants_to_can_stop_the_page_from_loading_itself(counter: Shop) -> None:
    payment = counter.created()
    page = payment_page(counter, payment)
    assert page.links[-1] == "?refresh=off"
    still = payment_page(counter, payment, "refresh=off")
    assert not still.is_live
    assert "?refresh=off" not in still.links


def test_after_an_end_the_page_says_where_to_begin_again(open_shop: OpenShop) -> None:
    shop = open_shop(PAY_FORM="on", RETURN_URL_ORIGINS="https://shop.example.com")
    went_to(send(shop, form(shop)))
    assert "/pay" in payment_page(shop, ended(shop, payments(shop)[-1])).links
    went_to(send(shop, form(shop, link(shop))))
    assert "open the payment link" in payment_page(shop, ended(shop, payments(shop)[-1])).text
    assert "go back to where you ordered" in payment_page(shop, ended(shop, shop.created())).text
    payment = ended(shop, shop.created(return_url="https://shop.example.com/thanks?order=7#top"))
    [back] = payment_page(shop, payment).links
    assert back == f"https://shop.example.com/thanks?order=7&payment={payment['id']}#top"


def test_a_page_that_there_is_not_says_what_to_do(shop: Shop) -> None:
    page = Page(get(shop, NOWHERE, "reference=x"), 404)
    assert page.title == "There is nothing here"
    assert "your money is not lost" in page.text
    assert Page(get(shop, "/pay/x"), 404).text == page.text


def test_pages_say_test_in_test_mode_alone(database_url: str) -> None:
    with Sandbox(LIVE["PAYSTACK_SECRET_KEY"]) as sandbox, Shop(database_url, sandbox, PAY_FORM="on", **LIVE) as live:
        payment = live.created()
        for page in (form(live), form(live, link(live)), payment_page(live, payment)):
            assert "TEST" not in page.text
    live_settings = {**LIVE, "PAYSTACK_SECRET_KEY": SECRET_KEY}
    with Sandbox(SECRET_KEY) as sandbox, Shop(database_url, sandbox, PAY_FORM="on", **live_settings) as test:
        for page in (form(test), form(test, link(test)), payment_page(test, test.created())):
            assert page.of("strong").startswith("TEST")
        assert "TEST" not in payment_page(test, payment).text  # it is that payment's mode which counts


def test_below_a_path_of_the_public_url_everything_is_found(open_shop: OpenShop) -> None:
    shop = open_shop(PAY_FORM="on", PUBLIC_URL="https://pay.example.com/shop")
    page = form(shop)
    assert page.find("form")["action"] == "/shop/pay?sent=on"
    assert page.find("link", rel="stylesheet")["href"].startswith("/shop/paygate.css?")
    went_to(send(shop, page))
    payment = only_payment(shop)
    shop.pay(payment["reference"])
    assert went_to(send(shop, page)) == f"/shop/pay/{payment['id']}"
    assert payment_page(shop, payment).find("script")["src"].startswith("/shop/paygate.js?")


# What they are made of


def test_the_pages_load_little_and_nothing_from_elsewhere(counter: Shop) -> None:
    page = payment_page(counter, counter.created())
    sizes = {"page": len(page.answer.text.encode()), "form": len(form(counter).answer.text.encode())}
    for attrs in (*page.all("link"), *page.all("script")):
        path, _, version = (attrs.get("src") or attrs["href"]).partition("?")
        asset = get(counter, path, version)
        assert asset.status_code == 200
        assert asset.headers["x-content-type-options"] == "nosniff"
        assert asset.headers["cache-control"] == "public, max-age=86400"
        assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", asset.text)
        sizes[path] = len(asset.content)
    assert sum(sizes.values()) < 20_000, sizes


def test_every_block_is_used_and_every_state_has_one() -> None:
    blocks = pages.read_blocks("payment.html")
    known = {"payment", "fact", "opening", "confirming", "late", "print", "shop", "live", *STATES}
    known |= {f"again_{source}" for source in ("api", "form", "link")}
    known |= {f"{state}_next" for state in ("opening", "pending", "declined", "confirming", "review")}
    assert set(blocks) == known


def test_texts_are_escaped_wherever_they_come_from(open_shop: OpenShop) -> None:
    evil = '<i>"Shop"</i> {0.__class__} %s &amp;'
    shop = open_shop(PAY_FORM="on", MERCHANT_NAME=evil)
    payment = shop.created(description=evil)
    shop.sql("UPDATE payments SET status_reason = %s WHERE id = %s", f"last try declined: {evil}", payment["id"])
    for page in (payment_page(shop, payment), form(shop), form(shop, link(shop, description=evil, order=evil))):
        assert not page.all("i")
        assert evil in page.text
    Page(get(shop, "/pay", urlencode({"signature": evil})), 403)
