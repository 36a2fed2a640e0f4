"""Raw HTTP that no well-behaved client sends: smuggling, bad lengths and chunks, bad UTF-8, NUL, and mutations."""

import json
import random
from collections.abc import Iterator

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


def post(body: bytes, *headers: bytes, head: bytes = HEAD) -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return head + lines + b"Content-Length: %d\r\n\r\n" % len(body) + body


def get(path: bytes, *headers: bytes, method: bytes = b"GET", version: bytes = b"HTTP/1.1") -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return method + b" " + path + b" " + version + b"\r\nHost: x\r\n" + lines + b"\r\n"


BODIES = (
    *(b"", b"{", b"[]", b"null", b"NaN", b'"x"', b"\xff\xfe", b"\x00", b"{}", b"[" * 16000, b'{"a":' * 3000),
    *(b'{"amount": 1e999999999}', b'{"amount": -1}', b'{"amount": 1E400}', b'{"amount": NaN}', b'{"amount": Infinity}'),
    *(b'{"amount": 5, "amount": 6}', b'{"amount": "50.001"}', b'{"amount": "\\u0000"}', b'{"amount": true}'),
    *(b'{"amount": ' + b"9" * 5000 + b"}", b'{"amount": 0.' + b"0" * 5000 + b"1}", b'{"amount": {"x": [1]}}'),
    ORDER.replace(b"Jane", b"\\ud800"),
    ORDER.replace(b"Jane", b"\xc3\x28"),
    ORDER.replace(b"Jane", b"\x00"),
    ORDER.replace(b"Jane", b"\\u0000"),
    ORDER.replace(b"Jane", "\u202e".encode()),
    ORDER.replace(b"Jane", b"x" * 15000),
    ORDER.replace(b"50", b"5" * 13),
    ORDER.replace(b"50", b'"50\xd9\xa1"'),
    ORDER[:-1] + b', "metadata": {"a": {"b": 1}}}',
    ORDER[:-1] + b', "metadata": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
    ORDER[:-1] + b', "return_url": "javascript:alert(1)"}',
    ORDER[:-1] + b', "currency": "\\u0130"}',
    ORDER + ORDER,
)
KEYS = (b"", b"x" * 256, b"\xff", b"a,b", b'"a', b'"a\\', b'""', b"a b", b"\xc3\xa9", b"a\x01b", b"'", b"%00")
IDS = (
    *(b"x", b"%00", b"%ff", b"%c3%28", b"PAY-%00", b"PAY-" + b"0" * 26, b"PAY-" + b"0" * 5000, b"../../etc/passwd"),
    *(
        b"%2e%2e%2f",
        b"PAY-0000000000000000000000000'",
        b"a?b=c&b=c&%",
        b"x" * 4000,
        b"\xe2\x82\xac",
        b"a%0d%0aX: y",
        b";",
    ),
)
HEADERS = (
    *(b"X-Request-Id: " + b"x" * 4000, b"X-Request-Id: \xff\xfe", b"X-Request-Id: a\tb", b"Prefer: wait=99999999999"),
    *(
        b"Prefer: wait=-1",
        b"Prefer: wait=1;wait=2",
        b"Prefer: \xff",
        b"Authorization: Bearer \xff",
        b"Expect: 100-continue",
    ),
    *(
        b"Content-Encoding: gzip",
        b"Content-Type: text/plain",
        b"Content-Type: \xff",
        b"Content-Type: application/json; charset=x",
    ),
    *(
        b"X-Forwarded-For: \xff, , ,",
        b"Cookie: " + b"a=b;" * 1000,
        b"Upgrade: h2c",
        b"Connection: Upgrade",
        b"TE: trailers",
    ),
    *(b"Accept: \xff/*;q=x", b"If-Match: *", b"Range: bytes=0-0", b"Host: evil", b"Transfer-Encoding: identity"),
    *(
        b"x-paystack-signature: \xff",
        b"x-paystack-signature: " + b"0" * 128,
        b"Content-Length: 5",
        b"Content-Length: -1",
    ),
)


def seeds() -> list[bytes]:
    """The corpus by hand."""
    chunked = b"Transfer-Encoding: chunked\r\n"
    plain = [
        *(post(body) for body in BODIES),
        *(post(ORDER, b"Idempotency-Key: " + key) for key in KEYS),
        post(ORDER, b"Idempotency-Key: a", b"Idempotency-Key: b"),
        *(post(ORDER, header) for header in HEADERS),
        *(get(b"/api/v1/payments/" + each) for each in IDS),
        *(get(b"/pay/" + each) for each in IDS),
        *(get(b"/pay?" + each) for each in IDS),
        *(get(b"/api/v1/payments/PAY-" + b"0" * 26, header) for header in HEADERS),
        *(post(body, b"x-paystack-signature: " + b"0" * 128, head=HOOK) for body in BODIES),
        *(get(b"/" + each) for each in IDS),
        *(get(b"/api/v1/payments", method=word) for word in (b"GET", b"PUT", b"DELETE", b"OPTIONS", b"HEAD", b"TRACE")),
        *(get(b"/healthz", method=word) for word in (b"get", b"G\x00T", b"", b"POST" * 50, b"CONNECT", b"PRI")),
        *(
            get(b"/healthz", version=word)
            for word in (b"HTTP/0.9", b"HTTP/2.0", b"HTTP/1.10", b"HTP/1.1", b"", b"HTTP/1.\xff")
        ),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]
    lengths = (b"-1", b"+5", b"0x10", b"5,5", b"5, 6", b"\xd9\xa5", b"9" * 30, b"1e3", b"", b" ", b"5 5", b"00000005")
    smuggling = [
        *(HEAD + b"Content-Length: " + length + b"\r\n\r\n" + ORDER for length in lengths),
        *(HOOK + b"Content-Length: " + length + b"\r\n\r\n" + ORDER for length in lengths),
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + ORDER,
        HEAD + b"Content-Length: 5\r\n" + chunked + b"\r\n0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        HOOK + b"Content-Length: 5\r\n" + chunked + b"\r\n0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        *(
            HOOK + b"Transfer-Encoding: " + coding + b"\r\n\r\n0\r\n\r\n"
            for coding in (
                b"xchunked",
                b"chunked, chunked",
                b"gzip, chunked",
                b" chunked",
                b"chunked\x00",
                b"Chunked ",
                b"\x0bchunked",
            )
        ),
        HOOK + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        HOOK + b"Transfer\x00-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HOOK + b"X: y\r\n Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        *(
            start + chunked + b"\r\n" + chunks
            for start in (HEAD, HOOK)
            for chunks in (
                *(
                    b"5\r\nabc\r\n0\r\n\r\n",
                    b"-5\r\nabcde\r\n0\r\n\r\n",
                    b"zz\r\n\r\n",
                    b"5;x=" + b"y" * 5000 + b"\r\nabcde\r\n0\r\n\r\n",
                ),
                *(
                    b"FFFFFFFFFFFFFFFFFFFF\r\nabc",
                    b"5\nabcde\n0\n\n",
                    b"5\r\nabcdeXX0\r\n\r\n",
                    b"\r\n\r\n",
                    b"0\r\nX: y\r\n\r\n",
                ),
                *(
                    b"0x5\r\nabcde\r\n0\r\n\r\n",
                    b"5\r\nabcde\r\n",
                    b"1\r\na\r\n" * 2000 + b"0\r\n\r\n",
                    b"5 \r\nabcde\r\n0\r\n\r\n",
                ),
            )
        ),
        b"\r\n\r\n\r\n" + get(b"/healthz"),
        b"\x00" * 100,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,  # TLS
        b"GET /healthz HTTP/1.1\r\n" + b"A: b\r\n" * 300 + b"\r\n",
        b"GET /healthz HTTP/1.1\r\nA: " + b"x" * 20000 + b"\r\n\r\n",
        b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\nHost: x\n\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nBad Header: y\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n: y\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: x\rX: y\r\n\r\n",
        b"GET http://evil/healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET //evil/healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET  /healthz  HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n" + get(b"/healthz"),
        get(b"/healthz") * 50,
    ]
    return plain + smuggling


def requests(seed: int, count: int) -> Iterator[bytes]:
    """`count` requests: the corpus, then mutations of it drawn from the seed."""
    dice, known = random.Random(seed), seeds()
    for number in range(count):
        yield known[number] if number < len(known) else mutate(dice, dice.choice(known), known)


def mutate(dice: random.Random, request: bytes, known: list[bytes]) -> bytes:
    for _ in range(dice.randrange(1, 4)):
        at = dice.randrange(len(request) + 1)
        match dice.randrange(6):
            case 0:
                request = request[:at] + bytes([dice.randrange(256)]) + request[at + 1 :]
            case 1:
                request = (
                    request[:at] + dice.choice((b"\r\n", b"\n", b"\x00", b":", b" ", b"\xff", b"%00")) + request[at:]
                )
            case 2:
                request = request[:at] + request[at + dice.randrange(1, 20) :]
            case 3:
                request = request[:at]
            case 4:
                other = dice.choice(known)
                request = request[:at] + other[dice.randrange(len(other) + 1) :][:2000]
            case 5:
                request = request[:at] + request[max(0, at - dice.randrange(1, 60)) :]
    return request
