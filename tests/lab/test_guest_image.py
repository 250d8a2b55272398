# SPDX-License-Identifier: Apache-2.0
"""The small guest boots as a disk, applies its seed verbatim, answers, and powers off on request."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ppec_lab.conditions import wait_until
from ppec_lab.guest_image import guest_image
from ppec_lab.private_libvirtd import private_libvirtd

pytestmark = [pytest.mark.libvirt, pytest.mark.slow]

MAC = "52:54:00:00:77:09"
HOSTILE = b"#cloud-config\n{{ lookup('pipe', 'id') }} $(poweroff -f) `reboot`\n'\"<xml>&\x00\xff\n"


def grown_overlay(place: Path) -> Path:
    overlay = place / "disk.qcow2"
    backing = ["-b", str(guest_image()), "-F", "qcow2"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(overlay), "1G"], check=True, timeout=60)
    return overlay


def test_seed_network_and_power(
    tmp_path: Path,
    seed_writer: Callable[..., Path],
    network_for: Callable[..., dict[str, Any]],
    guest_domain: Callable[..., str],
) -> None:
    network = network_for(MAC, ["10.77.0.9/24", "fd00:77::9/64"], "10.77.0.1")
    metadata = {"instance-id": "iid-77", "local-hostname": "web-01"}
    seed = seed_writer(tmp_path, metadata, network, HOSTILE)
    console = tmp_path / "console.log"
    xml = tmp_path / "guest.xml"
    xml.write_text(
        guest_domain(
            name="web-01",
            disk=str(grown_overlay(tmp_path)),
            seed=str(seed),
            console=str(console),
            mac=MAC,
            bridge="br-lab",
        )
    )
    with private_libvirtd(own_network=True) as daemon:
        daemon.run("ip", "link", "add", "br-lab", "type", "bridge")
        daemon.run("ip", "addr", "add", "10.77.0.1/24", "dev", "br-lab")
        daemon.run("ip", "addr", "add", "fd00:77::1/64", "dev", "br-lab", "nodad")
        daemon.run("ip", "link", "set", "br-lab", "up")
        daemon.run("virsh", "-c", daemon.uri, "create", str(xml))
        # A line comes letter by letter.
        (ready,) = wait_until(
            lambda: re.findall(r"ppec-guest ready .*(?=\n)", console.read_text(errors="replace")),
            "the guest is ready",
            timeout_s=240,
        )
        assert ready.strip() == "ppec-guest ready web-01 10.77.0.9"
        assert f"disk vda {1024**3} bytes" in console.read_text(errors="replace")
        # QEMU 7.2 may crash under an emulated guest that uses two.
        assert "cpus 0-1 possible, 0 online" in console.read_text(errors="replace")

        def get(host: str, path: str) -> bytes:
            return daemon.run("curl", "-gsS", f"http://{host}:8000{path}").stdout.encode(errors="surrogateescape")

        digest = hashlib.sha256(HOSTILE).hexdigest().encode()
        assert get("10.77.0.9", "/").split() == [b"web-01", b"iid-77", digest]
        assert get("[fd00:77::9]", "/").split() == [b"web-01", b"iid-77", digest]
        daemon.run("ping", "-c", "1", "-W", "20", "10.77.0.9")
        daemon.run("virsh", "-c", daemon.uri, "shutdown", "web-01")
        wait_until(
            lambda: "web-01" not in daemon.run("virsh", "-c", daemon.uri, "list", "--all").stdout,
            "the guest powers off on the ACPI button",
            timeout_s=240,
        )


def test_the_image_is_built_once_per_recipe() -> None:
    first = guest_image()
    stamp = first.stat().st_mtime_ns
    assert guest_image() == first
    assert first.stat().st_mtime_ns == stamp
