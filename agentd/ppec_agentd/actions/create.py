# SPDX-License-Identifier: Apache-2.0
"""Create: admit, prepare disk and seed side by side, define, start, commit; or take everything back."""

from __future__ import annotations

import asyncio
from uuid import UUID

from ppec_agentd.actions.context import HostContext, Outcome, Steps
from ppec_agentd.actions.delete import erase_domain, refuse_lingering
from ppec_agentd.disks import VmFolder
from ppec_agentd.files import os_errors, write_whole
from ppec_agentd.hypervisor import BridgeNic, Disk, Domain, DomainDefinition, DomainMetadata
from ppec_agentd.journal import Key
from ppec_agentd.ledger import Claim
from ppec_agentd.numa import NumaPlan
from ppec_agentd.observed import started_info, vm_info
from ppec_agentd.seed import seed_iso
from ppec_agentd.undo import UndoStack
from ppec_contract.agent import Stage
from ppec_contract.errors import PpecError
from ppec_contract.vm import VmSpec, VmState

# In a problem's details: the undos still to be done.
LEFT_BEHIND = "left_behind"


async def create(host: HostContext, vm: VmSpec, operation_id: str, steps: Steps) -> Outcome:
    """Makes the VM and starts it.

    What came late of an earlier try that was undone is taken back first. Raises `hypervisor.unavailable` while an
    earlier call about the VM has not ended, and what went wrong after everything done so far was undone;
    `details["left_behind"]` names the undos that failed: `undo_create` does them later.
    """
    refuse_lingering(host, vm.vm_id)
    present = await host.hypervisor.domain(vm.vm_id)
    if present is not None and present.metadata is not None and await came_late(host, present):
        # Not always of this operation.
        await undo_create(host, vm.vm_id, present.metadata.operation_id)
        present = await host.hypervisor.domain(vm.vm_id)
    if present is not None:
        return _present(present, vm, operation_id)
    with steps.stage(Stage.ADMITTED):
        await host.refuse_missing_bridges(vm)
        disk_folder = await host.disk_folder(vm)
        plan = host.ledger.reserve(_claim(vm))
    undo = UndoStack()
    undo.push("release", lambda: _release(host, vm.vm_id))
    try:
        drives = await _hand_over_drives(host, vm)
        definition = _definition(vm, operation_id, plan, drives, host.folder(vm.vm_id), disk_folder)
        await _prepare(host, vm, steps, undo, disk_folder)
        undo.push("undefine", lambda: erase_domain(host, vm.vm_id, operation_id))
        with steps.stage(Stage.DEFINE):
            await host.hypervisor.define(definition)
        async with host.starts:
            with steps.stage(Stage.START):
                await host.hypervisor.start(vm.vm_id)
        host.ledger.commit(vm.vm_id)
    except BaseException as error:
        failed = await undo.run()
        if failed:
            raise _left_behind(vm, failed) from error
        raise
    return Outcome(True, started_info(definition, host.facts.architecture), vm.name)


def _claim(vm: VmSpec) -> Claim:
    return Claim(
        vm_id=vm.vm_id,
        name=vm.name,
        vcpus=vm.vcpus,
        memory_mib=vm.memory_mib,
        disk_mib=vm.root_disk.size_mib,
        cells=vm.cells,
        policy=vm.numa,
        max_vcpus=vm.max_vcpus or 0,
        max_memory_mib=vm.max_memory_mib or 0,
        pool=vm.root_disk.pool or "",
        nvme_drives=vm.nvme_drives,
    )


def _present(domain: Domain, vm: VmSpec, operation_id: str) -> Outcome:
    """The VM is there although the journal knows no answer: ours from before a lost journal, or somebody else's."""
    ours = domain.metadata
    if ours is None or ours.operation_id != operation_id or ours.name != vm.name or domain.state != VmState.RUNNING:
        raise PpecError(
            "vm.exists",
            f"vm {vm.name}: id {vm.vm_id} belongs to {domain.name} on this host",
            hint="Delete that VM first, or ask for a new id.",
            subject=f"vm {vm.name}",
            details={"vm_id": str(vm.vm_id), "name": domain.name, "state": domain.state.value},
        )
    return Outcome(False, vm_info(domain), vm.name)


def _left_behind(vm: VmSpec, failed: tuple[str, ...]) -> PpecError:
    return PpecError(
        "vm.create_failed",
        f"vm {vm.name} could not be created, and not all of it could be undone yet",
        hint="The agent tries the undo again when its hypervisor answers; repeat the request then.",
        subject=f"vm {vm.name}",
        details={LEFT_BEHIND: list(failed)},
    )


async def undo_create(host: HostContext, vm_id: UUID, operation_id: str) -> None:
    """Takes back whatever an interrupted create left, from any point; idempotent. Raises what `erase_domain` does."""
    await erase_domain(host, vm_id, operation_id)
    present = await host.hypervisor.domain(vm_id)
    if present is None:
        await asyncio.to_thread(host.places.remove, vm_id)
        await _release(host, vm_id)


async def came_late(host: HostContext, domain: Domain) -> bool:
    """Whether the domain is there because the hypervisor finished a call late: one of a create that has been undone, or
    of a change to a VM that was deleted meanwhile."""
    ours = domain.metadata
    undone = ours is not None and host.journal.undone(Key(ours.operation_id, "CreateVms", str(domain.vm_id)))
    return undone or await came_back(host, domain)


async def came_back(host: HostContext, domain: Domain) -> bool:
    """Whether this is what a call that ended late makes of a deleted VM: a definition, off, and nothing else. One that
    runs, or has a folder anywhere, was brought back by somebody and is left alone."""
    if not domain.managed or domain.state is not VmState.STOPPED:
        return False
    if not host.journal.deleted((domain.vm_id,)):
        return False
    return not await asyncio.to_thread(host.places.hold, domain.vm_id)


async def _release(host: HostContext, vm_id: UUID) -> None:
    host.release(vm_id)


async def _hand_over_drives(host: HostContext, vm: VmSpec) -> tuple[str, ...]:
    """Those that the ledger has just granted. Raises `host.no_capacity`."""
    held = host.ledger.holding(vm.vm_id)
    drives = tuple(sorted(held.drives)) if held is not None else ()
    await host.drives.hand_over(f"vm {vm.name}", drives)
    return drives


async def _prepare(host: HostContext, vm: VmSpec, steps: Steps, undo: UndoStack, disk_folder: VmFolder) -> None:
    """Image, then overlay on it; the seed meanwhile. Returns or raises only when both have ended."""
    folder = host.folder(vm.vm_id)
    undo.push("remove_folder", lambda: asyncio.to_thread(host.places.remove, vm.vm_id))
    for needed in dict.fromkeys((folder, disk_folder)):
        await asyncio.to_thread(needed.make)
    done = await asyncio.gather(
        _disk(host, vm, steps, disk_folder), _seed(host, vm, steps, folder), return_exceptions=True
    )
    for problem in done:
        if problem is not None:
            raise problem


async def _disk(host: HostContext, vm: VmSpec, steps: Steps, folder: VmFolder) -> None:
    # Until the disk is there nothing but this says that the image is needed.
    with host.images.held(vm.root_disk.image.sha256):
        with steps.stage(Stage.IMAGE):
            image = await host.images.ensure(vm.root_disk.image)
        async with host.preparations:
            with steps.stage(Stage.DISK):
                await host.disks.make_overlay(folder.root_disk, image, vm.root_disk.size_mib)


async def _seed(host: HostContext, vm: VmSpec, steps: Steps, folder: VmFolder) -> None:
    async with host.preparations:
        with steps.stage(Stage.SEED), os_errors(f"vm {vm.name}: the seed can't be written", f"vm {vm.name}"):
            await asyncio.to_thread(lambda: write_whole(folder.seed, seed_iso(vm)))


def _definition(
    vm: VmSpec,
    operation_id: str,
    plan: NumaPlan,
    drives: tuple[str, ...],
    folder: VmFolder,
    disk_folder: VmFolder,
) -> DomainDefinition:
    return DomainDefinition(
        metadata=DomainMetadata(
            vm_id=vm.vm_id,
            name=vm.name,
            operation_id=operation_id,
            cells=plan.cells,
            vcpus=vm.vcpus,
            memory_mib=vm.memory_mib,
            disk_mib=vm.root_disk.size_mib,
            image_sha256=vm.root_disk.image.sha256,
            pins=plan.pins,
            numa=vm.numa,
            max_vcpus=vm.max_vcpus or 0,
            max_memory_mib=vm.max_memory_mib or 0,
            guest_cells=plan.guest_cells,
            pool=vm.root_disk.pool or "",
            nvme_drives=drives,
        ),
        disks=(
            Disk(str(disk_folder.root_disk), "qcow2", boot_order=1),
            Disk(str(folder.seed), "raw", read_only=True),
        ),
        nics=tuple(BridgeNic(nic.mac, nic.bridge) for nic in vm.nics),
        emulator_cpus=plan.emulator_cpus,
        threads_per_core=plan.threads_per_core,
        console_log=str(folder.console_log),
        shared_cpus=plan.shared_cpus,
    )
