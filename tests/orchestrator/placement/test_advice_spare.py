# SPDX-License-Identifier: Apache-2.0
"""What is offered to a VM that N+1 keeps out keeps to N+1, or says that it does not; and no size is too small to ask
for."""

from __future__ import annotations

import random
from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ppec_contract.api_placement import Policy, VmSize
from ppec_contract.vm import NumaPolicy
from ppec_orchestrator.placement.advice import advise, helps
from ppec_orchestrator.placement.applied import applied
from ppec_orchestrator.placement.changes import EndDrain, FreeRoom, GiveUp, OtherSize
from ppec_orchestrator.placement.fleet import CellState, Fleet, HostState, SeatedVm
from ppec_orchestrator.placement.planner import plan
from ppec_orchestrator.placement.reasons import Reason
from ppec_orchestrator.placement.request import Level, PlanRequest, Profile, Shape, Spare, SpareRule, VmRequest, Where

from .occupied import a_profile, an_occupied_fleet, some_groups

REQUIRED = SpareRule(Spare.REQUIRED)
OLD = SeatedVm(UUID(int=9), "old", Profile(Shape(4, 64, 1), "x86_64", Where(vrf="v1")), (0,))


def host(name: str, cores: int = 8, free: int | None = None, memory_mib: int = 8192, **more: object) -> HostState:
    cells = (CellState(0, 0, 1, cores, cores if free is None else free, memory_mib, memory_mib),)
    given: dict[str, object] = {"prefixes": ((1,),), **more}
    return HostState(int(name[1:]), name, "d1", "c1", "r1", "v1", "x86_64", cells, 1000, 1000, **given)  # type: ignore[arg-type]


def vm(vcpus: int = 4, memory_mib: int = 64, where: Where | None = None, numa: NumaPolicy | None = None) -> VmRequest:
    shape = Shape(vcpus, memory_mib, 1, numa or NumaPolicy())
    return VmRequest(UUID(int=1), "v", Profile(shape, "x86_64", where or Where()))


def a_way_out_that_is_needed() -> Fleet:
    """The VM fits on both hosts; on either it takes the room that a loss of the other needs."""
    return Fleet.build([host("h1", free=4, vms=(OLD,)), host("h2", cores=4)])


def test_what_n_plus_one_alone_keeps_out_is_told_to_do_without_it() -> None:
    fleet, asked = a_way_out_that_is_needed(), vm(where=Where(cluster="c1"))
    answer = plan(fleet, PlanRequest((asked,), spare=REQUIRED))
    assert dict(answer.refused[0].reasons) == {Reason.N_PLUS_ONE: 2}
    assert advise(fleet, asked, REQUIRED) == [GiveUp(("spare",))]
    assert GiveUp(("spare",)).sentence() == "do without N+1"
    assert helps(GiveUp(("spare",)), fleet, asked, REQUIRED)
    assert not helps(GiveUp(("cluster",)), fleet, asked, REQUIRED)


@pytest.mark.parametrize("rule", [SpareRule(), SpareRule(Spare.WARN)])
def test_a_rule_that_refuses_nobody_is_not_given_up(rule: SpareRule) -> None:
    fleet = Fleet.build([host("h1", free=2)])
    assert not [change for change in advise(fleet, vm(), rule) if change == GiveUp(("spare",))]


def test_n_plus_one_is_given_up_beside_another_rule() -> None:
    fleet = Fleet.build([host("h1", free=4, vms=(OLD,), labels={"a": "b"}), host("h2", cores=4, labels={"a": "b"})])
    asked = vm(where=Where(without=frozenset({("a", "")})))
    assert advise(fleet, asked, REQUIRED)[0] == GiveUp(("without", "spare"))


def test_a_drain_is_ended_where_that_makes_room_for_a_loss() -> None:
    # h3 is too small for a loss, h4 is not.
    fleet = Fleet.build(
        [*a_way_out_that_is_needed().hosts, host("h3", cores=2, draining=True), host("h4", draining=True)]
    )
    assert [each for each in advise(fleet, vm(), REQUIRED) if isinstance(each, EndDrain)] == [EndDrain(("h4",))]


def test_of_many_drained_hosts_those_are_opened_that_the_vm_could_go_to() -> None:
    """The others are of a cluster that isn't asked for, and come first by name."""
    elsewhere = [replace(host(f"h{number}", draining=True), cluster="c2") for number in range(1, 6)]
    fleet = Fleet.build([*elsewhere, host("h6", draining=True), host("h7")])
    offered = advise(fleet, vm(where=Where(cluster="c1")), REQUIRED)
    assert EndDrain(("h6",)) in offered
    assert GiveUp(("spare",)) in offered


def test_room_is_freed_only_where_a_loss_could_be_made_good_after_it() -> None:
    """With two cores freed, the VM fits on h1, and can restart on h2; or on h3, which is alone in its cluster."""
    hosts = [host("h1", cores=4, free=2), host("h2", labels={"a": "b"}), host("h3", cores=4, free=2)]
    fleet = Fleet.build([*hosts[:2], replace(hosts[2], cluster="c2")])
    asked = vm(where=Where(without=frozenset({("a", "")})))
    for rule, named in ((SpareRule(), ["h1", "h3"]), (REQUIRED, ["h1"])):
        (freed,) = [each for each in advise(fleet, asked, rule) if isinstance(each, FreeRoom)]
        assert [room.host for room in freed.rooms] == named


@pytest.mark.parametrize(
    ("memory_mib", "free_mib", "offered"), [(128, 100, [100]), (128, 64, [64]), (128, 63, []), (64, 60, [])]
)
def test_no_less_memory_is_offered_than_a_vm_may_have(memory_mib: int, free_mib: int, offered: list[int]) -> None:
    fleet = Fleet.build([host("h1", memory_mib=free_mib)])
    sizes = [each for each in advise(fleet, vm(2, memory_mib)) if isinstance(each, OtherSize)]
    assert [size.memory_mib for size in sizes] == offered


# --- properties -------------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(st.integers(0, 2**32), st.sampled_from((Level.HOST, Level.RACK)))
@example(5024518, Level.HOST)
def test_whatever_is_offered_under_the_rule_makes_the_vm_fit(seed: int, level: Level) -> None:
    rng = random.Random(seed)
    fleet, rule = an_occupied_fleet(rng), SpareRule(Spare.REQUIRED, level)
    vms = tuple(
        VmRequest(UUID(int=number + 1), f"vm-{number}", a_profile(rng), groups=some_groups(rng)) for number in range(3)
    )
    answer = plan(fleet, PlanRequest(vms, rng.choice(list(Policy)), spare=rule))
    after = applied(fleet, vms, answer)
    refused = {one.vm_id for one in answer.refused}
    for one in [each for each in vms if each.vm_id in refused][:2]:
        offered = advise(after, one, rule)
        assert all(helps(change, after, one, rule) for change in offered)
        without = plan(after, PlanRequest((one,), Policy.PACK)).placed
        assert (GiveUp(("spare",)) in offered) == bool(without)


@settings(max_examples=150)
@given(st.integers(2, 8), st.integers(64, 400), st.integers(1, 500), st.integers(1, 8), st.booleans())
def test_every_size_that_is_offered_can_be_asked_for(
    cores: int, memory_mib: int, free_mib: int, vcpus: int, huge: bool
) -> None:
    numa = NumaPolicy(huge_page_kib=2048) if huge else NumaPolicy()
    asked = vm(2 * vcpus, memory_mib - memory_mib % 2, numa=numa)
    cell = replace(host("h1").cells[0], cores=cores, cores_free=cores, memory_mib=free_mib, memory_free_mib=free_mib)
    pages = {"pages_2m": free_mib // 2, "pages_2m_free": free_mib // 2}
    fleet = Fleet.build([replace(host("h1"), cells=(replace(cell, **pages),))])
    for size in advise(fleet, asked):
        if isinstance(size, OtherSize):
            VmSize(vcpus=size.vcpus, memory_mib=size.memory_mib, disk_mib=size.disk_mib, numa=numa)
