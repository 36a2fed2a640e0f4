"""A receiver of paygate's notifications, to copy. It needs nothing but Python:

    NOTIFY_SECRET=whsec_… PORT=9000 python receiver.py

`application` is WSGI: `gunicorn receiver:application` serves it too.
"""

import base64
import binascii
import hashlib
import hmac
import json
import os
import time
from decimal import Decimal
from pathlib import Path
from typing import Any
from wsgiref.simple_server import make_server

SECRET = os.environ["NOTIFY_SECRET"]
LARGEST_BODY = 1024 * 1024
ORDERS = {"1001": ("1250.00", "NGN")}  # stands for your database: what each order costs
DELIVERED = Path(os.environ.get("DELIVERED", "delivered"))


def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    length = int(environ.get("CONTENT_LENGTH") or 0)
    body = environ["wsgi.input"].read(length) if length <= LARGEST_BODY else b""
    headers = {name: environ.get("HTTP_WEBHOOK_" + name.upper(), "") for name in ("id", "timestamp", "signature")}
    if not verify(body, headers["id"], headers["timestamp"], headers["signature"], SECRET):
        start_response("401 Unauthorized", [])
        return [b"this was not signed by us, or is old\n"]
    handle(json.loads(body, parse_float=Decimal))
    start_response("204 No Content", [])  # any 2xx; anything else, or an exception, and it is sent again
    return []


def verify(body: bytes, webhook_id: str, timestamp: str, signature: str, secret: str) -> bool:
    """Whether paygate signed this body, less than five minutes ago. `body` is raw: parsed JSON is another text."""
    if not timestamp.isdigit() or abs(time.time() - int(timestamp)) > 300:
        return False
    key = base64.b64decode(secret.removeprefix("whsec_"))
    made = hmac.new(key, f"{webhook_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    for each in signature.split(" "):  # two of them, while one secret replaces another
        version, _, text = each.partition(",")
        try:
            given = base64.b64decode(text)
        except binascii.Error:
            continue
        if version == "v1" and hmac.compare_digest(made, given):
            return True
    return False


def handle(notification: dict[str, Any]) -> None:
    """The same notification may come twice, and `metadata` is the word of whoever opened the payment."""
    payment = notification["data"].get("payment")
    if notification["type"] != "payment.completed" or payment is None:
        print(notification["type"], flush=True)
        return
    number = str((payment["metadata"] or {}).get("order"))
    amount, currency = ORDERS.get(number, ("0", ""))
    if (Decimal(payment["amount"]), payment["currency"]) != (Decimal(amount), currency):
        print("not what we sell:", payment["id"], flush=True)
        return
    # In your database: UPDATE orders SET paid = true WHERE number = … AND NOT paid. Deliver if it changed a row.
    DELIVERED.mkdir(exist_ok=True)
    try:
        (DELIVERED / number).open("x").close()
    except FileExistsError:
        print("delivered before:", number, flush=True)
    else:
        print("deliver:", number, flush=True)


if __name__ == "__main__":
    make_server("127.0.0.1", int(os.environ.get("PORT", "9000")), application).serve_forever()
