# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A VM as wanted against a VM as the host has it."""

from __future__ import annotations

_SHOWN = ("state", "vcpus", "memory_mib", "cells", "disk_mib", "image_sha256", "macs")


def shown(vm):
    """The part of a VmInfo that a diff shows (user data and tags are not in it), or None."""
    return None if vm is None else {**{key: vm[key] for key in _SHOWN if key in vm}, **_pool(vm)}


def as_info(spec):
    """The comparable part of a VmSpec in a VmInfo's words."""
    disk = spec["root_disk"]
    return {
        "vcpus": spec["vcpus"],
        "memory_mib": spec["memory_mib"],
        "cells": spec["cells"],
        "disk_mib": disk["size_mib"],
        **_pool(disk),
        "image_sha256": disk["image"]["sha256"],
        "macs": [nic["mac"] for nic in spec.get("nics", [])],
    }


def differences(spec, found):
    """One line per thing that is not as wanted; of a domain PPEC did not make, too little is known to accept it."""
    if not found["managed"]:
        return ["it is a domain that PPEC did not make"]
    wanted = {"name": spec["name"], **as_info(spec)}
    return [
        f"{key} wanted {wanted[key]}, found {found[key]}"
        for key in wanted
        if key in found and _comparable(key, wanted[key]) != _comparable(key, found[key])
    ]


def predicted(spec, found, state, power):
    """What the diff shows after the change, when the change is not made; `power` is the power state of each state."""
    if state == "absent":
        return None
    if state == "present":
        return {"state": "running", **as_info(spec)}
    if state == "resized":
        return {**shown(found), "vcpus": spec["vcpus"], "memory_mib": spec["memory_mib"]}
    return {**shown(found), "state": power.get(state, found["state"])}


def _pool(named):
    """Of a disk that is wanted, or of a VM; none is the host's own place, where agents that know no pools keep all."""
    return {"pool": named["pool"]} if named.get("pool") else {}


def _comparable(key, value):
    return sorted(value) if key in ("cells", "macs") else value
