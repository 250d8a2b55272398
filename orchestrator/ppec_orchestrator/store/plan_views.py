# SPDX-License-Identifier: Apache-2.0
"""Kept plans as the API shows them: those that have neither expired nor been executed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, select

from ppec_contract.api import Page
from ppec_contract.api_placement import PlanView
from ppec_contract.api_plans import PlanDetails, PlanState, PlanSummary, RequestShown
from ppec_contract.api_vms import VmsCreate
from ppec_contract.errors import PpecError
from ppec_orchestrator.approvals import ApprovalPolicy
from ppec_orchestrator.store.paging import Slice, newest_page
from ppec_orchestrator.store.plans import StoredPlan
from ppec_orchestrator.store.tables import plan


@dataclass(frozen=True, slots=True)
class PlanFilter:
    """Which plans to list; None means any."""

    created_by: str | None = None
    state: PlanState | None = None


# Nothing of the large documents: PostgreSQL would parse a whole one for a single name.
_SUMMARY = select(
    plan.c.id,
    plan.c.created_by,
    plan.c.created_at,
    plan.c.expires_at,
    plan.c.approved_by,
    plan.c.approved_at,
    plan.c.image,
    plan.c.first_vm,
    plan.c.vms,
    plan.c.placed,
).where(plan.c.vms.is_not(None))


def page(
    conn: Connection, wanted: Slice, chosen: PlanFilter, approvals: ApprovalPolicy, now: datetime
) -> Page[PlanSummary]:
    """The newest first."""
    query = _SUMMARY.where(plan.c.expires_at > now)
    if chosen.created_by is not None:
        query = query.where(plan.c.created_by == chosen.created_by)
    if chosen.state is PlanState.APPROVED:
        query = query.where(plan.c.approved_by.is_not(None))
    if chosen.state is PlanState.WAITING:
        query = query.where(plan.c.approved_by.is_(None))
    return newest_page(conn, query, wanted, plan, lambda rows: [_summary(row, approvals) for row in rows])


def details(stored: StoredPlan, approvals: ApprovalPolicy) -> PlanDetails:
    """Without user data, whoever looks. Raises `plan.not_found` of one that an older replica has made, which kept
    nothing to show."""
    if stored.shown is None:
        raise PpecError(
            "plan.not_found",
            f"plan {stored.plan_id} was made by an older orchestrator, and can only be executed",
            hint="Plan again once all of them are upgraded.",
            subject=f"plan {stored.plan_id}",
        )
    request = _request(stored)
    shown = as_it_stands(stored, request, approvals)
    return PlanDetails(
        plan_id=stored.plan_id,
        created_by=stored.created_by,
        created_at=stored.created_at,
        expires_at=stored.expires_at,
        state=_state(stored.approved_by),
        needs_approval=shown.needs_approval,
        approved_by=stored.approved_by,
        approved_at=stored.approved_at,
        image=request.image,
        first_vm=shown.placed[0].vm,
        vms=request.total,
        placed=len(shown.placed),
        request=request,
        plan=shown,
    )


def as_it_stands(stored: StoredPlan, asked: VmsCreate, approvals: ApprovalPolicy) -> PlanView:
    """As it was shown, but for what an approval changes, or another setting since then."""
    needs_approval = stored.approved_by is None and approvals.needs_approval(asked)
    changed = {"expires_at": stored.expires_at, "needs_approval": needs_approval}
    return PlanView.model_validate(stored.shown).model_copy(update=changed)


def _request(stored: StoredPlan) -> RequestShown:
    user_data = stored.asked.get("user_data", "").encode()
    return RequestShown.model_validate(
        {
            **stored.asked,
            "user_data": "",
            "user_data_bytes": len(user_data),
            "user_data_sha256": hashlib.sha256(user_data).hexdigest() if user_data else None,
        }
    )


def _summary(row: Row[Any], approvals: ApprovalPolicy) -> PlanSummary:
    return PlanSummary(
        plan_id=row.id,
        created_by=row.created_by,
        created_at=row.created_at,
        expires_at=row.expires_at,
        state=_state(row.approved_by),
        needs_approval=row.approved_by is None and approvals.needed_for(row.vms),
        approved_by=row.approved_by,
        approved_at=row.approved_at,
        image=row.image,
        first_vm=row.first_vm,
        vms=row.vms,
        placed=row.placed,
    )


def _state(approved_by: str | None) -> PlanState:
    return PlanState.WAITING if approved_by is None else PlanState.APPROVED
