# SPDX-License-Identifier: Apache-2.0
"""A host's views as the API needs them: one question and its answer, or an answer that goes on.

Everything here raises `host.unreachable` when the host can't be spoken to, and the host's own problem, cut to what a
host may say, when it refuses.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ppec_contract.agent import METHODS, Method
from ppec_contract.errors import PpecError, Problem
from ppec_contract.model import Model
from ppec_orchestrator.operations.bounds import bounded

M = TypeVar("M", bound=Model)
_CALLERS_FAULT = ("auth.", "request.")


@dataclass(frozen=True, slots=True)
class HostDoor:
    """Where the proxy of the host of this name listens."""

    host: str
    address: str
    port: int


class HostLine(Protocol):
    """A conversation with one host: one question at a time."""

    async def ask(self, question: Model, answer: type[M], *, patience_s: float = 0.0) -> M:
        """The reply of the agent's method that takes such a question. `patience_s` is how long the host may wait for
        others."""

    def follow(self, question: Model, answer: type[M]) -> AsyncGenerator[M, None]:
        """Reply after reply, until the host ends it. Close the generator, then the line, to end it before. What isn't
        taken from it is not fetched."""


class HostViews(Protocol):
    """Makes lines to hosts; they are closed on leaving the block."""

    def line(self, door: HostDoor) -> AbstractAsyncContextManager[HostLine]: ...


def view_of(question: Model) -> Method:
    """The method. A method that changes the host is a fault of ours: it needs an operation, a fence and a run."""
    method = METHODS[type(question).__name__]
    if method.changes:
        raise TypeError(f"{method.name} changes a host: it has to go through an operation")
    return method


def refused(host: str, told: Problem) -> PpecError:
    """A host's problem as the caller may see it. What the host holds against *us* is no fault of the caller's."""
    error = bounded(told).error()
    if not error.code.startswith(_CALLERS_FAULT):
        return error
    return PpecError(
        "host.unreachable" if error.code == "request.deadline_exceeded" else "internal.error",
        f"host {host} refused the orchestrator's call ({error.code}): {error.message}",
        hint="Host and orchestrator may be of different releases, or the host's ring-fence or CA is another one.",
        subject=f"host {host}",
    )


def unreachable(door: HostDoor, why: str) -> PpecError:
    return PpecError(
        "host.unreachable",
        f"host {door.host} at {door.address} port {door.port}: {why}",
        hint="Check the host's ppec-proxy, its allow_from, and the network between.",
        subject=f"host {door.host}",
    )
