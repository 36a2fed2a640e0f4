"""The log's format: one JSON line an event, with a fixed set of fields, so that no customer's data and no secret can
reach a log.

    logging.getLogger("paygate").info("polled", extra={"payment": payment.id, "outcome": "paid", "ms": 81.5})
"""

import contextvars
import json
import logging
import logging.config
import traceback
from datetime import UTC, datetime
from typing import Any

request_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)
"""The request that this thread is answering."""

FIELDS = ("payment", "reference", "ms", "outcome")
"""The members of a record's `extra` that a line shows. `outcome` is our own word or status, never text from a
client."""

QUOTING_WORDS = ("Invalid request", "Error handling request")
"""The beginnings of gunicorn's messages that quote a header or a path."""


class Line(logging.Formatter):
    """A record as one line of JSON. Our records have their fields; gunicorn's have their words, unless these quote a
    request; other libraries' records have only the logger's name."""

    def format(self, record: logging.LogRecord) -> str:
        words = record.getMessage() if record.name in ("paygate", "gunicorn.error") else record.name
        if words.startswith(QUOTING_WORDS):
            words = " ".join(words.split()[:2])
        fields = {name: getattr(record, name, None) for name in FIELDS} | {"request_id": request_id.get()}
        if record.exc_info and record.exc_info[1]:
            fields["outcome"] = kind_and_place(record.exc_info[1])
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "event": words,
            **{name: value for name, value in fields.items() if value is not None},
        }
        return json.dumps(line, ensure_ascii=False)


def kind_and_place(error: BaseException) -> str:
    """An error's type and where it was raised, without its message.

    psycopg's messages quote rows ("Failing row contains …"), and requests' messages quote URLs and headers. The name of
    a violated constraint is logged, because it says what is wrong.
    """
    diagnosis = getattr(error, "diag", None)
    words = (type(error).__name__, getattr(error, "sqlstate", None), getattr(diagnosis, "constraint_name", None))
    frames = [
        f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)
    ]
    return " ".join(word for word in words if word) + (" at " + " ".join(frames[-6:]) if frames else "")


def configuration(level: str) -> dict[str, Any]:
    """For logging.config.dictConfig: all that is logged goes to stderr, one JSON line an event."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": Line}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
        "root": {"level": "WARNING", "handlers": ["stderr"]},
        "loggers": {
            "paygate": {"level": level},
            # `database_away` says better what its warnings say.
            "psycopg.pool": {"level": "ERROR"},
            "gunicorn.error": {"level": "INFO", "handlers": ["stderr"], "propagate": False},
        },
    }


def configure(level: str) -> None:
    logging.config.dictConfig(configuration(level))
