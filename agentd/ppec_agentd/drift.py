# SPDX-License-Identifier: Apache-2.0
"""How the host differs from what was decided: granted against observed. Pure; nothing here repairs anything.

What was granted stands in each domain's metadata, which libvirt keeps and nobody changes by accident; which VMs there
should be is known from the journal, and from having seen them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from ppec_agentd.hypervisor import Domain, DomainMetadata
from ppec_agentd.ledger import Finding, FindingKind
from ppec_agentd.places import Places, vm_id_of
from ppec_contract.host import Drift, DriftKind
from ppec_contract.vm import VcpuPin
from ppec_contract.words import MAX_DRIFT, short, words

_FROM_AUDIT = {
    FindingKind.PINS_OVERLAP: DriftKind.PINS_OVERLAP,
    FindingKind.PINS_RESERVED: DriftKind.PINS_RESERVED,
}


@dataclass(frozen=True, slots=True)
class HostLook:
    """One look at the host. `expected` are the VMs that should be here, by id, with their names; `folders` the names
    of the VMs' folders in each place, and `disks` those of them that have a root disk somewhere. VMs in `busy` are
    being changed by order: nothing is said of them."""

    domains: tuple[Domain, ...]
    places: Places
    images_dir: Path
    expected: dict[UUID, str] = field(default_factory=dict)
    folders: Mapping[Path, tuple[str, ...]] = field(default_factory=dict)
    disks: frozenset[str] = frozenset()
    busy: frozenset[UUID] = frozenset()
    audit: tuple[Finding, ...] = ()


def find_drift(look: HostLook) -> tuple[Drift, ...]:
    """In an order that only depends on what there is; no more than a report holds."""
    found = [
        *(drift for domain in look.domains if domain.vm_id not in look.busy for drift in _of_domain(domain, look)),
        *_of_the_absent(look),
        *(
            _crowded(finding)
            for finding in look.audit
            if finding.kind in _FROM_AUDIT and finding.vm_id not in look.busy
        ),
    ]
    return tuple(sorted(found, key=lambda drift: drift.order())[:MAX_DRIFT])


def _of_domain(domain: Domain, look: HostLook) -> Iterator[Drift]:
    granted = domain.metadata
    if granted is None:
        size = f"{domain.vcpus} vCPUs, {domain.memory_mib} MiB"
        yield _drift(DriftKind.MADE_BY_HAND, domain, "", size)
        return
    if domain.name != granted.name:
        yield _drift(DriftKind.NAME, domain, granted.name, domain.name)
    if _differs(domain.vcpus, granted.vcpus, granted):
        yield _drift(DriftKind.VCPUS, domain, str(granted.vcpus), str(domain.vcpus))
    if _differs(domain.memory_mib, granted.memory_mib, granted):
        yield _drift(DriftKind.MEMORY, domain, f"{granted.memory_mib} MiB", f"{domain.memory_mib} MiB")
    yield from _of_pins(granted, domain)
    if set(granted.cells) != set(domain.memory_cells):
        before, after = (_numbers(cells) for cells in (granted.cells, domain.memory_cells))
        yield _drift(DriftKind.MEMORY_CELLS, domain, before, after or "any")
    yield from _of_disks(domain, look)
    yield from _of_drives(granted, domain)


def _differs(found: int, held: int, granted: DomainMetadata) -> bool:
    """Between a resize and its next start a VM holds the larger of what it has and what it will have."""
    return found > held if granted.pending else found != held


def _of_pins(granted: DomainMetadata, domain: Domain) -> Iterator[Drift]:
    """A VM between a resize and its next start may have fewer vCPUs than it holds pins for."""
    wanted, found = _by_vcpu(granted.pins), _by_vcpu(domain.pins)
    strays = any(wanted.get(vcpu) != pcpu for vcpu, pcpu in found.items())
    if strays or (not granted.pending and wanted != found):
        yield _drift(DriftKind.PINS, domain, _pins(wanted), _pins(found) or "none")


def _of_disks(domain: Domain, look: HostLook) -> Iterator[Drift]:
    """Its own disks lie in its folders, on images of the cache; nothing else is a VM's."""
    pool = domain.metadata.pool if domain.metadata is not None else ""
    folder, disk_folder = look.places.folder(domain.vm_id), look.places.disk_folder(domain.vm_id, pool)
    if disk_folder is None:
        yield _drift(DriftKind.DISKS, domain, f"in storage pool {pool}", "this host has no such pool any more")
        return
    paths = {disk.path or disk.elsewhere for disk in domain.disks}
    known = (f"{folder.path}/", f"{disk_folder.path}/", f"{look.images_dir}/")
    strange = sorted(path for path in paths if not path.startswith(known))
    own = str(disk_folder.root_disk)
    if strange:
        yield _drift(DriftKind.DISKS, domain, own, ", ".join(strange))
    elif own not in paths:
        yield _drift(DriftKind.DISKS, domain, own, "detached")


def _of_drives(granted: DomainMetadata, domain: Domain) -> Iterator[Drift]:
    """Devices of the host's: NVMe drives are all that a VM is given of them."""
    given, found = sorted(granted.nvme_drives), sorted(domain.host_devices)
    if given != found:
        yield _drift(DriftKind.DISKS, domain, _devices(given), _devices(found))


def _devices(addresses: list[str]) -> str:
    return f"NVMe drives {', '.join(addresses)}" if addresses else "no NVMe drives"


def _of_the_absent(look: HostLook) -> Iterator[Drift]:
    there = {domain.vm_id: domain for domain in look.domains}
    missing = {vm_id: name for vm_id, name in look.expected.items() if vm_id not in there and vm_id not in look.busy}
    for vm_id, name in missing.items():
        left = "its disk is there" if str(vm_id) in look.disks else "its disk is gone"
        yield _said(DriftKind.DOMAIN_REMOVED, vm_id, name, "defined", left)
    unsure = {str(vm_id) for vm_id in (*missing, *look.busy)}
    for place, names in look.folders.items():
        owned = {str(vm_id) for vm_id, domain in there.items() if place in _places_of(domain, look.places)}
        for name in sorted({*names} - owned - unsure):
            yield _said(DriftKind.ORPHANED_DISK, vm_id_of(name), name, "", f"{place}/{name}")


def _places_of(domain: Domain, places: Places) -> set[Path]:
    """Where a domain may have a folder. Of one made by hand nobody knows, nor of one in a pool that left the settings:
    the same folder may be there by another name."""
    granted = domain.metadata
    disk_folder = None if granted is None else places.disk_folder(domain.vm_id, granted.pool)
    return {*places.folders} if disk_folder is None else {places.own, disk_folder.root}


def _crowded(finding: Finding) -> Drift:
    others = f" of {', '.join(map(str, finding.others))}" if finding.others else ""
    found = f"on CPUs {_numbers(finding.found)}{others}"
    return _said(_FROM_AUDIT[finding.kind], finding.vm_id, finding.name, "", found)


def _drift(kind: DriftKind, domain: Domain, before: str, after: str) -> Drift:
    return _said(kind, domain.vm_id, domain.name, before, after)


def _said(kind: DriftKind, vm_id: UUID | None, name: str, before: str, after: str) -> Drift:
    """Names and paths are whatever somebody made them: here they come within the contract's bounds."""
    return Drift(kind=kind, vm_id=vm_id, name=short(name), before=words(before), after=words(after))


def _by_vcpu(pins: Iterable[VcpuPin]) -> dict[int, int]:
    return {pin.vcpu: pin.pcpu for pin in pins}


def _pins(pins: dict[int, int]) -> str:
    return " ".join(f"{vcpu}:{pins[vcpu]}" for vcpu in sorted(pins))


def _numbers(numbers: Iterable[int]) -> str:
    return ",".join(map(str, sorted(numbers)))
