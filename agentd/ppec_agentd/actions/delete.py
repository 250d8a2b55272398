# SPDX-License-Identifier: Apache-2.0
"""Delete: pull the plug, remove the definition, wipe the VM's own folders, give back what it held.

There is no undo, on purpose: each step can be repeated, and a delete that broke off is finished by the next one.
"""

from __future__ import annotations

import asyncio
import os
from uuid import UUID

import structlog

from ppec_agentd.actions.context import HostContext, Outcome, Steps, refuse_foreign
from ppec_agentd.hypervisor import Domain
from ppec_agentd.places import Places
from ppec_contract.agent import Stage
from ppec_contract.errors import PpecError

log = structlog.get_logger(__name__)


async def delete(host: HostContext, vm_id: UUID, steps: Steps) -> Outcome:
    """Idempotent: an absent VM is a success that changed nothing.

    Raises `vm.wrong_state` for a foreign domain, and `hypervisor.unavailable` while a call about the VM has not ended
    that may yet define it again; its files are then still there.
    """
    lingered = host.hypervisor.lingers(vm_id)
    domain = await _remove_domain(host, vm_id, steps)
    if lingered:
        # Asked only now: what hangs on a guest ends when its plug is pulled.
        refuse_lingering(host, vm_id)
        domain = await _remove_domain(host, vm_id, steps) or domain
    with steps.stage(Stage.CLEANUP):
        if domain is not None:
            await asyncio.to_thread(_say_what_is_left, host.places, domain)
        removed = await asyncio.to_thread(host.places.remove, vm_id)
    await host.thaws.forget(vm_id)
    released = host.release(vm_id)
    # A VM that is made anew under this id must not get what was still to be settled of this one.
    host.unfit.pop(vm_id, None)
    if (move := host.open_seats.pop(vm_id, None)) is not None:
        await asyncio.to_thread(host.journal.append_abandoned, move)
    return Outcome(domain is not None or removed or released, None, domain.name if domain else "")


def _say_what_is_left(places: Places, domain: Domain) -> None:
    """A pool that is gone, from the settings or from the machine, keeps no VM from being deleted. Once it is back, the
    next recovery removes the disk, as the journal says that the VM is gone. To be called before anything is removed;
    blocking."""
    name = domain.metadata.pool if domain.metadata is not None else ""
    if name and (why := _why_left(places, domain.vm_id, name)):
        log.warning("disk_left_in_pool", vm_id=str(domain.vm_id), vm=domain.name, pool=name, why=why)


def _why_left(places: Places, vm_id: UUID, name: str) -> str:
    pool, folder = places.pools.get(name), places.disk_folder(vm_id, name)
    if pool is None or folder is None:
        return "it is not in the settings"
    if problem := pool.problem():
        return problem
    # Its file system may not be mounted, which only the disk tells where the settings don't ask for one.
    return "" if os.path.lexists(folder.path) else f"{folder.path} is not there"


async def _remove_domain(host: HostContext, vm_id: UUID, steps: Steps) -> Domain | None:
    """The domain as it was; None if there is none."""
    domain = await host.hypervisor.domain(vm_id)
    if domain is not None:
        refuse_foreign(domain)
        steps.name = domain.name
        with steps.stage(Stage.STOP):
            await host.hypervisor.destroy(vm_id)
        with steps.stage(Stage.UNDEFINE):
            await host.hypervisor.undefine(vm_id)
    return domain


async def erase_domain(host: HostContext, vm_id: UUID, operation_id: str) -> bool:
    """Removes the domain if this operation made it, running or not. False if there is nothing of the operation's.

    Returns only when the domain is seen to be gone: raises `hypervisor.unavailable` while a call that may yet make it
    or start it has not ended, `hypervisor.failed` if it is still there.
    """
    refuse_lingering(host, vm_id)
    if not _made_by(await host.hypervisor.domain(vm_id), operation_id):
        return False
    await host.hypervisor.destroy(vm_id)
    undefined = await host.hypervisor.undefine(vm_id)
    if _made_by(await host.hypervisor.domain(vm_id), operation_id):
        raise PpecError("hypervisor.failed", f"vm {vm_id} is still there after it was undefined", subject=f"vm {vm_id}")
    return undefined


def refuse_lingering(host: HostContext, vm_id: UUID) -> None:
    """Raises `hypervisor.unavailable` while a call about the VM that missed its deadline may still take effect."""
    if host.hypervisor.lingers(vm_id):
        raise PpecError(
            "hypervisor.unavailable",
            f"vm {vm_id}: the hypervisor is still at work on an earlier call about it",
            hint="Try again when that has ended; libvirt's log on the host may say why it takes so long.",
            subject=f"vm {vm_id}",
        )


def _made_by(domain: Domain | None, operation_id: str) -> bool:
    return domain is not None and domain.metadata is not None and domain.metadata.operation_id == operation_id
