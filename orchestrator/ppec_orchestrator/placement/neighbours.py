# SPDX-License-Identifier: Apache-2.0
"""Which hosts are closed to a VM by its hard groups, by its earlier failures and by others' haste."""

from __future__ import annotations

from functools import reduce

import numpy as np

from ppec_orchestrator.placement.fleet import IntArray
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import VmRequest
from ppec_orchestrator.placement.workspace import Workspace


class Neighbours:
    """Asked anew for each VM: where its groups' members stand changes with every placement."""

    def __init__(self, workspace: Workspace, contended: frozenset[str] = frozenset()) -> None:
        self._workspace = workspace
        self._contended = contended

    def closed(self, vm: VmRequest) -> IntArray | None:
        """The rows that earlier failures and hard groups close to the VM, some perhaps twice; None for none."""
        closed = [rows for _, rows in self.shut(vm)]
        within = self.within(vm)
        if within:
            outside = np.ones(len(self._workspace.fleet.hosts), dtype=np.bool_)
            outside[reduce(np.intersect1d, within)] = False
            closed.append(np.flatnonzero(outside))
        if not closed:
            return None
        return closed[0] if len(closed) == 1 else np.unique(np.concatenate(closed))

    def shut(self, vm: VmRequest) -> list[tuple[Reason, IntArray]]:
        """Rows closed one by one: hosts that failed it, and domains with VMs that it must stand apart from."""
        shut: list[tuple[Reason, IntArray]] = []
        for reason, names in ((Reason.FAILED_BEFORE, vm.excluded_hosts), (Reason.CONTENDED, self._contended)):
            if names:
                known = [row for name in names if (row := self._workspace.fleet.index.get(name)) is not None]
                shut.append((reason, np.array(known, dtype=np.int64)))
        for group in vm.groups:
            if group.hard and group.apart:
                rows = self._workspace.groups.rows(group)
                if rows is not None:
                    shut.append((Reason.ANTI_AFFINITY, rows))
        return shut

    def within(self, vm: VmRequest) -> list[IntArray]:
        """Rows of the domains with VMs that it must stand with, for each group that has any VM yet."""
        together = [group for group in vm.groups if group.hard and not group.apart]
        found = (self._workspace.groups.rows(group) for group in together)
        return [rows for rows in found if rows is not None]
