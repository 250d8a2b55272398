# SPDX-License-Identifier: Apache-2.0
"""The small guest reads network-config v2 the way it is written by hand, by PyYAML and as JSON."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from ppec_lab.guest_image import GUEST_DIR

BY_HAND = """\
version: 2
ethernets:
  net0:   # the only one
    match:
      macaddress: "52:54:00:AA:bb:01"
    addresses:
    - 10.0.2.9/24
    - "fd00::9/64"
    routes:
      - to: default
        via: 10.0.2.2
      - {to: "::/0", via: 'fd00::1'}
    nameservers:
      addresses: [1.1.1.1, "8.8.8.8"]
  'net1':
    addresses: ['10.3.0.1/24']
    gateway4: 10.3.0.254 # comment
"""

EXPECTED = [
    ["address", "52:54:00:aa:bb:01", "10.0.2.9/24"],
    ["address", "52:54:00:aa:bb:01", "fd00::9/64"],
    ["route", "52:54:00:aa:bb:01", "0.0.0.0/0", "10.0.2.2"],
    ["route", "52:54:00:aa:bb:01", "::/0", "fd00::1"],
    ["dns", "52:54:00:aa:bb:01", "1.1.1.1"],
    ["dns", "52:54:00:aa:bb:01", "8.8.8.8"],
    ["address", "net1", "10.3.0.1/24"],
    ["route", "net1", "0.0.0.0/0", "10.3.0.254"],
]


def awk(script: str, text: str) -> str:
    command = ["busybox", "awk", "-f", str(GUEST_DIR / script)]
    return subprocess.run(command, input=text, check=True, capture_output=True, text=True, timeout=60).stdout


def flattened(text: str) -> dict[str, str]:
    lines = awk("flatten.awk", text).splitlines()
    return dict(line.split("\t", 1) for line in lines)


@pytest.mark.parametrize(
    "write", [str, lambda t: yaml.safe_dump(yaml.safe_load(t)), lambda t: json.dumps(yaml.safe_load(t))]
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_network_config(write: Any, wrapped: bool) -> None:
    text = BY_HAND
    if wrapped:
        text = yaml.safe_dump({"network": yaml.safe_load(text)}, sort_keys=False)
    lines = awk("network.awk", awk("flatten.awk", write(text))).splitlines()
    assert [line.split("\t") for line in lines] == EXPECTED


@pytest.mark.parametrize(
    "value",
    [
        "plain",
        "with: colon",
        "a # b",
        "it's",
        'say "hi"',
        "{{ x }}",
        "$(id)",
        "[a, b]",
        "- x",
        "back\\slash",
        "",
    ],
)
@pytest.mark.parametrize("dump", [json.dumps, lambda d: yaml.safe_dump(d, width=10_000)])
def test_a_hostile_value_is_read_verbatim(value: str, dump: Any) -> None:
    document = {"instance-id": value, "local-hostname": "web-01"}
    assert flattened(dump(document)) == {"/instance-id": value, "/local-hostname": "web-01"}


def test_scripts_are_in_the_package() -> None:
    assert {path.name for path in Path(GUEST_DIR).iterdir()} == {"init", "flatten.awk", "network.awk"}
