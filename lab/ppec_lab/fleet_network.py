# SPDX-License-Identifier: Apache-2.0
"""The network of a fleet of lab hosts: one bridge on the machine outside, one cable from it to each host.

    machine outside                     a host's network namespace
    fleet bridge  ===== veth pair ===== eth0 --- br-ppec --- taps of its guests
    gateways of all prefixes            the host's own address

All is one Ethernet segment: guests sit on it with their own addresses, of whichever prefix, and the machine outside
holds each prefix's gateway address, so it reaches them directly and nothing is translated or filtered on the way. A
VRF's prefix is just one more gateway address on the bridge. A host's namespace is made before its container and
outlives it, as a cable outlives a reboot. Plain iproute2: podman's own networks would need a network plugin and
rewrite the machine's iptables.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A fleet takes one /20 of these: its hosts' /24 first, then fifteen /24 for guests.
POOL = ipaddress.ip_network("10.224.0.0/12")
BLOCK_LENGTH = 20
IPV6_POOL = ipaddress.ip_network("fd70:7065:6300::/48")
BRIDGE = "br-ppec"
CLAIM_LOCK = Path("/run/ppec-lab.lock")
IPv4 = ipaddress.IPv4Network
IPv6 = ipaddress.IPv6Network


@dataclass(frozen=True)
class FleetNetwork:
    """The addresses of one fleet. ``index`` is the number of its /20 in the pool; all else follows from it."""

    index: int
    bridge: str

    @property
    def block(self) -> IPv4:
        """All IPv4 addresses of the fleet."""
        start = int(POOL.network_address) + self.index * 2 ** (32 - BLOCK_LENGTH)
        return ipaddress.IPv4Network((start, BLOCK_LENGTH))

    def prefix(self, number: int) -> IPv4:
        """The fleet's /24 number 0 (hosts) to 15; guests' prefixes count from 1."""
        return list(self.block.subnets(new_prefix=24))[number]

    def prefix6(self, number: int) -> IPv6:
        """The /64 that goes with `prefix(number)`."""
        start = int(IPV6_POOL.network_address) + ((self.index * 16 + number) << 64)
        return ipaddress.IPv6Network((start, 64))

    @property
    def gateway(self) -> str:
        """The address by which hosts reach the machine outside."""
        return str(self.prefix(0)[1])

    def host_address(self, number: int) -> str:
        """Address of host number 0, 1, ..."""
        return str(self.prefix(0)[number + 11])

    def add_gateways(self, number: int) -> tuple[str, str]:
        """Make the machine outside the gateway of guest prefix `number`; returns its IPv4 and IPv6 address."""
        four, six = self.prefix(number), self.prefix6(number)
        ip("addr", "replace", f"{four[1]}/{four.prefixlen}", "dev", self.bridge)
        ip("addr", "replace", f"{six[1]}/{six.prefixlen}", "dev", self.bridge, "nodad")
        return str(four[1]), str(six[1])

    def plug_in(self, namespace: str, number: int) -> None:
        """Make host `number`'s namespace, its cable, and ``br-ppec`` with the host's address inside."""
        ip("netns", "add", namespace)
        outer = self.cable(number)
        ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        ip("link", "set", outer, "master", self.bridge, "up")
        inside = ("-netns", namespace)
        ip(*inside, "link", "set", "lo", "up")
        ip(*inside, "link", "add", BRIDGE, "type", "bridge", "stp_state", "0", "forward_delay", "0")
        ip(*inside, "link", "set", "eth0", "master", BRIDGE, "up")
        ip(*inside, "addr", "add", f"{self.host_address(number)}/24", "dev", BRIDGE)
        ip(*inside, "link", "set", BRIDGE, "up")
        ip(*inside, "route", "add", "default", "via", self.gateway)

    def cable(self, number: int) -> str:
        """Name of the outer end of host `number`'s cable; a link's name has at most 15 characters."""
        return f"{self.bridge}-{number}"

    def raise_bridge(self) -> None:
        """Make the fleet's bridge with the hosts' gateway on it, unless it stands."""
        if Path("/sys/class/net", self.bridge).exists():
            return
        ip("link", "add", self.bridge, "type", "bridge", "stp_state", "0", "forward_delay", "0")
        ip("addr", "add", f"{self.gateway}/24", "dev", self.bridge)
        ip("link", "set", self.bridge, "up")

    def unplug(self, namespace: str, number: int) -> None:
        """Remove a host's cable and namespace, with all links in it."""
        # The kernel would remove the cable with the namespace, but later, in the background.
        if Path("/sys/class/net", self.cable(number)).exists():
            ip("link", "delete", self.cable(number))
        if Path("/run/netns", namespace).exists():
            ip("netns", "delete", namespace)

    def remove(self) -> None:
        """Remove the fleet's bridge with all its gateway addresses."""
        if Path("/sys/class/net", self.bridge).exists():
            ip("link", "delete", self.bridge)


def claim_network(saved: frozenset[int] = frozenset()) -> FleetNetwork:
    """Make a bridge on addresses that nothing on this machine uses; two fleets started at once get different ones.

    `saved` are the indices of fleets that are down at present and may come back.
    """
    with _claim():
        used = _used_networks()
        for index in range(2 ** (BLOCK_LENGTH - POOL.prefixlen)):
            network = FleetNetwork(index, f"ppeclab{index}")
            if index in saved or Path("/sys/class/net", network.bridge).exists():
                continue
            if not any(network.block.overlaps(other) for other in used):
                network.raise_bridge()
                return network
    raise RuntimeError(f"no free /{BLOCK_LENGTH} of {POOL} for a fleet of lab hosts: remove a fleet or a route")


def ip(*words: str) -> str:
    """Run iproute2; `RuntimeError` with its own words when it refuses."""
    done = subprocess.run(["ip", *words], check=False, capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _used_networks() -> list[IPv4]:
    rows: list[dict[str, Any]] = json.loads(ip("-json", "-4", "route", "show", "table", "all"))
    found = []
    for row in rows:
        with contextlib.suppress(ValueError):
            found.append(ipaddress.IPv4Network(row["dst"], strict=False))
    return found


@contextlib.contextmanager
def _claim() -> Iterator[None]:
    with CLAIM_LOCK.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
