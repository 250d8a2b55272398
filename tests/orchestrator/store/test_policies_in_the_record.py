# SPDX-License-Identifier: Apache-2.0
"""From a host's report to reservations by policy and back, on both databases; the host admits what is granted."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Connection, insert, select, update

from ppec_agentd.ledger import Claim, Ledger
from ppec_agentd.topology import declare_topology
from ppec_contract.host import HostReport
from ppec_contract.vm import CpuPolicy, NumaPolicy, Size, SmtPolicy
from ppec_orchestrator.liveness import MessageId
from ppec_orchestrator.placement.demand import CELL_RESOURCES
from ppec_orchestrator.placement.plan import Placement
from ppec_orchestrator.placement.planner import plan
from ppec_orchestrator.placement.request import PlanRequest, Shape
from ppec_orchestrator.store import sizes
from ppec_orchestrator.store import tables as t
from ppec_orchestrator.store.cells import used_column, whole_column
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.fleet import load_fleet
from ppec_orchestrator.store.reports import NewReport, apply_report
from ppec_orchestrator.store.reservations import LostRaceError, release, reserve

NOW = datetime(2026, 11, 20, tzinfo=UTC)
MACHINE = "sockets=2,cores=8,threads=2,memory_mib=16384,huge_2m=1024,huge_1g=4"
SHARED = NumaPolicy(cpus=CpuPolicy.SHARED)
ISOLATE = NumaPolicy(smt=SmtPolicy.ISOLATE)
SMALL_PAGES = NumaPolicy(huge_page_kib=2048)
LARGE_PAGES = NumaPolicy(huge_page_kib=1024 * 1024, smt=SmtPolicy.REQUIRE)
ACROSS = NumaPolicy(multi_cell=True)
MIX = (
    Shape(4, 1024, 1, SHARED),
    Shape(2, 2048, 1, LARGE_PAGES),
    Shape(2, 1000, 1),
    Shape(2, 512, 1, ISOLATE),
    Shape(2, 512, 1, SMALL_PAGES),
    Shape(18, 3000, 1, ACROSS),
)


def ledger() -> Ledger:
    return Ledger(
        declare_topology(MACHINE),
        10**6,
        reserved_cores_per_cell=1,
        reserved_memory_per_cell_mib=512,
        shared_cores_per_cell=2,
        shared_vcpus_per_cpu=2,
    )


def a_host(conn: Connection) -> None:
    conn.execute(insert(t.datacentre).values(id=1, name="d1", region="r"))
    conn.execute(insert(t.cluster).values(id=1, name="c1", datacentre_id=1, architecture="x86_64"))
    conn.execute(insert(t.rack).values(id=1, name="r1", cluster_id=1))
    conn.execute(insert(t.vrf).values(id=1, name="red", description=""))
    conn.execute(
        insert(t.prefix).values(
            id=1, vrf_id=1, cidr="fd00::/64", family=6, bridge="br0", cluster_id=1, nameservers=[],
            first="fd00::10", last="fd00::ffff", next_hex=f"{0xFD00 << 112 | 0x10:032x}",
        )
    )  # fmt: skip
    conn.execute(
        insert(t.image).values(
            id=1, name="i", format="raw", architecture="x86_64", sha256="0" * 64, size_bytes=1, virtual_size_mib=1
        )
    )
    conn.execute(
        insert(t.host).values(
            id=1, name="h1", rack_id=1, vrf_id=1, address="192.0.2.1", port=7443, enrolled_at=NOW, last_seen_at=NOW
        )
    )
    assert report(conn, ledger(), 1)


def report(conn: Connection, host: Ledger, sequence: int) -> bool:
    said = HostReport(
        host="h1", boot_id="b", agent_version="1", api_version=1, capabilities=("vm-policies",),
        architecture="x86_64", domain_type="fake", libvirt_version="", qemu_version="", kernel_version="",
        cells=host.cells(), disk_mib=10**6, disk_free_mib=10**6, bridges=("br0",), vms=(),
    )  # fmt: skip
    after = MessageId(1, sequence - 1) if sequence > 1 else None
    return apply_report(conn, NewReport(1, MessageId(1, sequence), said.digest(), said, after), now=NOW)


def planned(conn: Connection, shape: Shape, ids: Sequence[UUID]) -> tuple[Placement, ...]:
    fleet = load_fleet(conn, now=NOW, silent_after_s=30)
    asked = [(vm_id, f"v{vm_id.hex[:12]}") for vm_id in ids]
    return plan(fleet, PlanRequest.alike(asked, shape, "x86_64", capabilities=frozenset({"vm-policies"}))).placed


def commit(conn: Connection, shape: Shape, places: Sequence[Placement]) -> None:
    for place in places:
        conn.execute(
            insert(t.vm).values(
                id=place.vm_id, name=place.name, record="creating", flavor="f", image_id=1, vcpus=shape.vcpus,
                memory_mib=shape.memory_mib, disk_mib=1, labels={}, created_at=NOW, operation_id="op",
                numa=shape.numa.model_dump(mode="json", exclude_defaults=True), nvme_drives=shape.nvme,
            )
        )  # fmt: skip
    reserve(conn, places)


def used(conn: Connection) -> list[dict[str, int]]:
    rows = conn.execute(select(t.host_cell).order_by(t.host_cell.c.cell))
    return [{each: row._mapping[used_column(each).name] for each in CELL_RESOURCES} for row in rows]


def test_a_report_says_what_there_is_of_everything(database: Database) -> None:
    with database.write() as conn:
        a_host(conn)
        rows = conn.execute(select(t.host_cell)).all()
    whole = [{each: row._mapping[whole_column(each).name] for each in CELL_RESOURCES} for row in rows]
    ordinary_mib = 16384 - 512 - 2 * 1024 - 4 * 1024
    per_cell = {"cores": 5, "memory_mib": ordinary_mib, "shared_vcpus": 8, "pages_2m": 1024, "pages_1g": 4, "nvme": 0}
    assert whole == [per_cell] * 2
    assert [row.shared_cpus for row in rows] == [4, 4]


def test_a_mix_of_policies_fills_a_host_as_far_as_the_host_admits_and_is_given_back_whole(database: Database) -> None:
    host, ids = ledger(), []
    with database.write() as conn:
        a_host(conn)
        for shape in MIX * 3:
            places = planned(conn, shape, [uuid4(), uuid4()])
            commit(conn, shape, places)
            for place in places:
                host.reserve(Claim(place.vm_id, place.name, shape.vcpus, shape.memory_mib, 1, place.cells, shape.numa))
                ids.append(place.vm_id)
        cells = host.cells()
        held = used(conn)
    assert [cell.shared_vcpus - cell.shared_vcpus_free for cell in cells] == [each["shared_vcpus"] for each in held]
    assert [cell.huge_pages[1].pages - cell.huge_pages[1].pages_free for cell in cells] == [
        each["pages_1g"] for each in held
    ]
    assert [cell.cores - cell.cores_reserved - cell.cores_free for cell in cells] == [each["cores"] for each in held]
    with database.write() as conn:
        assert report(conn, host, 2), "a report with everything in use changes nothing of what is held"
        assert used(conn) == held
        assert release(conn, ids) == len(ids) > 6
        assert used(conn) == [dict.fromkeys(CELL_RESOURCES, 0)] * 2


@pytest.mark.parametrize("shape", [Shape(4, 64, 1, SHARED), Shape(2, 2048, 1, LARGE_PAGES), Shape(10, 64, 1, ACROSS)])
def test_room_that_another_took_after_the_plan_is_a_lost_race(database: Database, shape: Shape) -> None:
    with database.write() as conn:
        a_host(conn)
        stale = planned(conn, shape, [uuid4()])
        while places := planned(conn, shape, [uuid4()]):
            commit(conn, shape, places)
        before = used(conn)
    with pytest.raises(LostRaceError), database.write() as conn:
        commit(conn, shape, stale)
    with database.read() as conn:
        assert used(conn) == before


def test_a_vm_of_another_size_keeps_its_drives(database: Database) -> None:
    small = Shape(2, 1000, 1, nvme=1)
    with database.write() as conn:
        a_host(conn)
        conn.execute(update(t.host_cell).values(nvme=1))
        (place,) = places = planned(conn, small, [uuid4()])
        commit(conn, small, places)
        sizes.begin(conn, place.vm_id, Size(vcpus=4, memory_mib=2000))
        held = used(conn)[place.cells[0]]
        assert (held["cores"], held["memory_mib"], held["nvme"]) == (2, 2000, 1)
        assert release(conn, [place.vm_id]) == 1
        assert used(conn) == [dict.fromkeys(CELL_RESOURCES, 0)] * 2


def test_a_cell_that_is_gone_stays_while_vms_hold_its_pages(database: Database) -> None:
    with database.write() as conn:
        a_host(conn)
        (place,) = places = planned(conn, MIX[0], [uuid4()])
        commit(conn, MIX[0], places)
        lone = Ledger(declare_topology("sockets=1,cores=8,threads=2,memory_mib=16384"), 10**6)
        gone = [cell.model_copy(update={"cell": 7}) for cell in lone.cells()]
        said = HostReport.model_validate(
            {
                "host": "h1", "boot_id": "b", "agent_version": "1", "api_version": 1, "capabilities": [],
                "architecture": "x86_64", "domain_type": "fake", "libvirt_version": "", "qemu_version": "",
                "kernel_version": "", "cells": gone, "disk_mib": 1, "disk_free_mib": 1, "bridges": [], "vms": [],
            }
        )  # fmt: skip
        assert apply_report(conn, NewReport(1, MessageId(1, 2), said.digest(), said, MessageId(1, 1)), now=NOW)
        rows = conn.execute(select(t.host_cell).order_by(t.host_cell.c.cell)).all()
    assert [(row.cell, row.shared_vcpus, row.shared_vcpus_used) for row in rows] == [(place.cells[0], 0, 4), (7, 0, 0)]


def test_drives_over_cells_are_counted_near_each(database: Database) -> None:
    """As many near each, rounded up, as the host gives them; and read again as they were asked for."""
    across = Shape(12, 1000, 1, ACROSS, nvme=3)
    with database.write() as conn:
        a_host(conn)
        conn.execute(update(t.host_cell).values(nvme=3))
        (place,) = places = planned(conn, across, [uuid4()])
        commit(conn, across, places)
        assert [each["nvme"] for each in used(conn)] == [2, 2]
        (host,) = load_fleet(conn, now=NOW, silent_after_s=30).hosts
        assert [vm.profile.shape for vm in host.vms] == [across]
        assert planned(conn, Shape(4, 1000, 1, ACROSS, nvme=3), [uuid4()]) == (), "one is left near each"
        assert release(conn, [place.vm_id]) == 1
        assert used(conn) == [dict.fromkeys(CELL_RESOURCES, 0)] * 2
