# ruff: noqa: F811  (fixtures are imported by their names)
"""What is done about one payment changes nothing of another, whatever has become of that one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from backstage import end_time
from local.sandbox import Sandbox
from shop import Shop, open_shop, sandbox  # noqa: F401  # fixtures
from till import Till, open_till, paid  # noqa: F401  # fixtures

NOTIFY = {"NOTIFY_URL": "http://127.0.0.1:9/", "NOTIFY_SECRET": "whsec_" + "QUFB" * 11}
REFUSAL = {"status": False, "message": "Invalid Email Address Passed", "type": "validation_error"}
UNDERPAID = "underpaid@example.com"
TABLES = {
    "payments": "id",
    **dict.fromkeys(
        ("idempotency_keys", "charges", "refunds", "incidents", "payment_events", "notifications", "provider_events"),
        "payment_id",
    ),
}


@dataclass
class Street:
    """A shop with payments in every state, and the one who minds it."""

    shop: Shop
    till: Till

    @property
    def sandbox(self) -> Sandbox:
        return self.shop.sandbox

    def status(self, payment: dict[str, Any]) -> str:
        """Read behind the service's back: whoever reads an unpaid payment there has it looked at soon."""
        return str(self.shop.sql("SELECT status FROM payments WHERE id = %s", payment["id"])[0]["status"])

    def refused(self) -> None:
        self.sandbox.fault("initialize", "answer", effect=False, status=400, body=REFUSAL)
        assert self.shop.create().status_code == 422

    def unanswered(self) -> None:
        self.sandbox.fault("initialize", "500", times=2)
        assert self.shop.create().status_code == 503

    def over(self) -> None:
        payment = self.shop.created()
        self.sandbox.decline(payment["reference"])
        end_time(self.shop.database_url, payment["id"])
        self.till.did("sync", payment["id"])
        assert self.status(payment) == "failed"

    def given_back(self, amount: str, status: str = "processed") -> None:
        payment = paid(self.shop)
        self.till.did("refund", payment["id"], "--amount", amount, "--reason", "sent back")
        self.sandbox.move_refund(payment["reference"], status)
        self.shop.deliver(payment["reference"], f"refund.{status}")
        self.till.did("sync", payment["id"])

    def refund_refused(self) -> None:
        self.sandbox.fault("refund", "answer", effect=False, status=400, body={"status": False, "message": "No"})
        assert self.till.run("refund", paid(self.shop)["id"], "--reason", "sent back").status == 1

    def told_unreadably(self) -> None:
        reference = self.shop.created()["reference"]
        self.sandbox.pay(reference)
        self.shop.deliver(reference, amount=None)

    def paid_twice(self) -> None:
        payment = paid(self.shop)
        self.sandbox.charge_elsewhere(f"{payment['reference']}-2", amount=5000)
        self.shop.deliver(f"{payment['reference']}-2")
        (open_one,) = self.shop.sql("SELECT id FROM incidents WHERE payment_id = %s", payment["id"])
        self.till.did("resolve", "--incident", str(open_one["id"]), "--reason", "a gift")

    def disputed(self) -> None:
        payment = paid(self.shop)
        self.sandbox.dispute(payment["reference"])
        self.shop.deliver(payment["reference"], "charge.dispute.create")
        self.shop.deliver(payment["reference"], "charge.dispute.resolve")

    def accepted(self) -> None:
        payment = paid(self.shop, customer_email=UNDERPAID)
        self.till.did("resolve", payment["id"], "accept", "--reason", "the rest came in cash")

    def rejected(self) -> None:
        payment = paid(self.shop, customer_email=UNDERPAID)
        self.till.did("resolve", payment["id"], "reject", "--reason", "too little")
        self.sandbox.move_refund(payment["reference"], "processed")
        self.till.did("sync", payment["id"])
        assert self.status(payment) == "refunded"

    def erased(self) -> None:
        self.till.did("erase", paid(self.shop)["id"], "--yes")

    def notified_again(self) -> None:
        self.till.did("notify", paid(self.shop)["id"])

    def left_alone(self) -> None:
        """Of each kind one more, and open: a payment to be paid, one to be reviewed, a refund under way."""
        self.shop.created()
        paid(self.shop, customer_email=UNDERPAID)
        self.till.did("refund", paid(self.shop)["id"], "--reason", "sent back")
        for _ in range(2):
            payment = paid(self.shop)
            self.sandbox.dispute(payment["reference"])
            self.shop.deliver(payment["reference"], "charge.dispute.create")

    def rows(self, payments: list[str]) -> dict[str, list[dict[str, Any]]]:
        return {
            table: self.shop.sql(f"SELECT * FROM {table} WHERE {key} = ANY(%s) ORDER BY {table}::text", payments)  # noqa: S608  # ours
            for table, key in TABLES.items()
        }


def differences(rows: dict[str, list[dict[str, Any]]], before: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A line for each row that has changed, come or gone."""
    return [
        f"{table}: {[f'{name}: {was[name]} -> {value}' for name, value in row.items() if value != was[name]]}"
        for table in before
        for row, was in zip(rows[table], before[table], strict=True)
        if row != was
    ]


DOINGS: tuple[Callable[[Street], None], ...] = (
    Street.erased,
    Street.refused,
    Street.unanswered,
    Street.over,
    lambda street: street.given_back("50"),
    lambda street: street.given_back("10", "failed"),
    Street.refund_refused,
    Street.told_unreadably,
    Street.paid_twice,
    Street.disputed,
    Street.accepted,
    Street.rejected,
    Street.notified_again,
)


@pytest.fixture
def street(open_shop: Callable[..., Shop], open_till: Callable[..., Till]) -> Street:
    return Street(open_shop(**NOTIFY), open_till(**NOTIFY))


def test_what_is_done_about_one_payment_changes_nothing_of_another(street: Street) -> None:
    for doing in (*DOINGS, Street.left_alone):
        doing(street)
    neighbours = [row["id"] for row in street.shop.sql("SELECT id FROM payments")]
    before = street.rows(neighbours)
    assert all(len(rows) > 1 for rows in before.values()), "no neighbours in a table"
    for doing in DOINGS:
        doing(street)
        assert differences(street.rows(neighbours), before) == [], doing
