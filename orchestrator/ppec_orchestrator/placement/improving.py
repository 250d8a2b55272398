# SPDX-License-Identifier: Apache-2.0
"""A second look at a plan that was made VM after VM: seats for the batch as a whole, so that all of it has room, or is
more evenly spread.

A batch that can't be placed whole has its first VMs placed up to the first for which no way is found, if not all or
nothing is wanted: as it says itself who comes first, nobody who comes later keeps them out, unless fewer vCPUs were
placed for it in all. Or the planner may choose whom to refuse, for the most vCPUs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, takewhile
from typing import Protocol
from uuid import UUID

import numpy as np

from ppec_contract.api_placement import Policy
from ppec_orchestrator.placement.candidates import Candidates
from ppec_orchestrator.placement.cell_by_cell import CellByCell
from ppec_orchestrator.placement.evening import Evening, worth_evening
from ppec_orchestrator.placement.plan import Plan
from ppec_orchestrator.placement.ranks import order
from ppec_orchestrator.placement.rearranging import Rearranging
from ppec_orchestrator.placement.request import PlanRequest, Profile, SpareRule, VmRequest
from ppec_orchestrator.placement.room_for_all import too_many
from ppec_orchestrator.placement.search import Search
from ppec_orchestrator.placement.shelf import Shelf
from ppec_orchestrator.placement.spare_rules import SpareRules
from ppec_orchestrator.placement.workspace import Seat, Workspace

# VMs in a batch that is rearranged, or searched for any way there is.
MOST_REARRANGED, MOST_SEARCHED = 1000, 200
# VMs in a batch that is tried otherwise where N+1 is required: every try is a plan with all of its searches.
MOST_GUARDED = 32
# Of all that is tried for one batch: to fill cells (`filling.py`), beside those of `rearranging.py`. A live fleet waits
# meanwhile: together they take a second or a few.
MOST_STEPS = 60_000
# And to choose whom to refuse (`knapsacks.py`), where the planner may: as long again. These steps are much smaller.
# After a lost race it is a glance: the plan may be made within a transaction.
MOST_KNAPSACK_STEPS, KNAPSACK_STEPS_AGAIN = 4_000_000, 400_000
# Beyond, a float doesn't tell one vCPU from none.
_EXACT = 2**53


class VmAfterVm(Protocol):
    """The planner: how a batch is planned, and what it is planned on."""

    workspace: Workspace
    shelf: Shelf

    def candidates(self, profile: Profile, policy: Policy) -> Candidates: ...
    def spare_rules(self, request: PlanRequest) -> SpareRules: ...
    def run(self, request: PlanRequest, *, seats: Sequence[Seat] = (), turns: Sequence[int] | None = None) -> Plan: ...


@dataclass(slots=True)
class _Means:
    """What is left to be tried for one batch, and for the shorter ones that it is tried as."""

    rearranging: Rearranging
    filling_steps: int = MOST_STEPS


class Improving:
    """One batch, within its plan."""

    def __init__(
        self,
        planner: VmAfterVm,
        request: PlanRequest,
        means: _Means | None = None,
        knapsack_steps: int = MOST_KNAPSACK_STEPS,
    ) -> None:
        self._planner = planner
        self._knapsack_steps = knapsack_steps
        self._workspace = planner.workspace
        self._candidates = planner.candidates
        self._request = request
        self._guards = planner.spare_rules(request).required
        # A warning decides nothing, so nobody looks on while ways are tried.
        self._tried = request if self._guards else replace(request, spare=SpareRule(clusters=False))
        self._means = means or _Means(Rearranging(planner.workspace, planner.candidates, request))
        self._order = order(request)
        self._vms = [request.vms[index] for index in self._order]

    def better(self, found: Plan) -> Plan:
        """The plan itself where none better is found."""
        better = self._better(found)
        return self._fuller(better) if self._request.most_vcpus and better.refused else better

    def gain(self, plan: Plan) -> tuple[int, ...]:
        """How much of what is asked for a plan of this request has, to compare: VMs, or what they are worth. So many
        VMs as are needed at least go before that."""
        count = len(plan.placed)
        if not self._request.most_vcpus:
            return (count,)
        worth = sum(self._worth(vm) for vm in self._placed_by(plan))
        return min(count, self._request.at_least), worth, count, -len(plan.moves)

    def _better(self, found: Plan) -> Plan:
        if self._request.most_moves and (found.refused or found.moves):
            return self._with_fewer_moves(found)
        if self._guards:
            return self._guarded(found) if found.refused else found
        if not found.refused:
            return self._evened(found)
        if not self._worth_a_search(found):
            return found
        whole = found if self._too_many(self._vms) else self._whole(found, searching=True)
        if not whole.refused or self._request.all_or_nothing:
            return whole
        return self._further(found)

    def _with_fewer_moves(self, found: Plan) -> Plan:
        """Without any, if that places as many: VMs may be moved where it helps, and what is opened for one VM of the
        batch can cost another its place."""
        request = replace(self._request, most_moves=0)
        still = Improving(self._planner, request)._better(self._planner.run(request))
        return max(found, still, key=lambda each: (self.gain(each), _first_refused(each), -len(each.moves)))

    def _guarded(self, found: Plan) -> Plan:
        """Where N+1 is required, a small batch is tried in the seats of other orders and policies; which of its VMs
        protect each other is decided as it is planned."""
        if len(self._vms) > MOST_GUARDED or self._too_many(self._vms) or not self._fit_alone(found):
            return found
        otherwise = [replace(self._request, all_or_nothing=not self._request.all_or_nothing)]
        otherwise += [replace(self._request, policy=each) for each in Policy if each is not self._request.policy]
        for request in otherwise:
            other = self._planner.run(request)
            whole = found if other.refused else self._if_whole(_those_placed(self._seats(other)), found)
            if not whole.refused:
                return whole
        return found

    def _evened(self, found: Plan) -> Plan:
        if not worth_evening(self._request, len(self._workspace.fleet.hosts)):
            return found
        evening = Evening(self._workspace, self._candidates, self._request)
        evened = self._if_whole(evening.seats(self._vms, self._seats(found)), found)
        # With a seat that the policy had to replace, nothing is known of how even it is.
        return evened if all(why.searched for why in evened.evidence) else found

    # --- all of it has room ------------------------------------------------------------------------------------------

    def _whole(self, found: Plan, *, searching: bool) -> Plan:
        """By one way after the other, those first that keep most of the policy's choices."""
        for seats in self._ways(found, searching):
            whole = self._if_whole(seats, found)
            if not whole.refused:
                return whole
        return found

    def _ways(self, found: Plan, searching: bool) -> Iterator[Sequence[Seat] | None]:
        cell_by_cell, filled = CellByCell(self._workspace, self._candidates, self._request), None
        if self._means.filling_steps > 0 and cell_by_cell.applies(self._vms):
            filled = cell_by_cell.fill(self._vms, self._means.filling_steps)
            self._means.filling_steps -= filled.steps
            if filled.impossible:
                return
        rearranging = self._means.rearranging
        yield rearranging.seats(self._vms, self._seats(found))
        # Largest first, or as asked: whichever it was not.
        otherwise = self._planner.run(replace(self._tried, all_or_nothing=not self._request.all_or_nothing))
        yield rearranging.seats(self._vms, self._seats(otherwise))
        if filled is not None and filled.seats is not None:
            yield filled.seats
        elif searching and len(self._vms) <= MOST_SEARCHED:
            yield Search(self._workspace, self._candidates, self._request).seats(self._vms)

    def _if_whole(self, seats: Sequence[Seat] | None, found: Plan) -> Plan:
        """With all VMs in place a seat can do that does not when its VM's turn comes, as cells and addresses go to
        whoever is there first."""
        seated = found if seats is None else self._planner.run(self._request, seats=seats)
        return found if seated.refused or len(seated.moves) > len(found.moves) else seated

    # --- as far as there is room -------------------------------------------------------------------------------------

    def _further(self, found: Plan) -> Plan:
        """The first VM that is refused gets a place with all before it; then the next. Not at the cost of VMs that come
        later and have more vCPUs, or are needed for there to be enough."""
        first, reached = _first_refused(found), _those_placed(self._seats(found))
        # More than these are too many by their count alone.
        most = bisect_left(range(len(self._vms)), True, key=lambda last: self._too_many(self._vms[: last + 1]))
        rearranging = self._means.rearranging
        while len(reached) < most and rearranging.left > 0:
            reached = rearranging.first_seats(self._vms[:most], reached)
            one_more = self._vms[: len(reached) + 1]
            longer = self._placed_whole(one_more) if len(reached) < most else []
            if len(longer) < len(one_more):
                break
            reached = longer
        seated = self._planner.run(self._request, seats=reached) if len(reached) > first else found
        enough = len(seated.placed) >= min(len(found.placed), self._request.at_least)
        further = _first_refused(seated) > first and enough and self._vcpus(seated) >= self._vcpus(found)
        return seated if further else found

    def _placed_whole(self, vms: Sequence[VmRequest]) -> list[Seat]:
        """Seats for these VMs alone, in their order; not of all where no way is found with what is left to try."""
        request = replace(self._tried, vms=tuple(vms), all_or_nothing=True)
        whole = Improving(self._planner, request, self._means)._whole(self._planner.run(request), searching=False)
        return _those_placed(self._seats(whole))

    # --- as much as there is room for ---------------------------------------------------------------------------------

    def _fuller(self, found: Plan) -> Plan:
        """Whom to refuse is the planner's choice: those with much memory for their vCPUs; or, where nobody minds whom
        he is beside, whom knapsacks leave out."""
        vms = self._request.vms
        leanest = sorted(self._order, key=lambda index: (-vms[index].priority, _memory_a_vcpu(vms[index])))
        plans = [found, self._planner.run(self._request, turns=leanest)]
        cell_by_cell = CellByCell(self._workspace, self._candidates, self._request)
        if cell_by_cell.applies(self._vms, priorities=True) and sum(map(self._worth, self._vms)) < _EXACT:
            chosen = cell_by_cell.fill_with_the_most(self._vms, self._worth, self._knapsack_steps)
            seats = {index: seat for index, seat in zip(self._order, chosen, strict=True) if seat is not None}
            turns = [*seats, *(index for index in leanest if index not in seats)]
            plans.append(self._planner.run(self._request, seats=list(seats.values()), turns=turns))
        return max(plans, key=self.gain)

    def _vcpus(self, plan: Plan) -> int:
        return sum(vm.profile.shape.vcpus for vm in self._placed_by(plan))

    def _worth(self, vm: VmRequest) -> int:
        """Its vCPUs; with priorities, of one of which a VM outweighs all of lower ones, as many times as that takes."""
        return vm.profile.shape.vcpus * self._weights[vm.priority]

    def _placed_by(self, plan: Plan) -> Iterator[VmRequest]:
        placed = {place.vm_id for place in plan.placed}
        return (vm for vm in self._vms if vm.vm_id in placed)

    @cached_property
    def _weights(self) -> dict[int, int]:
        weights: dict[int, int] = {}
        below = 0
        for priority, vms in groupby(sorted(self._vms, key=_priority), _priority):
            weights[priority] = below + 1
            below += weights[priority] * sum(vm.profile.shape.vcpus for vm in vms)
        return weights

    # --- what decides whether it is of use ---------------------------------------------------------------------------

    def _worth_a_search(self, found: Plan) -> bool:
        """A VM that fits nowhere alone does not fit beside others."""
        vms = self._vms
        if self._leave_as_much_wherever():
            return False
        if len(vms) > MOST_REARRANGED or not self._planner.shelf.holds(len({vm.profile for vm in vms})):
            return False
        return self._fit_alone(found)

    def _leave_as_much_wherever(self) -> bool:
        """VMs of one profile in one cell each, without rules about neighbours and with addresses to spare, leave each
        other as many places wherever they go."""
        vms, profile = self._vms, self._vms[0].profile
        return (
            all(vm.profile == profile and not vm.groups and not vm.excluded_hosts for vm in vms)
            and not profile.shape.numa.multi_cell
            and not self._workspace.addresses.choice_matters(len(profile.networks) * len(vms))
        )

    def _fit_alone(self, found: Plan) -> bool:
        """Each of those that the plan refuses."""
        refused = {one.vm_id for one in found.refused}
        left = {vm.kind: vm for vm in self._vms if vm.vm_id in refused}
        return all(self._planner.run(replace(self._tried, vms=(vm,))).placed for vm in left.values())

    def _too_many(self, vms: Sequence[VmRequest]) -> bool:
        if self._workspace.addresses.fewer_than(sum(len(vm.profile.networks) for vm in vms)):
            return True
        all_of_it = [self._candidates(vm.profile, self._request.policy) for vm in vms]
        standing = np.logical_or.reduce([candidates.standing for candidates in set(all_of_it)])
        return too_many(self._workspace, [candidates.fitting for candidates in all_of_it], np.flatnonzero(standing))

    def _seats(self, found: Plan) -> list[Seat | None]:
        """Of the VMs, in their order; None of one that was refused."""
        fleet, seats = self._workspace.fleet, dict[UUID, Seat]()
        for place in found.placed:
            row = fleet.index[place.host]
            cells = fleet.hosts[row].cells
            seats[place.vm_id] = row, tuple(column for column, cell in enumerate(cells) if cell.cell in place.cells)
        return [seats.get(vm.vm_id) for vm in self._vms]


def _priority(vm: VmRequest) -> int:
    return vm.priority


def _memory_a_vcpu(vm: VmRequest) -> float:
    return vm.profile.shape.memory_mib / vm.profile.shape.vcpus


def _first_refused(plan: Plan) -> int:
    """The step; that after the last where there is none."""
    return min([refusal.step for refusal in plan.refused], default=len(plan.placed))


def _those_placed(seats: Sequence[Seat | None]) -> list[Seat]:
    """Before the first that has none."""
    return [seat for seat in takewhile(bool, seats) if seat is not None]
