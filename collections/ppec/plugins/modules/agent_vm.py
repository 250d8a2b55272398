#!/usr/bin/python
# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One VM on one host, through the host's agent."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: agent_vm
short_description: Create, delete, start, stop or otherwise switch one VM on a host
version_added: "0.1.0"
description:
  - Makes one VM of a bare-metal host be as described, through the host's proxy or its agent's socket.
  - This is the host's own view. To have the fleet choose a host and an address, use M(ppec.cloud.vm).
  - A VM that exists and is as described is left alone, whatever its power state, for O(state=present).
author: PPEC contributors (@ppec)
extends_documentation_fragment:
  - ppec.cloud.agent
  - ppec.cloud.agent.change
  - ppec.cloud.vm_spec
  - ppec.cloud.attributes
  - ppec.cloud.attributes.agent
options: {}
"""

EXAMPLES = r"""
- name: A VM on the host this play runs on
  ppec.cloud.agent_vm:
    vm_id: 7d2c4f0e-6f0a-4b7e-9f55-2b1c36a0a001
    name: web-1
    vcpus: 4
    memory_mib: 4096
    cells: [0]
    root_disk:
      size_mib: 20480
      image:
        name: debian-12
        sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
        size_bytes: 350000000
        format: qcow2
        url: https://images.example.net/debian-12.qcow2
    nics:
      - mac: "52:54:00:00:00:01"
        bridge: br0
        addresses: [10.0.0.5/24]
        gateway4: 10.0.0.1
    user_data: "{{ lookup('ansible.builtin.file', 'web.user-data') }}"

- name: The same VM, stopped, with a minute for its guest
  ppec.cloud.agent_vm:
    vm_id: 7d2c4f0e-6f0a-4b7e-9f55-2b1c36a0a001
    state: stopped
    timeout_s: 60

- name: Gone
  ppec.cloud.agent_vm:
    vm_id: 7d2c4f0e-6f0a-4b7e-9f55-2b1c36a0a001
    state: absent
"""

RETURN = r"""
vm_id:
  description: The VM's UUID.
  returned: when the host answered
  type: str
  sample: 7d2c4f0e-6f0a-4b7e-9f55-2b1c36a0a001
name:
  description: The VM's name, as far as it is known.
  returned: when the host answered
  type: str
  sample: web-1
vm:
  description: The VM as the host has it now; null when it is absent. In check mode, as it was found.
  returned: when the host answered
  type: dict
  sample:
    vm_id: 7d2c4f0e-6f0a-4b7e-9f55-2b1c36a0a001
    name: web-1
    state: running
    managed: true
    vcpus: 2
    memory_mib: 4096
    cells: [0]
    pins: [{vcpu: 0, pcpu: 2}, {vcpu: 1, pcpu: 3}]
    disk_mib: 20480
    image_sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
    macs: ["52:54:00:00:00:01"]
    operation_id: ansible-0f8c
stage_ms:
  description: Milliseconds spent in each stage of the change.
  returned: when the host answered
  type: dict
  sample: {disk: 40, start: 310}
replayed:
  description: Whether the answer came from the agent's journal, because the operation had been done before.
  returned: when the host answered
  type: bool
problem:
  description: What went wrong, as problem+json; C(code) is stable.
  returned: on failure
  type: dict
  sample: {code: vm.exists, detail: "vm web-1 exists and differs: vcpus wanted 4, found 2", status: 409}
diff:
  description: The VM before and after, with what a host can tell of it.
  returned: when the host answered
  type: dict
  sample: {before: {vms: {}}, after: {vms: {web-1: {state: running, vcpus: 4}}}}
"""

from ansible_collections.ppec.cloud.plugins.module_utils.agent_actions import run_module


def main():
    run_module("agent_vm")


if __name__ == "__main__":
    main()
