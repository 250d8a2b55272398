# SPDX-License-Identifier: Apache-2.0
"""Which VMs of which groups stand on which hosts, and what that means for the next one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ppec_orchestrator.placement.fleet import Fleet, SomeRows
from ppec_orchestrator.placement.request import Group, Level

# A dtype, and not the class that it is made of with each call.
_INT64 = np.dtype(np.int64)
# So few rows are faster one by one than with arrays.
_FEW = 32


class GroupBook:
    """Members per group and host row. Groups are few beside hosts, members of one group fewer: dictionaries do."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._members: dict[str, dict[int, int]] = {}
        # Not by `count`: most of a planner's beginning is here, and a call for each VM would double it.
        for row, host in enumerate(fleet.hosts):
            for vm in host.vms:
                for group in vm.groups:
                    members = self._members.setdefault(group.name, {})
                    members[row] = members.get(row, 0) + 1

    def __len__(self) -> int:
        """How many groups have members."""
        return len(self._members)

    def count(self, row: int, groups: tuple[Group, ...], by: int) -> None:
        """A VM of these groups comes to the host in `row`, or (with -1) leaves it."""
        for group in groups:
            members = self._members.setdefault(group.name, {})
            count = members.get(row, 0) + by
            if count:
                members[row] = count
                continue
            del members[row]
            if not members:
                del self._members[group.name]

    def replace(self, row: int, before: Fleet, after: Fleet) -> None:
        """The host in `row` has other VMs now."""
        for vm in before.hosts[row].vms:
            self.count(row, vm.groups, -1)
        for vm in after.hosts[row].vms:
            self.count(row, vm.groups, 1)
        self._fleet = after

    def members(self, name: str) -> Mapping[int, int]:
        """How many members the group has, by row."""
        return self._members.get(name, {})

    def rows(self, group: Group) -> SomeRows | None:
        """The rows of all hosts in domains (of the group's level) that have members, of which there are some; None
        where it has none yet."""
        members = self._members.get(group.name)
        if not members:
            return None
        if group.level is Level.HOST:
            return list(members) if len(members) <= _FEW else np.fromiter(members, _INT64, len(members))
        domains = {self._fleet.domain(row, group.level) for row in members}
        return np.concatenate([self._fleet.rows_of(group.level, name) for name in sorted(domains)])


def hard_names(groups: tuple[Group, ...]) -> frozenset[str]:
    return frozenset(group.name for group in groups if group.hard) if groups else _NO_NAMES


_NO_NAMES: frozenset[str] = frozenset()
