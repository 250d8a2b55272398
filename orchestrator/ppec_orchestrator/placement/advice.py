# SPDX-License-Identifier: Apache-2.0
"""The cheapest changes that would make a refused VM fit, each tried in the model before it is offered.

Asked of the fleet as it is with the rest of the plan carried out (`applied.py`): the VM is alone then. Where N+1 is
required it has to be kept after a change too, unless that is what is given up.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import replace
from itertools import combinations

import numpy as np

from ppec_contract.api_placement import Policy
from ppec_orchestrator.placement.addresses import choices
from ppec_orchestrator.placement.candidates import Candidates
from ppec_orchestrator.placement.changes import (
    AddAddresses,
    Change,
    EndDrain,
    FreeRoom,
    GiveUp,
    OtherSize,
    Retune,
    Several,
    rules_of,
    spare_after,
)
from ppec_orchestrator.placement.fleet import Fleet, HostState
from ppec_orchestrator.placement.plan import Plan, Refusal
from ppec_orchestrator.placement.planner import Planner
from ppec_orchestrator.placement.request import PlanRequest, Shape, Spare, SpareRule, VmRequest
from ppec_orchestrator.placement.shortage import Shortage

# Of the kinds of VMs that one plan refused, so many are told what would help unless somebody wants more.
MOST_ADVISED = 10
# Hosts named in one change.
MOST_NAMED = 20
# Running VMs that may change cells for one.
MOST_MOVES = 4
# Drains that are ended one by one to see whether N+1 is kept: each time, all is worked out anew.
MOST_ENDED = 4
# No VM may be smaller (`ppec_contract/vm.py`).
LEAST_MEMORY_MIB = 64
_NO_RULE = SpareRule()


def refused_by_kind(vms: Iterable[VmRequest], plan: Plan) -> list[tuple[VmRequest, list[Refusal]]]:
    """The refusals of a plan for these VMs, those together whose VMs the same would help, with the first such VM."""
    asked = {vm.vm_id: vm for vm in vms}
    found: dict[Hashable, tuple[VmRequest, list[Refusal]]] = {}
    for refusal in plan.refused:
        vm = asked[refusal.vm_id]
        found.setdefault(vm.kind, (vm, []))[1].append(refusal)
    return list(found.values())


def advise(fleet: Fleet, vm: VmRequest, spare: SpareRule = _NO_RULE) -> list[Change]:
    """Cheapest first; empty where nothing helps, not even rules given up and something else. Every one of them makes
    the VM fit."""
    return Adviser(fleet).advise(vm, spare)


def helps(change: Change, fleet: Fleet, vm: VmRequest, spare: SpareRule = _NO_RULE) -> bool:
    """Applied to the model, does it make the VM fit?"""
    changed, other = change.apply(fleet, vm)
    return bool(Planner(changed).plan(PlanRequest((other,), Policy.PACK, spare=spare_after(change, spare))).placed)


class Adviser:
    """For several VMs that the same fleet has no place for: most of the work on one is its planner."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self._planner = Planner(fleet)

    def advise(self, vm: VmRequest, spare: SpareRule = _NO_RULE) -> list[Change]:
        """As `advise`."""
        # A warning refuses nobody.
        spare = spare if spare.mode is Spare.REQUIRED else _NO_RULE
        trials = self._without(vm, spare, ())
        try:
            found: list[Change] = [*trials.give_up(), *trials.all_but_rules()]
            return sorted(found or self._several(vm, spare), key=lambda change: change.cost)
        finally:
            # The next VM is of another profile.
            self._planner.shelf.clear()

    def _several(self, vm: VmRequest, spare: SpareRule) -> Iterator[Change]:
        """No more rules given up than it takes: those are kept, one after the other, without which something helps."""
        rules = tuple(rules_of(vm, spare))
        if not rules or not self._without(vm, spare, rules).something_helps():
            return
        for rule in reversed(rules):
            fewer = tuple(each for each in rules if each != rule)
            if fewer and self._without(vm, spare, fewer).something_helps():
                rules = fewer
        trials, given_up = self._without(vm, spare, rules), GiveUp(rules)
        if trials.fits():
            yield given_up
        else:
            yield from (Several(given_up, change) for change in trials.all_but_rules())

    def _without(self, vm: VmRequest, spare: SpareRule, rules: tuple[str, ...]) -> _Trials:
        given_up = GiveUp(rules)
        other = given_up.apply(self.fleet, vm)[1]
        return _Trials(self.fleet, self._planner, other, spare_after(given_up, spare))


class _Trials:
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
        return self.fits() or next(self.all_but_rules(), None) is not None

    def all_but_rules(self) -> Iterator[EndDrain | Retune | AddAddresses | OtherSize | FreeRoom]:
        yield from self.end_drain()
        yield from self.retune()
        yield from self.add_addresses()
        yield from self.other_size()
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

    def end_drain(self) -> Iterator[EndDrain]:
        drained = [host for host in self.fleet.hosts if host.draining]
        if self.spare.mode is Spare.OFF:
            rested = self._fitting(replace(host, draining=False) for host in drained) if drained else []
        else:
            # The VM may also fit elsewhere, once a loss there could be made good here.
            few = [(host.name, EndDrain((host.name,))) for host in drained[:MOST_ENDED]]
            rested = [name for name, change in few if self._would_fit_on(change.apply(self.fleet, self.vm)[0])]
        if rested:
            yield EndDrain(tuple(rested[:MOST_NAMED]))

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
        alone, with fewer vCPUs and less memory in proportion; if not even that does, with a smaller disk as well."""
        shape = self.vm.profile.shape
        page_mib = max(shape.numa.huge_page_kib // 1024, 1)
        least_pages = -(-LEAST_MEMORY_MIB // page_mib)
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
        for size in found:
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

    def _largest(self, least: int, most: int, sized: Callable[[int], Shape]) -> Shape | None:
        """With the most units below `most` with which the VM fits, `least` at the least: what fits with more fits with
        fewer."""
        low, high = least - 1, most
        # Mostly no size fits, and then one look tells; but not where N+1 is searched for, which may miss what is there.
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


def _fits(planner: Planner, vm: VmRequest, spare: SpareRule) -> bool:
    """As a plan would find, which also works out why not; that is half of the work."""
    if spare.mode is not Spare.OFF:
        return bool(planner.plan(PlanRequest((vm,), Policy.PACK, spare=spare)).placed)
    fits = Candidates(planner.workspace, vm.profile, Policy.PACK).key < np.inf
    for rows in planner.closed(vm):
        fits[rows] = False
    return bool(fits.any())
