# SPDX-License-Identifier: Apache-2.0
"""One refused VM, and the changes of each kind that would make it fit: each is tried in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from ppec_contract.api_placement import Policy
from ppec_orchestrator.placement.addresses import choices
from ppec_orchestrator.placement.candidates import Candidates
from ppec_orchestrator.placement.changes import (
    OPENINGS,
    AddAddresses,
    FreeRoom,
    GiveUp,
    Opening,
    OtherSize,
    Retune,
    Single,
    spare_after,
)
from ppec_orchestrator.placement.fleet import BoolArray, Fleet, HostState
from ppec_orchestrator.placement.planner import Planner
from ppec_orchestrator.placement.request import PlanRequest, Shape, Spare, SpareRule, VmRequest
from ppec_orchestrator.placement.rules import rules_of
from ppec_orchestrator.placement.shortage import Shortage

# Hosts named in one change.
MOST_NAMED = 20
# Running VMs that may change cells for one.
MOST_MOVES = 4
# Hosts that are opened one by one to see whether N+1 is kept: each time, all is worked out anew.
MOST_ENDED = 4
# No VM may be smaller (`ppec_contract/vm.py`).
LEAST_MEMORY_MIB = 64


class Trials:
    """Of one VM. The planner stays on the fleet as it is: with N+1 one that comes back from another may know ways out
    that no new one would find."""

    def __init__(self, fleet: Fleet, planner: Planner, vm: VmRequest, spare: SpareRule) -> None:
        self.fleet = fleet
        self.planner = planner
        self.vm = vm
        self.spare = spare
        self._elsewhere: Planner | None = None

    def fits(self) -> bool:
        return _fits(self.planner, self.vm, self.spare)

    def something_helps(self) -> bool:
        """Or is not even needed."""
        return (
            self.fits()
            or self._would_fit_sized(_smallest(self.vm.profile.shape))
            or next(self._all_but_rules_and_sizes(), None) is not None
        )

    def hosts_after(self, change: Single | None = None) -> list[str]:
        """Those that the change, or none, makes the VM fit, N+1 left aside."""
        if isinstance(change, FreeRoom):
            return [room.host for room in change.rooms]
        if isinstance(change, Retune):
            return [change.host]
        if isinstance(change, OPENINGS):
            return list(change.hosts)
        fleet, vm = (self.fleet, self.vm) if change is None else change.apply(self.fleet, self.vm)
        planner = self.planner if fleet is self.fleet else Planner(fleet)
        return [fleet.hosts[row].name for row in np.flatnonzero(_fitting_rows(planner, vm)).tolist()]

    def all_but_rules(self) -> Iterator[Opening | Retune | AddAddresses | OtherSize | FreeRoom]:
        yield from self._all_but_rules_and_sizes()
        yield from self.other_size()

    def _all_but_rules_and_sizes(self) -> Iterator[Opening | Retune | AddAddresses | FreeRoom]:
        yield from self.open_hosts()
        yield from self.retune()
        yield from self.add_addresses()
        yield from self.free()

    def give_up(self) -> Iterator[GiveUp]:
        """One rule; if none alone is enough, two."""
        rules = rules_of(self.vm, self.spare)
        for count in (1, 2):
            changes = [GiveUp(chosen) for chosen in combinations(rules, count)]
            helpful = [change for change in changes if self._would_do(change)]
            if helpful:
                yield from helpful
                return

    def open_hosts(self) -> Iterator[Opening]:
        left = MOST_ENDED
        for kind in OPENINGS:
            closed = [(h, after) for h in self.fleet.hosts if (after := kind.opened(h, self.vm)) is not h]
            if self.spare.mode is Spare.OFF:
                opened = self._fitting(after for _, after in closed) if closed else []
            else:
                # The VM may also fit elsewhere, once a loss there could be made good here.
                few = [(host.name, self.fleet.changed([after])) for host, after in closed[:left]]
                opened = [name for name, changed in few if self._would_fit_on(changed)]
                left -= len(few)
            if opened:
                yield kind(tuple(opened[:MOST_NAMED]))

    def retune(self) -> Iterator[Retune]:
        """Where a host has all that is wanted, in the wrong cells."""
        answer = self.planner.plan(PlanRequest((self.vm,), Policy.PACK, spare=self.spare, most_moves=MOST_MOVES))
        if not answer.placed or not answer.evidence[0].moves:
            return
        change = Retune(answer.placed[0].host, answer.evidence[0].moves)
        # With the moves made and the VM yet to come, ways out are looked for anew, and may not be found.
        if self.spare.mode is Spare.OFF or self._would_fit_on(change.apply(self.fleet, self.vm)[0]):
            yield change

    def add_addresses(self) -> Iterator[AddAddresses]:
        """For hosts that have everything but an address."""
        spent = {prefix for prefix, free in self.fleet.free_addresses.items() if free <= 0}
        networks = self.vm.profile.networks
        # Of hosts with the same prefixes one tells for all.
        wanting = {
            tuple(
                sorted(
                    {
                        family[0]
                        for network in networks
                        for family in choices(prefixes, network)
                        if family and all(prefix in spent for prefix in family)
                    }
                )
            )
            for prefixes in {host.prefixes for host in self.fleet.hosts}
        }
        options = [AddAddresses(prefixes) for prefixes in sorted(wanting)[:MOST_NAMED] if prefixes]
        yield from (change for change in options if self._would_fit_on(change.apply(self.fleet, self.vm)[0]))

    def other_size(self) -> Iterator[OtherSize]:
        """The largest that fits with fewer vCPUs, less memory, a smaller disk or fewer drives; if none of these helps
        alone, with fewer vCPUs and less memory in proportion; if not even that does, with a smaller disk as well; or
        else in whatever proportions."""
        shape = self.vm.profile.shape
        # Mostly no size fits, and then one look tells; but not where N+1 is searched for, which may miss what is there.
        if self.spare.mode is Spare.OFF and not self._would_fit_sized(_smallest(shape)):
            return
        page_mib = _page_mib(shape)
        least_pages = _least_pages(shape)
        alone: list[tuple[int, int, Callable[[int], Shape]]] = [
            (1, shape.vcpus // 2, lambda units: replace(shape, vcpus=2 * units)),
            (least_pages, shape.memory_mib // page_mib, lambda units: replace(shape, memory_mib=units * page_mib)),
            (1, shape.disk_mib, lambda units: replace(shape, disk_mib=units)),
            (1, shape.nvme, lambda units: replace(shape, nvme=units)),
        ]

        def in_proportion(units: int) -> Shape:
            pages = max(shape.memory_mib * 2 * units // shape.vcpus // page_mib, least_pages)
            return replace(shape, vcpus=2 * units, memory_mib=min(pages * page_mib, shape.memory_mib))

        found = [size for least, most, sized in alone if (size := self._largest(least, most, sized))]

        def smaller_throughout(units: int) -> Shape:
            return replace(in_proportion(units), disk_mib=-(-shape.disk_mib * 2 * units // shape.vcpus))

        for sized in (in_proportion, smaller_throughout):
            found = found or [size for size in (self._largest(1, shape.vcpus // 2, sized),) if size]
        for size in found or self._grown(shape):
            yield OtherSize(size.vcpus, size.memory_mib, size.disk_mib, _lost(size, shape), size.nvme)

    def free(self) -> Iterator[FreeRoom]:
        """The hosts with the least to free, of those that would do but for room."""
        candidates = self.planner.candidates(self.vm.profile, Policy.PACK)
        allowed = candidates.standing & self.planner.workspace.addresses.enough(self.vm.profile.networks)
        for rows in self.planner.closed(self.vm):
            allowed[rows] = False
        shortage = Shortage(self.planner.workspace, candidates.fitting)
        weights = np.where(allowed, shortage.weights, np.inf)
        least = weights.min(initial=np.inf)
        if not np.isfinite(least):
            return
        rooms = [shortage.room(int(row)) for row in np.flatnonzero(weights == least)[:MOST_NAMED]]
        rooms = [room for room in rooms if self._would_do_freed(FreeRoom((room,), 0.0).host(self.fleet))]
        if rooms:
            yield FreeRoom(tuple(rooms), float(least))

    # --- trying ----------------------------------------------------------------------------------------------------

    def _would_do(self, change: GiveUp) -> bool:
        vm = change.apply(self.fleet, self.vm)[1]
        return _fits(self.planner, vm, spare_after(change, self.spare))

    def _would_fit_sized(self, shape: Shape) -> bool:
        return _fits(self.planner, replace(self.vm, profile=replace(self.vm.profile, shape=shape)), self.spare)

    def _would_fit_on(self, changed: Fleet) -> bool:
        """Tried by a planner that goes from one such fleet to the next: it keeps what is the same in all of them."""
        if self._elsewhere is None:
            self._elsewhere = Planner(changed)
        else:
            pairs = enumerate(zip(self._elsewhere.fleet.hosts, changed.hosts, strict=True))
            self._elsewhere.follow(changed, [row for row, (before, after) in pairs if before is not after])
        return _fits(self._elsewhere, self.vm, self.spare)

    def _would_do_freed(self, host: HostState) -> bool:
        fits = bool(self._fitting([host]))
        return fits and (self.spare.mode is Spare.OFF or self._would_fit_on(self.fleet.changed([host])))

    def _fitting(self, changed: Iterable[HostState]) -> list[str]:
        """The hosts that the VM would fit if they were like this, each alone. Only its groups look at other hosts."""
        few = Fleet.build(list(changed), self.fleet.free_addresses)
        fits = Planner(few).candidates(self.vm.profile, Policy.PACK).key < np.inf
        open_rows = np.ones(len(self.fleet.hosts), dtype=np.bool_)
        for rows in self.planner.closed(self.vm):
            open_rows[rows] = False
        return [
            host.name
            for host, fit in zip(few.hosts, fits, strict=True)
            if fit and open_rows[self.fleet.index[host.name]]
        ]

    def _grown(self, shape: Shape) -> Iterator[Shape]:
        """The smallest there is, with as many vCPUs as fit then, then memory, drives and disk."""
        size = _smallest(shape)
        if self.spare.mode is not Spare.OFF and not self._would_fit_sized(size):
            return
        page_mib = _page_mib(shape)
        sizes: list[tuple[str, int, int]] = [
            ("vcpus", 2, shape.vcpus), ("memory_mib", page_mib, shape.memory_mib), ("nvme", 1, shape.nvme),
            ("disk_mib", 1, shape.disk_mib),
        ]  # fmt: skip
        for name, unit, most in sizes:
            size = self._with_most(size, name, unit, most)
        yield size

    def _with_most(self, size: Shape, name: str, unit: int, most: int) -> Shape:
        """With as much as fits of one thing, `most` at the most; `size` fits."""
        least = int(getattr(size, name)) // unit

        def sized(units: int) -> Shape:
            more: dict[str, Any] = {name: units * unit}
            return replace(size, **more)

        return self._largest(least, most // unit + 1, sized) or size

    def _largest(self, least: int, most: int, sized: Callable[[int], Shape]) -> Shape | None:
        """With the most units below `most` with which the VM fits, `least` at the least: what fits with more fits with
        fewer."""
        low, high = least - 1, most
        # As above.
        if self.spare.mode is Spare.OFF and least < most and not self._would_fit_sized(sized(least)):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if self._would_fit_sized(sized(middle)):
                low = middle
            else:
                high = middle
        return sized(low) if low >= least else None


def _lost(size: Shape, wanted: Shape) -> float:
    """The largest share that is given up of anything; on shared storage a VM has no disk of a host."""
    pairs = [(size.vcpus, wanted.vcpus), (size.memory_mib, wanted.memory_mib)]
    pairs += [(size.disk_mib, wanted.disk_mib), (size.nvme, wanted.nvme)]
    return max(1 - less / all_of_it for less, all_of_it in pairs if all_of_it)


def _smallest(shape: Shape) -> Shape:
    """Where not even that fits, no size does; without drives it would be a VM of another kind."""
    return replace(
        shape,
        vcpus=min(2, shape.vcpus),
        memory_mib=min(_least_pages(shape) * _page_mib(shape), shape.memory_mib),
        disk_mib=min(1, shape.disk_mib),
        nvme=min(1, shape.nvme),
    )


def _page_mib(shape: Shape) -> int:
    return max(shape.numa.huge_page_kib // 1024, 1)


def _least_pages(shape: Shape) -> int:
    return -(-LEAST_MEMORY_MIB // _page_mib(shape))


def _fits(planner: Planner, vm: VmRequest, spare: SpareRule) -> bool:
    """As a plan would find, which also works out why not; that is half of the work."""
    if spare.mode is not Spare.OFF:
        return bool(planner.plan(PlanRequest((vm,), Policy.PACK, spare=spare)).placed)
    return bool(_fitting_rows(planner, vm).any())


def _fitting_rows(planner: Planner, vm: VmRequest) -> BoolArray:
    fits: BoolArray = Candidates(planner.workspace, vm.profile, Policy.PACK).key < np.inf
    for rows in planner.closed(vm):
        fits[rows] = False
    return fits
