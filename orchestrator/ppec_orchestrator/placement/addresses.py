# SPDX-License-Identifier: Apache-2.0
"""What is left of the prefixes' addresses while one batch is being placed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ppec_orchestrator.placement.fleet import Fleet, HostState

# The prefixes that could give an address; None: any that serves the host, one address of each family.
Network = frozenset[int] | None
ANY: tuple[Network, ...] = (None,)


def served(host: HostState, networks: Iterable[Network]) -> bool:
    """Whether the host is served by a prefix of each network that names some."""
    mine = {one for family in host.prefixes for one in family}
    return all(network is None or mine & network for network in networks)


class AddressRoom:
    """Each VM of the batch takes an address of each of the `networks`. A prefix without a count has no end."""

    def __init__(self, fleet: Fleet, networks: Sequence[Network] = ANY) -> None:
        self._hosts = fleet.hosts
        # As they are granted: those first that have the fewest to choose from.
        self._networks = sorted(networks, key=lambda network: network is None)
        self._left = dict(fleet.free_addresses)
        self._rows: dict[int, list[int]] = {}
        for row, host in enumerate(fleet.hosts):
            for family in host.prefixes:
                for prefix in family:
                    self._rows.setdefault(prefix, []).append(row)

    def fits(self, row: int) -> bool:
        return self._choice(row) is not None

    def take(self, row: int) -> set[int]:
        """Uses up one VM's addresses on a host that it fits; returns the rows of hosts that may not fit another."""
        changed = {row}
        for prefix, count in (self._choice(row) or {}).items():
            if prefix in self._left:
                self._left[prefix] -= count
                if self._left[prefix] < len(self._networks):
                    changed.update(self._rows[prefix])
        return changed

    def _choice(self, row: int) -> dict[int, int] | None:
        """How many addresses of which prefix a VM there would get; None when there are not enough."""
        families = self._hosts[row].prefixes
        chosen: Counter[int] = Counter()
        for network in self._networks:
            for family in families if network is None else [[p for each in families for p in each if p in network]]:
                found = next((p for p in family if self._left.get(p, chosen[p] + 1) > chosen[p]), None)
                if found is None:
                    return None
                chosen[found] += 1
        return dict(chosen) if families else None
