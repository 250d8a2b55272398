# SPDX-License-Identifier: Apache-2.0
"""The views that look into guests: their agents' word, and their consoles."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncGenerator

from ppec_agentd.actions.context import HostContext
from ppec_agentd.consoles import Consoles
from ppec_agentd.guests import GuestSays
from ppec_agentd.hypervisor import Domain
from ppec_contract.errors import PpecError
from ppec_contract.guest import (
    GuestInfo,
    GuestInterface,
    QueryGuests,
    QueryGuestsReply,
    ReadConsole,
    ReadConsoleReply,
    WriteConsole,
    WriteConsoleReply,
)
from ppec_contract.vm import VmState


class GuestViews:
    """Views of one host's guests."""

    def __init__(self, host: HostContext) -> None:
        self._host = host
        self._consoles = Consoles(host.hypervisor, host.vms_dir)

    async def query(self, request: QueryGuests) -> QueryGuestsReply:
        """All guests are asked side by side; what befalls one is in its own part of the answer."""
        domains = {domain.vm_id: domain for domain in await self._host.hypervisor.domains()}
        asked = [domains[vm_id] for vm_id in dict.fromkeys(request.vm_ids) if vm_id in domains]
        guests = await asyncio.gather(*(self._guest(domain, request.timeout_s) for domain in asked))
        return QueryGuestsReply(guests=tuple(guests))

    def read_console(self, request: ReadConsole, *, more: bool) -> AsyncGenerator[ReadConsoleReply, None]:
        """Without `more` there is one reply: what is there now."""
        return self._consoles.read(request, follow=more and request.follow)

    async def write_console(self, request: WriteConsole) -> WriteConsoleReply:
        try:
            data = base64.b64decode(request.data, validate=True)
        except binascii.Error as error:
            raise PpecError("request.invalid", "WriteConsole: data is not base64", subject="data") from error
        await self._consoles.write(request.vm_id, data)
        return WriteConsoleReply(written_bytes=len(data))

    async def _guest(self, domain: Domain, timeout_s: float) -> GuestInfo:
        says, problem = None, None
        if domain.state is VmState.RUNNING:
            try:
                says = await self._host.hypervisor.guest(domain.vm_id, timeout_s)
            except PpecError as error:
                problem = error.problem()
        told = says or GuestSays()
        return GuestInfo(
            vm_id=domain.vm_id,
            name=domain.name,
            agent_connected=says is not None,
            frozen=self._host.thaws.frozen(domain.vm_id),
            hostname=told.hostname,
            os_id=told.os_id,
            os_name=told.os_name,
            os_version=told.os_version,
            kernel=told.kernel,
            interfaces=tuple(GuestInterface(name=n.name, mac=n.mac, addresses=n.addresses) for n in told.nics),
            problem=problem,
        )
