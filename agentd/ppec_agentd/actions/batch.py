# SPDX-License-Identifier: Apache-2.0
"""Runs one changing call: every VM on its own, each with its own result, each in the journal before and after.

A call that is repeated while the first is still at work joins it: per (operation, action, VM) there is one *flight*.
Flights on the same VM wait for one another. Nobody's leaving cancels a flight.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from uuid import UUID

import structlog

from ppec_agentd.actions.context import Emit, HostContext, Steps
from ppec_agentd.actions.create import LEFT_BEHIND, came_back, undo_create
from ppec_agentd.actions.items import Item, items_of
from ppec_agentd.actions.resize import settle_resize
from ppec_agentd.actions.retune import results_by_vm, settle_seat, without_the_host
from ppec_agentd.hypervisor import Domain
from ppec_agentd.journal import Action, Key
from ppec_contract.agent import RetuneHost, Stage, VmResult, VmsReply, WriteCall
from ppec_contract.errors import PpecError

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Flight:
    """Work on one VM under way: `task` never raises; `fence` is the highest of those who asked for it."""

    key: Key
    fence: int
    steps: Steps
    task: asyncio.Task[VmResult] = field(init=False)


@dataclass(frozen=True, slots=True)
class _Batch:
    """What the VMs of one call share; `intents` ends when the journal holds them all."""

    operation_id: str
    fence: int
    action: Action
    intents: asyncio.Future[None]


class Actions:
    """The changing half of the agent. `on_change` is called after every VM that ended."""

    def __init__(self, host: HostContext, on_change: Callable[[], None] = lambda: None) -> None:
        self._host = host
        self._on_change = on_change
        self._flights: dict[Key, Flight] = {}
        # Creates that could not be undone whole, by VM: see `settle`.
        self._unsettled: dict[UUID, Key] = {}
        self._journal_turn = asyncio.Lock()

    async def run(self, request: WriteCall, emit: Emit) -> VmsReply:
        """All VMs' results, in the order of the request; `emit` gets progress and results as they come.

        Raises `operation.fenced` and `request.invalid` for the whole call; what befalls one VM is in its result.
        """
        if isinstance(request, RetuneHost):
            emit = without_the_host(emit)
        action, items = items_of(self._host, request)
        journal, fence = self._host.journal, request.fence
        journal.refuse_lower(request.operation_id, fence)
        batch = _Batch(request.operation_id, fence, action, asyncio.get_running_loop().create_future())
        fresh: list[tuple[Key, str]] = []
        waiting = [self._result_of(item, batch, emit, fresh) for item in items]
        try:
            # In turn: a newer owner's fence must not overtake the intents of the work it has just joined.
            async with self._journal_turn:
                await asyncio.to_thread(journal.append_intents, request.operation_id, fence, fresh)
            batch.intents.set_result(None)
        except PpecError as error:
            batch.intents.set_exception(error)
            batch.intents.exception()  # retrieved here as well: with only replays nobody else may look
        finally:
            if not batch.intents.done():
                batch.intents.cancel()
        results = tuple(await asyncio.gather(*waiting))
        if isinstance(request, RetuneHost):
            results = await results_by_vm(self._host, request, results[0])
        return VmsReply(results=results)

    @property
    def host(self) -> HostContext:
        return self._host

    def in_flight(self) -> frozenset[Key]:
        return frozenset(self._flights)

    async def settle(self) -> None:
        """Undoes what could not be undone before, and domains that turned up after their create had been undone; gives
        back what VMs no longer need that were resized; puts VMs in place whose move broke off.

        To be called when domains came or the hypervisor is back, and now and then. Raises `hypervisor.unavailable`.
        """
        for vm_id in list(self._unsettled):
            await self._settle_one("still_left_behind", vm_id, self._settle)
        for vm_id in list(self._host.unfit):
            await self._settle_one("still_unfit", vm_id, partial(settle_resize, self._host))
        for vm_id in list(self._host.open_seats):
            await self._settle_one("seat_still_open", vm_id, self._close_seat)
        if self._host.journal.undone_creates():
            for domain in await self._host.hypervisor.domains():
                await self._undo_late(domain)
        # Those that came back since they were deleted are in the ledger, which follows what is there.
        for vm_id in self._host.journal.deleted(self._host.ledger.held_ids()):
            await self._undo_late(await self._host.hypervisor.domain(vm_id))

    async def _settle_one(self, left: str, vm_id: UUID, settle: Callable[[UUID], Awaitable[object]]) -> None:
        """What one VM can't have done now, whatever the reason, keeps no other waiting, and is tried again."""
        async with self._host.lock_of(vm_id):
            try:
                await settle(vm_id)
            except PpecError as error:
                log.warning(left, vm_id=str(vm_id), code=error.code, why=error.message)
            except Exception:
                log.exception(left, vm_id=str(vm_id))

    async def _close_seat(self, vm_id: UUID) -> None:
        # Looked at again: while this waited for its turn it may have been deleted.
        if vm_id in self._host.open_seats:
            await settle_seat(self._host, vm_id)
            key = self._host.open_seats.pop(vm_id)
            await asyncio.to_thread(self._host.journal.append_abandoned, key)

    async def drain(self, timeout_s: float) -> int:
        """Waits for the work under way; returns how many VMs were left (recovery finishes or undoes those)."""
        tasks = [flight.task for flight in self._flights.values()]
        if not tasks:
            return 0
        _, pending = await asyncio.wait(tasks, timeout=timeout_s)
        return len(pending)

    # --- one VM -------------------------------------------------------------------------------------------------

    def _result_of(self, item: Item, batch: _Batch, emit: Emit, fresh: list[tuple[Key, str]]) -> Awaitable[VmResult]:
        """From the journal, from the flight under way, or from a new flight, which is then added to `fresh`."""
        key = Key(batch.operation_id, batch.action, str(item.vm_id))
        flight = self._flights.get(key)
        if flight is None:
            try:
                recorded = self._host.journal.recorded(key, batch.fence)
            except PpecError as refusal:
                recorded = _failed(item.vm_id, item.name, refusal)
            if recorded is not None:
                return _told(recorded, emit)
            flight = self._flights[key] = Flight(key, batch.fence, Steps(item.vm_id, item.name))
            flight.task = asyncio.create_task(self._fly(flight, item, batch), name=f"{batch.action} {item.vm_id}")
            fresh.append((key, item.name))
        flight.fence = max(flight.fence, batch.fence)
        flight.steps.listeners.append(emit)
        return _wait_and_tell(flight.task, emit)

    async def _fly(self, flight: Flight, item: Item, batch: _Batch) -> VmResult:
        key, steps = flight.key, flight.steps
        try:
            await batch.intents
            async with self._host.lock_of(item.vm_id):
                # Meanwhile a newer owner, or a delete, may have gone first.
                self._host.journal.recorded(key, flight.fence)
                if await self._settle(item.vm_id) == key:
                    # Its own intent went with the undo of the try before.
                    intent = [(key, item.name)]
                    await asyncio.to_thread(self._host.journal.append_intents, key.operation_id, flight.fence, intent)
                result = await self._act(item, steps)
                if result.problem is not None and LEFT_BEHIND in result.problem.details:
                    await self._leave_behind(key)
                else:
                    await self._keep(key, flight.fence, result)
                return result
        except PpecError as refusal:
            # The undo of the try before is still due if that is what kept this one from beginning.
            if self._unsettled.get(item.vm_id) != key:
                await asyncio.to_thread(self._host.journal.append_abandoned, key)
            return _failed(item.vm_id, item.name, refusal)
        finally:
            self._flights.pop(key, None)
            self._on_change()

    async def _leave_behind(self, key: Key) -> None:
        self._unsettled[UUID(key.vm_id)] = key
        try:
            await asyncio.to_thread(self._host.journal.append_undo_due, key)
        except PpecError as error:
            log.error("undo_not_recorded", vm_id=key.vm_id, operation=key.operation_id, why=error.message)

    async def _settle(self, vm_id: UUID) -> Key | None:
        """Finishes the VM's undo, if one is due, and returns whose it was."""
        key = self._unsettled.get(vm_id)
        if key is not None:
            await undo_create(self._host, vm_id, key.operation_id)
            del self._unsettled[vm_id]
            await asyncio.to_thread(partial(self._host.journal.append_abandoned, key, undone=True))
            self._on_change()
        return key

    async def _undo_late(self, seen: Domain | None) -> None:
        if seen is None or not await self._came_late(seen):
            return
        vm_id = seen.vm_id
        async with self._host.lock_of(vm_id):
            domain = await self._host.hypervisor.domain(vm_id)
            # Looked at again: while this waited for its turn a create may have begun anew and made the VM.
            if domain is None or domain.metadata is None or not await self._came_late(domain):
                return
            operation_id = domain.metadata.operation_id
            try:
                await undo_create(self._host, vm_id, operation_id)
                log.warning("late_domain_undone", vm=domain.name, vm_id=str(vm_id), operation=operation_id)
            except PpecError as error:
                log.warning("late_domain_left", vm=domain.name, vm_id=str(vm_id), code=error.code, why=error.message)
        self._on_change()

    async def _came_late(self, domain: Domain) -> bool:
        ours, undone = domain.metadata, self._host.journal.undone_creates()
        # Not one whose create is at work again, or was and could not be recorded: that may have made it.
        if ours is not None and Key(ours.operation_id, "CreateVms", str(domain.vm_id)) in undone:
            return True
        return await came_back(self._host, domain)

    async def _act(self, item: Item, steps: Steps) -> VmResult:
        try:
            outcome = await item.act(steps)
        except PpecError as error:
            log.warning("vm_action_failed", vm=steps.name, vm_id=str(item.vm_id), code=error.code, why=error.message)
            told: dict[str, object] = {"stage_ms": steps.stage_ms}
            if steps.left is not None:
                told |= {"vm": steps.left, "observed_at": self._host.moments.observed()}
            return _failed(item.vm_id, steps.name, error).model_copy(update=told)
        except Exception:
            log.exception("vm_action_broke", vm=steps.name, vm_id=str(item.vm_id))
            broke = PpecError(
                "internal.error", f"vm {steps.name or item.vm_id}: an error of the agent's; its log has the details"
            )
            return _failed(item.vm_id, steps.name, broke).model_copy(update={"stage_ms": steps.stage_ms})
        return VmResult(
            vm_id=item.vm_id,
            name=outcome.name or item.name,
            changed=outcome.changed,
            vm=outcome.vm,
            stage_ms=steps.stage_ms,
            resized=outcome.resized,
            observed_at=self._host.moments.observed(),
        )

    async def _keep(self, key: Key, fence: int, result: VmResult) -> None:
        # From there on a failing pool may have kept a folder, and later the hypervisor may have heard of the domain,
        # even if it has shown none yet.
        undone = result.problem is not None and Stage.IMAGE in result.stage_ms
        try:
            await asyncio.to_thread(partial(self._host.journal.append_answer, key, fence, result, undone=undone))
        except PpecError as error:
            # It is done all the same; a repeated call finds the domain, and recovery does.
            log.error("answer_not_recorded", vm_id=key.vm_id, operation=key.operation_id, why=error.message)


def _failed(vm_id: UUID, name: str, error: PpecError) -> VmResult:
    return VmResult(vm_id=vm_id, name=name, changed=False, problem=error.problem())


async def _told(result: VmResult, emit: Emit) -> VmResult:
    emit(VmsReply(results=(result,)))
    return result


async def _wait_and_tell(task: asyncio.Task[VmResult], emit: Emit) -> VmResult:
    # Shielded: the flight belongs to the journal, not to whoever asked first.
    return await _told(await asyncio.shield(task), emit)
