# SPDX-License-Identifier: Apache-2.0
"""Which hosts a list shows, in its order: by name. `host_views` reads the rows of those that are shown."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, select

from ppec_contract.api_hosts import HostLiveness
from ppec_orchestrator.store.labels import WantedLabel
from ppec_orchestrator.store.paging import Slice
from ppec_orchestrator.store.places import Place
from ppec_orchestrator.store.search import contains
from ppec_orchestrator.store.tables import host, host_label, host_search


@dataclass(frozen=True, slots=True)
class HostFilter:
    """Which hosts to list; None means any. `silent_before`: a host last seen earlier is silent.

    `liveness` is by what the database says, which is a flush (`liveness_flush_s`) behind what replicas heard. `text` is
    looked for in names, addresses and labels.
    """

    silent_before: datetime
    place: Place = field(default_factory=Place)
    liveness: HostLiveness | None = None
    draining: bool | None = None
    labels: tuple[WantedLabel, ...] = ()
    text: str | None = None


def keys(wanted: Slice, chosen: HostFilter) -> Select[Any]:
    """Selects `id` of the wanted hosts and, if there are more, of one besides."""
    query = select(host.c.id)
    name = host.c.name
    if chosen.text is not None:
        name = host_search.c.name
        query = query.select_from(host_search).join(host, host.c.id == host_search.c.host_id)
        query = query.where(contains(host_search.c.text, chosen.text))
    query = query.where(*chosen.place.conditions(), *_conditions(chosen))
    if wanted.after is not None:
        query = query.where(name > str(wanted.after))
    return query.order_by(name).limit(wanted.limit + 1)


def _conditions(chosen: HostFilter) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = [
        host.c.id.in_(select(host_label.c.host_id).where(label.of(host_label))) for label in chosen.labels
    ]
    if chosen.draining is not None:
        found.append(host.c.draining.is_(chosen.draining))
    if chosen.liveness is None:
        return found
    heard = {
        HostLiveness.REGISTERED: (),
        HostLiveness.ENROLLED: (host.c.last_seen_at.is_(None),),
        HostLiveness.UP: (host.c.last_seen_at >= chosen.silent_before,),
        HostLiveness.UNKNOWN: (host.c.last_seen_at < chosen.silent_before,),
    }
    registered_only = chosen.liveness is HostLiveness.REGISTERED
    return [
        *found,
        host.c.enrolled_at.is_(None) if registered_only else host.c.enrolled_at.is_not(None),
        *heard[chosen.liveness],
    ]
