"""What holds for the API's answers, and for its errors in the one shape that errors have."""

import re
from typing import Any

from falcon.testing import Result

from shop import Reply


def guarded(answer: Result | Reply) -> None:
    """What every answer carries."""
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", answer.headers["x-request-id"])
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


def problem(answer: Result | Reply, status: int, code: str) -> dict[str, Any]:
    """The error in an answer, in the one shape that errors have."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    guarded(answer)
    error = answer.json
    members = ["status", "code", "message", *(["errors"] if "errors" in error else []), "request_id"]
    assert list(error) == members
    assert (error["status"], error["code"]) == ("error", code)
    assert error["message"].endswith(".")
    assert error["request_id"] == answer.headers["x-request-id"]
    return dict(error)


def invalid(answer: Result) -> dict[str, list[str]]:
    """What is wrong with the fields of a payment, by their names."""
    errors = problem(answer, 422, "invalid_fields")["errors"]
    assert all(messages and all(messages) for messages in errors.values())
    return dict(errors)


def to_be_retried(answer: Result | Reply) -> None:
    assert int(answer.headers["retry-after"]) >= 1


def without_request_id(answer: Any) -> dict[str, Any]:
    """An error's members that a repetition has too."""
    return {name: value for name, value in answer.json.items() if name != "request_id"}
