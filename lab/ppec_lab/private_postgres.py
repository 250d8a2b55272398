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
# Durability is PostgreSQL's own business: nobody here pulls its plug.
_OPTIONS = "-h '' -F -c max_connections=100 -c full_page_writes=off"


@contextmanager
def private_postgres(shared_buffers_mib: int = 32) -> Iterator[Path]:
    """The folder with its socket. Raises FileNotFoundError where PostgreSQL's programs are not installed."""
    if not POSTGRES_BIN.is_dir():
        raise FileNotFoundError(f"PostgreSQL's programs are not in {POSTGRES_BIN}: install postgresql-15")
    place = Path(tempfile.mkdtemp(prefix="ppec-pg-", dir="/tmp"))
    if os.geteuid() == 0:
        shutil.chown(place, "postgres", "postgres")
    data = str(place / "data")
    initdb = ("initdb", "-D", data, "-U", "postgres", "-A", "trust", "-N", "--locale=C", "-E", "UTF8")
    _as_postgres(place, *initdb)
    options = f"-k {place} {_OPTIONS} -c shared_buffers={shared_buffers_mib}MB"
    _as_postgres(place, "pg_ctl", "start", "-D", data, "-w", "-l", str(place / "log"), "-o", options)
    try:
        yield place
    finally:
        _as_postgres(place, "pg_ctl", "stop", "-D", data, "-m", "immediate", "-w")
        shutil.rmtree(place, ignore_errors=True)


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
