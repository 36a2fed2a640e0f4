"""The sandbox itself: its controls, served with the API and the checkout page by one thread and one event loop."""

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from local.sandbox import page
from local.sandbox.controls import Controls, control
from local.sandbox.endpoints import ANSWERS, receive, unknown_reference
from local.sandbox.faults import FAULTS, send_faulty
from local.sandbox.ledger import SandboxError
from local.sandbox.settings import Settings
from local.sandbox.wire import Answer, Refused, Request, is_loopback, read_request, send


class Sandbox(Controls):
    """The stand-in: `with Sandbox(secret_key=…) as sandbox` in a test, `python -m local.sandbox` in a shell."""

    def __init__(
        self,
        secret_key: str,
        webhook_url: str | None = None,
        data: str | os.PathLike[str] | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        public_url: str | None = None,
        merchant: str = "Example Shop",
        retry_seconds: Sequence[float] | None = None,
        refund_seconds: float | None = None,
    ) -> None:
        """`refund_seconds` is how long a refund stays in each state; None leaves it pending until move_refund."""
        if not is_loopback(host):
            raise SandboxError(f"the sandbox listens on loopback only, not on {host}")
        super().__init__(
            Settings(secret_key, merchant, webhook_url, retry_seconds, refund_seconds), Path(data) if data else None
        )
        self.host, self.port, self.public_url = host, port, public_url
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._failure: BaseException | None = None

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def start(self) -> Self:
        self._thread = threading.Thread(target=self._run, name="sandbox", daemon=True)
        self._thread.start()
        if not self._ready.wait(10):
            raise SandboxError("the sandbox did not start within 10 seconds")
        if self._failure is not None:
            raise self._failure
        return self

    def stop(self) -> None:
        if self.background.loop is not None and self._thread is not None:
            self.background.loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(5)
            self._thread = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            asyncio.run(self.serve())
        except OSError as error:  # the port is in use: start() tells its caller
            self._failure = error
            self._ready.set()

    async def serve(self, when_ready: Callable[[], None] = lambda: None) -> None:
        """Listen until stopped. One thread and one event loop: a sleeping answer costs a timer, not a thread."""
        self.background.loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self.webhooks.begin()
        # A plain function for a callback: a coroutine would be a task of asyncio's own, which complains when cancelled.
        server = await asyncio.start_server(
            lambda reader, writer: self.background.begin(self._converse(reader, writer)),
            self.host,
            self.port,
            backlog=1024,
        )
        self.port = server.sockets[0].getsockname()[1]
        self.origin = self.public_url or self.url
        for refund in self.ledger.refunds.values():
            self.process_later(refund)
        self._ready.set()
        when_ready()
        try:
            await self._stopping.wait()
        finally:
            server.close()
            # Or one would go on for a moment, and answer what the closed ledger does not keep. What has begun since is
            # cancelled by asyncio.run.
            self.background.cancel()
            with self.lock:
                self.background.loop = None
                self.ledger.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request after the other until the client goes or a fault ends the connection."""
        try:
            while True:
                try:
                    request = await read_request(reader)
                except ValueError as error:
                    await send(writer, Answer(400, {"status": False, "message": str(error)}))
                    return
                if not await self._respond(request, writer):
                    return
        except (OSError, EOFError, asyncio.LimitOverrunError):
            pass  # the client has gone, or was too slow or too long
        finally:
            writer.close()

    async def _respond(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False when the connection is to be closed."""
        if request.path.startswith("/_sandbox/"):
            peer = str(writer.get_extra_info("peername")[0])
            return await send(writer, control(self, request, peer), request)
        if request.path.startswith("/checkout/"):
            return await send(writer, page.checkout(self, request), request)
        if request.path in page.STATIC:
            return await send(writer, page.static(request.path), request)
        if request.path == "/elsewhere":  # where the fault "redirect" leads
            self.call_counts["elsewhere", ""] += 1
            return await send(writer, Answer(200, {"status": True, "message": "Elsewhere", "data": {}}), request)
        return await self._api(request, writer)

    async def _api(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        try:
            with self.lock:
                call = receive(self, request)
        except Refused as refused:
            return await send(writer, refused.answer, request)
        fault = call.fault
        happens = fault is None or (FAULTS[fault.name] if fault.effect is None else fault.effect)
        wait = self.settings.latency_seconds + (fault.seconds(3) if fault is not None and fault.name == "slow" else 0)
        if wait:
            await asyncio.sleep(wait)
        answer = Answer(200, {"status": True, "message": "", "data": {}})
        if happens:
            with self.lock:
                try:
                    answer = ANSWERS[call.endpoint](self, call)
                except Refused as refused:
                    answer = refused.answer
        if call.delivery is not None:
            await self.webhooks.first_try(call.delivery)
        if fault is not None:
            elsewhere = f"http://localhost:{self.port}/elsewhere"
            return await send_faulty(writer, fault, answer, unknown_reference(self).answer, elsewhere)
        return await send(writer, answer, request)
