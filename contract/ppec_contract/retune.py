# SPDX-License-Identifier: Apache-2.0
"""Retune: what a host is asked to open, the plan it answers with, and the plan it is told to carry out.

A plan is made by the host (`PlanRetune`), shown to whoever decides, and carried out exactly as shown (`RetuneHost`) or
not at all: it names each VM's pins before and after, so a host that has moved on since refuses it.
"""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from pydantic import Field, model_validator

from ppec_contract.model import Model, VmName, digest
from ppec_contract.vm import MAX_MEMORY_MIB, CellId, MemoryMib, NumaPolicy, VcpuPin, Vcpus

MAX_MOVES = 256
MAX_MOVED_MIB = 64 * MAX_MEMORY_MIB
Moves = Annotated[int, Field(strict=True, ge=0, le=MAX_MOVES)]
Mib = Annotated[int, Field(strict=True, ge=0, le=MAX_MOVED_MIB)]


class RetuneWant(Model):
    """What is to fit: a VM of `vcpus` and `memory_mib` under `numa`, or, without `vcpus`, a whole cell to be empty.

    With `cells` only those are considered.
    """

    vcpus: Vcpus | None = None
    memory_mib: MemoryMib | None = None
    numa: NumaPolicy = Field(default_factory=NumaPolicy)
    cells: Annotated[tuple[CellId, ...], Field(max_length=16)] = ()


class RetuneBounds(Model):
    """The most a retune may do: so many moves, so much memory copied from cell to cell."""

    moves: Moves = 16
    memory_mib: Mib = 256 * 1024


class RetuneSeat(Model):
    """Where a VM sits: its pins, the cell of its cores and memory, and the CPUs of QEMU's own threads."""

    cell: CellId
    pins: Annotated[tuple[VcpuPin, ...], Field(max_length=512)]
    emulator_cpus: Annotated[tuple[int, ...], Field(max_length=512)] = ()


class RetuneMove(Model):
    """One VM changes its seat while it runs; `memory_mib` is what has to be copied."""

    vm_id: UUID
    name: VmName
    before: RetuneSeat
    after: RetuneSeat
    memory_mib: int


class CellRoom(Model):
    """What is free in a cell: whole cores, and memory on pages of the wanted size."""

    cell: CellId
    cores: int
    memory_mib: int


class RetunePlan(Model):
    """The moves, in the order in which each finds its cores free, and the room per cell before and after.

    `opened` are the cells in which the wanted VM then fits. `cheapest` is false if the search for less to move was cut
    short. A plan without moves says that it fits already.
    """

    opened: Annotated[tuple[CellId, ...], Field(max_length=16)]
    moves: Annotated[tuple[RetuneMove, ...], Field(max_length=MAX_MOVES)]
    before: Annotated[tuple[CellRoom, ...], Field(max_length=4096)]
    after: Annotated[tuple[CellRoom, ...], Field(max_length=4096)]
    cheapest: bool = True

    @model_validator(mode="after")
    def _moves_change_something(self) -> RetunePlan:
        for move in self.moves:
            if move.before.cell == move.after.cell or len(move.before.pins) != len(move.after.pins):
                raise ValueError(f"the move of VM {move.name} is no move between two cells")
        return self

    @property
    def moved_mib(self) -> int:
        return sum(move.memory_mib for move in self.moves)

    def digest(self) -> str:
        return digest(self)
