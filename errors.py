"""What can go wrong for a client: the one list of codes, statuses and messages, and the shape of every error."""

import json

import log

PROBLEMS = {
    "invalid_json": (400, "The body is not valid JSON."),
    "invalid_idempotency_key": (400, "Send one Idempotency-Key of 1 to 255 visible ASCII characters."),
    "idempotency_key_required": (400, "Send an Idempotency-Key header: the same one when you try again."),
    "bad_request": (400, "The request is malformed."),
    "unauthorized": (401, "Send the API token as Authorization: Bearer TOKEN."),
    "invalid_signature": (401, "The signature does not match the body."),
    "link_refused": (403, "This payment link is not as it was made. Ask for the link again."),
    "not_found": (404, "There is nothing at this address."),
    "method_not_allowed": (405, "This method is not allowed here; see the Allow header."),
    "request_timeout": (408, "The body did not come in time."),
    "request_in_flight": (409, "A request with this Idempotency-Key is being worked on; try again."),
    "link_over": (410, "The time of this payment link has ended. Ask for a new one."),
    "length_required": (411, "Send a Content-Length."),
    "payload_too_large": (413, "The body is too large."),
    "unsupported_media_type": (415, "Send JSON."),
    "invalid_fields": (422, "Some fields are invalid."),
    "idempotency_key_reused": (422, "This Idempotency-Key came before with another payment."),
    "provider_refused": (422, "The payment provider refuses this payment."),
    "payment_expired": (422, "The time of this payment has ended; start another one with a new Idempotency-Key."),
    "internal_error": (500, "Something went wrong here. It has been logged."),
    "rate_limited": (429, "Too many payments from your address; try again later, with the same Idempotency-Key."),
    "provider_misconfigured": (502, "The payment provider refuses this service's set-up; the operator must mend it."),
    "provider_unavailable": (503, "The payment provider gave no answer; try again with the same Idempotency-Key."),
    "references_used_up": (503, "This payment could not be opened; the operator has been told."),
    "busy": (503, "Too many payments are being opened; try again with the same Idempotency-Key."),
    "database_unavailable": (503, "The database is away; try again, with the same Idempotency-Key if you sent one."),
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
