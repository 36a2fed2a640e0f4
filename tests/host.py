"""A host on loopback that answers calls byte by byte as a test tells it to, over TLS too."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

CONTENT = b'{"status": true}'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(CONTENT)
WHOLE = HEAD + CONTENT
CLOSE = b""
"""As a part of an answer: the connection ends here."""

Answers = Sequence[Sequence[bytes]] | Callable[[socket.socket], None]

# A certificate for localhost and 127.0.0.1 that nobody has signed, and its key, good for nothing but these tests.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgYJla9cbDiyRbeHvt
msAGCl2krUzrUl3Vczks8GHYLHihRANCAAQnys4gCcpa7BSZ4mt7SR9YRJ/3F8ri
MImSV4XfKdaFm3jflX9tcC4a4m+c1ndgqdq6Xru9AjCuk0kq//EqUt4c
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBmjCCAUGgAwIBAgIUL8xPNSdgMAUmmvPgHjtq1GGLH4EwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyNDIwMTQzNloYDzIxMjYxMDMx
MjAxNDM2WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAQnys4gCcpa7BSZ4mt7SR9YRJ/3F8riMImSV4XfKdaFm3jflX9tcC4a
4m+c1ndgqdq6Xru9AjCuk0kq//EqUt4co28wbTAdBgNVHQ4EFgQUbANhx6L3YTtJ
HAAK8yqrWdT+91UwHwYDVR0jBBgwFoAUbANhx6L3YTtJHAAK8yqrWdT+91UwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDRwAwRAIgFY+3RSrPY39ZxKh6gkwxi6y15wTukzha1cJOM0OmPK4CIFVl
w0IQu2qFXTjXywzSqH3XE/TjGJbwsIdW08kA887O
-----END CERTIFICATE-----
"""


class Host:
    """It gives the first of `answers` to the first request and so on, and the last one for ever. Or it does as told."""

    def __init__(self, answers: Answers, pause_seconds: float, context: ssl.SSLContext | None) -> None:
        self.to_come = [] if callable(answers) else list(answers)
        self.answer = answers if callable(answers) else self.answer_in_turn
        self.pause_seconds = pause_seconds
        self.context = context
        self.received: list[bytes] = []
        """Each request, whole."""
        self.connections = 0
        self.ended = 0
        """Connections that are over, whoever ended them."""
        self.is_over = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http{'s' if context else ''}://127.0.0.1:{self.port}"

    def accept(self) -> None:
        self.listener.settimeout(0.05)
        while not self.is_over.is_set():
            with contextlib.suppress(OSError):  # nobody came
                connection, _ = self.listener.accept()
                self.connections += 1
                threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        connection.settimeout(20)
        with contextlib.suppress(OSError), connection:  # whoever came went away
            if self.context is None:
                self.answer(connection)
            else:
                with self.context.wrap_socket(connection, server_side=True) as sock:
                    self.answer(sock)
        self.ended += 1

    def answer_in_turn(self, sock: socket.socket) -> None:
        while request := read_request(sock):
            self.received.append(request)
            for part in self.to_come.pop(0) if len(self.to_come) > 1 else self.to_come[0]:
                if part == CLOSE:
                    return
                sock.sendall(part)
                self.is_over.wait(self.pause_seconds)


def read_request(sock: socket.socket) -> bytes:
    request = b""
    while b"\r\n\r\n" not in request:
        if not (received := sock.recv(65536)):
            return b""
        request += received
    head = request.partition(b"\r\n\r\n")[0]
    lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    size = len(head) + 4 + int(lengths[0] if lengths else 0)
    while len(request) < size:
        if not (received := sock.recv(65536)):
            return b""
        request += received
    return request


@contextlib.contextmanager
def host(answers: Answers, pause_seconds: float = 0, certificate: Path | None = None) -> Iterator[Host]:
    """A host whose answers come in their parts, with a pause after each. It speaks TLS if it has a certificate."""
    context = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
    opened = Host(answers, pause_seconds, context)
    thread = threading.Thread(target=opened.accept)
    thread.start()
    try:
        yield opened
    finally:
        opened.is_over.set()
        thread.join()
        opened.listener.close()


def bytewise(answer: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in answer]
