"""The network between paygate and its database: a TCP proxy in front of the server's Unix socket that can fail."""

import asyncio
import threading
from contextlib import suppress
from pathlib import Path
from typing import Self


class Proxy:
    """Passes bytes on, unless it is told to hold them back, delay them or cut every connection."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.port = 0
        self.delay_seconds = 0.0
        self.is_cut = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(5)

    def cut(self) -> None:
        """Reset all connections and refuse new ones, until `mend`."""
        self.is_cut = True
        self._loop.call_soon_threadsafe(self._abort_all)

    def hold(self) -> None:
        """Let nothing through, without a word: as a dead host or a switch that forgets does."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def mend(self) -> None:
        self.is_cut, self.delay_seconds = False, 0.0
        self._loop.call_soon_threadsafe(self._open.set)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping, self._open = asyncio.Event(), asyncio.Event()
        self._open.set()
        server = await asyncio.start_server(self._converse, "127.0.0.1", self.port, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stopping.wait()
        server.close()
        self._abort_all()

    def _abort_all(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_cut:
            writer.transport.abort()
            return
        self._writers.add(writer)
        try:
            # Held back, a client sees its connection taken and nothing after it, as from a host that died.
            await self._open.wait()
            upstream, outlet = await asyncio.open_unix_connection(str(self.target))
            self._writers.add(outlet)
            try:
                await asyncio.gather(self._pass_on(reader, outlet), self._pass_on(upstream, writer))
            finally:
                self._writers.discard(outlet)
                outlet.close()
        except OSError:
            writer.transport.abort()
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if self.delay_seconds:
                    await asyncio.sleep(self.delay_seconds)
                await self._open.wait()
                writer.write(data)
                await writer.drain()
        writer.close()
