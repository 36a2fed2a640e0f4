"""What no generator can know: the origins that a shop has allowed, which keys were used, how a webhook is signed."""

import hashlib
import hmac
import json
import os
import re
from typing import Any

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
    # A URL that is well-formed leads to the shop: which shops are allowed is no rule of the description.
    if isinstance(body, dict) and isinstance(url := body.get("return_url"), str) and len(url) <= 2000:
        body["return_url"] = re.sub(r"^https?://[!-\[\]-~]+$", f"{ALLOWED}/thanks", url)
    # JSON Schema takes 500.0 for a whole number; here it has a decimal, which a currency may not have.
    if isinstance(body, dict) and isinstance(amount := body.get("amount"), float) and amount.is_integer():
        body["amount"] = int(amount)
    # The same key with another payment is refused, rightly: each payment gets a key of its own.
    key = headers.get("Idempotency-Key")
    if isinstance(key, str) and (valid := VALID_KEY.fullmatch(key)):
        digest = hashlib.sha256(json.dumps(body, default=str).encode()).hexdigest()[:16]
        quote, text = valid[2] or "", valid[1] or valid[3]
        headers["Idempotency-Key"] = f"{quote}{text if len(text) < 240 else ''}{digest}{quote}"
    kwargs["auth"] = Signed()


class Signed(requests.auth.AuthBase):
    """A signature that is one by its looks is made over the body that is sent; a missing or malformed one stays so."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        name = "x-paystack-signature"
        if re.fullmatch("[0-9a-f]{128}", request.headers.get(name, "")):
            body = request.body.encode() if isinstance(request.body, str) else request.body or b""
            request.headers[name] = hmac.new(SECRET_KEY, body, hashlib.sha512).hexdigest()
        return request
