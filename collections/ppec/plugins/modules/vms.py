#!/usr/bin/python
# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Several VMs of the fleet, through the orchestrator."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: vms
short_description: Create or delete a list of VMs of the fleet, all of them or none
version_added: "0.1.0"
description:
  - Makes a list of VMs be there, each with its flavor, place and addresses, through the orchestrator. Those that lack
    are made in one request, all of them or none; which hosts they get is decided for them together.
  - Runs where the orchestrator's API can be reached, usually C(localhost).
  - A VM that exists and is as described is left alone, whatever its power state. What differs can't be changed in place
    and makes the task fail before anything is made. O(user_data) and O(policy) are not compared, being used once; of
    networks only the addresses asked for by number are.
author: PPEC contributors (@ppec)
extends_documentation_fragment:
  - ppec.cloud.orchestrator
  - ppec.cloud.attributes
options:
  vms:
    description: The VMs. What one leaves out is as for all of them.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: The VM's name, a DNS label.
        type: str
        required: true
      flavor:
        description: Its size, in place of O(flavor).
        type: str
      pool:
        description: The storage pool that gets its disk, in place of O(pool).
        type: str
      rack:
        description: Only hosts of this rack, in place of O(rack).
        type: str
      host:
        description: Only this host, in place of O(host).
        type: str
      networks:
        description:
          - The addresses it gets, an item each, in place of O(networks).
          - An item without options is one of each family. The gateway of the first one is the VM's.
        type: list
        elements: dict
        suboptions:
          prefix:
            description: One address of this prefix of the host's VRF, such as C(10.1.0.0/24).
            type: str
          address:
            description: Just this address. It must be free, or reserved for a VM of this name.
            type: str
      groups:
        description:
          - Groups that it is made a member of besides O(groups).
          - A VM that is there keeps the groups that it was made with.
        type: list
        elements: dict
        suboptions:
          name:
            description: The group. All its members say the rest alike.
            type: str
            required: true
          apart:
            description: Whether its VMs stand apart, in place of together.
            type: bool
            default: true
          level:
            description: What they share, or don't.
            type: str
            choices: [host, rack, datacentre]
            default: host
          hard:
            description: Whether the VM is refused where the group can't be kept.
            type: bool
            default: true
      priority:
        description: One of a higher priority is placed first.
        type: int
  state:
    description: V(present) creates and starts the VMs. V(absent) deletes them with their disks and gives their
      addresses back.
    type: str
    choices: [present, absent]
    default: present
  flavor:
    description: The size of VMs that say none. Each needs one for O(state=present).
    type: str
  image:
    description: The image their disks are made from. Needed for O(state=present).
    type: str
  pool:
    description: The storage pool that gets their disks; without one, where a host keeps VMs by itself.
    type: str
  policy:
    description: How hosts that fit are ranked; V(balanced) evens out use, V(pack) fills hosts, V(spread) parts VMs.
    type: str
    choices: [balanced, pack, spread]
    default: balanced
  datacentre:
    description: Only hosts of this data centre.
    type: str
  cluster:
    description: Only hosts of this cluster.
    type: str
  rack:
    description: Only hosts of this rack.
    type: str
  host:
    description: Only this host.
    type: str
  vrf:
    description: Only hosts of this VRF.
    type: str
  region:
    description: Only hosts in data centres of this region.
    type: str
  host_labels:
    description: Only hosts with all of these labels, C(key) or C(key=value).
    type: list
    elements: str
  avoid_labels:
    description: No host with any of these labels, C(key) or C(key=value).
    type: list
    elements: str
  groups:
    description:
      - Groups that all are made members of, to stand apart from their other VMs, or together with them.
      - A VM that is there keeps the groups that it was made with.
    type: list
    elements: dict
    suboptions:
      name:
        description: The group. All its members say the rest alike.
        type: str
        required: true
      apart:
        description: Whether its VMs stand apart, in place of together.
        type: bool
        default: true
      level:
        description: What they share, or don't.
        type: str
        choices: [host, rack, datacentre]
        default: host
      hard:
        description: Whether the VM is refused where the group can't be kept.
        type: bool
        default: true
  n_plus_one:
    description: Whether a VM may come where the loss of any one host, or rack, could not be made good afterwards.
    type: dict
    suboptions:
      mode:
        description:
          - V(required) turns it away there; V(warn) has the task warn of what the loss would leave without a place.
        type: str
        choices: ["off", warn, required]
        default: "off"
      level:
        description: What may be lost.
        type: str
        choices: [host, rack]
        default: host
  max_moves:
    description:
      - How many running VMs may change NUMA cells on their host so that one opens for each VM.
      - Nothing is moved for a VM that shares CPUs or may span cells.
    type: int
  user_data:
    description:
      - Cloud-init user data, handed to each guest byte for byte.
      - Kept out of results and logs. Mark text that holds C({{) or C({%) with C(!unsafe), or read it with a lookup.
    type: str
  labels:
    description: Words of yours for each VM, text to text. Lists are narrowed by them.
    type: dict
  wait:
    description: Whether to wait for the operation to end. If not, the task tells only that it was accepted.
    type: bool
    default: true
  networks:
    description:
      - The addresses that VMs get which say no networks of their own, an item each; without, one of each family that
        serves the host.
      - An item without options is one of each family. The gateway of the first one is the VM's.
    type: list
    elements: dict
    suboptions:
      prefix:
        description: One address of this prefix of the host's VRF, such as C(10.1.0.0/24).
        type: str
      address:
        description: Just this address, if one VM alone says no networks of its own.
        type: str
  wait_timeout_s:
    description: Seconds to wait for the operation. It goes on when they are over, and the task fails.
    type: float
    default: 600.0
"""

EXAMPLES = r"""
- name: Three VMs with static addresses, all of them or none
  ppec.cloud.vms:
    image: debian-12
    flavor: small
    cluster: c1
    vms:
      - name: web-1
        networks: [{address: 10.1.0.11}]
      - name: web-2
        networks: [{address: 10.1.0.12}]
        rack: r2
      - name: db-1
        flavor: large
        host: h7
        networks: [{address: 10.2.0.5}, {prefix: "fd00:2::/64"}]
  register: made

- name: Where they are
  ansible.builtin.debug:
    msg: "{{ item.name }}: {{ item.addresses[0].address }} on {{ item.host }}"
  loop: "{{ made.vms }}"

- name: Gone again
  ppec.cloud.vms:
    state: absent
    vms: [{name: web-1}, {name: web-2}, {name: db-1}]
"""

RETURN = r"""
vms:
  description:
    - The VMs' records and what their hosts last observed, in the order asked for, without those that are absent. In
      check mode, as they were found.
  returned: success
  type: list
  elements: dict
  sample:
    - {name: web-1, record: active, observed: running, host: h1, addresses: [{address: 10.1.0.11}]}
operation:
  description: The operation that made the change, ended when O(wait=true); null when there was nothing to do.
  returned: success
  type: dict
  sample: {operation_id: op-1, kind: vm.create, state: succeeded}
problem:
  description: What went wrong, as problem+json; C(code) is stable.
  returned: on failure
  type: dict
  sample: {code: address.in_use, detail: "vm web-2: address 10.1.0.12 is in use by VM old", status: 409}
diff:
  description: The VMs before and after, by name.
  returned: success
  type: dict
  sample: {before: {web-1: {}}, after: {web-1: {state: running, flavor: small, image: debian-12}}}
"""

from ansible_collections.ppec.cloud.plugins.module_utils.orchestrator_actions import run_module


def main():
    run_module("vms")


if __name__ == "__main__":
    main()
