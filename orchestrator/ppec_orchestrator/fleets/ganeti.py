# SPDX-License-Identifier: Apache-2.0
"""Ganeti's htools text format (what `hscan` writes and htools read with -t), version 3.0: sections of lines with fields
between bars, an empty line between sections: groups, nodes, instances, cluster tags, instance policies.

A node has no sockets: it is a host of one NUMA cell. A group is a cluster, and a rack, as nothing else says what fails
with what. Where the policy's vCPU ratio is 1, instances have cores of their own; otherwise they share all CPUs, and the
ratio says how many vCPUs are admitted. Tags by which instances exclude each other (`htools:iextags:…`) are groups on
hosts of their own. An offline node is silent, one of an unallocable group draining. What a node says is free is
believed, unless its instances leave less.

A file contradicts itself where instances hold more of a node than there is of it at all. Anything less is found in real
clusters: what a node of KVM says it uses itself contains its instances' memory, and an instance that is down has none
of the node's, though it is kept for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import floor

from ppec_contract.vm import CpuPolicy, NumaPolicy
from ppec_orchestrator.fleets.faults import FleetError, not_utf8, shown
from ppec_orchestrator.fleets.file import MOST_AMOUNT, MOST_CPUS, MOST_HOSTS, MOST_VMS, FleetFile, made_up_ids
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState, SeatedVm
from ppec_orchestrator.placement.request import Group, Profile, Shape

_EXCLUSION = "htools:iextags:"
_MOST_RATIO = 128
_TEMPLATES = ("diskless", "file", "sharedfile", "gluster", "plain", "blockdev", "drbd", "rbd", "ext")
_ON_THE_NODE = frozenset(("plain", "drbd", "file"))
# Whose disks are volumes of the node's group, as large as they say; a file may have holes, or lie elsewhere.
_VOLUMES = frozenset(("plain", "drbd"))
_MIRRORED = "drbd"
# Those that have memory of their primary node: up as they should be, or although they shouldn't.
_UP = frozenset(("running", "ERROR_up"))
_STATES = (
    "running", "ERROR_up", "ADMIN_down", "ADMIN_offline", "USER_down", "ERROR_down", "ERROR_nodedown",
    "ERROR_nodeoffline", "ERROR_wrongnode",
)  # fmt: skip
_ALLOCATION = ("preferred", "last_resort", "unallocable")
_UNKNOWN = "?"
_SECTIONS = ("groups", "nodes", "instances", "cluster tags", "policies")
_Line = tuple[int, str]


@dataclass(frozen=True, slots=True)
class _Policy:
    """How many vCPUs are admitted to a CPU, and how much memory of instances to a node's. The defaults are Ganeti's,
    where no policy says otherwise; older versions have no memory ratio."""

    vcpu_ratio: float = 4.0
    memory_ratio: float = 1.0


@dataclass(slots=True)
class _Cluster:
    """A node group."""

    name: str
    unallocable: bool
    policy: _Policy | None = None


@dataclass(slots=True)
class _Node:
    """The figures of a node line, and what its instances take of them."""

    name: str
    line: int
    cluster: _Cluster
    offline: bool
    memory_mib: int
    memory_reserved_mib: int
    memory_free_mib: int
    disk_mib: int
    disk_free_mib: int
    cpus: int
    cpus_reserved: int
    vms: list[SeatedVm] = field(default_factory=list)
    memory_held_mib: int = 0
    disk_held_mib: int = 0

    def hold(self, line: int, policy: _Policy, *, memory_mib: int = 0, disk_mib: int = 0) -> None:
        """Raises FleetError if its instances hold more than there is. Of an offline node the figures say nothing."""
        self.memory_held_mib += memory_mib
        self.disk_held_mib += disk_mib
        if self.offline:
            return
        for what, held, whole in (
            ("memory", self.memory_held_mib, floor(self.memory_mib * policy.memory_ratio)),
            ("disk", self.disk_held_mib, self.disk_mib),
        ):
            if held > whole:
                raise FleetError(
                    f"line {line}",
                    f"with it the instances of node {shown(self.name)} hold {held} MiB of {what}, and it has {whole}",
                )


def read(data: bytes) -> FleetFile:
    """Raises FleetError with the line."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(data, error) from error
    groups, nodes, instances, tags, policies = _sections(text)
    clusters = _clusters(groups)
    default = _read_policies(policies, {each.name: each for each in clusters.values()})
    found = _nodes(nodes, clusters)
    kept = {name: node.cluster.policy or default for name, node in found.items()}
    _seat(instances, found, kept, _exclusions(tags))
    hosts = [_host(number, node, kept[name].vcpu_ratio) for number, (name, node) in enumerate(found.items())]
    return FleetFile(Fleet.build(hosts))


def _sections(text: str) -> list[list[_Line]]:
    """Always five; of policies there may be none, as older files have it."""
    found: list[list[_Line]] = [[]]
    for number, whole in enumerate(text.split("\n"), 1):
        line = whole.removesuffix("\r")
        if line.startswith("#"):
            continue
        if line:
            found[-1].append((number, line))
        elif len(found) < len(_SECTIONS) or found[-1]:
            found.append([])
    beyond = next((lines[0] for lines in found[len(_SECTIONS) :] if lines), None)
    if beyond is not None:
        raise FleetError(f"line {beyond[0]}", f"the format has {len(_SECTIONS)} sections, and here begins one more")
    if not found[0]:
        raise FleetError("line 1", "it begins with no group of nodes")
    if len(found) < len(_SECTIONS) - 1:
        last = text.count("\n") + 1
        raise FleetError(f"line {last}", f"it ends before the {_SECTIONS[len(found)]}")
    return [*found[: len(_SECTIONS)], *([] for _ in range(len(_SECTIONS) - len(found)))]


def _rows(lines: Sequence[_Line], kind: str, fewest: int, most: int) -> Iterator[tuple[int, list[str]]]:
    """The fields of each line; as many as are left out are empty."""
    for number, line in lines:
        fields = line.split("|")
        if not fewest <= len(fields) <= most:
            wanted = f"{fewest} to {most}" if fewest < most else str(most)
            raise FleetError(f"line {number}", f"a line of {kind} has {wanted} fields, this one {len(fields)}")
        if fewest < most:
            fields += [""] * (most - len(fields))
        yield number, fields


def _clusters(lines: Sequence[_Line]) -> dict[str, _Cluster]:
    """By UUID, which is what nodes name."""
    found: dict[str, _Cluster] = {}
    names: set[str] = set()
    for number, (name, uuid, allocation, *_) in _rows(lines, "groups", 3, 5):
        if not name or not uuid:
            raise FleetError(f"line {number}", "a group without a name or UUID")
        if name in names or uuid in found:
            raise FleetError(f"line {number}", f"group {shown(name)} ({shown(uuid)}) is there twice")
        _refuse_others(allocation, _ALLOCATION, number)
        names.add(name)
        found[uuid] = _Cluster(name, allocation == "unallocable")
    return found


def _read_policies(lines: Sequence[_Line], clusters: dict[str, _Cluster]) -> _Policy:
    """Sets the clusters' policies; returns the one of those that have none."""
    default = _Policy()
    owners: set[str] = set()
    for number, (owner, *fields) in _rows(lines, "policies", 6, 7):
        if owner in owners:
            raise FleetError(f"line {number}", f"group {shown(owner)} has a policy already")
        owners.add(owner)
        # Sizes, templates, ratios. In older versions the largest sizes have a field of their own, before the templates.
        older = fields[2][:1].isdigit()
        vcpus, _, memory = [*fields, ""][4:7] if older else fields[3:6]
        policy = _Policy(_ratio(vcpus, number, "vCPU"), _ratio(memory, number, "memory") if memory else 1.0)
        if not owner:
            default = policy
        elif owner in clusters:
            clusters[owner].policy = policy
        else:
            raise FleetError(f"line {number}", f"there is no group {shown(owner)}")
    return default


def _ratio(text: str, number: int, what: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = 0.0
    # Also false for NaN.
    if not 0.01 <= ratio <= _MOST_RATIO:
        raise FleetError(f"line {number}", f"{shown(text)} is no {what} ratio from 0.01 to {_MOST_RATIO}")
    return ratio


def _nodes(lines: Sequence[_Line], clusters: dict[str, _Cluster]) -> dict[str, _Node]:
    if len(lines) > MOST_HOSTS:
        raise FleetError(f"line {lines[MOST_HOSTS][0]}", f"more than {MOST_HOSTS} nodes")
    found: dict[str, _Node] = {}
    for number, fields in _rows(lines, "nodes", 9, 15):
        name, *figures, state, uuid = fields[:9]
        if name in found:
            raise FleetError(f"line {number}", f"node {shown(name)} is there twice, first on line {found[name].line}")
        if not name:
            raise FleetError(f"line {number}", "a node without a name")
        if uuid not in clusters:
            raise FleetError(f"line {number}", f"there is no group {shown(uuid)}")
        if state not in ("Y", "N", "M"):
            raise FleetError(f"line {number}", f"{shown(state)} is none of Y (offline), N, M (master)")
        unknown = _UNKNOWN in figures
        tm, nm, fm, td, fd = (0 if unknown else _number(text, number) for text in figures[:5])
        tc = 0 if unknown else _number(figures[5], number, MOST_CPUS)
        nos = 0 if unknown or not fields[13] else _number(fields[13], number, MOST_CPUS)
        for part, whole, what in ((nm, tm, "memory"), (fm, tm, "memory"), (fd, td, "disk"), (nos, tc, "CPUs")):
            if part > whole:
                raise FleetError(f"line {number}", f"{part} of {whole} {what}")
        offline = unknown or state == "Y"
        found[name] = _Node(name, number, clusters[uuid], offline, tm, nm, fm, td, fd, tc, nos)
    return found


def _exclusions(lines: Sequence[_Line]) -> tuple[str, ...]:
    """What the tags begin with by which instances exclude each other."""
    tags = (line.removeprefix(_EXCLUSION) for _, line in lines if line.startswith(_EXCLUSION))
    return tuple(f"{tag}:" for tag in tags if tag)


def _seat(
    lines: Sequence[_Line], nodes: dict[str, _Node], policies: dict[str, _Policy], exclusions: tuple[str, ...]
) -> None:
    if len(lines) > MOST_VMS:
        raise FleetError(f"line {lines[MOST_VMS][0]}", f"more than {MOST_VMS} instances")
    ids = made_up_ids(1)
    names: set[str] = set()
    profile_of = _profiles()
    groups: dict[str, tuple[Group, ...]] = {"": ()}
    for number, fields in _rows(lines, "instances", 10, 13):
        name, memory, disk, vcpus, state, _, primary, secondary, template, tags = fields[:10]
        _refuse_others(state, _STATES, number)
        _refuse_others(template, _TEMPLATES, number)
        _refuse_others(fields[12], ("", "Y", "N"), number)
        if name in names or not name:
            raise FleetError(f"line {number}", f"instance {shown(name)} is there twice" if name else "it has no name")
        names.add(name)
        node = nodes.get(primary)
        if node is None:
            raise FleetError(f"line {number}", f"there is no node {shown(primary)}")
        if secondary and (secondary not in nodes or secondary == primary):
            raise FleetError(f"line {number}", f"its secondary node {shown(secondary)} is its primary, or none at all")
        if tags not in groups:
            mine = dict.fromkeys(tag for tag in tags.split(",") if tag.startswith(exclusions)) if exclusions else {}
            groups[tags] = tuple(Group(tag) for tag in mine)
        disk_mib = _number(disk, number)
        profile = profile_of(
            _number(vcpus, number, MOST_CPUS, least=1),
            _number(memory, number),
            disk_mib if template in _ON_THE_NODE else 0,
            policies[primary].vcpu_ratio == 1.0,
        )
        node.vms.append(SeatedVm(next(ids), name, profile, (0,), groups[tags]))
        # What is only promised an instance (`forthcoming`) nothing holds yet.
        if fields[12] != "Y":
            shape = profile.shape
            volume_mib = shape.disk_mib if template in _VOLUMES else 0
            memory_mib = shape.memory_mib if state in _UP else 0
            node.hold(number, policies[primary], memory_mib=memory_mib, disk_mib=volume_mib)
            if secondary and template == _MIRRORED:
                nodes[secondary].hold(number, policies[secondary], disk_mib=volume_mib)


def _profiles() -> Callable[[int, int, int, bool], Profile]:
    """One profile object for all instances of a size."""
    shared = NumaPolicy(cpus=CpuPolicy.SHARED)
    found: dict[tuple[int, int, int, bool], Profile] = {}

    def profile(vcpus: int, memory_mib: int, disk_mib: int, own_cores: bool) -> Profile:
        key = (vcpus, memory_mib, disk_mib, own_cores)
        if key not in found:
            numa = NumaPolicy() if own_cores else shared
            found[key] = Profile(Shape(vcpus, memory_mib, disk_mib, numa), "x86_64")
        return found[key]

    return profile


def _number(text: str, line: int, most: int = MOST_AMOUNT, *, least: int = 0) -> int:
    # Fourteen digits are more than any bound here, and no work to turn into a number.
    if text.isascii() and text.isdigit() and len(text) <= 14 and least <= int(text) <= most:
        return int(text)
    raise FleetError(f"line {line}", f"{shown(text)} is no number from {least} to {most}")


def _refuse_others(text: str, known: Sequence[str], line: int) -> None:
    if text not in known:
        raise FleetError(f"line {line}", f"{shown(text)} is none of {', '.join(each or 'nothing' for each in known)}")


def _host(number: int, node: _Node, ratio: float) -> HostState:
    return HostState(
        host_id=number,
        name=node.name,
        datacentre="",
        cluster=node.cluster.name,
        rack=node.cluster.name,
        vrf="",
        architecture="x86_64",
        cells=(_cell(node, ratio),),
        disk_mib=node.disk_mib,
        disk_free_mib=node.disk_free_mib,
        vms=tuple(node.vms),
        live=not node.offline,
        draining=node.cluster.unallocable,
        prefixes=((1,),),
    )


def _cell(node: _Node, ratio: float) -> CellState:
    memory_mib = node.memory_mib - node.memory_reserved_mib
    memory_used_mib = sum(vm.profile.shape.memory_mib for vm in node.vms)
    admitted = floor(node.cpus * ratio) - node.cpus_reserved
    vcpus_free = max(0, admitted - sum(vm.profile.shape.vcpus for vm in node.vms))
    own = ratio == 1.0
    return CellState(
        cell=0,
        socket=0,
        threads_per_core=1,
        cores=admitted if own else 0,
        cores_free=vcpus_free if own else 0,
        memory_mib=memory_mib,
        memory_free_mib=max(0, min(node.memory_free_mib, memory_mib - memory_used_mib)),
        shared_cpus=0 if own else node.cpus,
        shared_vcpus=0 if own else max(0, admitted),
        shared_vcpus_free=0 if own else vcpus_free,
        cores_reserved=node.cpus_reserved,
        memory_reserved_mib=node.memory_reserved_mib,
    )
