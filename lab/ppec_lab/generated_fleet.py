# SPDX-License-Identifier: Apache-2.0
"""A large fleet made up by chance: hosts of three shapes in racks and clusters, filled with VMs. Pure.

The same seed makes the same fleet. Shapes, sizes and their weights follow a real fleet's public figures: two sockets a
host, a reserve of two cores and 8 GiB on each, VMs that fit one socket, hosts filled to some 65 % in the mean.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar
from uuid import UUID

SEED = 20241122
HOSTS_PER_RACK = 40
RACKS_PER_CLUSTER = 12
CLUSTERS_PER_DATACENTRE = 5
VRFS = ("red", "green", "blue", "grey")
# Of these VRFs VMs have an IPv6 address besides.
DUAL = ("blue",)
RESERVED_CORES, RESERVED_MIB = 2, 8 * 1024
SOCKETS = 2
# Near each socket, for VMs; and a storage pool that some hosts have.
DRIVES_PER_SOCKET = 2
POOL, POOL_MIB = "san", 20 * 1024 * 1024
# What a host keeps free of memory on each socket, and of disk.
_SPARE_MIB = 1024
_MEAN_FILL, _SPREAD = 0.65, 0.18
_EMPTIEST, _FULLEST = 0.05, 0.97
# A host that turned away so many sizes in turn is full.
_MISSES = 12


class HostShape(NamedTuple):
    """Of one of two equal sockets, and of the host's disk."""

    name: str
    weight: int
    cores: int
    memory_mib: int
    disk_mib: int


class Flavor(NamedTuple):
    name: str
    weight: int
    vcpus: int
    memory_mib: int
    disk_mib: int


_GIB, _TIB = 1024, 1024 * 1024
P = TypeVar("P", HostShape, Flavor)
SHAPES = (
    HostShape("s104", 55, 52, 384 * _GIB, 7 * _TIB),
    HostShape("m128", 35, 64, 512 * _GIB, 14 * _TIB),
    HostShape("l192", 10, 96, 768 * _GIB, 14 * _TIB),
)
FLAVORS = tuple(
    Flavor(f"c{vcpus}.{memory_gib}", weight, vcpus, memory_gib * _GIB, disk_gib * _GIB)
    for weight, vcpus, memory_gib, disk_gib in (
        (14, 2, 4, 40), (14, 2, 8, 60), (20, 4, 16, 100), (8, 4, 32, 100), (16, 8, 32, 200), (8, 8, 64, 400),
        (5, 12, 96, 400), (6, 16, 64, 300), (4, 16, 128, 800), (2, 24, 192, 1200), (2, 32, 256, 1600),
        (1, 48, 320, 2000),
    )
)  # fmt: skip
TIERS = ("web", "api", "db", "cache", "batch", "queue")
IMAGES = ("debian-12", "debian-13", "ubuntu-24.04", "rocky-9", "windows-2025")
# Every fifth cluster is of the second architecture.
ARCHITECTURES = ("x86_64", "x86_64", "x86_64", "x86_64", "aarch64")


@dataclass(slots=True)
class Socket:
    """Usable room: the reserve is not in it. Its NUMA cell has the same number."""

    cores: int
    memory_mib: int
    cores_used: int = 0
    memory_used_mib: int = 0
    drives_used: int = 0


@dataclass(slots=True)
class GeneratedHost:
    """`known` is false for one that is registered and never reported: it holds nothing."""

    number: int
    shape: HostShape
    labels: dict[str, str]
    known: bool
    silent: bool
    draining: bool
    sockets: list[Socket]
    disk_used_mib: int = 0
    pool_used_mib: int = 0
    vms: list[GeneratedVm] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"h{self.number:05d}"

    @property
    def rack(self) -> int:
        return self.number // HOSTS_PER_RACK

    @property
    def cluster(self) -> int:
        return self.rack // RACKS_PER_CLUSTER

    @property
    def vrf(self) -> str:
        return VRFS[self.rack % len(VRFS)]

    @property
    def pool_mib(self) -> int:
        """Of the pool `POOL`, which every fourth host has."""
        return POOL_MIB if self.known and self.number % 4 == 0 else 0

    @property
    def architecture(self) -> str:
        return ARCHITECTURES[self.cluster % len(ARCHITECTURES)]

    def takes(self, flavor: Flavor) -> int | None:
        """The fuller socket that has room for it, if one has."""
        if not self.known or self.shape.disk_mib - self.disk_used_mib - flavor.disk_mib < _SPARE_MIB:
            return None
        fitting = [
            number
            for number, socket in enumerate(self.sockets)
            if socket.cores - socket.cores_used >= flavor.vcpus
            and socket.memory_mib - socket.memory_used_mib - flavor.memory_mib >= _SPARE_MIB
        ]
        return max(fitting, key=lambda number: (self.sockets[number].cores_used, -number), default=None)

    @property
    def filled(self) -> float:
        return sum(s.cores_used for s in self.sockets) / sum(s.cores for s in self.sockets)


@dataclass(slots=True)
class GeneratedVm:
    """`first_core` is the first of its cores on its socket, counted without the reserve; each vCPU has a core."""

    number: int
    vm_id: UUID
    name: str
    flavor: Flavor
    image: str
    labels: dict[str, str]
    observed: str
    socket: int
    first_core: int
    pool: str | None = None
    # Of the drives near its socket, counted over all of its VMs.
    drives: range = range(0)


@dataclass(frozen=True)
class GeneratedFleet:
    """`failed` are VMs of which only the record is left."""

    hosts: list[GeneratedHost]
    failed: list[GeneratedVm]

    def placed(self) -> Iterator[tuple[GeneratedHost, GeneratedVm]]:
        return ((host, vm) for host in self.hosts for vm in host.vms)


def generate(hosts: int, vms: int, seed: int = SEED) -> GeneratedFleet:
    """Raises ValueError when so many VMs don't fit on so many hosts. One VM in five hundred has failed."""
    dice = random.Random(seed)  # noqa: S311 - a fleet, not a secret
    made = [_host(dice, number) for number in range(hosts)]
    failed = vms // 500
    numbers = iter(range(vms))
    wanted = {host.number: min(_FULLEST, max(_EMPTIEST, dice.gauss(_MEAN_FILL, _SPREAD))) for host in made}
    left = vms - failed
    while left:
        before = left
        # In an order of its own: else a fleet of few VMs had them all in the first racks.
        for host in dice.sample(made, len(made)):
            left -= _fill(dice, host, wanted[host.number], left, numbers)
        if left == before and min(wanted.values(), default=1) >= 1:
            raise ValueError(f"{left} of {vms} VMs don't fit on {hosts} hosts")
        wanted = {number: min(1.0, fill + 0.1) for number, fill in wanted.items()}
    gone = [_vm(dice, next(numbers), FLAVORS[0], "x86_64", 0, 0) for _ in range(failed)]
    return GeneratedFleet(made, gone)


def _host(dice: random.Random, number: int) -> GeneratedHost:
    shape = _pick(dice, SHAPES)
    labels = {"shape": shape.name, "power": f"feed-{dice.randrange(2)}"}
    if dice.random() < 0.1:
        labels["gpu"] = ""
    chance = dice.random()
    sockets = [Socket(shape.cores - RESERVED_CORES, shape.memory_mib - RESERVED_MIB) for _ in range(SOCKETS)]
    return GeneratedHost(
        number, shape, labels, known=chance >= 0.005, silent=0.005 <= chance < 0.015, draining=chance > 0.98,
        sockets=sockets,
    )  # fmt: skip


def _fill(dice: random.Random, host: GeneratedHost, fill: float, most: int, numbers: Iterator[int]) -> int:
    """Until it is filled so far, is full, or has `most` VMs more; how many it got."""
    added = misses = 0
    while added < most and misses < _MISSES and host.known and host.filled < fill:
        flavor = _pick(dice, FLAVORS)
        socket = host.takes(flavor)
        if socket is None:
            misses += 1
            continue
        room = host.sockets[socket]
        made = _vm(dice, next(numbers), flavor, host.architecture, socket, room.cores_used)
        host.vms.append(made)
        room.cores_used += flavor.vcpus
        room.memory_used_mib += flavor.memory_mib
        _store(host, room, made)
        added += 1
    return added


def _store(host: GeneratedHost, room: Socket, vm: GeneratedVm) -> None:
    """Some VMs have their disk in the host's pool, some a drive of their own."""
    if vm.number % 5 == 0 and host.pool_mib - host.pool_used_mib >= vm.flavor.disk_mib:
        vm.pool = POOL
        host.pool_used_mib += vm.flavor.disk_mib
    else:
        host.disk_used_mib += vm.flavor.disk_mib
    if vm.number % 20 == 0 and room.drives_used < DRIVES_PER_SOCKET:
        vm.drives = range(room.drives_used, room.drives_used + 1)
        room.drives_used += 1


def _vm(
    dice: random.Random, number: int, flavor: Flavor, architecture: str, socket: int, first_core: int
) -> GeneratedVm:
    tier = dice.choice(TIERS)
    labels = {"tier": tier, "app": f"app-{dice.randrange(4000):04d}", "env": dice.choice(("prod", "prod", "test"))}
    image = dice.choice(IMAGES) if architecture == "x86_64" else f"debian-12-{architecture}"
    observed = "running" if (chance := dice.random()) < 0.95 else "stopped" if chance < 0.99 else "paused"
    vm_id = UUID(int=dice.getrandbits(128), version=4)
    return GeneratedVm(number, vm_id, f"{tier}-{number:06d}", flavor, image, labels, observed, socket, first_core)


def _pick(dice: random.Random, choices: Sequence[P]) -> P:
    return dice.choices(choices, [choice.weight for choice in choices])[0]
