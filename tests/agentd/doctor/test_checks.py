# SPDX-License-Identifier: Apache-2.0
"""Every finding both ways, on made-up hosts: the whole one has nothing to mend, and each fault is found as one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ppec_agentd.doctor.checks import CHECKS, examine
from ppec_agentd.doctor.findings import Level, exit_code, worst
from ppec_agentd.doctor.snapshot import (
    CertificateFacts,
    CgroupFacts,
    ClockFacts,
    CpuFacts,
    FileSystemFacts,
    HostFactsSnapshot,
    HugePageFacts,
    KvmFacts,
    LibvirtFacts,
    PathFacts,
    SocketFacts,
    UserFacts,
)
from ppec_agentd.nvme.drive import NvmeDrive
from ppec_agentd.nvme.sysfs import BEING_ERASED
from ppec_agentd.settings import Settings

STATE = Path("/var/lib/ppec")
VMS, IMAGES, RUN, KEY = STATE / "vms", STATE / "images", Path("/run/ppec"), Path("/etc/ppec/pki/host.key")
QEMU = UserFacts("libvirt-qemu", 64055, frozenset({107, 64055}))
KVM = PathFacts(Path("/dev/kvm"), "device", 0o660, 0, 107)
DRIVE = NvmeDrive("0000:01:00.0", cell=1, driver="nvme", serial="S1", namespaces=("nvme0n1",))
EXPECT = {"bridges": ["br0"], "huge_pages_2mib_per_cell": 8, "huge_pages_1gib_per_cell": 1, "iommu": True}


def settings(**sections: Any) -> Settings:
    reports = {"orchestrator_url": "https://orchestrator:8443"}
    return Settings.model_validate({"host": "h1", "reports": reports, "expect": EXPECT, **sections})


def folder(path: Path, mode: int = 0o711) -> PathFacts:
    return PathFacts(path, "folder", mode)


WHOLE = HostFactsSnapshot(
    settings=settings(),
    architecture="x86_64",
    machine="x86_64",
    cpu=CpuFacts("A CPU", frozenset({"vmx", "sse"}), 8, "on", frozenset({"performance"})),
    kvm=KvmFacts(KVM, answers=True, nested=False),
    iommu_groups=12,
    cgroups=CgroupFacts("v2", frozenset({"cpuset", "cpu", "memory"})),
    libvirt=LibvirtFacts("qemu:///system", libvirt_version="9.0.0", qemu_version="7.2.0"),
    clock=ClockFacts(synchronised=True, worst_error_s=0.02),
    socket=SocketFacts("free"),
    certificate=CertificateFacts(identities=("ppec://host/h1",), days_left=80.0),
    qemu_user=QEMU,
    programs=frozenset({"qemu-img", "nvme"}),
    groups={"ppec": 990},
    paths={
        **{path: folder(path, 0o755) for path in (Path("/"), Path("/var"), Path("/var/lib"))},
        **{path: folder(path) for path in (STATE, VMS, IMAGES)},
        RUN: folder(RUN, 0o750),
        KEY: PathFacts(KEY, "file", 0o640),
    },
    file_systems=(FileSystemFacts(STATE, 1_000_000, 400_000),),
    huge_pages=tuple(HugePageFacts(c, kib, n, n) for c in (0, 1) for kib, n in ((2048, 8), (1048576, 1))),
    bridges=frozenset({"br0", "br1"}),
    nvme_drives=(
        DRIVE,
        replace(DRIVE, address="0000:02:00.0", driver="vfio-pci", cell=None),
        replace(DRIVE, address="0000:03:00.0", problem=BEING_ERASED),
    ),
    memory_mib=65536,
)
HYPERVISOR_FLAG = replace(WHOLE.cpu, flags=WHOLE.cpu.flags | {"hypervisor"})
NO_VMX = replace(WHOLE.cpu, flags=frozenset({"sse"}))
NO_DEVICE = KvmFacts(PathFacts(Path("/dev/kvm")))


def paths(*changed: PathFacts) -> dict[Path, PathFacts]:
    return {**WHOLE.paths, **{facts.path: facts for facts in changed}}


def space(size_mib: int, free_mib: int, **more: Any) -> tuple[FileSystemFacts, ...]:
    return (FileSystemFacts(STATE, size_mib, free_mib, **more),)


FAST, SLOW = Path("/srv/fast"), Path("/srv/slow")
SRV = folder(Path("/srv"), 0o755)


def pooled(*facts: PathFacts, pools: dict[str, Any] | None = None, **storage: Any) -> dict[str, Any]:
    """A host with pools; of `fast` alone, unless they are given. Paths of `facts` are as these say."""
    known = {"fast": {"path": str(FAST)}} if pools is None else pools
    there = {FAST: replace(folder(FAST), device=9, inode=1), SLOW: replace(folder(SLOW), device=9, inode=2)}
    there |= {path / "..": replace(SRV, path=path / "..") for path in (FAST, SLOW)}
    there |= {facts.path: facts for facts in facts}
    return {
        "settings": settings(storage={"pools": known, **storage}),
        "paths": paths(SRV, *there.values()),
    }


BOTH_POOLS = {"fast": {"path": str(FAST), "disk_mib": 5}, "slow": {"path": str(SLOW)}}

# Each: the fault, the check that has to find it, how bad it is, and words of what is found or advised.
FAULTS: list[tuple[dict[str, Any], str, Level, str]] = [
    ({"architecture": None, "machine": "vax"}, "architecture", Level.ERROR, "vax"),
    ({"cpu": NO_VMX}, "virtualisation", Level.WARNING, "neither vmx nor svm"),
    ({"kvm": NO_DEVICE}, "virtualisation", Level.WARNING, "no /dev/kvm"),
    ({"kvm": NO_DEVICE, "settings": settings(libvirt={"domain_type": "kvm"})}, "virtualisation", Level.ERROR, "no /d"),
    ({"cpu": NO_VMX, "settings": settings(libvirt={"domain_type": "qemu"})}, "virtualisation", Level.NOTE, "emulated"),
    ({"kvm": KvmFacts(KVM, answers=False)}, "virtualisation", Level.ERROR, "doesn't answer"),
    ({"kvm": KvmFacts(replace(KVM, mode=0o600), answers=True)}, "kvm-permissions", Level.ERROR, "0600"),
    ({"kvm": KvmFacts(replace(KVM, gid=5), answers=True)}, "kvm-permissions", Level.ERROR, "group 5"),
    ({"kvm": KvmFacts(KVM, answers=True, nested=True)}, "nested", Level.NOTE, "on"),
    ({"cpu": HYPERVISOR_FLAG}, "nested", Level.NOTE, "itself a virtual machine"),
    ({"iommu_groups": 0}, "iommu", Level.ERROR, "intel_iommu=on"),
    ({"iommu_groups": 0, "settings": settings(expect={})}, "iommu", Level.NOTE, "none"),
    ({"huge_pages": WHOLE.huge_pages[:-1]}, "huge-pages", Level.ERROR, "node1/hugepages/hugepages-1048576kB"),
    ({"huge_pages": ()}, "huge-pages", Level.ERROR, "Write 8 to"),
    ({"settings": settings(expect={})}, "huge-pages", Level.NOTE, "2080 MiB"),
    ({"locked_memory_limit_mib": 64}, "locked-memory", Level.NOTE, "64 MiB"),
    (
        {"nvme_drives": (replace(DRIVE, problem="is mounted on /srv"),)},
        "nvme-drives",
        Level.ERROR,
        "0000:01:00.0 is mo",
    ),
    ({"programs": frozenset({"qemu-img"})}, "nvme-cli", Level.WARNING, "Install the package nvme-cli"),
    ({"clock": ClockFacts(synchronised=False)}, "clock", Level.WARNING, "not synchronised"),
    ({"clock": ClockFacts(synchronised=True, worst_error_s=1.5)}, "clock", Level.WARNING, "1.5 s off"),
    ({"clock": ClockFacts(problem="Operation not permitted")}, "clock", Level.NOTE, "not permitted"),
    ({"cpu": replace(WHOLE.cpu, governors=frozenset({"powersave"}))}, "cpu-governor", Level.NOTE, "powersave"),
    ({"cgroups": CgroupFacts()}, "cgroups", Level.ERROR, "none mounted"),
    ({"cgroups": CgroupFacts("v2", frozenset({"cpuset"}))}, "cgroups", Level.WARNING, "without memory"),
    ({"libvirt": LibvirtFacts("qemu:///system", problem="no socket")}, "libvirt", Level.ERROR, "no socket"),
    ({"libvirt": LibvirtFacts("u", "", "8.10.2", "7.2.0")}, "libvirt", Level.ERROR, "8.10.2"),
    ({"libvirt": LibvirtFacts("u", "", "10.0.0", "6.2.0")}, "qemu", Level.ERROR, "7.2.0 or later"),
    ({"programs": frozenset()}, "qemu-img", Level.ERROR, "qemu-utils"),
    ({"qemu_user": None}, "folders", Level.ERROR, "qemu.conf"),
    ({"paths": paths(folder(STATE, 0o700))}, "folders", Level.ERROR, "chmod o+x /var/lib/ppec"),
    ({"paths": paths(folder(Path("/var/lib"), 0o750))}, "folders", Level.ERROR, "/var/lib (mode 0750"),
    ({"paths": paths(PathFacts(VMS, "file"))}, "folders", Level.ERROR, "is no folder"),
    (pooled(folder(SRV.path, 0o700)), "folders", Level.ERROR, "chmod o+x /srv"),
    (pooled(folder(FAST, 0o700)), "folders", Level.ERROR, "folder of pool fast"),
    (pooled(PathFacts(FAST)), "pools", Level.ERROR, "install -d -m 0711 /srv/fast"),
    (pooled(PathFacts(FAST, "file")), "pools", Level.ERROR, "is no folder"),
    (pooled(replace(folder(FAST, 0o777), device=9)), "pools", Level.ERROR, "mode 0777, owner 0:0"),
    (pooled(replace(folder(FAST), uid=64055, device=9)), "pools", Level.ERROR, "owner 64055:0"),
    (
        pooled(replace(folder(FAST), inode=1), pools={"fast": {"path": str(FAST), "mounted": True}}, disk_mib=1),
        *("pools", Level.ERROR, "mount /srv/fast"),
    ),
    (pooled(replace(folder(FAST), device=0, inode=0)), "pools", Level.ERROR, "as that of the VMs' own place"),
    (pooled(replace(folder(SLOW), device=9, inode=1), pools=BOTH_POOLS), "pools", Level.ERROR, "as that of pool fast"),
    (pooled(replace(folder(FAST), inode=1)), "pools", Level.WARNING, "file system of the VMs' own place"),
    (pooled(pools=BOTH_POOLS), "pools", Level.WARNING, "file system of pool fast"),
    ({"file_systems": space(1000, 500, read_only=True)}, "disk-space", Level.ERROR, "read-only"),
    ({"file_systems": space(10**6, 10**5, free_inodes_percent=1)}, "disk-space", Level.ERROR, "inodes"),
    ({"file_systems": space(100_000, 1_900)}, "disk-space", Level.ERROR, "1900 of 100000 MiB free (1 %)"),
    ({"file_systems": space(1000, 255)}, "disk-space", Level.ERROR, "255 of 1000"),
    ({"file_systems": space(100_000, 9_900)}, "disk-space", Level.WARNING, "(9 %)"),
    ({"groups": {}}, "group", Level.ERROR, "groupadd --system ppec"),
    ({"socket": SocketFacts("stranger")}, "socket", Level.ERROR, "another program"),
    ({"socket": SocketFacts("no-socket")}, "socket", Level.ERROR, "no socket"),
    ({"paths": paths(folder(RUN, 0o777))}, "socket", Level.ERROR, "anybody can replace"),
    ({"paths": paths(PathFacts(RUN, "file"))}, "socket", Level.ERROR, "is no folder"),
    ({"port_holders": {7443: "nginx"}}, "proxy-port", Level.WARNING, "nginx"),
    ({"bridges": frozenset({"br1"})}, "bridges", Level.ERROR, "found br1"),
    ({"certificate": CertificateFacts(problem="certificate has expired")}, "certificate", Level.ERROR, "expired"),
    ({"certificate": CertificateFacts("", ("ppec://host/h2",), 80)}, "certificate", Level.ERROR, "ppec://host/h2"),
    ({"certificate": CertificateFacts("", ("ppec://host/h1",), 3)}, "certificate", Level.WARNING, "3.0 days"),
    ({"certificate": None}, "certificate", Level.NOTE, "orchestrator_url"),
    ({"paths": paths(PathFacts(KEY, "file", 0o644))}, "certificate", Level.ERROR, "anybody may use it"),
]

# What is as good as on the whole host, or not asked for.
FINE: list[tuple[dict[str, Any], str]] = [
    ({"socket": SocketFacts("stale")}, "socket"),
    ({"socket": SocketFacts("agent", "version 1 of host h1")}, "socket"),
    ({"port_holders": {7443: "ppec-proxy"}}, "proxy-port"),
    ({"port_holders": {7443: "systemd"}}, "proxy-port"),
    ({"paths": paths(PathFacts(VMS), PathFacts(IMAGES))}, "folders"),
    ({"paths": paths(folder(STATE, 0o700)), "qemu_user": UserFacts("root", 0, frozenset({0}))}, "folders"),
    (pooled(), "pools"),
    (pooled(), "folders"),
    (pooled(PathFacts(FAST)), "folders"),
    (pooled(pools={"fast": {"path": str(FAST), "mounted": True}}), "pools"),
    (pooled(replace(folder(FAST), inode=1), pools={"fast": {"path": str(FAST), "disk_mib": 5}}, disk_mib=5), "pools"),
    (pooled(pools={name: pool | {"disk_mib": 5} for name, pool in BOTH_POOLS.items()}), "pools"),
    ({"cgroups": CgroupFacts("hybrid", frozenset({"cpuset", "memory"}))}, "cgroups"),
    ({"libvirt": LibvirtFacts("u", "", "10.0.0", "10.1.2")}, "libvirt"),
    ({"architecture": "aarch64", "cpu": replace(NO_VMX, flags=frozenset())}, "virtualisation"),
    ({"file_systems": space(100_000_000, 3_000_000)}, "disk-space"),
    ({"locked_memory_limit_mib": 65536}, "locked-memory"),
]


def test_a_whole_host_has_nothing_to_mend() -> None:
    findings = examine(WHOLE)
    assert {finding.level for finding in findings} == {Level.OK, Level.NOTE}
    assert [f.check for f in findings if f.level is Level.NOTE] == ["smt"]
    assert exit_code(worst(findings)) == 0
    assert all(not finding.advice for finding in findings)


@pytest.mark.parametrize(("changes", "check", "level", "words"), FAULTS, ids=[f"{f[1]}-{f[3]}" for f in FAULTS])
def test_a_fault_is_found(changes: dict[str, Any], check: str, level: Level, words: str) -> None:
    found = [f for f in examine(replace(WHOLE, **changes)) if f.check == check]
    assert worst(found) is level
    (finding, *_) = [f for f in found if f.level is level and words in f"{f.subject} {f.found} {f.wanted} {f.advice}"]
    # Whoever reads a warning or an error is told what would be right and what to do.
    if level >= Level.WARNING:
        assert finding.wanted
        assert finding.advice


@pytest.mark.parametrize(("changes", "check"), FINE, ids=[f"{i}-{f[1]}" for i, f in enumerate(FINE)])
def test_what_is_good_enough_is_not_complained_of(changes: dict[str, Any], check: str) -> None:
    found = [f for f in examine(replace(WHOLE, **changes)) if f.check == check]
    assert found
    assert worst(found) is Level.OK


def test_every_check_is_seen_to_complain() -> None:
    """No row of the table that could never say anything but "ok"."""
    whole = set(examine(WHOLE))
    for row in CHECKS:
        hosts = [replace(WHOLE, **changes) for changes, *_ in FAULTS]
        assert any(finding not in whole for host in hosts for finding in row.check(host)), row


def test_a_fake_host_is_asked_for_nothing_of_real_guests() -> None:
    fake = settings(hypervisor="fake", lab={"topology": "cores=4"})
    broken = replace(
        WHOLE, settings=fake, libvirt=None, kvm=NO_DEVICE, cpu=NO_VMX, cgroups=CgroupFacts(), qemu_user=None
    )
    assert worst(examine(broken)) is Level.NOTE


def test_exit_codes() -> None:
    assert [exit_code(level) for level in Level] == [0, 0, 1, 2]
    assert worst([]) is Level.OK
