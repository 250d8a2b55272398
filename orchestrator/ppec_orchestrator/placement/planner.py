# SPDX-License-Identifier: Apache-2.0
"""The planner: places a batch of VMs one after the other and says of every other VM why not.

>>> plan(fleet, request).placed[0]
Placement(vm_id=…, name='web-1', host_id=3, host='h3', cells=(1,), cores=4, memory_mib=8192, disk_mib=20480)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from uuid import UUID

import numpy as np

from ppec_contract.api import Policy as PolicyName
from ppec_orchestrator.placement.balance import Floats
from ppec_orchestrator.placement.candidates import Candidates, code, counted
from ppec_orchestrator.placement.demand import CELL_RESOURCES
from ppec_orchestrator.placement.fleet import Fleet, IntArray
from ppec_orchestrator.placement.neighbours import Neighbours
from ppec_orchestrator.placement.plan import Evidence, Placement, Plan, Refusal
from ppec_orchestrator.placement.policies import POLICIES
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import PlanRequest, Profile, VmRequest
from ppec_orchestrator.placement.search import Search, Seat
from ppec_orchestrator.placement.workspace import Taken, Workspace

# VMs in a batch that is searched for a way to place it whole.
MOST_SEARCHED = 200
# By VM: the place it has and why.
Kept = Mapping[UUID, tuple[Placement, Evidence]]
# Profiles whose vectors are kept from plan to plan; of some 250 kB each on ten thousand hosts.
MOST_PROFILES = 256


def plan(fleet: Fleet, request: PlanRequest) -> Plan:
    """Never raises for want of room: what does not fit is refused with counted reasons. The fleet is not changed."""
    return Planner(fleet).plan(request)


class Planner:
    """Plans on one fleet, and keeps what it worked out for the next plan. Not for two threads at once."""

    def __init__(self, fleet: Fleet) -> None:
        self.workspace = Workspace(fleet)
        self._candidates: dict[tuple[Profile, PolicyName], Candidates] = {}
        self._era = 0

    @property
    def fleet(self) -> Fleet:
        return self.workspace.fleet

    def plan(self, request: PlanRequest, kept: Kept | None = None) -> Plan:
        """Leaves room as it was: two plans in a row are the same.

        `kept` are the places of those VMs of the request that an earlier plan placed where nothing came in between;
        they stay, if they still can."""
        self._forget()
        self.workspace.begin()
        try:
            found = self._run(request, kept or {})
            if found.refused and not kept and request.all_or_nothing and self._worth_a_search(request, found):
                vms = [request.vms[index] for index in _order(request)]
                seats = Search(self.workspace, self.candidates, request).seats(vms)
                found = found if seats is None else self._run(request, {}, seats)
            return found
        finally:
            self.workspace.end()

    def _forget(self) -> None:
        """What nobody holds between plans."""
        self.workspace.forget_changes()
        if len(self._candidates) > MOST_PROFILES:
            self._candidates.clear()
            self.workspace.addresses.forget()

    def _run(self, request: PlanRequest, kept: Kept, seats: Sequence[Seat] = ()) -> Plan:
        batch = _Batch(self, request, kept, seats)
        try:
            return batch.run()
        finally:
            batch.give_back()

    def _worth_a_search(self, request: PlanRequest, found: Plan) -> bool:
        """VMs of one profile without rules about neighbours leave room for each other wherever they go; a VM that fits
        nowhere alone does not fit beside others."""
        first, refused = request.vms[0], {one.vm_id for one in found.refused}
        if all(vm.profile == first.profile and not vm.groups and not vm.excluded_hosts for vm in request.vms):
            return False
        if len(request.vms) > MOST_SEARCHED:
            return False
        left = [vm for vm in request.vms if vm.vm_id in refused]
        return all(self._run(replace(request, vms=(vm,)), {}).placed for vm in left)

    def follow(self, fleet: Fleet, rows: Sequence[int]) -> None:
        """The fleet is another one now, of the same hosts, of which those in `rows` changed."""
        self.workspace.follow(fleet, rows)

    def closed(self, vm: VmRequest) -> IntArray | None:
        """The rows that earlier failures and hard groups close to the VM; None for none."""
        return Neighbours(self.workspace).closed(vm)

    def candidates(self, profile: Profile, policy: PolicyName) -> Candidates:
        """Current ones."""
        if self._era != self.workspace.era:
            self._era = self.workspace.era
            self._candidates.clear()
        key = (profile, policy)
        found = self._candidates.get(key)
        if found is None:
            found = self._candidates[key] = Candidates(self.workspace, profile, policy)
        else:
            found.refresh()
        return found


class _Batch:
    """`kept` VMs stay where they are. `seats`, where given, are where the VMs go, in the order they are planned in."""

    def __init__(self, planner: Planner, request: PlanRequest, kept: Kept, seats: Sequence[Seat] = ()) -> None:
        self.planner = planner
        self._seats = seats
        self.request = request
        self.kept = kept
        self.workspace = planner.workspace
        self.fleet = planner.fleet
        self.neighbours = Neighbours(planner.workspace, request.contended_hosts)
        self.taken: list[Taken] = []
        self.ranks = _Ranks(self.fleet, request)
        # By identity: hashing a profile takes longer than finding it, and a batch has few.
        self._candidates: dict[int, Candidates] = {}
        self._refusals: dict[tuple[int, int], dict[Reason, int]] = {}

    def run(self) -> Plan:
        moves_with_fleet = POLICIES[self.request.policy].moves_with_fleet
        self.workspace.start_epoch(0)
        found: dict[int, tuple[Placement, Evidence] | Refusal] = dict(self._keep())
        for step, index in enumerate(_order(self.request)):
            if index in found:
                continue
            if moves_with_fleet:
                self.workspace.step(step)
            found[index] = self._place(step, self.request.vms[index])
        answers = [found[index] for index in range(len(self.request.vms))]
        placed = [answer for answer in answers if not isinstance(answer, Refusal)]
        return Plan(
            placed=tuple(place for place, _ in placed),
            refused=tuple(answer for answer in answers if isinstance(answer, Refusal)),
            evidence=tuple(evidence for _, evidence in placed),
        )

    def give_back(self) -> None:
        for taken in reversed(self.taken):
            self.workspace.give_back(taken)
        self.taken.clear()

    def _keep(self) -> Iterator[tuple[int, tuple[Placement, Evidence]]]:
        """Takes what the kept VMs hold, before anything else is placed. One with rules about its neighbours is placed
        anew: they may have changed with others' places."""
        for index, vm in enumerate(self.request.vms):
            kept = self.kept.get(vm.vm_id)
            if kept is not None and not vm.groups and self._take_again(vm, kept[0]):
                yield index, kept

    def _take_again(self, vm: VmRequest, place: Placement) -> bool:
        row = self.fleet.index.get(place.host)
        candidates = self._current(vm)
        if row is None or not candidates.standing[row] or not self.workspace.addresses.enough(vm.profile.networks)[row]:
            return False
        columns = [column for column, cell in enumerate(self.fleet.hosts[row].cells) if cell.cell in place.cells]
        if len(columns) != len(place.cells):
            return False
        taken = self.workspace.take(row, columns, candidates.fitting, vm)
        if {**_NOTHING, **taken.part} != place.per_cell or self.workspace.overdrawn(taken):
            self.workspace.give_back(taken)
            return False
        self.taken.append(taken)
        if self.ranks.matter:
            self.ranks.placed(row)
        return True

    def _current(self, vm: VmRequest) -> Candidates:
        candidates = self._candidates.get(id(vm.profile))
        if candidates is None:
            candidates = self.planner.candidates(vm.profile, self.request.policy)
            self._candidates[id(vm.profile)] = candidates
        else:
            candidates.refresh()
        return candidates

    def _place(self, step: int, vm: VmRequest) -> tuple[Placement, Evidence] | Refusal:
        candidates = self._current(vm)
        narrowed = vm.groups or vm.excluded_hosts or self.request.contended_hosts
        closed = self.neighbours.closed(vm) if narrowed else None
        best = self._best(candidates, vm, closed)
        if best is None:
            return Refusal(vm.vm_id, vm.name, self._reasons(candidates, vm), step)
        row, count, broken = best
        if self._seats:
            row, columns = self._seats[step]
            broken = self.ranks.broken(self.workspace, vm, row)
        else:
            columns = tuple(candidates.cells(row))
        score = float(candidates.key[row])
        taken = self.workspace.take(row, columns, candidates.fitting, vm)
        self.taken.append(taken)
        if self.ranks.matter:
            self.ranks.placed(row)
        host = self.fleet.hosts[row]
        place = Placement(
            vm_id=vm.vm_id,
            name=vm.name,
            host_id=host.host_id,
            host=host.name,
            cells=tuple([host.cells[column].cell for column in columns]),
            disk_mib=vm.profile.shape.disk_mib,
            **{**_NOTHING, **taken.part},
        )
        why = Evidence(vm.vm_id, step, count, score, broken, self.workspace.epoch, searched=bool(self._seats))
        return place, why

    def _best(self, candidates: Candidates, vm: VmRequest, closed: IntArray | None) -> tuple[int, int, int] | None:
        """The row, over how many candidates it won, and how many soft groups it breaks; None where nothing is left."""
        key = candidates.key
        if closed is None or not len(closed):
            return self._lowest(key, vm, candidates.count)
        # Few rows, as a rule: closed for a moment in place, and opened again.
        kept = key.take(closed)
        key[closed] = np.inf
        try:
            return self._lowest(key, vm, candidates.count - int(np.count_nonzero(kept < np.inf)))
        finally:
            key[closed] = kept

    def _lowest(self, key: Floats, vm: VmRequest, count: int) -> tuple[int, int, int] | None:
        if not count:
            return None
        soft = any(not group.hard for group in vm.groups)
        if not soft and not self.ranks.matter:
            return int(key.argmin()), count, 0
        rank, broken = self.ranks.of(self.workspace, vm)
        fits = key < np.inf
        first = rank[fits].min()
        row = int(np.where(fits & (rank == first), key, np.inf).argmin())
        return row, count, int(broken[row]) if broken is not None else 0

    def _reasons(self, candidates: Candidates, vm: VmRequest) -> dict[Reason, int]:
        if not vm.groups and not vm.excluded_hosts and not self.request.contended_hosts:
            known = (id(vm.profile), len(self.workspace.changes))
            if known not in self._refusals:
                self._refusals[known] = counted(candidates.reasons())
            return dict(self._refusals[known])
        codes = candidates.reasons().copy()
        open_rows = candidates.standing.copy()
        for reason, rows in self.neighbours.shut(vm):
            mine = rows[open_rows[rows]]
            codes[mine] = code(reason)
            open_rows[mine] = False
        for rows in self.neighbours.within(vm):
            outside = open_rows.copy()
            outside[rows] = False
            codes[outside] = code(Reason.AFFINITY)
            open_rows &= ~outside
        return counted(codes)


_NOTHING = dict.fromkeys(CELL_RESOURCES, 0)


class _Ranks:
    """What comes before the score: fewest soft groups broken, then (where the policy keeps a batch apart) the fewest
    VMs of the batch on the host, then the fewest in the rack."""

    def __init__(self, fleet: Fleet, request: PlanRequest) -> None:
        self._fleet = fleet
        self.matter = POLICIES[request.policy].apart
        self._on_host: IntArray = np.zeros(len(fleet.hosts), dtype=np.int64)
        self._on_rack: IntArray = np.zeros(len(fleet.hosts), dtype=np.int64)
        if self.matter:
            for name, count in request.batch_hosts.items():
                if name in fleet.index:
                    self._count(fleet.index[name], count)

    def placed(self, row: int) -> None:
        self._count(row, 1)

    def of(self, workspace: Workspace, vm: VmRequest) -> tuple[IntArray, IntArray | None]:
        """Per host: its rank, and how many of the VM's soft groups it breaks (None where the VM has none)."""
        broken: IntArray | None = None
        for group in vm.groups:
            rows = None if group.hard else workspace.groups.rows(group)
            if rows is None:
                continue
            if broken is None:
                broken = np.zeros(len(self._on_host), dtype=np.int64)
            if group.apart:
                broken[rows] += 1
            else:
                broken += 1
                broken[rows] -= 1
        # No batch has as many VMs as the next factor.
        apart = (self._on_host << 20) + self._on_rack
        return apart + ((broken << 40) if broken is not None else 0), broken

    def broken(self, workspace: Workspace, vm: VmRequest, row: int) -> int:
        """How many of the VM's soft groups this host breaks."""
        broken = self.of(workspace, vm)[1]
        return int(broken[row]) if broken is not None else 0

    def _count(self, row: int, count: int) -> None:
        self._on_host[row] += count
        self._on_rack[self._fleet.places["rack"][self._fleet.hosts[row].rack]] += count


def _order(request: PlanRequest) -> Sequence[int]:
    """The order VMs are placed in. All or nothing: the largest first, so that the plan is the same whatever order they
    came in; otherwise as they came. The priority goes before both."""
    vms = request.vms
    if not request.all_or_nothing:
        if all(not vm.priority for vm in vms):
            return range(len(vms))
        return sorted(range(len(vms)), key=lambda index: -vms[index].priority)

    def size(index: int) -> tuple[object, ...]:
        vm, shape = vms[index], vms[index].profile.shape
        return (-vm.priority, -shape.vcpus, -shape.memory_mib, -shape.disk_mib, len(vm.name), vm.name)

    return sorted(range(len(vms)), key=size)
