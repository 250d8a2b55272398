# SPDX-License-Identifier: Apache-2.0
"""vm, vm_info and host_info against a scripted orchestrator."""

from __future__ import annotations

import json
import re

import pytest
from ansible_collections.ppec.cloud.plugins.module_utils.orchestrator_actions import ACTIONS, VM, warnings_of
from ansible_collections.ppec.cloud.plugins.module_utils.orchestrator_client import OrchestratorClient
from ansible_collections.ppec.cloud.plugins.module_utils.problem import ProblemError
from orchestrator_double import TOKEN, FakeOrchestrator, api_of

from ppec_contract.api_vms import VmRecord
from ppec_contract.vm import VmState


@pytest.fixture
def orchestrator():
    return FakeOrchestrator()


@pytest.fixture
def api(orchestrator, certificates):
    with api_of(orchestrator, *certificates.issue("ppec://orchestrator/main")) as url:
        yield {"api_url": url, "token": TOKEN, "ca_path": str(certificates.path), "request_timeout_s": 10.0}


@pytest.fixture
def do(api):
    def perform(module="vm", check_mode=False, connection=None, **options):
        options = {"name": "web-1", **options} if module == "vm" else {"name": None, **options}
        if module == "vm":
            defaults = {name: option.get("default") for name, option in VM["argument_spec"].items()}
            options = {**defaults, **options}
        params = {**options, **api, **(connection or {})}
        return ACTIONS[module][1](params, OrchestratorClient(params, sleep=lambda _: None), check_mode)

    return perform


WEB = {"flavor": "small", "image": "tiny"}


def test_created_once_and_waited_for(do, orchestrator):
    first = do(**WEB, labels={"tier": "web"}, user_data="{{ x }}", policy="spread", cluster="c1")
    second = do(**WEB, labels={"tier": "web"}, user_data="another", policy="pack", cluster="c1")
    assert (first["changed"], second["changed"]) == (True, False)
    assert (first["operation"]["state"], first["vm"]["record"]) == ("succeeded", "active")
    assert orchestrator.changes == [
        (
            "/v1/vms",
            {
                "name": "web-1", **WEB, "labels": {"tier": "web"}, "user_data": "{{ x }}", "policy": "spread",
                "cluster": "c1",
            },
        )
    ]  # fmt: skip
    assert "{{ x }}" not in json.dumps([first, second])
    assert second["diff"]["before"] == second["diff"]["after"] == first["diff"]["after"]


def test_a_task_warns_of_what_n_plus_one_warned_of(do):
    assert warnings_of(do(**WEB)) == warnings_of(do(**WEB)) == warnings_of(do(state="absent")) == []
    exposed = {"domain": "h1", "vm": "db", "without_place": 2}
    (warning,) = warnings_of({"operation": {"exposed": [exposed]}})
    assert warning == "h1 is exposed: of the VMs that its loss ends, so many have no place then: 2, db first"


def test_a_pool_is_asked_for_once_and_compared_where_it_is_given(do, orchestrator):
    first, second, third = do(**WEB, pool="ssd"), do(**WEB, pool="ssd"), do(**WEB)
    assert [first["changed"], second["changed"], third["changed"]] == [True, False, False]
    assert orchestrator.changes == [("/v1/vms", {"name": "web-1", **WEB, "pool": "ssd", "policy": "balanced"})]
    assert first["vm"]["pool"] == "ssd"


def sizes(result):
    return [{key: result["diff"][when].get(key) for key in ("vcpus", "memory_mib")} for when in ("before", "after")]


@pytest.mark.parametrize("options", [{**WEB, "state": "present"}, {"state": "resized"}])
def test_a_vm_of_another_size_is_resized_once(do, orchestrator, options):
    do(**WEB)
    wanted = {"vcpus": 4, "memory_mib": 256}
    said = do(**options, **wanted, check_mode=True)
    assert len(orchestrator.changes) == 1
    first, second = do(**options, **wanted, timeout_s=7.0), do(**options, **wanted)
    assert (said["changed"], first["changed"], second["changed"]) == (True, True, False)
    assert said["diff"] == first["diff"]
    assert sizes(first) == [{"vcpus": 2, "memory_mib": 512}, wanted]
    # Grown at once, and smaller after its next start.
    assert first["resized"] == {"vcpus": "now", "memory_mib": "next_start"}
    assert (said["resized"], second["resized"]) == (None, None)
    assert orchestrator.changes[1:] == [("/v1/vms/web-1", {**wanted, "timeout_s": 7.0})]
    # What is left out stays.
    third = do(**options, memory_mib=512)
    assert sizes(third) == [wanted, {"vcpus": 4, "memory_mib": 512}]
    assert orchestrator.changes[2:] == [("/v1/vms/web-1", {"memory_mib": 512, "timeout_s": 30.0})]
    assert not do(**options, vcpus=4)["changed"]
    assert not do(**WEB)["changed"]


def test_one_that_is_made_gets_its_size_after_its_flavor_s(do, orchestrator):
    said = do(**WEB, vcpus=8, memory_mib=512, check_mode=True)
    made = do(**WEB, vcpus=8, memory_mib=512)
    assert orchestrator.changes[1:] == [("/v1/vms/web-1", {"vcpus": 8, "timeout_s": 30.0})]
    assert (said["changed"], made["changed"]) == (True, True)
    assert made["resized"] == {"vcpus": "now", "memory_mib": "unchanged"}
    assert (said["diff"]["before"], made["diff"]["before"]) == ({}, {})
    assert said["diff"]["after"].items() <= made["diff"]["after"].items()
    assert not do(**WEB, vcpus=8, memory_mib=512)["changed"]
    # What isn't waited for can't be resized yet; the next run does.
    assert do(name="b", **WEB, vcpus=8, wait=False)["changed"]
    assert [path for path, _ in orchestrator.changes[2:]] == ["/v1/vms"]
    assert do(name="b", **WEB, vcpus=8)["changed"]
    assert not do(name="b", **WEB, vcpus=8)["changed"]


def test_a_resize_that_is_refused_fails_the_task(do, orchestrator):
    do(**WEB)
    orchestrator.operation_problem = "host.no_capacity"
    with pytest.raises(ProblemError) as refused:
        do(state="resized", vcpus=64)
    assert refused.value.code == "host.no_capacity"


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"state": "resized"}, "request.invalid"),
        ({"state": "started", "vcpus": 4}, "request.invalid"),
        ({"state": "absent", "memory_mib": 512}, "request.invalid"),
        ({"name": "other", "state": "resized", "vcpus": 4}, "vm.not_found"),
    ],
)
def test_a_size_where_it_counts_for_nothing_is_refused(do, orchestrator, options, code, check_mode):
    do(**WEB)
    with pytest.raises(ProblemError) as refused:
        do(**options, check_mode=check_mode)
    assert refused.value.code == code
    assert len(orchestrator.changes) == 1


def test_frozen_and_thawed_are_known_from_the_host(do, orchestrator):
    do(**WEB)
    assert not do(state="thawed")["changed"]
    for state, body in (("frozen", {"action": "freeze", "thaw_after_s": 9.0}), ("thawed", {"action": "thaw"})):
        said = do(state=state, thaw_after_s=9.0, check_mode=True)
        did = do(state=state, thaw_after_s=9.0)
        again = do(state=state, thaw_after_s=9.0)
        assert (said["changed"], did["changed"], again["changed"]) == (True, True, False)
        assert orchestrator.changes[-1] == ("/v1/vms/actions", {"vms": ["web-1"], **body})
        assert do("vm_guest_info", name="web-1", timeout_s=3.0)["guest"]["frozen"] is (state == "frozen")
    do(state="stopped")
    assert not do(state="thawed")["changed"]
    with pytest.raises(ProblemError, match="Start it") as refused:
        do(state="frozen")
    assert refused.value.code == "vm.wrong_state"


def test_a_guest_of_no_vm(do):
    with pytest.raises(ProblemError) as refused:
        do("vm_guest_info", name="web-1", timeout_s=5.0)
    assert refused.value.code == "vm.not_found"


def test_networks_are_asked_for_and_only_fixed_addresses_compared(do, orchestrator):
    networks = [{"prefix": "10.0.0.0/24", "address": None}, {"prefix": None, "address": None}]
    do(**WEB, networks=networks)
    assert orchestrator.changes[-1][1]["networks"] == [{"prefix": "10.0.0.0/24"}, {}]
    assert not do(**WEB, networks=networks[:1])["changed"]
    with pytest.raises(ProblemError, match="address wanted fd00::5, found"):
        do(**WEB, networks=[{"prefix": None, "address": "fd00:0::5"}])


POWER = ["started", "stopped", "restarted", "reset", "paused", "resumed"]
# In which a state does something each time, and the state that a VM is brought into first, for it to have work at all.
EACH_TIME = ("restarted", "reset")
BEFORE = {"started": "stopped", "resumed": "paused"}


@pytest.mark.parametrize("state", ["absent", *POWER])
def test_other_states_change_once(do, orchestrator, state):
    do(**WEB)
    if state in BEFORE:
        do(state=BEFORE[state])
    first, second = do(state=state, force=True, timeout_s=3.0), do(state=state)
    assert (first["changed"], second["changed"]) == (True, state in EACH_TIME)
    path, body = orchestrator.changes[-2 if state in EACH_TIME else -1]
    assert path == "/v1/vms/actions"
    assert body["vms"] == ["web-1"]
    asked_of_guests = state in ("stopped", "restarted")
    assert (body.get("force"), body.get("timeout_s")) == ((True, 3.0) if asked_of_guests else (None, None))
    assert ("web-1" in orchestrator.vms) == (state != "absent")


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize(
    ("found", "state", "hint"),
    [
        ("stopped", "restarted", "Start it"),
        ("stopped", "reset", "Start it"),
        ("stopped", "paused", "Start it"),
        ("stopped", "resumed", "Start it"),
        ("paused", "restarted", "Resume it"),
        ("paused", "reset", "Resume it"),
    ],
)
def test_power_states_that_a_vm_can_t_be_brought_into(do, orchestrator, found, state, hint, check_mode):
    do(**WEB)
    do(state=found)
    changes = len(orchestrator.changes)
    with pytest.raises(ProblemError, match=hint) as caught:
        do(state=state, check_mode=check_mode)
    assert (caught.value.code, caught.value.details) == ("vm.wrong_state", {"state": found})
    assert len(orchestrator.changes) == changes


def test_of_a_vm_whose_power_is_unknown_its_host_decides(do, orchestrator):
    do(**WEB)
    for state in POWER:
        orchestrator.vms["web-1"] = orchestrator.vms["web-1"].model_copy(update={"observed": VmState.UNKNOWN})
        assert do(state=state)["changed"], state


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("state", ["present", "absent", *POWER])
def test_check_mode_predicts_and_changes_nothing(do, orchestrator, state, exists):
    if not exists and state in POWER:
        pytest.skip("fails, in check mode and without; tested below")
    if exists:
        do(**WEB)
        if state in BEFORE:
            do(state=BEFORE[state])
    changes = len(orchestrator.changes)
    said = do(**WEB, state=state, check_mode=True)
    assert len(orchestrator.changes) == changes
    did = do(**WEB, state=state)
    assert said["changed"] == did["changed"]
    assert said["diff"]["before"] == did["diff"]["before"]
    assert said["diff"]["after"].items() <= {**did["diff"]["after"]}.items()


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize("state", POWER)
def test_power_needs_a_vm(do, state, check_mode):
    with pytest.raises(ProblemError) as caught:
        do(state=state, check_mode=check_mode)
    assert caught.value.code == "vm.not_found"


@pytest.mark.parametrize("check_mode", [False, True])
@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"flavor": "large"}, "flavor wanted large, found small"),
        ({"image": "big"}, "image wanted big, found tiny"),
        ({"pool": "ssd"}, "pool wanted ssd, found None"),
        ({"vrf": "lab"}, "vrf wanted lab, found prod"),
        ({"host": "h9"}, "host wanted h9, found h1"),
        ({"rack": "r9"}, "rack wanted r9, found r1"),
        ({"cluster": "c9", "datacentre": "dc9"}, "datacentre wanted dc9, found dc1; cluster wanted c9, found c1"),
        ({"labels": {"a": "b"}}, "labels wanted {'a': 'b'}, found {}"),
    ],
)
def test_what_can_t_be_changed_in_place_is_named(do, orchestrator, other, said, check_mode):
    do(**WEB)
    with pytest.raises(ProblemError, match=re.escape(said)) as caught:
        do(**{**WEB, **other}, check_mode=check_mode)
    assert caught.value.code == "vm.exists"
    assert len(orchestrator.changes) == 1


def test_a_vm_being_made_is_waited_for_not_made_again(do, orchestrator):
    do(**WEB, wait=False)
    assert orchestrator.vms["web-1"].record == "creating"
    orchestrator.vms["web-1"] = orchestrator.vms["web-1"].model_copy(update={"operation_id": "op-0"})
    result = do(**WEB)
    assert (result["changed"], result["vm"]["record"]) == (False, "active")
    assert len(orchestrator.changes) == 1


def test_without_waiting_the_operation_is_handed_over(do):
    result = do(**WEB, wait=False)
    assert (result["changed"], result["operation"]["state"]) == (True, "queued")


def test_waiting_has_an_end(do, orchestrator):
    orchestrator.polls = 10**6
    with pytest.raises(ProblemError, match="still queued") as caught:
        do(**WEB, wait_timeout_s=0.05)
    assert caught.value.code == "request.deadline_exceeded"


def test_an_operation_that_fails_fails_the_task_with_the_vm_s_own_reason(do, orchestrator):
    orchestrator.operation_problem = "placement.no_capacity"
    with pytest.raises(ProblemError, match="no host can take it") as caught:
        do(**WEB)
    assert caught.value.code == "placement.no_capacity"


def test_a_create_that_did_not_work_out_can_be_tried_again(do, orchestrator):
    do(**WEB)
    orchestrator.vms["web-1"] = orchestrator.vms["web-1"].model_copy(update={"record": VmRecord.FAILED})
    assert not do(state="absent")["changed"]
    assert do(**WEB)["changed"]


def test_a_lost_answer_is_asked_for_again_and_nothing_made_twice(do, orchestrator):
    orchestrator.faults = ["lose"] * 2
    do(**WEB)
    orchestrator.faults = ["store.unavailable"]
    assert not do(**WEB)["changed"]
    do(state="stopped")
    orchestrator.vms["b"] = orchestrator.vms["web-1"]
    # Lost on the way back of the change itself: GET passes, POST is lost.
    requests = len(orchestrator.requests)
    orchestrator.faults = []
    lose_next_post(orchestrator)
    assert do(name="c", **WEB)["changed"]
    posts = [path for method, path in orchestrator.requests[requests:] if method == "POST"]
    assert posts == ["/v1/vms", "/v1/vms"]
    assert [body["name"] for path, body in orchestrator.changes if path == "/v1/vms"] == ["web-1", "c"]


def lose_next_post(orchestrator):
    plain = orchestrator.post

    def post(*args):
        answer = plain(*args)
        orchestrator.post = plain
        orchestrator.faults.append("lose")
        return answer

    orchestrator.post = post


def test_lists_go_over_all_pages_and_one_can_be_asked_for(do):
    hosts = do("host_info")
    assert [host["name"] for host in hosts["hosts"]] == [f"h{n}" for n in range(5)]
    assert [host["name"] for host in do("host_info", name="h3")["hosts"]] == ["h3"]
    assert do("host_info", name="x")["hosts"] == []
    for name in "abc":
        do(name=name, **WEB)
    assert [vm["name"] for vm in do("vm_info")["vms"]] == ["a", "b", "c"]
    assert do("vm_info", name="../hosts")["vms"] == []


def test_who_it_talks_to(do, certificates, tmp_path, orchestrator):
    cases = [
        ({"token": "wrong"}, "auth.required"),
        ({"ca_path": None}, "auth.wrong_identity"),
        ({"ca_path": "/nowhere"}, "auth.required"),
        ({"api_url": "http://orchestrator.example.net"}, "request.invalid"),
        ({"api_url": "file:///etc/passwd"}, "request.invalid"),
        ({"api_url": "https://127.0.0.1:1"}, "orchestrator.unavailable"),
    ]
    for connection, code in cases:
        with pytest.raises(ProblemError) as caught:
            do(**WEB, connection=connection)
        assert caught.value.code == code, connection
        assert TOKEN not in str(caught.value)
    assert orchestrator.changes == []


def test_a_host_s_certificate_is_no_orchestrator_s(do, certificates, orchestrator):
    with api_of(orchestrator, *certificates.issue("ppec://host/h1")) as url, pytest.raises(ProblemError) as caught:
        do(**WEB, connection={"api_url": url})
    assert caught.value.code == "auth.wrong_identity"
    assert orchestrator.requests == []


def test_by_the_real_ansible_playbook(api, orchestrator, ansible_playbook):
    play = [
        {
            "hosts": "all",
            "connection": "local",
            "gather_facts": False,
            "module_defaults": {"group/ppec.cloud.ppec": {"ca_path": api["ca_path"]}},
            "tasks": [
                {"ppec.cloud.vm": {"name": "web-1", **WEB, "user_data": "{{ lookup('env', 'USER_DATA') }}"}},
                {"ppec.cloud.vm_info": {"name": "web-1"}},
                {"ppec.cloud.host_info": {}},
                {"ppec.cloud.vm": {"name": "web-1", **WEB, "flavor": "large"}},
            ],
        }
    ]
    env = {"PPEC_SERVER": api["api_url"], "PPEC_TOKEN": TOKEN, "USER_DATA": "hunter2 {{ 1 }}"}
    run = ansible_playbook(play, {"h1": {}}, "-vvv", env=env)
    created, vms, hosts, failed = (result for _, _, result in run.tasks)
    assert created["changed"], run.output
    assert vms["vms"][0]["record"] == "active"
    assert len(hosts["hosts"]) == 5
    assert (run.returncode, failed["problem"]["code"]) == (2, "vm.exists")
    assert orchestrator.changes[0][1]["user_data"] == "hunter2 {{ 1 }}"
    assert TOKEN not in run.output
    assert "hunter2" not in run.output
    again = ansible_playbook([{**play[0], "tasks": play[0]["tasks"][:1]}], {"h1": {}}, "--check", "--diff", env=env)
    assert not again.result()["changed"]
