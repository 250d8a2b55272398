# SPDX-License-Identifier: Apache-2.0
"""Which hosts have addresses for a VM is known at any moment, and asked of each kind of host once."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from ppec_orchestrator.placement.addresses import AddressRoom, grants
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState
from ppec_orchestrator.placement.request import Network

SERVED = [(), ((1,),), ((2,),), ((1, 2), (3,)), ((3, 2, 1),), ((4,), (1,)), ((1,), (1, 2))]
NETWORKS: list[tuple[Network, ...]] = [(None,), (frozenset({1}),), (None, None), (None, frozenset({1, 3})), ()]


def _fleet(served: list[tuple[tuple[int, ...], ...]], left: dict[int, int]) -> Fleet:
    cells = (CellState(0, 0, 1, 8, 8, 8192, 8192),)
    hosts = [
        HostState(number, f"h{number:04}", "d", "c", "r", "v", "x86_64", cells, 1000, 1000, prefixes=prefixes)
        for number, prefixes in enumerate(served)
    ]
    return Fleet.build(hosts, left)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_what_is_kept_current_is_what_is_worked_out_anew(seed: int) -> None:
    rng = random.Random(seed)
    told: set[int] = set()
    fleet = _fleet(rng.choices(SERVED, k=8), {1: rng.randint(0, 5), 2: rng.randint(0, 5), 3: 3})
    room = AddressRoom(fleet, told.update)
    before = {networks: room.enough(networks).copy() for networks in NETWORKS}
    for _ in range(12):
        prefix = rng.choice((1, 2, 3))
        room.count(prefix, rng.randint(-min(2, room.left[prefix]), 2))
        for networks in NETWORKS:
            now = [grants(host, networks, room.left) is not None for host in fleet.hosts]
            assert room.enough(networks).tolist() == now
            assert told >= {row for row, enough in enumerate(now) if enough != before[networks][row]}
            before[networks] = room.enough(networks).copy()
        told.clear()


class _Counted(dict[int, int]):
    looks = 0

    def get(self, *asked: int) -> int:  # type: ignore[override]
        self.looks += 1
        return super().get(*asked)  # type: ignore[call-overload, no-any-return]


def test_a_prefix_that_runs_low_is_looked_at_once_for_all_its_hosts() -> None:
    room = AddressRoom(_fleet([((1,), (2,))] * 500, {1: 50, 2: 50}), lambda rows: None)
    room.left = left = _Counted(room.left)
    for networks in NETWORKS[:2]:
        assert room.enough(networks).all()
    for _ in range(50):
        room.count(1, -1)
    assert not room.enough(NETWORKS[0]).any()
    assert left.looks < 20
