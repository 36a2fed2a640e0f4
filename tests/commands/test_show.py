# ruff: noqa: F811  (fixtures are imported by their names)
"""The whole story of a payment, and every incident."""

import json
import re

import pytest

from customer import page_of
from local.sandbox import Sandbox
from money_back import settle
from shop import Shop, open_shop, sandbox, shop  # noqa: F401  # fixtures
from till import Till, open_till, paid, till  # noqa: F401  # fixtures
from web import story


def test_show_tells_the_whole_story_in_order(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop)
    till.did("refund", payment["id"], "--amount", "20", "--reason", "one item", "--by", "Grace")
    settle(shop, sandbox, payment["reference"])
    out = till.did("show", payment["id"])
    steps = (
        "payment of NGN 50.00 asked for → pending",
        "checkout page opened",
        "the request was answered (payment)",
        "NGN 50.00 came as",
        "paid: NGN 50.00 → completed",
        "event charge.success",
        "of NGN 20.00 asked for (one item)",
        "event refund.processed",
        "was paid out",
        "given back so far: NGN 20.00 → partially_refunded",
    )
    places = [out.find(step) for step in steps]
    assert -1 not in places, steps[places.index(-1)]
    assert places == sorted(places)
    assert "operator:Grace" in out
    assert out.startswith(f"{payment['id']}: NGN 50.00, partially refunded (TEST)")


def test_show_for_a_program_is_json(shop: Shop, till: Till) -> None:
    payment = paid(shop)
    told = json.loads(till.did("show", payment["reference"], "--json"))
    assert told["payment"]["customer_phone"] == "+2348012345678"
    assert [each["what"] for each in told["timeline"]][-1] == "next poll"
    assert [each["at"] for each in told["timeline"]] == sorted(each["at"] for each in told["timeline"])
    (charge,) = [each["facts"] for each in told["timeline"] if each["what"] == "charge"]
    assert (charge["amount"], charge["currency"]) == ("50.00", "NGN")


def test_show_finds_a_payment_by_any_of_its_references_in_either_mode(shop: Shop, till: Till) -> None:
    payment = shop.created()
    live = "sk_live_0123456789abcdef"
    for name in (payment["id"], payment["reference"], f"{payment['reference']}-4"):
        assert payment["id"] in till.did("show", name, PAYSTACK_SECRET_KEY=live)


def test_show_finds_a_payment_by_the_number_on_its_receipt(shop: Shop, till: Till) -> None:
    payment = paid(shop)
    paid(shop)
    number = re.search(r"<dt>Receipt</dt><dd>(\w+)</dd>", page_of(shop, payment["id"]).text)
    assert number is not None
    for name in (number[1], number[1].lower()):
        assert till.did("show", name).startswith(payment["id"])
    for other in (number[1][:9], number[1][:9] + "-", number[1] + "0"):
        assert till.run("show", other).status == 1


@pytest.mark.parametrize("kind", sorted(story.INCIDENTS))
def test_every_incident_says_what_it_is_and_can_be_closed(shop: Shop, till: Till, kind: str) -> None:
    payment = paid(shop)
    till.sql(
        "INSERT INTO incidents (mode, kind, subject, payment_id) VALUES ('test', %s, 'SUBJECT', %s)",
        *(kind, payment["id"]),
    )
    done = till.run("doctor")
    assert done.status == 1
    (line,) = [line for line in done.out.splitlines() if line.startswith("BAD")]
    assert "incident 1" in line
    assert line.partition("incident 1")[2].strip() in till.did("show", payment["id"])
    till.did("resolve", "--incident", "1", "--reason", "seen to it")
    assert "seen to it" in till.did("show", payment["id"])
    assert till.run("doctor").status == 0
    assert till.run("resolve", "--incident", "1", "--reason", "twice").status == 1


def test_show_says_the_price_and_what_was_given_back(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = paid(shop, customer_email="pays-fees@example.com", amount="5000")
    assert till.did("show", payment["id"]).startswith(f"{payment['id']}: NGN 5,000.00, completed")
    till.did("refund", payment["id"], "--amount", "1200.50")
    sandbox.move_refund(payment["reference"], "processed")
    till.did("sync", payment["id"])
    assert "given back  NGN 1,200.50\n" in till.did("show", payment["id"])
