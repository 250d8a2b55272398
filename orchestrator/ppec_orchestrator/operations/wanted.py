# SPDX-License-Identifier: Apache-2.0
"""What operations keep of the request they came from: their `input` column, as models."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from uuid import UUID

from pydantic import Field

from ppec_contract.api_hosts import HostRetune
from ppec_contract.api_ipdb import NetworkWanted
from ppec_contract.api_placement import ExposedView, GroupRule, VmItem
from ppec_contract.api_vms import BatchMode, VmsCreate
from ppec_contract.host import Architecture
from ppec_contract.model import HostName, Model
from ppec_contract.version import Capability
from ppec_contract.vm import NumaPolicy, Size
from ppec_orchestrator.ipdb.ranges import Address
from ppec_orchestrator.placement.request import PlanRequest, Profile, Shape, SpareRule, VmRequest, Where
from ppec_orchestrator.store.ipdb import ANY_NETWORK
from ppec_orchestrator.store.vm_groups import group_of


class SizeMeant(Model):
    """A VM's size, how it sits on its host, and the storage pool of its disk (None: the host's own); `flavor` is where
    the size came from, empty for one of the request's own."""

    vcpus: int
    memory_mib: int
    disk_mib: int
    max_vcpus: int | None = None
    max_memory_mib: int | None = None
    numa: NumaPolicy = Field(default_factory=NumaPolicy)
    flavor: str | None = None
    nvme_drives: int = 0
    pool: str | None = None

    @property
    def shape(self) -> Shape:
        return Shape(self.vcpus, self.memory_mib, self.disk_mib, self.numa, self.pool or "", self.nvme_drives)

    @property
    def capabilities(self) -> frozenset[str]:
        """What a host's agent must know to make such VMs."""
        asked = {
            Capability.VM_POLICIES: self.numa != NumaPolicy() or bool(self.max_vcpus or self.max_memory_mib),
            Capability.STORAGE_POOLS: self.pool is not None,
            Capability.NVME_DRIVES: self.nvme_drives > 0,
        }
        return frozenset(capability.value for capability, wanted in asked.items() if wanted)


class CreateInput(SizeMeant):
    """A create: the request without user data (the VMs' rows have it), and what its names meant when it was accepted.

    A flavor may be deleted while a batch is being made; what was asked for stays the same. `sizes` are of VMs, by name,
    that have a size or pool of their own.
    """

    request: VmsCreate
    architecture: Architecture
    sizes: dict[str, SizeMeant] = Field(default_factory=dict)
    # Of each of the request's networks the prefixes that could give its address: see `wanted_networks.candidates`.
    prefixes: tuple[tuple[int, ...] | None, ...] = (None,)
    # The same of VMs, by name, that have networks of their own.
    own_prefixes: dict[str, tuple[tuple[int, ...] | None, ...]] = Field(default_factory=dict)
    # What N+1, as a warning, named when the plan was made that was committed.
    exposed: tuple[ExposedView, ...] = ()

    @cached_property
    def _items(self) -> Mapping[str, VmItem]:
        return {item.name: item for item in self.request.items}

    def networks_of(self, name: str) -> tuple[NetworkWanted, ...]:
        """What addresses the VM gets."""
        item = self._items.get(name)
        return (item.networks if item else ()) or self.request.networks or ANY_NETWORK

    def size_of(self, name: str) -> SizeMeant:
        return self.sizes.get(name, self)

    def rules_of(self, name: str) -> tuple[GroupRule, ...]:
        """The groups that a VM is of."""
        item = self._items.get(name)
        own = item.groups if item else ()
        return tuple({rule.name: rule for rule in (*self.request.groups, *own)}.values())

    def profile_of(self, name: str, counted: Collection[Address] = ()) -> Profile:
        """`counted`: of the addresses asked for by number, those counted as free. None of those that a VM has is."""
        size, candidates = self.size_of(name), self._candidates(name, counted)
        return Profile(
            size.shape,
            self.architecture,
            self._where(name),
            size.capabilities,
            networks=tuple(ids for ids, fixed in candidates if not fixed),
            fixed=tuple(ids for ids, fixed in candidates if fixed and ids is not None),
        )

    def vm_requests(
        self, named: Iterable[tuple[UUID, str, frozenset[str]]], counted: Collection[Address] = ()
    ) -> list[VmRequest]:
        """To place VMs of this request, by id, name, and hosts that failed them before; `counted` as in `profile_of`.
        VMs that are alike share their profile: what is worked out for it is then worked out once."""
        profiles: dict[Hashable, Profile] = {}
        common = tuple(group_of(rule) for rule in self.request.groups)
        found = []
        for vm_id, name, excluded in named:
            key = self._kind(name, counted)
            if key not in profiles:
                profiles[key] = self.profile_of(name, counted)
            item = self._items.get(name)
            groups = tuple(group_of(rule) for rule in self.rules_of(name)) if item else common
            found.append(VmRequest(vm_id, name, profiles[key], excluded, groups, item.priority if item else 0))
        return found

    def _kind(self, name: str, counted: Collection[Address]) -> Hashable:
        """Equal of VMs that have the same profile, and quicker to come by."""
        size, item = self.size_of(name), self._items.get(name)
        own = None if size is self else size.model_dump_json()
        if item is None or not (item.rack or item.host or item.networks):
            return own
        return own, item.rack, item.host, tuple(self._candidates(name, counted))

    def plan_request(self, vms: Sequence[VmRequest], batch_hosts: Mapping[str, int] | None = None) -> PlanRequest:
        """Of `vm_requests`."""
        return PlanRequest(
            vms=tuple(vms),
            policy=self.request.policy,
            all_or_nothing=self.request.mode is BatchMode.ALL_OR_NOTHING,
            most_vcpus=self.request.mode is BatchMode.MOST_VCPUS,
            at_least=self.request.at_least or 0,
            batch_hosts=dict(batch_hosts or {}),
            spare=SpareRule.of(self.request.n_plus_one),
            most_moves=self.request.max_moves,
        )

    def _candidates(self, name: str, counted: Collection[Address]) -> list[tuple[frozenset[int] | None, bool]]:
        """Of each network of a VM the prefixes that could give its address, and whether that is one by number for which
        none that is counted as free is needed."""
        named = self.own_prefixes.get(name, self.prefixes)
        found = zip(named, self.networks_of(name), strict=False)
        return [
            (frozenset(ids) if ids is not None else None, one.address is not None and one.address not in counted)
            for ids, one in found
        ]

    def _where(self, name: str) -> Where:
        asked, own = self.request, self._items.get(name) or self.request
        wanted, avoided = (frozenset(map(_pair, labels)) for labels in (asked.host_labels, asked.avoid_labels))
        rack, host = own.rack or asked.rack, own.host or asked.host
        return Where(asked.datacentre, asked.cluster, rack, host, asked.vrf, asked.region, wanted, avoided)


def _pair(label: str) -> tuple[str, str]:
    """Of `key=value`, or of `key` whatever its value."""
    key, _, value = label.partition("=")
    return key, value


class GuestInput(Model):
    """A stop or a reboot: how long the guest is asked, and what then."""

    timeout_s: float
    force: bool


class FreezeInput(Model):
    """A freeze: when its host ends it by itself."""

    thaw_after_s: float


class RetuneInput(HostRetune):
    """A retune, and of which host."""

    host: HostName


class ResizeInput(Model):
    """A resize: the size wanted, and the one that was held besides the VM's own when it was accepted."""

    size: Size
    held: Size | None = None
    timeout_s: float
