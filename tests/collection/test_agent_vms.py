# SPDX-License-Identifier: Apache-2.0
"""The pure part of the agent modules: read, compare, act, on a scripted agent without any wire."""

from __future__ import annotations

import json

import pytest
from ansible_collections.ppec.cloud.plugins.module_utils import agent_actions, agent_arguments
from ansible_collections.ppec.cloud.plugins.module_utils.agent_vms import METHOD_OF_STATE, execute
from ansible_collections.ppec.cloud.plugins.module_utils.problem import ProblemError

from ppec_contract.vm import VmState


def params(state, *vms, **other):
    defaults = {"operation_id": None, "fence": 0, "timeout_s": 30.0, "force": False, "thaw_after_s": 60.0}
    return {"state": state, "vms": list(vms), **defaults, **other}


def test_present_creates_what_is_absent_and_only_that(agent, spec):
    execute(params("present", spec("a")), agent, False)
    outcome = execute(params("present", spec("a"), spec("b")), agent, False)
    assert outcome["changed"]
    assert [(r["name"], r["changed"]) for r in outcome["vms"]] == [("a", False), ("b", True)]
    assert [[vm["name"] for vm in sent["vms"]] for _, sent in agent.changes] == [["a"], ["b"]]
    assert "failed" not in outcome


@pytest.mark.parametrize("state", ["present", "absent", "started", "stopped"])
def test_done_twice_changes_once(agent, spec, state):
    if state == "started":
        execute(params("present", spec("a")), agent, False)
        execute(params("stopped", spec("a")), agent, False)
    elif state != "present":
        execute(params("present", spec("a")), agent, False)
    first = execute(params(state, spec("a")), agent, False)
    calls = len(agent.changes)
    second = execute(params(state, spec("a")), agent, False)
    assert (first["changed"], second["changed"]) == (True, False)
    assert len(agent.changes) == calls
    assert second["diff"]["before"] == second["diff"]["after"]


@pytest.mark.parametrize("state", ["present", "absent", "started", "stopped"])
@pytest.mark.parametrize("exists", [False, "running", "stopped"])
def test_check_mode_predicts_what_happens_and_changes_nothing(agent, spec, state, exists):
    if exists:
        execute(params("present", spec("a")), agent, False)
    if exists == "stopped":
        execute(params("stopped", spec("a")), agent, False)
    calls, vms = len(agent.changes), dict(agent.vms)
    said = execute(params(state, spec("a")), agent, True)
    assert len(agent.changes) == calls
    assert agent.vms == vms
    did = execute(params(state, spec("a")), agent, False)
    for key in ("changed", "diff", "failed_names"):
        assert said[key] == did[key]


def test_a_vm_that_differs_is_a_failure_that_names_the_difference(agent, spec):
    execute(params("present", spec("a"), spec("b")), agent, False)
    outcome = execute(params("present", spec("a", vcpus=4, memory_mib=512), spec("b")), agent, False)
    assert outcome["failed"]
    assert outcome["failed_names"] == ["a"]
    assert outcome["vms"][0]["problem"]["code"] == "vm.exists"
    assert "vcpus wanted 4, found 2; memory_mib wanted 512, found 256" in outcome["msg"]
    assert not outcome["changed"]


def test_a_disk_in_another_pool_is_a_difference(agent, spec):
    def pooled(name, pool):
        disk = spec(name)["root_disk"]
        return spec(name, root_disk={**disk, **({"pool": pool} if pool else {})})

    made = execute(params("present", pooled("a", "fast"), pooled("b", None)), agent, False)
    assert {name: vm.get("pool") for name, vm in made["diff"]["after"]["vms"].items()} == {"a": "fast", "b": None}
    for state in ("present", "absent"):
        assert not execute(params(state, pooled("a", "fast")), agent, True).get("failed")
    again = execute(params("present", pooled("a", "slow"), pooled("b", "fast")), agent, False)
    assert again["failed_names"] == ["a", "b"]
    said = [result["problem"]["detail"] for result in again["vms"]]
    assert "pool wanted slow, found fast" in said[0]
    assert "pool wanted fast, found " in said[1]
    # Who asks for none takes the VM where it is, and an agent that knows no pools says nothing of one.
    assert not execute(params("present", pooled("a", None)), agent, False).get("failed")


def test_order_of_cells_and_nics_is_no_difference(agent, spec):
    nics = [{"mac": f"52:54:00:00:00:0{n}", "bridge": "br0"} for n in (1, 2)]
    execute(params("present", spec("a", cells=[0, 1], nics=nics)), agent, False)
    outcome = execute(params("present", spec("a", cells=[1, 0], nics=nics[::-1])), agent, False)
    assert not outcome["changed"]
    assert "failed" not in outcome


def test_a_domain_made_by_hand_is_not_taken_for_ours(agent, spec):
    execute(params("present", spec("a")), agent, False)
    vm_id = spec("a")["vm_id"]
    agent.vms[vm_id] = agent.vms[vm_id].model_copy(update={"managed": False})
    outcome = execute(params("present", spec("a")), agent, False)
    assert "did not make" in outcome["vms"][0]["problem"]["detail"]


@pytest.mark.parametrize("state", ["started", "stopped"])
def test_power_needs_a_vm(agent, spec, state):
    outcome = execute(params(state, {"vm_id": spec("a")["vm_id"]}), agent, False)
    assert outcome["vms"][0]["problem"]["code"] == "vm.not_found"
    assert agent.changes == []


@pytest.mark.parametrize("state", METHOD_OF_STATE)
@pytest.mark.parametrize("power", ["running", "stopped", "paused"])
def test_check_mode_says_of_every_state_what_then_happens(agent, spec, state, power):
    execute(params("present", spec("a")), agent, False)
    vm_id = spec("a")["vm_id"]
    agent.vms[vm_id] = agent.vms[vm_id].model_copy(update={"state": VmState(power)})
    if state == "thawed":
        agent.frozen.add(vm_id)
    size = {"vcpus": 4, "memory_mib": 512} if state == "resized" else {}
    calls = len(agent.changes)
    said = execute(params(state, spec("a", **size)), agent, True)
    assert len(agent.changes) == calls
    did = execute(params(state, spec("a", **size)), agent, False)
    for key in ("changed", "diff", "failed_names"):
        assert said[key] == did[key], key
    again = execute(params(state, spec("a", **size)), agent, True)
    if state not in ("restarted", "reset", "frozen", "thawed"):
        assert not again["changed"]


@pytest.mark.parametrize(
    ("state", "power", "hint"),
    [
        ("restarted", "stopped", "Start"),
        ("restarted", "paused", "Resume"),
        ("reset", "stopped", "Start"),
        ("reset", "paused", "Resume"),
        ("paused", "stopped", "Start"),
        ("resumed", "stopped", "Start"),
        ("resumed", "crashed", "Start"),
        ("frozen", "stopped", "Start"),
        ("frozen", "paused", "Resume"),
    ],
)
def test_a_switch_needs_a_vm_that_is_on(agent, spec, state, power, hint):
    execute(params("present", spec("a")), agent, False)
    vm_id = spec("a")["vm_id"]
    agent.vms[vm_id] = agent.vms[vm_id].model_copy(update={"state": VmState(power)})
    outcome = execute(params(state, {"vm_id": vm_id}), agent, False)
    problem = outcome["vms"][0]["problem"]
    assert (problem["code"], problem["hint"]) == ("vm.wrong_state", f"{hint} it first.")
    assert len(agent.changes) == 1


@pytest.mark.parametrize("state", ["restarted", "stopped"])
def test_what_is_asked_of_a_guest_has_its_time_and_force(agent, spec, state):
    execute(params("present", spec("a")), agent, False)
    execute(params(state, spec("a"), timeout_s=7.0, force=True), agent, False)
    _, sent = agent.changes[-1]
    assert (sent["timeout_s"], sent["force"]) == (7.0, True)


def test_the_end_of_a_freeze_travels(agent, spec):
    execute(params("present", spec("a")), agent, False)
    execute(params("frozen", spec("a"), thaw_after_s=9.0), agent, False)
    method, sent = agent.changes[-1]
    assert (method, sent["thaw_after_s"]) == ("FreezeVms", 9.0)
    assert "force" not in sent


def test_one_vm_failing_leaves_the_others_done(agent, spec):
    agent.failing["b"] = "vm.start_failed"
    outcome = execute(params("present", spec("a"), spec("b"), spec("c")), agent, False)
    assert outcome["failed"]
    assert outcome["changed"]
    assert outcome["failed_names"] == ["b"]
    assert sorted(vm.name for vm in agent.vms.values()) == ["a", "c"]
    assert list(outcome["diff"]["after"]["vms"]) == ["a", "c"]


def test_stop_options_and_identity_of_the_operation_travel(agent, spec):
    execute(params("present", spec("a")), agent, False)
    sent = params("stopped", spec("a"), operation_id="op-7", fence=3, timeout_s=5.0, force=True)
    execute(sent, agent, False)
    assert agent.changes[-1] == (
        "StopVms",
        {"operation_id": "op-7", "fence": 3, "vm_ids": [spec("a")["vm_id"]], "timeout_s": 5.0, "force": True},
    )


def test_more_vms_than_a_call_takes_go_in_several(agent, spec):
    outcome = execute(params("present", *(spec(f"vm-{n}") for n in range(300))), agent, False)
    assert [len(sent["vms"]) for _, sent in agent.changes] == [256, 44]
    assert len({sent["operation_id"] for _, sent in agent.changes}) == 1
    assert [r["name"] for r in outcome["vms"]] == [f"vm-{n}" for n in range(300)]


@pytest.mark.parametrize(
    ("vms", "said"),
    [
        ([{"vm_id": "../../etc"}], "not a UUID"),
        ([{"vm_id": "00000000-0000-0000-0000-000000000001"}] * 2, "given twice"),
        ([{"vm_id": "00000000-0000-0000-0000-000000000001"}], "needs name, vcpus, memory_mib, cells, root_disk"),
    ],
)
def test_a_bad_list_is_refused_before_anything_is_asked(agent, vms, said):
    with pytest.raises(ProblemError, match=said):
        execute(params("present", *vms), agent, False)
    assert agent.requests == []


def test_an_id_may_be_spelled_in_capitals(agent, spec):
    execute(params("present", spec("a")), agent, False)
    outcome = execute(params("present", spec("a", vm_id=spec("a")["vm_id"].upper())), agent, False)
    assert not outcome["changed"]
    assert "failed" not in outcome


def test_user_data_and_tags_appear_in_no_result(agent, spec):
    vm = spec("a", user_data="#cloud-config\npassword: hunter2\n", tags={"secret": "hunter2"})
    outcome = execute(params("present", vm), agent, False)
    outcome = [outcome, execute(params("present", vm), agent, False), execute(params("absent", vm), agent, True)]
    assert "hunter2" not in json.dumps(outcome)


def test_agent_vm_is_a_list_of_one_laid_open(agent, spec):
    one = {**dict.fromkeys(agent_arguments.VM), **params("present"), **spec("a")}
    result = agent_actions.agent_vm(one, agent, False)
    assert (result["changed"], result["name"], result["vm"]["state"]) == (True, "a", "running")
    failed = agent_actions.agent_vm({**one, "vcpus": 4}, agent, False)
    assert failed["failed"]
    assert failed["problem"]["code"] == "vm.exists"


def test_info_by_id_and_by_name(agent, spec):
    execute(params("present", spec("a"), spec("b"), spec("c")), agent, False)

    def names(vm_ids=(), names=()):
        found = agent_actions.agent_vm_info({"vm_ids": list(vm_ids), "names": list(names)}, agent, False)
        assert not found["changed"]
        return [vm["name"] for vm in found["vms"]]

    assert names() == ["a", "b", "c"]
    assert names(names=["b", "nobody"]) == ["b"]
    assert names(vm_ids=[spec("c")["vm_id"]]) == ["c"]
    assert names(vm_ids=[spec("c")["vm_id"]], names=["a"]) == ["a", "c"]


def test_agent_info_with_and_without_the_report(agent):
    assert agent_actions.agent_info({"report": True}, agent, False)["report"]["bridges"] == ["br0"]
    assert "report" not in agent_actions.agent_info({"report": False}, agent, False)
