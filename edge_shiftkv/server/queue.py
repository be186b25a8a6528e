"""Where requests meet the runtime: they wait in a line for the one thread that it is used in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from edge_shiftkv.closing import Closing
from edge_shiftkv.errors import CancelledError
from edge_shiftkv.runtime import Runtime
from edge_shiftkv.server.errors import FullError, StoppingError

Work = Callable[[Runtime], Iterable[dict[str, Any]]]
"""What a request does in its turn: it gives JSON objects, one after the other."""

_CANCEL_AGAIN_S = 0.05


class Queue(Closing):
    """Serves requests one at a time, first come first served. To be used in one event loop.

    n_waiting: how many may wait beside the one that is served.
    """

    def __init__(self, runtime: Runtime, n_waiting: int) -> None:
        self.runtime = runtime
        self.stopping = False
        self.turn = asyncio.Lock()  # wakes those that wait for it in their order
        self.thread = ThreadPoolExecutor(1, "edge_shiftkv")
        self.jobs: set[Job] = set()
        self._n_places = n_waiting + 1

    def enter(self) -> Job:
        """A place for a request, to be given work or cancelled.

        Raises FullError when there is none, StoppingError after `stop`.
        """
        if self.stopping:
            raise StoppingError
        if len(self.jobs) >= self._n_places:
            raise FullError(self._n_places - 1)
        return Job(self)

    def stop(self) -> None:
        """Finish what is being answered, and turn away the others, with StoppingError."""
        self.stopping = True
        for job in list(self.jobs):
            if not job.running:
                job.cancel(StoppingError())

    def close(self) -> None:
        """End what is still being answered, and the thread."""
        idle = self.thread.submit(lambda: None)
        while not idle.done():
            self.runtime.cancel()
            wait([idle], _CANCEL_AGAIN_S)
        self.thread.shutdown()


class Job:
    """A request's place and, once it has work, what that gives: an asynchronous iterator, which raises what it raises.

    Leaving it unread costs its memory only: nothing waits for a client that reads slowly.

    running: whether it is being answered.
    """

    def __init__(self, queue: Queue) -> None:
        self.running = False
        self._queue = queue
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[dict[str, Any] | Exception | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[None] = self._loop.create_future()
        queue.jobs.add(self)

    def start(self, work: Work) -> None:
        """Wait in line, and do the work. A job that was cancelled already does nothing."""
        if not self._ended.done():
            self._task = asyncio.create_task(self._run(work))

    def cancel(self, error: Exception | None = None) -> None:
        """Free the place: at once while it waits, within moments while it is answered. Does nothing after its end.

        error: what the iterator raises if it had to wait; by default a CancelledError.
        """
        if self._ended.done():
            return
        if self.running:
            # A runtime forgets this when it has only just been given the request. The next one does not begin before
            # this event loop knows that this one is over, and cannot be hit.
            self._queue.runtime.cancel()
            self._loop.call_later(_CANCEL_AGAIN_S, self.cancel)
            return
        if self._task:
            self._task.cancel()
        self._items.put_nowait(error or CancelledError("the request was cancelled while it waited"))
        self._end()

    def on_end(self, call: Callable[[], object]) -> None:
        """Call something when the place is free again."""
        self._ended.add_done_callback(lambda _: call())

    def __aiter__(self) -> Job:
        return self

    async def __anext__(self) -> dict[str, Any]:
        item = await self._items.get()
        if isinstance(item, dict):
            return item
        self._items.put_nowait(item)  # for whoever asks again
        raise item or StopAsyncIteration

    async def _run(self, work: Work) -> None:
        async with self._queue.turn:
            self.running = True
            try:
                await self._loop.run_in_executor(self._queue.thread, self._work, work)
            finally:
                self._end()

    def _end(self) -> None:
        self.running = False
        self._ended.set_result(None)
        self._queue.jobs.discard(self)

    def _work(self, work: Work) -> None:
        end: Exception | None = None
        try:
            for item in work(self._queue.runtime):
                self._put(item)
        except Exception as error:
            end = error
        self._put(end)

    def _put(self, item: dict[str, Any] | Exception | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
