"""A call ends in time, is sent once, and believes and sends nothing that it was not told to. Over real sockets."""

import contextlib
import gzip
import re
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import calls
import settings
from backstage import at_once
from host import CERTIFICATE, CLOSE, CONTENT, HEAD, WHOLE, bytewise, host
from shop import wait_until

LARGEST = 100_000


def caller_of(url: str, **headers: str) -> calls.Caller:
    return calls.Caller(url, headers, LARGEST)


def why(call: Callable[[], object], *, within_seconds: float = 30) -> str:
    """Why the call fails, which it does in time."""
    started = time.monotonic()
    with pytest.raises(calls.Failed) as failed:
        call()
    assert time.monotonic() - started < within_seconds
    return str(failed.value)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    path = tmp_path / "certificate.pem"
    path.write_text(CERTIFICATE)
    return path


@pytest.fixture
def trusted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(calls, "DEFAULT_CA_BUNDLE_PATH", str(certificate))
    return certificate


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[str] | threading.Event]]:
    """What the name server says: addresses, or nothing until the event."""
    known: dict[str, list[str] | threading.Event] = {}
    resolve = socket.getaddrinfo

    def getaddrinfo(name: str, *rest: Any, **options: Any) -> list[Any]:
        addresses = known.get(name, [name])
        if isinstance(addresses, threading.Event):
            addresses.wait(60)
            raise socket.gaierror("no answer")
        return [found for address in addresses for found in resolve(address, *rest, **options)]

    monkeypatch.setattr(calls, "getaddrinfo", getaddrinfo)
    yield known
    for each in known.values():
        if isinstance(each, threading.Event):
            each.set()


# It ends in time


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    "answer",
    [[HEAD[:9]], bytewise(WHOLE), [HEAD, *bytewise(CONTENT)]],
    ids=["silence", "dripping head", "dripping body"],
)
def test_a_call_ends_when_its_time_is_over_whatever_trickles_in(
    trusted: Path, scheme: str, answer: list[bytes]
) -> None:
    with host([answer], pause_seconds=0.2, certificate=trusted if scheme == "https" else None) as far:
        caller = caller_of(far.url)
        assert why(lambda: caller.call("GET", "/", 0.5), within_seconds=2.5) == "time-out"
        wait_until(lambda: far.ended == 1)  # the connection is not left behind


def test_a_byte_that_comes_late_buys_no_more_time() -> None:
    with host([[HEAD[:9], HEAD[9:]]], pause_seconds=1.8) as far:
        assert why(lambda: caller_of(far.url).call("GET", "/", 2), within_seconds=3.4) == "time-out"


def test_answers_that_are_none_without_end_buy_no_more_time() -> None:
    with host([[b"HTTP/1.1 100 Continue\r\n\r\n" * 2000] * 10_000]) as far:
        assert why(lambda: caller_of(far.url).call("GET", "/", 0.5), within_seconds=5) == "time-out"


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_host_that_takes_a_body_little_by_little_holds_nobody(trusted: Path, scheme: str) -> None:
    is_over = threading.Event()

    def sip(sock: socket.socket) -> None:
        while not is_over.wait(0.1):
            sock.recv(65536)

    with host(sip, certificate=trusted if scheme == "https" else None) as far:
        body = b"x" * 50_000_000
        assert why(lambda: caller_of(far.url).call("POST", "/", 0.5, body), within_seconds=5) == "time-out"
        is_over.set()


def test_a_tls_handshake_that_stalls_ends_in_time(trusted: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # the kernel accepts, and nobody speaks
        caller = caller_of(f"https://127.0.0.1:{listener.getsockname()[1]}")
        assert why(lambda: caller.call("GET", "/", 0.5), within_seconds=9) == "time-out"


def test_the_addresses_of_a_name_share_the_time(names: dict[str, Any]) -> None:
    """A dead one leaves the next its part of the time, and all of them hold the caller no longer than one."""
    names |= {"one-dead.example": ["127.0.0.2", "127.0.0.1"], "all-dead.example": ["127.0.0.2"] * 6}
    with host([[WHOLE]]) as far, swallowing("127.0.0.2", far.port):
        one, none = (caller_of(f"http://{name}:{far.port}") for name in ("one-dead.example", "all-dead.example"))
        assert one.call("GET", "/", 5).content == CONTENT
        assert why(lambda: none.call("GET", "/", 1), within_seconds=3) == "time-out"


@contextlib.contextmanager
def swallowing(address: str, port: int) -> Iterator[None]:
    """Whoever connects there waits in vain: more have come than may wait to be accepted."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(socket.create_server((address, port), backlog=0))
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex((address, port))
        yield


def test_a_name_server_that_says_nothing_delays_no_other_name_and_holds_one_thread(names: dict[str, Any]) -> None:
    names |= {"stuck.example": threading.Event(), "good.example": ["127.0.0.1"]}
    before = threading.active_count()
    with host([[WHOLE]]) as far:
        stuck = caller_of(f"http://stuck.example:{far.port}")
        told = at_once([lambda: why(lambda: stuck.call("GET", "/", 1), within_seconds=30)] * 100)
        assert set(told) == {"name"}
        assert threading.active_count() <= before + 2  # the host's one, and the one that asks
        assert caller_of(f"http://good.example:{far.port}").call("GET", "/", 10).content == CONTENT
        assert caller_of(far.url).call("GET", "/", 10).content == CONTENT
        event, names["stuck.example"] = names["stuck.example"], ["127.0.0.1"]
        event.set()  # it has said that there is no such name; it is asked again
        wait_until(lambda: answers(stuck))


def answers(caller: calls.Caller) -> bool:
    with contextlib.suppress(calls.Failed):
        return caller.call("GET", "/", 10).content == CONTENT
    return False


def test_a_kept_connection_needs_no_name_server(names: dict[str, Any]) -> None:
    names["good.example"] = ["127.0.0.1"]
    with host([[WHOLE]]) as far:
        caller = caller_of(f"http://good.example:{far.port}")
        caller.call("GET", "/", 10)
        names["good.example"] = threading.Event()
        assert caller.call("GET", "/", 10).content == CONTENT
        assert far.connections == 1


def test_no_process_waits_for_a_name_server_before_it_ends() -> None:
    program = """
import time, calls
calls.getaddrinfo = lambda *_, **__: time.sleep(60)
try:
    calls.Caller("http://stuck.example", {}, 100).call("GET", "/", 0.1)
except calls.Failed as failed:
    print(failed)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=40, check=True)
    assert done.stdout == "name\n"


# It is sent once


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_connection_that_was_closed_while_idle_costs_no_error(trusted: Path, scheme: str, method: str) -> None:
    with host([[WHOLE, CLOSE], [WHOLE]], certificate=trusted if scheme == "https" else None) as far:
        caller = caller_of(far.url)
        caller.call(method, "/first", 10, b"{}" if method == "POST" else None)
        wait_until(lambda: far.ended == 1)
        assert caller.call(method, "/second", 10, b"{}" if method == "POST" else None).content == CONTENT
        assert [request.split()[1] for request in far.received] == [b"/first", b"/second"]


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("before", [[], [[WHOLE]]], ids=["at once", "on a kept connection"])
def test_what_gets_no_answer_is_not_sent_again(method: str, before: list[list[bytes]]) -> None:
    with host([*before, [CLOSE]]) as far:
        caller = caller_of(far.url)
        for _ in before:
            caller.call(method, "/", 10, b"{}")
        assert why(lambda: caller.call(method, "/", 10, b"{}")) == "unreachable"
        time.sleep(0.3)  # a second request would come now
        assert (len(far.received), far.connections) == (len(before) + 1, 1)


def test_connections_are_kept_and_used_again() -> None:
    with host([[WHOLE]]) as far:
        caller = caller_of(far.url)
        for _ in range(5):
            assert caller.call("POST", "/", 10, b"{}").content == CONTENT
        assert (len(far.received), far.connections) == (5, 1)


def test_threads_that_share_a_caller_get_each_its_own_answer() -> None:
    with host(echo) as far:
        caller = caller_of(far.url)

        def call(number: int) -> None:
            for turn in range(30):
                assert caller.call("GET", f"/{number}/{turn}", 20).content == f"/{number}/{turn}".encode()

        at_once([lambda number=number: call(number) for number in range(16)])  # type: ignore[misc]
        assert far.connections <= 16


def echo(sock: socket.socket) -> None:
    while request := sock.recv(65536):
        path = request.split()[1]
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(path), path))


# What it sends


def test_it_says_who_calls_and_asks_for_content_as_it_is() -> None:
    with host([[WHOLE]]) as far:
        caller_of(far.url, Authorization="Bearer k").call("POST", "/a?b=c", 10, b"{}", {"webhook-id": "1"})
    lines = far.received[0].split(b"\r\n")
    assert lines[0] == b"POST /a?b=c HTTP/1.1"
    assert set(lines[1:]) == {
        b"Host: 127.0.0.1:%d" % far.port,
        b"User-Agent: paygate/%s" % settings.VERSION.encode(),
        b"Accept-Encoding: identity",
        b"Authorization: Bearer k",
        b"webhook-id: 1",
        b"Content-Length: 2",
        b"",
        b"{}",
    }


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((Path(settings.__file__).parent / "pyproject.toml").read_text())["project"]
    assert project["version"] == settings.VERSION


def test_neither_netrc_nor_a_proxy_of_the_environment_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login shop password hush\ndefault login shop password hush\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody answers there
    with host([[WHOLE]]) as far:
        caller_of(far.url).call("GET", "/", 10)
        caller_of(far.url, Authorization="Bearer k").call("GET", "/", 10)
    assert [re.findall(b"Authorization: (.*?)\r", request) for request in far.received] == [[], [b"Bearer k"]]


def test_no_cookie_is_kept() -> None:
    with host([[HEAD.replace(b"\r\n", b"\r\nSet-Cookie: who=you; Path=/\r\n", 1) + CONTENT]]) as far:
        caller = caller_of(far.url)
        for _ in range(2):
            assert "Set-Cookie" in caller.call("GET", "/", 10).headers
    assert not any(b"cookie" in request.lower() for request in far.received)


def test_an_ipv6_address_is_called_by_its_name_in_brackets(names: dict[str, Any]) -> None:
    names["::1"] = ["127.0.0.1"]  # for hosts without IPv6
    with host([[WHOLE]]) as far:
        assert caller_of(f"http://[::1]:{far.port}").call("GET", "/", 10).content == CONTENT
    assert b"\r\nHost: [::1]:%d\r\n" % far.port in far.received[0]


# What it believes


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed_and_no_more_of_it_is_read(status: int) -> None:
    with host([[WHOLE]]) as elsewhere:
        head = b"HTTP/1.1 %d Elsewhere\r\nLocation: %b\r\nContent-Length: " % (status, elsewhere.url.encode())
        with host([[head + b"2\r\n\r\n{}"], [head + b"1000000000\r\n\r\n", *[b"x" * 1000] * 1000]]) as far:
            assert caller_of(far.url).call("GET", "/", 10).status == status
            assert why(lambda: caller_of(far.url).call("GET", "/", 10)) == "too large"
        assert elsewhere.received == []


def test_a_huge_answer_is_not_read_to_its_end() -> None:
    for head in (b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n"):
        with host([[head, *[b"x" * 65536] * 150_000]]) as far:
            with pytest.raises(calls.Failed, match="too large") as failed:
                caller_of(far.url).call("GET", "/", 60)
            assert failed.value.status == 200
            wait_until(lambda far=far: far.ended == 1)  # type: ignore[misc]


def test_an_answer_may_be_as_large_as_allowed() -> None:
    for size, is_taken in ((LARGEST, True), (LARGEST + 1, False)):
        with host([[b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size, b"x" * size]]) as far:
            if is_taken:
                assert len(caller_of(far.url).call("GET", "/", 10).content) == size
            else:
                assert why(lambda far=far: caller_of(far.url).call("GET", "/", 10)) == "too large"  # type: ignore[misc]


def test_compressed_content_is_not_blown_up() -> None:
    bomb = gzip.compress(b"\0" * 10_000_000)
    assert len(bomb) < LARGEST
    with host([[b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb) + bomb]]) as far:
        assert caller_of(far.url).call("GET", "/", 10).content == bomb


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.0 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(CONTENT),
    ],
)
def test_an_answer_that_ends_its_connection_is_read_to_its_end(head: bytes) -> None:
    """However long after its head its body comes."""
    with host([[head, CONTENT[:9], CONTENT[9:], CLOSE]], pause_seconds=0.05) as far:
        caller = caller_of(far.url)
        for _ in range(2):
            assert caller.call("GET", "/", 10).content == CONTENT


def test_an_answer_in_chunks_is_read_whole() -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    with host(
        [[head, b"5\r\n" + CONTENT[:5] + b"\r\n", b"%x\r\n" % len(CONTENT[5:]) + CONTENT[5:] + b"\r\n0\r\n\r\n"]]
    ) as far:
        caller = caller_of(far.url)
        for _ in range(2):
            assert caller.call("GET", "/", 10).content == CONTENT
        assert far.connections == 1


@pytest.mark.parametrize(
    "answer",
    [
        [CLOSE],
        [b"\0\xff garbage", CLOSE],
        [HEAD[:5], CLOSE],
        [HEAD, CONTENT[:5], CLOSE],
        [HEAD, CLOSE],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{}", CLOSE],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n{}", CLOSE],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{}", CLOSE],
        [b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000 + b"\r\n", CLOSE],
    ],
)
def test_a_broken_answer_is_none_and_spoils_no_later_call(answer: list[bytes]) -> None:
    with host([answer, [WHOLE]]) as far:
        caller = caller_of(far.url)
        assert why(lambda: caller.call("GET", "/", 10)) == "unreachable"
        assert caller.call("GET", "/", 10).content == CONTENT


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_an_answer_that_follows_early_hints_is_no_answer_to_the_next_call(trusted: Path, scheme: str) -> None:
    early, late = b"HTTP/1.1 103 Early Hints\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    certificate = trusted if scheme == "https" else None
    with host([[early, late], [WHOLE]], pause_seconds=0.2, certificate=certificate) as far:
        caller = caller_of(far.url)
        with pytest.raises(calls.Failed, match="unreachable") as failed:
            caller.call("GET", "/", 10)
        assert failed.value.status == 103
        assert caller.call("GET", "/", 10).content == CONTENT


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_what_comes_uncalled_is_no_answer_to_the_next_call(trusted: Path, scheme: str) -> None:
    """Of one TLS record a part may be read and the rest be waiting, unseen by who asks the operating system."""
    uncalled = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    for size in (8192, 16384, 16384 - len(uncalled) + 1):  # as much as may be read at once
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 12345\r\n\r\n"
        head = head.replace(b"12345", b"%5d" % (size - len(head)))
        first = head.ljust(size, b"x")
        with host([[first + uncalled], [WHOLE]], certificate=trusted if scheme == "https" else None) as far:
            caller = caller_of(far.url)
            caller.call("GET", "/", 10)
            assert caller.call("GET", "/", 10).content == CONTENT


# Whom it trusts


def test_a_host_is_trusted_by_its_name_and_not_its_address(trusted: Path, names: dict[str, Any]) -> None:
    names |= {"localhost": ["127.0.0.1"], "other.example": ["127.0.0.1"]}
    with host([[WHOLE]], certificate=trusted) as far:
        assert caller_of(far.url).call("GET", "/", 10).content == CONTENT
        assert caller_of(f"https://localhost:{far.port}").call("GET", "/", 10).content == CONTENT
        assert why(lambda: caller_of(f"https://other.example:{far.port}").call("GET", "/", 10)) == "TLS"
        assert len(far.received) == 2


def test_a_host_whose_certificate_is_not_trusted_is_told_nothing(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.setenv(name, str(certificate))  # the environment has no say in whom to trust
    with host([[WHOLE]], certificate=certificate) as far:
        assert why(lambda: caller_of(far.url).call("GET", "/", 10)) == "TLS"
        wait_until(lambda: far.ended == 1)
        assert far.received == []


# What it says of a failure


def test_a_failure_is_told_in_a_word_of_ours(names: dict[str, Any]) -> None:
    names["nowhere.example"] = []
    with host([[WHOLE]]) as gone:
        pass
    with host(lambda sock: sock.sendall(WHOLE[: len(sock.recv(65536))])) as far:  # whatever it is asked
        assert why(lambda: caller_of(gone.url).call("GET", "/", 10)) == "refused"
        assert why(lambda: caller_of("http://nowhere.example").call("GET", "/", 10)) == "name"
        assert why(lambda: caller_of(f"http://{'x' * 70}.example").call("GET", "/", 10)) == "name"
        assert why(lambda: caller_of(far.url.replace("http:", "https:")).call("GET", "/", 10)) == "TLS"
