# SPDX-License-Identifier: Apache-2.0
"""The Debian guest boots as a disk, cloud-init finishes from the seed alone, and the root grows to its disk."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ppec_lab.conditions import wait_until
from ppec_lab.debian_guest_image import debian_guest_image
from ppec_lab.private_libvirtd import private_libvirtd

pytestmark = [pytest.mark.libvirt, pytest.mark.slow, pytest.mark.long]

MAC = "52:54:00:00:79:09"
USER_DATA = b"""#cloud-config
runcmd:
  - [sh, -c, 'echo root-mib $(df -m --output=size / | tail -n 1) >/dev/console']
"""


@pytest.mark.timeout(600)
def test_cloud_init_finishes_and_the_guest_powers_off(
    tmp_path: Path,
    seed_writer: Callable[..., Path],
    network_for: Callable[..., dict[str, Any]],
    guest_domain: Callable[..., str],
) -> None:
    disk = tmp_path / "disk.qcow2"
    backing = ["-b", str(debian_guest_image()), "-F", "qcow2"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(disk), "4G"], check=True, timeout=60)
    network = network_for(MAC, ["10.79.0.9/24"], "10.79.0.1")
    seed = seed_writer(tmp_path, {"instance-id": "iid-79", "local-hostname": "deb-01"}, network, USER_DATA)
    console = tmp_path / "console.log"
    xml = tmp_path / "guest.xml"
    xml.write_text(guest_domain(name="deb-01", disk=str(disk), seed=str(seed), console=str(console), mac=MAC,
                                bridge="br-lab", memory_mib=768))  # fmt: skip
    with private_libvirtd(own_network=True) as daemon:
        daemon.run("ip", "link", "add", "br-lab", "type", "bridge")
        daemon.run("ip", "addr", "add", "10.79.0.1/24", "dev", "br-lab")
        daemon.run("ip", "link", "set", "br-lab", "up")
        daemon.run("virsh", "-c", daemon.uri, "create", str(xml))

        def finished() -> str:
            # Whole lines: one comes letter by letter.
            lines = console.read_text(errors="replace").splitlines(keepends=True)
            ends = (line for line in lines if "Cloud-init" in line and " finished at " in line)
            return next((line for line in ends if line.endswith("\n")), "")

        line = wait_until(finished, "cloud-init has finished", timeout_s=300, every_s=0.5)
        assert "DataSourceNoCloud" in line
        wait_until(lambda: "deb-01 login:" in console.read_text(errors="replace"), "it offers a login", timeout_s=60)
        text = console.read_text(errors="replace")
        assert "Invalid cloud-config" not in text
        grown_mib = next(int(row.split()[-1]) for row in text.splitlines() if row.startswith("root-mib"))
        assert grown_mib > 3500
        daemon.run("ping", "-c", "1", "-W", "20", "10.79.0.9")
        assert "SSH-2.0" in daemon.run("ssh-keyscan", "-T", "10", "10.79.0.9").stderr
        daemon.run("virsh", "-c", daemon.uri, "shutdown", "deb-01")
        wait_until(
            lambda: "deb-01" not in daemon.run("virsh", "-c", daemon.uri, "list", "--all").stdout,
            "the guest powers off on request",
            timeout_s=120,
            every_s=0.5,
        )
