# SPDX-License-Identifier: Apache-2.0
"""How fast the planner places, how well, and in how much memory; beside Ganeti's `hail` on the same fleets.

Fleets come from the product's generator, by the seeds given. CPU seconds are of the process, whatever else the machine
does. "Every rule on" is: VMs in one NUMA cell, disks, an app's VMs on hosts of their own, for one VM in ten on racks
of their own too, one VRF, the hosts' reserve.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count, cycle
from pathlib import Path
from uuid import UUID

import numpy as np

from bench import hail
from bench.figures import PAIRS, Figures, compared, paired
from ppec_contract.api_placement import Policy
from ppec_orchestrator.fleets.file import FleetFile
from ppec_orchestrator.fleets.generator import Recipe, generate
from ppec_orchestrator.fleets.snapshot import written
from ppec_orchestrator.placement.balance import Balance
from ppec_orchestrator.placement.fleet import Fleet
from ppec_orchestrator.placement.plan import Plan
from ppec_orchestrator.placement.planner import Planner
from ppec_orchestrator.placement.request import Group, Level, PlanRequest, Profile, Shape, VmRequest

SEEDS, SIZES = (20,), (80, 1000, 3500, 10_000)
_CLUSTERS = {80: 2, 1000: 10, 3500: 20, 10_000: 40}
# Few enough that all of them find a place in the smaller fleet.
_BATCH = {80: 150, 1000: 2000, 3500: 6000, 10_000: 10_000}
_SINGLE = 1000
# hail's CPU time grows with the square of the hosts; beyond these it is asked once.
_HAIL_OFTEN_UP_TO, _HAIL_HUNDRED_UP_TO, _MIP_UP_TO = 1000, 100, 100
_IDS = count(1)


def run(figures: Figures, seeds: Sequence[int] = (), sizes: Sequence[int] = ()) -> None:
    """On fleets of these seeds and numbers of hosts; of the usual ones where none are given."""
    sizes = sizes or SIZES
    Path("build").mkdir(exist_ok=True)
    for seed in seeds or SEEDS:
        fleets: dict[int, FleetFile] = {}
        for size in sizes:
            fleets[size] = generate(Recipe(size, _CLUSTERS.get(size, max(1, size // 250)), seed=seed))
            _one_size(Named(figures, f"planning.seed{seed}.{size}"), fleets[size], size)
        if 1000 in fleets and 10_000 in fleets:
            _growth(Named(figures, f"planning.seed{seed}"), fleets[1000], fleets[10_000])
        if 3500 in fleets and 10_000 in fleets:
            _beside_the_same_machine(Named(figures, f"planning.seed{seed}"))


@dataclass(frozen=True, slots=True)
class Named:
    """Figures of one fleet."""

    figures: Figures
    prefix: str

    def add(self, name: str, figure: float, unit: str, *, bar: str = "") -> None:
        self.figures.add(f"{self.prefix}.{name}", figure, unit, bar=bar)

    def found(self, name: str) -> float:
        """A figure added before."""
        return float(self.figures.found[f"{self.prefix}.{name}"]["figure"])


def _one_size(named: Named, file: FleetFile, size: int) -> None:
    planner = Planner(file.fleet)
    _still()
    batch = every_rule(file.requests[: _BATCH.get(size, size)])
    _speed(named, planner, batch)
    _packing(named, planner, file)
    if size <= _MIP_UP_TO:
        _optimum(named, planner, file)
    _beside_hail(named, planner, file, size)


# --- speed -----------------------------------------------------------------------------------------------------------


def every_rule(requests: Sequence[VmRequest]) -> tuple[VmRequest, ...]:
    """With a VRF asked for, and for one VM in ten a group on racks besides the app's on hosts."""
    profiles: dict[int, Profile] = {}
    found = []
    for index, request in enumerate(requests):
        profile = profiles.get(id(request.profile))
        if profile is None:
            where = replace(request.profile.where, vrf="v1")
            profile = profiles[id(request.profile)] = replace(request.profile, where=where)
        # Sixteen racks at least: groups of eight VMs.
        racks = (Group(f"racks-{index // 80}", level=Level.RACK),) if index % 10 == 0 else ()
        found.append(replace(request, profile=profile, groups=request.groups + racks))
    return tuple(found)


def with_labels_and_addresses(fleet: Fleet, batch: Sequence[VmRequest]) -> tuple[Fleet, tuple[VmRequest, ...]]:
    """Half of the hosts have a label that half of the VMs want, and each cluster a prefix whose addresses are counted,
    as the built-in IPDB counts them."""
    numbers = {name: number for number, name in enumerate(fleet.places["cluster"], 1)}
    hosts = [
        replace(
            host, labels={**host.labels, "half": "yes" if index % 2 else "no"}, prefixes=((numbers[host.cluster],),)
        )
        for index, host in enumerate(fleet.hosts)
    ]
    profiles: dict[int, Profile] = {}
    found = []
    for index, vm in enumerate(batch):
        wanted = vm.profile
        if index % 2:
            where = replace(wanted.where, labels=wanted.where.labels | {("half", "yes")})
            wanted = profiles.setdefault(id(wanted), replace(wanted, where=where))
        found.append(replace(vm, profile=wanted))
    return Fleet.build(hosts, {number: len(batch) for number in numbers.values()}), tuple(found)


def _speed(named: Named, planner: Planner, batch: Sequence[VmRequest]) -> None:
    fleet, picky = with_labels_and_addresses(planner.fleet, batch)
    picky_planner = Planner(fleet)
    _still()
    for policy in Policy:
        plan, cold_s, warm_s = _cold_and_warm(planner, PlanRequest(tuple(batch), policy))
        _refuse_over_commitment(planner.fleet, plan, batch)
        bar = ">= 20,000 at 10,000 hosts"
        named.add(f"{policy}.rate", len(plan.placed) / warm_s, "placements per CPU-second", bar=bar)
        named.add(f"{policy}.rate_first", len(plan.placed) / cold_s, "placements per CPU-second")
        named.add(f"{policy}.refused", len(plan.refused), f"of {len(batch)} VMs")
        _, cold_s, warm_s = _cold_and_warm(picky_planner, PlanRequest(picky, policy))
        named.add(f"{policy}.rate_labels_addresses", len(picky) / warm_s, "VMs per CPU-second", bar=bar)
        named.add(f"{policy}.rate_labels_addresses_first", len(picky) / cold_s, "VMs per CPU-second")
        named.add(f"{policy}.p99", _p99(planner, batch, policy) * 1000, "CPU-ms a VM alone", bar="<= 1 ms")


def _cold_and_warm(planner: Planner, request: PlanRequest) -> tuple[Plan, float, float]:
    """The plan; what it took when the planner did not know the profiles yet, and once it did, as in a process that has
    planned before."""
    cold_s, plan = _timed(planner, request)
    return plan, cold_s, statistics.median(_timed(planner, request)[0] for _ in range(3))


def _p99(planner: Planner, batch: Sequence[VmRequest], policy: Policy) -> float:
    taken_s = [_timed(planner, PlanRequest((vm,), policy))[0] for vm in batch[:_SINGLE]]
    return statistics.quantiles(taken_s, n=100)[98]


def _growth(named: Named, small: FleetFile, large: FleetFile) -> None:
    """The same number of VMs on both, in turn."""
    planners = [Planner(small.fleet), Planner(large.fleet)]
    _still()
    for policy in Policy:
        requests = [PlanRequest(every_rule(file.requests[: _BATCH[1000]]), policy) for file in (small, large)]
        small_s, large_s = (_again(planner, request) for planner, request in zip(planners, requests, strict=True))
        ratio, _, _ = paired(small_s, large_s)
        named.add(f"{policy}.rate_at_10000_by_rate_at_1000", ratio, "x", bar=">= 0.4")


def _beside_the_same_machine(named: Named) -> None:
    """A CPU-second is worth two or three of another machine's: how many are placed while hail places one VM, which took
    it 39 to 45 CPU-seconds where the bar was set. Where it had no answer, at least so many."""
    hail_s = named.found("3500.one_vm.hail")
    for policy in Policy:
        placed = named.found(f"10000.{policy}.rate") * hail_s
        named.add(f"{policy}.placed_in_hails_time_for_one", placed, "placements", bar=">= 840,000")


def _again(planner: Planner, request: PlanRequest) -> Callable[[], float]:
    def seconds_a_vm() -> float:
        taken_s, plan = _timed(planner, request)
        return taken_s / len(plan.placed)

    seconds_a_vm()
    return seconds_a_vm


def _timed(planner: Planner, request: PlanRequest) -> tuple[float, Plan]:
    started_s = time.process_time()
    plan = planner.plan(request)
    return time.process_time() - started_s, plan


def _still() -> None:
    """Fleets stay: the collector's passes over them are no part of planning."""
    gc.collect()
    gc.freeze()


# --- quality ---------------------------------------------------------------------------------------------------------


def _packing(named: Named, planner: Planner, file: FleetFile) -> None:
    free = int(file.fleet.free("cores").sum())
    free_mib = int(file.fleet.free("memory_mib").sum())
    for mix, factor in (("mix_a", 1), ("mix_b", 2)):
        batch = endless(file.requests, factor, free)
        bound = min(latest_refusal(file.fleet, batch), free)
        named.add(f"{mix}.latest_refusal", bound / free, "of free cores: the first refusal can't come later")
        for policy in (Policy.PACK, Policy.BALANCED):
            plan = planner.plan(PlanRequest(batch, policy))
            _refuse_over_commitment(file.fleet, plan, batch)
            refused = _until_refused(plan, batch)
            if refused > bound:
                raise AssertionError(f"the first refusal came after {refused} cores, which can't be: {bound}")
            named.add(f"{mix}.{policy}.first_refusal", refused / free, "of free cores")
            bar = ">= 0.99" if policy is Policy.PACK else ""
            named.add(f"{mix}.{policy}.first_refusal_by_latest", refused / bound, "x", bar=bar)
            cores, memory_mib = (sum(getattr(e, name) for e in plan.placed) for name in ("cores", "memory_mib"))
            named.add(f"{mix}.{policy}.cores_placed", cores / free, "of free cores, of a batch larger than the fleet")
            named.add(f"{mix}.{policy}.memory_placed", memory_mib / free_mib, "of free memory")
        freely_s, plan = _timed(planner, PlanRequest(batch, Policy.PACK, most_vcpus=True))
        _refuse_over_commitment(file.fleet, plan, batch)
        named.add(f"{mix}.most_vcpus.cores_placed", sum(e.cores for e in plan.placed) / free, "of free cores")
        named.add(f"{mix}.most_vcpus", freely_s, f"CPU-s for {len(batch)} VMs")


def endless(requests: Sequence[VmRequest], factor: int, cores: int) -> tuple[VmRequest, ...]:
    """The list again and again, until it asks for a third more than the `cores`; memory by a factor, without groups:
    what is looked at is how the room is used."""
    profiles: dict[int, Profile] = {}
    found: list[VmRequest] = []
    asked = 0
    for request in cycle(requests):
        if asked > cores * 4 // 3:
            return tuple(found)
        key = id(request.profile)
        if key not in profiles:
            shape = request.profile.shape
            profiles[key] = replace(request.profile, shape=replace(shape, memory_mib=shape.memory_mib * factor))
        number = next(_IDS)
        found.append(VmRequest(UUID(int=number), f"endless-{number}", profiles[key]))
        asked += request.profile.shape.vcpus
    raise AssertionError("unreachable")


def _until_refused(plan: Plan, batch: Sequence[VmRequest]) -> int:
    refused = {each.vm_id for each in plan.refused}
    cores = 0
    for request in batch:
        if request.vm_id in refused:
            break
        cores += request.profile.shape.vcpus
    return cores


def latest_refusal(fleet: Fleet, batch: Sequence[VmRequest]) -> int:
    """The cores asked for before the first refusal, whoever places the batch in its order: no more of the VMs that are
    of a size or larger can be placed than cells, as they are, have room for of that size (decision 0020)."""
    cores, memory = fleet.free("cores"), fleet.free("memory_mib")
    sizes = {(vm.profile.shape.vcpus, vm.profile.shape.memory_mib) for vm in batch}
    room = {size: int(np.minimum(cores // size[0], memory // size[1]).sum()) for size in sizes}
    asked = 0
    for vm in batch:
        shape = vm.profile.shape
        for size in sizes:
            if shape.vcpus >= size[0] and shape.memory_mib >= size[1]:
                room[size] -= 1
                if room[size] < 0:
                    return asked
        asked += shape.vcpus
    return asked


def _optimum(named: Named, planner: Planner, file: FleetFile) -> None:
    from bench.planning_optimum import longest_whole, most_cores

    free = int(file.fleet.free("cores").sum())
    for mix, factor in (("mix_a", 1), ("mix_b", 2)):
        batch = endless(file.requests, factor, free)
        bound = min(latest_refusal(file.fleet, batch), free)
        first = _vms_asking_for(batch, _until_refused(planner.plan(PlanRequest(batch, Policy.PACK)), batch))
        longest = longest_whole(file.fleet, batch, first, _vms_asking_for(batch, bound))
        best = _vcpus(batch[:longest])
        ratio = _vcpus(batch[:first]) / best
        named.add(f"{mix}.pack.first_refusal_by_optimum", ratio, "x, of a list that does not fit whole", bar=">= 0.995")
        for policy in Policy:
            for mode in (True, False):
                ratio = _vcpus(_placed_whole(planner, batch[:longest], policy, all_or_nothing=mode)) / best
                name = "all_or_nothing" if mode else "best_effort"
                named.add(f"{mix}.{policy}.{name}.placed_whole_by_optimum", ratio, "x", bar=">= 0.995")
        # The optimum may choose whom to refuse, and leaves out the VMs with the most memory for their cores.
        best_cores, bound_cores = most_cores(file.fleet, batch)
        named.add(f"{mix}.optimum", best_cores / free, f"of free cores (none beyond {bound_cores / free:.4f})")
        for policy in (Policy.PACK, Policy.BALANCED):
            for mode, asked in _MODES.items():
                plan = planner.plan(replace(asked, vms=batch, policy=policy))
                _refuse_over_commitment(file.fleet, plan, batch)
                placed = sum(each.cores for each in plan.placed)
                named.add(f"{mix}.{policy}.{mode}.by_optimum", placed / best_cores, "x", bar=_bar(mix, policy, mode))


_MODES = {
    "largest_first": PlanRequest((), all_or_nothing=True),
    "as_asked": PlanRequest(()),
    "most_vcpus": PlanRequest((), most_vcpus=True),
}


def _bar(mix: str, policy: Policy, mode: str) -> str:
    """Where the planner may choose whom to refuse as the optimum does; or need not choose."""
    return ">= 0.995" if mode == "most_vcpus" or (mix == "mix_a" and policy is Policy.PACK) else ""


def _placed_whole(
    planner: Planner, batch: Sequence[VmRequest], policy: Policy, *, all_or_nothing: bool
) -> Sequence[VmRequest]:
    """The list, or as much of it from the first on as is placed without a VM left out."""
    while planner.plan(PlanRequest(tuple(batch), policy, all_or_nothing=all_or_nothing)).refused:
        batch = batch[:-1]
    return batch


def _vcpus(batch: Sequence[VmRequest]) -> int:
    return sum(vm.profile.shape.vcpus for vm in batch)


def _vms_asking_for(batch: Sequence[VmRequest], cores: int) -> int:
    """How many VMs from the first on ask for so many cores, or less."""
    asked = 0
    for number, request in enumerate(batch):
        asked += request.profile.shape.vcpus
        if asked > cores:
            return number
    return len(batch)


def _refuse_over_commitment(fleet: Fleet, plan: Plan, batch: Sequence[VmRequest]) -> None:
    """A fast plan that isn't one would be no figure."""
    shapes = {request.vm_id: request.profile.shape for request in batch}
    cores, memory, disk = fleet.free("cores").copy(), fleet.free("memory_mib").copy(), fleet.disk_free_mib.copy()
    for place in plan.placed:
        row, (cell,) = fleet.index[place.host], place.cells
        shape: Shape = shapes[place.vm_id]
        cores[row, cell] -= shape.vcpus
        memory[row, cell] -= shape.memory_mib
        disk[row] -= shape.disk_mib
    if min(int(np.min(left)) for left in (cores, memory, disk)) < 0:
        raise AssertionError("the plan takes more of a cell or a disk than there is")


# --- beside hail -----------------------------------------------------------------------------------------------------


def _beside_hail(named: Named, planner: Planner, file: FleetFile, size: int) -> None:
    files = _Files(file)
    ours, theirs = files.ours(), files.theirs(1)
    pairs = PAIRS if size <= 100 else 3 if size <= _HAIL_OFTEN_UP_TO else 1
    runs = [(hail.run(ours), hail.run(theirs)) for _ in range(pairs)]
    named.add("one_vm.ours", statistics.median(a.cpu_s for a, _ in runs), "CPU-s of a process, start to end")
    named.add("one_vm.ours.memory", max(a.peak_mib for a, _ in runs), "MiB")
    answered = all(hail.places(b) is not None for _, b in runs)
    unit = "CPU-s of a process, start to end" if answered else "CPU-s without an answer"
    named.add("one_vm.hail", statistics.median(b.cpu_s for _, b in runs), unit)
    named.add("one_vm.hail.memory", max(b.peak_mib for _, b in runs), "MiB")
    if answered:
        ratio, _, _ = compared([b.cpu_s for _, b in runs], [a.cpu_s for a, _ in runs])
        named.add("one_vm.hail_by_ours", ratio, "x")
    whole = hail.run(files.ours("--output", "json", "--advise", "0", requests=None))
    answer = json.loads(whole.output or b"{}")
    named.add("file.load", answer["load_cpu_s"], "CPU-s")
    named.add("file.plan", answer["plan_cpu_s"], f"CPU-s for {len(file.requests)} VMs")
    named.add("file.memory", whole.peak_mib, "MiB")
    if size <= _HAIL_HUNDRED_UP_TO:
        _hundred(named, planner, file, files)


def _hundred(named: Named, planner: Planner, file: FleetFile, files: _Files) -> None:
    """Ganeti's score after the first hundred VMs of the list, whoever placed them."""
    batch = file.requests[:100]
    placed = planner.plan(PlanRequest(batch, Policy.BALANCED)).placed
    before = Balance(file.fleet).score()
    ours = score_after(file.fleet, batch, {each.name: each.host for each in placed})
    ran = hail.run(files.theirs(100))
    found = hail.places(ran)
    named.add("hundred.score_before", before, "")
    named.add("hundred.ours.score", ours, f"with {len(placed)} of 100 placed", bar="<= hail's")
    if found is not None:
        theirs = score_after(file.fleet, batch, found)
        named.add("hundred.hail.score", theirs, f"with {len(found)} of 100 placed")
        named.add("hundred.score_ours_by_hail", ours / theirs, "x", bar="<= 1")


def score_after(fleet: Fleet, batch: Sequence[VmRequest], hosts: dict[str, str]) -> float:
    balance = Balance(fleet)
    for request in batch:
        if request.name in hosts:
            row, shape = fleet.index[hosts[request.name]], request.profile.shape
            balance.take(row, shape.memory_mib, shape.disk_mib, shape.vcpus, 1)
    return balance.score()


class _Files:
    """The fleet in files: a snapshot, and Ganeti's text; and the commands on them."""

    def __init__(self, file: FleetFile) -> None:
        self._place = Path("build") / "planning"
        self._place.mkdir(exist_ok=True)
        self._requests = file.requests
        (self._place / "fleet.json").write_text("".join(written(file.fleet, file.requests, file.names)))
        (self._place / "fleet.data").write_text(hail.fleet_text(file.fleet))
        names = {profile: name for name, profile in file.names.profiles.items()}
        one = file.requests[0]
        batch = [{"name": one.name + "-alone", "profile": names[one.profile]}]
        (self._place / "one.json").write_text(json.dumps({"schema": "ppec-requests/1", "batch": batch}))

    def ours(self, *more: str, requests: str | None = "one.json") -> list[str]:
        command = [str(Path(sys.executable).parent / "ppec"), "plan", "--fleet", str(self._place / "fleet.json"), *more]
        return command if requests is None else [*command, "--requests", str(self._place / requests)]

    def theirs(self, vms: int) -> list[str]:
        wanted = self._place / f"hail-{vms}.json"
        wanted.write_text(hail.allocation(self._requests[:vms]))
        return [hail.PROGRAM, str(wanted), "-t", str(self._place / "fleet.data"), "--no-capacity-checks"]
