# SPDX-License-Identifier: Apache-2.0
"""What operations keep of the request they came from: their `input` column, as models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ppec_contract.api import VmsCreate
from ppec_contract.host import Architecture
from ppec_contract.model import Model
from ppec_orchestrator.placement.request import PlanRequest, Shape, VmRequest, Where


class CreateInput(Model):
    """A create: the request without user data (the VMs' rows have it), and what its names meant when it was accepted.

    A flavor may be deleted while a batch is being made; what was asked for stays the same.
    """

    request: VmsCreate
    vcpus: int
    memory_mib: int
    disk_mib: int
    architecture: Architecture

    @property
    def shape(self) -> Shape:
        return Shape(self.vcpus, self.memory_mib, self.disk_mib)

    def plan_request(self, vms: Sequence[VmRequest], batch_hosts: Mapping[str, int] | None = None) -> PlanRequest:
        asked = self.request
        return PlanRequest(
            vms=tuple(vms),
            shape=self.shape,
            architecture=self.architecture,
            policy=asked.policy,
            where=Where(asked.datacentre, asked.cluster, asked.rack, asked.host, asked.vrf),
            batch_hosts=dict(batch_hosts or {}),
        )


class GuestInput(Model):
    """A stop or a reboot: how long the guest is asked, and what then."""

    timeout_s: float
    force: bool
