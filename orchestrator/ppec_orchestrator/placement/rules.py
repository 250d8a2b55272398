# SPDX-License-Identifier: Apache-2.0
"""The rules of a request that could be given up, what is said of each, and what is left of the request then."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from ppec_contract.version import Capability
from ppec_contract.vm import CpuPolicy, NumaPolicy, SmtPolicy
from ppec_orchestrator.placement.fleet import Fleet
from ppec_orchestrator.placement.request import ANY_NETWORK, NO_SPARE_RULE, Shape, SpareRule, VmRequest, Where
from ppec_orchestrator.placement.spare_rules import SpareRules

# What is said of the parts of a request that can be given up.
RULES: Mapping[str, str] = {
    "region": "look in every region",
    "datacentre": "look in every data centre",
    "cluster": "look in every cluster",
    "rack": "look in every rack",
    "host": "look on every host",
    "vrf": "take any VRF",
    "labels": "give up the labels wanted",
    "without": "give up the labels avoided",
    "networks": "take addresses of any prefix",
    "failed": "try the hosts where it failed before",
    "one-cell": "let it span NUMA cells",
    "siblings": "do without SMT siblings",
    "isolation": "let its vCPUs share cores",
    "huge-pages": "do without huge pages",
    "shared": "have CPUs of its own",
    "dedicated": "share CPUs with others",
    "pool": "have its disk in no pool",
    "nvme": "do without NVMe drives",
    "spare": "do without N+1",
    # The clusters': it is not the request that gives it up.
    "cluster-spare": "lift N+1 of the cluster",
}
# Those about N+1.
SPARED = ("spare", "cluster-spare")
# Those about the size, and what it is without them.
_SHAPES: Mapping[str, Callable[[Shape], Shape]] = {
    "one-cell": lambda shape: _with_numa(shape, multi_cell=True),
    "siblings": lambda shape: _with_numa(shape, smt=SmtPolicy.PREFER),
    "isolation": lambda shape: _with_numa(shape, smt=SmtPolicy.PREFER),
    "huge-pages": lambda shape: _with_numa(shape, huge_page_kib=0),
    "shared": lambda shape: _with_numa(shape, cpus=CpuPolicy.DEDICATED),
    "dedicated": lambda shape: _with_numa(shape, cpus=CpuPolicy.SHARED, smt=SmtPolicy.PREFER, multi_cell=False),
    "pool": lambda shape: replace(shape, pool=""),
    "nvme": lambda shape: replace(shape, nvme=0),
}
# Prefixes for others, huge pages for ordinary ones, shared CPUs for dedicated ones, a pool for the host's own disk.
_SWITCHES = frozenset({"networks", "huge-pages", "shared", "pool"})
# What is asked of a host's agent for their sake.
_ASKED_FOR = {"pool": Capability.STORAGE_POOLS, "nvme": Capability.NVME_DRIVES}


def rules_of(vm: VmRequest, spare: SpareRules) -> list[str]:
    """The rules of a request that could be given up, and last those about N+1 (`SPARED`), which it meets."""
    where, empty = vm.profile.where, Where()
    narrowed = [name for name in RULES if hasattr(where, name) and getattr(where, name) != getattr(empty, name)]
    failed = ["failed"] if vm.excluded_hosts else []
    prefixes = bool(vm.profile.fixed) or any(network is not None for network in vm.profile.networks)
    groups = [f"group:{group.name}" for group in vm.groups if group.hard]
    shape = vm.profile.shape
    storage = [name for name in ("pool", "nvme") if getattr(shape, name)]
    here = {"spare": replace(spare, clusters={}), "cluster-spare": replace(spare, own=NO_SPARE_RULE)}
    spared = [name for name in SPARED if here[name].required]
    return narrowed + ["networks"] * prefixes + failed + groups + _numa_rules(shape.numa) + storage + spared


def spare_without(rules: Collection[str], spare: SpareRule) -> SpareRule:
    """What is left of the rule about spare room: it is the whole request's, and of no single VM."""
    own = SpareRule(clusters=spare.clusters) if "spare" in rules else spare
    return replace(own, clusters=False) if "cluster-spare" in rules else own


def switches(vm: VmRequest, fleet: Fleet) -> list[str]:
    """Rules that give one thing up for another, of which there may be less; and last, what nobody asked for in so many
    words, and is given up where nothing else helps."""
    dedicated = vm.profile.shape.numa.cpus is CpuPolicy.DEDICATED
    asked = [rule for rule in rules_of(vm, SpareRules()) if rule in _SWITCHES]
    return asked + ["dedicated"] * (dedicated and bool(fleet.capacity("shared_vcpus").any()))


def _numa_rules(numa: NumaPolicy) -> list[str]:
    asked = {
        "one-cell": not numa.multi_cell and numa.cpus is CpuPolicy.DEDICATED,
        "siblings": numa.smt is SmtPolicy.REQUIRE,
        "isolation": numa.smt is SmtPolicy.ISOLATE,
        "huge-pages": numa.huge_page_kib > 0,
        "shared": numa.cpus is CpuPolicy.SHARED,
    }
    return [name for name, there in asked.items() if there]


def without(vm: VmRequest, rule: str) -> VmRequest:
    """What is left of the request. N+1 is no part of it: `spare_without`."""
    profile = vm.profile
    if rule.startswith("group:"):
        return replace(vm, groups=tuple(group for group in vm.groups if f"group:{group.name}" != rule))
    if rule in SPARED:
        return vm
    if rule == "failed":
        return replace(vm, excluded_hosts=frozenset())
    if rule == "networks":
        return replace(vm, profile=replace(profile, networks=ANY_NETWORK, fixed=()))
    if rule in _SHAPES:
        asked = {_ASKED_FOR[rule].value} if rule in _ASKED_FOR else set()
        smaller = replace(profile, shape=_SHAPES[rule](profile.shape), capabilities=profile.capabilities - asked)
        return replace(vm, profile=smaller)
    where = replace(profile.where, **{rule: getattr(Where(), rule)})
    return replace(vm, profile=replace(profile, where=where))


def words_of(rule: str) -> str:
    """A name of `RULES`, or `group:` and a group's name."""
    return f"give up the rule of group {rule.removeprefix('group:')}" if rule.startswith("group:") else RULES[rule]


def _with_numa(shape: Shape, **changed: object) -> Shape:
    return replace(shape, numa=shape.numa.model_copy(update=changed))
