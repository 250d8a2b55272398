# SPDX-License-Identifier: Apache-2.0
"""The faults of the fake hypervisor: calls that are slow, fail, lose their answer, or outlive their deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from ppec_contract.errors import PpecError


@dataclass(frozen=True, slots=True)
class Hang:
    """A call that outlives its deadline: see `FaultPlan.hang`."""

    released: asyncio.Event
    unseen: bool


@dataclass
class FaultPlan:
    """Faults to come, by the port's method names ("define", "start", ...).

    `delays_s` slows every call of a method. `fail` has the n-th call from now fail; nothing is changed by a call that
    fails, unless `after` is set: then it takes effect first, as when an answer is lost. `fail_every` n has every n-th
    call of a method fail, as long as the fake lives. `hang` has the n-th call miss its deadline and take effect later.
    """

    delays_s: dict[str, float] = field(default_factory=dict)
    fail_every: dict[str, int] = field(default_factory=dict)
    _planned: dict[str, list[tuple[int, Exception, bool]]] = field(default_factory=dict)
    _hangs: dict[str, dict[int, Hang]] = field(default_factory=dict)
    _calls: dict[str, int] = field(default_factory=dict)

    def fail(self, method: str, error: Exception, *, nth: int = 1, after: bool = False) -> None:
        """Have the `nth` call of `method` from now on (1 is the next) raise `error`; one that is no PpecError is a bug
        of the agent's."""
        self._planned.setdefault(method, []).append((self.calls(method) + nth, error, after))

    def hang(self, method: str, *, nth: int = 1, unseen: bool = False) -> asyncio.Event:
        """Have the `nth` changing call from now on raise ``hypervisor.unavailable`` at once, as one that missed its
        deadline, and take effect when the returned event is set. `unseen` has it not linger meanwhile, as when the
        connection was lost over it."""
        planned = Hang(asyncio.Event(), unseen)
        self._hangs.setdefault(method, {})[self.calls(method) + nth] = planned
        return planned.released

    def next_hang(self, method: str) -> Hang | None:
        return self._hangs.get(method, {}).get(self.calls(method) + 1)

    def calls(self, method: str) -> int:
        """How often `method` has been called."""
        return self._calls.get(method, 0)

    async def begin(self, method: str) -> Callable[[], None]:
        """Count the call, delay it, fail it. The returned function raises what is due after the effect."""
        number = self._calls[method] = self.calls(method) + 1
        await asyncio.sleep(self.delays_s.get(method, 0))
        every = self.fail_every.get(method)
        if every and number % every == 0:
            raise PpecError("hypervisor.failed", f"{method}: a fault planned for every call number {every}")
        due = [(error, after) for nth, error, after in self._planned.get(method, []) if nth == number]
        for error, after in due:
            if not after:
                raise error

        def end() -> None:
            for error, _after in due:
                raise error

        return end
