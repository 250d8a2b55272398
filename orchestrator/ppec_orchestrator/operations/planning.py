# SPDX-License-Identifier: Apache-2.0
"""Plans and commits in one: a lost race replans, and only a fleet without room refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import TypeVar

from sqlalchemy import Connection, text

from ppec_contract.errors import PpecError, Problem
from ppec_contract.vm import CpuPolicy, SmtPolicy
from ppec_orchestrator.placement.fleet import Fleet
from ppec_orchestrator.placement.plan import Plan, Refusal
from ppec_orchestrator.placement.planner import plan
from ppec_orchestrator.placement.request import PlanRequest, Shape
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.faults import TransactionLostError
from ppec_orchestrator.store.fleet import load_fleet
from ppec_orchestrator.store.reservations import LostRaceError

T = TypeVar("T")
_TRIES = 12
# The same in every replica: whoever has lost a race plans and commits alone, and so loses none again but by chance.
_PLAN_LOCK = 0x70706570
# What a vCPU gets one of, by policy.
_SEATS = {
    SmtPolicy.PREFER: "usable threads",
    SmtPolicy.ISOLATE: "usable cores",
    SmtPolicy.REQUIRE: "usable threads of cores with siblings",
}


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, the fleet it was made on, and how many planning passes that took so far."""

    plan: Plan
    fleet: Fleet
    passes: int


class Planning:
    """Reads the fleet, plans, and has the plan committed by the caller's writes."""

    def __init__(self, database: Database, *, silent_after_s: float, now: Callable[[], datetime]) -> None:
        self._database = database
        self._silent_after_s = silent_after_s
        self._now = now

    def alive_since(self) -> datetime:
        """A host that was last seen earlier is not live."""
        return self._now() - timedelta(seconds=self._silent_after_s)

    def carry_through(
        self,
        request: PlanRequest,
        commit: Callable[[Callable[[Connection], T]], T],
        writes: Callable[[Connection, Planned], T],
    ) -> T:
        """Plans, then calls `writes` in a transaction opened by `commit`, which is to reserve what was planned.

        The first plan is made on a snapshot, so that planning holds up nobody's writes. When the room is gone by the
        time of the commit, planning moves into the write transaction. Whatever else `writes` raises is the caller's.
        """
        with self._database.read() as conn:
            first = Planned(*self._plan(conn, request), passes=1)
        for passes in range(1, _TRIES + 1):
            try:
                if passes == 1:
                    return commit(lambda conn: writes(conn, first))
                return commit(partial(self._alone, request, passes, writes))
            except PpecError as error:
                if not _lost(error) or passes == _TRIES:
                    raise
        raise AssertionError("unreachable")

    def _alone(
        self, request: PlanRequest, passes: int, writes: Callable[[Connection, Planned], T], conn: Connection
    ) -> T:
        if conn.dialect.name == "postgresql":
            conn.execute(text("SELECT pg_advisory_xact_lock(:key)").bindparams(key=_PLAN_LOCK))
        return writes(conn, Planned(*self._plan(conn, request), passes=passes))

    def _plan(self, conn: Connection, request: PlanRequest) -> tuple[Plan, Fleet]:
        fleet = load_fleet(conn, now=self._now(), silent_after_s=self._silent_after_s)
        return plan(fleet, request), fleet


def _lost(error: PpecError) -> bool:
    """Addresses run out between plan and commit like everything else; the next plan counts them as a reason."""
    return isinstance(error, LostRaceError | TransactionLostError) or error.code == "address.exhausted"


def refusal(refused: Sequence[Refusal], shape: Shape, fleet: Fleet, wanted: int) -> PpecError:
    """Why not, for a whole batch: the reasons counted over hosts, as the first refused VM met them."""
    numa = shape.numa
    of_one_socket = numa.cpus is CpuPolicy.DEDICATED and not numa.multi_cell
    largest = fleet.largest_socket_vcpus(numa.smt) if of_one_socket else 0
    first = refused[0]
    details = {
        "reasons": {reason.value: count for reason, count in first.reasons.items()},
        "refused": len(refused),
        "wanted": wanted,
        "hosts": len(fleet.hosts),
    }
    if fleet.hosts and 0 < largest < shape.vcpus:
        return PpecError(
            "vm.exceeds_socket",
            f"{shape.vcpus} vCPUs are wanted, the largest socket of the fleet has {largest} {_SEATS[numa.smt]}",
            hint="Choose a smaller flavor, or one that spans NUMA cells.",
            subject=f"vm {first.name}",
            details={**details, "largest_socket_vcpus": largest},
        )
    what = f"vm {first.name}" if wanted == 1 else f"{len(refused)} of {wanted} VMs"
    return PpecError(
        "placement.no_capacity",
        f"{what} ({shape.vcpus} vCPUs, {shape.memory_mib} MiB, disk {shape.disk_mib} MiB) found no place: "
        + first.sentence(),
        hint=_hint(refused, wanted),
        subject=f"vm {first.name}",
        details=details,
    )


def _hint(refused: Sequence[Refusal], wanted: int) -> str:
    if 0 < len(refused) < wanted:
        return f"The other {wanted - len(refused)} fit: ask for fewer, or for best effort."
    top = Counter(refused[0].reasons).most_common(1)
    if not top:
        return "Add hosts first."
    return f"The most frequent reason is {top[0][0].value}: relieve that, or widen the search."


def refusal_problem(one: Refusal, shape: Shape, fleet: Fleet) -> Problem:
    """Why not, for one VM of a batch."""
    return refusal([one], shape, fleet, 1).problem()
