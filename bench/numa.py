# SPDX-License-Identifier: Apache-2.0
"""How often a plan leaves a whole cell free: ours, the blog's greedy, and the best there is, on the same hosts."""

from __future__ import annotations

import random
import time

from bench.figures import Figures
from bench.numa_exact import Sockets, best_outcome
from ppec_agentd.numa import CpuPool
from ppec_agentd.numa.packing import Packing, Room, first_socket, pack, pack_by
from ppec_agentd.topology import declare_topology

HOSTS = 300
SHAPES = ((2, 1, 6), (2, 2, 4), (1, 4, 4), (4, 1, 4))  # sockets, cells per socket, cores per cell


def run(figures: Figures) -> None:
    """The hosts differ in shape, in what is taken, and in what is asked of them; they are the same at each run."""
    dice = random.Random(20)
    ours_whole = greedy_whole = best_whole = ours_best = worse = 0
    planning_s = 0.0
    for _ in range(HOSTS):
        pool, sizes = _host(dice)
        best = _best(pool, sizes)
        started = time.perf_counter()
        ours = pack(pool, sizes)
        planning_s += time.perf_counter() - started
        greedy = pack_by(pool, sizes, first_socket)
        ours_whole += ours.room.whole_cells > 0
        greedy_whole += greedy.room.whole_cells > 0
        best_whole += best.whole_cells > 0
        ours_best += ours.room == best
        worse += ours.room < greedy.room
        _refuse_better_than_best(ours, best)
    figures.add("numa.whole_cell.ours", ours_whole / HOSTS, "of hosts", bar="no less than the greedy")
    figures.add("numa.whole_cell.greedy", greedy_whole / HOSTS, "of hosts")
    figures.add("numa.whole_cell.best", best_whole / HOSTS, "of hosts")
    figures.add("numa.worse_than_greedy", worse, "hosts", bar="0")
    figures.add("numa.as_good_as_best", ours_best / HOSTS, "of hosts")
    figures.add("numa.plan_of_a_host", planning_s / HOSTS * 1000, "ms")


def _host(dice: random.Random) -> tuple[CpuPool, list[int]]:
    """A host with up to a third of its cores taken, asked for about what is left."""
    sockets, cells, cores = dice.choice(SHAPES)
    topology = declare_topology(f"sockets={sockets},cells={cells},cores={cores},threads=2")
    every = list(topology.cores)
    taken = dice.sample(every, dice.randrange(len(every) // 3 + 1))
    pool = CpuPool(topology, 0).take(cpu for core in taken for cpu in core.cpus)
    room = 2 * (len(every) - len(taken))
    sizes: list[int] = []
    target = room * dice.uniform(0.3, 0.9)
    while sum(sizes) < target:
        sizes.append(2 * dice.randint(1, cores))
    return pool, sizes


def _best(pool: CpuPool, sizes: list[int]) -> Room:
    cells_of = [[cell for cell in pool.topology.cells if cell.socket == socket] for socket in pool.topology.sockets]
    whole: Sockets = tuple(tuple(len(pool.usable_of(cell)) for cell in cells) for cells in cells_of)
    free: Sockets = tuple(tuple(len(pool.free_of(cell)) for cell in cells) for cells in cells_of)
    placed, sockets, cells, largest = best_outcome(whole, free, [size // 2 for size in sizes])
    return Room(2 * placed, sockets, cells, 2 * largest)


def _refuse_better_than_best(ours: Packing, best: Room) -> None:
    if ours.room > best:
        raise AssertionError(f"a plan that leaves {ours.room} is better than the best, {best}")
