# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.limited OUTPUT COMMAND…`: runs a program within limits and prints what it took, as JSON.

A process of its own, and a small one: Linux counts to a program's peak memory what the process that it was forked from
had, and a benchmark has whole fleets.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

MOST_BYTES = 7 * 1024**3
MOST_CPU_S = 60
# A machine that others load gives a process a part of itself.
_MOST_WALL_S = 900


def main() -> None:
    output, *command = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_CPU_S, MOST_CPU_S))
    with Path(output).open("wb") as out:
        try:
            ran = subprocess.run(
                command, stdout=out, stderr=subprocess.DEVNULL, timeout=_MOST_WALL_S, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            ran = -1
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps({"code": ran, "cpu_s": used.ru_utime + used.ru_stime, "peak_mib": used.ru_maxrss / 1024}))


if __name__ == "__main__":
    main()
