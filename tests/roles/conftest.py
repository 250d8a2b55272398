# SPDX-License-Identifier: Apache-2.0
"""Runs roles as users do, by ansible-playbook, and reads the outcome from its recap."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ppec_lab.container_fleet import ContainerFleet, container_fleet
from ppec_lab.container_host import ContainerHost, ssh_options

PROJECT = Path(__file__).parents[2]
ROLES = PROJECT / "collections" / "ppec" / "roles"
_RECAP = re.compile(r"ok=(\d+)\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)")


@dataclass(frozen=True)
class Played:
    """What a run did on its one host."""

    ok: int
    changed: int
    failed: int
    output: str


Play = Callable[..., Played]


def play(folder: Path, host: dict[str, Any], roles: list[str], variables: dict[str, Any], *flags: str) -> Played:
    """One play of the collection's `roles` on one host. The variables are inventory variables."""
    inventory = {"all": {"hosts": {"host1": {"ansible_python_interpreter": "/usr/bin/python3", **host, **variables}}}}
    playbook = [{"hosts": "host1", "gather_facts": False, "roles": [f"ppec.cloud.{role}" for role in roles]}]
    (folder / "inventory.yml").write_text(json.dumps(inventory))
    (folder / "play.yml").write_text(json.dumps(playbook))
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"),
        "ANSIBLE_NOCOLOR": "1",
    }
    command = ["ansible-playbook", "--inventory", str(folder / "inventory.yml"), str(folder / "play.yml"), *flags]
    done = subprocess.run(command, env=env, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=240)
    recap = _RECAP.search(done.stdout)
    assert recap, done.stdout + done.stderr
    ok, changed, unreachable, failed = map(int, recap.groups())
    assert not unreachable, done.stdout
    return Played(ok, changed, failed, done.stdout + done.stderr)


@pytest.fixture(scope="module")
def fleet() -> Iterator[ContainerFleet]:
    """One systemd host of its own for the module."""
    if os.geteuid() != 0:
        pytest.skip("systemd hosts in containers need root")
    with container_fleet(1) as started:
        yield started


@pytest.fixture(scope="module")
def host(fleet: ContainerFleet) -> ContainerHost:
    return fleet.hosts[0]


@pytest.fixture
def play_on_host(fleet: ContainerFleet, host: ContainerHost, tmp_path: Path) -> Play:
    """play(roles, variables, *flags) on the container host, over ssh."""
    reached_by = {
        "ansible_host": host.address,
        "ansible_user": "root",
        "ansible_ssh_private_key_file": str(fleet.ssh_key),
        "ansible_ssh_common_args": " ".join(ssh_options(fleet.directory)),
    }

    def run(roles: list[str], variables: dict[str, Any], *flags: str) -> Played:
        return play(tmp_path, reached_by, roles, variables, *flags)

    return run
