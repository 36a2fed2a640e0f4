"""What no generator can know: the origins that a shop has allowed, which keys were used, how a webhook is signed."""

import hashlib
import hmac
import json
import os
import re
from typing import Any, cast

import requests
import requests.auth
import schemathesis

ALLOWED = os.environ["RETURN_URL_ORIGINS"]
VALID_KEY = re.compile(r'([!#-+\--~]{1,255})|(")((?:[!#-\[\]-~]|\\["\\]){1,255})"')
SECRET_KEY = os.environ["PAYSTACK_SECRET_KEY"].encode()


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case[Any], kwargs: dict[str, Any]) -> None:
    headers: Any = case.headers or {}
    body = case.body
    if case.path == "/":  # where only a browser finds something
        cast(Any, case).headers = {**headers, "Accept": "text/html"}
    # A URL that is well-formed leads to the shop: which shops are allowed is no rule of the description.
    if isinstance(body, dict) and isinstance(url := body.get("return_url"), str) and len(url) <= 2000:
        body["return_url"] = re.sub(r"^https?://[!-\[\]-~]+$", f"{ALLOWED}/thanks", url)
    # Digits that happen to be a card number are refused, rightly; no card number is made of ones.
    if isinstance(body, dict):
        without_card_numbers(body)
        if isinstance(metadata := body.get("metadata"), dict):
            body["metadata"] = {name: 1 if type(value) in (int, float) else value for name, value in metadata.items()}
    if isinstance(query := case.query, dict):
        without_card_numbers(query)
        query_that_can_be_met(case.path, query)
    # The same key with another payment is refused, rightly: each payment gets a key of its own.
    key = headers.get("Idempotency-Key")
    if isinstance(key, str) and (valid := VALID_KEY.fullmatch(key)):
        digest = hashlib.sha256(json.dumps(body, default=str).encode()).hexdigest()[:16]
        quote, text = valid[2] or "", valid[1] or valid[3]
        headers["Idempotency-Key"] = f"{quote}{text if len(text) < 240 else ''}{digest}{quote}"
    kwargs["auth"] = Signed()


def without_card_numbers(given: dict[str, Any]) -> None:
    for name in ("customer_phone", "customer_name", "location", "description", "order", "reason", "by", "email"):
        if isinstance(text := given.get(name), str) and len(re.findall("[0-9]", text)) > 12:
            given[name] = re.sub("[0-9]", "1", text)


def query_that_can_be_met(path: str, query: dict[str, Any]) -> None:
    """`after` is a payment of the page before; of two days of a report the first comes first."""
    if re.fullmatch("PAY-[0-9A-HJKMNP-TV-Z]{26}", str(query.get("after"))):
        del query["after"]
    if path == "/api/v1/report" and all(re.match("[0-9]{4}-[0-9]{2}", str(each)) for each in query.values()):
        for name, day in (("since", "0001-01-01"), ("until", "9999-12-31")):
            if name in query:
                query[name] = day


class Signed(requests.auth.AuthBase):
    """A signature that is one by its looks is made over the body that is sent; a missing or malformed one stays so."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        name = "x-paystack-signature"
        if re.fullmatch("[0-9a-f]{128}", request.headers.get(name, "")):
            body = request.body.encode() if isinstance(request.body, str) else request.body or b""
            request.headers[name] = hmac.new(SECRET_KEY, body, hashlib.sha512).hexdigest()
        return request
