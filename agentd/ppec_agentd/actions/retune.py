# SPDX-License-Identifier: Apache-2.0
"""Retune: carry out a plan that moves running VMs between cells, step by step, or take it back.

The moves go in *legs*: as many at once as the ledger admits, so that until the leg stands nobody else gets what an undo
would need. A VM's place is what its metadata says. Each move changes the running domain first, then its metadata, then
its definition: broken off anywhere, the VM is put where its metadata says (`settle_seat`), at once or by recovery.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from uuid import UUID

import structlog

from ppec_agentd.actions.context import Emit, HostContext, Outcome, Steps, as_it_is, refuse_foreign
from ppec_agentd.actions.delete import refuse_lingering
from ppec_agentd.hypervisor import Domain, DomainDefinition, DomainMetadata, Seat
from ppec_agentd.journal import Key
from ppec_agentd.ledger import Holding, Move
from ppec_agentd.numa import NumaPlan
from ppec_agentd.retune.tenants import seat_of, tenant_of
from ppec_contract.agent import RetuneHost, Stage, VmResult, VmsReply
from ppec_contract.errors import PpecError
from ppec_contract.retune import RetuneMove, RetunePlan, RetuneSeat
from ppec_contract.vm import VmState

log = structlog.get_logger(__name__)
# The journal knows a retune by the VMs it moves and by itself, which has an id that no VM has: its first half is all
# ones. The second half is the plan's, as one operation may retune a host several times. It was all zeros once.
_FLIGHTS = (1 << 64) - 1
HOST_ID = UUID(int=0)
_OFF = (VmState.STOPPED, VmState.CRASHED)


def flight_of(plan: RetunePlan) -> UUID:
    """The id of the retune that carries this plan out."""
    return UUID(int=_FLIGHTS << 64 | int(plan.digest()[:16], 16))


def is_flight(vm_id: UUID) -> bool:
    """Whether this is no VM's id, but a retune's."""
    return vm_id.int >> 64 == _FLIGHTS or vm_id == HOST_ID


class SeatsLeftOpenError(PpecError):
    """A `retune.failed` of which not all could be taken back: the ledger has VMs in two places until `settle_seat`."""

    def __init__(self, failed: PpecError) -> None:
        super().__init__(failed.code, failed.message, hint=failed.hint, subject=failed.subject, details=failed.details)


async def retune_host(host: HostContext, call: RetuneHost, steps: Steps) -> Outcome:
    """Carries the plan out, with the locks of all its VMs held, and after any other retune.

    Raises ``retune.outdated`` before anything is changed, and ``retune.failed`` once what was changed is taken back, as
    `SeatsLeftOpenError` if not all of it could be.
    """
    async with AsyncExitStack() as locks:
        await locks.enter_async_context(host.lock_of(HOST_ID))
        for vm_id in sorted({move.vm_id for move in call.plan.moves}):
            await locks.enter_async_context(host.lock_of(vm_id))
        moves = _left_to_do(host, call.plan.moves)
        await _refuse_waiting(host, moves)
        if moves:
            await _in_the_journal(host, call, moves, steps)
        return Outcome(bool(moves), None)


def without_the_host(emit: Emit) -> Emit:
    """A retune's flight is the host's: what it ends with is told by VM, once it has ended."""

    def filtered(reply: VmsReply) -> None:
        if not any(is_flight(result.vm_id) for result in reply.results):
            emit(reply)

    return filtered


async def results_by_vm(host: HostContext, call: RetuneHost, own: VmResult) -> tuple[VmResult, ...]:
    """The host's result as that of each VM of the plan, with the VM as it is now: of one that failed, too, because not
    all of it may have been taken back."""
    results = []
    for vm_id, name in {move.vm_id: move.name for move in call.plan.moves}.items():
        vm = await as_it_is(host, vm_id)
        shown = {"vm_id": vm_id, "name": name, "vm": vm, "observed_at": host.moments.observed() if vm else None}
        results.append(own.model_copy(update=shown))
    return tuple(results)


async def _in_the_journal(host: HostContext, call: RetuneHost, moves: Sequence[RetuneMove], steps: Steps) -> None:
    keys = {move.vm_id: Key(call.operation_id, "RetuneHost", str(move.vm_id)) for move in moves}
    names = {move.vm_id: move.name for move in moves}
    intents = [(key, names[vm_id]) for vm_id, key in keys.items()]
    await asyncio.to_thread(host.journal.append_intents, call.operation_id, call.fence, intents)
    work = _Retune(host, steps)
    try:
        await work.carry_out(moves)
    finally:
        # However it ended, be it by a fault of ours or by the agent's own end: who holds two places is to be settled.
        left_open = {vm_id: key for vm_id, key in keys.items() if _in_two_places(host, vm_id)}
        host.open_seats.update(left_open)
        await asyncio.to_thread(_forget, host, [key for vm_id, key in keys.items() if vm_id not in left_open])


async def settle_seat(host: HostContext, vm_id: UUID) -> None:
    """Puts a VM whose move broke off where its metadata says; in the ledger, too. Idempotent.

    Raises `hypervisor.unavailable`, also while a call has not ended that may yet move the VM; it may then be called
    again.
    """
    refuse_lingering(host, vm_id)
    domain = await host.hypervisor.domain(vm_id)
    held = host.ledger.holding(vm_id)
    if domain is not None and domain.metadata is not None and held is not None:
        plan = _plan_of(held, domain.metadata)
        if plan is None:
            # Entered as it was found, partly here and partly there: its metadata alone counts.
            host.ledger.release(vm_id)
            host.ledger.adopt(replace(domain, pins=domain.metadata.pins))
            held = host.ledger.holding(vm_id)
            plan = held.plan if held is not None else None
        if plan is not None:
            await _seat(host, domain, domain.metadata, plan)
    if held is not None and held.pending:
        moved = domain is not None and domain.metadata is not None and domain.metadata.pins == held.plan.pins
        (host.ledger.commit if moved else host.ledger.revert)(vm_id)


class _Retune:
    def __init__(self, host: HostContext, steps: Steps) -> None:
        self._host = host
        self._steps = steps

    async def carry_out(self, moves: Sequence[RetuneMove]) -> None:
        left, done = list(moves), list[RetuneMove]()
        try:
            while left:
                leg = self._admitted(left)
                await self._fly(leg)
                done += leg
                left = left[len(leg) :]
        except SeatsLeftOpenError:
            raise
        except Exception as error:
            stayed = await self._take_back(done, error)
            raise _failed(error, stayed) from error

    def _admitted(self, moves: Sequence[RetuneMove]) -> list[RetuneMove]:
        """The longest leg the ledger takes: no VM twice, and room for all of them in both places."""
        ids = [move.vm_id for move in moves]
        leg = self._in_turn(moves[: next((n for n, vm_id in enumerate(ids) if vm_id in ids[:n]), len(ids))])
        while True:
            try:
                self._host.ledger.repin([Move(m.vm_id, m.after.pins, (m.after.cell,)) for m in leg])
            except PpecError:
                if len(leg) == 1:
                    raise
                leg = leg[: len(leg) // 2]
            else:
                return leg

    def _in_turn(self, moves: Sequence[RetuneMove]) -> list[RetuneMove]:
        """As far as no move goes where another of them has yet to leave. To the ledger they may trade places; made one
        after the other, both would be on the same cores for a while."""
        whole = self._host.ledger.pool().whole
        leaving = {cpu: n for n, move in enumerate(moves) for cpu in whole(p.pcpu for p in self._plan(move.vm_id).pins)}
        taken = (
            leaving[cpu]
            for n, move in enumerate(moves)
            for cpu in whole(pin.pcpu for pin in move.after.pins)
            if leaving.get(cpu, n) > n
        )
        return list(moves[: min(taken, default=len(moves))])

    async def _fly(self, leg: Sequence[RetuneMove]) -> None:
        """All of the leg's moves, or none: then raises what went wrong."""
        begun: list[RetuneMove] = []
        try:
            for move in leg:
                begun.append(move)
                await self._move(move.vm_id, move.name, self._plan(move.vm_id))
        except Exception as error:
            # A bug of ours as well: the leg's VMs must not hold two places for ever.
            await self._undo(leg, begun, error)
            raise
        self._host.ledger.commit(*(move.vm_id for move in leg))

    async def _undo(self, leg: Sequence[RetuneMove], begun: list[RetuneMove], error: Exception) -> None:
        for position, move in reversed(list(enumerate(begun))):
            try:
                await self._move(move.vm_id, move.name, self._before(move.vm_id))
            except Exception as again:
                _log_not_taken_back(move, again)
                # Their cores may be where those before them came from: these stay, and so does what they hold.
                open_ids = {other.vm_id for other in begun[: position + 1]}
                self._host.ledger.revert(*(m.vm_id for m in leg if m.vm_id not in open_ids))
                raise SeatsLeftOpenError(_failed(error, [m.name for m in begun])) from again
        self._host.ledger.revert(*(move.vm_id for move in leg))

    async def _take_back(self, done: list[RetuneMove], failed: Exception) -> tuple[str, ...]:
        """Legs that stood already, as far as nobody has taken their places since; the names of VMs that stay moved."""
        for position, move in reversed(list(enumerate(done))):
            try:
                self._host.ledger.repin([Move(move.vm_id, move.before.pins, (move.before.cell,))])
                await self._fly([_turned(move)])
            except Exception as error:
                _log_not_taken_back(move, error)
                stayed = tuple(other.name for other in done[: position + 1])
                if isinstance(error, SeatsLeftOpenError):
                    raise SeatsLeftOpenError(_failed(failed, stayed)) from error
                return stayed
        return ()

    async def _move(self, vm_id: UUID, name: str, plan: NumaPlan) -> None:
        host = self._host
        # A move that missed its deadline may take effect after the one that takes it back.
        refuse_lingering(host, vm_id)
        domain = await host.hypervisor.domain(vm_id)
        if domain is None or domain.metadata is None:
            raise PpecError("vm.not_found", f"vm {name} is gone", subject=f"vm {name}")
        metadata = replace(domain.metadata, pins=plan.pins, cells=plan.cells)
        moving = Steps(vm_id, name, self._steps.accepted_s, listeners=self._steps.listeners)
        with moving.stage(Stage.RESEAT):
            await _seat(host, domain, metadata, plan)
        spent_ms = self._steps.stage_ms
        spent_ms[Stage.RESEAT] = spent_ms.get(Stage.RESEAT, 0) + moving.stage_ms[Stage.RESEAT]

    def _plan(self, vm_id: UUID) -> NumaPlan:
        return self._held(vm_id).plan

    def _before(self, vm_id: UUID) -> NumaPlan:
        before = self._held(vm_id).before
        assert before is not None, "a move under way has a place to go back to"
        return before.plan

    def _held(self, vm_id: UUID) -> Holding:
        held = self._host.ledger.holding(vm_id)
        if held is None:
            raise PpecError("vm.not_found", f"vm {vm_id} holds nothing any more", subject=f"vm {vm_id}")
        return held


async def _seat(host: HostContext, domain: Domain, metadata: DomainMetadata, plan: NumaPlan) -> None:
    """The running domain, its metadata, its definition: in this order. A stopped domain is only defined anew."""
    refuse_foreign(domain)
    if domain.state not in _OFF:
        try:
            await host.hypervisor.reseat(domain.vm_id, Seat(plan.pins, plan.cells, plan.emulator_cpus))
            await host.hypervisor.annotate(metadata)
        except PpecError as error:
            # Off meanwhile: its next start is all there is to move.
            now = await host.hypervisor.domain(domain.vm_id) if error.code == "vm.wrong_state" else None
            if now is None or now.state not in _OFF:
                raise
    definition = DomainDefinition(
        metadata=metadata, emulator_cpus=plan.emulator_cpus, threads_per_core=plan.threads_per_core
    )
    await host.hypervisor.redefine(definition)


def _plan_of(held: Holding, metadata: DomainMetadata) -> NumaPlan | None:
    """Which of the places it holds the metadata means."""
    places = [held.plan] if held.before is None else [held.plan, held.before.plan]
    whole = held.before is not None or held.cpus == frozenset(held.plan.cpus)
    return next((plan for plan in places if whole and plan.pins == metadata.pins), None)


def _left_to_do(host: HostContext, moves: Sequence[RetuneMove]) -> list[RetuneMove]:
    """The moves that an earlier call has not made. Raises `retune.outdated`."""
    left: list[RetuneMove] = []
    for vm_id in dict.fromkeys(move.vm_id for move in moves):
        chain = [move for move in moves if move.vm_id == vm_id]
        held = host.ledger.holding(vm_id)
        if held is None or tenant_of(held, host.ledger.pool()) is None:
            raise _outdated(chain[0], "it is gone, or can't be moved")
        now = seat_of(held)
        ends = [chain[0].before, *(move.after for move in chain)]
        made = next((n for n in range(len(chain), -1, -1) if _same(ends[n], now)), None)
        if made is None:
            raise _outdated(chain[0], f"it is in cell {now.cell} on other CPUs than the plan says")
        left += chain[made:]
    return [move for move in moves if any(move is other for other in left)]


async def _refuse_waiting(host: HostContext, moves: Sequence[RetuneMove]) -> None:
    for move in moves:
        domain = await host.hypervisor.domain(move.vm_id)
        # One that is off shows nothing of a resize that is still to be taken back: with its old definition.
        waits = move.vm_id in host.unfit
        if waits or domain is None or domain.metadata is None or domain.metadata.pending:
            raise _outdated(move, "it is gone, or waits for its next start to get another size")


def _same(one: RetuneSeat, other: RetuneSeat) -> bool:
    return one.cell == other.cell and one.pins == other.pins


def _turned(move: RetuneMove) -> RetuneMove:
    """The move back."""
    return move.model_copy(update={"before": move.after, "after": move.before})


def _in_two_places(host: HostContext, vm_id: UUID) -> bool:
    held = host.ledger.holding(vm_id)
    return held is not None and held.pending


def _log_not_taken_back(move: RetuneMove, error: Exception) -> None:
    # The hypervisor's refusals need no trace; a fault of ours does.
    trace = None if isinstance(error, PpecError) else error
    log.error("retune_not_taken_back", vm=move.name, why=str(error), exc_info=trace)


def _forget(host: HostContext, keys: Sequence[Key]) -> None:
    for key in keys:
        host.journal.append_abandoned(key)


def _outdated(move: RetuneMove, why: str) -> PpecError:
    return PpecError(
        "retune.outdated",
        f"vm {move.name} can't be moved as planned: {why}",
        hint="Plan the retune again.",
        subject=f"vm {move.name}",
        details={"vm_id": str(move.vm_id), "before": move.before.cell, "after": move.after.cell},
    )


def _failed(error: Exception, stayed: Sequence[str]) -> PpecError:
    done = f"; these VMs stay where they were moved: {', '.join(stayed)}" if stayed else "; it was taken back"
    if isinstance(error, PpecError):
        ours = error
    else:
        log.error("retune_broke", exc_info=error)
        ours = PpecError("internal.error", "an error of the agent's; its log has the details")
    return PpecError(
        "retune.failed",
        f"the retune broke off: {ours.message}{done}",
        hint=ours.hint or "Plan the retune again.",
        subject="retune",
        details={"code": ours.code, "stayed": list(stayed)},
    )
