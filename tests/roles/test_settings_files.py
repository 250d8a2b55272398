# SPDX-License-Identifier: Apache-2.0
"""What the templates write is what the services read: the rendered files through the services' own loaders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from ppec_agentd import settings as agentd_settings
from ppec_contract.errors import PpecError
from ppec_proxy import settings as proxy_settings

PROJECT = Path(__file__).parents[2]
ROLES = PROJECT / "collections" / "ppec" / "roles"


def rendered(tmp_path: Path, role: str, template: str, variables: dict[str, Any]) -> Path:
    """The role's template with its own defaults and vars below `variables`, as a play would see them."""
    target = tmp_path / template.removesuffix(".j2")
    files = [str(ROLES / role / part / "main.yml") for part in ("defaults", "vars")]
    tasks = [
        *({"ansible.builtin.include_vars": {"file": file}} for file in files),
        {"ansible.builtin.template": {"src": str(ROLES / role / "templates" / template), "dest": str(target)}},
    ]
    play = [{"hosts": "host1", "gather_facts": False, "connection": "local", "tasks": tasks}]
    inventory = {"all": {"hosts": {"host1": {"ansible_python_interpreter": sys.executable, **variables}}}}
    (tmp_path / "play.yml").write_text(json.dumps(play))
    (tmp_path / "inventory.yml").write_text(json.dumps(inventory))
    done = subprocess.run(
        ["ansible-playbook", "--inventory", tmp_path / "inventory.yml", tmp_path / "play.yml"],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    return target


def test_agent_settings_from_nothing_but_the_inventory_name(tmp_path: Path) -> None:
    loaded = agentd_settings.load(rendered(tmp_path, "agentd", "agentd.toml.j2", {}))
    assert loaded == agentd_settings.Settings(host="host1")


def test_agent_settings_of_every_shape(tmp_path: Path) -> None:
    variables = {
        "ppec_host_name": "rack1-h7",
        "ppec_orchestrator_url": "https://192.0.2.5:8443/",
        "ppec_agentd_settings": {
            "hypervisor": "fake",
            "libvirt": {"domain_type": "qemu"},
            "socket": {"allowed_uids": [7, 8], "frame_timeout_s": 2.5},
            "storage": {"disk_mib": None},
            "lab": {"topology": "sockets=2,cores=4", "bridges": ["br0", "br1"], "delays_s": {"start": 0.5}},
        },
    }
    loaded = agentd_settings.load(rendered(tmp_path, "agentd", "agentd.toml.j2", variables))
    assert (loaded.host, loaded.hypervisor, loaded.libvirt.domain_type) == ("rack1-h7", "fake", "qemu")
    assert loaded.reports.orchestrator_url == "https://192.0.2.5:8443"
    assert (loaded.socket.allowed_uids, loaded.socket.frame_timeout_s, loaded.socket.group) == ((7, 8), 2.5, "ppec")
    assert (loaded.lab.topology, loaded.lab.bridges) == ("sockets=2,cores=4", ("br0", "br1"))
    assert loaded.lab.delays_s == {"start": 0.5}


POOLS = [
    {"name": "fast", "path": "/srv/fast"},
    {"name": "slow.1", "path": "/srv/slow", "disk_mib": 7, "mounted": True},
]


def test_storage_pools_are_the_agents_and_its_unit_may_write_there(tmp_path: Path) -> None:
    """A name with a dot is one name, and settings by hand are added to the role's."""
    by_hand = {"storage": {"disk_mib": 99, "pools": {"third": {"path": "/srv/third"}, "fast": {"disk_mib": 5}}}}
    variables = {"ppec_storage_pools": POOLS, "ppec_agentd_settings": by_hand}
    storage = agentd_settings.load(rendered(tmp_path, "agentd", "agentd.toml.j2", variables)).storage
    assert storage.disk_mib == 99
    assert {name: (str(pool.path), pool.disk_mib, pool.mounted) for name, pool in storage.pools.items()} == {
        "fast": ("/srv/fast", 5, False),
        "slow.1": ("/srv/slow", 7, True),
        "third": ("/srv/third", None, False),
    }
    unit = rendered(tmp_path, "agentd", "ppec-agentd.service.j2", variables).read_text()
    written = [line.partition("=")[2] for line in unit.splitlines() if line.startswith("ReadWritePaths=")]
    assert written == ["/var/lib/ppec", "-/srv/fast", "-/srv/slow", "-/srv/third"]


def test_without_pools_the_unit_writes_to_the_agents_own_folders_alone(tmp_path: Path) -> None:
    variables = {"ppec_agentd_settings": {"storage": {"image_dir": "/srv/images"}}}
    unit = rendered(tmp_path, "agentd", "ppec-agentd.service.j2", variables).read_text()
    assert [line for line in unit.splitlines() if line.startswith("ReadWritePaths=")] == [
        "ReadWritePaths=/var/lib/ppec /srv/images"
    ]


def capabilities(unit: Path) -> set[str]:
    (line,) = [line for line in unit.read_text().splitlines() if line.startswith("CapabilityBoundingSet=")]
    return set(line.partition("=")[2].split())


@pytest.mark.parametrize(
    "variables",
    [
        {"ppec_nvme_drives": ["0000:3b:00.0", "0000:af:00.0"]},
        {"ppec_agentd_settings": {"nvme": {"drives": ["0000:3b:00.0", "0000:af:00.0"]}}},
    ],
)
def test_drives_for_vms_are_the_agents_and_udev_leaves_them_alone(tmp_path: Path, variables: dict[str, Any]) -> None:
    nvme = agentd_settings.load(rendered(tmp_path, "agentd", "agentd.toml.j2", variables)).nvme
    assert nvme == agentd_settings.NvmeSettings(drives=("0000:3b:00.0", "0000:af:00.0"))
    assert "CAP_SYS_ADMIN" in capabilities(rendered(tmp_path, "agentd", "ppec-agentd.service.j2", variables))
    rules = rendered(tmp_path, "agentd", "59-ppec-drives.rules.j2", variables).read_text()
    said = [line.split(", ") for line in rules.splitlines() if not line.startswith("#")]
    flags = ['ENV{UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG}="1"', 'ENV{SYSTEMD_READY}="0"']
    assert said == [
        ['SUBSYSTEM=="block"', 'KERNELS=="0000:3b:00.0"', *flags],
        ['SUBSYSTEM=="block"', 'KERNELS=="0000:af:00.0"', *flags],
    ]


def test_without_drives_for_vms_the_unit_has_no_capability_for_them(tmp_path: Path) -> None:
    found = capabilities(rendered(tmp_path, "agentd", "ppec-agentd.service.j2", {}))
    assert {"CAP_LEASE"} < found
    assert "CAP_SYS_ADMIN" not in found


@pytest.mark.parametrize("name", ["a b", 'x"\n[socket]\npath = "/tmp/s', "fast\n", "é"])
def test_a_name_that_is_none_is_refused_by_the_agent_and_nothing_else(tmp_path: Path, name: str) -> None:
    variables = {"ppec_storage_pools": [{"name": name, "path": "/srv/fast"}]}
    path = rendered(tmp_path, "agentd", "agentd.toml.j2", variables)
    assert tomllib.loads(path.read_text())["storage"]["pools"] == {name: {"path": "/srv/fast"}}
    with pytest.raises(PpecError, match=r": storage\.pools\."):
        agentd_settings.load(path)


@pytest.mark.parametrize("text", ['a"b\\c', 'x"\n[socket]\npath = "/tmp/s', "ü€😀", "tab\there"])
def test_text_stays_inside_its_string(tmp_path: Path, text: str) -> None:
    variables = {"ppec_agentd_settings": {"libvirt": {"uri": text}}}
    loaded = agentd_settings.load(rendered(tmp_path, "agentd", "agentd.toml.j2", variables))
    assert loaded.libvirt.uri == text
    assert str(loaded.socket.path) == "/run/ppec/agentd.sock"


def test_a_setting_the_agent_does_not_know_is_refused_by_it(tmp_path: Path) -> None:
    path = rendered(tmp_path, "agentd", "agentd.toml.j2", {"ppec_agentd_settings": {"reserve": {"core": 1}}})
    with pytest.raises(PpecError, match=r"reserve\.core"):
        agentd_settings.load(path)


def test_proxy_settings(tmp_path: Path) -> None:
    variables = {
        "ppec_allow_from": ["192.0.2.5/32", "2001:db8::/64"],
        "ppec_proxy_settings": {"listen_port": 9443, "read_timeout_s": 2.5},
    }
    loaded = proxy_settings.load(rendered(tmp_path, "proxy", "proxy.toml.j2", variables))
    assert [str(network) for network in loaded.allow_from] == ["192.0.2.5/32", "2001:db8::/64"]
    assert (loaded.listen_port, loaded.read_timeout_s) == (9443, 2.5)
    assert str(loaded.agent_socket_path) == "/run/ppec/agentd.sock"
