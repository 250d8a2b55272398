# SPDX-License-Identifier: Apache-2.0
"""What is written down of drives."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ppec_agentd.nvme.records import DriveRecord, DriveRecords

DRIVES = 8


def test_the_first_records_of_several_drives_are_written_at_once(tmp_path: Path) -> None:
    """Each is erased on its own, and whichever ends first makes the folder."""
    for number in range(50):
        records, together = DriveRecords(tmp_path / str(number)), threading.Barrier(DRIVES)

        def write(address: str, records: DriveRecords = records, together: threading.Barrier = together) -> None:
            together.wait(timeout=30)
            records.write(address, "S1", DriveRecord.CLEAN)

        addresses = [f"0000:0{drive}:00.0" for drive in range(DRIVES)]
        with ThreadPoolExecutor(DRIVES) as pool:
            list(pool.map(write, addresses))
        assert {records.of(address, "S1") for address in addresses} == {DriveRecord.CLEAN}
