# SPDX-License-Identifier: Apache-2.0
"""The fleet as a plan changes it: which hosts a VM fits, and what decides between them. What one host has room for is
`host_rules.py`'s word, asked once for all VMs of a profile and again when the host has changed.

Arrays have shape (hosts,), in the fleet's order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from ppec_contract.api_placement import Policy
from ppec_orchestrator.placement.fleet import BoolArray, Fleet, IntArray
from ppec_orchestrator.placement.host_rules import Seat, cpus, gives, granted, left, may_stand, part_of, seats, units
from ppec_orchestrator.placement.plan import Move
from ppec_orchestrator.placement.request import Group, Level, PlanRequest, Profile, Shape, VmRequest

Floats = NDArray[np.float64]
_DOMAINS = {Level.HOST: "name", Level.RACK: "rack", Level.DATACENTRE: "datacentre"}
# The figures that `balanced` evens out, with Ganeti's weights; what of cells counts in them, and how much a unit of it.
_MEMORY, _DISK, _CPUS, _VMS = range(4)
_WEIGHTS = (1, 1, 1, 4 + 1 / 320)
_COUNTED = {_MEMORY: {"memory_mib": 1, "pages_2m": 2, "pages_1g": 1024}, _CPUS: {"cores": 1, "shared_vcpus": 1}}
_RESERVED = {_MEMORY: "memory_reserved_mib", _CPUS: "cores_reserved"}
_FREE = {each: f"{each}_free" for counted in _COUNTED.values() for each in (*counted, "nvme")}
_FREE["memory_mib"] = "memory_free_mib"


class Ranks(NamedTuple):
    """What decides between the hosts that a VM fits, in this order; lower is better. `apart` counts VMs of the batch on
    the host, then in its rack, where these are kept apart; `names` decide between scores that are whole."""

    broken: IntArray
    apart: tuple[IntArray, ...]
    score: Floats
    names: tuple[IntArray, ...]


@dataclass(slots=True)
class _Known:
    """Of the VMs of one profile: where they may stand, and what they would leave there after so many changes."""

    stand: set[int]
    lefts: Floats
    seen: int = 0


class Replay:
    def __init__(self, fleet: Fleet, request: PlanRequest) -> None:
        self.fleet, self.request, hosts = fleet, request, fleet.hosts
        self._free = [{c.cell: {r: getattr(c, name) for r, name in _FREE.items()} for c in h.cells} for h in hosts]
        self._disk_mib = [{"": h.disk_free_mib} | {name: p.free_mib for name, p in h.pools.items()} for h in hosts]
        self._addresses = dict(fleet.free_addresses)
        # No VM takes more addresses than so many: of a prefix that has them it matters to nobody how many there are.
        networks = max((len(vm.profile.networks) for vm in request.vms), default=0)
        self._most_addresses = networks * max((len(host.prefixes) for host in hosts), default=0)
        # By level the number of each host's domain, in the order of their names.
        self._domains: dict[Level, IntArray] = {
            level: np.unique([getattr(host, name) for host in hosts], return_inverse=True)[1]
            for level, name in _DOMAINS.items()
        }
        self._members: dict[str, list[int]] = {}
        for row, host in enumerate(hosts):
            self._join(row, (group for vm in host.vms for group in vm.groups))
        self._batch: IntArray = np.array([request.batch_hosts.get(host.name, 0) for host in hosts], dtype=np.int64)
        self._moved: dict[UUID, tuple[int, ...]] = {}
        # Shape (figures, hosts): of the whole machine, its own reserve included; and what is unused. VMs use one each.
        self._whole, self._unused = np.ones((2, len(_WEIGHTS), len(hosts)), dtype=np.int64)
        for figure, counted in _COUNTED.items():
            self._whole[figure] = fleet.cells[_RESERVED[figure]].sum(axis=1)
            self._whole[figure] += sum(fleet.cells[each].sum(axis=1) * unit for each, unit in counted.items())
            self._unused[figure] = sum(fleet.cells[_FREE[each]].sum(axis=1) * unit for each, unit in counted.items())
        self._whole[_DISK], self._unused[_DISK] = fleet.disk_mib, fleet.disk_free_mib
        self._unused[_VMS] = [-len(host.vms) for host in hosts]
        self._whole = self._whole.clip(min=1)
        self._most_threads: IntArray = fleet.threads_per_core.max(axis=1)
        self.epoch = -1
        self._known: dict[Profile, _Known] = {}
        # Rows, in the order they changed in; all of them are new at first.
        self._changes = list(range(len(hosts)))

    # --- which hosts a VM fits ---------------------------------------------------------------------------------------

    def candidates(self, vm: VmRequest) -> BoolArray:
        fits: BoolArray = self._lefts(vm.profile) < np.inf
        shut = vm.excluded_hosts | self.request.contended_hosts
        fits[[self.fleet.index[name] for name in shut if name in self.fleet.index]] = False
        for group in vm.groups:
            if group.hard:
                fits &= self._keeps(group)
        return fits

    def seats(self, row: int, profile: Profile) -> Iterator[Seat]:
        """In the cells of a host that is a candidate."""
        return seats(self.fleet.hosts[row], profile.shape, self._free[row])

    def _keeps(self, group: Group) -> BoolArray:
        """Apart: none of the group in the host's domain. Together: all of them there, or there are none."""
        domains, members = self._domains[group.level], self._members.get(group.name, [])
        taken = np.zeros(len(domains), dtype=np.bool_)
        taken[domains[members]] = True
        here: BoolArray = taken[domains]
        return ~here if group.apart else here | (not members)

    def _lefts(self, profile: Profile) -> Floats:
        """`left` of each host, infinite where the VM does not fit."""
        hosts = self.fleet.hosts
        if profile not in self._known:
            stand = {row for row, host in enumerate(hosts) if may_stand(host, profile)}
            self._known[profile] = _Known(stand, np.full(len(hosts), np.inf))
        known = self._known[profile]
        for row in known.stand.intersection(self._changes[known.seen :]):
            host, shape = hosts[row], profile.shape
            room = self._disk_mib[row].get(shape.pool, -1) >= shape.disk_mib
            fits = room and granted(host, profile.networks, self._addresses) is not None
            known.lefts[row] = left(host, shape, self._free[row]) if fits else np.inf
        known.seen = len(self._changes)
        return known.lefts

    # --- what decides between them -----------------------------------------------------------------------------------

    def ranks(self, vm: VmRequest) -> Ranks:
        broken: IntArray = np.zeros(len(self.fleet.hosts), dtype=np.int64)
        for group in vm.groups:
            if not group.hard:
                broken += ~self._keeps(group)
        if self.request.policy is Policy.PACK:
            return Ranks(broken, (), self._lefts(vm.profile), (self._domains[Level.HOST],))
        if self.request.policy is Policy.BALANCED:
            return Ranks(broken, (), self._balanced(vm.profile.shape), ())
        racks = self._domains[Level.RACK]
        in_rack = np.bincount(racks, self._batch).astype(np.int64)[racks]
        return Ranks(broken, (self._batch, in_rack), self._balanced(vm.profile.shape), ())

    def start_epoch(self, epoch: int) -> None:
        """`balanced` scores with the sums over all hosts as they are now."""
        shares = self._unused / self._whole
        self.epoch, self._means, self._variances = epoch, shares.mean(axis=1), shares.var(axis=1)

    def _balanced(self, shape: Shape) -> Floats:
        """Ganeti's score with the VM there: the sums are those of the epoch's begin, the host's own figures today's."""
        n, memory_mib = len(self.fleet.hosts), units(shape) * (shape.numa.huge_page_kib or 1024) // 1024
        fewest_cpus = cpus(shape, self._most_threads)
        score = np.zeros(n)
        for figure, need in enumerate((memory_mib, 0 if shape.pool else shape.disk_mib, fewest_cpus, 1)):
            off = self._unused[figure] / self._whole[figure] - self._means[figure]
            by = need / self._whole[figure]
            variance = self._variances[figure] + (by * (1 - 1 / n) - 2 * off) * by / n
            score += _WEIGHTS[figure] * np.sqrt(variance.clip(min=0))
        return score

    # --- how a plan changes it ---------------------------------------------------------------------------------------

    def take(self, row: int, vm: VmRequest, seat: Seat) -> None:
        host, shape = self.fleet.hosts[row], vm.profile.shape
        for prefix in granted(host, vm.profile.networks, self._addresses) or ():
            if prefix in self._addresses:
                self._addresses[prefix] -= 1
                if self._addresses[prefix] < self._most_addresses:
                    self._changes += [
                        at for at, h in enumerate(self.fleet.hosts) if any(prefix in f for f in h.prefixes)
                    ]
        self._disk_mib[row][shape.pool] -= shape.disk_mib
        self._unused[_DISK, row] = self._disk_mib[row][""]
        self._unused[_VMS, row] -= 1
        self._batch[row] += 1
        self._join(row, vm.groups)
        self._give(row, seat, -1)

    def move(self, move: Move) -> bool:
        """A VM changes to as many other cells of its host, if these have the room before it leaves its own."""
        row = self.fleet.index.get(move.host, -1)
        vm = next((each for each in self.fleet.hosts[row].vms if each.vm_id == move.vm_id), None) if row >= 0 else None
        if vm is None or not vm.movable or self._moved.get(vm.vm_id, vm.cells) != move.cells_before:
            return False
        before, after = (self._seat(row, vm.profile.shape, cells) for cells in (move.cells_before, move.cells_after))
        alike = before and list(before.values()) == list(after.values())
        if not alike or not all(gives(self._free[row][cell], part) for cell, part in after.items()):
            return False
        self._give(row, before, 1)
        self._give(row, after, -1)
        self._moved[vm.vm_id] = move.cells_after
        return True

    def _seat(self, row: int, shape: Shape, numbers: tuple[int, ...]) -> Seat:
        """What the VM takes of these cells; nothing if they could not be its own."""
        parts = {c.cell: part_of(shape, c, len(numbers)) for c in self.fleet.hosts[row].cells if c.cell in numbers}
        return {cell: part for cell, part in parts.items() if part} if sorted(parts) == sorted(numbers) else {}

    def _give(self, row: int, seat: Seat, sign: int) -> None:
        for cell, part in seat.items():
            for resource, amount in part.items():
                self._free[row][cell][resource] += sign * amount
            for figure, counted in _COUNTED.items():
                self._unused[figure, row] += sign * sum(part.get(each, 0) * unit for each, unit in counted.items())
        self._changes.append(row)

    def _join(self, row: int, groups: Iterable[Group]) -> None:
        for group in groups:
            self._members.setdefault(group.name, []).append(row)
