# SPDX-License-Identifier: Apache-2.0
"""Which rules about spare room (N+1) hold where: the request's own in every cluster, and each cluster's in that one.

A request can ask for more than a cluster does, never for less."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ppec_orchestrator.placement.fleet import Fleet
from ppec_orchestrator.placement.request import NO_SPARE_RULE, Level, Spare, SpareRule

# The stricter one later.
_STRICTNESS = (Spare.OFF, Spare.WARN, Spare.REQUIRED)


@dataclass(frozen=True, slots=True)
class SpareRules:
    """`own` is the request's, `clusters` are those that clusters have, by name; one that is not there has none."""

    own: SpareRule = NO_SPARE_RULE
    clusters: Mapping[str, SpareRule] = field(default_factory=dict)

    @classmethod
    def of(cls, fleet: Fleet, own: SpareRule) -> SpareRules:
        """Those for a request with this rule of its own."""
        return cls(own, fleet.spare_rules if own.clusters else {})

    def mode(self, level: Level, cluster: str) -> Spare:
        """What is made of the loss of one host, or rack, of the cluster."""
        rules = (self.own, self.clusters.get(cluster, NO_SPARE_RULE))
        return max((rule.mode for rule in rules if rule.level is level), key=_STRICTNESS.index, default=Spare.OFF)

    @property
    def levels(self) -> tuple[Level, ...]:
        """Those that any rule is about."""
        used = {rule.level for rule in (self.own, *self.clusters.values()) if rule.mode is not Spare.OFF}
        return tuple(level for level in Level if level in used)

    @property
    def off(self) -> bool:
        """Nobody asks for anything."""
        return not self.levels

    @property
    def required(self) -> bool:
        """Somewhere a VM may be turned away. A warning turns nobody away."""
        return any(rule.mode is Spare.REQUIRED for rule in (self.own, *self.clusters.values()))

    def required_in(self, cluster: str) -> bool:
        return any(self.mode(level, cluster) is Spare.REQUIRED for level in self.levels)
