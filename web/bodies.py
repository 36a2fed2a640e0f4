"""Reads a request's body, and its Idempotency-Key."""

import re
from typing import Any

import falcon
from gunicorn.http.errors import ParseException

from web import orders
from web.errors import Problem

LARGEST_JSON = 16 * 1024


def read(req: falcon.Request, most: int, what: str) -> bytes:
    """The whole body, in chunks or not. Raises Problem."""
    too_large = Problem("payload_too_large", f"{what} is at most {most} bytes.")
    length = req.content_length
    if length is not None and length > most:
        raise too_large
    try:
        # Falcon's bounded_stream reads chunks as nothing; gunicorn's stream ends where the body ends.
        body: bytes = req.stream.read(most + 1 if length is None else length)
    except TimeoutError:  # see web/sockets.py
        raise Problem("request_timeout") from None
    except (OSError, ParseException):  # a cut connection, malformed chunks
        raise Problem("bad_request") from None
    if len(body) > most:
        raise too_large
    if len(body) < (length or 0):
        raise Problem("bad_request", "The body is shorter than its Content-Length.")
    return body


def read_json(req: falcon.Request) -> dict[str, Any]:
    """The JSON object in the request's body; its numbers stay text. Raises Problem."""
    if (req.content_type or "").partition(";")[0].strip().lower() != falcon.MEDIA_JSON:
        raise Problem("unsupported_media_type", "Send JSON, with Content-Type: application/json.")
    if (req.get_header("Content-Encoding") or "identity").lower() != "identity":
        raise Problem("unsupported_media_type", "Send the body as it is, without Content-Encoding.")
    return orders.parse_json(read(req, LARGEST_JSON, "A request"))


VISIBLE_ASCII = re.compile(r"[!-~]{1,255}", re.ASCII)
QUOTED_KEY = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\]){1,510})"', re.ASCII)


def idempotency_key(req: falcon.Request, is_required: bool) -> str | None:
    """The Idempotency-Key, bare or as a quoted string (draft-ietf-httpapi-idempotency-key-header): both are the same
    key.

    A comma in a bare key is refused, because two headers arrive joined by a comma.
    """
    header = req.get_header("Idempotency-Key")
    if header is None:
        if is_required:
            raise Problem("idempotency_key_required")
        return None
    quoted = QUOTED_KEY.fullmatch(header)
    key = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else header
    if not VISIBLE_ASCII.fullmatch(key) or (not quoted and re.search(r'[",]', key)):
        raise Problem("invalid_idempotency_key")
    return key
