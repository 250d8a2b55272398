# SPDX-License-Identifier: Apache-2.0
"""The fleet as a plan changes it, by the rules in plain words: where a VM fits, what decides between the hosts that it
fits, and what it takes there. For the checker, and with none of the planner's code but its data.

All is worked out anew for each VM, of all hosts at once, so that nothing has to be kept current but what is free.
Arrays have shape (hosts,) or (cells, hosts), in the fleet's order, which is that of the hosts' names."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ppec_contract.api_placement import Policy
from ppec_contract.vm import CpuPolicy, SmtPolicy
from ppec_orchestrator.placement.fleet import BoolArray, Fleet, HostState, IntArray, SeatedVm
from ppec_orchestrator.placement.plan import Move, Placement
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import (
    Group,
    Level,
    Network,
    PlanRequest,
    Profile,
    Shape,
    Spare,
    VmRequest,
    Where,
)

Floats = NDArray[np.float64]
_PLACES = ("region", "datacentre", "cluster", "rack", "vrf")
_PAGES = {0: "memory_mib", 2048: "pages_2m", 1048576: "pages_1g"}
_MIB = {"memory_mib": 1, "pages_2m": 2, "pages_1g": 1024}
# Ganeti's, of memory, disk, CPUs and VMs: the figures that `balanced` evens out.
_WEIGHTS = np.array([1, 1, 1, 4 + 1 / 320])
_MOST_CELLS = 16


class Replay:
    """Which hosts N+1 closes, where it may, is not worked out."""

    def __init__(self, fleet: Fleet, request: PlanRequest) -> None:
        hosts, cells = fleet.hosts, {name: figure.T.copy() for name, figure in fleet.cells.items()}
        self.fleet, self.hosts, self.request = fleet, hosts, request
        rules = ([request.spare.mode, host.spare.mode] for host in hosts)
        self._guarded: BoolArray = np.array([Spare.REQUIRED in modes for modes in rules], dtype=np.bool_)
        self.threads, self._sockets, self._shared = cells["threads_per_core"], cells["socket"], cells["shared_cpus"]
        self.free = {each: cells[f"{each}_free"] for each in ("cores", "shared_vcpus", "pages_2m", "pages_1g", "nvme")}
        self.free["memory_mib"] = cells["memory_free_mib"]
        self.sizes: Mapping[str, IntArray] = {each: cells[each] for each in self.free}
        # By pool; less than nothing where a host has no such pool, or it is gone.
        self.disk_mib = defaultdict(lambda: np.full(len(hosts), -1), {"": fleet.disk_free_mib.copy()})
        # By the name of the host; and by that of the group, the rows of its VMs' hosts.
        self.vms = {host.name: {vm.vm_id: vm for vm in host.vms} for host in hosts}
        self.members: defaultdict[str, list[int]] = defaultdict(list)
        for row, host in enumerate(hosts):
            for group in (group for vm in host.vms for group in vm.groups):
                self.members[group.name].append(row)
            for name, pool in host.pools.items():
                self.disk_mib[name][row] = pool.free_mib if pool.size_mib else -1
        self._addresses = dict(fleet.free_addresses)
        # Numbers for the prefixes that hosts have, and each host's; and by level the number of its domain.
        self._prefixes = {each: number for number, each in enumerate(dict.fromkeys(host.prefixes for host in hosts))}
        self._served: IntArray = np.array([self._prefixes[host.prefixes] for host in hosts], dtype=np.int64)
        names = {level: [fleet.domain(row, level) for row in range(len(hosts))] for level in Level}
        self._domains = {level: np.unique(each, return_inverse=True)[1] for level, each in names.items()}
        self._standing: dict[Profile, BoolArray] = {}
        self._batch: IntArray = np.array([request.batch_hosts.get(host.name, 0) for host in hosts], dtype=np.int64)
        self._count: IntArray = np.array([len(host.vms) for host in hosts], dtype=np.int64)
        # Of the whole machine, its own reserve included. VMs are just counted.
        machine = cells | {"memory_mib": cells["memory_mib"] + cells["memory_reserved_mib"]}
        machine["cores"] = cells["cores"] + cells["cores_reserved"]
        self._whole = _figures(machine, fleet.disk_mib, 0 * self._count).clip(min=1)
        self.epoch = 0
        if hosts:
            self.start_epoch(0)

    # --- where a VM fits ---------------------------------------------------------------------------------------------

    def surely_open(self, vm: VmRequest) -> BoolArray:
        """Where N+1 turns the VM away for nothing. It may be in somebody's way from afar, who is of its hard groups."""
        members = [row for group in vm.groups if group.hard for row in self.members[group.name]]
        return np.broadcast_to(~(self._guarded[members].any() | self._guarded), len(self.hosts))

    def candidates(self, vm: VmRequest) -> BoolArray:
        shut, profile = vm.excluded_hosts | self.request.contended_hosts, vm.profile
        fits: BoolArray = self.may_stand(profile) & self.enough_addresses(profile)
        fits &= self._lefts(profile.shape) < np.inf
        fits[[self.fleet.index[name] for name in shut if name in self.fleet.index]] = False
        for group in vm.groups:
            fits &= not group.hard or self.keeps(group, self.members[group.name])
        return fits

    def may_stand(self, profile: Profile) -> BoolArray:
        """Whatever is free in cells and prefixes."""
        if profile not in self._standing:
            stands = [lasting(host, profile) is None for host in self.hosts]
            self._standing[profile] = np.array(stands, dtype=np.bool_)
        return np.logical_and(self._standing[profile], self.disk_mib[profile.shape.pool] >= profile.shape.disk_mib)

    def enough_addresses(self, profile: Profile) -> BoolArray:
        granting = [granted(each, profile.networks, self._addresses) is not None for each in self._prefixes]
        enough: BoolArray = np.array(granting, dtype=np.bool_)[self._served]
        return enough

    def keeps(self, group: Group, members: Sequence[int]) -> BoolArray:
        """Where members are on the hosts in these rows. Apart: none of them is in a host's domain. Together: one is, or
        there are none."""
        domains = self._domains[group.level]
        taken = np.zeros(len(domains), dtype=np.bool_)
        taken[domains[members]] = True
        here: BoolArray = taken[domains]
        return ~here if group.apart else here | (not members)

    def seat(self, row: int, shape: Shape, cells: Sequence[int], *, new: bool = False) -> list[int]:
        """The columns of these cells if the VM can have just them, in equal parts, of cores of one width; or none. A
        `new` one has the fewest that will do, and of one socket if one has enough."""
        columns, count, threads = self._columns(row, cells), len(cells), self.threads[:, row]
        if not columns or len(columns) != count or any(threads[columns] != threads[columns[0]]):
            return []
        able, sockets = self._able(shape, count, self.free, [row])[:, 0], self._sockets[:, row]
        near = max(Counter(zip(sockets[able].tolist(), threads[able].tolist(), strict=True)).values(), default=0)
        far = near >= count and any(sockets[columns] != sockets[columns[0]])
        fewer = any(self._enough(shape, less, self.free, [row])[0] for less in range(1, count))
        return columns if all(able[columns]) and not (new and (far or fewer)) else []

    def _columns(self, row: int, cells: Sequence[int]) -> list[int]:
        return [column for column, cell in enumerate(self.hosts[row].cells) if cell.cell in cells]

    def on_any_number(self, shape: Shape, amounts: Mapping[str, IntArray]) -> BoolArray:
        """Whether the VM could have some number of cells, were that much free."""
        counts = range(1, len(self.threads) + 1 if shape.numa.multi_cell else 2)
        can: BoolArray = np.logical_or.reduce([self._enough(shape, count, amounts) for count in counts])
        return can

    def _enough(
        self, shape: Shape, count: int, amounts: Mapping[str, IntArray], rows: slice | list[int] = slice(None)
    ) -> BoolArray:
        """Whether the VM could have so many cells of one width."""
        able, threads = self._able(shape, count, amounts, rows), self.threads[:, rows]
        of_width = [(able & (threads == width)).sum(axis=0) >= count for width in np.unique(threads)]
        enough: BoolArray = np.logical_or.reduce(of_width)
        return enough

    def _able(
        self, shape: Shape, count: int, amounts: Mapping[str, IntArray], rows: slice | list[int] = slice(None)
    ) -> BoolArray:
        """The cells that could be one of so many, each with a core and memory of its own."""
        wanted, most = needs(shape, self.threads[:, rows]), _MOST_CELLS if shape.numa.multi_cell else 1
        cpus, memory, _ = wanted.values()
        able: BoolArray = self.usable(shape)[:, rows] & (cpus >= count) & (memory >= count) & (count <= most)
        for resource, amount in wanted.items():
            able &= amounts[resource][:, rows] >= -(-amount // count)
        return able

    def usable(self, shape: Shape) -> BoolArray:
        """The cells that could serve the VM, were they only large enough."""
        if shape.numa.cpus is CpuPolicy.SHARED:
            return self._shared >= shape.vcpus
        return self.threads >= (2 if shape.numa.smt is SmtPolicy.REQUIRE else 1)

    # --- what decides between hosts that it fits ---------------------------------------------------------------------

    def ranks(self, vm: VmRequest) -> dict[str, NDArray[Any]]:
        """Lower is better, by the first that differs, between candidates: these break soft groups alone. `spread` has
        VMs of a batch on hosts of their own, then in racks; scores of `pack` are whole numbers, and of the same the
        first by name wins."""
        policy, shape, racks = self.request.policy, vm.profile.shape, self._domains[Level.RACK]
        broken: IntArray = np.zeros(len(self.hosts), dtype=np.int64)
        for group in vm.groups:
            broken += ~self.keeps(group, self.members[group.name])
        if policy is Policy.PACK:
            return {"broken": broken, "score": self._lefts(shape), "name": np.arange(len(self.hosts))}
        if policy is Policy.BALANCED:
            return {"broken": broken, "score": self._balanced(shape)}
        in_rack = np.bincount(racks, self._batch)[racks]
        return {"broken": broken, "host": self._batch, "rack": in_rack, "score": self._balanced(shape)}

    def _lefts(self, shape: Shape) -> Floats:
        """CPUs left, then MiB or pages, in the cell with the fewest; over several cells, their number and the host's
        CPUs. Infinite where the VM does not fit."""
        (cpu, cpus), (memory, units), _ = needs(shape, self.threads).items()
        in_cell = (self.free[cpu] - cpus) * 2.0**40 + (self.free[memory] - units)
        lefts: Floats = np.where(self._able(shape, 1, self.free), in_cell, np.inf).min(axis=0)
        for count in range(2, len(self.threads) + 1 if shape.numa.multi_cell else 2):
            on_host = (count - 1) * 2.0**53 + (self.free[cpu] * self.usable(shape)).sum(axis=0) * 2.0**40
            lefts = np.where((lefts == np.inf) & self._enough(shape, count, self.free), on_host, lefts)
        return lefts

    def _balanced(self, shape: Shape) -> Floats:
        """Ganeti's score with the VM there: the sums are those of the epoch's begin, the host's own figures today's."""
        (_, cpus), (memory, units), _ = needs(shape, self.threads.max(axis=0)).items()
        needed, n = (units * _MIB[memory], 0 if shape.pool else shape.disk_mib, cpus, 1), len(self.hosts)
        by = np.array([need / whole for need, whole in zip(needed, self._whole, strict=True)])
        variances = self._variances + (by * (1 - 1 / n) - 2 * (self._shares() - self._means)) * by / n
        score: Floats = _WEIGHTS @ np.sqrt(variances.clip(min=0))
        return score

    def start_epoch(self, epoch: int) -> None:
        """`balanced` scores with the sums over all hosts as they are now."""
        self.epoch, shares = epoch, self._shares()
        self._means, self._variances = shares.mean(axis=1, keepdims=True), shares.var(axis=1, keepdims=True)

    def _shares(self) -> Floats:
        """Of what is unused."""
        shares: Floats = _figures(self.free, self.disk_mib[""], -self._count) / self._whole
        return shares

    # --- how a plan changes it ---------------------------------------------------------------------------------------

    def place(self, vm: VmRequest, row: int, columns: list[int]) -> Placement:
        """From now on it stands there, as its record will have it: it may restart anywhere in the host's VRF."""
        host, shape = self.hosts[row], vm.profile.shape
        taken = granted(host.prefixes, vm.profile.networks, self._addresses) or {}
        for prefix in self._addresses.keys() & taken.keys():
            self._addresses[prefix] -= taken[prefix]
        cells = tuple(host.cells[column].cell for column in columns)
        profile = Profile(shape, vm.profile.architecture, Where(vrf=host.vrf))
        self.vms[host.name][vm.vm_id] = SeatedVm(vm.vm_id, vm.name, profile, cells, vm.groups, movable=False)
        for group in vm.groups:
            self.members[group.name].append(row)
        self._batch[row] += 1
        self._count[row] += 1
        parts = dict.fromkeys(self.free, 0) | self.take(row, shape, columns)
        return Placement(vm.vm_id, vm.name, host.host_id, host.name, cells, shape.disk_mib, shape.pool, **parts)

    def move(self, move: Move) -> bool:
        """A VM changes to cells of its host that give it the same, and have it free before the VM leaves its own."""
        row, vm = self.fleet.index.get(move.host, -1), self.vms.get(move.host, {}).get(move.vm_id)
        if vm is None or not vm.movable or vm.cells != move.cells_before:
            return False
        shape, threads = vm.profile.shape, self.threads[:, row]
        before, after = self._columns(row, vm.cells), self.seat(row, shape, move.cells_after)
        if len(before) != len(after) or needs(shape, threads[before[0]]) != needs(shape, threads[after[0]]):
            return False
        self.take(row, shape, after)
        self.take(row, shape, before, -1)
        self.vms[move.host][vm.vm_id] = replace(vm, cells=move.cells_after)
        return True

    def take(self, row: int, shape: Shape, columns: list[int], sign: int = 1) -> dict[str, int]:
        """A VM takes its part of each of these cells; with a sign of -1, it gives it back."""
        wanted = needs(shape, self.threads[columns[0], row]).items()
        parts = {resource: -(-int(amount) // len(columns)) for resource, amount in wanted}
        for resource, part in parts.items():
            self.free[resource][columns, row] -= sign * part
        self.disk_mib[shape.pool][row] -= sign * shape.disk_mib
        return parts


def needs(shape: Shape, threads: IntArray) -> dict[str, IntArray | int]:
    """CPUs, memory and drives, in cells whose cores have so many threads: whole cores, as SMT siblings never serve two
    VMs, or shared vCPUs; MiB, or huge pages."""
    shared, isolated = shape.numa.cpus is CpuPolicy.SHARED, shape.numa.smt is SmtPolicy.ISOLATE
    cpus, memory = -(-shape.vcpus // (1 if shared or isolated else threads)), _PAGES[shape.numa.huge_page_kib]
    return {"shared_vcpus" if shared else "cores": cpus, memory: shape.memory_mib // _MIB[memory], "nvme": shape.nvme}


def granted(
    prefixes: Sequence[Sequence[int]], networks: Iterable[Network], left: Mapping[int, int]
) -> Mapping[int, int] | None:
    """How many addresses a VM on a host with these prefixes gets of each, networks that name the fewest prefixes first,
    those that name none last; None where one is lacking. `left` counts those of prefixes that have an end."""
    chosen: Counter[int] = Counter()
    for network in sorted(networks, key=lambda each: (each is None, len(each or ()))):
        named = [[prefix for family in prefixes for prefix in family if network and prefix in network]]
        for family in prefixes if network is None else named:
            free = [prefix for prefix in family if left.get(prefix, 1 + chosen[prefix]) > chosen[prefix]]
            if not free:
                return None
            chosen[free[0]] += 1
    return chosen if prefixes else None


def lasting(host: HostState, profile: Profile) -> Reason | None:
    """The first reason why the host never takes such a VM, whatever is free there."""
    where, served = profile.where, {prefix for family in host.prefixes for prefix in family}
    places = all(getattr(where, place) in (None, getattr(host, place)) for place in _PLACES)
    # A label without a value stands for any.
    labels = {(key, value) for key, own in host.labels.items() for value in ("", own)}
    kept = {
        Reason.OUTSIDE_SCOPE: places and where.host in (None, host.name),
        Reason.ARCHITECTURE: profile.architecture == host.architecture,
        Reason.LABELS: where.labels <= labels and not where.without & labels,
        Reason.SILENT: host.live,
        Reason.DRAINING: not host.draining,
        Reason.AGENT_TOO_OLD: profile.capabilities <= host.capabilities,
        Reason.NOT_SERVED: all(each is None or served & each for each in (*profile.networks, *profile.fixed)),
    }
    return next((reason for reason, keeps in kept.items() if not keeps), None)


def _figures(cells: Mapping[str, IntArray], disk_mib: IntArray, vms: IntArray) -> IntArray:
    """Memory, disk, CPUs and VMs, of shape (figures, hosts)."""
    memory_mib = sum(cells[each].sum(axis=0) * mib for each, mib in _MIB.items())
    return np.array([memory_mib, disk_mib, cells["cores"].sum(axis=0) + cells["shared_vcpus"].sum(axis=0), vms])
