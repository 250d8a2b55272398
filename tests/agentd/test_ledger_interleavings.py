# SPDX-License-Identifier: Apache-2.0
"""The ledger with every policy: no interleaving of reserve, resize, repin, commit, revert, release and crash leaks or
books twice, nor is a drive given away that has not settled since its last VM."""

from __future__ import annotations

import uuid
from collections import Counter
from dataclasses import replace
from typing import Any

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ppec_agentd.ledger import DriveState, Holding, Move
from ppec_agentd.numa import PinRequest, plan_pins
from ppec_contract.errors import PpecError
from ppec_contract.vm import CpuPolicy, NumaPolicy, SmtPolicy, VcpuPin

from .ledger_host import CELL_BY_DRIVE, ORDINARY_MIB, TOPOLOGY, claim, domain_of, new_ledger, with_free_drives

REFUSALS = {"host.no_capacity", "vm.exceeds_socket"}
SHARED = NumaPolicy(cpus=CpuPolicy.SHARED)
POLICIES = [
    NumaPolicy(),
    NumaPolicy(smt=SmtPolicy.ISOLATE),
    NumaPolicy(smt=SmtPolicy.REQUIRE, huge_page_kib=2048),
    NumaPolicy(huge_page_kib=1048576),
    NumaPolicy(multi_cell=True),
    NumaPolicy(multi_cell=True, huge_page_kib=2048),
    SHARED,
]


class LedgerChanges(RuleBasedStateMachine):
    """The model is who asked for what last; everything else must follow from it."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = with_free_drives(new_ledger())
        # vCPUs and memory now, and before the pending change.
        self.sizes: dict[uuid.UUID, tuple[int, int]] = {}
        self.before: dict[uuid.UUID, tuple[int, int]] = {}
        self.committed: set[uuid.UUID] = set()
        # Drives erased since their last VM, and what each VM was given.
        self.settled = set(CELL_BY_DRIVE)
        self.given: dict[uuid.UUID, frozenset[str]] = {}

    def some(self, data: Any) -> uuid.UUID | None:
        return data.draw(st.sampled_from(sorted(self.sizes))) if self.sizes else None

    def picture(self) -> object:
        seen = self.ledger.totals(), self.ledger.cells(), self.ledger.drives()
        return *seen, sorted(self.ledger.holdings(), key=lambda held: held.vm_id)

    @rule(
        policy=st.sampled_from(POLICIES),
        cells=st.sampled_from([(0,), (1,), (0, 1), (2,), (3,), (2, 3)]),
        vcpus=st.sampled_from([2, 4, 6, 8, 12]),
        pages=st.integers(1, 400),
        growth=st.sampled_from([0, 2, 4]),
        pool=st.sampled_from(["", "fast"]),
        drives=st.sampled_from([0, 0, 1, 2, 3]),
    )
    def reserve(
        self, policy: NumaPolicy, cells: tuple[int, ...], vcpus: int, pages: int, growth: int, *, pool: str, drives: int
    ) -> None:
        memory_mib = 1024 if policy.huge_page_kib == 1048576 else 2 * pages
        if policy.multi_cell:
            cells = (0, 1, 2, 3)[: len(cells) * 2]
        most = vcpus + growth if growth else 0
        sizes = {"vcpus": vcpus, "memory_mib": memory_mib, "max_vcpus": most, "disk_mib": 30, "nvme_drives": drives}
        wanted = claim(cells, policy, pool, **sizes)
        before = self.picture()
        try:
            self.ledger.reserve(wanted)
        except PpecError as refusal:
            assert refusal.code in REFUSALS  # noqa: PT017 - a refusal is one of two fair answers
            assert self.picture() == before
        else:
            self.sizes[wanted.vm_id] = vcpus, memory_mib
            self._given(wanted.vm_id, cells, drives)

    def _given(self, vm_id: uuid.UUID, cells: tuple[int, ...], wanted: int) -> None:
        held = self.ledger.holding(vm_id)
        assert held is not None
        assert held.drives <= self.settled
        each = -(-wanted // len(cells))
        assert Counter(CELL_BY_DRIVE[drive] for drive in held.drives) == Counter({c: each for c in cells if each})
        self.given[vm_id] = held.drives
        self.settled -= held.drives

    @rule(drive=st.sampled_from(sorted(CELL_BY_DRIVE)), state=st.sampled_from(DriveState))
    def a_drive_settles_or_fails(self, drive: str, state: DriveState) -> None:
        """Said of a drive that a VM has, it means nothing."""
        if state is DriveState.HELD:
            return
        self.ledger.mark_drive(drive, state)
        if not any(drive in given for given in self.given.values()):
            (self.settled.add if state is DriveState.FREE else self.settled.discard)(drive)

    @rule(data=st.data(), vcpus=st.sampled_from([2, 4, 6, 8]), pages=st.integers(1, 400))
    def resize(self, data: Any, vcpus: int, pages: int) -> None:
        vm_id = self.some(data)
        if vm_id is None:
            return
        held = self.ledger.holding(vm_id)
        assert held is not None
        memory_mib = 1024 if held.page_kib == 1048576 else 2 * pages
        before = self.picture()
        try:
            plan = self.ledger.resize(vm_id, vcpus, memory_mib)
        except PpecError as refusal:
            assert refusal.code in REFUSALS | ({"vm.wrong_state"} if held.pending else set())  # noqa: PT017
            assert self.picture() == before
        else:
            assert not held.pending
            stay = min(len(plan.pins), len(held.plan.pins))
            assert plan.pins[:stay] == held.plan.pins[:stay]
            self.before[vm_id] = self.sizes[vm_id]
            self.sizes[vm_id] = vcpus, memory_mib

    @rule(data=st.data(), cell=st.sampled_from([(0,), (1,), (2,), (3,)]))
    def move(self, data: Any, cell: tuple[int, ...]) -> None:
        """To cores that are free now, as a retune plans it."""
        vm_id = self.some(data)
        held = self.ledger.holding(vm_id) if vm_id else None
        if held is None or held.policy.multi_cell or held.drives:
            return
        request = PinRequest(held.vcpus, cell, held.subject, held.policy, held.max_vcpus)
        try:
            pins = plan_pins(self.ledger.pool(), request).pins
        except PpecError:
            return
        self._repin([Move(held.vm_id, pins, cell)])

    @rule(data=st.data())
    def trade_places(self, data: Any) -> None:
        alike = [
            held
            for held in self.ledger.holdings()
            if not held.policy.multi_cell
            and not held.pending
            and not held.drives
            and held.policy.cpus is CpuPolicy.DEDICATED
        ]
        alike.sort(key=lambda held: held.vm_id)
        if len(alike) < 2:
            return
        one, other = data.draw(st.permutations(alike))[:2]
        if one.vcpus == other.vcpus and one.policy.smt == other.policy.smt:
            before = self.picture()
            if not self._repin([Move(a.vm_id, b.plan.pins, b.plan.cells) for a, b in ((one, other), (other, one))]):
                return
            # Traded places are settled together, as an executor does.
            pair = (one.vm_id, other.vm_id)
            if data.draw(st.booleans()):
                self.ledger.commit(*pair)
                self.committed.update(pair)
            else:
                self.ledger.revert(*pair)
                assert self.picture() == before
            for vm_id in pair:
                del self.before[vm_id]

    def _repin(self, moves: list[Move]) -> bool:
        before = self.picture()
        pending = any(move.vm_id in self.before for move in moves)
        try:
            plans = self.ledger.repin(moves)
        except PpecError as refusal:
            allowed = {"host.no_capacity"} | ({"vm.wrong_state"} if pending else set())
            assert refusal.code in allowed  # noqa: PT017
            assert self.picture() == before
            return False
        assert not pending
        for asked in moves:
            assert plans[asked.vm_id].pins == asked.pins
            assert plans[asked.vm_id].cells == asked.cells
            self.before[asked.vm_id] = self.sizes[asked.vm_id]
        return True

    @rule(data=st.data())
    def commit(self, data: Any) -> None:
        vm_id = self.some(data)
        if vm_id:
            self.ledger.commit(vm_id)
            self.committed.add(vm_id)
            self.before.pop(vm_id, None)

    @rule(data=st.data())
    def revert(self, data: Any) -> None:
        vm_id = self.some(data)
        if vm_id:
            self.ledger.revert(vm_id)
            self.sizes[vm_id] = self.before.pop(vm_id, self.sizes[vm_id])

    @rule(data=st.data())
    def release(self, data: Any) -> None:
        vm_id = self.some(data)
        if vm_id:
            assert self.ledger.release(vm_id)
            assert not self.ledger.release(vm_id)
            del self.sizes[vm_id]
            del self.given[vm_id]
            self.before.pop(vm_id, None)
            self.committed.discard(vm_id)

    @rule(changes_survive=st.booleans())
    def crash_and_rebuild(self, changes_survive: bool) -> None:
        """Only what was committed has a domain; a pending change reached its definition or did not."""
        there = []
        for held in self.ledger.holdings():
            if held.vm_id in self.committed:
                there.append(held if changes_survive or held.before is None else held.before)
                self.sizes[held.vm_id] = there[-1].vcpus, there[-1].memory_mib
        self.sizes = {held.vm_id: self.sizes[held.vm_id] for held in there}
        self.before = {}
        self.given = {held.vm_id: held.drives for held in there}
        self.settled = set()
        self.ledger = new_ledger()
        self.ledger.follow(domain_of(held) for held in there)
        for held in there:
            rebuilt = self.ledger.holding(held.vm_id)
            assert rebuilt is not None
            assert (rebuilt.plan.pins, rebuilt.cpus) == (held.plan.pins, held.cpus)
            assert rebuilt.plan.shared_cpus == held.plan.shared_cpus
            assert [c.vcpus for c in rebuilt.plan.guest_cells] == [c.vcpus for c in held.plan.guest_cells]
            assert rebuilt.plan.emulator_cpus == held.plan.emulator_cpus
            assert rebuilt.drives == held.drives

    @rule()
    def read_the_hypervisor(self) -> None:
        before = self.picture()
        there = [held for held in self.ledger.holdings() if held.vm_id in self.committed]
        self.ledger.follow([domain_of(held) for held in there], self.ledger.held())
        assert self.picture() == before
        assert self.ledger.audit(map(domain_of, there)) == ()

    @rule(data=st.data(), cpu=st.integers(0, 39))
    def pins_changed_by_hand_and_back(self, data: Any, cpu: int) -> None:
        """While a VM runs on a free core that it was never granted, nobody else gets it; then all is as before."""
        vm_id = data.draw(st.sampled_from(sorted(self.committed))) if self.committed else None
        if vm_id is None or vm_id in self.before or cpu in self.ledger.pool().taken:
            return
        before, held = self.picture(), self.ledger.held()
        drifted = replace(domain_of(held[vm_id]), pins=(VcpuPin(vcpu=0, pcpu=cpu),))
        others = [domain_of(one) for one in held.values() if one.vm_id != vm_id]
        self.ledger.follow([drifted, *others], held)
        assert cpu in self.ledger.pool().taken
        self.ledger.follow([domain_of(held[vm_id]), *others], self.ledger.held())
        assert self.picture() == before

    @rule(data=st.data(), drive=st.sampled_from(sorted(CELL_BY_DRIVE)))
    def a_drive_is_attached_by_hand_and_detached(self, data: Any, drive: str) -> None:
        """While a VM has a free drive that it was never given, nobody else gets it; and not before it has settled."""
        vm_id = data.draw(st.sampled_from(sorted(self.committed))) if self.committed else None
        if vm_id is None or vm_id in self.before or drive not in self.settled:
            return
        held = self.ledger.held()
        drifted = replace(domain_of(held[vm_id]), host_devices=(*sorted(held[vm_id].drives), drive, "0000:99:00.0"))
        others = [domain_of(one) for one in held.values() if one.vm_id != vm_id]
        self.ledger.follow([drifted, *others], held)
        assert self.ledger.drives()[drive] is DriveState.HELD
        self.ledger.follow([domain_of(held[vm_id]), *others], self.ledger.held())
        assert self.ledger.drives()[drive] is DriveState.SETTLING
        self.settled.discard(drive)

    @invariant()
    def nothing_is_shared_or_leaked(self) -> None:
        holdings = self.ledger.holdings()
        assert {held.vm_id for held in holdings} == set(self.sizes)
        assert {held.vm_id for held in holdings if held.pending} == set(self.before)
        users = Counter(cpu for held in holdings for cpu in held.kept().cpus)
        assert not [cpu for cpu, count in users.items() if count > 1], "a CPU is held twice"
        assert {held.vm_id: held.drives for held in holdings} == self.given
        drives = Counter(drive for held in holdings for drive in held.drives)
        assert not [drive for drive, count in drives.items() if count > 1], "a drive is held twice"
        states = self.ledger.drives()
        assert {drive for drive, state in states.items() if state is DriveState.HELD} == set(drives)
        assert {drive for drive, state in states.items() if state is DriveState.FREE} == self.settled
        for held in holdings:
            assert (held.vcpus, held.memory_mib) == self.sizes[held.vm_id]
            assert sum(held.shared_by_cell.values()) == (held.vcpus if held.policy.cpus is CpuPolicy.SHARED else 0)
            assert len(held.plan.pins) == (0 if held.policy.cpus is CpuPolicy.SHARED else held.vcpus)
            if held.plan.guest_cells:
                shown = {cell.cell: cell.memory_mib for cell in held.plan.guest_cells}
                assert shown == dict(held.memory_by_cell_mib)
        self._totals_follow(holdings, len({TOPOLOGY.core_of_cpu[cpu] for cpu in users}))
        self._cells_follow(holdings)

    def _totals_follow(self, holdings: tuple[Holding, ...], cores: int) -> None:
        totals = self.ledger.totals()
        kept = [held.kept() for held in holdings]
        used = Counter(cores=cores)
        used["nvme_drives"] = len(CELL_BY_DRIVE) - len(self.settled)
        for held in kept:
            page_mib = held.page_kib // 1024
            used[f"pool_{held.pool}_mib" if held.pool else "disk_mib"] += held.disk_mib
            name = f"huge_pages_{held.page_kib}_kib" if page_mib else "memory_mib"
            assert held.memory_mib % (page_mib or 1) == 0
            used[name] += held.memory_mib // (page_mib or 1)
            used["shared_vcpus"] += sum(held.shared_by_cell.values())
        for name, whole in totals.amounts.items():
            assert whole - totals.free[name] == used[name], name
            assert totals.free[name] >= 0, name

    def _cells_follow(self, holdings: tuple[Holding, ...]) -> None:
        kept = [held.kept() for held in holdings]
        for cell in self.ledger.cells():
            by_size = Counter[int]()
            for held in kept:
                by_size[held.page_kib] += held.memory_by_cell_mib.get(cell.cell, 0)
            assert cell.memory_free_mib == ORDINARY_MIB - by_size[0]
            assert {pages.size_kib: pages.pages - pages.pages_free for pages in cell.huge_pages} == {
                2048: by_size[2048] // 2,
                1048576: by_size[1048576] // 1024,
            }
            assert cell.nvme_drives_free == sum(CELL_BY_DRIVE[drive] == cell.cell for drive in self.settled)
            shared = sum(held.shared_by_cell.get(cell.cell, 0) for held in kept)
            assert cell.shared_vcpus - cell.shared_vcpus_free == shared
            assert (cell.cores_reserved, cell.cores_shared, cell.shared_vcpus) == (2, 1, 6)

    def teardown(self) -> None:
        for vm_id in list(self.sizes):
            self.ledger.release(vm_id)
        for drive in CELL_BY_DRIVE:
            self.ledger.mark_drive(drive, DriveState.SETTLING)
        assert self.ledger.totals() == new_ledger().totals()
        assert self.ledger.cells() == new_ledger().cells()


LedgerChanges.TestCase.settings = hypothesis_settings(max_examples=80, stateful_step_count=40, deadline=None)
TestLedgerChanges = LedgerChanges.TestCase
