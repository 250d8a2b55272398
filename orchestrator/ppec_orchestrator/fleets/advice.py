# SPDX-License-Identifier: Apache-2.0
"""What would help the VMs that a plan on a file refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ppec_contract.api_placement import ChangeView
from ppec_orchestrator.placement.advice import MOST_TRIED_IN_ALL, Adviser, refused_by_kind
from ppec_orchestrator.placement.applied import applied
from ppec_orchestrator.placement.change_views import views
from ppec_orchestrator.placement.fleet import Fleet
from ppec_orchestrator.placement.plan import Plan, Refusal
from ppec_orchestrator.placement.request import PlanRequest


@dataclass(frozen=True, slots=True)
class Advised:
    """VMs of one kind, each of which these changes would make fit."""

    refusals: tuple[Refusal, ...]
    changes: tuple[ChangeView, ...]


def advice_on(
    fleet: Fleet, request: PlanRequest, plan: Plan, called: Mapping[str, str], most: int
) -> tuple[Advised, ...]:
    """For the first so many kinds of VMs that the plan refused, on the fleet with the rest of it carried out; as in the
    API, of fewer where N+1 makes it long."""
    kinds = refused_by_kind(request.vms, plan)[:most]
    if not kinds:
        return ()
    adviser, left = Adviser(applied(fleet, request.vms, plan)), MOST_TRIED_IN_ALL
    found: list[Advised] = []
    for vm, all_of_it in kinds:
        if left <= 0:
            break
        advice = adviser.advice(vm, request.spare)
        left -= advice.tried
        found.append(Advised(tuple(all_of_it), views(advice.changes, called)))
    return tuple(found)
