# SPDX-License-Identifier: Apache-2.0
"""Changes of VMs in the ledger, by example: memory and pages, resize, repin, and what a rebuilt ledger knows."""

from __future__ import annotations

import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ppec_agentd.hypervisor import Domain
from ppec_agentd.ledger import Claim, DriveState, FindingKind, Ledger, Move
from ppec_agentd.retune.tenants import tenant_of
from ppec_agentd.topology import declare_topology, parse_capabilities
from ppec_contract.errors import PpecError
from ppec_contract.vm import NumaPolicy, VcpuPin, VmState

from .ledger_host import (
    CELL_BY_DRIVE,
    DISK_MIB,
    ORDINARY_MIB,
    TOPOLOGY,
    claim,
    domain_of,
    new_ledger,
    with_free_drives,
)


def reserved(ledger: Ledger, *claims: Claim) -> list[uuid.UUID]:
    for wanted in claims:
        ledger.reserve(wanted)
        ledger.commit(wanted.vm_id)
    return [wanted.vm_id for wanted in claims]


def refused(act: Any) -> PpecError:
    with pytest.raises(PpecError) as caught:
        act()
    return caught.value


def figures(error: PpecError) -> tuple[object, ...]:
    return error.code, error.details["resource"], error.details["wanted"], error.details["free"]


# --- drives -------------------------------------------------------------------------------------------------------


def test_drives_come_from_the_cells_named_as_many_from_each() -> None:
    ledger = with_free_drives(new_ledger())
    error = refused(lambda: ledger.reserve(claim((0,), nvme_drives=3)))
    assert figures(error) == ("host.no_capacity", "nvme_drives", 3, 2)
    assert error.details["cells"] == [0]
    wide = claim((0, 1), NumaPolicy(multi_cell=True), vcpus=4, nvme_drives=3)
    ledger.reserve(wide)
    held = ledger.holding(wide.vm_id)
    assert held is not None
    assert sorted(CELL_BY_DRIVE[drive] for drive in held.drives) == [0, 0, 1, 1]
    assert [(cell.nvme_drives, cell.nvme_drives_free) for cell in ledger.cells()] == [(2, 0), (2, 0), (2, 2), (0, 0)]


def test_no_drive_is_free_before_somebody_says_so() -> None:
    ledger = new_ledger()
    assert set(ledger.drives().values()) == {DriveState.SETTLING}
    assert refused(lambda: ledger.reserve(claim(nvme_drives=1))).details["free"] == 0
    assert figures(refused(lambda: with_free_drives(ledger).reserve(claim((3,), nvme_drives=1))))[3] == 0


def test_a_vm_with_drives_is_not_moved() -> None:
    ledger = with_free_drives(new_ledger())
    (vm_id,) = reserved(ledger, claim(nvme_drives=1))
    pins = tuple(VcpuPin(vcpu=vcpu, pcpu=cpu) for vcpu, cpu in enumerate(TOPOLOGY.by_cell[1].cores[3].cpus))
    error = refused(lambda: ledger.repin([Move(vm_id, pins, (1,))]))
    assert error.code == "request.invalid"
    assert "its memory is locked where it is" in error.message


def test_a_vm_with_a_device_that_the_settings_do_not_name_is_not_moved() -> None:
    """Its drive was taken off the list while it had it: its memory is locked all the same."""
    ledger = new_ledger()
    (vm_id,) = reserved(ledger, claim())
    held = ledger.holding(vm_id)
    assert held is not None
    assert tenant_of(held, ledger.pool()) is not None
    pins = tuple(VcpuPin(vcpu=vcpu, pcpu=cpu) for vcpu, cpu in enumerate(TOPOLOGY.by_cell[1].cores[3].cpus))
    domain = replace(domain_of(held), host_devices=("0000:99:00.0",))
    restarted = new_ledger()
    restarted.adopt(domain)
    ledger.follow([domain], {vm_id: held})
    for one in (ledger, restarted):
        now = one.holding(vm_id)
        assert now is not None
        assert (now.drives, now.locked, tenant_of(now, one.pool())) == (frozenset(), True, None)
        assert (
            "its memory is locked where it is" in refused(lambda one=one: one.repin([Move(vm_id, pins, (1,))])).message
        )


def test_a_drive_is_used_by_domains_and_not_by_grants() -> None:
    ledger = with_free_drives(new_ledger())
    granted, one = claim(nvme_drives=1), claim(nvme_drives=1)
    ledger.reserve(granted)
    (drive,) = ledger.holding(granted.vm_id).drives  # type: ignore[union-attr]
    ledger.release(granted.vm_id)
    assert ledger.drive_uses(drive) == 0
    ledger.mark_drive(drive, DriveState.FREE)
    reserved(ledger, one)
    assert ledger.drive_uses(drive) == 1
    domain = domain_of(ledger.holding(one.vm_id))  # type: ignore[arg-type]
    ledger.release(one.vm_id)
    ledger.adopt(domain)
    assert ledger.drive_uses(drive) == 2


# --- memory -------------------------------------------------------------------------------------------------------


def test_huge_pages_are_gone_from_ordinary_memory() -> None:
    (cell, *_) = new_ledger().cells()
    assert (cell.memory_mib, cell.memory_reserved_mib, cell.memory_free_mib) == (4000, 2124, ORDINARY_MIB)
    error = refused(lambda: new_ledger().reserve(claim(memory_mib=ORDINARY_MIB + 1)))
    assert figures(error) == ("host.no_capacity", "memory_mib", ORDINARY_MIB + 1, ORDINARY_MIB)


def test_a_huge_page_vm_takes_pages_of_its_size_and_no_ordinary_memory() -> None:
    ledger = new_ledger()
    ledger.reserve(claim(policy=NumaPolicy(huge_page_kib=2048), memory_mib=600))
    (cell, *_) = ledger.cells()
    assert cell.memory_free_mib == ORDINARY_MIB
    assert [(pages.size_kib, pages.pages_free) for pages in cell.huge_pages] == [(2048, 200), (1048576, 1)]
    error = refused(lambda: ledger.reserve(claim(policy=NumaPolicy(huge_page_kib=2048), memory_mib=402)))
    assert figures(error) == ("host.no_capacity", "huge_pages_2048_kib", 201, 200)
    assert error.details["cells"] == [0]


def test_a_host_without_pages_of_that_size_says_so() -> None:
    plain = Ledger(declare_topology("cores=4"), DISK_MIB)
    error = refused(lambda: plain.reserve(claim(policy=NumaPolicy(huge_page_kib=2048))))
    assert figures(error) == ("host.no_capacity", "huge_pages_2048_kib", 50, 0)


def test_memory_over_cells_is_whole_pages_in_each() -> None:
    ledger = new_ledger()
    wanted = claim((0, 1), NumaPolicy(huge_page_kib=2048), memory_mib=6)
    ledger.reserve(wanted)
    held = ledger.holding(wanted.vm_id)
    assert held is not None
    assert dict(held.memory_by_cell_mib) == {0: 4, 1: 2}


def test_part_of_a_page_is_refused() -> None:
    error = refused(lambda: new_ledger().reserve(claim(policy=NumaPolicy(huge_page_kib=1048576), memory_mib=1025)))
    assert error.code == "request.invalid"


# --- cores of different width -------------------------------------------------------------------------------------


def test_totals_count_the_cores_that_were_given_and_not_those_that_were_expected() -> None:
    """Ten vCPUs would take three cores of four threads; here one of a single thread lies between them."""
    document = Path(__file__).parent / "fixtures" / "capabilities" / "ppc64le-offline-siblings.xml"
    ledger = Ledger(parse_capabilities(document.read_text()), DISK_MIB)
    wanted = claim((0,), vcpus=10)
    ledger.reserve(wanted)
    assert ledger.totals().cores_free == sum(cell.cores_free for cell in ledger.cells()) == 3
    ledger.release(wanted.vm_id)
    assert ledger.totals().cores_free == ledger.totals().cores == 7


# --- resize -------------------------------------------------------------------------------------------------------


def test_what_a_shrinking_vm_gives_up_stays_its_own_until_it_is_settled() -> None:
    ledger = new_ledger()
    (vm_id,) = reserved(ledger, claim(vcpus=6, memory_mib=ORDINARY_MIB))
    ledger.resize(vm_id, 2, 100)
    assert figures(refused(lambda: ledger.reserve(claim())))[1:] == ("vcpus", 2, 0)
    ledger.revert(vm_id)
    held = ledger.holding(vm_id)
    assert held is not None
    assert (held.vcpus, held.memory_mib, len(held.cpus)) == (6, ORDINARY_MIB, 6)
    ledger.resize(vm_id, 2, 100)
    ledger.commit(vm_id)
    ledger.reserve(claim(vcpus=4, memory_mib=ORDINARY_MIB - 100))


def test_growth_that_finds_no_room_names_what_there_is_and_changes_nothing() -> None:
    ledger = new_ledger()
    (vm_id, _) = reserved(ledger, claim(), claim())
    before = ledger.holding(vm_id)
    assert figures(refused(lambda: ledger.resize(vm_id, 6, 100)))[1:] == ("vcpus", 6, 4)
    assert figures(refused(lambda: ledger.resize(vm_id, 2, ORDINARY_MIB)))[1:] == (
        "memory_mib", ORDINARY_MIB, ORDINARY_MIB - 100,
    )  # fmt: skip
    assert ledger.holding(vm_id) == before


def test_one_change_at_a_time_and_none_for_strangers() -> None:
    ledger = new_ledger()
    (vm_id,) = reserved(ledger, claim())
    ledger.resize(vm_id, 4, 100)
    assert refused(lambda: ledger.resize(vm_id, 6, 100)).code == "vm.wrong_state"
    by_hand = Domain(uuid.uuid4(), "hand", VmState.RUNNING, 2, 100)
    ledger.adopt(by_hand)
    assert refused(lambda: ledger.resize(by_hand.vm_id, 4, 100)).code == "vm.wrong_state"
    assert refused(lambda: ledger.resize(uuid.uuid4(), 4, 100)).code == "vm.not_found"


# --- repin --------------------------------------------------------------------------------------------------------


def pins_of(*pcpus: int) -> tuple[VcpuPin, ...]:
    return tuple(VcpuPin(vcpu=vcpu, pcpu=pcpu) for vcpu, pcpu in enumerate(pcpus))


def test_a_move_takes_memory_along_and_frees_its_cell_once_settled() -> None:
    ledger = new_ledger()
    (vm_id,) = reserved(ledger, claim(memory_mib=500))
    plan = ledger.repin([Move(vm_id, pins_of(7, 27), (1,))])[vm_id]
    assert (plan.cells, plan.emulator_cpus) == ((1,), (5, 25))
    assert [cell.memory_free_mib for cell in ledger.cells()[:2]] == [ORDINARY_MIB - 500] * 2
    ledger.commit(vm_id)
    assert [cell.memory_free_mib for cell in ledger.cells()[:2]] == [ORDINARY_MIB, ORDINARY_MIB - 500]
    assert [cell.cores_free for cell in ledger.cells()[:2]] == [3, 2]


@pytest.mark.parametrize(
    ("pcpus", "cells", "code"),
    [
        ((2, 22), (0,), "vm.wrong_state"),  # another VM's core
        ((22, 3), (0,), "vm.wrong_state"),  # its sibling
        ((0, 20), (0,), "request.invalid"),  # reserved
        ((1, 21), (0,), "request.invalid"),  # shared
        ((7, 27), (0,), "request.invalid"),  # outside the cells named
        ((7, 7), (1,), "request.invalid"),  # twice
        ((7,), (1,), "request.invalid"),  # too few
        ((7, 27), (9,), "request.invalid"),  # no such cell
        ((7, 12), (1, 2), "request.invalid"),  # two sockets
    ],
)
def test_moves_that_break_a_rule_are_refused_whole(pcpus: tuple[int, ...], cells: tuple[int, ...], code: str) -> None:
    ledger = new_ledger()
    _, vm_id, other = reserved(ledger, claim(), claim(), claim((3,)))
    before = ledger.totals(), ledger.cells(), ledger.holdings()
    moves = [Move(other, pins_of(18, 38), (3,)), Move(vm_id, pins_of(*pcpus), cells)]
    assert refused(lambda: ledger.repin(moves)).code == code
    assert (ledger.totals(), ledger.cells(), ledger.holdings()) == before


def test_a_move_to_a_cell_without_the_memory_is_refused() -> None:
    ledger = new_ledger()
    vm_id, _ = reserved(ledger, claim(memory_mib=500), claim((1,), memory_mib=ORDINARY_MIB - 400))
    error = refused(lambda: ledger.repin([Move(vm_id, pins_of(8, 28), (1,))]))
    assert figures(error) == ("host.no_capacity", "memory_mib", 500, 400)


def test_traded_places_are_reverted_together_and_never_alone() -> None:
    ledger = new_ledger()
    one, other = reserved(ledger, claim((0,)), claim((1,)))
    ledger.repin([Move(one, pins_of(7, 27), (1,)), Move(other, pins_of(2, 22), (0,))])
    assert refused(lambda: ledger.revert(one)).code == "vm.wrong_state"
    ledger.revert(one, other)
    held = ledger.holding(one)
    assert held is not None
    assert sorted(held.cpus) == [2, 22]


def test_a_guest_that_was_shown_its_cells_stays_on_them() -> None:
    ledger = new_ledger()
    (vm_id,) = reserved(ledger, claim((0, 1), NumaPolicy(multi_cell=True), vcpus=4))
    held = ledger.holding(vm_id)
    assert held is not None
    assert refused(lambda: ledger.repin([Move(vm_id, held.plan.pins, (0, 1))])).code == "request.invalid"


# --- rebuilding ---------------------------------------------------------------------------------------------------


def test_memory_that_can_lie_anywhere_makes_way_for_memory_that_can_not() -> None:
    """The VM over two cells is read first; both ledgers agree on what is free."""
    ledger = new_ledger()
    full, wide = claim((1,), memory_mib=ORDINARY_MIB), claim((0, 1), memory_mib=600)
    vm_ids = reserved(ledger, full, wide)
    holdings = [held for vm_id in reversed(vm_ids) if (held := ledger.holding(vm_id))]
    rebuilt = new_ledger()
    rebuilt.follow(map(domain_of, holdings))
    assert rebuilt.cells() == ledger.cells()


def test_cells_that_a_guest_was_shown_tell_how_wide_its_cores_are() -> None:
    """By its pins alone, on one core of eight threads since it shrank, they could be six wide."""
    topology = declare_topology("sockets=2,cells=1,cores=6,threads=8,memory_mib=4000")

    def ledger_of_wide_cores() -> Ledger:
        return Ledger(topology, DISK_MIB, reserved_cores_per_cell=0, reserved_memory_per_cell_mib=100)

    ledger = ledger_of_wide_cores()
    wide = claim((0, 1), NumaPolicy(multi_cell=True), vcpus=16, max_vcpus=18)
    (vm_id,) = reserved(ledger, wide)
    ledger.resize(vm_id, 6, 100)
    ledger.commit(vm_id)
    held = ledger.holding(vm_id)
    assert held is not None
    assert [cell.vcpus for cell in held.plan.guest_cells] == [(*range(8), 16, 17), tuple(range(8, 16))]
    rebuilt = ledger_of_wide_cores()
    rebuilt.follow([domain_of(held)])
    again = rebuilt.holding(vm_id)
    assert again is not None
    assert again.plan == held.plan
    assert again.plan.threads_per_core == 2


def test_the_cpus_a_domain_was_found_on_are_granted_to_nobody() -> None:
    """Its pins were changed by hand before the agent started: it holds what it was granted and where it is."""
    ledger = new_ledger()
    (vm_id,) = reserved(ledger, claim())
    held = ledger.holding(vm_id)
    assert held is not None
    drifted = replace(domain_of(held), pins=pins_of(3, 4))
    rebuilt = new_ledger()
    rebuilt.follow([drifted])
    (finding,) = rebuilt.audit([drifted])
    assert (finding.kind, finding.granted, finding.found) == (FindingKind.PINS_DIFFER, (2, 22), (3, 4))
    assert figures(refused(lambda: rebuilt.reserve(claim())))[1:] == ("vcpus", 2, 0)
    assert rebuilt.release(vm_id)
    assert rebuilt.cells() == new_ledger().cells()


def test_a_picture_older_than_a_move_does_not_undo_it() -> None:
    ledger = new_ledger()
    (vm_id,) = reserved(ledger, claim())
    held_before = ledger.held()
    old = domain_of(held_before[vm_id])
    ledger.repin([Move(vm_id, pins_of(7, 27), (1,))])
    ledger.commit(vm_id)
    ledger.follow([old], held_before)
    assert sorted(ledger.held()[vm_id].cpus) == [7, 27]
    ledger.follow([old], ledger.held())
    assert sorted(ledger.held()[vm_id].cpus) == [2, 7, 22, 27], "it is seen there now, and its grant is elsewhere"


def test_a_domain_made_by_hand_is_followed_as_it_changes() -> None:
    ledger = new_ledger()
    by_hand = Domain(uuid.uuid4(), "hand", VmState.RUNNING, 2, 300, pins_of(2), (0,))
    ledger.follow([by_hand])
    changed = replace(by_hand, memory_mib=500, pins=pins_of(7), memory_cells=(1,))
    ledger.follow([changed], ledger.held())
    assert [cell.cores_free for cell in ledger.cells()] == [3, 2, 3, 3]
    assert [cell.memory_free_mib for cell in ledger.cells()[:2]] == [ORDINARY_MIB, ORDINARY_MIB - 500]
    ledger.follow([], ledger.held())
    assert (ledger.totals(), ledger.cells()) == (new_ledger().totals(), new_ledger().cells())
