# SPDX-License-Identifier: Apache-2.0
"""A PostgreSQL of one's own on a UNIX socket in a throw-away folder."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

POSTGRES_BIN = Path("/usr/lib/postgresql/15/bin")
_OPTIONS = "-h '' -c max_connections=100"
# Durability is PostgreSQL's own business: tests don't pull its plug.
_CARELESS = "-F -c full_page_writes=off -c max_wal_size=128MB"
# There a database is made in a third of the time: that is a thousand files. A container's own may be far too small.
_MEMORY = Path("/dev/shm")
_ROOM_BYTES = 4 * 1024**3


@contextmanager
def private_postgres(shared_buffers_mib: int = 32, *, durable: bool = False) -> Iterator[Path]:
    """The folder with its socket; `durable` commits reach the disk, others may never leave the memory.

    Raises FileNotFoundError where PostgreSQL's programs are not installed.
    """
    if not POSTGRES_BIN.is_dir():
        raise FileNotFoundError(f"PostgreSQL's programs are not in {POSTGRES_BIN}: install postgresql-15")
    place = Path(tempfile.mkdtemp(prefix="ppec-pg-", dir="/tmp" if durable else _quick_folder()))
    if os.geteuid() == 0:
        shutil.chown(place, "postgres", "postgres")
    data = str(place / "data")
    initdb = ("initdb", "-D", data, "-U", "postgres", "-A", "trust", "-N", "--locale=C", "-E", "UTF8")
    _as_postgres(place, *initdb)
    options = f"-k {place} {_OPTIONS} {'' if durable else _CARELESS} -c shared_buffers={shared_buffers_mib}MB"
    _as_postgres(place, "pg_ctl", "start", "-D", data, "-w", "-l", str(place / "log"), "-o", options)
    try:
        yield place
    finally:
        _as_postgres(place, "pg_ctl", "stop", "-D", data, "-m", "immediate", "-w")
        shutil.rmtree(place, ignore_errors=True)


def _quick_folder() -> Path:
    """In memory, if there is plenty."""
    roomy = _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > _ROOM_BYTES
    return _MEMORY if roomy else Path("/tmp")


def postgres_url(place: Path, database: str) -> str:
    return f"postgresql://postgres@/{database}?host={place}"


def _as_postgres(place: Path, program: str, *arguments: str) -> None:
    """PostgreSQL refuses to run as root; the cluster belongs to its own user."""
    user = pwd.getpwnam("postgres") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    drop: dict[str, Any] = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
    subprocess.run(
        (str(POSTGRES_BIN / program), *arguments), check=True, cwd=place, timeout=120,
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
        stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, **drop,
    )  # fmt: skip
