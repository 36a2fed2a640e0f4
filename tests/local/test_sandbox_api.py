# ruff: noqa: F811  (fixtures are imported by their names)
"""The sandbox keeps Paystack's published contract, also with clients that we did not write."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import paystackapi  # type: ignore[import-untyped]
import paystackapi.base  # type: ignore[import-untyped]
import pypaystack2.base_clients
import pytest
import requests
from paystackapi.refund import Refund  # type: ignore[import-untyped]
from paystackapi.transaction import Transaction  # type: ignore[import-untyped]
from pypaystack2 import PaystackClient

from local.sandbox import Sandbox, SandboxError
from sandbox_client import (  # noqa: F401
    KEY,
    PAID,
    Json,
    Shop,
    call,
    fields,
    initialize,
    paid,
    refund,
    sandbox,
    shop,
    told,
    verified,
    without_a_proxy,
)

PUBLISHED = json.loads((Path(__file__).parent.parent / "paystack-openapi.json").read_text())


def as_json_schema(node: Any) -> Any:
    """OpenAPI 3.0 as JSON Schema, and mended where the description contradicts itself."""
    if isinstance(node, list):
        return [as_json_schema(item) for item in node]
    if not isinstance(node, dict):
        return node
    schema = {name: as_json_schema(value) for name, value in node.items()}
    if schema.pop("nullable", None) is True and isinstance(schema.get("type"), str):
        schema["type"] = [schema["type"], "null"]
    return schema


def published_schema(path: str, method: str, status: int) -> Json:
    components = as_json_schema(PUBLISHED["components"])
    # Error.code has Error.type's words; the example of a bad initialize shows what codes look like.
    del components["schemas"]["Error"]["properties"]["code"]["enum"]
    # The same moment as paid_at, which may be null: nobody has paid yet.
    components["schemas"]["TransactionListResponseArray"]["properties"]["paidAt"]["type"] = ["string", "null"]
    answer = as_json_schema(PUBLISHED["paths"][path][method]["responses"][str(status)])
    if "$ref" in answer:
        answer = components["responses"][answer["$ref"].rsplit("/", 1)[1]]
    return {**answer["content"]["application/json"]["schema"], "components": components}


UNPAID, NOT_THERE = "/transaction/verify/PG-2", "/transaction/verify/PG-none"
PUBLISHED_ANSWERS: list[tuple[str, str, int, Callable[[Sandbox], requests.Response]]] = [
    ("/transaction/initialize", "post", 200, lambda s: initialize(s, "PG-3")),
    ("/transaction/initialize", "post", 400, lambda s: initialize(s, "PG-1")),
    ("/transaction/initialize", "post", 401, lambda s: call(s, "POST", "/transaction/initialize", key="sk_test_other")),
    ("/transaction/verify/{reference}", "get", 200, lambda s: call(s, "GET", PAID)),
    ("/transaction/verify/{reference}", "get", 200, lambda s: call(s, "GET", UNPAID)),
    ("/transaction/verify/{reference}", "get", 404, lambda s: call(s, "GET", NOT_THERE)),
    ("/transaction", "get", 200, lambda s: call(s, "GET", "/transaction")),
    ("/transaction/{id}", "get", 200, lambda s: call(s, "GET", f"/transaction/{verified(s)['id']}")),
    ("/refund", "post", 200, lambda s: refund(s, amount=1000)),
    ("/refund", "get", 200, lambda s: call(s, "GET", "/refund")),
    ("/refund/{id}", "get", 200, lambda s: call(s, "GET", f"/refund/{s.refunds()[0]['id']}")),
    ("/refund/{id}", "get", 404, lambda s: call(s, "GET", "/refund/1")),
    ("/dispute", "get", 200, lambda s: call(s, "GET", "/dispute")),
    ("/dispute/transaction/{id}", "get", 200, lambda s: call(s, "GET", f"/dispute/transaction/{verified(s)['id']}")),
    ("/dispute/transaction/{id}", "get", 404, lambda s: call(s, "GET", "/dispute/transaction/1")),
]


@pytest.mark.parametrize(("path", "method", "status", "ask"), PUBLISHED_ANSWERS)
def test_answers_have_the_published_shape(
    sandbox: Sandbox, path: str, method: str, status: int, ask: Callable[[Sandbox], requests.Response]
) -> None:
    sandbox.configure(not_found_status=404)
    paid(sandbox, "PG-1", metadata=fields("A1"))
    assert initialize(sandbox, "PG-2", metadata=fields("A2")).status_code == 200
    sandbox.dashboard_refund("PG-1", 2000)
    sandbox.dispute("PG-1")
    answer = ask(sandbox)
    assert answer.status_code == status
    jsonschema.Draft202012Validator(published_schema(path, method, status)).validate(answer.json())


def test_a_used_reference_is_refused_in_paystacks_words(sandbox: Sandbox) -> None:
    initialize(sandbox)
    answer = initialize(sandbox)
    assert answer.status_code == 400
    assert answer.json() == {
        "status": False,
        "message": "Duplicate Transaction Reference",
        "meta": {"nextStep": "Try and create the Transaction or Charge with a new reference"},
        "type": "validation_error",
        "code": "duplicate_reference",
    }


@pytest.mark.parametrize(
    ("order", "code"),
    [
        ({"email": ""}, "missing_params"),
        ({"email": "john"}, "invalid_email_address"),
        ({"email": "john@localhost"}, "invalid_email_address"),
        ({"amount": 4999}, "invalid_amount"),
        ({"amount": 5000.5}, "invalid_amount"),
        ({"amount": True}, "invalid_amount"),
        ({"amount": None}, "invalid_amount"),
        ({"amount": 99, "currency": "XOF"}, "invalid_amount"),
        ({"currency": "EUR"}, "unsupported_currency"),
        ({"reference": "PG_1"}, "invalid_reference"),
        ({"reference": "PG 1"}, "invalid_reference"),
    ],
)
def test_a_bad_order_is_refused(sandbox: Sandbox, order: Json, code: str) -> None:
    answer = initialize(sandbox, **order)
    assert (answer.status_code, answer.json()["code"]) == (400, code)
    assert sandbox.transactions() == []


def test_a_key_of_another_account_opens_nothing(sandbox: Sandbox) -> None:
    for path in ("/transaction", "/refund", "/dispute", "/integration/payment_session_timeout"):
        answer = call(sandbox, "GET", path, key="sk_test_other")
        assert (answer.status_code, answer.json()["message"]) == (401, "Invalid key")


def test_a_transaction_is_abandoned_then_failed_then_paid(sandbox: Sandbox) -> None:
    initialize(sandbox)
    assert (verified(sandbox)["status"], verified(sandbox)["paid_at"]) == ("abandoned", None)
    sandbox.decline("PG-1")
    assert (verified(sandbox)["status"], verified(sandbox)["gateway_response"]) == ("failed", "Insufficient Funds")
    sandbox.pay("PG-1")
    data = verified(sandbox)
    assert (data["status"], data["amount"], data["requested_amount"], data["fees"]) == (
        "success",
        500000,
        500000,
        17500,
    )
    with pytest.raises(SandboxError):
        sandbox.pay("PG-1")


def test_lists_are_paged_filtered_and_newest_first(sandbox: Sandbox) -> None:
    for number in range(7):
        initialize(sandbox, f"PG-{number}", amount=10000 + number)
    sandbox.pay("PG-3")
    sandbox.backdate("PG-0", 3600)

    def references(query: str) -> list[str]:
        return [row["reference"] for row in call(sandbox, "GET", f"/transaction?{query}").json()["data"]]

    assert references("perPage=3&page=1") == ["PG-6", "PG-5", "PG-4"]
    assert references("perPage=3&page=3") == ["PG-0"]
    assert references("status=success") == ["PG-3"]
    assert references("amount=10005") == ["PG-5"]
    since = sandbox.transactions()[1]["created_at"]
    assert len(references(f"from={since}")) == 6
    assert references("to=2020-01-01") == []
    assert call(sandbox, "GET", "/transaction?perPage=3").json()["meta"] == {
        **{"total": 7, "skipped": 0, "perPage": 3, "page": 1, "pageCount": 3, "total_volume": 10003}
    }
    assert call(sandbox, "GET", "/transaction?from=yesterday").status_code == 400


def test_a_list_may_have_smaller_pages_than_are_asked_for(sandbox: Sandbox) -> None:
    sandbox.configure(page_cap=10)
    for number in range(23):
        initialize(sandbox, f"PG-{number}")
    paid(sandbox, "PG-paid")
    for _ in range(11):
        refund(sandbox, "PG-paid", amount=1)
    pages = [call(sandbox, "GET", f"/transaction?per_page=100&page={page}").json() for page in (1, 2, 3, 4)]
    assert [len(page["data"]) for page in pages] == [10, 10, 4, 0]
    assert {(page["meta"]["total"], page["meta"]["pageCount"], page["meta"]["perPage"]) for page in pages} == {
        (24, 3, 10)
    }
    refunds = call(sandbox, "GET", "/refund?perPage=100&page=2").json()
    assert len(refunds["data"]) == 1
    assert {name: refunds["meta"][name] for name in ("total", "pageCount", "perPage")} == {
        **{"total": 11, "pageCount": 2, "perPage": "10"}
    }


def test_each_list_takes_the_names_of_its_own_parameters(sandbox: Sandbox) -> None:
    for number in range(101):
        initialize(sandbox, f"PG-{number}")
    paid(sandbox, "PG-paid")
    for _ in range(3):
        refund(sandbox, "PG-paid", amount=1)

    def sizes(path: str, *queries: str) -> list[int]:
        return [len(call(sandbox, "GET", f"{path}?{query}").json()["data"]) for query in queries]

    assert sizes("/transaction", "", "perPage=2", "per_page=2", "per_page=500") == [50, 2, 2, 100]
    assert sizes("/refund", "", "perPage=2", "per_page=2") == [3, 2, 3]


def test_a_cursor_misses_and_repeats_nothing_while_new_ones_come(sandbox: Sandbox) -> None:
    for number in range(5):
        initialize(sandbox, f"PG-{number}", "wide-id@example.com" if number == 1 else "john@example.com")
    seen, cursor = [], ""
    while cursor is not None:
        answer = call(
            sandbox, "GET", "/transaction", params={"use_cursor": "true", "next": cursor, "perPage": 2}
        ).json()
        seen += [row["reference"] for row in answer["data"]]
        cursor = answer["meta"]["next"]
        initialize(sandbox, f"PG-late-{len(seen)}")
    assert seen == ["PG-4", "PG-3", "PG-2", "PG-1", "PG-0"]


def test_the_session_timeout_is_kept(sandbox: Sandbox) -> None:
    path = "/integration/payment_session_timeout"
    assert call(sandbox, "GET", path).json()["data"] == {"payment_session_timeout": 0}
    assert call(sandbox, "PUT", path, json={"timeout": 600}).json()["data"] == {"payment_session_timeout": 600}
    assert call(sandbox, "GET", path).json()["data"] == {"payment_session_timeout": 600}


# Refunds


def test_partial_refunds_add_up_to_the_charge_and_no_further(sandbox: Sandbox) -> None:
    paid(sandbox)
    first = refund(sandbox, amount=200000, merchant_note="ours").json()["data"]
    assert (first["status"], first["transaction"]["reference"], first["merchant_note"]) == ("pending", "PG-1", "ours")
    assert refund(sandbox, amount=300001).status_code == 400
    assert refund(sandbox, str(first["transaction"]["id"])).json()["data"]["amount"] == 300000
    assert verified(sandbox)["status"] == "reversal-pending"
    answer = refund(sandbox)
    assert (answer.status_code, answer.json()["code"]) == (400, "transaction_reversed")
    for row in sandbox.refunds():
        sandbox.move_refund(row["id"], "processed")
    assert verified(sandbox)["status"] == "reversed"
    sandbox.move_refund(first["id"], "failed")
    assert verified(sandbox)["status"] == "success"
    assert refund(sandbox).json()["data"]["amount"] == 200000


def test_what_is_not_paid_is_not_refunded(sandbox: Sandbox) -> None:
    initialize(sandbox)
    assert refund(sandbox).status_code == 400
    assert refund(sandbox, "PG-none").json()["code"] == "transaction_not_found"


def test_the_dashboard_may_refund_more_than_is_left(sandbox: Sandbox) -> None:
    paid(sandbox)
    sandbox.dashboard_refund("PG-1", 600000)
    assert [row["amount"] for row in call(sandbox, "GET", "/refund").json()["data"]] == [600000]


@pytest.mark.parametrize(
    ("email", "states"),
    [
        ("john@example.com", ["pending", "processing", "processed"]),
        ("refund-fails@example.com", ["pending", "processing", "failed"]),
        ("refund-fails-late@example.com", ["pending", "processing", "processed", "failed"]),
        ("refund-needs-attention+1@example.com", ["pending", "processing", "needs-attention"]),
    ],
)
def test_a_refund_goes_its_way_by_itself_and_events_tell(shop: Shop, email: str, states: list[str]) -> None:
    with Sandbox(KEY, shop.url, refund_seconds=0.1) as sandbox:
        paid(sandbox, email=email)
        shop.heard(1)  # events overtake each other, as Paystack's do
        refund(sandbox)
        assert shop.heard(1 + len(states)) == ["charge.success", *(f"refund.{state}" for state in states)]
        assert sandbox.refunds("PG-1")[0]["status"] == states[-1]
    told = shop.events[1]["data"]
    assert (told["amount"], told["refund_reference"], "id" in told) == ("500000", None, False)


def test_refund_events_bear_id_and_note_when_told_to(told: Sandbox, shop: Shop) -> None:
    told.configure(refund_events_with_id=True)
    paid(told)
    made = refund(told, merchant_note="ours").json()["data"]
    told.move_refund("PG-1", "processed")
    shop.heard(3)
    event = next(event["data"] for event in shop.events if event["event"] == "refund.processed")
    assert (event["id"], event["merchant_note"], event["amount"]) == (made["id"], "ours", 500000)


def test_a_dispute_is_told_and_listed(told: Sandbox, shop: Shop) -> None:
    paid(told)
    dispute = told.dispute("PG-1")
    told.remind_dispute(dispute["id"])
    told.resolve_dispute(dispute["id"], "declined")
    events = sorted(shop.heard(4))
    assert events == ["charge.dispute.create", "charge.dispute.remind", "charge.dispute.resolve", "charge.success"]
    listed = call(told, "GET", "/dispute?status=resolved").json()["data"]
    assert (listed[0]["resolution"], listed[0]["transaction"]["reference"]) == ("declined", "PG-1")


def test_a_charge_may_be_disputed_twice(told: Sandbox, shop: Shop) -> None:
    paid(told)
    first, second = told.dispute("PG-1"), told.dispute("PG-1", 1000)
    told.resolve_dispute(first["id"])
    listed = call(told, "GET", f"/dispute?transaction={verified(told)['id']}").json()["data"]
    assert [(row["id"], row["status"], row["refund_amount"]) for row in listed] == [
        (second["id"], "awaiting-merchant-feedback", 1000),
        (first["id"], "resolved", 500000),
    ]
    assert first["id"] != second["id"]
    shop.heard(4)
    created = {event["data"]["id"] for event in shop.events if event["event"] == "charge.dispute.create"}
    assert created == {first["id"], second["id"]}


# Clients that we did not write


def test_pypaystack2_works(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pypaystack2.base_clients.AbstractAPIClient, "_BASE_URL", sandbox.url)
    client = PaystackClient(secret_key=KEY)
    begun = client.transactions.initialize(amount=500000, email="john@example.com", reference="PG-1")
    assert begun.status and begun.data.reference == "PG-1"
    sandbox.pay("PG-1")
    checked = client.transactions.verify("PG-1")
    assert checked.status and checked.data.status == "success" and checked.data.amount == 500000
    listed = client.transactions.get_transactions()
    assert [row.reference for row in listed.data] == ["PG-1"]
    assert client.transactions.get_transaction(checked.data.id).status
    made = client.refunds.create("PG-1", amount=1000, merchant_note="ours")
    assert made.status and made.data.amount == 1000
    # Its model wants an object where the published description has a string (customer.metadata): raw it is.
    refunds: Any = client.refunds.get_refunds().raw
    assert [row["amount"] for row in refunds["data"]] == [1000]
    assert client.transactions.verify("PG-none").status is False


def test_paystackapi_works(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paystackapi, "API_URL", f"{sandbox.url}/")
    monkeypatch.setattr(paystackapi, "SECRET_KEY", KEY)
    monkeypatch.setattr(paystackapi.base.Borg, "_shared_state", {})
    begun = Transaction.initialize(reference="PG-1", amount=500000, email="john@example.com")
    assert begun["data"]["authorization_url"].startswith(f"{sandbox.url}/checkout/")
    sandbox.pay("PG-1")
    assert Transaction.verify(reference="PG-1")["data"]["status"] == "success"
    assert [row["reference"] for row in Transaction.list()["data"]] == ["PG-1"]
    made = Refund.create(transaction="PG-1", amount=1000)
    assert made["message"] == "Refund has been queued for processing"
    assert [row["id"] for row in Refund.list()["data"]] == [made["data"]["id"]]
    assert Refund.fetch(made["data"]["id"])["data"]["amount"] == 1000
