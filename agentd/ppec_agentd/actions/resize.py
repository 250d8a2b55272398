# SPDX-License-Identifier: Apache-2.0
"""Resize: ask the ledger, say so in the running domain, change its definition, then plug what can be plugged.

The order is what a crash at any point is safe by. At every moment

    ledger ≥ metadata of what runs ≥ the larger of what runs and what the next start will have.

Growing, the left is changed before the right: ledger, metadata, definition, the running VM. What is given back goes the
other way round, when it is really gone (`fit`). So the metadata found after a crash holds enough, whatever had been
reached, and `fit` brings it down to what is needed.

What waits for the next start is held from now on: a refusal comes now, and not when the VM has been shut down. The
price is that growth somebody asked for and doesn't start yet keeps others out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from uuid import UUID

import structlog

from ppec_agentd.actions.context import HostContext, Outcome, Steps, as_it_is, refuse_foreign, vm_not_found
from ppec_agentd.actions.delete import refuse_lingering
from ppec_agentd.hypervisor import Domain, DomainDefinition, DomainMetadata
from ppec_agentd.ledger import Ledger
from ppec_agentd.numa import NumaPlan, PinRequest, replan
from ppec_agentd.numa.guest_topology import threads_shown
from ppec_agentd.numa.shares import even_shares
from ppec_agentd.observed import vm_info
from ppec_agentd.undo import UndoStack
from ppec_contract.agent import Effect, Resized, Stage, VmSize
from ppec_contract.errors import PpecError
from ppec_contract.vm import CpuPolicy, SmtPolicy, VmState, whole_huge_pages

log = structlog.get_logger(__name__)
_ACTIVE = (VmState.RUNNING, VmState.PAUSED)


@dataclass(frozen=True, slots=True)
class _Resize:
    """One VM's resize: the domain as it was, what it is granted meanwhile, and what its next start is to make of it."""

    domain: Domain
    granted: DomainMetadata
    wanted: DomainDefinition
    before: DomainDefinition
    timeout_s: float

    @property
    def vm_id(self) -> UUID:
        return self.domain.vm_id


async def resize(host: HostContext, size: VmSize, timeout_s: float, steps: Steps) -> Outcome:
    """Gives the VM this size, and says what of it waits for the next start.

    Raises `vm.not_found`, `vm.wrong_state`, `request.invalid`, `vm.exceeds_socket`, `host.no_capacity`; then nothing
    has changed. What the hypervisor raises comes after everything was taken back that can be; if all was, `steps.left`
    says to what.
    """
    refuse_lingering(host, size.vm_id)
    domain = await _found(host, size.vm_id, steps)
    held = _metadata(domain)
    if _is(domain, size) and not held.pending:
        return Outcome(False, vm_info(domain), domain.name, _effects(domain, domain, size))
    with steps.stage(Stage.ADMITTED):
        plan = _ask_ledger(host.ledger, held, size)
    change = _planned(host, domain, plan, size, timeout_s)
    undo = UndoStack()
    undo.push("resize", lambda: _take_back(host, change))
    # Until it has gone through or was taken back: if neither can be now, housekeeping does it.
    host.unfit[size.vm_id] = change.before
    try:
        await _apply(host, change, steps)
        host.unfit[size.vm_id] = None
        now = await fit(host, size.vm_id)
    except BaseException:
        if not await undo.run():
            steps.left = await as_it_is(host, size.vm_id)
        raise
    if now is None:
        raise vm_not_found(size.vm_id)
    return Outcome(vm_info(now) != vm_info(domain), vm_info(now), now.name, _effects(domain, now, size))


async def fit(host: HostContext, vm_id: UUID) -> Domain | None:
    """Has metadata and ledger hold what the VM runs with and will start with, and no more; returns the domain.

    To be called under the VM's lock. Idempotent. Raises `hypervisor.unavailable`, also while a call has not ended that
    may yet change the VM.
    """
    refuse_lingering(host, vm_id)
    domain = await host.hypervisor.domain(vm_id)
    if domain is None or domain.metadata is None:
        host.unfit.pop(vm_id, None)
        return domain
    try:
        domain = await _fit_metadata(host, domain)
    except PpecError as error:
        if error.code != "vm.wrong_state":
            raise
        # It was shut down meanwhile: its definition is now all there is of it.
        domain = await _fit_metadata(host, await host.hypervisor.domain(vm_id) or domain)
    hold(host.ledger, _metadata(domain))
    if _metadata(domain).pending:
        host.unfit.setdefault(vm_id, None)
    else:
        host.unfit.pop(vm_id, None)
    return domain


def hold(ledger: Ledger, metadata: DomainMetadata) -> None:
    """Has the ledger hold what the metadata says. Raises `host.no_capacity` if that is more than it does.

    It is more only where somebody changed a definition behind the agent's back: called before each start.
    """
    vm_id, wanted = metadata.vm_id, (metadata.vcpus, metadata.memory_mib)
    held = ledger.holding(vm_id)
    if held is None or held.foreign:
        return
    now = (held.vcpus, held.memory_mib)
    if held.before is not None:
        then = (held.before.vcpus, held.before.memory_mib)
        if then == now:
            # A move, and no resize: somebody else's to settle.
            return
        if then == wanted:
            ledger.revert(vm_id)
            return
        # The larger of both, so that what is left to do is giving back.
        ledger.commit(vm_id)
    if now != wanted:
        ledger.resize(vm_id, *wanted)
        ledger.commit(vm_id)


async def settle_resize(host: HostContext, vm_id: UUID) -> None:
    """What a resize left to do, if anything: its undo, or giving back what the VM has no more. Raises as `fit` does."""
    before = host.unfit.get(vm_id)
    if before is not None:
        refuse_lingering(host, vm_id)
        domain = await host.hypervisor.domain(vm_id)
        if domain is not None and domain.managed:
            await _go_back(host, domain, before)
        host.unfit[vm_id] = None
    if vm_id in host.unfit:
        await fit(host, vm_id)


# --- before anything changes ------------------------------------------------------------------------------------


async def _found(host: HostContext, vm_id: UUID, steps: Steps) -> Domain:
    domain = await host.hypervisor.domain(vm_id)
    if domain is None:
        raise vm_not_found(vm_id)
    refuse_foreign(domain)
    steps.name = domain.name
    if vm_id in host.unfit:
        await settle_resize(host, vm_id)
        domain = await host.hypervisor.domain(vm_id) or domain
    if domain.state not in (VmState.RUNNING, VmState.STOPPED, VmState.CRASHED):
        raise PpecError(
            "vm.wrong_state",
            f"vm {domain.name} is {domain.state.value}; to be resized it runs or is off",
            hint="Resume it, or stop it, and resize it then.",
            subject=f"vm {domain.name}",
            details={"state": domain.state.value},
        )
    host.ledger.adopt(domain)
    return domain


def _ask_ledger(ledger: Ledger, held: DomainMetadata, size: VmSize) -> NumaPlan:
    """The larger of what it has and what it is to have, for both may be there for a while."""
    try:
        whole_huge_pages(size.memory_mib, held.numa)
    except ValueError as error:
        raise PpecError("request.invalid", f"vm {held.name}: {error}", subject=f"vm {held.name}") from error
    vcpus, memory_mib = max(held.vcpus, size.vcpus), max(held.memory_mib, size.memory_mib)
    plan = ledger.resize(size.vm_id, vcpus, memory_mib)
    if (vcpus, memory_mib) == (held.vcpus, held.memory_mib):
        # It only gives back, and holds what it has until that is gone.
        ledger.commit(size.vm_id)
    return plan


def _planned(host: HostContext, domain: Domain, plan: NumaPlan, size: VmSize, timeout_s: float) -> _Resize:
    held = _metadata(domain)
    later = domain.next or replace(held, pending=False)
    granted = replace(
        held,
        vcpus=max(held.vcpus, size.vcpus),
        memory_mib=max(held.memory_mib, size.memory_mib),
        pins=plan.pins,
        guest_cells=plan.guest_cells,
        pending=True,
    )
    own = _smaller_plan(host, plan, granted, size)
    wanted = replace(
        later,
        vcpus=size.vcpus,
        memory_mib=size.memory_mib,
        pins=own.pins,
        guest_cells=own.guest_cells,
        max_vcpus=max(later.max_vcpus, size.vcpus) if later.max_vcpus else 0,
        max_memory_mib=max(later.max_memory_mib, size.memory_mib) if later.max_memory_mib else 0,
    )
    return _Resize(domain, granted, _defined(host, wanted, plan), _defined(host, later, plan), timeout_s)


def _smaller_plan(host: HostContext, plan: NumaPlan, granted: DomainMetadata, size: VmSize) -> NumaPlan:
    """What of the plan a VM of this size has: the ledger says the same when it is asked to give the rest back."""
    if (size.vcpus, size.memory_mib) == (granted.vcpus, granted.memory_mib):
        return plan
    request = PinRequest(size.vcpus, plan.cells, f"vm {granted.name}", granted.numa, granted.max_vcpus)
    own = plan if plan.shared_cpus else replan(host.ledger.pool(), plan, request)
    unit = max(1, granted.numa.huge_page_kib // 1024)
    shares = even_shares(size.memory_mib, {cell.cell: cell.memory_mib for cell in plan.guest_cells}, unit)
    return replace(own, guest_cells=tuple(replace(cell, memory_mib=shares[cell.cell]) for cell in own.guest_cells))


def _defined(host: HostContext, metadata: DomainMetadata, plan: NumaPlan) -> DomainDefinition:
    most = max(metadata.vcpus, metadata.max_vcpus)
    alone = metadata.numa.smt is SmtPolicy.ISOLATE or metadata.numa.cpus is CpuPolicy.SHARED
    return DomainDefinition(
        metadata,
        emulator_cpus=plan.emulator_cpus,
        threads_per_core=1 if alone else threads_shown(host.facts.topology, metadata.pins, most, metadata.guest_cells),
        shared_cpus=plan.shared_cpus,
    )


# --- changing ---------------------------------------------------------------------------------------------------


async def _apply(host: HostContext, change: _Resize, steps: Steps) -> None:
    running = change.domain.state is VmState.RUNNING
    with steps.stage(Stage.RESIZE):
        if running:
            await host.hypervisor.annotate(change.granted)
        await host.hypervisor.redefine(change.wanted)
        if running:
            await _plug(host, change)


async def _plug(host: HostContext, change: _Resize) -> None:
    domain, wanted = change.domain, change.wanted.metadata
    if wanted.vcpus != domain.vcpus:
        await host.hypervisor.set_vcpus(change.vm_id, wanted.vcpus, change.granted.pins, change.timeout_s)
    if wanted.memory_mib > domain.memory_mib:
        cells = tuple(cell.memory_mib for cell in wanted.guest_cells) or (wanted.memory_mib,)
        if not await host.hypervisor.grow_memory(change.vm_id, cells):
            log.info("memory_waits_for_next_start", vm=domain.name, memory_mib=wanted.memory_mib)


async def _take_back(host: HostContext, change: _Resize) -> None:
    """The definition as it was, and the vCPUs as far as the guest lets go. A DIMM stays until the next start."""
    refuse_lingering(host, change.vm_id)
    domain = await host.hypervisor.domain(change.vm_id)
    if domain is not None and domain.managed:
        await _go_back(host, domain, change.before)
        then = change.domain
        if domain.state in _ACTIVE and then.state in _ACTIVE and domain.vcpus != then.vcpus:
            await host.hypervisor.set_vcpus(change.vm_id, then.vcpus, change.granted.pins, change.timeout_s)
    host.unfit[change.vm_id] = None
    await fit(host, change.vm_id)


async def _go_back(host: HostContext, domain: Domain, before: DomainDefinition) -> None:
    """The definition as it was. A VM that was started from the other one keeps that size until its next start: from now
    on its metadata says so, and holds the larger of both."""
    ours, then = _metadata(domain), before.metadata
    if domain.state not in _ACTIVE and ours == then:
        return
    if domain.state in _ACTIVE and ours != then and not ours.pending:
        larger = replace(
            ours,
            vcpus=max(ours.vcpus, then.vcpus),
            memory_mib=max(ours.memory_mib, then.memory_mib),
            pins=max(ours.pins, then.pins, key=len),
            guest_cells=(ours if ours.memory_mib >= then.memory_mib else then).guest_cells,
            pending=True,
        )
        try:
            await host.hypervisor.annotate(larger)
        except PpecError as error:
            # Off meanwhile: its definition is all there is of it.
            if error.code != "vm.wrong_state":
                raise
    await host.hypervisor.redefine(before)


async def _fit_metadata(host: HostContext, domain: Domain) -> Domain:
    ours = _metadata(domain)
    if not ours.pending:
        return domain
    later = domain.next or replace(ours, pending=False)
    vcpus, memory_mib = max(domain.vcpus, later.vcpus), max(domain.memory_mib, later.memory_mib)
    # A guest lets go of one after the other, and a VM holds an even number: the last of two gives back both.
    vcpus = min(ours.vcpus, vcpus + vcpus % 2)
    fitting = replace(
        later,
        vcpus=vcpus,
        memory_mib=memory_mib,
        pins=tuple(pin for pin in ours.pins if pin.vcpu < vcpus),
        guest_cells=later.guest_cells if memory_mib == later.memory_mib else ours.guest_cells,
        pending=(domain.vcpus, domain.memory_mib) != (later.vcpus, later.memory_mib),
    )
    if fitting != ours:
        await host.hypervisor.annotate(fitting)
    return replace(domain, metadata=fitting, next=later if fitting.pending else None)


# --- telling ----------------------------------------------------------------------------------------------------


def _metadata(domain: Domain) -> DomainMetadata:
    if domain.metadata is None:
        raise TypeError(f"{domain.name} was not made by PPEC")
    return domain.metadata


def _is(domain: Domain, size: VmSize) -> bool:
    return (domain.vcpus, domain.memory_mib) == (size.vcpus, size.memory_mib)


def _effects(before: Domain, now: Domain, size: VmSize) -> Resized:
    later = before.next or before
    return Resized(
        vcpus=_effect((before.vcpus, later.vcpus), now.vcpus, size.vcpus),
        memory_mib=_effect((before.memory_mib, later.memory_mib), now.memory_mib, size.memory_mib),
    )


def _effect(before: tuple[int, int], now: int, wanted: int) -> Effect:
    """`before` is what it had, and what its next start would have made of it."""
    if before == (wanted, wanted):
        return Effect.UNCHANGED
    return Effect.NOW if now == wanted else Effect.NEXT_START
