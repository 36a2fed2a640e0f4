"""Payments in many states, and what is done to them behind everybody's back, for the commands that read the books."""

import re
from typing import Any

import psycopg
import pytest
from psycopg import sql

from local.sandbox import Sandbox
from money_back import settle
from shop import Shop
from till import Till, paid


def as_superuser(till: Till, statement: str, *values: object) -> None:
    """As somebody who may do everything and leaves no trace: no trigger fires, no key is checked."""
    with psycopg.connect(till.database_url) as conn:
        conn.execute("SET session_replication_role = replica")
        conn.execute(sql.SQL(statement), values)


@pytest.fixture
def ledger(shop: Shop, sandbox: Sandbox, till: Till) -> list[dict[str, Any]]:
    """Payments in many states: paid, refunded, in review, pending, paid in other ways."""
    payments = [
        paid(shop),
        paid(shop, customer_email="pays-fees@example.com"),
        paid(shop, customer_email="underpaid@example.com"),
        shop.created(),
        paid(shop, amount=70),
    ]
    till.did("refund", payments[4]["id"], "--amount", "30")
    settle(shop, sandbox, payments[4]["reference"])
    return payments


def checkpoint_of(out: str) -> str:
    found = re.search(r"^checkpoint (\d+:[0-9a-f]{64})$", out, re.MULTILINE)
    assert found is not None, out
    return found[1]
