# SPDX-License-Identifier: Apache-2.0
"""What is asked of the planner: batches of VMs, each with a profile, rules about its neighbours, and how to go about
it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from uuid import UUID

from ppec_contract.api_placement import NPlusOne, Policy
from ppec_contract.vm import NumaPolicy


@dataclass(frozen=True, slots=True)
class Shape:
    """The resources of one VM.

    `pool` names the storage pool of its disk, "" the host's own disk. `nvme` is how many whole NVMe drives it takes
    besides, all of the NUMA cells it sits in.
    """

    vcpus: int
    memory_mib: int
    disk_mib: int
    numa: NumaPolicy = field(default_factory=NumaPolicy)
    pool: str = ""
    nvme: int = 0


@dataclass(frozen=True, slots=True)
class Where:
    """Narrows the hosts; None means anywhere.

    `labels` are pairs that a host must have, `without` pairs that it must not have; an empty value in a pair stands for
    any value of that key.
    """

    datacentre: str | None = None
    cluster: str | None = None
    rack: str | None = None
    host: str | None = None
    vrf: str | None = None
    region: str | None = None
    labels: frozenset[tuple[str, str]] = frozenset()
    without: frozenset[tuple[str, str]] = frozenset()


# The ids of the prefixes that could give an address; None: any that serves the host, one address of each family.
Network = frozenset[int] | None
ANY_NETWORK: tuple[Network, ...] = (None,)


@dataclass(frozen=True, slots=True)
class Profile:
    """All that decides which hosts could take a VM but for its neighbours. VMs of one profile are interchangeable, so
    what is worked out for a profile is worked out once.

    `capabilities` are what a host's agent must announce to be told of such VMs, `networks` of what it gets one of the
    addresses that are counted as free, `fixed` which prefixes could give the addresses that are its already, or held
    for it, by number: they must serve the host, but nothing of them is counted.
    """

    shape: Shape
    architecture: str
    where: Where = field(default_factory=Where)
    capabilities: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ANY_NETWORK
    fixed: tuple[frozenset[int], ...] = ()


class Level(StrEnum):
    """What fails, or is shared, as one."""

    HOST = "host"
    RACK = "rack"
    DATACENTRE = "datacentre"


@dataclass(frozen=True, slots=True)
class Group:
    """VMs that are to stand together (affinity) or apart (anti-affinity), on or over one level.

    A hard group is kept, whatever it costs; of a soft one, a host that keeps more of a VM's soft groups comes first.
    The definition is the same for all members: members of one name with unequal definitions are a fault of the caller.
    """

    name: str
    apart: bool = True
    level: Level = Level.HOST
    hard: bool = True


@dataclass(frozen=True, slots=True)
class VmRequest:
    """One VM to place. `excluded_hosts` are those that failed it before; of a batch, the highest `priority` goes
    first."""

    vm_id: UUID
    name: str
    profile: Profile
    excluded_hosts: frozenset[str] = frozenset()
    groups: tuple[Group, ...] = ()
    priority: int = 0

    @property
    def kind(self) -> tuple[Profile, tuple[Group, ...], frozenset[str]]:
        """All that decides where it can stand: where one of a kind fits, every other does."""
        return self.profile, self.groups, self.excluded_hosts


class Spare(StrEnum):
    """What is made of the rule that all VMs can restart elsewhere after the loss of one host, or rack (N+1)."""

    OFF = "off"
    WARN = "warn"
    REQUIRED = "required"


@dataclass(frozen=True, slots=True)
class SpareRule:
    """N+1 for the clusters that the plan touches; `level` is what may be lost: one host, or one rack.

    Required, no VM is placed where that would leave a loss that can't be made good, or would be lost so itself; as a
    warning, the plan names what can't. `witnessed` has the plan say where each VM would restart. Rules that clusters
    have themselves hold besides (`spare_rules.py`), unless it is to be seen what would be without `clusters`."""

    mode: Spare = Spare.OFF
    level: Level = Level.HOST
    witnessed: bool = False
    clusters: bool = True

    @classmethod
    def of(cls, asked: NPlusOne) -> SpareRule:
        return cls(Spare(asked.mode), Level(asked.level))


NO_SPARE_RULE = SpareRule()


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """A batch of VMs.

    `all_or_nothing` has the largest VMs placed first, whatever order they came in; without it they go in the order
    given. The plan of such a batch may still place some and refuse others, to say of each why: see `Plan.serves`.
    `most_vcpus`, without `all_or_nothing`, leaves it to the planner whom it refuses of VMs that don't all fit: so that
    those placed have the most vCPUs in all. One of a higher priority outweighs all of lower ones, even then. `at_least`
    so many are of use; what places more for fewer of them helps nobody.
    `batch_hosts` says how many VMs of this batch already stand on a host (a replan). `most_moves` is how many running
    VMs a plan may move between cells of their host to open one for a VM; 0 leaves them where they are.
    `contended_hosts` are left out, because another request is just taking room there."""

    vms: tuple[VmRequest, ...]
    policy: Policy = Policy.BALANCED
    all_or_nothing: bool = False
    most_vcpus: bool = False
    at_least: int = 0
    batch_hosts: Mapping[str, int] = field(default_factory=dict)
    spare: SpareRule = NO_SPARE_RULE
    most_moves: int = 0
    contended_hosts: frozenset[str] = frozenset()

    @classmethod
    def alike(  # noqa: PLR0913 - each is a field of its own
        cls,
        names: Iterable[tuple[UUID, str]],
        shape: Shape,
        architecture: str,
        *,
        where: Where | None = None,
        policy: Policy = Policy.BALANCED,
        capabilities: frozenset[str] = frozenset(),
        batch_hosts: Mapping[str, int] | None = None,
    ) -> PlanRequest:
        """VMs of one profile, by id and name."""
        profile = Profile(shape, architecture, where or Where(), capabilities)
        vms = tuple(VmRequest(vm_id, name, profile) for vm_id, name in names)
        return cls(vms, policy, batch_hosts=batch_hosts or {})
