# SPDX-License-Identifier: Apache-2.0
"""A refusal that says what would help: the cheapest changes that make a refused VM fit, tried in the model.

A model of a large fleet is tens of MiB of arrays, and trying changes in it is work for a CPU: for all of a process one
VM's are tried at a time. On one thread, because the C library keeps what was freed for the thread that had it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from uuid import UUID
from weakref import WeakKeyDictionary

from ppec_contract.api_placement import ChangeView
from ppec_contract.errors import PpecError, Problem
from ppec_orchestrator.operations.planning import Planning
from ppec_orchestrator.placement.advice import MOST_ADVISED, MOST_TRIED_IN_ALL, Adviser, refused_by_kind
from ppec_orchestrator.placement.applied import applied
from ppec_orchestrator.placement.change_views import views
from ppec_orchestrator.placement.fleet import Fleet
from ppec_orchestrator.placement.plan import Plan
from ppec_orchestrator.placement.request import PlanRequest, SpareRule, VmRequest

# The refusals that advice is given with.
ADVISABLE = frozenset({"placement.no_capacity", "vm.exceeds_socket"})
# Of one fleet, so many answers are kept: those given last.
MOST_ANSWERS = 64
# What requests call the rules and resources that the planner has other words for. Some are the orchestrator's own, such
# as `failed`.
IN_REQUESTS = {
    "labels": "host_labels",
    "without": "avoid_labels",
    "one-cell": "numa.multi_cell",
    "spare": "n_plus_one",
    "cluster-spare": "cluster.n_plus_one",
    "nvme": "nvme_drives",
}
Changes = tuple[ChangeView, ...]


@dataclass(frozen=True, slots=True)
class _Answer:
    """As `placement.advice.Advice`."""

    changes: Changes
    tried: int


class Advising:
    """Answers what would help a VM on a fleet. Whoever asks the same of the same fleet is told the same, without
    another trial: a fleet never changes, so its answers hold for as long as there is one. Who asks meanwhile waits for
    the one answer. `tried` counts the VMs that changes were tried for."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="advice")
        self._lock = threading.Lock()
        # They go when nobody else has the fleet any more.
        self._answers: WeakKeyDictionary[Fleet, OrderedDict[Hashable, Future[_Answer]]] = WeakKeyDictionary()
        self._waiting = 0
        # Kept from one VM to the next while others wait, and no longer: it holds a model of the whole fleet.
        self._adviser: Adviser | None = None
        self.tried = 0

    def changes_for(self, fleet: Fleet, vm: VmRequest, spare: SpareRule) -> Changes:
        """Cheapest first; none where nothing helps that changes are made of."""
        return self._answer(fleet, vm, spare).changes

    def changes_for_first(self, fleet: Fleet, vms: Iterable[VmRequest], spare: SpareRule) -> list[Changes]:
        """One VM after the other, until enough plans were made under N+1: fewer answers than VMs then."""
        found: list[Changes] = []
        left = MOST_TRIED_IN_ALL
        with self._lock:
            # As one that waits: what was worked out for one VM is there for the next.
            self._waiting += 1
        try:
            for vm in vms:
                if left <= 0:
                    break
                answer = self._answer(fleet, vm, spare)
                found.append(answer.changes)
                left -= answer.tried
        finally:
            self._thread.submit(self._waits_no_more)
        return found

    def _answer(self, fleet: Fleet, vm: VmRequest, spare: SpareRule) -> _Answer:
        question = (vm.kind, spare)
        with self._lock:
            answers = self._answers.setdefault(fleet, OrderedDict())
            answer = answers.pop(question, None)
            if answer is None:
                self._waiting += 1
                answer = self._thread.submit(self._answered, fleet, vm, spare)
            answers[question] = answer
            if len(answers) > MOST_ANSWERS:
                answers.popitem(last=False)
        try:
            return answer.result()
        except BaseException:
            # Not kept: whoever asks next has another try, and what was raised holds the fleet.
            with self._lock:
                if answers.get(question) is answer:
                    del answers[question]
            raise

    def after(self, fleet: Fleet, request: PlanRequest, plan: Plan) -> Fleet:
        """The fleet with the plan carried out; itself, and so what is known of it, where nothing was placed."""
        return self._thread.submit(applied, fleet, request.vms, plan).result() if plan.placed else fleet

    def _answered(self, fleet: Fleet, vm: VmRequest, spare: SpareRule) -> _Answer:
        try:
            self.tried += 1
            if self._adviser is None or self._adviser.fleet is not fleet:
                # The other one goes before there is another model.
                self._adviser = None
                self._adviser = Adviser(fleet)
            advice = self._adviser.advice(vm, spare)
            return _Answer(views(advice.changes, IN_REQUESTS), advice.tried)
        finally:
            self._waits_no_more()

    def _waits_no_more(self) -> None:
        with self._lock:
            self._waiting -= 1
            if not self._waiting:
                self._adviser = None


ADVISING = Advising()


def advised(error: PpecError, planning: Planning, request: PlanRequest) -> PpecError:
    """The same error, with what would make the first refused VM fit. The fleet may have moved on: where the VM fits by
    now, or no change helps, nothing is added."""
    plan, snapshot = planning.shown(request)
    changes = _first_changes(snapshot, request, plan) if plan.refused else ()
    return with_changes(error.problem(), changes).error()


def changes_by_vm(fleet: Fleet, request: PlanRequest, plan: Plan) -> dict[UUID, Changes]:
    """For the first kinds of VMs that the plan for this fleet refuses; what would help one VM would help those that are
    like it."""
    if not plan.refused:
        return {}
    after = ADVISING.after(fleet, request, plan)
    kinds = refused_by_kind(request.vms, plan)[:MOST_ADVISED]
    found = ADVISING.changes_for_first(after, (vm for vm, _ in kinds), request.spare)
    # Those that come after are not advised.
    return {one.vm_id: changes for (_, alike), changes in zip(kinds, found, strict=False) for one in alike}


def advised_problems(
    problems: Mapping[UUID, Problem], fleet: Fleet, request: PlanRequest, plan: Plan
) -> dict[UUID, Problem]:
    """Why VMs were refused while others of the request were made, with what would make them fit now that these are;
    of those alone that something is known to help."""
    open_to_advice = {vm_id: problem for vm_id, problem in problems.items() if problem.code in ADVISABLE}
    refused = tuple(one for one in plan.refused if one.vm_id in open_to_advice)
    changes = changes_by_vm(fleet, request, replace(plan, refused=refused))
    return {vm_id: with_changes(open_to_advice[vm_id], found) for vm_id, found in changes.items() if found}


def with_changes(problem: Problem, changes: Changes) -> Problem:
    """The same problem, which says what would help, and in its hint the cheapest of that."""
    if not changes:
        return problem
    told = [change.model_dump(mode="json") for change in changes]
    hint = f"{problem.hint} Cheapest change: {changes[0].sentence}.".strip()
    return problem.model_copy(update={"hint": hint, "details": {**problem.details, "changes": told}})


def _first_changes(fleet: Fleet, request: PlanRequest, plan: Plan) -> Changes:
    vm = next(each for each in request.vms if each.vm_id == plan.refused[0].vm_id)
    return ADVISING.changes_for(ADVISING.after(fleet, request, plan), vm, request.spare)
