# SPDX-License-Identifier: Apache-2.0
"""API tokens: random, shown once, kept as sha256 only.

Looking a token up by its hash leaks nothing through time: what an attacker can steer is not the hash's prefix.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, delete, func, insert, select

from ppec_contract.errors import PpecError
from ppec_orchestrator.roles import Role
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.tables import api_token

# How long a removed token may still work in another replica, and how often a busy one is looked up.
CACHE_S = 5.0
_MAX_CACHED = 4096


@dataclass(frozen=True, slots=True)
class Token:
    name: str
    role: Role
    expires_at: datetime | None

    def valid_at(self, now: datetime) -> bool:
        return self.expires_at is None or now < self.expires_at


def token_hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def new_secret() -> str:
    """256 bits, URL-safe."""
    return secrets.token_urlsafe(32)


def create_token(conn: Connection, name: str, role: Role, *, now: datetime, expires_at: datetime | None = None) -> str:
    """Makes the token `name` or replaces it; returns the secret, which is kept nowhere."""
    token = f"ppec_{new_secret()}"
    conn.execute(delete(api_token).where(api_token.c.name == name))
    conn.execute(
        insert(api_token).values(
            name=name, sha256=token_hash(token), role=role.value, created_at=now, expires_at=expires_at
        )
    )
    return token


def remove_token(conn: Connection, name: str) -> None:
    if conn.execute(delete(api_token).where(api_token.c.name == name)).rowcount != 1:
        raise PpecError("request.invalid", f"there is no token {name!r}", subject=f"token {name}")


def count_tokens(conn: Connection) -> int:
    return conn.execute(select(func.count()).select_from(api_token)).scalar_one()


class TokenBook:
    """Looks tokens up, and remembers the good ones for `CACHE_S` seconds. Unknown ones are never remembered."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._cached: dict[str, tuple[Token, float]] = {}

    def remembered(self, token: str, *, now: datetime) -> Token | None:
        """Without a look at the database: None says nothing about the token."""
        return self._remembered(token_hash(token), now)

    def find(self, token: str, *, now: datetime) -> Token | None:
        """Looks it up, unless it is remembered."""
        key = token_hash(token)
        found = self._remembered(key, now) or self._load(key)
        return found if found is not None and found.valid_at(now) else None

    def _remembered(self, key: str, now: datetime) -> Token | None:
        with self._lock:
            token, until_s = self._cached.get(key, (None, 0.0))
        return token if token is not None and time.monotonic() < until_s and token.valid_at(now) else None

    def _load(self, key: str) -> Token | None:
        with self._database.read() as connection:
            row = connection.execute(select(api_token).where(api_token.c.sha256 == key)).one_or_none()
        if row is None:
            return None
        found = Token(row.name, Role(row.role), row.expires_at)
        with self._lock:
            if len(self._cached) >= _MAX_CACHED:
                self._cached.clear()
            self._cached[key] = (found, time.monotonic() + CACHE_S)
        return found
