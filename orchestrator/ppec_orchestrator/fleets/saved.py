# SPDX-License-Identifier: Apache-2.0
"""A plan's answer that was kept, held against the fleet and the requests that it is of: by the checker, as if the plan
had just been made.

It is one of `ppec plan --evidence`, or of the API: a `PlanView`, which is made the same answer here, also inside a
`PlanDetails`. VMs and hosts are known by their names, of which a fleet has each once. What a place takes of its cells
is no part of an answer: it is what the VM needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from ppec_contract.api_placement import LossView, MoveView, PlacedView, PlanView
from ppec_contract.api_plans import PlanDetails
from ppec_contract.errors import PpecError
from ppec_orchestrator.fleets.answer import (
    ExposedDomain,
    MovedVm,
    PlacedVm,
    PlaceEvidence,
    PlanAnswer,
    RefusedVm,
    moved,
)
from ppec_orchestrator.fleets.faults import ANSWER, FleetError, shown, unreadable
from ppec_orchestrator.fleets.json_document import parsed, validated
from ppec_orchestrator.placement.checker import check
from ppec_orchestrator.placement.fleet import Fleet, SeatedVm
from ppec_orchestrator.placement.plan import Evacuation, Evidence, Exposed, Move, Placement, Plan, Refusal
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.replay import needs
from ppec_orchestrator.placement.request import Level, PlanRequest
from ppec_orchestrator.placement.spare_rules import SpareRules


@dataclass(frozen=True, slots=True)
class Saved:
    """`answer` has the evidence of each place and the step of each refusal. `requests` is the document of the VMs that
    it is of, if it carries one. Whether it is `executable` is held against it only if the answer is ours: the API knows
    of more that VMs are made for (`at_least`)."""

    answer: PlanAnswer
    requests: Mapping[str, Any] | None = None
    of_the_api: bool = False


def read_answer(data: bytes, source: str) -> Saved:
    """Raises PpecError `fleet.unreadable` for what is no answer, or is one without its evidence."""
    try:
        document = parsed(data)
        saved = _saved(document if isinstance(document, dict) else {})
        _refuse_without_evidence(saved.answer)
    except FleetError as fault:
        raise unreadable(source, f"{fault.where}: {fault.what}", ANSWER) from fault
    return saved


def faults_of(saved: Saved, fleet: Fleet, request: PlanRequest) -> list[str]:
    """None for an answer that holds. One that speaks of other VMs than were asked for, or than there are, is not played
    through. Raises PpecError for one that was made by another rule about spare room, which nothing else would show."""
    _refuse_other_rule(saved.answer, SpareRules.of(fleet, request.spare))
    answer, told = saved.answer, _Told(saved.answer, fleet, request)
    faults = [*told.strangers()]
    if faults:
        return faults
    plan = told.plan()
    faults = check(fleet, request, plan)
    if answer.moves is not None and answer.moves != moved(plan.moves):
        faults.append("the moves that it lists are not those that open its VMs' cells")
    executable = plan.serves(all_or_nothing=request.all_or_nothing)
    if not saved.of_the_api and answer.executable != executable:
        faults.append(
            f"it is said to be {'' if answer.executable else 'not '}executable, and is{' not' * (not executable)}"
        )
    return faults


def _refuse_other_rule(answer: PlanAnswer, rules: SpareRules) -> None:
    if rules.off and (answer.exposed or answer.evacuations):
        what, hint = "was made with N+1", "Give --n-plus-one as it was given then."
    elif not rules.off and answer.evacuations is None:
        what, hint = (
            "says nothing of where VMs would restart (N+1)",
            "Ask for it with --evidence, and --n-plus-one if it is given here.",
        )
    else:
        return
    raise PpecError("request.invalid", f"the answer {what}", hint=hint, subject="verify")


# --- reading ---------------------------------------------------------------------------------------------------------


def _saved(document: Mapping[str, Any]) -> Saved:
    if "plan_id" not in document:
        return Saved(validated(TypeAdapter(PlanAnswer), document))
    if "plan" in document:
        view = validated(TypeAdapter(PlanDetails), document).plan
    else:
        view = validated(TypeAdapter(PlanView), document)
    return Saved(_as_ours(view), view.requests, of_the_api=True)


def _refuse_without_evidence(answer: PlanAnswer) -> None:
    for kind, without in (
        ("placed", (index for index, each in enumerate(answer.placed) if each.evidence is None)),
        ("refused", (index for index, each in enumerate(answer.refused) if each.step is None)),
    ):
        for index in without:
            raise FleetError(f"{kind}[{index}]", "it comes without its evidence")


def _as_ours(view: PlanView) -> PlanAnswer:
    return PlanAnswer(
        placed=tuple(_placed(each) for each in view.placed),
        refused=tuple(RefusedVm(vm=each.vm, reasons=each.reasons, step=each.step) for each in view.refused),
        load_cpu_s=0,
        plan_cpu_s=0,
        executable=view.executable,
        exposed=tuple(ExposedDomain(**dict(each)) for each in view.exposed),
        evacuations=view.evacuations,
    )


def _placed(view: PlacedView) -> PlacedVm:
    evidence = PlaceEvidence(
        step=view.step,
        candidates=view.candidates,
        score=view.score,
        epoch=view.epoch,
        searched=view.searched,
        broken=view.broken_groups,
        moves=tuple(_moved(move, view.host) for move in view.moves) or None,
    )
    return PlacedVm(vm=view.vm, host=view.host, cells=view.cells, evidence=evidence)


def _moved(move: MoveView, host: str) -> MovedVm:
    return MovedVm(vm=move.vm, host=host, cells_before=move.cells_before, cells_after=move.cells_after)


# --- an answer as the plan that it tells -----------------------------------------------------------------------------


class _Told:
    """Names looked up: those of requests, and of the fleet's VMs."""

    def __init__(self, answer: PlanAnswer, fleet: Fleet, request: PlanRequest) -> None:
        self._answer, self._fleet = answer, fleet
        self._level = request.spare.level
        self._asked = {vm.name: vm for vm in request.vms}
        self._standing = {vm.name: vm for host in fleet.hosts for vm in host.vms}
        # The checker looks up where they stand, and in which cells.
        new = {each.vm: self._asked[each.vm] for each in answer.placed if each.vm in self._asked}
        self._vms = self._standing | {
            name: SeatedVm(vm.vm_id, name, vm.profile, (), vm.groups) for name, vm in new.items()
        }

    def strangers(self) -> Iterator[str]:
        """Faults that leave no plan to play through."""
        answer = self._answer
        answered = {each.vm for several in (answer.placed, answer.refused) for each in several}
        for name in sorted(answered - self._asked.keys()):
            yield f"{shown(name)} is no VM that is asked for"
        for name in sorted(self._asked.keys() - answered):
            yield f"{shown(name)} is asked for, and nothing is said of it"
        for refused in answer.refused:
            for reason in sorted(refused.reasons.keys() - set(Reason)):
                yield f"{refused.vm}: {shown(reason)} is no reason to refuse a VM for"
        for placed in answer.placed:
            for move in _evidence(placed).moves or ():
                if move.vm not in self._vms:
                    yield f"{shown(move.vm)} is moved, and there is no such VM"
        yield from self._strange_losses(answer.evacuations or ())

    def _strange_losses(self, losses: Iterable[LossView]) -> Iterator[str]:
        seen = set[tuple[str | None, str, str]]()
        for loss in losses:
            if (loss.level, loss.cluster, loss.domain) in seen:
                yield f"where the VMs of {shown(loss.domain)} would restart is said twice"
            seen.add((loss.level, loss.cluster, loss.domain))
            names = [each.vm for each in loss.restarts] + [*loss.without_place]
            for name in names:
                if name not in self._vms:
                    yield f"{shown(name)} would restart were {shown(loss.domain)} lost, and there is no such VM"
            if len(set(names)) != len(names):
                yield f"where a VM of {shown(loss.domain)} would restart is said twice"

    def plan(self) -> Plan:
        answer = self._answer
        return Plan(
            placed=tuple(self._place(each) for each in answer.placed),
            refused=tuple(
                Refusal(
                    self._asked[each.vm].vm_id,
                    each.vm,
                    {Reason(reason): count for reason, count in each.reasons.items()},
                    each.step or 0,
                )
                for each in answer.refused
            ),
            evidence=tuple(self._why(each) for each in answer.placed),
            exposed=tuple(map(self._exposed, answer.exposed or ())),
            evacuations=tuple(self._evacuation(each) for each in answer.evacuations or ()),
        )

    def _place(self, said: PlacedVm) -> Placement:
        vm, row = self._asked[said.vm], self._fleet.index.get(said.host)
        host = None if row is None else self._fleet.hosts[row]
        cells = [] if host is None else [cell for cell in host.cells if cell.cell in said.cells]
        shape, parts = vm.profile.shape, dict[str, int]()
        if cells:
            wanted = needs(shape, np.array(cells[0].threads_per_core)).items()
            parts = {resource: -(-int(amount) // len(cells)) for resource, amount in wanted}
        more = dict.fromkeys(("cores", "memory_mib"), 0) | parts
        number = -1 if host is None else host.host_id
        return Placement(vm.vm_id, said.vm, number, said.host, said.cells, shape.disk_mib, shape.pool, **more)

    def _why(self, said: PlacedVm) -> Evidence:
        why = _evidence(said)
        moves = tuple(
            Move(self._vms[each.vm].vm_id, each.vm, each.host, each.cells_before, each.cells_after)
            for each in why.moves or ()
        )
        vm_id = self._asked[said.vm].vm_id
        return Evidence(vm_id, why.step, why.candidates, why.score, why.broken, why.epoch, moves, why.searched)

    def _exposed(self, said: ExposedDomain) -> Exposed:
        level = Level(said.level or self._level)
        rows = self._fleet.rows_of(level, said.domain)
        cluster = self._fleet.hosts[rows[0]].cluster if said.cluster is None and len(rows) else said.cluster or ""
        return Exposed(said.domain, level, cluster, said.vm, said.without_place)

    def _evacuation(self, said: LossView) -> Evacuation:
        seats = {self._vms[each.vm].vm_id: (each.host, each.cells) for each in said.restarts}
        without = tuple(self._vms[name] for name in said.without_place)
        return Evacuation(said.domain, Level(said.level or self._level), said.cluster, seats, without)


def _evidence(said: PlacedVm) -> PlaceEvidence:
    if said.evidence is None:
        raise ValueError("an answer without evidence was refused when it was read")
    return said.evidence
