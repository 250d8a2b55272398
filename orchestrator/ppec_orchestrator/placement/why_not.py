# SPDX-License-Identifier: Apache-2.0
"""Why hosts turn a VM away, by the rules in plain words: for the checker, and with none of the planner's code."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ppec_contract.vm import CpuPolicy, SmtPolicy
from ppec_orchestrator.placement.fleet import BoolArray, IntArray
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.replay import Replay, lasting, needs
from ppec_orchestrator.placement.request import Profile, Shape, VmRequest

_REASONS = list(Reason)
_NONE = len(_REASONS)
Away = Iterator[tuple[Reason, BoolArray]]


class WhyNot:
    """Of the fleet as it is in the replay."""

    def __init__(self, replay: Replay) -> None:
        self._replay = replay
        # What does not change while VMs are placed: per host the number of the first reason.
        self._lasting: dict[Profile, IntArray] = {}

    def reasons(self, vm: VmRequest) -> dict[Reason, int]:
        """How many hosts each turns away. Each host counts under the first of its reasons; what none of them turns
        away, N+1 does."""
        found = self._for_good(vm.profile).copy()
        for reason, away in (*self._neighbours(vm), *self._room(vm)):
            found[away & (found == _NONE)] = _REASONS.index(reason)
        found[found == _NONE] = _REASONS.index(Reason.N_PLUS_ONE)
        numbers, counts = np.unique(found, return_counts=True)
        return {_REASONS[number]: count for number, count in zip(numbers.tolist(), counts.tolist(), strict=True)}

    def _for_good(self, profile: Profile) -> IntArray:
        if profile not in self._lasting:
            first = (lasting(host, profile) for host in self._replay.hosts)
            codes = [_NONE if reason is None else _REASONS.index(reason) for reason in first]
            found: IntArray = np.array(codes, dtype=np.int64)
            for reason, away in self._never(profile.shape):
                found[away & (found == _NONE)] = _REASONS.index(reason)
            self._lasting[profile] = found
        return self._lasting[profile]

    def _never(self, shape: Shape) -> Away:
        """Whatever is free: the hosts have not enough of it."""
        replay, numa, (cpu, memory, _) = self._replay, shape.numa, needs(shape, self._replay.threads)
        sizes, threads, pool = replay.sizes, replay.threads, shape.pool
        if numa.smt is SmtPolicy.REQUIRE:
            yield Reason.NO_SIBLINGS, np.where(threads > 1, sizes["cores"], 0).max(axis=0) == 0
        if numa.cpus is CpuPolicy.SHARED:
            yield Reason.NO_SHARED_CPUS, sizes[cpu].max(axis=0) == 0
        else:
            yield Reason.NO_DEDICATED_CPUS, (sizes["cores"].max(axis=0) == 0) & (sizes["shared_vcpus"].max(axis=0) > 0)
        if numa.huge_page_kib:
            yield Reason.NO_HUGE_PAGES, sizes[memory].max(axis=0) == 0
        if shape.nvme:
            near = sizes["nvme"].sum(axis=0) if numa.multi_cell else sizes["nvme"].max(axis=0)
            yield Reason.NO_NVME, near < shape.nvme
        if pool:
            has = [pool in host.pools and host.pools[pool].size_mib > 0 for host in replay.hosts]
            yield Reason.NO_POOL, ~np.array(has, dtype=np.bool_)
        larger = Reason.VM_LARGER_THAN_HOST if numa.multi_cell else Reason.VM_LARGER_THAN_CELL
        yield larger, ~replay.on_any_number(shape, sizes)

    def _neighbours(self, vm: VmRequest) -> Away:
        replay = self._replay
        for reason, names in (
            (Reason.FAILED_BEFORE, vm.excluded_hosts),
            (Reason.CONTENDED, replay.request.contended_hosts),
        ):
            yield reason, np.array([host.name in names for host in replay.hosts], dtype=np.bool_)
        hard = [group for group in vm.groups if group.hard]
        for group in sorted(hard, key=lambda each: not each.apart):
            reason = Reason.ANTI_AFFINITY if group.apart else Reason.AFFINITY
            yield reason, ~replay.keeps(group, replay.members[group.name])

    def _room(self, vm: VmRequest) -> Away:
        """Too little in all its cells together, before no cells that have all of it."""
        replay, shape = self._replay, vm.profile.shape
        (cpu, cpus), (memory, units), _ = needs(shape, replay.threads).items()
        usable, free, numa = replay.usable(shape), replay.free, shape.numa
        counts = range(1, len(replay.threads) + 1 if numa.multi_cell else 2)
        # More than any host has, in cells that are of no use to it.
        parts = [np.where(usable & (cpus >= count), -(-cpus // count) * count, 2**40) for count in counts]
        fewest = np.min(parts, axis=(0, 1))
        shared = numa.cpus is CpuPolicy.SHARED
        yield Reason.SHARED_VCPUS if shared else Reason.CORES, (free[cpu] * usable).sum(axis=0) < fewest
        few = (free[memory] * usable).sum(axis=0) < units
        yield Reason.HUGE_PAGES if numa.huge_page_kib else Reason.MEMORY, few
        if shape.nvme:
            yield Reason.NVME, (free["nvme"] * usable).sum(axis=0) < shape.nvme
        yield Reason.NUMA_PARTS if numa.multi_cell else Reason.NUMA_FIT, ~replay.on_any_number(shape, free)
        yield Reason.DISK, replay.disk_mib[shape.pool] < shape.disk_mib
        yield Reason.ADDRESSES, ~replay.enough_addresses(vm.profile)
