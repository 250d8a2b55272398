# SPDX-License-Identifier: Apache-2.0
"""Which drives are clean: a small file for each, which outlives the agent and the host's power.

*Clean* is written after a drive was erased, and taken back before it is handed over: whatever happens in between, a
drive that is not known to be clean is erased before anybody gets it. *Given* says that what is on it is a VM's. Of a
drive without a record nobody knows whose data it holds; its serial number tells it from another in the same slot.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path

from ppec_agentd.files import os_errors, sync_directory, write_whole


class DriveRecord(StrEnum):
    UNKNOWN = "unknown"
    GIVEN = "given"
    CLEAN = "clean"


class DriveRecords:
    """In a folder of their own, made when it is first written to. All of it blocks, and is on disk when it returns."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, address: str, serial: str) -> DriveRecord:
        """`serial` "" asks for the drive in that slot whichever it is."""
        try:
            said = json.loads(self._path(address).read_bytes())
            record, known = DriveRecord(said["record"]), str(said["serial"])
        except (OSError, ValueError, KeyError, TypeError):
            return DriveRecord.UNKNOWN
        # A domain made by hand may have had the drive before anybody could read its serial number.
        same = known == serial or not serial or (not known and record is DriveRecord.GIVEN)
        return record if same else DriveRecord.UNKNOWN

    def write(self, address: str, serial: str, record: DriveRecord) -> None:
        """Raises `internal.error`, or `disk.full`."""
        with os_errors(f"the record of drive {address} can't be written", f"drive {address}"):
            if not self._folder.is_dir():
                # Another drive's record may be the first at the same moment.
                self._folder.mkdir(mode=0o700, exist_ok=True)
                sync_directory(self._folder.parent)
            write_whole(self._path(address), json.dumps({"serial": serial, "record": record.value}).encode())

    def give(self, address: str) -> None:
        """From now on what is on the drive is a VM's. Raises as `write` does."""
        try:
            serial = str(json.loads(self._path(address).read_bytes())["serial"])
        except (OSError, ValueError, KeyError, TypeError):
            serial = ""
        self.write(address, serial, DriveRecord.GIVEN)

    def forget(self, address: str) -> None:
        with os_errors(f"the record of drive {address} can't be removed", f"drive {address}"):
            self._path(address).unlink(missing_ok=True)
            if self._folder.is_dir():
                sync_directory(self._folder)

    def _path(self, address: str) -> Path:
        return self._folder / f"{address}.json"
