# SPDX-License-Identifier: Apache-2.0
"""The state folder and the database that settings name, opened: for the server, and for commands that need no more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ppec_contract.errors import PpecError
from ppec_orchestrator.settings import Settings
from ppec_orchestrator.store.database import Database


@contextmanager
def opened_database(settings: Settings) -> Iterator[Database]:
    """The database of these settings, migrated."""
    try:
        settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise PpecError(
            "request.invalid",
            f"state_dir {settings.state_dir} can't be made: {error.strerror}",
            hint="Choose a folder that this user may write, by state_dir or PPEC_STATE_DIR.",
            subject="settings",
        ) from error
    database = Database(settings.effective_database_url)
    try:
        database.migrate()
        yield database
    finally:
        database.close()
