# SPDX-License-Identifier: Apache-2.0
"""A refusal that says what would help: the cheapest changes that make the first refused VM fit, tried in the model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from ppec_contract.api_placement import ChangeView
from ppec_contract.errors import PpecError
from ppec_orchestrator.operations.live_fleet import LiveFleet
from ppec_orchestrator.placement.advice import advise
from ppec_orchestrator.placement.applied import applied
from ppec_orchestrator.placement.changes import AddAddresses, Change, EndDrain, FreeRoom, GiveUp, OtherSize, Retune
from ppec_orchestrator.placement.fleet import Fleet
from ppec_orchestrator.placement.plan import Plan, Refusal
from ppec_orchestrator.placement.request import PlanRequest

# The refusals that advice is given with.
ADVISABLE = frozenset({"placement.no_capacity", "vm.exceeds_socket"})
# Offered of one VM.
MOST_CHANGES = 5
# A model of a large fleet is tens of MiB of arrays, and trying changes in it is work for a CPU: for all of a process
# one VM's are tried at a time. On one thread, because the C library keeps what was freed for the thread that had it.
_TRIER = ThreadPoolExecutor(1, thread_name_prefix="advice")
_KINDS = {
    GiveUp: "give-up",
    EndDrain: "end-drain",
    Retune: "retune",
    AddAddresses: "add-addresses",
    OtherSize: "other-size",
    FreeRoom: "free-room",
}
# What requests call the rules and resources that the planner has other words for. Some are the orchestrator's own, such
# as `failed`.
IN_REQUESTS = {
    "labels": "host_labels",
    "without": "avoid_labels",
    "one-cell": "numa.multi_cell",
    "spare": "n_plus_one",
    "nvme": "nvme_drives",
}


def advised(error: PpecError, fleet: LiveFleet, request: PlanRequest) -> PpecError:
    """The same error, with what would make the first refused VM fit. The fleet may have moved on: where the VM fits by
    now, or nothing single helps, nothing is added."""
    plan, snapshot = fleet.plan(request)
    changes = changes_for(snapshot, request, plan, plan.refused[0]) if plan.refused else []
    if not changes:
        return error
    return PpecError(
        error.code,
        error.message,
        hint=f"{error.hint} Cheapest change: {changes[0].sentence}.".strip(),
        subject=error.subject,
        details={**error.details, "changes": [change.model_dump(mode="json") for change in changes]},
    )


def changes_for(fleet: Fleet, request: PlanRequest, plan: Plan, refusal: Refusal) -> list[ChangeView]:
    """Cheapest first, on the fleet with the rest of the plan carried out."""
    vm = next(each for each in request.vms if each.vm_id == refusal.vm_id)
    found = _TRIER.submit(lambda: advise(applied(fleet, request.vms, plan), vm, request.spare)).result()
    return [_view(change) for change in found[:MOST_CHANGES]]


def _view(change: Change) -> ChangeView:
    details = _plain(asdict(change))
    if isinstance(change, GiveUp):
        details["rules"] = [IN_REQUESTS.get(rule, rule) for rule in change.rules]
    return ChangeView(kind=_KINDS[type(change)], sentence=change.sentence(), details=details)


def _plain(value: Any) -> Any:
    """As JSON has it: names of fields are strings, and so are numbers of cells; resources as requests call them."""
    if isinstance(value, dict):
        return {IN_REQUESTS.get(str(key), str(key)): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
