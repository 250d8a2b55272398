#!/usr/bin/python
# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The hosts of the fleet."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: host_info
short_description: List the hosts of the fleet
version_added: "0.1.0"
description:
  - Asks the orchestrator for its hosts, where they stand, whether they are heard of and what they last reported.
author: PPEC contributors (@ppec)
extends_documentation_fragment:
  - ppec.cloud.orchestrator
  - ppec.cloud.attributes.info
options:
  name:
    description: Only the host with this name. The list is empty when there is none.
    type: str
"""

EXAMPLES = r"""
- name: All hosts
  ppec.cloud.host_info:
  register: fleet

- name: Those that are silent
  ansible.builtin.debug:
    msg: "{{ fleet.hosts | selectattr('liveness', 'eq', 'unknown') | map(attribute='name') }}"
"""

RETURN = r"""
hosts:
  description: The hosts.
  returned: success
  type: list
  elements: dict
  sample:
    - name: h1
      rack: r1
      cluster: c1
      datacentre: dc1
      vrf: prod
      address: 10.1.0.1
      port: 7443
      liveness: up
      draining: false
      vm_count: 12
problem:
  description: What went wrong, as problem+json; C(code) is stable.
  returned: on failure
  type: dict
  sample: {code: auth.required, detail: the bearer token is unknown or has expired, status: 401}
"""

from ansible_collections.ppec.cloud.plugins.module_utils.orchestrator_actions import run_module


def main():
    run_module("host_info")


if __name__ == "__main__":
    main()
