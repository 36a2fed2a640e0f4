# ruff: noqa: F811  (fixtures are imported by their names)
"""Whether it lives and is ready, whatever has become of the database."""

import concurrent.futures
import re
import time
from collections.abc import Callable
from typing import Any

from falcon.testing import Result
from psycopg.conninfo import conninfo_to_dict

from answers import guarded, problem, to_be_retried
from local.sandbox import Sandbox
from shop import PAYMENTS, UNKNOWN_ID, Shop, counter, open_shop, query, sandbox, shop, sign  # noqa: F401  # fixtures


def test_the_process_lives_whatever_has_become_of_the_database(counter: Shop) -> None:
    answer = counter.client.simulate_get("/healthz")
    assert answer.status_code == 200
    guarded(answer)


def test_it_is_ready_when_the_database_can_be_written(shop: Shop) -> None:
    answer = shop.client.simulate_get("/readyz")
    assert answer.status_code == 200
    guarded(answer)


def assert_not_ready(answer: Result) -> None:
    assert answer.status_code == 503, answer.text
    guarded(answer)
    to_be_retried(answer)


def test_it_is_not_ready_without_its_schema(cluster: Any, sandbox: Sandbox) -> None:
    with Shop(cluster.url, sandbox) as shop:
        assert_not_ready(shop.client.simulate_get("/readyz"))


def test_it_is_not_ready_with_a_schema_older_than_it_needs_and_ready_with_a_newer(shop: Shop) -> None:
    shop.sql("INSERT INTO migrations VALUES (9999, now())")
    assert shop.client.simulate_get("/readyz").status_code == 200
    shop.sql("DELETE FROM migrations")
    assert_not_ready(shop.client.simulate_get("/readyz"))


def test_it_is_not_ready_where_the_database_can_only_be_read(database_url: str, sandbox: Sandbox) -> None:
    name = conninfo_to_dict(database_url)["dbname"]
    query(database_url, f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    with Shop(database_url, sandbox) as shop:
        assert_not_ready(shop.client.simulate_get("/readyz"))


def test_while_the_database_is_away_each_answer_says_so_in_time_and_no_more(counter: Shop) -> None:
    body = b'{"event": "charge.success", "data": {"reference": "T1"}}'
    requests: dict[str, Callable[[], Result]] = {
        "create": counter.create,
        "webhook": lambda: counter.webhook(body, sign(body)),
        "read": lambda: counter.client.simulate_get(f"{PAYMENTS}/{UNKNOWN_ID}"),
        "page": lambda: counter.client.simulate_get(f"/pay/{UNKNOWN_ID}"),
        "ready": lambda: counter.client.simulate_get("/readyz"),
    }
    seconds: dict[str, float] = {}

    def timed(name: str) -> Result:
        started = time.monotonic()
        answer = requests[name]()
        seconds[name] = time.monotonic() - started
        return answer

    with concurrent.futures.ThreadPoolExecutor() as pool:
        answers = dict(zip(requests, pool.map(timed, requests), strict=True))
    for name, answer in answers.items():
        assert answer.status_code == 503
        if name != "page":
            problem(answer, 503, "database_unavailable")
        guarded(answer)
        to_be_retried(answer)
        assert not re.search(r"keeper|opensesame|vault|127\.|psycopg|\w+Error|Timeout|refused|SELECT", answer.text)
    assert seconds["ready"] < 4.5
    assert max(seconds.values()) < 20
