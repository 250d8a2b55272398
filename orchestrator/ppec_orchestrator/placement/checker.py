# SPDX-License-Identifier: Apache-2.0
"""Checks a plan against its fleet and request: what the planner worked out is not believed.

The plan is played through step by step, by rules in plain words (`replay.py`, and for refusals `why_not.py`), and what
it says of itself held against that. Of the fleet as it then is, each domain that N+1 keeps is lost, and its VMs put to
where the plan says that they restart. None of them has any of the planner's code but its data, so that a plan on which
both agree is right.

Three things are taken from the planner, as each is a search of its own: which hosts N+1 closes to a VM, which hosts
moves could open, and that a domain which is named as exposed is. An error in the first two is on the safe side. One in
the third is not where the domain could be lost before the plan, and that the rule is required (decision 0027)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from ppec_orchestrator.placement.fleet import Fleet
from ppec_orchestrator.placement.plan import Evacuation, Evidence, Exposed, Placement, Plan, Refusal
from ppec_orchestrator.placement.replay import Replay
from ppec_orchestrator.placement.request import Level, PlanRequest, Spare, VmRequest
from ppec_orchestrator.placement.why_not import WhyNot

# Sums come out a little different in another order, and a root near zero makes much of a little. What `pack` counts is
# whole, and so never this near.
_SLACK = 1e-6


def check(fleet: Fleet, request: PlanRequest, plan: Plan) -> list[str]:
    """The faults found, none for a sound plan. Every VM is answered once; each placement fits where it stands, when its
    turn came, and none of the hosts that fit was better; where a VM was refused, none did fit. With N+1, for which the
    rule must have been `witnessed`, what is lost with a domain restarts elsewhere."""
    answered = Counter([place.vm_id for place in plan.placed] + [refusal.vm_id for refusal in plan.refused])
    if answered != Counter(vm.vm_id for vm in request.vms):
        return ["the plan does not answer each VM of the request once"]
    if [why.vm_id for why in plan.evidence] != [place.vm_id for place in plan.placed]:
        return ["the plan has not the evidence of each placement, in their order"]
    steps: dict[int, tuple[Placement, Evidence] | Refusal] = {one.step: one for one in plan.refused}
    steps |= {why.step: (place, why) for place, why in zip(plan.placed, plan.evidence, strict=True)}
    replay, by_id = Replay(fleet, request), {vm.vm_id: vm for vm in request.vms}
    why_not = WhyNot(replay)
    faults = [] if len(steps) == len(request.vms) else ["two VMs were planned in one step"]
    for _, answer in sorted(steps.items()):
        if isinstance(answer, Refusal):
            faults += _refused(replay, why_not, by_id[answer.vm_id], answer)
        else:
            faults += _placed(replay, by_id[answer[0].vm_id], *answer)
    for level in (Level.HOST, Level.RACK):
        faults += _losses(replay, plan, level)
    return faults


def _refused(replay: Replay, why_not: WhyNot, vm: VmRequest, refusal: Refusal) -> Iterator[str]:
    """It fits nowhere, and each host is counted under the first of its reasons."""
    rows, reasons = np.flatnonzero(replay.candidates(vm) & replay.surely_open(vm)), why_not.reasons(vm)
    if len(rows):
        yield f"{vm.name} was refused, but fits {replay.hosts[rows[0]].name}"
    elif refusal.name != vm.name or dict(refusal.reasons) != reasons:
        yield f"{vm.name} is refused as {refusal.name} for {dict(refusal.reasons)}, it is for {reasons}"


def _placed(replay: Replay, vm: VmRequest, place: Placement, why: Evidence) -> Iterator[str]:
    """Its moves can be made, it fits, and it won as the evidence says. From now on it stands there."""
    if why.epoch > replay.epoch:
        replay.start_epoch(why.epoch)
    if len(why.moves) > replay.request.most_moves:
        yield f"{vm.name} moves {len(why.moves)} VMs, {replay.request.most_moves} may be moved"
    stuck = [f"{move.name} can't move to cells {move.cells_after}" for move in why.moves if not replay.move(move)]
    row, candidates = replay.fleet.index.get(place.host, -1), replay.candidates(vm)
    columns = replay.seat(row, vm.profile.shape, place.cells, new=True) if row >= 0 and candidates[row] else []
    if stuck or not columns:
        yield from stuck or [f"{vm.name} does not fit cells {place.cells} of {place.host}"]
        return
    open_too, ranks, count = candidates & replay.surely_open(vm), replay.ranks(vm), int(candidates.sum())
    score, broken = float(ranks["score"][row]), int(ranks["broken"][row])
    if why.moves or open_too.sum() <= why.candidates < count:
        count = why.candidates
    open_too[row] = True
    if abs(score - why.score) <= _SLACK:
        score = why.score
    yield from _differences(vm, why, why._replace(candidates=count, score=score, broken=broken))
    rows = np.flatnonzero(open_too)
    for rank in ranks.values() if not why.searched else ():
        above = rank[rows] - rank[row]
        if above.min() < -_SLACK:
            yield f"{vm.name}: {replay.hosts[rows[above.argmin()]].name} would have been better than {place.host}"
            break
        rows = rows[abs(above) <= _SLACK]
    yield from _differences(vm, place, replay.place(vm, row, columns))


def _differences(vm: VmRequest, said: Placement | Evidence, found: Placement | Evidence) -> list[str]:
    fields = zip(said._fields, said, found, strict=True)
    return [f"{vm.name}: {field} is said to be {claim}, it is {fact}" for field, claim, fact in fields if claim != fact]


# --- N+1 --------------------------------------------------------------------------------------------------------------


def _losses(replay: Replay, plan: Plan, level: Level) -> Iterator[str]:
    """Each domain is lost alone, of the clusters with a rule that the plan comes to, or that have members of its hard
    groups: all VMs restart, or it is exposed. Then it is named, if in a cluster that the plan comes to, and nothing is
    placed there if that is ruled out."""
    hosts, index = replay.hosts, replay.fleet.index
    placed = {place.vm_id: hosts[index[place.host]].cluster for place in plan.placed if place.host in index}
    groups = {group for vm in replay.request.vms if vm.vm_id in placed for group in vm.groups if group.hard}
    touched = {*placed.values()} | {hosts[row].cluster for group in groups for row in replay.members[group.name]}
    domains: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for row, host in enumerate(hosts):
        domains[host.cluster, replay.fleet.domain(row, level)].append(row)
    said = {(each.cluster, each.domain): each for each in plan.evacuations if each.level is level}
    exposed = set[Exposed]()
    for (cluster, domain), rows in domains.items():
        modes = _modes(replay, level, rows[0])
        if (cluster not in touched or not modes) and (cluster, domain) not in said:
            continue
        each = said.get((cluster, domain), Evacuation(domain, level, cluster, {}))
        if not each.without_place:
            yield from _restarts(replay, each, rows)
            continue
        named = Exposed(domain, level, cluster, min(vm.name for vm in each.without_place), len(each.without_place))
        exposed.add(named)
        if cluster in placed.values() and named not in plan.exposed:
            yield f"{domain} has VMs that would have no place if it were lost, and is not named as exposed"
        new = [vm.name for row in rows for vm in replay.vms[hosts[row].name].values() if vm.vm_id in placed]
        if new and Spare.REQUIRED in modes:
            yield f"{new[0]} is on {domain}, whose VMs would have no place if it were lost"
    if not exposed >= {each for each in plan.exposed if each.level is level}:
        yield "a domain is named as exposed whose VMs would restart"


def _modes(replay: Replay, level: Level, row: int) -> set[Spare]:
    """What the request, and the cluster of the host in `row`, make of such a loss, but for nothing."""
    rules = (replay.request.spare, replay.hosts[row].spare)
    return {rule.mode for rule in rules if rule.level is level and rule.mode is not Spare.OFF}


def _restarts(replay: Replay, said: Evacuation, lost: Sequence[int]) -> Iterator[str]:
    """All of the domain's VMs at once, while everybody else stays in place: elsewhere in the cluster, where they keep
    their addresses, and where they may stand and have room."""
    vms = {vm.vm_id: (vm, replay.hosts[row]) for row in lost for vm in replay.vms[replay.hosts[row].name].values()}
    if said.seats.keys() != vms.keys():
        yield f"{said.domain} has {len(vms)} VMs, and where they would restart is said of {len(said.seats)}"
        return
    names, taken = {group.name for vm, _ in vms.values() for group in vm.groups}, []
    members = {name: [row for row in replay.members[name] if row not in lost] for name in names}
    for vm_id, (name, cells) in said.seats.items():
        (vm, old), row = vms[vm_id], replay.fleet.index.get(name, -1)
        shape, new = vm.profile.shape, replay.hosts[row]
        near = (new.cluster, new.vrf) == (old.cluster, old.vrf) and {*chain(*old.prefixes)} <= {*chain(*new.prefixes)}
        kept = all(replay.keeps(group, members[group.name])[row] for group in vm.groups if group.hard)
        stands = row not in (-1, *lost) and near and kept and replay.may_stand(vm.profile)[row]
        columns = replay.seat(row, shape, cells) if stands else []
        if not columns:
            yield f"{vm.name} can't restart in cells {cells} of {name} when {said.domain} is lost"
            continue
        replay.take(row, shape, columns)
        taken.append((row, shape, columns))
        for group in vm.groups:
            members[group.name].append(row)
    for each in taken:
        replay.take(*each, sign=-1)
