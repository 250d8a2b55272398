# SPDX-License-Identifier: Apache-2.0
"""The collection against the contract: the generated table, the argument specs, the documents."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
import yaml
from ansible_collections.ppec.cloud.plugins.module_utils import agent_arguments, orchestrator_actions
from ansible_collections.ppec.cloud.plugins.module_utils.agent_actions import ACTIONS as AGENT_ACTIONS
from ansible_collections.ppec.cloud.plugins.module_utils.agent_vms import METHOD_OF_STATE, REQUIRED_TO_CREATE
from ansible_collections.ppec.cloud.plugins.module_utils.orchestrator_client import ENDED
from ansible_collections.ppec.cloud.plugins.plugin_utils.run_plan import VIEWS
from conftest import ROOT

from ppec_contract.agent import METHODS, CreateVms, DeleteVms, FreezeVms, StopVms, VmResult
from ppec_contract.api_operations import OperationState
from ppec_contract.api_vms import VmResize, VmsAction, VmsCreate
from ppec_contract.module_table import TABLE_PATH, render
from ppec_contract.run import PlanAction
from ppec_contract.vm import VmInfo, VmSpec, VmState

COLLECTION = ROOT / "collections/ppec"
MODULES = sorted(path.stem for path in (COLLECTION / "plugins/modules").glob("[a-z]*.py"))
RUNTIME = yaml.safe_load((COLLECTION / "meta/runtime.yml").read_text())


def test_the_generated_table_is_current():
    """`python -m ppec_contract.module_table` rewrites it."""
    assert (ROOT / TABLE_PATH).read_text() == render()


class Schema:
    """One JSON schema node, with references followed and `null` alternatives dropped."""

    def __init__(self, node: dict[str, Any], root: dict[str, Any]) -> None:
        self.root = root
        while True:
            if "$ref" in node:
                beside = {k: v for k, v in node.items() if k != "$ref"}
                node = {**root["$defs"][node["$ref"].rpartition("/")[2]], **beside}
            elif "anyOf" in node:
                kinds = [n for n in node["anyOf"] if n.get("type") != "null"]
                # Alternatives that are all text (an IPv4 or an IPv6 address) are text.
                node = {**kinds[0], **{k: v for k, v in node.items() if k != "anyOf"}}
            else:
                break
        self.node = node

    @property
    def fields(self) -> dict[str, Schema]:
        return {name: Schema(node, self.root) for name, node in self.node["properties"].items()}

    @property
    def required(self) -> set[str]:
        return set(self.node.get("required", ()))


def schema_of(model) -> Schema:
    root = model.model_json_schema()
    return Schema(root, root)


ANSIBLE_TYPE = {
    "string": "str",
    "integer": "int",
    "number": "float",
    "boolean": "bool",
    "array": "list",
    "object": "dict",
}


def require_same(options, schema, *, required_elsewhere=frozenset(), where=""):
    """Every field is an option of the same type, choices, default and necessity, and the other way round."""
    assert set(options) == set(schema.fields), where
    for name, field in schema.fields.items():
        option, at = options[name], f"{where}.{name}"
        assert option["type"] == ANSIBLE_TYPE[field.node["type"]], at
        assert option.get("choices") == field.node.get("enum"), at
        if name not in required_elsewhere:
            assert option.get("required", False) == (name in schema.required), at
        if "default" in option:
            assert option["default"] == field.node["default"], at
        if option["type"] == "list":
            item = Schema(field.node["items"], field.root)
            assert option["elements"] == ANSIBLE_TYPE[item.node["type"]], at
            if "options" in option:
                require_same(option["options"], item, where=at)
        elif "properties" in field.node:
            require_same(option["options"], field, where=at)


def test_a_vm_s_options_are_the_contract_s_vm():
    schema = schema_of(VmSpec)
    require_same(agent_arguments.VM, schema, required_elsewhere=set(REQUIRED_TO_CREATE) - {"vm_id"})
    assert set(REQUIRED_TO_CREATE) == schema.required


def test_the_options_of_a_change_are_those_of_its_methods():
    stop, create, delete, freeze = (schema_of(model) for model in (StopVms, CreateVms, DeleteVms, FreezeVms))
    ours = {**agent_arguments.CHANGE}
    del ours["state"]
    fields = {**stop.fields, **freeze.fields}
    del fields["vm_ids"]
    assert set(ours) == set(fields)
    for name in ours:
        assert ours[name]["type"] == ANSIBLE_TYPE[fields[name].node["type"]], name
    for name in ("timeout_s", "force", "thaw_after_s"):
        assert ours[name]["default"] == fields[name].node["default"]
    assert set(create.fields) == {"operation_id", "fence", "vms"}
    assert set(delete.fields) == {"operation_id", "fence", "vm_ids"}


def test_every_changing_method_has_a_state_and_a_plan_action():
    changing = {name for name, method in METHODS.items() if method.changes}
    assert changing | set(VIEWS) == set(PlanAction.__args__)
    assert not any(METHODS[name].changes or METHODS[name].streams for name in VIEWS)
    # A retune is of the whole host, and no state of any VM.
    assert set(METHOD_OF_STATE.values()) == changing - {"RetuneHost"}


def test_the_orchestrator_s_vm_takes_what_its_api_takes():
    ours = {**orchestrator_actions.VM["argument_spec"]}
    create, action, resize = schema_of(VmsCreate), schema_of(VmsAction), schema_of(VmResize)
    not_in_api = {"state", "wait", "wait_timeout_s", *orchestrator_actions.CONNECTION}
    # One VM a task, and one VM either exists or not: no batches.
    batch = {"count", "names", "mode", "at_least", "items"}
    # A size is a flavor's here, or what `vcpus` and `memory_mib` make of it.
    batch |= {"size"}
    acts = set(action.fields) - {"action", "vms"}
    assert set(ours) - not_in_api == (set(create.fields) - batch) | acts | set(resize.fields)
    for name in set(ours) - not_in_api:
        field = (create.fields.get(name) or action.fields.get(name) or resize.fields[name]).node
        assert ours[name]["type"] == ANSIBLE_TYPE[field["type"]], name
        assert ours[name].get("choices") == field.get("enum"), name
        if "default" in ours[name]:
            assert ours[name]["default"] == field["default"], name
    network = Schema(create.fields["networks"].node["items"], create.root)
    assert set(ours["networks"]["options"]) == set(network.fields)
    assert ours["networks"]["elements"] == ANSIBLE_TYPE[network.node["type"]]
    needed = {row[1]: set(row[2]) for row in orchestrator_actions.VM["required_if"]}
    # The API takes a size in place of a flavor.
    assert needed["present"] == create.required | {"flavor"}


def test_words_of_states_are_the_contract_s():
    assert {"running", "stopped"} <= set(VmState)
    assert set(ENDED) == {state for state in OperationState if state.ended}


@pytest.mark.parametrize("name", MODULES)
def test_documented_options_are_the_module_s_options(name):
    arguments = AGENT_ACTIONS.get(name) or orchestrator_actions.ACTIONS[name]
    documentation = yaml.safe_load(importlib.import_module(f"{PLUGINS}.modules.{name}").DOCUMENTATION)
    options = dict(documentation["options"])
    for fragment in documentation["extends_documentation_fragment"]:
        _, _, leaf, *variable = fragment.split(".")
        text = importlib.import_module(f"{PLUGINS}.doc_fragments.{leaf}").ModuleDocFragment
        options.update(yaml.safe_load(getattr(text, (variable or ["documentation"])[0].upper()))["options"])
    require_documented(options, arguments[0]["argument_spec"], name)


PLUGINS = "ansible_collections.ppec.cloud.plugins"


def require_documented(documented, spec, where):
    assert set(documented) == set(spec), where
    for name, option in spec.items():
        text, at = documented[name], f"{where}.{name}"
        for key in ("type", "choices", "elements", "default"):
            assert text.get(key) == option.get(key), f"{at}: {key}"
        assert text.get("required", False) == option.get("required", False), at
        assert text.get("description"), at
        if "options" in option:
            require_documented(text["suboptions"], option["options"], at)


def test_documented_results_of_a_vm_are_the_contract_s():
    returned = yaml.safe_load(importlib.import_module(f"{PLUGINS}.modules.agent_vms").RETURN)
    assert set(returned["vms"]["contains"]) == set(schema_of(VmResult).fields)
    for name in ("agent_vm", "agent_vm_info"):
        returned = yaml.safe_load(importlib.import_module(f"{PLUGINS}.modules.{name}").RETURN)
        sample = returned["vm"]["sample"] if name == "agent_vm" else returned["vms"]["sample"][0]
        VmInfo.model_validate(sample)


def test_all_modules_are_in_the_action_group_and_all_agent_modules_share_the_plugin():
    groups = RUNTIME["action_groups"]
    (top,) = groups["ppec"]
    members = [name for group in top["metadata"]["extend_group"] for name in groups[group]]
    assert sorted(members) == MODULES
    routed = {name: entry["action_plugin"] for name, entry in RUNTIME["plugin_routing"]["modules"].items()}
    assert routed == dict.fromkeys((n for n in MODULES if n.startswith("agent_")), "ppec.cloud.agent")
    assert sorted(AGENT_ACTIONS) == sorted(routed)


def test_secrets_are_marked():
    assert agent_arguments.VM["user_data"]["no_log"]
    assert orchestrator_actions.VM["argument_spec"]["user_data"]["no_log"]
    for contract, _ in orchestrator_actions.ACTIONS.values():
        assert contract["argument_spec"]["token"]["no_log"]


@pytest.mark.parametrize("path", sorted(COLLECTION.glob("plugins/**/*.py")), ids=lambda path: path.stem)
def test_plugins_carry_the_licence_and_import_only_what_a_host_has(path):
    text = path.read_text()
    assert "GNU General Public License v3.0+" in text
    assert "SPDX-License-Identifier: GPL-3.0-or-later" in text
    if path.parent.name in ("modules", "module_utils"):
        for imported in re.findall(r"^\s*(?:from|import) (\S+)", text, re.MULTILINE):
            top = imported.split(".")[0]
            assert top in STDLIB or imported.startswith(("ansible.module_utils", f"{PLUGINS}.module_utils")), imported


STDLIB = ("__future__", "http", "ipaddress", "json", "socket", "ssl", "time", "urllib", "uuid")
