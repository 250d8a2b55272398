# SPDX-License-Identifier: Apache-2.0
"""N+1 from plan to plan: what one plan did leaves no trace in the next one's answers, whatever it kept, however many
clusters it came to, and in whichever order."""

from __future__ import annotations

import random
from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppec_contract.api_placement import Policy
from ppec_contract.vm import NumaPolicy
from ppec_orchestrator.placement.applied import applied
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState, SeatedVm
from ppec_orchestrator.placement.plan import Plan
from ppec_orchestrator.placement.planner import Planner, plan
from ppec_orchestrator.placement.request import (
    Group,
    Level,
    PlanRequest,
    Profile,
    Shape,
    Spare,
    SpareRule,
    VmRequest,
    Where,
)
from ppec_orchestrator.placement.spare import SpareGuard
from ppec_orchestrator.placement.witnesses import ModeOf, Whose, Witnesses

from .occupied import GROUPS
from .test_spare import LEVELS, SEEDS, safe_domains

NAMES = tuple(f"h{number}" for number in range(6))
REQUIRED = SpareRule(Spare.REQUIRED)


def a_host(
    name: str, cluster: str = "c1", rack: str = "r1", cores: int = 8, held: tuple[SeatedVm, ...] = ()
) -> HostState:
    used = sum(vm.profile.shape.vcpus for vm in held)
    cells = (CellState(0, 0, 1, cores, cores - used, 8192, 8192),)
    return HostState(
        int(name[1:]), name, "d1", cluster, rack, "v1", "x86_64", cells, 1000, 1000, vms=held, prefixes=((1,),)
    )


def a_vm(number: int, vcpus: int = 2, where: Where | None = None, **more: object) -> VmRequest:
    profile = Profile(Shape(vcpus, 64, 1), "x86_64", where or Where())
    return VmRequest(UUID(int=number), f"vm-{number}", profile, **more)  # type: ignore[arg-type]


def on(name: str) -> frozenset[str]:
    """All hosts but this one."""
    return frozenset(NAMES) - {name}


def shown(result: Plan) -> object:
    return (
        [(place.name, place.host, place.cells) for place in result.placed],
        [(refusal.name, dict(refusal.reasons)) for refusal in result.refused],
        result.exposed,
    )


def old(vcpus: int, *groups: Group) -> SeatedVm:
    return SeatedVm(UUID(int=900), "old", Profile(Shape(vcpus, 64, 1), "x86_64", Where(vrf="v1")), (0,), groups)


def two_clusters() -> tuple[Fleet, PlanRequest]:
    """Rack r9 is in both clusters: with a member of the group on h0, the one on h2 could not restart on h3. The request
    comes to cluster c1 first."""
    racks = Group("racks", level=Level.RACK)
    fleet = Fleet.build(
        [
            a_host("h0", "c1", "r9"),
            a_host("h1", "c1", "r1"),
            a_host("h2", "c2", "r3", held=(old(2, racks),)),
            a_host("h3", "c2", "r9"),
        ]
    )
    vms = (a_vm(1, excluded_hosts=on("h0"), groups=(racks,)), a_vm(2, excluded_hosts=on("h3")))
    return fleet, PlanRequest(vms, spare=REQUIRED)


def test_a_cluster_that_a_plan_comes_to_later_is_kept_safe_from_its_first_vm_on() -> None:
    fleet, request = two_clusters()
    result = plan(fleet, request)
    assert ([place.name for place in result.placed], result.exposed) == (["vm-2"], ())
    assert safe_domains(fleet, Level.HOST) <= safe_domains(applied(fleet, request.vms, result), Level.HOST)


def test_the_next_plan_finds_each_cluster_as_if_nothing_had_been_planned() -> None:
    fleet, request = two_clusters()
    planner = Planner(fleet)
    planner.plan(request)
    after = PlanRequest((a_vm(50, excluded_hosts=on("h2")),), spare=REQUIRED)
    assert [place.host for place in planner.plan(after).placed] == ["h2"]


def test_a_cluster_is_not_looked_at_once_its_groups_have_grown() -> None:
    fleet, request = two_clusters()
    witnesses = Planner(fleet).witnesses(Level.HOST)
    witnesses.look_at_for_good("c1")
    newcomer = replace(old(2), vm_id=UUID(int=1), groups=request.vms[0].groups)
    witnesses.placed(newcomer, 0, lambda _: Spare.WARN)
    with pytest.raises(LookupError, match="cluster c2 is looked at too late"):
        witnesses.look_at_for_good("c2")
    witnesses.back_to(0)
    witnesses.look_at_for_good("c2")


@pytest.mark.parametrize("mode", [Spare.REQUIRED, Spare.WARN])
def test_places_that_are_kept_have_to_pass_too(mode: Spare) -> None:
    # The second host is the one way out for what is on the first: with a VM there it is none.
    fleet = Fleet.build([a_host("h0", held=(old(4),)), a_host("h1", cores=6)])
    request = PlanRequest((a_vm(1, 4, Where(host="h1")), a_vm(2)), spare=SpareRule(mode))
    loose = plan(fleet, replace(request, spare=SpareRule()))
    kept = {loose.placed[0].vm_id: (loose.placed[0], loose.evidence[0])}
    planner = Planner(fleet)
    assert shown(planner.plan(request, kept)) == shown(plan(fleet, request))
    after = PlanRequest((a_vm(50, excluded_hosts=on("h0")),), spare=REQUIRED)
    assert shown(planner.plan(after)) == shown(plan(fleet, after))


# --- properties -------------------------------------------------------------------------------------------------------


def a_fleet(rng: random.Random) -> Fleet:
    """Two clusters in the same three racks, some VMs of some groups."""
    hosts = []
    for number, name in enumerate(NAMES[: rng.randint(3, 6)]):
        held = tuple(
            replace(
                old(rng.choice((2, 4)), *rng.sample(GROUPS, rng.choice((0, 1)))), vm_id=UUID(int=900 + 2 * number + n)
            )
            for n in range(rng.randint(0, 1))
        )
        hosts.append(a_host(name, rng.choice(("c1", "c2")), f"r{number % 3}", rng.choice((4, 6, 8)), held))
    return Fleet.build(hosts)


def a_request(rng: random.Random, rule: SpareRule) -> PlanRequest:
    vms = tuple(
        a_vm(
            number + 1,
            rng.choice((2, 2, 4)),
            groups=tuple(rng.sample(GROUPS, rng.choice((0, 0, 1, 2)))),
            excluded_hosts=frozenset(rng.sample(NAMES, rng.choice((0, 0, 3)))),
        )
        for number in range(rng.randint(1, 4))
    )
    return PlanRequest(vms, rng.choice(list(Policy)), spare=rule, most_moves=rng.choice((0, 0, 2)))


@settings(max_examples=300)
@given(SEEDS)
def test_a_planner_that_has_planned_before_answers_as_a_new_one(seed: int) -> None:
    rng = random.Random(seed)
    planner = Planner(a_fleet(rng))
    for _ in range(4):
        rule = SpareRule(rng.choice((Spare.WARN, Spare.REQUIRED, Spare.REQUIRED)), rng.choice(LEVELS))
        request = a_request(rng, rule)
        loose = plan(planner.fleet, replace(request, spare=SpareRule()))
        some = [pair for pair in zip(loose.placed, loose.evidence, strict=True) if rng.random() < 0.3]
        kept = {place.vm_id: (place, why) for place, why in some if not why.moves}
        assert shown(planner.plan(request, kept)) == shown(plan(planner.fleet, request))


@settings(max_examples=300)
@given(SEEDS, st.sampled_from(LEVELS))
def test_no_cluster_is_made_less_safe(seed: int, level: Level) -> None:
    """Not even one that the plan does not come to: groups reach over clusters."""
    rng = random.Random(seed)
    fleet = a_fleet(rng)
    request = a_request(rng, SpareRule(Spare.REQUIRED, level))
    after = applied(fleet, request.vms, plan(fleet, request))
    assert safe_domains(fleet, level) <= safe_domains(after, level)


# --- how much is worked out again -------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [Level.HOST, Level.RACK])
def test_a_new_member_of_a_group_disturbs_few_of_the_others(level: Level) -> None:
    """Forty VMs that stand apart, on eighty hosts in racks of their own: each comes to where few of those before it
    would restart, and the others are left alone."""
    fleet = Fleet.build([a_host(f"h{number}", rack=f"r{number}") for number in range(80)])
    apart = Group("apart", level=level)
    planner = Planner(fleet)
    witnesses, fitting = planner.witnesses(Level.HOST), planner.candidates(a_vm(1).profile, Policy.PACK).fitting
    witnesses.look_at_for_good("c1")
    for row in range(40):
        planner.workspace.take(row, [0], fitting, a_vm(row + 1, groups=(apart,)))
        assert witnesses.placed(replace(old(2, apart), vm_id=UUID(int=row + 1)), row, lambda _: Spare.WARN) is None
    # Not every one before it, each time.
    assert witnesses.mark() < 40 * 41 // 2 / 3


@settings(max_examples=300)
@given(SEEDS, st.sampled_from(LEVELS))
def test_what_is_known_to_be_turned_away_changes_no_plan(seed: int, level: Level) -> None:
    rng = random.Random(seed)
    fleet = a_fleet(rng)
    request = a_request(rng, SpareRule(Spare.REQUIRED, level))
    known = plan(fleet, request)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SpareGuard, "turned_away", lambda *_: False)
        asked = plan(fleet, request)
    # Scores differ in their last digit: what is tried is added and taken away again.
    assert (asked.placed, asked.refused) == (known.placed, known.refused)


@pytest.mark.parametrize("level", [Level.HOST, Level.RACK])
def test_what_was_turned_away_is_not_asked_for_again_by_its_like(level: Level) -> None:
    """Four hosts, each with just the room for a third of what another holds: with one VM more none could be spared."""
    held = [tuple(replace(old(2), vm_id=UUID(int=10 * host + n)) for n in range(3)) for host in range(4)]
    fleet = Fleet.build([a_host(f"h{n}", rack=f"r{n}", held=vms) for n, vms in enumerate(held)])
    asked: list[int] = []
    with pytest.MonkeyPatch.context() as patched:
        placed = Witnesses.placed

        def counted(self: Witnesses, vm: SeatedVm, row: int, mode_of: ModeOf) -> Whose | None:
            asked.append(row)
            return placed(self, vm, row, mode_of)

        patched.setattr(Witnesses, "placed", counted)
        vms = tuple(a_vm(100 + n, groups=(Group(f"g{n}"),)) for n in range(30))
        result = plan(fleet, PlanRequest(vms, spare=SpareRule(Spare.REQUIRED, level)))
    assert not result.placed
    # Twice for each host: with the first VM's group, and without.
    assert sorted(asked) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_vm_that_may_span_more_cells_is_not_turned_away_for_a_smaller_one() -> None:
    """Elsewhere there are cells of 2,000 MiB: two parts of 3,000 fit in none of them, four of 1,500 in all."""
    large = replace(a_host("h0"), cells=(CellState(0, 0, 1, 8, 8, 12500, 12500),))
    small = replace(a_host("h1", rack="r2"), cells=tuple(CellState(n, 0, 1, 2, 2, 2000, 2000) for n in range(4)))
    spanning = [Shape(vcpus, 6000, 1, NumaPolicy(multi_cell=True)) for vcpus in (2, 4)]
    vms = tuple(
        VmRequest(UUID(int=shape.vcpus), f"vm-{shape.vcpus}", Profile(shape, "x86_64", Where(host="h0")))
        for shape in spanning
    )
    result = plan(Fleet.build([large, small]), PlanRequest(vms, spare=REQUIRED))
    assert [place.name for place in result.placed] == ["vm-4"]
