# SPDX-License-Identifier: Apache-2.0
"""`python -m bench [NAME ...]`: takes the figures and writes build/bench.json."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from bench import accepting, creating, footprint, ledger, lifetimes, listing, numa, retuning
from bench.figures import Figures

SUBJECTS: dict[str, Callable[[Figures], None]] = {
    "accepting": accepting.run,
    "creating": creating.run,
    "footprint": footprint.run,
    "numa": numa.run,
    "ledger": ledger.run,
    "lifetimes": lifetimes.run,
    "listing": listing.run,
    "retuning": retuning.run,
}


def main() -> int:
    wanted = sys.argv[1:] or list(SUBJECTS)
    unknown = set(wanted) - set(SUBJECTS)
    if unknown:
        print(f"bench: there is no {', '.join(sorted(unknown))}; there are {', '.join(SUBJECTS)}", file=sys.stderr)
        return 2
    figures = Figures()
    try:
        for name in wanted:
            SUBJECTS[name](figures)
    finally:
        figures.write(Path("build") / "bench.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
