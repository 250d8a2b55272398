# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes a list of VMs be there, or gone, through the orchestrator: those that lack are made in one request."""

from __future__ import annotations

import uuid

from ansible_collections.ppec.cloud.plugins.module_utils.orchestrator_vm import (
    ended,
    find,
    given,
    require_same,
    settle,
    shown,
)
from ansible_collections.ppec.cloud.plugins.module_utils.problem import ProblemError

# Options of a create that go into the request as they are; `networks` go with the VMs, for of those asked for together
# some may be there already.
_CREATE = (
    "flavor", "image", "pool", "policy", "region", "datacentre", "cluster", "rack", "host", "vrf", "host_labels",
    "avoid_labels", "groups", "n_plus_one", "max_moves", "user_data", "labels",
)  # fmt: skip
_SHOWN = ("flavor", "image", "pool", "vrf", "host", "labels")


def execute(params, client, check_mode):
    """`changed`, `vms`, `operation` and `diff`. Raises ProblemError."""
    wanted = _wanted(params)
    found = {name: settle(one, client, find(client, name), check_mode) for name, one in wanted.items()}
    absent = params["state"] == "absent"
    if not absent:
        for name, vm in found.items():
            if vm is not None:
                require_same(wanted[name], client, vm)
    names = [name for name, vm in found.items() if (vm is None) != absent]
    if not names:
        return _outcome(found, found)
    if check_mode:
        return _outcome(found, found, names, after={name: _predicted(wanted[name], absent) for name in names})
    path, body = _deletion(names) if absent else _creation(params, [wanted[name] for name in names])
    operation = client.post(path, body, idempotency_key=uuid.uuid4().hex)
    if params["wait"]:
        operation = ended(client, operation, params, ", ".join(names))
    return _outcome(found, {name: find(client, name) for name in found}, names, operation)


def _wanted(params):
    """By name, the options of each VM: its own, and for the rest those of all."""
    names = [one["name"] for one in params["vms"]]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ProblemError("request.invalid", f"vms hold the name {twice[0]} twice", subject=f"vm {twice[0]}")
    return {one["name"]: {**params, **given(one)} for one in params["vms"]}


def _deletion(names):
    return "vms/actions", {"action": "delete", "vms": names}


def _creation(params, wanted):
    body = {option: params[option] for option in _CREATE if params[option] is not None}
    return "vms", {**body, "items": [_item(params, one) for one in wanted]}


def _item(params, wanted):
    """Of a VM what is its own; its networks in any case."""
    own = next(one for one in params["vms"] if one["name"] == wanted["name"])
    item = {key: value for key, value in given(own).items() if key != "networks"}
    networks = [given(network) for network in wanted["networks"] or ()]
    return {**item, "networks": networks} if networks else item


def _outcome(before, vms, names=(), operation=None, after=None):
    found = {name: shown(vm) for name, vm in vms.items()}
    return {
        "changed": bool(names),
        "vms": [vm for vm in vms.values() if vm is not None],
        "operation": operation,
        "diff": {"before": {name: shown(vm) for name, vm in before.items()}, "after": {**found, **(after or {})}},
    }


def _predicted(wanted, absent):
    if absent:
        return {}
    return {"state": "running", **{key: wanted[key] for key in _SHOWN if wanted[key] is not None}}
