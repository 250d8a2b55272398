# SPDX-License-Identifier: Apache-2.0
"""Whole systems: a cloud on container hosts for what only real machines show, local hosts for what must be killed."""

from __future__ import annotations

import contextlib
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


@contextlib.contextmanager
def _made_local_cloud() -> Iterator[LocalCloud]:
    directory = Path(tempfile.mkdtemp(prefix="ppec-e2e-", dir="/tmp"))
    made = LocalCloud(directory)
    try:
        yield made
    finally:
        made.remove()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def local_cloud() -> Iterator[Callable[..., LocalCloud]]:
    """Starts a LocalCloud of the test's own, whose processes it may kill."""
    with _made_local_cloud() as made:

        def start(**options: Any) -> LocalCloud:
            made.start(**options)
            return made

        yield start


@pytest.fixture(scope="module")
def shared_local_cloud() -> Iterator[LocalCloud]:
    """Two hosts of two cells with 4 cores each, so 8 VMs of 2 vCPUs fit; a file's tests share it and clean up."""
    with _made_local_cloud() as made:
        made.start(lab={"topology": "sockets=2,cores=4,threads=1,memory_mib=8192"})
        yield made
