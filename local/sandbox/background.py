"""Work on the event loop that is begun from any thread."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class Background:
    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None  # None: nothing runs
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Callable[[Any], Coroutine[Any, Any, None]], subject: object) -> None:
        """Run `work(subject)` on the loop, from whatever thread."""
        if self.loop is not None:
            self.loop.call_soon_threadsafe(lambda: self.begin(work(subject)))

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)  # or it might be collected before its end
        task.add_done_callback(self._tasks.discard)

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
