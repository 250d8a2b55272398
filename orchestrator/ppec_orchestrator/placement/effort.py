# SPDX-License-Identifier: Apache-2.0
"""How much is tried for one VM where N+1 is required.

A trial there is a whole plan: for each place that the VM could have, a search for where everything restarts that might
be lost, and a search that ends in no is the longest there is. So these are counted. Without N+1 a trial is a look at
arrays, and nothing is counted.
"""

from __future__ import annotations

from collections.abc import Hashable
from weakref import WeakKeyDictionary

from ppec_contract.api_placement import Policy
from ppec_orchestrator.placement.planner import Planner
from ppec_orchestrator.placement.request import PlanRequest, SpareRule, VmRequest

# For one VM. Mostly three to six do; where a smaller size fits, twenty.
MOST_TRIED = 32
# What was found of planners that stay on their fleet: whether a VM fits, by VM and rule. It goes with them.
Known = WeakKeyDictionary[Planner, dict[Hashable, bool]]


class Effort:
    """For one VM: `tried` plans were made under N+1, or made before for another VM. Once they are `most`, nothing more
    is known to fit. `known` is of all VMs that the planners are for: what it spares is counted, so that each VM is told
    the same whatever was found for another before."""

    def __init__(self, known: Known, most: int) -> None:
        self.most = most
        self.tried = 0
        self._known = known
        self._asked = set[Hashable]()

    def spend(self) -> bool:
        """One plan more. False where there may be none."""
        if self.tried >= self.most:
            return False
        self.tried += 1
        return True

    def fits(self, planner: Planner, vm: VmRequest, spare: SpareRule) -> bool:
        """A plan has a place for it; False too where none may be made any more."""
        return self.spend() and _fits(planner, vm, spare)

    def fits_still(self, planner: Planner, vm: VmRequest, spare: SpareRule) -> bool:
        """The same of a planner that stays on its fleet: nothing is tried twice."""
        asked, known = (vm.kind, spare), self._known.setdefault(planner, {})
        if (id(planner), asked) not in self._asked:
            if not self.spend():
                return False
            self._asked.add((id(planner), asked))
        if asked not in known:
            known[asked] = _fits(planner, vm, spare)
        return known[asked]


def _fits(planner: Planner, vm: VmRequest, spare: SpareRule) -> bool:
    return bool(planner.plan(PlanRequest((vm,), Policy.PACK, spare=spare)).placed)
