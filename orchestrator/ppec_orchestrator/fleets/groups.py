# SPDX-License-Identifier: Apache-2.0
"""Groups that no placement can keep: VMs that must stand together, and apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ppec_orchestrator.fleets.faults import FleetError, shown
from ppec_orchestrator.placement.request import Group, Level

# A VM with the path or line it stands at.
Member = tuple[str, tuple[Group, ...]]
# Whoever stands together on one of these does so on all after it.
_FROM_FINE_TO_COARSE = (Level.HOST, Level.RACK, Level.DATACENTRE)


def refuse_contradictions(members: Iterable[Member]) -> None:
    """Raises FleetError where two VMs are bound together, perhaps by way of others, on a level that a group holds them
    apart on. Only hard groups bind."""
    bound = [(where, groups) for where, groups in members if any(group.hard for group in groups)]
    if not any(group.hard and not group.apart for _, groups in bound for group in groups):
        return
    for level in _FROM_FINE_TO_COARSE:
        _refuse_on(level, bound)


def _refuse_on(level: Level, members: Sequence[Member]) -> None:
    binding = _FROM_FINE_TO_COARSE[: _FROM_FINE_TO_COARSE.index(level) + 1]
    together = _Together()
    for _, groups in members:
        together.bind([group.name for group in groups if group.hard and not group.apart and group.level in binding])
    seen: dict[tuple[str, str], str] = {}
    for where, groups in members:
        mine = next((group.name for group in groups if together.holds(group.name)), None)
        if mine is None:
            continue
        for group in groups:
            if group.hard and group.apart and group.level is level:
                first = seen.setdefault((group.name, together.root(mine)), where)
                if first != where:
                    raise FleetError(
                        where,
                        f"group {shown(group.name)} holds it apart from the VM at {first}, "
                        f"and group {shown(mine)} holds the two together",
                    )


class _Together:
    """Groups of one VM hold all their members together: sets that grow into each other."""

    def __init__(self) -> None:
        self._above: dict[str, str] = {}

    def holds(self, name: str) -> bool:
        return name in self._above

    def root(self, name: str) -> str:
        while self._above[name] != name:
            self._above[name] = self._above[self._above[name]]
            name = self._above[name]
        return name

    def bind(self, names: Sequence[str]) -> None:
        for name in names:
            self._above.setdefault(name, name)
        for name in names[1:]:
            self._above[self.root(name)] = self.root(names[0])
