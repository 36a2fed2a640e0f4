"""Calls to other hosts that end in time, whatever the other side does."""

import contextvars
import functools
import http.client
import io
import socket
import time
from typing import Any

import requests
import requests.adapters
import urllib3
import urllib3.connection


class Failed(Exception):
    """No whole answer: `time-out`, `unreachable` or `too large`. The call may or may not have taken effect.

    `status` is that of an answer whose head came, if it did.
    """

    def __init__(self, why: str, status: int | None) -> None:
        super().__init__(why)
        self.status = status


class Caller:
    """Keeps its connections and uses them again. Safe to share between threads.

    A requests.Session would look for a .netrc, which replaces our Authorization header, for proxies in the environment
    and for cookies, and costs a third of the whole call: each request is handed to the adapter as it is.
    """

    def __init__(self, headers: dict[str, str]) -> None:
        self.headers = {"Accept-Encoding": "identity", **headers}
        self.adapter = BoundedAdapter(pool_connections=4, pool_maxsize=256)

    def call(
        self,
        method: str,
        url: str,
        within_seconds: float,
        largest: int,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[requests.Response, bytes]:
        """One call, `within_seconds` in all, and its answer of at most `largest` bytes. Redirects are not followed.

        Raises Failed.
        """
        token = DEADLINE.set(time.monotonic() + within_seconds)
        status = None
        try:
            request = requests.PreparedRequest()
            request.prepare_method(method)
            request.url = prepared_url(url)
            request.prepare_headers({**self.headers, **(headers or {})})
            request.prepare_cookies({})
            request.prepare_body(body, files=None)
            with self.adapter.send(request, stream=True, timeout=within_seconds, proxies={}) as response:
                status = response.status_code
                content = response.raw.read(largest + 1, decode_content=False)
        except (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
            raise Failed("time-out" if _is_timeout(error) else "unreachable", status) from error
        finally:
            DEADLINE.reset(token)
        if len(content) > largest:
            raise Failed("too large", status)
        return response, content


@functools.lru_cache(maxsize=256)
def prepared_url(url: str) -> str | None:
    """`url` as it is sent. Most calls go to one of two addresses, and preparing one is a tenth of a payment's POST."""
    request = requests.PreparedRequest()
    request.prepare_url(url, None)
    return request.url


def _is_timeout(error: BaseException) -> bool:
    timeouts = (TimeoutError, requests.Timeout, urllib3.exceptions.TimeoutError)
    return isinstance(error, timeouts) or any(isinstance(each, timeouts) for each in error.args)


# requests' time-out is for one read: an answer of one byte a second, in its headers or its body, never ends. Here each
# read gets what is left until the deadline of the call.
DEADLINE: contextvars.ContextVar[float] = contextvars.ContextVar("DEADLINE")


class BoundedReader(socket.SocketIO):
    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock, "rb")
        self.socket = sock
        sock._io_refs += 1  # type: ignore[attr-defined]  # what socket.makefile() does: closing waits for this reader

    def readinto(self, buffer: Any) -> int | None:
        left = DEADLINE.get() - time.monotonic()
        if left <= 0:
            raise TimeoutError("the call's time is over")
        self.socket.settimeout(left)
        return super().readinto(buffer)


class BoundedResponse(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self.fp = io.BufferedReader(BoundedReader(sock))


class BoundedConnection(urllib3.connection.HTTPConnection):
    response_class = BoundedResponse


class BoundedTLSConnection(urllib3.connection.HTTPSConnection):
    response_class = BoundedResponse


class BoundedPool(urllib3.HTTPConnectionPool):
    ConnectionCls = BoundedConnection


class BoundedTLSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = BoundedTLSConnection


class BoundedAdapter(requests.adapters.HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": BoundedPool, "https": BoundedTLSPool}
