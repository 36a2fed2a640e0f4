# ruff: noqa: F811  (fixtures are imported by their names)
"""One line of JSON an event, with nothing in it that anybody sent."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import requests

import db
from shop import Shop, free_port, open_shop, sandbox, shop  # noqa: F401  # fixtures
from web import log

logger = logging.getLogger("paygate")


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator["Lines"]:
    """What is logged at INFO and above, as the service writes it to stderr."""
    root = logging.getLogger()
    handlers, levels = root.handlers[:], (root.level, logger.level)
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    log.configure("INFO")
    token = log.request_id.set("req-1")
    yield Lines(stderr)
    log.request_id.reset(token)
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    logger.setLevel(levels[1])


class Lines:
    def __init__(self, stderr: io.StringIO) -> None:
        self.stderr = stderr

    @property
    def text(self) -> str:
        return self.stderr.getvalue()

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]


def test_an_event_is_one_line_of_json_with_its_fields_in_order(lines: Lines) -> None:
    logger.info(
        "polled", extra={"payment": "PAY-1", "reference": "PG-1", "ms": 12.3, "outcome": "paid", "customer": "zebedee"}
    )
    [line] = lines.read()
    assert list(line) == ["at", "level", "event", "payment", "reference", "ms", "outcome", "request_id"]
    assert line.pop("at").endswith("Z")
    assert line == {
        "level": "INFO",
        "event": "polled",
        "payment": "PAY-1",
        "reference": "PG-1",
        "ms": 12.3,
        "outcome": "paid",
        "request_id": "req-1",
    }


def test_what_is_not_known_is_left_out(lines: Lines) -> None:
    log.request_id.set(None)
    logger.info("listed", extra={"outcome": 0})
    [line] = lines.read()
    assert list(line) == ["at", "level", "event", "outcome"]
    assert line["outcome"] == 0


def test_no_text_can_break_a_line(lines: Lines) -> None:
    logger.info("polled", extra={"outcome": 'a\r\nb"c'})
    assert lines.text.count("\n") == 1
    assert lines.read()[0]["outcome"] == 'a\r\nb"c'


def test_what_is_below_the_level_is_not_written(lines: Lines) -> None:
    logger.debug("detail")
    assert lines.text == ""


def raise_and_log(error: Exception) -> None:
    try:
        raise error
    except Exception as raised:
        logger.error("unexpected", exc_info=raised, extra={"payment": "PAY-1"})


def test_an_error_is_logged_by_its_type_and_place_and_never_by_its_message(lines: Lines) -> None:
    raise_and_log(requests.ConnectionError("https://zebedee:hush@example.com/ refused zebedee@example.com"))
    [line] = lines.read()
    assert line["level"] == "ERROR"
    assert line["payment"] == "PAY-1"
    assert line["outcome"].startswith("ConnectionError at test_log.py:")
    assert "zebedee" not in lines.text


def test_an_error_that_was_caused_by_another_hides_both_messages(lines: Lines) -> None:
    try:
        try:
            raise ValueError("zebedee")
        except ValueError as cause:
            raise RuntimeError("zebedee again") from cause
    except RuntimeError as error:
        logger.error("unexpected", exc_info=error)
    assert "RuntimeError" in lines.text
    assert "zebedee" not in lines.text


def test_a_violated_constraint_is_named_without_the_row_that_violates_it(lines: Lines, database_url: str) -> None:
    with psycopg.connect(database_url) as conn:
        conn.execute("CREATE TABLE names (name text CONSTRAINT name_is_short CHECK (length(name) < 3))")
        try:
            conn.execute("INSERT INTO names VALUES ('zebedee')")
        except psycopg.Error as error:
            assert "zebedee" in str(error)
            logger.error("unexpected", exc_info=error)
    [line] = lines.read()
    assert line["outcome"].startswith("CheckViolation 23514 name_is_short at ")
    assert "zebedee" not in lines.text


@pytest.mark.parametrize("name", ["psycopg", "urllib3.connectionpool", "falcon", "concurrent.futures"])
def test_of_a_librarys_message_only_its_source_is_kept(lines: Lines, name: str) -> None:
    logging.getLogger(name).warning("cannot connect to %s", "postgresql://zebedee:hush@db", exc_info=ValueError("hush"))
    [line] = lines.read()
    assert (line["level"], line["event"]) == ("WARNING", name)
    assert "zebedee" not in lines.text
    assert "hush" not in lines.text


def test_a_library_is_not_heard_below_a_warning(lines: Lines) -> None:
    logging.getLogger("urllib3").debug("zebedee")
    logging.getLogger("psycopg").info("zebedee")
    assert lines.text == ""


def test_a_request_s_line_names_its_payment(lines: Lines, shop: Shop) -> None:
    payment = shop.created()
    shop.get(payment["id"])
    shop.client.simulate_get(f"/pay/{payment['id']}")
    shop.pay(payment["reference"])
    shop.sandbox.fault("initialize", "lost-request", times=2)
    assert shop.create("one").status_code == 503
    assert [line["outcome"] for line in lines.read() if line["event"] == "provider_unavailable"] == ["unreachable"]
    created, read, page, hook, lost = [line for line in lines.read() if line["event"].startswith(("GET", "POST"))]
    assert [line["payment"] for line in (created, read, page)] == [payment["id"]] * 3
    assert hook["reference"] == payment["reference"]
    assert [{"id": lost["payment"]}] == shop.sql("SELECT id FROM payments WHERE id <> %s", payment["id"])


def test_why_the_database_is_away_is_told_once_and_again_when_it_changes(lines: Lines, database_url: str) -> None:
    def away(url: str) -> None:
        with db.Database(url, 2) as database, pytest.raises(db.DatabaseUnavailable):
            database.run(lambda conn: conn.execute("SELECT 1"), within_seconds=3)

    with db.Database(database_url, 1) as database:
        database.run(lambda conn: conn.execute("SELECT 1"))
    nowhere = f"postgresql://zebedee:hush@127.0.0.1:{free_port()}/shop"
    away(nowhere)
    away(nowhere)
    away(database_url + "&dbname=nonesuch")
    told = [line for line in lines.read() if line["event"] == "database_away"]
    assert [line["level"] for line in told] == ["ERROR", "ERROR"]
    assert "refused" in told[0]["outcome"]
    assert '"nonesuch" does not exist' in told[1]["outcome"]
    assert "hush" not in lines.text
    assert "psycopg.pool" not in lines.text
