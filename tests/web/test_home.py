# ruff: noqa: F811  (fixtures are imported by their names)
"""The first page: whoever opens the address in a browser is told what is there; an API's client, that nothing is."""

from collections.abc import Callable

import falcon.testing
import pytest

from shop import Shop, open_shop, sandbox, shop  # noqa: F401

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
LIVE = {"PAYSTACK_SECRET_KEY": "sk_live_0123456789abcdef", "PUBLIC_URL": "https://pay.example.com/shop"}


def home(shop: Shop) -> falcon.testing.Result:
    answer: falcon.testing.Result = shop.client.simulate_get("/", headers=BROWSER)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["cache-control"] == "no-store"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    return answer


def test_it_leads_to_the_api_the_form_and_the_sandbox(open_shop: Callable[..., Shop]) -> None:
    shop = open_shop(PAY_FORM="on", MERCHANT_NAME="<i>Shop</i>")
    text = home(shop).text
    for address in ("/docs", "/pay", "/desk"):
        assert f'href="{address}"' in text
    assert shop.sandbox.url in text
    assert "python manage.py list" in text
    assert "Pay &lt;i&gt;Shop&lt;/i&gt;" in text
    assert "<i>" not in text


def test_it_names_neither_a_form_nor_a_sandbox_where_there_is_none(open_shop: Callable[..., Shop]) -> None:
    text = home(open_shop(**LIVE, PAYSTACK_URL="https://api.paystack.co")).text
    assert 'href="/shop/docs"' in text
    assert "/pay" not in text.replace("/paygate", "")
    assert "sandbox" not in text
    assert "manage.py" not in text


@pytest.mark.parametrize("accept", ["*/*", "application/json", ""])
def test_to_an_api_s_client_there_is_nothing_here(shop: Shop, accept: str) -> None:
    answer: falcon.testing.Result = shop.client.simulate_get("/", headers={"Accept": accept})
    assert answer.status_code == 404
    assert answer.json["code"] == "not_found"


def test_a_browser_finds_nothing_at_an_unknown_address(shop: Shop) -> None:
    assert shop.client.simulate_get("/nowhere", headers=BROWSER).status_code == 404
