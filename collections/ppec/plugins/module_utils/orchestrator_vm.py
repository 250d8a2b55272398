# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes one VM of the fleet as a playbook wants it, through the orchestrator: read, compare, act, wait."""

from __future__ import annotations

import ipaddress
import uuid

from ansible_collections.ppec.cloud.plugins.module_utils.orchestrator_client import segment_path
from ansible_collections.ppec.cloud.plugins.module_utils.problem import ProblemError

# Options of a create that go into the request as they are.
_CREATE = ("flavor", "image", "policy", "datacentre", "cluster", "rack", "host", "vrf", "user_data", "tags")
_PLACE_OF_HOST = ("datacentre", "cluster", "rack")
_SHOWN = ("flavor", "image", "vrf", "host", "tags")
_ACTION = {
    "absent": "delete",
    "started": "start",
    "stopped": "stop",
    "restarted": "reboot",
    "reset": "reset",
    "paused": "pause",
    "resumed": "resume",
}
# The power state that a state is; then there is nothing to do.
_OBSERVED = {"started": "running", "stopped": "stopped", "paused": "paused", "resumed": "running"}
# The power state after any of them.
_AFTER = {**_OBSERVED, "restarted": "running", "reset": "running"}
# The power states in which a VM can be brought into a state at all. Of one that is unknown the host decides.
_POSSIBLE_IN = {
    "restarted": ("running", "unknown"),
    "reset": ("running", "unknown"),
    "paused": ("running", "paused", "unknown"),
    "resumed": ("running", "paused", "unknown"),
}
# What a guest is asked for, with a time to obey and what follows when it doesn't.
_ASKED_OF_GUESTS = ("stopped", "restarted")


def execute(params, client, check_mode):
    """`changed`, `vm`, `operation` and `diff`. Raises ProblemError."""
    state, name = params["state"], params["name"]
    found = _find(client, name)
    found = _settle(params, client, found, check_mode)
    if state == "present" and found is not None:
        _require_same(params, client, found)
        return _outcome(params, found, found)
    if state == "absent" and found is None:
        return _outcome(params, None, None)
    if state in _AFTER:
        _require_possible(params, found)
        if found["observed"] == _OBSERVED.get(state):
            return _outcome(params, found, found)
    if check_mode:
        return _outcome(params, found, found, changed=True, predicted=True)
    operation = client.post(*_change(params), idempotency_key=uuid.uuid4().hex)
    if params["wait"]:
        operation = _ended(client, operation, params, name)
    return _outcome(params, found, _find(client, name), changed=True, operation=operation)


def _require_possible(params, found):
    state, name = params["state"], params["name"]
    if found is None:
        raise ProblemError(
            "vm.not_found",
            f"vm {name} does not exist",
            hint="Create it with state present first.",
            subject=f"vm {name}",
        )
    observed = found["observed"]
    if observed not in _POSSIBLE_IN.get(state, (observed,)):
        raise ProblemError(
            "vm.wrong_state",
            f"vm {name} can't be {state}: it is {observed}",
            hint="Resume it first." if observed == "paused" else "Start it first.",
            subject=f"vm {name}",
            details={"state": observed},
        )


def _find(client, name):
    """The VM, or None. A create that did not work out leaves a record, but no VM."""
    try:
        vm = client.get(segment_path("vms", name))
    except ProblemError as problem:
        if problem.code == "vm.not_found":
            return None
        raise
    return None if vm["record"] == "failed" else vm


def _settle(params, client, found, check_mode):
    """Lets an operation that is making or deleting the VM right now end first, when we may wait."""
    if found is None or found["record"] not in ("creating", "deleting"):
        return found
    if check_mode or not params["wait"]:
        return None if found["record"] == "deleting" else found
    operation = client.get(segment_path("operations", found["operation_id"]))
    client.wait_operation(operation, params["wait_timeout_s"])
    return _find(client, params["name"])


def _change(params):
    name = params["name"]
    if params["state"] == "present":
        body = {option: params[option] for option in _CREATE if params[option] is not None}
        if params["networks"] is not None:
            body["networks"] = [_given(network) for network in params["networks"]]
        return "vms", {"name": name, **body}
    body = {"action": _ACTION[params["state"]], "vms": [name]}
    if params["state"] in _ASKED_OF_GUESTS:
        body.update(timeout_s=params["timeout_s"], force=params["force"])
    return "vms/actions", body


def _given(network):
    return {key: value for key, value in network.items() if value is not None}


def _require_same(params, client, found):
    wanted = {option: params[option] for option in _SHOWN if params[option] is not None}
    have = dict(found)
    places = {option: params[option] for option in _PLACE_OF_HOST if params[option] is not None}
    if places and found.get("host"):
        wanted.update(places)
        have.update(client.get(segment_path("hosts", found["host"])))
    faults = [
        f"{option} wanted {wanted[option]}, found {have.get(option)}"
        for option in wanted
        if _differs(wanted[option], have.get(option))
    ]
    has = {one["address"] for one in found.get("addresses", ())}
    asked = [network["address"] for network in params["networks"] or () if network["address"] is not None]
    fixed = [_spelt_as_answered(address) for address in asked]
    faults += [f"address wanted {one}, found {', '.join(sorted(has)) or 'none'}" for one in fixed if one not in has]
    if faults:
        raise ProblemError(
            "vm.exists",
            f"vm {found['name']} exists and differs: {'; '.join(faults)}",
            hint="None of this can be changed in place: delete the VM and create it again, or correct the task.",
            subject=f"vm {found['name']}",
            details={"differences": faults},
        )


def _spelt_as_answered(address):
    """`fd00::0:5` is answered as `fd00::5`."""
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        return address


def _differs(wanted, found):
    return wanted != (found or {} if isinstance(wanted, dict) else found)


def _ended(client, operation, params, name):
    operation = client.wait_operation(operation, params["wait_timeout_s"])
    if operation["state"] == "succeeded":
        return operation
    items = [item for item in operation.get("items", ()) if item.get("problem")]
    problem = ProblemError.from_body(items[0]["problem"] if items else operation.get("problem"))
    raise problem or ProblemError(
        "run.failed",
        f"operation {operation['operation_id']} on vm {name} ended {operation['state']}",
        hint="`ppec operation show` has its steps.",
        subject=f"vm {name}",
    )


def _outcome(params, before, after, changed=False, predicted=False, operation=None):
    shown_after = _predicted(params, before) if predicted else _shown(after)
    return {
        "changed": changed,
        "vm": after,
        "operation": operation,
        "diff": {"before": _shown(before), "after": shown_after},
    }


def _shown(vm):
    return {} if vm is None else {"state": vm["observed"], **{key: vm.get(key) for key in _SHOWN}}


def _predicted(params, before):
    if params["state"] == "absent":
        return {}
    if params["state"] == "present":
        return {"state": "running", **{key: params[key] for key in _SHOWN if params[key] is not None}}
    return {**_shown(before), "state": _AFTER[params["state"]]}
