# SPDX-License-Identifier: Apache-2.0
"""The most that any placement of a batch could do: a mixed-integer program, for fleets small enough for one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import highspy
import numpy as np

from ppec_orchestrator.placement.fleet import Fleet
from ppec_orchestrator.placement.request import Shape, VmRequest

_MOST_S = 60.0


def most_cores(fleet: Fleet, requests: Sequence[VmRequest]) -> tuple[float, float]:
    """The cores of the best placement found, whichever VMs it leaves out, and the bound that none can be beyond.

    Without groups, and every VM in one cell: x[cell, shape] VMs, within a cell's cores and memory, its host's disk, and
    how many of the shape are asked for.
    """
    wanted = Counter(request.profile.shape for request in requests)
    shapes = list(wanted)
    cores, memory = fleet.free("cores"), fleet.free("memory_mib")
    cells = [(row, column) for row in range(cores.shape[0]) for column in range(cores.shape[1])]
    model = highspy.Highs()
    model.silent()
    model.setOptionValue("time_limit", _MOST_S)
    model.setOptionValue("threads", 1)
    columns = _add_columns(model, shapes, [(int(cores[c]), int(memory[c])) for c in cells])
    for number, cell in enumerate(cells):
        mine = columns[number]
        _add_row(model, int(cores[cell]), mine, [shape.vcpus for shape in shapes])
        _add_row(model, int(memory[cell]), mine, [shape.memory_mib for shape in shapes])
    for row in range(cores.shape[0]):
        mine = np.concatenate([columns[number] for number, cell in enumerate(cells) if cell[0] == row])
        per_cell = [shape.disk_mib for shape in shapes]
        _add_row(model, int(fleet.disk_free_mib[row]), mine, per_cell * (len(mine) // len(shapes)))
    for index, shape in enumerate(shapes):
        _add_row(model, wanted[shape], columns[:, index], [1] * len(cells))
    model.changeObjectiveSense(highspy.ObjSense.kMaximize)
    model.run()
    info = model.getInfo()
    return info.objective_function_value, info.mip_dual_bound


def longest_whole(fleet: Fleet, requests: Sequence[VmRequest], at_least: int, at_most: int) -> int:
    """How many VMs from the first on have a placement that leaves none of them out. That `at_least` so many have one is
    known, and that more than `at_most` can't."""
    while at_least < at_most:
        count = (at_least + at_most + 1) // 2
        asked = sum(request.profile.shape.vcpus for request in requests[:count])
        found, bound = most_cores(fleet, requests[:count])
        if found > asked - 0.5:
            at_least = count
        elif bound < asked - 0.5:
            at_most = count - 1
        else:
            raise RuntimeError(f"of {count} VMs it was not found out whether they fit (in {_MOST_S:.0f} s at most)")
    return at_least


def _add_columns(
    model: highspy.Highs, shapes: Sequence[Shape], room: Sequence[tuple[int, int]]
) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """The columns' numbers, shape (cells, shapes); an objective of one for each vCPU."""
    for cores, memory_mib in room:
        for shape in shapes:
            model.addVar(0, min(cores // shape.vcpus, memory_mib // shape.memory_mib))
            column = model.getNumCol() - 1
            model.changeColCost(column, shape.vcpus)
            model.changeColIntegrality(column, highspy.HighsVarType.kInteger)
    return np.arange(len(room) * len(shapes), dtype=np.int32).reshape(len(room), len(shapes))


def _add_row(
    model: highspy.Highs, most: int, columns: np.ndarray[tuple[int], np.dtype[np.int32]], by: Sequence[int]
) -> None:
    model.addRow(-highspy.kHighsInf, most, len(columns), columns, np.array(by, dtype=np.float64))
