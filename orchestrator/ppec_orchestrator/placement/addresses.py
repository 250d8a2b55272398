# SPDX-License-Identifier: Apache-2.0
"""What is left of the prefixes' addresses while plans are made, and which hosts it is enough for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from ppec_orchestrator.placement.fleet import BoolArray, Fleet, HostState, IntArray
from ppec_orchestrator.placement.request import Network

# The prefixes of a host, one tuple per address family.
Prefixes = tuple[tuple[int, ...], ...]


def served(host: HostState, networks: Iterable[Network]) -> bool:
    """Whether the host is served by a prefix of each network that names some."""
    mine = {prefix for family in host.prefixes for prefix in family}
    return all(network is None or mine & network for network in networks)


def choices(prefixes: Prefixes, network: Network) -> Prefixes:
    """The prefixes of a host that each address for this network could be of, one tuple per address."""
    return prefixes if network is None else (tuple([p for family in prefixes for p in family if p in network]),)


def fewest_first(network: Network) -> tuple[bool, int]:
    """The order in which addresses are granted: networks that leave less to choose from come first."""
    return network is None, len(network or ())


def grants(host: HostState, networks: Sequence[Network], left: Mapping[int, int]) -> dict[int, int] | None:
    """How many addresses of which prefix a VM there gets; None when there are not enough. Prefixes that are not `left`
    have no end."""
    return _grants(host.prefixes, networks, left)


def lacking(prefixes: Prefixes, networks: Sequence[Network], left: Mapping[int, int]) -> dict[int, int]:
    """How many addresses more, of which prefix, a VM would need on a host with these; of prefixes of which any would
    do, the first."""
    return dict(Counter(family[0] for family, found in _given(prefixes, networks, left) if found is None and family))


def _grants(prefixes: Prefixes, networks: Sequence[Network], left: Mapping[int, int]) -> dict[int, int] | None:
    given = [found for _, found in _given(prefixes, networks, left)]
    chosen = dict(Counter(found for found in given if found is not None))
    return chosen if prefixes and None not in given else None


def _given(
    prefixes: Prefixes, networks: Sequence[Network], left: Mapping[int, int]
) -> Iterator[tuple[tuple[int, ...], int | None]]:
    """For each address, in the order in which they are granted, the prefixes that could give it and the one that does;
    None where none of them has one left."""
    chosen: Counter[int] = Counter()
    for network in sorted(networks, key=fewest_first):
        for family in choices(prefixes, network):
            found = next((p for p in family if left.get(p, chosen[p] + 1) > chosen[p]), None)
            if found is not None:
                chosen[found] += 1
            yield family, found


class _Kinds:
    """Hosts are of few kinds: those with the same prefixes get their addresses alike."""

    def __init__(self, fleet: Fleet) -> None:
        numbers: dict[Prefixes, int] = {}
        of_row = [numbers.setdefault(host.prefixes, len(numbers)) for host in fleet.hosts]
        self.of_row: IntArray = np.array(of_row, dtype=np.int64)
        self.prefixes = list(numbers)
        self.with_prefix: dict[int, list[int]] = {}
        for prefixes, kind in numbers.items():
            for prefix in {prefix for family in prefixes for prefix in family}:
                self.with_prefix.setdefault(prefix, []).append(kind)
        # In how many families of one host a prefix is, at most; it should be one.
        self.most_families = max(
            (sum(prefix in f for f in each) for each in numbers for f in each for prefix in f), default=1
        )

    def rows(self, kind: int) -> IntArray:
        return np.flatnonzero(self.of_row == kind)


class AddressRoom:
    """`left` counts by prefix; one without a count has no end. `changed` is told of the rows for which something may be
    otherwise now."""

    def __init__(self, fleet: Fleet, changed: Callable[[Iterable[int]], None]) -> None:
        self._kinds = _Kinds(fleet)
        self._changed = changed
        self.left = dict(fleet.free_addresses)
        # By networks: per kind of host, and the same per host.
        self._kinds_enough: dict[tuple[Network, ...], list[bool]] = {}
        self._enough: dict[tuple[Network, ...], BoolArray] = {}
        # Per kind, what a VM takes as long as the first prefix of each family has enough.
        self._first: dict[tuple[Network, ...], list[tuple[tuple[int, int], ...]]] = {}
        # Of a prefix with as many addresses left as any VM takes of it, one more or less matters to no host.
        self._plenty = 0
        # By kind, whether any of its prefixes can run out.
        self._scarce = [any(p in self.left for family in each for p in family) for each in self._kinds.prefixes]

    def enough(self, networks: tuple[Network, ...]) -> BoolArray:
        """Per host: whether a VM with these networks would get its addresses."""
        found = self._enough.get(networks)
        if found is None:
            self._plenty = max(self._plenty, len(networks) * self._kinds.most_families)
            of_kinds = [self._would_do(kind, networks) for kind in range(len(self._kinds.prefixes))]
            self._kinds_enough[networks] = of_kinds
            found = self._enough[networks] = np.array(of_kinds, dtype=np.bool_)[self._kinds.of_row]
        return found

    def kinds_short_of(self, networks: int) -> IntArray:
        """Per host a number, the same for hosts with the same prefixes; -1 where they have enough for VMs with so many
        networks together."""
        most = networks * self._kinds.most_families
        short = [
            any(self.left.get(prefix, most) < most for family in prefixes for prefix in family)
            for prefixes in self._kinds.prefixes
        ]
        return np.where(np.array(short, dtype=np.bool_), np.arange(len(short)), -1)[self._kinds.of_row]

    def choice_matters(self, networks: int) -> bool:
        """Whether it counts for VMs with so many networks together which of them goes where: hosts that may run short
        on the way share a prefix, and not all of them alike."""
        kinds = self.kinds_short_of(networks)
        serving = [
            {prefix for family in self._kinds.prefixes[kind] for prefix in family}
            for kind in np.unique(kinds[kinds >= 0]).tolist()
        ]
        return sum(map(len, serving)) > len(set().union(*serving))

    def fewer_than(self, networks: int) -> bool:
        """Whether VMs with so many networks together ask for more than is left of all prefixes."""
        prefixes = self._kinds.with_prefix
        return all(prefix in self.left for prefix in prefixes) and sum(map(self.left.__getitem__, prefixes)) < networks

    def forget(self, networks: tuple[Network, ...]) -> None:
        """What was worked out for networks that may never be asked for again."""
        self._enough.pop(networks, None)
        self._kinds_enough.pop(networks, None)
        self._first.pop(networks, None)

    def granted(self, row: int, networks: tuple[Network, ...]) -> tuple[tuple[int, int], ...]:
        """What a VM there would take of prefixes that can run out: (prefix, how many)."""
        kind = self._kinds.of_row.item(row)
        if not self._scarce[kind]:
            return ()
        if networks not in self._first:
            self._first[networks] = [self._of_counted(prefixes, networks, {}) for prefixes in self._kinds.prefixes]
        first, left = self._first[networks][kind], self.left
        for prefix, count in first:
            if left[prefix] < count:
                return self._of_counted(self._kinds.prefixes[kind], networks, left)
        return first

    def _of_counted(
        self, prefixes: Prefixes, networks: Sequence[Network], left: Mapping[int, int]
    ) -> tuple[tuple[int, int], ...]:
        found = _grants(prefixes, networks, left) or {}
        return tuple((prefix, count) for prefix, count in found.items() if prefix in self.left)

    def count(self, prefix: int, by: int) -> None:
        """There are more, or fewer, addresses left."""
        before = self.left[prefix]
        self.left[prefix] = now = before + by
        if before >= self._plenty <= now:
            return
        for kind in self._kinds.with_prefix.get(prefix, ()):
            self._look_again(kind)

    def _look_again(self, kind: int) -> None:
        otherwise = [
            networks
            for networks, known in self._kinds_enough.items()
            if known[kind] is not self._would_do(kind, networks)
        ]
        if not otherwise:
            return
        rows = self._kinds.rows(kind)
        for networks in otherwise:
            now = self._kinds_enough[networks][kind] = not self._kinds_enough[networks][kind]
            self._enough[networks][rows] = now
        self._changed(rows.tolist())

    def _would_do(self, kind: int, networks: tuple[Network, ...]) -> bool:
        return _grants(self._kinds.prefixes[kind], networks, self.left) is not None

    def follow(self, fleet: Fleet) -> None:
        """The same hosts and prefixes, with other counts."""
        for prefix, left in fleet.free_addresses.items():
            if left != self.left[prefix]:
                self.count(prefix, left - self.left[prefix])
