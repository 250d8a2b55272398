# SPDX-License-Identifier: Apache-2.0
"""How the host is set up: libvirt, QEMU, control groups, folders, socket, network, certificates. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from ppec_agentd.doctor.findings import Finding, Level
from ppec_agentd.doctor.permissions import first_closed
from ppec_agentd.doctor.snapshot import FileSystemFacts, HostFactsSnapshot
from ppec_contract.agent import PROXY_PORT
from ppec_contract.identity import Identity

# The oldest that the agent is tested with: Debian 12's.
OLDEST_LIBVIRT = (9, 0, 0)
OLDEST_QEMU = (7, 2, 0)
CONTROLLERS = ("cpuset", "memory")
LOW_PERCENT, FULL_PERCENT = 10, 2
LOW_MIB, FULL_MIB = 2048, 256
DAYS_LEFT = 14


def libvirt(host: HostFactsSnapshot) -> Iterator[Finding]:
    facts = host.libvirt
    if facts is None:
        yield Finding("libvirt", Level.NOTE, "libvirt", "not used: the settings choose the fake hypervisor")
        return
    subject = f"libvirt at {facts.uri}"
    if facts.problem:
        advice = "See that libvirtd runs (systemctl status libvirtd.socket) and that python3-libvirt is installed."
        yield Finding("libvirt", Level.ERROR, subject, facts.problem, "a connection", advice)
        return
    yield _version("libvirt", facts.libvirt_version, OLDEST_LIBVIRT)
    yield _version("qemu", facts.qemu_version, OLDEST_QEMU)


def _version(check: str, found: str, oldest: tuple[int, ...]) -> Finding:
    subject = {"libvirt": "libvirt", "qemu": "QEMU"}[check]
    if tuple(int(part) for part in found.split(".")) >= oldest:
        return Finding(check, Level.OK, subject, found)
    wanted = ".".join(map(str, oldest))
    advice = "Use a distribution that has it; older ones are not tested."
    return Finding(check, Level.ERROR, subject, found, f"{wanted} or later", advice)


def qemu_img(host: HostFactsSnapshot) -> Iterator[Finding]:
    if "qemu-img" in host.programs:
        yield Finding("qemu-img", Level.OK, "qemu-img", "there")
    else:
        advice = "Install qemu-utils (Debian) or qemu-img."
        yield Finding("qemu-img", Level.ERROR, "qemu-img", "not on the PATH", "there: it makes the disks", advice)


def cgroups(host: HostFactsSnapshot) -> Iterator[Finding]:
    facts, subject = host.cgroups, "control groups"
    missing = [name for name in CONTROLLERS if name not in facts.controllers]
    if facts.layout == "none":
        advice = "Mount them: systemd does, also in containers that are given /sys/fs/cgroup."
        yield Finding("cgroups", Level.ERROR, subject, "none mounted", "v2, or v1 with the v2 tree", advice)
    elif missing:
        found = f"{facts.layout}, without {' and '.join(missing)}"
        advice = "Take cgroup_disable= off the kernel's command line; in a container, delegate them."
        yield Finding("cgroups", Level.WARNING, subject, found, " and ".join(CONTROLLERS), advice)
    else:
        yield Finding("cgroups", Level.OK, subject, f"{facts.layout}, with {' and '.join(CONTROLLERS)}")


def folders(host: HostFactsSnapshot) -> Iterator[Finding]:
    """Disks and images are QEMU's to open: its user passes through every folder above them."""
    user = host.qemu_user
    if user is None:
        advice = "Install libvirt's QEMU driver, or name an existing user in /etc/libvirt/qemu.conf."
        yield Finding("folders", Level.ERROR, "QEMU's user", "not in the system's users", "a user", advice)
        return
    storage = host.settings.storage
    pools = {f"pool {name}": pool.path for name, pool in storage.pools.items()}
    for name, folder in {"VMs": storage.vms, "images": storage.images, **pools}.items():
        subject, closed = f"folder of {name}, {folder}", first_closed(user, folder, host.paths)
        if closed is not None:
            found = f"{closed.path} (mode {closed.mode:04o}, owner {closed.uid}:{closed.gid}) is closed to {user.name}"
            advice = f"chmod o+x {closed.path}"
            yield Finding("folders", Level.ERROR, subject, found, "a way through for QEMU's user", advice)
        elif host.paths[folder].kind not in ("folder", "missing"):
            yield Finding("folders", Level.ERROR, subject, "is no folder", "a folder", "Move what is there away.")
        else:
            # A pool that is missing is another check's to say.
            made = "; the agent will make it" if host.paths[folder].kind == "missing" and name not in pools else ""
            yield Finding("folders", Level.OK, subject, f"{user.name} can pass through{made}")


def disk_space(host: HostFactsSnapshot) -> Iterator[Finding]:
    for facts in host.file_systems:
        yield _space(facts)


def _space(facts: FileSystemFacts) -> Finding:
    subject = f"file system of {facts.path}"
    percent = 100 * facts.free_mib // max(1, facts.size_mib)
    found = f"{facts.free_mib} of {facts.size_mib} MiB free ({percent} %)"
    if facts.read_only:
        advice = "See the kernel's log for errors of the device, then mount it for writing."
        return Finding("disk-space", Level.ERROR, subject, "mounted read-only", "writable", advice)
    if facts.free_inodes_percent < FULL_PERCENT:
        found = f"{facts.free_inodes_percent} % of the inodes free"
        return Finding("disk-space", Level.ERROR, subject, found, f"{FULL_PERCENT} %", "Remove files there.")
    # Of a large disk a few per cent are plenty, of a small one a few hundred MiB are.
    for level, share, amount in ((Level.ERROR, FULL_PERCENT, FULL_MIB), (Level.WARNING, LOW_PERCENT, LOW_MIB)):
        if (percent < share and facts.free_mib < amount * 10) or facts.free_mib < amount:
            wanted = f"{share} % and {amount} MiB"
            return Finding("disk-space", level, subject, found, wanted, "Make room, or move it to a larger disk.")
    return Finding("disk-space", Level.OK, subject, found)


def socket(host: HostFactsSnapshot) -> Iterator[Finding]:
    settings = host.settings.socket
    subject, folder = f"socket {settings.path}", host.paths[settings.path.parent]
    match host.socket.holder:
        case "free":
            yield Finding("socket", Level.OK, subject, "free")
        case "stale":
            yield Finding("socket", Level.OK, subject, "left over by an agent that ended; it will be replaced")
        case "agent":
            yield Finding("socket", Level.OK, subject, f"an agent serves it ({host.socket.said})")
        case "stranger":
            advice = "End that program (ss -xlp shows it), or choose another path below [socket]."
            yield Finding("socket", Level.ERROR, subject, "another program serves it", "free", advice)
        case "no-socket":
            advice = "Move what is there away, or choose another path below [socket]."
            yield Finding("socket", Level.ERROR, subject, "something that is no socket", "free", advice)
    if folder.kind not in ("folder", "missing"):
        yield Finding("socket", Level.ERROR, f"folder {folder.path}", "is no folder", "a folder", "Move it away.")
    elif folder.kind == "folder" and folder.mode & 0o002:
        found, advice = f"mode {folder.mode:04o}: anybody can replace the socket", f"chmod o-w {folder.path}"
        yield Finding("socket", Level.ERROR, f"folder {folder.path}", found, "not writable by others", advice)


def group(host: HostFactsSnapshot) -> Iterator[Finding]:
    name = host.settings.socket.group
    if name and name not in host.groups:
        found, advice = "no such group", f"groupadd --system {name}"
        yield Finding("group", Level.ERROR, f"group {name}", found, "the group that may use the socket", advice)
    elif name:
        yield Finding("group", Level.OK, f"group {name}", f"there, {host.groups[name]}")


def proxy_port(host: HostFactsSnapshot) -> Iterator[Finding]:
    holder, subject = host.port_holders.get(PROXY_PORT), f"TCP port {PROXY_PORT}"
    if holder is None:
        yield Finding("proxy-port", Level.OK, subject, "free for the proxy")
    elif "ppec" in holder or holder == "systemd":
        yield Finding("proxy-port", Level.OK, subject, f"held by {holder}")
    else:
        advice = "End that program, or give the proxy another port (ppec host add --port)."
        yield Finding("proxy-port", Level.WARNING, subject, f"held by {holder}", "free for the proxy", advice)


def bridges(host: HostFactsSnapshot) -> Iterator[Finding]:
    for name in host.settings.expect.bridges:
        if name in host.bridges:
            yield Finding("bridges", Level.OK, f"bridge {name}", "there")
        else:
            found = f"not there; found {', '.join(sorted(host.bridges)) or 'none'}"
            advice = f"Make it (the ppec.cloud.libvirt_host role does), or take {name} off [expect] bridges."
            yield Finding("bridges", Level.ERROR, f"bridge {name}", found, "a Linux bridge", advice)


def certificates(host: HostFactsSnapshot) -> Iterator[Finding]:
    tls, facts = host.settings.tls, host.certificate
    if facts is None:
        yield Finding("certificate", Level.NOTE, "certificate", "not looked at: no orchestrator_url below [reports]")
        return
    subject, renew = f"certificate {tls.certificate_path}", "Enrol the host again (the ppec.cloud.pki role)."
    wanted = Identity("host", host.settings.host).uri
    if facts.problem:
        yield Finding("certificate", Level.ERROR, subject, facts.problem, "good in the eyes of a TLS peer", renew)
    elif facts.identities != (wanted,):
        found = f"is of {', '.join(facts.identities) or 'nobody'}"
        yield Finding("certificate", Level.ERROR, subject, found, f"of {wanted}", renew)
    elif facts.days_left < DAYS_LEFT:
        found = f"expires in {facts.days_left:.1f} days"
        yield Finding("certificate", Level.WARNING, subject, found, f"{DAYS_LEFT} days or more", renew)
    else:
        yield Finding("certificate", Level.OK, subject, f"of {wanted}, for {facts.days_left:.0f} days")
    key = host.paths[tls.key_path]
    if key.kind == "file" and key.mode & 0o007:
        found, advice = f"mode {key.mode:04o}: anybody may use it", f"chmod o= {tls.key_path}"
        yield Finding("certificate", Level.ERROR, f"key {tls.key_path}", found, "closed to others", advice)
