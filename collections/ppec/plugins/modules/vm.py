#!/usr/bin/python
# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One VM of the fleet, through the orchestrator."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: vm
short_description: Create, delete, start, stop, resize, reboot, reset, pause, resume, freeze or thaw a VM of the fleet
version_added: "0.1.0"
description:
  - Makes one VM be as described, through the orchestrator, which chooses its host, its NUMA cells and its addresses.
  - Runs where the orchestrator's API can be reached, usually C(localhost).
  - A VM that exists and is as described is left alone, whatever its power state, for O(state=present). What differs
    can't be changed in place and makes the task fail, apart from its size (O(vcpus), O(memory_mib)). O(user_data) and
    O(policy) are not compared, being used once; of O(networks) only the addresses asked for by number are.
author: PPEC contributors (@ppec)
extends_documentation_fragment:
  - ppec.cloud.orchestrator
  - ppec.cloud.attributes
options:
  name:
    description: The VM's name, a DNS label.
    type: str
    required: true
  state:
    description:
      - V(present) creates and starts the VM. V(absent) deletes it with its disks and gives its addresses back.
      - All others need a VM that exists. V(resumed) has a paused one run on, V(started) one that is off.
      - V(restarted) asks the guest to reboot, V(reset) presses the reset button, each time; both need a VM that runs.
      - V(resized) gives it the size of O(vcpus) and O(memory_mib), of which it needs one.
      - V(frozen) has the guest's agent flush and freeze its file systems, for a copy of the disks that is whole;
        V(thawed) ends that. Its host ends it by itself after O(thaw_after_s).
    type: str
    choices: [present, absent, started, stopped, resized, restarted, reset, paused, resumed, frozen, thawed]
    default: present
  flavor:
    description: The VM's size, if not said otherwise. Needed for O(state=present).
    type: str
  image:
    description: The image its disk is made from. Needed for O(state=present).
    type: str
  pool:
    description: The storage pool that gets its disk; without one, where a host keeps VMs by itself.
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
      - Groups that the VM is made a member of, to stand apart from their other VMs, or together with them.
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
    description: Whether the VM may come where the loss of any one host, or rack, could not be made good afterwards.
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
      - How many running VMs may change NUMA cells on their host so that one opens for this VM.
      - Nothing is moved for a VM that shares CPUs or may span cells.
    type: int
  networks:
    description:
      - The addresses it gets, an item each; without, one of each family that serves its host.
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
  user_data:
    description:
      - Cloud-init user data, handed to the guest byte for byte.
      - Kept out of results and logs. Mark text that holds C({{) or C({%) with C(!unsafe), or read it with a lookup.
    type: str
  labels:
    description: Words of yours for the VM, text to text. Lists are narrowed by them.
    type: dict
  vcpus:
    description:
      - How many vCPUs the VM is to have, an even number; what its flavor says if left out, and whatever it has when it
        exists. For O(state=present) and O(state=resized).
      - A VM that runs gets them at once as far as that can be done, and the rest at its next start; RV(resized) says
        which. One that is created is made with its flavor's size first, and resized then if O(wait=true).
    type: int
  memory_mib:
    description: Its memory; see O(vcpus).
    type: int
  timeout_s:
    description:
      - Seconds the guest has to obey, for O(state=stopped) and O(state=restarted), and to let go of vCPUs in a resize.
    type: float
    default: 30.0
  force:
    description:
      - Whether a guest that did not obey in time has its power cut (O(state=stopped)) or is reset (O(state=restarted)).
    type: bool
    default: false
  thaw_after_s:
    description: Seconds after which the host thaws a frozen VM by itself, for O(state=frozen). At most 600.
    type: float
    default: 60.0
  wait:
    description: Whether to wait for the operation to end. If not, the task tells only that it was accepted.
    type: bool
    default: true
  wait_timeout_s:
    description: Seconds to wait for the operation. It goes on when they are over, and the task fails.
    type: float
    default: 600.0
"""

EXAMPLES = r"""
- name: A web server, wherever there is room
  ppec.cloud.vm:
    name: web-1
    flavor: small
    image: debian-12
    policy: spread
    labels: {tier: web}
    user_data: "{{ lookup('ansible.builtin.file', 'web.user-data') }}"
  register: web

- name: Where it is
  ansible.builtin.debug:
    msg: "{{ web.vm.addresses[0].address }} on {{ web.vm.host }}"

- name: More of it; the rest of what can't be had while it runs comes with its next start
  ppec.cloud.vm:
    name: web-1
    state: resized
    vcpus: 4
    memory_mib: 8192
  register: grown

- name: Start it anew if that is needed
  ppec.cloud.vm:
    name: web-1
    state: "{{ item }}"
  loop: [stopped, started]
  when: "'next_start' in (grown.resized | default({}, true)).values()"

- name: Gone again
  ppec.cloud.vm:
    name: web-1
    state: absent
"""

RETURN = r"""
vm:
  description: The VM's record and what its host last observed; null when it is absent. In check mode, as it was found.
  returned: success
  type: dict
  sample:
    vm_id: 7d2c4f0e-6f0a-4b7e-9f55-2b1c36a0a001
    name: web-1
    record: active
    observed: running
    flavor: small
    image: debian-12
    vcpus: 2
    memory_mib: 2048
    host: h1
    cells: [0]
    vrf: prod
    addresses: [{address: 10.0.0.5, prefix: 10.0.0.0/24, vrf: prod}]
    labels: {tier: web}
operation:
  description: The operation that made the change, ended when O(wait=true); null when there was nothing to do.
  returned: success
  type: dict
  sample: {operation_id: op-1, kind: vm.create, state: succeeded}
resized:
  description:
    - After a resize that was waited for, when each part of the new size takes effect, V(unchanged), V(now) or
      V(next_start); null otherwise.
  returned: success
  type: dict
  sample: {vcpus: now, memory_mib: next_start}
problem:
  description: What went wrong, as problem+json; C(code) is stable.
  returned: on failure
  type: dict
  sample: {code: placement.no_capacity, detail: "no host can take vm web-1", status: 409}
diff:
  description: The VM before and after.
  returned: success
  type: dict
  sample: {before: {}, after: {state: running, flavor: small, image: debian-12}}
"""

from ansible_collections.ppec.cloud.plugins.module_utils.orchestrator_actions import run_module


def main():
    run_module("vm")


if __name__ == "__main__":
    main()
