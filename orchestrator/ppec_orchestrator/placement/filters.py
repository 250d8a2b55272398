# SPDX-License-Identifier: Apache-2.0
"""The filters: each looks at every host at once and says which may pass.

To add one: write the function, give it a `Reason`, put the pair where it belongs in the list. The order decides only
under which reason a host is counted, never whether it passes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ppec_orchestrator.placement.fleet import BoolArray, Fleet, IntArray
from ppec_orchestrator.placement.request import PlanRequest, Reason, Shape

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


def cell_large_enough(fleet: Fleet, request: PlanRequest) -> BoolArray:
    """Could the VM fit one of the host's cells if the host were empty?"""
    enough_cores: BoolArray = fleet.cores >= cores_needed(fleet, request.shape)
    enough_memory: BoolArray = fleet.memory_mib >= request.shape.memory_mib
    fits: BoolArray = np.any(enough_cores & enough_memory, axis=1)
    return fits


# What of a host never changes while one batch is placed.
STANDING: tuple[tuple[Reason, HostFilter], ...] = (
    (Reason.OUTSIDE_SCOPE, in_scope),
    (Reason.ARCHITECTURE, right_architecture),
    (Reason.SILENT, live),
    (Reason.DRAINING, not_draining),
    (Reason.VM_LARGER_THAN_CELL, cell_large_enough),
)


def cores_needed(fleet: Fleet, shape: Shape) -> IntArray:
    """Whole physical cores the VM takes in each cell: SMT siblings are never shared between VMs."""
    needed: IntArray = -(-shape.vcpus // fleet.threads_per_core)
    return needed


def _mask(values: object) -> BoolArray:
    return np.fromiter(values, dtype=np.bool_)  # type: ignore[call-overload,no-any-return]
