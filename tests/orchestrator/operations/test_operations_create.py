# SPDX-License-Identifier: Apache-2.0
"""Creating batches: work counts, refusals that leave nothing, and requests that come twice or at once."""

from __future__ import annotations

import threading
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from batches import create, states
from sqlalchemy import update

from ppec_contract.api_operations import ItemState, OperationState
from ppec_contract.api_placement import Policy
from ppec_contract.api_vms import BatchMode, VmAction, VmsAction
from ppec_contract.errors import PpecError
from ppec_contract.model import MAX_VMS_PER_CALL
from ppec_orchestrator.ipdb.ranges import usable_range
from ppec_orchestrator.store import ipdb
from ppec_orchestrator.store.tables import host, host_cell, prefix


def test_clean_batch_does_no_more_work_than_it_must(world: Any) -> None:
    view = create(world, world.replica(), 6, policy=Policy.SPREAD)
    hosts = {item.host for item in view.items}
    assert view.state is OperationState.SUCCEEDED
    assert states(view) == [ItemState.SUCCEEDED] * 6
    assert len(hosts) == 3
    assert view.counters["runs"] == 1
    assert view.counters["host_tasks"] <= len(hosts) + 1
    assert view.counters["planning_passes"] == 1
    assert view.counters["commits"] <= 3 + len(hosts)
    assert view.counters["proxy_sessions"] <= len(hosts)
    assert [step.state for step in view.steps] == ["done", "done"]
    world.assert_consistent()


def test_counted_commits_are_the_databases_own(world: Any) -> None:
    """The counter is not a wish: the database's count of write transactions agrees, renewals left out."""
    world.settings(renewal_s=60)
    replica = world.replica()
    database = replica.engine._ports.database
    before = database.commits
    view = create(world, replica, 3)
    # The database counts a write just after it has been committed, and seen.
    world.wait_until(lambda: not replica.engine.running, "its thread has ended")
    assert database.commits - before == view.counters["commits"]


def test_refused_batch_says_why_and_leaves_nothing(world: Any) -> None:
    replica = world.replica(start=False)
    with pytest.raises(PpecError) as refused:
        replica.create(world.batch(7, flavor="half"), world.ask)
    assert refused.value.code == "placement.no_capacity"
    assert sum(refused.value.details["reasons"].values()) == 3
    assert refused.value.details["refused"] == 1
    world.assert_empty()


def test_best_effort_makes_what_fits_and_names_the_rest(world: Any) -> None:
    view = create(world, world.replica(), 8, flavor="half", mode=BatchMode.BEST_EFFORT)
    assert view.state is OperationState.PARTIAL
    assert states(view) == [ItemState.SUCCEEDED] * 6 + [ItemState.REFUSED] * 2
    assert all(item.problem and item.problem.code == "placement.no_capacity" for item in view.items[6:])
    world.assert_consistent()


def test_vm_larger_than_any_socket_is_a_fault_of_the_request(world: Any) -> None:
    from sqlalchemy import insert

    from ppec_orchestrator.store import tables

    with world.database.write() as conn:
        conn.execute(insert(tables.flavor).values(name="huge", vcpus=64, memory_mib=1024, disk_mib=8192))
    with pytest.raises(PpecError) as refused:
        world.replica(start=False).create(world.batch(1, flavor="huge"), world.ask)
    assert refused.value.code == "vm.exceeds_socket"
    world.assert_empty()


@pytest.mark.parametrize("named", ["flavor", "image", "cluster", "rack", "host", "vrf", "datacentre"])
def test_what_the_request_names_must_exist(world: Any, named: str) -> None:
    with pytest.raises(PpecError) as refused:
        world.replica(start=False).create(world.batch(1, **{named: "nowhere"}), world.ask)
    assert refused.value.code == f"{named}.not_found"


def test_taken_names_are_named(world: Any) -> None:
    replica = world.replica()
    create(world, replica, 1, name="web")
    with pytest.raises(PpecError) as refused:
        replica.create(world.batch(1, name="web"), world.ask)
    assert refused.value.code == "vm.exists"
    assert refused.value.details["names"] == ["web"]
    world.assert_consistent()


def test_more_vms_than_a_call_takes_are_still_one_run(world: Any) -> None:
    """The action plugin cuts a host's part into calls; nothing else knows of them."""
    with world.database.write() as conn:
        conn.execute(update(prefix).values(cidr="10.7.0.0/22", last="10.7.3.254"))
        usable = usable_range(
            ip_network("10.7.1.0/24"), gateway=None, first=ip_address("10.7.1.0"), last=ip_address("10.7.1.254")
        )
        ipdb.insert_ipv4_rows(conn, 1, usable)
        conn.execute(update(host).values(disk_mib=10**7))
        conn.execute(update(host_cell).values(cores=1000, memory_mib=10**7))
    view = create(world, world.replica(), MAX_VMS_PER_CALL + 44, host="h1")
    assert view.state is OperationState.SUCCEEDED
    assert view.counters["runs"] == 1
    (started,) = world.dispatcher.started
    assert len(started.hosts["h1"].parameters["vms"]) == MAX_VMS_PER_CALL + 44
    assert started.timeout_s == 1200.0, "twice the time for two calls"
    world.assert_consistent()


def test_idempotency_key_makes_one_operation(world: Any) -> None:
    replica = world.replica()
    asked = world.batch(2)
    keyed = world.keyed("k1", asked)
    first = replica.create(asked, keyed)
    again = replica.create(asked, keyed)
    assert first.operation_id == again.operation_id
    with pytest.raises(PpecError) as refused:
        replica.create(world.batch(3), world.keyed("k1", world.batch(3)))
    assert refused.value.code == "request.idempotency_mismatch"
    world.ended(first.operation_id)
    world.assert_consistent()


def test_same_key_at_once_makes_one_operation(world: Any) -> None:
    replica = world.replica()
    asked = world.batch(1)
    made: list[str] = []
    threads = [
        threading.Thread(target=lambda: made.append(replica.create(asked, world.keyed("k", asked)).operation_id))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(made) == 6
    assert len(set(made)) == 1
    world.ended(made[0])
    world.assert_consistent()


@pytest.mark.parametrize("slots", [1, 5])
def test_race_for_the_last_slots_has_exactly_as_many_winners(world: Any, slots: int) -> None:
    """Twelve halves fill... six hold; all but `slots` of them are taken, then sixteen ask at once on two replicas."""
    create(world, world.replica(), 6 - slots, flavor="half")
    replicas = [world.replica("two"), world.replicas[0]]
    won: list[str] = []
    refused: list[str] = []

    def ask(at: int) -> None:
        try:
            won.append(replicas[at % 2].create(world.batch(1, flavor="half"), world.ask).operation_id)
        except PpecError as error:
            refused.append(error.code)

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(won) == slots
    assert set(refused) == {"placement.no_capacity"}
    assert len(refused) == 16 - slots
    for operation_id in won:
        assert world.ended(operation_id).state is OperationState.SUCCEEDED
    world.assert_consistent()


def test_what_a_request_is_answered_is_what_the_record_shows(world: Any) -> None:
    """The answer is not read back, so it has to be made right: for a batch with refusals, and for an action."""
    waiting = world.replica("acceptor", start=False)
    accepted = waiting.create(world.batch(20, flavor="half", mode=BatchMode.BEST_EFFORT), world.ask)
    assert set(states(accepted)) == {ItemState.PENDING, ItemState.REFUSED}
    assert accepted == world.show(accepted.operation_id)
    with world.running():
        world.ended(accepted.operation_id)
    names = tuple(item.name for item in accepted.items if item.state is ItemState.PENDING)
    stopping = waiting.act(VmsAction(action=VmAction.STOP, vms=names), world.ask)
    assert stopping == world.show(stopping.operation_id)
