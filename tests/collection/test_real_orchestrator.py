# SPDX-License-Identifier: Apache-2.0
"""The orchestrator's modules against the real orchestrator, which runs the collection in turn on a host of its own."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest

from ppec_lab.local_cloud import LocalCloud


@pytest.fixture
def cloud():
    """One fake-hypervisor host; flavor `small`, image `empty`, VRF `blue`."""
    directory = Path(tempfile.mkdtemp(prefix="ppec-coll-", dir="/tmp"))
    made = LocalCloud(directory)
    try:
        made.start(hosts=1)
        yield made
    finally:
        made.remove()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.slow
def test_a_vm_through_its_life(cloud, ansible_playbook):
    given = {"name": "web-1", "flavor": "small", "image": "empty", "vrf": "blue", "labels": {"tier": "{% raw"}}
    tasks = [{"ppec.cloud.host_info": {}}]
    for wanted in (
        {**given, "user_data": "{{ lookup('env', 'USER_DATA') }}"},
        {"name": "web-1", "state": "stopped", "force": True, "timeout_s": 1},
        {"name": "web-1", "state": "started"},
        {**given, "vcpus": 4},
        {"name": "web-1", "state": "frozen", "thaw_after_s": 600},
        {"name": "web-1", "state": "thawed"},
    ):
        tasks += [{"ppec.cloud.vm": wanted, "check_mode": True}, {"ppec.cloud.vm": wanted}, {"ppec.cloud.vm": wanted}]
        tasks.append({"ppec.cloud.vm_info": {"name": "web-1"}})
    tasks.append({"ppec.cloud.vm_guest_info": {"name": "web-1"}})
    tasks.append({"ppec.cloud.vm": {**given, "flavor": "small", "image": "other"}, "ignore_errors": True})
    tasks += [{"ppec.cloud.vm": {"name": "web-1", "state": "absent"}}] * 2
    play = [{"hosts": "all", "connection": "local", "gather_facts": False, "tasks": tasks}]
    # A label may hold what looks like a template; only the play's own text would be rendered.
    path = cloud.directory / "play.yml"
    path.write_text(json.dumps(play).replace('"{% raw"', '!unsafe "{% raw"'))
    env = {**cloud.orchestrator.user_environment(), "USER_DATA": "#!/bin/sh\necho {{ x }} {% y %}\n"}
    env = {name: env[name] for name in ("PPEC_SERVER", "PPEC_TOKEN", "PPEC_CA", "USER_DATA")}
    run = ansible_playbook(path, {"h1": {}}, env=env)
    assert run.returncode == 0, run.output
    hosts, *steps = (result for _, _, result in run.tasks)
    assert [(host["name"], host["liveness"]) for host in hosts["hosts"]] == [("h1", "up")]
    *life, asked, refused, gone, still_gone = steps
    for start in range(0, len(life), 4):
        check, first, second, info = life[start : start + 4]
        assert [check["changed"], first["changed"], second["changed"]] == [True, True, False], run.output
        assert info["vms"][0]["record"] == "active"
    assert [life[n]["vms"][0]["observed"] for n in (3, 7, 11)] == ["running", "stopped", "running"]
    assert life[13]["resized"]["vcpus"] in ("now", "next_start")
    assert life[15]["vms"][0]["vcpus"] == 4
    assert (asked["guest"]["name"], asked["guest"]["agent_connected"]) == ("web-1", True)
    assert life[1]["vm"]["labels"] == {"tier": "{% raw"}
    assert refused["problem"]["code"] == "vm.exists"
    assert (gone["changed"], still_gone["changed"]) == (True, False)
    assert cloud.domains() == {"h1": []}
    assert cloud.addresses_in_use() == set()


@pytest.mark.slow
def test_a_list_of_vms_with_an_address_each(cloud, ansible_playbook):
    common = {"flavor": "small", "image": "empty", "vrf": "blue"}
    listed = [{"name": f"web-{n}", "networks": [{"address": f"198.51.100.{n}0"}]} for n in (1, 2, 3)]
    taken = [{"name": "late", "networks": [{"address": "198.51.100.20"}]}, {"name": "other"}]
    tasks = [
        {"ppec.cloud.vms": {**common, "vms": listed}},
        {"ppec.cloud.vms": {**common, "vms": listed}},
        {"ppec.cloud.vms": {**common, "vms": taken}, "ignore_errors": True},
        {"ppec.cloud.vm_info": {}},
        {"ppec.cloud.vms": {"state": "absent", "vms": [{"name": one["name"]} for one in [*listed, *taken]]}},
    ]
    play = [{"hosts": "all", "connection": "local", "gather_facts": False, "tasks": tasks}]
    env = {name: cloud.orchestrator.user_environment()[name] for name in ("PPEC_SERVER", "PPEC_TOKEN", "PPEC_CA")}
    run = ansible_playbook(play, {"h1": {}}, env=env)
    assert run.returncode == 0, run.output
    made, again, refused, there, gone = (result for _, _, result in run.tasks)
    assert [made["changed"], again["changed"], gone["changed"]] == [True, False, True]
    got = {vm["name"]: [one["address"] for one in vm["addresses"]] for vm in made["vms"]}
    assert got == {one["name"]: [one["networks"][0]["address"]] for one in listed}
    assert refused["problem"]["code"] == "address.in_use"
    assert "vm late: address 198.51.100.20" in refused["msg"]
    assert [vm["name"] for vm in there["vms"]] == ["web-1", "web-2", "web-3"]
    assert cloud.addresses_in_use() == set()
