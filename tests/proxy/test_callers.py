# SPDX-License-Identifier: Apache-2.0
"""Who gets in: the ring-fence, the certificate, the role."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import warnings
from ipaddress import ip_network
from typing import Any

import pytest


def test_the_orchestrator_and_an_operator_may_call(proxy: Any, fleet_ca: Any) -> None:
    for uri in ("ppec://orchestrator/main", "ppec://operator/bob"):
        assert proxy.call("GetVersion", credential=fleet_ca.issue(uri)).status == 200


@pytest.mark.parametrize(
    "uris",
    [
        ("ppec://host/h2",),
        (),
        ("https://example.org/",),
        ("ppec://orchestrator/a", "ppec://operator/b"),
        ("ppec://root/a",),
        ("ppec://operator/../x",),
    ],
    ids=["host", "no-san", "foreign-uri", "two", "unknown-role", "path"],
)
@pytest.mark.parametrize("path", ["/v1/agent/GetVersion", "/healthz"])
def test_another_identity_of_the_fleet_ca_is_refused(proxy: Any, fleet_ca: Any, uris: Any, path: str) -> None:
    method = "GET" if path == "/healthz" else "POST"
    answer = proxy.request(method, path, {}, credential=fleet_ca.issue(*uris))
    assert (answer.status, answer.json["code"]) == (403, "auth.wrong_identity")
    assert proxy.agent.calls == []


def test_a_certificate_of_another_ca_or_out_of_date_fails_the_handshake(
    proxy: Any, fleet_ca: Any, other_ca: Any
) -> None:
    strangers = [other_ca.issue("ppec://orchestrator/main"), fleet_ca.issue("ppec://orchestrator/main", expired=True)]
    for credential in strangers:
        # In TLS 1.3 the client learns of it with its first read.
        with pytest.raises((ssl.SSLError, ConnectionError, http.client.BadStatusLine)):
            proxy.call("GetVersion", credential=credential)
    assert proxy.agent.calls == []


def test_no_certificate_no_answer_not_even_health(proxy: Any) -> None:
    context = ssl.create_default_context(cafile=str(proxy.ca.path))
    context.check_hostname = False
    connection = http.client.HTTPSConnection("127.0.0.1", proxy.port, context=context, timeout=60)
    with pytest.raises((ssl.SSLError, ConnectionError, http.client.BadStatusLine)):  # noqa: PT012
        connection.request("GET", "/healthz")
        connection.getresponse()


def test_old_tls_is_refused(proxy: Any) -> None:
    context = proxy.context()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")  # or our own side would refuse first
    with socket.create_connection(("127.0.0.1", proxy.port), 60) as raw, pytest.raises((ssl.SSLError, ConnectionError)):
        context.wrap_socket(raw)


def test_the_proxy_shows_its_hosts_identity(proxy: Any) -> None:
    connection = proxy.connection()
    connection.connect()
    assert ("URI", "ppec://host/h1") in connection.sock.getpeercert()["subjectAltName"]


def client_hello() -> bytes:
    outgoing = ssl.MemoryBIO()
    context = ssl.create_default_context()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="h1")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def hello_answer(port: int, source: str) -> bytes:
    """The first bytes the server says to a ClientHello from `source`; empty when it only closes."""
    client = socket.create_connection(("127.0.0.1", port), 60, source_address=(source, 0))
    with client, contextlib.suppress(ConnectionError):
        client.sendall(client_hello())
        return client.recv(5)
    return b""


def test_outside_the_ring_fence_nobody_says_hello(start_proxy: Any) -> None:
    proxy = start_proxy(allow_from=["127.0.0.1/32"])
    assert hello_answer(proxy.port, "127.0.0.1")[:1] == b"\x16"  # a handshake record: the ServerHello
    for last in range(2, 12):
        assert hello_answer(proxy.port, f"127.0.0.{last}") == b""
    assert proxy.call("GetVersion").status == 200
    lines = [line for line in proxy.log_lines() if line["event"] == "refused"]
    assert lines[0]["client"] == "127.0.0.2"
    assert lines[0]["code"] == "auth.outside_ring_fence"


def test_an_ipv4_client_of_a_dual_stack_listener_is_judged_as_ipv4(start_proxy: Any) -> None:
    proxy = start_proxy(listen_address="::", allow_from=["127.0.0.0/30", "fd00::/8"])
    assert proxy.call("GetVersion").status == 200
    assert hello_answer(proxy.port, "127.0.0.9") == b""


def test_the_fence_matches_networks_of_the_clients_own_family() -> None:
    from ppec_proxy.ring_fence import RingFence

    fence = RingFence((ip_network("10.1.0.0/16"), ip_network("fd00:1::/32")))
    inside = ("10.1.2.3", "::ffff:10.1.2.3", "fd00:1::5", "fd00:1::5%eth0")
    outside = ("10.2.0.1", "::ffff:10.2.0.1", "fd00:2::5", "::1", "::a01:203")
    assert [fence.admits(address) for address in inside] == [True] * len(inside)
    assert [fence.admits(address) for address in outside] == [False] * len(outside)
