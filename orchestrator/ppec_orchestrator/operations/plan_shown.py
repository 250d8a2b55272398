# SPDX-License-Identifier: Apache-2.0
"""A plan that is shown, not carried out: made, kept under its hash, and found again when somebody wants it executed.

The hash is of all that the plan is: what was asked and what it meant, every place and move, and the generations of the
hosts that it stands on. Of the same request on a fleet that has not moved on only ids and time differ."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from ppec_contract.api_placement import ExposedView, MoveView, PlacedView, PlanView, RefusedView
from ppec_contract.api_vms import VmsCreate
from ppec_contract.errors import PpecError, Problem
from ppec_contract.model import canonical_json
from ppec_orchestrator.approvals import NONE_NEEDED, ApprovalPolicy
from ppec_orchestrator.fleets.answer import evacuations
from ppec_orchestrator.fleets.snapshot import requests_document
from ppec_orchestrator.operations.advising import Changes, changes_by_vm
from ppec_orchestrator.operations.meaning import Meant, meaning, new_plan_request
from ppec_orchestrator.operations.planning import Planning, relied_on, rows_counted_on
from ppec_orchestrator.operations.wanted import CreateInput
from ppec_orchestrator.placement.fleet import Fleet
from ppec_orchestrator.placement.plan import Evidence, Exposed, Move, Placement, Plan, Refusal
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import Level, PlanRequest
from ppec_orchestrator.placement.spare_rules import SpareRules
from ppec_orchestrator.store import plan_views, plans, vms
from ppec_orchestrator.store.clock import Clock
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.plans import StoredPlan
from ppec_orchestrator.store.vm_groups import check_rules

# How long a plan can be executed after it was made, and after it was approved.
LIFETIME = timedelta(minutes=15)
# Of the view; these are its evidence.
_NOT_KEPT = {"requests", "evacuations"}


@dataclass(frozen=True, slots=True)
class Restored:
    """A stored plan as the planner made it, and the request it was made for; `changes` are what those that it refused
    were shown to be helped by."""

    plan: Plan
    meant: Meant
    user_data: str
    changes: Mapping[UUID, Changes]


def show_plan(  # noqa: PLR0913 - what it needs of the service, and what is asked for
    database: Database,
    planning: Planning,
    now: Clock,
    asked: VmsCreate,
    caller: str,
    approvals: ApprovalPolicy = NONE_NEEDED,
    *,
    evidence: bool = False,
) -> PlanView:
    """Raises `….not_found` of whatever the request names, `vm.exists` and `group.mismatch`; VMs without a place are
    part of the plan. With `evidence` the view has what it takes to play it through, which is not kept: of a large
    cluster it may be megabytes, and changes nothing of the plan."""
    with database.read() as conn:
        meant = meaning(conn, asked, now())
        request = new_plan_request(meant, asked)
        vms.refuse_taken(conn, [vm.name for vm in request.vms])
        check_rules(conn, asked.rules)
    request = replace(request, spare=replace(request.spare, witnessed=evidence))
    plan, fleet = planning.shown(request)
    made_at = now()
    stored = _stored(meant, asked, plan, _Ground.of(plan, request, fleet), caller, made_at)
    executable = plan.serves(all_or_nothing=request.all_or_nothing) and len(plan.placed) >= (asked.at_least or 1)
    refused = _refused(fleet, request, plan, meant.refused)
    view = _view(stored, plan, fleet, refused, executable=executable)
    certificate = _certificate(request, plan, fleet) if evidence else {}
    if not executable:
        return view.model_copy(update=certificate)
    view = view.model_copy(update={"needs_approval": approvals.needs_approval(asked)})
    with database.write() as conn:
        kept = plans.keep(conn, replace(stored, shown=view.model_dump(mode="json", exclude=_NOT_KEPT)))
    # The same plan may have been approved before.
    shown = view if kept.approved_by is None else plan_views.as_it_stands(kept, asked, approvals)
    return shown.model_copy(update=certificate)


def restored(stored: StoredPlan) -> Restored:
    places = stored.places
    placed = tuple(
        # One that was kept before there were pools doesn't name any.
        Placement(**{"pool": "", **place, "vm_id": UUID(place["vm_id"]), "cells": tuple(place["cells"])})
        for place in places["placed"]
    )
    refused = tuple(
        Refusal(UUID(one["vm_id"]), one["name"], {Reason(reason): count for reason, count in one["reasons"].items()})
        for one in places.get("refused", ())
    )
    # Of why, what carrying it out needs: which moves come before which VM.
    opened = {UUID(vm_id): (step, moves) for vm_id, step, moves in places.get("opened", ())}
    evidence = tuple(
        Evidence(place.vm_id, step, candidates=0, score=0.0, moves=tuple(map(_move, moves)))
        for place in placed
        for step, moves in (opened.get(place.vm_id, (0, ())),)
    )
    problems = ((one["name"], one.get("problem")) for one in places.get("refused", ()))
    unaddressed = {name: Problem.model_validate(problem).error() for name, problem in problems if problem}
    asked = CreateInput.model_validate(stored.input)
    meant = Meant(places["image_id"], places.get("image_sha256", ""), asked, refused=unaddressed)
    shown = PlanView.model_validate(stored.shown).exposed if stored.shown is not None else ()
    level = meant.input.request.n_plus_one.level
    exposed = tuple(
        Exposed(each.domain, Level(each.level or level), each.cluster or "", each.vm, each.without_place)
        for each in shown
    )
    plan = Plan(placed, refused, evidence, exposed)
    return Restored(plan, meant, stored.asked.get("user_data", ""), _changes_shown(stored, plan))


def _changes_shown(stored: StoredPlan, plan: Plan) -> dict[UUID, Changes]:
    """Not looked for again: who executes a plan gets what was shown, and perhaps approved. None are known of one that
    an older replica has made, which kept nothing of it."""
    if stored.shown is None:
        return {}
    shown = {one.vm: one.changes for one in PlanView.model_validate(stored.shown).refused}
    return {one.vm_id: shown[one.name] for one in plan.refused if one.name in shown}


def _move(kept: dict[str, Any]) -> Move:
    cells = {name: tuple(kept[name]) for name in ("cells_before", "cells_after")}
    return Move(**{**kept, "vm_id": UUID(kept["vm_id"]), **cells})


@dataclass(frozen=True, slots=True)
class _Ground:
    """What a plan stands on: the generations, by id, of the hosts that VMs are placed on, and of those whose VMs its
    rules look at; and the ids of those whose room it counts on for a loss."""

    generations: dict[int, int]
    counted_on: list[int]

    @classmethod
    def of(cls, plan: Plan, request: PlanRequest, fleet: Fleet) -> _Ground:
        hosts = [fleet.hosts[fleet.index[place.host]] for place in plan.placed]
        generations = {host.host_id: host.generation for host in hosts} | dict(relied_on(plan, request, fleet))
        spare = rows_counted_on(plan, fleet)
        return cls(generations, sorted(fleet.hosts[row].host_id for row in spare))


def _stored(meant: Meant, asked: VmsCreate, plan: Plan, ground: _Ground, caller: str, made_at: datetime) -> StoredPlan:
    kept = meant.input.model_dump(mode="json")
    placed = [{**place._asdict(), "vm_id": str(place.vm_id)} for place in plan.placed]
    # Ids are made anew with each plan, and say nothing of it.
    pairs = zip(plan.placed, plan.evidence, strict=True)
    found = ([place.name, place.host, list(place.cells), place.per_cell, why.broken] for place, why in pairs)
    places = sorted(found, key=str)
    refused = [_refused_row(one, meant.refused.get(one.name)) for one in plan.refused]
    why_not = sorted([one["name"], one["reasons"]] for one in refused)
    # Of VMs on hosts with moves the order counts: what a move leaves, another VM may get.
    opening = {move.host for move in plan.moves}
    in_turn = [
        (place, why.step, [{**asdict(move), "vm_id": str(move.vm_id)} for move in why.moves])
        for place, why in zip(plan.placed, plan.evidence, strict=True)
        if place.host in opening
    ]
    opened = [(str(place.vm_id), step, moves) for place, step, moves in in_turn]
    turns = [[step, place.name, moves] for place, step, moves in sorted(in_turn, key=lambda each: each[1])]
    image = [meant.image_id, meant.image_sha256]
    # What a checker would say no to: it may change on hosts that the plan doesn't stand on.
    exposed = [asdict(each) for each in plan.exposed]
    stands_on = sorted(ground.generations.items())
    what = [asked.model_dump(mode="json"), kept, image, places, turns, why_not, exposed, stands_on, caller]
    return StoredPlan(
        plan_id=hashlib.sha256(canonical_json(what)).hexdigest(),
        created_by=caller,
        created_at=made_at,
        expires_at=made_at + LIFETIME,
        asked=asked.model_dump(mode="json"),
        input=kept,
        places={
            "image_id": meant.image_id,
            "image_sha256": meant.image_sha256,
            "placed": placed,
            "refused": refused,
            "opened": opened,
            "counted_on": ground.counted_on,
        },
        generations=ground.generations,
    )


def _refused_row(one: Refusal, unaddressed: PpecError | None) -> dict[str, Any]:
    row = {"vm_id": str(one.vm_id), "name": one.name, "reasons": {r.value: n for r, n in one.reasons.items()}}
    return row if unaddressed is None else row | {"problem": unaddressed.problem().model_dump(mode="json")}


def _view(
    stored: StoredPlan, plan: Plan, fleet: Fleet, refused: tuple[RefusedView, ...], *, executable: bool
) -> PlanView:
    pairs = zip(plan.placed, plan.evidence, strict=True)
    return PlanView(
        plan_id=stored.plan_id,
        created_by=stored.created_by,
        created_at=stored.created_at,
        expires_at=stored.expires_at,
        executable=executable,
        placed=tuple(_placed(place, why) for place, why in pairs),
        refused=refused,
        exposed=tuple(ExposedView(**asdict(one)) for one in plan.exposed),
        hosts=len(fleet.hosts),
    )


def _certificate(request: PlanRequest, plan: Plan, fleet: Fleet) -> dict[str, Any]:
    return {
        "requests": requests_document(request.vms, fleet),
        "evacuations": None if SpareRules.of(fleet, request.spare).off else evacuations(plan, fleet),
    }


def _placed(place: Placement, why: Evidence) -> PlacedView:
    return PlacedView(
        vm=place.name,
        host=place.host,
        cells=place.cells,
        candidates=why.candidates,
        score=why.score,
        broken_groups=why.broken,
        searched=why.searched,
        step=why.step,
        epoch=why.epoch,
        moves=tuple(
            MoveView(vm=move.name, cells_before=move.cells_before, cells_after=move.cells_after) for move in why.moves
        ),
    )


def _refused(
    fleet: Fleet, request: PlanRequest, plan: Plan, unaddressed: Mapping[str, PpecError]
) -> tuple[RefusedView, ...]:
    changes = changes_by_vm(fleet, request, plan)
    return tuple(
        RefusedView(
            vm=one.name,
            reasons={reason.value: count for reason, count in one.reasons.items()},
            sentence=unaddressed[one.name].message if one.name in unaddressed else one.sentence(),
            changes=changes.get(one.vm_id, ()),
            advised=one.vm_id in changes,
            step=one.step,
        )
        for one in plan.refused
    )
