# SPDX-License-Identifier: Apache-2.0
"""Threads of their own for requests that may wait, so that none of the others ever waits behind them.

Starlette has one pool of forty threads for every `def` endpoint. Whoever wants places waits for the turn to plan
(decision 0022) or for the transaction that is shared (0021), and every change for the database's writer, or for a row
that somebody holds: forty of them in the pool, and no heartbeat is taken and no list shown. Decision 0023.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from inspect import iscoroutinefunction
from typing import Any, ClassVar, TypeVar

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

from ppec_contract.errors import PpecError
from ppec_orchestrator.api.audited import CHANGING, AuditedRoute
from ppec_orchestrator.operations.creation import MOST_JOINED

T = TypeVar("T")


class Bulkhead:
    """At most so many `threads` at once for `what` (in the plural). Whoever comes then waits without one, in the order
    of coming; after `most_waiting` of them, whoever comes is told so."""

    def __init__(self, what: str, *, threads: int, most_waiting: int) -> None:
        self._what = what
        self._threads = threads
        self._most_waiting = most_waiting
        # Like AnyIO's own limiter: one belongs to the event loop that waits at it.
        self._limiter: RunVar[CapacityLimiter] = RunVar(f"ppec: {what}")

    async def run(self, work: Callable[[], T]) -> T:
        """Raises `orchestrator.busy`, and what `work` raises."""
        limiter = self._limiter_here()
        waiting = limiter.statistics().tasks_waiting
        if waiting >= self._most_waiting:
            raise PpecError(
                "orchestrator.busy",
                f"{self._threads} {self._what} are under way and {waiting} wait, and no more than that may",
                hint="Try again in a moment, or with fewer requests at once.",
                subject="orchestrator",
            )
        return await to_thread.run_sync(work, limiter=limiter)

    def _limiter_here(self) -> CapacityLimiter:
        limiter = self._limiter.get(None)
        if limiter is None:
            limiter = CapacityLimiter(self._threads)
            self._limiter.set(limiter)
        return limiter


# As many as share a transaction; nearly all of them sleep. About as many more may wait as are accepted in the half
# minute for which clients have patience, if each is a batch of a hundred.
PLANNING = Bulkhead("requests for places", threads=MOST_JOINED, most_waiting=256)
# As many as they had in the pool.
CHANGES = Bulkhead("changes", threads=40, most_waiting=256)
# The operation ids of what plans: all that `operations/planning.py` has take turns.
_PLANNERS = frozenset({"create_vms", "create_plan", "execute_plan"})


class BulkheadRoute(AuditedRoute):
    """A route whose endpoint runs among its own kind: what plans, or what else changes something. Everything else stays
    in the common pool. So do dependencies: who may not call is told at once."""

    # Whether what is sent here are changes that somebody wants, who may be let wait.
    may_wait: ClassVar[bool] = True
    bulkhead: Bulkhead | None

    def __init__(self, path: str, endpoint: Callable[..., Any], **declared: Any) -> None:
        name, methods = declared.get("name") or endpoint.__name__, declared.get("methods") or ()
        self.bulkhead = self._bulkhead_of(name, frozenset(methods))
        # Asynchronous endpoints wait in the event loop already.
        if self.bulkhead is not None and not iscoroutinefunction(endpoint):
            endpoint = _within(self.bulkhead, endpoint)
        super().__init__(path, endpoint, **declared)

    def _bulkhead_of(self, name: str, methods: frozenset[str]) -> Bulkhead | None:
        if not self.may_wait or not CHANGING & methods:
            return None
        return PLANNING if name in _PLANNERS else CHANGES


def _within(bulkhead: Bulkhead, endpoint: Callable[..., T]) -> Callable[..., Any]:
    """Still the endpoint as far as FastAPI reads its parameters."""

    @wraps(endpoint)
    async def waits_its_turn(**arguments: Any) -> T:
        return await bulkhead.run(partial(endpoint, **arguments))

    return waits_its_turn
