# SPDX-License-Identifier: Apache-2.0
"""The filters: each looks at every host at once and says which may pass.

To add one: write the function, give it a `Reason`, put the pair where it belongs in the list. The order decides only
under which reason a host is counted, never whether it passes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ppec_contract.vm import CpuPolicy, SmtPolicy
from ppec_orchestrator.placement.addresses import served
from ppec_orchestrator.placement.demand import CELL_RESOURCES, memory_resource
from ppec_orchestrator.placement.fitting import Fitting
from ppec_orchestrator.placement.fleet import BoolArray, Fleet, HostState, IntArray
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import ANY_NETWORK, Profile

HostFilter = Callable[[Fleet, Profile], BoolArray]


def in_scope(fleet: Fleet, profile: Profile) -> BoolArray:
    where = profile.where
    passes = _everywhere(fleet)
    for place in ("region", "datacentre", "cluster", "rack", "vrf"):
        wanted = getattr(where, place)
        if wanted is not None:
            passes &= _rows(fleet, fleet.places[place].get(wanted))
    if where.host is not None:
        passes &= _rows(fleet, fleet.index.get(where.host))
    return passes


def right_architecture(fleet: Fleet, profile: Profile) -> BoolArray:
    return _rows(fleet, fleet.places["architecture"].get(profile.architecture))


def right_labels(fleet: Fleet, profile: Profile) -> BoolArray:
    where = profile.where
    if not where.labels and not where.without:
        return _everywhere(fleet)
    return _mask(
        fleet,
        lambda host: (
            all(_has(host, pair) for pair in where.labels) and not any(_has(host, pair) for pair in where.without)
        ),
    )


def live(fleet: Fleet, profile: Profile) -> BoolArray:
    return fleet.live


def not_draining(fleet: Fleet, profile: Profile) -> BoolArray:
    return ~fleet.draining


def knows_what_is_asked(fleet: Fleet, profile: Profile) -> BoolArray:
    """Has the host's agent announced all that the VM's spec will ask of it?"""
    if not profile.capabilities:
        return _everywhere(fleet)
    return _mask(fleet, lambda host: profile.capabilities <= host.capabilities)


def served_as_asked(fleet: Fleet, profile: Profile) -> BoolArray:
    if profile.networks == ANY_NETWORK and not profile.fixed:
        return _everywhere(fleet)
    return _mask(fleet, lambda host: served(host, (*profile.networks, *profile.fixed)))


def has_siblings(fleet: Fleet, profile: Profile) -> BoolArray:
    if profile.shape.numa.smt is not SmtPolicy.REQUIRE:
        return _everywhere(fleet)
    return _any_cell((fleet.threads_per_core > 1) & (fleet.capacity("cores") > 0))


def shares_cpus(fleet: Fleet, profile: Profile) -> BoolArray:
    shared = profile.shape.numa.cpus is CpuPolicy.SHARED
    return _any_cell(fleet.capacity("shared_vcpus") > 0) if shared else _everywhere(fleet)


def has_cores(fleet: Fleet, profile: Profile) -> BoolArray:
    """Of a host whose CPUs are all shared, as Ganeti's mostly are, it is no matter how large its cells are."""
    if profile.shape.numa.cpus is CpuPolicy.SHARED:
        return _everywhere(fleet)
    return _any_cell(fleet.capacity("cores") > 0) | ~_any_cell(fleet.capacity("shared_vcpus") > 0)


def has_huge_pages(fleet: Fleet, profile: Profile) -> BoolArray:
    huge = profile.shape.numa.huge_page_kib > 0
    return _any_cell(fleet.capacity(memory_resource(profile.shape)) > 0) if huge else _everywhere(fleet)


def has_nvme(fleet: Fleet, profile: Profile) -> BoolArray:
    """Drives are taken of the VM's own cells; over several of them, a part of each."""
    wanted = profile.shape.nvme
    if not wanted:
        return _everywhere(fleet)
    drives = fleet.capacity("nvme")
    return (drives.sum(axis=1) >= wanted) if profile.shape.numa.multi_cell else _any_cell(drives >= wanted)


def has_pool(fleet: Fleet, profile: Profile) -> BoolArray:
    """One without a size is gone, though VMs' disks are still held there."""
    pool = profile.shape.pool
    if not pool:
        return _everywhere(fleet)
    return _mask(fleet, lambda host: pool in host.pools and host.pools[pool].size_mib > 0)


def cell_large_enough(fleet: Fleet, profile: Profile) -> BoolArray:
    """Could the VM fit one of the host's cells if the host were empty?"""
    return _everywhere(fleet) if profile.shape.numa.multi_cell else _could_fit(fleet, profile)


def cells_large_enough(fleet: Fleet, profile: Profile) -> BoolArray:
    """Could the VM fit several of the host's cells, in equal parts, if the host were empty?"""
    return _could_fit(fleet, profile) if profile.shape.numa.multi_cell else _everywhere(fleet)


# What of a host never changes while a batch is placed.
STANDING: tuple[tuple[Reason, HostFilter], ...] = (
    (Reason.OUTSIDE_SCOPE, in_scope),
    (Reason.ARCHITECTURE, right_architecture),
    (Reason.LABELS, right_labels),
    (Reason.SILENT, live),
    (Reason.DRAINING, not_draining),
    (Reason.AGENT_TOO_OLD, knows_what_is_asked),
    (Reason.NOT_SERVED, served_as_asked),
    (Reason.NO_SIBLINGS, has_siblings),
    (Reason.NO_SHARED_CPUS, shares_cpus),
    (Reason.NO_DEDICATED_CPUS, has_cores),
    (Reason.NO_HUGE_PAGES, has_huge_pages),
    (Reason.NO_NVME, has_nvme),
    (Reason.NO_POOL, has_pool),
    (Reason.VM_LARGER_THAN_CELL, cell_large_enough),
    (Reason.VM_LARGER_THAN_HOST, cells_large_enough),
)


def _could_fit(fleet: Fleet, profile: Profile) -> BoolArray:
    could: BoolArray = (
        Fitting(fleet, profile.shape).parts({each: fleet.capacity(each) for each in CELL_RESOURCES}, None) > 0
    )
    return could


def _has(host: HostState, pair: tuple[str, str]) -> bool:
    key, value = pair
    return key in host.labels and value in ("", host.labels[key])


def _everywhere(fleet: Fleet) -> BoolArray:
    return np.ones(len(fleet.hosts), dtype=np.bool_)


def _any_cell(cells: BoolArray) -> BoolArray:
    found: BoolArray = np.any(cells, axis=1)
    return found


def _rows(fleet: Fleet, rows: IntArray | int | None) -> BoolArray:
    """These rows alone; None stands for none."""
    mask = np.zeros(len(fleet.hosts), dtype=np.bool_)
    if rows is not None:
        mask[rows] = True
    return mask


def _mask(fleet: Fleet, passes: Callable[[HostState], bool]) -> BoolArray:
    return np.fromiter((passes(host) for host in fleet.hosts), dtype=np.bool_, count=len(fleet.hosts))
