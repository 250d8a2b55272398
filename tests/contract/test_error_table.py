# SPDX-License-Identifier: Apache-2.0
"""The one error table, and the problem that carries a row of it."""

from __future__ import annotations

import re
from http import HTTPStatus

import pytest

from ppec_contract.errors import (
    CLASS_RULES,
    ERROR_TABLE,
    ErrorClass,
    PpecError,
    Problem,
    exit_code,
    http_status,
    retryable,
)


@pytest.mark.parametrize("code", ERROR_TABLE)
def test_every_row_is_whole(code: str) -> None:
    row = ERROR_TABLE[code]
    assert re.fullmatch(r"[a-z]+\.[a-z]+(_[a-z]+)*", code)
    assert row.title[0].isupper() or row.title.startswith("libvirt")
    assert not row.title.endswith(".")
    assert 400 <= HTTPStatus(http_status(code)) <= 599
    assert 2 <= exit_code(code) <= 8
    assert retryable(code) == (row.error_class is ErrorClass.TRY_AGAIN)


def test_titles_tell_codes_apart() -> None:
    titles = [row.title for row in ERROR_TABLE.values()]
    assert len(set(titles)) == len(titles)


def test_every_class_has_a_rule_and_an_exit_code_of_its_own() -> None:
    assert set(CLASS_RULES) == set(ErrorClass)
    assert len({rule.exit_code for rule in CLASS_RULES.values()}) == len(CLASS_RULES)


def test_only_what_is_ours_to_fix_or_passing_is_a_5xx() -> None:
    passing = {ErrorClass.INTERNAL, ErrorClass.TRY_AGAIN}
    for code, row in ERROR_TABLE.items():
        assert (http_status(code) >= 500) == (row.error_class in passing), code


@pytest.mark.parametrize("code", ERROR_TABLE)
def test_an_error_survives_the_way_to_the_client(code: str) -> None:
    sent = PpecError(code, "what failed", hint="do this", subject="vm a", details={"free": 2})
    body = sent.problem().model_dump_json()
    received = Problem.model_validate_json(body).error()
    assert (received.code, received.message, received.hint) == (code, "what failed", "do this")
    assert (received.subject, received.details) == ("vm a", {"free": 2})
    assert Problem.model_validate_json(body).type == f"urn:ppec:error:{code}"


def test_a_code_from_a_newer_server_counts_as_internal() -> None:
    problem = PpecError("vm.exists", "x").problem().model_copy(update={"code": "vm.haunted"})
    assert problem.error().code == "internal.error"
    assert exit_code("vm.haunted") == exit_code("internal.error")
    assert not retryable("vm.haunted")


def test_a_code_without_a_row_can_not_be_raised() -> None:
    with pytest.raises(KeyError, match="no row"):
        PpecError("vm.haunted", "boo")
