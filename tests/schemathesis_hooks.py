"""What a generator cannot know: the origins that a shop has allowed, and how a webhook is signed."""

import hashlib
import hmac
import os
import re
from typing import Any

import requests
import requests.auth
import schemathesis

ALLOWED = os.environ["RETURN_URL_ORIGINS"]


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """A URL that is well-formed leads to the shop: which shops are allowed is no rule of the description."""
    if isinstance(body, dict) and isinstance(url := body.get("return_url"), str):
        body["return_url"] = re.sub(r"^https?://[!-\[\]-~]+$", f"{ALLOWED}/thanks", url) if len(url) <= 2000 else url
    return body


class Signed(requests.auth.AuthBase):
    """A signature that is one by its looks is made over the body that is sent; a missing or malformed one stays so."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        name = "x-paystack-signature"
        if re.fullmatch("[0-9a-f]{128}", request.headers.get(name, "")):
            body = request.body.encode() if isinstance(request.body, str) else request.body or b""
            key = os.environ["PAYSTACK_SECRET_KEY"].encode()
            request.headers[name] = hmac.new(key, body, hashlib.sha512).hexdigest()
        return request


schemathesis.auth.set_from_requests(Signed()).apply_to(path="/api/v1/webhooks/paystack")
