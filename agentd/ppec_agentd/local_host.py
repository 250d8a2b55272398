# SPDX-License-Identifier: Apache-2.0
"""What the agent reads of its own machine, and the choice between KVM and emulation."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ppec_contract.errors import PpecError
from ppec_contract.host import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    "x86_64": "x86_64",
    "amd64": "x86_64",
    "aarch64": "aarch64",
    "arm64": "aarch64",
    "ppc64le": "ppc64le",
    "s390x": "s390x",
    "riscv64": "riscv64",
}


@dataclass(frozen=True, slots=True)
class LocalHost:
    """Facts of the machine the agent runs on; `bridges` are its Linux bridges, ascending."""

    architecture: Architecture
    kernel_version: str
    boot_id: str
    bridges: tuple[str, ...]
    can_kvm: bool


def read_local_host(root: Path = Path("/")) -> LocalHost:
    """Read /proc and /sys under `root`. Raises ``hypervisor.failed`` on an architecture the contract doesn't know."""
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise PpecError("hypervisor.failed", f"hosts of architecture {machine} are unknown", subject="this host")
    architecture = ARCHITECTURES[machine]
    cpuinfo = root / "proc/cpuinfo"
    return LocalHost(
        architecture=architecture,
        kernel_version=platform.release(),
        boot_id=(root / "proc/sys/kernel/random/boot_id").read_text().strip(),
        bridges=tuple(sorted(entry.parent.name for entry in (root / "sys/class/net").glob("*/bridge"))),
        can_kvm=can_kvm(architecture, cpuinfo.read_text(), kvm_device=(root / "dev/kvm").exists()),
    )


def can_kvm(architecture: Architecture, cpuinfo: str, *, kvm_device: bool) -> bool:
    """Whether guests really run under KVM.

    On x86 the CPU's own flags decide beside the device: inside some virtual machines /dev/kvm exists, guests are
    created, and none ever leaves its firmware. Elsewhere there is no such flag, and the device decides.
    """
    if not kvm_device:
        return False
    if architecture != "x86_64":
        return True
    flags = (line.partition(":")[2].split() for line in cpuinfo.splitlines() if line.startswith("flags"))
    return any({"vmx", "svm"} & set(words) for words in flags)


def choose_domain_type(local: LocalHost, override: Literal["kvm", "qemu"] | None) -> Literal["kvm", "qemu"]:
    """The domain type for all domains of this host; a setting overrides what was found."""
    return override or ("kvm" if local.can_kvm else "qemu")
