#!/usr/bin/python
# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The VMs of the fleet."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: vm_info
short_description: List the VMs of the fleet
version_added: "0.1.0"
description:
  - Asks the orchestrator for its VMs, their records and what their hosts last observed.
author: PPEC contributors (@ppec)
extends_documentation_fragment:
  - ppec.cloud.orchestrator
  - ppec.cloud.attributes.info
options:
  name:
    description: Only the VM with this name or id. The list is empty when there is none.
    type: str
"""

EXAMPLES = r"""
- name: All VMs
  ppec.cloud.vm_info:
  register: fleet

- name: Those that no host reports running
  ansible.builtin.debug:
    msg: "{{ fleet.vms | rejectattr('observed', 'eq', 'running') | map(attribute='name') }}"
"""

RETURN = r"""
vms:
  description: The VMs.
  returned: success
  type: list
  elements: dict
  sample:
    - vm_id: 7d2c4f0e-6f0a-4b7e-9f55-2b1c36a0a001
      name: web-1
      record: active
      observed: running
      flavor: small
      image: debian-12
      host: h1
      vrf: prod
      addresses: [{address: 10.0.0.5, prefix: 10.0.0.0/24, vrf: prod}]
problem:
  description: What went wrong, as problem+json; C(code) is stable.
  returned: on failure
  type: dict
  sample: {code: auth.required, detail: the bearer token is unknown or has expired, status: 401}
"""

from ansible_collections.ppec.cloud.plugins.module_utils.orchestrator_actions import run_module


def main():
    run_module("vm_info")


if __name__ == "__main__":
    main()
