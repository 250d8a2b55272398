# SPDX-License-Identifier: Apache-2.0
"""A host for suites that run on the fake hypervisor and on a real libvirt alike."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ppec_lab.hypervisor_hosts import FakeHost, LibvirtHost, SuiteHost
from ppec_lab.private_libvirtd import PrivateLibvirtd, private_libvirtd


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[PrivateLibvirtd]:
    with private_libvirtd() as daemon:
        yield daemon


@pytest.fixture(params=["fake", pytest.param("libvirt", marks=pytest.mark.libvirt)])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SuiteHost]:
    if request.param == "fake":
        yield FakeHost(tmp_path)
        return
    real = LibvirtHost(request.getfixturevalue("libvirtd"), tmp_path, os.cpu_count() or 1)
    yield real
    real.sweep()
