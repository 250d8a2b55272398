# SPDX-License-Identifier: Apache-2.0
"""From a VM in a path to the host it is on, for what is asked of the host directly."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from ppec_contract.errors import PpecError
from ppec_orchestrator.host_views.port import HostDoor
from ppec_orchestrator.store import vms
from ppec_orchestrator.store.database import Database


@dataclass(frozen=True, slots=True)
class VmDoor:
    """A VM, and how its host is reached."""

    vm_id: UUID
    name: str
    host: HostDoor


def door_of(database: Database, ref: str) -> VmDoor:
    """Raises `vm.not_found`, and `vm.wrong_state` for a VM that is on no host."""
    with database.read() as conn:
        (found,) = vms.find(conn, [ref])
        place = vms.endpoints(conn, [found.host]) if found.host is not None else {}
    if found.host is None or found.host not in place:
        raise PpecError(
            "vm.wrong_state",
            f"vm {found.name} is on no host: it is {found.record.value}",
            hint="`ppec operation show` of its operation says why.",
            subject=f"vm {found.name}",
        )
    endpoint = place[found.host]
    return VmDoor(found.vm_id, found.name, HostDoor(found.host, endpoint.address, endpoint.port))
