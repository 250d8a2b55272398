# SPDX-License-Identifier: Apache-2.0
"""A fresh SQLite file that several open at once: `serve` and `token create` on a new state directory do."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sqlalchemy import text

from ppec_orchestrator.store.database import Database

ROUNDS = 60
AT_ONCE = 4


def test_none_is_refused_for_another(tmp_path: Path) -> None:
    """Of those who switch it to write-ahead logging at the same moment SQLite refuses some, busy timeout or not.

    One round in ten or so hits the moment.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for number in range(ROUNDS):
            together = threading.Barrier(AT_ONCE)

            def open_one(path: Path = tmp_path / f"{number}.sqlite", together: threading.Barrier = together) -> str:
                database = Database(f"sqlite:///{path}")
                together.wait(60)
                try:
                    with database.read() as conn:
                        return str(conn.execute(text("PRAGMA journal_mode")).scalar_one())
                finally:
                    database.close()

            modes = [made.result() for made in [pool.submit(open_one) for _ in range(AT_ONCE)]]
            assert modes == ["wal"] * AT_ONCE
