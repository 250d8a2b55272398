# SPDX-License-Identifier: Apache-2.0
"""The fleet in memory is the fleet in the database, whoever changed it and however late. On both databases."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from small_fleet import NOW, SHAPE, add_vms, make_fleet
from sqlalchemy import Connection, delete, event, insert, select, text, update

from ppec_contract.api_hosts import HostLiveness, HostUpdate
from ppec_contract.api_ipdb import NetworkWanted
from ppec_contract.vm import Size
from ppec_orchestrator.operations.live_fleet import LiveFleet
from ppec_orchestrator.operations.planning import Planned, Planning
from ppec_orchestrator.placement.fleet import Fleet
from ppec_orchestrator.placement.plan import Plan
from ppec_orchestrator.placement.planner import plan
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import PlanRequest, Shape, VmRequest
from ppec_orchestrator.store import seats, sizes
from ppec_orchestrator.store import tables as t
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.fleet import changes_since, load_fleet
from ppec_orchestrator.store.hosts import delete_host, flush_last_seen, update_host
from ppec_orchestrator.store.ipdb import ANY_NETWORK
from ppec_orchestrator.store.reservations import release, reserve

SILENT_AFTER_S = 30
SHAPES = (SHAPE, replace(SHAPE, pool="ssd"), replace(SHAPE, nvme=2), replace(SHAPE, pool="san", nvme=1))


def watch(database: Database, clock: Any) -> LiveFleet:
    return LiveFleet(database, silent_after_s=SILENT_AFTER_S, now=clock)


def whole(database: Database, clock: Any) -> Fleet:
    with database.read() as conn:
        return load_fleet(conn, now=clock(), silent_after_s=SILENT_AFTER_S)


def asked(count: int, shape: Shape = SHAPE) -> PlanRequest:
    """Under the names that `add_vms` gives."""
    ids = [uuid4() for _ in range(count)]
    return PlanRequest.alike([(vm_id, f"v{vm_id.hex[:12]}") for vm_id in ids], shape, "x86_64")


def take(database: Database, made: Plan) -> None:
    if not made.placed:
        return
    with database.write() as conn:
        add_placed(conn, made)
        reserve(conn, made.placed)


def add_placed(conn: Connection, made: Plan) -> None:
    """Of the shape that the plan's VMs have in common."""
    first = made.placed[0]
    shape = replace(SHAPE, pool=first.pool, nvme=first.nvme)
    add_vms(conn, [place.vm_id for place in made.placed], shape)


def same(one: Fleet, other: Fleet) -> None:
    assert [host.name for host in one.hosts] == [host.name for host in other.hosts]
    for mine, its in zip(one.hosts, other.hosts, strict=True):
        assert mine == its
    assert one.free_addresses == other.free_addresses
    assert one.index == other.index
    for name, array in other.cells.items():
        columns = min(one.width, other.width)
        assert np.array_equal(one.cells[name][:, :columns], array[:, :columns]), name
    assert np.array_equal(one.disk_free_mib, other.disk_free_mib)
    assert np.array_equal(one.disk_mib, other.disk_mib)


def alike(one: Plan, other: Plan) -> None:
    """Of hosts with equal scores either may be chosen: sums kept incrementally differ in their last digit."""
    assert one.refused == other.refused
    assert [place.vm_id for place in one.placed] == [place.vm_id for place in other.placed]
    scores = [[evidence.score for evidence in each.evidence] for each in (one, other)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


class _World:
    """What may happen to a fleet, by a name each."""

    def __init__(self, database: Database, clock: Any, dice: random.Random, planning: Planning) -> None:
        self.database, self.clock, self.dice, self.planning = database, clock, dice, planning
        self.hosts = 6

    def create(self) -> None:
        take(self.database, plan(whole(self.database, self.clock), self._asked()))

    def _asked(self) -> PlanRequest:
        return asked(self.dice.randint(1, 5), self.dice.choice(SHAPES))

    def create_here(self) -> None:
        """By who keeps the fleet: what it committed itself it doesn't read again."""
        request = self._asked()

        def writes(conn: Connection, planned: Planned) -> None:
            if planned.plan.placed:
                add_placed(conn, planned.plan)
            planned.reserve(conn)

        def commit(writes: Callable[[Connection], None]) -> None:
            if self.dice.random() < 0.3:
                self.create()  # somebody else, between plan and commit
            with self.database.write() as conn:
                writes(conn)

        self.planning.carry_through(request, commit, writes)

    def delete(self) -> None:
        with self.database.write() as conn:
            held = conn.execute(select(t.allocation.c.vm_id)).scalars().all()
            release(conn, self.dice.sample(held, min(2, len(held))))

    def resize(self) -> None:
        with self.database.write() as conn:
            vm_id = conn.execute(select(t.allocation.c.vm_id)).scalars().first()
            if vm_id is not None:
                sizes.begin(conn, vm_id, Size(vcpus=2, memory_mib=1024 + self.dice.choice((0, 512))))

    def retune(self) -> None:
        with self.database.write() as conn:
            vm_id = conn.execute(select(t.allocation.c.vm_id)).scalars().first()
            if vm_id is not None:
                sizes.lock_host_of(conn, vm_id)
                seats.follow(conn, {vm_id: [self.dice.choice((0, 1))]})

    def drain(self) -> None:
        with self.database.write() as conn:
            name = conn.execute(select(t.host.c.name).order_by(t.host.c.id)).scalars().first()
            if name:
                wanted = HostUpdate(draining=self.dice.random() < 0.5)
                update_host(conn, name, wanted, lambda *_: (HostLiveness.UP, None))

    def report(self) -> None:
        with self.database.write() as conn:
            facts = {"capabilities": self.dice.sample(["vm-lifecycle", "vm-policies"], 1)}
            conn.execute(update(t.host).where(t.host.c.id == self.dice.randint(1, 3)).values(facts=facts))

    def grow(self) -> None:
        with self.database.write() as conn:
            mine = t.host_cell.c.host_id == self.dice.randint(1, 3)
            conn.execute(update(t.host).where(t.host.c.id == self.dice.randint(1, 3)).values(disk_mib=2_000_000))
            host_id = conn.execute(select(t.host_cell.c.host_id).where(mine)).scalars().first()
            if host_id is not None:
                conn.execute(update(t.host_cell).where(mine).values(memory_mib=70000))
                conn.execute(update(t.host).where(t.host.c.id == host_id).values(report_sequence=2))

    def pools(self) -> None:
        """As a report has them: one comes, grows, shrinks, or goes unless there is a disk in it."""
        host_id, name = self.dice.randint(1, 3), self.dice.choice(("ssd", "san"))
        mine = (t.host_pool.c.host_id == host_id, t.host_pool.c.name == name)
        with self.database.write() as conn:
            if conn.execute(update(t.host).where(t.host.c.id == host_id).values(report_sequence=3)).rowcount == 0:
                return
            if conn.execute(select(t.host_pool).where(*mine)).first() is None:
                conn.execute(insert(t.host_pool).values(host_id=host_id, name=name, size_mib=3000))
            else:
                conn.execute(update(t.host_pool).where(*mine).values(size_mib=self.dice.choice((0, 1500, 6000))))
                conn.execute(delete(t.host_pool).where(*mine, t.host_pool.c.used_mib == 0))

    def silence(self) -> None:
        self.clock.forward(SILENT_AFTER_S / 2 + 1)

    def heard(self) -> None:
        flush_last_seen(self.database, dict.fromkeys(range(1, 4), self.clock()))
        self.clock.forward(1)

    def new_host(self) -> None:
        self.hosts += 1
        with self.database.write() as conn:
            row = {"id": self.hosts, "name": f"h{self.hosts}", "rack_id": 1, "vrf_id": 1, "address": "a", "port": 1}
            conn.execute(insert(t.host).values(**row, enrolled_at=NOW, last_seen_at=self.clock(), disk_mib=10**6))
            cell = {"host_id": self.hosts, "socket": 0, "threads_per_core": 2, "cores": 4, "memory_mib": 9000}
            conn.execute(insert(t.host_cell), [cell | {"cell": number} for number in range(self.dice.randint(1, 3))])

    def removed_host(self) -> None:
        with self.database.write() as conn:
            holds = select(t.allocation.c.host_id)
            free = conn.execute(select(t.host.c.name).where(t.host.c.id.not_in(holds))).scalars().all()
            if len(free) > 1:
                delete_host(conn, self.dice.choice(free))

    def new_prefix(self) -> None:
        with self.database.write() as conn:
            number = conn.execute(select(t.prefix.c.id).order_by(t.prefix.c.id.desc())).scalars().first() or 0
            conn.execute(
                insert(t.prefix).values(
                    id=number + 1, vrf_id=1, cidr=f"fd00:{number}::/64", family=6, bridge="br0", cluster_id=1,
                    nameservers=[], first=f"fd00:{number}::1", last=f"fd00:{number}::ffff",
                )
            )  # fmt: skip
        self.clock.forward(1)


EVENTS = [name for name in vars(_World) if not name.startswith("_")]


@pytest.mark.parametrize("seed", range(4))
def test_after_any_changes_by_anybody_it_equals_a_whole_load(
    open_database: Callable[[], Database], clock: Any, seed: int
) -> None:
    dice = random.Random(seed)
    mine, others = open_database(), open_database()
    with mine.write() as conn:
        make_fleet(conn, hosts=6, cores=6, pool_mib=5000, drives=3)
        cells = [{"host_id": n, "cell": 1, "socket": 1, "threads_per_core": 1, "cores": 6, "memory_mib": 9000}
                 for n in range(1, 7)]  # fmt: skip
        conn.execute(insert(t.host_cell), cells)
    planning = Planning(mine, silent_after_s=SILENT_AFTER_S, now=clock)
    live = planning.fleet
    worlds = [_World(database, clock, dice, planning) for database in (mine, others)]
    for round_ in range(40):
        world = worlds[dice.randrange(2)]
        world.hosts = max(each.hosts for each in worlds)
        getattr(world, dice.choice(EVENTS))()
        worlds[0].hosts = worlds[1].hosts = world.hosts
        if dice.random() < 0.6:
            live.plan(asked(3))
        if round_ % 4 == 3:
            same(live.current(), whole(mine, clock))
            request = asked(4, dice.choice(SHAPES))
            alike(live.plan(request)[0], plan(whole(mine, clock), request))


@contextmanager
def _uncommitted_drain(database: Database) -> Iterator[None]:
    with database.write() as conn:
        conn.execute(update(t.host).where(t.host.c.name == "h1").values(draining=True))
        yield


def test_a_change_committed_after_later_ones_is_not_missed(postgres_url: str, clock: Any) -> None:
    """The late one took its mark first; looks in between saw higher marks."""
    mine, others = Database(postgres_url), Database(postgres_url)
    try:
        with mine.write() as conn:
            make_fleet(conn, hosts=3)
        live = watch(mine, clock)
        assert not live.current().hosts[0].draining
        with _uncommitted_drain(others):
            for _ in range(3):
                with mine.write() as conn:
                    conn.execute(update(t.host).where(t.host.c.name == "h2").values(disk_mib=5_000_000))
                assert live.current().hosts[1].disk_mib == 5_000_000
                assert not live.current().hosts[0].draining
        assert live.current().hosts[0].draining
        same(live.current(), whole(mine, clock))
    finally:
        mine.close()
        others.close()


def test_only_hosts_that_changed_are_read(database: Database, clock: Any) -> None:
    with database.write() as conn:
        make_fleet(conn, hosts=5)
    with database.read() as conn:
        before = changes_since(conn, 0)
    assert set(before.marks) == {1, 2, 3, 4, 5}
    flush_last_seen(database, {2: clock() + timedelta(seconds=1)})
    with database.read() as conn:
        looked = changes_since(conn, before.horizon)
    assert not {i for i, mark in looked.marks.items() if before.marks[i] != mark}
    take(database, plan(whole(database, clock), asked(1)))
    with database.read() as conn:
        after = changes_since(conn, looked.horizon)
    assert len({i for i, mark in after.marks.items() if before.marks[i] != mark}) == 1


def test_a_refusal_is_of_figures_read_after_the_request(database: Database, clock: Any) -> None:
    """Within the second in which silence and addresses are not looked at again."""
    with database.write() as conn:
        make_fleet(conn, hosts=1, cores=8, addresses="10.0.0.0/30")
        conn.execute(update(t.host).values(last_seen_at=NOW - timedelta(hours=1)))
    live = watch(database, clock)
    (refused,) = live.plan(asked(1))[0].refused
    assert refused.reasons == {Reason.SILENT: 1}
    assert flush_last_seen(database, {}) == frozenset()
    flush_last_seen(database, {1: clock()})
    made, _ = live.plan(asked(2))
    assert len(made.placed) == 2
    take(database, made)
    assert live.plan(asked(1))[0].refused[0].reasons == {Reason.ADDRESSES: 1}
    with database.write() as conn:
        release(conn, [place.vm_id for place in made.placed])
    assert len(live.plan(asked(1))[0].placed) == 1


def test_what_this_process_committed_is_not_read_again(database: Database, clock: Any) -> None:
    """Nor is it wrong: the fleet in memory is the one in the database, marks and all."""
    with database.write() as conn:
        make_fleet(conn, hosts=4)
    planning = Planning(database, silent_after_s=SILENT_AFTER_S, now=clock)
    reads: list[str] = []

    @event.listens_for(database._reader, "after_cursor_execute")
    def remember(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
        reads.append(statement)

    def writes(conn: Connection, planned: Planned) -> None:
        add_vms(conn, [place.vm_id for place in planned.plan.placed])
        planned.reserve(conn)

    def commit(writes: Callable[[Connection], None]) -> None:
        with database.write() as conn:
            writes(conn)

    for round_ in range(3):
        reads.clear()
        planning.carry_through(asked(2), commit, writes)
        assert any("allocation_cell" in statement for statement in reads) is (round_ == 0)
    same(planning.fleet.current(), whole(database, clock))


def test_a_vm_takes_as_many_addresses_as_its_networks_say(database: Database, clock: Any) -> None:
    """Between two looks at the free ones: by who commits it, and by another who reads that VMs have come."""
    with database.write() as conn:
        make_fleet(conn, hosts=2, cores=8)
    here, there = (Planning(database, silent_after_s=SILENT_AFTER_S, now=clock) for _ in range(2))
    for planning in (here, there):
        planning.carry_through(asked(1), _write(database), _reserving())
    looked = [planning.fleet._known.round_s for planning in (here, there)]  # type: ignore[union-attr]
    mine = frozenset({1})
    # One asked for by number that is free is counted like the others.
    profile = replace(asked(1).vms[0].profile, networks=(mine, mine, None, mine))
    request = PlanRequest((VmRequest(new := uuid4(), f"v{new.hex[:12]}", profile),))
    wanted = [NetworkWanted(prefix="10.0.0.0/26"), NetworkWanted(prefix="10.0.0.0/26")]
    networks = [*wanted, NetworkWanted(), NetworkWanted(address="10.0.0.40")]
    here.carry_through(request, _write(database), _reserving(networks))
    for planning in (here, there):
        planning.fleet.plan(asked(1))
        assert planning.fleet._known.planner.fleet.free_addresses == {1: 62 - 2 - 4}  # type: ignore[union-attr]
    assert looked == [planning.fleet._known.round_s for planning in (here, there)]  # type: ignore[union-attr]
    same(there.fleet.current(), whole(database, clock))


def _reserving(networks: Sequence[NetworkWanted] = ANY_NETWORK) -> Callable[[Connection, Planned], None]:
    def writes(conn: Connection, planned: Planned) -> None:
        add_vms(conn, [place.vm_id for place in planned.plan.placed])
        planned.reserve(conn, {place.vm_id: networks for place in planned.plan.placed})

    return writes


def _write(database: Database) -> Callable[[Callable[[Connection], None]], None]:
    def commit(writes: Callable[[Connection], None]) -> None:
        with database.write() as conn:
            writes(conn)

    return commit


def test_what_is_not_committed_is_not_seen(database: Database, clock: Any) -> None:
    with database.write() as conn:
        make_fleet(conn, hosts=2)
    live = watch(database, clock)
    live.current()

    def rolled_back() -> None:
        with _uncommitted_drain(database):
            assert not live.current().hosts[0].draining
            raise KeyError

    with pytest.raises(KeyError):
        rolled_back()
    same(live.current(), whole(database, clock))


def test_a_look_that_fails_is_forgotten(database: Database, clock: Any) -> None:
    with database.write() as conn:
        make_fleet(conn, hosts=2)
    live = watch(database, clock)
    live.current()
    with database.write() as conn:
        conn.execute(text("ALTER TABLE host_cell RENAME TO elsewhere"))
        conn.execute(update(t.host).where(t.host.c.name == "h1").values(draining=True))
    with pytest.raises(Exception, match="database"):
        live.current()
    with database.write() as conn:
        conn.execute(text("ALTER TABLE elsewhere RENAME TO host_cell"))
    same(live.current(), whole(database, clock))
