# SPDX-License-Identifier: Apache-2.0
"""N+1 as a rule of a cluster: whoever places or grows a VM there keeps it, asked or not, from when it is set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import insert, select, update

from ppec_contract.api_catalogue import ClusterUpdate
from ppec_contract.api_operations import ItemState, OperationState
from ppec_contract.api_vms import VmResize, VmsCreate
from ppec_contract.errors import PpecError
from ppec_orchestrator.dispatch.simulated import Fault
from ppec_orchestrator.ipdb.provider import BuiltIn
from ppec_orchestrator.operations import creation
from ppec_orchestrator.operations.enqueueing import Ask
from ppec_orchestrator.operations.growing import Growing, Growth, Seen
from ppec_orchestrator.operations.live_fleet import LiveFleet
from ppec_orchestrator.operations.planning import Planned, Planning
from ppec_orchestrator.placement.evacuation import exposed
from ppec_orchestrator.placement.plan import Exposed
from ppec_orchestrator.placement.request import Level, PlanRequest
from ppec_orchestrator.store import tables
from ppec_orchestrator.store.clusters import update_cluster
from ppec_orchestrator.store.operations import NewOperation

REQUIRED, OFF = {"mode": "required", "level": "host"}, {"mode": "off", "level": "host"}
BODY = {"image": "debian", "flavor": "half"}


def ruled(world: Any, rule: Mapping[str, str] = REQUIRED) -> None:
    """Three hosts of two such VMs each: four can stand there, and be restarted after the loss of a host."""
    with world.database.write() as conn:
        update_cluster(conn, "c1", ClusterUpdate.model_validate({"n_plus_one": rule}))


def made(world: Any, *hosts: str) -> list[str]:
    """A VM on each of these hosts, which are called by the hosts' names."""
    with world.running(name="maker") as maker:
        for host in hosts:
            batch = world.batch(1, flavor="half", host=host, name=f"on-{host}")
            view = world.ended(maker.create(batch, world.ask).operation_id)
            assert view.state is OperationState.SUCCEEDED, view.problem
    return [f"on-{host}" for host in hosts]


def unsafe(world: Any) -> set[str]:
    fleet = LiveFleet(world.database, silent_after_s=3600, now=world.now).current()
    return {each.domain for each in exposed(fleet, Level.HOST)}


@pytest.fixture
def admin(api: Any) -> Mapping[str, str]:
    headers: Mapping[str, str] = api.admin
    return headers


# --- the resource -----------------------------------------------------------------------------------------------------


def test_a_cluster_has_a_rule_that_an_admin_changes(api: TestClient, admin: Mapping[str, str]) -> None:
    assert api.get("/v1/clusters/c1").json()["n_plus_one"] == OFF
    for sent, told in (({"mode": "warn", "level": "rack"}, None), ({"mode": "required"}, REQUIRED)):
        changed = api.patch("/v1/clusters/c1", json={"n_plus_one": sent}, headers=admin)
        assert (changed.status_code, changed.json()["n_plus_one"]) == (200, told or sent)
        assert api.get("/v1/clusters/c1").json() == changed.json()
        assert api.get("/v1/clusters").json()["items"] == [changed.json()]


@pytest.mark.parametrize(
    ("name", "body", "status"),
    [
        ("c9", {"n_plus_one": {"mode": "required"}}, 404),
        ("c1", {"n_plus_one": {"mode": "perhaps"}}, 422),
        ("c1", {"n_plus_one": {"mode": "warn", "level": "datacentre"}}, 422),
        ("c1", {"n_plus_one": None}, 422),
        ("c1", {}, 422),
        ("c1", {"n_plus_one": {"mode": "warn"}, "architecture": "aarch64"}, 422),
    ],
)
def test_what_is_no_rule_changes_nothing(
    api: TestClient, admin: Mapping[str, str], name: str, body: Any, status: int
) -> None:
    assert api.patch(f"/v1/clusters/{name}", json=body, headers=admin).status_code == status
    assert api.get("/v1/clusters/c1").json()["n_plus_one"] == OFF


def test_an_operator_does_not_change_it(api: TestClient) -> None:
    refused = api.patch("/v1/clusters/c1", json={"n_plus_one": REQUIRED})
    assert (refused.status_code, refused.json()["code"]) == (403, "auth.forbidden")
    assert api.get("/v1/clusters/c1").json()["n_plus_one"] == OFF


# --- creating ---------------------------------------------------------------------------------------------------------


def test_who_asks_for_nothing_keeps_the_rule_from_when_it_is_set(
    world: Any, api: TestClient, admin: Mapping[str, str]
) -> None:
    """The replica has planned before, so it has to notice."""
    assert api.post("/v1/vms", json=BODY | {"name": "first"}).status_code == 202
    assert api.patch("/v1/clusters/c1", json={"n_plus_one": REQUIRED}, headers=admin).status_code == 200
    assert api.post("/v1/vms", json=BODY | {"name": "more", "count": 3}).status_code == 202
    refused = api.post("/v1/vms", json=BODY | {"name": "last"})
    assert (refused.status_code, refused.json()["code"]) == (409, "placement.no_capacity")
    assert refused.json()["details"]["reasons"]["n-plus-one"] > 0
    first = refused.json()["details"]["changes"][0]
    assert first["sentence"] == "lift N+1 of the cluster"
    assert first["details"]["rules"] == ["cluster.n_plus_one"]
    assert unsafe(world) == set()
    assert api.patch("/v1/clusters/c1", json={"n_plus_one": OFF}, headers=admin).status_code == 200
    assert api.post("/v1/vms", json=BODY | {"name": "last"}).status_code == 202
    assert unsafe(world) != set()


def test_clients_at_once_take_no_more_than_the_rule_leaves(world: Any, api: TestClient) -> None:
    ruled(world)

    def one(number: int) -> int:
        return api.post("/v1/vms", json=BODY | {"name": f"v{number}"}).status_code

    with ThreadPoolExecutor(8) as clients:
        answers = sorted(clients.map(one, range(8)))
    assert answers == [202] * 4 + [409] * 4
    assert unsafe(world) == set()


def test_a_warning_of_the_cluster_is_told_to_who_did_not_ask(world: Any, api: TestClient) -> None:
    ruled(world, {"mode": "warn", "level": "host"})
    made = api.post("/v1/vms", json=BODY | {"count": 5})
    assert made.status_code == 202
    assert {(each["domain"], each["level"]) for each in made.json()["exposed"]} == {
        (h, "host") for h in ("h1", "h2", "h3")
    }


@pytest.mark.parametrize("rule", [OFF, REQUIRED])
def test_a_plan_that_was_shown_before_the_rule_changed_is_outdated(
    api: TestClient, admin: Mapping[str, str], rule: Mapping[str, str]
) -> None:
    """The same rule set again is no change."""
    shown = api.post("/v1/plans", json=BODY | {"count": 5}).json()
    assert shown["executable"]
    assert api.patch("/v1/clusters/c1", json={"n_plus_one": rule}, headers=admin).status_code == 200
    executed = api.post(f"/v1/plans/{shown['plan_id']}/execute")
    if rule is OFF:
        assert executed.status_code == 202
    else:
        assert (executed.status_code, executed.json()["code"]) == (409, "plan.outdated")


def test_a_plan_counts_on_the_hosts_that_the_rule_needs(world: Any, api: TestClient) -> None:
    """Whatever comes to another host of the cluster may take what a loss would need."""
    ruled(world)
    shown = api.post("/v1/plans", json=BODY | {"host": "h1"}).json()
    assert api.post("/v1/vms", json=BODY | {"host": "h2"}).status_code == 202
    executed = api.post(f"/v1/plans/{shown['plan_id']}/execute")
    assert (executed.status_code, executed.json()["code"]) == (409, "plan.outdated")


def test_the_rule_is_in_the_export_of_the_fleet(world: Any, api: TestClient) -> None:
    assert "clusters" not in api.get("/v1/fleet").json()
    ruled(world)
    assert api.get("/v1/fleet").json()["clusters"] == [{"name": "c1", "n_plus_one": REQUIRED}]


@pytest.mark.parametrize("before", [OFF, {"mode": "warn", "level": "host"}])
def test_a_rule_that_is_set_while_a_create_is_on_its_way_holds_for_it(
    world: Any, api: TestClient, monkeypatch: pytest.MonkeyPatch, before: Mapping[str, str]
) -> None:
    """Between its plan and its commit."""
    ruled(world, before)
    planned, plans = Planning.planned, []

    def disturbed(planning: Planning, request: PlanRequest, course: Any) -> Planned:
        found = planned(planning, request, course)
        plans.append(len(found.plan.placed))
        if len(plans) == 1:
            ruled(world)
        return found

    monkeypatch.setattr(Planning, "planned", disturbed)
    made = api.post("/v1/vms", json=BODY | {"count": 6, "mode": "best-effort"}).json()
    assert [item["state"] for item in made["items"]].count("pending") == 4
    assert plans == [6, 4]
    assert unsafe(world) == set()


def test_who_shares_a_plan_is_not_told_of_others_vms(world: Any) -> None:
    """Two strangers at once, in two clusters, of which one warns."""
    with world.database.write() as conn:
        second = {"name": "c2", "datacentre_id": 1, "architecture": "x86_64"}
        cluster_id = conn.execute(
            insert(tables.cluster).values(id=2, **second).returning(tables.cluster.c.id)
        ).scalar_one()
        conn.execute(insert(tables.rack).values(id=2, name="rack2", cluster_id=cluster_id))
        conn.execute(update(tables.host).where(tables.host.c.name == "h3").values(rack_id=2))
        conn.execute(update(tables.prefix).values(cluster_id=None, region="r1"))
        update_cluster(conn, "c2", ClusterUpdate.model_validate({"n_plus_one": {"mode": "warn"}}))
    wishes = [
        creation._Wish(VmsCreate.model_validate(BODY | {"name": f"in-{name}", "cluster": name}), Ask(f"of-{name}"))
        for name in ("c1", "c2")
    ]
    planning = Planning(world.database, silent_after_s=3600, now=world.now)
    made = creation.Creation(world.database, planning, world.now, BuiltIn())._create_together(wishes)
    told = [[each.vm for each in world.show(one.operation_id).exposed] for one in made if isinstance(one, NewOperation)]
    assert told == [[], ["in-c2"]]


def test_a_claim_waits_for_a_host_that_is_just_being_written(world: Any, api: TestClient) -> None:
    """One that it counts on for a loss, and asks nothing of: it can't do without, but a report is soon written."""
    if world.database.dialect == "sqlite":
        pytest.skip("has one writer, whom everybody waits for")
    ruled(world)
    with ThreadPoolExecutor(1) as others:
        with world.database.write() as conn:
            conn.execute(select(tables.host.c.id).where(tables.host.c.name == "h3").with_for_update())
            body = BODY | {"mode": "best-effort", "at_least": 1, "host": "h1"}
            claim = others.submit(api.post, "/v1/vms", json=body)
            world.wait_until(lambda: claim.done() or bool(_waiting(world)), "it waits")
        assert claim.result(30).status_code == 202


def _waiting(world: Any) -> int:
    """How many transactions wait for locks."""
    theirs = "datname = current_database() AND wait_event_type = 'Lock'"
    with world.database.read() as conn:
        return int(conn.exec_driver_sql(f"SELECT count(*) FROM pg_stat_activity WHERE {theirs}").scalar_one())


@pytest.mark.parametrize(("count", "is_moved"), [(3, True), (5, False)])
def test_a_vm_whose_host_failed_it_is_placed_anew_by_the_rule(world: Any, count: int, is_moved: bool) -> None:
    """h1 fails whatever comes. Of three VMs all have room elsewhere, and restart after a loss; of five, accepted before
    there was the rule, what h1 had has room, but no loss could be made good then."""
    view = world.replica("accepting", start=False).create(world.batch(count, flavor="half"), world.ask)
    ruled(world)
    fault = Fault.of("host.no_capacity")
    world.fleet.faults = lambda action, host, vm: fault if host == "h1" else None
    with world.running():
        ended = world.ended(view.operation_id)
    assert "h1" in {item.host for item in view.items}
    moved = [item for item in ended.items if item.attempt > 1 or item.state is not ItemState.SUCCEEDED]
    assert moved
    assert {item.state is ItemState.SUCCEEDED for item in moved} == {is_moved}
    if is_moved:
        assert unsafe(world) == set()


# --- growing ----------------------------------------------------------------------------------------------------------

WHOLE = {"vcpus": 16, "memory_mib": 16384}


def grow(world: Any, name: str, **wanted: int) -> Any:
    with world.running(name="resizer") as replica:
        return world.ended(replica.resize(name, VmResize(**wanted), world.ask).operation_id)


def test_a_vm_does_not_grow_where_it_could_not_be_restarted(world: Any) -> None:
    on_h1, _, _ = made(world, "h1", "h2", "h3")
    before = world.vm(on_h1)
    ruled(world)
    with pytest.raises(PpecError) as refused:
        grow(world, on_h1, **WHOLE)
    assert refused.value.code == "cluster.exposed"
    assert refused.value.details == {"domain": "h1", "level": "host", "without_place": 1, "vm": on_h1}
    assert "were host h1 lost, 1 VM would have no place" in refused.value.message
    assert world.vm(on_h1) == before
    assert unsafe(world) == set()
    ruled(world, OFF)
    assert grow(world, on_h1, **WHOLE).state is OperationState.SUCCEEDED
    assert unsafe(world) == {"h1"}


def test_a_vm_does_not_grow_over_the_room_that_another_hosts_loss_needs(world: Any) -> None:
    """Were h2 lost, h1 and h3 would take one of its two VMs each, beside a small one of their own."""
    with world.running(name="maker") as maker:
        for name, flavor, host in (
            ("one", "half", "h2"), ("two", "half", "h2"), ("small-1", "small", "h1"), ("small-3", "small", "h3"),
        ):  # fmt: skip
            view = maker.create(world.batch(1, flavor=flavor, host=host, name=name), world.ask)
            assert world.ended(view.operation_id).state is OperationState.SUCCEEDED
    ruled(world)
    with pytest.raises(PpecError) as refused:
        grow(world, "small-1", vcpus=10)
    assert refused.value.code == "cluster.exposed"
    assert (refused.value.details["domain"], refused.value.details["without_place"]) == ("h2", 1)
    assert grow(world, "small-1", vcpus=8).state is OperationState.SUCCEEDED
    assert unsafe(world) == set()


def test_a_vm_grows_where_all_can_still_be_restarted_and_shrinks_anywhere(world: Any) -> None:
    on_h1, on_h2 = made(world, "h1", "h2")
    ruled(world)
    assert grow(world, on_h1, **WHOLE).state is OperationState.SUCCEEDED
    assert unsafe(world) == set()
    assert grow(world, on_h2, vcpus=2).state is OperationState.SUCCEEDED


def test_a_host_without_the_room_says_so_and_nothing_of_n_plus_one(world: Any) -> None:
    on_h1, _, _ = made(world, "h1", "h2", "h3")
    ruled(world)
    with pytest.raises(PpecError) as refused:
        grow(world, on_h1, vcpus=18)
    assert refused.value.code == "host.no_capacity"


@pytest.mark.parametrize(("come", "is_refused"), [(("h2",), False), (("h2", "h3"), True)])
def test_what_comes_between_the_look_and_the_commit_is_looked_at(
    world: Any, monkeypatch: pytest.MonkeyPatch, come: tuple[str, ...], is_refused: bool
) -> None:
    """After the first look; the second one is taken while nobody can come."""
    (on_h1,) = made(world, "h1")
    ruled(world)
    looks: list[Exposed | None] = []
    seen: Callable[[Growing, Growth], Seen] = Growing.seen

    def disturbed(growing: Growing, growth: Growth) -> Seen:
        found = seen(growing, growth)
        looks.append(found.exposed)
        if len(looks) == 1:
            made(world, *come)
        return found

    monkeypatch.setattr(Growing, "seen", disturbed)
    if is_refused:
        with pytest.raises(PpecError) as refused:
            grow(world, on_h1, **WHOLE)
        assert refused.value.code == "cluster.exposed"
    else:
        assert grow(world, on_h1, **WHOLE).state is OperationState.SUCCEEDED
    assert [each is not None for each in looks] == [False, is_refused]
    assert unsafe(world) == set()
