# SPDX-License-Identifier: Apache-2.0
"""Consoles through the proxy: no end but the client's leaving, nothing piled up, nothing typed twice."""

from __future__ import annotations

import base64
import json
import threading
from typing import Any

from ppec_lab.conditions import wait_until

SOON_S = 60
NDJSON = {"Accept": "application/x-ndjson"}
VM_ID = "6f2f9d0c-3b0b-4f55-9f2e-0d6c0b1a2c3d"


def open_stream(proxy: Any) -> tuple[Any, Any]:
    connection = proxy.connection()
    connection.request("POST", "/v1/agent/ReadConsole", json.dumps({"vm_id": VM_ID}), NDJSON)
    return connection, connection.getresponse()


def data(number: int, size: int = 9) -> dict[str, Any]:
    return {"data": base64.b64encode(b"%08x\n" % number * (size // 9)).decode()}


def test_a_console_may_be_watched_for_longer_than_any_deadline(start_proxy: Any) -> None:
    proxy = start_proxy(read_timeout_s=1)
    pause = threading.Event()

    def script(call: Any) -> None:
        assert call.message["more"] is True
        for number in range(12):
            call.reply(data(number), continues=True)
            pause.wait(0.25)
        call.reply({"data": ""})

    proxy.agent.script = script
    connection, response = open_stream(proxy)
    lines = [json.loads(line) for line in response]
    assert lines[:12] == [{"parameters": data(number), "continues": True} for number in range(12)]
    assert lines[12:] == [{"parameters": {"data": ""}}]
    connection.close()


def test_an_agent_that_says_nothing_any_more_ends_the_stream_in_words(start_proxy: Any) -> None:
    proxy = start_proxy(read_timeout_s=0.5)
    go_on = threading.Event()

    def script(call: Any) -> None:
        call.reply(data(0), continues=True)
        go_on.wait(SOON_S)

    proxy.agent.script = script
    connection, response = open_stream(proxy)
    lines = [json.loads(line) for line in response]
    assert [line["parameters"].get("code") for line in lines] == [None, "request.deadline_exceeded"]
    go_on.set()
    connection.close()


def test_the_agent_is_hung_up_on_when_the_client_leaves(start_proxy: Any) -> None:
    proxy = start_proxy()

    left = threading.Event()
    go_on = threading.Event()

    def script(call: Any) -> None:
        call.reply(data(0), continues=True)
        go_on.wait(SOON_S)
        try:
            for number in range(1_000_000):
                call.reply(data(number), continues=True)
        except OSError:
            left.set()

    proxy.agent.script = script
    connection, response = open_stream(proxy)
    assert json.loads(response.readline())["continues"]
    connection.sock.close() if connection.sock else None
    response.close()
    connection.close()
    go_on.set()
    assert left.wait(SOON_S), "the agent writes to nobody"


def test_a_client_that_stops_reading_piles_nothing_up_and_ends_its_stream(start_proxy: Any) -> None:
    proxy = start_proxy(stalled_client_timeout_s=1)
    written, left = [0], threading.Event()

    def script(call: Any) -> None:
        try:
            while True:
                call.reply(data(1, size=90_000), continues=True)
                written[0] += 120_000
        except OSError:
            left.set()

    proxy.agent.script = script
    connection, _response = open_stream(proxy)
    assert left.wait(SOON_S), "the agent is let go"
    # What sockets and one reply hold; the proxy's own memory does not grow with what is written.
    status = (f"/proc/{proxy.process.pid}/status", "VmRSS")
    with open(status[0]) as file:  # noqa: PTH123 - a file of the kernel's
        (resident,) = [int(line.split()[1]) for line in file if line.startswith(status[1])]
    assert written[0] < 64 * 1024 * 1024
    assert resident < 150 * 1024
    connection.close()


def test_what_is_typed_goes_to_the_agent_once_even_if_its_answer_is_lost(start_proxy: Any) -> None:
    proxy = start_proxy()
    assert proxy.call("GetVersion").status == 200  # leaves a connection to be kept
    typed: list[Any] = []

    def script(call: Any) -> None:
        typed.append(call.message["parameters"])
        call.hang_up()

    proxy.agent.script = script
    answer = proxy.call("WriteConsole", {"vm_id": VM_ID, "data": "YQ=="})
    assert answer.json["code"] == "agent.unavailable"
    wait_until(lambda: len(proxy.agent.calls) >= 2, "the call arrived", timeout_s=SOON_S)
    assert typed == [{"vm_id": VM_ID, "data": "YQ=="}]
    assert "YQ==" not in proxy.log_path.read_text()


def test_a_read_is_tried_anew_on_a_kept_connection_that_died(start_proxy: Any) -> None:
    """What `once` leaves out, so that the test above can fail."""
    proxy = start_proxy()
    assert proxy.call("GetVersion").status == 200
    asked: list[Any] = []

    def script(call: Any) -> None:
        asked.append(call.message)
        call.hang_up()

    proxy.agent.script = script
    assert proxy.call("ListVms").json["code"] == "agent.unavailable"
    assert len(asked) == 2
