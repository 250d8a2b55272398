# SPDX-License-Identifier: Apache-2.0
"""Looks for drift whenever the domains are read, and says in the log what is new and what is over."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import structlog

from ppec_agentd.actions.context import HostContext
from ppec_agentd.disks import ROOT_DISK
from ppec_agentd.drift import HostLook, find_drift
from ppec_agentd.hypervisor import Domain
from ppec_agentd.journal import LastWord
from ppec_agentd.places import Places
from ppec_contract.host import Drift

log = structlog.get_logger(__name__)
LastWords = dict[str, LastWord]


@dataclass(frozen=True, slots=True)
class Before:
    """What the agent was doing before the domains were read: an action may begin and end meanwhile."""

    words: LastWords
    folders: Mapping[Path, tuple[str, ...]]
    disks: frozenset[str]


class DriftWatch:
    """`before` → read the domains → `look`. The VMs it has seen it goes on expecting, until they are deleted by order:
    the journal forgets old operations."""

    def __init__(self, context: HostContext) -> None:
        self._context = context
        self._seen: dict[str, str] = {}
        # Per VM the ordinal of the create or delete that was looked into, and whether the VM stands by it: to read the
        # answers again at each look would cost more than all else.
        self._read: dict[str, tuple[int, bool]] = {}
        self.drift: tuple[Drift, ...] = ()

    async def before(self) -> Before:
        words = self._context.journal.last_words()
        folders, disks = await asyncio.to_thread(_listed, self._context.places)
        return Before(words, folders, disks)

    def look(self, before: Before, domains: tuple[Domain, ...]) -> tuple[Drift, ...]:
        """What differs now, also kept as `drift`."""
        context, words = self._context, self._context.journal.last_words()
        known = before.words
        changing = {i for i, word in words.items() if word.in_flight or _ordinal(known, i) != word.ordinal}
        busy = {UUID(vm_id) for vm_id in changing} | {h.vm_id for h in context.ledger.holdings() if h.pending}
        found = find_drift(
            HostLook(
                domains=domains,
                places=context.places,
                images_dir=context.images.directory,
                expected=self._expected(words, domains),
                folders=before.folders,
                disks=before.disks,
                busy=frozenset(busy),
                audit=context.ledger.audit(domains),
            )
        )
        self._tell(found)
        return found

    def _expected(self, words: LastWords, domains: tuple[Domain, ...]) -> dict[UUID, str]:
        self._seen |= {str(domain.vm_id): domain.name for domain in domains if domain.managed}
        read: dict[str, tuple[int, bool]] = {}
        for vm_id, word in words.items():
            if word.made is None:
                continue
            known = self._read.get(vm_id)
            stands = known[1] if known is not None and known[0] == word.made.ordinal else bool(word.stands())
            read[vm_id] = (word.made.ordinal, stands)
            if stands:
                self._seen.setdefault(vm_id, word.name)
            else:
                self._seen.pop(vm_id, None)
        self._read = read
        return {UUID(vm_id): name for vm_id, name in self._seen.items()}

    def _tell(self, found: tuple[Drift, ...]) -> None:
        for drift in found:
            if drift not in self.drift:
                log.warning("drift_found", **_words(drift))
        for drift in self.drift:
            if drift not in found:
                log.info("drift_over", **_words(drift))
        self.drift = found


def _words(drift: Drift) -> dict[str, str]:
    return {name: str(value) for name, value in drift.model_dump(mode="json").items() if value}


def _listed(places: Places) -> tuple[Mapping[Path, tuple[str, ...]], frozenset[str]]:
    """The names in each place, and which of them have a root disk in any."""
    folders = places.names()
    disks = {name for place, names in folders.items() for name in names if os.path.lexists(place / name / ROOT_DISK)}
    return folders, frozenset(disks)


def _ordinal(words: LastWords, vm_id: str) -> int:
    word = words.get(vm_id)
    return 0 if word is None else word.ordinal
