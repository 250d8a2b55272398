# SPDX-License-Identifier: Apache-2.0
"""All checks, in the order in which they are shown. To add one: a function, a row here, and a test of it both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ppec_agentd.doctor import host_checks, machine_checks, pool_checks
from ppec_agentd.doctor.findings import Finding
from ppec_agentd.doctor.snapshot import HostFactsSnapshot

Check = Callable[[HostFactsSnapshot], Iterator[Finding]]


@dataclass(frozen=True, slots=True)
class Row:
    """`real` ones are about real guests: on a host with the fake hypervisor they mean nothing."""

    check: Check
    real: bool = False


CHECKS: tuple[Row, ...] = (
    Row(machine_checks.architecture),
    Row(machine_checks.virtualisation, real=True),
    Row(machine_checks.kvm_permissions, real=True),
    Row(machine_checks.nested, real=True),
    Row(machine_checks.iommu, real=True),
    Row(machine_checks.nvme_drives, real=True),
    Row(machine_checks.huge_pages, real=True),
    Row(machine_checks.locked_memory, real=True),
    Row(machine_checks.clock),
    Row(machine_checks.cpu_tuning),
    Row(host_checks.cgroups, real=True),
    Row(host_checks.libvirt),
    Row(host_checks.qemu_img, real=True),
    Row(host_checks.folders, real=True),
    Row(pool_checks.pools, real=True),
    Row(host_checks.disk_space),
    Row(host_checks.group),
    Row(host_checks.socket),
    Row(host_checks.proxy_port),
    Row(host_checks.bridges),
    Row(host_checks.certificates),
)


def examine(host: HostFactsSnapshot) -> tuple[Finding, ...]:
    fake = host.settings.hypervisor == "fake"
    rows = (row for row in CHECKS if not (fake and row.real))
    return tuple(finding for row in rows for finding in row.check(host))
