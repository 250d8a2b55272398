# SPDX-License-Identifier: Apache-2.0
"""The largest smaller sizes that a VM would fit with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ppec_orchestrator.placement.changes import OtherSize
from ppec_orchestrator.placement.request import Shape

# No VM may be smaller (`ppec_contract/vm.py`).
LEAST_MEMORY_MIB = 64
# Where each trial is a long one: a size has so many parts of what was asked for, all but one at the most. Less than one
# would hardly be the VM that was asked for.
PARTS = 16
# Of one thing: how many units are the least, how many are asked for, and the size with so many.
_Sized = tuple[int, int, Callable[[int], Shape]]


class Sizes:
    """Of one VM. `fits` says whether it fits with a size; a few are tried if that is `costly`."""

    def __init__(self, shape: Shape, fits: Callable[[Shape], bool], *, costly: bool) -> None:
        self._shape = shape
        self._fits = fits
        self._parts = PARTS if costly else None

    def smallest_fits(self) -> bool:
        """Where not even that fits, no size does."""
        return self._fits(self.smallest)

    @property
    def smallest(self) -> Shape:
        return smallest(self._shape, self._parts)

    def largest(self) -> Iterator[OtherSize]:
        """With fewer vCPUs, less memory, a smaller disk or fewer drives; if none of these helps alone, with fewer vCPUs
        and less memory in proportion; if not even that does, with a smaller disk as well; or else in whatever
        proportions."""
        shape = self._shape
        # Mostly no size fits, and then one look tells.
        if not self.smallest_fits():
            return
        found = [size for each in self._alone() if (size := self._largest(*each))]
        for sized in (self._in_proportion, self._smaller_throughout):
            found = found or [size for size in (self._largest(1, shape.vcpus // 2, sized),) if size]
        for size in found or [self._grown()]:
            yield OtherSize(size.vcpus, size.memory_mib, size.disk_mib, _lost(size, shape), size.nvme)

    # --- what is tried -----------------------------------------------------------------------------------------------

    def _alone(self) -> list[_Sized]:
        shape, page_mib = self._shape, _page_mib(self._shape)
        return [
            (1, shape.vcpus // 2, lambda units: replace(shape, vcpus=2 * units)),
            (
                _least_pages(shape),
                shape.memory_mib // page_mib,
                lambda units: replace(shape, memory_mib=units * page_mib),
            ),
            (1, shape.disk_mib, lambda units: replace(shape, disk_mib=units)),
            (1, shape.nvme, lambda units: replace(shape, nvme=units)),
        ]

    def _in_proportion(self, units: int) -> Shape:
        shape, page_mib = self._shape, _page_mib(self._shape)
        pages = max(shape.memory_mib * 2 * units // shape.vcpus // page_mib, _least_pages(shape))
        return replace(shape, vcpus=2 * units, memory_mib=min(pages * page_mib, shape.memory_mib))

    def _smaller_throughout(self, units: int) -> Shape:
        shape = self._shape
        return replace(self._in_proportion(units), disk_mib=-(-shape.disk_mib * 2 * units // shape.vcpus))

    def _grown(self) -> Shape:
        """The smallest there is, with as many vCPUs as fit then, then memory, drives and disk."""
        shape, size = self._shape, self.smallest
        sizes: list[tuple[str, int, int]] = [
            ("vcpus", 2, shape.vcpus), ("memory_mib", _page_mib(shape), shape.memory_mib), ("nvme", 1, shape.nvme),
            ("disk_mib", 1, shape.disk_mib),
        ]  # fmt: skip
        for name, unit, most in sizes:
            size = self._with_most(size, name, unit, most)
        return size

    def _with_most(self, size: Shape, name: str, unit: int, most: int) -> Shape:
        """With as much as fits of one thing, `most` at the most; `size` fits."""
        least = int(getattr(size, name)) // unit

        def sized(units: int) -> Shape:
            more: dict[str, Any] = {name: units * unit}
            return replace(size, **more)

        return self._largest(least, most // unit + 1, sized) or size

    # --- trying ------------------------------------------------------------------------------------------------------

    def _largest(self, least: int, most: int, sized: Callable[[int], Shape]) -> Shape | None:
        """With the most units below `most` with which the VM fits, `least` at the least: what fits with more fits with
        fewer."""
        step = _step(most, self._parts)
        first, beyond = -(-least // step), -(-most // step)
        if first >= beyond or not self._fits(sized(first * step)):
            return None
        low, high = first - 1, beyond
        while high - low > 1:
            middle = (low + high) // 2
            if self._fits(sized(middle * step)):
                low = middle
            else:
                high = middle
        return sized(low * step) if low >= first else None


def smallest(shape: Shape, parts: int | None = None) -> Shape:
    """The smallest size of such a VM that is ever tried; without drives it would be one of another kind. With `parts`,
    not less than one of them."""
    page_mib = _page_mib(shape)

    def units(least: int, most: int) -> int:
        step = _step(most, parts)
        return -(-least // step) * step

    return replace(
        shape,
        vcpus=min(2 * units(1, shape.vcpus // 2), shape.vcpus),
        memory_mib=min(units(_least_pages(shape), shape.memory_mib // page_mib) * page_mib, shape.memory_mib),
        disk_mib=min(units(1, shape.disk_mib), shape.disk_mib),
        nvme=min(units(1, shape.nvme), shape.nvme),
    )


def _step(most: int, parts: int | None) -> int:
    return max(most // parts, 1) if parts else 1


def _lost(size: Shape, wanted: Shape) -> float:
    """The largest share that is given up of anything; on shared storage a VM has no disk of a host."""
    pairs = [(size.vcpus, wanted.vcpus), (size.memory_mib, wanted.memory_mib)]
    pairs += [(size.disk_mib, wanted.disk_mib), (size.nvme, wanted.nvme)]
    return max(1 - less / all_of_it for less, all_of_it in pairs if all_of_it)


def _page_mib(shape: Shape) -> int:
    return max(shape.numa.huge_page_kib // 1024, 1)


def _least_pages(shape: Shape) -> int:
    return -(-LEAST_MEMORY_MIB // _page_mib(shape))
