# SPDX-License-Identifier: Apache-2.0
"""Small fleets and requests of every kind, made from a seed.

A seed in place of hypothesis' own draws: a fleet is some hundred draws, and drawing takes longer than planning.
"""

from __future__ import annotations

import random
from typing import Any
from uuid import UUID

import numpy as np

from ppec_contract.api_placement import Policy
from ppec_contract.vm import CpuPolicy, NumaPolicy, SmtPolicy
from ppec_orchestrator.placement.filling import Cells
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState, PoolState, SeatedVm
from ppec_orchestrator.placement.request import (
    ANY_NETWORK,
    Group,
    Level,
    Network,
    PlanRequest,
    Profile,
    Shape,
    VmRequest,
    Where,
)

GROUPS = (
    Group("apart", level=Level.HOST),
    Group("racks", level=Level.RACK),
    Group("near", apart=False, level=Level.RACK),
    Group("same", apart=False, level=Level.HOST),
    Group("rather-apart", hard=False),
    Group("rather-near", apart=False, level=Level.RACK, hard=False),
)
NUMAS = (
    NumaPolicy(),
    NumaPolicy(),
    NumaPolicy(smt=SmtPolicy.ISOLATE),
    NumaPolicy(smt=SmtPolicy.REQUIRE),
    NumaPolicy(cpus=CpuPolicy.SHARED),
    NumaPolicy(multi_cell=True),
    NumaPolicy(multi_cell=True, smt=SmtPolicy.ISOLATE),
    NumaPolicy(huge_page_kib=2048),
)
PLACES = (
    Where(),
    Where(),
    Where(cluster="c1"),
    Where(rack="r0"),
    Where(labels=frozenset({("disk", "ssd")})),
    Where(without=frozenset({("disk", "")})),
)
NETWORKS: tuple[tuple[Network, ...], ...] = (
    ANY_NETWORK,
    ANY_NETWORK,
    ANY_NETWORK,
    (frozenset({1}),),
    (None, frozenset({1, 3})),
    (frozenset({2, 3}), frozenset({1})),
    (),
)
FIXED: tuple[tuple[frozenset[int], ...], ...] = ((), (), (), (frozenset({1}),), (frozenset({2, 3}), frozenset({1})))
# More than any cell has.
_NEVER = 1 << 40
_MOST = {"cores": 8, "shared_vcpus": 8, "pages_2m": 2048, "pages_1g": 2, "nvme": 2}


def a_cell(rng: random.Random, number: int) -> CellState:
    sizes = {name: rng.randint(0, most) for name, most in _MOST.items()}
    free = {f"{name}_free": rng.randint(0, size) for name, size in sizes.items()}
    memory_mib = rng.randint(0, 8192)
    return CellState(
        cell=number,
        socket=number // 2,
        threads_per_core=rng.choice((1, 2, 2)),
        memory_mib=memory_mib,
        memory_free_mib=rng.randint(0, memory_mib),
        shared_cpus=rng.choice((0, 4)),
        cores_reserved=1,
        memory_reserved_mib=512,
        **sizes,
        **free,
    )


def a_host(rng: random.Random, number: int) -> HostState:
    members = tuple(rng.sample(GROUPS, rng.choice((0, 0, 1, 2))))
    tiny = Profile(Shape(2, 64, 1), "x86_64")
    seated = (SeatedVm(UUID(int=1000 + number), f"old-{number}", tiny, (0,), members, movable=False),)
    return HostState(
        host_id=number,
        name=f"h{number}",
        datacentre="d1",
        cluster=rng.choice(("c1", "c1", "c2")),
        rack=f"r{number % 3}",
        vrf="v1",
        architecture=rng.choice(("x86_64",) * 5 + ("aarch64",)),
        cells=tuple(a_cell(rng, each) for each in range(rng.randint(1, 4))),
        disk_mib=300,
        disk_free_mib=rng.randint(0, 300),
        vms=seated if members else (),
        live=rng.random() < 0.9,
        draining=rng.random() < 0.1,
        prefixes=rng.choice((((1,),), ((1,),), ((2, 1), (3,)), ())),
        labels=rng.choice(({}, {"disk": "ssd"}, {"disk": "hdd", "gen": "4"})),
        pools=rng.choice(({}, {"fast": PoolState(200, 100)})),
    )


def a_fleet(rng: random.Random, most_hosts: int = 6) -> Fleet:
    hosts = [a_host(rng, number) for number in range(rng.randint(1, most_hosts))]
    return Fleet.build(hosts, {1: rng.randint(0, 12), 3: 4})


def a_profile(rng: random.Random) -> Profile:
    numa = rng.choice(NUMAS)
    shape = Shape(
        vcpus=rng.choice((2, 2, 4, 6, 8)),
        memory_mib=rng.choice((64, 1024, 2048) if numa.huge_page_kib else (64, 1024, 2048, 3000)),
        disk_mib=rng.choice((1, 50, 120)),
        numa=numa,
        pool=rng.choice(("", "", "", "fast")),
        nvme=rng.choice((0, 0, 0, 1, 2)),
    )
    return Profile(shape, "x86_64", rng.choice(PLACES), networks=rng.choice(NETWORKS), fixed=rng.choice(FIXED))


def a_request(rng: random.Random, most_vms: int = 8, **fixed: Any) -> PlanRequest:
    kinds = [a_profile(rng) for _ in range(rng.randint(1, 3))]
    vms = tuple(
        VmRequest(
            vm_id=UUID(int=number + 1),
            name=f"vm-{number}",
            profile=rng.choice(kinds),
            excluded_hosts=frozenset({"h0"}) if rng.random() < 0.2 else frozenset(),
            groups=tuple(rng.sample(GROUPS, rng.choice((0, 0, 1, 2)))),
            priority=rng.choice((0, 0, 0, 5)),
        )
        for number in range(rng.randint(1, most_vms))
    )
    choices: dict[str, Any] = {
        "policy": rng.choice(list(Policy)),
        "all_or_nothing": rng.random() < 0.5,
        "batch_hosts": rng.choice(({}, {"h1": 2})),
    }
    return PlanRequest(vms, **(choices | fixed))


def some_cells(rng: random.Random, *, disk: int) -> tuple[Cells, list[int]]:
    """A few hosts of one or two cells; kinds that some cells can't serve, and that take more CPUs in others."""
    hosts = rng.randint(1, 3)
    host = sorted(rng.choices(range(hosts), k=rng.randint(hosts, 4)))
    kinds = rng.randint(1, 3)
    needs = [
        [
            [_NEVER, _NEVER] if rng.random() < 0.15 else [rng.choice((cpus, cpus, 2 * cpus)), memory]
            for cpus, memory in ((1, 3), (2, 2), (3, 5))[:kinds]
        ]
        for _ in host
    ]
    cells = Cells(
        room=np.array([[rng.randint(0, 6), rng.randint(0, 9)] for _ in host], dtype=np.int64),
        needs=np.array(needs, dtype=np.int64),
        host=np.array(host, dtype=np.int64),
        disk=np.array([[rng.randint(disk // 2, disk)] for _ in range(hosts)], dtype=np.int64),
        disk_needs=np.array([[number] for number in range(kinds)], dtype=np.int64),
    )
    return cells, [rng.randint(0, 3) for _ in range(kinds)]
