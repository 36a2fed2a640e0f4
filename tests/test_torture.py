"""The torture in its short form, and what it found, each as small as it can be had."""

import os
import subprocess
import sys
import time
from pathlib import Path

import db
from backstage import at_once
from shop import ROOT


def test_nothing_is_lost_doubled_stuck_or_wrong_while_everything_breaks(tmp_path: Path) -> None:
    """`make torture` is the same for as long as you like."""
    run = subprocess.run(
        [sys.executable, "-m", "torture", "--seed", "7", "--minutes", "0.5", "--brisk", "--shoppers", "4"],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr


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


def test_requests_with_one_key_at_the_same_moment_meet_each_other_and_no_error(database_url: str) -> None:
    """The key and the payment's id, which is made from it, are both unique: the loser may hit either of the two."""
    order = db.Order("Jane Doe", "jane@example.com", "+2348012345678", 5000, "Lagos", "NGN")

    def reserve(database: db.Database, key: bytes) -> bool:
        try:
            db.reserve(database, mode="test", key=key, order=order, lease_seconds=60, ttl_seconds=3600)
        except db.InFlight:
            return False
        return True

    with db.Database(database_url, 4) as database:
        for number in range(200):
            key = db.key_of(f"key-{number}")
            took = at_once([lambda key=key: reserve(database, key)] * 4)
            assert sorted(took) == [False, False, False, True]
