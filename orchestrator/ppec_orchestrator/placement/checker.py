# SPDX-License-Identifier: Apache-2.0
"""Checks a plan against its fleet and request, from the rules alone: what the planner worked out is not believed.

Plain Python over plain dictionaries, host by host and step by step, and none of the planner's code but its data: slow,
short and independent, so that a plan on which both agree is right. `check` returns the faults found, none for a sound
plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import combinations
from math import sqrt
from uuid import UUID

from ppec_contract.api_placement import Policy
from ppec_contract.vm import CpuPolicy, SmtPolicy
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState
from ppec_orchestrator.placement.plan import Evidence, Move, Placement, Plan, Refusal
from ppec_orchestrator.placement.request import Group, PlanRequest, Shape, Spare, VmRequest

# What one of a VM's cells gives, by resource.
Part = dict[str, int]
_MEMORY, _CPU = {"memory_mib": 1, "pages_2m": 2, "pages_1g": 1024}, {"cores": 1, "shared_vcpus": 1}
_RESOURCES = (*_CPU, *_MEMORY, "nvme")
_PAGES = {0: "memory_mib", 2048: "pages_2m", 1048576: "pages_1g"}
_SEVERAL = 2.0**53


def check(fleet: Fleet, request: PlanRequest, plan: Plan) -> list[str]:
    """Every VM is answered once; each placement fits where it stands, when its turn came, and none of the hosts that
    fit scored lower; where a VM was refused, none did fit."""
    answered = Counter([place.vm_id for place in plan.placed] + [refusal.vm_id for refusal in plan.refused])
    if answered != Counter(vm.vm_id for vm in request.vms):
        return ["the plan does not answer each VM of the request once"]
    replay, by_id = Replay(fleet, request), {vm.vm_id: vm for vm in request.vms}
    steps: dict[int, tuple[Placement, Evidence] | Refusal] = {one.step: one for one in plan.refused}
    steps |= {why.step: (place, why) for place, why in zip(plan.placed, plan.evidence, strict=True)}
    faults: list[str] = []
    for _, answer in sorted(steps.items()):
        if isinstance(answer, Refusal):
            faults += replay.refused(by_id[answer.vm_id], answer)
        else:
            faults += replay.placed(by_id[answer[0].vm_id], *answer)
    return faults if len(steps) == len(request.vms) else [*faults, "two VMs were planned in one step"]


class Replay:
    """The fleet as the plan changes it."""

    def __init__(self, fleet: Fleet, request: PlanRequest) -> None:
        self.hosts = fleet.hosts
        self.request = request
        self.free: dict[tuple[str, int], dict[str, int]] = {
            (h.name, c.cell): {
                r: getattr(c, "memory_free_mib" if r == "memory_mib" else f"{r}_free") for r in _RESOURCES
            }
            for h in fleet.hosts
            for c in h.cells
        }
        self.disk = {
            h.name: {"": h.disk_free_mib} | {name: p.free_mib for name, p in h.pools.items()} for h in self.hosts
        }
        self.addresses = dict(fleet.free_addresses)
        self.vms = {h.name: len(h.vms) for h in self.hosts}
        self.members = Counter((g.name, h.name) for h in self.hosts for vm in h.vms for g in vm.groups)
        self.of_batch = Counter(request.batch_hosts)
        self.seats: dict[UUID, tuple[int, ...]] = {}
        self.means = (-1, [0.0] * 4, [0.0] * 4)

    def refused(self, vm: VmRequest, refusal: Refusal) -> list[str]:
        # A host that N+1 closes does fit.
        loose = self.request.spare.mode is Spare.REQUIRED
        fits = [] if loose else [h.name for h in self.hosts if any(self.ways(h, vm))]
        faults = [f"{vm.name} was refused, but fits {fits[0]}"] if fits else []
        if sum(refusal.reasons.values()) != len(self.hosts):
            faults.append(f"{vm.name}: {sum(refusal.reasons.values())} hosts have a reason, of {len(self.hosts)}")
        return faults

    def placed(self, vm: VmRequest, place: Placement, why: Evidence) -> list[str]:
        if why.epoch > self.means[0]:
            self.means = (why.epoch, *self.spread())
        stuck = [f"{move.name} can't move to cells {move.cells_after}" for move in why.moves if not self.move(move)]
        if stuck:
            return stuck
        scores = {h.name: best for h in self.hosts if (best := self.best(h, vm)) is not None}
        host = next((h for h in self.hosts if h.name == place.host), None)
        ways = {tuple(sorted(part)): part for part in self.ways(host, vm)} if host else {}
        part = ways.get(place.cells)
        if host is None or part is None:
            return [f"{vm.name} does not fit cells {place.cells} of {place.host}"]
        faults = [
            f"{vm.name} takes {place.per_cell} of cell {c}, not {p}" for c, p in part.items() if place.per_cell != p
        ]
        rank, score = scores[host.name]
        # What N+1 closes, and which hosts moves could open, is not worked out here: see `exposed` and `moves.py`.
        chosen = self.request.spare.mode is not Spare.REQUIRED and not why.moves
        if chosen and len(scores) != why.candidates:
            faults.append(f"{vm.name}: {why.candidates} candidates are claimed, there are {len(scores)}")
        # The sums of `balanced` come out a little different in another order, and a root near zero makes much of a
        # little; what `pack` counts is whole.
        slack = 0.0 if self.request.policy is Policy.PACK else 1e-6
        if abs(score - why.score) > slack or rank[0] != why.broken:
            faults.append(f"{vm.name} on {host.name}: a score of {why.score} is claimed, it is {score}")
        better = (
            []
            if why.searched or not chosen
            else [
                name
                for name, (r, s) in scores.items()
                if r < rank or (r == rank and (s < score - slack or (not slack and s == score and name < host.name)))
            ]
        )
        faults += [f"{vm.name}: {better[0]} would have been better than {host.name}"] if better else []
        self.take(host, vm, part)
        return faults

    def move(self, move: Move) -> bool:
        """A VM changes to other cells of its host, if these have the room before it leaves its own."""
        host = next((h for h in self.hosts if h.name == move.host), None)
        vm = next((v for v in host.vms if v.vm_id == move.vm_id), None) if host else None
        cells = {c.cell: c for c in host.cells} if host else {}
        if host is None or vm is None or not vm.movable or self.seats.get(vm.vm_id, vm.cells) != move.cells_before:
            return False
        shape, count = vm.profile.shape, len(move.cells_after)
        after = {c: p for c in move.cells_after if (p := _part(shape, cells[c], count)) and self.gives(host, c, p)}
        before = {c: _part(shape, cells[c], len(move.cells_before)) or {} for c in move.cells_before}
        if count != len(before) or set(after) != set(move.cells_after):
            return False
        for parts, sign in ((before, 1), (after, -1)):
            for cell, part in parts.items():
                for resource, amount in part.items():
                    self.free[host.name, cell][resource] += sign * amount
        self.seats[vm.vm_id] = move.cells_after
        return True

    def take(self, host: HostState, vm: VmRequest, parts: Mapping[int, Part]) -> None:
        for cell, part in parts.items():
            for resource, amount in part.items():
                self.free[host.name, cell][resource] -= amount
        self.disk[host.name][vm.profile.shape.pool] -= vm.profile.shape.disk_mib
        for prefix in self.granted(host, vm) or ():
            if prefix in self.addresses:
                self.addresses[prefix] -= 1
        self.members.update((group.name, host.name) for group in vm.groups)
        self.of_batch[host.name] += 1
        self.vms[host.name] += 1

    # --- what fits -------------------------------------------------------------------------------------------------

    def ways(self, host: HostState, vm: VmRequest) -> Iterator[dict[int, Part]]:
        """The sets of cells that the VM could take here, fewest cells first and only so many; none where it may not
        stand."""
        shape = vm.profile.shape
        room = self.disk[host.name].get(shape.pool, -1) >= shape.disk_mib and self.granted(host, vm) is not None
        if not room or not _may_stand(host, vm) or not all(self.keeps(g, host) for g in vm.groups if g.hard):
            return
        for count in range(
            1, (min(16, len(host.cells), shape.vcpus, shape.memory_mib) if shape.numa.multi_cell else 1) + 1
        ):
            found = False
            for width in sorted({c.threads_per_core for c in host.cells}):
                alike = [c for c in host.cells if c.threads_per_core == width]
                parts = {c.cell: p for c in alike if (p := _part(shape, c, count)) and self.gives(host, c.cell, p)}
                if len(parts) >= count:
                    found = True
                    yield from ({c: parts[c] for c in chosen} for chosen in _chosen(host, parts, count))
            if found:
                return

    def granted(self, host: HostState, vm: VmRequest) -> list[int] | None:
        """The prefix of each address, networks that name prefixes first; None where one is lacking."""
        chosen: list[int] = []
        for network in sorted(vm.profile.networks, key=lambda each: each is None):
            mine = [[p for f in host.prefixes for p in f if p in network]] if network is not None else host.prefixes
            for family in mine:
                free = [p for p in family if self.addresses.get(p, 1 + chosen.count(p)) > chosen.count(p)]
                if not free:
                    return None
                chosen.append(free[0])
        return chosen if host.prefixes else None

    def gives(self, host: HostState, cell: int, part: Part) -> bool:
        return all(self.free[host.name, cell][resource] >= amount for resource, amount in part.items())

    def keeps(self, group: Group, host: HostState) -> bool:
        """Apart: none of the group in the host's domain. Together: all of them there, or there are none."""
        peers = [h for h in self.hosts if self.members[group.name, h.name] > 0]
        here = any(getattr(h, _DOMAIN[group.level]) == getattr(host, _DOMAIN[group.level]) for h in peers)
        return not here if group.apart else here or not peers

    # --- what wins -------------------------------------------------------------------------------------------------

    def best(self, host: HostState, vm: VmRequest) -> tuple[tuple[int, int, int], float] | None:
        """The host's rank and score; None where the VM does not fit."""
        ways = list(self.ways(host, vm))
        if not ways:
            return None
        broken = sum(not self.keeps(group, host) for group in vm.groups if not group.hard)
        if self.request.policy is Policy.PACK:
            return (broken, 0, 0), min(self.left(host, vm.profile.shape, way) for way in ways)
        score = self.balanced(host, vm.profile.shape)
        if self.request.policy is Policy.BALANCED:
            return (broken, 0, 0), score
        on_rack = sum(
            n for name, n in self.of_batch.items() for h in self.hosts if h.name == name and h.rack == host.rack
        )
        return (broken, self.of_batch[host.name], on_rack), score

    def left(self, host: HostState, shape: Shape, way: Mapping[int, Part]) -> float:
        """`pack`: cores left, then MiB or pages, in the one cell; over several, their number and the CPUs of the
        host."""
        cpu, memory = _cpu(shape), _PAGES[shape.numa.huge_page_kib]
        if len(way) > 1:
            usable = (c.cell for c in host.cells if _part(shape, c, 1))
            return (len(way) - 1) * _SEVERAL + sum(self.free[host.name, c][cpu] for c in usable) * 2.0**40
        ((cell, part),) = way.items()
        free = self.free[host.name, cell]
        return (free[cpu] - part[cpu]) * 2.0**40 + free[memory] - part[memory]

    def balanced(self, host: HostState, shape: Shape) -> float:
        """Ganeti's score with the VM here: the sums are those of the epoch's begin, the host's own figures today's."""
        n, (_, means, variances) = len(self.hosts), self.means
        memory, disk, cpus = _whole(host)
        counts = range(1, (min(16, len(host.cells), shape.vcpus, shape.memory_mib) if shape.numa.multi_cell else 1) + 1)
        fewest = min(p[_cpu(shape)] * k for k in counts for c in host.cells if (p := _part(shape, c, k)))
        page_kib = shape.numa.huge_page_kib or 1024
        size = shape.memory_mib * 1024 // page_kib * page_kib // 1024
        by = (-size / memory, -(0 if shape.pool else shape.disk_mib) / disk, fewest / cpus, 1.0)
        after = [
            v + (2 * x * d + d * d) / n - (2 * mean * d + d * d / n) / n
            for v, x, mean, d in zip(variances, self.figures(host), means, by, strict=True)
        ]
        return sum(w * sqrt(max(v, 0.0)) for w, v in zip((1, 1, 1, 4 + 1 / 320), after, strict=True))

    def figures(self, host: HostState) -> tuple[float, float, float, float]:
        cells = [self.free[host.name, c.cell] for c in host.cells]
        memory, disk, cpus = _whole(host)
        free = sum(cell[r] * unit for cell in cells for r, unit in _MEMORY.items())
        idle = sum(cell[r] for cell in cells for r in _CPU)
        return free / memory, self.disk[host.name][""] / disk, 1 - idle / cpus, float(self.vms[host.name])

    def spread(self) -> tuple[list[float], list[float]]:
        columns = list(zip(*(self.figures(h) for h in self.hosts), strict=True))
        means = [sum(column) / len(column) for column in columns]
        return means, [sum((x - m) ** 2 for x in c) / len(c) for c, m in zip(columns, means, strict=True)]


_DOMAIN = {"host": "name", "rack": "rack", "datacentre": "datacentre"}


def _may_stand(host: HostState, vm: VmRequest) -> bool:
    where, profile = vm.profile.where, vm.profile
    places = {p: getattr(where, p) for p in ("region", "datacentre", "cluster", "rack", "vrf")} | {"name": where.host}
    has = [k in host.labels and v in ("", host.labels[k]) for k, v in where.labels]
    lacks = [not (k in host.labels and v in ("", host.labels[k])) for k, v in where.without]
    usable = host.live and not host.draining and host.name not in vm.excluded_hosts
    known = profile.capabilities <= host.capabilities and profile.architecture == host.architecture
    # Of an address that is the VM's by number only the prefix matters.
    mine = [any(p in family for family in host.prefixes for p in network) for network in profile.fixed]
    there = [getattr(host, place) == wanted for place, wanted in places.items() if wanted is not None]
    return usable and known and all(has + lacks + mine + there)


def _cpu(shape: Shape) -> str:
    return "shared_vcpus" if shape.numa.cpus is CpuPolicy.SHARED else "cores"


def _part(shape: Shape, cell: CellState, count: int) -> Part | None:
    """What each of so many cells like this one gives; None where the VM can't use it, or not so many."""
    numa, threads = shape.numa, cell.threads_per_core
    if numa.cpus is CpuPolicy.SHARED:
        cpus = whole = shape.vcpus
        usable = cell.shared_cpus >= shape.vcpus
    else:
        width = 1 if numa.smt is SmtPolicy.ISOLATE else threads
        cpus, whole = -(-shape.vcpus // (width * count)), -(-shape.vcpus // width)
        usable = numa.smt is not SmtPolicy.REQUIRE or threads > 1
    if not usable or whole < count:
        return None
    units = shape.memory_mib * 1024 // (numa.huge_page_kib or 1024)
    part = dict.fromkeys(_RESOURCES, 0)
    return part | {_cpu(shape): cpus, _PAGES[numa.huge_page_kib]: -(-units // count), "nvme": -(-shape.nvme // count)}


def _chosen(host: HostState, parts: Mapping[int, Part], count: int) -> Iterator[tuple[int, ...]]:
    """So many of the cells; of one socket where one has enough."""
    sockets: dict[int, list[int]] = {}
    for cell in host.cells:
        if cell.cell in parts:
            sockets.setdefault(cell.socket, []).append(cell.cell)
    near = [cells for cells in sockets.values() if len(cells) >= count]
    for cells in near or [sorted(parts)]:
        yield from combinations(sorted(cells), count)


def _whole(host: HostState) -> tuple[float, float, float]:
    """Memory, disk and CPUs of the machine, its own reserve included; at least one of each."""
    memory = sum(getattr(c, r) * unit for c in host.cells for r, unit in _MEMORY.items())
    cpus = sum(getattr(c, r) for c in host.cells for r in _CPU) + sum(c.cores_reserved for c in host.cells)
    return max(memory + sum(c.memory_reserved_mib for c in host.cells), 1), max(host.disk_mib, 1), max(cpus, 1)
