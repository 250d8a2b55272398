# SPDX-License-Identifier: Apache-2.0
"""From a request to a queued operation, in one write transaction: plan, rows, room, addresses and the operation."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy import Connection, select
from sqlalchemy.exc import IntegrityError

from ppec_contract.api import BatchMode, HostRetune, ItemState, VmAction, VmRecord, VmResize, VmsAction, VmsCreate
from ppec_contract.errors import PpecError
from ppec_contract.vm import NumaPolicy, Size, whole_huge_pages
from ppec_orchestrator.ipdb.provider import AddressProvider
from ppec_orchestrator.operations.address_refusals import lacks_addresses, with_addresses
from ppec_orchestrator.operations.advising import ADVISABLE, advised
from ppec_orchestrator.operations.kinds import create, delete, power, resize, retune
from ppec_orchestrator.operations.limits import priority
from ppec_orchestrator.operations.meaning import Meant, meaning, new_plan_request
from ppec_orchestrator.operations.plan_shown import restored
from ppec_orchestrator.operations.planning import Planned, Planning, refusal, refusal_problem
from ppec_orchestrator.operations.registry import KINDS
from ppec_orchestrator.operations.wanted import FreezeInput, GuestInput, ResizeInput, RetuneInput
from ppec_orchestrator.placement.request import PlanRequest
from ppec_orchestrator.store import idempotency, plans, sizes, vms
from ppec_orchestrator.store import operations as store
from ppec_orchestrator.store.catalogue import not_found
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.idempotency import RequestKey
from ppec_orchestrator.store.ipdb import ANY_NETWORK
from ppec_orchestrator.store.operations import NewItem, NewOperation
from ppec_orchestrator.store.tables import host, vm
from ppec_orchestrator.store.vm_groups import check_rules, insert_groups
from ppec_orchestrator.store.vms import KnownVm, NewVm

T = TypeVar("T")
_KINDS = {VmAction.DELETE: delete.NAME} | {action: kind.name for action, kind in power.KINDS.items()}
# What a guest is asked for, and has a time to obey.
_ASKED_OF_GUESTS = (VmAction.STOP, VmAction.REBOOT)


@dataclass(frozen=True, slots=True)
class Ask:
    """Who asks, and under which idempotency key (None: without one)."""

    caller: str
    key: RequestKey | None = None


@dataclass(frozen=True, slots=True)
class _New:
    """An operation about to be enqueued; `kept` is its input."""

    operation_id: str
    kind: str
    kept: dict[str, Any]
    items: Sequence[NewItem]
    passes: int = 0


class Acceptor:
    """Answers with the operation as it was enqueued, or the id of the one that the same request made before."""

    def __init__(
        self,
        database: Database,
        planning: Planning,
        now: Callable[[], datetime],
        addresses: AddressProvider,
    ) -> None:
        self._addresses = addresses
        self._database = database
        self._planning = planning
        self._now = now

    def create(self, asked: VmsCreate, ask: Ask) -> NewOperation | str:
        """See `_create`. Its addresses may have to be acquired first: some are asked for by number, others ran out."""
        self._addresses.prepare(asked.networks, asked.vrf)
        try:
            return self._create(asked, ask)
        except PpecError as error:
            networks, count = asked.networks or ANY_NETWORK, asked.total
            if not lacks_addresses(error) or not self._addresses.supply(networks, asked.vrf, count):
                raise
        return self._create(asked, ask)

    def _create(self, asked: VmsCreate, ask: Ask) -> NewOperation | str:
        """Raises the planner's refusal, `vm.exists`, what `wanted_networks.candidates` raises, and `….not_found` of
        whatever the request names."""
        with self._database.read() as conn:
            known = idempotency.earlier(conn, ask.key) if ask.key else None
            if known is not None:
                return known
            meant = meaning(conn, asked, self._now())
        request, wait = new_plan_request(meant, asked), asked.at_least is None

        def writes(conn: Connection, planned: Planned) -> NewOperation | str:
            return self._enqueue_create(conn, meant, asked.user_data, ask, planned)

        return self._once_per_key(ask, lambda: self._planned(request, meant, writes, wait=wait))

    def execute(self, plan_id: str, ask: Ask) -> NewOperation | str:
        """The stored plan as it is. Raises `plan.not_found`, `plan.outdated`, `auth.forbidden` for another's plan, and
        what `create` raises."""
        with self._database.read() as conn:
            known = idempotency.earlier(conn, ask.key) if ask.key else None
            if known is not None:
                return known
            stored = plans.load(conn, plan_id, self._now())
        made = restored(stored, ask.caller)

        def writes(conn: Connection) -> NewOperation | str:
            plans.use(conn, stored)
            planned = Planned(made.plan, self._planning.fleet.current(), passes=0)
            return self._enqueue_create(conn, made.meant, made.user_data, ask, planned)

        return self._once_per_key(ask, lambda: self._write(writes))

    def _planned(
        self,
        request: PlanRequest,
        meant: Meant,
        writes: Callable[[Connection, Planned], NewOperation | str],
        *,
        wait: bool,
    ) -> NewOperation | str:
        """A refusal tells the cheapest changes that would help; they are looked for when nothing is locked any more."""
        try:
            return self._planning.carry_through(request, self._write, writes, wait=wait)
        except PpecError as error:
            if error.code not in ADVISABLE:
                raise
            raise advised(error, self._planning.fleet, request) from error

    def _enqueue_create(
        self, conn: Connection, meant: Meant, user_data: str, ask: Ask, planned: Planned
    ) -> NewOperation:
        plan, wanted = planned.plan, meant.input.request
        total = len(plan.placed) + len(plan.refused)
        fewest = total if wanted.mode is BatchMode.ALL_OR_NOTHING else wanted.at_least or 1
        if len(plan.placed) < fewest:
            first = plan.refused[0].name
            refused = refusal(plan.refused, meant.input.size_of(first).shape, planned.fleet, total)
            raise with_addresses(conn, refused, planned.fleet, meant.input.profile_of(first), self._now())
        operation_id, now = new_id(), self._now()
        rules = {place.vm_id: meant.input.rules_of(place.name) for place in plan.placed}
        check_rules(conn, [rule for mine in rules.values() for rule in mine])
        new = [
            NewVm(
                place.vm_id, place.name, size.flavor or "", meant.image_id, size.vcpus, size.memory_mib, size.disk_mib,
                user_data, wanted.labels, size.max_vcpus, size.max_memory_mib, size.numa,
            )
            for place in plan.placed
            for size in (meant.input.size_of(place.name),)
        ]  # fmt: skip
        vms.insert_vms(conn, new, operation_id, now)
        insert_groups(conn, rules)
        planned.reserve(conn, meant.input.networks, now)
        items = [NewItem(place.vm_id, place.name, place.host) for place in plan.placed]
        items += [
            NewItem(
                one.vm_id, one.name, None, ItemState.REFUSED,
                refusal_problem(one, meant.input.size_of(one.name).shape, planned.fleet),
            )
            for one in plan.refused
        ]  # fmt: skip
        kept = meant.input.model_dump(mode="json")
        return self._enqueue(conn, ask, _New(operation_id, create.NAME, kept, items, planned.passes))

    def act(self, asked: VmsAction, ask: Ask) -> NewOperation | str:
        """Raises `vm.not_found`, and `vm.wrong_state` for VMs the action can't be taken on now."""

        def writes(conn: Connection) -> NewOperation | str:
            known = idempotency.earlier(conn, ask.key) if ask.key else None
            if known is not None:
                return known
            chosen = vms.find(conn, asked.vms)
            ids = [one.vm_id for one in chosen]
            _free_to(conn, asked.action, chosen)
            operation_id = new_id()
            if asked.action is VmAction.DELETE:
                # Who waits for a VM to be gone finds here what to wait for.
                vms.set_record(conn, ids, VmRecord.DELETING, operation_id)
            items = [NewItem(one.vm_id, one.name, one.host) for one in chosen]
            return self._enqueue(conn, ask, _New(operation_id, _KINDS[asked.action], _terms(asked), items))

        return self._once_per_key(ask, lambda: self._write(writes))

    def resize(self, ref: str, asked: VmResize, ask: Ask) -> NewOperation | str:
        """Raises `vm.not_found`, `vm.wrong_state`, `request.invalid`, and `host.no_capacity` with what is free."""

        def writes(conn: Connection) -> NewOperation | str:
            known = idempotency.earlier(conn, ask.key) if ask.key else None
            if known is not None:
                return known
            (one,) = chosen = vms.find(conn, [ref])
            # Who writes a host's report has the host's row before its VMs'.
            sizes.lock_host_of(conn, one.vm_id)
            _free_to(conn, "resize", chosen)
            row = conn.execute(select(vm).where(vm.c.id == one.vm_id)).one()
            size = Size(vcpus=asked.vcpus or row.vcpus, memory_mib=asked.memory_mib or row.memory_mib)
            _check_pages(row.name, size, NumaPolicy(**row.numa))
            kept = ResizeInput(size=size, held=sizes.held_of(row), timeout_s=asked.timeout_s).model_dump(mode="json")
            sizes.begin(conn, one.vm_id, size)
            items = [NewItem(one.vm_id, one.name, one.host)]
            return self._enqueue(conn, ask, _New(new_id(), resize.NAME, kept, items))

        return self._once_per_key(ask, lambda: self._write(writes))

    def retune(self, name: str, asked: HostRetune, ask: Ask) -> NewOperation | str:
        """Raises `host.not_found`. Which VMs it is about only the host's plan says."""

        def writes(conn: Connection) -> NewOperation | str:
            known = idempotency.earlier(conn, ask.key) if ask.key else None
            if known is not None:
                return known
            if conn.execute(select(host.c.id).where(host.c.name == name)).first() is None:
                raise not_found("host", "host", name)
            kept = RetuneInput(host=name, **dict(asked)).model_dump(mode="json")
            return self._enqueue(conn, ask, _New(new_id(), retune.KIND.name, kept, ()))

        return self._once_per_key(ask, lambda: self._write(writes))

    def _enqueue(self, conn: Connection, ask: Ask, new: _New) -> NewOperation:
        enqueued = NewOperation(
            operation_id=new.operation_id,
            kind=new.kind,
            created_by=ask.caller,
            created_at=self._now(),
            input=new.kept,
            steps=KINDS[new.kind].step_names,
            items=new.items,
            # The first step of each of these is this very transaction.
            done=1,
            priority=priority(conn, new.kind),
            counters={"commits": 1} | ({"planning_passes": new.passes} if new.passes else {}),
        )
        store.enqueue(conn, enqueued)
        if ask.key is not None:
            idempotency.remember(conn, ask.key, new.operation_id, enqueued.created_at)
        self._database.notify(store.WORK, within=conn)
        return enqueued

    def _write(self, writes: Callable[[Connection], T]) -> T:
        with self._database.write() as conn:
            return writes(conn)

    def _once_per_key(self, ask: Ask, accept: Callable[[], NewOperation | str]) -> NewOperation | str:
        """Whatever refuses a request may be its twin's doing, accepted just before: then that is the answer."""
        try:
            return accept()
        except (IntegrityError, PpecError) as error:
            with self._database.read() as conn:
                known = idempotency.earlier(conn, ask.key) if ask.key else None
            if known is not None:
                return known
            if isinstance(error, PpecError):
                raise
            raise PpecError(
                "vm.exists",
                "a name was taken by another request while this one was being accepted",
                hint="Choose other names.",
                subject="request",
            ) from error


def new_id() -> str:
    return f"op-{uuid.uuid4().hex}"


def _terms(asked: VmsAction) -> dict[str, Any]:
    """What the action's method takes beside the VMs."""
    if asked.action in _ASKED_OF_GUESTS:
        return GuestInput(timeout_s=asked.timeout_s, force=asked.force).model_dump()
    if asked.action is VmAction.FREEZE:
        return FreezeInput(thaw_after_s=asked.thaw_after_s).model_dump()
    return {}


def _check_pages(name: str, size: Size, numa: NumaPolicy) -> None:
    try:
        whole_huge_pages(size.memory_mib, numa)
    except ValueError as error:
        raise PpecError("request.invalid", f"vm {name}: {error}", subject=f"vm {name}") from error


def _free_to(conn: Connection, action: str, chosen: Sequence[KnownVm]) -> None:
    """Two requests for one VM follow one another, and the second sees the first one's operation."""
    ids = [one.vm_id for one in chosen]
    conn.execute(select(vm.c.id).where(vm.c.id.in_(ids)).order_by(vm.c.id).with_for_update())
    _check_states(chosen, action, store.under_way(conn, ids))


def _check_states(chosen: Sequence[KnownVm], action: str, busy: dict[UUID, str]) -> None:
    allowed = {VmRecord.ACTIVE}
    if action == VmAction.DELETE:
        allowed |= {VmRecord.FAILED}
    wrong = [one for one in chosen if one.vm_id in busy or one.record not in allowed]
    if not wrong:
        return
    first = wrong[0]
    why = f"operation {busy[first.vm_id]} is under way" if first.vm_id in busy else f"it is {first.record.value}"
    more = f" (and {len(wrong) - 1} more VMs are in a wrong state)" if len(wrong) > 1 else ""
    raise PpecError(
        "vm.wrong_state",
        f"vm {first.name} can't be asked to {action} now: {why}{more}",
        hint="Wait for the operation, then ask again." if first.vm_id in busy else "",
        subject=f"vm {first.name}",
        details={"vms": [one.name for one in wrong[:20]], "count": len(wrong)},
    )
