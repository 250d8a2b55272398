# SPDX-License-Identifier: Apache-2.0
"""Ganeti's allocator beside ours: the same fleet in its text format, the same VMs as its requests.

`hail` (Debian's ganeti-htools-3.0) sees nodes without sockets; disks, exclusion tags and reserves are the same. It may
take 7 GiB and 60 CPU-seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppec_orchestrator.placement.fleet import Fleet, HostState, SeatedVm
from ppec_orchestrator.placement.request import Group, Shape, VmRequest

PROGRAM = "/usr/lib/ganeti/3.0/usr/lib/ganeti/iallocators/hail"
_STANDARD = (16384, 4, 102400, 1, 1, 1)
_LEAST = (1024, 2, 0, 1, 1, 1)
_MOST = (786432, 96, 16777216, 16, 8, 12)
_TEMPLATES = ("plain", "drbd", "ext", "diskless")
_SPEC = ("memory-size", "cpu-count", "disk-size", "disk-count", "nic-count", "spindle-use")


def fleet_text(fleet: Fleet) -> str:
    """The fleet for htools' -t: a cluster is a node group, anti-affinity on hosts an exclusion tag."""
    uuids = {name: f"00000000-0000-4000-8000-{n:012d}" for n, name in enumerate(fleet.places["cluster"])}
    sections = [
        [f"{name}|{uuid}|preferred||" for name, uuid in uuids.items()],
        [_node(host, uuids[host.cluster], master=row == 0) for row, host in enumerate(fleet.hosts)],
        [_instance(vm, host) for host in fleet.hosts for vm in host.vms],
        ["htools:iextags:app"],
        [_policy(owner) for owner in ("", *uuids)],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def allocation(requests: Sequence[VmRequest]) -> str:
    """A request of hail's: for one VM, or for several in their order."""
    wanted: dict[str, Any] = {"type": "multi-allocate", "instances": [_wanted(each) for each in requests]}
    if len(requests) == 1:
        wanted = {**_wanted(requests[0]), "type": "allocate"}
    return json.dumps(
        {
            "version": 2, "cluster_name": "bench", "cluster_tags": [], "enabled_hypervisors": ["kvm"],
            "ipolicy": _limits(), "nodegroups": {}, "nodes": {}, "instances": {}, "request": wanted,
        }
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ran:
    """What a program took, all of it: start, reading, planning. `output` is None where it found no end or was ended."""

    cpu_s: float
    peak_mib: float
    output: bytes | None


def run(command: Sequence[str]) -> Ran:
    """A program in a process of its own, within the limits (`limited.py`)."""
    place = Path("build") / "planning-output"
    limited = [sys.executable, "-m", "bench.limited", str(place), *command]
    found = json.loads(subprocess.run(limited, check=True, capture_output=True).stdout)
    return Ran(found["cpu_s"], found["peak_mib"], place.read_bytes() if found["code"] == 0 else None)


def places(ran: Ran) -> dict[str, str] | None:
    """Where hail put which VM; None where it gave no answer. The one VM of a single request has no name."""
    answer: dict[str, Any] = json.loads(ran.output) if ran.output else {"success": False}
    if not answer["success"]:
        return None
    result = answer["result"]
    if result and isinstance(result[0], str):
        return {"": result[0]}
    return {name: nodes[0] for name, nodes in result[0]}


def _node(host: HostState, uuid: str, *, master: bool) -> str:
    memory_reserved_mib = sum(cell.memory_reserved_mib for cell in host.cells)
    cores_reserved = sum(cell.cores_reserved for cell in host.cells)
    fields = (
        host.name,
        sum(cell.memory_mib for cell in host.cells) + memory_reserved_mib,
        memory_reserved_mib,
        sum(cell.memory_free_mib for cell in host.cells),
        host.disk_mib,
        host.disk_free_mib,
        sum(cell.cores for cell in host.cells) + cores_reserved,
        "M" if master else "N",
        uuid,
        10,
        "",
        "N",
        0,
        cores_reserved,
        "1.0",
    )
    return "|".join(map(str, fields))


def _instance(vm: SeatedVm, host: HostState) -> str:
    shape = vm.profile.shape
    size = f"{shape.memory_mib}|{shape.disk_mib}|{shape.vcpus}"
    return f"{vm.name}|{size}|running|Y|{host.name}||plain|{','.join(_tags(vm.groups))}|1"


def _tags(groups: Sequence[Group]) -> list[str]:
    return [group.name for group in groups]


def _policy(owner: str) -> str:
    standard, least, most = (",".join(map(str, spec)) for spec in (_STANDARD, _LEAST, _MOST))
    return f"{owner}|{standard}|{least};{most}|{','.join(_TEMPLATES)}|1.0|32.0"


def _limits() -> dict[str, Any]:
    standard, least, most = (dict(zip(_SPEC, spec, strict=True)) for spec in (_STANDARD, _LEAST, _MOST))
    ratios = {"vcpu-ratio": 1.0, "spindle-ratio": 32.0, "disk-templates": list(_TEMPLATES)}
    return {"std": standard, "minmax": [{"min": least, "max": most}], **ratios}


def _wanted(request: VmRequest) -> dict[str, Any]:
    shape: Shape = request.profile.shape
    return {
        "name": request.name, "memory": shape.memory_mib, "vcpus": shape.vcpus, "disk_space_total": shape.disk_mib,
        "disks": [{"mode": "rw", "size": shape.disk_mib, "spindles": 1}], "disk_template": "plain",
        "required_nodes": 1, "spindle_use": 1, "nics": [], "os": "debian", "hypervisor": "kvm",
        "tags": _tags(request.groups),
    }  # fmt: skip
