# SPDX-License-Identifier: Apache-2.0
"""What the planner answers: a place and its evidence for each VM, or the counted reasons why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple
from uuid import UUID

from ppec_orchestrator.placement.demand import CELL_RESOURCES, CellResource
from ppec_orchestrator.placement.fleet import SeatedVm
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import Level


class Placement(NamedTuple):
    """One VM's place: a host and the NUMA cells it fits in. All figures but the disk's are of each of these cells:
    whole physical cores or shared vCPUs, ordinary memory or huge pages, NVMe drives. The disk is of the storage `pool`,
    or (with "") the host's own."""

    vm_id: UUID
    name: str
    host_id: int
    host: str
    cells: tuple[int, ...]
    disk_mib: int
    pool: str
    # In the order of `CELL_RESOURCES`.
    cores: int
    memory_mib: int
    shared_vcpus: int = 0
    pages_2m: int = 0
    pages_1g: int = 0
    nvme: int = 0

    @property
    def per_cell(self) -> dict[CellResource, int]:
        """What it takes of each of its cells, by every resource that cells have."""
        return {resource: getattr(self, resource) for resource in CELL_RESOURCES}


@dataclass(frozen=True, slots=True)
class Move:
    """A running VM changes cells on its host, to open one: carried out by the host's retune before the VM comes."""

    vm_id: UUID
    name: str
    host: str
    cells_before: tuple[int, ...]
    cells_after: tuple[int, ...]


class Evidence(NamedTuple):
    """Why a placement won: the `step` of the plan it was made in, over how many hosts that could take the VM, and its
    score, the lowest among them by the policy. `broken` counts the VM's soft groups that the place does not keep.
    `epoch` is the step whose figures `balanced` scored with. `moves` are what opened the cell, in the order they are
    made in, after those of earlier steps; the candidates are then the hosts that as few moves open, and the score is
    this host's after them. `searched`: VM after VM, the policy's own choice would have left others of the batch
    without a place, or the fleet less even: this is not the lowest score of its step, but part of a whole.
    """

    vm_id: UUID
    step: int
    candidates: int
    score: float
    broken: int = 0
    epoch: int = 0
    moves: tuple[Move, ...] = ()
    searched: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """A VM that fits nowhere: every host counted under the reason that turned it away, when its turn came."""

    vm_id: UUID
    name: str
    reasons: Mapping[Reason, int]
    step: int = 0

    def sentence(self) -> str:
        """`12 hosts: 8 without enough free cores, 3 draining, 1 silent`"""
        if not self.reasons:
            return "the fleet has no hosts"
        counted = sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))
        total = sum(self.reasons.values())
        hosts = "1 host" if total == 1 else f"{total} hosts"
        return f"{hosts}: " + ", ".join(f"{count} {reason.words}" for reason, count in counted)


@dataclass(frozen=True, slots=True)
class Exposed:
    """A failure domain (a host, or a rack) whose loss would leave VMs without a place, and the first of them."""

    domain: str
    level: Level
    cluster: str
    vm: str
    without_place: int


@dataclass(frozen=True, slots=True)
class Evacuation:
    """A failure domain that has VMs, and by VM the host and cells that each would restart in, were it lost; or those
    without a place, as few as were found."""

    domain: str
    level: Level
    cluster: str
    seats: Mapping[UUID, tuple[str, tuple[int, ...]]]
    without_place: tuple[SeatedVm, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """`placed` and `refused` together hold every VM of the request, each in the request's order; `evidence` is in the
    order of `placed`. `exposed` names what the rule about spare room found unprotected. `evacuations`, where the rule
    is `witnessed`, are those of the fleet after the plan, of all domains with VMs in the clusters that it touches:
    those that it comes to, and those with members of its hard groups. An exposed domain is given no seats there.
    `counted_on` are those of these clusters where the rule is required: it holds as long as their hosts stay as they
    are."""

    placed: tuple[Placement, ...]
    refused: tuple[Refusal, ...]
    evidence: tuple[Evidence, ...] = ()
    exposed: tuple[Exposed, ...] = field(default=())
    evacuations: tuple[Evacuation, ...] = field(default=())
    counted_on: tuple[str, ...] = field(default=())

    def serves(self, *, all_or_nothing: bool) -> bool:
        """Whether VMs are made of it; of a batch that needs all of its VMs a plan may still place some."""
        return bool(self.placed) and not (all_or_nothing and self.refused)

    @property
    def moves(self) -> tuple[Move, ...]:
        """All that are part of it, in the order they are made in."""
        if not any(why.moves for why in self.evidence):
            return ()
        return tuple(move for why in sorted(self.evidence, key=lambda why: why.step) for move in why.moves)
