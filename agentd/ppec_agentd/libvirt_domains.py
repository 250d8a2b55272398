# SPDX-License-Identifier: Apache-2.0
"""Looking up a domain on a libvirt connection, and changing it unless that is done already. All of it blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import UUID

import libvirt

from ppec_agentd.lifecycle import vm_not_found
from ppec_contract.errors import PpecError
from ppec_contract.vm import VmState

STATES = {
    libvirt.VIR_DOMAIN_RUNNING: VmState.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: VmState.RUNNING,
    # The guest is on its way down and still runs.
    libvirt.VIR_DOMAIN_SHUTDOWN: VmState.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: VmState.PAUSED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: VmState.PAUSED,
    libvirt.VIR_DOMAIN_SHUTOFF: VmState.STOPPED,
    libvirt.VIR_DOMAIN_CRASHED: VmState.CRASHED,
}


def find(connection: Any, vm_id: UUID) -> Any | None:
    return found(partial(connection.lookupByUUIDString, str(vm_id)))


def find_name(connection: Any, name: str) -> Any | None:
    return found(partial(connection.lookupByName, name))


def found(look: Callable[[], Any]) -> Any | None:
    try:
        return look()
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise


def false_if_gone(work: Callable[[Any], bool], connection: Any) -> bool:
    """The domain may vanish between any two calls; for what removes it, gone is done."""
    return bool(found(partial(work, connection)))


def must_find(connection: Any, vm_id: UUID) -> Any:
    domain = find(connection, vm_id)
    if domain is None:
        raise vm_not_found(vm_id)
    return domain


def unless(already: bool, act: Callable[[], object], *, done: Callable[[], bool]) -> bool:
    """Act unless it is `already` so. A refusal counts as "no change" if by then it is `done`: somebody was faster."""
    if already:
        return False
    try:
        act()
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID and done():
            return False
        raise
    return True


def wrong_state(vm_id: UUID, what: str, found: str) -> PpecError:
    return PpecError("vm.wrong_state", f"can't {what} vm {vm_id}: it {found}", subject=f"vm {vm_id}")
