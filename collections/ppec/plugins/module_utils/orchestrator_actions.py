# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What each orchestrator module takes and does, and the thin shell around it."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule, env_fallback
from ansible_collections.ppec.cloud.plugins.module_utils import orchestrator_vm, orchestrator_vms
from ansible_collections.ppec.cloud.plugins.module_utils.orchestrator_client import OrchestratorClient, segment_path
from ansible_collections.ppec.cloud.plugins.module_utils.problem import ProblemError

CONNECTION = {
    "api_url": {"type": "str", "required": True, "fallback": (env_fallback, ["PPEC_SERVER"])},
    "token": {"type": "str", "required": True, "no_log": True, "fallback": (env_fallback, ["PPEC_TOKEN"])},
    "ca_path": {"type": "path", "fallback": (env_fallback, ["PPEC_CA"])},
    "request_timeout_s": {"type": "float", "default": 30.0},
}

GROUPS = {
    "type": "list",
    "elements": "dict",
    "options": {
        "name": {"type": "str", "required": True},
        "apart": {"type": "bool", "default": True},
        "level": {"type": "str", "choices": ["host", "rack", "datacentre"], "default": "host"},
        "hard": {"type": "bool", "default": True},
    },
}
NETWORKS = {
    "type": "list",
    "elements": "dict",
    "options": {"prefix": {"type": "str"}, "address": {"type": "str"}},
}
N_PLUS_ONE = {
    "type": "dict",
    "options": {
        "mode": {"type": "str", "choices": ["off", "warn", "required"], "default": "off"},
        "level": {"type": "str", "choices": ["host", "rack"], "default": "host"},
    },
}
STATES = [
    "present", "absent", "started", "stopped", "resized", "restarted", "reset", "paused", "resumed", "frozen", "thawed",
]  # fmt: skip
VM = {
    "argument_spec": {
        "name": {"type": "str", "required": True},
        "state": {"type": "str", "choices": STATES, "default": "present"},
        "flavor": {"type": "str"},
        "image": {"type": "str"},
        "pool": {"type": "str"},
        "policy": {"type": "str", "choices": ["balanced", "pack", "spread"], "default": "balanced"},
        "region": {"type": "str"},
        "datacentre": {"type": "str"},
        "cluster": {"type": "str"},
        "rack": {"type": "str"},
        "host": {"type": "str"},
        "vrf": {"type": "str"},
        "host_labels": {"type": "list", "elements": "str"},
        "avoid_labels": {"type": "list", "elements": "str"},
        "groups": GROUPS,
        "n_plus_one": N_PLUS_ONE,
        "max_moves": {"type": "int"},
        "networks": NETWORKS,
        # User data may hold passwords: it is kept out of logs and results.
        "user_data": {"type": "str", "no_log": True},
        "labels": {"type": "dict"},
        "vcpus": {"type": "int"},
        "memory_mib": {"type": "int"},
        "timeout_s": {"type": "float", "default": 30.0},
        "force": {"type": "bool", "default": False},
        "thaw_after_s": {"type": "float", "default": 60.0},
        "wait": {"type": "bool", "default": True},
        "wait_timeout_s": {"type": "float", "default": 600.0},
        **CONNECTION,
    },
    "required_if": [("state", "present", ("flavor", "image"))],
}

_PLACED = {
    name: VM["argument_spec"][name]
    for name in (
        "flavor", "image", "pool", "policy", "region", "datacentre", "cluster", "rack", "host", "vrf", "host_labels",
        "avoid_labels", "groups", "n_plus_one", "max_moves", "networks", "user_data", "labels", "wait",
        "wait_timeout_s",
    )
}  # fmt: skip
VMS = {
    "argument_spec": {
        "vms": {
            "type": "list",
            "elements": "dict",
            "required": True,
            "options": {
                "name": {"type": "str", "required": True},
                "flavor": {"type": "str"},
                "pool": {"type": "str"},
                "rack": {"type": "str"},
                "host": {"type": "str"},
                "networks": NETWORKS,
                "groups": GROUPS,
                "priority": {"type": "int"},
            },
        },
        "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        **_PLACED,
        **CONNECTION,
    },
    "required_if": [("state", "present", ("image",))],
}

VM_INFO = {"argument_spec": {"name": {"type": "str"}, **CONNECTION}}
VM_GUEST_INFO = {
    "argument_spec": {
        "name": {"type": "str", "required": True},
        "timeout_s": {"type": "float", "default": 5.0},
        **CONNECTION,
    }
}
HOST_INFO = {"argument_spec": {"name": {"type": "str"}, **CONNECTION}}


def _listing(collection):
    """All of a collection, or the one of a name; a name that does not exist gives an empty list."""

    def execute(params, client, check_mode):
        if params["name"] is None:
            return {"changed": False, collection: client.pages(collection)}
        try:
            found = [client.get(segment_path(collection, params["name"]))]
        except ProblemError as problem:
            if not problem.code.endswith(".not_found"):
                raise
            found = []
        return {"changed": False, collection: found}

    return execute


def _guest(params, client, check_mode):
    path = segment_path("vms", params["name"], "guest")
    return {"changed": False, "guest": client.get(path, {"timeout_s": params["timeout_s"]})}


ACTIONS = {
    "vm": (VM, orchestrator_vm.execute),
    "vms": (VMS, orchestrator_vms.execute),
    "vm_info": (VM_INFO, _listing("vms")),
    "vm_guest_info": (VM_GUEST_INFO, _guest),
    "host_info": (HOST_INFO, _listing("hosts")),
}


def warnings_of(result):
    """What N+1 warned of when the operation was accepted."""
    exposed = (result.get("operation") or {}).get("exposed", ())
    said = "{domain} is exposed: of the VMs that its loss ends, so many have no place then: {without_place}, {vm} first"
    return [said.format(**one) for one in exposed]


def run_module(name):
    """The whole of a module's `main`."""
    contract, execute = ACTIONS[name]
    module = AnsibleModule(supports_check_mode=True, **contract)
    try:
        result = execute(module.params, OrchestratorClient(module.params), module.check_mode)
    except ProblemError as problem:
        module.fail_json(msg=str(problem), problem=problem.body())
    except (AttributeError, KeyError, TypeError) as error:
        module.fail_json(msg=f"the orchestrator's answer does not follow the contract: {error!r}")
    for warning in warnings_of(result):
        module.warn(warning)
    module.exit_json(**result)
