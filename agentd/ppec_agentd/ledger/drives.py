# SPDX-License-Identifier: Apache-2.0
"""NVMe drives that VMs may have whole, by cell. No lock of its own: the details' lock guards it.

A drive that a VM gave back is *settling*: it holds the VM's data until it is erased, and is nobody's until then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from enum import StrEnum

from ppec_agentd.ledger.claims import NVME_DRIVES, no_capacity


class DriveState(StrEnum):
    """`free`: erased, and the next VM's. `held`: a domain has it. `settling`: to be taken back and erased first.
    `out`: can't be handed over as things are."""

    FREE = "free"
    HELD = "held"
    SETTLING = "settling"
    OUT = "out"


class CellDrives:
    """Which drives there are near which cell, and the state of each. None is free before somebody says so.

    Several domains may have a drive, if somebody defined them by hand: it is held until the last is gone.
    """

    def __init__(self, cell_by_drive: Mapping[str, int]) -> None:
        self._cells = dict(cell_by_drive)
        # As they are while nobody holds them.
        self._states = dict.fromkeys(self._cells, DriveState.SETTLING)
        self._holders: Counter[str] = Counter()
        self._uses: Counter[str] = Counter()

    def uses(self, drive: str) -> int:
        """How often domains were seen to have it, since this ledger is there: what was known of it before the last time
        doesn't hold any more."""
        return self._uses[drive]

    def state(self, drive: str) -> DriveState:
        return DriveState.HELD if self._holders[drive] else self._states[drive]

    def states(self) -> dict[str, DriveState]:
        return {drive: self.state(drive) for drive in self._cells}

    def known(self, drives: Iterable[str]) -> frozenset[str]:
        """Those of them that are for VMs."""
        return frozenset(drives) & self._cells.keys()

    def count(self, cell: int, *states: DriveState) -> int:
        return sum(self.state(drive) in states for drive, near in self._cells.items() if near == cell)

    def choose(self, subject: str, wanted: int, cells: Collection[int]) -> frozenset[str]:
        """So many free drives, as many near each of the cells, rounded up. Raises `host.no_capacity`."""
        chosen: set[str] = set()
        for cell in sorted(set(cells)) if wanted else ():
            part = drives_per_cell(wanted, cells)
            free = [drive for drive, near in sorted(self._cells.items()) if near == cell and self._is_free(drive)]
            if len(free) < part:
                raise no_capacity(subject, NVME_DRIVES, part, len(free), (cell,))
            chosen.update(free[:part])
        return frozenset(chosen)

    def use(self, drives: Iterable[str]) -> None:
        """A domain has them: they are not just granted to one to come."""
        self._uses.update(drives)

    def take(self, drives: Iterable[str]) -> int:
        """Enters them as held; returns how many of them were free."""
        taken = 0
        for drive in drives:
            taken += self._is_free(drive)
            self._holders[drive] += 1
            self._states[drive] = DriveState.SETTLING
        return taken

    def give(self, drives: Iterable[str]) -> None:
        """None of them is free by this: who had it may have written to it."""
        self._holders.subtract(drives)

    def mark(self, drive: str, state: DriveState) -> int:
        """Says how a drive is that nobody holds; of one that is held it changes nothing. Returns how many fewer are
        free."""
        if self._holders[drive]:
            return 0
        before = self._is_free(drive)
        self._states[drive] = state
        return before - self._is_free(drive)

    def _is_free(self, drive: str) -> bool:
        return self.state(drive) is DriveState.FREE


def drives_per_cell(wanted: int, cells: Collection[int]) -> int:
    return -(-wanted // max(1, len(set(cells))))
