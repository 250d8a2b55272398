# SPDX-License-Identifier: Apache-2.0
"""A small registered fleet in the database, its hosts simulated, and replicas of the operations engine on it."""

from __future__ import annotations

import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, insert, select
from starlette.testclient import TestClient

from ppec_contract.api_operations import OperationState, OperationView
from ppec_contract.api_vms import VmsCreate, VmView
from ppec_contract.model import digest
from ppec_orchestrator.api.app import create_app
from ppec_orchestrator.api.services import make_services
from ppec_orchestrator.approvals import NONE_NEEDED, ApprovalPolicy
from ppec_orchestrator.dispatch.simulated import SimulatedDispatcher, SimulatedFleet
from ppec_orchestrator.ipdb.ranges import to_address, usable_range
from ppec_orchestrator.operations.context import Ports
from ppec_orchestrator.operations.enqueueing import Ask
from ppec_orchestrator.operations.planning import Planning
from ppec_orchestrator.operations.replica import Replica
from ppec_orchestrator.operations.service import Operations
from ppec_orchestrator.settings import Settings
from ppec_orchestrator.store import ipdb, tables, vm_views
from ppec_orchestrator.store import operations as store
from ppec_orchestrator.store.claims import give_up
from ppec_orchestrator.store.clock import utc_now
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.idempotency import RequestKey
from ppec_orchestrator.store.operation_views import OperationFilter
from ppec_orchestrator.store.paging import Slice
from ppec_orchestrator.store.tokens import Role, create_token

# What test modules here share.
sys.path.append(str(Path(__file__).parent))
from people import People
from storage_sums import assert_storage_summed

WAIT_S = 60.0
# The longest there may be, and longer than any test: what takes an operation from its living owner is the test, never
# a slow machine.
LEASE_S = 600
CORES, MEMORY_MIB, DISK_MIB = 8, 16384, 400_000


def now() -> datetime:
    return datetime.now(UTC)


def wait_until(found: Callable[[], Any], what: str) -> Any:
    """Waits on a condition with a bound; returns its first true value."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.01)
    pytest.fail(f"waited {WAIT_S} s in vain until {what}")


def seed(database: Database, hosts: int) -> None:
    """One cluster, one VRF, one IPv4 prefix, `hosts` equal hosts that have just been heard, a flavor and an image."""
    with database.write() as conn:
        conn.execute(insert(tables.datacentre).values(id=1, name="dc1", region="r1"))
        conn.execute(insert(tables.cluster).values(id=1, name="c1", datacentre_id=1, architecture="x86_64"))
        conn.execute(insert(tables.rack).values(id=1, name="rack1", cluster_id=1))
        conn.execute(insert(tables.vrf).values(id=1, name="v1", description=""))
        conn.execute(
            insert(tables.prefix).values(
                id=1, vrf_id=1, cidr="10.7.0.0/24", family=4, gateway="10.7.0.1", bridge="br0", cluster_id=1,
                first="10.7.0.2", last="10.7.0.254", nameservers=["10.7.0.1"],
            )
        )  # fmt: skip
        prefix = conn.execute(select(tables.prefix)).one()
        usable = usable_range(
            ip_network(prefix.cidr),
            gateway=to_address(prefix.gateway),
            first=to_address(prefix.first),
            last=to_address(prefix.last),
        )
        ipdb.insert_ipv4_rows(conn, 1, usable)
        for number in range(1, hosts + 1):
            conn.execute(
                insert(tables.host).values(
                    id=number, name=f"h{number}", rack_id=1, vrf_id=1, address="127.0.0.1", port=7000 + number,
                    draining=False, enrolled_at=now(), last_seen_at=now(), disk_mib=DISK_MIB, disk_used_mib=0,
                )
            )  # fmt: skip
            conn.execute(
                insert(tables.host_cell).values(
                    host_id=number, cell=0, socket=0, threads_per_core=2, cores=CORES, memory_mib=MEMORY_MIB,
                    cores_used=0, memory_used_mib=0,
                )
            )  # fmt: skip
        conn.execute(insert(tables.flavor).values(name="small", vcpus=2, memory_mib=1024, disk_mib=8192))
        conn.execute(insert(tables.flavor).values(name="half", vcpus=8, memory_mib=8192, disk_mib=8192))
        conn.execute(
            insert(tables.image).values(
                id=1, name="debian", format="qcow2", architecture="x86_64", sha256="a" * 64, size_bytes=1,
                virtual_size_mib=1024,
            )
        )  # fmt: skip


def prepare(database: Database, dispatcher: Any, now: Callable[[], datetime]) -> Ports:
    return Ports(
        database=database,
        dispatcher=dispatcher,
        planning=Planning(database, silent_after_s=3600, now=now),
        image_url=lambda sha256: f"https://orchestrator.test/v1/images/{sha256}/content",
        now=now,
    )


@dataclass
class World:
    """The database, the hosts, and as many replicas as a test starts."""

    open_database: Callable[[], Database]
    folder: Path
    fleet: SimulatedFleet = field(default_factory=SimulatedFleet)
    replicas: list[Operations] = field(default_factory=list)
    # By how much the replicas' clock is ahead of the time.
    ahead: timedelta = timedelta(0)
    # Of the replicas that are made from then on.
    approvals: ApprovalPolicy = NONE_NEEDED

    ask = Ask("tester")
    wait_until = staticmethod(wait_until)

    @staticmethod
    def batch(count: int = 4, **more: Any) -> VmsCreate:
        """A batch of small VMs under names of their own."""
        name = f"b{uuid.uuid4().hex[:6]}"
        return VmsCreate(**{"flavor": "small", "image": "debian", "name": name, "count": count, **more})

    def __post_init__(self) -> None:
        self.database = self.open_database()
        self.dispatcher = SimulatedDispatcher(self.fleet)

    def now(self) -> datetime:
        return now() + self.ahead

    def replica(
        self, name: str = "one", *, dispatcher: Any = None, database: Database | None = None, start: bool = True
    ) -> Operations:
        """Starts a replica on a database of its own; one that isn't to start only accepts and shows."""
        if database is None:
            database = self.open_database() if start else self.database
        ports = prepare(database, dispatcher or self.dispatcher, self.now)
        made = Operations(replace(ports, approvals=self.approvals))
        if start:
            made.start(Replica(self.folder / name))
            self.replicas.append(made)
        return made

    def bury(self, replica: Operations, *, leases_end: bool = True) -> None:
        """Ends the threads of a replica whose database died under it, frees its state directory, ends its leases."""
        with suppress(BaseException):
            replica.stop()
        dead = replica.engine._replica
        assert dead is not None
        dead.close()
        replica.engine._ports.database.close()
        self.replicas.remove(replica)
        if leases_end:
            self.end_leases(dead.owner)

    def end_leases(self, owner: str) -> None:
        """As time would."""
        with self.database.write() as conn:
            give_up(conn, owner_prefix=owner, now=self.now())

    def stop(self) -> None:
        for replica in self.replicas:
            replica.stop()

    def settings(self, **values: float) -> None:
        with self.database.write() as conn:
            for name, value in values.items():
                store.change_setting(conn, f"operations.{name}", value)

    def show(self, operation_id: str) -> OperationView:
        return self.replica("reader", start=False).show(operation_id)

    def ended(self, operation_id: str) -> OperationView:
        wait_until(lambda: self.over(operation_id), f"operation {operation_id} has ended")
        return self.show(operation_id)

    def over(self, operation_id: str) -> bool:
        """Whether it has ended: asked often while others work, and so of no more than its state."""
        with self.database.read() as conn:
            query = select(tables.operation.c.state).where(tables.operation.c.id == operation_id)
            return OperationState(conn.execute(query).scalar_one()).ended

    @contextmanager
    def running(self, **more: Any) -> Iterator[Operations]:
        """A replica for the time of the block, on the world's own database if no other is given."""
        replica = self.replica(**{"database": self.database, **more})
        try:
            yield replica
        finally:
            replica.stop()
            database = replica.engine._ports.database
            if database is not self.database:
                database.close()
            self.replicas.remove(replica)

    def wait_cleaned(self) -> None:
        """Until no clean-up is open."""
        with self.database.read() as conn:
            query = select(tables.operation.c.id).where(tables.operation.c.kind == "vm.cleanup")
            found = list(conn.execute(query).scalars())
        for operation_id in found:
            self.ended(operation_id)

    def lease(self, operation_id: str) -> Any:
        with self.database.read() as conn:
            query = select(tables.operation.c.lease_until).where(tables.operation.c.id == operation_id)
            return conn.execute(query).scalar_one()

    def fence(self, operation_id: str) -> Any:
        with self.database.read() as conn:
            query = select(tables.operation.c.fence).where(tables.operation.c.id == operation_id)
            return conn.execute(query).scalar_one()

    def vm(self, ref: str) -> VmView:
        with self.database.read() as conn:
            return vm_views.show(conn, ref, datetime(2000, 1, 1, tzinfo=UTC))

    @staticmethod
    def slice() -> Slice:
        return Slice()

    @staticmethod
    def operations_of_kind(kind: str) -> OperationFilter:
        return OperationFilter(kind=kind)

    @staticmethod
    def keyed(key: str, asked: VmsCreate) -> Ask:
        return Ask("tester", RequestKey("tester", key, digest(asked)))

    # --- what must hold ----------------------------------------------------------------------------------------------

    def assert_consistent(self) -> None:
        """The record, the allocations, the addresses and the hosts agree, and sums are what they sum up."""
        with self.database.read() as conn:
            vms = {row.id: row.record for row in conn.execute(select(tables.vm.c.id, tables.vm.c.record))}
            placed = conn.execute(select(tables.allocation.c.vm_id, tables.host.c.name).join(tables.host))
            allocations = {row.vm_id: row.name for row in placed}
            taken = select(tables.address.c.vm_id).where(tables.address.c.vm_id.is_not(None))
            held = Counter(conn.execute(taken).scalars())
            summed = conn.execute(
                select(tables.allocation.c.host_id, func.sum(tables.allocation_cell.c.cores).label("cores"))
                .join(tables.allocation_cell, tables.allocation_cell.c.vm_id == tables.allocation.c.vm_id)
                .group_by(tables.allocation.c.host_id)
            )
            cores = {row.host_id: int(row.cores) for row in summed}
            by_host = select(tables.host_cell.c.host_id, func.sum(tables.host_cell.c.cores_used))
            used = {row[0]: int(row[1]) for row in conn.execute(by_host.group_by(tables.host_cell.c.host_id))}
            assert_storage_summed(conn)
        living = {vm_id for vm_id, record in vms.items() if record != "failed"}
        assert set(allocations) == living, "room is held by exactly the living VMs"
        assert {vm_id for vm_id in held if vm_id in vms} == living, "and so are addresses"
        assert all(count == 1 for count in held.values())
        assert {host: cores.get(host, 0) for host in used} == used
        there = {vm_id: host for host, mine in self.fleet.vms.items() for vm_id in mine}
        assert len(there) == len(self.fleet.everywhere()), "no VM is on two hosts"
        assert there == {vm_id: allocations[vm_id] for vm_id in living}, "every VM is where the record has it"

    def assert_empty(self) -> None:
        """Nothing is held by anybody, and nothing is on any host."""
        self.assert_consistent()
        with self.database.read() as conn:
            assert conn.execute(select(func.count()).select_from(tables.allocation)).scalar_one() == 0
            taken = select(func.count()).select_from(tables.address).where(tables.address.c.vm_id.is_not(None))
            assert conn.execute(taken).scalar_one() == 0
            assert conn.execute(select(func.sum(tables.host_cell.c.cores_used))).scalar_one() == 0
            assert conn.execute(select(func.sum(tables.host.c.disk_used_mib))).scalar_one() == 0
            assert conn.execute(select(func.sum(tables.host_pool.c.used_mib))).scalar_one() in {None, 0}
            assert conn.execute(select(func.sum(tables.host_cell.c.nvme_used))).scalar_one() == 0
        assert self.fleet.everywhere() == []


@pytest.fixture
def world(open_database: Callable[[], Database], tmp_path: Path) -> Iterator[World]:
    """Three simulated hosts of eight cores each."""
    before = own_threads()
    made = World(open_database, tmp_path / "replicas")
    seed(made.database, 3)
    made.settings(lease_s=LEASE_S)
    yield made
    made.stop()
    # Not those of databases: they are closed after this.
    left = wait_until(lambda: not (own_threads() - before) or None, "every thread of the replicas has ended")
    assert left


def own_threads() -> set[threading.Thread]:
    """The engine's and the watchers' threads that live now."""
    prefixes = ("ppec-op", "ppec-claims", "ppec-leases", "ppec-retention")
    return {one for one in threading.enumerate() if one.name.startswith(prefixes)}


@pytest.fixture
def api(world: Any, tmp_path: Path) -> Iterator[TestClient]:
    services = replace(
        make_services(Settings(state_dir=tmp_path / "state"), world.database), operations=world.replica()
    )
    with world.database.write() as conn:
        token = create_token(conn, "operator", Role.OPERATOR, now=utc_now())
        other = create_token(conn, "other", Role.OPERATOR, now=utc_now())
        admin = create_token(conn, "admin", Role.ADMIN, now=utc_now())
    client = TestClient(
        create_app(services), headers={"Authorization": f"Bearer {token}"}, raise_server_exceptions=False
    )
    client.other = {"Authorization": f"Bearer {other}"}  # type: ignore[attr-defined]
    client.admin = {"Authorization": f"Bearer {admin}"}  # type: ignore[attr-defined]
    yield client
    client.close()


@pytest.fixture
def people(world: Any, tmp_path: Path) -> Iterator[People]:
    made = People(world, tmp_path / "state")
    yield made
    made.close()


@pytest.fixture
def strict(world: Any, tmp_path: Path) -> Iterator[People]:
    """Four VMs or more need an approved plan."""
    world.approvals = ApprovalPolicy(vms_from=4)
    made = People(world, tmp_path / "state")
    yield made
    made.close()
