# SPDX-License-Identifier: Apache-2.0
"""VMs that ask for addresses: from the request to what the host is told, and why not."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import delete, insert, select, update

from ppec_contract.api_ipdb import HoldCreate, PrefixCreate
from ppec_contract.api_operations import OperationState
from ppec_contract.api_placement import Policy
from ppec_contract.api_vms import VmRecord, VmsAction, VmsCreate
from ppec_contract.errors import PpecError
from ppec_orchestrator.dispatch.simulated import Fault
from ppec_orchestrator.ipdb.ranges import to_hex
from ppec_orchestrator.operations.specs import nics
from ppec_orchestrator.store import holds, ipdb, prefixes, tables
from ppec_orchestrator.store.serving import range_of


@pytest.fixture
def two_prefixes(world: Any) -> Any:
    """The world's prefix, and 10.8.0.2 to 10.8.0.6 on another bridge."""
    with world.database.write() as conn:
        conn.execute(
            insert(tables.prefix).values(
                id=2, vrf_id=1, cidr="10.8.0.0/29", family=4, gateway="10.8.0.1", bridge="br1", cluster_id=1,
                first="10.8.0.2", last="10.8.0.6", nameservers=[],
            )
        )  # fmt: skip
        row = conn.execute(select(tables.prefix).where(tables.prefix.c.id == 2)).one()
        ipdb.insert_ipv4_rows(conn, 2, range_of(row))
    return world


def asked(world: Any, *networks: dict[str, str], count: int = 1) -> VmsCreate:
    return VmsCreate.model_validate(world.batch(count=count).model_dump() | {"networks": networks})


def addresses(world: Any, view: Any) -> list[list[str]]:
    return [[str(one.address) for one in world.vm(str(item.vm_id)).addresses] for item in view.items]


def test_a_vm_gets_what_it_asks_for_and_its_host_is_told(two_prefixes: Any) -> None:
    world = two_prefixes
    with world.running() as replica:
        request = asked(world, {"prefix": "10.8.0.0/29"}, {"address": "10.7.0.77"})
        ended = world.ended(replica.create(request, world.ask).operation_id)
    assert ended.state is OperationState.SUCCEEDED
    assert addresses(world, ended) == [["10.8.0.2", "10.7.0.77"]]
    vm_id = ended.items[0].vm_id
    with world.database.read() as conn:
        told = nics(vm_id, ipdb.addresses_of(conn, [vm_id])[vm_id])
    assert [(nic.bridge, [str(a) for a in nic.addresses], str(nic.gateway4)) for nic in told] == [
        ("br1", ["10.8.0.2/29"], "10.8.0.1"),
        ("br0", ["10.7.0.77/24"], "None"),
    ]


def test_a_vrf_without_hosts_hides_nothing_of_who_has_an_address(world: Any) -> None:
    replica = world.replica("accepting", start=False)
    replica.create(asked(world, {"address": "10.7.0.9"}), world.ask)
    with world.database.write() as conn:
        conn.execute(insert(tables.vrf).values(id=2, name="shadow", description=""))
        shadow = conn.execute(select(tables.prefix).where(tables.prefix.c.id == 1)).one()
        conn.execute(insert(tables.prefix).values(shadow._asdict() | {"id": 2, "vrf_id": 2}))
        ipdb.insert_ipv4_rows(conn, 2, range_of(shadow))
    for where in ({}, {"vrf": "v1"}, {"host": "h1"}):
        request = asked(world, {"address": "10.7.0.9"}).model_copy(update=where)
        with pytest.raises(PpecError) as refused:
            replica.create(request, world.ask)
        assert refused.value.code == "address.in_use"


@pytest.fixture
def two_racks(world: Any) -> Any:
    """The first host has a rack of its own, with one address; the others' rack has 253. All are served by a region's
    prefix of two."""
    with world.database.write() as conn:
        conn.execute(delete(tables.address))
        conn.execute(delete(tables.prefix))
        conn.execute(insert(tables.rack).values(id=2, name="rack2", cluster_id=1))
        conn.execute(update(tables.host).where(tables.host.c.id > 1).values(rack_id=2))
        for cidr, place in (
            ("10.1.0.0/32", {"cluster": "c1", "rack": "rack1"}),
            ("10.2.0.0/24", {"cluster": "c1", "rack": "rack2"}),
            ("10.3.0.0/31", {"region": "r1"}),
        ):
            wanted = PrefixCreate.model_validate({"vrf": "v1", "cidr": cidr, "bridge": "br0", **place})
            prefixes.create_prefix(conn, wanted, world.now())
    return world


@pytest.mark.parametrize("policy", ["pack", "balanced", "spread"])
def test_an_address_asked_for_by_number_is_no_other_network_s(two_racks: Any, policy: str) -> None:
    """The last address of the region can't be both that which was asked for and the one of any prefix."""
    world = two_racks
    accepting = world.replica("accepting", start=False)
    for network in ({"prefix": "10.1.0.0/32"}, {"address": "10.3.0.0"}):
        accepting.create(asked(world, network).model_copy(update={"host": "h1"}), world.ask)
    request = asked(world, {"address": "10.3.0.1"}, {}).model_copy(update={"policy": Policy(policy)})
    view = accepting.create(request, world.ask)
    assert addresses(world, view) == [["10.3.0.1", "10.2.0.1"]]
    assert view.items[0].host != "h1"


def test_an_address_that_is_reserved_for_a_vm_takes_none_of_the_free_ones(two_racks: Any) -> None:
    """Of the region's two one is the VM's, so it gets the other as well."""
    world = two_racks
    accepting = world.replica("accepting", start=False)
    with world.database.write() as conn:
        hold = HoldCreate(kind="reserved", first="10.3.0.1", reserved_for="web")
        holds.create_hold(conn, 3, hold, "me", world.now)
    only = {"prefix": "10.3.0.0/31"}
    request = asked(world, {"address": "10.3.0.1"}, only).model_copy(update={"name": "web", "host": "h1"})
    assert addresses(world, accepting.create(request, world.ask)) == [["10.3.0.1", "10.3.0.0"]]


@pytest.mark.parametrize(
    ("network", "code"),
    [
        ({"address": "10.7.0.1"}, "address.not_usable"),
        ({"address": "10.9.0.1"}, "address.not_usable"),
        ({"prefix": "10.9.0.0/24"}, "prefix.not_found"),
        ({"address": "10.7.0.9"}, "address.in_use"),
        ({"address": "10.7.0.8"}, "address.reserved"),
    ],
)
def test_a_request_for_what_can_t_be_had_changes_nothing(two_prefixes: Any, network: dict[str, str], code: str) -> None:
    world = two_prefixes
    accepting = world.replica("accepting", start=False)
    accepting.create(asked(world, {"address": "10.7.0.9"}), world.ask)
    with world.database.write() as conn:
        holds.create_hold(conn, 1, HoldCreate(kind="reserved", first="10.7.0.8"), "me", world.now)
    before = rows(world)
    with pytest.raises(PpecError) as caught:
        accepting.create(asked(world, network), world.ask)
    assert caught.value.code == code
    assert rows(world) == before


def rows(world: Any) -> list[int]:
    counted = (tables.vm, tables.operation, tables.allocation, tables.address_event)
    with world.database.read() as conn:
        return [len(conn.execute(select(table)).all()) for table in counted]


def test_running_out_is_a_refusal_with_counts(two_prefixes: Any) -> None:
    """Five addresses, and VMs that take two each."""
    world = two_prefixes
    only = {"prefix": "10.8.0.0/29"}
    with world.running() as replica:
        with pytest.raises(PpecError) as caught:
            replica.create(asked(world, only, only, count=3), world.ask)
        assert caught.value.code == "placement.no_capacity"
        assert caught.value.details["reasons"] == {"addresses": 3}
        assert (caught.value.details["refused"], caught.value.details["wanted"]) == (1, 3)
        counted = {"prefix": "10.8.0.0/29", "vrf": "v1", "total": 5, "free": 5, "quarantined": 0, "reserved": 0}
        assert caught.value.details["prefixes"] == [counted]
        made = world.ended(replica.create(asked(world, only, only, count=2), world.ask).operation_id)
        assert made.state is OperationState.SUCCEEDED
        released = addresses(world, made)[0]
        delete = VmsAction.model_validate({"action": "delete", "vms": [made.items[0].name]})
        world.ended(replica.act(delete, world.ask).operation_id)
        with pytest.raises(PpecError) as again:
            replica.create(asked(world, only, only), world.ask)
        assert "10.8.0.0/29 has 1 of 5 free, 2 in quarantine, 0 reserved" in again.value.message
        world.ahead = timedelta(seconds=301)
        ended = world.ended(replica.create(asked(world, only, only), world.ask).operation_id)
    assert addresses(world, ended) == [released]


def test_what_is_reserved_for_a_vm_is_its_own_when_nothing_else_is_free(two_prefixes: Any) -> None:
    world = two_prefixes
    accepting = world.replica("accepting", start=False)
    with world.database.write() as conn:
        mine = HoldCreate(kind="reserved", first="10.8.0.6", reserved_for="db")
        holds.create_hold(conn, 2, mine, "me", world.now)
    accepting.create(asked(world, {"prefix": "10.8.0.0/29"}, count=4), world.ask)
    request = asked(world, {"address": "10.8.0.6"}).model_copy(update={"name": "db"})
    assert addresses(world, accepting.create(request, world.ask)) == [["10.8.0.6"]]


def test_only_hosts_that_a_prefix_serves_are_places_for_its_vms(two_prefixes: Any) -> None:
    world = two_prefixes
    with world.database.write() as conn:
        conn.execute(insert(tables.rack).values(id=2, name="rack2", cluster_id=1))
        conn.execute(tables.host.update().where(tables.host.c.name == "h2").values(rack_id=2))
        conn.execute(tables.prefix.update().where(tables.prefix.c.id == 2).values(rack_id=2))
    accepting = world.replica("accepting", start=False)
    view = accepting.create(asked(world, {"prefix": "10.8.0.0/29"}, count=3), world.ask)
    assert {item.host for item in view.items} == {"h2"}
    elsewhere = asked(world, {"address": "10.8.0.6"}).model_copy(update={"host": "h1"})
    with pytest.raises(PpecError) as caught:
        accepting.create(elsewhere, world.ask)
    assert caught.value.details["reasons"]["not-served"] == 1


def test_a_vm_that_moves_to_another_host_takes_its_address_along(two_prefixes: Any) -> None:
    """Its first host refuses it before it makes anything."""
    world = two_prefixes
    fault = Fault.of("host.no_capacity")
    request = asked(world, {"address": "10.7.0.77"}, {"prefix": "10.8.0.0/29"})
    accepting = world.replica("accepting", start=False)
    view = accepting.create(request, world.ask)
    first = view.items[0].host
    world.fleet.faults = lambda action, host, vm: fault if host == first else None
    with world.running():
        ended = world.ended(view.operation_id)
    assert (ended.state, ended.items[0].attempt) == (OperationState.SUCCEEDED, 2)
    assert ended.items[0].host != first
    assert addresses(world, ended)[0][0] == "10.7.0.77"
    with world.database.read() as conn:
        query = select(tables.address_event.c.action).where(tables.address_event.c.address_hex == to_hex(0x0A07004D))
        assert list(conn.execute(query).scalars()) == ["granted", "released", "granted"]


def test_an_address_that_may_still_be_in_use_is_not_moved(two_prefixes: Any) -> None:
    """Its first host falls silent, and may have it: the create fails, and the address stays kept."""
    world = two_prefixes
    accepting = world.replica("accepting", start=False)
    view = accepting.create(asked(world, {"address": "10.7.0.77"}), world.ask)
    silent, fault = view.items[0].host, Fault.of("host.unreachable", whole_host=True)
    world.fleet.faults = lambda action, host, vm: fault if host == silent else None
    with world.running():
        ended = world.ended(view.operation_id)
    assert ended.state is OperationState.FAILED
    assert ended.problem is not None
    assert world.vm(str(view.items[0].vm_id)).record is VmRecord.FAILED
    with pytest.raises(PpecError) as caught:
        accepting.create(asked(world, {"address": "10.7.0.77"}), world.ask)
    assert caught.value.code == "address.in_use"
    assert "what may be left of VM" in caught.value.message
