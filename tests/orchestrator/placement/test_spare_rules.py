# SPDX-License-Identifier: Apache-2.0
"""N+1 as a rule of clusters: it holds for whoever comes, beside what a request asks for itself, and there alone."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppec_contract.api_placement import Policy
from ppec_orchestrator.placement.advice import advise, helps
from ppec_orchestrator.placement.applied import applied
from ppec_orchestrator.placement.changes import EndDrain, GiveUp
from ppec_orchestrator.placement.checker import check
from ppec_orchestrator.placement.fleet import Fleet, SeatedVm
from ppec_orchestrator.placement.plan import Plan
from ppec_orchestrator.placement.planner import Planner, plan
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import (
    NO_SPARE_RULE,
    Group,
    Level,
    PlanRequest,
    Spare,
    SpareRule,
    VmRequest,
    Where,
)
from ppec_orchestrator.placement.spare_rules import SpareRules

from .occupied import an_occupied_fleet, place_of
from .test_spare import LEVELS, PROFILE, SEEDS, a_host, a_request, ask, safe_domains

REQUIRED, WARN = SpareRule(Spare.REQUIRED), SpareRule(Spare.WARN)
RACKS = SpareRule(Spare.REQUIRED, Level.RACK)
MODES = st.sampled_from((Spare.WARN, Spare.REQUIRED))
CLUSTERS = ("c1", "c2")


def ruled(fleet: Fleet, rules: Mapping[str, SpareRule]) -> Fleet:
    """The fleet with these clusters' rules."""
    hosts = [replace(host, spare=rules.get(host.cluster, NO_SPARE_RULE)) for host in fleet.hosts]
    return Fleet.build(hosts, fleet.free_addresses)


def broken(before: Fleet, after: Fleet, level: Level, cluster: str) -> set[tuple[str, str]]:
    """Domains of the cluster that were safe, by brute force, and are not any more."""
    lost = safe_domains(before, level) - safe_domains(after, level)
    return {name for name in lost if name[0] == cluster}


# --- properties -------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(SEEDS, st.sampled_from(LEVELS), MODES)
def test_a_rule_of_all_clusters_is_as_one_of_the_request(seed: int, level: Level, mode: Spare) -> None:
    rng = random.Random(seed)
    fleet = an_occupied_fleet(rng, clusters=CLUSTERS)
    request = a_request(rng, most_moves=rng.choice((0, 0, 2)), all_or_nothing=rng.random() < 0.5)
    rule = SpareRule(mode, level, witnessed=True)
    asked = plan(fleet, replace(request, spare=rule))
    witnessed = replace(request, spare=SpareRule(witnessed=True))
    assert plan(ruled(fleet, dict.fromkeys(CLUSTERS, SpareRule(mode, level))), witnessed) == asked


@settings(max_examples=200)
@given(SEEDS, st.sampled_from(LEVELS))
def test_a_cluster_keeps_its_rule_and_another_has_none(seed: int, level: Level) -> None:
    rng = random.Random(seed)
    fleet = ruled(an_occupied_fleet(rng, 5, clusters=CLUSTERS), {"c1": SpareRule(Spare.REQUIRED, level)})
    request = a_request(rng, 3, spare=SpareRule(witnessed=True), most_moves=rng.choice((0, 0, 2)))
    result = plan(fleet, request)
    assert check(fleet, request, result) == []
    assert broken(fleet, applied(fleet, request.vms, result), level, "c1") == set()
    safe = safe_domains(fleet, level)
    for place in result.placed:
        host = fleet.hosts[fleet.index[place.host]]
        assert host.cluster == "c2" or (host.cluster, place_of(host, level)) in safe


@settings(max_examples=150)
@given(SEEDS)
def test_both_levels_hold_where_the_cluster_asks_for_one_and_the_request_for_the_other(seed: int) -> None:
    rng = random.Random(seed)
    one, other = rng.sample([REQUIRED, RACKS], 2)
    fleet = ruled(an_occupied_fleet(rng, most_hosts=4, most_vms=4), {"c1": one})
    request = a_request(rng, 3, spare=replace(other, witnessed=True))
    result = plan(fleet, request)
    assert check(fleet, request, result) == []
    after = applied(fleet, request.vms, result)
    assert {level for level in LEVELS if broken(fleet, after, level, "c1")} == set()


@settings(max_examples=200)
@given(SEEDS, MODES)
def test_a_rule_where_no_vm_can_go_and_no_member_stands_changes_nothing(seed: int, mode: Spare) -> None:
    rng = random.Random(seed)
    near = an_occupied_fleet(rng, 5, 5)
    far = [
        replace(host, name=f"z{row}", host_id=90 + row, cluster="far", rack="far", architecture="aarch64", vms=())
        for row, host in enumerate(near.hosts[:2])
    ]
    fleet = Fleet.build([*near.hosts, *far], near.free_addresses)
    request = a_request(rng, 6, all_or_nothing=rng.random() < 0.7, most_moves=rng.choice((0, 0, 2)))
    with_rule = ruled(fleet, {"far": SpareRule(mode)})
    result = plan(with_rule, request)
    assert result == plan(fleet, request)
    assert check(with_rule, request, result) == []


@settings(max_examples=100)
@given(SEEDS)
def test_what_is_kept_from_plan_to_plan_changes_no_answer(seed: int) -> None:
    rng = random.Random(seed)
    fleet = an_occupied_fleet(rng, clusters=CLUSTERS)
    planner = Planner(fleet)
    for _ in range(4):
        rules = {name: rng.choice((REQUIRED, WARN, RACKS, NO_SPARE_RULE)) for name in CLUSTERS}
        changed = fleet.changed([replace(host, spare=rules[host.cluster]) for host in fleet.hosts])
        planner.follow(changed, [row for row, host in enumerate(fleet.hosts) if host is not changed.hosts[row]])
        fleet = changed
        request = a_request(rng, spare=rng.choice((NO_SPARE_RULE, REQUIRED, WARN)))
        result, anew = planner.plan(request), plan(fleet, request)
        assert (result.placed, result.refused) == (anew.placed, anew.refused)
        assert {each.domain for each in result.exposed} == {each.domain for each in anew.exposed}


# --- cases ------------------------------------------------------------------------------------------------------------


def without_a_rule(count: int) -> PlanRequest:
    return ask(count, Spare.OFF)


def test_who_asks_for_nothing_keeps_the_clusters_rule_and_uses_the_other_cluster_up() -> None:
    hosts = [a_host("h1"), a_host("h2"), a_host("h3", cluster="c2"), a_host("h4", cluster="c2")]
    result = plan(ruled(Fleet.build(hosts), {"c1": REQUIRED}), without_a_rule(20))
    count = {name: sum(place.host in each for place in result.placed) for name, each in HOSTS_OF.items()}
    assert count == {"c1": 4, "c2": 8}
    assert Reason.N_PLUS_ONE in result.refused[0].reasons


HOSTS_OF = {"c1": ("h1", "h2"), "c2": ("h3", "h4")}


@pytest.mark.parametrize("own", [NO_SPARE_RULE, WARN, REQUIRED])
def test_a_request_makes_a_clusters_rule_no_looser(own: SpareRule) -> None:
    fleet = ruled(Fleet.build([a_host("h1"), a_host("h2")]), {"c1": REQUIRED})
    assert len(plan(fleet, replace(ask(8), spare=own)).placed) == 4


def test_a_request_may_make_it_stricter() -> None:
    fleet = ruled(Fleet.build([a_host("h1"), a_host("h2")]), {"c1": WARN})
    assert len(plan(fleet, without_a_rule(8)).placed) == 8
    assert len(plan(fleet, ask(8)).placed) == 4


def test_a_warning_of_one_cluster_names_its_domains_alone() -> None:
    hosts = [a_host("h1"), a_host("h2"), a_host("h3", cluster="c2"), a_host("h4", cluster="c2")]
    result = plan(ruled(Fleet.build(hosts), {"c2": WARN}), without_a_rule(16))
    assert len(result.placed) == 16
    assert [(each.domain, each.level) for each in result.exposed] == [("h3", Level.HOST), ("h4", Level.HOST)]


def test_a_member_from_afar_takes_no_place_that_a_cluster_with_a_rule_counts_on() -> None:
    """The data centre's one other member of the group is on h1: lost, it can restart only where no member stands."""
    apart = Group("apart", level=Level.RACK)
    member = SeatedVm(UUID(int=77), "member", replace(PROFILE, where=Where(vrf="v1")), (0,), (apart,))
    hosts = [a_host("h1", rack="a", vms=(member,)), a_host("h2", rack="b"), a_host("h3", rack="b", cluster="c2")]
    vm = VmRequest(UUID(int=1), "new", replace(PROFILE, where=Where(cluster="c2")), groups=(apart,))
    request = PlanRequest((vm,), Policy.PACK)
    assert plan(Fleet.build(hosts), request).placed
    fleet = ruled(Fleet.build(hosts), {"c1": REQUIRED})
    refused = plan(fleet, replace(request, spare=SpareRule(witnessed=True)))
    assert dict(refused.refused[0].reasons) == {Reason.OUTSIDE_SCOPE: 2, Reason.N_PLUS_ONE: 1}
    assert check(fleet, replace(request, spare=SpareRule(witnessed=True)), refused) == []
    assert refused.counted_on == ()


def test_a_plan_counts_on_the_clusters_with_a_rule_that_it_comes_to_or_has_members_in() -> None:
    """The member on h1 can restart on h2 as long as nobody else of its group comes there."""
    apart = Group("apart")
    member = SeatedVm(UUID(int=77), "member", replace(PROFILE, where=Where(vrf="v1")), (0,), (apart,))
    clusters = {"h1": "c1", "h2": "c1", "h3": "c2", "h4": "c3", "h5": "c4"}
    hosts = [a_host(name, cluster=cluster) for name, cluster in clusters.items()]
    fleet = ruled(
        Fleet.build([replace(host, vms=(member,) if host.name == "h1" else ()) for host in hosts]),
        {"c1": REQUIRED, "c3": REQUIRED, "c4": WARN},
    )

    def counted_on(cluster: str, *groups: Group) -> tuple[str, ...]:
        vm = VmRequest(UUID(int=1), "new", replace(PROFILE, where=Where(cluster=cluster)), groups=groups)
        return plan(fleet, PlanRequest((vm,), Policy.PACK)).counted_on

    assert [counted_on(cluster) for cluster in ("c1", "c2", "c4")] == [("c1",), (), ()]
    assert [counted_on(cluster, apart) for cluster in ("c2", "c4")] == [("c1",)] * 2


def test_rules_are_met_where_the_vms_could_go() -> None:
    fleet = ruled(Fleet.build([a_host("h1"), a_host("h2", cluster="c2", draining=True)]), {"c1": REQUIRED, "c2": WARN})
    planner = Planner(fleet)

    def met(where: Where, **more: object) -> set[str]:
        vm = VmRequest(UUID(int=1), "v", replace(PROFILE, where=where), **more)  # type: ignore[arg-type]
        return {*planner.spare_rules(PlanRequest((vm,))).clusters}

    assert met(Where()) == {"c1", "c2"}
    assert met(Where(cluster="c2")) == met(Where(host="h2")) == {"c2"}
    assert met(Where(cluster="c2"), groups=(Group("g"),)) == {"c2"}
    assert planner.spare_rules(PlanRequest((), spare=SpareRule(clusters=False))).off
    assert plan(fleet, PlanRequest(())) == Plan((), ())


def test_the_stricter_of_two_rules_about_one_level_holds() -> None:
    rules = SpareRules(WARN, {"c1": REQUIRED, "c2": RACKS})
    assert [rules.mode(level, "c1") for level in LEVELS] == [Spare.REQUIRED, Spare.OFF]
    assert [rules.mode(level, "c2") for level in LEVELS] == [Spare.WARN, Spare.REQUIRED]
    assert [rules.required_in(name) for name in ("c1", "c2", "c3")] == [True, True, False]
    assert (rules.levels, rules.required, rules.off) == (LEVELS, True, False)


# --- what the checker says --------------------------------------------------------------------------------------------


def test_the_checker_finds_a_plan_that_passed_over_a_clusters_rule() -> None:
    hosts = [a_host("h1"), a_host("h2")]
    request = replace(without_a_rule(8), spare=SpareRule(witnessed=True))
    free = plan(Fleet.build(hosts), request)
    faults = check(ruled(Fleet.build(hosts), {"c1": REQUIRED}), request, free)
    assert [fault for fault in faults if "where they would restart is said of 0" in fault]


def test_the_checker_finds_a_refusal_that_no_clusters_rule_was_the_reason_of() -> None:
    hosts = [a_host("h1"), a_host("h2"), a_host("h3", cluster="c2")]
    fleet = ruled(Fleet.build(hosts), {"c1": REQUIRED})
    request = replace(without_a_rule(9), spare=SpareRule(witnessed=True))
    sound = plan(fleet, request)
    assert check(fleet, request, sound) == []
    last = max(sound.evidence, key=lambda why: why.step)
    lost = [place for place in sound.placed if place.vm_id == last.vm_id]
    refusal = replace(sound.refused[0], vm_id=lost[0].vm_id, name=lost[0].name, step=last.step)
    worse = Plan(
        tuple(place for place in sound.placed if place not in lost),
        (refusal, *sound.refused),
        tuple(why for why in sound.evidence if why != last),
        sound.exposed,
        sound.evacuations,
    )
    assert [fault for fault in check(fleet, request, worse) if "was refused, but fits h3" in fault]


# --- advice -----------------------------------------------------------------------------------------------------------

LIFTED = GiveUp(("cluster-spare",))


def full_of_what_the_rule_keeps() -> Fleet:
    return ruled(Fleet.build([a_host("h1", held=2), a_host("h2", held=2)]), {"c1": REQUIRED})


def test_a_vm_that_a_clusters_rule_keeps_out_is_told_so() -> None:
    fleet, vm = full_of_what_the_rule_keeps(), without_a_rule(1).vms[0]
    assert not plan(fleet, without_a_rule(1)).placed
    changes = advise(fleet, vm)
    assert changes[0] == LIFTED
    assert LIFTED.sentence() == "lift N+1 of the cluster"
    assert all(helps(change, fleet, vm) for change in changes)
    assert not helps(GiveUp(("spare",)), fleet, vm)


def test_both_rules_are_given_up_where_either_would_keep_the_vm_out() -> None:
    assert advise(full_of_what_the_rule_keeps(), ask(1).vms[0], REQUIRED)[0] == GiveUp(("spare", "cluster-spare"))


def test_a_rule_of_a_cluster_that_the_vm_can_not_go_to_is_none_of_its_business() -> None:
    full = a_host("h3", held=4, cluster="c2")
    fleet = Fleet.build([*full_of_what_the_rule_keeps().hosts, full])
    vm = replace(without_a_rule(1).vms[0], profile=replace(PROFILE, where=Where(cluster="c2")))
    changes = advise(fleet, vm)
    assert changes
    assert not [change for change in changes if "cluster-spare" in getattr(change, "rules", ())]


def test_a_drained_host_is_opened_only_where_the_clusters_rule_is_kept_after_it() -> None:
    """All hosts of the cluster are drained; h3 alone is of no use, its loss could not be made good."""
    fleet = ruled(Fleet.build([a_host("h3", draining=True)]), {"c1": REQUIRED})
    vm = without_a_rule(1).vms[0]
    changes = advise(fleet, vm)
    assert EndDrain(("h3",)) not in changes
    assert changes
    assert all(helps(change, fleet, vm) for change in changes)


@settings(max_examples=60)
@given(SEEDS, st.sampled_from(LEVELS))
def test_whatever_is_offered_helps(seed: int, level: Level) -> None:
    rng = random.Random(seed)
    fleet = ruled(an_occupied_fleet(rng, clusters=CLUSTERS), {"c1": SpareRule(Spare.REQUIRED, level)})
    request = a_request(rng, spare=rng.choice((NO_SPARE_RULE, REQUIRED)))
    result = plan(fleet, request)
    vms = {vm.vm_id: vm for vm in request.vms}
    after = applied(fleet, request.vms, result)
    for refusal in result.refused[:2]:
        vm = vms[refusal.vm_id]
        assert [
            change for change in advise(after, vm, request.spare) if not helps(change, after, vm, request.spare)
        ] == []
