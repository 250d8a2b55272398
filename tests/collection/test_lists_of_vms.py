# SPDX-License-Identifier: Apache-2.0
"""The module `vms` against a scripted orchestrator."""

from __future__ import annotations

import pytest
from ansible_collections.ppec.cloud.plugins.module_utils.orchestrator_actions import ACTIONS, VMS
from ansible_collections.ppec.cloud.plugins.module_utils.orchestrator_client import OrchestratorClient
from ansible_collections.ppec.cloud.plugins.module_utils.problem import ProblemError
from orchestrator_double import TOKEN, FakeOrchestrator, api_of

OF_EACH = VMS["argument_spec"]["vms"]["options"]


@pytest.fixture
def orchestrator():
    return FakeOrchestrator()


@pytest.fixture
def api(orchestrator, certificates):
    with api_of(orchestrator, *certificates.issue("ppec://orchestrator/main")) as url:
        yield {"api_url": url, "token": TOKEN, "ca_path": str(certificates.path), "request_timeout_s": 10.0}


@pytest.fixture
def do(api):
    """As the module is called: what a playbook leaves out is None, or the default."""

    def perform(*vms, check_mode=False, **options):
        defaults = {name: option.get("default") for name, option in VMS["argument_spec"].items()}
        params = {**defaults, **options, **api, "vms": [{**dict.fromkeys(OF_EACH), **one} for one in vms]}
        return ACTIONS["vms"][1](params, OrchestratorClient(params, sleep=lambda _: None), check_mode)

    return perform


def network(address=None, prefix=None):
    return {"address": address, "prefix": prefix}


ALL = {"flavor": "small", "image": "tiny", "cluster": "c1"}
WEB = {"name": "web-1", "networks": [network("10.0.0.11")]}
DB = {"name": "db-1", "flavor": "large", "host": "h2", "networks": [network("10.0.0.12"), network(prefix="fd00::/64")]}


def test_a_list_is_made_in_one_request_and_once(do, orchestrator):
    said = do(WEB, DB, **ALL, check_mode=True)
    assert orchestrator.changes == []
    first, second = do(WEB, DB, **ALL), do(DB, WEB, **ALL)
    assert [said["changed"], first["changed"], second["changed"]] == [True, True, False]
    items = [
        {"name": "web-1", "networks": [{"address": "10.0.0.11"}]},
        {
            "name": "db-1", "flavor": "large", "host": "h2",
            "networks": [{"address": "10.0.0.12"}, {"prefix": "fd00::/64"}],
        },
    ]  # fmt: skip
    assert orchestrator.changes == [("/v1/vms", {**ALL, "policy": "balanced", "items": items})]
    assert [vm["name"] for vm in second["vms"]] == ["db-1", "web-1"]
    assert [vm["record"] for vm in first["vms"]] == ["active"] * 2
    assert first["operation"]["state"] == "succeeded"
    for name in ("web-1", "db-1"):
        assert said["diff"]["before"][name] == first["diff"]["before"][name] == {}
        assert said["diff"]["after"][name].items() <= first["diff"]["after"][name].items()
    assert second["diff"]["before"] == second["diff"]["after"]


def test_only_those_that_lack_are_made_with_what_networks_all_have(do, orchestrator):
    """The address of all is that of the one VM which says none, also when that is there."""
    both = [{"name": "a"}, WEB]
    do(both[0], **ALL, networks=[network("10.0.0.9")])
    assert do(*both, **ALL, networks=[network("10.0.0.9")])["changed"]
    assert [body["items"] for _, body in orchestrator.changes] == [
        [{"name": "a", "networks": [{"address": "10.0.0.9"}]}],
        [{"name": "web-1", "networks": [{"address": "10.0.0.11"}]}],
    ]
    assert all("networks" not in body for _, body in orchestrator.changes)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"networks": [network("10.0.0.99")]}, "address wanted 10.0.0.99, found 10.0.0.11"),
        ({"flavor": "large"}, "flavor wanted large, found small"),
        ({"host": "h4"}, "host wanted h4, found h1"),
        ({"rack": "r9"}, "rack wanted r9, found r1"),
    ],
)
def test_what_differs_is_named_before_anything_is_made(do, orchestrator, other, said):
    do(WEB, **ALL)
    with pytest.raises(ProblemError, match=said) as refused:
        do({**WEB, **other}, DB, **ALL)
    assert (refused.value.code, refused.value.subject) == ("vm.exists", "vm web-1")
    assert len(orchestrator.changes) == 1


def test_a_list_is_deleted_as_far_as_it_is_there(do, orchestrator):
    do(WEB, DB, **ALL)
    gone = [{"name": "web-1"}, {"name": "db-1"}, {"name": "never"}]
    said, first, second = (
        do(*gone, state="absent", check_mode=True),
        do(*gone, state="absent"),
        do(*gone, state="absent"),
    )
    assert [said["changed"], first["changed"], second["changed"]] == [True, True, False]
    assert orchestrator.changes[1:] == [("/v1/vms/actions", {"action": "delete", "vms": ["web-1", "db-1"]})]
    assert orchestrator.vms == {}
    assert said["diff"] == first["diff"]


def test_a_name_is_in_the_list_once(do, orchestrator):
    with pytest.raises(ProblemError, match="vms hold the name web-1 twice"):
        do(WEB, WEB, **ALL)
    assert orchestrator.requests == []


def test_a_refusal_is_the_task_s(do, orchestrator):
    orchestrator.faults = ["address.in_use"]
    with pytest.raises(ProblemError) as refused:
        do(WEB, DB, **ALL)
    assert refused.value.code == "address.in_use"
    assert orchestrator.vms == {}
    orchestrator.operation_problem = "placement.no_capacity"
    with pytest.raises(ProblemError) as failed:
        do(WEB, DB, **ALL)
    assert failed.value.code == "placement.no_capacity"


def test_by_the_real_ansible_playbook(api, orchestrator, ansible_playbook):
    listed = [{"name": "web-1", "networks": [{"address": "10.0.0.11"}]}, {"name": "db-1", "host": "h2"}]
    tasks = [
        {"ppec.cloud.vms": {**ALL, "vms": listed}},
        {"ppec.cloud.vms": {**ALL, "vms": listed}},
        {"ppec.cloud.vms": {"state": "absent", "vms": listed}},
        {"ppec.cloud.vms": {"vms": listed}},
    ]
    play = {
        "hosts": "all",
        "connection": "local",
        "gather_facts": False,
        "module_defaults": {"group/ppec.cloud.ppec": {"ca_path": api["ca_path"]}},
        "tasks": tasks,
    }
    run = ansible_playbook([play], {"h1": {}}, env={"PPEC_SERVER": api["api_url"], "PPEC_TOKEN": TOKEN})
    made, again, gone, invalid = (result for _, _, result in run.tasks)
    assert (made["changed"], again["changed"], gone["changed"]) == (True, False, True), run.output
    assert [vm["name"] for vm in made["vms"]] == ["web-1", "db-1"]
    assert "image" in invalid["msg"]
    items = orchestrator.changes[0][1]["items"]
    assert items == [{"name": "web-1", "networks": [{"address": "10.0.0.11"}]}, {"name": "db-1", "host": "h2"}]
