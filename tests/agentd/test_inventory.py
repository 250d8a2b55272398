# SPDX-License-Identifier: Apache-2.0
"""The machine's parts, of a made-up tree and of this machine; and free space that stays the same while it does."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ppec_agentd.inventory import Inventory, read_cpu, read_drives, read_nics, steady
from ppec_agentd.report import ReportSource
from ppec_contract.host import CpuReport, DriveReport, NicReport

PCI = "sys/devices/pci0000:00/0000:00:1f.0"


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def link(root: Path, name: str, target: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(root / target)


def test_drives_are_those_of_the_machine(tmp_path: Path) -> None:
    nvme = {"model": "FAST 1\n", "serial": " NVME0001 \n", "numa_node": "-1"}
    write(tmp_path, **{f"{PCI}/numa_node": "1\n"}, **{f"{PCI}/nvme/nvme0/{k}": v for k, v in nvme.items()})
    link(tmp_path, "sys/block/nvme0n1/device", f"{PCI}/nvme/nvme0")
    write(tmp_path, **{"sys/block/nvme0n1/size": "4194304\n", "sys/block/nvme0n1/queue/rotational": "0\n"})
    write(tmp_path, **{"sys/devices/ata/sda/model": "SLOW\x1b[2J 2", "sys/devices/ata/sda/wwid": "naa.5"})
    link(tmp_path, "sys/block/sda/device", "sys/devices/ata/sda")
    write(tmp_path, **{"sys/block/sda/size": "2048", "sys/block/sda/queue/rotational": "1"})
    write(tmp_path, **{"sys/block/loop0/size": "8", "sys/block/dm-0/size": "8"})
    assert list(read_drives(tmp_path)) == [
        DriveReport(name="nvme0n1", size_mib=2048, rotational=False, model="FAST 1", serial="NVME0001", cell=1),
        DriveReport(name="sda", size_mib=1, rotational=True, model="SLOW[2J 2", serial="naa.5", cell=None),
    ]


def test_nics_are_those_of_the_machine_and_bonds(tmp_path: Path) -> None:
    net = "sys/class/net"
    write(tmp_path, **{f"{PCI}/numa_node": "0\n"})
    link(tmp_path, f"{net}/eth0/device", PCI)
    link(tmp_path, f"{net}/eth0/master", f"{net}/bond0")
    write(tmp_path, **{f"{net}/eth0/address": "52:54:00:00:00:01", f"{net}/eth0/speed": "25000"})
    write(tmp_path, **{f"{net}/eth0/operstate": "up", f"{net}/bond0/bonding/slaves": "eth0"})
    write(tmp_path, **{f"{net}/bond0/speed": "-1", f"{net}/bond0/operstate": "down", f"{net}/vnet0/operstate": "up"})
    assert list(read_nics(tmp_path)) == [
        NicReport(name="bond0", mac="", state="down", speed_mbit=None, master="", cell=None),
        NicReport(name="eth0", mac="52:54:00:00:00:01", state="up", speed_mbit=25000, master="bond0", cell=0),
    ]


def test_cpus(tmp_path: Path) -> None:
    write(tmp_path, **{"proc/cpuinfo": "processor: 0\nmodel name : A CPU\n"})
    for cpu in range(8):
        figures = {"physical_package_id": cpu // 4, "core_id": cpu // 2, "die_id": 0}
        topology = f"sys/devices/system/cpu/cpu{cpu}/topology"
        write(tmp_path, **{f"{topology}/{name}": f"{value}\n" for name, value in figures.items()})
    assert read_cpu(tmp_path) == CpuReport(model="A CPU", sockets=2, cores=4, threads=8)


def test_a_bare_tree_has_nothing(tmp_path: Path) -> None:
    parts = Inventory((tmp_path / "none",), tmp_path).read()
    assert (parts.cpu, parts.drives, parts.file_systems, parts.nics) == (CpuReport(), (), (), ())


@given(st.integers(1, 10**8), st.lists(st.floats(0, 1), min_size=1))
def test_what_is_said_to_be_free_is_near_the_truth_and_rests(size_mib: int, shares: list[float]) -> None:
    said = None
    for free_mib in (int(share * size_mib) for share in shares):
        before, said = said, steady(said, free_mib, size_mib)
        step = max(1, size_mib // 32)
        assert abs(said - free_mib) < step
        # It changes only when it has to.
        assert said == before or before is None or abs(before - free_mib) >= step


def test_a_write_or_two_is_no_new_report(settings: Any, words: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            inventory = Inventory((agent.context.vms_dir, settings.storage.images))
            source = ReportSource("h1", agent.context, inventory)
            first = await source.build()
            (file_system,) = first.file_systems
            assert file_system.path == str(agent.context.vms_dir)
            assert 0 <= file_system.free_mib <= file_system.size_mib
            assert first.cpu is not None
            assert first.cpu.threads > 0
            (agent.context.vms_dir.parent / "note").write_bytes(b"x" * 5_000_000)
            assert (await source.build()).file_systems == first.file_systems

    asyncio.run(scenario())
