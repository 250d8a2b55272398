# SPDX-License-Identifier: Apache-2.0
"""`ppec-bench-cluster/1`: a plain description of a cluster, made to compare planners.

A socket is one NUMA cell; what is reserved of it is the host's own. A group is a cluster. A VM's app is a group of VMs
that stand on hosts of their own, if the rules say so. Disks are the hosts' own unless the storage is shared; of a
mirrored one the second host holds as much as the first. The format has no addresses: they never run out.

What follows from the rest may be left out, and has to agree with it: a host's `free` figures; a VM's `flavour`, whose
size may have changed since. `seed`, `weight`, `uuid` and `class` are notes of who made the file.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import partial
from uuid import UUID

from ppec_contract.vm import NumaPolicy
from ppec_orchestrator.fleets.bench_cluster_rows import (
    DOCUMENT,
    REQUESTS,
    SCHEMA,
    Document,
    Flavour,
    HostRow,
    Requests,
    SocketRow,
    VmRow,
)
from ppec_orchestrator.fleets.faults import FleetError, refuse_doubles, refuse_standing, shown
from ppec_orchestrator.fleets.file import FleetFile, Names, made_up_ids
from ppec_orchestrator.fleets.json_document import validated
from ppec_orchestrator.fleets.places import Places
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState, SeatedVm
from ppec_orchestrator.placement.request import Group, Profile, Shape, VmRequest

__all__ = ["SCHEMA", "read"]

_ARCHITECTURE = "x86_64"
# The format's words, and the API's for what is no part of it (as in `snapshot.py`).
_CALLED = {"one-cell": "rules.vm_fits_one_socket", "spare": "n_plus_one", "cluster-spare": "cluster.n_plus_one"}
_PLACES = {"cluster": "group"}
# One prefix for all hosts, without a bound.
_PREFIXES = ((1,),)
_NO_REQUESTS: Requests = {"batch": []}


def read(parsed: object, taken: Container[UUID] = ()) -> FleetFile:
    """Raises FleetError. No request is given one of the ids `taken`."""
    document = validated(DOCUMENT, parsed)
    refuse_doubles((each["name"] for each in document["groups"]), "group", "groups[{}].name".format)
    refuse_doubles((each["name"] for each in document["hosts"]), "host", "hosts[{}].name".format)
    refuse_doubles((each["name"] for each in document["vms"]), "VM", "vms[{}].name".format)
    reading = _Reading(document)
    requests = reading.requests(document.get("requests", _NO_REQUESTS), "requests.", taken)
    return FleetFile(
        Fleet.build(reading.hosts()),
        requests,
        Names(reading.flavours),
        partial(_more_requests, reading),
        _CALLED,
    )


def _more_requests(reading: _Reading, parsed: object) -> tuple[VmRequest, ...]:
    return reading.requests(validated(REQUESTS, parsed), "")


class _Reading:
    """One document, of the right shape; what it refers to is looked up here."""

    def __init__(self, document: Document) -> None:
        rules = document["rules"]
        self._apart = rules["anti_affinity"]
        self._even = rules["even_vcpus"]
        self._own_disk = document["storage"] != "shared"
        self._mirrored = document["storage"] == "mirrored"
        self._numa = NumaPolicy(multi_cell=not rules["vm_fits_one_socket"])
        self._document = document
        self._profiles: dict[tuple[int, int, int], Profile] = {}
        self._groups: dict[str, tuple[Group, ...]] = {}
        self._standing = {vm["name"] for vm in document["vms"]}
        refuse_doubles((each["name"] for each in document["flavours"]), "flavour", "flavours[{}].name".format)
        self.flavours = {
            each["name"]: self._profile(each, f"flavours[{index}]") for index, each in enumerate(document["flavours"])
        }

    def hosts(self) -> list[HostState]:
        clusters = {each["name"] for each in self._document["groups"]}
        rows = {host["name"]: _Rest(host, f"hosts[{index}]") for index, host in enumerate(self._document["hosts"])}
        self._seat(rows)
        hosts, places = [], Places(_PLACES)
        for index, rest in enumerate(rows.values()):
            host = rest.state(index, clusters)
            places.check(host, f"hosts[{index}]")
            rest.refuse_wrong_free(own_disk=self._own_disk)
            hosts.append(host)
        return hosts

    def requests(self, requests: Requests, inside: str, taken: Container[UUID] = ()) -> tuple[VmRequest, ...]:
        if "one" in requests:
            self._flavour(requests["one"]["flavour"], f"{inside}one.flavour")
        batch, where = requests["batch"], f"{inside}batch"
        refuse_doubles((each["name"] for each in batch), "VM", (where + "[{}].name").format)
        ids = made_up_ids(2, taken)
        found = []
        for index, each in enumerate(batch):
            refuse_standing(each["name"], self._standing, f"{where}[{index}].name")
            profile = self._flavour(each["flavour"], f"{where}[{index}].flavour")
            found.append(VmRequest(next(ids), each["name"], profile, groups=self._group(each.get("app", ""))))
        return tuple(found)

    def _flavour(self, name: str, where: str) -> Profile:
        found = self.flavours.get(name)
        if found is None:
            raise FleetError(where, f"there is no flavour {shown(name)}")
        return found

    def _seat(self, rows: Mapping[str, _Rest]) -> None:
        ids = made_up_ids(1)
        for index, vm in enumerate(self._document["vms"]):
            where = f"vms[{index}]"
            rest = rows.get(vm["host"])
            if rest is None:
                raise FleetError(f"{where}.host", f"there is no host {shown(vm['host'])}")
            if "flavour" in vm:
                self._flavour(vm["flavour"], f"{where}.flavour")
            profile = self._profile(vm, where)
            seated = SeatedVm(next(ids), vm["name"], profile, (vm["socket"],), self._group(vm.get("app", "")))
            rest.seat(seated, where)
            if "secondary" in vm:
                self._second(vm, vm["secondary"], rows, f"{where}.secondary").take_disk(profile.shape.disk_mib, where)

    def _second(self, vm: VmRow, second: str, rows: Mapping[str, _Rest], where: str) -> _Rest:
        if second not in rows:
            raise FleetError(where, f"there is no host {shown(second)}")
        if second == vm["host"]:
            raise FleetError(where, "it is the VM's own host")
        if not self._mirrored:
            raise FleetError(where, f"storage is {self._document['storage']}: no disk has a second host")
        return rows[second]

    def _profile(self, sized: VmRow | Flavour, where: str) -> Profile:
        key = (sized["vcpus"], sized["mem_mib"], sized["disk_mib"])
        found = self._profiles.get(key)
        if found is None:
            vcpus, memory_mib, disk_mib = key
            if self._even and vcpus % 2:
                raise FleetError(f"{where}.vcpus", f"{vcpus} vCPUs are odd, and the rules want an even number")
            shape = Shape(vcpus, memory_mib, disk_mib if self._own_disk else 0, self._numa)
            found = self._profiles[key] = Profile(shape, _ARCHITECTURE)
        return found

    def _group(self, app: str) -> tuple[Group, ...]:
        if not self._apart or not app:
            return ()
        found = self._groups.get(app)
        if found is None:
            found = self._groups[app] = (Group(f"app:{app}"),)
        return found


class _Rest:
    """What is left of a host while its VMs take their seats."""

    def __init__(self, host: HostRow, where: str) -> None:
        self._host = host
        self._where = where
        self._vms: list[SeatedVm] = []
        self._disk_free_mib = host["disk_mib"]
        self._free: dict[int, list[int]] = {}
        for index, socket in enumerate(host["sockets"]):
            for figure, reserve in (("cores", "reserved_cores"), ("mem_mib", "reserved_mem_mib")):
                whole, kept = socket[figure], socket[reserve]  # type: ignore[literal-required]
                if kept > whole:
                    raise FleetError(f"{where}.sockets[{index}].{reserve}", f"{kept} of {whole} are reserved")
            self._free[socket["id"]] = [
                socket["cores"] - socket["reserved_cores"],
                socket["mem_mib"] - socket["reserved_mem_mib"],
            ]
        refuse_doubles((each["id"] for each in host["sockets"]), "socket", (where + ".sockets[{}].id").format)

    def seat(self, vm: SeatedVm, where: str) -> None:
        free = self._free.get(vm.cells[0])
        if free is None:
            raise FleetError(f"{where}.socket", f"host {shown(self._host['name'])} has no socket {vm.cells[0]}")
        shape = vm.profile.shape
        free[0] -= shape.vcpus
        free[1] -= shape.memory_mib
        if free[0] < 0 or free[1] < 0:
            what = f"{-free[0]} cores" if free[0] < 0 else f"{-free[1]} MiB of memory"
            raise FleetError(
                where,
                f"it overlaps the VMs before it: socket {vm.cells[0]} of host {shown(self._host['name'])} "
                f"lacks {what} for it",
            )
        self.take_disk(shape.disk_mib, where)
        self._vms.append(vm)

    def take_disk(self, disk_mib: int, where: str) -> None:
        self._disk_free_mib -= disk_mib
        if self._disk_free_mib < 0:
            raise FleetError(where, f"host {shown(self._host['name'])} lacks {-self._disk_free_mib} MiB of disk for it")

    def refuse_wrong_free(self, *, own_disk: bool) -> None:
        """Raises FleetError where the file says otherwise than its VMs leave. Of shared storage nobody says whether a
        host's disk has it."""
        said = self._host.get("free")
        if said is None:
            return
        cores, memory_mib = (sum(figures) for figures in zip(*self._free.values(), strict=True))
        left = {"cores": cores, "mem_mib": memory_mib} | ({"disk_mib": self._disk_free_mib} if own_disk else {})
        for figure, amount in left.items():
            if said[figure] != amount:  # type: ignore[literal-required]
                what = f"{said[figure]} are said to be free, and its VMs leave {amount}"  # type: ignore[literal-required]
                raise FleetError(f"{self._where}.free.{figure}", what)
        if said["disk_mib"] > self._host["disk_mib"]:
            raise FleetError(f"{self._where}.free.disk_mib", f"{said['disk_mib']} are free of {self._host['disk_mib']}")

    def state(self, number: int, clusters: set[str]) -> HostState:
        host = self._host
        if host["group"] not in clusters:
            raise FleetError(f"{self._where}.group", f"there is no group {shown(host['group'])}")
        return HostState(
            host_id=number,
            name=host["name"],
            datacentre="",
            cluster=host["group"],
            rack=host["rack"],
            vrf="",
            architecture=_ARCHITECTURE,
            cells=tuple(self._cell(socket) for socket in host["sockets"]),
            disk_mib=host["disk_mib"],
            disk_free_mib=self._disk_free_mib,
            vms=tuple(self._vms),
            prefixes=_PREFIXES,
        )

    def _cell(self, socket: SocketRow) -> CellState:
        cores_free, memory_free_mib = self._free[socket["id"]]
        return CellState(
            cell=socket["id"],
            socket=socket["id"],
            threads_per_core=1,
            cores=socket["cores"] - socket["reserved_cores"],
            cores_free=cores_free,
            memory_mib=socket["mem_mib"] - socket["reserved_mem_mib"],
            memory_free_mib=memory_free_mib,
            cores_reserved=socket["reserved_cores"],
            memory_reserved_mib=socket["reserved_mem_mib"],
        )
