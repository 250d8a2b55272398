# SPDX-License-Identifier: Apache-2.0
"""A whole PPEC on this machine: an orchestrator, and hosts in containers deployed by the collection's own roles."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from ppec_lab.cache import say
from ppec_lab.conditions import wait_until
from ppec_lab.fleet_network import FleetNetwork
from ppec_lab.orchestrator_process import BIN, OrchestratorProcess

PROJECT = Path(__file__).parents[2]
# What each lab host says it is: two sockets, though all hosts share this machine's few CPUs. The declared machine is
# what is planned on and pinned to; the guests' threads float on what there really is.
DECLARED_TOPOLOGY = "sockets=2,cores=4,threads=2,memory_mib=8192"
# A storage pool on each of them.
POOL, POOL_PATH, POOL_MIB = "fast", "/srv/fast", 10240
DATACENTRE, CLUSTER = "lab-dc", "lab"
VRFS = ("blue", "green")
FLAVORS = {
    # name: vcpus, memory MiB, disk MiB
    "small": (2, 256, 1024),
    "large": (4, 1024, 4096),
}


# What the roles are told of hosts in containers.
CONTAINER_HOSTS: Mapping[str, Any] = {
    # The lab's network has made the bridge already, as a machine's own installer might.
    "ppec_bridges": [],
    "ppec_agentd_settings": {"lab": {"topology": DECLARED_TOPOLOGY}},
    "ppec_storage_pools": [{"name": POOL, "path": POOL_PATH, "disk_mib": POOL_MIB}],
}


class FleetHost(Protocol):
    """A host as the cloud needs it, whatever it is made of."""

    @property
    def name(self) -> str: ...

    @property
    def number(self) -> int: ...

    @property
    def address(self) -> str: ...

    def bridge(self) -> str: ...


class Fleet(Protocol):
    """Running hosts on one network, reached by root's ssh: containers, or an emulated bare-metal machine."""

    @property
    def hosts(self) -> Sequence[FleetHost]: ...

    @property
    def network(self) -> FleetNetwork: ...

    @property
    def gateway(self) -> str: ...

    @property
    def ssh_key(self) -> Path: ...

    @property
    def known_hosts(self) -> Path: ...

    def remove(self) -> None: ...


F = TypeVar("F", bound=Fleet)


@dataclass(frozen=True)
class Cloud(Generic[F]):
    """`fleet` are the hosts; the orchestrator listens on loopback for people and on the fleet's gateway for hosts.

    `host_variables` go to the roles, beside what any deployment needs.
    """

    directory: Path
    fleet: F
    orchestrator: OrchestratorProcess
    host_variables: Mapping[str, Any]

    @classmethod
    def on(cls, fleet: F, directory: Path, port: int, host_variables: Mapping[str, Any] = CONTAINER_HOSTS) -> Cloud[F]:
        addresses = ("127.0.0.1", fleet.gateway)
        orchestrator = OrchestratorProcess(directory / "orchestrator", port, addresses)
        return cls(directory, fleet, orchestrator, host_variables)

    def register(self) -> None:
        """Tells the orchestrator what there is: places, VRFs with a prefix each, flavors and hosts. Repeatable."""
        ppec = self.orchestrator.ppec
        # Again each time: a reboot of this machine takes them from the fleet's bridge.
        gateways = [self.fleet.network.add_gateways(number) for number in range(1, len(VRFS) + 1)]
        known = {host["name"] for host in ppec("host", "list")}
        if not ppec("datacentre", "list"):
            ppec("datacentre", "create", DATACENTRE, "--region", "lab")
            ppec("cluster", "create", CLUSTER, "--datacentre", DATACENTRE)
            for number, vrf in enumerate(VRFS, start=1):
                self._register_vrf(vrf, number, gateways[number - 1])
            for name, (vcpus, memory_mib, disk_mib) in FLAVORS.items():
                size = ("--vcpus", str(vcpus), "--memory-mib", str(memory_mib), "--disk-mib", str(disk_mib))
                ppec("flavor", "create", name, *size)
        for host in self.fleet.hosts:
            if host.name not in known:
                rack = f"rack{host.number + 1}"
                ppec("rack", "create", rack, "--cluster", CLUSTER)
                ppec("host", "add", host.name, "--rack", rack, "--vrf", vrf_of(host.number), "--address", host.address)

    def import_image(self, name: str, path: Path) -> None:
        """Registers a qcow2 image unless one of that name is there."""
        known = {image["name"] for image in self.orchestrator.ppec("image", "list")}
        if name not in known:
            self.orchestrator.ppec("image", "import", name, str(path))

    def deploy(self, release: Path, *, timeout_s: float = 600.0) -> None:
        """Makes the machines PPEC hosts: `ansible-playbook playbooks/site.yml`, its output in `deploy.log`."""
        inventory = self._write_inventory(release)
        log = self.directory / "deploy.log"
        # All hosts at once; play keywords take no inventory variables.
        waves = ("--extra-vars", "ppec_serial=100%")
        command = [str(BIN / "ansible-playbook"), "-i", str(inventory), *waves, str(PROJECT / "playbooks" / "site.yml")]
        environment = {**os.environ, "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg")}
        with log.open("w") as output:
            done = subprocess.run(
                command, cwd=PROJECT, env=environment, stdout=output, stderr=output, timeout=timeout_s, check=False
            )
        if done.returncode:
            tail = "\n".join(log.read_text().splitlines()[-30:])
            raise RuntimeError(f"site.yml ended with {done.returncode}; see {log}:\n{tail}")

    def wait_up(self, timeout_s: float = 120.0) -> None:
        """Returns when every host reports: an agent that was refused before tries again after at most a minute."""
        wait_until(lambda: self._silent_hosts() == set(), "every host reports", timeout_s=timeout_s, every_s=0.3)

    def remove(self) -> None:
        """Ends everything this cloud started and removes its hosts; its directory stays to its owner."""
        self.orchestrator.stop()
        self.fleet.remove()

    def _silent_hosts(self) -> set[str]:
        wanted = {host.name for host in self.fleet.hosts}
        return wanted - {h["name"] for h in self.orchestrator.ppec("host", "list") if h["liveness"] == "up"}

    def _register_vrf(self, vrf: str, number: int, gateways: tuple[str, str]) -> None:
        ppec = self.orchestrator.ppec
        ppec("ipdb", "vrf", "create", vrf)
        serves = ("--cluster", CLUSTER, "--bridge", self.fleet.hosts[0].bridge())
        prefixes = (self.fleet.network.prefix(number), self.fleet.network.prefix6(number))
        for prefix, gateway in zip(prefixes, gateways, strict=True):
            ppec("ipdb", "prefix", "create", str(prefix), "--vrf", vrf, "--gateway", gateway, *serves)

    def _write_inventory(self, release: Path) -> Path:
        path = self.directory / "inventory.json"
        path.touch(mode=0o600)
        hosts = {host.name: self._host_variables(host.name, host.address) for host in self.fleet.hosts}
        path.write_text(json.dumps({"ppec_hosts": {"hosts": hosts, "vars": self._fleet_variables(release)}}, indent=1))
        return path

    def _host_variables(self, name: str, address: str) -> dict[str, Any]:
        # The role uses the token only if the host's certificate doesn't count: whether it does, the record can't tell.
        token = self.orchestrator.ppec("host", "enrolment-token", name)["token"]
        return {"ansible_host": address, "ppec_enrolment_token": token}

    def _fleet_variables(self, release: Path) -> dict[str, Any]:
        return {
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(self.fleet.ssh_key),
            "ansible_ssh_common_args": f"-o UserKnownHostsFile={self.fleet.known_hosts} -F /dev/null",
            "ansible_python_interpreter": "/usr/bin/python3",
            "ppec_orchestrator_url": self.orchestrator.url,
            "ppec_ca_file": str(self.orchestrator.ca),
            "ppec_release_archive": str(release),
            "ppec_allow_from": [f"{self.fleet.gateway}/32"],
            **self.host_variables,
        }


def vrf_of(number: int) -> str:
    """Hosts take turns: host1 is blue, host2 green, host3 blue."""
    return VRFS[number % len(VRFS)]


def build_release(output: Path) -> Path:
    """Builds what hosts run (cached by content) and returns the archive."""
    subprocess.run(
        [str(BIN / "python"), "-m", "ppec_orchestrator.release.build", "--output", str(output)],
        cwd=PROJECT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return (output / "latest-py311-x86_64.tar.gz").resolve()


class Stopwatch:
    """Says how long each part took, as it ends."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def lap(self, what: str) -> None:
        now = time.monotonic()
        say(f"  {what} ({now - self._start:.1f} s)")
        self._start = now
