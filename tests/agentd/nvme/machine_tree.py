# SPDX-License-Identifier: Apache-2.0
"""A machine's NVMe drives as the kernel shows them, in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ONE, TWO = "0000:01:00.0", "0000:02:00.0"


@dataclass(frozen=True)
class MachineTree:
    """/sys, /proc and /dev, below `root`."""

    root: Path

    def write(self, path: str, text: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def link(self, path: str, target: str) -> None:
        link = self.root / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(self.root / target)

    def pci(self, address: str, *, group: int, device_class: str = "0x010802", cell: int = 0) -> None:
        """A device, alone in its IOMMU group or with those that were put there before; nobody drives it."""
        self.write(f"sys/bus/pci/devices/{address}/class", f"{device_class}\n")
        self.write(f"sys/bus/pci/devices/{address}/numa_node", f"{cell}\n")
        self.link(f"sys/bus/pci/devices/{address}/iommu_group", f"sys/kernel/iommu_groups/{group}")
        self.link(f"sys/kernel/iommu_groups/{group}/devices/{address}", f"sys/bus/pci/devices/{address}")

    def drive(self, address: str = ONE, *, number: int = 0, cell: int = 0, serial: str = "S1") -> None:
        """An NVMe drive at the host's driver, with a partition on its one namespace."""
        self.pci(address, group=10 + number, cell=cell)
        self.driven_by(address, "nvme")
        name = f"nvme{number}n1"
        self.write(f"sys/bus/pci/devices/{address}/nvme/nvme{number}/serial", f"{serial}  \n")
        (self.root / f"sys/bus/pci/devices/{address}/nvme/nvme{number}/{name}").mkdir()
        self.write(f"sys/class/block/{name}/dev", f"259:{2 * number}\n")
        self.write(f"sys/class/block/{name}/size", "8192\n")
        self.write(f"sys/class/block/{name}/{name}p1/partition", "1\n")
        self.write(f"sys/class/block/{name}/{name}p1/dev", f"259:{2 * number + 1}\n")
        self.write(f"dev/{name}", "\0" * 8192)

    def driven_by(self, address: str, driver: str) -> None:
        (self.root / "sys/bus/pci/drivers" / driver).mkdir(parents=True, exist_ok=True)
        self.link(f"sys/bus/pci/devices/{address}/driver", f"sys/bus/pci/drivers/{driver}")

    def mount(self, number: str, source: str, place: str) -> None:
        """A line of proc_pid_mountinfo(5)."""
        self.write("proc/1/mountinfo", f"36 35 {number} / {place} rw,noatime shared:1 - ext4 {source} rw\n")
