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
  - ppec.cloud.attributes
  - ppec.cloud.attributes.agent
options:
  state:
    description:
      - V(present) creates and starts the VM. V(absent) deletes it with its disks.
      - V(started) and V(stopped) need a VM that exists, as do all that follow.
      - V(resized) gives the VM the vCPUs and memory named here, at once as far as can be, the rest at its next start.
      - V(restarted) asks the guest to reboot, V(reset) presses the reset button. Both change something whenever they
        are asked for, and need a running VM.
      - V(paused) stops the vCPUs and V(resumed) has them run on. Neither starts a VM that is off.
      - V(frozen) has the guest's agent flush and freeze its file systems, V(thawed) ends that. What is frozen can't be
        seen from the host, so check mode says that both would change something.
    type: str
    choices: [present, absent, started, stopped, resized, restarted, reset, paused, resumed, frozen, thawed]
    default: present
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
    description: Up to how many vCPUs the VM can grow while it runs, an even number. Left out, no more than O(vcpus).
    type: int
  max_memory_mib:
    description: Up to how much memory in MiB the VM can grow while it runs. Left out, no more than O(memory_mib).
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
    description: NUMA cells of one socket that the VM's cores and memory are taken from. Needed for O(state=present).
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
