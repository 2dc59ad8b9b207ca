"""A LocalCluster in a thread of its own: for programs without an event loop, and for notebooks, which have another."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from typing import Any, TypeVar

from moiety.client import Client
from moiety.core.supervise import spawn_thread
from moiety.errors import Cancelled
from moiety.local.cluster import LocalCluster

Result = TypeVar("Result")


class BackgroundCluster:
    """A running cluster and a client of it. Any thread may use it, except the cluster's own."""

    def __init__(self, make: Callable[[], LocalCluster]) -> None:
        """Starts what `make` returns. Raises what its start raises; then, as after Ctrl-C, no process is left."""
        self._make = make
        self._loop: asyncio.AbstractEventLoop
        self._client: Client
        self._live: asyncio.Task[None]
        self._begun = threading.Event()  # the thread runs its event loop
        self._started: Future[str] = Future()  # the gateway's address
        self._thread = spawn_thread("local cluster", self._main)
        self._thread.start()
        try:
            self.address = self._started.result()
        except BaseException:
            self.close()
            raise

    def run(self, work: Callable[[Client], Coroutine[Any, Any, Result]]) -> Result:
        """Returns the result of `work(client)`, which runs beside the cluster. Ctrl-C in this thread cancels it.

        Raises Cancelled if the cluster is closed before or meanwhile.
        """
        coroutine = work(self._client)
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:  # the loop is closed
            coroutine.close()
            raise Cancelled("the cluster is closed") from None
        try:
            return future.result()
        except CancelledError:
            raise Cancelled("the cluster was closed while this ran") from None
        finally:
            future.cancel()

    def close(self) -> None:
        """Ends the cluster's processes, and what `run` still does for other threads. May be called again."""
        self._begun.wait()
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._live.cancel)
        if threading.current_thread() is not self._thread:  # a garbage collection may call this from any thread
            self._thread.join()

    def _main(self) -> None:
        """Runs in the thread, from the cluster's start to its end."""
        with asyncio.Runner() as runner, suppress(asyncio.CancelledError):
            runner.run(self._live_there())

    async def _live_there(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._loop, self._live = asyncio.get_running_loop(), task
        self._begun.set()
        try:
            async with self._make() as cluster, Client(cluster.address) as self._client:
                self._started.set_result(cluster.address)
                await asyncio.Event().wait()  # until `close` cancels this task
        except asyncio.CancelledError:
            if not self._started.done():
                self._started.set_exception(Cancelled("the cluster was closed while it started"))
            raise
        except Exception as error:
            if self._started.done():
                raise
            self._started.set_exception(error)
