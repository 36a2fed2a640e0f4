# ruff: noqa: F811  (fixtures are imported by their names)
"""The payment's page, by what HTML shows: what has become of the money, and what can be done next."""

import re
from datetime import datetime
from urllib.parse import urlencode
from zoneinfo import ZoneInfo

import pytest

from answers import guarded
from backstage import poll
from customer import (  # noqa: F401  # fixtures
    NOWHERE,
    Page,
    counter,
    form,
    get,
    link,
    only_payment,
    page_of,
    payment_page,
    payments,
    send,
    went_to,
)
from local.sandbox import Sandbox
from shop import LIVE, SECRET_KEY, UNKNOWN_ID, OpenShop, Shop, open_shop, sandbox, shop  # noqa: F401  # fixtures
from states import STATES, declined, ended, paid

# The customer's page


def test_the_page_says_what_is_paid_to_whom_and_leads_to_the_checkout(open_shop: OpenShop) -> None:
    shop = open_shop(MERCHANT_NAME="Mama Put & Sons")
    payment = shop.created(amount=1234.5, description="Rice & beans")
    answer = page_of(shop, payment["id"])
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    guarded(answer)
    for text in ("1,234.50", "NGN", "Mama Put &amp; Sons", "Rice &amp; beans", "TEST", payment["reference"]):
        assert text in answer.text
    assert f'href="{payment["checkout_url"]}"' in answer.text
    assert '<meta http-equiv="refresh"' in answer.text
    assert page_of(shop, payment["id"] + "/").text == answer.text


def test_the_page_of_a_paid_payment_is_its_receipt(shop: Shop) -> None:
    payment = shop.created()
    shop.pay(payment["reference"])
    text = page_of(shop, payment["id"]).text
    assert "Paid" in text
    assert "50.00" in text
    assert payment["checkout_url"] not in text
    assert "http-equiv" not in text


def test_the_page_says_why_the_last_try_failed(shop: Shop) -> None:
    payment = shop.created()
    reason = "last try declined: Insufficient Funds"
    shop.sql("UPDATE payments SET status_reason = %s WHERE id = %s", reason, payment["id"])
    assert "Insufficient Funds" in page_of(shop, payment["id"]).text


def test_a_page_says_test_in_test_mode_alone(database_url: str) -> None:
    with Sandbox(LIVE["PAYSTACK_SECRET_KEY"]) as sandbox, Shop(database_url, sandbox, **LIVE) as shop:
        assert "TEST" not in page_of(shop, shop.created()["id"]).text


def test_the_page_shows_nobodys_data(shop: Shop) -> None:
    payment = shop.created(metadata={"order": "1001", "note": "wombat-7"})
    shop.pay(payment["reference"])
    for word in ("John", "john@", "801", "wombat"):
        assert word not in page_of(shop, payment["id"]).text


def test_the_page_escapes_what_was_sent(open_shop: OpenShop) -> None:
    shop = open_shop(MERCHANT_NAME='<i>"Shop"</i>')
    payment = shop.created(description="<script>alert(1)</script> {0.__class__} {merchant} %s")
    text = page_of(shop, payment["id"]).text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; {0.__class__} {merchant} %s" in text
    assert "<script>" not in text
    assert "<i>" not in text


def test_a_page_has_a_policy_without_inline_code_that_lets_the_checkout_through(shop: Shop) -> None:
    answer = page_of(shop, shop.created()["id"])
    policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert "https://checkout.paystack.com" in policy["form-action"].split()
    assert shop.sandbox.url in policy["form-action"].split()
    assert policy["frame-ancestors"] == "'none'"
    assert "unsafe-inline" not in answer.headers["content-security-policy"]
    assert not re.search(r"<script>|<style|style=|\son\w+=", answer.text)


def test_nothing_on_a_page_is_loaded_from_another_host(shop: Shop) -> None:
    text = page_of(shop, shop.created()["id"]).text
    loaded = re.findall(r'<(?:link|img|script|iframe)\b[^>]*?(?:href|src)="([^"]*)"', text)
    assert "/static/paygate.css" in [address.partition("?")[0] for address in loaded]
    for address in loaded:
        assert re.match(r"/[^/]", address)
        answer = shop.client.simulate_get(address)
        assert answer.status_code == 200
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"(?:url\(|@import|src=|href=)[\s\"']*(?:https?:)?//", answer.text)


def test_the_customer_who_comes_back_from_the_checkout_goes_on_to_the_shop(open_shop: OpenShop) -> None:
    shop = open_shop(RETURN_URL_ORIGINS="https://shop.example.com")
    payment = shop.created(return_url="https://shop.example.com/thanks?order=7#top")
    for parameters in ("trxref=x&reference=x", "reference=x", "trxref=x"):
        answer = page_of(shop, payment["id"], parameters)
        assert answer.status_code == 303
        assert answer.headers["location"] == f"https://shop.example.com/thanks?order=7&payment={payment['id']}#top"
        guarded(answer)
    assert page_of(shop, payment["id"]).status_code == 200
    odd = shop.created(return_url='https://shop.example.com/?b={x}|y"')
    address = f"https://shop.example.com/?b=%7Bx%7D%7Cy%22&payment={odd['id']}"
    assert page_of(shop, odd["id"], "reference=x").headers["location"] == address
    plain = shop.created(return_url="https://shop.example.com")
    assert page_of(shop, plain["id"], "reference=x").headers["location"].endswith(f"example.com?payment={plain['id']}")


def test_without_a_return_url_the_customer_stays_on_the_page(shop: Shop) -> None:
    payment = shop.created()
    answer = page_of(shop, payment["id"], f"trxref={payment['reference']}&reference={payment['reference']}")
    assert answer.status_code == 200
    assert shop.get(payment["id"])["status"] == "pending"  # the redirect proves nothing


def test_an_unknown_page_is_a_page_too(shop: Shop) -> None:
    answer = page_of(shop, UNKNOWN_ID, "reference=x")
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("text/html")
    assert "content-security-policy" in answer.headers
    guarded(answer)
    assert page_of(shop, "x").text == answer.text


# The payment's page


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


def test_a_cancelled_order_s_page_leads_to_no_checkout_and_becomes_a_receipt_if_money_comes(counter: Shop) -> None:
    payment = STATES["cancelled"][0](counter)
    for query in ("", "reference=x", "go=on"):
        page = payment_page(counter, payment, query)
        assert page.heading == "This order was cancelled"
        assert payment["checkout_url"] not in page.answer.text
        assert list(page.facts) == ["Started on", "Reference"]
    poll(counter)
    assert payment_page(counter, payment).heading == "This order was cancelled"
    counter.pay(payment["reference"])
    assert payment_page(counter, payment).heading == "Paid"


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
    assert page.find("link", rel="stylesheet")["href"].startswith("/shop/static/paygate.css?")
    went_to(send(shop, page))
    payment = only_payment(shop)
    shop.pay(payment["reference"])
    assert went_to(send(shop, page)) == f"/shop/pay/{payment['id']}"
    assert payment_page(shop, payment).find("script")["src"].startswith("/shop/static/paygate.js?")


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


def test_texts_are_escaped_wherever_they_come_from(open_shop: OpenShop) -> None:
    evil = '<i>"Shop"</i> {0.__class__} %s &amp;'
    shop = open_shop(PAY_FORM="on", MERCHANT_NAME=evil)
    payment = shop.created(description=evil)
    shop.sql("UPDATE payments SET status_reason = %s WHERE id = %s", f"last try declined: {evil}", payment["id"])
    for page in (payment_page(shop, payment), form(shop), form(shop, link(shop, description=evil, order=evil))):
        assert not page.all("i")
        assert evil in page.text
    Page(get(shop, "/pay", urlencode({"signature": evil})), 403)


def test_dates_are_written_in_the_merchant_s_zone(open_shop: OpenShop) -> None:
    shop = open_shop(TIMEZONE="Africa/Lagos")
    page = payment_page(shop, paid(shop))
    told = datetime.strptime(page.facts["Paid on"], "%d %B %Y, %H:%M WAT").replace(tzinfo=ZoneInfo("Africa/Lagos"))
    assert told == datetime.fromisoformat(page.find("time")["datetime"]).replace(second=0)
