# SPDX-License-Identifier: Apache-2.0
"""The REST resources of plans that are kept: what their makers execute, and what others look at and approve.

What a plan says is in `api_placement.py: PlanView`; the words are maker (who planned) and checker (who approves).
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Literal

from ppec_contract.api_placement import PlanView
from ppec_contract.api_vms import VmsCreate
from ppec_contract.model import Model, ResourceName, Sha256, VmName


class PlanState(StrEnum):
    """`waiting`: nobody has approved it, whether or not it needs that."""

    WAITING = "waiting"
    APPROVED = "approved"


class PlanSummary(Model):
    """A plan that has neither expired nor been executed, as lists show it: `placed` of the `vms` asked for have a
    place, `first_vm` is one of them. It `needs_approval` as long as it can't be executed without, and has none."""

    plan_id: Sha256
    created_by: str
    created_at: datetime
    expires_at: datetime
    state: PlanState
    needs_approval: bool = False
    approved_by: str | None = None
    approved_at: datetime | None = None
    image: ResourceName
    first_vm: VmName
    vms: int
    placed: int


class RequestShown(VmsCreate):
    """A request as others than its maker see it. User data may hold secrets: its length and sha256 stand for it, so
    that who approves knows what they sign."""

    user_data: Literal[""] = ""
    user_data_bytes: int
    user_data_sha256: Sha256 | None = None


class PlanDetails(PlanSummary):
    """`GET /v1/plans/{id}`: the plan as it was shown, and the request that it is of. Of the plan only two things are
    as they are now: `expires_at`, since an approval gives it more time, and `needs_approval`."""

    request: RequestShown
    plan: PlanView
