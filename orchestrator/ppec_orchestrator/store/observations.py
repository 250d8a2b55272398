# SPDX-License-Identifier: Apache-2.0
"""What hosts answer about VMs, applied to the record in the order in which the hosts looked.

An answer comes with an operation's run, a report straight from the host, and either may be the slower one. Both have a
moment by the order of the host's agent (`ppec_contract.vm.Moment`); the later one stands. A host's row has its latest
report's, an allocation its VM's latest answer's. `reports.py` does the same from the reports' side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, Select, bindparam, select, update

from ppec_contract.agent import VmResult
from ppec_contract.api_vms import VmRecord
from ppec_orchestrator.store import sizes
from ppec_orchestrator.store.seats import follow
from ppec_orchestrator.store.tables import allocation, host, vm


def record_observed(
    conn: Connection, answers: Sequence[VmResult], now: datetime, record: VmRecord | None = None
) -> None:
    """What hosts answered about VMs, and `record` for all of those VMs if given.

    What is known already of a VM from a later moment stays: the answer may have been overtaken by a report, or be a
    repeated one from long ago.
    """
    about = {answer.vm.vm_id: answer for answer in answers if answer.vm is not None}
    if not about:
        return
    # First of all: who writes a host's report has the host's row before its VMs'.
    fresh = {vm_id: about[vm_id] for vm_id in _not_overtaken(conn, about)}
    if record is not None:
        conn.execute(update(vm).where(vm.c.id.in_(list(about))).values(record=record.value))
    if not fresh:
        return
    conn.execute(
        update(vm)
        .where(vm.c.id == bindparam("which"))
        .values(
            observed=bindparam("seen_state"),
            observed_at=now,
            pins=bindparam("seen_pins", type_=vm.c.pins.type),
        ),
        [
            {"which": info.vm_id, "seen_state": info.state.value, "seen_pins": [pin.model_dump() for pin in info.pins]}
            for info in (answer.vm for answer in fresh.values())
            if info is not None
        ],
    )
    moments = [
        {"which": vm_id, "process": at.agent_started_at_unix_ms, "count": at.tick}
        for vm_id, at in ((vm_id, answer.observed_at) for vm_id, answer in fresh.items())
        if at is not None
    ]
    infos = {vm_id: answer.vm for vm_id, answer in fresh.items() if answer.vm is not None}
    follow(conn, {vm_id: info.cells for vm_id, info in infos.items()})
    between = select(vm.c.id).where(vm.c.id.in_(list(infos)), vm.c.held_vcpus.is_not(None))
    sizes.follow(conn, {vm_id: infos[vm_id] for vm_id in conn.execute(between).scalars()})
    if moments:
        seen: dict[str, Any] = {"seen_started_at_unix_ms": bindparam("process"), "seen_tick": bindparam("count")}
        conn.execute(update(allocation).where(allocation.c.vm_id == bindparam("which")).values(seen), moments)


def _not_overtaken(conn: Connection, about: Mapping[UUID, VmResult]) -> list[UUID]:
    """Takes turns with these hosts' reports, by their rows, until the transaction ends."""
    where = select(allocation.c.host_id).where(allocation.c.vm_id.in_(list(about)))
    # By id: see `reservations.reserve`.
    locked = select(host.c.id).where(host.c.id.in_(where)).order_by(host.c.id).with_for_update(key_share=True)
    conn.execute(locked).all()
    known: Select[Any] = (
        select(allocation, host.c.agent_started_at_unix_ms, host.c.report_tick)
        .join(host, host.c.id == allocation.c.host_id)
        .where(allocation.c.vm_id.in_(list(about)))
    )
    overtaken = {row.vm_id for row in conn.execute(known) if _overtaken(about[row.vm_id], row)}
    return [vm_id for vm_id in about if vm_id not in overtaken]


def _overtaken(answer: VmResult, known: Row[Any]) -> bool:
    """Whether the host's latest report, or another answer, is of a later moment."""
    at = answer.observed_at
    if at is None:
        # A journal's answer from before the agent gave moments is older than whatever has one.
        return answer.replayed and (known.report_tick is not None or known.seen_tick is not None)
    moment = (at.agent_started_at_unix_ms, at.tick)
    # Of a report without a moment only its process is known.
    reported = (known.agent_started_at_unix_ms, -1 if known.report_tick is None else known.report_tick)
    return moment < reported or (
        known.seen_tick is not None and moment < (known.seen_started_at_unix_ms, known.seen_tick)
    )
