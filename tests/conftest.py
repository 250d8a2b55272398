# SPDX-License-Identifier: Apache-2.0
"""Fixtures every folder may use. A component's own fixtures are in its folder's conftest.py."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# An example that takes long says something of the machine, not of what is tested. Every run tries new ones.
settings.register_profile("ppec", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ppec")


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A temporary folder with a short path: a UNIX socket's path may have 107 bytes, and tmp_path is longer."""
    path = Path(tempfile.mkdtemp(prefix="ppec-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that wait for machines come first: at the end they would leave the other process without work."""
    items.sort(key=lambda item: item.get_closest_marker("containers") is None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate-golden", action="store_true", help="rewrite golden files with what tests find")


@pytest.fixture
def regenerate_golden(request: pytest.FixtureRequest) -> bool:
    """True under ``--regenerate-golden``: a golden test then writes what it found before it compares."""
    return bool(request.config.getoption("--regenerate-golden"))
