# SPDX-License-Identifier: Apache-2.0
"""N+1, where a cluster requires it, before a VM of it grows.

Whether a loss could still be made good takes longer than a transaction should: it is looked at on a snapshot, before.
If the cluster's hosts are other ones by the commit, it is looked at again while nobody else can change them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar
from uuid import UUID

from sqlalchemy import Connection, select

from ppec_contract.api_placement import NPlusOne
from ppec_contract.errors import PpecError
from ppec_contract.vm import Size
from ppec_orchestrator.operations.live_fleet import LiveFleet
from ppec_orchestrator.placement.fleet import Fleet, HostState
from ppec_orchestrator.placement.growth import exposed_by, grown
from ppec_orchestrator.placement.plan import Exposed
from ppec_orchestrator.placement.planner import Planner
from ppec_orchestrator.store.reservations import lock_hosts
from ppec_orchestrator.store.tables import allocation, cluster, host, rack

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Growth:
    """A VM that is to hold room for `size`, on this host."""

    vm_id: UUID
    name: str
    host: str
    size: Size


@dataclass(frozen=True, slots=True)
class Seen:
    """What its growth would expose, and the generations, by id, of the hosts that this was seen on."""

    growth: Growth
    exposed: Exposed | None
    generations: Mapping[int, int]


class UnseenError(Exception):
    """The rule has not been looked at for this, or on other hosts than there are now: nothing may be written."""

    def __init__(self, growth: Growth) -> None:
        super().__init__(growth.name)
        self.growth = growth


class Growing:
    """Of VMs on the live fleet."""

    def __init__(self, fleet: LiveFleet) -> None:
        self._fleet = fleet
        self._lock = threading.Lock()
        # Not the live fleet's, which must not lose the ways out that it has found. Kept: a first look at a cluster
        # takes long, and what is the same since the last one is not looked at again.
        self._planner: Planner | None = None

    def through(self, attempt: Callable[[Look], T]) -> T:
        """`attempt` opens a transaction, has the look `begin` before it locks anything, and asks it before it lets the
        VM grow."""
        try:
            return attempt(Look(self))
        except UnseenError as unseen:
            seen = self.seen(unseen.growth)
        try:
            return attempt(Look(self, seen))
        except UnseenError as unseen:
            return attempt(Look(self, within=unseen.growth))

    def seen(self, growth: Growth) -> Seen:
        fleet = self._fleet.current()
        row = fleet.index.get(growth.host)
        here = None if row is None else fleet.hosts[row]
        if here is None or growth.vm_id not in {vm.vm_id for vm in here.vms}:
            # It is to be seen again, and found gone.
            return Seen(growth, None, {})
        rows = fleet.places["cluster"][here.cluster].tolist()
        generations = {fleet.hosts[each].host_id: fleet.hosts[each].generation for each in rows}
        after = grown(here, growth.vm_id, growth.size.vcpus, growth.size.memory_mib)
        # What has no room where it is, is refused for that.
        return Seen(growth, None if after is None else self._exposed_by(fleet, after), generations)

    def _exposed_by(self, fleet: Fleet, after: HostState) -> Exposed | None:
        with self._lock:
            planner, self._planner = self._following(fleet), None
            found = exposed_by(planner, after)
            # Not if it broke off half-way.
            self._planner = planner
            return found

    def _following(self, fleet: Fleet) -> Planner:
        planner = self._planner
        if planner is None or planner.fleet.index is not fleet.index:
            return Planner(fleet)
        pairs = enumerate(zip(planner.fleet.hosts, fleet.hosts, strict=True))
        planner.follow(fleet, [row for row, (before, now) in pairs if before is not now])
        return planner


class Look:
    """The rule, in one transaction: `seen` is what was found before; `within` has it looked at there."""

    def __init__(self, growing: Growing, seen: Seen | None = None, *, within: Growth | None = None) -> None:
        self._growing = growing
        self._seen = seen
        self._within = within

    def begin(self, conn: Connection) -> None:
        """Nobody changes the cluster's hosts until the transaction ends. Without a rule, as is mostly so, nothing is
        locked."""
        about = self._within if self._seen is None else self._seen.growth
        if about is not None:
            # All of them, in the order in which everybody locks hosts.
            lock_hosts(conn, _generations(conn, about.host))

    def refuse_exposing(self, conn: Connection, growth: Growth) -> None:
        """Its host is locked, so the cluster's rule stays as it is; nothing is taken yet. Raises `cluster.exposed`, or
        UnseenError."""
        if not _required(conn, growth.vm_id):
            return
        seen = self._seen
        if self._within is not None:
            seen = self._growing.seen(growth)
        elif seen is None or seen.growth != growth or seen.generations != _generations(conn, growth.host):
            raise UnseenError(growth)
        if seen.exposed is not None:
            raise _exposing(growth, seen.exposed)


def _generations(conn: Connection, name: str) -> dict[int, int]:
    """Of the hosts of this host's cluster, by id."""
    here = select(rack.c.cluster_id).join(host, host.c.rack_id == rack.c.id).where(host.c.name == name)
    racks = select(rack.c.id).where(rack.c.cluster_id.in_(here))
    hosts = select(host.c.id, host.c.generation).where(host.c.rack_id.in_(racks))
    return {row.id: row.generation for row in conn.execute(hosts)}


def _required(conn: Connection, vm_id: UUID) -> bool:
    """By the rule of the cluster that the VM is in."""
    rule = (
        select(cluster.c.n_plus_one)
        .join(rack, rack.c.cluster_id == cluster.c.id)
        .join(host, host.c.rack_id == rack.c.id)
        .join(allocation, allocation.c.host_id == host.c.id)
        .where(allocation.c.vm_id == vm_id)
    )
    asked = conn.execute(rule).scalar_one_or_none()
    return asked is not None and NPlusOne(**asked).mode == "required"


def _exposing(growth: Growth, exposed: Exposed) -> PpecError:
    size, lost = growth.size, exposed.without_place
    vms = "1 VM" if lost == 1 else f"{lost} VMs"
    return PpecError(
        "cluster.exposed",
        f"vm {growth.name} can't have {size.vcpus} vCPUs and {size.memory_mib} MiB on host {growth.host}: were "
        f"{exposed.level.value} {exposed.domain} lost, {vms} would have no place, {exposed.vm} first, and its cluster "
        "requires N+1",
        hint=f"Make room in the cluster, or ease its rule: `ppec cluster update {exposed.cluster} --n-plus-one warn`.",
        subject=f"vm {growth.name}",
        details={"domain": exposed.domain, "level": exposed.level.value, "without_place": lost, "vm": exposed.vm},
    )
