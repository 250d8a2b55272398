# SPDX-License-Identifier: Apache-2.0
"""An array's own memory, item by item: of a handful of items that takes a third of the time it takes through the array.

What is written in one is written in the other. Of an array of several dimensions, the last runs fastest."""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray


def ints(array: NDArray[np.int64]) -> memoryview[int]:
    """Raises ValueError for an array whose items don't lie one after the other."""
    return array.reshape(-1, copy=False).data


def floats(array: NDArray[np.float64]) -> memoryview[float]:
    """As `ints`, of numbers with fractions."""
    return cast("memoryview[float]", array.reshape(-1, copy=False).data)


def bools(array: NDArray[np.bool_]) -> memoryview[bool]:
    """As `ints`, of truths."""
    return cast("memoryview[bool]", array.reshape(-1, copy=False).data)
