# SPDX-License-Identifier: Apache-2.0
"""A fleet of lab hosts on a network of their own, started together and removed without a trace.

A fleet lives in a directory, ``<state root>/<name>``, with its ssh key, its known hosts and ``fleet.json``; a later
process takes it up again with `ContainerFleet.load`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ppec_lab.cache import say
from ppec_lab.container_host import ContainerHost, make_key
from ppec_lab.fleet_network import FleetNetwork, claim_network
from ppec_lab.host_tree import host_tree

DEFAULT_STATE_ROOT = "/var/lib/ppec-lab"
# Starting is bound by the CPU: more at once only makes each slower to answer.
STARTED_AT_ONCE = 4


def state_root() -> Path:
    """Where fleets keep their state: ``$PPEC_LAB_STATE``, or /var/lib/ppec-lab. Not on an overlay file system."""
    return Path(os.environ.get("PPEC_LAB_STATE") or DEFAULT_STATE_ROOT)


@dataclass(frozen=True)
class ContainerFleet:
    """Running hosts and their network. `hosts` are in order, named ``<prefix>1``, ``<prefix>2``, ..."""

    name: str
    directory: Path
    network: FleetNetwork
    hosts: tuple[ContainerHost, ...]

    @property
    def ssh_key(self) -> Path:
        """The private key that all hosts accept for root."""
        return self.directory / "ssh_key"

    @property
    def known_hosts(self) -> Path:
        """The hosts' ssh keys, under their names and addresses."""
        return self.directory / "known_hosts"

    @property
    def gateway(self) -> str:
        """The address of the machine outside as the hosts see it."""
        return self.network.gateway

    @staticmethod
    def start(count: int, name: str | None = None, host_prefix: str = "host") -> ContainerFleet:
        """Start `count` new hosts and return when all answer on ssh; undone as a whole when one doesn't.

        Builds the host tree if need be. Without a `name` a fresh one is made. `FileExistsError` when the name is taken.
        """
        name = name or f"lab-{secrets.token_hex(3)}"
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,30}", name):
            raise ValueError(f"fleet name {name!r}: want lower-case letters, digits and dashes, at most 31")
        tree = host_tree()
        directory = state_root() / name
        _make_new(directory)
        try:
            network = claim_network(_saved_indices())
        except BaseException:
            directory.rmdir()
            raise
        fleet = _plan(count, name, directory, network, host_prefix)
        try:
            fleet._save(tree)
            fleet._start(tree)
        except BaseException:
            fleet.remove()
            raise
        return fleet

    @staticmethod
    def load(name: str) -> ContainerFleet:
        """The fleet of that name as it was started; `FileNotFoundError` when there is none."""
        directory = state_root() / name
        saved = json.loads((directory / "fleet.json").read_text())
        hosts = tuple(ContainerHost(fleet_dir=directory, **row) for row in saved["hosts"])
        return ContainerFleet(name, directory, FleetNetwork(**saved["network"]), hosts)

    def resume(self) -> None:
        """Bring back what doesn't run, after a reboot of this machine for example; returns when all hosts answer.

        Hosts keep their disks, keys and addresses. Gateways of guest prefixes are to be added again.
        """
        tree = Path(json.loads((self.directory / "fleet.json").read_text())["tree"])
        self.network.raise_bridge()
        for host in self.hosts:
            if not Path("/run/netns", host.container).exists():
                self.network.plug_in(host.container, host.number)
            host.mount(tree)
        self._start_all()

    def host(self, name: str) -> ContainerHost:
        """The host called `name`; `KeyError` when the fleet has none."""
        return {host.name: host for host in self.hosts}[name]

    def remove(self) -> None:
        """End all hosts and remove their containers, overlays, network and state; may be repeated."""
        with ThreadPoolExecutor(STARTED_AT_ONCE) as pool:
            list(pool.map(ContainerHost.remove, self.hosts))
        for host in self.hosts:
            self.network.unplug(host.container, host.number)
        self.network.remove()
        shutil.rmtree(self.directory, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.directory.parent.rmdir()

    def _save(self, tree: Path) -> None:
        rows = [
            {
                "name": host.name,
                "number": host.number,
                "container": host.container,
                "address": host.address,
                "host_uuid": host.host_uuid,
            }
            for host in self.hosts
        ]
        network = {"index": self.network.index, "bridge": self.network.bridge}
        saved = {"tree": str(tree), "network": network, "hosts": rows}
        partial = self.directory / "fleet.json.new"
        partial.write_text(json.dumps(saved, indent=1))
        partial.rename(self.directory / "fleet.json")

    def _start(self, tree: Path) -> None:
        make_key(self.ssh_key, comment=f"ppec lab fleet {self.name}")
        authorized = self.ssh_key.with_suffix(".pub").read_text()
        names = self._hosts_file()
        known = []
        for host in self.hosts:
            host.lay_out(tree)
            host.write_hosts_file(names)
            known.append(f"{host.name},{host.address} {host.install_keys(authorized)}\n")
            self.network.plug_in(host.container, host.number)
        self.known_hosts.write_text("".join(known))
        self._start_all()

    def _start_all(self) -> None:
        with ThreadPoolExecutor(STARTED_AT_ONCE) as pool:
            list(pool.map(ContainerHost.start, self.hosts))
            list(pool.map(ContainerHost.wait_ready, self.hosts))

    def _hosts_file(self) -> str:
        lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost", f"{self.gateway} ppec-outside"]
        return "".join(f"{line}\n" for line in [*lines, *(f"{host.address} {host.name}" for host in self.hosts)])


def _make_new(directory: Path) -> None:
    """`FileExistsError` when it is there."""
    while True:
        directory.parent.mkdir(parents=True, exist_ok=True)
        # Another process that removes the last fleet removes the root, too.
        with contextlib.suppress(FileNotFoundError):
            directory.mkdir()
            return


def _saved_indices() -> frozenset[int]:
    """Address blocks of all fleets with a state directory, whether they run or not."""
    return frozenset(fleet.network.index for fleet in saved_fleets())


def saved_fleets() -> list[ContainerFleet]:
    """All fleets that were started and not removed."""
    found = []
    for path in sorted(state_root().glob("*/fleet.json")):
        # Another process may be removing it just now.
        with contextlib.suppress(FileNotFoundError):
            found.append(ContainerFleet.load(path.parent.name))
    return found


def _plan(count: int, name: str, directory: Path, network: FleetNetwork, host_prefix: str) -> ContainerFleet:
    hosts = tuple(
        ContainerHost(
            name=f"{host_prefix}{number + 1}",
            number=number,
            container=f"ppec-{name}-{host_prefix}{number + 1}",
            address=network.host_address(number),
            host_uuid=str(uuid.uuid4()),
            fleet_dir=directory,
        )
        for number in range(count)
    )
    return ContainerFleet(name, directory, network, hosts)


@contextlib.contextmanager
def container_fleet(count: int, name: str | None = None) -> Iterator[ContainerFleet]:
    """A fleet for the length of a ``with`` block."""
    fleet = ContainerFleet.start(count, name)
    try:
        yield fleet
    finally:
        fleet.remove()


def main() -> None:
    """Start, list or remove fleets of lab hosts."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("action", choices=("up", "show", "down", "down-all"))
    parser.add_argument("--name", default="demo")
    parser.add_argument("--hosts", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.action == "up":
        say(f"fleet {arguments.name}: starting {arguments.hosts} hosts")
        ContainerFleet.start(arguments.hosts, arguments.name)
    fleets = saved_fleets()
    if not arguments.action.endswith("all"):
        fleets = [fleet for fleet in fleets if fleet.name == arguments.name]
    if not fleets:
        say("there is no such fleet")
    for fleet in fleets:
        if arguments.action.startswith("down"):
            fleet.remove()
            say(f"fleet {fleet.name}: removed")
        else:
            for host in fleet.hosts:
                print(f"{fleet.name}\t{host.name}\t{host.address}\t{host.container}")


if __name__ == "__main__":
    main()
