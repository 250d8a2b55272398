# SPDX-License-Identifier: Apache-2.0
"""One host's part of a plan: the events that come of it, and the small result."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ansible_collections.ppec.cloud.plugins.plugin_utils.event_log import EventLog
from ansible_collections.ppec.cloud.plugins.plugin_utils.run_plan import (
    PlanError,
    call_path,
    carry_out,
    predict,
    read_part,
)

from ppec_contract.agent import PlanRetuneReply
from ppec_contract.frames import MAX_FRAME_BYTES
from ppec_contract.retune import RetunePlan
from ppec_contract.run import RunEvent

# The first ones would be files that are there.
NO_HOST_NAMES = [
    "../plan",
    "x/../h1",
    "./h1",
    "",
    ".",
    "..",
    "/etc/passwd",
    ".h1",
    "h1/",
    "h1\n",
    "h1\0",
    "H1",
    "n" * 64,
]


def part_of(fleet, plan, host="h1"):
    return read_part(fleet.write_plan(plan), host)


def events_of(plan):
    path = Path(plan["events_path"])
    return [RunEvent.model_validate_json(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def kinds(events):
    return [
        "accepted" if e.accepted else "progress" if e.progress else "result" if e.result else "problem" for e in events
    ]


def test_each_thing_is_told_once_and_the_call_made_once(make_fleet, spec):
    fleet = make_fleet("h1")
    plan = fleet.plan({"h1": {"vms": [spec("a"), spec("b")]}})
    result = carry_out(part_of(fleet, plan))
    assert kinds(events_of(plan)) == ["accepted", "progress", "result", "progress", "result"]
    assert result == {
        "changed": True,
        "action": "CreateVms",
        "vm_count": 2,
        "succeeded": 2,
        "failed_vms": 0,
        "failed_names": [],
        "proxy_sessions": 1,
    }
    agent = fleet.hosts["h1"].agent
    assert [(method, sent["operation_id"], sent["fence"]) for method, sent in agent.requests] == [
        ("CreateVms", plan["operation_id"], 1)
    ]
    assert agent.connections == 1


def test_a_host_with_many_vms_is_called_again_over_the_same_session(make_fleet, spec):
    fleet = make_fleet("h1")
    plan = fleet.plan({"h1": {"vms": [spec(f"vm-{number}") for number in range(600)]}})
    result = carry_out(part_of(fleet, plan))
    assert (result["succeeded"], result["proxy_sessions"]) == (600, 1)
    agent = fleet.hosts["h1"].agent
    assert [len(sent["vms"]) for _, sent in agent.requests] == [256, 256, 88]
    assert {sent["operation_id"] for _, sent in agent.requests} == {plan["operation_id"]}
    told = events_of(plan)
    assert (kinds(told).count("accepted"), kinds(told).count("result")) == (1, 600)
    gone = fleet.plan({"h1": {"vm_ids": sorted(agent.vms)}}, action="DeleteVms")
    assert carry_out(part_of(fleet, gone))["succeeded"] == 600
    assert agent.vms == {}


def test_no_call_is_longer_than_a_frame(make_fleet, spec):
    fleet = make_fleet("h1")
    # A control character is one byte of user data and six of JSON.
    text = "#cloud-config\n" + "\x01" * 65000
    plan = fleet.plan({"h1": {"vms": [spec(f"vm-{number}", user_data=text) for number in range(25)]}})
    result = carry_out(part_of(fleet, plan))
    assert (result["succeeded"], result["proxy_sessions"]) == (25, 1)
    sent = fleet.hosts["h1"].agent.requests
    assert [len(parameters["vms"]) for _, parameters in sent] == [10, 10, 5]
    assert max(len(json.dumps(parameters)) for _, parameters in sent) < MAX_FRAME_BYTES
    assert all(vm["user_data"] == text for _, parameters in sent for vm in parameters["vms"])


def test_a_host_lost_between_two_calls_keeps_what_was_told(make_fleet, spec):
    fleet = make_fleet("h1")
    fleet.hosts["h1"].agent.failing["vm-3"] = "vm.start_failed"
    vms = [spec(f"vm-{number}") for number in range(256)] + [spec("odd", vcpus=3)]
    result = carry_out(part_of(fleet, fleet.plan({"h1": {"vms": vms}})))
    assert result["failed"]
    told = events_of(fleet.plan({"h1": {}}))
    assert (kinds(told).count("result"), kinds(told)[-1]) == (256, "problem")


def test_parameters_may_name_the_operation_themselves(make_fleet, spec):
    fleet = make_fleet("h1")
    plan = fleet.plan({"h1": {"operation_id": "op-own", "fence": 9, "vms": [spec("a")]}})
    carry_out(part_of(fleet, plan))
    assert [(sent["operation_id"], sent["fence"]) for _, sent in fleet.hosts["h1"].agent.changes] == [("op-own", 9)]


def test_a_vm_that_fails_is_an_event_and_a_count_not_a_failed_task(make_fleet, spec):
    fleet = make_fleet("h1")
    fleet.hosts["h1"].agent.failing["b"] = "vm.start_failed"
    plan = fleet.plan({"h1": {"vms": [spec("a"), spec("b")]}})
    result = carry_out(part_of(fleet, plan))
    assert "failed" not in result
    assert (result["succeeded"], result["failed_vms"], result["failed_names"]) == (1, 1, ["b"])
    problems = [e.result.problem.code for e in events_of(plan) if e.result and e.result.problem]
    assert problems == ["vm.start_failed"]


def test_a_lost_connection_is_told_as_if_nothing_had_been(make_fleet, spec):
    fleet = make_fleet("h1")
    fleet.hosts["h1"].agent.faults = ["drop_after:2"]
    plan = fleet.plan({"h1": {"vms": [spec("a"), spec("b")]}})
    result = carry_out(part_of(fleet, plan))
    assert result["proxy_sessions"] == 2
    told = events_of(plan)
    assert kinds(told).count("accepted") == 1
    assert [e.result.name for e in told if e.result] == ["a", "b"]
    assert len(fleet.hosts["h1"].agent.vms) == 2


def test_a_host_that_can_t_be_reached_is_a_problem_and_a_failed_task(make_fleet, spec):
    fleet = make_fleet("h1", "h2")
    plan = fleet.plan({"h1": {"vms": [spec("a")]}})
    # In place of h1 there is h2.
    plan["hosts"]["h1"]["port"] = fleet.hosts["h2"].port
    result = carry_out(part_of(fleet, plan))
    assert (result["failed"], result["code"]) == (True, "auth.wrong_identity")
    (event,) = events_of(plan)
    assert (event.host, event.problem.code, event.problem.subject) == ("h1", "auth.wrong_identity", "host h1")
    assert fleet.hosts["h2"].agent.requests == []


def test_a_refused_call_is_the_host_s_problem_and_quotes_no_tenant(make_fleet, spec):
    fleet = make_fleet("h1")
    plan = fleet.plan({"h1": {"vms": [spec("{{ lookup('pipe', 'id') }}", vcpus=3)]}})
    result = carry_out(part_of(fleet, plan))
    assert result["failed"]
    assert "lookup" not in json.dumps(result)
    assert kinds(events_of(plan)) == ["problem"]


def test_a_host_the_plan_does_not_know_says_so(make_fleet, spec):
    fleet = make_fleet("h1")
    plan = fleet.plan({"h1": {"vms": [spec("a")]}})
    for result in (predict(part_of(fleet, plan, "h2")), carry_out(part_of(fleet, plan, "h2"))):
        assert result["code"] == "host.not_found"
    assert [(e.host, e.problem.code) for e in events_of(plan)] == [("h2", "host.not_found")]


def test_a_call_that_is_missing_is_not_taken_for_a_host_without_one(make_fleet, spec):
    fleet = make_fleet("h1")
    plan = fleet.plan({"h1": {"vms": [spec("a")]}})
    path = fleet.write_plan(plan)
    call_path(path, "h1").unlink()
    with pytest.raises(PlanError, match=r"h1\.json is missing"):
        read_part(path, "h1")
    assert events_of(plan) == []


def test_results_that_are_missing_are_a_problem(make_fleet, spec):
    fleet = make_fleet("h1")
    fleet.hosts["h1"].agent.faults = ['script:{"parameters": {"results": []}}\n']
    plan = fleet.plan({"h1": {"vms": [spec("a"), spec("b")]}})
    assert carry_out(part_of(fleet, plan))["failed"]
    assert [e.problem.detail for e in events_of(plan) if e.problem] == ["host h1 gave no result for 2 of 2 VMs"]


@pytest.mark.parametrize("action", ["DeleteVms", "StartVms", "StopVms"])
def test_the_other_actions_by_id(make_fleet, spec, action):
    fleet = make_fleet("h1")
    carry_out(part_of(fleet, fleet.plan({"h1": {"vms": [spec("a")]}})))
    plan = fleet.plan({"h1": {"vm_ids": [spec("a")["vm_id"]]}}, action=action)
    result = carry_out(part_of(fleet, plan))
    assert (result["vm_count"], result["succeeded"]) == (1, 1)
    assert fleet.hosts["h1"].agent.changes[-1][0] == action


def moves_of(fleet, *names):
    """A retune of these VMs, all from cell 0 to cell 1."""
    mine = {vm.name: vm for vm in fleet.hosts["h1"].agent.vms.values()}

    def seat(cell):
        return {"cell": cell, "pins": [{"vcpu": 0, "pcpu": cell}, {"vcpu": 1, "pcpu": cell + 2}]}

    moves = [
        {"vm_id": str(mine[n].vm_id), "name": n, "before": seat(0), "after": seat(1), "memory_mib": 512} for n in names
    ]
    return {"opened": [0], "moves": moves, "before": [], "after": []}


def test_the_reply_of_a_view_is_passed_on_whole(make_fleet, spec):
    fleet = make_fleet("h1")
    carry_out(part_of(fleet, fleet.plan({"h1": {"vms": [spec("a")]}})))
    agent = fleet.hosts["h1"].agent
    agent.retune_plan = moves_of(fleet, "a")
    asked = {"want": {"vcpus": 4, "memory_mib": 1024, "cells": [0]}, "bounds": {"moves": 3}}
    plan = fleet.plan({"h1": asked}, action="PlanRetune", events_path=str(fleet.folder / "view.jsonl"))
    result = carry_out(part_of(fleet, plan))
    assert (result["changed"], result["vm_count"], result["succeeded"]) == (False, 0, 0)
    assert agent.requests[-1] == ("PlanRetune", asked), "without an operation: it changes nothing"
    (event,) = events_of(plan)
    assert PlanRetuneReply.model_validate(event.view).plan == RetunePlan.model_validate(agent.retune_plan)
    assert not predict(part_of(fleet, plan))["changed"]
    agent.retune_plan = None
    assert carry_out(part_of(fleet, plan))["code"] == "retune.not_possible"
    assert events_of(plan)[-1].problem.code == "retune.not_possible"


def test_a_retune_has_a_result_for_each_vm_of_its_plan(make_fleet, spec):
    fleet = make_fleet("h1")
    carry_out(part_of(fleet, fleet.plan({"h1": {"vms": [spec("a"), spec("b")]}})))
    agent = fleet.hosts["h1"].agent
    plan = fleet.plan({"h1": {"plan": moves_of(fleet, "a", "b")}}, action="RetuneHost")
    changes = len(agent.changes)
    assert predict(part_of(fleet, plan))["changed"]
    assert len(agent.changes) == changes
    result = carry_out(part_of(fleet, plan))
    assert (result["changed"], result["vm_count"], result["succeeded"]) == (True, 2, 2)
    assert [event.result.vm.cells for event in events_of(plan) if event.result][-2:] == [(1,), (1,)]
    assert not predict(part_of(fleet, plan))["changed"]
    agent.vms.clear()
    assert predict(part_of(fleet, plan))["failed_vms"] == 2


def test_sizes_are_a_call_s_vms_too(make_fleet, spec):
    fleet = make_fleet("h1")
    carry_out(part_of(fleet, fleet.plan({"h1": {"vms": [spec("a")]}})))
    size = {"vm_id": spec("a")["vm_id"], "vcpus": 4, "memory_mib": 1024}
    plan = fleet.plan({"h1": {"sizes": [size]}}, action="ResizeVms")
    assert predict(part_of(fleet, plan))["changed"]
    assert carry_out(part_of(fleet, plan))["succeeded"] == 1
    assert not predict(part_of(fleet, plan))["changed"]


def test_check_mode_asks_and_changes_nothing(make_fleet, spec):
    fleet = make_fleet("h1")
    plan = fleet.plan({"h1": {"vms": [spec("a"), spec("b")]}})
    result = predict(part_of(fleet, plan))
    assert (result["changed"], result["vm_count"]) == (True, 2)
    assert fleet.hosts["h1"].agent.changes == []
    assert not Path(plan["events_path"]).exists()
    carry_out(part_of(fleet, plan))
    assert not predict(part_of(fleet, plan))["changed"]


NOT_A_CALL = ["", "{", "[]", "{}", '{"run": 1}', '{"run": {"action": "Format", "events_path": "/x"}}']


@pytest.mark.parametrize("text", NOT_A_CALL)
@pytest.mark.parametrize("name", ["plan.json", "calls/h1.json"])
def test_a_plan_file_that_is_none(tmp_path, name, text):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    with pytest.raises(PlanError):
        read_part(tmp_path / "plan.json", "h1")


def test_nothing_but_the_file_of_the_own_host_is_read(make_fleet, spec):
    """So what a worker reads and parses does not grow with the VMs of other hosts."""
    fleet = make_fleet("h1", "h2", "h3")
    plan = fleet.plan({host: {"vms": [spec(f"{host}-vm")]} for host in fleet.hosts})
    path = fleet.write_plan(plan)
    for other in (path, call_path(path, "h2"), call_path(path, "h3")):
        other.write_bytes(b"\xff not JSON")
    assert carry_out(read_part(path, "h1"))["succeeded"] == 1
    assert [vm.name for vm in fleet.hosts["h1"].agent.vms.values()] == ["h1-vm"]
    assert {event.host for event in events_of(plan)} == {"h1"}
    with pytest.raises(PlanError, match=r"calls/h2\.json"):
        read_part(path, "h2")


@pytest.mark.parametrize("host", NO_HOST_NAMES)
def test_a_host_name_leads_nowhere_but_into_the_plan_s_folder(make_fleet, spec, host):
    fleet = make_fleet("h1")
    path = fleet.write_plan(fleet.plan({"h1": {"vms": [spec("a")]}}))
    with pytest.raises(PlanError, match="not a host name"):
        read_part(path, host)


@pytest.mark.parametrize("host", ["plan", "run", "a..b", "h1.json", "n" * 63])
def test_every_host_name_has_a_file_of_its_own(host):
    assert call_path("/run/plan.json", host) == Path(f"/run/calls/{host}.json")


def test_lines_of_many_writers_stay_whole(tmp_path):
    path = tmp_path / "events.jsonl"

    def write(host):
        log = EventLog(str(path), host)
        for number in range(200):
            log.append(progress={"text": "x" * 5000, "number": number})
        log.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, [f"h{n}" for n in range(8)]))
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert len(lines) == 1600
    assert path.stat().st_mode & 0o777 == 0o600
