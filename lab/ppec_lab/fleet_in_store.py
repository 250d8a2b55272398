# SPDX-License-Identifier: Apache-2.0
"""Writes a generated fleet into an orchestrator's empty database, as if it had been built and filled over the years.

The record is whole: room used on cells and hosts is the sum of what allocations hold, every VM has the addresses that
its host's VRF gives, reports name the VMs that are there. Only the operations that made the VMs are not kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from itertools import islice
from typing import Any

from sqlalchemy import Connection, Table, delete, func, insert, select, text, update

from ppec_contract.api_ipdb import PrefixCreate
from ppec_contract.api_vms import VmRecord
from ppec_contract.host import CellReport, DriveReport, HostReport, NicReport, PoolReport
from ppec_contract.vm import VcpuPin, VmInfo, VmState
from ppec_lab.generated_fleet import (
    ARCHITECTURES,
    CLUSTERS_PER_DATACENTRE,
    DRIVES_PER_SOCKET,
    DUAL,
    FLAVORS,
    HOSTS_PER_RACK,
    IMAGES,
    POOL,
    RACKS_PER_CLUSTER,
    RESERVED_CORES,
    RESERVED_MIB,
    VRFS,
    GeneratedFleet,
    GeneratedHost,
    GeneratedVm,
)
from ppec_orchestrator.ipdb.ranges import to_hex, usable_range
from ppec_orchestrator.store import tables
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.prefixes import insert_prefix
from ppec_orchestrator.store.reports import FACTS
from ppec_orchestrator.store.search import host_text, vm_text

_ROWS = 5000
_BOOTED = 1_700_000_000_000
_OPERATION = "op-generated"


def write_fleet(database: Database, fleet: GeneratedFleet, now: datetime) -> None:
    """In one transaction, into a database that is migrated and empty. `now` is when hosts were last heard."""
    with database.write() as conn:
        if conn.dialect.name == "postgresql":
            # It looks every reference up, row by row. SQLite, which gets the same rows, does so too.
            conn.execute(text("SET LOCAL session_replication_role = replica"))
        _Writer(conn, fleet, now).write()


class _Writer:
    """Rows refer to each other by the ids that they are given here, counted from one."""

    def __init__(self, conn: Connection, fleet: GeneratedFleet, now: datetime) -> None:
        self._conn = conn
        self._fleet = fleet
        self._now = now
        self._images = {name: number for number, name in enumerate((*IMAGES, "debian-12-aarch64"), 1)}

    def write(self) -> None:
        self._catalogue()
        self._hosts()
        self._vms()
        self._addresses()
        self._count_ids()

    def _catalogue(self) -> None:
        hosts = len(self._fleet.hosts)
        racks = -(-hosts // HOSTS_PER_RACK)
        clusters = -(-racks // RACKS_PER_CLUSTER)
        centres = -(-clusters // CLUSTERS_PER_DATACENTRE)
        self._insert(
            tables.datacentre,
            ({"id": n + 1, "name": f"dc{n}", "region": ("north", "south")[n % 2]} for n in range(centres)),
        )
        self._insert(
            tables.cluster,
            (
                {
                    "id": n + 1,
                    "name": f"c{n:02d}",
                    "datacentre_id": n // CLUSTERS_PER_DATACENTRE + 1,
                    "architecture": ARCHITECTURES[n % len(ARCHITECTURES)],
                }
                for n in range(clusters)
            ),
        )
        self._insert(
            tables.rack,
            ({"id": n + 1, "name": f"r{n:03d}", "cluster_id": n // RACKS_PER_CLUSTER + 1} for n in range(racks)),
        )
        self._insert(tables.vrf, ({"id": n, "name": name, "description": ""} for n, name in enumerate(VRFS, 1)))
        self._insert(
            tables.flavor,
            (
                {"name": f.name, "vcpus": f.vcpus, "memory_mib": f.memory_mib, "disk_mib": f.disk_mib, "numa": {}}
                for f in FLAVORS
            ),
        )
        self._insert(tables.image, (_image(number, name) for name, number in self._images.items()))

    def _hosts(self) -> None:
        hosts = self._fleet.hosts
        self._insert(tables.host, map(self._host, hosts))
        self._insert(tables.host_cell, (row for host in hosts for row in _cells(host)))
        self._insert(
            tables.host_pool,
            (
                {"host_id": h.number + 1, "name": POOL, "size_mib": h.pool_mib, "used_mib": h.pool_used_mib}
                for h in hosts
                if h.pool_mib
            ),
        )
        self._insert(
            tables.host_label, (row for host in hosts for row in _labels("host_id", host.number + 1, host.labels))
        )
        self._insert(
            tables.host_search,
            (
                {"name": h.name, "host_id": h.number + 1, "text": host_text(h.name, _address(h), h.labels)}
                for h in hosts
            ),
        )

    def _host(self, host: GeneratedHost) -> dict[str, Any]:
        seen_at = self._now - timedelta(days=1) if host.silent else self._now
        row: dict[str, Any] = {
            "id": host.number + 1,
            "name": host.name,
            "rack_id": host.rack + 1,
            "vrf_id": VRFS.index(host.vrf) + 1,
            "address": _address(host),
            "port": 7443,
            "draining": host.draining,
            "enrolled_at": None,
            "generation": len(host.vms),
            "last_seen_at": None,
            "agent_started_at_unix_ms": 0,
            "report_sequence": 0,
            "report_digest": None,
            "report": None,
            "facts": None,
            "disk_mib": 0,
            "disk_used_mib": 0,
            "labels": host.labels,
        }
        if not host.known:
            return row
        report = _report(host)
        dumped = report.model_dump(mode="json")
        return row | {
            "enrolled_at": self._now - timedelta(days=400),
            "last_seen_at": seen_at,
            "agent_started_at_unix_ms": _BOOTED,
            "report_sequence": 1,
            "report_digest": report.digest(),
            "report": dumped,
            "facts": {name: dumped[name] for name in FACTS} | {"drift_count": 0},
            "disk_mib": host.shape.disk_mib,
            "disk_used_mib": host.disk_used_mib,
        }

    def _vms(self) -> None:
        # In the order in which they were created: so rows lie in a database that has grown.
        placed = sorted(self._fleet.placed(), key=lambda pair: pair[1].number)
        vms = [vm for _, vm in placed] + self._fleet.failed
        self._insert(tables.vm, (self._vm(vm) | _seen(host, vm, self._now) for host, vm in placed))
        self._insert(tables.vm, (self._vm(vm) | _FAILED for vm in self._fleet.failed))
        self._insert(
            tables.vm_label, (row | {"name": vm.name} for vm in vms for row in _labels("vm_id", vm.vm_id, vm.labels))
        )
        self._insert(
            tables.vm_search,
            (
                {"name": v.name, "vm_id": v.vm_id, "text": vm_text(v.name, v.image, v.flavor.name, v.labels)}
                for v in vms
            ),
        )
        self._insert(
            tables.allocation,
            (
                {"vm_id": v.vm_id, "host_id": h.number + 1, "disk_mib": v.flavor.disk_mib, "pool": v.pool}
                for h, v in placed
            ),
        )
        self._insert(
            tables.allocation_cell,
            (
                {
                    "vm_id": v.vm_id,
                    "cell": v.socket,
                    "cores": v.flavor.vcpus,
                    "memory_mib": v.flavor.memory_mib,
                    "nvme": len(v.drives),
                }
                for _, v in placed
            ),
        )

    def _vm(self, vm: GeneratedVm) -> dict[str, Any]:
        return {
            "id": vm.vm_id,
            "name": vm.name,
            "flavor": vm.flavor.name,
            "image_id": self._images[vm.image],
            "vcpus": vm.flavor.vcpus,
            "memory_mib": vm.flavor.memory_mib,
            "disk_mib": vm.flavor.disk_mib,
            "pool": vm.pool,
            "nvme_drives": len(vm.drives),
            "user_data": "#cloud-config\n{}\n",
            "labels": vm.labels,
            "created_at": self._now - timedelta(days=300) + timedelta(minutes=vm.number),
            "operation_id": _OPERATION,
            "numa": {},
        }

    def _addresses(self) -> None:
        """A prefix for each VRF of a cluster, with a quarter more addresses than are in use."""
        owners: dict[tuple[str, int], list[GeneratedVm]] = defaultdict(list)
        for host, vm in self._fleet.placed():
            owners[host.vrf, host.cluster].append(vm)
        for number, ((vrf, cluster), vms) in enumerate(sorted(owners.items(), key=lambda item: item[0])):
            self._grant(_ipv4(number, vrf, cluster, len(vms)), vms)
            if vrf in DUAL:
                self._grant(_ipv6(number, vrf, cluster), vms)

    def _grant(self, wanted: PrefixCreate, vms: Sequence[GeneratedVm]) -> None:
        """The lowest addresses of a new prefix, one for each VM."""
        prefix_id = insert_prefix(self._conn, wanted)
        usable = usable_range(wanted.cidr, gateway=wanted.gateway, first=None, last=None)
        numbers = usable.window(int(usable.first), len(vms))
        if usable.family == 4:
            # Its free rows are there already.
            mine = (tables.address.c.prefix_id == prefix_id, tables.address.c.address_hex <= to_hex(numbers[-1]))
            self._conn.execute(delete(tables.address).where(*mine))
        else:
            after = update(tables.prefix).where(tables.prefix.c.id == prefix_id)
            self._conn.execute(after.values(next_hex=to_hex(numbers[-1] + 1)))
        self._insert(
            tables.address,
            (
                {"prefix_id": prefix_id, "address_hex": to_hex(number), "vm_id": vm.vm_id}
                for number, vm in zip(numbers, vms, strict=True)
            ),
        )

    def _insert(self, table: Table, rows: Iterable[Mapping[str, Any]]) -> None:
        left = iter(rows)
        while chunk := list(islice(left, _ROWS)):
            self._conn.execute(insert(table), chunk)

    def _count_ids(self) -> None:
        """PostgreSQL counts by itself, and was not asked."""
        if self._conn.dialect.name != "postgresql":
            return
        for table in (tables.datacentre, tables.cluster, tables.rack, tables.vrf, tables.image, tables.host):
            sequence = func.pg_get_serial_sequence(table.name, "id")
            self._conn.execute(select(func.setval(sequence, select(func.max(table.c.id)).scalar_subquery())))


def _image(number: int, name: str) -> dict[str, Any]:
    return {
        "id": number,
        "name": name,
        "format": "qcow2",
        "architecture": "aarch64" if name.endswith("aarch64") else "x86_64",
        "sha256": f"{number:064x}",
        "size_bytes": 500_000_000,
        "virtual_size_mib": 4096,
    }


def _address(host: GeneratedHost) -> str:
    return f"10.{200 + (host.number >> 16)}.{host.number >> 8 & 255}.{host.number & 255}"


def _labels(owner: str, owner_id: Any, labels: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    return ({owner: owner_id, "key": key, "value": value} for key, value in labels.items())


def _cells(host: GeneratedHost) -> Iterator[dict[str, Any]]:
    for number, socket in enumerate(host.sockets if host.known else ()):
        yield {
            "host_id": host.number + 1,
            "cell": number,
            "socket": number,
            "threads_per_core": 1,
            "cores": socket.cores,
            "memory_mib": socket.memory_mib,
            "cores_reserved": RESERVED_CORES,
            "memory_reserved_mib": RESERVED_MIB,
            "cores_used": socket.cores_used,
            "memory_used_mib": socket.memory_used_mib,
            "nvme": DRIVES_PER_SOCKET,
            "nvme_used": socket.drives_used,
        }


_FAILED: dict[str, Any] = {
    "record": VmRecord.FAILED.value,
    "observed": VmState.UNKNOWN.value,
    "observed_at": None,
    "pins": None,
}


def _seen(host: GeneratedHost, vm: GeneratedVm, now: datetime) -> dict[str, Any]:
    return {
        "record": VmRecord.ACTIVE.value,
        "observed": vm.observed,
        "observed_at": now,
        "pins": [pin.model_dump() for pin in _pins(host, vm)],
    }


def _pins(host: GeneratedHost, vm: GeneratedVm) -> tuple[VcpuPin, ...]:
    """A core has one thread; each socket's first cores are the host's own."""
    first = vm.socket * host.shape.cores + RESERVED_CORES + vm.first_core
    return tuple(VcpuPin(vcpu=number, pcpu=first + number) for number in range(vm.flavor.vcpus))


def _report(host: GeneratedHost) -> HostReport:
    cells = tuple(
        CellReport(
            cell=number,
            socket=number,
            threads_per_core=1,
            cores=socket.cores + RESERVED_CORES,
            cores_reserved=RESERVED_CORES,
            cores_free=socket.cores - socket.cores_used,
            memory_mib=socket.memory_mib + RESERVED_MIB,
            memory_reserved_mib=RESERVED_MIB,
            memory_free_mib=socket.memory_mib - socket.memory_used_mib,
            nvme_drives=DRIVES_PER_SOCKET,
            nvme_drives_free=DRIVES_PER_SOCKET - socket.drives_used,
        )
        for number, socket in enumerate(host.sockets)
    )
    return HostReport(
        host=host.name,
        boot_id=f"{host.number:032x}",
        agent_version="0.1.0",
        api_version=1,
        capabilities=("vm-lifecycle", "vm-policies", "storage-pools", "nvme-drives"),
        architecture=host.architecture,
        domain_type="kvm",
        libvirt_version="9.0.0",
        qemu_version="7.2.0",
        kernel_version="6.1.0",
        cells=cells,
        disk_mib=host.shape.disk_mib,
        disk_free_mib=host.shape.disk_mib - host.disk_used_mib,
        bridges=("br0",),
        vms=tuple(_info(host, vm) for vm in host.vms),
        drives=tuple(
            DriveReport(name=f"nvme{n}n1", size_mib=host.shape.disk_mib // 4, rotational=False) for n in range(4)
        ),
        nics=tuple(
            NicReport(name=f"eth{n}", mac=f"02:00:00:00:00:0{n}", state="up", speed_mbit=25000) for n in range(2)
        ),
        pools=_pools(host),
    )


def _pools(host: GeneratedHost) -> tuple[PoolReport, ...]:
    if not host.pool_mib:
        return ()
    return (PoolReport(name=POOL, size_mib=host.pool_mib, free_mib=host.pool_mib - host.pool_used_mib),)


def _info(host: GeneratedHost, vm: GeneratedVm) -> VmInfo:
    return VmInfo(
        vm_id=vm.vm_id,
        name=vm.name,
        state=VmState(vm.observed),
        managed=True,
        vcpus=vm.flavor.vcpus,
        memory_mib=vm.flavor.memory_mib,
        cells=(vm.socket,),
        pins=_pins(host, vm),
        disk_mib=vm.flavor.disk_mib,
        operation_id=_OPERATION,
        pool=vm.pool or "",
        nvme_drives=tuple(f"000{vm.socket}:{drive + 1:02x}:00.0" for drive in vm.drives),
    )


def _ipv4(number: int, vrf: str, cluster: int, addresses: int) -> PrefixCreate:
    """A prefix with a quarter more addresses than are in use; each has a /16 of its own to be in."""
    bits = max(4, (addresses * 5 // 4 + 3).bit_length())
    network = IPv4Network((int(IPv4Address("10.0.0.0")) + (number << 16), 32 - bits))
    return PrefixCreate(
        vrf=vrf, cidr=network, gateway=network[1], bridge="br0", cluster=f"c{cluster:02d}",
        nameservers=(IPv4Address("10.255.0.1"),),
    )  # fmt: skip


def _ipv6(number: int, vrf: str, cluster: int) -> PrefixCreate:
    network = IPv6Network(f"2001:db8:{number:x}::/64")
    return PrefixCreate(vrf=vrf, cidr=network, gateway=network[1], bridge="br0", cluster=f"c{cluster:02d}")
