"""The merchant's own system: takes paygate's notifications, checks each signature, and can be down."""

import base64
import hashlib
import hmac
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

SECRET = b"the merchant's own secret, 32 by"
NOTIFY_SECRET = "whsec_" + base64.b64encode(SECRET).decode()


class Receiver:
    """`mode` is what it does: `ok`, `500`, `hang` (for 20 s) or `drop` (closes without an answer)."""

    def __init__(self) -> None:
        self.mode = "ok"
        self.lock = threading.Lock()
        self.taken: dict[str, dict[str, Any]] = {}
        """By webhook-id, in the order in which each was first answered 200."""
        self.forged = 0
        self.changed: list[str] = []
        """The ids of notifications that came again with another body."""
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                status = receiver.take(dict(self.headers.items()), body)
                if status is None:
                    self.close_connection = True
                    return
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/paygate"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, name="receiver", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def take(self, headers: dict[str, str], body: bytes) -> int | None:
        match self.mode:
            case "500":
                return 500
            case "drop":
                return None
            case "hang":
                time.sleep(20)
                return None
        given = {name.lower(): value for name, value in headers.items()}
        number, timestamp = given.get("webhook-id", ""), given.get("webhook-timestamp", "")
        digest = hmac.new(SECRET, f"{number}.{timestamp}.".encode() + body, hashlib.sha256).digest()
        if given.get("webhook-signature") != "v1," + base64.b64encode(digest).decode():
            with self.lock:
                self.forged += 1
            return 401
        content = json.loads(body)
        with self.lock:
            if self.taken.setdefault(number, content) != content:
                self.changed.append(number)
        return 200
