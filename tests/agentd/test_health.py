# SPDX-License-Identifier: Apache-2.0
"""Health: every check at every level it has, read from made-up trees, and told when its level changes."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from structlog.testing import capture_logs

from ppec_agentd.health import (
    LOOKS_BEFORE_BETTER,
    Change,
    ClockFigures,
    DriveFigures,
    EccFigures,
    FileSystemFigures,
    HealthBook,
    HealthFigures,
    LibvirtFigures,
    MemoryFigures,
    judge,
)
from ppec_agentd.health_figures import read_drives, read_ecc, read_figures, read_memory
from ppec_agentd.health_watch import HealthWatch
from ppec_agentd.vm_use import read_vm_use
from ppec_contract.errors import PpecError
from ppec_contract.host import HealthFinding, HealthLevel, VmUse
from ppec_contract.words import MAX_CHECKS

OK, NOTE, WARNING, ERROR = HealthLevel
WELL = HealthFigures(
    file_systems=(FileSystemFigures("/v", 100_000, 50_000),),
    memory=MemoryFigures(65536, 30000, 0.0),
    ecc=EccFigures(3, 0),
    drives=(DriveFigures("nvme0", "live", 40, 85), DriveFigures("sda", "running")),
    clock=ClockFigures(synchronised=True, worst_error_s=0.01),
    libvirt=LibvirtFigures(0.002),
    vm_drives={"0000:3b:00.0": ""},
)


def disk(free_mib: int, size_mib: int = 100_000) -> dict[str, Any]:
    return {"file_systems": (FileSystemFigures("/v", size_mib, free_mib),)}


CASES: list[tuple[dict[str, Any], str, HealthLevel]] = [
    (disk(9_999), "disk-space /v", WARNING),
    (disk(1_999), "disk-space /v", ERROR),
    (disk(1500, 10_000), "disk-space /v", WARNING),
    (disk(255, 1_000), "disk-space /v", ERROR),
    ({"memory": MemoryFigures(65536, 3000, 0.0)}, "memory", WARNING),
    ({"memory": MemoryFigures(65536, 1000, 0.0)}, "memory", ERROR),
    ({"memory": MemoryFigures(65536, 30000, 10.0)}, "memory-pressure", WARNING),
    ({"memory": MemoryFigures(65536, 30000, 40.0)}, "memory-pressure", ERROR),
    ({"memory": MemoryFigures(65536, 30000)}, "memory-pressure", NOTE),
    ({"ecc": EccFigures(100, 0)}, "ecc", WARNING),
    ({"ecc": EccFigures(0, 1)}, "ecc", ERROR),
    ({"ecc": None}, "ecc", NOTE),
    ({"drives": (DriveFigures("nvme0", "dead", 40, 85),)}, "drive nvme0", ERROR),
    ({"vm_drives": {"0000:3b:00.0": "it is mounted on /srv"}}, "vm-drive 0000:3b:00.0", ERROR),
    ({"drives": (DriveFigures("sda", "offline"),)}, "drive sda", ERROR),
    ({"drives": (DriveFigures("nvme0", "live", 85, 85),)}, "drive nvme0", WARNING),
    ({"clock": ClockFigures()}, "clock", WARNING),
    ({"clock": ClockFigures(synchronised=True, worst_error_s=1.1)}, "clock", WARNING),
    ({"clock": ClockFigures(problem="Operation not permitted")}, "clock", NOTE),
    ({"libvirt": LibvirtFigures(1.1)}, "libvirt", WARNING),
    ({"libvirt": LibvirtFigures(problem="no answer within 5 s")}, "libvirt", ERROR),
]


def test_a_host_that_is_well_is_said_to_be() -> None:
    findings = judge(WELL)
    assert {finding.level for finding in findings} == {OK}
    assert [f.check for f in findings] == sorted(f.check for f in findings)
    assert len(findings) == 9


@pytest.mark.parametrize(("changes", "check", "level"), CASES, ids=[f"{c}-{level}" for _, c, level in CASES])
def test_each_trouble_is_one_checks_and_no_others(changes: dict[str, Any], check: str, level: HealthLevel) -> None:
    other = {finding.check: finding.level for finding in judge(replace(WELL, **changes)) if finding.level is not OK}
    assert other == {check: level}


def test_what_is_said_is_bounded_and_what_is_too_much_is_the_worst() -> None:
    told = judge(
        replace(
            WELL,
            libvirt=LibvirtFigures(problem="lost:\n" + "x" * 10_000),
            drives=tuple(DriveFigures(f"sd{number:04}", "running") for number in range(2 * MAX_CHECKS)),
            file_systems=(FileSystemFigures("/" + "v" * 1000, 1000, 500),),
        )
    )
    assert len(told) == MAX_CHECKS
    (libvirt,) = (finding for finding in told if finding.level is ERROR)
    assert (libvirt.check, libvirt.found[:7]) == ("libvirt", "lost: x")
    assert all(HealthFinding.model_validate_json(one.model_dump_json()) == one for one in told)


def finding(level: HealthLevel, found: str = "") -> tuple[HealthFinding, ...]:
    return (HealthFinding(check="c", level=level, found=found),)


def test_worse_is_said_at_once_and_better_when_it_lasts() -> None:
    book = HealthBook()
    assert book.enter(finding(OK, "1")) == (Change(finding(OK, "1")[0], None),)
    assert book.enter(finding(OK, "2")) == ()
    assert book.findings == finding(OK, "1")
    assert book.enter(finding(ERROR, "3")) == (Change(finding(ERROR, "3")[0], OK),)
    for _ in range(LOOKS_BEFORE_BETTER - 1):
        assert book.enter(finding(OK)) == ()
    # Once more in trouble: the looks that were well count no more.
    assert book.enter(finding(ERROR, "4")) == ()
    for _ in range(LOOKS_BEFORE_BETTER - 1):
        assert book.enter(finding(WARNING)) == ()
    assert book.enter(finding(OK, "5")) == (Change(finding(OK, "5")[0], ERROR),)
    assert book.enter(()) == ()
    assert book.findings == ()


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_memory_and_its_pressure(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": "MemTotal:  2048000 kB\nMemFree: 1 kB\nMemAvailable:   1024000 kB\n"})
    assert read_memory(tmp_path) == MemoryFigures(2000, 1000, None)
    pressure = "some avg10=9.00 avg60=8.00 avg300=7.00 total=1\nfull avg10=3.00 avg60=2.50 avg300=1.00 total=1\n"
    write(tmp_path, {"proc/pressure/memory": pressure})
    assert read_memory(tmp_path).stalled_percent == 2.5


def test_errors_of_all_memory_controllers(tmp_path: Path) -> None:
    edac = "sys/devices/system/edac/mc"
    assert read_ecc(tmp_path) is None
    for number in range(2):
        write(tmp_path, {f"{edac}/mc{number}/ce_count": f"{number + 4}\n", f"{edac}/mc{number}/ue_count": "1\n"})
    assert read_ecc(tmp_path) == EccFigures(9, 2)


def test_drives_by_the_kernels_word(tmp_path: Path) -> None:
    nvme = "sys/class/nvme/nvme0"
    write(
        tmp_path,
        {f"{nvme}/state": "live\n", f"{nvme}/hwmon3/temp1_input": "41850", f"{nvme}/hwmon3/temp1_crit": "84850"},
    )
    write(tmp_path, {"sys/class/nvme/nvme1/state": "dead\n", "sys/block/sda/device/state": "running\n"})
    write(tmp_path, {"sys/block/nvme0n1/device/state": "live\n", "sys/block/loop0/size": "1"})
    assert list(read_drives(tmp_path)) == [
        DriveFigures("nvme0", "live", 41.85, 84.85),
        DriveFigures("nvme1", "dead"),
        DriveFigures("sda", "running"),
    ]


def test_this_machine_has_figures(tmp_path: Path) -> None:
    figures = read_figures((tmp_path,), LibvirtFigures())
    assert figures.memory.total_mib > figures.memory.available_mib > 0
    assert [fs.path for fs in figures.file_systems] == [str(tmp_path)]
    assert figures.clock.problem or figures.clock.worst_error_s >= 0


def test_what_vms_use(tmp_path: Path) -> None:
    first, second = UUID(int=1), UUID(int=2)
    ticks = os.sysconf("SC_CLK_TCK")
    stat = f"77 (qemu-system-x86) S 1 {' '.join(['0'] * 9)} {3 * ticks} {ticks} 0 0"
    # Ordinary memory, and huge pages beside it.
    memory = "VmPeak:\t 9 kB\nVmRSS:\t   65536 kB\nRssAnon:\t 8 kB\nHugetlbPages:\t 2097152 kB\n"
    command = f"/usr/bin/qemu-system-x86_64\0-name\0x\0-uuid\0{first}\0"
    write(tmp_path, {"proc/77/stat": stat, "proc/77/cmdline": command, "proc/77/status": memory})
    # A QEMU without a name, and a program that only looks like one.
    write(tmp_path, {"proc/78/stat": stat.replace("77", "78"), "proc/78/cmdline": "qemu-img\0create\0"})
    write(tmp_path, {"proc/79/stat": "79 (bash) S", "proc/79/cmdline": command})
    write(tmp_path, {f"vms/{second}/root.qcow2": "x" * 3 * 2**20, "vms/keep/x": "y"})
    # Named like a VM, but not as the agent names one.
    write(tmp_path, {f"vms/{UUID(int=7).hex}/root.qcow2": "x" * 2**20})
    # Its seed and its disk are in two places.
    write(tmp_path, {f"vms/{first}/seed.iso": "x" * 2**20, f"fast/{first}/root.qcow2": "x" * 2 * 2**20})
    places = (tmp_path / "vms", tmp_path / "fast", tmp_path / "none")
    assert read_vm_use(places, tmp_path) == (
        VmUse(vm_id=first, cpu_time_ms=4000, memory_mib=2112, disk_mib=3),
        VmUse(vm_id=second, disk_mib=3),
    )
    assert read_vm_use((tmp_path / "none",), tmp_path / "none") == ()


def test_a_hypervisor_that_hangs_is_said_and_then_taken_back(settings: Any, words: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            changes: list[None] = []
            folders = agent.context.places, settings.storage.images
            watch = HealthWatch(agent.hypervisor, *folders, lambda: changes.append(None), probe_s=0.05)

            def libvirt() -> HealthFinding:
                (found,) = (finding for finding in watch.findings if finding.check == "libvirt")
                return found

            await watch.look()
            assert libvirt().level is OK
            assert len(changes) == 1
            agent.hypervisor.faults.delays_s["domain"] = 60.0
            with capture_logs() as logs:
                await watch.look()
            assert (libvirt().level, libvirt().found) == (ERROR, "no answer within 0.05 s")
            said = [line for line in logs if line.get("check") == "libvirt"]
            assert [(line["entered"], line["before"], line["log_level"]) for line in said] == [
                ("error", "ok", "warning")
            ]
            agent.hypervisor.faults.delays_s.clear()
            for _ in range(LOOKS_BEFORE_BETTER):
                await watch.look()
            assert libvirt().level is OK
            agent.hypervisor.faults.fail("domain", PpecError("hypervisor.unavailable", "no connection"))
            await watch.look()
            assert libvirt().found == "no connection"
            vitals = await watch.vitals()
            assert vitals.health == watch.findings
            assert vitals.use.free_mib.keys() == {str(settings.storage.vms)}

    asyncio.run(scenario())
