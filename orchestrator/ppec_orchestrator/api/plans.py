# SPDX-License-Identifier: Apache-2.0
"""`/v1/plans`: where VMs would go and why, and why not; the very plan can be executed while its hosts stand still."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from ppec_contract.api_operations import OperationView
from ppec_contract.api_placement import PlanView
from ppec_contract.api_vms import VmsCreate
from ppec_contract.model import Model
from ppec_orchestrator.api.asks import IdempotencyKey, accepted, ask_of
from ppec_orchestrator.api.auth import Operator
from ppec_orchestrator.api.bodies import StrictJsonRoute
from ppec_orchestrator.api.operations import Engine

router = APIRouter(prefix="/v1/plans", tags=["plans"], route_class=StrictJsonRoute)
PlanId = Annotated[str, Path(min_length=64, max_length=64, pattern=r"^[0-9a-f]{64}$", description="The plan's hash.")]


@router.post("", name="create_plan", summary="Plan VMs without making them")
def create_plan(operations: Engine, caller: Operator, body: VmsCreate) -> PlanView:
    """Nothing is reserved. VMs that find no place are part of the answer, with what would help."""
    return operations.show_plan(body, caller.name)


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
    plan: PlanId,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Refused (`plan.outdated`) if anything has changed on the hosts it stands on; once executed it is gone."""
    return accepted(request, operations.execute(plan, ask_of(caller, idempotency_key, request, Model())))
