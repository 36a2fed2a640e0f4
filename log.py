"""One JSON line an event, with a fixed set of fields, so that no customer's data and no secret can reach a log."""

import contextvars
import json
import logging
import logging.config
import traceback
from datetime import UTC, datetime
from typing import Any

logger = logging.getLogger("paygate")

request_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)
"""The request that this thread is answering."""


def event(
    name: str,
    *,
    level: int = logging.INFO,
    payment: str | None = None,
    reference: str | None = None,
    ms: float | None = None,
    outcome: str | int | None = None,
) -> None:
    """Log that `name` happened. `outcome` is a word or a status of ours, never text that somebody sent."""
    if logger.isEnabledFor(level):
        fields = {
            "payment": payment,
            "reference": reference,
            "ms": round(ms, 1) if ms is not None else None,
            "outcome": outcome,
            "request_id": request_id.get(),
        }
        # logger.log() would walk the stack for a file and a line that nobody asks for: half the cost of a line.
        record = logging.LogRecord(logger.name, level, "", 0, name, None, None)
        record.fields = {key: value for key, value in fields.items() if value is not None}
        logger.handle(record)


def failure(name: str, error: BaseException, *, payment: str | None = None) -> None:
    """Log an error that nobody expected: its type and where it was raised, without its message.

    The messages of psycopg quote rows ("Failing row contains …") and those of requests URLs and headers. A violated
    constraint is named, for its name says what is wrong.
    """
    diagnosis = getattr(error, "diag", None)
    words = (type(error).__name__, getattr(error, "sqlstate", None), getattr(diagnosis, "constraint_name", None))
    frames = [
        f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)
    ]
    outcome = " ".join(word for word in words if word) + " at " + " ".join(frames[-6:])
    event(name, level=logging.ERROR, payment=payment, outcome=outcome)


class Line(logging.Formatter):
    """A record as one line of JSON: ours with its fields; gunicorn's with its words, unless these quote a request; of
    any other library's only where it came from."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", None)
        words = record.getMessage() if fields is not None or record.name == "gunicorn.error" else record.name
        if words.startswith(QUOTING_WORDS):
            words = " ".join(words.split()[:2])
        if record.exc_info and record.exc_info[0]:
            fields = {"outcome": record.exc_info[0].__name__}
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "event": words,
            **(fields or {}),
        }
        return ENCODE(line)


ENCODE = json.JSONEncoder(ensure_ascii=False).encode
"""json.dumps with an option would make an encoder for each line."""


QUOTING_WORDS = ("Invalid request", "Error handling request")
"""How gunicorn's messages begin that quote a header or a path."""


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
            "gunicorn.error": {"level": "INFO", "handlers": ["stderr"], "propagate": False},
        },
    }


# What LogRecord would look up for every line, and no line shows.
logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
logging.logAsyncioTasks = False  # type: ignore[attr-defined]  # from Python 3.12 on


def configure(level: str) -> None:
    logging.config.dictConfig(configuration(level))
