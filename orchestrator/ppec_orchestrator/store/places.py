# SPDX-License-Identifier: Apache-2.0
"""Where hosts stand, as a filter of hosts and of the VMs on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, select

from ppec_orchestrator.store.tables import cluster, datacentre, host, rack, vrf


@dataclass(frozen=True, slots=True)
class Place:
    """None means any. The architecture is that of the host's cluster."""

    architecture: str | None = None
    region: str | None = None
    datacentre: str | None = None
    cluster: str | None = None
    rack: str | None = None
    vrf: str | None = None
    host: str | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        """On `host`. Which racks are meant is asked once, apart from the hosts: they are few."""
        found: list[ColumnElement[bool]] = []
        if self.host is not None:
            found.append(host.c.name == self.host)
        if self.vrf is not None:
            found.append(host.c.vrf_id.in_(select(vrf.c.id).where(vrf.c.name == self.vrf)))
        of_racks = self._of_racks()
        if of_racks:
            racks = (
                select(rack.c.id)
                .join(cluster, cluster.c.id == rack.c.cluster_id)
                .join(datacentre, datacentre.c.id == cluster.c.datacentre_id)
            )
            found.append(host.c.rack_id.in_(racks.where(*of_racks)))
        return found

    def _of_racks(self) -> list[ColumnElement[bool]]:
        wanted = (
            (rack.c.name, self.rack),
            (cluster.c.name, self.cluster),
            (cluster.c.architecture, self.architecture),
            (datacentre.c.name, self.datacentre),
            (datacentre.c.region, self.region),
        )
        return [column == value for column, value in wanted if value is not None]

    def hosts(self) -> Select[Any] | None:
        """The ids of the hosts there; None where any host would do."""
        conditions = self.conditions()
        return select(host.c.id).where(*conditions) if conditions else None
