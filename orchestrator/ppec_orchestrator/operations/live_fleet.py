# SPDX-License-Identifier: Apache-2.0
"""The fleet kept in memory, with a planner that remembers what it worked out. Before a plan only what changed is read.

Which hosts changed, by this process or another, their marks tell (`store/changes.py`). Two figures have none, because
they change all the time, and are up to a second old: which hosts are silent, and how many addresses are free (less
those that VMs have taken since). A VM is refused only on figures that were read after it was asked for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy import Connection

from ppec_orchestrator.placement.applied import less_granted, with_room_taken
from ppec_orchestrator.placement.fleet import Fleet, HostState
from ppec_orchestrator.placement.plan import Placement, Plan
from ppec_orchestrator.placement.planner import Kept, Planner
from ppec_orchestrator.placement.request import PlanRequest, VmRequest
from ppec_orchestrator.store.clock import Clock
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.fleet import Changes, HostReader, changes_since, prefix_rows, silent_hosts
from ppec_orchestrator.store.seated import SeatedVms
from ppec_orchestrator.store.utilisation import free_counts, held_counts

_ROUND_EVERY = timedelta(seconds=1)
# A look at all hosts and addresses is put off, if need be, so that at most this part of the time goes into it.
_ROUND_SHARE = 0.05
# When more than this part of the hosts changed, all of them are read.
_MOST_CHANGED = 0.5
# A statement takes only so many parameters.
_AT_ONCE = 1000


@dataclass(slots=True)
class _Known:
    """What the last look found. `rows` are by host id."""

    planner: Planner
    reader: HostReader
    rows: dict[int, int]
    horizon: int
    removals: int
    round_at: datetime
    round_s: float
    round_took_s: float = 0.0

    def round_due(self, now: datetime, since_s: float) -> bool:
        """Silence and addresses were read before `since_s` on the monotonic clock, or long ago."""
        every = max(_ROUND_EVERY, timedelta(seconds=self.round_took_s / _ROUND_SHARE))
        return self.round_s < since_s or not timedelta(0) <= now - self.round_at < every


@dataclass(frozen=True, slots=True)
class Taken:
    """The marks of hosts, by id, before and after a commit that alone changed them."""

    before: Mapping[int, int]
    after: Mapping[int, int]


class LiveFleet:
    """For all threads of a process: one plans at a time, which is work for a CPU and not waiting."""

    def __init__(self, database: Database, *, silent_after_s: float, now: Clock) -> None:
        self._database = database
        self._silent_after = timedelta(seconds=silent_after_s)
        self._now = now
        self._lock = threading.Lock()
        self._known: _Known | None = None

    def plan(
        self,
        request: PlanRequest,
        kept: Kept | None = None,
        *,
        afresh: bool = False,
        leaving: Mapping[UUID, str] | None = None,
    ) -> tuple[Plan, Fleet]:
        """On the fleet as it is committed now. `afresh`: with the figures that have no marks read now as well.
        `leaving`: without these VMs, by their hosts, but for the room that they take."""
        asked_s = time.monotonic()
        with self._lock:
            known = self._followed(asked_s if afresh else 0)
            planner = _planner_of(known, leaving)
            plan = self._plan(planner, request, kept)
            if plan.refused and known.round_s < asked_s:
                planner = _planner_of(self._followed(asked_s), leaving)
                plan = self._plan(planner, request, kept)
            return plan, planner.fleet

    def _plan(self, planner: Planner, request: PlanRequest, kept: Kept | None) -> Plan:
        try:
            return planner.plan(request, kept)
        except BaseException:
            # Whatever it had taken by then is not given back: better to read the fleet again than to plan on that.
            self._known = None
            raise

    def committed(self, request: PlanRequest, placements: Sequence[Placement], taken: Taken) -> None:
        """Follows what this process committed itself, without reading it: of hosts on which nothing else changed."""
        asked = {vm.vm_id: vm for vm in request.vms}
        by_host: dict[int, list[Placement]] = {}
        for place in placements:
            by_host.setdefault(place.host_id, []).append(place)
        with self._lock:
            known = self._known
            if known is None:
                return
            fleet, rows = known.planner.fleet, known.rows
            states = [
                _with(fleet.hosts[rows[host_id]], by_host[host_id], asked, known.reader.seated, mark)
                for host_id, mark in taken.after.items()
                if host_id in rows and fleet.hosts[rows[host_id]].mark == taken.before[host_id]
            ]
            if states:
                self._known = None
                followed = [place for state in states for place in by_host[state.host_id]]
                changed = fleet.changed(states, less_granted(fleet, followed, asked))
                known.planner.follow(changed, sorted(rows[state.host_id] for state in states))
                self._known = known

    def current(self) -> Fleet:
        """As a plan would find it now."""
        with self._lock:
            return self._followed(time.monotonic()).planner.fleet

    def _followed(self, round_since_s: float) -> _Known:
        """Up to date, and silence and addresses read no earlier than that on the monotonic clock."""
        known, self._known = self._known, None
        # A transaction of its own, also while the caller writes: what may yet be rolled back is not to be seen here.
        with self._database.read() as conn:
            # Nothing is known, rather than half of it, when this fails.
            self._known = self._load(conn) if known is None else self._follow(conn, known, round_since_s)
        return self._known

    # --- the whole fleet -------------------------------------------------------------------------------------------

    def _load(self, conn: Connection) -> _Known:
        now, started_s = self._now(), time.monotonic()
        changes = changes_since(conn, 0)
        reader = HostReader(SeatedVms(), prefix_rows(conn))
        fleet = Fleet.build(reader.read(conn, now - self._silent_after), free_counts(conn, now))
        return _Known(
            planner=Planner(fleet),
            reader=reader,
            rows={host.host_id: row for row, host in enumerate(fleet.hosts)},
            horizon=changes.horizon,
            removals=changes.removals,
            round_at=now,
            round_s=started_s,
        )

    # --- what changed ----------------------------------------------------------------------------------------------

    def _follow(self, conn: Connection, known: _Known, round_since_s: float) -> _Known:
        now, started_s = self._now(), time.monotonic()
        changes = changes_since(conn, known.horizon)
        due = known.round_due(now, round_since_s)
        if due and prefix_rows(conn) != known.reader.prefixes:
            return self._load(conn)
        states = self._changed(conn, known, changes, now)
        if states is None:
            return self._load(conn)
        before = known.planner.fleet
        if due:
            free: Mapping[int, int] = free_counts(conn, now)
            states = self._with_silence(conn, before, states, now)
            known.round_at, known.round_s, known.round_took_s = now, started_s, time.monotonic() - started_s
        else:
            free = _less_held(conn, before, states)
        if states or free != before.free_addresses:
            rows = sorted(known.rows[state.host_id] for state in states)
            known.planner.follow(before.changed(states, free), rows)
        known.horizon = changes.horizon
        return known

    def _changed(self, conn: Connection, known: _Known, changes: Changes, now: datetime) -> Sequence[HostState] | None:
        """The hosts that changed since; None when they are not those of the fleet, or too many."""
        fleet, rows = known.planner.fleet, known.rows
        if changes.removals != known.removals or not changes.marks.keys() <= rows.keys():
            return None
        # A mark may be found again: the horizon is behind whoever was still under way the last time.
        ids = sorted(each for each, mark in changes.marks.items() if fleet.hosts[rows[each]].mark != mark)
        if len(ids) > max(_AT_ONCE, _MOST_CHANGED * len(rows)):
            return None
        if not ids:
            return ()
        chunks = (ids[start : start + _AT_ONCE] for start in range(0, len(ids), _AT_ONCE))
        states = [state for chunk in chunks for state in known.reader.read(conn, now - self._silent_after, chunk)]
        alike = all(
            fleet.index.get(state.name) == known.rows[state.host_id] and len(state.cells) <= fleet.width
            for state in states
        )
        return states if alike and len(states) == len(ids) else None

    def _with_silence(
        self, conn: Connection, fleet: Fleet, states: Sequence[HostState], now: datetime
    ) -> Sequence[HostState]:
        """And those that fell silent, or are heard again."""
        silent = silent_hosts(conn, now - self._silent_after)
        read = {state.host_id for state in states}
        turned = [
            replace(host, live=not host.live)
            for host in fleet.hosts
            if host.live == (host.host_id in silent) and host.host_id not in read
        ]
        return [*states, *turned]


def _planner_of(known: _Known, leaving: Mapping[UUID, str] | None) -> Planner:
    """For VMs that leave, which is rare, one of its own: whatever looks at neighbours doesn't see them."""
    fleet = known.planner.fleet
    rows = {row for name in (leaving or {}).values() if (row := fleet.index.get(name)) is not None}
    if not leaving or not rows:
        return known.planner
    hosts = (fleet.hosts[row] for row in rows)
    without = [replace(host, vms=tuple(vm for vm in host.vms if vm.vm_id not in leaving)) for host in hosts]
    return Planner(fleet.changed(without))


def _with(
    host: HostState, placements: Sequence[Placement], asked: Mapping[UUID, VmRequest], seated: SeatedVms, mark: int
) -> HostState:
    """The host as it is read once these VMs are placed on it."""
    new = (seated.new(place, asked[place.vm_id], host.vrf) for place in placements)
    vms = sorted((*host.vms, *new), key=lambda vm: vm.vm_id)
    return replace(with_room_taken(host, placements, vms), generation=host.generation + 1, mark=mark)


def _less_held(conn: Connection, fleet: Fleet, states: Sequence[HostState]) -> Mapping[int, int]:
    """The free addresses, less those of VMs that these hosts have got. What was given back is counted with the next
    round: of which prefix it was, the hosts' VMs don't say."""
    known = {vm.vm_id for state in states for vm in fleet.hosts[fleet.index[state.name]].vms}
    new = [vm.vm_id for state in states for vm in state.vms if vm.vm_id not in known]
    if not new:
        return fleet.free_addresses
    free = dict(fleet.free_addresses)
    for start in range(0, len(new), _AT_ONCE):
        for prefix, count in held_counts(conn, new[start : start + _AT_ONCE]).items():
            if prefix in free:
                free[prefix] = max(free[prefix] - count, 0)
    return free
