"""Raw HTTP that no well-behaved client sends: smuggling, bad lengths and chunks, bad UTF-8, NUL, and mutations.

corpus.txt has a line for each body, Idempotency-Key, id in a path, header, and whole request: bytes as Python escapes
them, ⟨x×9⟩ for nine x, ⟨HEAD⟩, ⟨HOOK⟩ and ⟨ORDER⟩ for what stands here.
"""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

ORDER = json.dumps(
    {
        "customer_name": "Jane Doe",
        "customer_email": "jane@example.com",
        "customer_phone": "+2348012345678",
        "amount": 50,
        "location": "Lagos",
    }
).encode()
HEAD = b"POST /api/v1/payments HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
HOOK = b"POST /api/v1/webhooks/paystack HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CORPUS = Path(__file__).with_name("corpus.txt").read_text(encoding="utf-8").splitlines()


def read(kind: str) -> Iterator[bytes]:
    for line in CORPUS:
        if line.startswith(f"{kind} "):
            parts = re.split("⟨(.*?)⟩", line.removeprefix(f"{kind} "))
            yield b"".join(insert(part) if number % 2 else unescape(part) for number, part in enumerate(parts))


def insert(word: str) -> bytes:
    what, _, times = word.partition("×")
    return unescape(what) * int(times) if times else {"HEAD": HEAD, "HOOK": HOOK, "ORDER": ORDER}[what]


def unescape(text: str) -> bytes:
    return text.encode().decode("unicode_escape").encode("latin-1")


def post(body: bytes, *headers: bytes, head: bytes = HEAD) -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return head + lines + b"Content-Length: %d\r\n\r\n" % len(body) + body


def get(path: bytes, *headers: bytes) -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n"


def seeds() -> list[bytes]:
    paths = (b"/api/v1/payments/", b"/pay/", b"/pay?", b"/")
    return [
        *(post(body) for body in read("body")),
        *(post(body, b"x-paystack-signature: " + b"0" * 128, head=HOOK) for body in read("body")),
        *(post(ORDER, b"Idempotency-Key: " + key) for key in read("key")),
        *(post(ORDER, header) for header in read("header")),
        *(get(b"/api/v1/payments/PAY-" + b"0" * 26, header) for header in read("header")),
        *(get(path + each) for path in paths for each in read("id")),
        *read("request"),
    ]


def requests(seed: int, count: int) -> Iterator[bytes]:
    """`count` requests: the corpus, then mutations of it drawn from the seed."""
    dice, known = random.Random(seed), seeds()
    for number in range(count):
        yield known[number] if number < len(known) else mutate(dice, dice.choice(known), known)


def mutate(dice: random.Random, request: bytes, known: list[bytes]) -> bytes:
    for _ in range(dice.randrange(1, 4)):
        at = dice.randrange(len(request) + 1)
        begin, end = request[:at], request[at:]
        match dice.randrange(6):
            case 0:
                request = begin + bytes([dice.randrange(256)]) + end[1:]
            case 1:
                request = begin + dice.choice((b"\r\n", b"\n", b"\x00", b":", b" ", b"\xff", b"%00")) + end
            case 2:
                request = begin + end[dice.randrange(1, 20) :]
            case 3:
                request = begin
            case 4:
                other = dice.choice(known)
                request = begin + other[dice.randrange(len(other) + 1) :][:2000]
            case 5:
                request = begin + request[max(0, at - dice.randrange(1, 60)) :]
    return request
