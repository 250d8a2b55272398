# SPDX-License-Identifier: Apache-2.0
"""The columns of `host_cell` by the resource they count: all there is for VMs, and what they hold of it."""

from __future__ import annotations

from sqlalchemy import Column

from ppec_orchestrator.placement.demand import CellResource
from ppec_orchestrator.store.tables import host_cell


def whole_column(resource: CellResource) -> Column[int]:
    return host_cell.c[resource]


def used_column(resource: CellResource) -> Column[int]:
    return host_cell.c["memory_used_mib" if resource == "memory_mib" else f"{resource}_used"]
