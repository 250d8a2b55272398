# SPDX-License-Identifier: Apache-2.0
"""The ledger with every policy: no interleaving of reserve, resize, repin, commit, revert, release and crash leaks or
books twice."""

from __future__ import annotations

import uuid
from collections import Counter
from dataclasses import replace
from typing import Any

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ppec_agentd.ledger import Holding, Move
from ppec_agentd.numa import PinRequest, plan_pins
from ppec_contract.errors import PpecError
from ppec_contract.vm import CpuPolicy, NumaPolicy, SmtPolicy, VcpuPin

from .ledger_host import ORDINARY_MIB, TOPOLOGY, claim, domain_of, new_ledger

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
        self.ledger = new_ledger()
        # vCPUs and memory now, and before the pending change.
        self.sizes: dict[uuid.UUID, tuple[int, int]] = {}
        self.before: dict[uuid.UUID, tuple[int, int]] = {}
        self.committed: set[uuid.UUID] = set()

    def some(self, data: Any) -> uuid.UUID | None:
        return data.draw(st.sampled_from(sorted(self.sizes))) if self.sizes else None

    def picture(self) -> object:
        return self.ledger.totals(), self.ledger.cells(), sorted(self.ledger.holdings(), key=lambda held: held.vm_id)

    @rule(
        policy=st.sampled_from(POLICIES),
        cells=st.sampled_from([(0,), (1,), (0, 1), (2,), (3,), (2, 3)]),
        vcpus=st.sampled_from([2, 4, 6, 8, 12]),
        pages=st.integers(1, 400),
        growth=st.sampled_from([0, 2, 4]),
        pool=st.sampled_from(["", "fast"]),
    )
    def reserve(
        self, policy: NumaPolicy, cells: tuple[int, ...], vcpus: int, pages: int, growth: int, pool: str
    ) -> None:
        memory_mib = 1024 if policy.huge_page_kib == 1048576 else 2 * pages
        if policy.multi_cell:
            cells = (0, 1, 2, 3)[: len(cells) * 2]
        most = vcpus + growth if growth else 0
        wanted = claim(cells, policy, pool, vcpus=vcpus, memory_mib=memory_mib, max_vcpus=most, disk_mib=30)
        before = self.picture()
        try:
            self.ledger.reserve(wanted)
        except PpecError as refusal:
            assert refusal.code in REFUSALS  # noqa: PT017 - a refusal is one of two fair answers
            assert self.picture() == before
        else:
            self.sizes[wanted.vm_id] = vcpus, memory_mib

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
        if held is None or held.policy.multi_cell:
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
            if not held.policy.multi_cell and not held.pending and held.policy.cpus is CpuPolicy.DEDICATED
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
        self.ledger = new_ledger()
        self.ledger.follow(domain_of(held) for held in there)
        for held in there:
            rebuilt = self.ledger.holding(held.vm_id)
            assert rebuilt is not None
            assert (rebuilt.plan.pins, rebuilt.cpus) == (held.plan.pins, held.cpus)
            assert rebuilt.plan.shared_cpus == held.plan.shared_cpus
            assert [c.vcpus for c in rebuilt.plan.guest_cells] == [c.vcpus for c in held.plan.guest_cells]
            assert rebuilt.plan.emulator_cpus == held.plan.emulator_cpus

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

    @invariant()
    def nothing_is_shared_or_leaked(self) -> None:
        holdings = self.ledger.holdings()
        assert {held.vm_id for held in holdings} == set(self.sizes)
        assert {held.vm_id for held in holdings if held.pending} == set(self.before)
        users = Counter(cpu for held in holdings for cpu in held.kept().cpus)
        assert not [cpu for cpu, count in users.items() if count > 1], "a CPU is held twice"
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
            shared = sum(held.shared_by_cell.get(cell.cell, 0) for held in kept)
            assert cell.shared_vcpus - cell.shared_vcpus_free == shared
            assert (cell.cores_reserved, cell.cores_shared, cell.shared_vcpus) == (2, 1, 6)

    def teardown(self) -> None:
        for vm_id in list(self.sizes):
            self.ledger.release(vm_id)
        assert self.ledger.totals() == new_ledger().totals()
        assert self.ledger.cells() == new_ledger().cells()


LedgerChanges.TestCase.settings = hypothesis_settings(max_examples=80, stateful_step_count=40, deadline=None)
TestLedgerChanges = LedgerChanges.TestCase
