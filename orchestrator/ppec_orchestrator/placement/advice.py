# SPDX-License-Identifier: Apache-2.0
"""The cheapest changes that would make a refused VM fit, each tried in the model before it is offered.

Asked of the fleet as it is with the rest of the plan carried out (`applied.py`): the VM is alone then. Where N+1 is
required it has to be kept after a change too, unless that is what is given up.

Single changes come first (`trials.py`). Where none helps, rules are given up and closed hosts are opened, no more of
either than it takes, until one does.

With N+1 there is a bound to what is tried for one VM (`effort.py`). Beyond it nothing more is offered but to do without
N+1, which is seen without a trial.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from ppec_contract.api_placement import Policy
from ppec_orchestrator.placement.changes import (
    OPENINGS,
    Change,
    FreeRoom,
    GiveUp,
    Opening,
    Single,
    spare_after,
    together,
)
from ppec_orchestrator.placement.effort import MOST_TRIED, Effort, Known
from ppec_orchestrator.placement.fleet import Fleet
from ppec_orchestrator.placement.plan import Plan, Refusal
from ppec_orchestrator.placement.planner import Planner
from ppec_orchestrator.placement.request import PlanRequest, Spare, SpareRule, VmRequest
from ppec_orchestrator.placement.rules import SPARED, rules_of, switches
from ppec_orchestrator.placement.spare_rules import SpareRules
from ppec_orchestrator.placement.trials import MOST_ENDED, Trials, spare_rules

# Of the kinds of VMs that one plan refused, so many are told what would help unless somebody wants more.
MOST_ADVISED = 10
# And with N+1 required, until so many plans were made for them in all (`effort.py`).
MOST_TRIED_IN_ALL = 96
# Of the request; and of the clusters neither.
_NO_RULE, _UNGUARDED = SpareRule(), SpareRule(clusters=False)
# A rule that is given up; or all hosts that take no VMs of the kind for one reason, opened.
_Relief = str | type[Opening]


@dataclass(frozen=True, slots=True)
class Advice:
    """What would help one VM, cheapest first, and how many plans were made under N+1 to find it."""

    changes: list[Change]
    tried: int


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
    """For several VMs that the same fleet has no place for: most of the work on one is its planner. `most_tried` plans
    are made under N+1 for each."""

    def __init__(self, fleet: Fleet, most_tried: int = MOST_TRIED) -> None:
        self.fleet = fleet
        self._most_tried = most_tried
        self._planner = Planner(fleet)
        # Of the VM that is advised: the fleet with hosts opened, by how; and how much was tried.
        self._opened: dict[frozenset[type[Opening]], Planner] = {}
        self._known = Known()
        self._effort = Effort(self._known, self._most_tried)

    def advise(self, vm: VmRequest, spare: SpareRule = _NO_RULE) -> list[Change]:
        """As `advise`."""
        return self.advice(vm, spare).changes

    def advice(self, vm: VmRequest, spare: SpareRule = _NO_RULE) -> Advice:
        """The same whoever was advised before, and as much work."""
        # A warning refuses nobody.
        spare = spare if spare.mode is Spare.REQUIRED else _NO_RULE
        self._effort = Effort(self._known, self._most_tried)
        trials = self._after(vm, spare, ())
        try:
            found: list[Change] = [*trials.give_up(), *trials.all_but_rules()]
            found = found or self._several(vm, spare)
            return Advice(sorted(found, key=lambda change: change.cost), self._effort.tried)
        finally:
            # The next VM is of another profile.
            self._planner.shelf.clear()
            self._opened.clear()

    def _several(self, vm: VmRequest, spare: SpareRule) -> list[Change]:
        if all(host.architecture != vm.profile.architecture for host in self.fleet.hosts):
            return []
        found = self._together(vm, spare, must=())
        spared = self._spared(vm, spare)
        # All hosts opened would keep N+1, but no single one does.
        for must in dict.fromkeys((*((rule,) for rule in spared), spared)):
            found = found or (self._together(vm, spare, must=must) if must else [])
        return found

    def _together(self, vm: VmRequest, spare: SpareRule, must: tuple[_Relief, ...]) -> list[Change]:
        reliefs = self._fewest(vm, spare, must)
        if reliefs is None:
            return []
        trials, rules = self._after(vm, spare, reliefs), _rules_among(reliefs)
        given_up = (GiveUp(rules),) if rules else ()
        kinds = [kind for kind in OPENINGS if kind in reliefs]
        changes: list[tuple[Single, ...]] = [()] if trials.fits() else [(change,) for change in trials.all_but_rules()]
        found = (self._on_hosts(trials, kinds, change) if kinds else change for change in changes)
        return [together((*given_up, *each)) for each in found if each is not None]

    def _fewest(self, vm: VmRequest, spare: SpareRule, must: tuple[_Relief, ...]) -> tuple[_Relief, ...] | None:
        """No more than it takes for something to help: those are kept, one after the other, without which nothing
        does, and all that `must` be. None where nothing helps whatever is given up."""
        reliefs = next((some for some in self._reliefs(vm, spare) if self._helps(vm, spare, some)), None)
        if reliefs is None:
            return None
        for relief in reversed(reliefs):
            fewer = tuple(each for each in reliefs if each != relief)
            if fewer and relief not in must and self._helps(vm, spare, fewer):
                reliefs = fewer
        return reliefs

    def _reliefs(self, vm: VmRequest, spare: SpareRule) -> Iterator[tuple[_Relief, ...]]:
        """All that leaves the VM more room than before; beside it none of those that may leave less, then one, then all
        of them: each takes as long as the advice on another VM."""
        maybe_less = switches(vm, self.fleet)
        rules = [rule for rule in rules_of(vm, SpareRules()) if rule not in maybe_less]
        spared = self._spared(vm, spare)
        kinds = [kind for kind in OPENINGS if any(kind.opened(host, vm) is not host for host in self.fleet.hosts)]
        more: list[_Relief] = [*rules, *kinds, *spared]
        for count in dict.fromkeys((0, min(1, len(maybe_less)), len(maybe_less))):
            yield from ((*more, *some) for some in combinations(maybe_less, count) if more or some)

    def _spared(self, vm: VmRequest, spare: SpareRule) -> tuple[str, ...]:
        """The rules about N+1 that the VM meets once all others are given up."""
        anywhere = GiveUp(tuple(rules_of(vm, SpareRules()))).apply(self.fleet, vm)[1]
        return tuple(rule for rule in rules_of(vm, spare_rules(self._planner, anywhere, spare)) if rule in SPARED)

    def _helps(self, vm: VmRequest, spare: SpareRule, reliefs: tuple[_Relief, ...]) -> bool:
        """What does not even help without N+1 is seen sooner there."""
        if not self._after(vm, _UNGUARDED, reliefs).something_helps():
            return False
        trials = self._after(vm, spare, reliefs)
        return not trials.guarded or trials.something_helps()

    def _after(self, vm: VmRequest, spare: SpareRule, reliefs: tuple[_Relief, ...]) -> Trials:
        given_up = GiveUp(_rules_among(reliefs))
        planner = self._planner_with(vm, frozenset(each for each in reliefs if not isinstance(each, str)))
        other = given_up.apply(self.fleet, vm)[1]
        return Trials(planner.fleet, planner, other, spare_after(given_up, spare), self._effort)

    def _planner_with(self, vm: VmRequest, kinds: frozenset[type[Opening]]) -> Planner:
        if not kinds:
            return self._planner
        if kinds not in self._opened:
            hosts = self.fleet.hosts
            for kind in kinds:
                hosts = tuple(kind.opened(host, vm) for host in hosts)
            changed = [after for before, after in zip(self.fleet.hosts, hosts, strict=True) if before is not after]
            self._opened[kinds] = Planner(self.fleet.changed(changed))
        return self._opened[kinds]

    # --- which hosts are to be opened ------------------------------------------------------------------------------

    def _on_hosts(
        self, trials: Trials, kinds: list[type[Opening]], change: tuple[Single, ...]
    ) -> tuple[Single, ...] | None:
        """All that it takes, of what was found with every host opened that one of these kinds opens."""
        names = trials.hosts_after(*change)
        if trials.guarded:
            # The VM may go to an open host, once a loss there could be made good on another.
            names += [host.name for host in self.fleet.hosts if self._openings(trials.vm, host.name, kinds)]
        openings = {name: self._openings(trials.vm, name, kinds) for name in names}
        fewest = sorted((name for name in openings if openings[name]), key=lambda name: len(openings[name]))
        for name in fewest[:MOST_ENDED]:
            found = (*openings[name], *(_on_host(each, name) for each in change))
            if trials.guarded and not self._effort.spend():
                return None
            if helps(together(found), self.fleet, trials.vm, trials.spare):
                return found
        return None

    def _openings(self, vm: VmRequest, name: str, kinds: Iterable[type[Opening]]) -> tuple[Opening, ...]:
        host = self.fleet.hosts[self.fleet.index[name]]
        return tuple(kind((name,)) for kind in kinds if kind.opened(host, vm) is not host)


def _rules_among(reliefs: Iterable[_Relief]) -> tuple[str, ...]:
    return tuple(each for each in reliefs if isinstance(each, str))


def _on_host(change: Single, name: str) -> Single:
    """The same on this host alone, where it is one of several that would do."""
    if isinstance(change, OPENINGS) and name in change.hosts:
        return replace(change, hosts=(name,))
    if isinstance(change, FreeRoom):
        here = tuple(room for room in change.rooms if room.host == name)
        return replace(change, rooms=here or change.rooms[:1])
    return change
