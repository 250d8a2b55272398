# SPDX-License-Identifier: Apache-2.0
"""Which hosts are closed to a VM by its hard groups, by its earlier failures and by others' haste."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import reduce

import numpy as np

from ppec_orchestrator.placement.balance import Floats
from ppec_orchestrator.placement.candidates import Candidates
from ppec_orchestrator.placement.fleet import BoolArray, SomeRows
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import VmRequest
from ppec_orchestrator.placement.workspace import Workspace


class Neighbours:
    """Asked anew for each VM: where its groups' members stand changes with every placement."""

    def __init__(self, workspace: Workspace, contended: frozenset[str] = frozenset()) -> None:
        self._workspace = workspace
        self._contended = contended

    def closed(self, vm: VmRequest) -> list[SomeRows]:
        """The rows that earlier failures and hard groups close to the VM: each rule's, which others may close too."""
        _, closed, within = self._rules(vm)
        if within:
            outside = np.ones(len(self._workspace.fleet.hosts), dtype=np.bool_)
            outside[reduce(np.intersect1d, within)] = False
            closed.append(np.flatnonzero(outside))
        return closed

    def open_scores(self, candidates: Candidates, vm: VmRequest) -> Floats:
        """The policy's, infinite too where a rule closes the host. Not to be changed."""
        key, closed = candidates.key, self.closed(vm)
        if closed:
            key = key.copy()
            for rows in closed:
                key[rows] = np.inf
        return key

    def stands(self, candidates: Candidates, vm: VmRequest) -> BoolArray:
        """The hosts that nothing lasting closes to the VM, its groups aside."""
        stands = candidates.standing & self._workspace.addresses.enough(vm.profile.networks)
        for _, rows in self.shut(replace(vm, groups=())):
            stands[rows] = False
        return stands

    def shut(self, vm: VmRequest) -> list[tuple[Reason, SomeRows]]:
        """Rows closed one by one: hosts that failed it, and domains with VMs that it must stand apart from."""
        reasons, shut, _ = self._rules(vm)
        return list(zip(reasons, shut, strict=True))

    def within(self, vm: VmRequest) -> list[SomeRows]:
        """Rows of the domains with VMs that it must stand with, for each group that has any VM yet."""
        return self._rules(vm)[2]

    def _rules(self, vm: VmRequest) -> tuple[list[Reason], list[SomeRows], list[SomeRows]]:
        """What `shut` says, its reasons and its rows, and what `within` does."""
        reasons: list[Reason] = []
        shut: list[SomeRows] = []
        within: list[SomeRows] = []
        if vm.excluded_hosts:
            reasons.append(Reason.FAILED_BEFORE)
            shut.append(self._named(vm.excluded_hosts))
        if self._contended:
            reasons.append(Reason.CONTENDED)
            shut.append(self._named(self._contended))
        for group in vm.groups:
            rows = self._workspace.groups.rows(group) if group.hard else None
            if rows is None:
                continue
            if group.apart:
                reasons.append(Reason.ANTI_AFFINITY)
                shut.append(rows)
            else:
                within.append(rows)
        return reasons, shut, within

    def _named(self, names: Iterable[str]) -> SomeRows:
        index = self._workspace.fleet.index
        return np.array([index[name] for name in names if name in index], dtype=np.int64)
