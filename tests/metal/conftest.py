# SPDX-License-Identifier: Apache-2.0
"""One emulated bare-metal machine for all tests here, made a PPEC host by the roles; see lab/README.md."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ppec_lab.bare_metal import BareMetalFleet, bare_metal_fleet
from ppec_lab.bare_metal_disk import bare_metal_disk
from ppec_lab.bare_metal_machine import MachineShape
from ppec_lab.cache import say
from ppec_lab.cloud import PROJECT, Cloud, Stopwatch, build_release
from ppec_lab.guest_image import guest_image
from ppec_lab.orchestrator_process import free_port

# Nothing is declared: the agent goes by what libvirt says of the machine, and by its CPU's flags.
HOST_VARIABLES = {
    "ppec_bridges": [{"name": "br-ppec", "interface": "eth0"}],
    "ppec_nvme_drives": list(MachineShape().nvme_addresses),
}


@pytest.fixture(scope="session", autouse=True)
def _ended_in_order() -> Iterator[None]:
    """Being told to end is as good as Ctrl-C: machine, bridge and processes go."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def metal() -> Iterator[Cloud[BareMetalFleet]]:
    """The machine deployed by site.yml, up, with the small guest's image."""
    watch = Stopwatch()
    bare_metal_disk()
    release = build_release(PROJECT / "build" / "releases")
    image = guest_image()
    watch.lap("disk, release and guest image")
    # Not pytest's own: a UNIX socket's path must be short.
    directory = Path(tempfile.mkdtemp(prefix="ppec-metal-", dir="/tmp"))
    try:
        with bare_metal_fleet(directory) as fleet:
            watch.lap("the machine booted")
            whole = Cloud.on(fleet, directory, free_port(), HOST_VARIABLES)
            try:
                whole.orchestrator.start()
                whole.register()
                whole.import_image("small", image)
                whole.deploy(release, timeout_s=1500)
                whole.wait_up(timeout_s=300)
                watch.lap("deployed by site.yml")
                yield whole
            finally:
                whole.orchestrator.stop()
                watch.lap("the tests")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        say("  nothing is left")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    """What failed on the machine is told by its own console and its agent's log, which are gone with it."""
    report = yield
    cloud = getattr(item, "funcargs", {}).get("metal")
    if report.failed and cloud is not None:
        report.sections.append(("the machine's console", cloud.fleet.console_tail()))
        agent = ("journalctl", "--no-pager", "-u", "ppec-agentd", "-u", "libvirtd", "-n", "40")
        report.sections.append(("agent and libvirt", cloud.fleet.host.run(*agent, check=False).stdout))
    return report
