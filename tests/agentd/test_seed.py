# SPDX-License-Identifier: Apache-2.0
"""The NoCloud seed, read back by xorriso: what the guest is told, and nothing more."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ppec_agentd.iso_image import iso_image
from ppec_agentd.seed import seed_files, seed_iso

HOSTILE = [
    "#cloud-config\nruncmd: ['echo {{ 7*7 }}']\n",
    "{{ lookup('pipe', 'id') }}",
    "#!/bin/sh\nrm -rf / ; `id` $(id) %s\n",
    "--- !!python/object/apply:os.system ['id']\n",
    "</domain>&amp;\"'\r\n\t\u00e9\u2028 \U0001f600",
]


def extracted(iso: Path, folder: Path) -> dict[str, bytes]:
    command = ["xorriso", "-osirrox", "on", "-indev", str(iso), "-extract", "/", str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("user_data", [*HOSTILE, "", "x" * 65536], ids=range(len(HOSTILE) + 2))
def test_user_data_is_carried_byte_for_byte(tmp_path: Path, vm: Any, user_data: str) -> None:
    one = vm(user_data=user_data)
    (tmp_path / "seed.iso").write_bytes(seed_iso(one))
    files = extracted(tmp_path / "seed.iso", tmp_path / "out")
    assert files == seed_files(one)
    assert files["user-data"] == (user_data or "#cloud-config\n{}\n").encode()
    assert json.loads(files["meta-data"]) == {"instance-id": str(one.vm_id), "local-hostname": one.name}


def test_the_volume_is_found_by_its_label(tmp_path: Path, vm: Any) -> None:
    (tmp_path / "seed.iso").write_bytes(seed_iso(vm()))
    answer = subprocess.run(
        ["blkid", "-p", "-o", "value", "-s", "LABEL", str(tmp_path / "seed.iso")],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert answer.stdout.strip() == "cidata"


def test_an_independent_reader_finds_both_trees_sound(vm: Any) -> None:
    """isoinfo and the kernel are lenient; pycdlib's parser is not."""
    pycdlib = pytest.importorskip("pycdlib")
    one = vm(user_data="x" * 5000)
    iso = pycdlib.PyCdlib()
    iso.open_fp(io.BytesIO(seed_iso(one)))
    names = [child.file_identifier() for child in iso.list_children(joliet_path="/")][2:]
    assert [name.decode("utf-16-be") for name in names] == ["meta-data", "network-config", "user-data"]
    for joliet, number in (("/meta-data", 0), ("/network-config", 1), ("/user-data", 2)):
        for where in ({"joliet_path": joliet}, {"iso_path": f"/FILE{number}.;1"}):
            content = io.BytesIO()
            iso.get_file_from_iso_fp(content, **where)
            assert content.getvalue() == seed_files(one)[joliet[1:]]
    iso.close()


def test_more_files_than_a_folder_holds_are_refused() -> None:
    with pytest.raises(ValueError, match="too many files"):
        iso_image("x", {f"{number:030}": b"" for number in range(40)})


def test_network_config_names_each_nic_by_mac(vm: Any) -> None:
    one = vm(
        nics=[
            {
                "mac": "52:54:00:00:00:01",
                "bridge": "br0",
                "addresses": ["10.1.0.5/24", "fd00::5/64"],
                "gateway4": "10.1.0.1",
                "gateway6": "fd00::1",
                "nameservers": ["10.1.0.1", "fd00::1"],
            },
            {"mac": "52:54:00:00:00:02", "bridge": "br1"},
        ]
    )
    # YAML and JSON readers must agree on it.
    assert yaml.safe_load(seed_files(one)["network-config"]) == {
        "version": 2,
        "ethernets": {
            "nic0": {
                "match": {"macaddress": "52:54:00:00:00:01"},
                "dhcp4": False,
                "dhcp6": False,
                "addresses": ["10.1.0.5/24", "fd00::5/64"],
                "routes": [{"to": "0.0.0.0/0", "via": "10.1.0.1"}, {"to": "::/0", "via": "fd00::1"}],
                "nameservers": {"addresses": ["10.1.0.1", "fd00::1"]},
            },
            "nic1": {"match": {"macaddress": "52:54:00:00:00:02"}, "dhcp4": False, "dhcp6": False},
        },
    }


def test_equal_vms_get_equal_bytes_at_any_time(vm: Any) -> None:
    import time_machine

    one = vm(user_data="same")
    with time_machine.travel(1_000_000_000, tick=False):
        first = seed_iso(one)
    with time_machine.travel(1_700_000_123, tick=False):
        second = seed_iso(one)
    assert first == second
