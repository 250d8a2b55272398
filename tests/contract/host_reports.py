# SPDX-License-Identifier: Apache-2.0
"""Hosts' reports: one to change, and any that an agent could send in its life."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from hypothesis import strategies as st

from ppec_contract.host import (
    CellReport,
    CpuReport,
    Drift,
    DriftKind,
    DriveReport,
    FileSystemReport,
    HostReport,
    HugePagesReport,
    NicReport,
)
from ppec_contract.vm import NumaPolicy, Size, VcpuPin, VmInfo, VmState

drifts = tuple(
    Drift(kind=kind, vm_id=UUID(int=number) if number else None, name=f"v{number}", before=before, after=after)
    for kind in (DriftKind.PINS, DriftKind.MADE_BY_HAND)
    for number in range(2)
    for before in ("", "0:1")
    for after in ("", "0:2")
)


def cell(number: int, cores_free: int = 6, pages_free: int = 3) -> CellReport:
    return CellReport(
        cell=number, socket=number, threads_per_core=2, cores=8, cores_reserved=1, cores_free=cores_free,
        memory_mib=16384, memory_reserved_mib=2048, memory_free_mib=1024 * cores_free,
        huge_pages=(HugePagesReport(size_kib=2048, pages=4, pages_free=pages_free),),
    )  # fmt: skip


def vm(number: int, state: VmState = VmState.RUNNING, **values: Any) -> VmInfo:
    """As large as a VM of eight vCPUs is that an agent shows."""
    known: dict[str, Any] = {
        "pins": tuple(VcpuPin(vcpu=vcpu, pcpu=8 * number + vcpu) for vcpu in range(8)),
        "cells": (number % 2,),
        "macs": (f"52:54:00:00:{number % 256:02x}:01",),
        "image_sha256": "a" * 64,
        "operation_id": f"op-{UUID(int=number)}",
        "numa": NumaPolicy(),
    }
    sizes = {"vcpus": 8, "memory_mib": 8192, "disk_mib": 20480, "max_vcpus": 8, "max_memory_mib": 8192}
    return VmInfo(vm_id=UUID(int=number), name=f"web-{number}", state=state, managed=True, **sizes, **known | values)


def report(**values: Any) -> HostReport:
    known: dict[str, Any] = {
        "cells": (cell(0), cell(1)),
        "vms": (),
        "bridges": ("br0",),
        "disk_mib": 1_000_000,
        "disk_free_mib": 900_000,
        "cpu": CpuReport(model="A CPU", sockets=2, cores=16, threads=32),
        "drives": (DriveReport(name="nvme0n1", size_mib=1, rotational=False, model="M", serial="S", cell=0),),
        "file_systems": (FileSystemReport(path="/var/lib/ppec/vms", size_mib=1000, free_mib=500),),
        "nics": (NicReport(name="eth0", mac="m", state="up", speed_mbit=25000, master="br0"),),
        "drift": (),
    }
    return HostReport(
        host="h1", boot_id="b", agent_version="0.1.0", api_version=1, capabilities=("vm-lifecycle",),
        architecture="x86_64", domain_type="qemu", libvirt_version="9.0.0", qemu_version="7.2.0",
        kernel_version="6.1", **known | values,
    )  # fmt: skip


def vms() -> st.SearchStrategy[tuple[VmInfo, ...]]:
    any_vm = st.builds(
        vm,
        st.integers(0, 5),
        st.sampled_from(VmState),
        pins=st.sampled_from([(), (VcpuPin(vcpu=0, pcpu=3),)]),
        pending=st.sampled_from([None, Size(vcpus=2, memory_mib=64)]),
        cells=st.sampled_from([(), (0,), (1,), (0, 1)]),
    )
    unique = st.lists(any_vm, unique_by=lambda one: one.vm_id, max_size=6)
    return unique.map(lambda found: tuple(sorted(found, key=lambda one: one.vm_id)))


def reports() -> st.SearchStrategy[HostReport]:
    """Of one agent's life: what changes only with the agent or its hypervisor doesn't."""
    drift = st.sets(st.sampled_from(drifts), max_size=4).map(lambda s: tuple(sorted(s, key=lambda one: one.order())))
    return st.builds(
        report,
        vms=vms(),
        cells=st.tuples(*(st.builds(cell, st.just(n), st.integers(0, 7), st.integers(0, 4)) for n in range(2))),
        drift=drift,
        disk_free_mib=st.integers(0, 3),
        bridges=st.sampled_from([(), ("br0",), ("br0", "br1")]),
        file_systems=st.sampled_from([(), (FileSystemReport(path="/v", size_mib=9, free_mib=3),)]),
        nics=st.sampled_from([(), (NicReport(name="eth0", mac="m", state="down"),)]),
    )
