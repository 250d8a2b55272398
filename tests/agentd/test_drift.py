# SPDX-License-Identifier: Apache-2.0
"""Drift: what somebody changed by hand is found, each kind for itself; what was ordered is not."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from structlog.testing import capture_logs

from ppec_agentd.drift import HostLook, find_drift
from ppec_agentd.hypervisor import Domain, DomainMetadata, ObservedDisk
from ppec_agentd.ledger import Finding, FindingKind
from ppec_agentd.observed import vm_info
from ppec_agentd.places import Places, Pool
from ppec_agentd.report import ReportSource
from ppec_contract.host import Drift, DriftKind
from ppec_contract.vm import VcpuPin, VmInfo, VmState
from ppec_contract.words import MAX_DRIFT

VMS, IMAGES, ID, OTHER = Path("/s/vms"), Path("/s/images"), UUID(int=7), UUID(int=9)
PINS = (VcpuPin(vcpu=0, pcpu=2), VcpuPin(vcpu=1, pcpu=3))
GRANTED = DomainMetadata(
    vm_id=ID,
    name="web",
    operation_id="op",
    cells=(1,),
    vcpus=2,
    memory_mib=512,
    disk_mib=10,
    image_sha256="0" * 64,
    pins=PINS,
)
DOMAIN = Domain(
    vm_id=ID,
    name="web",
    state=VmState.RUNNING,
    vcpus=2,
    memory_mib=512,
    pins=PINS,
    memory_cells=(1,),
    metadata=GRANTED,
    disks=(ObservedDisk(f"/s/vms/{ID}/root.qcow2"), ObservedDisk("/s/images/a.qcow2")),
)
FAST = Path("/fast")
PLACES = Places(VMS, {"fast": Pool("fast", FAST)})
HERE = {VMS: (str(ID),), FAST: ()}
LOOK = HostLook((DOMAIN,), PLACES, IMAGES, expected={ID: "web"}, folders=HERE, disks=frozenset({str(ID)}))


def look(domain: Domain) -> HostLook:
    return replace(LOOK, domains=(domain,))


def moved(*pcpus: int) -> tuple[VcpuPin, ...]:
    return tuple(VcpuPin(vcpu=vcpu, pcpu=pcpu) for vcpu, pcpu in enumerate(pcpus))


PENDING = replace(GRANTED, pending=True, vcpus=4, pins=(*PINS, *moved(0, 0, 4, 5)[2:]))
AUDITED = Finding(FindingKind.PINS_OVERLAP, ID, "web", found=(3, 2), others=(UUID(int=8),))
STRANGE_DISK = (*DOMAIN.disks, ObservedDisk("/mnt/x.img"))
IN_FAST = (ObservedDisk(f"/fast/{ID}/root.qcow2"), ObservedDisk(f"/s/vms/{ID}/seed.iso"))
POOLED = replace(DOMAIN, metadata=replace(GRANTED, pool="fast"), disks=IN_FAST)
BOTH = {VMS: (str(ID),), FAST: (str(ID),)}

CASES: list[tuple[HostLook, DriftKind, str, str]] = [
    (look(replace(DOMAIN, metadata=None)), DriftKind.MADE_BY_HAND, "", "2 vCPUs, 512 MiB"),
    (look(replace(DOMAIN, name="web2")), DriftKind.NAME, "web", "web2"),
    (look(replace(DOMAIN, vcpus=1)), DriftKind.VCPUS, "2", "1"),
    (look(replace(DOMAIN, metadata=PENDING, vcpus=6)), DriftKind.VCPUS, "4", "6"),
    (look(replace(DOMAIN, memory_mib=1024)), DriftKind.MEMORY, "512 MiB", "1024 MiB"),
    (look(replace(DOMAIN, pins=moved(3, 2))), DriftKind.PINS, "0:2 1:3", "0:3 1:2"),
    (look(replace(DOMAIN, pins=())), DriftKind.PINS, "0:2 1:3", "none"),
    (look(replace(DOMAIN, memory_cells=(0, 1))), DriftKind.MEMORY_CELLS, "1", "0,1"),
    (look(replace(DOMAIN, memory_cells=())), DriftKind.MEMORY_CELLS, "1", "any"),
    (look(replace(DOMAIN, disks=STRANGE_DISK)), DriftKind.DISKS, f"/s/vms/{ID}/root.qcow2", "/mnt/x.img"),
    (look(replace(DOMAIN, disks=())), DriftKind.DISKS, f"/s/vms/{ID}/root.qcow2", "detached"),
    (replace(LOOK, domains=()), DriftKind.DOMAIN_REMOVED, "defined", "its disk is there"),
    (replace(LOOK, domains=(), folders={}, disks=frozenset()), DriftKind.DOMAIN_REMOVED, "defined", "its disk is gone"),
    (replace(LOOK, domains=(), expected={}), DriftKind.ORPHANED_DISK, "", f"/s/vms/{ID}"),
    (replace(LOOK, folders={VMS: (str(ID), "keep")}), DriftKind.ORPHANED_DISK, "", "/s/vms/keep"),
    (
        replace(LOOK, domains=(), folders=BOTH, disks=frozenset()),
        DriftKind.DOMAIN_REMOVED,
        "defined",
        "its disk is gone",
    ),
    (replace(LOOK, folders=BOTH), DriftKind.ORPHANED_DISK, "", f"/fast/{ID}"),
    (replace(LOOK, folders=HERE | {FAST: (str(OTHER),)}), DriftKind.ORPHANED_DISK, "", f"/fast/{OTHER}"),
    (look(replace(POOLED, disks=IN_FAST[1:])), DriftKind.DISKS, f"/fast/{ID}/root.qcow2", "detached"),
    (look(replace(POOLED, disks=DOMAIN.disks)), DriftKind.DISKS, f"/fast/{ID}/root.qcow2", "detached"),
    (look(replace(DOMAIN, disks=IN_FAST)), DriftKind.DISKS, f"/s/vms/{ID}/root.qcow2", f"/fast/{ID}/root.qcow2"),
    (
        look(replace(POOLED, metadata=replace(GRANTED, pool="gone"))),
        *(DriftKind.DISKS, "in storage pool gone", "this host has no such pool any more"),
    ),
    (replace(LOOK, audit=(AUDITED,)), DriftKind.PINS_OVERLAP, "", f"on CPUs 2,3 of {UUID(int=8)}"),
    (look(replace(DOMAIN, metadata=PENDING, pins=moved(2, 9))), DriftKind.PINS, "0:2 1:3 2:4 3:5", "0:2 1:9"),
]


@pytest.mark.parametrize(("seen", "kind", "before", "after"), CASES, ids=[f"{c[1]}-{c[3]}" for c in CASES])
def test_each_difference_is_found_and_nothing_beside_it(
    seen: HostLook, kind: DriftKind, before: str, after: str
) -> None:
    (drift,) = find_drift(seen)
    assert (drift.kind, drift.before, drift.after) == (kind, before, after)
    # Of what is being changed by order nothing is said.
    if drift.vm_id is not None:
        assert find_drift(replace(seen, busy=frozenset({drift.vm_id}))) == ()


@pytest.mark.parametrize(
    "seen",
    [
        LOOK,
        look(replace(DOMAIN, state=VmState.STOPPED)),
        look(replace(DOMAIN, metadata=PENDING)),
        replace(LOOK, folders={}),
        replace(LOOK, domains=(POOLED,), folders=BOTH),
        replace(LOOK, audit=(Finding(FindingKind.UNKNOWN_DOMAIN, ID, "web"),)),
    ],
    ids=[
        "as-granted",
        "stopped",
        "before-its-next-start",
        "no-folder-listed",
        "in-a-pool",
        "audit-of-another",
    ],
)
def test_what_was_ordered_is_no_drift(seen: HostLook) -> None:
    assert find_drift(seen) == ()


def test_every_kind_is_seen() -> None:
    assert {kind for _, kind, _, _ in CASES} | {DriftKind.PINS_RESERVED} == set(DriftKind)
    reserved = Finding(FindingKind.PINS_RESERVED, ID, "web", found=(0,))
    assert [drift.kind for drift in find_drift(replace(LOOK, audit=(reserved,)))] == [DriftKind.PINS_RESERVED]


def kinds(drift: tuple[Drift, ...]) -> list[str]:
    return [found.kind for found in drift]


def test_an_agents_own_doings_are_no_drift_and_others_are(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            source = ReportSource("h1", agent.context)
            first, second = vm(), vm()
            await agent.create(first, second)
            report = await source.build()
            assert report.drift == ()
            # Changed and put right again by hand.
            whole = await agent.hypervisor.domain(first.vm_id)
            assert whole is not None
            with capture_logs() as logs:
                agent.hypervisor.make_by_hand(replace(whole, memory_mib=9))
                drifted = await source.build()
                agent.hypervisor.make_by_hand(whole)
                assert (await source.build()).digest() == report.digest()
            assert [(d.kind, d.vm_id, d.after) for d in drifted.drift] == [("memory", first.vm_id, "9 MiB")]
            assert drifted.digest() != report.digest()
            assert [line["event"] for line in logs if "drift" in line["event"]] == ["drift_found", "drift_over"]
            # Removed by hand, and its disk after it; deleted by order.
            await agent.hypervisor.destroy(first.vm_id)
            await agent.hypervisor.undefine(first.vm_id)
            assert kinds((await source.build()).drift) == ["domain_removed"]
            await agent.delete(second.vm_id, operation="op-2")
            assert kinds((await source.build()).drift) == ["domain_removed"]
            # An agent that begins anew knows it from the journal; once it is deleted by order, all is well.
            again = ReportSource("h1", agent.context)
            assert kinds((await again.build()).drift) == ["domain_removed"]
            await agent.delete(first.vm_id, operation="op-3")
            assert (await again.build()).drift == (await source.build()).drift == ()

    asyncio.run(scenario())


def test_nothing_of_a_create_under_way_is_drift(settings: Any, words: Any, vm: Any) -> None:
    """Looked at all the while, with every step slow: half-made VMs, and half-deleted ones, are no news."""

    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            agent.hypervisor.faults.delays_s.update({"define": 0.02, "start": 0.02, "undefine": 0.02, "domains": 0.005})
            source, looks, found = ReportSource("h1", agent.context), 0, []
            vms = [vm() for _ in range(4)]

            async def work() -> None:
                for one in vms:
                    await agent.create(one, operation=f"make-{one.name}")
                for one in vms:
                    await agent.delete(one.vm_id, operation=f"unmake-{one.name}")

            working = asyncio.create_task(work())
            while not working.done():
                found += (await source.build()).drift
                looks += 1
            await working
            assert looks > len(vms)
            assert found == []
            assert (await source.build()).drift == ()

    asyncio.run(scenario())


def test_a_folder_nobody_knows_is_an_orphan_and_stays(settings: Any, words: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            orphan = agent.context.vms_dir / str(uuid4())
            orphan.mkdir()
            (drift,) = (await ReportSource("h1", agent.context).build()).drift
            assert (drift.kind, drift.name, drift.after) == ("orphaned_disk", orphan.name, str(orphan))
            assert orphan.is_dir()

    asyncio.run(scenario())


def test_drift_of_any_names_and_of_any_amount_can_be_told() -> None:
    """What somebody made by hand has the name they gave it, and a folder's name may be any bytes."""
    by_hand = replace(DOMAIN, vm_id=UUID(int=8), metadata=None, name="a\nb\x1b" + "x" * 500)
    elsewhere = tuple(ObservedDisk(f"/mnt/{'y' * 200}/{number}") for number in range(50))
    strange = replace(
        LOOK, domains=(replace(DOMAIN, disks=elsewhere), by_hand), folders={VMS: (str(ID), "\udcff\udcfe")}
    )
    told = find_drift(strange)
    assert [drift.kind for drift in told] == ["orphaned_disk", "disks", "made_by_hand"]
    assert [drift.name[:4] for drift in told] == ["??", "web", "a b?"]
    assert all(Drift.model_validate_json(drift.model_dump_json()) == drift for drift in told)
    endless = replace(by_hand, vcpus=2**40, memory_mib=2**40, max_memory_mib=2**60, pins=PINS * 5000)
    seen = vm_info(endless)
    assert VmInfo.model_validate_json(seen.model_dump_json()) == seen
    many = replace(LOOK, folders={VMS: tuple(f"left-{number:05}" for number in range(2 * MAX_DRIFT))})
    assert len(find_drift(many)) == MAX_DRIFT
