# SPDX-License-Identifier: Apache-2.0
"""An amount over several cells."""

from __future__ import annotations

from collections.abc import Mapping


def even_shares(amount: int, free: Mapping[int, int], unit: int = 1) -> dict[int, int]:
    """Equal shares as far as they go: what one cell lacks, the others give. At most what is free in all.

    Shares are whole units as far as the amount and what is free are.
    """
    shares: dict[int, int] = {}
    order = sorted(free, key=lambda cell: (free[cell], cell))
    for position, cell in enumerate(order):
        fair = -(-amount // (unit * (len(order) - position))) * unit
        shares[cell] = min(free[cell], fair, amount)
        amount -= shares[cell]
    return shares
