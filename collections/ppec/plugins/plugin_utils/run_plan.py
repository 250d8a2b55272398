# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One host's part of an orchestrator's run: the call in its file beside the plan, and the events of how it went.

The call is read here and sent as it is. Nothing of it becomes a variable or a task argument, because tenants' text in
those would be rendered as a template; for the same reason the task's result holds counts and names only. The files of
other hosts are not looked at: a run may hold many megabytes of user data, and every worker would parse them all.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from ansible_collections.ppec.cloud.plugins.module_utils import agent_vms
from ansible_collections.ppec.cloud.plugins.module_utils.agent_actions import OFF_CONTRACT, off_contract
from ansible_collections.ppec.cloud.plugins.module_utils.agent_client import client_from_params
from ansible_collections.ppec.cloud.plugins.module_utils.problem import ProblemError
from ansible_collections.ppec.cloud.plugins.plugin_utils.event_log import EventLog

# The contract's pattern of a host's name: one part of a path, that never is hidden, `.` or `..`.
_HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_STATE_OF_METHOD = {method: state for state, method in agent_vms.METHOD_OF_STATE.items()}
# What is asked of a host as a whole: a change by a plan of its own, and views, whose replies are passed on.
_RETUNE = "RetuneHost"
VIEWS = ("PlanRetune",)
# Where a call's VMs are in its parameters.
_LISTS = ("vms", "sizes", "vm_ids")


class PlanError(Exception):
    """The plan can't be used; there is nowhere to send events to."""


class HostPart:
    """What a plan says of one host: `terms` are those of the whole run, `call` is None when it has no part in it."""

    def __init__(self, host, terms, call):
        self.host = host
        self.action = terms["action"]
        self.events_path = terms["events_path"]
        self.call = call
        if self.action not in _STATE_OF_METHOD and self.action != _RETUNE and not self.is_view:
            raise PlanError(f"the plan's action {str(self.action)[:64]!r} is not one that a run has")
        if self.call is None:
            return
        change = {} if self.is_view else {"operation_id": terms["operation_id"], "fence": terms["fence"]}
        self.parameters = {**change, **call["parameters"]}
        self.connection = {
            "host_name": host,
            "proxy_address": call["address"],
            "proxy_port": call["port"],
            "deadline_s": terms.get("timeout_s", 300.0),
            **{name: terms[name] for name in ("ca_path", "certificate_path", "key_path")},
        }

    @property
    def is_view(self):
        return self.action in VIEWS

    def calls(self):
        """The parameters of each call: a host with more VMs than one takes is called again, over the same session."""
        name = next((name for name in _LISTS if name in self.parameters), None)
        if name is None:
            return [self.parameters]
        return [{**self.parameters, name: part} for part in agent_vms.parts(self.parameters[name])] or [self.parameters]

    @property
    def vm_ids(self):
        """The VMs that a result is due for."""
        if self.is_view:
            return []
        if self.action == _RETUNE:
            return list(dict.fromkeys(move["vm_id"] for move in self.parameters["plan"]["moves"]))
        for name in ("vms", "sizes"):
            if name in self.parameters:
                return [vm["vm_id"] for vm in self.parameters[name]]
        return list(self.parameters["vm_ids"])


def read_part(path, host):
    """`host`'s part of the plan at `path`, from the host's own file beside it. Raises PlanError."""
    source = call_path(path, host)
    try:
        try:
            call = json.loads(source.read_bytes())
            terms = call["run"]
        except FileNotFoundError:
            # Of a host without a part, only the plan itself can say where to tell so.
            missing, source, call = source, Path(path), None
            plan = json.loads(source.read_bytes())
            terms = plan["run"]
            if host in plan["hosts"]:
                raise PlanError(f"the plan names host {host}, and its file {missing} is missing") from None
        return HostPart(host, terms, call)
    except (OSError, ValueError) as error:
        raise PlanError(f"the plan file {source} can't be read: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"the plan file {source} is not a run plan: {error!r}") from error


def call_path(path, host):
    """The file of `host`'s call, of the plan at `path`. Raises PlanError for what is no host name."""
    if not _HOST_NAME.fullmatch(host):
        raise PlanError(f"{host[:64]!r} is not a host name that a plan can have")
    return Path(path).parent / "calls" / f"{host}.json"


class _Progress:
    """Turns the agent's replies into events, each once: a repeated call tells again what was told before."""

    def __init__(self, events):
        self._events = events
        self._accepted = False
        self.results = {}

    def on_reply(self, reply):
        if not self._accepted:
            self._accepted = True
            self._events.append(accepted=True)
        if reply.get("progress"):
            self._events.append(progress=reply["progress"])
        for result in reply.get("results") or ():
            if result["vm_id"] not in self.results:
                self.results[result["vm_id"]] = result
                self._events.append(result=result)


def carry_out(part):
    """Calls the host and appends the events; the task's result. It failed only when the host as a whole did."""
    events = EventLog(part.events_path, part.host)
    try:
        progress = _Progress(events)
        sessions = 0
        try:
            if part.call is None:
                raise ProblemError("host.not_found", f"the plan has no part for host {part.host}")
            client = client_from_params(part.connection)
            try:
                if part.is_view:
                    events.append(view=client.call(part.action, part.parameters))
                else:
                    for parameters in part.calls():
                        client.call(part.action, parameters, progress.on_reply)
            except OFF_CONTRACT as error:
                raise off_contract(error) from error
            finally:
                sessions = client.sessions_opened
                client.close()
            _require_all(part, progress.results)
        except ProblemError as problem:
            problem.subject = problem.subject or f"host {part.host}"
            events.append(problem=problem.body())
            return {**_counts(part, progress.results, sessions), **_failure(problem)}
        return _counts(part, progress.results, sessions)
    finally:
        events.close()


def predict(part):
    """The task's result in check mode: the host is asked what it has, nothing is changed and no event written."""
    if part.call is None:
        return _failure(ProblemError("host.not_found", f"the plan has no part for host {part.host}"))
    try:
        client = client_from_params(part.connection)
        try:
            outcome = _predicted(part, client)
        except OFF_CONTRACT as error:
            raise off_contract(error) from error
        finally:
            client.close()
    except ProblemError as problem:
        return _failure(problem)
    return _counts(part, {result["vm_id"]: result for result in outcome["vms"]}, client.sessions_opened)


def _predicted(part, client):
    if part.is_view:
        client.call(part.action, part.parameters)
        return {"vms": []}
    if part.action == _RETUNE:
        # Whoever is in the plan moves, unless it is there already.
        ends = {move["vm_id"]: move for move in part.parameters["plan"]["moves"]}
        found = {vm["vm_id"]: vm for vm in client.call("ListVms", {"vm_ids": list(ends)})["vms"]}
        return {"vms": [_predicted_move(vm_id, move, found.get(vm_id)) for vm_id, move in ends.items()]}
    vms = part.parameters.get("vms") or part.parameters.get("sizes")
    vms = vms or [{"vm_id": vm_id} for vm_id in part.parameters["vm_ids"]]
    return agent_vms.execute({"state": _STATE_OF_METHOD[part.action], "vms": vms}, client, True)


def _predicted_move(vm_id, move, found):
    result = {"vm_id": vm_id, "name": move["name"], "changed": False}
    if found is None:
        return {**result, "problem": ProblemError("retune.outdated", f"vm {move['name']} is not on this host").body()}
    return {**result, "changed": found["cells"] != [move["after"]["cell"]]}


def _require_all(part, results):
    missing = [vm_id for vm_id in part.vm_ids if vm_id not in results]
    if missing:
        raise ProblemError(
            "internal.error", f"host {part.host} gave no result for {len(missing)} of {len(part.vm_ids)} VMs"
        )


def _counts(part, results, sessions):
    failed = [result["name"][:63] for result in results.values() if result.get("problem")]
    return {
        "changed": any(result.get("changed") for result in results.values()),
        "action": part.action,
        "vm_count": len(part.vm_ids) if part.call else 0,
        "succeeded": len(results) - len(failed),
        "failed_vms": len(failed),
        "failed_names": failed,
        "proxy_sessions": sessions,
    }


def _failure(problem):
    # The title is the table's; the detail may quote a peer and stays in the event.
    return {"failed": True, "msg": f"{problem.code}: {problem.title}", "code": problem.code}
