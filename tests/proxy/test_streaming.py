# SPDX-License-Identifier: Apache-2.0
"""Progress in pieces, ends that come too early, and many at once."""

from __future__ import annotations

import http.client
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ppec_contract.agent import FAILED
from ppec_contract.errors import PpecError
from ppec_lab.conditions import wait_until

# Long enough for a loaded machine; reached only when a test fails.
SOON_S = 60
NDJSON = {"Accept": "application/x-ndjson"}


def progress(stage: str) -> dict[str, Any]:
    return {"progress": {"vm_id": "6f2f9d0c-3b0b-4f55-9f2e-0d6c0b1a2c3d", "name": "a", "stage": stage, "elapsed_ms": 1}}


def test_each_reply_is_a_line_at_once(proxy: Any, create_call: Any) -> None:
    go_on = threading.Semaphore(0)

    def script(call: Any) -> None:
        assert call.message["more"] is True
        for stage in ("admitted", "disk"):
            call.reply(progress(stage), continues=True)
            assert go_on.acquire(timeout=SOON_S)
        call.reply({"results": []})

    proxy.agent.script = script
    connection = proxy.connection()
    connection.request("POST", "/v1/agent/CreateVms", json.dumps(create_call()), NDJSON)
    response = connection.getresponse()
    assert (response.status, response.headers["content-type"]) == (200, "application/x-ndjson")
    for stage in ("admitted", "disk"):
        # The line is here while the agent still waits for us.
        assert json.loads(response.readline()) == {"parameters": progress(stage), "continues": True}
        go_on.release()
    assert json.loads(response.readline()) == {"parameters": {"results": []}}
    assert response.read() == b""


def test_a_method_without_progress_answers_one_line(proxy: Any) -> None:
    proxy.agent.script = lambda call: call.reply({"vms": []})
    assert proxy.call("ListVms", stream=True).lines == [{"parameters": {"vms": []}}]
    assert "more" not in proxy.agent.calls[0]


def test_an_error_before_the_first_line_is_a_plain_problem(proxy: Any, create_call: Any) -> None:
    problem = PpecError("operation.fenced", "too old").problem().model_dump(mode="json")
    proxy.agent.script = lambda call: call.error(FAILED, problem)
    answer = proxy.call("CreateVms", create_call(), stream=True)
    assert (answer.status, answer.headers["content-type"]) == (409, "application/problem+json")


def test_an_error_after_the_first_line_is_a_line(proxy: Any, create_call: Any) -> None:
    problem = PpecError("disk.full", "no room").problem().model_dump(mode="json")

    def script(call: Any) -> None:
        call.reply(progress("admitted"), continues=True)
        call.error(FAILED, problem)

    proxy.agent.script = script
    answer = proxy.call("CreateVms", create_call(), stream=True)
    assert answer.status == 200
    assert answer.lines[1:] == [{"error": FAILED, "parameters": problem}]


def test_an_agent_that_dies_mid_stream_is_a_line(proxy: Any, create_call: Any) -> None:
    def script(call: Any) -> None:
        call.reply(progress("admitted"), continues=True)
        call.raw(b'{"parameters":{"prog')
        call.hang_up()

    proxy.agent.script = script
    last = proxy.call("CreateVms", create_call(), stream=True).lines[-1]
    assert (last["error"], last["parameters"]["code"]) == (FAILED, "agent.unavailable")
    assert len(proxy.agent.calls) == 1  # not asked again: it had begun to answer


def test_an_agent_that_is_down_is_unavailable_and_back_when_it_is_back(start_proxy: Any, create_call: Any) -> None:
    proxy = start_proxy()
    assert proxy.call("GetVersion").status == 200
    proxy.agent.die()
    for stream in (False, True):
        answer = proxy.call("CreateVms", create_call(), stream=stream)
        assert (answer.status, answer.json["code"]) == (503, "agent.unavailable")
    proxy.agent.path.unlink()
    assert proxy.request("GET", "/healthz").json["code"] == "agent.unavailable"
    proxy.agent.listen()
    assert proxy.call("GetVersion").status == 200


def test_a_kept_connection_that_turns_out_dead_costs_nothing(proxy: Any) -> None:
    seen: list[int] = []

    def script(call: Any) -> None:
        seen.append(1)
        if len(seen) == 2:  # the kept connection: closed instead of answered
            call.hang_up()
        else:
            call.reply({"vms": []})

    proxy.agent.script = script
    assert proxy.call("ListVms").status == 200
    assert proxy.call("ListVms").status == 200
    assert len(seen) == 3


def test_connections_to_the_agent_are_kept(proxy: Any) -> None:
    before = len(proxy.agent.connections)
    for _ in range(10):
        assert proxy.call("GetVersion").status == 200
    assert len(proxy.agent.connections) - before <= 1


def test_a_client_that_leaves_does_not_stop_the_agent(start_proxy: Any, create_call: Any) -> None:
    proxy = start_proxy()
    client_left = threading.Event()
    wrote_all = threading.Event()

    def script(call: Any) -> None:
        call.reply(progress("admitted"), continues=True)
        assert client_left.wait(SOON_S)
        for _ in range(200):
            call.reply(progress("disk"), continues=True)
        call.reply({"results": []})
        wrote_all.set()

    proxy.agent.script = script
    connection = proxy.connection()
    connection.request("POST", "/v1/agent/CreateVms", json.dumps(create_call()), NDJSON)
    connection.getresponse().readline()
    connection.close()
    client_left.set()
    assert wrote_all.wait(SOON_S)
    # What the agent wrote, the proxy may be reading still.
    ended = "the request comes to its end"
    wait_until(lambda: [line for line in proxy.log_lines() if line["event"] == "request"], ended, timeout_s=SOON_S)
    # So did the conversation, and the connection is of use to the next caller.
    proxy.agent.script = lambda call: call.reply({"vms": []})
    assert proxy.call("ListVms").status == 200
    assert len(proxy.agent.connections) == 1


def test_a_client_that_stops_reading_does_not_hold_the_agent(start_proxy: Any, create_call: Any) -> None:
    proxy = start_proxy(stalled_client_timeout_s=0.2)
    wrote_all = threading.Event()
    bulk = progress("disk") | {"pad": "x" * 100_000}

    def script(call: Any) -> None:
        for _ in range(200):
            call.reply(bulk, continues=True)
        call.reply({"results": []})
        wrote_all.set()

    proxy.agent.script = script
    connection = proxy.connection()
    connection.request("POST", "/v1/agent/CreateVms", json.dumps(create_call()), NDJSON)
    assert wrote_all.wait(SOON_S)
    connection.close()


def test_a_deadline_ends_a_call_and_a_stream(start_proxy: Any, create_call: Any) -> None:
    # The second has to leave time for the first line.
    proxy = start_proxy(read_timeout_s=0.3, change_timeout_s=3)
    release = threading.Event()
    proxy.agent.script = lambda call: release.wait(SOON_S)
    answer = proxy.call("ListVms")
    assert (answer.status, answer.json["code"]) == (504, "request.deadline_exceeded")

    def script(call: Any) -> None:
        call.reply(progress("admitted"), continues=True)
        release.wait(SOON_S)

    proxy.agent.script = script
    lines = proxy.call("CreateVms", create_call(), stream=True).lines
    assert lines[-1]["parameters"]["code"] == "request.deadline_exceeded"
    release.set()


def test_a_body_that_dribbles_is_given_up(start_proxy: Any) -> None:
    proxy = start_proxy(body_timeout_s=0.3)
    connection = proxy.connection()
    connection.connect()
    # In one go: what is sent later might meet a connection that is closed already.
    connection.sock.sendall(b"POST /v1/agent/ListVms HTTP/1.1\r\nHost: h1\r\nContent-Length: 10\r\n\r\n{")
    response = http.client.HTTPResponse(connection.sock)
    response.begin()
    assert (response.status, json.loads(response.read())["code"]) == (504, "request.deadline_exceeded")


def test_when_all_connections_are_in_use_the_agent_is_busy(start_proxy: Any) -> None:
    proxy = start_proxy(max_agent_connections=1, agent_queue_timeout_s=0.2)
    entered, release = threading.Event(), threading.Event()

    def script(call: Any) -> None:
        entered.set()
        assert release.wait(SOON_S)
        call.reply({"vms": []})

    proxy.agent.script = script
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(proxy.call, "ListVms")
        assert entered.wait(SOON_S)
        second = proxy.call("ListVms")
        release.set()
        assert (second.status, second.json["code"]) == (503, "agent.busy")
        assert first.result().status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_many_at_once_each_get_their_own_answer(proxy: Any, stream: bool) -> None:
    def script(call: Any) -> None:
        if call.message.get("more"):
            for _ in range(5):
                call.reply(progress("disk"), continues=True)
        call.reply({"echo": call.message["parameters"]["operation_id"]})

    proxy.agent.script = script

    def one(number: int) -> bool:
        body = {"operation_id": f"op-{number}", "fence": 0, "vm_ids": ["6f2f9d0c-3b0b-4f55-9f2e-0d6c0b1a2c3d"]}
        answer = proxy.call("DeleteVms", body, stream=stream)
        last = answer.lines[-1]
        return (last["parameters"] if stream else last) == {"echo": f"op-{number}"}

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(64)))
