# SPDX-License-Identifier: Apache-2.0
"""Looks at the host's health every few seconds, says in the log what changed, and has the reporter tell it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from uuid import UUID

import structlog

from ppec_agentd.health import HealthBook, LibvirtFigures, judge
from ppec_agentd.health_figures import read_figures, read_file_systems, read_memory
from ppec_agentd.hypervisor import Hypervisor
from ppec_agentd.places import Places
from ppec_agentd.vm_use import read_vm_use
from ppec_contract.errors import PpecError
from ppec_contract.host import HealthFinding, HealthLevel, HostUse, Vitals
from ppec_contract.words import MAX_FILE_SYSTEMS, MAX_VMS, short

log = structlog.get_logger(__name__)
LOOK_EVERY_S = 10.0
# So long may libvirt take to answer before it counts as hung. Far below the deadline of any call.
PROBE_S = 5.0
_NOBODY = UUID(int=0)


class HealthWatch:
    """`run` until cancelled. `places` have VMs' folders; disk space is looked at there and where images are. `drives`
    says what is wrong with each drive for VMs, "" for nothing."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        places: Places,
        images: Path,
        on_change: Callable[[], None] = lambda: None,
        *,
        probe_s: float = PROBE_S,
        drives: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self._hypervisor = hypervisor
        self._places = places
        self._folders = (*places.folders, images)
        self._probe_s = probe_s
        self._drives = drives
        self._book = HealthBook()
        self.on_change = on_change
        self.every_s = LOOK_EVERY_S

    @property
    def findings(self) -> tuple[HealthFinding, ...]:
        return self._book.findings

    async def run(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:
                # A bug; nobody would start this task again.
                log.exception("health_look_broke")
            await asyncio.sleep(self.every_s)

    async def look(self) -> None:
        """One look at everything; never waits for libvirt longer than `probe_s`."""
        libvirt = await self._probe()
        pools = tuple(self._places.pools.values())
        figures = await asyncio.to_thread(read_figures, self._folders, libvirt, pools=pools)
        figures = replace(figures, vm_drives=self._drives())
        changes = self._book.enter(judge(figures))
        for change in changes:
            finding = change.finding
            say = log.warning if finding.level in (HealthLevel.WARNING, HealthLevel.ERROR) else log.info
            before = None if change.before is None else change.before.value
            say("health_changed", check=finding.check, entered=finding.level.value, before=before, found=finding.found)
        if changes:
            self.on_change()

    async def vitals(self) -> Vitals:
        """What the reporter sends: the health as of the last look, and what is used now."""
        return Vitals(health=self.findings, use=await asyncio.to_thread(self._use))

    def _use(self) -> HostUse:
        return HostUse(
            memory_available_mib=read_memory(Path("/")).available_mib,
            free_mib={short(fs.path): fs.free_mib for fs in islice(read_file_systems(self._folders), MAX_FILE_SYSTEMS)},
            vms=read_vm_use(self._places.folders)[:MAX_VMS],
        )

    async def _probe(self) -> LibvirtFigures:
        """A light call: to look a VM up that nobody has."""
        if self._hypervisor.lingers(_NOBODY):
            return LibvirtFigures(problem="an earlier call has not been answered yet")
        begun = time.monotonic()
        try:
            async with asyncio.timeout(self._probe_s):
                await self._hypervisor.domain(_NOBODY)
        except TimeoutError:
            return LibvirtFigures(problem=f"no answer within {self._probe_s:g} s")
        except PpecError as error:
            return LibvirtFigures(problem=error.message)
        return LibvirtFigures(latency_s=time.monotonic() - begun)
