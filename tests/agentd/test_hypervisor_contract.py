# SPDX-License-Identifier: Apache-2.0
"""What every hypervisor must do: one suite on the fake and on a real libvirt, so that the fake stays honest."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from ppec_agentd.guests import NOBODY_ASKED
from ppec_agentd.hypervisor import Disk, DomainDefinition, EventKind, Hypervisor, HypervisorEvent, ObservedDisk
from ppec_contract.errors import PpecError
from ppec_contract.vm import VcpuPin, VmState
from ppec_lab.hypervisor_hosts import SuiteHost, with_nic

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


# Long enough for a loaded machine; reached only when a test fails.
SOON_S = 60


class Heard:
    """The events of one domain (and of the connection), in order."""

    def __init__(self, hypervisor: Hypervisor, vm_id: UUID | None = None) -> None:
        self.events: list[HypervisorEvent] = []
        self._vm_id = vm_id
        self._more = asyncio.Event()
        self.remove = hypervisor.on_event(self._hear)

    def _hear(self, event: HypervisorEvent) -> None:
        if event.vm_id in (self._vm_id, None):
            self.events.append(event)
            self._more.set()

    @property
    def kinds(self) -> list[EventKind]:
        return [event.kind for event in self.events]

    async def until(self, kind: EventKind) -> HypervisorEvent:
        async with asyncio.timeout(SOON_S):
            while kind not in self.kinds:
                self._more.clear()
                await self._more.wait()
        return self.events[self.kinds.index(kind)]


def disks_of(guest: DomainDefinition) -> list[Path]:
    return [Path(disk.path) for disk in guest.disks if Path(disk.path).exists()]


async def refused(code: str, call: object) -> PpecError:
    with pytest.raises(PpecError) as caught:
        await call  # type: ignore[misc]
    assert caught.value.code == code, str(caught.value)
    return caught.value


async def test_the_facts_are_complete(host: SuiteHost) -> None:
    async with host.opened() as hypervisor:
        facts = await hypervisor.facts()
        assert facts.topology.cells[0].cores
        assert facts.topology.memory_mib > 0
        assert facts.domain_type in {"qemu", "fake"}
        assert all((facts.architecture, facts.libvirt_version, facts.qemu_version, facts.kernel_version, facts.boot_id))
        assert list(facts.bridges) == sorted(facts.bridges)
        assert await hypervisor.facts() == facts


async def test_an_absent_vm(host: SuiteHost) -> None:
    absent = uuid4()
    async with host.opened() as hypervisor:
        assert await hypervisor.domains() == ()
        assert await hypervisor.domain(absent) is None
        assert await hypervisor.destroy(absent) is False
        assert await hypervisor.undefine(absent) is False
        await refused("vm.not_found", hypervisor.start(absent))
        await refused("vm.not_found", hypervisor.shutdown(absent))
        await refused("vm.not_found", hypervisor.wait_state(absent, VmState.STOPPED, SOON_S))


async def test_what_is_defined_is_read_back(host: SuiteHost) -> None:
    wanted = with_nic(host.definition())
    seed = Path(wanted.disks[0].path).with_name("seed.iso")
    wanted = replace(wanted, disks=(*wanted.disks, Disk(str(seed), "raw", read_only=True)))
    async with host.opened() as hypervisor:
        assert await hypervisor.define(wanted) is True
        domain = await hypervisor.domain(wanted.metadata.vm_id)
        assert domain is not None
        assert domain.managed
        assert domain.metadata == wanted.metadata
        assert (domain.name, domain.state) == (wanted.metadata.name, VmState.STOPPED)
        assert (domain.vcpus, domain.memory_mib) == (2, 64)
        assert domain.pins == wanted.metadata.pins
        assert domain.memory_cells == (0,)
        assert domain.macs == ("52:54:00:00:00:01",)
        assert domain.disks == (ObservedDisk(wanted.disks[0].path, "qcow2"), ObservedDisk(str(seed), "raw"))
        assert await hypervisor.domains() == (domain,)


async def test_defining_again_replaces_the_definition(host: SuiteHost) -> None:
    first = host.definition()
    second = replace(first, metadata=replace(first.metadata, operation_id="op-2", memory_mib=128))
    async with host.opened() as hypervisor:
        assert await hypervisor.define(first) is True
        assert await hypervisor.define(second) is False
        domains = await hypervisor.domains()
        assert [(d.memory_mib, d.metadata) for d in domains] == [(128, second.metadata)]


async def test_a_taken_name_or_id_is_refused_and_its_owner_untouched(host: SuiteHost) -> None:
    ours = host.definition()
    foreign = uuid4()
    async with host.opened() as hypervisor:
        await hypervisor.define(ours)
        await host.make_by_hand(hypervisor, "pet", foreign)
        before = await hypervisor.domains()
        vm_id, name = ours.metadata.vm_id, ours.metadata.name
        for taken_id, taken_name in ((uuid4(), name), (vm_id, "other"), (uuid4(), "pet"), (foreign, "pet")):
            clash = replace(ours, metadata=replace(ours.metadata, vm_id=taken_id, name=taken_name))
            await refused("vm.exists", hypervisor.define(clash))
        assert await hypervisor.domains() == before


async def test_a_domain_made_by_hand_is_seen_and_not_ours(host: SuiteHost) -> None:
    foreign = uuid4()
    ours = host.definition()
    async with host.opened() as hypervisor:
        await host.make_by_hand(hypervisor, "pet", foreign)
        await hypervisor.define(ours)
        domains = await hypervisor.domains()
        assert [d.vm_id for d in domains] == sorted([foreign, ours.metadata.vm_id])
        pet = next(d for d in domains if d.vm_id == foreign)
        assert (pet.name, pet.managed, pet.pins, pet.vcpus, pet.memory_mib) == ("pet", False, (), 1, 32)


async def test_start_and_destroy_and_both_again(host: SuiteHost) -> None:
    guest = host.definition()
    vm_id = guest.metadata.vm_id
    async with host.opened() as hypervisor:
        await hypervisor.define(guest)
        assert await hypervisor.start(vm_id) is True
        assert await hypervisor.start(vm_id) is False
        running = await hypervisor.domain(vm_id)
        assert running is not None
        assert (running.state, running.pins, running.memory_cells) == (VmState.RUNNING, guest.metadata.pins, (0,))
        assert await hypervisor.destroy(vm_id) is True
        assert await hypervisor.destroy(vm_id) is False
        stopped = await hypervisor.domain(vm_id)
        assert stopped is not None
        assert (stopped.state, stopped.metadata) == (VmState.STOPPED, guest.metadata)


async def test_undefine_wants_it_stopped(host: SuiteHost) -> None:
    guest = host.definition()
    vm_id = guest.metadata.vm_id
    async with host.opened() as hypervisor:
        await hypervisor.define(guest)
        await hypervisor.start(vm_id)
        await refused("vm.wrong_state", hypervisor.undefine(vm_id))
        await hypervisor.destroy(vm_id)
        assert await hypervisor.undefine(vm_id) is True
        assert await hypervisor.undefine(vm_id) is False
        assert await hypervisor.domains() == ()
    assert [path.name for path in disks_of(guest)] == [f"{guest.metadata.name}.qcow2"]


async def test_a_guest_may_ignore_the_power_button(host: SuiteHost) -> None:
    guest = host.definition()
    vm_id = guest.metadata.vm_id
    async with host.opened() as hypervisor:
        await hypervisor.define(guest)
        assert await hypervisor.shutdown(vm_id) is False
        await hypervisor.start(vm_id)
        assert await hypervisor.shutdown(vm_id) is True
        assert await hypervisor.wait_state(vm_id, VmState.STOPPED, 0.3) is False
        assert await hypervisor.wait_state(vm_id, VmState.RUNNING, SOON_S) is True


async def test_a_reset_begins_the_guest_anew_and_a_deaf_one_ignores_a_reboot(host: SuiteHost) -> None:
    guest = host.definition()
    vm_id = guest.metadata.vm_id
    async with host.opened() as hypervisor:
        await hypervisor.define(guest)
        for call in (hypervisor.reboot, hypervisor.reset):
            assert await call(vm_id) is False
            await refused("vm.not_found", call(uuid4()))
        await hypervisor.start(vm_id)
        heard = Heard(hypervisor, vm_id)
        assert await hypervisor.reboot(vm_id) is True
        await asyncio.sleep(0.3)
        assert EventKind.REBOOTED not in heard.kinds
        assert await hypervisor.reset(vm_id) is True
        await heard.until(EventKind.REBOOTED)
        domain = await hypervisor.domain(vm_id)
        assert domain is not None
        assert domain.state is VmState.RUNNING


async def test_pause_and_resume_and_both_again(host: SuiteHost) -> None:
    guest = host.definition()
    vm_id = guest.metadata.vm_id
    async with host.opened() as hypervisor:
        await hypervisor.define(guest)
        for call in (hypervisor.pause, hypervisor.resume):
            await refused("vm.wrong_state", call(vm_id))
            await refused("vm.not_found", call(uuid4()))
        await hypervisor.start(vm_id)
        assert await hypervisor.resume(vm_id) is False
        for call, state in ((hypervisor.pause, VmState.PAUSED), (hypervisor.resume, VmState.RUNNING)):
            assert [await call(vm_id), await call(vm_id)] == [True, False]
            assert await hypervisor.wait_state(vm_id, state, SOON_S)


async def test_a_guest_without_an_agent_is_said_so_at_once(host: SuiteHost) -> None:
    guest = host.definition()
    vm_id = guest.metadata.vm_id
    async with host.opened() as hypervisor:
        await hypervisor.define(guest)
        assert await hypervisor.guest(vm_id, 5) is None
        assert await hypervisor.thaw(vm_id) is False
        await refused("vm.wrong_state", hypervisor.freeze(vm_id))
        await hypervisor.start(vm_id)
        assert await hypervisor.guest(vm_id, 5) is None
        error = await refused("guest.agent_unavailable", hypervisor.freeze(vm_id))
        assert error.details == NOBODY_ASKED
        await refused("guest.agent_unavailable", hypervisor.thaw(vm_id))
        await hypervisor.pause(vm_id)
        for call in (hypervisor.freeze(vm_id), hypervisor.thaw(vm_id), hypervisor.guest(vm_id, 5)):
            await refused("vm.wrong_state", call)
        for call in (hypervisor.freeze(uuid4()), hypervisor.thaw(uuid4()), hypervisor.guest(uuid4(), 5)):
            await refused("vm.not_found", call)


async def test_nobody_types_to_a_vm_that_is_off_or_not_there(host: SuiteHost) -> None:
    guest = host.definition()
    vm_id = guest.metadata.vm_id
    async with host.opened() as hypervisor:
        await hypervisor.define(guest)
        await refused("vm.wrong_state", hypervisor.type_on_console(vm_id, b"x"))
        await refused("vm.not_found", hypervisor.type_on_console(uuid4(), b"x"))
        await hypervisor.start(vm_id)
        await hypervisor.type_on_console(vm_id, b"x")
        await hypervisor.type_on_console(vm_id, bytes(range(256)))


async def test_a_wait_ends_when_the_state_comes(host: SuiteHost) -> None:
    guest = host.definition()
    vm_id = guest.metadata.vm_id
    async with host.opened() as hypervisor:
        await hypervisor.define(guest)
        await hypervisor.start(vm_id)
        waiting = asyncio.create_task(hypervisor.wait_state(vm_id, VmState.STOPPED, SOON_S))
        await asyncio.sleep(0)
        await hypervisor.destroy(vm_id)
        assert await waiting is True


async def test_a_wait_ends_when_the_vm_goes_away(host: SuiteHost) -> None:
    guest = host.definition()
    vm_id = guest.metadata.vm_id
    async with host.opened() as hypervisor:
        await hypervisor.define(guest)
        waiting = asyncio.create_task(hypervisor.wait_state(vm_id, VmState.RUNNING, SOON_S))
        await asyncio.sleep(0)
        await hypervisor.undefine(vm_id)
        await refused("vm.not_found", waiting)


async def test_events_tell_a_vms_life_in_order(host: SuiteHost) -> None:
    guest = host.definition()
    vm_id = guest.metadata.vm_id
    told = {EventKind.DEFINED, EventKind.STARTED, EventKind.STOPPED, EventKind.UNDEFINED}
    async with host.opened() as hypervisor:
        heard = Heard(hypervisor, vm_id)
        await hypervisor.define(guest)
        await hypervisor.start(vm_id)
        await hypervisor.destroy(vm_id)
        await hypervisor.undefine(vm_id)
        last = await heard.until(EventKind.UNDEFINED)
        assert [kind for kind in heard.kinds if kind in told] == [
            EventKind.DEFINED,
            EventKind.STARTED,
            EventKind.STOPPED,
            EventKind.UNDEFINED,
        ]
        assert last.name == guest.metadata.name


async def test_a_failing_listener_and_a_removed_one_disturb_nobody(host: SuiteHost) -> None:
    guest = host.definition()

    def fail(_event: HypervisorEvent) -> None:
        raise RuntimeError("listener")

    async with host.opened() as hypervisor:
        hypervisor.on_event(fail)
        removed = Heard(hypervisor, guest.metadata.vm_id)
        removed.remove()
        removed.remove()
        heard = Heard(hypervisor, guest.metadata.vm_id)
        await hypervisor.define(guest)
        await heard.until(EventKind.DEFINED)
        assert removed.events == []


async def test_a_start_that_fails_says_so_and_leaves_it_stopped(host: SuiteHost) -> None:
    guest = host.definition()
    vm_id = guest.metadata.vm_id
    async with host.opened() as hypervisor:
        await hypervisor.define(guest)
        await host.break_start(hypervisor, guest)
        error = await refused("vm.start_failed", hypervisor.start(vm_id))
        assert str(vm_id) in error.subject
        domain = await hypervisor.domain(vm_id)
        assert domain is not None
        assert domain.state is VmState.STOPPED


async def test_a_paused_vm_is_not_started(host: SuiteHost) -> None:
    guest = host.definition()
    vm_id = guest.metadata.vm_id
    async with host.opened() as hypervisor:
        await hypervisor.define(guest)
        await hypervisor.start(vm_id)
        await host.pause(hypervisor, vm_id)
        assert await hypervisor.wait_state(vm_id, VmState.PAUSED, SOON_S)
        await refused("vm.wrong_state", hypervisor.start(vm_id))
        assert await hypervisor.destroy(vm_id) is True


async def test_vms_run_on_while_the_agent_is_away(host: SuiteHost) -> None:
    running, stopped = host.definition(), host.definition()
    async with host.opened() as hypervisor:
        for guest in (running, stopped):
            await hypervisor.define(guest)
        await hypervisor.start(running.metadata.vm_id)
        before = await hypervisor.domains()
        await hypervisor.close()
        await hypervisor.close()
        await refused("hypervisor.unavailable", hypervisor.domains())
    async with host.opened() as hypervisor:
        assert await hypervisor.domains() == before
        assert {d.state for d in before} == {VmState.RUNNING, VmState.STOPPED}


async def test_calls_about_different_vms_run_side_by_side(host: SuiteHost) -> None:
    guests = [host.definition() for _ in range(3)]
    async with host.opened() as hypervisor:

        async def live(vm_id: UUID) -> list[bool]:
            return [await hypervisor.start(vm_id), await hypervisor.destroy(vm_id), await hypervisor.undefine(vm_id)]

        assert await asyncio.gather(*(hypervisor.define(guest) for guest in guests)) == [True] * 3
        assert await asyncio.gather(*(live(guest.metadata.vm_id) for guest in guests)) == [[True] * 3] * 3
        assert await hypervisor.domains() == ()


async def test_the_same_call_twice_at_once_changes_once(host: SuiteHost) -> None:
    guest = host.definition()
    vm_id = guest.metadata.vm_id
    async with host.opened() as hypervisor:
        await hypervisor.define(guest)
        for call in (hypervisor.start, hypervisor.destroy, hypervisor.undefine):
            answers = await asyncio.gather(call(vm_id), call(vm_id))
            assert sorted(answers) == [False, True]


async def test_a_lost_connection_comes_back_by_itself(host: SuiteHost) -> None:
    guest = host.definition()
    vm_id = guest.metadata.vm_id
    async with host.opened() as hypervisor:
        heard = Heard(hypervisor, vm_id)
        await hypervisor.define(guest)
        await hypervisor.start(vm_id)
        await host.cut_off(hypervisor)
        await heard.until(EventKind.DISCONNECTED)
        await refused("hypervisor.unavailable", hypervisor.domain(vm_id))
        await host.come_back(hypervisor)
        event = await heard.until(EventKind.RECONNECTED)
        assert event.vm_id is None
        domain = await hypervisor.domain(vm_id)
        assert domain is not None
        assert (domain.state, domain.metadata) == (VmState.RUNNING, guest.metadata)
        await hypervisor.destroy(vm_id)
        assert await hypervisor.wait_state(vm_id, VmState.STOPPED, SOON_S)
        another = host.definition()
        heard_again = Heard(hypervisor, another.metadata.vm_id)
        await hypervisor.define(another)
        await heard_again.until(EventKind.DEFINED)


async def test_a_vm_has_the_drives_it_is_given(host: SuiteHost) -> None:
    """This machine has none at these addresses: the VM is defined all the same, and refused at its start."""
    wanted = host.definition(nvme_drives=("ffff:fe:00.0", "ffff:ff:1f.7"))
    vm_id = wanted.metadata.vm_id
    async with host.opened() as hypervisor:
        await hypervisor.define(wanted)
        domain = await hypervisor.domain(vm_id)
        assert domain is not None
        assert domain.metadata == wanted.metadata
        assert domain.host_devices == wanted.metadata.nvme_drives
        later = replace(wanted, metadata=replace(wanted.metadata, memory_mib=128))
        await hypervisor.redefine(later)
        domain = await hypervisor.domain(vm_id)
        assert domain is not None
        assert (domain.memory_mib, domain.host_devices) == (128, wanted.metadata.nvme_drives)
        await refused("vm.start_failed", hypervisor.start(vm_id))
        domain = await hypervisor.domain(vm_id)
        assert domain is not None
        assert domain.state is VmState.STOPPED


async def test_a_device_that_is_not_there_is_not_given_back(host: SuiteHost) -> None:
    async with host.opened() as hypervisor:
        assert await hypervisor.reattach("ffff:ff:1f.7") is False


async def test_pins_are_those_asked_for(host: SuiteHost) -> None:
    guest = host.definition()
    crossed = tuple(
        VcpuPin(vcpu=pin.vcpu, pcpu=other.pcpu)
        for pin, other in zip(guest.metadata.pins, reversed(guest.metadata.pins), strict=True)
    )
    guest = replace(guest, metadata=replace(guest.metadata, pins=crossed))
    async with host.opened() as hypervisor:
        await hypervisor.define(guest)
        await hypervisor.start(guest.metadata.vm_id)
        domain = await hypervisor.domain(guest.metadata.vm_id)
        assert domain is not None
        assert domain.pins == crossed
