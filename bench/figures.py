# SPDX-License-Identifier: Apache-2.0
"""How a figure is taken and told.

Machines are noisy, so a figure that compares is a ratio of two things measured in turn: A and B alternate, and the
figure is the median of the pairwise ratios. Each figure is printed as one line, `bench NAME FIGURE UNIT`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PAIRS = 7


@dataclass
class Figures:
    """What this run has found; `write` leaves it as JSON."""

    found: dict[str, dict[str, float | str]] = field(default_factory=dict)

    def add(self, name: str, figure: float, unit: str, *, bar: str = "") -> None:
        """`bar` is what the figure must reach, in words; it is told, not judged."""
        self.found[name] = {"figure": round(figure, 4), "unit": unit, "bar": bar}
        print(f"bench {name} {figure:.4g} {unit}" + (f"   # bar: {bar}" if bar else ""), flush=True)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.found, indent=1) + "\n")


def paired(a: Callable[[], float], b: Callable[[], float], pairs: int = PAIRS) -> tuple[float, float, float]:
    """Runs a and b in turn, each returning its seconds; the median ratio a/b, and the median of each."""
    taken = [(a(), b()) if number % 2 else tuple(reversed((b(), a()))) for number in range(pairs)]
    return compared([first for first, _ in taken], [second for _, second in taken])


def compared(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """The same of seconds that were taken in turn: the median ratio a/b, and the median of each."""
    ratios = [first / second for first, second in zip(a, b, strict=True)]
    return statistics.median(ratios), statistics.median(a), statistics.median(b)
