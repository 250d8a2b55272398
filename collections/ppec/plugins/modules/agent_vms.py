#!/usr/bin/python
# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Several VMs on one host in one call, through the host's agent."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: agent_vms
short_description: Create, delete, start, stop or otherwise switch several VMs on a host
version_added: "0.1.0"
description:
  - Makes VMs of a bare-metal host be as described, in one call to the host's proxy or its agent's socket.
  - Each VM ends for itself; the task fails when any of them failed, and says which.
  - With O(plan_file) it carries out this host's part of an orchestrator's run. Then a VM's failure is told in the run's
    event file and counted in the result, and the task fails only when the host as a whole could not be used.
author: PPEC contributors (@ppec)
extends_documentation_fragment:
  - ppec.cloud.agent
  - ppec.cloud.agent.change
  - ppec.cloud.vm_spec.list
  - ppec.cloud.attributes
  - ppec.cloud.attributes.agent
options:
  plan_file:
    description:
      - Path of a run plan (JSON) on the controller, as the orchestrator writes it. Each host's call is in a file of its
        own, C(calls/<host>.json) beside it, and no other host's is read.
      - The call of C(inventory_hostname) is sent as it is, never passing through templates.
      - Excludes O(vms). None of the other options is used with it.
    type: path
"""

EXAMPLES = r"""
- name: Two VMs in one call
  ppec.cloud.agent_vms:
    vms:
      - vm_id: 7d2c4f0e-6f0a-4b7e-9f55-2b1c36a0a001
        name: web-1
        vcpus: 2
        memory_mib: 2048
        cells: [0]
        root_disk: "{{ root_disk }}"
      - vm_id: 7d2c4f0e-6f0a-4b7e-9f55-2b1c36a0a002
        name: web-2
        vcpus: 2
        memory_mib: 2048
        cells: [1]
        root_disk: "{{ root_disk }}"

- name: Both gone
  ppec.cloud.agent_vms:
    state: absent
    vms:
      - vm_id: 7d2c4f0e-6f0a-4b7e-9f55-2b1c36a0a001
      - vm_id: 7d2c4f0e-6f0a-4b7e-9f55-2b1c36a0a002

- name: This host's part of an orchestrator's run
  ppec.cloud.agent_vms:
    plan_file: "{{ ppec_plan_file }}"
"""

RETURN = r"""
vms:
  description: One entry per VM, in the order of the task, each like a result of the agent.
  returned: when the host answered and O(plan_file) is not given
  type: list
  elements: dict
  contains:
    vm_id:
      description: The VM's UUID.
      type: str
    name:
      description: The VM's name, as far as it is known.
      type: str
    changed:
      description: Whether this VM was (or in check mode would be) changed.
      type: bool
    vm:
      description: The VM as the host has it now; null when it is absent. In check mode, as it was found.
      type: dict
    problem:
      description: What went wrong with this VM, as problem+json, or null.
      type: dict
    stage_ms:
      description: Milliseconds spent in each stage of the change.
      type: dict
    replayed:
      description: Whether the answer came from the agent's journal.
      type: bool
    resized:
      description: After a resize, which part of the new size the VM has now and which from its next start on.
      type: dict
    observed_at:
      description: The agent's own order of what it saw, to tell an older answer or report from a newer one.
      type: dict
failed_names:
  description: Names of the VMs that failed, or their ids where no name is known.
  returned: when the host answered
  type: list
  elements: str
  sample: [web-2]
diff:
  description: The VMs before and after, by name, with what a host can tell of them.
  returned: when the host answered and O(plan_file) is not given
  type: dict
  sample: {before: {vms: {}}, after: {vms: {web-1: {state: running, vcpus: 2}}}}
problem:
  description: Why the host as a whole failed, as problem+json; C(code) is stable.
  returned: when the host failed and O(plan_file) is not given
  type: dict
  sample: {code: host.unreachable, detail: "host h1 at 10.0.0.1:7443: Connection refused", status: 503}
action:
  description: The agent's method that the plan calls.
  returned: with O(plan_file)
  type: str
  sample: CreateVms
vm_count:
  description: Number of VMs in this host's part of the plan.
  returned: with O(plan_file)
  type: int
succeeded:
  description: Number of VMs that worked out.
  returned: with O(plan_file)
  type: int
failed_vms:
  description: Number of VMs that did not.
  returned: with O(plan_file)
  type: int
proxy_sessions:
  description: Number of connections made to the host's proxy.
  returned: with O(plan_file)
  type: int
code:
  description: Stable code of why the host as a whole failed.
  returned: with O(plan_file), when the host failed
  type: str
  sample: host.unreachable
"""

from ansible_collections.ppec.cloud.plugins.module_utils.agent_actions import run_module


def main():
    run_module("agent_vms")


if __name__ == "__main__":
    main()
