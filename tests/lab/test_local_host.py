# SPDX-License-Identifier: Apache-2.0
"""A local host kept beside an orchestrator that lost its record, or all its state, reports again."""

from __future__ import annotations

import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from ppec_lab.conditions import wait_until
from ppec_lab.local_cloud import LocalCloud
from ppec_lab.local_host import LocalHost, _toml


@pytest.fixture
def cloud() -> Iterator[LocalCloud]:
    directory = Path(tempfile.mkdtemp(prefix="ppec-lab-", dir="/tmp"))
    made = LocalCloud(directory)
    try:
        made.start(hosts=1)
        yield made
    finally:
        made.remove()
        shutil.rmtree(directory, ignore_errors=True)


def certificate(host: LocalHost) -> str:
    return (host.directory / "pki" / "host.pem").read_text()


def gone(directory: Path) -> bool:
    shutil.rmtree(directory, ignore_errors=True)
    return not directory.exists()


def start_from_nothing(cloud: LocalCloud) -> None:
    """As the demo does: everything is registered again, and the host is started where it already is."""
    cloud.orchestrator.start()
    host = cloud.hosts[0]
    assert cloud.orchestrator.ppec("host", "list") == []
    cloud.register("datacentres", name="dc", region="lab")
    cloud.register("clusters", name="c1", datacentre="dc")
    cloud.register("racks", name="r1", cluster="c1")
    cloud.register("vrfs", name="blue")
    cloud.register("hosts", name=host.name, rack="r1", vrf="blue", address=host.address, port=host.port)


@pytest.mark.slow
def test_a_kept_host_comes_back_after_its_orchestrator_lost_its_record(cloud: LocalCloud) -> None:
    host, state = cloud.hosts[0], cloud.orchestrator.state_dir
    first, agent = certificate(host), host.agentd.pid()
    host.start()
    assert (certificate(host), host.agentd.pid()) == (first, agent), "a certificate that counts is kept"

    cloud.orchestrator.stop()
    host.enrol()
    assert certificate(host) == first, "nobody could be asked"
    for path in list(state.glob("ppec.db*")):
        path.unlink(missing_ok=True)
    start_from_nothing(cloud)
    host.start()
    second = certificate(host)
    assert second != first
    wait_until(cloud.all_up, "the host reports", timeout_s=120)

    cloud.orchestrator.stop()
    # What it had forked may still be clearing up after itself.
    wait_until(lambda: gone(state), "its state is gone", timeout_s=60)
    start_from_nothing(cloud)
    host.start()
    assert certificate(host) != second
    assert (host.directory / "pki" / "ca.pem").read_text() == cloud.orchestrator.ca.read_text()
    wait_until(cloud.all_up, "the host reports", timeout_s=120)


def test_settings_whose_keys_are_no_bare_ones_are_read_as_they_were_given() -> None:
    drives = {"0000:01:00.0": 0, "0000:02:00.0": 1}
    asked = {"host": "h1", "lab": {"nvme_drives": drives, "bridges": ["br-ppec"]}, 'a "b"': {"c d": True, "": 1}}
    assert tomllib.loads("\n".join(_toml(asked))) == asked
