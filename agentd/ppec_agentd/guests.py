# SPDX-License-Identifier: Apache-2.0
"""The part of the hypervisor port that reaches into guests: their agent, and what is typed on their console.

What a guest says is untrusted: whatever its length or kind, `guest_says` makes bounded, printable text of it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID

from ppec_contract.errors import PpecError

LONGEST_WORD = 256
MOST_INTERFACES = 64
MOST_ADDRESSES = 64
# In the details of an error: the guest was not even asked.
NOBODY_ASKED = {"asked": False}


@dataclass(frozen=True, slots=True)
class GuestNic:
    """A network interface as the guest names it; addresses have a prefix length."""

    name: str
    mac: str = ""
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GuestSays:
    """What a guest's agent says of the guest; empty where it says nothing."""

    hostname: str = ""
    os_id: str = ""
    os_name: str = ""
    os_version: str = ""
    kernel: str = ""
    nics: tuple[GuestNic, ...] = ()


class GuestPort(Protocol):
    """Calls that a guest takes part in: each ends in a bounded time, whatever the guest does.

    They raise ``vm.not_found``; ``vm.wrong_state`` while the domain is paused; ``guest.agent_unavailable`` if the guest
    has no agent that answers; ``guest.agent_failed`` if it answers with a refusal.
    """

    async def guest(self, vm_id: UUID, timeout_s: float) -> GuestSays | None:
        """What the guest's agent says; None if none is connected, or the domain is off."""

    async def freeze(self, vm_id: UUID) -> None:
        """Have the guest flush and freeze its file systems. When this fails it may be frozen all the same, or become
        so later (thaw it), unless the error's details are `NOBODY_ASKED`. ``vm.wrong_state`` also if it is off."""

    async def thaw(self, vm_id: UUID) -> bool:
        """Undo `freeze`. False if nothing was frozen, or the domain is off. One that is paused stays frozen."""

    async def type_on_console(self, vm_id: UUID, data: bytes) -> None:
        """Send bytes to the guest's serial port. Raises ``vm.wrong_state`` if it is off (and takes them while it is
        paused); ``console.busy`` while somebody else has the console open."""


def nobody_asked(vm_id: UUID) -> PpecError:
    """No agent is connected, so that nothing was asked of the guest."""
    return PpecError(
        "guest.agent_unavailable",
        f"vm {vm_id}: no agent is connected in the guest",
        hint="Install qemu-guest-agent in the guest, or wait until it has started.",
        subject=f"vm {vm_id}",
        details=dict(NOBODY_ASKED),
    )


def guest_says(told: Mapping[str, Any]) -> GuestSays:
    """From the flat table that libvirt makes of an agent's answers (``os.name``, ``if.0.addr.1.addr``). Pure."""
    return GuestSays(
        hostname=word(told.get("hostname")),
        os_id=word(told.get("os.id")),
        os_name=word(told.get("os.pretty-name") or told.get("os.name")),
        os_version=word(told.get("os.version-id") or told.get("os.version")),
        kernel=word(told.get("os.kernel-release")),
        nics=tuple(_nic(told, number) for number in range(_count(told.get("if.count"), MOST_INTERFACES))),
    )


def word(said: Any) -> str:
    """Text of a guest's, printable, on one line and bounded."""
    if not isinstance(said, str):
        return ""
    return "".join(c if c.isprintable() else " " for c in said[:LONGEST_WORD]).strip()


def _nic(told: Mapping[str, Any], number: int) -> GuestNic:
    addresses = []
    for index in range(_count(told.get(f"if.{number}.addr.count"), MOST_ADDRESSES)):
        at = f"if.{number}.addr.{index}"
        addresses.append(_address(told.get(f"{at}.addr"), told.get(f"{at}.prefix")))
    return GuestNic(
        name=word(told.get(f"if.{number}.name")),
        mac=word(told.get(f"if.{number}.hwaddr")),
        addresses=tuple(address for address in addresses if address),
    )


def _address(address: Any, prefix: Any) -> str:
    try:
        return str(ipaddress.ip_interface(f"{word(address)}/{int(prefix)}"))
    except (ValueError, TypeError):
        return ""


def _count(said: Any, most: int) -> int:
    return max(0, min(said, most)) if isinstance(said, int) else 0
