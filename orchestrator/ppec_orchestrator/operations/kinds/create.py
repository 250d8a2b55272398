# SPDX-License-Identifier: Apache-2.0
"""`vm.create`: a batch of VMs, each tried on a few hosts.

    reserve   do: by the accepting transaction        undo: give back room and addresses; the record stays as failed
    create    do: rounds of one run for all VMs       undo: delete on the hosts whatever may be there;
              still to be made; a VM that failed            VMs that changed cells stay where they are
              moves to another host in between;
              hosts open cells before that are
              to be (`openings.py`)

What a failed VM may have left on its host is removed before the VM moves on. A host that can't be reached for that
gets a `vm.cleanup` of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

import structlog
from sqlalchemy import Connection

from ppec_contract.api_operations import ItemState
from ppec_contract.api_vms import BatchMode, VmRecord
from ppec_contract.errors import Problem
from ppec_orchestrator.ipdb.ranges import Address
from ppec_orchestrator.operations import leftovers, openings
from ppec_orchestrator.operations.advising import changes_by_vm, with_changes
from ppec_orchestrator.operations.context import Context
from ppec_orchestrator.operations.hosts import Call, Outcome, carry
from ppec_orchestrator.operations.leftovers import Leftover
from ppec_orchestrator.operations.outcomes import may_move, whole_host
from ppec_orchestrator.operations.planning import Planned
from ppec_orchestrator.operations.specs import told, vm_spec
from ppec_orchestrator.operations.steps import Kind, Step, StepEnd, StepFailedError, done_on_accept
from ppec_orchestrator.operations.verdicts import by_items, reason
from ppec_orchestrator.operations.wanted import CreateInput
from ppec_orchestrator.placement.plan import Refusal
from ppec_orchestrator.placement.request import PlanRequest
from ppec_orchestrator.store import operations as store
from ppec_orchestrator.store import vms
from ppec_orchestrator.store.observations import record_observed
from ppec_orchestrator.store.operations import CREATE_STEP, Item, ItemChange
from ppec_orchestrator.store.reservations import release

NAME = "vm.create"
# In the details of a VM that its host failed: the counts of why no other could take it.
ELSEWHERE = "elsewhere"
_log = structlog.get_logger(__name__)


def create_on_hosts(context: Context) -> StepEnd:
    """Rounds, until every VM is made or has failed for good."""
    asked = CreateInput.model_validate(context.claimed.input)
    while True:
        items = context.items()
        under_way = [item for item in items if item.state is ItemState.RUNNING]
        untried = [item for item in under_way if item.problem is None]
        if untried:
            if ready := openings.ready(context, asked, untried):
                carry(context, _call(context, ready))
        elif under_way:
            context.check()
            _Round.of(context, asked, items, under_way).decide()
        else:
            _Round.of(context, asked, items, []).advise()
            return StepEnd(detail=_summary(items))


def _call(context: Context, items: Sequence[Item]) -> Call:
    def parameters(conn: Connection, hosts: Mapping[str, Sequence[UUID]]) -> dict[str, dict[str, Any]]:
        ids = [vm_id for mine in hosts.values() for vm_id in mine]
        specs = {one.vm_id: vm_spec(one) for one in vms.placed(conn, ids, context.ports.image_url)}
        return {host: {"vms": [told(specs[vm_id]) for vm_id in mine]} for host, mine in hosts.items()}

    def record(conn: Connection, outcomes: Sequence[Outcome]) -> None:
        made = [outcome.result for outcome in outcomes if outcome.problem is None and outcome.result]
        record_observed(conn, made, context.ports.now(), VmRecord.ACTIVE)
        store.change_items(conn, context.operation_id, [_change(outcome) for outcome in outcomes])

    targets = {item.vm_id: item.host for item in items if item.host is not None}
    return Call("CreateVms", targets, {item.vm_id: item.name for item in items}, parameters, record)


def _change(outcome: Outcome) -> ItemChange:
    """A failed attempt leaves the VM running, with its problem: the round decides what becomes of it."""
    failed = outcome.problem is not None
    return ItemChange(
        outcome.vm_id,
        ItemState.RUNNING if failed else ItemState.SUCCEEDED,
        outcome.problem,
        stage=None if failed else "done",
        stage_ms={stage.value: ms for stage, ms in outcome.result.stage_ms.items()} if outcome.result else None,
    )


@dataclass(frozen=True)
class _Round:
    """What becomes of the VMs whose attempt failed: `moving` are tried elsewhere, `lost` have failed for good."""

    context: Context
    asked: CreateInput
    items: Sequence[Item]
    moving: Mapping[UUID, Item]
    lost: Sequence[Item]

    @classmethod
    def of(cls, context: Context, asked: CreateInput, items: Sequence[Item], failed: Sequence[Item]) -> _Round:
        limit = context.limits.attempts
        moving = {i.vm_id: i for i in failed if i.problem and may_move(i.problem) and i.attempt < limit}
        return cls(context, asked, items, moving, [item for item in failed if item.vm_id not in moving])

    @property
    def whole(self) -> bool:
        return self.asked.request.mode is BatchMode.ALL_OR_NOTHING

    def decide(self) -> None:
        self._refuse_lost()
        left = leftovers.remove(self.context, leftovers.of_items([*self.moving.values(), *self.lost]))
        self._without_bound(left)._settle(left)

    def _refuse_lost(self) -> None:
        if self.lost and self.whole:
            raise StepFailedError(reason(self.lost))

    def _without_bound(self, left: Sequence[Leftover]) -> _Round:
        """A VM stays with the addresses that it asked for by number; as long as a host may still have it, so may no
        other."""
        bound: dict[UUID, Item] = {}
        for item in (self.moving[one.vm_id] for one in left if one.vm_id in self.moving):
            fixed = [one.address for one in self.asked.networks_of(item.name) if one.address is not None]
            if fixed:
                bound[item.vm_id] = replace(item, problem=_bound(item, fixed[0]))
        moving = {vm_id: item for vm_id, item in self.moving.items() if vm_id not in bound}
        return replace(self, moving=moving, lost=[*self.lost, *bound.values()])

    def _settle(self, left: Sequence[Leftover]) -> None:
        self._refuse_lost()
        journal = self.context.journal
        if not self.moving:
            journal.commit(lambda conn: self._end(conn, left, {}))
            return
        planning = self.context.ports.planning
        planned = planning.carry_through(
            self._plan_request(self.moving.values()),
            journal.commit,
            lambda conn, planned: self._move(conn, left, planned),
            leaving={vm_id: item.host for vm_id, item in self.moving.items() if item.host},
        )
        # Reaches the database with the next check-point; there always is one.
        journal.count(planning_passes=planned.passes)

    def advise(self) -> None:
        """Says what would help those that no other host could take, on the fleet as it is with their room given back.
        All others are made by then, and it makes nothing undone: they have failed already, and without advice still
        know why."""
        stuck = [item for item in self.items if item.problem and ELSEWHERE in item.problem.details]
        if not stuck:
            return
        try:
            request = self._plan_request(stuck)
            plan, fleet = self.context.ports.planning.shown(request)
            changes = changes_by_vm(fleet, request, plan)
        except Exception:
            _log.exception("no advice on refused VMs", operation=self.context.operation_id)
            return
        ended = [item for item in stuck if changes.get(item.vm_id)]
        told = [ItemChange(i.vm_id, i.state, with_changes(i.problem, changes[i.vm_id])) for i in ended if i.problem]
        if told:
            self.context.journal.commit(lambda conn: store.change_items(conn, self.context.operation_id, told))

    def _plan_request(self, moving: Iterable[Item]) -> PlanRequest:
        # A host that made others of the batch is not broken, whatever it says of one.
        sound = {i.host for i in self.items if i.state is ItemState.SUCCEEDED}
        broken = {i.host for i in self.items if i.host and i.problem and whole_host(i.problem)} - sound
        requests = self.asked.vm_requests(
            (item.vm_id, item.name, item.excluded_hosts | broken | {item.host or ""}) for item in moving
        )
        standing = Counter(i.host for i in self.items if i.host and i.state is ItemState.SUCCEEDED)
        return self.asked.plan_request(requests, standing)

    def _move(self, conn: Connection, left: Sequence[Leftover], planned: Planned) -> Planned:
        """Off the old hosts and onto the new ones, or to the end where there is none; all in one transaction."""
        planned.refuse_held_up()
        refused = {one.vm_id: one for one in planned.plan.refused}
        if refused and self.whole:
            stuck = [self.moving[vm_id] for vm_id in refused]
            raise StepFailedError(reason([replace(i, problem=_final(i, refused[i.vm_id])) for i in stuck]))
        # What is given back now changes hosts that the plan may rely on.
        planned.hold(conn)
        self._end(conn, left, refused)
        now = self.context.ports.now
        release(conn, [place.vm_id for place in planned.plan.placed], now=now)
        networks = {place.vm_id: self.asked.networks_of(place.name) for place in planned.plan.placed}
        planned.reserve(conn, networks, now)
        openings.remember(conn, self.context.operation_id, planned.plan)
        for place in planned.plan.placed:
            item = self.moving[place.vm_id]
            excluded = item.excluded_hosts | ({item.host} if item.host else set())
            store.move_item(conn, self.context.operation_id, item, place.host, excluded)
        return planned

    def _end(self, conn: Connection, left: Sequence[Leftover], refused: Mapping[UUID, Refusal]) -> None:
        """Remembers what is left, and gives up the lost and those no other host can take."""
        leftovers.remember(self.context, conn, left)
        ended = [*self.lost, *(self.moving[vm_id] for vm_id in refused)]
        ids = [item.vm_id for item in ended]
        release(conn, ids, now=self.context.ports.now)
        vms.set_record(conn, ids, VmRecord.FAILED)
        changes = [ItemChange(item.vm_id, ItemState.FAILED, _final(item, refused.get(item.vm_id))) for item in ended]
        store.change_items(conn, self.context.operation_id, changes)


def _bound(item: Item, address: Address) -> Problem | None:
    """Why the host failed it, and why no other is tried."""
    if item.problem is None:
        return None
    detail = f"{item.problem.detail}; no other host is tried while host {item.host} may have its address {address}"
    return item.problem.model_copy(update={"detail": detail})


def _final(item: Item, refusal: Refusal | None) -> Problem | None:
    """Why the host failed it and, if so, that no other could take it."""
    if item.problem is None or refusal is None:
        return item.problem
    detail = f"{item.problem.detail}; no other host can take it: {refusal.sentence()}"
    counted = {reason.value: count for reason, count in refusal.reasons.items()}
    return item.problem.model_copy(update={"detail": detail, "details": {**item.problem.details, ELSEWHERE: counted}})


def _summary(items: Sequence[Item]) -> str:
    counted = Counter(item.state for item in items)
    return ", ".join(f"{count} {state.value}" for state, count in counted.items())


def undo_create(context: Context) -> StepEnd:
    """Deletes wherever a VM may be, whatever was recorded of it."""
    left = leftovers.remove(context, leftovers.of_items(context.items()))
    return StepEnd(
        writes=lambda conn: leftovers.remember(context, conn, left),
        detail=f"{len(left)} VMs remain to be cleaned up" if left else "",
    )


def undo_reserve(context: Context) -> StepEnd:
    items = [item for item in context.items() if item.state not in (ItemState.REFUSED, ItemState.FAILED)]
    ids = [item.vm_id for item in items]

    def writes(conn: Connection) -> None:
        release(conn, ids, now=context.ports.now)
        vms.set_record(conn, ids, VmRecord.FAILED)
        store.change_items(
            conn,
            context.operation_id,
            [ItemChange(i.vm_id, ItemState.FAILED if i.problem else ItemState.UNDONE, i.problem) for i in items],
        )

    return StepEnd(writes)


KIND = Kind(
    NAME,
    (
        Step("reserve", done_on_accept, undo_reserve),
        Step(CREATE_STEP, create_on_hosts, undo_create),
    ),
    by_items,
)
