# SPDX-License-Identifier: Apache-2.0
"""The inside of a VM, as far as a host can reach it: the guest's agent, and the serial console."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from pydantic import Field, StringConstraints

from ppec_contract.errors import Problem
from ppec_contract.model import Model, VmIds
from ppec_contract.vm import VmState

MAX_CONSOLE_TAIL_BYTES = 256 * 1024


class QueryGuests(Model):
    """Asks the agents inside the guests. Each is waited for `timeout_s` at most.

    Ids the host doesn't know are absent from the answer.
    """

    vm_ids: VmIds
    timeout_s: Annotated[float, Field(ge=1, le=30)] = 5.0


class GuestInterface(Model):
    """A network interface as the guest sees it; addresses have a prefix length."""

    name: str
    mac: str = ""
    addresses: tuple[str, ...] = ()


class GuestInfo(Model):
    """What a guest says of itself through its agent: its word, bounded in length, and nothing a host can vouch for.

    `agent_connected` false, with no `problem`: the guest runs no agent, or has not started it yet. `frozen` is the
    host's own record. A frozen guest's agent answers nothing else.
    """

    vm_id: UUID
    name: str
    agent_connected: bool
    frozen: bool = False
    hostname: str = ""
    os_id: str = ""
    os_name: str = ""
    os_version: str = ""
    kernel: str = ""
    interfaces: tuple[GuestInterface, ...] = ()
    problem: Problem | None = None


class QueryGuestsReply(Model):
    guests: tuple[GuestInfo, ...]


class ReadConsole(Model):
    """The serial console: its last `tail_bytes`, and with `more` and `follow` what is written from then on.

    The stream goes on while the VM is off, so that its start can be watched, and ends when the VM is deleted or the
    caller leaves. However many watch, and however slowly, the guest is never held up.
    """

    vm_id: UUID
    tail_bytes: Annotated[int, Field(strict=True, ge=0, le=MAX_CONSOLE_TAIL_BYTES)] = 16 * 1024
    follow: bool = True


class ReadConsoleReply(Model):
    """A piece of the console, in order. `data` is base64: what a guest writes need not be text.

    `skipped_bytes` were written before `data` and after the piece before, and are lost to this reader, which was too
    slow. `state` is the VM's in the first reply, and again whenever it has changed. An empty reply says that the stream
    lives; one comes at least every 10 s.
    """

    data: str = ""
    skipped_bytes: Annotated[int, Field(ge=0)] = 0
    state: VmState | None = None


class WriteConsole(Model):
    """Types on the serial console of a VM that runs. `data` is base64, at most 4 KiB of bytes.

    Never kept and never repeated: without an answer it may have been typed or not.
    """

    vm_id: UUID
    data: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]+={0,2}$", max_length=5464)]


class WriteConsoleReply(Model):
    written_bytes: int
