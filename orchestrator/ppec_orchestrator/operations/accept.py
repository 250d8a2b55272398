# SPDX-License-Identifier: Apache-2.0
"""From a request about VMs that are there, or a host, to a queued operation. New VMs are `creation.py`'s."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy import Connection, select

from ppec_contract.api_hosts import HostRetune
from ppec_contract.api_vms import VmAction, VmRecord, VmResize, VmsAction
from ppec_contract.errors import PpecError
from ppec_contract.vm import NumaPolicy, Size, whole_huge_pages
from ppec_orchestrator.operations.enqueueing import Accepted, Ask, Queue, new_id
from ppec_orchestrator.operations.growing import Growing, Growth, Look
from ppec_orchestrator.operations.kinds import delete, power, resize, retune
from ppec_orchestrator.operations.wanted import FreezeInput, GuestInput, ResizeInput, RetuneInput
from ppec_orchestrator.store import operations as store
from ppec_orchestrator.store import sizes, vms
from ppec_orchestrator.store.catalogue import not_found
from ppec_orchestrator.store.clock import Clock
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.operations import NewItem, NewOperation
from ppec_orchestrator.store.tables import host, vm
from ppec_orchestrator.store.vms import KnownVm

T = TypeVar("T")
_KINDS = {VmAction.DELETE: delete.NAME} | {action: kind.name for action, kind in power.KINDS.items()}
# What a guest is asked for, and has a time to obey.
_ASKED_OF_GUESTS = (VmAction.STOP, VmAction.REBOOT)


class Acceptor:
    """Answers with the operation as it was enqueued, or the id of the one that the same request made before."""

    def __init__(self, database: Database, now: Clock, growing: Growing) -> None:
        self._database = database
        self._growing = growing
        self._queue = Queue(database, now)

    def act(self, asked: VmsAction, ask: Ask) -> NewOperation | str:
        """Raises `vm.not_found`, and `vm.wrong_state` for VMs the action can't be taken on now."""

        def writes(conn: Connection) -> NewOperation | str:
            known = self._queue.earlier(conn, ask)
            if known is not None:
                return known
            chosen = vms.find(conn, asked.vms)
            ids = [one.vm_id for one in chosen]
            _free_to(conn, asked.action, chosen)
            operation_id = new_id()
            if asked.action is VmAction.DELETE:
                # Who waits for a VM to be gone finds here what to wait for.
                vms.set_record(conn, ids, VmRecord.DELETING, operation_id)
            items = [NewItem(one.vm_id, one.name, one.host) for one in chosen]
            return self._enqueue(conn, Accepted(ask, operation_id, _KINDS[asked.action], _terms(asked), items))

        return self._queue.once_per_key(ask, lambda: self._write(writes))

    def resize(self, ref: str, asked: VmResize, ask: Ask) -> NewOperation | str:
        """Raises `vm.not_found`, `vm.wrong_state`, `request.invalid`, `host.no_capacity` with what is free, and
        `cluster.exposed` where N+1 is required."""

        def writes(look: Look, conn: Connection) -> NewOperation | str:
            known = self._queue.earlier(conn, ask)
            if known is not None:
                return known
            look.begin(conn)
            (one,) = chosen = vms.find(conn, [ref])
            # Who writes a host's report has the host's row before its VMs'.
            sizes.lock_host_of(conn, one.vm_id)
            _free_to(conn, "resize", chosen)
            row = conn.execute(select(vm).where(vm.c.id == one.vm_id)).one()
            size = Size(vcpus=asked.vcpus or row.vcpus, memory_mib=asked.memory_mib or row.memory_mib)
            _check_pages(row.name, size, NumaPolicy(**row.numa))
            kept = ResizeInput(size=size, held=sizes.held_of(row), timeout_s=asked.timeout_s).model_dump(mode="json")
            taken = sizes.larger(sizes.size_of(row), sizes.held_of(row))
            more = sizes.larger(taken, size)
            if one.host is not None and more != taken:
                look.refuse_exposing(conn, Growth(one.vm_id, one.name, one.host, more))
            sizes.begin(conn, one.vm_id, size)
            items = [NewItem(one.vm_id, one.name, one.host)]
            return self._enqueue(conn, Accepted(ask, new_id(), resize.NAME, kept, items))

        def attempt(look: Look) -> NewOperation | str:
            return self._queue.once_per_key(ask, lambda: self._write(partial(writes, look)))

        return self._growing.through(attempt)

    def retune(self, name: str, asked: HostRetune, ask: Ask) -> NewOperation | str:
        """Raises `host.not_found`. Which VMs it is about only the host's plan says."""

        def writes(conn: Connection) -> NewOperation | str:
            known = self._queue.earlier(conn, ask)
            if known is not None:
                return known
            if conn.execute(select(host.c.id).where(host.c.name == name)).first() is None:
                raise not_found("host", "host", name)
            kept = RetuneInput(host=name, **dict(asked)).model_dump(mode="json")
            return self._enqueue(conn, Accepted(ask, new_id(), retune.KIND.name, kept, ()))

        return self._queue.once_per_key(ask, lambda: self._write(writes))

    def _enqueue(self, conn: Connection, accepted: Accepted) -> NewOperation:
        return self._queue.enqueue(conn, [accepted])[0]

    def _write(self, writes: Callable[[Connection], T]) -> T:
        with self._database.write() as conn:
            return writes(conn)


def _terms(asked: VmsAction) -> dict[str, Any]:
    """What the action's method takes beside the VMs."""
    if asked.action in _ASKED_OF_GUESTS:
        return GuestInput(timeout_s=asked.timeout_s, force=asked.force).model_dump()
    if asked.action is VmAction.FREEZE:
        return FreezeInput(thaw_after_s=asked.thaw_after_s).model_dump()
    return {}


def _check_pages(name: str, size: Size, numa: NumaPolicy) -> None:
    try:
        whole_huge_pages(size.memory_mib, numa)
    except ValueError as error:
        raise PpecError("request.invalid", f"vm {name}: {error}", subject=f"vm {name}") from error


def _free_to(conn: Connection, action: str, chosen: Sequence[KnownVm]) -> None:
    """Two requests for one VM follow one another, and the second sees the first one's operation."""
    ids = [one.vm_id for one in chosen]
    conn.execute(select(vm.c.id).where(vm.c.id.in_(ids)).order_by(vm.c.id).with_for_update())
    _check_states(chosen, action, store.under_way(conn, ids))


def _check_states(chosen: Sequence[KnownVm], action: str, busy: dict[UUID, str]) -> None:
    allowed = {VmRecord.ACTIVE}
    if action == VmAction.DELETE:
        allowed |= {VmRecord.FAILED}
    wrong = [one for one in chosen if one.vm_id in busy or one.record not in allowed]
    if not wrong:
        return
    first = wrong[0]
    why = f"operation {busy[first.vm_id]} is under way" if first.vm_id in busy else f"it is {first.record.value}"
    more = f" (and {len(wrong) - 1} more VMs are in a wrong state)" if len(wrong) > 1 else ""
    raise PpecError(
        "vm.wrong_state",
        f"vm {first.name} can't be asked to {action} now: {why}{more}",
        hint="Wait for the operation, then ask again." if first.vm_id in busy else "",
        subject=f"vm {first.name}",
        details={"vms": [one.name for one in wrong[:20]], "count": len(wrong)},
    )
