# SPDX-License-Identifier: Apache-2.0
"""Maker and checker: what needs a second person, and who that may be. Pure.

The maker plans; a checker, somebody else, approves just that plan, by its hash; the maker executes it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ppec_contract.api_vms import VmsCreate
from ppec_contract.errors import PpecError


@dataclass(frozen=True, slots=True)
class ApprovalPolicy:
    """Requests for `vms_from` VMs or more need an approved plan; with 0 none does."""

    vms_from: int = 0

    def needs_approval(self, asked: VmsCreate) -> bool:
        """By what is asked for: how many find a place may be another number each time."""
        return self.needed_for(asked.total)

    def needed_for(self, vms: int) -> bool:
        return 0 < self.vms_from <= vms

    def refusal(self, asked: VmsCreate, plan_id: str | None = None) -> PpecError:
        """For a request that has no plan, or one that nobody has approved."""
        rule = f"{self.vms_from} or more" if self.vms_from > 1 else "all requests"
        why = f"{asked.total} VMs are wanted, and {rule} need a plan that somebody else has approved"
        plan = plan_id or "HASH"
        steps = [f"`ppec approve {plan}` by somebody else", f"`ppec execute {plan}`"]
        if plan_id is None:
            steps.insert(0, "`ppec explain` (POST /v1/plans)")
        return PpecError(
            "approval.required",
            why if plan_id is None else f"nobody has approved plan {plan_id}: {why}",
            hint=f"First {', then '.join(steps)}.",
            subject="request" if plan_id is None else f"plan {plan_id}",
            details={"wanted": asked.total, "vms_from": self.vms_from},
        )


NONE_NEEDED = ApprovalPolicy()


def refuse_others(plan_id: str, maker: str, caller: str) -> None:
    """Who executes it. Raises `auth.forbidden` for a plan of somebody else's: its request may hold what only they
    know."""
    if caller != maker:
        raise PpecError(
            "auth.forbidden",
            f"plan {plan_id} was made by {maker}, not by {caller}",
            hint="Plan for yourself.",
            subject=f"plan {plan_id}",
        )


def refuse_maker(plan_id: str, maker: str, caller: str) -> None:
    """Who approves it. Raises `approval.by_maker`."""
    if caller == maker:
        raise PpecError(
            "approval.by_maker",
            f"plan {plan_id} was made by {maker}, who can't approve it",
            hint="Have somebody else approve it, with a token of their own.",
            subject=f"plan {plan_id}",
        )


def refuse_second(plan_id: str, approved_by: str | None, caller: str) -> None:
    """Who approved it stays who did. Raises `approval.given`."""
    if caller != approved_by:
        raise PpecError(
            "approval.given",
            f"plan {plan_id} has been approved already, by {approved_by}",
            hint="Nothing is left to do but to execute it, by who made it.",
            subject=f"plan {plan_id}",
            details={"approved_by": approved_by},
        )
