# SPDX-License-Identifier: Apache-2.0
"""`/v1/plans`: where VMs would go and why, and why not. The very plan can be looked at again, approved by somebody else
and executed, while its hosts stand still."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from ppec_contract.api import Page
from ppec_contract.api_operations import OperationView
from ppec_contract.api_placement import PlanView
from ppec_contract.api_plans import PlanDetails, PlanState, PlanSummary
from ppec_contract.api_vms import VmsCreate
from ppec_contract.model import Model, Sha256, Sha256Start
from ppec_orchestrator.api.asks import IdempotencyKey, accepted, ask_of
from ppec_orchestrator.api.audited import tells
from ppec_orchestrator.api.auth import Operator
from ppec_orchestrator.api.bodies import StrictJsonRoute
from ppec_orchestrator.api.operations import Engine
from ppec_orchestrator.api.pages import ByName, Filter
from ppec_orchestrator.store.plan_views import PlanFilter

router = APIRouter(prefix="/v1/plans", tags=["plans"], route_class=StrictJsonRoute)
PlanId = Annotated[Sha256, Path(description="The plan's hash.")]
PlanRef = Annotated[
    Sha256Start, Path(description="The plan's hash, or what it and no other begins with, 8 digits at least.")
]

Evidence = Annotated[
    bool, Query(description="Whether to say all that it takes to verify the plan; with N+1 it may be megabytes.")
]


@router.post("", name="create_plan", summary="Plan VMs without making them")
def create_plan(operations: Engine, caller: Operator, body: VmsCreate, evidence: Evidence = False) -> PlanView:
    """Nothing is reserved. VMs that find no place are part of the answer, with what would help."""
    return operations.show_plan(body, caller.name, evidence=evidence)


@router.get("", name="list_plans", summary="List plans that were neither executed nor have expired, the newest first")
def list_plans(
    operations: Engine, caller: Operator, wanted: ByName, created_by: Filter = None, state: PlanState | None = None
) -> Page[PlanSummary]:
    """Anybody's. Whether their hosts have changed since is seen only when one is approved or executed."""
    return operations.kept_plans(wanted, PlanFilter(created_by, state))


@router.get("/{plan}", name="get_plan", summary="Show a plan again, and what was asked for")
def get_plan(operations: Engine, caller: Operator, plan: PlanRef) -> PlanDetails:
    """As it was shown, to whoever may have to approve it; without user data. Until when it holds, and whether it still
    needs an approval, is as of now."""
    return operations.kept_plan(plan)


@router.post("/{plan}/approve", name="approve_plan", summary="Approve somebody else's plan")
def approve_plan(operations: Engine, caller: Operator, plan: PlanId) -> PlanDetails:
    """Refused (`approval.by_maker`) to who made it, and (`plan.outdated`) if it couldn't be executed any more. From now
    on its maker has a plan's whole lifetime. Asked for again it changes nothing. The hash is what is signed, so it has
    to be whole: by the time of the approval another plan may begin alike."""
    return operations.approve(plan, caller.name)


@router.post(
    "/{plan}/execute",
    name="execute_plan",
    summary="Carry out a plan as it is",
    status_code=202,
    response_model=OperationView,
)
def execute_plan(
    operations: Engine,
    caller: Operator,
    request: Request,
    plan: PlanRef,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Refused (`plan.outdated`) if anything has changed on the hosts it stands on, and (`approval.required`) if it
    needs an approval that nobody has given; once executed it is gone."""
    view = operations.execute(plan, ask_of(caller, idempotency_key, request, Model()))
    tells(request, plan=view.plan_id or "", approved_by=view.approved_by or "")
    return accepted(request, view)
