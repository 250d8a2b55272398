# SPDX-License-Identifier: Apache-2.0
"""What the machine is: CPUs, KVM, IOMMU, huge pages, clock. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from ppec_agentd.doctor.findings import Finding, Level
from ppec_agentd.doctor.permissions import READ_WRITE, may
from ppec_agentd.doctor.snapshot import HostFactsSnapshot
from ppec_agentd.nvme.sysfs import BEING_ERASED

# A clock further off than this makes certificates and the order of events doubtful.
LARGEST_CLOCK_ERROR_S = 1.0
_FLAGS = frozenset({"vmx", "svm"})
PAGE_SIZES_KIB = (2048, 1048576)


def architecture(host: HostFactsSnapshot) -> Iterator[Finding]:
    if host.architecture is None:
        yield Finding(
            "architecture",
            Level.ERROR,
            f"machine {host.machine}",
            "an architecture PPEC doesn't know",
            "x86_64, aarch64, ppc64le, s390x or riscv64",
            "Use another machine.",
        )
    else:
        yield Finding("architecture", Level.OK, f"machine {host.machine}", f"{host.cpu.online} CPUs online")


def _lacks_flags(host: HostFactsSnapshot) -> bool:
    return host.architecture == "x86_64" and not host.cpu.flags & _FLAGS


def virtualisation(host: HostFactsSnapshot) -> Iterator[Finding]:
    """By the CPU's flags beside the device, as the agent itself decides (`local_host.can_kvm`)."""
    wanted, subject = host.settings.libvirt.domain_type, "virtualisation"
    flags, lacks_flags = sorted(host.cpu.flags & _FLAGS), _lacks_flags(host)
    if wanted == "qemu":
        yield Finding("virtualisation", Level.NOTE, subject, "guests are emulated, as the settings say")
        return
    if host.kvm.device.kind != "device" or lacks_flags:
        missing = "the CPU shows neither vmx nor svm" if lacks_flags else "no /dev/kvm"
        yield Finding(
            "virtualisation",
            Level.ERROR if wanted == "kvm" else Level.WARNING,
            subject,
            missing + ("" if wanted == "kvm" else "; guests would be emulated, many times slower"),
            "hardware virtualisation",
            "Switch VT-x or AMD-V on in the firmware and load the kvm module; or, to emulate on purpose, set "
            'domain_type = "qemu" below [libvirt].',
        )
        return
    if not host.kvm.answers:
        advice = "See the kernel's log for what the kvm module says, and that nothing else owns the CPU's extensions."
        yield Finding("virtualisation", Level.ERROR, subject, "/dev/kvm doesn't answer", "KVM's interface 12", advice)
        return
    yield Finding("virtualisation", Level.OK, subject, "KVM" + (f" ({', '.join(flags)})" if flags else ""))


def kvm_permissions(host: HostFactsSnapshot) -> Iterator[Finding]:
    device, user = host.kvm.device, host.qemu_user
    unused = host.settings.libvirt.domain_type == "qemu" or _lacks_flags(host)
    if device.kind != "device" or user is None or unused:
        return
    found = f"mode {device.mode:04o}, group {device.gid}"
    if may(user, device, READ_WRITE):
        yield Finding("kvm-permissions", Level.OK, "/dev/kvm", f"{found}: open to QEMU's user {user.name}")
        return
    yield Finding(
        "kvm-permissions",
        Level.ERROR,
        "/dev/kvm",
        f"{found}: closed to QEMU's user {user.name}",
        "read and write for it",
        f"Give it to the group kvm (chgrp kvm /dev/kvm; chmod 0660 /dev/kvm) and see that {user.name} is in it.",
    )


def nested(host: HostFactsSnapshot) -> Iterator[Finding]:
    if "hypervisor" in host.cpu.flags:
        yield Finding("nested", Level.NOTE, "this host", "is itself a virtual machine: its guests are nested")
    if host.kvm.nested:
        yield Finding("nested", Level.NOTE, "nested virtualisation", "is on: guests may run virtual machines")


def iommu(host: HostFactsSnapshot) -> Iterator[Finding]:
    subject, needed = "IOMMU", host.settings.expect.iommu or bool(host.settings.nvme.drives)
    if host.iommu_groups:
        yield Finding("iommu", Level.OK, subject, f"{host.iommu_groups} groups")
        return
    advice = "Switch VT-d or AMD-Vi on in the firmware and boot with intel_iommu=on (Intel) and iommu=pt."
    level = Level.ERROR if needed else Level.NOTE
    yield Finding("iommu", level, subject, "none: no device can be handed to a guest", "IOMMU groups", advice)


def nvme_drives(host: HostFactsSnapshot) -> Iterator[Finding]:
    """Those that VMs may have, as the agent itself will find them."""
    for drive in host.nvme_drives:
        subject = f"NVMe drive {drive.address}"
        if drive.problem == BEING_ERASED:
            yield Finding("nvme-drives", Level.OK, subject, BEING_ERASED)
        elif drive.problem:
            advice = "Free the drive, or take it out of drives below [nvme]; nothing on it is touched."
            yield Finding("nvme-drives", Level.ERROR, subject, drive.problem, "a drive of VMs' own", advice)
        else:
            where = "" if drive.cell is None else f", near cell {drive.cell}"
            yield Finding("nvme-drives", Level.OK, subject, f"with the driver {drive.driver or 'of nobody'}{where}")
    if host.nvme_drives and "nvme" not in host.programs:
        yield Finding(
            "nvme-cli",
            Level.WARNING,
            "the program nvme",
            "not installed: drives are overwritten with zeros in place of erasing themselves",
            "nvme-cli",
            "Install the package nvme-cli.",
        )


def huge_pages(host: HostFactsSnapshot) -> Iterator[Finding]:
    """What is expected of every cell against what the kernel has there."""
    expect = host.settings.expect
    wanted = dict(zip(PAGE_SIZES_KIB, (expect.huge_pages_2mib_per_cell, expect.huge_pages_1gib_per_cell), strict=True))
    cells = sorted({pages.cell for pages in host.huge_pages}) or [0]
    found = {(pages.cell, pages.size_kib): pages.total for pages in host.huge_pages}
    for size_kib, count in wanted.items():
        for cell in cells if count else ():
            total, subject = found.get((cell, size_kib), 0), f"huge pages of {size_kib // 1024} MiB on cell {cell}"
            if total >= count:
                yield Finding("huge-pages", Level.OK, subject, str(total))
                continue
            file = f"/sys/devices/system/node/node{cell}/hugepages/hugepages-{size_kib}kB/nr_hugepages"
            advice = f"Write {count} to {file}; at boot, before memory is in pieces, with hugepagesz= and hugepages=."
            yield Finding("huge-pages", Level.ERROR, subject, str(total), str(count), advice)
    unasked = sum(p.total * p.size_kib // 1024 for p in host.huge_pages if not wanted.get(p.size_kib))
    if unasked:
        yield Finding("huge-pages", Level.NOTE, "huge pages", f"{unasked} MiB set aside that [expect] doesn't name")


def clock(host: HostFactsSnapshot) -> Iterator[Finding]:
    facts, subject = host.clock, "clock"
    advice = "Run chrony or systemd-timesyncd, and see that its servers can be reached (chronyc tracking, timedatectl)."
    if facts.problem:
        yield Finding("clock", Level.NOTE, subject, f"can't be asked: {facts.problem}")
    elif not facts.synchronised:
        yield Finding("clock", Level.WARNING, subject, "not synchronised", "synchronised by NTP", advice)
    elif facts.worst_error_s > LARGEST_CLOCK_ERROR_S:
        found, wanted = f"may be {facts.worst_error_s:.1f} s off", f"at most {LARGEST_CLOCK_ERROR_S:g} s"
        yield Finding("clock", Level.WARNING, subject, found, wanted, advice)
    else:
        yield Finding("clock", Level.OK, subject, f"synchronised, at most {facts.worst_error_s * 1000:.0f} ms off")


def cpu_tuning(host: HostFactsSnapshot) -> Iterator[Finding]:
    """For information: neither keeps a host from serving."""
    if host.cpu.smt:
        yield Finding("smt", Level.NOTE, "SMT", host.cpu.smt)
    slow = sorted(host.cpu.governors - {"performance"})
    if slow:
        wanted, advice = "performance", "Set it for even latency: cpupower frequency-set -g performance."
        yield Finding("cpu-governor", Level.NOTE, "CPU frequency governor", ", ".join(slow), wanted, advice)


def locked_memory(host: HostFactsSnapshot) -> Iterator[Finding]:
    limit_mib, subject = host.locked_memory_limit_mib, "locked memory"
    if limit_mib is None or limit_mib >= host.memory_mib:
        yield Finding("locked-memory", Level.OK, subject, "enough" if limit_mib is not None else "unlimited")
        return
    yield Finding(
        "locked-memory",
        Level.NOTE,
        subject,
        f"limited to {limit_mib} MiB; libvirt raises it itself for guests with devices of their own",
        f"unlimited, or all {host.memory_mib} MiB",
        "If such a guest can't start, set LimitMEMLOCK=infinity in libvirtd's unit.",
    )
