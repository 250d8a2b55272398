# SPDX-License-Identifier: Apache-2.0
"""`/v1/vms/{vm}/guest`: what a VM's guest says of itself, asked of its host right now and kept nowhere."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.concurrency import run_in_threadpool

from ppec_contract.errors import PpecError
from ppec_contract.guest import GuestInfo, QueryGuests, QueryGuestsReply
from ppec_orchestrator.api.auth import Viewer
from ppec_orchestrator.api.bodies import StrictJsonRoute
from ppec_orchestrator.api.doors import VmDoor, door_of
from ppec_orchestrator.api.services import Here
from ppec_orchestrator.api.vms import VmRefInPath

router = APIRouter(prefix="/v1/vms", tags=["vms"], route_class=StrictJsonRoute)


@router.get("/{vm}/guest", name="get_vm_guest", summary="Ask a VM's guest agent")
async def get_vm_guest(
    services: Here, caller: Viewer, vm: VmRefInPath, timeout_s: Annotated[float, Query(ge=1, le=30)] = 5.0
) -> GuestInfo:
    """The guest's addresses and system in its own words, and whether its file systems are frozen. `timeout_s` is how
    long its agent may take."""
    door = await run_in_threadpool(door_of, services.database, vm)
    question = QueryGuests(vm_ids=(door.vm_id,), timeout_s=timeout_s)
    with services.guest_queries.taken():
        async with services.host_views.line(door.host) as line:
            reply = await line.ask(question, QueryGuestsReply, patience_s=timeout_s)
    return _of(door, reply)


def _of(door: VmDoor, reply: QueryGuestsReply) -> GuestInfo:
    found = next((guest for guest in reply.guests if guest.vm_id == door.vm_id), None)
    if found is None:
        raise PpecError(
            "vm.not_found",
            f"vm {door.name} is not on host {door.host.host}, where the record has it",
            hint="It is being made or deleted, or was removed by hand; `ppec vm show` has its operation.",
            subject=f"vm {door.name}",
        )
    return found
