# SPDX-License-Identifier: Apache-2.0
"""A list of VMs, each with addresses of its own: all in one request. On the whole API."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from plan_requests import BODY, code, planned
from sqlalchemy import insert, select, update
from starlette.testclient import TestClient

from ppec_contract.api_ipdb import HoldCreate
from ppec_contract.api_vms import VmsCreate
from ppec_contract.errors import PpecError
from ppec_orchestrator.dispatch.simulated import Fault
from ppec_orchestrator.ipdb.ranges import to_hex
from ppec_orchestrator.operations import creation
from ppec_orchestrator.operations.specs import nics
from ppec_orchestrator.operations.wanted import CreateInput
from ppec_orchestrator.store import holds, ipdb, tables
from ppec_orchestrator.store.serving import range_of

SMALL = BODY | {"flavor": "small"}
WITHOUT_THE_REST = ["best-effort", "most-vcpus"]


def item(name: str, *networks: str, **more: Any) -> dict[str, Any]:
    """Of each network the prefix, or the address."""
    wanted = [{"prefix" if "/" in one else "address": one} for one in networks]
    return {"name": name} | ({"networks": wanted} if wanted else {}) | more


THREE = [item("a", "10.7.0.50"), item("b", "10.7.0.60"), item("c", "10.7.0.70")]


def made(world: Any, api: TestClient, **body: Any) -> dict[str, list[str]]:
    """Their addresses, once they run."""
    answer = api.post("/v1/vms", json=SMALL | body)
    assert answer.status_code == 202, answer.text
    assert world.ended(answer.json()["operation_id"]).state == "succeeded"
    return addresses(api)


def addresses(api: TestClient) -> dict[str, list[str]]:
    return {vm["name"]: [one["address"] for one in vm["addresses"]] for vm in api.get("/v1/vms").json()["items"]}


def rows(world: Any) -> list[Any]:
    """All that a request may change."""
    counted = tables.vm, tables.operation, tables.allocation, tables.address_event, tables.address
    with world.database.read() as conn:
        return [sorted(conn.execute(select(table)).all(), key=str) for table in counted]


@pytest.fixture
def two_vlans(world: Any) -> Any:
    """Besides the world's own prefix 10.8.0.0/29, on a bridge of its own; and `h3` in a rack of its own."""
    with world.database.write() as conn:
        conn.execute(
            insert(tables.prefix).values(
                id=2, vrf_id=1, cidr="10.8.0.0/29", family=4, gateway="10.8.0.1", bridge="br8", vlan=8, cluster_id=1,
                first="10.8.0.2", last="10.8.0.6", nameservers=[],
            )
        )  # fmt: skip
        row = conn.execute(select(tables.prefix).where(tables.prefix.c.id == 2)).one()
        ipdb.insert_ipv4_rows(conn, 2, range_of(row))
        conn.execute(insert(tables.rack).values(id=2, name="rack2", cluster_id=1))
        conn.execute(update(tables.host).where(tables.host.c.name == "h3").values(rack_id=2))
    return world


# --- what they get ---------------------------------------------------------------------------------------------------


def test_each_vm_of_a_list_gets_just_the_address_it_asks_for(world: Any, api: TestClient) -> None:
    assert made(world, api, items=THREE) == {"a": ["10.7.0.50"], "b": ["10.7.0.60"], "c": ["10.7.0.70"]}
    world.assert_consistent()


def test_items_are_in_prefixes_and_vlans_of_their_own(two_vlans: Any, api: TestClient) -> None:
    """What an item leaves out is the request's, or any."""
    items = [item("a", "10.8.0.6"), item("b", "10.8.0.0/29", "10.7.0.9"), item("c"), item("d", networks=[{}])]
    got = made(two_vlans, api, items=items, networks=[{"prefix": "10.8.0.0/29"}])
    assert got == {"a": ["10.8.0.6"], "b": ["10.8.0.2", "10.7.0.9"], "c": ["10.8.0.3"], "d": ["10.7.0.2"]}
    with two_vlans.database.read() as conn:
        vm_id = conn.execute(select(tables.vm.c.id).where(tables.vm.c.name == "b")).scalar_one()
        told = nics(vm_id, ipdb.addresses_of(conn, [vm_id])[vm_id])
    assert [(nic.bridge, [str(one) for one in nic.addresses]) for nic in told] == [
        ("br8", ["10.8.0.2/29"]),
        ("br0", ["10.7.0.9/24"]),
    ]


def test_one_vm_may_use_the_fixed_address_of_the_request(world: Any, api: TestClient) -> None:
    got = made(world, api, items=[item("a"), item("b", "10.7.0.60")], networks=[{"address": "10.7.0.50"}])
    assert got == {"a": ["10.7.0.50"], "b": ["10.7.0.60"]}


def test_an_address_that_is_reserved_for_a_vm_s_name_is_that_item_s(world: Any, api: TestClient) -> None:
    with world.database.write() as conn:
        mine = HoldCreate(kind="reserved", first="10.7.0.60", reserved_for="b")
        holds.create_hold(conn, 1, mine, "me", world.now)
    others = [item("a", "10.7.0.60"), item("b", "10.7.0.50")]
    answer = api.post("/v1/vms", json=SMALL | {"items": others})
    assert code(answer) == (409, "address.reserved")
    assert answer.json()["details"]["wanted_for"] == "a"
    assert made(world, api, items=THREE)["b"] == ["10.7.0.60"]


def test_the_last_addresses_of_a_prefix_are_enough_for_those_who_ask_by_number(two_vlans: Any, api: TestClient) -> None:
    """Five: two by number, and three more. A sixth finds none."""
    items = [item("a", "10.8.0.2"), item("b", "10.8.0.6"), *(item(name, "10.8.0.0/29") for name in "cde")]
    answer = api.post("/v1/vms", json=SMALL | {"items": [*items, item("f", "10.8.0.0/29")]})
    assert code(answer) == (409, "placement.no_capacity")
    assert answer.json()["details"]["reasons"] == {"addresses": 3}
    assert [one["prefix"] for one in answer.json()["details"]["prefixes"]] == ["10.8.0.0/29"]
    got = made(two_vlans, api, items=items)
    assert (got["a"], got["b"]) == (["10.8.0.2"], ["10.8.0.6"])
    assert sorted(address for mine in got.values() for address in mine) == [f"10.8.0.{n}" for n in range(2, 7)]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"items": [item("a", "10.7.0.50"), item("b", "10.7.0.50")]}, "asked for twice, by item a and item b"),
        ({"items": [item("a", "10.7.0.50", "10.7.0.50")]}, "10.7.0.50 is asked for twice, by item a"),
        (
            {"items": [item("a", "10.7.0.50"), item("b")], "networks": [{"address": "10.7.0.50"}]},
            "twice, by the request and item a",
        ),
        ({"items": [item("a"), item("b")], "networks": [{"address": "10.7.0.50"}]}, "10.7.0.50 is for one VM"),
        ({"items": [item("a", "10.7.0.9")], "networks": [{"address": "10.7.0.50"}]}, "10.7.0.50 is for no VM"),
        ({"items": [item("a", networks=[{}] * 5)]}, "networks"),
    ],
)
def test_an_address_is_asked_for_once(world: Any, api: TestClient, body: dict[str, Any], words: str) -> None:
    before = rows(world)
    for path in ("vms", "plans"):
        answer = api.post(f"/v1/{path}", json=SMALL | body)
        assert code(answer) == (422, "request.invalid")
        assert words in answer.text
    assert rows(world) == before


@pytest.mark.parametrize(
    ("taken", "refused"),
    [
        ("10.7.0.60", (409, "address.in_use")),
        ("10.7.0.1", (422, "address.not_usable")),
        ("10.9.0.1", (422, "address.not_usable")),
        ("10.7.0.8", (409, "address.reserved")),
    ],
)
def test_one_address_that_can_t_be_had_refuses_the_whole_list(
    world: Any, api: TestClient, taken: str, refused: tuple[int, str]
) -> None:
    made(world, api, items=[item("other", "10.7.0.60")])
    with world.database.write() as conn:
        holds.create_hold(conn, 1, HoldCreate(kind="reserved", first="10.7.0.8"), "me", world.now)
    before = rows(world)
    answer = api.post("/v1/vms", json=SMALL | {"items": [THREE[0], item("b", taken), THREE[2]]})
    assert code(answer) == refused
    assert answer.json()["detail"].startswith(f"vm b: address {taken} ")
    assert (answer.json()["subject"], answer.json()["details"]["wanted_for"]) == (f"address {taken}", "b")
    assert rows(world) == before
    assert made(world, api, items=[THREE[0], THREE[2]])["other"] == ["10.7.0.60"]


def test_a_prefix_that_is_not_there_is_told_of_its_item(api: TestClient) -> None:
    for mode in ("all-or-nothing", "best-effort"):
        answer = api.post("/v1/vms", json=SMALL | {"items": [item("a"), item("b", "10.9.0.0/24")], "mode": mode})
        assert code(answer) == (404, "prefix.not_found")
        assert "vm b: " in answer.json()["detail"]


@pytest.mark.parametrize("mode", WITHOUT_THE_REST)
def test_one_address_that_is_taken_refuses_only_its_vm_where_the_others_will_do(
    world: Any, api: TestClient, mode: str
) -> None:
    made(world, api, items=[item("other", "10.7.0.60")])
    answer = api.post("/v1/vms", json=SMALL | {"items": THREE, "mode": mode})
    assert answer.status_code == 202, answer.text
    ended = world.ended(answer.json()["operation_id"])
    assert {one.name: one.state for one in ended.items} == {"a": "succeeded", "b": "refused", "c": "succeeded"}
    (problem,) = (one.problem for one in ended.items if one.problem)
    assert (problem.code, problem.details["wanted_for"]) == ("address.in_use", "b")
    assert "is in use by VM other" in problem.detail
    assert addresses(api) == {"a": ["10.7.0.50"], "c": ["10.7.0.70"], "other": ["10.7.0.60"]}
    world.assert_consistent()


@pytest.mark.parametrize("more", [{}, {"at_least": 2}])
def test_too_few_that_can_have_their_addresses_are_told_of_the_address(
    world: Any, api: TestClient, more: dict[str, Any]
) -> None:
    made(world, api, items=THREE[:2])
    before = rows(world)
    items = [item("x", "10.7.0.50"), item("y", "10.7.0.60"), *([item("z")] if more else [])]
    answer = api.post("/v1/vms", json=SMALL | {"items": items, "mode": "best-effort"} | more)
    assert code(answer) == (409, "address.in_use")
    assert answer.json()["details"]["wanted_for"] == "x"
    assert rows(world) == before


@pytest.mark.parametrize("mode", ["all-or-nothing", *WITHOUT_THE_REST])
def test_an_address_that_is_lost_between_plan_and_grant(world: Any, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Another request is quicker."""
    accepting, original, others = world.replica("accepting", start=False), creation.meaning, []

    def quicker(*args: Any, **more: Any) -> Any:
        meant = original(*args, **more)
        if not others:
            others.append(None)
            other = SMALL | {"items": [item("other", "10.7.0.60")]}
            others.append(world.replica("other", start=False).create(VmsCreate.model_validate(other), world.ask))
        return meant

    monkeypatch.setattr(creation, "meaning", quicker)
    request = VmsCreate.model_validate(SMALL | {"items": THREE, "mode": mode})
    if mode == "all-or-nothing":
        with pytest.raises(PpecError) as caught:
            accepting.create(request, world.ask)
        assert (caught.value.code, caught.value.details["wanted_for"]) == ("address.in_use", "b")
        assert "vm b: address 10.7.0.60" in caught.value.message
        assert len(rows(world)[0]) == 1
    else:
        view = accepting.create(request, world.ask)
        assert {one.name: one.state for one in view.items} == {"a": "pending", "c": "pending", "b": "refused"}
        assert len(rows(world)[0]) == 3


# --- where they go ---------------------------------------------------------------------------------------------------


def test_items_go_where_they_are_said_to(two_vlans: Any, api: TestClient) -> None:
    items = [item("a", host="h2"), item("b", "10.7.0.60", host="h3", rack="rack2"), item("c", rack="rack2"), item("d")]
    made(two_vlans, api, items=items, rack="rack1", policy="pack")
    hosts = {vm["name"]: vm["host"] for vm in api.get("/v1/vms").json()["items"]}
    assert {name: hosts[name] for name in "abc"} == {"a": "h2", "b": "h3", "c": "h3"}
    assert hosts["d"] in ("h1", "h2")


def test_vms_of_one_host_share_its_room(two_vlans: Any, api: TestClient) -> None:
    """Two of half its size fill it."""
    items = [item(f"v{number}", flavor="half", host="h1") for number in range(3)]
    answer = api.post("/v1/vms", json=SMALL | {"items": items})
    assert code(answer) == (409, "placement.no_capacity")
    assert answer.json()["details"]["reasons"] == {"outside-scope": 2, "cores": 1}
    assert len(made(two_vlans, api, items=items[:2])) == 2


@pytest.mark.parametrize(
    ("items", "more", "words"),
    [
        ([item("a", host="h1", rack="rack2")], {}, "item a is wanted on host h1, which is in rack rack1, and in rack"),
        ([item("a", host="h3")], {"rack": "rack1"}, "host h3, which is in rack rack2, and in rack rack1"),
        ([item("a", rack="rack2")], {"host": "h1"}, "host h1, which is in rack rack1, and in rack rack2"),
        ([item("a", rack="rack1")], {"cluster": "c2"}, "rack rack1, which is in cluster c1, and in cluster c2"),
        ([item("a", host="h1")], {"vrf": "v2"}, "host h1, which is in VRF v1, and in VRF v2"),
    ],
)
def test_an_item_in_two_places_is_refused(
    two_vlans: Any, api: TestClient, items: list[Any], more: dict[str, Any], words: str
) -> None:
    with two_vlans.database.write() as conn:
        conn.execute(insert(tables.cluster).values(id=2, name="c2", datacentre_id=1, architecture="x86_64"))
        conn.execute(insert(tables.vrf).values(id=2, name="v2", description=""))
    for path in ("vms", "plans"):
        answer = api.post(f"/v1/{path}", json=SMALL | {"items": [*items, item("b")]} | more)
        assert code(answer) == (422, "request.invalid")
        assert words in answer.json()["detail"]
        assert answer.json()["subject"] == "item a"


@pytest.mark.parametrize(("kind", "name"), [("host", "h9"), ("rack", "rack9")])
def test_a_place_that_is_not_there_is_told(api: TestClient, kind: str, name: str) -> None:
    answer = api.post("/v1/vms", json=SMALL | {"items": [item("a", **{kind: name}), item("b")]})
    assert code(answer) == (404, f"{kind}.not_found")


def test_a_host_that_an_item_s_prefix_does_not_serve_is_no_place_for_it(two_vlans: Any, api: TestClient) -> None:
    with two_vlans.database.write() as conn:
        conn.execute(update(tables.prefix).where(tables.prefix.c.cidr == "10.8.0.0/29").values(rack_id=2))
    elsewhere = api.post("/v1/vms", json=SMALL | {"items": [item("a", "10.8.0.6", host="h1"), item("b")]})
    assert code(elsewhere) == (409, "placement.no_capacity")
    assert elsewhere.json()["details"]["reasons"]["not-served"] == 1
    assert made(two_vlans, api, items=[item("a", "10.8.0.6"), item("b", host="h1")])["a"] == ["10.8.0.6"]
    assert api.get("/v1/vms/a").json()["host"] == "h3"


# --- when a host fails -----------------------------------------------------------------------------------------------


def test_vms_that_move_to_other_hosts_take_their_addresses_along(world: Any, api: TestClient) -> None:
    fault = Fault.of("host.no_capacity")
    world.fleet.faults = lambda action, host, vm: fault if host == "h1" else None
    items = [item("a", "10.7.0.50"), item("b", "10.7.0.60"), item("c"), item("d", "10.7.0.70", host="h2")]
    got = made(world, api, items=items, policy="pack")
    assert (got["a"], got["b"], got["d"]) == (["10.7.0.50"], ["10.7.0.60"], ["10.7.0.70"])
    hosts = {vm["name"]: vm["host"] for vm in api.get("/v1/vms").json()["items"]}
    assert "h1" not in hosts.values()
    assert hosts["d"] == "h2"
    world.assert_consistent()


def test_a_vm_that_is_bound_to_its_host_goes_nowhere_else(world: Any, api: TestClient) -> None:
    fault = Fault.of("host.no_capacity")
    world.fleet.faults = lambda action, host, vm: fault if host == "h1" else None
    body = SMALL | {"items": [item("a", "10.7.0.50", host="h1"), THREE[1]], "mode": "best-effort"}
    ended = world.ended(api.post("/v1/vms", json=body).json()["operation_id"])
    assert {one.name: one.state for one in ended.items} == {"a": "failed", "b": "succeeded"}
    assert addresses(api)["b"] == ["10.7.0.60"]


@pytest.mark.parametrize("mode", ["all-or-nothing", "best-effort"])
def test_a_host_that_may_still_have_an_address_keeps_its_vm_from_moving_and_no_other(world: Any, mode: str) -> None:
    """It falls silent. A VM that may have any address goes elsewhere with another one."""
    items = [item("a", "10.7.0.50"), item("b"), item("c", "10.7.0.70", host="h2")]
    request = VmsCreate.model_validate(SMALL | {"items": items, "mode": mode, "avoid_labels": ["later"]})
    labelled = update(tables.host).where(tables.host.c.name == "h3")
    with world.database.write() as conn:
        conn.execute(labelled.values(labels={"later": "yes"}))
        # So that the others fit on no host but h1.
        conn.execute(update(tables.host_cell).where(tables.host_cell.c.host_id == 2).values(cores_used=7))
    view = world.replica("accepting", start=False).create(request, world.ask)
    assert {one.name: one.host for one in view.items} == {"a": "h1", "b": "h1", "c": "h2"}
    with world.database.write() as conn:
        conn.execute(labelled.values(labels={}))
    silent = Fault.of("host.unreachable", whole_host=True)
    world.fleet.faults = lambda action, host, vm: silent if host == "h1" else None
    with world.running():
        ended = world.ended(view.operation_id)
    problem = ended.problem if mode == "all-or-nothing" else next(one.problem for one in ended.items if one.problem)
    assert problem is not None
    assert problem.code == "host.unreachable"
    assert "while host h1 may have its address 10.7.0.50" in problem.detail
    states = {one.name: one.state for one in ended.items}
    if mode == "all-or-nothing":
        assert (ended.state, states["b"], states["c"]) == ("failed", "failed", "undone")
    else:
        assert (ended.state, states) == ("partial", {"a": "failed", "b": "succeeded", "c": "succeeded"})
        assert [one.host for one in ended.items if one.name == "b"] == ["h3"]
    with world.database.read() as conn:
        holder = conn.execute(
            select(tables.address.c.vm_id).where(tables.address.c.address_hex == to_hex(0x0A070032))
        ).scalar_one()
    # It stays taken, in the name of what may be left over there.
    assert holder is not None
    assert holder not in [one.vm_id for one in ended.items]


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_that_is_executed_gives_the_addresses_and_places_it_was_made_for(
    two_vlans: Any, api: TestClient
) -> None:
    items = [item("a", "10.7.0.50", host="h3"), item("b", "10.8.0.5"), item("c", "10.8.0.0/29", rack="rack2")]
    view = planned(api, flavor="small", items=items)
    assert view["executable"]
    assert addresses(api) == {}
    kept = api.get(f"/v1/plans/{view['plan_id']}").json()
    assert kept["request"]["items"][0]["networks"] == [{"prefix": None, "address": "10.7.0.50"}]
    answer = api.post(f"/v1/plans/{view['plan_id']}/execute")
    assert two_vlans.ended(answer.json()["operation_id"]).state == "succeeded"
    assert addresses(api) == {"a": ["10.7.0.50"], "b": ["10.8.0.5"], "c": ["10.8.0.2"]}
    shown = {place["vm"]: place["host"] for place in view["placed"]}
    assert {vm["name"]: vm["host"] for vm in api.get("/v1/vms").json()["items"]} == shown
    assert (shown["a"], shown["c"]) == ("h3", "h3")


def test_a_plan_says_of_each_vm_whose_address_is_taken_and_so_does_its_execution(world: Any, api: TestClient) -> None:
    made(world, api, items=[item("other", "10.7.0.60")])
    view = planned(api, flavor="small", items=THREE, mode="best-effort")
    (refused,) = view["refused"]
    assert refused["vm"] == "b"
    assert refused["sentence"].startswith("vm b: address 10.7.0.60 of prefix 10.7.0.0/24 is in use by VM other")
    assert view["executable"]
    ended = world.ended(api.post(f"/v1/plans/{view['plan_id']}/execute").json()["operation_id"])
    (problem,) = (one.problem for one in ended.items if one.problem)
    assert (problem.code, problem.details["wanted_for"]) == ("address.in_use", "b")
    assert addresses(api) == {"a": ["10.7.0.50"], "c": ["10.7.0.70"], "other": ["10.7.0.60"]}


@pytest.mark.parametrize("mode", ["all-or-nothing", "best-effort"])
def test_a_plan_whose_address_was_taken_since_changes_nothing(world: Any, api: TestClient, mode: str) -> None:
    """It is that plan or none."""
    view = planned(api, flavor="small", items=[one | {"host": "h1"} for one in THREE], mode=mode)
    made(world, api, items=[item("other", "10.7.0.60", host="h2")])
    before = rows(world)
    answer = api.post(f"/v1/plans/{view['plan_id']}/execute")
    assert code(answer) == (409, "address.in_use")
    assert answer.json()["details"]["wanted_for"] == "b"
    assert rows(world) == before


# --- at once, and again ----------------------------------------------------------------------------------------------


def test_of_lists_that_ask_for_the_same_address_at_once_exactly_one_is_made(world: Any, api: TestClient) -> None:
    bodies = [
        SMALL | {"items": [item(f"x{n}", f"10.7.0.{100 + n}"), item(f"y{n}", "10.7.0.60"), item(f"z{n}")]}
        for n in range(4)
    ]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda body: api.post("/v1/vms", json=body), bodies))
    lost = [answer for answer in answers if answer.status_code != 202]
    assert [code(answer) for answer in lost] == [(409, "address.in_use")] * 3
    (won,) = (answer for answer in answers if answer.status_code == 202)
    assert world.ended(won.json()["operation_id"]).state == "succeeded"
    assert len(addresses(api)) == 3
    assert sum("10.7.0.60" in mine for mine in addresses(api).values()) == 1
    world.assert_consistent()


def test_of_best_efforts_at_once_exactly_one_gets_the_address(world: Any, api: TestClient) -> None:
    bodies = [
        SMALL | {"items": [item(f"x{n}", f"10.7.0.{100 + n}"), item(f"y{n}", "10.7.0.60")], "mode": "best-effort"}
        for n in range(4)
    ]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda body: api.post("/v1/vms", json=body), bodies))
    for answer in answers:
        assert answer.status_code == 202, answer.text
        world.ended(answer.json()["operation_id"])
    got = addresses(api)
    assert sorted(name[0] for name in got) == ["x"] * 4 + ["y"]
    assert [got[f"x{n}"] for n in range(4)] == [[f"10.7.0.{100 + n}"] for n in range(4)]


def test_a_list_sent_again_gets_the_operation_it_has(world: Any, api: TestClient) -> None:
    sent = [api.post("/v1/vms", json=SMALL | {"items": THREE}, headers={"Idempotency-Key": "k"}) for _ in range(2)]
    assert [answer.status_code for answer in sent] == [202, 202]
    assert len({answer.json()["operation_id"] for answer in sent}) == 1
    otherwise = [*THREE[:2], item("c", "10.7.0.71")]
    other = api.post("/v1/vms", json=SMALL | {"items": otherwise}, headers={"Idempotency-Key": "k"})
    assert code(other) == (409, "request.idempotency_mismatch")
    world.ended(sent[0].json()["operation_id"])
    assert addresses(api) == {"a": ["10.7.0.50"], "b": ["10.7.0.60"], "c": ["10.7.0.70"]}


def test_what_older_versions_kept_of_a_create_is_still_read() -> None:
    request = {"image": "debian", "flavor": "small", "items": [{"name": "a"}, {"name": "b", "pool": "fast"}]}
    size = {"vcpus": 2, "memory_mib": 1024, "disk_mib": 8192}
    kept = {**size, "request": request | {"networks": [{"prefix": "10.7.0.0/24"}]}, "architecture": "x86_64"}
    read = CreateInput.model_validate(kept | {"prefixes": [[1]]})
    assert read.networks_of("a") == read.request.networks
    assert read.profile_of("a").networks == (frozenset({1}),)
