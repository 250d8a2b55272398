# SPDX-License-Identifier: Apache-2.0
"""Puts the agent together from its settings: which hypervisor, which disks, what the ledger starts with."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import structlog

from ppec_agentd.actions.context import HostContext
from ppec_agentd.disks import MIB, DiskMaker, FakeDisks, QemuImg
from ppec_agentd.hypervisor import Hypervisor
from ppec_agentd.image_eviction import ImageEviction
from ppec_agentd.images import FetchLimits, ImageCache
from ppec_agentd.inventory import Inventory
from ppec_agentd.journal import Journal
from ppec_agentd.ledger import Ledger
from ppec_agentd.nvme.drive import DrivePort
from ppec_agentd.nvme.host_drives import HostDrives
from ppec_agentd.nvme.settling import SettlingDrives
from ppec_agentd.places import Places, Pool, vm_names
from ppec_agentd.settings import NvmeSettings, Settings, StorageSettings
from ppec_agentd.topology import Topology, declare_topology

log = structlog.get_logger(__name__)


def make_hypervisor(settings: Settings) -> Hypervisor:
    """Not connected yet. libvirt is imported only where it is used: a fake host needs none."""
    declared = declare_topology(settings.lab.topology) if settings.lab.topology else None
    if settings.hypervisor == "fake":
        return _fake(settings, declared or declare_topology("cores=4"))
    from ppec_agentd.libvirt_hypervisor import LibvirtHypervisor, LibvirtOptions

    return LibvirtHypervisor(
        LibvirtOptions(
            uri=settings.libvirt.uri,
            domain_type=settings.libvirt.domain_type,
            declared_topology=declared,
            disk_cache=settings.libvirt.disk_cache,
            start_timeout_s=settings.limits.hypervisor_timeout_s,
        )
    )


def _fake(settings: Settings, topology: Topology) -> Hypervisor:
    from ppec_agentd.fake_hypervisor import FakeHypervisor, FakeOptions

    return FakeHypervisor(
        FakeOptions(
            topology=topology,
            bridges=settings.lab.bridges,
            state_file=settings.storage.fake_hypervisor,
            deaf_guests=settings.lab.deaf_guests,
            delays_s=settings.lab.delays_s,
            fail_every=settings.lab.fail_every,
            nvme_drives=settings.lab.nvme_drives,
        )
    )


async def make_context(settings: Settings, hypervisor: Hypervisor, journal: Journal) -> HostContext:
    """Everything the actions need; the ledger is still empty. Raises `hypervisor.unavailable`."""
    facts = await hypervisor.facts()
    disks: DiskMaker = FakeDisks() if settings.hypervisor == "fake" else QemuImg(settings.limits.command_timeout_s)
    places = make_places(settings.storage)
    disk_mib = await asyncio.to_thread(usable_disk_mib, settings.storage)
    pools_mib = await asyncio.to_thread(usable_pools_mib, settings.storage)
    port = _drive_port(settings, hypervisor)
    ledger = Ledger(
        facts.topology,
        disk_mib,
        reserved_cores_per_cell=settings.reserve.cores_per_cell,
        reserved_memory_per_cell_mib=settings.reserve.memory_per_cell_mib,
        shared_cores_per_cell=settings.reserve.shared_cores_per_cell,
        shared_vcpus_per_cpu=settings.reserve.shared_vcpus_per_cpu,
        pools_mib=pools_mib,
        cell_by_drive=await asyncio.to_thread(_cell_by_drive, settings.nvme, port, facts.topology),
    )
    return HostContext(
        hypervisor=hypervisor,
        facts=facts,
        ledger=ledger,
        journal=journal,
        images=ImageCache(
            settings.storage.images,
            settings.tls,
            FetchLimits(settings.limits.image_timeout_s, settings.limits.image_away_s),
        ),
        disks=disks,
        places=places,
        starts=asyncio.Semaphore(settings.limits.concurrent_starts),
        preparations=asyncio.Semaphore(settings.limits.concurrent_preparations),
        drives=SettlingDrives(hypervisor, ledger, port, settings.storage.drives),
    )


def make_places(storage: StorageSettings) -> Places:
    pools = {name: Pool(name, pool.path, pool.mounted) for name, pool in sorted(storage.pools.items())}
    return Places(storage.vms, pools)


def _drive_port(settings: Settings, hypervisor: Hypervisor) -> DrivePort:
    """A fake machine has its drives with its domains."""
    if settings.hypervisor == "fake":
        from ppec_agentd.fake_nvme import FakeNvme

        if isinstance(hypervisor, FakeNvme):
            return hypervisor
    return HostDrives(settings.nvme.erase_timeout_s, settings.storage.drives)


def _cell_by_drive(nvme: NvmeSettings, port: DrivePort, topology: Topology) -> dict[str, int]:
    """Near the first cell is what says no cell, or one that this host doesn't have: a machine with one cell names
    none."""
    near = {address: port.read(address).cell for address in nvme.drives}
    first = topology.cells[0].cell
    return {address: first if cell not in topology.by_cell else cell for address, cell in near.items()}


def make_eviction(settings: Settings, context: HostContext) -> ImageEviction:
    """The end of images that this host's VMs need no more."""
    storage = settings.storage
    return ImageEviction(context.images, context.hypervisor, context.places, storage.image_keep_s)


def make_inventory(settings: Settings) -> Inventory | None:
    """A fake host has no parts."""
    storage = settings.storage
    places = make_places(storage).folders
    return None if settings.hypervisor == "fake" else Inventory((*places, storage.images))


def prepare_state(storage: StorageSettings) -> Journal:
    """Makes the folders, sweeps what a crash left half written, opens the journal."""
    for folder in (storage.state_dir, storage.vms, storage.images):
        if not folder.is_dir():
            folder.mkdir(parents=True)
            # Whatever the umask: QEMU's user passes through to its files, and lists nothing.
            folder.chmod(0o711)
    for partial in storage.images.glob(".*.partial"):
        partial.unlink(missing_ok=True)
    return Journal.open(storage.journal)


def usable_disk_mib(storage: StorageSettings) -> int:
    """What VMs may use: the setting, or what is free now plus what their folders hold already."""
    if storage.disk_mib is not None:
        return storage.disk_mib
    return (shutil.disk_usage(storage.vms).free + _held_bytes(storage.vms)) // MIB


def usable_pools_mib(storage: StorageSettings) -> dict[str, int]:
    """The same for each pool, by its name: nothing of one that can't be used now."""
    return {
        pool.name: _usable_pool_mib(pool, storage.pools[pool.name].disk_mib)
        for pool in make_places(storage).pools.values()
    }


def _usable_pool_mib(pool: Pool, disk_mib: int | None) -> int:
    """One that can't be read keeps the agent from nothing else."""
    try:
        if not (problem := pool.problem()):
            held = sum(_held_bytes(pool.path / name) for name in vm_names(pool.path))
            there_mib = (shutil.disk_usage(pool.path).free + held) // MIB
            return there_mib if disk_mib is None else disk_mib
    except OSError as error:
        problem = str(error)
    log.warning("pool_unusable", pool=pool.name, why=problem)
    return 0


def _held_bytes(folder: Path) -> int:
    held = 0
    for base, _, names in os.walk(folder):
        for name in names:
            held += (Path(base) / name).lstat().st_blocks * 512
    return held
