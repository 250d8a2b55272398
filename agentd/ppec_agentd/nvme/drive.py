# SPDX-License-Identifier: Apache-2.0
"""An NVMe drive as the host shows it, and the port to what is done to one.

Two adapters stand behind the port: `host_drives.HostDrives` and the fake hypervisor (`fake_nvme.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Protocol

from pydantic import StringConstraints

# As the kernel writes it: domain (of more than four digits only if it needs them), bus, slot and function.
PciAddress = Annotated[
    str, StringConstraints(pattern=r"^([0-9a-f]{4}|[1-9a-f][0-9a-f]{4,7}):[0-9a-f]{2}:[01][0-9a-f]\.[0-7]$")
]
HOST_DRIVER = "nvme"


@dataclass(frozen=True, slots=True)
class NvmeDrive:
    """One look. `problem` says why the drive can't be handed to a VM as things are; empty if it can.

    `cell` is None where the machine doesn't say. `driver` is who has the device now, "" for nobody; `serial` and
    `namespaces` (block devices, by their names) are known while that is the host's own. `used_by_host`: the problem is
    that the host itself has put it to use, so what is on it may be the host's own.
    """

    address: str
    cell: int | None = None
    driver: str = ""
    serial: str = ""
    namespaces: tuple[str, ...] = ()
    problem: str = ""
    used_by_host: bool = False

    @property
    def at_home(self) -> bool:
        return self.driver == HOST_DRIVER

    @property
    def shows_itself(self) -> bool:
        """Whether it is at home and alive: one that is dead or on its way shows no namespace or no serial number."""
        return self.at_home and bool(self.namespaces and self.serial)


class DrivePort(Protocol):
    """What the agent asks about drives and does to them."""

    def read(self, address: str) -> NvmeDrive:
        """How the drive is now. Blocking; raises nothing."""

    async def signature(self, drive: NvmeDrive) -> str:
        """What is recognised on a drive that is at home: a partition table, a file system; "" for nothing.

        Raises `disk.not_erased` if it can't be told.
        """

    async def erase(self, drive: NvmeDrive) -> None:
        """Have nothing left of what was written to a drive that is at home.

        Looks again first, and raises `disk.not_erased`, with nothing touched, if the drive is in use or is another one.
        The same if it could not be erased.
        """
