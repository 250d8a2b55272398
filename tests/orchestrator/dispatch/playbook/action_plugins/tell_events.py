# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Appends an event, waits while the file `hold` of the call's parameters exists, and appends another."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from ansible.plugins.action import ActionBase


class ActionModule(ActionBase):
    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        host = task_vars["inventory_hostname"]
        call = json.loads((Path(task_vars["ppec_plan_file"]).parent / "calls" / f"{host}.json").read_text())
        parameters = call["parameters"]
        for more in ({"accepted": True}, {"problem": self.problem()}):
            line = json.dumps({"host": host, "at_unix_ms": int(time.time() * 1000), **more})
            with Path(call["run"]["events_path"]).open("a") as events:
                events.write(line + "\n")
            while parameters.get("hold") and Path(parameters["hold"]).exists():
                time.sleep(0.01)
        return {**result, "proxy_sessions": 1, "pid": os.getpid(), "secret_seen": "PPEC_SECRET" in os.environ}

    def problem(self):
        # What tells a warm start from a cold one: only the fork server has imported this.
        import sys

        warm = "ppec_orchestrator.dispatch.playbook_child" in sys.modules
        return {"type": "t", "title": "t", "status": 503, "code": "run.failed", "detail": f"warm={warm}"}
