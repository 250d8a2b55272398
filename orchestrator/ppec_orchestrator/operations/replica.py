# SPDX-License-Identifier: Apache-2.0
"""One orchestrator process on one state directory."""

from __future__ import annotations

import fcntl
import os
import uuid
from pathlib import Path

from ppec_contract.errors import PpecError


class Replica:
    """Who this process is. `<folder>/replica` holds a lasting name and is locked for as long as the process lives, so
    leases under that name can't belong to anybody living when the next process starts."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / "replica"
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise PpecError(
                "resource.in_use",
                f"another orchestrator runs on the state directory {folder}",
                hint="Give each replica a state directory of its own.",
                subject=f"state directory {folder}",
            ) from error
        self.name = self._file.read().strip()
        if not self.name:
            self.name = uuid.uuid4().hex
            self._file.write(self.name)
            self._file.flush()
        self.owner = f"{self.name}:{uuid.uuid4().hex[:12]}"

    def close(self) -> None:
        self._file.close()
