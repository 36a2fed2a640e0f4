# ruff: noqa: F811  (fixtures are imported by their names)
"""What the customer keeps: the receipt says what an account-book needs, and whom to turn to."""

import re

import pytest

import refunds
from backstage import poll, worker_of
from customer import NOWHERE, Page, counter, form, get, link, payment_page  # noqa: F401  # fixtures
from shop import CARD, OpenShop, Shop, open_shop, sandbox, shop  # noqa: F401  # fixtures
from states import accepted, paid, refunded

WHEN = r"\d{1,2} \w+ \d{4}, \d\d:\d\d UTC"


def test_a_receipt_says_what_was_paid_how_when_and_for_which_order(counter: Shop) -> None:
    payment = paid(counter, description="Two bags of rice", metadata={"order": "1001", "note": "blue"})
    page = payment_page(counter, payment)
    assert "Two bags of rice" in page.text
    assert list(page.facts) == ["Receipt", "Order", "Paid", "Paid on", "Paid by", "Reference"]
    assert page.facts | {"Order": "1001", "Paid": "NGN\u00a050.00", "Paid by": "card"} == page.facts
    assert re.fullmatch(WHEN, page.facts["Paid on"])
    assert re.fullmatch(r"[-0-9]{10}T[:0-9]{8}[+-]\d\d:\d\d", page.find("time")["datetime"])
    assert "blue" not in page.text


def test_the_receipt_s_number_is_how_its_reference_begins(counter: Shop) -> None:
    facts = payment_page(counter, paid(counter)).facts
    assert re.fullmatch("[0-9A-Z]{10}", facts["Receipt"])
    assert facts["Reference"].startswith(f"PG-{facts['Receipt']}")


def test_what_is_not_paid_is_no_receipt(counter: Shop) -> None:
    assert list(payment_page(counter, counter.created(metadata={"order": "1001"})).facts) == [
        *("Order", "Pay until", "Reference")
    ]


def test_a_receipt_tells_fees_from_the_price(counter: Shop) -> None:
    fees = payment_page(counter, paid(counter, customer_email="pays-fees@example.com", amount=5000)).facts
    assert fees["Price"] == "NGN\u00a05,000.00"
    assert fees["Paid, with fees"] > fees["Price"]


@pytest.mark.parametrize(
    ("channel", "shown"), [("mobile_money", "mobile money"), ("cowrie_shells", "cowrie shells"), (None, None)]
)
def test_a_receipt_says_how_it_was_paid_as_the_provider_names_it(
    counter: Shop, channel: str | None, shown: str | None
) -> None:
    payment = counter.created()
    counter.sandbox.alter(payment["reference"], channel=channel)
    counter.pay(payment["reference"])
    assert payment_page(counter, payment).facts.get("Paid by") == shown


def test_a_receipt_says_nothing_of_the_card(counter: Shop) -> None:
    text = payment_page(counter, paid(counter)).text
    for word in (CARD, CARD[-4:], CARD[:6], "visa", "TEST BANK"):
        assert word not in text


def test_each_refund_is_on_the_receipt_with_its_date_and_so_is_what_is_on_its_way(counter: Shop) -> None:
    payment = refunded(counter, 2000)
    facts = payment_page(counter, payment).facts
    assert re.fullmatch(rf"NGN\u00a020\.00 {WHEN}", facts["Refunded"])
    assert facts.keys().isdisjoint({"Refunded in all", "On its way back"})
    counter.sandbox.dashboard_refund(payment["reference"], 500)
    counter.deliver(payment["reference"], "refund.pending")
    poll(counter)
    facts = payment_page(counter, payment).facts
    assert re.fullmatch(rf"NGN\u00a05\.00 since {WHEN}", facts["On its way back"])
    assert re.fullmatch(rf"NGN\u00a020\.00 {WHEN}", facts["Refunded"])
    counter.sandbox.move_refund(payment["reference"], "processed")
    counter.deliver(payment["reference"], "refund.processed")
    counter.sql("UPDATE refunds SET poll_at = now() WHERE poll_at IS NOT NULL")
    worker_of(counter).poll_refunds()
    facts = payment_page(counter, payment).facts
    assert "On its way back" not in facts
    assert re.fullmatch(rf"NGN\u00a020\.00 {WHEN} NGN\u00a05\.00 {WHEN}", facts["Refunded"])
    assert facts["Refunded in all"] == "NGN\u00a025.00"


def test_a_refund_that_may_never_be_made_is_not_said_to_be_on_its_way(counter: Shop) -> None:
    payment = paid(counter)
    counter.sandbox.fault("refund", "lost-request")
    request = refunds.Request(payment["id"], "20", "operator:john")
    made = refunds.refund(counter.app.database, counter.app.gateway, request)
    assert made.status == "unanswered"
    assert list(payment_page(counter, payment).facts) == ["Receipt", "Paid", "Paid on", "Paid by", "Reference"]
    failed = payment_page(counter, refunded(counter, 2000, "failed"))
    assert failed.facts.keys().isdisjoint({"Refunded", "On its way back"})
    assert failed.heading == "A refund did not go through"


def test_a_review_shows_what_came_and_what_was_asked_in_the_currency_of_each(counter: Shop) -> None:
    payment = paid(counter, customer_email="other-currency@example.com")
    (charge,) = counter.sql("SELECT * FROM charges WHERE reference = %s", payment["reference"])
    assert charge["currency"] != "NGN"
    came = f"{charge['currency']}\u00a0{charge['amount_minor'] / 100:,.2f}"
    page = payment_page(counter, payment)
    assert page.find("div", id="state")["class"] == "review"
    assert list(page.facts) == ["Asked for", "Arrived", "Arrived on", "Paid by", "Reference"]
    assert (page.facts["Asked for"], page.facts["Arrived"]) == ("NGN\u00a050.00", came)
    counter.sandbox.dashboard_refund(payment["reference"])
    counter.sandbox.move_refund(payment["reference"], "processed")
    counter.deliver(payment["reference"], "refund.processed")
    poll(counter)
    page = payment_page(counter, payment)
    assert page.heading == "Refunded"
    assert list(page.facts) == ["Receipt", "Price", "Paid", "Paid on", "Paid by", "Refunded", "Reference"]
    assert page.facts["Refunded"].startswith(came)


def test_what_came_and_was_accepted_is_a_receipt_that_names_the_price_too(counter: Shop) -> None:
    facts = payment_page(counter, accepted(counter)).facts
    assert facts["Price"] == "NGN\u00a050.00"
    assert facts["Paid"] != facts["Price"]
    assert "Receipt" in facts


# Whom to turn to


@pytest.mark.parametrize(
    ("contact", "url", "shown"),
    [
        ("+234 801-234 5678", "tel:+2348012345678", "+234 801-234 5678"),
        ("(0801) 234 5678", "tel:08012345678", "(0801) 234 5678"),
        ("help@shop.example.com", "mailto:help@shop.example.com", "help@shop.example.com"),
        ("https://shop.example.com/?a=1&b=@x", "https://shop.example.com/?a=1&b=@x", "shop.example.com/?a=1&b=@x"),
    ],
)
def test_every_page_says_who_answers_questions(open_shop: OpenShop, contact: str, url: str, shown: str) -> None:
    shop = open_shop(PAY_FORM="on", MERCHANT_NAME="Example Shop", MERCHANT_CONTACT=contact)
    for page in (
        form(shop),
        form(shop, link(shop)),
        payment_page(shop, shop.created()),
        payment_page(shop, paid(shop)),
        Page(get(shop, NOWHERE), 404),
        Page(get(shop, "/", Accept="text/html")),
    ):
        assert page.links[-1] == url
        assert page.of("p").endswith("Questions? Ask Example Shop:")
        assert shown in page.text


def test_without_a_contact_the_merchant_s_name_is_all_there_is(open_shop: OpenShop) -> None:
    assert "Questions? Ask Example Shop." in form(open_shop(PAY_FORM="on", MERCHANT_NAME="Example Shop")).text
    assert "Questions? Ask the merchant." in form(open_shop(PAY_FORM="on")).text
