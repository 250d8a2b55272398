# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes the VMs of one host as a playbook wants them: read, compare, act. Pure but for the client it is given.

The same code runs in the action plugin on the controller and in the module on the host.
"""

from __future__ import annotations

import uuid

from ansible_collections.ppec.cloud.plugins.module_utils.contract_table import MAX_FRAME_BYTES, MAX_VMS_PER_CALL
from ansible_collections.ppec.cloud.plugins.module_utils.messages import encode_object
from ansible_collections.ppec.cloud.plugins.module_utils.problem import ProblemError
from ansible_collections.ppec.cloud.plugins.module_utils.vm_comparison import differences, predicted, shown

# What `state: present` needs of a VM; the contract's VmSpec has the same list.
REQUIRED_TO_CREATE = ("vm_id", "name", "vcpus", "memory_mib", "cells", "root_disk")
REQUIRED_TO_RESIZE = ("vcpus", "memory_mib")
METHOD_OF_STATE = {
    "present": "CreateVms",
    "absent": "DeleteVms",
    "started": "StartVms",
    "stopped": "StopVms",
    "resized": "ResizeVms",
    "restarted": "RebootVms",
    "reset": "ResetVms",
    "paused": "PauseVms",
    "resumed": "ResumeVms",
    "frozen": "FreezeVms",
    "thawed": "ThawVms",
}
# What a guest is asked for, with a time to obey and what follows when it doesn't.
ASKED_OF_GUESTS = ("stopped", "restarted")
# The power state that a state is, where a host can see it; then there is nothing to do.
POWER_OF_STATE = {"started": "running", "stopped": "stopped", "paused": "paused", "resumed": "running"}
# The power states in which a VM can be brought into a state at all; otherwise a start or a resume comes first.
POSSIBLE_IN = {
    "restarted": ("running",),
    "reset": ("running",),
    "paused": ("running", "paused"),
    "resumed": ("running", "paused"),
    "frozen": ("running",),
}

# Of a frame, what is left when the call around the VMs has had its share.
_VMS_BYTES = MAX_FRAME_BYTES - 64 * 1024


def execute(params, client, check_mode):
    """One result per VM, in order; `failed` when any VM failed. Raises ProblemError when the host as a whole did."""
    state = params["state"]
    wanted = [without_none(vm) for vm in params["vms"]]
    _require_valid(wanted, state)
    before = _list(client, wanted)
    # Settled holds the VMs that need no call: right already, or impossible.
    settled = {vm["vm_id"]: _settled(vm, before.get(vm["vm_id"]), state) for vm in wanted}
    to_do = [vm for vm in wanted if settled[vm["vm_id"]] is None]
    if check_mode:
        acted = {vm["vm_id"]: _result(vm, changed=True, vm=before.get(vm["vm_id"])) for vm in to_do}
        after = {vm["vm_id"]: predicted(vm, before.get(vm["vm_id"]), state, POWER_OF_STATE) for vm in to_do}
    else:
        acted = _act(params, to_do, client)
        after = {vm_id: shown(result["vm"]) for vm_id, result in acted.items() if result["problem"] is None}
    results = [settled[vm["vm_id"]] or acted[vm["vm_id"]] for vm in wanted]
    return _outcome(results, {vm_id: shown(vm) for vm_id, vm in before.items()}, after)


def write_parameters(params, vms):
    """The parameters of the changing call for `params["state"]` on `vms`."""
    call = {"operation_id": params["operation_id"], "fence": params["fence"]}
    if params["state"] == "present":
        return {**call, "vms": vms}
    if params["state"] == "resized":
        sizes = [{key: vm[key] for key in ("vm_id", *REQUIRED_TO_RESIZE)} for vm in vms]
        return {**call, "sizes": sizes, "timeout_s": params["timeout_s"]}
    call["vm_ids"] = [vm["vm_id"] for vm in vms]
    if params["state"] in ASKED_OF_GUESTS:
        call.update(timeout_s=params["timeout_s"], force=params["force"])
    if params["state"] == "frozen":
        call["thaw_after_s"] = params["thaw_after_s"]
    return call


def new_operation_id():
    """An operation id of our own, for a task that was not given one."""
    return f"ansible-{uuid.uuid4().hex}"


def without_none(value):
    """The options that were given: the contract's own defaults stand for the others."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value


def _require_valid(wanted, state):
    ids = set()
    for vm in wanted:
        try:
            # The one spelling the agent answers with, so that ids can be compared.
            vm["vm_id"] = str(uuid.UUID(vm["vm_id"]))
        except ValueError as error:
            raise ProblemError("request.invalid", f"vm_id {vm['vm_id'][:64]!r} is not a UUID") from error
        if vm["vm_id"] in ids:
            raise ProblemError("request.invalid", f"vm_id {vm['vm_id']} is given twice", subject=f"vm {vm['vm_id']}")
        ids.add(vm["vm_id"])
    for vm in wanted:
        required = {"present": REQUIRED_TO_CREATE, "resized": REQUIRED_TO_RESIZE}.get(state, ())
        missing = [name for name in required if name not in vm]
        if missing:
            raise ProblemError(
                "request.invalid",
                f"vm {vm.get('name', vm['vm_id'])}: state {state} needs {', '.join(missing)} too",
                subject=f"vm {vm['vm_id']}",
            )


def _list(client, wanted):
    found = {}
    for part in parts(wanted):
        reply = client.call("ListVms", {"vm_ids": [vm["vm_id"] for vm in part]})
        found.update((vm["vm_id"], vm) for vm in reply["vms"])
    return found


def parts(vms):
    """The VMs (specs or ids) cut into what one call takes: by their number, and by the length of the message."""
    part, size = [], 0
    for vm in vms:
        length = len(encode_object(vm)) + 1
        if part and (len(part) == MAX_VMS_PER_CALL or size + length > _VMS_BYTES):
            yield part
            part, size = [], 0
        part.append(vm)
        size += length
    if part:
        yield part


def _settled(vm, found, state):
    """The result of a VM that needs no call, or None."""
    if state == "present":
        return None if found is None else _existing(vm, found)
    if state == "absent":
        return _result(vm) if found is None else None
    if found is None:
        problem = ProblemError(
            "vm.not_found",
            f"vm {vm.get('name', vm['vm_id'])} is not on this host",
            hint="Create it with state present first.",
            subject=f"vm {vm['vm_id']}",
        )
        return _result(vm, problem=problem.body())
    if found["state"] == POWER_OF_STATE.get(state) or (state == "thawed" and found["state"] == "stopped"):
        return _result(vm, vm=found)
    if state == "resized" and all(vm[key] == _to_be(found)[key] for key in REQUIRED_TO_RESIZE):
        return _result(vm, vm=found)
    possible = POSSIBLE_IN.get(state)
    return _impossible(vm, found, state) if possible and found["state"] not in possible else None


def _to_be(found):
    """The size a VM has, or will have from its next start on."""
    return found.get("pending") or found


def _impossible(vm, found, state):
    problem = ProblemError(
        "vm.wrong_state",
        f"vm {found['name']} can't be {state}: it is {found['state']}",
        hint="Resume it first." if found["state"] == "paused" else "Start it first.",
        subject=f"vm {vm['vm_id']}",
        details={"state": found["state"]},
    )
    return _result(vm, vm=found, problem=problem.body())


def _existing(vm, found):
    faults = differences(vm, found)
    if not faults:
        return _result(vm, vm=found)
    problem = ProblemError(
        "vm.exists",
        f"vm {vm['name']} exists and differs: {'; '.join(faults)}",
        hint="None of this can be changed in place: delete the VM and create it again, or correct the task.",
        subject=f"vm {vm['vm_id']}",
        details={"differences": faults},
    )
    return _result(vm, vm=found, problem=problem.body())


def _act(params, to_do, client):
    call = dict(params, operation_id=params.get("operation_id") or new_operation_id())
    acted = {}
    for part in parts(to_do):
        reply = client.call(METHOD_OF_STATE[params["state"]], write_parameters(call, part))
        acted.update((result["vm_id"], _completed(result)) for result in reply["results"])
    for vm in to_do:
        if vm["vm_id"] not in acted:
            problem = ProblemError("internal.error", f"the agent gave no result for vm {vm['vm_id']}")
            acted[vm["vm_id"]] = _result(vm, problem=problem.body())
    return acted


def _completed(result):
    """A result off the wire, with what the contract lets a peer leave out."""
    return {"name": "", "changed": False, "vm": None, "problem": None, "stage_ms": {}, "replayed": False, **result}


def _result(wanted, **given):
    return _completed({"vm_id": wanted["vm_id"], "name": wanted.get("name", ""), **given})


def _outcome(results, before, after):
    failed = [result for result in results if result["problem"]]
    labels = {r["vm_id"]: r["name"] or (r["vm"] or {}).get("name") or r["vm_id"] for r in results}
    diff_before = {labels[vm_id]: vm for vm_id, vm in before.items() if vm}
    diff_after = {labels[vm_id]: vm for vm_id, vm in {**before, **after}.items() if vm}
    outcome = {
        "changed": any(result["changed"] for result in results),
        "vms": results,
        "failed_names": [labels[result["vm_id"]] for result in failed],
        "diff": {"before": {"vms": diff_before}, "after": {"vms": diff_after}},
    }
    if failed:
        first = failed[0]["problem"]
        outcome["failed"] = True
        outcome["msg"] = (
            f"{len(failed)} of {len(results)} VMs failed; {labels[failed[0]['vm_id']]}: "
            f"{first['code']}: {first['detail']} {first.get('hint', '')}".rstrip()
        )
    return outcome
