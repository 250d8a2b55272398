# SPDX-License-Identifier: Apache-2.0
"""A VM's serial console, as the REST API has it: how it is opened, and what it tells beside its bytes."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from ppec_contract.errors import Problem
from ppec_contract.guest import MAX_CONSOLE_TAIL_BYTES
from ppec_contract.model import Model
from ppec_contract.vm import VmState


class ConsoleOpen(Model):
    """The query of `GET /v1/vms/{vm}/console`, a WebSocket. It begins with the console's last `tail_bytes`.

    Binary messages are bytes of the console, both ways; texts are `ConsoleNotice`s and come from the server alone.
    With `read_only` nothing may be sent. Without `follow` it ends once it has sent what is there.
    """

    read_only: bool = False
    follow: bool = True
    tail_bytes: Annotated[int, Field(ge=0, le=MAX_CONSOLE_TAIL_BYTES)] = 16 * 1024


class ConsoleEnd(StrEnum):
    """Why an open console ended. `complete`: all was sent that was asked for; `idle`: for long nothing was written or
    typed; `unauthorised`: the caller's token counts no longer; `problem`: the notice has it."""

    VM_OFF = "vm_off"
    VM_GONE = "vm_gone"
    COMPLETE = "complete"
    IDLE = "idle"
    UNAUTHORISED = "unauthorised"
    PROBLEM = "problem"


class ConsoleNotice(Model):
    """What a console tells beside its bytes. `state`: the VM's, first of all and when it has changed.

    `skipped_bytes` were lost just here to this reader, which was too slow. `ended` is in the last message.
    """

    state: VmState | None = None
    skipped_bytes: int = 0
    ended: ConsoleEnd | None = None
    problem: Problem | None = None
