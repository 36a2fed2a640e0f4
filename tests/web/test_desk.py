# ruff: noqa: F811  (fixtures are imported by their names)
"""The desk's page as it is served. What its owner does there is told in tests/browser/."""

import re
from collections.abc import Callable
from html.parser import HTMLParser

import falcon.testing
import pytest

from office import ADMIN_TOKEN
from shop import LIVE, Shop, counter, open_shop, sandbox, shop  # noqa: F401  # fixtures
from web.pages import STATIC, VERSION

SCRIPT = (STATIC / "desk.js").read_text(encoding="utf-8")


def desk(shop: Shop) -> falcon.testing.Result:
    answer: falcon.testing.Result = shop.client.simulate_get("/desk")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    return answer


@pytest.mark.parametrize("env", [{}, {"ADMIN_TOKEN": ADMIN_TOKEN}])
def test_no_cache_keeps_it_and_only_its_own_files_run(open_shop: Callable[..., Shop], env: dict[str, str]) -> None:
    answer = desk(open_shop(**env))
    assert answer.headers["cache-control"] == "no-store"
    policy = dict(each.strip().split(" ", 1) for each in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    for kind in ("script-src", "style-src", "connect-src", "img-src"):
        assert policy[kind] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in answer.headers["content-security-policy"]


def test_without_a_token_set_it_says_how_to_set_one_and_has_no_script(shop: Shop) -> None:
    text = desk(shop).text
    assert "ADMIN_TOKEN" in text
    assert "openssl rand -hex 24" in text
    assert "desk.js" not in text
    assert "<form" not in text


def test_the_page_holds_nothing_and_is_the_same_for_everybody(counter: Shop, open_shop: Callable[..., Shop]) -> None:
    shop = open_shop(ADMIN_TOKEN=ADMIN_TOKEN, MERCHANT_NAME="<i>Shop</i>")
    shop.created(customer_name="Zebedee")
    text = desk(shop).text
    assert ADMIN_TOKEN not in text
    assert "Zebedee" not in text
    assert "<i>" not in text
    assert shop.client.simulate_get("/desk", headers={"Authorization": f"Bearer {ADMIN_TOKEN}"}).text == text
    assert "ADMIN_TOKEN" in desk(counter).text  # without the database too


def test_its_files_and_its_api_are_below_the_path_of_the_public_url(open_shop: Callable[..., Shop]) -> None:
    text = desk(open_shop(**{**LIVE, "PUBLIC_URL": "https://pay.example.com/shop"}, ADMIN_TOKEN=ADMIN_TOKEN)).text
    assert f'src="/shop/static/desk.js?{VERSION}"' in text
    assert f'href="/shop/static/desk.css?{VERSION}"' in text
    assert 'data-base="/shop"' in text
    assert "paygate.js" not in text  # the customers' script would print receipts here
    assert "TEST" not in text


class Page(HTMLParser):
    """The ids of a page, and each way in which something could be sent or run from it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.methods: list[str | None] = []
        self.attributes: set[str] = set()
        self.named_secrets: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.attributes |= values.keys()
        self.ids += [str(values["id"])] if "id" in values else []
        if tag == "form":
            self.methods.append(values.get("method"))
        if values.get("type") == "password" and "name" in values:
            self.named_secrets.append(str(values["name"]))


def test_no_form_of_it_is_ever_sent_by_the_browser_itself(open_shop: Callable[..., Shop]) -> None:
    page = Page(desk(open_shop(ADMIN_TOKEN=ADMIN_TOKEN, CURRENCIES="NGN,GHS")).text)
    assert set(page.methods) == {"dialog"}  # which sends nothing: a token would be in the address else
    assert page.named_secrets == []
    assert not {each for each in page.attributes if each.startswith("on") or each == "style"}
    assert len(page.ids) == len(set(page.ids))


def test_the_script_finds_what_it_names_and_writes_no_html(open_shop: Callable[..., Shop]) -> None:
    page = Page(desk(open_shop(ADMIN_TOKEN=ADMIN_TOKEN)).text)
    named = re.findall(r"""\$\("([\w-]+)"\)|copy\("([\w-]+)"|ask\("([\w-]+)\"""", SCRIPT)
    assert {"".join(each) for each in named} <= set(page.ids)
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "localStorage", "cookie"):
        assert way not in SCRIPT
