# ruff: noqa: F811  (fixtures are imported by their names)
"""Signed payment links: what they fix, when they are refused, and one payment for one order."""

import time
from urllib.parse import parse_qsl, urlencode

import pytest

from backstage import at_once, end_time, poll
from customer import (  # noqa: F401  # fixtures
    TYPED,
    Page,
    counter,
    form,
    get,
    in_an_hour,
    link,
    only_payment,
    payment_page,
    payments,
    post,
    send,
    went_to,
)
from local.sandbox import Sandbox
from shop import LIVE, Shop, open_shop, sandbox, shop  # noqa: F401  # fixtures
from web.form import MOST_TRIES
from web.links import Link
from web.orders import Fields


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


def test_what_is_left_of_a_link_is_not_the_free_form(counter: Shop) -> None:
    query = link(counter, order="1001", expires="4102444800")
    unsigned = query.rpartition("&signature=")[0]
    cut = [query[:length] for length in range(1, len(query))]
    for left in (unsigned, unsigned + "&signature=", query.replace("&", "&amp;"), unsigned + "&amount=1", *cut):
        assert Page(get(counter, "/pay", left), 403).heading == "This payment link has been changed"
    for name in ("description", "order", "expires", "signature", "amp;order", "amp;signature"):
        Page(post(counter, {**TYPED, name: ""}), 403)
    assert payments(counter) == []
    assert form(counter, "utm_source=chat&fbclid=x").heading == "Pay Example Shop"


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
    ],
)
def test_what_would_keep_customers_from_paying_is_told_when_a_link_is_made(shop: Shop, member: str, value: str) -> None:
    asked = {"amount": "75.00", "currency": "NGN", "description": "A hat", "order": "1001"}
    assert errors_of(shop, asked) == []
    assert errors_of(shop, {**asked, member: value}) == [member]


def errors_of(shop: Shop, asked: dict[str, str]) -> list[str]:
    fields = Fields(asked)
    Link.asked_for(fields, shop.settings)
    return list(fields.errors)


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
    poll(shop)
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
    poll(shop)
    time.sleep(2)
    Page(get(shop, "/pay", query), 410)


def test_an_order_is_not_tried_without_end(shop: Shop) -> None:
    query = link(shop, order="1001")
    for _ in range(MOST_TRIES):
        went_to(send(shop, form(shop, query)))
        shop.sql("UPDATE payments SET status = 'expired'")
    assert went_to(get(shop, "/pay", query)) in {f"/pay/{payment['id']}" for payment in payments(shop)}
    assert len(payments(shop)) == MOST_TRIES


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
