# SPDX-License-Identifier: Apache-2.0
"""Plans and commits in one: a lost race replans, and only a fleet without room refuses."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from typing import TypeVar
from uuid import UUID

from sqlalchemy import Connection, text

from ppec_contract.errors import PpecError
from ppec_contract.vm import CpuPolicy, SmtPolicy
from ppec_orchestrator.operations.live_fleet import LiveFleet, Taken
from ppec_orchestrator.placement.fleet import Fleet
from ppec_orchestrator.placement.plan import Plan, Refusal
from ppec_orchestrator.placement.planner import Kept
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import PlanRequest, Shape
from ppec_orchestrator.store.clock import Clock, utc_now
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.faults import TransactionLostError
from ppec_orchestrator.store.ipdb import ALL_ANY, Networks
from ppec_orchestrator.store.reservations import ROOM, HostsHeldError, LostRaceError, Terms, lost_hosts, reserve

T = TypeVar("T")
_TRIES = 12
# How often a request that does not wait looks for other hosts, and how long it leaves those who are changing some.
_CLAIMS, _CLAIM_PAUSE_S = 3, 0.02
# For how long a request waits for others of its process: for a good many commits, or for one that gets no answer.
_LONGEST_TURN_S = 5.0
# The same in every replica: whoever has lost a race plans and commits alone, and so loses none again but by chance.
_PLAN_LOCK = 0x70706570
_NOBODY: Mapping[UUID, str] = {}
# What a vCPU gets one of, by policy.
_SEATS = {
    SmtPolicy.PREFER: "usable threads",
    SmtPolicy.ISOLATE: "usable cores",
    SmtPolicy.REQUIRE: "usable threads of cores with siblings",
}


@dataclass(slots=True)
class Planned:
    """A plan, the fleet it was made on, how many planning passes that took so far, and on what terms it holds.
    `taken` has the marks that its hosts got from its commit, as far as nothing else changed them. `held` is why some
    host was avoided for whose row others were waited for in vain."""

    plan: Plan
    fleet: Fleet
    passes: int
    terms: Terms = ROOM
    taken: Mapping[int, int] = field(default_factory=dict)
    held: PpecError | None = None

    @property
    def held_up(self) -> Mapping[UUID, PpecError]:
        """Which VMs have no place as long as somebody holds a host, and what to tell who wants them."""
        if self.held is None:
            return {}
        return {one.vm_id: self.held for one in self.plan.refused if Reason.CONTENDED in one.reasons}

    def refuse_held_up(self) -> None:
        """For who would rather ask again than go without: raises `store.unavailable` where any VM is held up."""
        for error in self.held_up.values():
            raise error

    def hold(self, conn: Connection) -> None:
        """For whoever changes what stands on hosts before it reserves, in the same transaction: its own changes don't
        count against the plan then. Raises `LostRaceError`."""
        if lost := lost_hosts(conn, self.plan.placed, self.terms):
            raise LostRaceError(lost)
        self.terms = replace(self.terms, generations={})

    def reserve(self, conn: Connection, networks: Networks = ALL_ANY, now: Clock = utc_now) -> None:
        """Commits the room and addresses of what is placed: see `reservations.reserve`."""
        self.taken = reserve(conn, self.plan.placed, self.terms, networks=networks, now=now)


class Planning:
    """Plans on the live fleet, and has the plan committed by the caller's writes."""

    def __init__(self, database: Database, *, silent_after_s: float, now: Clock) -> None:
        self._silent_after_s = silent_after_s
        self._now = now
        self._turn = threading.Lock()
        self.fleet = LiveFleet(database, silent_after_s=silent_after_s, now=now)

    def alive_since(self, at: datetime | None = None) -> datetime:
        """A host that was last seen earlier is not live now, or was not at that time."""
        return (at or self._now()) - timedelta(seconds=self._silent_after_s)

    def carry_through(
        self,
        request: PlanRequest,
        commit: Callable[[Callable[[Connection], T]], T],
        writes: Callable[[Connection, Planned], T],
        *,
        wait: bool = True,
        leaving: Mapping[UUID, str] = _NOBODY,
    ) -> T:
        """Plans, then calls `writes` in a transaction opened by `commit`, which is to have the plan `reserve` what it
        placed. After that, the transaction changes none of the plan's hosts.

        The requests of a process take turns, from plan to commit: two plans on one snapshot choose the same best hosts,
        and one of them would be made in vain. The first plan is made on a snapshot, so that planning holds up nobody's
        writes. When some of the room is gone by the time of the commit, another replica's doing, planning moves into
        the write transaction, and only the VMs of the hosts that clashed are planned again. Without `wait` neither a
        turn nor a lock of a host is waited for, only of addresses (`ipdb.grant`): what another transaction is just
        changing is left aside, and the plan that `writes` gets may refuse VMs for that alone. So it goes on when
        somebody, in psql for instance, keeps the row of a host for longer than is waited for: its VMs go elsewhere, or
        are in `Planned.held_up`. `leaving` are VMs that stand on these hosts until the commit: their room is taken, but
        nobody's neighbours they are any more. Whatever else `writes` raises is the caller's.
        """
        course = _Course(self, request, wait, leaving)
        with self._in_turn() if wait else nullcontext():
            if not _starts_group(request):
                course.plan()
            while True:
                try:
                    result = commit(partial(course.run, writes))
                except HostsHeldError as error:
                    if not course.wait:
                        # No row was waited for, so it is the table: no host is any better.
                        raise error.why from error
                    course.evade(error)
                except PpecError as error:
                    if not _lost(error) or course.passes >= (_TRIES if wait else _CLAIMS):
                        raise
                    course.lost(error)
                    if not course.wait:
                        time.sleep(_CLAIM_PAUSE_S)
                else:
                    course.committed()
                    return result

    def shown(self, request: PlanRequest) -> tuple[Plan, Fleet]:
        """A plan of which nothing is committed, on the fleet as it is now. In turn like the others, so that whoever
        commits one waits for it before a transaction begins, and not in one."""
        with self._in_turn():
            return self.fleet.plan(request)

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Out of turn where somebody takes too long, as with a database that doesn't answer: then all who wait would
        wait for each other's time limits one after another. Plans made at once are right too, only some in vain."""
        mine = self._turn.acquire(timeout=_LONGEST_TURN_S)
        try:
            yield
        finally:
            if mine:
                self._turn.release()

    def planned(self, request: PlanRequest, course: _Course) -> Planned:
        plan, fleet = self.fleet.plan(request, course.kept, afresh=course.afresh, leaving=course.leaving)
        hosts = {place.host_id: fleet.hosts[fleet.index[place.host]] for place in plan.placed}
        marks = {host_id: host.mark for host_id, host in hosts.items()}
        rules = {host_id: host.spare for host_id, host in hosts.items()}
        terms = Terms(relied_on(plan, request, fleet), marks, course.wait, plan.moves, rules)
        return Planned(plan, fleet, course.passes, terms, held=course.held)


class _Course:
    """A request on its way: how often it was planned, the latest plan, and which of its places stay in the next."""

    def __init__(
        self, planning: Planning, request: PlanRequest, wait: bool, leaving: Mapping[UUID, str] = _NOBODY
    ) -> None:
        self._planning = planning
        self._request = request
        self.leaving = leaving
        self._planned: Planned | None = None
        self.wait = wait
        self.held: PpecError | None = None
        self.passes = 0
        self.afresh = False
        self.kept: Kept = {}

    def plan(self) -> Planned:
        self.passes += 1
        self._planned = self._planning.planned(self._request, self)
        return self._planned

    def run(self, writes: Callable[[Connection, Planned], T], conn: Connection) -> T:
        """In a write transaction."""
        planned = self._planned
        if planned is None:
            # The first of a group has to wait for its turn, come what may: see `_starts_group`.
            if self.wait or _starts_group(self._request):
                take_turn(conn)
            planned = self.plan()
        self._planned = planned if self.wait else self._claimed(conn, planned)
        return writes(conn, self._planned)

    def committed(self) -> None:
        planned = self._planned
        if planned is not None and planned.taken:
            taken = Taken(planned.terms.marks, planned.taken)
            self._planning.fleet.committed(self._request, planned.plan.placed, taken)

    def lost(self, error: PpecError) -> None:
        """The places that did not clash stay. Addresses are not of one host: with them all clash."""
        exhausted = error.code == "address.exhausted"
        clashed = error.details["hosts"] if isinstance(error, LostRaceError) else ()
        self.kept = {} if exhausted or self._planned is None else _others(self._planned.plan, clashed)
        self.afresh = exhausted
        self._planned = None

    def evade(self, error: HostsHeldError) -> None:
        """From now on nothing is waited for: a host whose row is held is found by that, and left aside."""
        self.held = error.why
        self.wait = False
        self.kept = {}
        self._planned = None

    def _claimed(self, conn: Connection, planned: Planned) -> Planned:
        """What of the plan can be had at once; what can't is looked for on hosts that nobody else is changing."""
        contended: set[str] = set()
        for _ in range(_CLAIMS):
            lost = lost_hosts(conn, planned.plan.placed, planned.terms)
            if not lost:
                return planned
            contended.update(lost)
            self.kept = _others(planned.plan, lost)
            request = replace(self._request, contended_hosts=frozenset(contended))
            planned = self._planning.planned(request, self)
        return _without(planned, lost_hosts(conn, planned.plan.placed, planned.terms))


def take_turn(conn: Connection) -> None:
    """Nobody else plans or executes alone until the transaction ends. SQLite has one writer anyway."""
    if conn.dialect.name == "postgresql":
        conn.execute(text("SELECT pg_advisory_xact_lock(:key)").bindparams(key=_PLAN_LOCK))


def _others(plan: Plan, hosts: Collection[str]) -> Kept:
    """The places on other hosts."""
    pairs = zip(plan.placed, plan.evidence, strict=True)
    return {place.vm_id: (place, why) for place, why in pairs if place.host not in hosts}


def _without(planned: Planned, hosts: Collection[str]) -> Planned:
    """These hosts' VMs are refused."""
    plan = planned.plan
    stay = _others(plan, hosts)
    lost = [
        Refusal(place.vm_id, place.name, {Reason.CONTENDED: len(hosts)}) for place in plan.placed if place.host in hosts
    ]
    left = Plan(
        placed=tuple(place for place, _ in stay.values()),
        refused=(*plan.refused, *lost),
        evidence=tuple(why for _, why in stay.values()),
        exposed=plan.exposed,
        counted_on=plan.counted_on,
    )
    return replace(planned, plan=left, terms=replace(planned.terms, moves=left.moves))


def _starts_group(request: PlanRequest) -> bool:
    """May it place the first of VMs that are to stand together? Two such plans on one snapshot would start the group in
    two places, and no host could tell: from the start they are made one after another."""
    return any(group.hard and not group.apart for vm in request.vms for group in vm.groups)


def relied_on(plan: Plan, request: PlanRequest, fleet: Fleet) -> Mapping[int, int]:
    """The generations of hosts whose VMs the plan's rules look at: of all that share a level with a placement of a
    group, or are of a cluster whose room it counts on for a loss."""
    rows = rows_counted_on(plan, fleet)
    groups = {vm.vm_id: [group for group in vm.groups if group.hard] for vm in request.vms if vm.groups}
    for place in plan.placed if groups else ():
        row = fleet.index[place.host]
        for group in groups.get(place.vm_id, ()):
            rows.update(fleet.rows_of(group.level, fleet.domain(row, group.level)).tolist())
    return {fleet.hosts[row].host_id: fleet.hosts[row].generation for row in rows}


def rows_counted_on(plan: Plan, fleet: Fleet) -> set[int]:
    """Of the hosts whose room the plan counts on for a loss (N+1)."""
    return {row for cluster in plan.counted_on for row in fleet.places["cluster"][cluster].tolist()}


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
    if Reason.CONTENDED in first.reasons:
        return PpecError(
            "placement.conflict",
            f"{len(refused)} of {wanted} VMs found no place that nobody else is just taking: {first.sentence()}",
            hint="Try again, or without at_least: then the request waits for its turn.",
            subject="plan",
            details=details,
        )
    what = f"vm {first.name}" if wanted == 1 else f"{len(refused)} of {wanted} VMs"
    return PpecError(
        "placement.no_capacity",
        f"{what} ({_size_words(shape)}) found no place: " + first.sentence(),
        hint=_hint(refused, wanted),
        subject=f"vm {first.name}",
        details=details,
    )


def _size_words(shape: Shape) -> str:
    disk = f"disk {shape.disk_mib} MiB" + (f" in pool {shape.pool}" if shape.pool else "")
    drives = [f"{shape.nvme} NVMe drive{'s' if shape.nvme > 1 else ''}"] if shape.nvme else []
    return ", ".join([f"{shape.vcpus} vCPUs", f"{shape.memory_mib} MiB", disk, *drives])


def _hint(refused: Sequence[Refusal], wanted: int) -> str:
    if 0 < len(refused) < wanted:
        return f"The other {wanted - len(refused)} fit: ask for fewer, or for best effort."
    top = Counter(refused[0].reasons).most_common(1)
    if not top:
        return "Add hosts first."
    return f"The most frequent reason is {top[0][0].value}: relieve that, or widen the search."
