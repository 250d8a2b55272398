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
_CREATE = (
    "flavor", "image", "pool", "policy", "region", "datacentre", "cluster", "rack", "host", "vrf", "host_labels",
    "avoid_labels", "groups", "n_plus_one", "max_moves", "user_data", "labels",
)  # fmt: skip
_PLACE_OF_HOST = ("datacentre", "cluster", "rack")
_SHOWN = ("flavor", "image", "pool", "vrf", "host", "labels")
_SIZE = ("vcpus", "memory_mib")
# The states that a size can be asked for in.
_SIZED = ("present", "resized")
_ACTION = {
    "absent": "delete",
    "started": "start",
    "stopped": "stop",
    "restarted": "reboot",
    "reset": "reset",
    "paused": "pause",
    "resumed": "resume",
    "frozen": "freeze",
    "thawed": "thaw",
}
# The power state that a state is; then there is nothing to do.
_OBSERVED = {"started": "running", "stopped": "stopped", "paused": "paused", "resumed": "running"}
# The power state after any of them.
_AFTER = {**_OBSERVED, "restarted": "running", "reset": "running"}
# Whether the file systems are frozen in a state; its power stays as it is.
_FROZEN = {"frozen": True, "thawed": False}
# The power states in which a VM can be brought into a state at all. Of one that is unknown the host decides.
_POSSIBLE_IN = {
    "restarted": ("running", "unknown"),
    "reset": ("running", "unknown"),
    "paused": ("running", "paused", "unknown"),
    "resumed": ("running", "paused", "unknown"),
    "frozen": ("running", "unknown"),
    "thawed": ("running", "stopped", "unknown"),
}
# What a guest is asked for, with a time to obey and what follows when it doesn't.
_ASKED_OF_GUESTS = ("stopped", "restarted")
# How long a guest's agent may take when only the host's own record is wanted.
_BRIEFLY_S = "1"


def execute(params, client, check_mode):
    """`changed`, `vm`, `operation`, `resized` and `diff`. Raises ProblemError."""
    state, name = params["state"], params["name"]
    _require_a_size_where_it_counts(params)
    found = find(client, name)
    found = settle(params, client, found, check_mode)
    if state not in ("present", "absent"):
        _require_possible(params, found)
    elif state == "present" and found is not None:
        require_same(params, client, found)
    if state in _SIZED and found is not None:
        return _sized(params, client, found, found, check_mode)
    if _is_so(params, client, found):
        return _outcome(params, found, found)
    if check_mode:
        return _outcome(params, found, found, changed=True, predicted=True)
    operation = client.post(*_change(params), idempotency_key=uuid.uuid4().hex)
    if params["wait"]:
        operation = ended(client, operation, params, name)
    after = find(client, name)
    if state == "present" and params["wait"] and after is not None:
        # It is made with its flavor's size; another one is a change of its own.
        return _sized(params, client, found, after, check_mode, created=operation)
    return _outcome(params, found, after, changed=True, operation=operation)


def _sized(params, client, before, vm, check_mode, created=None):
    """Has `vm`, which exists, be of the size asked for. `created`: the operation that has made it just now."""
    size = {key: params[key] for key in _SIZE if params[key] not in (None, vm[key])}
    if not size:
        return _outcome(params, before, vm, changed=created is not None, operation=created)
    if check_mode:
        return _outcome(params, before, vm, changed=True, predicted=True)
    body = {**size, "timeout_s": params["timeout_s"]}
    operation = client.patch(segment_path("vms", params["name"]), body, idempotency_key=uuid.uuid4().hex)
    if params["wait"]:
        operation = ended(client, operation, params, params["name"])
    after = find(client, params["name"])
    return _outcome(params, before, after, changed=True, operation=operation)


def _require_a_size_where_it_counts(params):
    state, given = params["state"], [key for key in _SIZE if params[key] is not None]
    if given and state not in _SIZED:
        why = f"{' and '.join(given)} can't be given with state {state}"
    elif not given and state == "resized":
        why = "state resized needs vcpus, memory_mib, or both"
    else:
        return
    raise ProblemError(
        "request.invalid", why, hint="Give a size with state present or resized.", subject=f"vm {params['name']}"
    )


def _is_so(params, client, found):
    """Whether there is nothing to do."""
    state = params["state"]
    if found is None:
        return state == "absent"
    if state not in _FROZEN:
        return found["observed"] == _OBSERVED.get(state)
    if found["observed"] == "stopped":
        return True  # Only thawed comes here: what is off is not frozen.
    return _is_frozen(params, client) is _FROZEN[state]


def _is_frozen(params, client):
    """By the host's own record, whatever the guest's agent says."""
    return client.get(segment_path("vms", params["name"], "guest"), {"timeout_s": _BRIEFLY_S})["frozen"]


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


def find(client, name):
    """The VM, or None. A create that did not work out leaves a record, but no VM."""
    try:
        vm = client.get(segment_path("vms", name))
    except ProblemError as problem:
        if problem.code == "vm.not_found":
            return None
        raise
    return None if vm["record"] == "failed" else vm


def settle(params, client, found, check_mode):
    """Lets an operation that is making or deleting the VM right now end first, when we may wait."""
    if found is None or found["record"] not in ("creating", "deleting"):
        return found
    if check_mode or not params["wait"]:
        return None if found["record"] == "deleting" else found
    operation = client.get(segment_path("operations", found["operation_id"]))
    client.wait_operation(operation, params["wait_timeout_s"])
    return find(client, params["name"])


def _change(params):
    name = params["name"]
    if params["state"] == "present":
        body = {option: params[option] for option in _CREATE if params[option] is not None}
        if params["networks"] is not None:
            body["networks"] = [given(network) for network in params["networks"]]
        return "vms", {"name": name, **body}
    body = {"action": _ACTION[params["state"]], "vms": [name]}
    if params["state"] in _ASKED_OF_GUESTS:
        body.update(timeout_s=params["timeout_s"], force=params["force"])
    if params["state"] == "frozen":
        body["thaw_after_s"] = params["thaw_after_s"]
    return "vms/actions", body


def given(network):
    """The options of a network, or of another mapping, that are given."""
    return {key: value for key, value in network.items() if value is not None}


def require_same(params, client, found):
    """Raises `vm.exists` for what differs of a VM that is there and can't be changed in place."""
    wanted = {option: params[option] for option in _SHOWN if params[option] is not None}
    have = dict(found)
    places = {option: params[option] for option in _PLACE_OF_HOST if params[option] is not None}
    if places and found.get("host"):
        wanted.update(places)
        host = client.get(segment_path("hosts", found["host"]))
        have.update({option: host.get(option) for option in places})
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
            hint="Labels are changed by `ppec vm label`. Nothing else can be changed in place: delete the VM and "
            "create it again, or correct the task.",
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


def ended(client, operation, params, name):
    """The operation once it has ended; raises its reason, or its first VM's, if it has not succeeded."""
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
    shown_after = _predicted(params, before) if predicted else shown(after)
    return {
        "changed": changed,
        "vm": after,
        "operation": operation,
        "resized": _resized(operation),
        "diff": {"before": shown(before), "after": shown_after},
    }


def _resized(operation):
    """When each part of a new size takes effect, once the operation has ended that gave it."""
    items = (operation or {}).get("items") or ({},)
    return items[0].get("resized")


def shown(vm):
    """What a diff shows of a VM."""
    return {} if vm is None else {"state": vm["observed"], **{key: vm.get(key) for key in (*_SHOWN, *_SIZE)}}


def _predicted(params, before):
    if params["state"] == "absent":
        return {}
    given = {key: params[key] for key in (*_SHOWN, *_SIZE) if params[key] is not None}
    if before is None:
        return {"state": "running", **given}
    if params["state"] in _SIZED:
        return {**shown(before), **{key: given[key] for key in _SIZE if key in given}}
    return {**shown(before), "state": _AFTER.get(params["state"], before["observed"])}
