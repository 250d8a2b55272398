#!/usr/bin/python
# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A host's agent and what its host has."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: agent_info
short_description: Ask a host's agent for its version and report
version_added: "0.1.0"
description:
  - Asks a host's agent, through its proxy or its socket, who it is, what it can do and what its host has.
author: PPEC contributors (@ppec)
extends_documentation_fragment:
  - ppec.cloud.agent
  - ppec.cloud.attributes.info
  - ppec.cloud.attributes.agent
options:
  report:
    description: Whether the host's full report is wanted too.
    type: bool
    default: true
"""

EXAMPLES = r"""
- name: What is free on each NUMA cell
  ppec.cloud.agent_info:
  register: agent

- name: Show it
  ansible.builtin.debug:
    var: agent.report.cells
"""

RETURN = r"""
host:
  description: The host's name in PPEC.
  returned: success
  type: str
  sample: h1
agent_version:
  description: The agent's version.
  returned: success
  type: str
  sample: 0.1.0
api_version:
  description: The contract's version that the agent speaks.
  returned: success
  type: int
  sample: 1
capabilities:
  description: What the agent can do.
  returned: success
  type: list
  elements: str
  sample: [vm-lifecycle, progress-stream]
report:
  description: The host's report; its NUMA cells with free cores and memory, disk space, bridges, versions and VMs.
  returned: when O(report=true)
  type: dict
  sample:
    host: h1
    architecture: x86_64
    domain_type: kvm
    cells: [{cell: 0, socket: 0, cores: 16, cores_free: 12, memory_mib: 65536, memory_free_mib: 50000}]
    bridges: [br0]
    vms: []
problem:
  description: Why the host could not be asked, as problem+json; C(code) is stable.
  returned: on failure
  type: dict
  sample: {code: host.unreachable, detail: "host h1 at 10.0.0.1:7443: Connection refused", status: 503}
"""

from ansible_collections.ppec.cloud.plugins.module_utils.agent_actions import run_module


def main():
    run_module("agent_info")


if __name__ == "__main__":
    main()
