# SPDX-License-Identifier: Apache-2.0
"""Batches that are made to their end, and how each of their VMs came out."""

from __future__ import annotations

from typing import Any

from ppec_contract.api_operations import ItemState, OperationView


def create(world: Any, replica: Any, count: int = 4, **more: Any) -> OperationView:
    accepted = replica.create(world.batch(count, **more), world.ask)
    ended: OperationView = world.ended(accepted.operation_id)
    return ended


def states(view: OperationView) -> list[ItemState]:
    return [item.state for item in view.items]
