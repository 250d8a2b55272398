# SPDX-License-Identifier: Apache-2.0
"""Running out of addresses is told with counts: how many each prefix had, and what became of the rest."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection

from ppec_contract.errors import PpecError
from ppec_orchestrator.placement.filters import in_scope
from ppec_orchestrator.placement.fleet import Fleet
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import Profile
from ppec_orchestrator.store.ipdb import shortage_counts, shortage_words
from ppec_orchestrator.store.prefixes import select_prefixes
from ppec_orchestrator.store.tables import prefix
from ppec_orchestrator.store.utilisation import utilisation_of

_MOST_TOLD = 5


def lacks_addresses(refused: PpecError) -> bool:
    """Whether more addresses might help."""
    reasons = refused.details.get("reasons", {})
    return refused.code == "address.exhausted" or Reason.ADDRESSES.value in reasons


def with_addresses(conn: Connection, refused: PpecError, fleet: Fleet, profile: Profile, now: datetime) -> PpecError:
    """The planner's refusal; if hosts lack addresses, with the prefixes that serve the places asked for."""
    if not refused.details.get("reasons", {}).get(Reason.ADDRESSES.value):
        return refused
    ids = _serving(fleet, profile)
    rows = conn.execute(select_prefixes().where(prefix.c.id.in_(ids))).all()
    counted = utilisation_of(conn, rows, now)
    scarce = sorted(rows, key=lambda row: (counted[row.id].free, row.id))[:_MOST_TOLD]
    told = [shortage_words(row.cidr, counted[row.id].free, counted[row.id]) for row in scarce]
    prefixes = [
        {"prefix": row.cidr, "vrf": row.vrf, "free": counted[row.id].free} | shortage_counts(counted[row.id])
        for row in scarce
    ]
    return PpecError(
        refused.code,
        f"{refused.message}; " + ("; ".join(told) if told else "no prefix serves them"),
        hint=refused.hint,
        subject=refused.subject,
        details=refused.details | {"prefixes": prefixes},
    )


def _serving(fleet: Fleet, profile: Profile) -> list[int]:
    """The prefixes that count: of those named, or else of all."""
    mask = in_scope(fleet, profile)
    found = {p for row, host in enumerate(fleet.hosts) if mask[row] for family in host.prefixes for p in family}
    wanted = (*profile.networks, *profile.fixed)
    named = {p for network in wanted if network is not None for p in network}
    anywhere = any(network is None for network in wanted)
    return sorted(found if anywhere else found & named)
