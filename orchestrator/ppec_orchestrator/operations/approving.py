# SPDX-License-Identifier: Apache-2.0
"""Whether a kept plan can be carried out as it is, asked by who executes it; and its approval, which asks the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import Connection

from ppec_contract.api_placement import GroupRule
from ppec_contract.api_plans import PlanDetails
from ppec_contract.errors import PpecError
from ppec_orchestrator.approvals import NONE_NEEDED, ApprovalPolicy, refuse_maker, refuse_second
from ppec_orchestrator.operations.plan_shown import LIFETIME, Restored, restored
from ppec_orchestrator.operations.planning import Planning, take_turn
from ppec_orchestrator.store import plan_views, plans, vms
from ppec_orchestrator.store.clock import Clock
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.plans import StoredPlan
from ppec_orchestrator.store.reservations import ROOM, HostsHeldError, lost_hosts
from ppec_orchestrator.store.vm_groups import stands_elsewhere


def approve(
    database: Database,
    planning: Planning,
    now: Clock,
    plan_id: str,
    caller: str,
    approvals: ApprovalPolicy = NONE_NEEDED,
) -> PlanDetails:
    """By somebody else than its maker, who has a plan's whole lifetime from then on; asked for again it changes
    nothing. Raises `plan.not_found`, `approval.by_maker`, `approval.given`, `plan.outdated` and `vm.exists`: what can't
    be executed any more is not worth a look."""
    at = now()
    with database.write() as conn:
        stored = plans.load(conn, plan_id, at)
        refuse_maker(plan_id, stored.created_by, caller)
        # The plan before its hosts, as who executes it locks them.
        if plans.approve(conn, plan_id, caller, at, at + LIFETIME):
            _refuse_outdated(conn, stored, planning)
        approved = plans.load(conn, plan_id, at)
        refuse_second(plan_id, approved.approved_by, caller)
        return plan_views.details(approved, approvals)


def still_stands(conn: Connection, stored: StoredPlan, made: Restored, planning: Planning) -> None:
    """Raises `plan.outdated`. Its hosts are locked until the transaction ends; whether they have the room is seen when
    it is reserved."""
    together = _together(made)
    if together:
        take_turn(conn)
    plans.check(conn, stored, planning.alive_since(), planning.alive_since(stored.created_at))
    # A group that began elsewhere meanwhile changed no host that the plan looked at.
    for rule, hosts in together.items():
        if stands_elsewhere(conn, rule, hosts):
            raise plans.outdated(stored, {f"group {rule.name}": "stands elsewhere by now"})


def without_room(stored: StoredPlan, hosts: Sequence[str]) -> PpecError:
    return plans.outdated(stored, dict.fromkeys(hosts, "has the room no more"))


def _refuse_outdated(conn: Connection, stored: StoredPlan, planning: Planning) -> None:
    """As an execution would, but for addresses: these are granted then."""
    made = restored(stored)
    still_stands(conn, stored, made, planning)
    vms.refuse_taken(conn, [place.name for place in made.plan.placed])
    try:
        lost = lost_hosts(conn, made.plan.placed, replace(ROOM, moves=made.plan.moves))
    except HostsHeldError as error:
        raise error.why from error
    if lost:
        raise without_room(stored, lost)


def _together(made: Restored) -> dict[GroupRule, list[int]]:
    """The hard rules by which VMs of a plan stand together, and the hosts that they were given for it."""
    found: dict[GroupRule, list[int]] = {}
    for place in made.plan.placed:
        for rule in made.meant.input.rules_of(place.name):
            if rule.hard and not rule.apart:
                found.setdefault(rule, []).append(place.host_id)
    return found
