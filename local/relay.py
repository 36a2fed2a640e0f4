"""The network between paygate and its database: it can fail, and it can stop at a moment that was named before.

A moment is the first message to the server that contains certain bytes (an order's name, a checkout's URL, COMMIT): so
a process can be killed exactly before or exactly after something is on disk, without a hand on its code.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlsplit

from psycopg.conninfo import conninfo_to_dict

LONGEST_SECONDS = 30


@dataclass
class Moment:
    """`words` on their way to the server: held back before (`reached` is set, nothing has arrived), or, when `after`,
    passed on and the server's reply held back. It lasts until `over` is set; then the connection ends."""

    words: bytes
    after: bool
    reached: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        if not self.reached.wait(10):
            raise TimeoutError(f"nobody has sent {self.words!r}")


class Relay:
    """Listens on 127.0.0.1 in front of the server of `database_url`; `url` is the way through it."""

    def __init__(self, database_url: str) -> None:
        server = {name: str(value) for name, value in conninfo_to_dict(database_url).items()}
        self.host, self.server_port = server.get("host", "127.0.0.1"), int(server.get("port", "5432"))
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        parts = urlsplit(database_url)
        user = parts.netloc.rpartition("@")[0]
        port = self.listener.getsockname()[1]
        self.url = f"postgresql://{user}@127.0.0.1:{port}{parts.path}?sslmode=disable&gssencmode=disable"
        self.retell: Callable[[bytes], bytes] = bytes
        """What the client is told instead of what the server says."""
        self.moments: list[Moment] = []  # that are still to come
        self.all_moments: list[Moment] = []
        self.replaced = (b"", b"")
        self.is_down = False
        """No new connections either, when it is cut."""
        self.delay_seconds = 0.0
        self.flows = threading.Event()
        """Where it is clear, nothing passes, without a word: as with a dead host or a switch that forgets."""
        self.flows.set()
        self.sockets: set[socket.socket] = set()
        self.lock = threading.Lock()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, name="relay", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.mend()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for moment in self.all_moments:
            moment.over.set()
        self.cut()

    def before(self, words: bytes) -> Moment:
        """Hold back the next message with `words` in it."""
        return self._expect(Moment(words, after=False))

    def after(self, words: bytes) -> Moment:
        """Let the next message with `words` in it through, and hold back what the server replies."""
        return self._expect(Moment(words, after=True))

    def replace(self, words: bytes, by: bytes) -> None:
        """From now on pass `by`, which is of the same length, on where a client sends `words`."""
        if len(words) != len(by):
            raise ValueError("the message would be of another length")
        self.replaced = (words, by)

    def cut(self) -> None:
        """End all connections, as a failing network does."""
        with self.lock:
            self._end(*self.sockets)

    def mend(self) -> None:
        self.is_down, self.delay_seconds = False, 0.0
        self.flows.set()

    def _expect(self, moment: Moment) -> Moment:
        with self.lock:
            self.moments.append(moment)
            self.all_moments.append(moment)
        return moment

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed at the end
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _connect(self) -> socket.socket:
        if self.host.startswith("/"):
            server = socket.socket(socket.AF_UNIX)
            server.connect(f"{self.host}/.s.PGSQL.{self.server_port}")
            return server
        return socket.create_connection((self.host, self.server_port), 5)

    def _pass(self, to: socket.socket, data: bytes) -> None:
        time.sleep(self.delay_seconds)
        self.flows.wait()
        to.sendall(data)

    def _serve(self, client: socket.socket) -> None:
        self.flows.wait()
        try:
            if self.is_down:
                raise ConnectionRefusedError
            server = self._connect()
        except OSError:
            client.close()
            return
        with self.lock:
            self.sockets |= {client, server}
        held: list[Moment] = []
        replies = threading.Thread(target=self._reply, args=(server, client, held), daemon=True)
        replies.start()
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 16):
                moment = self._moment_of(data)
                if moment is None:
                    self._pass(server, data.replace(*self.replaced) if self.replaced[0] else data)
                    continue
                if moment.after:
                    held.append(moment)
                    server.sendall(data)
                    moment.reached.wait(LONGEST_SECONDS)
                else:
                    moment.reached.set()
                moment.over.wait(LONGEST_SECONDS)
                break
        self._end(client, server)
        replies.join(5)
        with self.lock:
            self.sockets -= {client, server}
        client.close()
        server.close()

    def _reply(self, server: socket.socket, client: socket.socket, held: list[Moment]) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                if held:
                    held[0].reached.set()
                else:
                    self._pass(client, self.retell(data))
        self._end(client, server)

    def _moment_of(self, data: bytes) -> Moment | None:
        with self.lock:
            for moment in self.moments:
                if moment.words in data:
                    self.moments.remove(moment)
                    return moment
        return None

    def _end(self, *sockets: socket.socket) -> None:
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
