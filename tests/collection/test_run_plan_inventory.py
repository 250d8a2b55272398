# SPDX-License-Identifier: Apache-2.0
"""The inventory plugin `ppec.cloud.run_plan`: a plan's hosts and nothing else, at once or once there is a plan."""

from __future__ import annotations

import json
import os
import threading

import pytest
from ansible.errors import AnsibleParserError
from ansible.inventory.data import InventoryData
from ansible.parsing.dataloader import DataLoader
from ansible_collections.ppec.cloud.plugins.inventory.run_plan import InventoryModule

WAIT_S = 30.0


def parsed(source):
    inventory = InventoryData()
    InventoryModule().parse(inventory, DataLoader(), str(source))
    return inventory


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"run": {"operation_id": "{{ 7 * 6 }}"}, "hosts": {"h2": ["b"], "h1": ["a"]}}))
    return path


def test_hosts_are_the_plans_and_know_where_it_is(tmp_path, plan):
    source = tmp_path / "now.run_plan"
    source.write_text(f"{plan}\n")
    inventory = parsed(source)
    assert list(inventory.hosts) == ["h1", "h2"]
    assert [host.name for host in inventory.groups["ppec_run"].hosts] == ["h1", "h2"]
    variables = inventory.groups["ppec_run"].get_vars()
    assert variables["ppec_plan_file"] == str(plan)
    assert variables["ansible_connection"] == "local"
    assert set(variables) == {"ppec_plan_file", "ansible_connection", "ansible_python_interpreter"}
    assert all(set(host.vars) <= {"inventory_file", "inventory_dir"} for host in inventory.hosts.values())


def test_fifo_is_waited_for(tmp_path, plan):
    source = tmp_path / "later.run_plan"
    os.mkfifo(source)
    gate = os.open(source, os.O_RDWR)
    found = []
    reader = threading.Thread(target=lambda: found.append(parsed(source)), daemon=True)
    reader.start()
    reader.join(timeout=0.2)
    assert reader.is_alive(), "there is no plan yet"
    os.write(gate, f"{plan}\n".encode())
    reader.join(timeout=WAIT_S)
    os.close(gate)
    assert list(found[0].hosts) == ["h1", "h2"]


@pytest.mark.parametrize(
    "content",
    ["", "not json", "[]", "{}", '{"hosts": 1}', '{"hosts": null}'],
    ids=["empty", "text", "list", "no-hosts", "number", "null"],
)
def test_what_is_no_plan_is_named(tmp_path, content):
    plan = tmp_path / "plan.json"
    plan.write_text(content)
    source = tmp_path / "now.run_plan"
    source.write_text(f"{plan}\n")
    with pytest.raises(AnsibleParserError, match=r"plan\.json can't be read"):
        parsed(source)


def test_source_that_ends_without_a_plan_is_no_empty_inventory(tmp_path):
    source = tmp_path / "never.run_plan"
    source.write_text("")
    with pytest.raises(AnsibleParserError, match="the plan that was to come can't be read"):
        parsed(source)


@pytest.mark.parametrize(("name", "taken"), [("now.run_plan", True), ("hosts.ini", False), ("missing", False)])
def test_only_its_own_sources_are_taken(tmp_path, name, taken):
    source = tmp_path / name
    if name != "missing":
        source.write_text("")
    assert InventoryModule().verify_file(str(source)) is taken
