# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The options of the modules that talk to a host's agent: one place for the modules and their action plugin."""

from __future__ import annotations

from ansible_collections.ppec.cloud.plugins.module_utils.agent_vms import (
    METHOD_OF_STATE,
    REQUIRED_TO_CREATE,
    REQUIRED_TO_RESIZE,
)
from ansible_collections.ppec.cloud.plugins.module_utils.contract_table import PROXY_PORT

# `no_log: False` says that a name that sounds like a secret is a path.
CONNECTION = {
    "proxy_address": {"type": "str"},
    "proxy_port": {"type": "int", "default": PROXY_PORT},
    "host_name": {"type": "str"},
    "ca_path": {"type": "path"},
    "certificate_path": {"type": "path"},
    "key_path": {"type": "path", "no_log": False},
    "socket_path": {"type": "path"},
    "deadline_s": {"type": "float", "default": 300.0},
}

_IMAGE = {
    "name": {"type": "str", "required": True},
    "sha256": {"type": "str", "required": True},
    "size_bytes": {"type": "int", "required": True},
    "format": {"type": "str", "required": True, "choices": ["qcow2", "raw"]},
    "url": {"type": "str", "required": True},
}

_ROOT_DISK = {
    "size_mib": {"type": "int", "required": True},
    "image": {"type": "dict", "required": True, "options": _IMAGE},
    "pool": {"type": "str"},
}

_NIC = {
    "mac": {"type": "str", "required": True},
    "bridge": {"type": "str", "required": True},
    "addresses": {"type": "list", "elements": "str"},
    "gateway4": {"type": "str"},
    "gateway6": {"type": "str"},
    "nameservers": {"type": "list", "elements": "str"},
}

_NUMA = {
    "cpus": {"type": "str", "choices": ["dedicated", "shared"]},
    "smt": {"type": "str", "choices": ["prefer", "isolate", "require"]},
    "multi_cell": {"type": "bool"},
    "huge_page_kib": {"type": "int", "choices": [0, 2048, 1048576]},
}

# User data may hold passwords: it is kept out of logs and results.
VM = {
    "vm_id": {"type": "str", "required": True},
    "name": {"type": "str"},
    "vcpus": {"type": "int"},
    "memory_mib": {"type": "int"},
    "max_vcpus": {"type": "int"},
    "max_memory_mib": {"type": "int"},
    "numa": {"type": "dict", "options": _NUMA},
    "cells": {"type": "list", "elements": "int"},
    "root_disk": {"type": "dict", "options": _ROOT_DISK},
    "nvme_drives": {"type": "int"},
    "nics": {"type": "list", "elements": "dict", "options": _NIC},
    "user_data": {"type": "str", "no_log": True},
    "tags": {"type": "dict"},
}

CHANGE = {
    "state": {"type": "str", "choices": list(METHOD_OF_STATE), "default": "present"},
    "operation_id": {"type": "str"},
    "fence": {"type": "int", "default": 0},
    "timeout_s": {"type": "float", "default": 30.0},
    "force": {"type": "bool", "default": False},
    "thaw_after_s": {"type": "float", "default": 60.0},
}

# Module: the keyword arguments of AnsibleModule, and of the validation in the action plugin.
AGENT_VM = {
    "argument_spec": {**VM, **CHANGE, **CONNECTION},
    "mutually_exclusive": [("proxy_address", "socket_path")],
    "required_if": [("state", "present", REQUIRED_TO_CREATE), ("state", "resized", REQUIRED_TO_RESIZE)],
}

AGENT_VMS = {
    "argument_spec": {
        "vms": {"type": "list", "elements": "dict", "options": VM},
        "plan_file": {"type": "path"},
        **CHANGE,
        **CONNECTION,
    },
    "mutually_exclusive": [("vms", "plan_file"), ("proxy_address", "socket_path")],
    "required_one_of": [("vms", "plan_file")],
}

AGENT_VM_INFO = {
    "argument_spec": {
        "vm_ids": {"type": "list", "elements": "str", "default": []},
        "names": {"type": "list", "elements": "str", "default": []},
        **CONNECTION,
    },
    "mutually_exclusive": [("proxy_address", "socket_path")],
}

AGENT_INFO = {
    "argument_spec": {"report": {"type": "bool", "default": True}, **CONNECTION},
    "mutually_exclusive": [("proxy_address", "socket_path")],
}
