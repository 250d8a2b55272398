# SPDX-License-Identifier: Apache-2.0
"""Whole systems: a cloud on container hosts for what only real machines show, local hosts for what must be killed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ppec_lab.cloud import PROJECT, Cloud, build_release
from ppec_lab.container_fleet import container_fleet
from ppec_lab.guest_image import guest_image
from ppec_lab.local_cloud import LocalCloud
from ppec_lab.orchestrator_process import free_port


@pytest.fixture(scope="session")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """Two systemd hosts deployed by site.yml, the small guest image registered as `small`."""
    directory = tmp_path_factory.mktemp("cloud")
    release = build_release(PROJECT / "build" / "releases")
    image = guest_image()
    with container_fleet(2) as fleet:
        whole = Cloud.on(fleet, directory, free_port())
        try:
            whole.orchestrator.start()
            whole.register()
            whole.import_image("small", image)
            whole.deploy(release)
            whole.wait_up()
            yield whole
        finally:
            whole.orchestrator.stop()


@pytest.fixture
def local_cloud() -> Iterator[Callable[..., LocalCloud]]:
    """Starts a LocalCloud; removed at the end, its logs kept in the report when the test failed."""
    directory = Path(tempfile.mkdtemp(prefix="ppec-e2e-", dir="/tmp"))
    made = LocalCloud(directory)

    def start(**options: Any) -> LocalCloud:
        made.start(**options)
        return made

    try:
        yield start
    finally:
        made.remove()
        shutil.rmtree(directory, ignore_errors=True)
