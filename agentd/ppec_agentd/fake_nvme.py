# SPDX-License-Identifier: Apache-2.0
"""The fake hypervisor's NVMe drives: records of who has each now, and who wrote to it since it was erased.

With a state file they outlive the agent, as real drives do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol
from uuid import UUID

from pydantic import TypeAdapter

from ppec_agentd.fake_faults import FaultPlan
from ppec_agentd.files import write_whole
from ppec_agentd.hypervisor import Domain
from ppec_agentd.nvme.drive import HOST_DRIVER, NvmeDrive
from ppec_contract.errors import PpecError
from ppec_contract.vm import VmState

VFIO = "vfio-pci"
_OFF = (VmState.STOPPED, VmState.CRASHED)


@dataclass(frozen=True, slots=True)
class FakeDrive:
    """`writers` are the domains whose data it holds; `signature` is what else was found on it. `used` says what the
    host itself does with it. `serial` is that of the slot's own drive unless another was put there."""

    driver: str = HOST_DRIVER
    writers: tuple[UUID, ...] = ()
    signature: str = ""
    used: str = ""
    serial: str = ""


_STATE_FILE: TypeAdapter[dict[str, FakeDrive]] = TypeAdapter(dict[str, FakeDrive])


class _Domains(Protocol):
    """What drives need of the fake."""

    faults: FaultPlan
    drives: dict[str, FakeDrive]
    drive_cells: Mapping[str, int]

    async def _begin(self, method: str) -> Callable[[], None]: ...

    def _all(self) -> tuple[Domain, ...]: ...

    def put_drive(self, address: str, drive: FakeDrive) -> None: ...


class FakeNvme:
    """The part of `FakeHypervisor` that is its machine's drives: `DrivePort`, and what domains do to drives."""

    def __init__(self, cells: Mapping[str, int], state_file: Path | None) -> None:
        self.drive_cells = dict(cells)
        self._drives_file = state_file.with_name("fake-nvme.json") if state_file and cells else None
        self.drives = {address: FakeDrive() for address in cells} | _load(self._drives_file)

    # --- DrivePort

    def read(self, address: str) -> NvmeDrive:
        if address not in self.drives:
            return NvmeDrive(address, problem="this host has no PCI device there")
        drive = self.drives[address]
        at_home = drive.driver == HOST_DRIVER
        return NvmeDrive(
            address=address,
            cell=self.drive_cells[address],
            driver=drive.driver,
            serial=(drive.serial or f"FAKE-{address}") if at_home else "",
            namespaces=(f"fake-{address}",) if at_home else (),
            problem=drive.used,
            used_by_host=bool(drive.used),
        )

    async def signature(self, drive: NvmeDrive) -> str:
        return self.drives[drive.address].signature

    async def erase(self: _Domains, drive: NvmeDrive) -> None:
        end = await self.faults.begin("erase")
        now = self.drives[drive.address]
        if now.used or now.driver != HOST_DRIVER:
            raise PpecError(
                "disk.not_erased", f"drive {drive.address}: {now.used or now.driver}", subject=f"drive {drive.address}"
            )
        self.put_drive(drive.address, replace(now, writers=(), signature=""))
        end()

    # --- the hypervisor's part

    async def reattach(self: _Domains, address: str) -> bool:
        end = await self._begin("reattach")
        if address not in self.drives:
            return False
        if any(address in domain.host_devices and domain.state not in _OFF for domain in self._all()):
            raise PpecError(
                "vm.wrong_state",
                f"can't take device {address} back: a domain that runs has it",
                subject=f"device {address}",
            )
        self.put_drive(address, replace(self.drives[address], driver=HOST_DRIVER))
        end()
        return True

    def take_drives(self, domain: Domain) -> None:
        """The domain starts, and writes to each of its drives."""
        for address in domain.host_devices:
            if address not in self.drives or self.drives[address].driver != HOST_DRIVER:
                raise PpecError("vm.start_failed", f"device {address} can't be had", subject=f"vm {domain.vm_id}")
        for address in domain.host_devices:
            drive = self.drives[address]
            writers = (*(writer for writer in drive.writers if writer != domain.vm_id), domain.vm_id)
            self.put_drive(address, replace(drive, driver=VFIO, writers=writers))

    def give_drives(self, domain: Domain) -> None:
        """The domain has ended."""
        for address in domain.host_devices:
            if address in self.drives:
                self.put_drive(address, replace(self.drives[address], driver=HOST_DRIVER))

    def put_drive(self, address: str, drive: FakeDrive) -> None:
        self.drives[address] = drive
        if self._drives_file is not None:
            write_whole(self._drives_file, _STATE_FILE.dump_json(self.drives, indent=1))


def _load(path: Path | None) -> dict[str, FakeDrive]:
    return {} if path is None or not path.exists() else _STATE_FILE.validate_json(path.read_bytes())
