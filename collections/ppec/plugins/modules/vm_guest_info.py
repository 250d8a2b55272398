#!/usr/bin/python
# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the guest of a VM says of itself."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: vm_guest_info
short_description: Ask a VM's guest agent for its addresses and system
version_added: "0.1.0"
description:
  - Has the orchestrator ask the VM's host, and that the agent inside the guest, right now.
  - What comes back is the guest's own word, bounded in length; nobody vouches for it. Mind that where you use it.
author: PPEC contributors (@ppec)
extends_documentation_fragment:
  - ppec.cloud.orchestrator
  - ppec.cloud.attributes.info
options:
  name:
    description: The VM's name or id.
    type: str
    required: true
  timeout_s:
    description: Seconds the guest's agent may take, 1 to 30.
    type: float
    default: 5.0
"""

EXAMPLES = r"""
- name: Wait until the guest's agent has come up
  ppec.cloud.vm_guest_info:
    name: web-1
  register: web
  until: web.guest.agent_connected
  retries: 30
  delay: 2
"""

RETURN = r"""
guest:
  description:
    - What the guest says. C(agent_connected) is false when no agent answers; C(frozen) is the host's own record.
  returned: success
  type: dict
  sample:
    vm_id: 7d2c4f0e-6f0a-4b7e-9f55-2b1c36a0a001
    name: web-1
    agent_connected: true
    frozen: false
    hostname: web-1
    os_id: debian
    os_name: Debian GNU/Linux 12 (bookworm)
    os_version: "12"
    kernel: 6.1.0-25-cloud-amd64
    interfaces: [{name: eth0, mac: "52:54:00:00:00:01", addresses: [10.0.0.5/24]}]
    problem: null
problem:
  description: What went wrong, as problem+json; C(code) is stable.
  returned: on failure
  type: dict
  sample: {code: vm.not_found, detail: there is no VM web-1, status: 404}
"""

from ansible_collections.ppec.cloud.plugins.module_utils.orchestrator_actions import run_module


def main():
    run_module("vm_guest_info")


if __name__ == "__main__":
    main()
