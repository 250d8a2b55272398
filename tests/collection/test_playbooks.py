# SPDX-License-Identifier: Apache-2.0
"""The real ansible-playbook on the collection: tenant text stays text, one task a host, nothing leaks."""

from __future__ import annotations

import json
import uuid

import pytest
from conftest import APPLY_PLAN

from ppec_contract.run import RunEvent


def variables(fleet, host):
    """What an inventory says of a host."""
    return {f"ppec_{name}": value for name, value in fleet.connection(host).items() if name != "deadline_s"}


def task(module, play=None, **options):
    name = module.rpartition(".")[2]
    return [
        {
            "hosts": "all",
            "gather_facts": False,
            "connection": "local",
            "tasks": [{"name": name, module: options, **(play or {}).pop("task", {})}],
            **(play or {}),
        }
    ]


def hostile_texts(canary):
    """Each would make the canary file if it were evaluated by the thing it is meant for."""
    touch = f"touch {canary}"
    return [
        f"{{{{ lookup('pipe', '{touch}') }}}}",
        f"{{{{ lookup('ansible.builtin.pipe', '{touch}') }}}}",
        f"{{% set x = lookup('pipe', '{touch}') %}}{{{{ x }}}}",
        f"{{{{ cycler.__init__.__globals__.os.system('{touch}') }}}}",
        f"#jinja2: variable_start_string: '[%', variable_end_string: '%]'\n[% lookup('pipe', '{touch}') %]",
        f"$({touch})",
        f"`{touch}`; {touch} | {touch} && {touch}",
        f"!!python/object/apply:os.system ['{touch}']",
        f"{{% raw %}}{{% endraw %}}{{{{ 1 + 1 }}}} {{# {touch} #}}",
        "<domain>&amp;]]><!ENTITY x SYSTEM 'file:///etc/passwd'>",
        "\"'\\ \u2028 \ud7ff ﷽ ../../etc/passwd %n%s ${jndi:x}\r\n---\n...\n",
    ]


def hostile_plan(fleet, spec, canary):
    texts = hostile_texts(canary)
    vms = [
        spec(f"vm-{n}", user_data=f"#cloud-config\n{text}\n", tags={f"tag {n} {text}"[:64].strip(): text[:256]})
        for n, text in enumerate(texts)
    ]
    for vm in vms:
        # Control characters are refused in tags, as the contract says; user data carries them.
        vm["tags"] = {k: v for k, v in vm["tags"].items() if (k + v).isprintable()}
    return fleet.plan({"h1": {"vms": vms}}), vms


def events_of(plan):
    from pathlib import Path

    return [RunEvent.model_validate_json(line) for line in Path(plan["events_path"]).read_bytes().splitlines()]


@pytest.mark.parametrize("playbook", [APPLY_PLAN, "ppec.cloud.apply_plan"])
def test_a_plan_reaches_each_host_in_one_task_and_one_session(make_fleet, spec, ansible_playbook, playbook):
    fleet = make_fleet("h1", "h2", "h3")
    plan = fleet.plan({host: {"vms": [spec(f"{host}-{n}") for n in range(3)]} for host in fleet.hosts})
    run = ansible_playbook(playbook, {h: {} for h in fleet.hosts}, "-e", f"ppec_plan_file={fleet.write_plan(plan)}")
    assert run.returncode == 0, run.output
    assert sorted(host for host, _, _ in run.tasks) == ["h1", "h2", "h3"]
    for host in fleet.hosts.values():
        assert host.agent.connections == 1
        assert [method for method, _ in host.agent.requests] == ["CreateVms"]
        assert len(host.agent.vms) == 3
        assert run.result(host.name)["proxy_sessions"] == 1
    events = events_of(plan)
    assert sum(event.accepted for event in events) == 3
    assert sorted(event.result.name for event in events if event.result) == sorted(
        f"{host}-{n}" for host in fleet.hosts for n in range(3)
    )


def test_a_failed_host_fails_alone(make_fleet, spec, ansible_playbook):
    fleet = make_fleet("h1", "h2")
    fleet.hosts["h1"].agent.failing["a"] = "vm.start_failed"
    plan = fleet.plan({"h1": {"vms": [spec("a"), spec("b")]}, "h2": {"vms": [spec("c")]}})
    plan["hosts"]["h2"]["port"] = fleet.hosts["h1"].port
    run = ansible_playbook(APPLY_PLAN, {"h1": {}, "h2": {}}, "-e", f"ppec_plan_file={fleet.write_plan(plan)}")
    assert run.returncode == 2
    assert not run.result("h1").get("failed")
    assert run.result("h1")["failed_names"] == ["a"]
    assert run.result("h2")["code"] == "auth.wrong_identity"
    assert [(e.host, e.problem.code) for e in events_of(plan) if e.problem] == [("h2", "auth.wrong_identity")]


def test_hostile_text_goes_through_a_plan_byte_for_byte_and_is_never_evaluated(make_fleet, spec, ansible_playbook):
    fleet = make_fleet("h1")
    canary = fleet.folder / "canary"
    plan, vms = hostile_plan(fleet, spec, canary)
    run = ansible_playbook(APPLY_PLAN, {"h1": {}}, "-vvvv", "--diff", "-e", f"ppec_plan_file={fleet.write_plan(plan)}")
    assert run.returncode == 0, run.output
    assert not canary.exists()
    agent = fleet.hosts["h1"].agent
    ((_, sent),) = agent.requests
    assert sent["vms"] == vms
    assert {spec.user_data for spec in agent.specs.values()} == {vm["user_data"] for vm in vms}
    assert "touch" not in run.output
    assert "touch" not in json.dumps(run.tasks)


def test_the_same_text_given_as_a_variable_would_have_been_evaluated(make_fleet, spec, ansible_playbook):
    """The control of the tests around it: this is why a run gets a plan file. Its canary does appear."""
    fleet = make_fleet("h1")
    canary = fleet.folder / "canary"
    given = {"vms": [spec("a", user_data=hostile_texts(canary)[0])]}
    play = task("ppec.cloud.agent_vms", vms="{{ vms }}")
    ansible_playbook(play, {"h1": variables(fleet, "h1")}, "-e", json.dumps(given))
    assert canary.exists()


def test_a_template_as_a_name_is_refused_by_the_host_and_never_evaluated(make_fleet, spec, ansible_playbook):
    names = {f"h{n}": text for n, text in enumerate(hostile_texts("/nowhere/canary"))}
    fleet = make_fleet(*names)
    canary = fleet.folder / "canary"
    names = dict(zip(names, hostile_texts(canary), strict=True))
    plan = fleet.plan({host: {"vms": [{**spec("a"), "name": text}]} for host, text in names.items()})
    hosts = {host: {} for host in names}
    run = ansible_playbook(APPLY_PLAN, hosts, "-vvvv", "-e", f"ppec_plan_file={fleet.write_plan(plan)}")
    assert not canary.exists()
    assert "touch" not in run.output
    for host, text in names.items():
        assert run.result(host)["code"] == "request.invalid"
        ((_, sent),) = fleet.hosts[host].agent.requests
        assert sent["vms"][0]["name"] == text
        assert fleet.hosts[host].agent.vms == {}
    assert sorted(event.host for event in events_of(plan)) == sorted(names)


def test_hostile_text_in_a_play_s_own_vms_when_it_is_marked_or_looked_up(make_fleet, spec, ansible_playbook):
    """A playbook's own text is the author's code; text marked unsafe, or read from a file, is data."""
    fleet = make_fleet("h1")
    canary = fleet.folder / "canary"
    (fleet.folder / "user-data").write_text(f"#cloud-config\n{{{{ lookup('pipe', 'touch {canary}') }}}}\n")
    text = f"{{{{ lookup('pipe', 'touch {canary}') }}}} {{% raw %}}"
    play = json.dumps(
        task(
            "ppec.cloud.agent_vms",
            vms=[
                spec("looked-up", user_data="{{ lookup('ansible.builtin.file', 'user-data', rstrip=False) }}"),
                spec("marked", user_data="UNSAFE", tags={"note": "UNSAFE"}),
            ],
        )
    )
    path = fleet.folder / "play.yml"
    path.write_text(play.replace('"UNSAFE"', f"!unsafe {json.dumps(text)}"))
    run = ansible_playbook(path, {"h1": variables(fleet, "h1")}, "-vvv", "--diff")
    assert run.returncode == 0, run.output
    assert not canary.exists()
    specs = {vm.name: vm for vm in fleet.hosts["h1"].agent.specs.values()}
    assert specs["looked-up"].user_data == (fleet.folder / "user-data").read_text()
    assert specs["marked"].user_data == text
    assert specs["marked"].tags == {"note": text}
    assert "touch" not in json.dumps(run.tasks)


def test_check_mode_then_twice_for_real(make_fleet, spec, ansible_playbook):
    fleet = make_fleet("h1")
    agent = fleet.hosts["h1"].agent
    hosts = {"h1": variables(fleet, "h1")}
    play = task("ppec.cloud.agent_vm", **spec("web-1"))
    check = ansible_playbook(play, hosts, "--check", "--diff")
    assert check.result()["changed"]
    assert agent.changes == []
    first, second = (ansible_playbook(play, hosts, "--diff") for _ in range(2))
    assert (first.result()["changed"], second.result()["changed"]) == (True, False)
    assert check.result()["diff"] == first.result()["diff"]
    assert '"state": "running"' in check.output
    assert len(agent.changes) == 1


def test_defaults_of_the_whole_group_reach_every_agent_module(make_fleet, spec, ansible_playbook):
    fleet = make_fleet("h1")
    connection = fleet.connection("h1")
    defaults = {"module_defaults": {"group/ppec.cloud.ppec": connection}}
    play = task("ppec.cloud.agent_vms", defaults, vms=[spec("a")])
    play[0]["tasks"] += [{"ppec.cloud.agent_vm_info": {"names": ["a"]}}, {"ppec.cloud.agent_info": {"report": False}}]
    run = ansible_playbook(play, {"h1": {}})
    assert run.returncode == 0, run.output
    assert run.result(task=1)["vms"][0]["name"] == "a"
    assert run.result(task=2)["host"] == "h1"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"vms": [{"vm_id": "x", "colour": "red"}]}, "colour"),
        ({}, "vms, plan_file"),
        ({"vms": [], "plan_file": "/p"}, "mutually exclusive"),
        ({"vms": [{"name": "a"}]}, "vm_id"),
        ({"vms": [{"vm_id": "x"}], "state": "melted"}, "melted"),
        ({"vms": [{"vm_id": "x", "vcpus": "many"}]}, "many"),
        ({"plan_file": "/nowhere/plan.json"}, "can't be read"),
    ],
)
def test_bad_arguments_are_refused_before_the_host_hears_of_them(make_fleet, ansible_playbook, options, said):
    fleet = make_fleet("h1")
    run = ansible_playbook(task("ppec.cloud.agent_vms", **options), {"h1": variables(fleet, "h1")})
    assert run.returncode == 2
    assert said in run.result()["msg"]
    assert fleet.hosts["h1"].agent.connections == 0


@pytest.mark.parametrize("elsewhere", [False, True])
def test_without_a_proxy_the_socket_of_the_host_is_used(agent, agent_socket, spec, ansible_playbook, elsewhere):
    """On another machine by the real module, on this one from the worker; both do the same."""
    connection = {"connection": "elsewhere"} if elsewhere else {}
    play = task("ppec.cloud.agent_vms", connection, vms=[spec("a", user_data="hunter2 {{ 1 }}")])
    play[0]["tasks"][0]["ppec.cloud.agent_vms"]["vms"][0]["user_data"] = "{{ lookup('env', 'USER_DATA') }}"
    hosts = {"h1": {"ppec_socket_path": str(agent_socket)}}
    env = {"USER_DATA": "hunter2 {{ 1 }}"}
    check = ansible_playbook(play, hosts, "--check", env=env)
    assert check.result()["changed"], check.output
    assert agent.changes == []
    first, second = (ansible_playbook(play, hosts, "-vvv", env=env) for _ in range(2))
    assert (first.result()["changed"], second.result()["changed"]) == (True, False)
    assert [vm.user_data for vm in agent.specs.values()] == ["hunter2 {{ 1 }}"]
    # Only a module that ran on the host reports how it was called.
    assert ("invocation" in first.result()) == elsewhere
    assert "hunter2" not in first.output


def test_the_host_s_name_is_the_inventory_s_unless_said_otherwise(make_fleet, ansible_playbook):
    fleet = make_fleet("h1")
    named = variables(fleet, "h1")
    named.pop("ppec_host_name")
    play = task("ppec.cloud.agent_info", report=False)
    assert ansible_playbook(play, {"h1": named}).result()["host"] == "h1"
    other = ansible_playbook(play, {"alias": named}).result("alias")
    assert other["problem"]["code"] == "auth.wrong_identity"
    assert ansible_playbook(play, {"alias": {**named, "ppec_host_name": "h1"}}).result("alias")["host"] == "h1"


def test_check_mode_of_a_plan_changes_nothing(make_fleet, spec, ansible_playbook):
    fleet = make_fleet("h1")
    plan = fleet.plan({"h1": {"vms": [spec("a")]}}, operation_id=f"op-{uuid.uuid4().hex[:6]}")
    run = ansible_playbook(APPLY_PLAN, {"h1": {}}, "--check", "-e", f"ppec_plan_file={fleet.write_plan(plan)}")
    assert run.result()["changed"]
    assert fleet.hosts["h1"].agent.changes == []
