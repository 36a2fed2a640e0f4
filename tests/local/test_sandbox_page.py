# ruff: noqa: F811  (fixtures are imported by their names)
"""The sandbox's checkout page."""

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from local.sandbox import Sandbox
from sandbox_client import Shop, call, initialize, sandbox, shop, told, verified, without_a_proxy  # noqa: F401


def checkout(sandbox: Sandbox, email: str = "john@example.com", **order: Any) -> str:
    return str(initialize(sandbox, email=email, **order).json()["data"]["authorization_url"])


def press(url: str, button: str) -> requests.Response:
    return requests.post(url, data={"do": button}, timeout=5, allow_redirects=False)


def test_the_checkout_page_shows_who_is_paid_what(sandbox: Sandbox) -> None:
    answer = requests.get(checkout(sandbox, "<i>john</i>@example.com", amount=123456789), timeout=5)
    assert answer.status_code == 200
    for text in (
        "TEST",
        "Example Shop",
        "NGN\N{NO-BREAK SPACE}1,234,567.89",
        "&lt;i&gt;john&lt;/i&gt;@example.com",
        "PG-1",
    ):
        assert text in answer.text
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    assert not re.search(r"<script|style=|https?://|\son\w+=", answer.text)
    css = requests.get(f"{sandbox.url}/sandbox.css", timeout=5)
    assert css.headers["Content-Type"] == "text/css"
    assert len(answer.content) + len(css.content) < 10_000


def test_the_page_has_an_icon_and_its_policy_lets_it_be_shown(sandbox: Sandbox) -> None:
    page = requests.get(checkout(sandbox), timeout=5)
    assert '<link rel="icon" href="/favicon.svg">' in page.text
    assert "img-src 'self'" in page.headers["Content-Security-Policy"]
    for path in ("/favicon.svg", "/favicon.ico"):
        icon = requests.get(sandbox.url + path, timeout=5)
        assert (icon.status_code, icon.headers["Content-Type"]) == (200, "image/svg+xml")
        assert icon.text.startswith("<svg")


def test_paying_leads_back_to_the_shop_and_happens_once(told: Sandbox, shop: Shop) -> None:
    url = checkout(told, callback_url="http://127.0.0.1:8000/pay/PAY-1?a=b")
    assert press(url, "nonsense").headers["Location"] == f"/checkout/{url.rsplit('/', 1)[1]}"
    for _ in range(2):
        answer = press(url, "pay")
        assert answer.status_code == 303
        assert answer.headers["Location"] == "http://127.0.0.1:8000/pay/PAY-1?a=b&trxref=PG-1&reference=PG-1"
    assert press(url, "decline").status_code == 303
    assert "Payment successful" in requests.get(url, timeout=5).text
    assert verified(told)["status"] == "success"
    told.wait_for_webhooks()
    assert shop.heard(1) == ["charge.success"]


def test_64_presses_at_once_pay_once(sandbox: Sandbox) -> None:
    url = checkout(sandbox)
    with ThreadPoolExecutor(32) as pool:
        assert {answer.status_code for answer in pool.map(lambda _: press(url, "pay"), range(64))} == {303}
    assert len(sandbox.deliveries("PG-1")) == 1


def test_after_a_declined_card_the_page_says_so_and_takes_another(sandbox: Sandbox) -> None:
    url = checkout(sandbox)
    assert "Declined" not in requests.get(url, timeout=5).text
    here = press(url, "decline")
    page = requests.get(sandbox.url + here.headers["Location"], timeout=5).text
    assert 'role="alert"' in page and "Insufficient Funds" in page
    press(url, "pay")
    assert verified(sandbox)["status"] == "success"


@pytest.mark.parametrize(("email", "states"), [("decline", ["failed", "success"]), ("declines", ["failed", "failed"])])
def test_some_customers_cards_are_declined(sandbox: Sandbox, email: str, states: list[str]) -> None:
    url, seen = checkout(sandbox, f"{email}@example.com"), []
    for _ in states:
        press(url, "pay")
        seen.append(verified(sandbox)["status"])
    assert seen == states


def test_who_walks_away_goes_where_the_shop_says(sandbox: Sandbox) -> None:
    url = checkout(sandbox, metadata={"cancel_action": "http://127.0.0.1:8000/pay/PAY-1"})
    assert press(url, "cancel").headers["Location"] == "http://127.0.0.1:8000/pay/PAY-1"
    assert verified(sandbox)["status"] == "abandoned"
    other = str(
        initialize(sandbox, "PG-2", metadata={"cancel_action": "javascript:alert(1)"}).json()["data"][
            "authorization_url"
        ]
    )
    assert (press(other, "cancel").status_code, "Nothing was paid" in press(other, "cancel").text) == (200, True)


def test_an_expired_session_takes_no_money_but_a_late_transfer_does(sandbox: Sandbox) -> None:
    url = checkout(sandbox)
    call(sandbox, "PUT", "/integration/payment_session_timeout", json={"timeout": 60})
    sandbox.backdate("PG-1", 61)
    assert requests.get(url, timeout=5).status_code == 410
    press(url, "pay")
    assert verified(sandbox)["status"] == "abandoned"
    sandbox.pay("PG-1")
    assert verified(sandbox)["status"] == "success"


def test_an_unknown_checkout_is_a_404(sandbox: Sandbox) -> None:
    assert requests.get(f"{sandbox.url}/checkout/nonsense", timeout=5).status_code == 404
