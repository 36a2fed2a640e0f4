# ruff: noqa: F811  (fixtures are imported by their names)
"""The files that the pages load: a browser may keep them, and asks again only for what may have changed."""

from collections.abc import Callable

import pytest

from shop import Shop, open_shop, sandbox, shop  # noqa: F401
from web import pages

TYPES = {
    **{"paygate.css": "text/css", "paygate.js": "text/javascript", "paygate.svg": "image/svg+xml"},
    **{"desk.css": "text/css", "desk.js": "text/javascript"},
}


@pytest.mark.parametrize("name", TYPES)
def test_a_file_is_served_with_its_type_for_a_day(shop: Shop, name: str) -> None:
    answer = shop.client.simulate_get(f"/static/{name}")
    assert answer.status_code == 200
    assert answer.content == (pages.STATIC / name).read_bytes()
    assert answer.headers["content-type"] == TYPES[name]
    assert answer.headers["cache-control"] == "public, max-age=86400"
    assert answer.headers["x-content-type-options"] == "nosniff"
    head = shop.client.simulate_head(f"/static/{name}")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(answer.content))


def test_a_browser_that_has_the_file_is_told_so(shop: Shop) -> None:
    first = shop.client.simulate_get("/static/paygate.css")
    again = shop.client.simulate_get("/static/paygate.css", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["cache-control"] == "public, max-age=86400"


@pytest.mark.parametrize("path", ["", "nothing.css", "../pages.py", "%2e%2e/pages.py", "../templates/form.html"])
def test_nothing_but_these_files_is_given_out_and_no_cache_keeps_that(shop: Shop, path: str) -> None:
    answer = shop.client.simulate_get(f"/static/{path}")
    assert answer.status_code == 404
    assert answer.json["code"] == "not_found"
    assert answer.headers["cache-control"] == "no-store"


def test_the_docs_load_their_stylesheet_from_below_the_public_url_s_path(open_shop: Callable[..., Shop]) -> None:
    shop = open_shop(PUBLIC_URL="https://pay.example.com/shop")
    address = f"/static/docs.css?{pages.VERSION}"
    assert f'href="/shop{address}"' in shop.client.simulate_get("/docs").text
    assert shop.client.simulate_get(address).headers["content-type"] == "text/css"  # the proxy has cut /shop off
