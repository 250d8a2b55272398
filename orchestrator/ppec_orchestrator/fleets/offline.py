# SPDX-License-Identifier: Apache-2.0
"""Plans without an orchestrator: what `ppec plan` and `ppec fleet` do with a file.

The one door for the command line, which imports it, and so numpy, when such a command runs and never before.
"""

from __future__ import annotations

import gc
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ppec_contract.api_placement import MAX_PLAN_MOVES, Policy
from ppec_contract.api_vms import BatchMode
from ppec_contract.errors import PpecError
from ppec_contract.model import Model
from ppec_orchestrator.fleets import snapshot
from ppec_orchestrator.fleets.advice import Advised, advice_on
from ppec_orchestrator.fleets.answer import (
    ExposedDomain,
    PlanAnswer,
    Verdict,
    evacuations,
    exposed,
    moved,
    placed,
    refused,
)
from ppec_orchestrator.fleets.faults import ANSWER, REQUESTS
from ppec_orchestrator.fleets.file import FleetFile
from ppec_orchestrator.fleets.generator import Recipe, generate
from ppec_orchestrator.fleets.reading import contents, read_fleet, read_requests
from ppec_orchestrator.fleets.saved import Saved, faults_of, read_answer
from ppec_orchestrator.placement import evacuation
from ppec_orchestrator.placement.advice import MOST_ADVISED
from ppec_orchestrator.placement.balance import Balance
from ppec_orchestrator.placement.checker import check
from ppec_orchestrator.placement.demand import CellPart, CellResource
from ppec_orchestrator.placement.fleet import Fleet, IntArray
from ppec_orchestrator.placement.plan import Plan, Refusal
from ppec_orchestrator.placement.planner import Planner
from ppec_orchestrator.placement.request import Level, PlanRequest, Spare, SpareRule
from ppec_orchestrator.placement.spare_rules import SpareRules

# All that the command line takes.
__all__ = [
    "ExposedDomain",
    "FleetExposed",
    "FleetSummary",
    "Options",
    "Outcome",
    "PlanAnswer",
    "Recipe",
    "Verdict",
    "exposed_in",
    "generated",
    "plan_on",
    "summary",
    "verified",
]


@dataclass(frozen=True, slots=True)
class Use:
    """Of one resource of a whole fleet; `mib` or a count."""

    name: str
    whole: int
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Why:
    """Why so many VMs were refused, `first` before the others, in words."""

    first: str
    vms: int
    sentence: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """A plan for people to look at: `whys` say of each refused VM why, once; `advice` what would help some of them, and
    the first VM of each of its kinds is the first of one of the first `whys`."""

    answer: PlanAnswer
    whys: tuple[Why, ...]
    advice: tuple[Advised, ...]
    uses: tuple[Use, ...]
    score_before: float
    score_after: float


class FleetSummary(Model):
    """A fleet in a few figures. `score` is Ganeti's cluster score: lower is more even."""

    hosts: int
    silent: int
    draining: int
    clusters: int
    racks: int
    cells: int
    vms: int
    requests: int
    cores: int
    cores_free: int
    shared_vcpus: int
    shared_vcpus_free: int
    memory_mib: int
    memory_free_mib: int
    huge_pages_mib: int
    huge_pages_free_mib: int
    disk_mib: int
    disk_free_mib: int
    nvme: int
    nvme_free: int
    score: float


class FleetExposed(Model):
    """Of how many hosts, or racks, which could not be lost (N+1)."""

    domains: int
    exposed: tuple[ExposedDomain, ...]


@dataclass(frozen=True, slots=True)
class Options:
    """How to plan. `spare` is `off`, `warn` or `required`, and `:rack` after it if a whole rack may be lost. `check`
    has the plan verified, `evidence` has the answer say what others need for that. `most_advised` is for how many kinds
    of refused VMs it says what would help."""

    policy: Policy = Policy.BALANCED
    mode: BatchMode = BatchMode.BEST_EFFORT
    spare: str = "off"
    most_moves: int = 0
    check: bool = False
    evidence: bool = False
    most_advised: int = MOST_ADVISED


def plan_on(fleet: Path | bytes, requests: Path | None, options: Options) -> Outcome:
    """`fleet` is a file, or a snapshot. Raises PpecError, without having planned, for a file or option that is
    wrong."""
    with _without_collector():
        return _plan_on(fleet, requests, options)


def _plan_on(fleet: Path | bytes, requests: Path | None, options: Options) -> Outcome:
    terms = _terms(options)
    started_s = time.process_time()
    file = _with_batch(_read(fleet), requests)
    planner = Planner(file.fleet)
    loaded_s = time.process_time()
    request = replace(terms, vms=file.requests)
    looked_on = not SpareRules.of(file.fleet, terms.spare).off
    plan = planner.plan(request)
    planned_s = time.process_time()
    advice = advice_on(file.fleet, request, plan, file.called, options.most_advised)
    advised_s = time.process_time()
    faults = tuple(check(file.fleet, request, plan)) if options.check else None
    checked_s = time.process_time()
    answer = PlanAnswer(
        executable=plan.serves(all_or_nothing=request.all_or_nothing),
        placed=placed(plan, with_evidence=options.evidence),
        refused=refused(plan, advice, with_evidence=options.evidence),
        load_cpu_s=round(loaded_s - started_s, 6),
        plan_cpu_s=round(planned_s - loaded_s, 6),
        advice_cpu_s=round(advised_s - planned_s, 6) if advice else None,
        exposed=exposed(plan) if looked_on else None,
        moves=moved(plan.moves) if options.most_moves else None,
        evacuations=evacuations(plan, file.fleet) if options.evidence and looked_on else None,
        faults=faults,
        domains_checked=_held(plan) if options.check and looked_on else None,
        check_cpu_s=round(checked_s - advised_s, 6) if options.check else None,
    )
    return _outcome(answer, file, plan, advice)


def verified(fleet: Path | bytes, requests: Path | None, answer: Path, options: Options) -> Verdict:
    """An answer that `plan_on`, or the API, gave before to just this. Raises PpecError as `plan_on` does, and for an
    answer that can't be verified so."""
    with _without_collector():
        terms = _terms(options)
        saved = read_answer(contents(answer, ANSWER), str(answer))
        read = _read(fleet)
        file = _with_own_batch(read, saved, answer) if requests is None else _with_batch(read, requests)
        started_s = time.process_time()
        faults = faults_of(saved, file.fleet, replace(terms, vms=file.requests))
        told = saved.answer
        lost = None if SpareRules.of(file.fleet, terms.spare).off else told.evacuations or ()
        return Verdict(
            placed=len(told.placed),
            refused=len(told.refused),
            faults=tuple(faults),
            domains_checked=None if lost is None else sum(not each.without_place for each in lost),
            check_cpu_s=round(time.process_time() - started_s, 6),
        )


def _terms(options: Options) -> PlanRequest:
    """What is asked for, but for the VMs."""
    rule = replace(_spare_rule(options.spare), witnessed=options.check or options.evidence)
    _refuse_moves_beyond_bounds(options.most_moves)
    return PlanRequest(
        (),
        options.policy,
        all_or_nothing=options.mode is BatchMode.ALL_OR_NOTHING,
        most_vcpus=options.mode is BatchMode.MOST_VCPUS,
        spare=rule,
        most_moves=options.most_moves,
    )


def _with_own_batch(file: FleetFile, saved: Saved, answer: Path) -> FleetFile:
    """The VMs of an answer that carries what they are."""
    if saved.requests is None:
        return _with_batch(file, None)
    return read_requests(json.dumps(saved.requests).encode(), f"{answer}, requests", file)


def _held(plan: Plan) -> int:
    """Domains that can be lost, as the plan has it."""
    return sum(not each.without_place for each in plan.evacuations)


def _with_batch(file: FleetFile, requests: Path | None) -> FleetFile:
    asked = file if requests is None else read_requests(contents(requests, REQUESTS), str(requests), file)
    if not asked.requests:
        raise PpecError(
            "request.invalid",
            "there is nothing to plan: the fleet comes without requests" if requests is None else "no VM is asked for",
            hint="Give --requests a file of them.",
            subject="requests",
        )
    return asked


def summary(fleet: Path | bytes) -> FleetSummary:
    file = _read(fleet)
    read = file.fleet
    figures = {name: int(array.sum()) for name, array in read.cells.items()}
    return FleetSummary(
        hosts=len(read.hosts),
        silent=sum(not host.live for host in read.hosts),
        draining=sum(host.draining for host in read.hosts),
        clusters=len(read.places["cluster"]),
        racks=len(read.places["rack"]),
        cells=sum(len(host.cells) for host in read.hosts),
        vms=sum(len(host.vms) for host in read.hosts),
        requests=len(file.requests),
        **{name: figures[name] for name in _SUMMED},
        huge_pages_mib=figures["pages_2m"] * 2 + figures["pages_1g"] * 1024,
        huge_pages_free_mib=figures["pages_2m_free"] * 2 + figures["pages_1g_free"] * 1024,
        disk_mib=int(read.disk_mib.sum()),
        disk_free_mib=int(read.disk_free_mib.sum()),
        score=round(Balance(read).score(), 8),
    )


def exposed_in(fleet: Path | bytes, level: str) -> FleetExposed:
    """Of all clusters; `level` is `host` or `rack`."""
    read = _read(fleet).fleet
    found = evacuation.exposed(read, Level(level))
    told = tuple(ExposedDomain(**asdict(each)) for each in found)
    return FleetExposed(domains=len(evacuation.domains(read, Level(level))), exposed=told)


def generated(recipe: Recipe) -> Iterator[str]:
    """A snapshot of a made-up fleet, piece by piece."""
    if recipe.clusters > recipe.hosts:
        raise PpecError(
            "request.invalid",
            f"{recipe.clusters} clusters of {recipe.hosts} hosts",
            hint="Ask for as many hosts as clusters, at least.",
            subject="clusters",
        )
    file = generate(recipe)
    return snapshot.written(file.fleet, file.requests, file.names)


@contextmanager
def _without_collector() -> Iterator[None]:
    """What is read, and planned, stays until the end: the collector's passes over it would take longer than both."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _read(fleet: Path | bytes) -> FleetFile:
    if isinstance(fleet, bytes):
        return read_fleet(fleet, "the orchestrator's fleet")
    return read_fleet(contents(fleet), str(fleet))


def _spare_rule(text: str) -> SpareRule:
    mode, _, level = text.partition(":")
    if mode not in set(Spare) or level not in ("", Level.HOST, Level.RACK):
        raise PpecError(
            "request.invalid",
            f"{text[:64]!r} is no rule about spare room (N+1)",
            hint="It is off, warn or required; warn:rack and required:rack if a whole rack may be lost.",
            subject="n-plus-one",
        )
    return SpareRule(Spare(mode), Level(level or Level.HOST))


def _refuse_moves_beyond_bounds(most_moves: int) -> None:
    # The API's bound: what is planned here must be what can be asked for there, and the search takes its time.
    if most_moves > MAX_PLAN_MOVES:
        raise PpecError(
            "request.invalid",
            f"{most_moves} moves of running VMs are wanted, {MAX_PLAN_MOVES} can be had",
            hint=f"Allow from 0 to {MAX_PLAN_MOVES} moves.",
            subject="max-moves",
        )


def _outcome(answer: PlanAnswer, file: FleetFile, plan: Plan, advice: tuple[Advised, ...]) -> Outcome:
    fleet = file.fleet
    balance = Balance(fleet)
    before = balance.score()
    taken: Counter[str] = Counter()
    of_pools: Counter[str] = Counter()
    for place in plan.placed:
        part, cells = CellPart.of(place.per_cell), len(place.cells)
        memory_mib, cpus = cells * part.memory_mib, cells * part.cpus
        disk_mib = 0 if place.pool else place.disk_mib
        of_pools[place.pool] += place.disk_mib
        balance.take(fleet.index[place.host], memory_mib, disk_mib, cpus, 1)
        taken.update({name: cells * amount for name, amount in place.per_cell.items()}, disk_mib=disk_mib)
    of_cells = [
        _use(words, fleet.capacity(name), fleet.free(name), taken[name])
        for name, words in _SHOWN.items()
        if name in _ALWAYS_SHOWN or fleet.capacity(name).any()
    ]
    of_disk = _use("disk MiB", fleet.disk_mib, fleet.disk_free_mib, taken["disk_mib"])
    uses = (*of_cells, of_disk, *_uses_of_pools(fleet, of_pools))
    return Outcome(answer, _whys(plan, advice), advice, uses, before, balance.score())


def _use(name: str, whole: IntArray, free: IntArray, taken: int) -> Use:
    used = int(whole.sum()) - int(free.sum())
    return Use(name, int(whole.sum()), used, used + taken)


def _uses_of_pools(fleet: Fleet, taken: Mapping[str, int]) -> list[Use]:
    """By name. What hosts share is counted of each in full, as the planner does."""
    whole: Counter[str] = Counter()
    used: Counter[str] = Counter()
    for host in fleet.hosts:
        for name, pool in host.pools.items():
            whole[name] += pool.size_mib
            used[name] += pool.size_mib - pool.free_mib
    return [Use(f"pool {name} MiB", whole[name], used[name], used[name] + taken[name]) for name in sorted(whole)]


def _whys(plan: Plan, advice: tuple[Advised, ...]) -> tuple[Why, ...]:
    """Of VMs that are advised on, apart for each kind: who reads the advice finds what it is for. Those that begin
    a kind come before the others, then the most frequent."""
    kinds = {refusal.vm_id: number for number, kind in enumerate(advice) for refusal in kind.refusals}
    alike: dict[tuple[int | None, str], list[Refusal]] = {}
    for refusal in plan.refused:
        alike.setdefault((kinds.get(refusal.vm_id), refusal.sentence()), []).append(refusal)
    begin = {kind.refusals[0].vm_id for kind in advice}
    ordered = sorted(alike.values(), key=lambda several: (several[0].vm_id not in begin, -len(several)))
    return tuple(Why(several[0].name, len(several), several[0].sentence()) for several in ordered)


# What cells have, as the table of uses calls it; what not all fleets have is shown where any host has it.
_SHOWN: Mapping[CellResource, str] = {
    "cores": "cores",
    "shared_vcpus": "shared vCPUs",
    "memory_mib": "memory MiB",
    "pages_2m": "huge pages of 2 MiB",
    "pages_1g": "huge pages of 1 GiB",
    "nvme": "NVMe drives",
}
_ALWAYS_SHOWN = frozenset({"cores", "memory_mib"})
_SUMMED = (
    "cores",
    "cores_free",
    "shared_vcpus",
    "shared_vcpus_free",
    "memory_mib",
    "memory_free_mib",
    "nvme",
    "nvme_free",
)
