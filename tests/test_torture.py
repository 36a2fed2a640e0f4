"""What the torture found, each as small as it can be had."""

import time

import db


def test_a_process_that_stood_still_in_a_transaction_goes_on_with_a_new_connection(database_url: str) -> None:
    """PostgreSQL ends such a transaction (idle_in_transaction_session_timeout), so that its locks are free again."""
    with db.Database(database_url, 2) as database:
        stood_still = []

        def work(conn: db.BoundedConnection) -> int:
            if not stood_still:
                conn.execute("SET LOCAL idle_in_transaction_session_timeout = '50ms'")
                stood_still.append(time.sleep(0.3))
            row = conn.execute("SELECT 42 AS answer").fetchone()
            assert row is not None
            return int(row["answer"])

        assert database.transaction("worker", "charge", work) == 42
