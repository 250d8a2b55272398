# SPDX-License-Identifier: Apache-2.0
"""The ledger with every policy: no interleaving of reserve, resize, repin, commit, revert, release and crash leaks or
books twice."""

from __future__ import annotations

import itertools
import uuid
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ppec_agentd.hypervisor import Domain, DomainMetadata
from ppec_agentd.ledger import Claim, FindingKind, Holding, Ledger, Move
from ppec_agentd.numa import PinRequest, plan_pins
from ppec_agentd.topology import declare_topology, parse_capabilities
from ppec_contract.errors import PpecError
from ppec_contract.vm import CpuPolicy, NumaPolicy, SmtPolicy, VcpuPin, VmState

TOPOLOGY = declare_topology("sockets=2,cells=2,cores=5,threads=2,memory_mib=4000,huge_2m=500,huge_1g=1")
ORDINARY_MIB = 4000 - 1000 - 1024 - 100
DISK_MIB = 5000
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
_numbers = itertools.count(1)


def new_ledger() -> Ledger:
    return Ledger(
        TOPOLOGY,
        DISK_MIB,
        reserved_cores_per_cell=1,
        reserved_memory_per_cell_mib=100,
        shared_cores_per_cell=1,
        shared_vcpus_per_cpu=3,
    )


def claim(cells: tuple[int, ...] = (0,), policy: NumaPolicy | None = None, **sizes: int) -> Claim:
    number = next(_numbers)
    amounts = {"vcpus": 2, "memory_mib": 100, "disk_mib": 10} | sizes
    return Claim(uuid.UUID(int=number), f"vm-{number}", cells=cells, policy=policy or NumaPolicy(), **amounts)


def domain_of(held: Holding) -> Domain:
    """The domain that a VM's definition and metadata make, as it is after a crash."""
    plan = held.plan
    metadata = DomainMetadata(
        held.vm_id, held.name, "op", plan.cells, held.vcpus, held.memory_mib, held.disk_mib, "", plan.pins,
        held.policy, held.max_vcpus, held.max_memory_mib, plan.guest_cells,
    )  # fmt: skip
    return Domain(held.vm_id, held.name, VmState.RUNNING, held.vcpus, held.memory_mib, plan.pins, plan.cells, metadata)


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
    )
    def reserve(self, policy: NumaPolicy, cells: tuple[int, ...], vcpus: int, pages: int, growth: int) -> None:
        memory_mib = 1024 if policy.huge_page_kib == 1048576 else 2 * pages
        if policy.multi_cell:
            cells = (0, 1, 2, 3)[: len(cells) * 2]
        wanted = claim(cells, policy, vcpus=vcpus, memory_mib=memory_mib, max_vcpus=vcpus + growth if growth else 0)
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
        used = Counter(cores=cores, disk_mib=sum(held.disk_mib for held in kept))
        for held in kept:
            page_mib = held.page_kib // 1024
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
