# ruff: noqa: F811  (fixtures are imported by their names)
"""A small back office, written from `/docs` alone, against a real server."""

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from local.sandbox import Sandbox
from shop import JSON, ORDER, Server, sandbox, wait_until  # noqa: F401  # fixtures

TILL, OWNER = "open-sesame-0123", "the-owner-0123456789"


class BackOffice:
    def __init__(self, url: str) -> None:
        self.url = f"{url}/api/v1"
        self.session = requests.Session()
        self.session.headers["Authorization"] = f"Bearer {OWNER}"

    def get(self, path: str, **filters: Any) -> Any:
        answer = self.session.get(self.url + path, params=filters, timeout=30)
        answer.raise_for_status()
        return answer.json()

    def post(self, path: str, body: dict[str, Any], key: str | None = None) -> requests.Response:
        headers = {"Idempotency-Key": key} if key is not None else {}
        return self.session.post(self.url + path, json=body, headers=headers, timeout=30)

    def status_of(self, payment: dict[str, Any]) -> str:
        return str(self.get(f"/payments/{payment['id']}")["payment"]["status"])


@pytest.fixture
def served(database_url: str, sandbox: Sandbox, tmp_path: Path) -> Iterator[Server]:
    with Server(database_url, sandbox, tmp_path, API_TOKEN=TILL, ADMIN_TOKEN=OWNER, WORKER_INTERVAL="0.2") as server:
        sandbox.configure(webhook_url=f"{server.url}/api/v1/webhooks/paystack")
        yield server


@pytest.fixture
def office(served: Server) -> BackOffice:
    return BackOffice(served.url)


def opened(served: Server, order: str, **fields: Any) -> dict[str, Any]:
    """By the shop's till."""
    body = {**ORDER, "metadata": {"order": order}, **fields}
    headers = {**JSON, "Authorization": f"Bearer {TILL}", "Idempotency-Key": f"order-{order}"}
    answer = requests.post(f"{served.url}/api/v1/payments", json=body, headers=headers, timeout=30)
    assert answer.status_code == 201, answer.text
    return dict(answer.json()["payment"])


def paid(served: Server, office: BackOffice, order: str, **fields: Any) -> dict[str, Any]:
    payment = opened(served, order, **fields)
    served.sandbox.pay(payment["reference"])
    wait_until(lambda: office.status_of(payment) != "pending")
    return payment


def test_it_lists_all_payments_page_by_page_and_finds_one_by_its_order(served: Server, office: BackOffice) -> None:
    made = [opened(served, str(1000 + n))["id"] for n in range(3)]
    page = office.get("/payments", limit=2)
    rest = office.get("/payments", limit=2, after=page["next"])
    assert [each["id"] for each in page["payments"] + rest["payments"]] == made[::-1]
    assert rest["next"] is None
    (found,) = office.get("/payments", order="1001")["payments"]
    assert (found["id"], found["metadata"]) == (made[1], {"order": "1001"})


def test_a_refund_whose_answer_is_lost_is_asked_for_again_and_made_once(served: Server, office: BackOffice) -> None:
    path, key = f"/payments/{paid(served, office, '1001')['id']}/refunds", secrets.token_hex(16)
    served.sandbox.fault("refund", "lost-answer", times=1)
    first = office.post(path, {"amount": "10.00", "reason": "one item", "by": "Ada"}, key)
    assert (first.status_code, first.json()["refund"]["status"]) == (202, "unanswered")
    again = office.post(path, {"amount": "10.00", "reason": "one item", "by": "Ada"}, key)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert [each["id"] for each in office.get(path)["refunds"]] == [again.json()["refund"]["id"]]
    assert office.get(f"{path}/{first.json()['refund']['id']}")["refund"]["made_by"] == "operator:Ada"
    assert served.sandbox.calls("refund") == 1


def test_an_order_that_is_given_up_has_no_checkout_any_more(served: Server, office: BackOffice) -> None:
    payment = opened(served, "1001")
    answer = office.post(f"/payments/{payment['id']}/cancel", {"by": "Ada"})
    assert (answer.status_code, answer.json()["payment"]["checkout_url"]) == (200, None)
    wait_until(lambda: office.status_of(payment) == "expired")
    whys = [each["facts"].get("why") for each in office.get(f"/payments/{payment['id']}/events")["events"]]
    assert "cancelled" in whys


def test_a_link_is_made_and_taken_back(office: BackOffice) -> None:
    made = office.post("/links", {"amount": "75.00", "description": "A hat", "order": "1002"})
    url = made.json()["link"]["url"]
    assert (made.status_code, requests.get(url, timeout=30).status_code) == (201, 200)
    assert office.post("/links/withdraw", {"order": "1002"}).status_code == 200
    assert requests.get(url, timeout=30).status_code == 410
    assert office.post("/links", {"amount": "75.00", "order": "1002"}).json()["code"] == "not_possible"


def test_an_incident_is_found_seen_to_and_closed(served: Server, office: BackOffice) -> None:
    payment = paid(served, office, "1001", customer_email="underpaid@example.com")
    wait_until(lambda: office.get("/incidents")["incidents"])
    (incident,) = office.get("/incidents")["incidents"]
    assert (incident["kind"], incident["payment"]) == ("mismatch", payment["id"])
    closed = office.post(f"/incidents/{incident['id']}/close", {"reason": "the customer was called", "by": "Ada"})
    assert closed.json()["incident"]["closed_by"] == "operator:Ada"
    assert office.get("/incidents")["incidents"] == []
