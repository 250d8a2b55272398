# SPDX-License-Identifier: Apache-2.0
"""Runs Alembic on a connection we hold, inside our transaction; there is no alembic.ini."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection

_HERE = Path(__file__).parent


def alembic_config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_HERE).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def upgrade_to_head(connection: Connection) -> None:
    command.upgrade(alembic_config(connection), "head")


def new_revision(connection: Connection, message: str, revision: str) -> None:
    """Writes the revision that brings the connected database's schema to `tables.py`; used in development."""
    command.revision(alembic_config(connection), message=message, autogenerate=True, rev_id=revision)
