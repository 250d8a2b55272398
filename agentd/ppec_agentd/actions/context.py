# SPDX-License-Identifier: Apache-2.0
"""What an action acts on, and how it tells where it is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID
from weakref import WeakValueDictionary

from ppec_agentd.disks import DiskMaker, VmFolder
from ppec_agentd.hypervisor import Domain, DomainDefinition, HostFacts, Hypervisor
from ppec_agentd.images import ImageCache
from ppec_agentd.journal import Journal, Key
from ppec_agentd.ledger import Ledger
from ppec_agentd.moments import Moments
from ppec_agentd.nvme.settling import SettlingDrives
from ppec_agentd.observed import vm_info
from ppec_agentd.places import Places
from ppec_agentd.thaws import Thaws
from ppec_contract.agent import Resized, Stage, VmProgress, VmsReply
from ppec_contract.errors import PpecError
from ppec_contract.vm import VmInfo, VmSpec

Emit = Callable[[VmsReply], None]


@dataclass
class HostContext:
    """One host's parts. `facts` are refreshed by reports and whenever a bridge seems to be missing.

    `unfit` are VMs of which more is held than they will need, or of which a resize could not be taken back: then the
    definition to go back to (`actions/resize.py`). `open_seats` are VMs whose move broke off and could not be taken
    back, each with the journal's key of the move (`actions/retune.py`).
    """

    hypervisor: Hypervisor
    facts: HostFacts
    ledger: Ledger
    journal: Journal
    images: ImageCache
    disks: DiskMaker
    places: Places
    starts: asyncio.Semaphore
    preparations: asyncio.Semaphore
    drives: SettlingDrives
    moments: Moments = field(default_factory=Moments)
    unfit: dict[UUID, DomainDefinition | None] = field(default_factory=dict)
    open_seats: dict[UUID, Key] = field(default_factory=dict)
    thaws: Thaws = field(init=False)
    _vm_locks: WeakValueDictionary[UUID, asyncio.Lock] = field(init=False, default_factory=WeakValueDictionary)

    def __post_init__(self) -> None:
        self.thaws = Thaws(self.hypervisor, self.vms_dir)

    def lock_of(self, vm_id: UUID) -> asyncio.Lock:
        """Held by whoever changes the VM. Whoever needs several takes them in the order of the ids."""
        return self._vm_locks.setdefault(vm_id, asyncio.Lock())

    @property
    def vms_dir(self) -> Path:
        return self.places.own

    def folder(self, vm_id: UUID) -> VmFolder:
        return self.places.folder(vm_id)

    async def disk_folder(self, vm: VmSpec) -> VmFolder:
        """Where the VM's disk is to be. Raises `host.pool_missing`."""
        name, known = vm.root_disk.pool or "", sorted(self.places.pools)
        folder = self.places.disk_folder(vm.vm_id, name)
        if folder is None:
            hint = "Name the pool in the settings of the host's agent, or ask for another one."
            found = ", ".join(known) or "none"
            raise _pool_missing(vm, known, f"wanted storage pool {name}, found {found}", hint)
        why = await asyncio.to_thread(self.places.pools[name].problem) if name else ""
        if why:
            hint = "Mount it, or make its folder, on the host; then restart its agent."
            raise _pool_missing(vm, known, f"storage pool {name} can't be used: {why}", hint)
        return folder

    def release(self, vm_id: UUID) -> bool:
        """Gives back all a VM holds, once it is gone; False if it held nothing. Its drives are free when they have
        settled."""
        released = self.ledger.release(vm_id)
        self.drives.look_soon()
        return released

    async def refuse_missing_bridges(self, vm: VmSpec) -> None:
        """Raises `host.bridge_missing`."""
        wanted = {nic.bridge for nic in vm.nics}
        if not wanted <= set(self.facts.bridges):
            self.facts = await self.hypervisor.facts()
        missing = sorted(wanted - set(self.facts.bridges))
        if missing:
            raise PpecError(
                "host.bridge_missing",
                f"vm {vm.name}: wanted bridge {', '.join(missing)}, found {', '.join(self.facts.bridges) or 'none'}",
                hint="Make the bridge on the host, or correct the prefix that names it.",
                subject=f"vm {vm.name}",
                details={"missing": missing, "found": list(self.facts.bridges)},
            )


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an action ended well: whether it changed anything, and the VM as it is now (None once deleted)."""

    changed: bool
    vm: VmInfo | None
    name: str = ""
    resized: Resized | None = None


@dataclass
class Steps:
    """Tells listeners which stage a VM is in, and keeps the time spent in each. Stages may overlap.

    `left` is what an action that failed left of the VM, if it knows: with it the failure says what the VM is now.
    """

    vm_id: UUID
    name: str
    accepted_s: float = field(default_factory=time.monotonic)
    stage_ms: dict[Stage, int] = field(default_factory=dict)
    listeners: list[Emit] = field(default_factory=list)
    left: VmInfo | None = None

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        begun = time.monotonic()
        progress = VmProgress(vm_id=self.vm_id, name=self.name, stage=stage, elapsed_ms=_ms(begun - self.accepted_s))
        for listener in self.listeners:
            listener(VmsReply(progress=progress))
        try:
            yield
        finally:
            self.stage_ms[stage] = self.stage_ms.get(stage, 0) + _ms(time.monotonic() - begun)


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))


def refuse_foreign(domain: Domain) -> None:
    """Raises `vm.wrong_state` for a domain PPEC did not make: it is somebody else's."""
    if not domain.managed:
        raise PpecError(
            "vm.wrong_state",
            f"vm {domain.name} was not made by PPEC and is left alone",
            hint="Use virsh on the host for domains made by hand.",
            subject=f"vm {domain.name}",
        )


async def as_it_is(host: HostContext, vm_id: UUID) -> VmInfo | None:
    """The VM after an action that failed; None if it is gone, or can't be looked at: the next report tells."""
    try:
        domain = await host.hypervisor.domain(vm_id)
    except PpecError:
        return None
    return vm_info(domain) if domain is not None else None


def _pool_missing(vm: VmSpec, known: list[str], problem: str, hint: str) -> PpecError:
    return PpecError(
        "host.pool_missing",
        f"vm {vm.name}: {problem}",
        hint=hint,
        subject=f"vm {vm.name}",
        details={"missing": [vm.root_disk.pool], "found": known},
    )


def vm_not_found(vm_id: UUID) -> PpecError:
    return PpecError("vm.not_found", f"vm {vm_id} is not on this host", subject=f"vm {vm_id}")
