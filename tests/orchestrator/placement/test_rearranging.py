# SPDX-License-Identifier: Apache-2.0
"""VMs that make way for others of their batch, in batches too large for a search."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppec_contract.api_placement import Policy
from ppec_orchestrator.placement.checker import check
from ppec_orchestrator.placement.fitting import Fitting
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState, SeatedVm
from ppec_orchestrator.placement.improving import MOST_REARRANGED, MOST_SEARCHED
from ppec_orchestrator.placement.plan import Plan
from ppec_orchestrator.placement.planner import Planner, plan
from ppec_orchestrator.placement.rearranging import MOST_TRIES, VMS_PER_TRY, Rearranging
from ppec_orchestrator.placement.request import Group, Level, PlanRequest, Profile, Shape, VmRequest, Where
from ppec_orchestrator.placement.shelf import Shelf
from ppec_orchestrator.placement.workspace import Taken, Tenant, Workspace

from .fleets import a_fleet, a_request

MIB = 1024


def host(number: int, cores: int, memory_mib: int, rack: str = "r") -> HostState:
    """One cell without siblings, all of it free."""
    cell = CellState(0, 0, 1, cores, cores, memory_mib, memory_mib)
    name = f"h{number:04d}"
    return HostState(number, name, "d", "c", rack, "v", "x86_64", (cell,), 1000, 1000, prefixes=((1,),))


def vms(*sizes: tuple[int, int], host: str = "", groups: tuple[Group, ...] = ()) -> tuple[VmRequest, ...]:
    """Of these vCPUs and MiB, in this order."""
    where = Where(host=host) if host else Where()
    return tuple(
        VmRequest(
            UUID(int=number + 1), f"v{number}", Profile(Shape(vcpus, mib, 1), "x86_64", where), frozenset(), groups
        )
        for number, (vcpus, mib) in enumerate(sizes)
    )


def whole(fleet: Fleet, request: PlanRequest) -> Plan:
    """The plan, which the checker finds nothing to say against."""
    found = plan(fleet, request)
    assert check(fleet, request, found) == []
    return found


@pytest.mark.parametrize("all_or_nothing", [True, False])
@pytest.mark.parametrize("policy", list(Policy))
def test_small_vms_make_way_for_large_ones(policy: Policy, all_or_nothing: bool) -> None:
    """As many hosts of either size as VMs of either: but for one way, a large one is left out. Small ones were asked
    for first, and `balanced` puts them on the large hosts."""
    pairs = MOST_SEARCHED // 2 + 1
    hosts = [
        host(number, 4 if number < pairs else 2, 16 * MIB if number < pairs else 4 * MIB) for number in range(2 * pairs)
    ]
    request = PlanRequest(vms(*[(2, 2 * MIB)] * pairs, *[(4, 8 * MIB)] * pairs), policy, all_or_nothing=all_or_nothing)
    found = whole(Fleet.build(hosts), request)
    assert not found.refused
    assert set(Counter(place.host for place in found.placed).values()) == {1}


def test_one_makes_way_for_the_next_in_a_row() -> None:
    """The large one needs the place of the middle one, which then needs the place of the small one. All three hosts are
    as good for the small one, and the first two for the middle one."""
    fleet = Fleet.build([host(0, 8, 8 * MIB), host(1, 4, 8 * MIB), host(2, 2, 8 * MIB)])
    seats = [(1, (0,)), (0, (0,)), None]
    asked = vms((2, 8 * MIB), (4, 8 * MIB), (8, 8 * MIB))
    assert _rearranged(fleet, PlanRequest(asked), seats) == [(2, (0,)), (1, (0,)), (0, (0,))]


def test_three_in_a_row_are_not_looked_for() -> None:
    fleet = Fleet.build([host(0, 16, MIB), host(1, 8, MIB), host(2, 4, MIB), host(3, 2, MIB)])
    seats = [(2, (0,)), (1, (0,)), (0, (0,)), None]
    asked = vms((2, MIB), (4, MIB), (8, MIB), (16, MIB))
    assert _rearranged(fleet, PlanRequest(asked), seats) is None
    # A batch of this size is searched, and so is placed all the same.
    assert not whole(fleet, PlanRequest(asked, all_or_nothing=True)).refused


def test_hard_groups_are_kept_when_vms_make_way() -> None:
    """The small one may not stand in the rack that the last free host is in."""
    apart = (Group("apart", True, Level.RACK, True),)
    hosts = [host(0, 4, 8 * MIB, "r0"), host(1, 2, 8 * MIB, "r1"), host(2, 2, 8 * MIB, "r1")]
    (first, second) = vms((2, MIB), (2, MIB), groups=apart)
    large = VmRequest(UUID(int=9), "large", Profile(Shape(4, MIB, 1), "x86_64", Where()))
    seats = [(1, (0,)), (0, (0,)), None]
    assert _rearranged(Fleet.build(hosts), PlanRequest((first, second, large)), seats) is None
    hosts[2] = host(2, 2, 8 * MIB, "r2")
    found = _rearranged(Fleet.build(hosts), PlanRequest((first, second, large)), seats)
    assert found == [(1, (0,)), (2, (0,)), (0, (0,))]


@pytest.mark.parametrize("all_or_nothing", [True, False])
@pytest.mark.parametrize("policy", list(Policy))
def test_vms_of_one_size_make_way_where_their_groups_differ(policy: Policy, all_or_nothing: bool) -> None:
    """As many hosts as VMs, half of them in a rack that the last VM may not be in."""
    apart = Group("apart", True, Level.RACK, True)
    count = MOST_SEARCHED + 2
    seated = SeatedVm(UUID(int=9999), "there", Profile(Shape(2, MIB, 1), "x86_64", Where()), (0,), (apart,))
    full = replace(host(count, 2, MIB, "r1"), cells=(CellState(0, 0, 1, 2, 0, MIB, 0),), vms=(seated,))
    hosts = [*(host(number, 2, MIB, "r0" if number < count // 2 else "r1") for number in range(count)), full]
    *others, last = vms(*[(2, MIB)] * count)
    request = PlanRequest((*others, replace(last, groups=(apart,))), policy, all_or_nothing=all_or_nothing)
    assert not whole(Fleet.build(hosts), request).refused


def test_vms_of_earlier_batches_stay() -> None:
    """Only VMs of the batch make way; what is seated already is not the planner's to move."""
    fleet = Fleet.build([host(0, 4, 8 * MIB), host(1, 2, 8 * MIB)])
    small, large = vms((2, MIB), (4, MIB))
    pinned = VmRequest(small.vm_id, small.name, Profile(small.profile.shape, "x86_64", Where(host="h0000")))
    assert [one.name for one in whole(fleet, PlanRequest((pinned, large))).refused] == ["v1"]


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_nothing_is_left_behind(seed: int) -> None:
    rng = random.Random(seed)
    fleet = a_fleet(rng, most_hosts=6)
    request = a_request(rng, most_vms=12, all_or_nothing=bool(seed % 2), batch_hosts={})
    planner = Planner(fleet)
    before = {name: free.copy() for name, free in planner.workspace.free.items()}
    first = planner.plan(request)
    assert all((planner.workspace.free[name] == free).all() for name, free in before.items())
    assert planner.plan(request) == first
    assert check(fleet, request, first) == []


class Counting(Workspace):
    """A workspace that counts how often a VM is put somewhere."""

    takes = 0

    def take(self, row: int, columns: Sequence[int], fitting: Fitting, vm: Tenant) -> Taken:
        self.takes += 1
        return super().take(row, columns, fitting, vm)


def test_looking_for_vms_that_could_make_way_is_bounded() -> None:
    """One VM too many: each of the others fills its host, and none has room in what that leaves of another's."""
    count = MOST_REARRANGED - 1
    sizes = [(16 + 2 * (number % 7), MIB * (1 + number % 5)) for number in range(count)]
    workspace = Counting(Fleet.build([host(number, vcpus, mib) for number, (vcpus, mib) in enumerate(sizes)]))
    request = PlanRequest(vms(*sizes, (16, MIB)))
    seats = [*((number, (0,)) for number in range(count)), None]
    assert Rearranging(workspace, Shelf(workspace).current, request).seats(request.vms, seats) is None
    looks = MOST_TRIES // (count // VMS_PER_TRY)
    assert looks < count
    # Before each look but the first, the VM is put in the place of the one that is looked at.
    assert count < workspace.takes <= count + looks


def test_tries_are_bounded() -> None:
    """One VM too many: all stand apart, each has a host, and the last host has another VM of their group. But for that
    it had room for any."""
    group = Group("apart", True, Level.HOST, True)
    count = 300
    sizes = [(2 + 2 * (number % 7), MIB) for number in range(count)]
    seated = SeatedVm(UUID(int=9999), "there", Profile(Shape(2, MIB, 1), "x86_64", Where()), (0,), (group,))
    hosts = [host(number, 16, 16 * MIB) for number in range(count)]
    hosts.append(replace(host(count, 16, 16 * MIB), vms=(seated,)))
    workspace = Counting(Fleet.build(hosts))
    request = PlanRequest(vms(*sizes, (16, MIB), groups=(group,)))
    seats = [*((number, (0,)) for number in range(count)), None]
    rearranging = Rearranging(workspace, Shelf(workspace).current, request)
    assert rearranging.seats(request.vms, seats) is None
    assert MOST_TRIES // 2 < workspace.takes - count <= MOST_TRIES
    # Another arrangement to begin with has no tries of its own.
    tried = workspace.takes
    assert rearranging.seats(request.vms, seats) is None
    assert workspace.takes - tried <= count + 1


def _rearranged(
    fleet: Fleet, request: PlanRequest, seats: list[tuple[int, tuple[int, ...]] | None]
) -> list[tuple[int, tuple[int, ...]]] | None:
    workspace = Workspace(fleet)
    free = {name: left.copy() for name, left in workspace.free.items()}
    found = Rearranging(workspace, Shelf(workspace).current, request).seats(request.vms, seats)
    assert all((workspace.free[name] == left).all() for name, left in free.items())
    return found
