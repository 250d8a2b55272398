# SPDX-License-Identifier: Apache-2.0
"""The first section of the ledger: sums over the whole host, and the names in use."""

from __future__ import annotations

import threading
from uuid import UUID

from ppec_agentd.ledger.claims import Amounts, Claim, Totals, no_capacity
from ppec_contract.errors import PpecError


class TotalsSection:
    """Small, under a lock of its own; most refusals end here.

    `_undecided` counts callers between the two sections. While there are any, the sums may be too low for a moment, and
    a refusal waits until they are right: nobody is turned away while there is room. Between the sections nobody waits
    for anything but the other lock, so the wait is short.
    """

    def __init__(self, whole: Amounts, free: Amounts) -> None:
        self._whole = dict(whole)
        self._free = dict(free)
        self._names: dict[str, UUID] = {}
        self._ids: set[UUID] = set()
        self._undecided = 0
        self._lock = threading.Condition()

    def admit(self, claim: Claim, wanted: Amounts) -> None:
        """Takes these amounts and the name; `settle` must follow. Raises `vm.exists` and `host.no_capacity`."""
        with self._lock:
            self._lock.wait_for(lambda: self._has_room(wanted) or not self._undecided)
            self._refuse_duplicate(claim)
            for resource, amount in wanted.items():
                if amount > self._free.get(resource, 0):
                    raise no_capacity(claim.subject, resource, amount, max(0, self._free.get(resource, 0)))
            self._move(wanted)
            self._names[claim.name] = claim.vm_id
            self._ids.add(claim.vm_id)
            self._undecided += 1

    def begin(self) -> None:
        """Somebody is about to change the details and knows only then by how much; `settle` must follow."""
        with self._lock:
            self._undecided += 1

    def settle(self, taken: Amounts) -> None:
        """Ends `admit` or `begin`: what the details took beyond what was taken here, or less than that."""
        with self._lock:
            self._move(taken)
            self._decided()

    def forget(self, name: str, vm_id: UUID, taken: Amounts) -> None:
        """Ends `admit` or `begin` of a VM that now holds nothing."""
        with self._lock:
            self._move(taken)
            if self._names.get(name) == vm_id:
                del self._names[name]
            self._ids.discard(vm_id)
            self._decided()

    def enter(self, name: str, vm_id: UUID, taken: Amounts) -> None:
        """A VM that is there, whatever that does to the sums."""
        with self._lock:
            self._move(taken)
            self._names.setdefault(name, vm_id)
            self._ids.add(vm_id)

    def totals(self) -> Totals:
        with self._lock:
            return Totals(dict(self._whole), dict(self._free))

    def _has_room(self, wanted: Amounts) -> bool:
        return all(amount <= self._free.get(resource, 0) for resource, amount in wanted.items())

    def _move(self, taken: Amounts) -> None:
        for resource, amount in taken.items():
            self._free[resource] = self._free.get(resource, 0) - amount

    def _decided(self) -> None:
        self._undecided -= 1
        self._lock.notify_all()

    def _refuse_duplicate(self, claim: Claim) -> None:
        owner = self._names.get(claim.name)
        if owner is None and claim.vm_id not in self._ids:
            return
        what = f"name {claim.name}" if owner is not None else f"id {claim.vm_id}"
        raise PpecError(
            "vm.exists",
            f"{claim.subject}: the {what} is taken on this host",
            hint="Choose another name, or delete the VM that has it.",
            subject=claim.subject,
            details={"vm_id": str(owner or claim.vm_id)},
        )
