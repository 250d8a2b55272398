# SPDX-License-Identifier: Apache-2.0
"""What operations keep of the request they came from: their `input` column, as models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field

from ppec_contract.api import BatchMode, HostRetune, VmsCreate
from ppec_contract.api_ipdb import NetworkWanted
from ppec_contract.host import Architecture
from ppec_contract.model import HostName, Model
from ppec_contract.version import Capability
from ppec_contract.vm import NumaPolicy, Size
from ppec_orchestrator.placement.request import PlanRequest, Profile, Shape, VmRequest, Where
from ppec_orchestrator.store.ipdb import ANY_NETWORK


class CreateInput(Model):
    """A create: the request without user data (the VMs' rows have it), and what its names meant when it was accepted.

    A flavor may be deleted while a batch is being made; what was asked for stays the same.
    """

    request: VmsCreate
    vcpus: int
    memory_mib: int
    disk_mib: int
    architecture: Architecture
    max_vcpus: int | None = None
    max_memory_mib: int | None = None
    numa: NumaPolicy = Field(default_factory=NumaPolicy)
    # Of each of the request's networks the prefixes that could give its address: see `wanted_networks.candidates`.
    prefixes: tuple[tuple[int, ...] | None, ...] = (None,)

    @property
    def networks(self) -> tuple[NetworkWanted, ...]:
        """What addresses each VM gets."""
        return self.request.networks or ANY_NETWORK

    def _candidates(self) -> list[tuple[frozenset[int] | None, bool]]:
        """Of each network the prefixes that could give its address, and whether that is one asked for by number."""
        named = (frozenset(ids) if ids is not None else None for ids in self.prefixes)
        return [(ids, one.address is not None) for ids, one in zip(named, self.networks, strict=False)]

    @property
    def shape(self) -> Shape:
        return Shape(self.vcpus, self.memory_mib, self.disk_mib, self.numa)

    @property
    def capabilities(self) -> frozenset[str]:
        """What a host's agent must know to make such VMs."""
        ordinary = self.numa == NumaPolicy() and self.max_vcpus is None and self.max_memory_mib is None
        return frozenset() if ordinary else frozenset({Capability.VM_POLICIES.value})

    @property
    def profile(self) -> Profile:
        asked = self.request
        where = Where(asked.datacentre, asked.cluster, asked.rack, asked.host, asked.vrf)
        candidates = self._candidates()
        return Profile(
            self.shape,
            self.architecture,
            where,
            self.capabilities,
            networks=tuple(ids for ids, fixed in candidates if not fixed),
            fixed=tuple(ids for ids, fixed in candidates if fixed and ids is not None),
        )

    def plan_request(self, vms: Sequence[VmRequest], batch_hosts: Mapping[str, int] | None = None) -> PlanRequest:
        """Of VMs that have this request's `profile`."""
        return PlanRequest(
            vms=tuple(vms),
            policy=self.request.policy,
            all_or_nothing=self.request.mode is BatchMode.ALL_OR_NOTHING,
            batch_hosts=dict(batch_hosts or {}),
        )


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
