# SPDX-License-Identifier: Apache-2.0
"""VMs of a create for which running VMs have to change NUMA cells first: their hosts retune, then they are made.

The plan says which VMs move where, cell by cell. The host plans that again to the core, as only it can, and carries out
its own plan; it may open the cell in another way. Nothing is recorded of the moves before the host has made them. On a
host with moves the VMs are made in the order of the plan, for what a move leaves behind may be another VM's place.

What was remembered with the operation survives a crash: which VMs wait for which, and the host's plan once it was made,
so that a retune under way is followed and not planned anew. Moved VMs stay where they are, whatever becomes of the
create: any cell is as good to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from uuid import UUID

from pydantic import Field
from sqlalchemy import Connection

from ppec_contract.errors import PpecError, Problem
from ppec_contract.model import HostName, Model
from ppec_contract.retune import MAX_MOVED_MIB, RetuneBounds, RetunePlan, RetuneWant
from ppec_orchestrator.operations.context import Context
from ppec_orchestrator.operations.retunes_by_hosts import carried_out, planned
from ppec_orchestrator.operations.steps import StepFailedError
from ppec_orchestrator.operations.wanted import CreateInput
from ppec_orchestrator.placement.plan import Plan
from ppec_orchestrator.store import operations as store
from ppec_orchestrator.store.operations import CREATE_STEP, Item, ItemChange, NewItem

# What a host says that has changed nothing, as its VMs are not where its plan has them.
_OUTDATED = "retune.outdated"


class _Turn(Model):
    """A VM on a host with moves, in the order of the plan; `opened` if its cells have to be opened for it."""

    vm_id: UUID
    cells: tuple[int, ...]
    opened: bool


class _Made(Model):
    """The plan that a host made for a VM."""

    vm_id: UUID
    host: HostName
    plan: RetunePlan


class _Openings(Model):
    """What is kept: the turns of each host, and the latest plan that any of them made. One that was carried out before
    needs not be known: who asks again is told that the VM fits."""

    turns: dict[str, tuple[_Turn, ...]] = Field(default_factory=dict)
    made: _Made | None = None


def remember(conn: Connection, operation_id: str, plan: Plan) -> None:
    """In the transaction that reserves the plan's room; nothing of an earlier plan is still to be made then."""
    opening = {move.host for move in plan.moves}
    if not opening and not _kept(conn, operation_id).turns:
        return
    pairs = sorted(zip(plan.placed, plan.evidence, strict=True), key=lambda pair: pair[1].step)
    turns = {
        host: tuple(
            _Turn(vm_id=place.vm_id, cells=place.cells, opened=bool(why.moves))
            for place, why in pairs
            if place.host == host
        )
        for host in opening
    }
    _keep(conn, operation_id, _Openings(turns=turns))


def ready(context: Context, asked: CreateInput, untried: Sequence[Item]) -> list[Item]:
    """Those whose turn it is: all on hosts without moves; on the others those before the next opening. Only when there
    are none the hosts whose next VM waits for it are made to open its cells. A VM for which that could not be done has
    its problem then, like one that the host failed to make."""
    with context.ports.database.read() as conn:
        kept = _kept(conn, context.operation_id)
    items = {item.vm_id: item for item in untried}
    left = {host: [turn for turn in turns if turn.vm_id in items] for host, turns in kept.turns.items()}
    first = [mine for mine in left.values() if mine and not mine[0].opened]
    found = [item for item in untried if item.host not in left]
    found += [items[turn.vm_id] for mine in first for turn in _until_next(mine)]
    if found:
        return found
    opened = [mine for mine in left.values() if mine and _opened(context, asked, kept, items[mine[0].vm_id], mine[0])]
    return [items[turn.vm_id] for mine in opened for turn in _until_next(mine)]


def _until_next(turns: Sequence[_Turn]) -> Iterator[_Turn]:
    for number, turn in enumerate(turns):
        if number and turn.opened:
            return
        yield turn


def _opened(context: Context, asked: CreateInput, kept: _Openings, item: Item, turn: _Turn) -> bool:
    try:
        made = kept.made if kept.made and (kept.made.vm_id, kept.made.host) == (item.vm_id, item.host) else None
        problem = _carried_out(context, item, made.plan if made else _planned(context, asked, item, turn))
        if problem is not None and problem.code == _OUTDATED:
            # Nothing was changed, and of what has changed meanwhile the host makes another plan, if it can.
            problem = _carried_out(context, item, _planned(context, asked, item, turn))
    except StepFailedError as error:
        problem = error.problem()
    if problem is None:
        return True
    change = ItemChange(item.vm_id, item.state, problem)
    context.journal.commit(lambda conn: store.change_items(conn, context.operation_id, [change]))
    return False


def _carried_out(context: Context, item: Item, plan: RetunePlan) -> Problem | None:
    outcomes = carried_out(context, item.host or "", plan) if plan.moves else []
    return next((outcome.problem for outcome in outcomes if outcome.problem), None)


def _planned(context: Context, asked: CreateInput, item: Item, turn: _Turn) -> RetunePlan:
    size, host = asked.size_of(item.name), item.host or ""
    want = RetuneWant(vcpus=size.vcpus, memory_mib=size.memory_mib, numa=size.numa, cells=turn.cells)
    bounds = RetuneBounds(moves=asked.request.max_moves, memory_mib=MAX_MOVED_MIB)
    # One host may be asked for several VMs.
    plan = planned(context, host, want, bounds, adopts=False)

    def keep(conn: Connection) -> None:
        store.refuse_not_free(conn, context.operation_id, [NewItem(m.vm_id, m.name, host) for m in plan.moves])
        kept = _kept(conn, context.operation_id)
        made = _Made(vm_id=item.vm_id, host=host, plan=plan)
        _keep(conn, context.operation_id, kept.model_copy(update={"made": made}))

    try:
        context.journal.commit(keep)
    except PpecError as error:
        if error.code != "vm.wrong_state":
            raise
        raise StepFailedError(_outdated(host, error).problem()) from error
    return plan


def _outdated(host: str, error: PpecError) -> PpecError:
    return PpecError(
        _OUTDATED,
        f"host {host} can't open the cells as planned: {error.message}",
        hint="Wait for the operation that is at work there.",
        subject=f"host {host}",
        details=error.details,
    )


def _kept(conn: Connection, operation_id: str) -> _Openings:
    return _Openings.model_validate(store.data_of(conn, operation_id, CREATE_STEP))


def _keep(conn: Connection, operation_id: str, openings: _Openings) -> None:
    store.keep_data(conn, operation_id, CREATE_STEP, openings.model_dump(mode="json"))
