# SPDX-License-Identifier: Apache-2.0
"""What is left of the prefixes' addresses while plans are made, and which hosts it is enough for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from ppec_orchestrator.placement.fleet import BoolArray, Fleet, HostState
from ppec_orchestrator.placement.request import Network

# Of a prefix with more addresses left than any VM takes of it, one more or less matters to no host.
_PLENTY = 64


def served(host: HostState, networks: Iterable[Network]) -> bool:
    """Whether the host is served by a prefix of each network that names some."""
    mine = {prefix for family in host.prefixes for prefix in family}
    return all(network is None or mine & network for network in networks)


def grants(host: HostState, networks: Sequence[Network], left: Mapping[int, int]) -> dict[int, int] | None:
    """How many addresses of which prefix a VM there gets; None when there are not enough. Prefixes that are not `left`
    have no end."""
    if not host.prefixes:
        return None
    chosen: Counter[int] = Counter()
    # As they are granted: those first that have the fewest to choose from.
    for network in sorted(networks, key=lambda each: each is None):
        families = (
            host.prefixes if network is None else [[p for family in host.prefixes for p in family if p in network]]
        )
        for family in families:
            found = next((p for p in family if left.get(p, chosen[p] + 1) > chosen[p]), None)
            if found is None:
                return None
            chosen[found] += 1
    return dict(chosen)


class AddressRoom:
    """`left` counts by prefix; one without a count has no end. `changed` is told of each row for which something may be
    otherwise now."""

    def __init__(self, fleet: Fleet, changed: Callable[[int], None]) -> None:
        self._fleet = fleet
        self._changed = changed
        self.left = dict(fleet.free_addresses)
        self._enough: dict[tuple[Network, ...], BoolArray] = {}
        # By row, whether any of its prefixes can run out.
        self._scarce = [
            any(prefix in self.left for family in host.prefixes for prefix in family) for host in fleet.hosts
        ]

    def enough(self, networks: tuple[Network, ...]) -> BoolArray:
        """Per host: whether a VM with these networks would get its addresses."""
        if networks not in self._enough:
            fits = (grants(host, networks, self.left) is not None for host in self._fleet.hosts)
            self._enough[networks] = np.fromiter(fits, dtype=np.bool_, count=len(self._fleet.hosts))
        return self._enough[networks]

    def forget(self) -> None:
        """What was worked out for networks, which may never be asked for again."""
        self._enough.clear()

    def granted(self, row: int, networks: Sequence[Network]) -> tuple[tuple[int, int], ...]:
        """What a VM there would take of prefixes that can run out: (prefix, how many)."""
        if not self._scarce[row]:
            return ()
        found = grants(self._fleet.hosts[row], networks, self.left) or {}
        return tuple((prefix, count) for prefix, count in found.items() if prefix in self.left)

    def count(self, prefix: int, by: int) -> None:
        """There are more, or fewer, addresses left."""
        before = self.left[prefix]
        self.left[prefix] = before + by
        if min(before, before + by) >= _PLENTY:
            return
        for row in self._fleet.hosts_of_prefix.get(prefix, ()):
            changed = False
            for networks, enough in self._enough.items():
                fits = grants(self._fleet.hosts[row], networks, self.left) is not None
                changed |= bool(enough[row]) is not fits
                enough[row] = fits
            if changed:
                self._changed(int(row))

    def follow(self, fleet: Fleet) -> None:
        """The same hosts and prefixes, with other counts."""
        self._fleet = fleet
        for prefix, left in fleet.free_addresses.items():
            if left != self.left[prefix]:
                self.count(prefix, left - self.left[prefix])
