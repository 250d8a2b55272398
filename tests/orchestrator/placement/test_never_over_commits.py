# SPDX-License-Identifier: Apache-2.0
"""No plan takes more than there is, of anything that runs out: cores, shared vCPUs, memory, huge pages and NVMe drives
of a cell, a host's disk and its pools, the addresses of prefixes. Counted by rules that the planner has no part in."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from math import ceil
from uuid import UUID

from hypothesis import given, settings
from hypothesis import strategies as st

from ppec_contract.api_placement import Policy
from ppec_orchestrator.placement.fleet import Fleet, PoolState
from ppec_orchestrator.placement.plan import Plan
from ppec_orchestrator.placement.planner import plan
from ppec_orchestrator.placement.request import Network, PlanRequest, Profile, VmRequest

from .occupied import a_profile, an_occupied_fleet, of_one_cell, some_groups

PREFIXES = (1, 2, 3, 4)
SERVED = ((), ((1,),), ((1, 2),), ((2, 1), (3,)), ((4,), (3,)))
NETWORKS: tuple[tuple[Network, ...], ...] = (
    (None,), (None,), (None, None), (), (frozenset({2}),), (frozenset({1, 2}), None),
    (frozenset({3}), frozenset({2, 3})),
)  # fmt: skip


def a_fleet(rng: random.Random) -> Fleet:
    """Of prefixes without a count there is no end."""
    fleet = an_occupied_fleet(rng, most_hosts=5, clusters=("c1", "c2"), most_cells=3, size=2)
    hosts = []
    for host in fleet.hosts:
        drives = [rng.choice((0, 0, 1, 2)) for _ in host.cells]
        cells = [replace(cell, nvme=n, nvme_free=n) for cell, n in zip(host.cells, drives, strict=True)]
        pools = {"san": PoolState(50, rng.choice((0, 10, 30)))} if rng.random() < 0.5 else {}
        hosts.append(
            replace(
                host, cells=tuple(cells), pools=pools, prefixes=rng.choice(SERVED), disk_free_mib=rng.choice((20, 60))
            )
        )
    return Fleet.build(hosts, {prefix: rng.randint(0, 4) for prefix in PREFIXES if rng.random() < 0.7})


def a_batch(rng: random.Random) -> PlanRequest:
    profiles = [_with_more(rng, a_profile(rng)) for _ in range(rng.randint(1, 4))]
    vms = tuple(
        VmRequest(
            UUID(int=n + 1), f"vm-{n}", rng.choice(profiles), groups=some_groups(rng), priority=rng.choice((0, 0, 1))
        )
        for n in range(rng.randint(1, 14))
    )
    mode = rng.choice(({}, {"all_or_nothing": True}, {"most_vcpus": True}))
    return PlanRequest(vms, rng.choice(list(Policy)), most_moves=rng.choice((0, 0, 2)), **mode)


def _with_more(rng: random.Random, profile: Profile) -> Profile:
    shape = replace(profile.shape, pool=rng.choice(("", "", "san")), nvme=rng.choice((0, 0, 0, 1, 2)))
    return replace(profile, shape=shape, networks=rng.choice(NETWORKS))


@settings(max_examples=400)
@given(st.integers(0, 2**32))
def test_a_plan_takes_no_more_than_there_is_of_anything(seed: int) -> None:
    rng = random.Random(seed)
    fleet, request = a_fleet(rng), a_batch(rng)
    result = plan(fleet, request)
    assert {each.vm_id for each in (*result.placed, *result.refused)} == {vm.vm_id for vm in request.vms}
    asked = {vm.vm_id: vm for vm in request.vms}
    _assert_hosts_hold(fleet, result, asked)
    assert _addresses_are_there(fleet, result, asked)


def _assert_hosts_hold(fleet: Fleet, result: Plan, asked: dict[UUID, VmRequest]) -> None:
    rows = {host.name: host for host in fleet.hosts}
    taken: Counter[tuple[str, int | str, str]] = Counter()
    for place in result.placed:
        shape, host = asked[place.vm_id].profile.shape, rows[place.host]
        cells = [cell for cell in host.cells if cell.cell in place.cells]
        assert len(cells) == len(place.cells) > 0
        for cell in cells:
            part = of_one_cell(shape, cell, len(cells))
            assert part is not None
            part["nvme"] = ceil(shape.nvme / len(cells))
            taken.update({(host.name, cell.cell, name): amount for name, amount in part.items()})
        taken[host.name, shape.pool, "disk"] += shape.disk_mib
    for move in result.moves:
        vm = next(each for each in rows[move.host].vms if each.vm_id == move.vm_id)
        for cells, sign in ((move.cells_before, -1), (move.cells_after, 1)):
            for cell in (each for each in rows[move.host].cells if each.cell in cells):
                for name, amount in (of_one_cell(vm.profile.shape, cell, len(cells)) or {}).items():
                    taken[move.host, cell.cell, name] += sign * amount
    for (name, where, what), amount in taken.items():
        host = rows[name]
        if what != "disk":
            cell = next(each for each in host.cells if each.cell == where)
            free = getattr(cell, "memory_free_mib" if what == "memory_mib" else f"{what}_free")
        else:
            free = host.pools[where].free_mib if where else host.disk_free_mib
        assert amount <= max(free, 0), (name, where, what)


def _addresses_are_there(fleet: Fleet, result: Plan, asked: dict[UUID, VmRequest]) -> bool:
    """Whether each address that the VMs need can be of a prefix that serves its host, none of them giving more than it
    has: a matching, found by augmenting paths."""
    prefixes = {host.name: host.prefixes for host in fleet.hosts}
    needs: list[tuple[int, ...]] = []
    for place in result.placed:
        mine = prefixes[place.host]
        for network in asked[place.vm_id].profile.networks:
            one_each = mine if network is None else ((*(p for family in mine for p in family if p in network),),)
            needs += one_each
    given: dict[int, list[int]] = {prefix: [] for prefix in PREFIXES}

    def has_one(need: int, tried: set[int]) -> bool:
        for prefix in needs[need]:
            if prefix in tried:
                continue
            tried.add(prefix)
            room = fleet.free_addresses.get(prefix, len(needs))
            if len(given[prefix]) < room:
                given[prefix].append(need)
                return True
            for other in list(given[prefix]):
                if has_one(other, tried):
                    given[prefix].remove(other)
                    given[prefix].append(need)
                    return True
        return False

    return all(has_one(need, set()) for need in range(len(needs)))
