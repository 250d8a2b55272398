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
from ppec_orchestrator.placement.demand import memory_resource
from ppec_orchestrator.placement.fitting import Fitting
from ppec_orchestrator.placement.fleet import BoolArray, Fleet
from ppec_orchestrator.placement.request import PlanRequest, Reason

HostFilter = Callable[[Fleet, PlanRequest], BoolArray]


def in_scope(fleet: Fleet, request: PlanRequest) -> BoolArray:
    where = request.where
    wanted = [
        (name, value)
        for name, value in (
            ("datacentre", where.datacentre),
            ("cluster", where.cluster),
            ("rack", where.rack),
            ("name", where.host),
            ("vrf", where.vrf),
        )
        if value is not None
    ]
    return _mask(all(getattr(h, name) == value for name, value in wanted) for h in fleet.hosts)


def right_architecture(fleet: Fleet, request: PlanRequest) -> BoolArray:
    return _mask(h.architecture == request.architecture for h in fleet.hosts)


def live(fleet: Fleet, request: PlanRequest) -> BoolArray:
    return _mask(h.live for h in fleet.hosts)


def not_draining(fleet: Fleet, request: PlanRequest) -> BoolArray:
    return _mask(not h.draining for h in fleet.hosts)


def knows_what_is_asked(fleet: Fleet, request: PlanRequest) -> BoolArray:
    """Has the host's agent announced all that the VM's spec will ask of it?"""
    return _mask(request.capabilities <= h.capabilities for h in fleet.hosts)


def served_as_asked(fleet: Fleet, request: PlanRequest) -> BoolArray:
    return _mask(served(h, (*request.networks, *request.fixed)) for h in fleet.hosts)


def has_siblings(fleet: Fleet, request: PlanRequest) -> BoolArray:
    if request.shape.numa.smt is not SmtPolicy.REQUIRE:
        return _everywhere(fleet)
    return _any_cell((fleet.threads_per_core > 1) & (fleet.cores > 0))


def shares_cpus(fleet: Fleet, request: PlanRequest) -> BoolArray:
    shared = request.shape.numa.cpus is CpuPolicy.SHARED
    return _any_cell(fleet.shared_vcpus > 0) if shared else _everywhere(fleet)


def has_huge_pages(fleet: Fleet, request: PlanRequest) -> BoolArray:
    huge = request.shape.numa.huge_page_kib > 0
    return _any_cell(fleet.capacity(memory_resource(request.shape)) > 0) if huge else _everywhere(fleet)


def cell_large_enough(fleet: Fleet, request: PlanRequest) -> BoolArray:
    """Could the VM fit one of the host's cells if the host were empty?"""
    return _everywhere(fleet) if request.shape.numa.multi_cell else _could_fit(fleet, request)


def cells_large_enough(fleet: Fleet, request: PlanRequest) -> BoolArray:
    """Could the VM fit several of the host's cells, in equal parts, if the host were empty?"""
    return _could_fit(fleet, request) if request.shape.numa.multi_cell else _everywhere(fleet)


# What of a host never changes while one batch is placed.
STANDING: tuple[tuple[Reason, HostFilter], ...] = (
    (Reason.OUTSIDE_SCOPE, in_scope),
    (Reason.ARCHITECTURE, right_architecture),
    (Reason.SILENT, live),
    (Reason.DRAINING, not_draining),
    (Reason.AGENT_TOO_OLD, knows_what_is_asked),
    (Reason.NOT_SERVED, served_as_asked),
    (Reason.NO_SIBLINGS, has_siblings),
    (Reason.NO_SHARED_CPUS, shares_cpus),
    (Reason.NO_HUGE_PAGES, has_huge_pages),
    (Reason.VM_LARGER_THAN_CELL, cell_large_enough),
    (Reason.VM_LARGER_THAN_HOST, cells_large_enough),
)


def _could_fit(fleet: Fleet, request: PlanRequest) -> BoolArray:
    fitting = Fitting(fleet, request.shape)
    could: BoolArray = fitting.parts(fitting.capacity()) > 0
    return could


def _everywhere(fleet: Fleet) -> BoolArray:
    return np.ones(len(fleet.hosts), dtype=np.bool_)


def _any_cell(cells: BoolArray) -> BoolArray:
    found: BoolArray = np.any(cells, axis=1)
    return found


def _mask(values: object) -> BoolArray:
    return np.fromiter(values, dtype=np.bool_)  # type: ignore[call-overload,no-any-return]
