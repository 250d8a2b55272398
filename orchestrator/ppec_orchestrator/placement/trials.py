# SPDX-License-Identifier: Apache-2.0
"""One refused VM, and the changes of each kind that would make it fit: each is tried in the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import combinations

import numpy as np

from ppec_contract.api_placement import Policy
from ppec_orchestrator.placement.addresses import lacking
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
from ppec_orchestrator.placement.effort import Effort
from ppec_orchestrator.placement.fleet import BoolArray, Fleet, HostState
from ppec_orchestrator.placement.plan import Plan
from ppec_orchestrator.placement.planner import Planner
from ppec_orchestrator.placement.request import PlanRequest, Shape, SpareRule, VmRequest
from ppec_orchestrator.placement.rules import rules_of
from ppec_orchestrator.placement.shortage import Shortage
from ppec_orchestrator.placement.sizes import Sizes, smallest
from ppec_orchestrator.placement.spare import MOST_PLACES
from ppec_orchestrator.placement.spare_rules import SpareRules

# Hosts named in one change.
MOST_NAMED = 20
# Running VMs that may change cells for one.
MOST_MOVES = 4
# Hosts that are opened one by one, of each kind, or have room freed, to see whether N+1 is kept: each time, all is
# worked out anew.
MOST_ENDED, MOST_FREED = 4, 2
_UNGUARDED = SpareRule(clusters=False)


class Trials:
    """Of one VM. The planner stays on the fleet as it is: with N+1 one that comes back from another may know ways out
    that no new one would find."""

    def __init__(self, fleet: Fleet, planner: Planner, vm: VmRequest, spare: SpareRule, effort: Effort) -> None:
        self.guarded = guarded(planner, vm, spare)
        self.fleet = fleet
        self.planner = planner
        self.vm = vm
        self.spare = spare
        self._effort = effort
        self._sizes = Sizes(vm.profile.shape, self._would_fit_sized, costly=self.guarded)
        self._elsewhere: Planner | None = None

    def fits(self) -> bool:
        return self._fits(self.vm, self.spare)

    def something_helps(self) -> bool:
        """Or is not even needed."""
        return self.fits() or self._sizes.smallest_fits() or next(self._all_but_rules_and_sizes(), None) is not None

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
        rules = rules_of(self.vm, spare_rules(self.planner, self.vm, self.spare))
        for count in (1, 2):
            changes = [GiveUp(chosen) for chosen in combinations(rules, count)]
            helpful = [change for change in changes if self._would_do(change)]
            if helpful:
                yield from helpful
                return

    def open_hosts(self) -> Iterator[Opening]:
        for kind in OPENINGS:
            closed = [after for host in self.fleet.hosts if (after := kind.opened(host, self.vm)) is not host]
            opened = self._fitting(closed) if closed else []
            if self.guarded:
                # The VM may also fit elsewhere, once a loss there could be made good here.
                fit = set(opened)
                likeliest = sorted(closed, key=lambda host: host.name not in fit)[:MOST_ENDED]
                opened = [host.name for host in likeliest if self._would_fit_on(self.fleet.changed([host]))]
            if opened:
                yield kind(tuple(opened[:MOST_NAMED]))

    def retune(self) -> Iterator[Retune]:
        """Where a host has all that is wanted, in the wrong cells."""
        answer = self._plan_with_moves()
        if answer is None or not answer.placed or not answer.evidence[0].moves:
            return
        change = Retune(answer.placed[0].host, answer.evidence[0].moves)
        # With the moves made and the VM yet to come, ways out are looked for anew, and may not be found.
        if not self.guarded or self._would_fit_on(change.apply(self.fleet, self.vm)[0]):
            yield change

    def add_addresses(self) -> Iterator[AddAddresses]:
        """For hosts that have everything but an address."""
        networks, left = self.vm.profile.networks, self.fleet.free_addresses
        # Of hosts with the same prefixes one tells for all.
        kinds = {host.prefixes for host in self.fleet.hosts}
        wanting = sorted({tuple(sorted(lacking(prefixes, networks, left).items())) for prefixes in kinds})
        options = [AddAddresses(dict(addresses)) for addresses in wanting[:MOST_NAMED] if addresses]
        yield from (change for change in options if self._would_fit_on(change.apply(self.fleet, self.vm)[0]))

    def other_size(self) -> Iterator[OtherSize]:
        """As `Sizes.largest`."""
        yield from self._sizes.largest()

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
        most = MOST_FREED if self.guarded else MOST_NAMED
        rooms = [shortage.room(int(row)) for row in np.flatnonzero(weights == least)[:most]]
        rooms = [room for room in rooms if self._would_do_freed(FreeRoom((room,), 0.0).host(self.fleet))]
        if rooms:
            yield FreeRoom(tuple(rooms), float(least))

    def _plan_with_moves(self) -> Plan | None:
        """None where there is no way, or no plan may be made any more."""
        request = PlanRequest((self.vm,), Policy.PACK, spare=_UNGUARDED, most_moves=MOST_MOVES)
        if not self.guarded:
            return self.planner.plan(request)
        # Where it fits as it stands nothing moves for it, and N+1 was tried there.
        rows = np.flatnonzero(_fitting_rows(self.planner, self.vm)).tolist()
        request = replace(request, contended_hosts=frozenset(self.fleet.hosts[row].name for row in rows))
        if not self.planner.plan(request).placed or not self._effort.spend():
            return None
        return self.planner.plan(replace(request, spare=self.spare))

    # --- trying ----------------------------------------------------------------------------------------------------

    def _would_do(self, change: GiveUp) -> bool:
        vm = change.apply(self.fleet, self.vm)[1]
        return self._fits(vm, spare_after(change, self.spare))

    def _would_fit_sized(self, shape: Shape) -> bool:
        return self._fits(replace(self.vm, profile=replace(self.vm.profile, shape=shape)), self.spare)

    def _fits(self, vm: VmRequest, spare: SpareRule) -> bool:
        """As a plan would find, which also works out why not; that is half of the work. What does not fit even without
        N+1 is seen sooner there."""
        rows = _fitting_rows(self.planner, vm)
        if not rows.any() or not guarded(self.planner, vm, spare):
            return bool(rows.any())
        return self._easier_fit(vm, spare) and self._effort.fits_still(self.planner, vm, spare)

    def _easier_fit(self, vm: VmRequest, spare: SpareRule) -> bool:
        """Where N+1 has no place for the least there is, it has none for more; and none for a member of a group where
        it has none for the same VM alone. One look at these tells of many VMs. Over several cells less may be harder:
        with fewer vCPUs it spans fewer."""
        alone = replace(vm, groups=())
        least = replace(alone, profile=replace(vm.profile, shape=smallest(vm.profile.shape)))
        for easier in (alone,) if vm.profile.shape.numa.multi_cell else (least, alone):
            # With more hosts than are tried, the larger may be for others.
            all_tried = _fitting_rows(self.planner, easier).sum() <= MOST_PLACES
            if all_tried and not self._effort.fits_still(self.planner, easier, spare):
                return False
        return True

    def _would_fit_on(self, changed: Fleet) -> bool:
        """Tried by a planner that goes from one such fleet to the next: it keeps what is the same in all of them."""
        if self._elsewhere is None:
            self._elsewhere = Planner(changed)
        else:
            pairs = enumerate(zip(self._elsewhere.fleet.hosts, changed.hosts, strict=True))
            self._elsewhere.follow(changed, [row for row, (before, after) in pairs if before is not after])
        fits = bool(_fitting_rows(self._elsewhere, self.vm).any())
        return fits and (not self.guarded or self._effort.fits(self._elsewhere, self.vm, self.spare))

    def _would_do_freed(self, host: HostState) -> bool:
        fits = bool(self._fitting([host]))
        return fits and (not self.guarded or self._would_fit_on(self.fleet.changed([host])))

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


def spare_rules(planner: Planner, vm: VmRequest, spare: SpareRule) -> SpareRules:
    """Those that the VM meets, with this rule of its request's."""
    return planner.spare_rules(PlanRequest((vm,), Policy.PACK, spare=spare))


def guarded(planner: Planner, vm: VmRequest, spare: SpareRule) -> bool:
    """Whether it may be N+1 that turns the VM away."""
    return spare_rules(planner, vm, spare).required


def _fitting_rows(planner: Planner, vm: VmRequest) -> BoolArray:
    fits: BoolArray = Candidates(planner.workspace, vm.profile, Policy.PACK).key < np.inf
    for rows in planner.closed(vm):
        fits[rows] = False
    return fits
