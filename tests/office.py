"""A shop's own back office: what it asks of the API with ADMIN_TOKEN."""

import json
from collections.abc import Callable
from typing import Any

import falcon.testing
import pytest

from shop import PAYMENTS, Shop

ADMIN_TOKEN = "the-owner's-token-0123456789"
API = "/api/v1"


class Office:
    """One who has the owner's token, or another one."""

    def __init__(self, shop: Shop, token: str | None = ADMIN_TOKEN) -> None:
        self.shop = shop
        self.headers = {"Authorization": f"Bearer {token}"} if token is not None else {}

    def ask(self, path: str, **params: object) -> falcon.testing.Result:
        texts = {name: str(value) for name, value in params.items()}
        return self.shop.client.simulate_get(API + path, params=texts, headers=self.headers)

    def do(self, path: str, body: object = None, key: str | None = None) -> falcon.testing.Result:
        headers = dict(self.headers)
        if key is not None:
            headers["Idempotency-Key"] = key
        if body is None:
            return self.shop.client.simulate_post(API + path, headers=headers)
        headers["Content-Type"] = "application/json"
        return self.shop.client.simulate_post(API + path, headers=headers, body=json.dumps(body))

    def asked(self, path: str, **params: object) -> dict[str, Any]:
        answer = self.ask(path, **params)
        assert answer.status_code == 200, answer.text
        return dict(answer.json)

    def did(self, path: str, body: object = None, key: str | None = None, status: int = 200) -> dict[str, Any]:
        answer = self.do(path, body, key)
        assert answer.status_code == status, answer.text
        return dict(answer.json)

    def refused(self, path: str, body: object = None, key: str | None = None) -> tuple[int, str]:
        """Status and code of an answer that is an error."""
        answer = self.do(path, body, key)
        return answer.status_code, answer.json.get("code", "")

    def give_back(self, payment: dict[str, Any], key: str, **body: object) -> falcon.testing.Result:
        return self.do(f"/payments/{payment['id']}/refunds", body, key)


@pytest.fixture
def office(open_shop: Callable[..., Shop]) -> Office:
    return Office(open_shop(ADMIN_TOKEN=ADMIN_TOKEN))


def ids(answer: dict[str, Any]) -> list[str]:
    return [payment["id"] for payment in answer["payments"]]


__all__ = ["ADMIN_TOKEN", "API", "PAYMENTS", "Office", "ids", "office"]
