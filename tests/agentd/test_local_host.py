# SPDX-License-Identifier: Apache-2.0
"""What the agent reads of its machine, and when it believes in KVM."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppec_agentd.local_host import LocalHost, can_kvm, choose_domain_type, read_local_host
from ppec_contract.host import Architecture

INTEL = "processor\t: 0\nflags\t\t: fpu vme vmx ssse3\n\nprocessor\t: 1\nflags\t\t: fpu vme vmx ssse3\n"
AMD = "processor\t: 0\nflags\t\t: fpu svm\n"
# The words stand elsewhere: in a model name, and as a part of another flag.
NEITHER = "model name\t: vmx svm\nflags\t\t: fpu vmxon tsc\nvmx flags\t: vmx\n"


@pytest.mark.parametrize(
    ("architecture", "cpuinfo", "device", "expected"),
    [
        ("x86_64", INTEL, True, True),
        ("x86_64", AMD, True, True),
        ("x86_64", INTEL, False, False),
        ("x86_64", NEITHER, True, False),
        ("x86_64", "", True, False),
        ("aarch64", "Features\t: fp asimd\n", True, True),
        ("aarch64", "", False, False),
    ],
)
def test_kvm_needs_device_and_flag(architecture: Architecture, cpuinfo: str, device: bool, expected: bool) -> None:
    assert can_kvm(architecture, cpuinfo, kvm_device=device) is expected


@pytest.mark.parametrize(("found", "chosen"), [(True, "kvm"), (False, "qemu")])
def test_a_setting_overrides_what_was_found(found: bool, chosen: str) -> None:
    local = LocalHost("x86_64", "6.1", "boot", (), can_kvm=found)
    assert choose_domain_type(local, None) == chosen
    assert choose_domain_type(local, "qemu") == "qemu"
    assert choose_domain_type(local, "kvm") == "kvm"


def test_bridges_and_boot_id_are_read(tmp_path: Path) -> None:
    (tmp_path / "proc/sys/kernel/random").mkdir(parents=True)
    (tmp_path / "proc/sys/kernel/random/boot_id").write_text("b00t\n")
    (tmp_path / "proc/cpuinfo").write_text(NEITHER)
    for device in ("eth0", "br1/bridge", "br0/bridge"):
        (tmp_path / "sys/class/net" / device).mkdir(parents=True)
    local = read_local_host(tmp_path)
    assert local.boot_id == "b00t"
    assert local.bridges == ("br0", "br1")
    assert not local.can_kvm
    assert local.kernel_version
