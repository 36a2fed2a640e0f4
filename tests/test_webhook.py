# ruff: noqa: F811  (fixtures are imported by their names)
"""The provider's events: which are believed, what is stored of them, and what they are answered."""

import hashlib
import hmac
import json
from typing import Any

import pytest

from answers import guarded, problem
from shop import SECRET_KEY, WEBHOOK, OpenShop, Server, Shop, count, open_shop, sandbox, shop, sign  # noqa: F401


def events(shop: Shop | Server) -> list[dict[str, Any]]:
    return shop.sql(
        "SELECT mode, name, reference, payment_id, body, outcome, deliveries FROM provider_events ORDER BY id"
    )


def test_a_signed_event_is_stored_applied_and_answered_200(shop: Shop) -> None:
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    body, headers = shop.sandbox.event(payment["reference"])
    answer = shop.webhook(body, headers)
    assert answer.status_code == 200
    guarded(answer)
    assert answer.json["status"] == "success"
    assert events(shop) == [
        {
            "mode": "test",
            "name": "charge.success",
            "reference": payment["reference"],
            "payment_id": payment["id"],
            "body": body.decode(),
            "outcome": "applied",
            "deliveries": 1,
        }
    ]
    assert shop.get(payment["id"])["status"] == "completed"
    assert count(shop, "charges") == 1


def test_an_event_with_a_slash_at_the_end_of_its_address_arrives(shop: Shop) -> None:
    assert shop.client.simulate_post(f"{WEBHOOK}/", body=b"{}", headers=sign(b"{}")).status_code == 200


@pytest.mark.parametrize("forgery", ["none", "empty", "other key", "other body", "short", "upper case", "sha256", "ü"])
def test_a_forged_event_is_stored_nowhere(shop: Shop, forgery: str) -> None:
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    body, headers = shop.sandbox.event(payment["reference"])
    signature = headers["x-paystack-signature"]
    forged = {
        "none": {},
        "empty": {"x-paystack-signature": ""},
        "other key": sign(body, "sk_test_another00"),
        "other body": sign(body + b" "),
        "short": {"x-paystack-signature": signature[:-1]},
        "upper case": {"x-paystack-signature": signature.upper()},
        "sha256": {"x-paystack-signature": hmac.new(SECRET_KEY.encode(), body, hashlib.sha256).hexdigest()},
        "ü": {"x-paystack-signature": "ü" * 128},
    }
    problem(shop.webhook(body, forged[forgery]), 401, "invalid_signature")
    assert count(shop, "provider_events") == count(shop, "charges") == 0
    assert shop.get(payment["id"])["status"] == "pending"


def test_the_signature_is_over_the_raw_body(shop: Shop) -> None:
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    body = (
        json.dumps(json.loads(shop.sandbox.event(payment["reference"])[0]), indent=3, sort_keys=True).encode() + b"\n"
    )
    assert shop.webhook(body, sign(body)).status_code == 200
    assert shop.get(payment["id"])["status"] == "completed"


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{}", b"null", b"[]", b"<xml/>", b"\xff\xfe\x00", b'{"event": "charge.success"}', b"[" * 100_000),
        b'{"event": 5, "data": {}}',
        json.dumps({"event": "charge.success", "data": {"reference": "x"}}).encode("utf-16"),
    ],
)
def test_a_signed_body_that_is_no_event_is_no_error(shop: Shop, body: bytes) -> None:
    assert shop.webhook(body, sign(body)).status_code == 200
    [event] = events(shop)
    assert (event["outcome"], event["name"], event["body"]) == ("no_event", None, None)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_a_signed_event_about_a_payment_in_another_encoding_is_no_error(shop: Shop, encoding: str) -> None:
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    body = shop.sandbox.event(payment["reference"])[0].decode().encode(encoding)
    assert shop.webhook(body, sign(body)).status_code == 200
    assert count(shop, "provider_events") == 1


def test_an_unknown_event_about_a_payment_is_stored_and_changes_nothing(shop: Shop) -> None:
    payment = shop.created()
    body = json.dumps({"event": "charge.unheard-of", "data": {"reference": payment["reference"]}}).encode()
    assert shop.webhook(body, sign(body)).status_code == 200
    [event] = events(shop)
    assert (event["name"], event["outcome"], event["payment_id"]) == ("charge.unheard-of", "noted", payment["id"])
    assert shop.get(payment["id"]) == payment


@pytest.mark.parametrize("reference", ["T012345", "PG-012", "PG-" + "0" * 26 + "-1", "PG-" + "0" * 26 + "-10"])
def test_of_another_shops_event_only_name_reference_and_digest_are_stored(shop: Shop, reference: str) -> None:
    shop.sandbox.charge_elsewhere(reference, email="stranger@example.com")
    body, headers = shop.sandbox.event(reference)
    assert shop.webhook(body, headers).status_code == 200
    [event] = events(shop)
    assert (event["name"], event["reference"], event["outcome"]) == ("charge.success", reference, "foreign")
    [stored] = shop.sql("SELECT * FROM provider_events")
    assert stored["digest"] == hashlib.sha256(body).digest()
    assert "stranger" not in str(stored)
    assert count(shop, "incidents") == count(shop, "charges") == 0


def test_an_event_of_the_other_mode_is_stored_and_not_applied(shop: Shop) -> None:
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    assert shop.deliver(payment["reference"], domain="live").status_code == 200
    [event] = events(shop)
    assert event["outcome"] == "other_mode"
    assert event["body"] is not None
    assert count(shop, "charges") == 0
    assert shop.get(payment["id"])["status"] == "pending"


def test_a_repeated_event_is_answered_200_and_changes_nothing(shop: Shop) -> None:
    payment = shop.created()
    shop.pay(payment["reference"])
    before = shop.get(payment["id"]), count(shop, "payment_events")
    for _ in range(3):
        assert shop.deliver(payment["reference"]).status_code == 200
    assert shop.deliver(payment["reference"], fees=1).status_code == 200  # the same charge in another body
    assert [event["deliveries"] for event in events(shop)] == [4, 1]
    assert count(shop, "charges") == 1
    assert count(shop, "incidents") == 0
    assert (shop.get(payment["id"]), count(shop, "payment_events")) == before


def test_an_event_that_cannot_be_applied_is_kept_and_handled_when_it_comes_again(shop: Shop) -> None:
    payment = shop.created()
    shop.sandbox.pay(payment["reference"])
    shop.sql("ALTER TABLE charges ADD CONSTRAINT broken CHECK (amount_minor < 0) NOT VALID")
    assert shop.deliver(payment["reference"]).status_code == 200
    [event] = events(shop)
    assert event["outcome"] == "received"
    assert event["body"] is not None
    assert shop.get(payment["id"])["status"] == "pending"
    shop.sql("ALTER TABLE charges DROP CONSTRAINT broken")
    assert shop.deliver(payment["reference"]).status_code == 200
    assert [event["outcome"] for event in events(shop)] == ["applied"]
    assert shop.get(payment["id"])["status"] == "completed"


def test_while_a_key_is_being_replaced_both_verify(open_shop: OpenShop) -> None:
    shop = open_shop(PAYSTACK_SECRET_KEY=f"{SECRET_KEY},sk_test_older0000")
    for key in (SECRET_KEY, "sk_test_older0000"):
        payment = shop.created()
        shop.sandbox.pay(payment["reference"])
        body, _ = shop.sandbox.event(payment["reference"])
        assert shop.webhook(body, sign(body, key)).status_code == 200
        assert shop.get(payment["id"])["status"] == "completed"
    problem(shop.webhook(b"{}", sign(b"{}", "sk_test_oldest000")), 401, "invalid_signature")


def test_an_event_has_at_most_256_kib(shop: Shop) -> None:
    largest = b"{}".ljust(256 * 1024)
    assert shop.webhook(largest, sign(largest)).status_code == 200
    problem(shop.webhook(largest + b" ", sign(largest + b" ")), 413, "payload_too_large")
    assert count(shop, "provider_events") == 1
