# SPDX-License-Identifier: Apache-2.0
"""Tokens and certificates that were looked up a moment ago are known without a look at the database, which answers a
request without a thread; whatever is not known so says nothing about them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

import pytest

from ppec_contract.identity import Identity
from ppec_orchestrator.pki.ca import Issued
from ppec_orchestrator.roles import Role
from ppec_orchestrator.store.certificates import CACHE_S, CertificateBook, record_certificate
from ppec_orchestrator.store.database import Database
from ppec_orchestrator.store.tokens import CACHE_S as TOKEN_CACHE_S
from ppec_orchestrator.store.tokens import TokenBook, create_token

Clock = Callable[[], datetime]
HOST, OTHER = Identity(role="host", name="h1"), Identity(role="host", name="h2")


def test_a_token_is_remembered_once_it_was_found_and_until_it_ends(database: Database, clock: Clock) -> None:
    ends = clock() + timedelta(minutes=1)
    with database.write() as conn:
        secret = create_token(conn, "ci", Role.OPERATOR, now=clock(), expires_at=ends)
    book = TokenBook(database)
    assert book.remembered(secret, now=clock()) is None
    assert (found := book.find(secret, now=clock())) is not None
    assert book.remembered(secret, now=clock()) == found
    assert book.remembered(secret, now=ends) is None
    assert book.find("ppec_unknown", now=clock()) is None
    assert book.remembered("ppec_unknown", now=clock()) is None


def test_a_remembered_token_is_looked_up_again(
    database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with database.write() as conn:
        secret = create_token(conn, "ci", Role.VIEWER, now=clock())
    book, time_s = TokenBook(database), [0.0]
    monkeypatch.setattr("ppec_orchestrator.store.tokens.time.monotonic", lambda: time_s[0])
    assert book.find(secret, now=clock()) is not None
    time_s[0] = TOKEN_CACHE_S
    assert book.remembered(secret, now=clock()) is None


def test_a_hosts_certificate_is_remembered_as_this_hosts_alone(database: Database, clock: Clock) -> None:
    issued = Issued(pem="", serial="7", uri=HOST.uri, not_before=clock(), not_after=clock() + timedelta(days=1))
    with database.write() as conn:
        record_certificate(conn, issued, now=clock())
    book = CertificateBook(database)
    assert not book.remembers(HOST, "7", now=clock())
    assert book.holds(HOST, "7", now=clock())
    assert book.remembers(HOST, "7", now=clock())
    assert not book.remembers(OTHER, "7", now=clock())
    assert not book.remembers(HOST, "7", now=clock() + timedelta(seconds=CACHE_S))
    book.forget()
    assert not book.remembers(HOST, "7", now=clock())
