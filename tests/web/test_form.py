# ruff: noqa: F811  (fixtures are imported by their names)
"""The payment form, by what HTML shows: what it takes, what it says, and when a payment begins."""

import time

import pytest

from backstage import at_once, end_time, meanwhile
from customer import NOWHERE, TYPED, Page, counter, form, get, only_payment, payments, post, send, went_to  # noqa: F401
from shop import OpenShop, Shop, open_shop, sandbox, shop  # noqa: F401  # fixtures

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
    assert page.described("amount") == "Such as 1500"


def test_each_error_stands_beside_its_field_and_above_with_what_was_typed_kept(counter: Shop) -> None:
    page = Page(send(counter, form(counter), amount="1,50", customer_email="john@", location=" "), 422)
    assert page.title == "Error: Pay Example Shop"
    assert page.fields | {"amount": "1,50", "customer_email": "john@", "customer_name": "John Doe"} == page.fields
    wrong = ["amount", "customer_email", "location"]
    assert [name for name in page.fields if "aria-invalid" in page.find("input", name=name)] == wrong
    assert page.described("amount").endswith("Amount in NGN must be clear: write it like 1500 or 1,500.50")
    assert page.described("customer_email") == "E-mail must be an e-mail address such as john@example.com"
    assert page.links == [f"#{name}" for name in wrong]
    summary = page.find("div", role="alert")
    assert summary | {"tabindex": "-1", "autofocus": ""} == summary
    assert went_to(send(counter, page, amount="1500", customer_email="john@example.com", location="Lagos"))
    assert only_payment(counter)["amount_minor"] == 150000


@pytest.mark.parametrize(
    "typed",
    [
        *("1,500", "1 500", "1\u00a0500", "1'500.00", "₦1500", "₦ 1,500.00", "N1,500", "NGN 1,500.00", "ngn1500"),
        *("1500 NGN", " 1500.0 ", "1500.000", "\u200e1,500\u202c"),
    ],
)
def test_an_amount_is_read_as_people_write_it(counter: Shop, typed: str) -> None:
    went_to(post(counter, {**TYPED, "amount": typed}))
    assert only_payment(counter)["amount_minor"] == 150000


@pytest.mark.parametrize(
    "typed", ["1,50", "1.500", "1,5000", "15,00", "1 50", "1.500,00", "$1500", "USD 1500", "1,500 000", "fifteen", "₦"]
)
def test_an_amount_that_may_mean_two_is_asked_for_again(counter: Shop, typed: str) -> None:
    page = Page(post(counter, {**TYPED, "amount": typed}), 422)
    assert page.described("amount").endswith("Amount in NGN must be clear: write it like 1500 or 1,500.50")
    assert payments(counter) == []


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
        ("", {}, 422),
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
