"""Refunds as tests look at them, and their way to an end at the provider."""

from typing import Any

import psycopg

from backstage import poll, worker_of
from local.sandbox import Sandbox
from shop import Shop

MINUTE, HOUR, DAY = 60, 3600, 86400


def refunds(shop: Shop) -> list[dict[str, Any]]:
    return shop.sql("SELECT * FROM refunds ORDER BY created_at, id")


def only_refund(shop: Shop) -> dict[str, Any]:
    (refund,) = refunds(shop)
    return refund


def incidents(shop: Shop) -> list[str]:
    """The kinds of the open ones."""
    return [row["kind"] for row in shop.sql("SELECT kind FROM incidents WHERE closed_at IS NULL ORDER BY id")]


def statuses(shop: Shop) -> list[str]:
    return [refund["status"] for refund in refunds(shop)]


def age(shop: Shop, seconds: float) -> None:
    """As if every refund had been asked for `seconds` earlier, and is due for a look."""
    with psycopg.connect(shop.database_url) as conn:
        conn.execute("SET session_replication_role = replica")
        conn.execute(
            """
            UPDATE refunds SET poll_at = now(), created_at = created_at - make_interval(secs => %(seconds)s),
                               sent_at = sent_at - make_interval(secs => %(seconds)s),
                               send_ended_at = send_ended_at - make_interval(secs => %(seconds)s)
            """,
            {"seconds": seconds},
        )


def seek(shop: Shop) -> None:
    """One round of the worker's looks at refunds and at payments that wait for refunds, with everything due."""
    shop.sql("UPDATE refunds SET poll_at = now() WHERE poll_at IS NOT NULL")
    worker_of(shop).poll_refunds()
    poll(shop)


def settle(shop: Shop, sandbox: Sandbox, reference: str, status: str = "processed") -> None:
    """The last refund of a charge comes to its end at the provider, and the event tells of it."""
    sandbox.move_refund(reference, status)
    assert shop.deliver(reference, f"refund.{status}").status_code == 200
    seek(shop)


def wait_for_refunds(shop: Shop) -> None:
    """The polls, until the half hour in which refunds are waited for is over."""
    poll(shop)
    shop.sql(
        "UPDATE payments SET refunds_awaited_since = now() - interval '31 min' WHERE refunds_awaited_since IS NOT NULL"
    )
    poll(shop)
