# SPDX-License-Identifier: Apache-2.0
"""The orchestrator's fixtures: `database` on SQLite and on a throw-away PostgreSQL, `client` on the whole API."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from ppec_orchestrator.store.database import Database

POSTGRES_BIN = Path("/usr/lib/postgresql/15/bin")
_TEMPLATE = "ppec_template"


def _as_postgres(place: Path, *command: str) -> None:
    """PostgreSQL refuses to run as root; the cluster belongs to its own user."""
    user = pwd.getpwnam("postgres") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    drop = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
    subprocess.run(
        command, check=True, cwd=place, timeout=120, env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
        stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, **drop,
    )  # fmt: skip


def _url(place: Path, name: str) -> str:
    return f"postgresql://postgres@/{name}?host={place}"


@pytest.fixture(scope="session")
def postgres_cluster() -> Iterator[Path]:
    """A cluster on a UNIX socket in the folder given, with a migrated template database."""
    if not POSTGRES_BIN.is_dir():
        pytest.fail(f"PostgreSQL's programs are not in {POSTGRES_BIN}: install postgresql-15")
    place = Path(tempfile.mkdtemp(prefix="ppec-pg-", dir="/tmp"))
    if os.geteuid() == 0:
        shutil.chown(place, "postgres", "postgres")
    data = str(place / "data")
    _as_postgres(
        place,
        str(POSTGRES_BIN / "initdb"),
        "-D",
        data,
        "-U",
        "postgres",
        "-A",
        "trust",
        "-N",
        "--locale=C",
        "-E",
        "UTF8",
    )
    # Durability is PostgreSQL's own business: the tests don't pull its plug.
    options = f"-k {place} -h '' -F -c max_connections=100 -c full_page_writes=off -c shared_buffers=32MB"
    start = ("-D", data, "-w", "-l", str(place / "log"), "-o", options)
    _as_postgres(place, str(POSTGRES_BIN / "pg_ctl"), "start", *start)
    try:
        with psycopg.connect(_url(place, "postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {_TEMPLATE}")
        database = Database(_url(place, _TEMPLATE))
        database.migrate()
        database.close()
        yield place
    finally:
        _as_postgres(place, str(POSTGRES_BIN / "pg_ctl"), "stop", "-D", data, "-m", "immediate", "-w")
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def postgres_url(postgres_cluster: Path) -> Iterator[str]:
    """A migrated database of the test's own."""
    name = f"t{uuid.uuid4().hex}"
    with psycopg.connect(_url(postgres_cluster, "postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {_TEMPLATE}")
    yield _url(postgres_cluster, name)
    with psycopg.connect(_url(postgres_cluster, "postgres"), autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "ppec.db"
    database = Database(f"sqlite:///{path}")
    database.migrate()
    database.close()
    return path


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    path = tmp_path / "ppec.db"
    shutil.copy(sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest) -> str:
    name = "sqlite_url" if request.param == "sqlite" else "postgres_url"
    return str(request.getfixturevalue(name))


@pytest.fixture
def open_database(database_url: str) -> Iterator[Callable[[], Database]]:
    """Opens the test's database once more, as another process would."""
    opened: list[Database] = []

    def open_one() -> Database:
        opened.append(Database(database_url))
        return opened[-1]

    yield open_one
    for database in opened:
        database.close()


@pytest.fixture
def database(open_database: Callable[[], Database]) -> Database:
    """A migrated, empty database of the test's own; every test that takes it runs on both kinds."""
    return open_database()
