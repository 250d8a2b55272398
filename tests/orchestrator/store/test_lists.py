# SPDX-License-Identifier: Apache-2.0
"""Lists of hosts and VMs: what filters choose, what pages have, and how many statements they take."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, delete, event, insert, select, update

from ppec_contract.api_hosts import HostLiveness, HostView
from ppec_contract.api_vms import VmRecord, VmView
from ppec_contract.host import HealthLevel
from ppec_contract.vm import VmState
from ppec_lab.fleet_in_store import write_fleet
from ppec_lab.generated_fleet import FLAVORS, IMAGES, POOL, generate
from ppec_orchestrator.liveness import liveness_of
from ppec_orchestrator.store import host_views, tables, vm_lists, vm_views
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.host_lists import HostFilter
from ppec_orchestrator.store.labels import WantedLabel, label_host, label_vm
from ppec_orchestrator.store.paging import Documents, Slice
from ppec_orchestrator.store.places import Place
from ppec_orchestrator.store.vm_lists import Bounds, VmFilter
from ppec_orchestrator.store.vms import forget

NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
SILENT_AFTER_S = 30
BEFORE = NOW - timedelta(seconds=SILENT_AFTER_S)
HOSTS, VMS = 1000, 600


def judge(name: str, enrolled_at: Any, last_seen_at: Any) -> tuple[HostLiveness, Any]:
    return liveness_of(enrolled_at, last_seen_at, now=NOW, silent_after_s=SILENT_AFTER_S), last_seen_at


@dataclass
class World:
    """A generated fleet, and its whole lists as the API shows them."""

    database: Database
    vms: list[VmView]
    hosts: dict[str, HostView]
    architectures: dict[str, str]
    regions: dict[str, str]

    def page(self, wanted: Slice, chosen: VmFilter, bounds: Bounds = vm_lists.BOUNDS) -> Documents:
        with self.database.read() as conn:
            return vm_views.page(conn, wanted, chosen, bounds)


def pages(read: Callable[[Slice], Documents], limit: int) -> Iterator[dict[str, Any]]:
    wanted = Slice(limit)
    while True:
        found = read(wanted)
        assert len(found.items) <= limit
        yield from map(json.loads, found.items)
        if found.last is None:
            return
        wanted = replace(wanted, after=found.last)


def _seen(database: Database) -> World:
    with database.read() as conn:
        vms = [VmView.model_validate_json(item) for item in vm_views.page(conn, Slice(VMS + 9), VmFilter(BEFORE)).items]
        listed = host_views.page(conn, Slice(HOSTS + 9), HostFilter(BEFORE), judge).items
        hosts = [HostView.model_validate_json(item) for item in listed]
        clusters = conn.execute(select(tables.cluster.c.name, tables.cluster.c.architecture)).all()
        centres = conn.execute(select(tables.datacentre.c.name, tables.datacentre.c.region)).all()
    return World(
        database, vms, {host.name: host for host in hosts}, dict(map(tuple, clusters)), dict(map(tuple, centres))
    )


def write(database: Database) -> None:
    """Three clusters; some hosts are silent, some never reported; some VMs failed, one has no host, one odd labels."""
    write_fleet(database, generate(HOSTS, VMS, seed=7), NOW)
    with database.write() as conn:
        chosen = conn.execute(select(tables.vm.c.id).where(tables.vm.c.record == "active").limit(3)).scalars().all()
        label_vm(conn, chosen[0], {"100%": "_x_", "Grösse": "XL", "path": "a/b", "tier": None})
        conn.execute(update(tables.vm).where(tables.vm.c.id == chosen[1]).values(record="creating"))
        conn.execute(delete(tables.allocation).where(tables.allocation.c.vm_id == chosen[1]))
        conn.execute(update(tables.vm).where(tables.vm.c.id == chosen[2]).values(observed="unknown"))
        conn.execute(update(tables.cluster).where(tables.cluster.c.name == "c01").values(architecture="aarch64"))
        label_host(conn, "h00003", {"shape": "odd", "room%": "A"})


@pytest.fixture
def world(fill_once: Callable[..., AbstractContextManager[Database]]) -> Iterator[World]:
    """What `write` wrote; each test may change it."""
    with fill_once(write) as database:
        yield _seen(database)


def test_every_item_is_as_the_contract_has_it(world: World) -> None:
    assert (len(world.vms), len(world.hosts)) == (VMS, HOSTS)
    with world.database.read() as conn:
        for view in world.vms[:: VMS // 20]:
            alone = vm_views.show(conn, str(view.vm_id), BEFORE)
            assert alone.model_copy(update={"drives": ()}) == view
            assert len(alone.drives) == view.nvme_drives
        raw = vm_views.page(conn, Slice(VMS), VmFilter(BEFORE)).items
        for item, view in zip(raw, world.vms, strict=True):
            assert json.loads(item) == view.model_dump(mode="json")
        for item in host_views.page(conn, Slice(HOSTS), HostFilter(BEFORE), judge).items:
            assert json.loads(item) == HostView.model_validate_json(item).model_dump(mode="json")
    assert {len(vm.addresses) for vm in world.vms} == {0, 1, 2}
    assert {(vm.pool, vm.nvme_drives) for vm in world.vms} == {
        (None, 0), (None, 1), (POOL, 0), (POOL, 1)
    }  # fmt: skip
    assert {vm.observed for vm in world.vms} == {VmState.RUNNING, VmState.STOPPED, VmState.PAUSED, VmState.UNKNOWN}
    assert {host.liveness for host in world.hosts.values()} == {
        HostLiveness.UP, HostLiveness.UNKNOWN, HostLiveness.REGISTERED,
    }  # fmt: skip


def test_what_is_odd_is_told_as_the_contract_tells_it(world: World) -> None:
    """Moments with and without fractions, many cells, names with quotes, VMs with no flavor or with a size held."""
    moments = [NOW, NOW.replace(microsecond=7), NOW.replace(microsecond=120_000), NOW.replace(year=1999), None]
    chosen = [vm for vm in world.vms if vm.host is not None][: len(moments)]
    with world.database.write() as conn:
        for vm, moment in zip(chosen, moments, strict=True):
            told = {"observed_at": moment, "created_at": moment or NOW, "operation_id": 'op-"1\\"', "flavor": ""}
            held = {"held_vcpus": 3, "held_memory_mib": 512}
            conn.execute(update(tables.vm).where(tables.vm.c.id == vm.vm_id).values(**told, **held))
            for cell in (10, 2):
                values = {"vm_id": vm.vm_id, "cell": cell, "cores": 1, "memory_mib": 1}
                conn.execute(insert(tables.allocation_cell).values(values))
    with world.database.read() as conn:
        items = map(json.loads, vm_views.page(conn, Slice(VMS), VmFilter(BEFORE)).items)
        found = {item["vm_id"]: item for item in items}
    for vm, moment in zip(chosen, moments, strict=True):
        item = found[str(vm.vm_id)]
        assert item == VmView.model_validate_json(json.dumps(item)).model_dump(mode="json")
        assert item["observed_at"] == (moment and moment.isoformat().replace("+00:00", "Z"))
        assert item["created_at"] == (moment or NOW).isoformat().replace("+00:00", "Z")
        assert (item["operation_id"], item["flavor"]) == ('op-"1\\"', None)
        assert item["held"] == {"vcpus": 3, "memory_mib": 512}
        assert item["cells"] == sorted((*vm.cells, 2, 10))


def test_hosts_tell_what_their_reports_said_whichever_version_stored_it(world: World) -> None:
    host = next(host for host in world.hosts.values() if host.cells)
    findings = [{"check": "a", "level": level, "found": "-"} for level in ("ok", "error", "warning")]
    with world.database.write() as conn:
        known = {"facts": {"agent_version": "0.1"}, "health": findings, "last_seen_at": NOW.replace(microsecond=7)}
        conn.execute(update(tables.host).where(tables.host.c.name == host.name).values(known))
        row = conn.execute(select(tables.host.c.id).where(tables.host.c.name == host.name)).scalar_one()
        cell = {"host_id": row, "socket": 1, "threads_per_core": 2, "cores": 8, "memory_mib": 100}
        more = {"cores_reserved": 2, "memory_reserved_mib": 50, "cores_used": 9, "memory_used_mib": 30}
        conn.execute(insert(tables.host_cell), [cell | more | {"cell": number} for number in (10, 2)])
    with world.database.read() as conn:
        items = map(json.loads, host_views.page(conn, Slice(HOSTS), HostFilter(BEFORE), judge).items)
        item = next(item for item in items if item["name"] == host.name)
        alone = host_views.get_host(conn, host.name, judge)
    view = HostView.model_validate_json(json.dumps(item))
    assert item == view.model_dump(mode="json")
    assert (view.agent_version, view.architecture, view.bridges, view.drift_count) == ("0.1", None, (), 0)
    assert view.health_level is HealthLevel.ERROR
    assert view.last_seen_at == NOW.replace(microsecond=7)
    assert view.vm_count == sum(vm.host == host.name for vm in world.vms)
    assert [cell.cell for cell in view.cells] == [*(cell.cell for cell in host.cells), 2, 10]
    last = view.cells[-1]
    assert (last.cores, last.cores_reserved, last.cores_free) == (10, 2, 0)
    assert (last.memory_mib, last.memory_reserved_mib, last.memory_free_mib) == (150, 50, 70)
    assert alone.cells == view.cells


# --- what filters choose ---------------------------------------------------------------------------------------------


def _in_place(world: World, host: HostView, place: Place) -> bool:
    pairs = (
        (place.architecture, world.architectures[host.cluster]),
        (place.region, world.regions[host.datacentre]),
        (place.datacentre, host.datacentre),
        (place.cluster, host.cluster),
        (place.rack, host.rack),
        (place.vrf, host.vrf),
        (place.host, host.name),
    )
    return all(wanted is None or wanted == found for wanted, found in pairs)


def _labelled(labels: dict[str, str], wanted: tuple[WantedLabel, ...]) -> bool:
    return all(one.key in labels and one.value in (None, labels[one.key]) for one in wanted)


def _in_text(text: str | None, *parts: str | None) -> bool:
    return text is None or any(text.casefold() in part.casefold() for part in parts if part is not None)


def _fits(world: World, vm: VmView, chosen: VmFilter) -> bool:
    pairs = (
        (chosen.name, vm.name),
        (chosen.record, vm.record),
        (chosen.observed, vm.observed),
        (chosen.image, vm.image),
        (chosen.flavor, vm.flavor),
        (chosen.pool, vm.pool),
    )
    labels = (f"{key}={value}" for key, value in vm.labels.items())
    text = chosen.text
    begins = (
        text is not None and set(text) & set(".:") and any(str(one.address).startswith(text) for one in vm.addresses)
    )
    return (
        all(wanted is None or wanted == found for wanted, found in pairs)
        and (chosen.place == Place() or (vm.host is not None and _in_place(world, world.hosts[vm.host], chosen.place)))
        and _labelled(vm.labels, chosen.labels)
        and (bool(begins) or _in_text(text, vm.name, vm.image, vm.flavor, vm.host, *labels))
    )


def maybe(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from((None, None, None, *values))


PLACES = st.builds(
    Place,
    architecture=maybe("x86_64", "aarch64"),
    region=maybe("north", "south"),
    datacentre=maybe("dc0", "dc9"),
    cluster=maybe("c00", "c01", "c03"),
    rack=maybe("r001", "r020"),
    vrf=maybe("red", "blue"),
)
LABELS = st.lists(
    st.sampled_from(
        [WantedLabel("tier", "web"), WantedLabel("tier"), WantedLabel("env", "test"), WantedLabel("100%"),
         WantedLabel("none"), WantedLabel("tier", "wēb"), WantedLabel("Grösse", "XL")]
    ), max_size=2, unique=True,
).map(tuple)  # fmt: skip
TEXTS = maybe(
    "web-0001", "WEB", "h0000", "h00100", "debian", "c2.", "tier=db", "100%", "%", "_", "grösse", "GRÖSSE", "10.0.",
    "10.0.0.1", "10.2.1", "env=prod", "\\", "'", "nothing", "2001:", "/",
)  # fmt: skip
VM_FILTERS = st.builds(
    VmFilter,
    silent_before=st.just(BEFORE),
    place=PLACES | st.builds(Place, host=maybe("h00003", "h00100", "h9")),
    record=maybe(*VmRecord),
    observed=maybe(*VmState),
    image=maybe(*IMAGES[:2], "none"),
    flavor=maybe(FLAVORS[0].name, FLAVORS[-1].name),
    pool=maybe(POOL, "none"),
    labels=LABELS,
    text=TEXTS,
)


@pytest.mark.parametrize("bounds", [Bounds(3, 3, 0), Bounds(3, 10**6), Bounds(100, 300), Bounds(10**6, 10**6)])
def test_vm_filters_choose_what_a_look_at_each_vm_chooses(world: World, bounds: Bounds) -> None:
    """Whatever there are few of, and so in whichever way they are looked for."""

    @settings(max_examples=40)
    @given(chosen=VM_FILTERS, limit=st.sampled_from([60, 500]))
    def compare(chosen: VmFilter, limit: int) -> None:
        found = [item["vm_id"] for item in pages(lambda part: world.page(part, chosen, bounds), limit)]
        assert found == [str(vm.vm_id) for vm in world.vms if _fits(world, vm, chosen)]

    compare()


HOST_FILTERS = st.builds(
    HostFilter,
    silent_before=st.just(BEFORE),
    place=PLACES,
    liveness=maybe(*HostLiveness),
    draining=maybe(True, False),
    labels=st.lists(
        st.sampled_from([WantedLabel("shape", "s104"), WantedLabel("gpu"), WantedLabel("room%", "A")]),
        max_size=2, unique=True,
    ).map(tuple),
    text=maybe("h0000", "H0001", "10.200.1.", "feed-1", "room%=a", "%", "nothing"),
)  # fmt: skip


def test_host_filters_choose_what_a_look_at_each_host_chooses(world: World) -> None:
    def fits(host: HostView, chosen: HostFilter) -> bool:
        labels = (f"{key}={value}" for key, value in host.labels.items())
        return (
            _in_place(world, host, chosen.place)
            and chosen.liveness in (None, host.liveness)
            and chosen.draining in (None, host.draining)
            and _labelled(host.labels, chosen.labels)
            and _in_text(chosen.text, host.name, host.address, *labels)
        )

    @settings(max_examples=40)
    @given(chosen=HOST_FILTERS, limit=st.sampled_from([90, 500]))
    def compare(chosen: HostFilter, limit: int) -> None:
        with world.database.read() as conn:
            found = [item["name"] for item in pages(lambda part: host_views.page(conn, part, chosen, judge), limit)]
        assert found == [host.name for host in world.hosts.values() if fits(host, chosen)]

    compare()


# --- what pages have -------------------------------------------------------------------------------------------------


def test_what_comes_and_goes_makes_nothing_else_be_left_out_or_come_twice(world: World) -> None:
    """Between two pages the last VM that was shown is deleted, others before and after it, and one is made."""
    there = {str(vm.vm_id) for vm in world.vms}
    gone: set[str] = set()
    shown: list[str] = []
    wanted = Slice(50)
    while True:
        page = world.page(wanted, VmFilter(BEFORE))
        shown += [json.loads(item)["vm_id"] for item in page.items]
        if page.last is None:
            break
        with world.database.write() as conn:
            for vm_id in (shown[-1], shown[0], world.vms[-len(shown)].vm_id):
                gone.add(str(vm_id))
                conn.execute(delete(tables.allocation).where(tables.allocation.c.vm_id == UUID(str(vm_id))))
                forget(conn, [UUID(str(vm_id))])
            early = conn.execute(select(tables.vm).limit(1)).one()._mapping
            conn.execute(
                insert(tables.vm).values(dict(early) | {"id": UUID(int=len(shown)), "name": f"a-{len(shown)}"})
            )
        wanted = replace(wanted, after=page.last)
    assert len(shown) == len(set(shown))
    assert there - gone <= set(shown) <= there


@pytest.mark.parametrize(
    ("chosen", "odd"),
    [
        (VmFilter(BEFORE, record=VmRecord.FAILED), True),
        (VmFilter(BEFORE, observed=VmState.PAUSED), True),
        (VmFilter(BEFORE, observed=VmState.UNKNOWN), True),
        (VmFilter(BEFORE, observed=VmState.RUNNING), False),
    ],
)
def test_sqlite_finds_the_few_odd_vms_by_their_index(tmp_path: Path, chosen: VmFilter, odd: bool) -> None:
    """It takes an index of some rows only for a query that says the very same of them."""
    database = Database(f"sqlite:///{tmp_path}/ppec.db")
    database.migrate()
    with database.read() as conn:
        query = vm_lists.keys(conn, Slice(), chosen).query
        text = query.compile(conn, compile_kwargs={"literal_binds": True})
        plan = " ".join(row.detail for row in conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}"))
    database.close()
    assert ("ix_vm_odd" in plan) is odd


@pytest.fixture
def statements() -> Iterator[list[str]]:
    """What is asked of any database meanwhile."""
    asked: list[str] = []

    def remember(conn: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.lstrip("(").startswith(("SELECT", "WITH")):
            asked.append(statement)

    event.listen(Engine, "before_cursor_execute", remember)
    yield asked
    event.remove(Engine, "before_cursor_execute", remember)


@pytest.mark.parametrize(
    ("chosen", "most"),
    [
        (VmFilter(BEFORE), 4),
        (VmFilter(BEFORE, record=VmRecord.FAILED, image="debian-12", flavor="c2.4"), 4),
        (VmFilter(BEFORE, place=Place(cluster="c00")), 5),
        (VmFilter(BEFORE, labels=(WantedLabel("tier", "web"), WantedLabel("env"))), 5),
        (VmFilter(BEFORE, observed=VmState.UNKNOWN), 6),
        (VmFilter(BEFORE, place=Place(vrf="red"), text="10.0.", observed=VmState.UNKNOWN), 6),
    ],
)
def test_a_page_takes_as_many_statements_however_long_it_is(
    world: World, statements: list[str], chosen: VmFilter, most: int
) -> None:
    for limit in (1, 10, 500):
        statements.clear()
        world.page(Slice(limit), chosen)
        assert len(statements) == most
    statements.clear()
    with world.database.read() as conn:
        host_views.page(conn, Slice(500), HostFilter(BEFORE, text="h"), judge)
    assert len(statements) == 1
