# SPDX-License-Identifier: Apache-2.0
"""What could be changed so that a refused VM fits: in the request, or on hosts. Each change can be applied to the
model.

A change says itself in words, what it costs (the order in which they are offered) and what becomes of request and
fleet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ppec_orchestrator.placement.applied import applied
from ppec_orchestrator.placement.demand import CellResource, free_name
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState
from ppec_orchestrator.placement.plan import Evidence, Move, Plan
from ppec_orchestrator.placement.request import SpareRule, VmRequest
from ppec_orchestrator.placement.rules import spare_without, without, words_of

# Of one, and of several.
_WORDS: Mapping[CellResource, tuple[str, str]] = {
    "cores": ("core", "cores"),
    "memory_mib": ("MiB of memory", "MiB of memory"),
    "shared_vcpus": ("shared vCPU", "shared vCPUs"),
    "pages_2m": ("huge page of 2 MiB", "huge pages of 2 MiB"),
    "pages_1g": ("huge page of 1 GiB", "huge pages of 1 GiB"),
    "nvme": ("NVMe drive", "NVMe drives"),
}


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Rules of the request that are given up: names of `rules.py: RULES`, or `group:` and a group's name."""

    rules: tuple[str, ...]

    @property
    def cost(self) -> tuple[int, float]:
        return 1, float(len(self.rules))

    def sentence(self) -> str:
        return " and ".join(words_of(rule) for rule in self.rules)

    def apply(self, fleet: Fleet, vm: VmRequest) -> tuple[Fleet, VmRequest]:
        for rule in self.rules:
            vm = without(vm, rule)
        return fleet, vm


@dataclass(frozen=True, slots=True)
class _OneOpened(ABC):
    """Any one of these hosts is opened to the VM; in the model the first."""

    hosts: tuple[str, ...]

    def apply(self, fleet: Fleet, vm: VmRequest) -> tuple[Fleet, VmRequest]:
        return fleet.changed([self.opened(_host(fleet, self.hosts[0]), vm)]), vm

    @staticmethod
    @abstractmethod
    def opened(host: HostState, vm: VmRequest) -> HostState:
        """The host as the VM could have it; the very same where this is not what keeps the VM out."""


@dataclass(frozen=True, slots=True)
class EndDrain(_OneOpened):
    """One of these hosts takes new VMs again."""

    @property
    def cost(self) -> tuple[int, float]:
        return 2, 1.0

    def sentence(self) -> str:
        return f"end the drain of {_any_of(self.hosts)}"

    @staticmethod
    def opened(host: HostState, vm: VmRequest) -> HostState:
        return replace(host, draining=False) if host.draining else host


@dataclass(frozen=True, slots=True)
class UpgradeAgent(_OneOpened):
    """The agent of one of these hosts is upgraded to one that knows all that is asked for."""

    @property
    def cost(self) -> tuple[int, float]:
        return 2, 10.0

    def sentence(self) -> str:
        return f"upgrade the agent of {_any_of(self.hosts)}"

    @staticmethod
    def opened(host: HostState, vm: VmRequest) -> HostState:
        asked = vm.profile.capabilities
        return host if asked <= host.capabilities else replace(host, capabilities=host.capabilities | asked)


@dataclass(frozen=True, slots=True)
class BringBack(_OneOpened):
    """One of these hosts, silent now, is heard of again, with the room that is known of it."""

    @property
    def cost(self) -> tuple[int, float]:
        return 2, 20.0

    def sentence(self) -> str:
        return f"bring back {_any_of(self.hosts)}, silent now"

    @staticmethod
    def opened(host: HostState, vm: VmRequest) -> HostState:
        return host if host.live else replace(host, live=True)


@dataclass(frozen=True, slots=True)
class Retune:
    """Running VMs change cells on their host, in this order, so that one opens."""

    host: str
    moves: tuple[Move, ...]

    @property
    def cost(self) -> tuple[int, float]:
        return 2, 1.0 + len(self.moves)

    def sentence(self) -> str:
        count = len(self.moves)
        return f"retune {self.host}: {count} running VM{'s change' if count > 1 else ' changes'} cells"

    def apply(self, fleet: Fleet, vm: VmRequest) -> tuple[Fleet, VmRequest]:
        moves = Evidence(vm.vm_id, step=0, candidates=0, score=0.0, moves=self.moves)
        return applied(fleet, (), Plan((), (), (moves,))), vm


@dataclass(frozen=True, slots=True)
class AddAddresses:
    """So many more free addresses, by the ids of their prefixes."""

    addresses: Mapping[int, int]

    @property
    def cost(self) -> tuple[int, float]:
        return 3, float(sum(self.addresses.values()))

    def sentence(self) -> str:
        counts = [
            f"{'one address' if count == 1 else f'{count} addresses'} in prefix {prefix}"
            for prefix, count in sorted(self.addresses.items())
        ]
        return f"free or add {' and '.join(counts)}"

    def apply(self, fleet: Fleet, vm: VmRequest) -> tuple[Fleet, VmRequest]:
        more = {prefix: fleet.free_addresses.get(prefix, 0) + count for prefix, count in self.addresses.items()}
        return replace(fleet, free_addresses={**fleet.free_addresses, **more}), vm


@dataclass(frozen=True, slots=True)
class OtherSize:
    """A smaller VM, otherwise the same."""

    vcpus: int
    memory_mib: int
    disk_mib: int
    lost: float
    nvme_drives: int = 0

    @property
    def cost(self) -> tuple[int, float]:
        return 4, self.lost

    def sentence(self) -> str:
        vcpus = f"{self.vcpus} vCPU{'s' if self.vcpus > 1 else ''}"
        drives = f", with {_amount('nvme', self.nvme_drives)}" if self.nvme_drives else ""
        return f"ask for {vcpus}, {self.memory_mib} MiB and a disk of {self.disk_mib} MiB{drives}"

    def apply(self, fleet: Fleet, vm: VmRequest) -> tuple[Fleet, VmRequest]:
        smaller = replace(vm.profile.shape, vcpus=self.vcpus, memory_mib=self.memory_mib, disk_mib=self.disk_mib)
        smaller = replace(smaller, nvme=self.nvme_drives)
        return fleet, replace(vm, profile=replace(vm.profile, shape=smaller))


@dataclass(frozen=True, slots=True)
class Room:
    """What is to be freed on one host: by cell and resource, and of its disk or of a pool."""

    host: str
    cells: Mapping[int, Mapping[CellResource, int]]
    disk_mib: int = 0
    pool: str = ""


@dataclass(frozen=True, slots=True)
class FreeRoom:
    """VMs are moved away or deleted on any one of these hosts until this much is free; `weight` compares amounts."""

    rooms: tuple[Room, ...]
    weight: float

    @property
    def cost(self) -> tuple[int, float]:
        return 5, self.weight

    def sentence(self) -> str:
        room = self.rooms[0]
        parts = [
            f"{_amount(resource, amount)} in cell {cell}"
            for cell, amounts in sorted(room.cells.items())
            for resource, amount in amounts.items()
        ]
        if room.disk_mib:
            parts.append(f"{room.disk_mib} MiB of {f'pool {room.pool}' if room.pool else 'disk'}")
        others = len(self.rooms) - 1
        elsewhere = self.rooms[1].host if others == 1 else f"any of {others} more hosts"
        return f"free {' and '.join(parts)} of {room.host}" + (f", or as much on {elsewhere}" if others else "")

    def apply(self, fleet: Fleet, vm: VmRequest) -> tuple[Fleet, VmRequest]:
        return fleet.changed([self.host(fleet)]), vm

    def host(self, fleet: Fleet) -> HostState:
        """The first of the hosts, with that room."""
        room = self.rooms[0]
        host = _host(fleet, room.host)
        cells = tuple(_freed(cell, room.cells.get(cell.cell, {})) for cell in host.cells)
        pools = dict(host.pools)
        if room.pool:
            pools[room.pool] = replace(pools[room.pool], free_mib=pools[room.pool].free_mib + room.disk_mib)
        own_mib = 0 if room.pool else room.disk_mib
        return replace(host, cells=cells, pools=pools, disk_free_mib=host.disk_free_mib + own_mib)


Opening = EndDrain | UpgradeAgent | BringBack
# What opens a host that takes no VMs of a kind, whatever room it has. The first is given up last.
OPENINGS: tuple[type[Opening], ...] = (EndDrain, UpgradeAgent, BringBack)
Single = GiveUp | Opening | Retune | AddAddresses | OtherSize | FreeRoom


@dataclass(frozen=True, slots=True)
class Several:
    """All of these, where none is enough: rules given up, a host opened, and something else, in this order."""

    changes: tuple[Single, ...]

    @property
    def rules(self) -> GiveUp:
        """Those given up."""
        first = self.changes[0]
        return first if isinstance(first, GiveUp) else GiveUp(())

    @property
    def cost(self) -> tuple[int, float]:
        # In the order of what comes besides rules, whose own figure only compares it with its like.
        costs = [change.cost for change in self.changes if not isinstance(change, GiveUp)]
        return 6, sum(kind + amount / (1 + amount) for kind, amount in costs)

    def sentence(self) -> str:
        *most, last = (change.sentence() for change in self.changes)
        return f"{', '.join(most)}, and {last}"

    def apply(self, fleet: Fleet, vm: VmRequest) -> tuple[Fleet, VmRequest]:
        for change in self.changes:
            fleet, vm = change.apply(fleet, vm)
        return fleet, vm


Change = Single | Several


def together(changes: Sequence[Single]) -> Change:
    return changes[0] if len(changes) == 1 else Several(tuple(changes))


def spare_after(change: Change, spare: SpareRule) -> SpareRule:
    """What becomes of the rule about spare room."""
    given_up = change.rules if isinstance(change, Several) else change
    return spare_without(given_up.rules, spare) if isinstance(given_up, GiveUp) else spare


def _amount(resource: CellResource, amount: int) -> str:
    one, several = _WORDS[resource]
    return f"{amount} {one if amount == 1 else several}"


def _freed(cell: CellState, amounts: Mapping[CellResource, int]) -> CellState:
    return replace(cell, **{free_name(each): getattr(cell, free_name(each)) + n for each, n in amounts.items()})


def _any_of(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} or any of {len(names) - 1} more hosts"


def _host(fleet: Fleet, name: str) -> HostState:
    return fleet.hosts[fleet.index[name]]
