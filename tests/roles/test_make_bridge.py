# SPDX-License-Identifier: Apache-2.0
"""make-bridge moves a live interface's addresses into a bridge without breaking what runs over them."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ppec_lab.conditions import wait_until

SCRIPT = Path(__file__).parents[2] / "collections/ppec/roles/libvirt_host/files/make-bridge"

ECHO = """
import socket
listener = socket.create_server(("198.18.0.2", 7))
print("listening", flush=True)
peer, _ = listener.accept()
while data := peer.recv(100):
    peer.sendall(data)
"""
TALK = """
import socket, sys
peer = socket.create_connection(("198.18.0.2", 7), timeout=60)
for line in sys.stdin:
    peer.sendall(line.encode())
    print(peer.recv(100).decode(), end="", flush=True)
"""


class Pair:
    """Two network namespaces and a cable: `eth0` in the host's, `far` in the neighbour's."""

    def __init__(self) -> None:
        tag = secrets.token_hex(3)
        self.host, self.neighbour = f"ppecbr{tag}h", f"ppecbr{tag}n"

    def ip(self, *words: str) -> str:
        return subprocess.run(["ip", *words], capture_output=True, text=True, check=True, timeout=60).stdout

    def at_host(self, *words: str) -> str:
        return self.ip("-netns", self.host, *words)

    def links(self) -> dict[str, Any]:
        return {link["ifname"]: link for link in json.loads(self.at_host("-json", "address"))}

    def addresses(self, link: str) -> set[str]:
        return {f"{a['local']}/{a['prefixlen']}" for a in self.links()[link]["addr_info"] if a["scope"] == "global"}

    def start(self, namespace: str, program: str) -> subprocess.Popen[str]:
        command = ["ip", "netns", "exec", namespace, sys.executable, "-c", program]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def make_bridge(self, **settings: str) -> subprocess.CompletedProcess[str]:
        command = ["ip", "netns", "exec", self.host, "sh", str(SCRIPT), "br-test"]
        env = {"PATH": os.environ["PATH"], **settings}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    made.ip("netns", "add", made.host)
    made.ip("netns", "add", made.neighbour)
    try:
        made.at_host("link", "add", "eth0", "type", "veth", "peer", "name", "far", "netns", made.neighbour)
        for address in ("198.18.0.2/24", "198.18.1.2/28"):
            made.at_host("address", "add", address, "dev", "eth0")
        made.at_host("address", "add", "2001:db8::2/64", "dev", "eth0", "nodad")
        made.ip("-netns", made.neighbour, "address", "add", "198.18.0.1/24", "dev", "far")
        made.at_host("link", "set", "eth0", "up")
        made.ip("-netns", made.neighbour, "link", "set", "far", "up")
        # The link comes up in the background, and with it the prefix by which the gateway is reached.
        prefix = "the prefix of the interface is routed"
        wait_until(lambda: "2001:db8::/64" in made.at_host("-6", "route", "show", "dev", "eth0"), prefix, timeout_s=60)
        made.at_host("route", "add", "default", "via", "198.18.0.1", "metric", "50")
        made.at_host("route", "add", "203.0.113.0/24", "via", "198.18.0.9")
        made.at_host("-6", "route", "add", "default", "via", "2001:db8::1")
        yield made
    finally:
        made.ip("netns", "delete", made.host)
        made.ip("netns", "delete", made.neighbour)


def test_addresses_and_routes_move_with_the_interfaces_mac(pair: Pair) -> None:
    mac = pair.links()["eth0"]["address"]
    done = pair.make_bridge(INTERFACE="eth0")
    assert (done.returncode, done.stderr) == (0, "")
    assert pair.addresses("eth0") == set()
    assert pair.addresses("br-test") == {"198.18.0.2/24", "198.18.1.2/28", "2001:db8::2/64"}
    assert (pair.links()["br-test"]["address"], pair.links()["eth0"]["master"]) == (mac, "br-test")
    routes = {route["dst"]: route for route in json.loads(pair.at_host("-json", "route"))}
    assert {route["dev"] for route in routes.values()} == {"br-test"}
    assert (routes["default"]["gateway"], routes["default"]["metric"]) == ("198.18.0.1", 50)
    assert routes["203.0.113.0/24"]["gateway"] == "198.18.0.9"
    six = {route["dst"]: route for route in json.loads(pair.at_host("-6", "-json", "route", "show", "default"))}
    assert six["default"]["dev"] == "br-test"


def test_a_connection_over_the_interface_survives(pair: Pair) -> None:
    with pair.start(pair.host, ECHO) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "listening\n"
        with pair.start(pair.neighbour, TALK) as client:
            assert client.stdin is not None
            assert client.stdout is not None
            for word in ("before\n", "after\n"):
                client.stdin.write(word)
                client.stdin.flush()
                assert client.stdout.readline() == word
                if word == "before\n":
                    assert pair.make_bridge(INTERFACE="eth0").returncode == 0
            client.stdin.close()


def test_a_second_run_changes_nothing(pair: Pair) -> None:
    settings = {"INTERFACE": "eth0", "ADDRESSES": "192.0.2.1/24 2001:db8:1::1/64", "MTU": "1400"}
    assert pair.make_bridge(**settings).returncode == 0
    before = (pair.addresses("br-test"), pair.at_host("route"), pair.links()["br-test"]["mtu"])
    done = pair.make_bridge(**settings)
    assert (done.returncode, done.stderr) == (0, "")
    assert (pair.addresses("br-test"), pair.at_host("route"), pair.links()["br-test"]["mtu"]) == before
    assert {"192.0.2.1/24", "2001:db8:1::1/64"} <= before[0]


def test_an_address_that_came_back_to_the_interface_moves_again(pair: Pair) -> None:
    assert pair.make_bridge(INTERFACE="eth0").returncode == 0
    pair.at_host("address", "add", "198.18.7.2/24", "dev", "eth0")
    assert pair.make_bridge(INTERFACE="eth0").returncode == 0
    assert pair.addresses("eth0") == set()
    assert "198.18.7.2/24" in pair.addresses("br-test")


def test_without_the_interface_it_says_so(pair: Pair) -> None:
    done = pair.make_bridge(INTERFACE="eth9")
    assert done.returncode == 1
    assert done.stderr == "bridge br-test: there is no interface eth9 on this host\n"
    assert pair.addresses("eth0") == {"198.18.0.2/24", "198.18.1.2/28", "2001:db8::2/64"}
