#!/usr/bin/python
# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The VMs of one host, as its agent has them."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: agent_vm_info
short_description: List the VMs of a host
version_added: "0.1.0"
description:
  - Asks a host's agent, through its proxy or its socket, for its VMs as libvirt has them now.
author: PPEC contributors (@ppec)
extends_documentation_fragment:
  - ppec.cloud.agent
  - ppec.cloud.attributes.info
  - ppec.cloud.attributes.agent
options:
  vm_ids:
    description: Only the VMs with these UUIDs. Those the host does not know are absent from the answer.
    type: list
    elements: str
    default: []
  names:
    description: Only the VMs with these names, besides those of O(vm_ids).
    type: list
    elements: str
    default: []
"""

EXAMPLES = r"""
- name: All VMs of the host
  ppec.cloud.agent_vm_info:
  register: host_vms

- name: One of them
  ppec.cloud.agent_vm_info:
    names: [web-1]
"""

RETURN = r"""
vms:
  description: The VMs. C(managed) is false for a domain that PPEC did not make.
  returned: success
  type: list
  elements: dict
  sample:
    - vm_id: 7d2c4f0e-6f0a-4b7e-9f55-2b1c36a0a001
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
problem:
  description: Why the host could not be asked, as problem+json; C(code) is stable.
  returned: on failure
  type: dict
  sample: {code: host.unreachable, detail: "host h1 at 10.0.0.1:7443: Connection refused", status: 503}
"""

from ansible_collections.ppec.cloud.plugins.module_utils.agent_actions import run_module


def main():
    run_module("agent_vm_info")


if __name__ == "__main__":
    main()
