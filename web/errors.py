"""Errors for clients: the one list of codes, statuses and messages, and the shape of every error."""

import json

from web import log

HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
"""Of every answer, unless a resource changes them."""

PROBLEMS = {
    "bad_request": (400, "The request is malformed."),
    "invalid_json": (400, "The body is not valid JSON."),
    "invalid_idempotency_key": (400, "Send one Idempotency-Key of 1 to 255 visible ASCII characters."),
    "idempotency_key_required": (400, "Send an Idempotency-Key header, and the same key when you try again."),
    "unauthorized": (401, "Send the API token as Authorization: Bearer TOKEN."),
    "invalid_signature": (401, "The signature does not match the body."),
    "token_required": (403, "The back office needs a token: set ADMIN_TOKEN, and send it as Authorization: Bearer."),
    "link_refused": (403, "This payment link was changed. Ask for the link again."),
    "not_found": (404, "There is nothing at this address."),
    "method_not_allowed": (405, "This method is not allowed here. See the Allow header."),
    "request_timeout": (408, "The body did not arrive in time."),
    "request_in_flight": (409, "A request with this Idempotency-Key is in progress. Try again."),
    "link_over": (410, "This payment link has expired. Ask for a new one."),
    "link_withdrawn": (410, "The shop has withdrawn this payment link. Ask for a new one."),
    "payload_too_large": (413, "The body is too large."),
    "unsupported_media_type": (415, "Send JSON."),
    "invalid_fields": (422, "Some fields are invalid."),
    "not_possible": (422, "This cannot be done."),
    "idempotency_key_reused": (422, "This Idempotency-Key was used for another request."),
    "provider_refused": (422, "The payment provider refuses this request."),
    "payment_expired": (422, "This payment has expired. Start another one with a new Idempotency-Key."),
    "internal_error": (500, "Something went wrong here. It has been logged."),
    "rate_limited": (429, "Too many payments from your address. Try again later, with the same Idempotency-Key."),
    "provider_misconfigured": (
        502,
        "The payment provider refuses this server's set-up. The operator must correct it.",
    ),
    "provider_unavailable": (503, "The payment provider gave no answer. Try again with the same Idempotency-Key."),
    "references_used_up": (503, "This payment could not be opened. The operator has been told."),
    "busy": (503, "The server is opening too many payments. Try again with the same Idempotency-Key."),
    "database_unavailable": (503, "The database is away. Try again, with the same Idempotency-Key if you sent one."),
}


class Problem(Exception):
    """An error for the client: one of PROBLEMS, maybe with a message of its own."""

    def __init__(
        self,
        code: str,
        message: str | None = None,
        *,
        errors: dict[str, list[str]] | None = None,
        retry_after_seconds: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(code)
        self.code = code
        self.status, self.message = PROBLEMS[code][0], message or PROBLEMS[code][1]
        self.errors = errors
        self.headers = dict(headers or {})
        if retry_after_seconds is not None:
            self.headers["Retry-After"] = str(max(1, round(retry_after_seconds)))

    def to_json(self) -> str:
        body = {
            "status": "error",
            "code": self.code,
            "message": self.message,
            "errors": self.errors,
            "request_id": log.request_id.get(),
        }
        return json.dumps({name: value for name, value in body.items() if value is not None}, ensure_ascii=False)
