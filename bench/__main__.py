# SPDX-License-Identifier: Apache-2.0
"""`python -m bench [NAME ...]`: takes the figures and writes build/bench.json."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench import accepting, creating, footprint, ledger, lifetimes, listing, numa, planning, retuning
from bench.figures import Figures

SUBJECTS: dict[str, Callable[[Figures], None]] = {
    "accepting": accepting.run,
    "creating": creating.run,
    "footprint": footprint.run,
    "numa": numa.run,
    "ledger": ledger.run,
    "lifetimes": lifetimes.run,
    "listing": listing.run,
    "planning": planning.run,
    "retuning": retuning.run,
}


def main() -> int:
    arguments = _parser().parse_args()
    of_fleets = partial(planning.run, seeds=arguments.seed, sizes=arguments.hosts)
    subjects: dict[str, Callable[[Figures], None]] = {**SUBJECTS, "planning": of_fleets}
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
    parser.add_argument(
        "--seed", type=int, action="append", default=[], help="planning: of a fleet; may be given again"
    )
    parser.add_argument(
        "--hosts", type=int, action="append", default=[], help="planning: the size of a fleet; may be given again"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
