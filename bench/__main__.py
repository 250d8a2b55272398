# SPDX-License-Identifier: Apache-2.0
"""`python -m bench [NAME ...]`: takes the figures and writes build/bench.json."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from bench import creating, footprint, ledger, numa, planning, retuning
from bench.figures import Figures


def main() -> int:
    arguments = _parser().parse_args()
    subjects: dict[str, Callable[[Figures], None]] = {
        "creating": creating.run,
        "footprint": footprint.run,
        "numa": numa.run,
        "ledger": ledger.run,
        "retuning": retuning.run,
        "planning": lambda found: planning.run(
            found, arguments.seed or planning.SEEDS, arguments.hosts or planning.SIZES
        ),
    }
    wanted = arguments.names or list(subjects)
    unknown = set(wanted) - set(subjects)
    if unknown:
        print(f"bench: there is no {', '.join(sorted(unknown))}; there are {', '.join(subjects)}", file=sys.stderr)
        return 2
    figures = Figures()
    try:
        for name in wanted:
            subjects[name](figures)
    finally:
        figures.write(Path("build") / "bench.json")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description="Takes the figures and writes build/bench.json.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to measure; all of it if left out")
    parser.add_argument("--seed", type=int, action="append", help="planning: of a fleet; may be given again")
    parser.add_argument("--hosts", type=int, action="append", help="planning: the size of a fleet; may be given again")
    return parser


if __name__ == "__main__":
    sys.exit(main())
