# SPDX-License-Identifier: Apache-2.0
"""The engine's limits: each has a most, and a value beyond it is not taken and said."""

from __future__ import annotations

from dataclasses import fields

import pytest
from structlog.testing import capture_logs

from ppec_orchestrator.operations.limits import MOST, Limits

NAMES = [one.name for one in fields(Limits)]


def test_every_limit_has_a_most_and_a_default_within() -> None:
    assert sorted(MOST) == sorted(NAMES)
    assert all(0 < getattr(Limits(), name) <= MOST[name] for name in NAMES)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "poll_s"])
def test_what_is_beyond_is_left_at_the_default_and_said(name: str) -> None:
    for value in (MOST[name] + 1, float("inf"), float("nan"), 0, -1, True, "6"):
        with capture_logs() as logs:
            assert Limits.of({name: value}) == Limits()
        (line,) = logs
        assert (line["event"], line["setting"]) == ("setting.unusable", f"operations.{name}")
        assert f"{MOST[name]:g} at most" in line["wanted"]
        assert line["found"] is value


@pytest.mark.parametrize("name", [name for name in NAMES if name != "poll_s"])
def test_the_most_itself_is_taken(name: str) -> None:
    assert getattr(Limits.of({name: MOST[name]}), name) == MOST[name]


@pytest.mark.parametrize("name", ["max_running", "attempts", "lost_runs"])
def test_count_is_whole(name: str) -> None:
    """Half an operation at a time would be none."""
    with capture_logs() as logs:
        assert Limits.of({name: 0.5}) == Limits()
    assert "a whole number" in logs[0]["wanted"]
    assert getattr(Limits.of({name: 2.0}), name) == 2
