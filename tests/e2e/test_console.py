# SPDX-License-Identifier: Apache-2.0
"""A person at a real guest's serial console: `ppec` in a terminal, orchestrator, proxy, agentd, libvirt, QEMU."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ppec_lab.counting_guest import counting_disk
from ppec_lab.local_cloud import LocalCloud
from ppec_lab.orchestrator_process import BIN
from ppec_lab.own_namespaces import in_own_network
from ppec_lab.private_libvirtd import private_libvirtd
from ppec_lab.terminal import Terminal

pytestmark = [pytest.mark.libvirt, pytest.mark.slow, pytest.mark.timeout(600)]
BOOT_S = 120
LINES = 10
LAST_LINE = b"%08x\n" % (LINES - 1)


@contextlib.contextmanager
def real_cloud() -> Iterator[LocalCloud]:
    """One host whose VMs are real; image `counting` counts on its serial port and then echoes."""
    directory = Path(tempfile.mkdtemp(prefix="ppec-e2e-", dir="/tmp"))
    made = LocalCloud(directory)
    try:
        subprocess.run(["ip", "link", "add", "br-ppec", "type", "bridge"], check=True, timeout=30)
        with private_libvirtd() as libvirtd:
            try:
                made.start(hosts=1, libvirt_uri=libvirtd.uri)
                disk = counting_disk(directory / "counting.raw", LINES)
                made.orchestrator.ppec("image", "import", "counting", str(disk), "--format", "raw")
                yield made
            finally:
                made.remove()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def console(cloud: LocalCloud, *options: str) -> Terminal:
    return Terminal([str(BIN / "ppec"), "vm", "console", "pet", *options], cloud.orchestrator.user_environment())


def logs(cloud: LocalCloud) -> str:
    (host,) = cloud.hosts
    processes = (cloud.orchestrator.process, host.proxy, host.agentd)
    return "".join(process.log.read_text() for process in processes)


def test_a_person_types_to_a_guest_that_another_one_watches() -> None:
    def scene() -> None:
        with real_cloud() as cloud:
            type_and_watch(cloud)

    in_own_network(scene)


def type_and_watch(cloud: LocalCloud) -> None:
    ppec = cloud.orchestrator.ppec
    made = cloud.ended(cloud.create(name="pet", image="counting")["operation_id"])
    assert made["state"] == "succeeded", made["problem"]
    with console(cloud) as typing, console(cloud, "--read-only") as watching:
        assert b"00000000\n00000001\n" in typing.see(LAST_LINE, BOOT_S)
        # Who only watches has an ordinary terminal, which makes two of a newline.
        watching.see(LAST_LINE.replace(b"\n", b"\r\n"), BOOT_S)
        # The guest sends back what it is sent, and the terminal shows nothing by itself.
        typing.type(b"who\rgoes\x03there")
        assert typing.see(b"there").count(b"who\rgoes\x03there") == 1
        watching.see(b"who\rgoes\x03there")
        typing.type(b"\x1d")
        assert (typing.end()[0], typing.untouched) == (0, True)

        with console(cloud, "--tail-bytes", "5") as again:
            again.see(b"there")
            again.type(b"hunter2!")
            assert again.see(b"hunter2!") == b"therehunter2!"
            watching.see(b"hunter2!")

            # No agent in such a guest: asked of the host all the same.
            told = ppec("vm", "guest", "pet")
            assert (told["name"], told["agent_connected"], told["frozen"]) == ("pet", False, False)

            ppec("vm", "stop", "pet", "--force", "--timeout", "0", "--wait")
            for one in (again, watching):
                code, said = one.end()
                assert (code, one.untouched) == (0, True), said
                assert "the VM is off" in said

    # An orchestrator that ends takes the consoles along, and they say so.
    with console(cloud, "--read-only") as cut:
        cut.see(b"hunter2!")
        cloud.orchestrator.stop()
        code, said = cut.end()
        assert (code, cut.untouched) == (7, True), said
    cloud.orchestrator.start()

    told = [json.loads(line) for line in logs(cloud).splitlines() if '"event": "audit"' in line]
    consoles = [(line["caller"], line["action"], line["subject"]) for line in told if "console" in line["action"]]
    assert sorted(consoles) == [("admin", "close_console", "pet")] * 4 + [("admin", "open_console", "pet")] * 4
    assert sorted(line["why"] for line in told if line["action"] == "close_console") == [
        "client_left",
        "client_left",
        "vm_off",
        "vm_off",
    ]
    assert "hunter2" not in logs(cloud)
    ppec("vm", "delete", "pet", "--wait")
    with console(cloud) as late:
        code, said = late.end()
        assert (code, late.untouched) == (4, True), said
