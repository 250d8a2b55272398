# SPDX-License-Identifier: Apache-2.0
"""The clients of proxy and socket: identities, broken connections, repeated calls, bounds."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from contextlib import contextmanager

import pytest
from ansible_collections.ppec.cloud.plugins.module_utils.agent_actions import perform
from ansible_collections.ppec.cloud.plugins.module_utils.agent_client import AgentClient, client_from_params
from ansible_collections.ppec.cloud.plugins.module_utils.contract_table import ERRORS, MAX_FRAME_BYTES
from ansible_collections.ppec.cloud.plugins.module_utils.deadline import Deadline
from ansible_collections.ppec.cloud.plugins.module_utils.problem import ProblemError
from ansible_collections.ppec.cloud.plugins.module_utils.proxy_session import ProxyAddress, ProxySession
from ansible_collections.ppec.cloud.plugins.module_utils.socket_session import SocketSession
from fleet_certificates import FleetCa

from ppec_contract.errors import ERROR_TABLE, retryable

INFO = {"report": False}


def create(spec, *names, **other):
    return {"operation_id": "op-1", "fence": 0, "vms": [spec(name) for name in names], **other}


def present(spec, name):
    return {"state": "present", "operation_id": "op-1", "fence": 0, "vms": [spec(name)], "timeout_s": 1, "force": False}


def impatient(connection, clock=time.monotonic):
    """A client that does not wait between attempts."""
    where = ProxyAddress(*(connection[n] for n in ("host_name", "proxy_address", "proxy_port", "ca_path")),
                         connection["certificate_path"], connection["key_path"])  # fmt: skip
    deadline = Deadline(connection["deadline_s"], clock)
    return AgentClient(lambda: ProxySession(where, deadline), deadline, sleep=lambda _: None)


def test_over_the_proxy_one_session_serves_reading_and_acting(make_fleet, spec):
    fleet = make_fleet("h1")
    outcome = perform("agent_vms", {**present(spec, "a"), **fleet.connection("h1")}, False)
    assert outcome["changed"]
    assert [method for method, _ in fleet.hosts["h1"].agent.requests] == ["ListVms", "CreateVms"]
    assert fleet.hosts["h1"].agent.connections == 1


def test_a_stream_leaves_the_session_ready_for_the_next_call(make_fleet, spec):
    fleet = make_fleet("h1")
    client = client_from_params(fleet.connection("h1"))
    client.call("CreateVms", create(spec, "a"))
    client.call("CreateVms", create(spec, "b"))
    assert [vm["name"] for vm in client.call("ListVms", {})["vms"]] == ["a", "b"]
    client.close()
    assert (client.sessions_opened, fleet.hosts["h1"].agent.connections) == (1, 1)


def test_over_the_socket(agent, agent_socket, spec):
    outcome = perform("agent_vms", {**present(spec, "a"), "socket_path": str(agent_socket), "deadline_s": 20.0}, False)
    assert outcome["changed"]
    assert agent.connections == 1


def test_replies_are_handed_over_as_they_come(make_fleet, agent, agent_socket, spec):
    fleet = make_fleet("h1")
    for connection in (fleet.connection("h1"), {"socket_path": str(agent_socket), "deadline_s": 20.0}):
        seen = []
        client = client_from_params(connection)
        last = client.call("CreateVms", create(spec, "a", "b"), seen.append)
        client.close()
        assert [bool(reply.get("progress")) for reply in seen] == [True, False, True, False, False]
        assert seen[-1] == last
        assert [result["name"] for result in last["results"]] == ["a", "b"]


@pytest.mark.parametrize("fault", ["drop", "drop_after:0", "drop_after:1", "drop_after:2", "busy"])
def test_a_lost_reply_is_asked_for_again_and_nothing_done_twice(make_fleet, spec, fault):
    fleet = make_fleet("h1")
    agent = fleet.hosts["h1"].agent
    agent.faults = [fault]
    client = impatient(fleet.connection("h1"))
    reply = client.call("CreateVms", create(spec, "a"))
    client.close()
    assert reply["results"][0]["problem"] is None
    assert reply["results"][0]["replayed"] == fault.startswith("drop_after")
    assert len(agent.vms) == 1
    assert len({sent["operation_id"] for _, sent in agent.changes}) == 1
    assert client.sessions_opened == 2


def test_the_number_of_attempts_is_bounded(make_fleet, spec):
    fleet = make_fleet("h1")
    fleet.hosts["h1"].agent.faults = ["busy"] * 5
    with pytest.raises(ProblemError) as caught:
        impatient(fleet.connection("h1")).call("CreateVms", create(spec, "a"))
    assert caught.value.code == "agent.busy"
    assert len(fleet.hosts["h1"].agent.changes) == 3


def test_a_refusal_is_not_tried_again(make_fleet, spec):
    fleet = make_fleet("h1")
    bad = create(spec, "a")
    bad["vms"][0]["vcpus"] = 3
    with pytest.raises(ProblemError) as caught:
        impatient(fleet.connection("h1")).call("CreateVms", bad)
    assert caught.value.code == "vm.odd_vcpus"
    assert len(fleet.hosts["h1"].agent.changes) == 1
    assert fleet.hosts["h1"].agent.vms == {}


def test_another_host_in_its_place_gets_no_request(make_fleet):
    fleet = make_fleet("h1", "h2")
    result = perform("agent_info", {**INFO, **fleet.connection("h1", proxy_port=fleet.hosts["h2"].port)}, False)
    assert result["problem"]["code"] == "auth.wrong_identity"
    assert "should be ppec://host/h1, its certificate says ppec://host/h2" in result["msg"]
    assert fleet.hosts["h2"].agent.requests == []


def test_a_server_of_another_ca_gets_no_request(make_fleet, tmp_path):
    fleet = make_fleet("h1")
    other = FleetCa(tmp_path, "other")
    result = perform("agent_info", {**INFO, **fleet.connection("h1", ca_path=str(other.path))}, False)
    assert result["problem"]["code"] == "auth.wrong_identity"
    assert fleet.hosts["h1"].agent.requests == []


def test_our_certificate_refused_is_said_as_such(make_fleet, tmp_path):
    fleet = make_fleet("h1")
    certificate, key = FleetCa(tmp_path, "other").issue("ppec://orchestrator/main")
    connection = fleet.connection("h1", certificate_path=str(certificate), key_path=str(key))
    result = perform("agent_info", {**INFO, **connection}, False)
    assert result["problem"]["code"] in ("auth.required", "host.unreachable")
    assert fleet.hosts["h1"].agent.requests == []


def test_certificates_that_are_missing_are_named(make_fleet):
    fleet = make_fleet("h1")
    result = perform("agent_info", {**INFO, **fleet.connection("h1", key_path="/nowhere/key")}, False)
    assert result["problem"]["code"] == "auth.required"
    assert "/nowhere/key" in result["msg"]
    result = perform("agent_info", {**INFO, **fleet.connection("h1", key_path=None, ca_path=None)}, False)
    assert "ca_path, key_path must be given too" in result["msg"]


def test_nobody_listens(make_fleet, short_dir):
    fleet = make_fleet("h1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(ProblemError) as caught:
            impatient(fleet.connection("h1", proxy_port=unused.getsockname()[1])).call("GetVersion", {})
    assert caught.value.code == "host.unreachable"
    deadline = Deadline(60)
    client = AgentClient(lambda: SocketSession(str(short_dir / "none"), deadline), deadline, sleep=lambda _: None)
    with pytest.raises(ProblemError) as caught:
        client.call("GetVersion", {})
    assert caught.value.code == "agent.unavailable"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("not json\n", "internal.error"),
        ("[1]\n", "internal.error"),
        ('{"parameters": 7}\n', "internal.error"),
        ('{"error": "org.varlink.service.MethodNotFound"}\n', "request.unknown_method"),
        ('{"error": "cloud.ppec.agent.Failed", "parameters": {}}\n', "internal.error"),
        ("x" * (MAX_FRAME_BYTES + 2), "internal.error"),
    ],
)
def test_an_answer_off_the_contract_is_an_error_not_a_traceback(make_fleet, spec, answer, code):
    fleet = make_fleet("h1")
    fleet.hosts["h1"].agent.faults = [f"script:{answer}"]
    with pytest.raises(ProblemError) as caught:
        impatient(fleet.connection("h1")).call("CreateVms", create(spec, "a"))
    assert caught.value.code == code


def test_a_reply_without_what_the_contract_says_is_an_error_not_a_traceback(make_fleet, spec):
    fleet = make_fleet("h1")
    fleet.hosts["h1"].agent.faults = ['script:{"parameters": {}}\n']
    result = perform("agent_vms", {**present(spec, "a"), **fleet.connection("h1")}, False)
    assert result["failed"]
    assert "does not follow the contract" in result["msg"]


@contextmanager
def trickling_server(context):
    """Takes one connection and sends an endless header, a byte at a time; its port, and whether it has begun."""
    begun, ended = threading.Event(), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            with socket.socket() as nothing:
                raw = nothing
                try:
                    raw, _ = listener.accept()
                    with context.wrap_socket(raw, server_side=True) as tls:
                        tls.recv(65536)
                        tls.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                        begun.set()
                        while not ended.wait(0.05):
                            tls.sendall(b"x")
                except OSError:
                    raw.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1], begun
        ended.set()
        thread.join(5)


def test_a_deadline_holds_against_a_peer_that_trickles(make_fleet, certificates):
    fleet = make_fleet()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificates.issue("ppec://host/slow"))
    fleet.hosts["slow"] = fleet  # only its port is looked up
    with trickling_server(context) as (fleet.port, begun):
        # However long it took to get there, only then is no more than half a second left.
        client = impatient(fleet.connection("slow"), lambda: time.monotonic() + (59.5 if begun.is_set() else 0.0))
        with pytest.raises(ProblemError) as caught:
            client.call("GetVersion", {})
    assert caught.value.code == "request.deadline_exceeded"


def test_retry_rules_are_the_contract_s():
    assert {code: ProblemError(code, "").retryable for code in ERRORS} == {
        code: retryable(code) for code in ERROR_TABLE
    }
    assert not ProblemError("made.up", "").retryable
