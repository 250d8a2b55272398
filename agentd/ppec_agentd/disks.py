# SPDX-License-Identifier: Apache-2.0
"""A VM's files: one folder per VM in the own place, and its disk, a qcow2 overlay, in there or in one in a pool.

`QemuImg` and `FakeDisks` make overlays; the second writes a description in place of a disk, so that the chain with the
fake hypervisor needs no QEMU.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from uuid import UUID

from ppec_agentd.files import os_errors, write_whole
from ppec_agentd.images import CachedImage
from ppec_contract.errors import PpecError

MIB = 1024 * 1024
# Of every disk in a VM's folder, and of nothing else there.
DISK_SUFFIX = ".qcow2"
ROOT_DISK = f"root{DISK_SUFFIX}"


@dataclass(frozen=True, slots=True)
class VmFolder:
    """`<state>/vms/<vm_id>/`, or `<pool>/<vm_id>/` with the root disk alone. Deleting it deletes what was made for the
    VM there and nothing else."""

    root: Path
    vm_id: UUID

    @property
    def path(self) -> Path:
        return self.root / str(self.vm_id)

    @property
    def root_disk(self) -> Path:
        return self.path / ROOT_DISK

    @property
    def seed(self) -> Path:
        return self.path / "seed.iso"

    @property
    def console_log(self) -> Path:
        return self.path / "console.log"

    def make(self) -> None:
        """QEMU's user passes through it to the files it is given, and can't list it.

        Never the place around it: in place of a file system that isn't mounted there would be a folder.
        """
        with os_errors(f"the folder {self.path} can't be made", f"vm {self.vm_id}"):
            self.path.mkdir(exist_ok=True)
            self.path.chmod(0o711)

    def remove(self) -> bool:
        """False if it was not there. A symbolic link in its place is removed, never followed."""
        if not os.path.lexists(self.path):
            return False
        with os_errors(f"the folder {self.path} can't be removed", f"vm {self.vm_id}"):
            if self.path.is_symlink() or not self.path.is_dir():
                self.path.unlink()
            else:
                shutil.rmtree(self.path)
        return True


class DiskMaker(Protocol):
    """Makes root disks."""

    async def make_overlay(self, path: Path, image: CachedImage, size_mib: int) -> None:
        """A writable disk of `size_mib` (virtual) over the image. Whatever stood at `path` is replaced.

        Raises `request.invalid` if the image's own disk is larger, `disk.full`, `vm.create_failed`.
        """


def check_size(path: Path, image: CachedImage, size_mib: int) -> None:
    """An overlay smaller than its image would cut the guest's file system off."""
    needed_mib = -(-image.virtual_size_bytes // MIB)
    if size_mib < needed_mib:
        raise PpecError(
            "request.invalid",
            f"disk {path.name} of {size_mib} MiB is smaller than its image's {needed_mib} MiB",
            hint=f"Choose a flavor with a disk of at least {needed_mib} MiB.",
            subject=f"disk {path.name}",
            details={"wanted_mib": size_mib, "image_mib": needed_mib},
        )


class QemuImg:
    """Overlays by `qemu-img create`."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    async def make_overlay(self, path: Path, image: CachedImage, size_mib: int) -> None:
        check_size(path, image, size_mib)
        await self._run(
            *("create", "-q", "-f", "qcow2", "-b", str(image.path), "-F", image.format),
            *(str(path), f"{size_mib}M"),
        )

    async def _run(self, *arguments: str) -> None:
        process = await asyncio.create_subprocess_exec(
            "qemu-img",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                _, stderr = await process.communicate()
        except TimeoutError as error:
            raise PpecError(
                "vm.create_failed", f"qemu-img {arguments[0]} was not done after {self._timeout_s:g} s"
            ) from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            said = stderr.decode(errors="replace").strip()[-500:]
            full = "No space left" in said
            raise PpecError(
                "disk.full" if full else "vm.create_failed",
                f"qemu-img {arguments[0]} ended with {process.returncode}: {said}",
                hint="Make room on the host's storage." if full else "",
            )


class FakeDisks:
    """Overlays that are only described: the same refusals, a JSON file in place of the disk."""

    async def make_overlay(self, path: Path, image: CachedImage, size_mib: int) -> None:
        check_size(path, image, size_mib)
        description = {"backing": str(image.path), "format": image.format, "size_mib": size_mib}
        with os_errors(f"the disk {path} can't be written", f"disk {path.name}"):
            await asyncio.to_thread(write_whole, path, json.dumps(description).encode())
