# SPDX-License-Identifier: Apache-2.0
"""Before serving: rebuild the ledger from the domains, then finish or undo what a crash interrupted.

By the journal's intents without an answer:

- create that failed and whose undo was still due: undone, whatever the domain does by now.
- create, and the domain runs: it was done, only the answer is missing. It is recorded.
- create, otherwise: taken back whole (domain, files, reservation); a repeated request begins anew.
- delete: finished; deleting can't be undone, and what is half deleted is of no use.
- start, stop, reboot, reset, pause, resume: nothing to finish or undo; the VM is what it is, and a repeated request
  acts on that (a guest may so be rebooted or reset a second time).
- freeze: the guest is thawed now, for nobody was told that it is frozen. Freezes that were answered go on to their end.
- thaw: nothing; the end of the freeze comes in any case.
- resize: what stands in the definition counts, be it the old size or the new, and so does what the VM runs with. What
  it holds is brought in line with both, and nothing more is plugged: a repeated request does that. The same is done
  for all VMs that had a resize waiting for their next start.

- retune: each of its VMs is put where its metadata says, whether it was moved by then or not; a repeated request makes
  the moves that are left.

Then domains are taken back that turned up after their create was undone, as the journal says (the hypervisor finished
a call late), and folders are removed of VMs that the journal says are gone (deleted, or never made whole). Any other
folder without a domain is left and named in the log: somebody may have undefined the domain by hand, and the disk is
all there is. NVMe drives that no domain has are looked at last: those that are not clean are taken back and erased.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from uuid import UUID

import structlog

from ppec_agentd.actions.context import HostContext, Steps
from ppec_agentd.actions.create import came_late, undo_create
from ppec_agentd.actions.delete import delete
from ppec_agentd.actions.resize import fit
from ppec_agentd.actions.retune import is_flight, settle_seat
from ppec_agentd.hypervisor import Domain
from ppec_agentd.journal import Entry
from ppec_agentd.observed import vm_info
from ppec_contract.agent import VmResult
from ppec_contract.errors import PpecError
from ppec_contract.vm import VmState

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Recovered:
    """What recovery found and did; VM ids."""

    adopted: int
    finished: tuple[str, ...]
    undone: tuple[str, ...]
    late: tuple[str, ...]
    folders_removed: tuple[str, ...]


async def recover(host: HostContext) -> Recovered:
    """Raises `hypervisor.unavailable`; may then be run again."""
    if host.journal.damaged_lines:
        log.error("journal_damaged", lines=host.journal.damaged_lines)
    domains = {domain.vm_id: domain for domain in await host.hypervisor.domains()}
    _say_gone_pools(host, domains.values())
    host.ledger.follow(domains.values())
    adopted = len(domains)
    finished: list[str] = []
    undone: list[str] = []
    frozen = host.thaws.resume()
    for entry in host.journal.in_flight():
        done = await _settle(host, entry, domains.get(UUID(entry.key.vm_id)))
        (finished if done else undone).append(entry.key.vm_id)
    await _fit_resized(host, domains.values())
    late = await _undo_late_domains(host)
    removed = await _remove_orphan_folders(host)
    await host.drives.once()
    recovered = Recovered(adopted, tuple(finished), tuple(undone), late, removed)
    if frozen:
        log.info("frozen_guests", vm_ids=[str(vm_id) for vm_id in frozen])
    log.info("recovered", adopted=adopted, finished=finished, undone=undone, late=late, folders_removed=removed)
    return recovered


async def _settle(host: HostContext, entry: Entry, domain: Domain | None) -> bool:
    """Whether the interrupted action counts as done."""
    key, vm_id = entry.key, UUID(entry.key.vm_id)
    if key.action == "CreateVms":
        if domain is not None and entry.undo != "due" and _made_and_running(domain, key.operation_id):
            seen, seen_at = vm_info(domain), host.moments.observed()
            result = VmResult(vm_id=vm_id, name=domain.name, changed=True, vm=seen, observed_at=seen_at)
            await asyncio.to_thread(host.journal.append_answer, key, entry.fence, result)
            return True
        await undo_create(host, vm_id, key.operation_id)
    elif key.action == "FreezeVms" and host.thaws.frozen(vm_id):
        await host.thaws.thaw_after(vm_id, 0)
    elif key.action == "DeleteVms" and (domain is None or domain.managed):
        outcome = await delete(host, vm_id, Steps(vm_id, entry.name))
        name, gone_at = outcome.name or entry.name, host.moments.observed()
        result = VmResult(vm_id=vm_id, name=name, changed=outcome.changed, observed_at=gone_at)
        await asyncio.to_thread(host.journal.append_answer, key, entry.fence, result)
        return True
    elif key.action == "RetuneHost" and not is_flight(vm_id):
        try:
            await settle_seat(host, vm_id)
        except PpecError as error:
            if error.retryable:
                raise
            # One VM that won't be moved must not keep the agent from serving: housekeeping comes back to it.
            log.warning("seat_still_open", vm_id=str(vm_id), code=error.code, why=error.message)
            host.open_seats[vm_id] = key
            return False
    await asyncio.to_thread(partial(host.journal.append_abandoned, key, undone=key.action == "CreateVms"))
    return False


async def _fit_resized(host: HostContext, domains: Iterable[Domain]) -> None:
    """A resize that was interrupted, or that waits for a start, shows in the domain and not in the journal alone."""
    for domain in domains:
        if domain.metadata is None or not domain.metadata.pending:
            continue
        host.unfit[domain.vm_id] = None
        try:
            await fit(host, domain.vm_id)
        except PpecError as error:
            # What it holds is enough, only more than it needs: housekeeping comes back to it.
            log.warning("still_unfit", vm_id=str(domain.vm_id), code=error.code, why=error.message)


async def _undo_late_domains(host: HostContext) -> tuple[str, ...]:
    undone = []
    for domain in await host.hypervisor.domains():
        if domain.metadata is None or not await came_late(host, domain):
            continue
        try:
            await undo_create(host, domain.vm_id, domain.metadata.operation_id)
            undone.append(str(domain.vm_id))
        except PpecError as error:
            # One domain that won't go must not keep the agent from serving: housekeeping comes back to it.
            log.warning("late_domain_left", vm_id=str(domain.vm_id), code=error.code, why=error.message)
    return tuple(undone)


def _made_and_running(domain: Domain, operation_id: str) -> bool:
    ours = domain.metadata
    return ours is not None and ours.operation_id == operation_id and domain.state == VmState.RUNNING


async def _remove_orphan_folders(host: HostContext) -> tuple[str, ...]:
    present = {str(domain.vm_id) for domain in await host.hypervisor.domains()}
    gone = host.journal.gone_ids()
    places = await asyncio.to_thread(host.places.names)
    loose = {place / name: name for place, names in places.items() for name in names if name not in present}
    for path, name in loose.items():
        if name not in gone:
            log.warning("folder_without_domain", path=str(path))
    removed = []
    for name in sorted({name for name in loose.values() if name in gone}):
        try:
            if await asyncio.to_thread(host.places.remove, UUID(name)):
                removed.append(name)
        except PpecError as error:
            # It holds nothing in the ledger, and must not keep the agent from serving: the next recovery tries again.
            log.warning("folder_left", vm_id=name, code=error.code, why=error.message)
    return tuple(removed)


def _say_gone_pools(host: HostContext, domains: Iterable[Domain]) -> None:
    """Their VMs go on, and what they hold stays in the ledger; nothing new is made there."""
    for domain in domains:
        pool = domain.metadata.pool if domain.metadata is not None else ""
        if pool and pool not in host.places.pools:
            log.warning("pool_gone", pool=pool, vm_id=str(domain.vm_id), vm=domain.name)
