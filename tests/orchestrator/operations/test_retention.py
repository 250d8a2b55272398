# SPDX-License-Identifier: Apache-2.0
"""What the database need not keep goes after its time, and nothing that is still referred to."""

from __future__ import annotations

import threading
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import func, insert, select, update

from ppec_contract.api_operations import ItemState, OperationState
from ppec_contract.api_vms import VmAction, VmsAction
from ppec_orchestrator.operations.limits import Limits
from ppec_orchestrator.operations.retention import Removed, Retention
from ppec_orchestrator.store import operations as store
from ppec_orchestrator.store import retention, tables
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.operations import NewItem, NewOperation

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
DAY = timedelta(days=1)
KEPT = 90 * DAY


@pytest.fixture
def sweeper(database: Database) -> Retention:
    return Retention(database, lambda: NOW, threading.Event())


def an_operation(database: Database, name: str, ended: timedelta | None, **more: Any) -> str:
    """One with a step and items that ended this long ago, or is queued since 200 days."""
    at = NOW - (ended or 200 * DAY)
    values = {"kind": "vm.create", "input": {}, "items": 1} | more
    items = [NewItem(uuid.uuid4(), f"v{n}", "h1", ItemState.SUCCEEDED) for n in range(values["items"])]
    new = NewOperation(name, values["kind"], "me", at, values["input"], ("reserve",), items)
    with database.write() as conn:
        store.enqueue(conn, [new])
        if ended is not None:
            store.end(conn, name, OperationState.SUCCEEDED, at)
    return name


def a_vm(database: Database, operation_id: str) -> None:
    image = {"name": "i", "format": "raw", "architecture": "x86_64", "sha256": "0" * 64}
    row = {"name": "v1", "record": "active", "flavor": "f", "vcpus": 2, "memory_mib": 512, "disk_mib": 9}
    with database.write() as conn:
        conn.execute(insert(tables.image).values(id=1, size_bytes=512, virtual_size_mib=1, **image))
        conn.execute(
            insert(tables.vm).values(
                id=uuid.uuid4(), image_id=1, labels={}, created_at=NOW, operation_id=operation_id, **row
            )
        )


def a_key(database: Database, operation_id: str, age: timedelta) -> None:
    row = {"caller": "me", "key": operation_id, "request_sha256": "0" * 64, "operation_id": operation_id}
    with database.write() as conn:
        conn.execute(insert(tables.idempotency_key).values(created_at=NOW - age, **row))


def left(database: Database, column: Any) -> list[Any]:
    with database.read() as conn:
        return sorted(set(conn.execute(select(column)).scalars()))


def test_old_operations_go_with_their_steps_and_items(database: Database, sweeper: Retention) -> None:
    an_operation(database, "old", KEPT + timedelta(seconds=1))
    an_operation(database, "young", KEPT)
    an_operation(database, "open", None)
    assert sweeper.sweep(Limits()) == Removed(operations=1, idempotency_keys=0, certificates=0, enrolment_tokens=0)
    for column in (tables.operation.c.id, tables.step.c.operation_id, tables.operation_item.c.operation_id):
        assert left(database, column) == ["open", "young"]
    assert sweeper.sweep(Limits()) == Removed(0, 0, 0, 0)


def test_one_that_was_accepted_long_ago_and_ended_just_now_stays(database: Database, sweeper: Retention) -> None:
    an_operation(database, "long", 200 * DAY)
    with database.write() as conn:
        conn.execute(update(tables.operation).values(ended_at=NOW - DAY))
    assert sweeper.sweep(Limits()).operations == 0


def test_what_is_referred_to_stays(database: Database, sweeper: Retention) -> None:
    old = 200 * DAY
    for name in ("of-vm", "of-cleanup", "of-closed-cleanup", "of-key", "of-nobody"):
        an_operation(database, name, old)
    a_vm(database, "of-vm")
    a_key(database, "of-key", old)
    an_operation(database, "cleanup", None, kind="vm.cleanup", input={"host": "h1", "after": "of-cleanup"})
    an_operation(database, "closed", old, kind="vm.cleanup", input={"host": "h1", "after": "of-closed-cleanup"})
    longer = Limits(keep_idempotency_keys_s=(old + DAY).total_seconds())
    assert sweeper.sweep(longer).operations == 3
    assert left(database, tables.operation.c.id) == ["cleanup", "of-cleanup", "of-key", "of-vm"]
    assert sweeper.sweep(Limits()) == Removed(operations=1, idempotency_keys=1, certificates=0, enrolment_tokens=0)
    assert left(database, tables.operation.c.id) == ["cleanup", "of-cleanup", "of-vm"]


def test_keys_and_certificates_go_after_their_time(database: Database, sweeper: Retention) -> None:
    for name, age in (("o1", 7 * DAY), ("o2", 7 * DAY + timedelta(seconds=1))):
        a_key(database, name, age)
    with database.write() as conn:
        for serial, over in (("1", -DAY), ("2", 30 * DAY), ("3", 31 * DAY)):
            row = {"serial": serial, "uri": "ppec://host/h1", "issued_at": NOW - 400 * DAY, "not_after": NOW - over}
            conn.execute(insert(tables.certificate).values(row))
    assert sweeper.sweep(Limits()) == Removed(operations=0, idempotency_keys=1, certificates=1, enrolment_tokens=0)
    assert left(database, tables.idempotency_key.c.key) == ["o1"]
    assert left(database, tables.certificate.c.serial) == ["1", "2"]


def test_enrolment_tokens_go_an_hour_after_they_are_over(database: Database, sweeper: Retention) -> None:
    hour, second = timedelta(hours=1), timedelta(seconds=1)
    tokens = (
        ("open", -DAY, None),
        ("just expired", hour, None),
        ("expired", hour + second, None),
        ("just used", -DAY, hour),
        ("used", -DAY, hour + second),
    )
    with database.write() as conn:
        conn.execute(insert(tables.datacentre).values(id=1, name="dc1", region="r1"))
        conn.execute(insert(tables.cluster).values(id=1, name="c1", datacentre_id=1, architecture="x86_64"))
        conn.execute(insert(tables.rack).values(id=1, name="r1", cluster_id=1))
        conn.execute(insert(tables.vrf).values(id=1, name="red"))
        names = {"id": 1, "name": "h1", "address": "192.0.2.1", "port": 7443}
        conn.execute(insert(tables.host).values(rack_id=1, vrf_id=1, enrolled_at=NOW - DAY, **names))
        for name, expired, used in tokens:
            times = {"expires_at": NOW - expired, "used_at": None if used is None else NOW - used}
            conn.execute(insert(tables.enrolment_token).values(sha256=name, host_id=1, created_at=NOW - DAY, **times))
    assert sweeper.sweep(Limits()) == Removed(0, 0, 0, enrolment_tokens=2)
    assert left(database, tables.enrolment_token.c.sha256) == ["just expired", "just used", "open"]
    assert left(database, tables.host.c.enrolled_at) == [NOW - DAY]
    assert sweeper.sweep(Limits()) == Removed(0, 0, 0, 0)


def test_writes_are_short_however_much_there_is(database: Database, sweeper: Retention) -> None:
    """Large operations go one by one, small ones together, and no write has more rows than a batch."""
    sizes = [retention.BATCH_ROWS + 5, *[retention.BATCH_ROWS // 2 - 1] * 4, *[1] * 20]
    for number, size in enumerate(sizes):
        an_operation(database, f"o{number:03}", (200 - number) * DAY, items=size)
    a_vm(database, "o003")
    rows = [{"caller": "c", "key": str(n), "request_sha256": "", "operation_id": "x"} for n in range(1100)]
    with database.write() as conn:
        conn.execute(insert(tables.idempotency_key), [row | {"created_at": NOW - 8 * DAY} for row in rows])
    before = database.commits
    assert sweeper.sweep(Limits()) == Removed(operations=24, idempotency_keys=1100, certificates=0, enrolment_tokens=0)
    # Keys 500 + 500 + 100; operations: the large one, two of the middling, the third with the small ones.
    assert database.commits - before == 3 + 3
    assert left(database, tables.operation.c.id) == ["o003"]
    assert sweeper.sweep(Limits()) == Removed(0, 0, 0, 0)
    assert database.commits - before == 6, "a sweep with nothing to do writes nothing"


def test_a_sweep_that_is_told_to_stop_removes_nothing_more(database: Database) -> None:
    an_operation(database, "old", 200 * DAY)
    stopping = threading.Event()
    stopping.set()
    assert Retention(database, lambda: NOW, stopping).sweep(Limits()) == Removed(0, 0, 0, 0)


def test_the_engine_sweeps_by_its_settings(world: Any) -> None:
    """Living VMs keep the operation they came from; a delete leaves nothing that anything refers to."""
    with world.running(name="maker") as replica:
        made = world.ended(replica.create(world.batch(2), world.ask).operation_id)
        asked = VmsAction(action=VmAction.DELETE, vms=(made.items[0].name,))
        gone = world.ended(replica.act(asked, world.ask).operation_id)
    world.settings(keep_operations_s=0.001, sweep_every_s=0.05)
    world.replica("sweeper")

    def ids() -> list[str]:
        return left(world.database, tables.operation.c.id)

    assert len({made.operation_id, gone.operation_id}) == 2
    world.wait_until(lambda: ids() == [made.operation_id], "the delete is forgotten, the living VM's create is not")
    with world.database.read() as conn:
        assert conn.execute(select(func.count()).select_from(tables.operation_item)).scalar_one() == 2


def test_what_befell_addresses_goes_but_not_since_when_a_vm_has_one(database: Database, sweeper: Retention) -> None:
    here, gone = uuid.uuid4(), uuid.uuid4()
    with database.write() as conn:
        conn.execute(insert(tables.vrf).values(id=1, name="red", description=""))
        conn.execute(
            insert(tables.prefix).values(
                id=1, vrf_id=1, cidr="fd00::/64", family=6, bridge="br0", region="r", first="fd00::1", last="fd00::9",
                nameservers=[],
            )
        )  # fmt: skip
        conn.execute(insert(tables.address).values(prefix_id=1, address_hex="2", vm_id=here))

    def befell(days: int, vm_id: uuid.UUID) -> dict[str, Any]:
        return {
            "at": NOW - days * DAY, "action": "granted", "vrf": "red", "prefix_id": 1, "cidr": "fd00::/64",
            "address_hex": "2", "vm_id": vm_id,
        }  # fmt: skip

    with database.write() as conn:
        conn.execute(insert(tables.address_event), [befell(400, gone), befell(399, here), befell(364, gone)])
    assert sweeper.sweep(Limits()) == Removed(0, 0, 0, 0, address_events=1)
    with database.read() as conn:
        left = conn.execute(select(tables.address_event.c.vm_id).order_by(tables.address_event.c.id)).scalars().all()
    assert left == [here, gone]


def test_plans_go_when_they_have_expired(database: Database, sweeper: Retention) -> None:
    """Nobody need make another plan for the user data of the last one to go."""
    kept: dict[str, Any] = {"created_by": "me", "asked": {}, "input": {}, "places": [], "generations": {}}
    with database.write() as conn:
        for name, expires_at in (("expired", NOW - timedelta(seconds=1)), ("open", NOW + timedelta(seconds=1))):
            conn.execute(insert(tables.plan).values(id=name, created_at=NOW - DAY, expires_at=expires_at, **kept))
    assert sweeper.sweep(Limits()) == Removed(0, 0, 0, 0, plans=1)
    assert left(database, tables.plan.c.id) == ["open"]
