# SPDX-License-Identifier: Apache-2.0
"""What a step works with."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from ppec_contract.errors import PpecError, Problem
from ppec_orchestrator.approvals import NONE_NEEDED, ApprovalPolicy
from ppec_orchestrator.dispatch.port import Dispatcher
from ppec_orchestrator.ipdb.provider import AddressProvider, BuiltIn
from ppec_orchestrator.operations.journal import Journal
from ppec_orchestrator.operations.limits import Limits
from ppec_orchestrator.operations.live import Live
from ppec_orchestrator.operations.planning import Planning
from ppec_orchestrator.operations.steps import HandedOverError
from ppec_orchestrator.store import operations as store
from ppec_orchestrator.store.claims import Claim
from ppec_orchestrator.store.clock import Clock
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.operations import Item


@dataclass(frozen=True)
class Ports:
    """What the engine needs of the world around it."""

    database: Database
    dispatcher: Dispatcher
    planning: Planning
    image_url: Callable[[str], str]
    now: Clock
    addresses: AddressProvider = field(default_factory=BuiltIn)
    approvals: ApprovalPolicy = NONE_NEEDED


class Signals:
    """What others want of an operation under way."""

    def __init__(self, stopping: threading.Event) -> None:
        self.cancel = threading.Event()
        self.stopping = stopping


@dataclass(frozen=True)
class Context:
    """One claimed operation at work. `reason` is set once it goes backwards: then a cancel changes nothing."""

    ports: Ports
    journal: Journal
    live: Live
    limits: Limits
    signals: Signals
    reason: Problem | None = None

    @property
    def claimed(self) -> Claim:
        return self.journal.claimed

    @property
    def operation_id(self) -> str:
        return self.claimed.operation_id

    def items(self) -> list[Item]:
        with self.ports.database.read() as conn:
            return store.items_of(conn, self.operation_id)

    def check(self) -> None:
        """Called wherever a step may stop: raises when the process stops, or `operation.cancelled` when asked to."""
        if self.signals.stopping.is_set():
            raise HandedOverError
        if self.signals.cancel.is_set() and self.reason is None:
            raise cancelled(self.operation_id)


def cancelled(operation_id: str) -> PpecError:
    return PpecError(
        "operation.cancelled",
        f"operation {operation_id} was cancelled",
        hint="Ask again if it is still wanted.",
        subject=f"operation {operation_id}",
    )
