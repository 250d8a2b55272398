# SPDX-License-Identifier: Apache-2.0
"""Runs Alembic on a connection we hold, inside our transaction; there is no alembic.ini.

Alembic is imported where it has something to do: a process that starts on a schema of today is up sooner without.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, inspect, text

if TYPE_CHECKING:
    from alembic.config import Config

_HERE = Path(__file__).parent


def alembic_config(connection: Connection) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_HERE).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def upgrade_to_head(connection: Connection) -> None:
    if _is_at_head(connection):
        return
    from alembic import command

    command.upgrade(alembic_config(connection), "head")


def new_revision(connection: Connection, message: str, revision: str) -> None:
    """Writes the revision that brings the connected database's schema to `store/tables/`; used in development."""
    from alembic import command

    command.revision(alembic_config(connection), message=message, autogenerate=True, rev_id=revision)


def newest_revision() -> str:
    """Revisions follow one another, and their files are named for them."""
    return max(path.name for path in (_HERE / "versions").glob("[0-9]*.py")).partition("_")[0]


def _is_at_head(connection: Connection) -> bool:
    if not inspect(connection).has_table("alembic_version"):
        return False
    # Whatever it is but this very one, Alembic knows what to do or to say.
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all()
    return found == [newest_revision()]
