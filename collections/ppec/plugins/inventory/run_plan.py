# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The hosts of an orchestrator's run, from its plan; of a playbook that was started early, once there is a plan."""

from __future__ import annotations

DOCUMENTATION = r"""
name: run_plan
short_description: The hosts of an orchestrator's run
version_added: 0.1.0
description:
  - Takes the hosts of a run from the plan that the orchestrator has made for it.
  - The source is a file whose name ends in C(.run_plan) and whose only line is the path of the plan.
  - The source may be a FIFO. A playbook then starts, reads it and waits there until somebody writes the path.
  - All hosts are in the group C(ppec_run) and local, because the work is done in Ansible's own process. Their one
    variable besides is C(ppec_plan_file), the path of the plan.
author:
  - PPEC contributors (@ppec)
"""

EXAMPLES = r"""
# ansible-playbook -i now.run_plan ppec.cloud.apply_plan
# where now.run_plan is this line:
# /var/lib/ppec/orchestrator/runs/op-1/1/plan.json
"""

import json
import sys
from pathlib import Path

from ansible.errors import AnsibleParserError
from ansible.plugins.inventory import BaseInventoryPlugin

GROUP = "ppec_run"


class InventoryModule(BaseInventoryPlugin):
    """See the documentation above."""

    NAME = "ppec.cloud.run_plan"

    def verify_file(self, path):
        return path.endswith(".run_plan") and super().verify_file(path)

    def parse(self, inventory, loader, path, cache=True):
        super().parse(inventory, loader, path, cache)
        with Path(path).open(encoding="utf-8") as source:
            plan_path = source.readline().rstrip("\n")
        inventory.add_group(GROUP)
        for host in sorted(_hosts(plan_path)):
            inventory.add_host(host, group=GROUP)
        inventory.set_variable(GROUP, "ansible_connection", "local")
        inventory.set_variable(GROUP, "ansible_python_interpreter", sys.executable)
        inventory.set_variable(GROUP, "ppec_plan_file", plan_path)


def _hosts(plan_path):
    try:
        return list(json.loads(Path(plan_path).read_bytes())["hosts"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AnsibleParserError(f"the plan {plan_path or 'that was to come'} can't be read: {error!r}") from error
