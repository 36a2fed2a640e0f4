# ruff: noqa: F811  (fixtures are imported by their names)
"""What a customer who is stuck finds on the page: what is wrong, once, and the way back to the shop."""

from collections.abc import Callable
from urllib.parse import urlencode

import falcon.testing

from backstage import poll
from shop import ORDER, Shop, open_shop, sandbox, shop  # noqa: F401

TYPED = {**ORDER, "amount": "50"}


def sent(shop: Shop, **typed: str) -> falcon.testing.Result:
    return shop.client.simulate_post(
        "/pay", body=urlencode({**TYPED, **typed}), headers={"Content-Type": "application/x-www-form-urlencoded"}
    )


def test_what_is_wrong_is_said_once_beside_its_field_and_linked_from_above(open_shop: Callable[..., Shop]) -> None:
    text = sent(open_shop(PAY_FORM="on"), amount="fifteen", customer_email="john@").text
    for label, name, wrong in (
        ("Amount in NGN", "amount", "must be clear: write it like 1500 or 1,500.50"),
        ("E-mail", "customer_email", "must be an e-mail address such as john@example.com"),
    ):
        assert text.count(wrong) == 1
        assert f'<p class="problem" id="{name}-problem">{label} {wrong}</p>' in text
        assert f'<a href="#{name}">{label}</a>' in text


def test_what_is_wrong_with_no_field_of_the_form_is_said_above_it(open_shop: Callable[..., Shop]) -> None:
    text = sent(open_shop(PAY_FORM="on"), currency="USD").text
    assert text.count("<p>currency must be ") == 1
    assert "#currency" not in text


def test_a_customer_who_gives_up_finds_the_way_back_to_the_shop(open_shop: Callable[..., Shop]) -> None:
    shop = open_shop(RETURN_URL_ORIGINS="https://shop.example.com", MERCHANT_NAME="Example Shop")
    payment = shop.created(return_url="https://shop.example.com/thanks?order=7")
    back = f'href="https://shop.example.com/thanks?order=7&amp;payment={payment["id"]}">Back to Example Shop</a>'
    page = f"/pay/{payment['id']}"
    assert back in shop.client.simulate_get(page).text
    shop.sandbox.decline(payment["reference"])
    poll(shop)
    text = shop.client.simulate_get(page).text
    assert "Your last try was declined" in text
    assert back in text
