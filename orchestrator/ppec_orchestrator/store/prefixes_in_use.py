# SPDX-License-Identifier: Apache-2.0
"""Why a prefix can't be deleted yet: who has addresses of it."""

from __future__ import annotations

from sqlalchemy import Connection, func, select

from ppec_contract.errors import PpecError
from ppec_orchestrator.store.tables import address, vm

# Of the VMs that have some, so many are told.
_NAMED = 3


def prefix_in_use(conn: Connection, prefix_id: int) -> PpecError:
    """Says who has addresses of it, which somebody has: the first few VMs by name."""
    left = select(func.count(address.c.vm_id), func.count()).where(address.c.prefix_id == prefix_id)
    of_vms, count = conn.execute(left).one()
    theirs = select(vm.c.name).join(address, address.c.vm_id == vm.c.id).where(address.c.prefix_id == prefix_id)
    names = conn.execute(theirs.distinct().order_by(vm.c.name).limit(_NAMED + 1)).scalars().all()
    named = ", ".join([*names[:_NAMED], *(["…"] if len(names) > _NAMED else [])])
    whose = []
    if of_vms:
        whose.append(f"VMs have {of_vms} of its addresses" + (f" ({named})" if named else ""))
    if count > of_vms:
        whose.append(f"NetBox has yet to get {count - of_vms} back")
    return PpecError(
        "resource.in_use",
        f"prefix {prefix_id} is in use: {', and '.join(whose)}",
        hint="Delete these VMs first." if of_vms else "Try again once NetBox has them back.",
        subject=f"prefix {prefix_id}",
    )
