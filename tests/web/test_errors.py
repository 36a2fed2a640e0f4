# ruff: noqa: F811  (fixtures are imported by their names)
"""What holds for every answer, the errors above all: their shape, request ids, addresses, nothing inside out."""

import re

import pytest

from answers import problem
from customer import page_of
from shop import PAYMENTS, UNKNOWN_ID, WEBHOOK, OpenShop, Shop, counter, open_shop, sandbox, shop  # noqa: F401


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/api", "/api/v1", "/api/v1/payment", "/api/v2/payments", f"{PAYMENTS}/{UNKNOWN_ID}/charges"),
        *("/pay/a/b", "/.env", "/settings.py", "/web/templates/payment.html", "/%00", "/%ff", "//evil.example"),
    ],
)
def test_there_is_nothing_at_another_address(counter: Shop, path: str) -> None:
    problem(counter.client.simulate_get(path), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        *((method, PAYMENTS, "GET, POST") for method in ("PUT", "PATCH", "DELETE")),
        *((method, f"{PAYMENTS}/{UNKNOWN_ID}", "GET") for method in ("POST", "PUT", "DELETE")),
        ("GET", WEBHOOK, "POST"),
        ("POST", f"/pay/{UNKNOWN_ID}", "GET"),
        ("POST", "/healthz", "GET"),
        ("DELETE", "/readyz", "GET"),
    ],
)
def test_a_wrong_method_is_told_the_right_one(counter: Shop, method: str, path: str, allowed: str) -> None:
    answer = counter.client.simulate_request(method, path)
    problem(answer, 405, "method_not_allowed")
    assert set(answer.headers["allow"].split(", ")) - {"OPTIONS", "HEAD"} == set(allowed.split(", "))


@pytest.mark.parametrize("method", ["WEBSOCKET", "BREW", "get"])
@pytest.mark.filterwarnings("ignore:Unknown REQUEST_METHOD")
def test_a_method_that_nobody_knows_is_a_bad_request(counter: Shop, method: str) -> None:
    problem(counter.client.simulate_request(method, "/healthz"), 400, "bad_request")


@pytest.mark.parametrize("given", ["3f2b9c0d11aa55ee", "F47AC10B-58CC-4372-A567-0E02B2C3D479", "ab" * 32])
def test_a_request_id_that_looks_random_is_kept(counter: Shop, given: str) -> None:
    answer = counter.client.simulate_get("/healthz", headers={"X-Request-Id": given})
    assert answer.headers["x-request-id"] == given


@pytest.mark.parametrize(
    "given",
    ["", "a", "john.doe@example.com", "2348012345678123", "4111-1111-1111-1111", "ab" * 33, "ä" * 16],
)
def test_another_request_id_is_replaced(counter: Shop, given: str) -> None:
    answers = [counter.client.simulate_get("/healthz", headers={"X-Request-Id": given}) for _ in range(2)]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids - {given}) == 2
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in ids)


def test_no_url_is_made_of_the_host_header(open_shop: OpenShop) -> None:
    shop = open_shop(PUBLIC_URL="https://pay.example.com/shop")
    evil = {"Host": "evil.example", "X-Forwarded-Host": "evil.example", "Forwarded": "host=evil.example"}
    answer = shop.create(headers=evil)
    payment_id = answer.json["payment"]["id"]
    page = shop.client.simulate_get(f"/pay/{payment_id}", headers=evil)
    missing = shop.client.simulate_get("/nowhere", headers=evil)
    for each in (answer, page, missing):
        assert "evil" not in each.text + str(each.headers)
    [asked] = shop.sandbox.requests()
    assert "evil" not in str(asked)
    assert asked["body"]["callback_url"] == f"https://pay.example.com/shop/pay/{payment_id}"
    assert asked["body"]["metadata"]["cancel_action"] == f"https://pay.example.com/shop/pay/{payment_id}"


def test_the_addresses_that_are_given_out_begin_with_the_public_url(open_shop: OpenShop) -> None:
    shop = open_shop(PUBLIC_URL="https://pay.example.com/shop")
    answer = shop.create()
    payment_id = answer.json["payment"]["id"]
    assert answer.headers["location"] == f"https://pay.example.com/shop/api/v1/payments/{payment_id}"
    # As a path, so that it is of the same host for the policy, whatever name the page was asked by.
    assert 'href="/shop/static/paygate.css?' in page_of(shop, payment_id).text


def test_an_error_that_nobody_expected_tells_nothing_of_its_cause(shop: Shop) -> None:
    shop.sql("ALTER TABLE payments ADD CONSTRAINT no_zebedee CHECK (customer_name <> 'Zebedee') NOT VALID")
    answer = shop.create(customer_name="Zebedee")
    problem(answer, 500, "internal_error")
    assert not re.search("zebedee|constraint|psycopg|payments|Traceback|INSERT|Error", answer.text)
    assert shop.create().status_code == 201
