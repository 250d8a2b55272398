# SPDX-License-Identifier: Apache-2.0
"""`ppec host show`: what a host says of itself, in lines that a reader understands."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from ppec_contract.api_hosts import HostView
from ppec_contract.host import (
    CellReport,
    CpuReport,
    Drift,
    DriftKind,
    DriveReport,
    FileSystemReport,
    HealthFinding,
    HealthLevel,
    HostUse,
    HugePagesReport,
    NicReport,
    PoolReport,
    VmUse,
)

ROOM = {"threads_per_core": 2, "cores": 16, "cores_reserved": 1, "cores_free": 10}
MEMORY = {"memory_mib": 65536, "memory_reserved_mib": 4096, "memory_free_mib": 30000}
HOST = HostView(
    name="h1", rack="r1", cluster="c1", datacentre="d1", vrf="blue", address="10.0.0.1", port=7443, liveness="up",
    draining=True, labels={"disk": "ssd", "gpu": ""}, capabilities=("nvme-drives", "storage-pools"),
    cells=(
        CellReport(
            cell=0, socket=0, **ROOM, **MEMORY, nvme_drives=2, nvme_drives_free=1, cores_shared=3, shared_vcpus=12,
            shared_vcpus_free=4,
            huge_pages=(
                HugePagesReport(size_kib=2048, pages=1024, pages_free=512),
                HugePagesReport(size_kib=64, pages=8, pages_free=0),
            ),
        ),
        CellReport(cell=1, socket=1, **ROOM | {"threads_per_core": 1}, **MEMORY),
    ),
    disk_mib=400_000, disk_free_mib=300_000, bridges=("br0", "br1"), vm_count=3,
    last_seen_at=datetime(2026, 11, 20, 12, tzinfo=UTC), health_level=HealthLevel.OK, drift_count=2,
    cpu=CpuReport(model="EPYC", sockets=2, cores=32, threads=64),
    drives=(
        DriveReport(name="nvme0n1", size_mib=1_000_000, rotational=False, model="Fast", serial="S1", cell=0),
        DriveReport(name="sda", size_mib=500, rotational=True),
    ),
    file_systems=(FileSystemReport(path="/var/lib/ppec", size_mib=400_000, free_mib=300_000),),
    nics=(
        NicReport(name="eth0", mac="52:54:00:00:00:01", state="up", speed_mbit=10_000, master="br0", cell=0),
        NicReport(name="eth1", mac="52:54:00:00:00:02", state="down"),
    ),
    pools=(PoolReport(name="ssd", size_mib=20_000, free_mib=8000), PoolReport(name="hdd", size_mib=500, free_mib=0)),
    health=(HealthFinding(check="clock", level=HealthLevel.OK, found="in step"),),
    drift=(
        Drift(kind=DriftKind.PINS, name="web", before="0-1", after="2-3"),
        Drift(kind=DriftKind.MADE_BY_HAND, vm_id=UUID(int=1)),
    ),
    use=HostUse(
        memory_available_mib=4000, free_mib={"/var/lib/ppec": 299_999},
        vms=(VmUse(vm_id=UUID(int=7), cpu_time_ms=1234, memory_mib=512, disk_mib=3),),
    ),
)  # fmt: skip


@pytest.fixture
def shown(orchestrator: Any, ppec: Any) -> list[str]:
    orchestrator.resources["hosts"] = [HOST.model_dump(mode="json")]
    ran = ppec("host", "show", "h1")
    assert ran.code == 0, ran.err
    return [" ".join(line.split()) for line in ran.out.splitlines()]


@pytest.mark.parametrize(
    "line",
    [
        "draining yes",
        "labels disk=ssd, gpu",
        "cells cell 0 of socket 0: 10 of 16 cores free (1 reserved), 2 threads per core,",
        "30000 of 65536 MiB of memory free (4096 reserved), 512 of 1024 huge pages of 2 MiB free,",
        "0 of 8 huge pages of 64 KiB free, 3 cores shared, 4 of 12 sharing vCPUs free, 1 of 2 NVMe drives free",
        "cell 1 of socket 1: 10 of 16 cores free (1 reserved), 1 thread per core,",
        "bridges br0, br1",
        "cpu EPYC: 2 sockets, 32 cores, 64 threads",
        "drives nvme0n1: 1000000 MiB, Fast, serial number S1, near cell 0",
        "sda: 500 MiB, rotational",
        "file systems /var/lib/ppec: 300000 of 400000 MiB free",
        "nics eth0: up, 10000 Mbit/s, 52:54:00:00:00:01, of br0, near cell 0",
        "eth1: down, 52:54:00:00:00:02",
        "pools ssd: 8000 of 20000 MiB free",
        "hdd: 0 of 500 MiB free",
        "health clock: ok, in step",
        "drift pins (web): 0-1 before, 2-3 now",
        f"made by hand ({UUID(int=1)})",
        "use 4000 MiB of memory available",
        "/var/lib/ppec: 299999 MiB free",
        f"vm {UUID(int=7)}: 1.2 s of CPU time, 512 MiB of memory, 3 MiB of disk",
    ],
)
def test_a_host_is_shown_in_lines_for_a_reader(shown: list[str], line: str) -> None:
    # What is wider than a table's column goes on in the next line.
    assert f" {line} " in f" {' '.join(shown)} "


def test_nothing_of_a_host_is_shown_as_python_or_json(shown: list[str]) -> None:
    for raw in ("_mib", "{", "[", "True", "False", "None", "'"):
        assert not [line for line in shown if raw in line]


def test_what_changes_a_host_shows_it_as_well(orchestrator: Any, ppec: Any) -> None:
    orchestrator.resources["hosts"] = [HOST.model_dump(mode="json")]
    for command in (("host", "drain", "h1"), ("host", "label", "h1", "a=b")):
        assert "8000 of 20000 MiB free" in ppec(*command).out
    assert HostView.model_validate(ppec("host", "show", "h1", "-o", "json").json) == HOST


def test_a_host_that_said_nothing_yet_is_shown(orchestrator: Any, ppec: Any) -> None:
    bare = {"name", "rack", "cluster", "datacentre", "vrf", "address", "port", "liveness", "draining"}
    orchestrator.resources["hosts"] = [HOST.model_dump(mode="json", include=bare)]
    lines = [" ".join(line.split()) for line in ppec("host", "show", "h1").out.splitlines()]
    assert {"labels -", "cells -", "cpu -", "pools -", "use -"} <= set(lines)
