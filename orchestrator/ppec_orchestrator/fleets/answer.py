# SPDX-License-Identifier: Apache-2.0
"""What `ppec plan` answers, as JSON has it. A field that is None was not asked for, and is left out there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Literal
from uuid import UUID

from ppec_contract.api_placement import ChangeView, LossView, RestartView
from ppec_contract.model import Model
from ppec_orchestrator.fleets.advice import Advised
from ppec_orchestrator.placement.fleet import Fleet
from ppec_orchestrator.placement.plan import Evidence, Move, Placement, Plan


class MovedVm(Model):
    vm: str
    host: str
    cells_before: tuple[int, ...]
    cells_after: tuple[int, ...]


class PlaceEvidence(Model):
    """`placement.plan.Evidence`: why a VM went there, for whoever plays the plan through, step by step. `moves` are
    those that opened its cells."""

    step: int
    candidates: int
    score: float
    epoch: int
    searched: bool
    broken: int
    moves: tuple[MovedVm, ...] | None = None


class PlacedVm(Model):
    vm: str
    host: str
    cells: tuple[int, ...]
    evidence: PlaceEvidence | None = None


class RefusedVm(Model):
    """`reasons` counts every host under what turned it away, in this `step`; of the `changes`, cheapest first, each
    would make the VM fit. None where they were not looked for, and where they are those of another VM, the first of its
    kind, which is then named (`changes_as`)."""

    vm: str
    reasons: dict[str, int]
    changes: tuple[ChangeView, ...] | None = None
    changes_as: str | None = None
    step: int | None = None


class ExposedDomain(Model):
    """A host or rack whose loss would leave VMs without a place, and the first of them. In answers of before `level`
    and `cluster` were told, they are those of the rule asked for and of the domain."""

    domain: str
    level: Literal["host", "rack"] | None = None
    cluster: str | None = None
    vm: str
    without_place: int


class PlanAnswer(Model):
    """`load_cpu_s` is until the planner stands ready, `plan_cpu_s` the batch, `advice_cpu_s` what would help VMs that
    were refused, `check_cpu_s` the search for `faults`, in which `domains_checked` were lost, and all that they have
    restarted where the plan says.
    `executable` as in the API's `PlanView`: whether VMs would be made of it; of a batch that needs all of its VMs none
    are if one is refused."""

    placed: tuple[PlacedVm, ...]
    refused: tuple[RefusedVm, ...]
    load_cpu_s: float
    plan_cpu_s: float
    executable: bool
    advice_cpu_s: float | None = None
    exposed: tuple[ExposedDomain, ...] | None = None
    moves: tuple[MovedVm, ...] | None = None
    evacuations: tuple[LossView, ...] | None = None
    faults: tuple[str, ...] | None = None
    domains_checked: int | None = None
    check_cpu_s: float | None = None


class Verdict(Model):
    """`ppec plan --verify`: what is wrong with a saved answer. `domains_checked` as in `PlanAnswer`."""

    placed: int
    refused: int
    faults: tuple[str, ...]
    domains_checked: int | None = None
    check_cpu_s: float


def placed(plan: Plan, *, with_evidence: bool) -> tuple[PlacedVm, ...]:
    if not with_evidence:
        return tuple([PlacedVm(vm=each.name, host=each.host, cells=each.cells) for each in plan.placed])
    return tuple([_with_evidence(*each) for each in zip(plan.placed, plan.evidence, strict=True)])


def refused(plan: Plan, advice: Iterable[Advised], *, with_evidence: bool) -> tuple[RefusedVm, ...]:
    told: dict[UUID, dict[str, Any]] = {}
    for kind in advice:
        first, *others = kind.refusals
        told[first.vm_id] = {"changes": kind.changes}
        told |= {refusal.vm_id: {"changes_as": first.name} for refusal in others}
    return tuple(
        [
            RefusedVm(
                vm=each.name,
                reasons={**each.reasons},
                step=each.step if with_evidence else None,
                **told.get(each.vm_id, {}),
            )
            for each in plan.refused
        ]
    )


def exposed(plan: Plan) -> tuple[ExposedDomain, ...]:
    return tuple(ExposedDomain(**asdict(each)) for each in plan.exposed)


def evacuations(plan: Plan, fleet: Fleet) -> tuple[LossView, ...]:
    """`fleet` is the one that the plan was made on: what its VMs are called."""
    names = {vm.vm_id: vm.name for host in fleet.hosts for vm in host.vms}
    names |= {place.vm_id: place.name for place in plan.placed}
    return tuple(
        LossView(
            domain=each.domain,
            level=each.level.value,
            cluster=each.cluster,
            restarts=tuple(
                RestartView(vm=names[vm_id], host=host, cells=cells) for vm_id, (host, cells) in each.seats.items()
            ),
            without_place=tuple(vm.name for vm in each.without_place),
        )
        for each in plan.evacuations
    )


def moved(moves: Iterable[Move]) -> tuple[MovedVm, ...]:
    return tuple(MovedVm(vm=m.name, host=m.host, cells_before=m.cells_before, cells_after=m.cells_after) for m in moves)


def _with_evidence(place: Placement, why: Evidence) -> PlacedVm:
    evidence = PlaceEvidence(
        step=why.step,
        candidates=why.candidates,
        score=why.score,
        epoch=why.epoch,
        searched=why.searched,
        broken=why.broken,
        moves=moved(why.moves) or None,
    )
    return PlacedVm(vm=place.name, host=place.host, cells=place.cells, evidence=evidence)
