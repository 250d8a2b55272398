# SPDX-License-Identifier: Apache-2.0
"""Drives between two VMs. A drive is *settled*, and free for the next, once it is back at the host's driver and erased.

What makes it safe is one order, on disk at each step (`records.py`):

1. before a drive is handed over its record says *given*; only a drive whose record says *clean* is ever chosen;
2. when its domain is gone the drive is taken back, and erased in the background: a delete doesn't wait for that;
3. when it has been erased, its record says *clean*, and the ledger is told that it is free.

Killed anywhere, the next agent finds a drive that a domain has, or one that isn't clean, and goes on with 2. A drive
that nobody has a record of is erased as well, unless something is recognised on it: that may be somebody's, who mistook
the slot. What the host itself uses is left alone, whatever the settings say; once it has used a drive, nobody knows
whose data is there.

The ledger sees more of domains than these looks: "clean" stands only while it has seen none that had the drive since.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import structlog

from ppec_agentd.hypervisor import Hypervisor
from ppec_agentd.ledger import DriveState, Ledger
from ppec_agentd.nvme.drive import HOST_DRIVER, DrivePort, NvmeDrive
from ppec_agentd.nvme.records import DriveRecord, DriveRecords
from ppec_contract.errors import PpecError

log = structlog.get_logger(__name__)
# The kernel needs a moment to find a drive's namespaces, more if it starts up slowly.
AT_HOME_S = 60.0
_LOOK_EVERY_S = 0.2
# What failed is likely to fail again, and to erase wears a drive out.
ERASE_AGAIN_S = 600.0


class SettlingDrives:
    """The drives of the ledger, one at a time each. `problems` says why a drive is not for VMs now, by its address."""

    def __init__(self, hypervisor: Hypervisor, ledger: Ledger, port: DrivePort, folder: Path) -> None:
        self._hypervisor = hypervisor
        self._ledger = ledger
        self._port = port
        self._records = DriveRecords(folder)
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._settling: dict[str, asyncio.Task[None]] = {}
        self._rounds: set[asyncio.Task[None]] = set()
        self._not_before_s: dict[str, float] = {}
        # How often domains had had it when it was erased: one that had one since is not clean, whatever is on disk.
        self._uses_when_clean: dict[str, int] = {}
        self.problems: dict[str, str] = {}
        self.on_change: Callable[[], None] = lambda: None

    def standing(self) -> dict[str, str]:
        """Each drive with what is wrong with it, "" for nothing: for the health."""
        return {address: self.problems.get(address, "") for address in self._ledger.drives()}

    # --- handing over -------------------------------------------------------------------------------------------

    async def hand_over(self, subject: str, addresses: Iterable[str]) -> None:
        """To be called for drives that the ledger has granted, before a domain has them.

        Raises `host.no_capacity` if one is not fit any more, and what writing its record raises.
        """
        for address in addresses:
            async with self._turns[address]:
                if why := await self._unfit(address):
                    raise _not_fit(subject, address, why)
                await asyncio.to_thread(self._records.give, address)

    async def _unfit(self, address: str) -> str:
        """Why the drive can't be handed over, "" if it can. The host may have put data there since the last look."""
        drive, record = await self._looked_at(address)
        if drive.problem:
            return drive.problem
        if not drive.shows_itself or record is not DriveRecord.CLEAN:
            return "it has not been erased"
        try:
            found = await self._port.signature(drive)
        except PpecError as error:
            return error.message
        if not found:
            return ""
        await asyncio.to_thread(self._records.forget, address)
        return f"it was erased, and now holds data ({found})"

    async def refuse_used(self, subject: str, addresses: Iterable[str]) -> None:
        """Before a VM that has drives is started again: raises `vm.start_failed` if the host uses one meanwhile, or has
        another one in its place."""
        for address in addresses:
            drive = await asyncio.to_thread(self._port.read, address)
            problem = drive.problem
            if not problem and drive.at_home:
                record = await asyncio.to_thread(self._records.of, address, drive.serial)
                problem = "" if record is DriveRecord.GIVEN else "another drive has come into its place"
            if problem:
                raise PpecError(
                    "vm.start_failed",
                    f"{subject}: its drive {address} can't be handed over: {problem}",
                    hint="Free the drive on its host, or put the VM's own back; nothing on it was touched.",
                    subject=subject,
                )

    # --- taking back --------------------------------------------------------------------------------------------

    def look_soon(self) -> None:
        """Somebody gave drives back: don't wait for the next round."""
        if self._ledger.drives():
            task = asyncio.create_task(self.once(), name="drives")
            self._rounds.add(task)
            task.add_done_callback(self._rounds.discard)

    async def once(self) -> None:
        """One round over all drives. What takes long is begun, and not waited for (`idle`)."""
        before, problems = self._ledger.drives(), dict(self.problems)
        for address in before:
            if address in self._settling:
                continue
            try:
                await self._look(address)
            except PpecError as error:
                # One drive's; the next round tries again.
                log.error("drive_record_failed", address=address, code=error.code, why=error.message)
        if (self._ledger.drives(), self.problems) != (before, problems):
            self.on_change()

    async def idle(self) -> None:
        """Until nothing is under way."""
        while tasks := [*self._settling.values(), *self._rounds]:
            await asyncio.wait(tasks)

    async def close(self) -> None:
        """Breaks off what is under way: the next agent begins it anew."""
        tasks = [*self._settling.values(), *self._rounds]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _look(self, address: str) -> None:
        async with self._turns[address]:
            if self._state(address) is DriveState.HELD:
                await self._keep_given(address)
                return
            drive, record = await self._looked_at(address)
            # Meanwhile a VM may have got it.
            if self._state(address) is DriveState.HELD:
                return
            if drive.problem:
                await self._leave_out(drive, drive.problem, record)
            elif drive.shows_itself and record is DriveRecord.CLEAN:
                self._free(address)
            else:
                if self._state(address) is DriveState.FREE:
                    self._ledger.mark_drive(address, DriveState.SETTLING)
                self._begin(address)

    async def _keep_given(self, address: str) -> None:
        """Also of a drive that a domain made by hand has: nobody asked for its record. One that was granted to a VM to
        come is clean until it is handed over."""
        if not any(held.committed and address in held.drives for held in self._ledger.holdings()):
            return
        self.problems.pop(address, None)
        if await asyncio.to_thread(self._records.of, address, "") is not DriveRecord.GIVEN:
            await asyncio.to_thread(self._records.give, address)

    def _begin(self, address: str) -> None:
        now_s = asyncio.get_running_loop().time()
        if address in self._settling or now_s < self._not_before_s.get(address, 0.0):
            return
        task = asyncio.create_task(self._settle(address), name=f"drive {address}")
        self._settling[address] = task
        task.add_done_callback(lambda _: self._settling.pop(address, None))

    async def _settle(self, address: str) -> None:
        before = self._state(address), self.problems.get(address)
        try:
            async with self._turns[address]:
                await self._settled(address)
        except PpecError as error:
            self._not_settled(address, error)
        except Exception:
            # A bug; nobody waits for this task, and the drive stays nobody's.
            log.exception("drive_settling_broke", address=address)
            self._put_off(address, "an error of the agent's; its log has the details")
        if (self._state(address), self.problems.get(address)) != before:
            self.on_change()

    async def _settled(self, address: str) -> None:
        if await self._somebody_has(address):
            return
        drive, record = await self._looked_at(address)
        if record is not DriveRecord.GIVEN and not (drive.problem or drive.at_home):
            why = f"no VM of this agent's had it, and {_who_has(drive)}; if it may be erased: bind it to {HOST_DRIVER}"
            await self._leave_out(drive, why, record)
            return
        drive = await self._at_home(drive)
        record = await self._record(drive)
        if drive.problem:
            await self._leave_out(drive, drive.problem, record)
            return
        if record is not DriveRecord.CLEAN and not await self._erased(drive, record):
            return
        self._free(address)

    async def _erased(self, drive: NvmeDrive, record: DriveRecord) -> bool:
        if record is DriveRecord.UNKNOWN and (found := await self._port.signature(drive)):
            self._put_out(
                drive.address, f"no VM of this agent's had it, and it holds data ({found}); if that can go: wipefs -a"
            )
            return False
        # Looked at once more: from here on there is no way back.
        if await self._somebody_has(drive.address):
            return False
        uses = self._ledger.drive_uses(drive.address)
        log.info("drive_erasing", address=drive.address, serial=drive.serial)
        await self._port.erase(drive)
        if await self._somebody_has(drive.address):
            return False
        await asyncio.to_thread(self._records.write, drive.address, drive.serial, DriveRecord.CLEAN)
        self._uses_when_clean[drive.address] = uses
        log.info("drive_erased", address=drive.address, serial=drive.serial)
        return uses == self._ledger.drive_uses(drive.address)

    async def _at_home(self, drive: NvmeDrive) -> NvmeDrive:
        """The drive at the host's own driver. A domain's end gives it back; what is left behind is taken back here."""
        address = drive.address
        if not (drive.problem or drive.at_home):
            log.warning("drive_left_behind", address=address, driver=drive.driver or "none")
            await self._hypervisor.reattach(address)
        ends_s = asyncio.get_running_loop().time() + AT_HOME_S
        while not (drive.problem or drive.shows_itself):
            if asyncio.get_running_loop().time() >= ends_s:
                why = "it shows no namespace, or no serial number" if drive.at_home else _who_has(drive)
                raise PpecError("disk.not_erased", f"drive {address} did not come back: {why}")
            await asyncio.sleep(_LOOK_EVERY_S)
            drive = await asyncio.to_thread(self._port.read, address)
        return drive

    async def _somebody_has(self, address: str) -> bool:
        """By the ledger, and by the domains as they are now: one may have been made by hand a moment ago."""
        domains = await self._hypervisor.domains()
        granted = (domain.metadata.nvme_drives for domain in domains if domain.metadata is not None)
        named = {one for drives in (*granted, *(domain.host_devices for domain in domains)) for one in drives}
        return address in named or self._state(address) is DriveState.HELD

    async def _looked_at(self, address: str) -> tuple[NvmeDrive, DriveRecord]:
        drive = await asyncio.to_thread(self._port.read, address)
        return drive, await self._record(drive)

    async def _record(self, drive: NvmeDrive) -> DriveRecord:
        record = await asyncio.to_thread(self._records.of, drive.address, drive.serial)
        had_since = self._ledger.drive_uses(drive.address) != self._uses_when_clean.get(drive.address, 0)
        return DriveRecord.GIVEN if record is DriveRecord.CLEAN and had_since else record

    # --- what becomes of it -------------------------------------------------------------------------------------

    def _state(self, address: str) -> DriveState:
        return self._ledger.drives()[address]

    def _free(self, address: str) -> None:
        if self.problems.pop(address, None) is not None:
            log.info("drive_well_again", address=address)
        self._not_before_s.pop(address, None)
        self._ledger.mark_drive(address, DriveState.FREE)

    async def _leave_out(self, drive: NvmeDrive, problem: str, record: DriveRecord) -> None:
        """What a VM left there is still to be erased, unless the host has put the drive to a use of its own."""
        if record is DriveRecord.CLEAN or (record is DriveRecord.GIVEN and drive.used_by_host):
            await asyncio.to_thread(self._records.forget, drive.address)
        self._put_out(drive.address, problem)

    def _put_out(self, address: str, problem: str) -> None:
        if self.problems.get(address) != problem:
            log.error("drive_left_out", address=address, why=problem)
        self.problems[address] = problem
        self._ledger.mark_drive(address, DriveState.OUT)

    def _not_settled(self, address: str, error: PpecError) -> None:
        if error.retryable:
            log.warning("drive_waits", address=address, code=error.code, why=error.message)
            return
        self._put_off(address, error.message)

    def _put_off(self, address: str, problem: str) -> None:
        self._not_before_s[address] = asyncio.get_running_loop().time() + ERASE_AGAIN_S
        self._put_out(address, problem)


def _who_has(drive: NvmeDrive) -> str:
    return f"the driver {drive.driver} has it" if drive.driver else "no driver has it"


def _not_fit(subject: str, address: str, why: str) -> PpecError:
    return PpecError(
        "host.no_capacity",
        f"{subject} was to get drive {address}, which can't be handed over now: {why}",
        hint="Plan again: the host leaves the drive out from now on.",
        subject=subject,
        details={"resource": "nvme_drives", "wanted": 1, "free": 0},
    )
