"""The load: kept-alive connections that send one request after the other, to 127.0.0.1 and nowhere else."""

import http.client
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    body: bytes | None
    headers: dict[str, str]


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    ms: float
    came_at: float


def send(port: int, requests: Iterable[Request], connections: int, until: float | None = None) -> list[Answer]:
    """The answers, in no order. None is begun after `until` (monotonic); who is told to come back later does."""
    source, lock = iter(requests), threading.Lock()

    def work() -> Iterator[Answer]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        while until is None or time.monotonic() < until:
            with lock:
                request = next(source, None)
            if request is None:
                break
            begun = time.monotonic()
            connection.request(request.method, request.path, request.body, request.headers)
            answer = connection.getresponse()
            body, now = answer.read(), time.monotonic()
            yield Answer(answer.status, body, (now - begun) * 1000, now)
            if answer.status == 503:
                time.sleep(float(answer.headers.get("Retry-After", "1")))
        connection.close()

    with ThreadPoolExecutor(connections) as threads:
        return [answer for answers in threads.map(lambda _: list(work()), range(connections)) for answer in answers]
