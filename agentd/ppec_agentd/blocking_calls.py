# SPDX-License-Identifier: Apache-2.0
"""Blocking calls from asyncio, bounded in number and in time.

Not a ThreadPoolExecutor: a call that never returns would keep one of its workers for good, a few of them would stop the
agent, and the interpreter would wait for them on exit. Here a call that misses its deadline gives its slot back and is
left to a daemon thread of its own; how many of those may linger is bounded too.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Hashable
from typing import TypeVar

T = TypeVar("T")


class CallsExhaustedError(Exception):
    """So many calls hang that no further thread is started."""


class CallTimeoutError(Exception):
    """The call did not return within its deadline; it may still take effect."""


class BlockingCalls:
    """Runs at most `limit` calls at a time; refuses more while `lingering_limit` have outlived their deadline."""

    def __init__(self, limit: int, lingering_limit: int = 32) -> None:
        self._slots = asyncio.Semaphore(limit)
        self._lingering_limit = lingering_limit
        self._lingering: Counter[Hashable] = Counter()
        self._lock = threading.Lock()

    @property
    def lingering(self) -> int:
        """Calls that outlived their deadline and still run."""
        with self._lock:
            return self._lingering.total()

    def lingers(self, about: Hashable) -> bool:
        """Whether such a call is about this subject. Once it is False, what those calls did has been done."""
        with self._lock:
            return self._lingering[about] > 0

    async def run(self, call: Callable[[], T], timeout_s: float, about: Hashable = None) -> T:
        """The call's result or exception. `timeout_s` includes the wait for a slot; `about` is for `lingers`.

        Raises CallTimeoutError or CallsExhaustedError.
        """
        try:
            async with asyncio.timeout(timeout_s) as deadline, self._slots:
                if self.lingering >= self._lingering_limit:
                    raise CallsExhaustedError(f"{self.lingering} calls hang")
                return await self._in_thread(call, about)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise CallTimeoutError(f"no answer within {timeout_s:g} s") from error

    async def _in_thread(self, call: Callable[[], T], about: Hashable) -> T:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        state = {"abandoned": False, "done": False}

        def deliver(result: T | None, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def work() -> None:
            result: T | None = None
            error: BaseException | None = None
            try:
                result = call()
            except BaseException as raised:
                error = raised
            with self._lock:
                state["done"] = True
                if state["abandoned"]:
                    self._lingering[about] -= 1
                    if not self._lingering[about]:
                        del self._lingering[about]
                    return
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
                loop.call_soon_threadsafe(deliver, result, error)

        threading.Thread(target=work, name="libvirt-call", daemon=True).start()
        try:
            return await future
        except asyncio.CancelledError:
            with self._lock:
                if not state["done"]:
                    state["abandoned"] = True
                    self._lingering[about] += 1
            raise
