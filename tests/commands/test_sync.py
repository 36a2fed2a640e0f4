# ruff: noqa: F811  (fixtures are imported by their names)
"""`sync`: the provider is asked about one payment now."""

from backstage import age
from local.sandbox import Sandbox
from shop import Shop, open_shop, sandbox, shop  # noqa: F401  # fixtures
from till import Till, open_till, till  # noqa: F401  # fixtures


def test_sync_tells_what_has_become_of_a_payment(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = shop.created()
    assert f"{payment['id']} is still pending" in till.did("sync", payment["id"])
    sandbox.decline(payment["reference"])
    assert "last try declined: Insufficient Funds" in till.did("sync", payment["id"])
    sandbox.pay(payment["reference"])
    assert f"{payment['id']} is completed" in till.did("sync", payment["id"])
    sandbox.dashboard_refund(payment["reference"], 1000)
    sandbox.move_refund(payment["reference"], "processed")
    assert "is partially_refunded, NGN 10.00 given back" in till.did("sync", payment["reference"])


def test_sync_says_when_there_was_no_answer(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = shop.created()
    sandbox.fault("verify", "lost-answer")
    done = till.run("sync", payment["id"])
    assert (done.status, "is still pending" in done.out, "no final answer" in done.err) == (1, True, True)


def test_sync_does_not_move_the_regular_looks(shop: Shop, till: Till) -> None:
    payment = shop.created()
    age(shop.database_url, payment["id"], 7 * 60)
    for _ in range(2):
        till.did("sync", payment["id"])
        (row,) = shop.sql("SELECT extract(epoch FROM poll_at - created_at)::int AS at FROM payments")
        assert 595 <= row["at"] <= 605


def test_sync_says_what_went_back_in_its_charges_currency(shop: Shop, sandbox: Sandbox, till: Till) -> None:
    payment = shop.created(customer_email="other-currency@example.com")
    sandbox.pay(payment["reference"])
    till.did("sync", payment["id"])
    sandbox.dashboard_refund(payment["reference"])
    sandbox.move_refund(payment["reference"], "processed")
    assert "is refunded, GHS 50.00 given back" in till.did("sync", payment["id"])
