# SPDX-License-Identifier: Apache-2.0
"""What gets through to the agent, what is refused before it, and how the agent's answers come back."""

from __future__ import annotations

import http.client
import json
import uuid
from typing import Any

import pytest

from ppec_contract.agent import FAILED, METHODS
from ppec_contract.errors import PpecError
from ppec_lab.conditions import wait_until


def refused(answer: Any, proxy: Any, code: str, status: int) -> dict[str, Any]:
    """The answer is the problem `code`, and the agent was never asked."""
    assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json")
    assert answer.json["code"] == code
    assert b"Traceback" not in answer.body
    assert proxy.agent.calls == []
    return answer.json


def test_a_call_reaches_the_agent_as_one_varlink_message(proxy: Any, create_call: Any) -> None:
    proxy.agent.script = lambda call: call.reply({"results": []})
    parameters = create_call(user_data="#cloud-config\n{{ lookup('pipe', 'id') }}\n", tags={"<a>": "$(id)"})
    answer = proxy.call("CreateVms", parameters)
    assert (answer.status, answer.json) == (200, {"results": []})
    assert proxy.agent.calls == [{"method": "cloud.ppec.agent.CreateVms", "parameters": parameters}]


def test_what_the_client_left_out_is_left_to_the_agent(proxy: Any) -> None:
    proxy.call("StopVms", {"operation_id": "op", "fence": 0, "vm_ids": ["6f2f9d0c-3b0b-4f55-9f2e-0d6c0b1a2c3d"]})
    assert set(proxy.agent.calls[0]["parameters"]) == {"operation_id", "fence", "vm_ids"}


def test_an_unknown_field_is_refused_and_named(proxy: Any, create_call: Any) -> None:
    problem = refused(proxy.call("CreateVms", create_call(hugepages=True)), proxy, "request.invalid", 422)
    assert problem["details"]["faults"][0]["field"] == "vms.0.hugepages"


def test_odd_vcpus_have_a_code_of_their_own(proxy: Any, create_call: Any) -> None:
    problem = refused(proxy.call("CreateVms", create_call(vcpus=3)), proxy, "vm.odd_vcpus", 422)
    assert "ask for 2 or 4" in problem["detail"]


@pytest.mark.parametrize("name", ["{{ 1 }}", "../etc", "a\nb", "$(id)", "<x>", "a" * 64, ""])
def test_a_hostile_vm_name_is_refused(proxy: Any, create_call: Any, name: str) -> None:
    refused(proxy.call("CreateVms", create_call(name=name)), proxy, "request.invalid", 422)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"fence": 1, "fence": 2}',
        b'{"fence": NaN}',
        b'{"operation_id": "\\ud800"}',
        b'{"fence": 9223372036854775808}',
        b"\xff{}",
        b'{"a":' * 40 + b"1" + b"}" * 40,
    ],
)
def test_a_body_that_is_not_strict_json_is_malformed(proxy: Any, body: bytes) -> None:
    refused(proxy.request("POST", "/v1/agent/DeleteVms", body), proxy, "request.malformed", 400)


def test_a_body_over_the_limit_is_refused(proxy: Any) -> None:
    body = b'{"a": "' + b"x" * (5 << 20) + b'"}'
    refused(proxy.request("POST", "/v1/agent/GetReport", body), proxy, "request.too_large", 413)


def test_a_chunked_body_over_the_limit_is_refused(proxy: Any) -> None:
    connection = proxy.connection()
    chunks = (b"x" * 65536 for _ in range(80))
    connection.request("POST", "/v1/agent/GetReport", chunks, encode_chunked=True)
    assert connection.getresponse().status == 413
    assert proxy.agent.calls == []


def test_an_announced_giant_is_refused_before_it_is_sent(proxy: Any) -> None:
    connection = proxy.connection()
    connection.putrequest("POST", "/v1/agent/GetReport")
    connection.putheader("Content-Length", str(1 << 40))
    connection.endheaders()
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())["code"]) == (413, "request.too_large")


@pytest.mark.parametrize("path", ["/", "/v1/agent/", "/v1/agent/Reboot", "/v1/agent/CreateVms/", "/v2/agent/ListVms"])
def test_there_are_no_other_routes(proxy: Any, path: str) -> None:
    refused(proxy.request("POST", path, {}), proxy, "request.unknown_method", 404)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_contract_is_a_route_for_post_only(proxy: Any, method: str) -> None:
    answer = proxy.request("GET", f"/v1/agent/{method}")
    refused(answer, proxy, "request.method_not_allowed", 405)
    assert answer.headers["allow"] == "POST"


def test_health_is_that_of_the_agent_behind(proxy: Any) -> None:
    answer = proxy.request("GET", "/healthz")
    assert (answer.status, answer.json["status"]) == (200, "ok")
    assert proxy.agent.calls == [{"method": "cloud.ppec.agent.GetVersion"}]


def test_the_agents_problem_keeps_its_code_status_and_details(proxy: Any) -> None:
    problem = PpecError("host.no_capacity", "no cores", hint="h", subject="host h1", details={"free": 2}).problem()
    proxy.agent.script = lambda call: call.error(FAILED, problem.model_dump(mode="json"))
    answer = proxy.call("ListVms")
    assert (answer.status, answer.json) == (409, problem.model_dump(mode="json"))


@pytest.mark.parametrize(
    ("name", "code", "status"),
    [
        ("org.varlink.service.MethodNotFound", "request.unknown_method", 404),
        ("org.varlink.service.InvalidParameter", "request.invalid", 422),
        ("org.varlink.service.InterfaceNotFound", "request.unsupported_version", 422),
        ("org.varlink.service.PermissionDenied", "auth.peer_refused", 403),
        ("cloud.ppec.agent.Unheard", "internal.error", 500),
        (FAILED, "internal.error", 500),
    ],
)
def test_other_varlink_errors_are_mapped(proxy: Any, name: str, code: str, status: int) -> None:
    proxy.agent.script = lambda call: call.error(name, {"parameter": "x"})
    answer = proxy.call("ListVms")
    assert (answer.status, answer.json["code"]) == (status, code)


def test_an_agent_that_speaks_nonsense_is_an_internal_error(proxy: Any) -> None:
    proxy.agent.script = lambda call: call.raw(b"<html>\0")
    assert proxy.call("ListVms").json["code"] == "internal.error"
    proxy.agent.script = lambda call: call.reply({"vms": []})
    assert proxy.call("ListVms").json == {"vms": []}


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET /healthz HTTP/9.9\r\n\r\n",
        b"POST /v1/agent/ListVms HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/agent/ListVms HTTP/1.1\r\nContent-Length: 1e3\r\n\r\n",
        b"GET / HTTP/1.1\r\nX-Long: " + b"a" * 200_000,
        b"GET /" + b"a" * 200_000,
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 30_000,
    ],
    ids=["binary", "version", "negative-length", "odd-length", "long-header", "long-path", "many-headers"],
)
def test_what_is_not_http_gets_a_problem_too(proxy: Any, raw: bytes) -> None:
    connection = proxy.connection()
    connection.connect()
    connection.sock.sendall(raw)
    response = http.client.HTTPResponse(connection.sock)
    response.begin()
    assert (response.status, json.loads(response.read())["code"]) == (400, "request.malformed")
    assert proxy.agent.calls == []


def test_the_access_line_names_the_caller_and_no_content(proxy: Any, create_call: Any) -> None:
    proxy.agent.script = lambda call: call.reply({"results": []})
    operation_id = f"op-{uuid.uuid4().hex}"
    proxy.call("CreateVms", {**create_call(user_data="secret-of-the-tenant"), "operation_id": operation_id})

    def access_lines() -> list[dict[str, Any]]:
        return [line for line in proxy.log_lines() if line.get("operation_id") == operation_id]

    # It tells how long the answer took, so it comes after the answer.
    (line,) = wait_until(access_lines, "the request has its line", timeout_s=20) or []
    assert line["event"] == "request"
    assert line["identity"] == "ppec://operator/alice"
    assert (line["client"], line["path"], line["status"]) == ("127.0.0.1", "/v1/agent/CreateVms", 200)
    assert line["duration_ms"] >= 0
    assert "secret-of-the-tenant" not in proxy.log_path.read_text()
