# SPDX-License-Identifier: Apache-2.0
"""The rules of clusters about N+1 in a snapshot: only clusters that have one are listed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from ppec_orchestrator.fleets.faults import FleetError, refuse_doubles, shown
from ppec_orchestrator.fleets.snapshot_rows import ClusterRow
from ppec_orchestrator.placement.fleet import Fleet
from ppec_orchestrator.placement.request import Level, Spare, SpareRule


def rules_of(rows: Sequence[ClusterRow], known: Collection[str]) -> Mapping[str, SpareRule]:
    """By the cluster's name. Raises FleetError for one that is there twice, or that no host stands in (`known`)."""
    refuse_doubles((row["name"] for row in rows), "cluster", "clusters[{}].name".format)
    for index, row in enumerate(rows):
        if row["name"] not in known:
            raise FleetError(f"clusters[{index}].name", f"no host is in cluster {shown(row['name'])}")
    return {row["name"]: _rule(row) for row in rows}


def cluster_rows(fleet: Fleet) -> Iterator[dict[str, Any]]:
    for name, rule in sorted(fleet.spare_rules.items()):
        yield {"name": name, "n_plus_one": {"mode": rule.mode.value, "level": rule.level.value}}


def _rule(row: ClusterRow) -> SpareRule:
    asked = row["n_plus_one"]
    return SpareRule(Spare(asked["mode"]), Level(asked.get("level", "host")))
