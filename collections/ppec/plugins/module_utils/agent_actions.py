# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What each agent module does, by name, and the thin shell around it: a client in, a module result out."""

from __future__ import annotations

from ansible_collections.ppec.cloud.plugins.module_utils import agent_arguments, agent_vms
from ansible_collections.ppec.cloud.plugins.module_utils.agent_client import client_from_params
from ansible_collections.ppec.cloud.plugins.module_utils.problem import ProblemError


def agent_vm(params, client, check_mode):
    """One VM: `agent_vms` with a list of one, and its result laid open."""
    vm = {name: params[name] for name in agent_arguments.VM}
    outcome = agent_vms.execute(dict(params, vms=[vm]), client, check_mode)
    result = outcome["vms"][0]
    flat = {"changed": outcome["changed"], "diff": outcome["diff"]}
    flat.update((key, result[key]) for key in ("vm_id", "name", "vm", "stage_ms", "replayed"))
    if result["problem"]:
        flat.update(failure(ProblemError.from_body(result["problem"])))
    return flat


def agent_vm_info(params, client, check_mode):
    """All VMs, or those with one of the ids or one of the names."""
    names = params["names"]
    found = client.call("ListVms", {} if names else {"vm_ids": params["vm_ids"]})["vms"]
    if names:
        found = [vm for vm in found if vm["name"] in names or vm["vm_id"] in params["vm_ids"]]
    return {"changed": False, "vms": found}


def agent_info(params, client, check_mode):
    """Who answers and, unless it is not wanted, the host's full report."""
    answer = {"changed": False, **client.call("GetVersion", {})}
    if params["report"]:
        answer.update(client.call("GetReport", {}))
    return answer


# Module name: (its arguments, what it does).
ACTIONS = {
    "agent_vm": (agent_arguments.AGENT_VM, agent_vm),
    "agent_vms": (agent_arguments.AGENT_VMS, agent_vms.execute),
    "agent_vm_info": (agent_arguments.AGENT_VM_INFO, agent_vm_info),
    "agent_info": (agent_arguments.AGENT_INFO, agent_info),
}


# What reading an answer raises when it is JSON, but not what the contract says.
OFF_CONTRACT = (AttributeError, KeyError, TypeError)


def off_contract(error):
    """The problem that stands for an answer that does not follow the contract."""
    return ProblemError(
        "internal.error",
        f"the agent's answer does not follow the contract: {type(error).__name__} {str(error)[:120]}",
        hint="Compare the agent's version with the collection's.",
    )


def failure(problem):
    """A failed module result."""
    return {"failed": True, "msg": str(problem), "problem": problem.body()}


def perform(name, params, check_mode):
    """The result of module `name`; never raises ProblemError."""
    try:
        client = client_from_params(params)
        try:
            return ACTIONS[name][1](params, client, check_mode)
        finally:
            client.close()
    except ProblemError as problem:
        return failure(problem)
    except OFF_CONTRACT as error:
        return failure(off_contract(error))


def run_module(name):
    """The whole of a module's `main`, when it runs on the host itself."""
    # Not at the top: the action plugin has no use for it.
    from ansible.module_utils.basic import AnsibleModule

    module = AnsibleModule(supports_check_mode=True, **ACTIONS[name][0])
    if module.params.get("plan_file"):
        module.fail_json(msg="plan_file is read on the controller, by the action plugin of this module")
    result = perform(name, module.params, module.check_mode)
    if result.get("failed"):
        module.fail_json(**result)
    module.exit_json(**result)
