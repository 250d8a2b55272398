# SPDX-License-Identifier: Apache-2.0
"""VMs with their disks in a storage pool, and with NVMe drives: from the request to the host and back to nothing."""

from __future__ import annotations

from typing import Any

import pytest
from batches import create
from cells_opened import announce
from sqlalchemy import insert, select, update
from storage_given import POOL, give_storage, storage_used

from ppec_contract.api_operations import ItemState, OperationState
from ppec_contract.api_placement import Policy, VmItem, VmSize
from ppec_contract.api_vms import BatchMode, VmAction, VmResize, VmsAction, VmsCreate
from ppec_contract.errors import PpecError
from ppec_contract.version import Capability
from ppec_contract.vm import VmSpec
from ppec_orchestrator.dispatch.simulated import Fault
from ppec_orchestrator.operations.meaning import meaning
from ppec_orchestrator.operations.outcomes import may_have_left_something, may_move, whole_host
from ppec_orchestrator.store import tables

DISK_MIB = 8192
NOTHING = {"h1": (0, 0, 0), "h2": (0, 0, 0), "h3": (0, 0, 0)}


def with_drives(drives: int = 1, **more: Any) -> VmSize:
    return VmSize(**{"vcpus": 2, "memory_mib": 1024, "disk_mib": DISK_MIB, "nvme_drives": drives, **more})


def delete(world: Any, *names: str) -> None:
    with world.running(name="eraser") as replica:
        asked = VmsAction(action=VmAction.DELETE, vms=names)
        assert world.ended(replica.act(asked, world.ask).operation_id).state is OperationState.SUCCEEDED


def told_specs(world: Any) -> dict[str, VmSpec]:
    sent = [
        VmSpec.model_validate(spec)
        for run in world.dispatcher.started
        for target in run.hosts.values()
        for spec in target.parameters.get("vms", ())
    ]
    return {spec.name: spec for spec in sent}


def refused(world: Any, count: int = 1, **body: Any) -> PpecError:
    with pytest.raises(PpecError) as caught:
        world.replica(start=False).create(world.batch(count, **body), world.ask)
    world.assert_consistent()
    return caught.value


def test_a_vm_in_a_pool_with_drives_is_made_where_they_are_and_told_so(world: Any) -> None:
    give_storage(world, "h2", pool_mib=100_000, drives=4)
    view = create(world, world.replica(), 2, flavor=None, size=with_drives(2), pool=POOL)
    assert view.state is OperationState.SUCCEEDED, view.problem
    assert storage_used(world) == NOTHING | {"h2": (0, 2 * DISK_MIB, 4)}
    specs = told_specs(world)
    assert [(spec.root_disk.pool, spec.nvme_drives) for spec in specs.values()] == [(POOL, 2)] * 2
    names = [item.name for item in view.items]
    for name in names:
        shown = world.vm(name)
        assert (shown.host, shown.pool, shown.nvme_drives, shown.disk_mib) == ("h2", POOL, 2, DISK_MIB)
    world.assert_consistent()
    given = [drive for vm in world.fleet.vms["h2"].values() for drive in vm.nvme_drives]
    assert len(set(given)) == len(given) == 4
    delete(world, *names)
    assert storage_used(world) == NOTHING
    world.assert_empty()


def test_a_flavors_drives_are_its_vms(world: Any) -> None:
    give_storage(world, "h1", "h2", "h3", drives=1)
    with world.database.write() as conn:
        size = {"vcpus": 2, "memory_mib": 1024, "disk_mib": DISK_MIB}
        conn.execute(insert(tables.flavor).values(name="fast", **size, nvme_drives=1))
    view = create(world, world.replica(), 3, flavor="fast", policy=Policy.PACK)
    assert view.state is OperationState.SUCCEEDED
    assert {item.host for item in view.items} == {"h1", "h2", "h3"}, "one drive each"
    assert storage_used(world) == dict.fromkeys(NOTHING, (DISK_MIB, 0, 1))
    assert refused(world, flavor="fast").details["reasons"] == {"nvme": 3}
    # What others want has nothing to do with drives.
    assert create(world, world.replica("two"), 3).state is OperationState.SUCCEEDED


def test_what_an_item_leaves_out_is_the_requests(world: Any) -> None:
    give_storage(world, "h1", pool_mib=100_000, drives=2)
    with world.database.write() as conn:
        conn.execute(insert(tables.host_pool).values(host_id=1, name="archive", size_mib=50_000))
    world.fleet.pools_mib = {POOL: 100_000, "archive": 50_000}
    items = (
        VmItem(name="as-asked"),
        VmItem(name="elsewhere", pool="archive"),
        VmItem(name="larger", size=with_drives(2, disk_mib=20_000)),
        VmItem(name="both", size=with_drives(0, disk_mib=10_000), pool="archive"),
    )
    asked = VmsCreate(image="debian", flavor="small", pool=POOL, items=items)
    view = world.ended(world.replica().create(asked, world.ask).operation_id)
    assert view.state is OperationState.SUCCEEDED, view.problem
    found = {name: (vm.pool, vm.disk_mib, vm.nvme_drives) for name in told_specs(world) for vm in (world.vm(name),)}
    assert found == {
        "as-asked": (POOL, 8192, 0), "elsewhere": ("archive", 8192, 0), "larger": (POOL, 20_000, 2),
        "both": ("archive", 10_000, 0),
    }  # fmt: skip
    assert {spec.name: (spec.root_disk.pool, spec.nvme_drives) for spec in told_specs(world).values()} == {
        name: (pool, drives) for name, (pool, _, drives) in found.items()
    }
    with world.database.read() as conn:
        pools = {row.name: row.used_mib for row in conn.execute(select(tables.host_pool))}
        (kept,) = conn.execute(select(tables.operation.c.input)).scalars()
    assert pools == {POOL: 28_192, "archive": 18_192}
    assert set(kept["sizes"]) == {"elsewhere", "larger", "both"}


def test_an_operation_keeps_no_sizes_of_vms_that_have_none_of_their_own(world: Any) -> None:
    """A thousand of them would be told a thousand times what the request says once."""
    items = tuple(VmItem(name=f"v{number}", priority=number) for number in range(3))
    for named in ({"flavor": "small"}, {"size": with_drives(0)}):
        asked = VmsCreate(image="debian", items=items, mode=BatchMode.BEST_EFFORT, **named)
        with world.database.read() as conn:
            assert meaning(conn, asked, world.now()).input.sizes == {}
    world.assert_consistent()


def test_hosts_without_are_counted(world: Any) -> None:
    give_storage(world, "h1", pool_mib=DISK_MIB, drives=1)
    announce(world, "h2", "h3")
    assert refused(world, pool="none").details["reasons"] == {"no-pool": 3}
    of_pool = refused(world, pool=POOL, count=2)
    assert of_pool.details["reasons"] == {"no-pool": 2, "disk": 1}
    assert f"disk {DISK_MIB} MiB in pool {POOL}" in of_pool.message
    of_drives = refused(world, flavor=None, size=with_drives(1), count=2)
    assert of_drives.details["reasons"] == {"no-nvme": 2, "nvme": 1}
    assert "1 NVMe drive)" in of_drives.message
    too_many = refused(world, flavor=None, size=with_drives(2))
    assert too_many.details["reasons"] == {"no-nvme": 3}
    world.assert_empty()


def test_an_agent_that_does_not_know_them_is_not_chosen(world: Any) -> None:
    """Whatever it reports; and it is counted."""
    give_storage(world, "h1", "h2", "h3", pool_mib=100_000, drives=4)
    announce(world, "h1", capabilities=(Capability.STORAGE_POOLS,))
    announce(world, "h2", capabilities=(Capability.NVME_DRIVES,))
    announce(world, "h3", capabilities=(Capability.VM_POLICIES,))
    assert refused(world, flavor=None, size=with_drives(), pool=POOL).details["reasons"] == {"agent-too-old": 3}
    replica = world.replica()
    pooled, driven = create(world, replica, 1, pool=POOL), create(world, replica, 1, flavor=None, size=with_drives())
    assert [view.items[0].host for view in (pooled, driven)] == ["h1", "h2"]
    asked = [set(spec) for run in world.dispatcher.started for spec in run.hosts.popitem()[1].parameters["vms"]]
    assert [("nvme_drives" in words) for words in asked] == [False, True], "none is told more than it knows"


def test_a_vm_of_another_size_stays_in_its_pool_with_its_drives(world: Any) -> None:
    give_storage(world, "h3", pool_mib=100_000, drives=2)
    view = create(world, world.replica(), 1, flavor=None, size=with_drives(2), pool=POOL)
    name = view.items[0].name
    with world.running(name="resizer") as replica:
        ended = world.ended(replica.resize(name, VmResize(vcpus=4, memory_mib=2048), world.ask).operation_id)
    assert ended.state is OperationState.SUCCEEDED
    shown = world.vm(name)
    assert (shown.vcpus, shown.memory_mib, shown.pool, shown.nvme_drives) == (4, 2048, POOL, 2)
    assert storage_used(world)["h3"] == (0, DISK_MIB, 2)
    world.assert_consistent()


def test_a_vm_that_fails_on_one_host_takes_pool_and_drives_of_another(world: Any) -> None:
    give_storage(world, "h1", "h2", pool_mib=2 * DISK_MIB, drives=2)
    fault = Fault.of("hypervisor.failed")
    world.fleet.faults = lambda action, host, vm: fault if (action, host) == ("CreateVms", "h1") else None
    view = create(world, world.replica(), 2, flavor=None, size=with_drives(), pool=POOL, policy=Policy.SPREAD)
    assert view.state is OperationState.SUCCEEDED
    assert [item.host for item in view.items] == ["h2", "h2"]
    assert storage_used(world) == NOTHING | {"h2": (0, 2 * DISK_MIB, 2)}
    world.assert_consistent()


def test_a_host_that_lost_its_pool_is_left_by_those_that_want_it(world: Any) -> None:
    """The others of the batch stay, and come there."""
    give_storage(world, "h1", "h2", pool_mib=100_000)
    gone = Fault.of("host.pool_missing")
    pooled = {"a", "b"}

    def faults(action: Any, host: str, vm_id: Any) -> Fault | None:
        return gone if (action, host) == ("CreateVms", "h1") and world.vm(str(vm_id)).pool else None

    world.fleet.faults = faults
    items = tuple(VmItem(name=name, pool=POOL if name in pooled else None) for name in ("a", "b", "c", "d"))
    asked = VmsCreate(image="debian", flavor="small", items=items, policy=Policy.SPREAD)
    view = world.ended(world.replica().create(asked, world.ask).operation_id)
    assert view.state is OperationState.SUCCEEDED, view.problem
    stand = {item.name: item.host for item in view.items}
    assert {stand[name] for name in pooled} == {"h2"}
    assert "h1" in {stand["c"], stand["d"]}
    assert "DeleteVms" not in {action for action, _, _ in world.fleet.deeds}, "nothing was left to be removed"
    assert storage_used(world)["h2"][1] == 2 * DISK_MIB
    world.assert_consistent()


@pytest.mark.parametrize(
    ("code", "whole"),
    [
        ("host.unreachable", True),
        ("host.bridge_missing", True),
        ("host.no_capacity", False),
        ("host.pool_missing", False),
    ],
)
def test_a_pool_that_is_missing_is_no_fault_of_the_whole_host(code: str, whole: bool) -> None:
    """Others that have to move may come there."""
    problem = PpecError(code, "…").problem()
    assert (whole_host(problem), may_move(problem)) == (whole, True)
    assert may_have_left_something(problem) is (code == "host.unreachable")


def test_of_a_batch_that_fails_nothing_is_kept(world: Any) -> None:
    give_storage(world, "h1", "h2", pool_mib=100_000, drives=4)
    fault = Fault.of("hypervisor.failed")
    world.fleet.faults = lambda action, host, vm: fault if action == "CreateVms" else None
    view = create(world, world.replica(), 2, flavor=None, size=with_drives(), pool=POOL)
    assert view.state is OperationState.FAILED
    assert storage_used(world) == NOTHING
    world.wait_cleaned()
    world.assert_empty()


def test_best_effort_takes_the_rest_of_a_pool(world: Any) -> None:
    give_storage(world, "h1", "h2", pool_mib=2 * DISK_MIB + 1)
    announce(world, "h3")
    view = create(world, world.replica(), 6, pool=POOL, mode=BatchMode.BEST_EFFORT)
    states = [item.state for item in view.items]
    assert (states.count(ItemState.SUCCEEDED), states.count(ItemState.REFUSED)) == (4, 2)
    problems = [item.problem for item in view.items if item.problem]
    assert [problem.details["reasons"] for problem in problems] == [{"no-pool": 1, "disk": 2}] * 2
    world.assert_consistent()


def test_a_pool_that_shrank_or_went_keeps_what_vms_hold_and_takes_no_more(world: Any) -> None:
    give_storage(world, "h1", pool_mib=100_000)
    view = create(world, world.replica(), 2, pool=POOL, host="h1")
    for size_mib, reason in ((DISK_MIB, "disk"), (0, "no-pool")):
        with world.database.write() as conn:
            conn.execute(update(tables.host_pool).values(size_mib=size_mib))
            conn.execute(update(tables.host).where(tables.host.c.id == 1).values(report_sequence=size_mib))
        with pytest.raises(PpecError) as full:
            world.replica(start=False).create(world.batch(1, pool=POOL, host="h1"), world.ask)
        assert full.value.details["reasons"] == {"outside-scope": 2, reason: 1}
        assert storage_used(world)["h1"] == (0, 2 * DISK_MIB, 0)
    delete(world, *(item.name for item in view.items))
    assert storage_used(world) == NOTHING
    world.assert_empty()
