# SPDX-License-Identifier: Apache-2.0
"""The machine's own drives: looked at through the kernel's files, erased by nvme-cli and util-linux.

A drive that can format itself does (`nvme format --ses=1`: user data erase, spare blocks and all). One that can't, or
refuses, is overwritten with zeros through the kernel. What a program says of its own success is believed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import structlog

from ppec_agentd.files import os_errors
from ppec_agentd.nvme.drive import NvmeDrive
from ppec_agentd.nvme.sysfs import lock_path, read_drive
from ppec_contract.errors import PpecError

log = structlog.get_logger(__name__)
# Optional admin commands that a controller knows (NVMe base specification, Identify Controller, OACS).
_FORMATS, _MANAGES_NAMESPACES = 1 << 1, 1 << 3
# linux/fs.h: read the partition table again, now that there is none.
_BLKRRPART = 0x125F
_QUESTION_S = 30.0
_LOOK_EVERY_S = 0.2
_NOTHING_FOUND = 2
_READ_BYTES = 4096


class HostDrives:
    """`erase_timeout_s` bounds each program; `locks` is a folder that outlives the agent. Tests make up a `root`."""

    def __init__(self, erase_timeout_s: float, locks: Path, root: Path = Path("/")) -> None:
        self._erase_timeout_s = erase_timeout_s
        self._locks = locks
        self._root = root

    def read(self, address: str) -> NvmeDrive:
        return read_drive(address, self._root, self._locks)

    async def signature(self, drive: NvmeDrive) -> str:
        with _worded(drive):
            return await self._signature(drive)

    async def _signature(self, drive: NvmeDrive) -> str:
        for name in drive.namespaces:
            status, said = await _run(drive, _QUESTION_S, "blkid", "--probe", "--output", "export", self._device(name))
            if status == _NOTHING_FOUND:
                # blkid says that, too, of a device that is not there, or that can't be read.
                await asyncio.to_thread(_read_ends, drive, self._device(name))
                continue
            kinds = [line.partition("=")[2] for line in said.splitlines() if line.startswith(("TYPE=", "PTTYPE="))]
            return f"{name}: {', '.join(kinds) or 'something that blkid can not name'}"
        return ""

    async def erase(self, drive: NvmeDrive) -> None:
        with _worded(drive):
            await self._erase(drive)

    async def _erase(self, drive: NvmeDrive) -> None:
        lock = await self._locked(drive)
        try:
            await self._refuse_changed(drive)
            formats = await self._formats(drive)
            for name in drive.namespaces:
                if not (formats and await self._format(drive, name, lock)):
                    await self._zero(drive, name, lock)
                await asyncio.to_thread(_forget_partitions, self._device(name))
        finally:
            os.close(lock)

    async def _refuse_changed(self, drive: NvmeDrive) -> None:
        # Whoever holds the lock is this agent itself.
        now = await asyncio.to_thread(read_drive, drive.address, self._root)
        if now.problem or not now.at_home:
            raise not_erased(drive, now.problem or f"the driver {now.driver or 'of nobody'} has it")
        if (now.serial, now.namespaces) != (drive.serial, drive.namespaces):
            raise not_erased(drive, "another drive has come into its place")
        if not now.namespaces:
            raise not_erased(drive, "it has no namespace")

    async def _formats(self, drive: NvmeDrive) -> bool:
        """Whether the drive formats itself. Raises `disk.not_erased` for namespaces that the host doesn't see: somebody
        may have left data there, and the next who has the drive can attach them."""
        if not await self._has_nvme_cli(drive):
            return False
        device = self._device(drive.namespaces[0])
        knows = int((await self._ask(drive, "id-ctrl", device))["oacs"])
        listed = ("list-ns", "--all") if knows & _MANAGES_NAMESPACES else ("list-ns",)
        count = len((await self._ask(drive, *listed, device))["nsid_list"])
        if count != len(drive.namespaces):
            seen = f"{count} namespaces, and the host sees {len(drive.namespaces)} of them"
            raise not_erased(drive, f"it has {seen}; delete the others (nvme list-ns, nvme delete-ns)")
        return bool(knows & _FORMATS)

    async def _has_nvme_cli(self, drive: NvmeDrive) -> bool:
        try:
            status, _ = await _run(drive, _QUESTION_S, "nvme", "version")
        except FileNotFoundError:
            return False
        return status == 0

    async def _ask(self, drive: NvmeDrive, command: str, *arguments: str) -> dict[str, Any]:
        status, said = await _run(drive, _QUESTION_S, "nvme", command, *arguments, "--output-format=json")
        try:
            answer = json.loads(said)
        except ValueError:
            answer = None
        if status or not isinstance(answer, dict) or not answer.keys() & {"oacs", "nsid_list"}:
            raise not_erased(drive, f"nvme {command} ended with {status}: {said[-300:]}")
        return answer

    async def _format(self, drive: NvmeDrive, name: str, lock: int) -> bool:
        """False if the drive refuses. For nvme-cli to go by the device's name alone, it is held here meanwhile."""
        with self._held(drive, name):
            milliseconds = f"--timeout={int(self._erase_timeout_s * 1000)}"
            words = ("nvme", "format", self._device(name), "--ses=1", "--force", milliseconds)
            status, said = await _run(drive, self._erase_timeout_s, *words, lock=lock)
        if status:
            log.warning("drive_not_formatted", address=drive.address, namespace=name, status=status, why=said[-300:])
        return status == 0

    async def _zero(self, drive: NvmeDrive, name: str, lock: int) -> None:
        """blkdiscard(8) takes the device for itself, and refuses one that is in use. The kernel zeroes by the drive's
        own command where it has one, and else writes."""
        size = self._root / "sys/class/block" / name / "size"
        if not int(size.read_text().strip() or 0):
            raise not_erased(drive, f"the host sees nothing of {name}: its format is none that the kernel reads")
        status, said = await _run(
            drive, self._erase_timeout_s, "blkdiscard", "--zeroout", self._device(name), lock=lock
        )
        if status:
            raise not_erased(drive, f"blkdiscard ended with {status}: {said[-300:]}")

    def _device(self, name: str) -> str:
        return str(self._root / "dev" / name)

    @contextlib.contextmanager
    def _held(self, drive: NvmeDrive, name: str) -> Iterator[None]:
        """As long as this lasts nobody mounts it. Raises `disk.not_erased` if somebody uses it."""
        try:
            file = os.open(self._device(name), os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            busy = "in use by the host" if error.errno == errno.EBUSY else error.strerror
            raise not_erased(drive, f"{name}: {busy}") from error
        try:
            yield
        finally:
            os.close(file)

    async def _locked(self, drive: NvmeDrive) -> int:
        """The programs inherit it: one that outlives a killed agent keeps the drive to itself until it ends."""
        path = lock_path(drive.address, self._locks)
        with os_errors(f"the lock {path} can't be made", f"drive {drive.address}"):
            self._locks.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            async with asyncio.timeout(self._erase_timeout_s):
                # Nobody says when another process lets go: there is nothing to wait on but the lock itself.
                while not _taken(lock):  # noqa: ASYNC110
                    await asyncio.sleep(_LOOK_EVERY_S)
        except BaseException as error:
            os.close(lock)
            if not isinstance(error, TimeoutError):
                raise
            raise not_erased(drive, "a program that an earlier agent started is still at work on it") from error
        return lock


def not_erased(drive: NvmeDrive, why: str) -> PpecError:
    return PpecError(
        "disk.not_erased",
        f"drive {drive.address} could not be erased: {why}",
        hint="No VM gets the drive before that; the agent tries again by itself.",
        subject=f"drive {drive.address}",
    )


@contextlib.contextmanager
def _worded(drive: NvmeDrive) -> Iterator[None]:
    """What the system refuses (a program, a file of the kernel's that is going) is a drive that is not erased."""
    try:
        yield
    except OSError as error:
        raise not_erased(drive, f"{error.filename or 'the system'}: {error.strerror or error}") from error


def _read_ends(drive: NvmeDrive, device: str) -> None:
    """Raises `disk.not_erased` for a device whose start or end can't be read."""
    file = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.lseek(file, 0, os.SEEK_END)
        for start in (0, max(0, size - _READ_BYTES)):
            if len(os.pread(file, _READ_BYTES, start)) < _READ_BYTES:
                raise not_erased(drive, f"{device} can't be read at byte {start} of {size}")
    finally:
        os.close(file)


def _taken(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _forget_partitions(device: str) -> None:
    """Those of the tenant before are gone from the drive, but not from the kernel; nothing depends on that."""
    with contextlib.suppress(OSError):
        file = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(file, _BLKRRPART)
        finally:
            os.close(file)


async def _run(drive: NvmeDrive, timeout_s: float, *command: str, lock: int | None = None) -> tuple[int, str]:
    """Exit status and all that was said. Raises FileNotFoundError for a program that is not there, and
    `disk.not_erased` after `timeout_s`."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={"LC_ALL": "C", "PATH": os.environ.get("PATH", os.defpath)},
        pass_fds=() if lock is None else (lock,),
    )
    try:
        async with asyncio.timeout(timeout_s):
            said, _ = await process.communicate()
    except TimeoutError as error:
        raise not_erased(drive, f"{' '.join(command[:2])} was not done after {timeout_s:g} s") from error
    finally:
        if process.returncode is None:
            # Not waited for: a drive that hangs keeps it in the kernel. It has the lock until it ends.
            process.kill()
    return process.returncode or 0, said.decode(errors="replace").strip()
