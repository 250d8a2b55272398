# SPDX-License-Identifier: Apache-2.0
"""Fixtures every folder may use. A component's own fixtures are in its folder's conftest.py."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, settings

# An example that takes long says something of the machine, not of what is tested. Every run tries new ones.
settings.register_profile("ppec", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ppec")

# As it is, but for tracebacks: those of rich show every local variable, which takes up to a second or two each.
_RENDERER = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
structlog.configure(processors=[*structlog.get_config()["processors"][:-1], _RENDERER])

# Files whose tests work with the `cloud` of tests/e2e/conftest.py, which takes a minute to deploy.
_ON_ONE_CLOUD = ("tests/e2e/test_first_light.py", "tests/e2e/test_storage_pools.py")


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A temporary folder with a short path: a UNIX socket's path may have 107 bytes, and tmp_path is longer."""
    path = Path(tempfile.mkdtemp(prefix="ppec-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that wait for machines come first: at the end they would leave the other process without work."""
    items.sort(key=lambda item: item.get_closest_marker("containers") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile` as it is, but for files that share a cloud: two processes would each deploy one."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class BySharedHosts(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return _ON_ONE_CLOUD[0] if file in _ON_ONE_CLOUD else file

    return BySharedHosts(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate-golden", action="store_true", help="rewrite golden files with what tests find")


@pytest.fixture
def regenerate_golden(request: pytest.FixtureRequest) -> bool:
    """True under ``--regenerate-golden``: a golden test then writes what it found before it compares."""
    return bool(request.config.getoption("--regenerate-golden"))
