# SPDX-License-Identifier: Apache-2.0
"""The hypervisor port without a hypervisor: domains are records, in memory or in a file that outlives the process.

For `make demo HYPERVISOR=fake`, for simulated fleets, and for every test that doesn't need a guest. It is kept honest
by the contract suite it shares with libvirt. With a `state_file`, a domain "runs" on while the agent is away, as a real
one does; faults are injected through `FaultPlan` (fake_faults.py), by settings or at run time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from uuid import UUID

from pydantic import TypeAdapter

from ppec_agentd.fake_faults import FaultPlan, Hang
from ppec_agentd.fake_guests import FakeGuests
from ppec_agentd.fake_nvme import FakeNvme
from ppec_agentd.fake_resize import OFF as _OFF
from ppec_agentd.fake_resize import FakeResize, shown, started_anew
from ppec_agentd.hypervisor import (
    Domain,
    DomainDefinition,
    EventCallback,
    EventKind,
    HostFacts,
    HypervisorEvent,
    ObservedDisk,
)
from ppec_agentd.lifecycle import EventFanout, vm_not_found, wait_for_state
from ppec_agentd.topology import Topology
from ppec_contract.errors import PpecError
from ppec_contract.host import Architecture
from ppec_contract.vm import VmState

# After these the guest is another one, with nothing frozen.
_ENDS = (EventKind.STOPPED, EventKind.CRASHED, EventKind.REBOOTED)


@dataclass(frozen=True, slots=True)
class FakeOptions:
    """`state_file` None keeps the domains in memory. `deaf_guests` don't obey the power button, nor let go of vCPUs.
    `nvme_drives` are the machine's, by PCI address, each with its cell."""

    topology: Topology
    architecture: Architecture = "x86_64"
    bridges: tuple[str, ...] = ("br0",)
    state_file: Path | None = None
    deaf_guests: bool = False
    delays_s: dict[str, float] = field(default_factory=dict)
    fail_every: dict[str, int] = field(default_factory=dict)
    nvme_drives: dict[str, int] = field(default_factory=dict)


class FakeHypervisor(FakeResize, FakeGuests, FakeNvme):
    """`Hypervisor` on records. Also what its tests do by hand on a real host: `make_by_hand`, `crash`, `cut_off`."""

    def __init__(self, options: FakeOptions) -> None:
        FakeGuests.__init__(self)
        FakeNvme.__init__(self, options.nvme_drives, options.state_file)
        self._options = options
        self._fanout = EventFanout()
        self._domains: dict[UUID, Domain] = {}
        self._connected = False
        self._lingering: Counter[UUID] = Counter()
        self._late: set[asyncio.Task[None]] = set()
        self.faults = FaultPlan(delays_s=dict(options.delays_s), fail_every=dict(options.fail_every))

    async def open(self) -> None:
        (await self.faults.begin("open"))()
        if self._options.state_file is not None:
            self._domains = {domain.vm_id: domain for domain in _load(self._options.state_file)}
        self._connected = True

    async def close(self) -> None:
        self._connected = False
        for task in self._late:
            task.cancel()

    async def facts(self) -> HostFacts:
        end = await self._begin("facts")
        end()
        return HostFacts(
            topology=self._options.topology,
            architecture=self._options.architecture,
            domain_type="fake",
            libvirt_version="0.0.0",
            qemu_version="0.0.0",
            kernel_version="0.0.0",
            boot_id=str(UUID(int=0)),
            bridges=tuple(sorted(self._options.bridges)),
        )

    async def domains(self) -> tuple[Domain, ...]:
        (await self._begin("domains"))()
        return tuple(shown(self._domains[vm_id]) for vm_id in sorted(self._domains))

    async def domain(self, vm_id: UUID) -> Domain | None:
        (await self._begin("domain"))()
        found = self._domains.get(vm_id)
        return None if found is None else shown(found)

    def lingers(self, vm_id: UUID) -> bool:
        return self._lingering[vm_id] > 0

    async def define(self, definition: DomainDefinition) -> bool:
        return await self._change("define", definition.metadata.vm_id, lambda: self._define(definition))

    def _define(self, definition: DomainDefinition) -> bool:
        wanted = definition.metadata
        taken = [d for d in self._domains.values() if d.vm_id == wanted.vm_id or d.name == wanted.name]
        for other in taken:
            if (other.vm_id, other.name, other.managed) != (wanted.vm_id, wanted.name, True):
                raise PpecError(
                    "vm.exists",
                    f"vm {wanted.name} ({wanted.vm_id}) can't be defined: {other.name} ({other.vm_id}) is there",
                    subject=f"vm {wanted.name}",
                )
        state = taken[0].state if taken else VmState.STOPPED
        self._put(_domain(definition, state), EventKind.DEFINED)
        return not taken

    async def start(self, vm_id: UUID) -> bool:
        return await self._change("start", vm_id, lambda: self._start(vm_id))

    def _start(self, vm_id: UUID) -> bool:
        domain = self._must_find(vm_id)
        if domain.state is VmState.PAUSED:
            raise PpecError("vm.wrong_state", f"can't start vm {vm_id}: it is paused", subject=f"vm {vm_id}")
        changed = domain.state in _OFF
        if changed:
            self.take_drives(domain)
            self._put(replace(domain, state=VmState.RUNNING), EventKind.STARTED)
        return changed

    async def shutdown(self, vm_id: UUID) -> bool:
        end = await self._begin("shutdown")
        domain = self._must_find(vm_id)
        changed = domain.state not in _OFF
        if changed and not self._options.deaf_guests:
            # Like a guest, it takes a moment: the caller gets its answer first.
            asyncio.get_running_loop().call_soon(self._power_off, vm_id)
        end()
        return changed

    async def reboot(self, vm_id: UUID) -> bool:
        end = await self._begin("reboot")
        domain = self._must_find(vm_id)
        if domain.state is VmState.RUNNING and not self._options.deaf_guests:
            asyncio.get_running_loop().call_soon(self._changed, EventKind.REBOOTED, domain)
        end()
        return domain.state not in _OFF

    async def reset(self, vm_id: UUID) -> bool:
        return await self._change("reset", vm_id, lambda: self._reset(vm_id))

    def _reset(self, vm_id: UUID) -> bool:
        domain = self._must_find(vm_id)
        if domain.state not in _OFF:
            self._changed(EventKind.REBOOTED, domain)
        return domain.state not in _OFF

    async def pause(self, vm_id: UUID) -> bool:
        return await self._change("pause", vm_id, lambda: self._switch(vm_id, VmState.PAUSED, EventKind.PAUSED))

    async def resume(self, vm_id: UUID) -> bool:
        return await self._change("resume", vm_id, lambda: self._switch(vm_id, VmState.RUNNING, EventKind.RESUMED))

    def _switch(self, vm_id: UUID, state: VmState, kind: EventKind) -> bool:
        domain = self._must_find(vm_id)
        if domain.state in _OFF:
            raise PpecError("vm.wrong_state", f"can't do this to vm {vm_id}: it is off", subject=f"vm {vm_id}")
        if domain.state is state:
            return False
        self._put(replace(domain, state=state), kind)
        return True

    async def destroy(self, vm_id: UUID) -> bool:
        return await self._change("destroy", vm_id, lambda: self._power_off(vm_id))

    async def undefine(self, vm_id: UUID) -> bool:
        return await self._change("undefine", vm_id, lambda: self._undefine(vm_id))

    def _undefine(self, vm_id: UUID) -> bool:
        domain = self._domains.get(vm_id)
        if domain is not None and domain.state not in _OFF:
            raise PpecError("vm.wrong_state", f"can't undefine vm {vm_id}: it runs", subject=f"vm {vm_id}")
        if domain is not None:
            del self._domains[vm_id]
            self._changed(EventKind.UNDEFINED, domain)
        return domain is not None

    async def wait_state(self, vm_id: UUID, state: VmState, timeout_s: float) -> bool:
        return await wait_for_state(self, vm_id, state, timeout_s)

    def on_event(self, callback: EventCallback) -> Callable[[], None]:
        return self._fanout.add(callback)

    # What a real host does to its agent

    def make_by_hand(self, domain: Domain) -> None:
        """A domain nobody asked the agent for, or one changed behind its back."""
        self._put(domain, EventKind.DEFINED)

    def crash(self, vm_id: UUID) -> None:
        """The guest dies."""
        self.give_drives(self._must_find(vm_id))
        self._put(started_anew(replace(self._must_find(vm_id), state=VmState.CRASHED)), EventKind.CRASHED)

    def cut_off(self) -> None:
        """The daemon goes away: calls raise ``hypervisor.unavailable`` until `come_back`; guests run on."""
        self._connected = False
        self._fanout.send(HypervisorEvent(EventKind.DISCONNECTED))

    def come_back(self) -> None:
        self._connected = True
        self._fanout.send(HypervisorEvent(EventKind.RECONNECTED))

    async def wait_until_none_lingers(self) -> None:
        """Until calls that hung and were released have taken effect."""
        await asyncio.gather(*self._late)

    async def _begin(self, method: str) -> Callable[[], None]:
        if not self._connected:
            raise PpecError("hypervisor.unavailable", f"{method}: no connection", subject="the fake hypervisor")
        return await self.faults.begin(method)

    async def _change(self, method: str, vm_id: UUID, effect: Callable[[], bool]) -> bool:
        hang = self.faults.next_hang(method)
        end = await self._begin(method)
        if hang is not None:
            self._lingering[vm_id] += not hang.unseen
            task = asyncio.create_task(self._take_effect_late(hang, vm_id, effect))
            self._late.add(task)
            task.add_done_callback(self._late.discard)
            raise PpecError("hypervisor.unavailable", f"{method} vm {vm_id}: no answer in time", subject=f"vm {vm_id}")
        changed = effect()
        end()
        return changed

    async def _take_effect_late(self, hang: Hang, vm_id: UUID, effect: Callable[[], bool]) -> None:
        await hang.released.wait()
        with contextlib.suppress(PpecError):  # whoever wanted to know has gone
            effect()
        self._lingering[vm_id] -= not hang.unseen

    def _all(self) -> tuple[Domain, ...]:
        return tuple(self._domains.values())

    def _find(self, vm_id: UUID) -> Domain | None:
        return self._domains.get(vm_id)

    def _must_find(self, vm_id: UUID) -> Domain:
        if vm_id not in self._domains:
            raise vm_not_found(vm_id)
        return self._domains[vm_id]

    def _power_off(self, vm_id: UUID) -> bool:
        domain = self._domains.get(vm_id)
        if domain is None or domain.state in _OFF:
            return False
        self.give_drives(domain)
        self._put(started_anew(replace(domain, state=VmState.STOPPED)), EventKind.STOPPED)
        return True

    @property
    def deaf_guests(self) -> bool:
        return self._options.deaf_guests

    def _put(self, domain: Domain, kind: EventKind | None) -> None:
        self._domains[domain.vm_id] = domain
        self._changed(kind, domain)

    def _changed(self, kind: EventKind | None, domain: Domain) -> None:
        _save(self._options.state_file, tuple(self._domains.values()))
        if kind in _ENDS:
            self.frozen.discard(domain.vm_id)
        if kind is not None:
            self._fanout.send(HypervisorEvent(kind, domain.vm_id, domain.name))


def _domain(definition: DomainDefinition, state: VmState) -> Domain:
    vm = definition.metadata
    return Domain(
        vm_id=vm.vm_id,
        name=vm.name,
        state=state,
        vcpus=vm.vcpus,
        memory_mib=vm.memory_mib,
        pins=vm.pins,
        memory_cells=vm.cells,
        metadata=vm,
        macs=tuple(nic.mac for nic in definition.nics),
        disks=tuple(ObservedDisk(disk.path, disk.format) for disk in definition.disks),
        max_vcpus=max(vm.vcpus, vm.max_vcpus),
        max_memory_mib=max(vm.memory_mib, vm.max_memory_mib),
        host_devices=vm.nvme_drives,
    )


_STATE_FILE: TypeAdapter[tuple[Domain, ...]] = TypeAdapter(tuple[Domain, ...])


def _load(path: Path) -> tuple[Domain, ...]:
    if not path.exists():
        return ()
    return _STATE_FILE.validate_json(path.read_bytes())


def _save(path: Path | None, domains: tuple[Domain, ...]) -> None:
    """By rename, so that an agent killed at any moment leaves a whole file."""
    if path is None:
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(_STATE_FILE.dump_json(domains, indent=1))
    partial.replace(path)
