# SPDX-License-Identifier: Apache-2.0
"""What a caller of the API may do."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """Look; change VMs; change the fleet itself. Each includes the ones before it."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"

    def includes(self, other: Role) -> bool:
        order = list(Role)
        return order.index(self) >= order.index(other)
