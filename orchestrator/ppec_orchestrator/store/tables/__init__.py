# SPDX-License-Identifier: Apache-2.0
"""The database schema, whole. SQLite and PostgreSQL alike; migrations are in `store/migrations/`.

Ids that leave the process are UUIDs or names; integers stay inside. Times are UTC (`UtcTime`). JSON columns hold
contract models.

A table is defined in the file of its subject and imported from here: so whoever imports one has all of them in
`metadata`, and foreign keys, which name tables of other subjects, lead somewhere.
"""

from __future__ import annotations

from ppec_orchestrator.store.tables.callers import api_token, idempotency_key
from ppec_orchestrator.store.tables.catalogue import cluster, datacentre, flavor, image, rack
from ppec_orchestrator.store.tables.hosts import (
    certificate,
    enrolment_token,
    host,
    host_cell,
    host_event,
    host_label,
    host_pool,
    host_removal,
    host_search,
)
from ppec_orchestrator.store.tables.ipdb import address, address_event, address_hold, prefix, vrf
from ppec_orchestrator.store.tables.operations import operation, operation_item, step
from ppec_orchestrator.store.tables.schema import UtcTime, metadata
from ppec_orchestrator.store.tables.settings import setting
from ppec_orchestrator.store.tables.vms import (
    VM_IS_ODD,
    allocation,
    allocation_cell,
    plan,
    vm,
    vm_group,
    vm_label,
    vm_search,
)

__all__ = [
    "VM_IS_ODD",
    "UtcTime",
    "address",
    "address_event",
    "address_hold",
    "allocation",
    "allocation_cell",
    "api_token",
    "certificate",
    "cluster",
    "datacentre",
    "enrolment_token",
    "flavor",
    "host",
    "host_cell",
    "host_event",
    "host_label",
    "host_pool",
    "host_removal",
    "host_search",
    "idempotency_key",
    "image",
    "metadata",
    "operation",
    "operation_item",
    "plan",
    "prefix",
    "rack",
    "setting",
    "step",
    "vm",
    "vm_group",
    "vm_label",
    "vm_search",
    "vrf",
]
