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
  - ppec.cloud.attributes
  - ppec.cloud.attributes.agent
options:
  state:
    description:
      - V(present) creates and starts the VMs. V(absent) deletes them with their disks.
      - V(started) and V(stopped) need VMs that exist, as do all that follow.
      - V(resized) gives each the vCPUs and memory named here, at once as far as can be, the rest at its next start.
      - V(restarted) asks the guest to reboot, V(reset) presses the reset button. Both change something whenever they
        are asked for, and need a running VM.
      - V(paused) stops the vCPUs and V(resumed) has them run on. Neither starts VMs that are off.
      - V(frozen) has the guest's agent flush and freeze its file systems, V(thawed) ends that. What is frozen can't be
        seen from the host, so check mode says that both would change something.
      - Not used with O(plan_file), nor are the other options but that.
    type: str
    choices: [present, absent, started, stopped, resized, restarted, reset, paused, resumed, frozen, thawed]
    default: present
  plan_file:
    description:
      - Path of a run plan (JSON) on the controller, as the orchestrator writes it. Each host's call is in a file of its
        own, C(calls/<host>.json) beside it, and no other host's is read.
      - The call of C(inventory_hostname) is sent as it is, never passing through templates.
      - Excludes O(vms).
    type: path
  vms:
    description: The VMs. For states other than V(present), O(vms[].vm_id) is enough.
    type: list
    elements: dict
    suboptions:
      vm_id:
        description: The VM's UUID.
        type: str
        required: true
      name:
        description: The VM's name, a DNS label. Needed for O(state=present).
        type: str
      vcpus:
        description: Number of vCPUs, an even one. Needed for O(state=present) and O(state=resized).
        type: int
      memory_mib:
        description: Memory in MiB. Needed for O(state=present) and O(state=resized).
        type: int
      max_vcpus:
        description: Up to how many vCPUs the VM can grow while it runs, an even number. Left out, no further.
        type: int
      max_memory_mib:
        description: Up to how much memory in MiB the VM can grow while it runs. Left out, no further.
        type: int
      numa:
        description: How the VM sits on the host's CPUs and memory.
        type: dict
        suboptions:
          cpus:
            description:
              - V(dedicated), which is the contract's default, gives the VM whole physical cores of its own.
              - V(shared) lets its vCPUs float over the CPUs that the host sets aside for sharing.
            type: str
            choices: [dedicated, shared]
          smt:
            description:
              - What a dedicated VM makes of SMT siblings, which are always its own.
              - V(prefer), the contract's default, puts a vCPU on every thread and takes cores without siblings as well.
              - V(isolate) puts one vCPU on a core and leaves its siblings idle.
              - V(require) is V(prefer) on cores that have siblings, and on no others.
            type: str
            choices: [prefer, isolate, require]
          multi_cell:
            description: Whether the VM may span sockets, and is shown NUMA cells that mirror the host's.
            type: bool
          huge_page_kib:
            description: Size in KiB of the pages behind the guest's memory, 0 for the ordinary ones.
            type: int
            choices: [0, 2048, 1048576]
      cells:
        description: NUMA cells of one socket for its cores and memory. Needed for O(state=present).
        type: list
        elements: int
      root_disk:
        description: The disk the VM boots from. Needed for O(state=present).
        type: dict
        suboptions:
          size_mib:
            description: Virtual size in MiB.
            type: int
            required: true
          image:
            description: The image it is an overlay of.
            type: dict
            required: true
            suboptions:
              name:
                description: The image's name.
                type: str
                required: true
              sha256:
                description: Checksum of the image file (hex).
                type: str
                required: true
              size_bytes:
                description: Size of the image file.
                type: int
                required: true
              format:
                description: Format of the image file.
                type: str
                choices: [qcow2, raw]
                required: true
              url:
                description: Where the host fetches it once, C(https://) or C(file:///).
                type: str
                required: true
      nics:
        description: Network interfaces.
        type: list
        elements: dict
        suboptions:
          mac:
            description: MAC address.
            type: str
            required: true
          bridge:
            description: The host's bridge it is plugged into.
            type: str
            required: true
          addresses:
            description: Addresses with prefix length that the guest is told to use.
            type: list
            elements: str
          gateway4:
            description: IPv4 gateway.
            type: str
          gateway6:
            description: IPv6 gateway.
            type: str
          nameservers:
            description: Addresses of name servers.
            type: list
            elements: str
      user_data:
        description:
          - Cloud-init user data, handed to the guest byte for byte.
          - Kept out of results and logs. Mark text that holds C({{) or C({%) with C(!unsafe), or read it with a lookup.
        type: str
      tags:
        description: Words of yours for the VM, text to text.
        type: dict
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
