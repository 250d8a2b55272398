# SPDX-License-Identifier: Apache-2.0
"""What guests say, and consoles through the agent's socket: hostile words, many readers, readers that leave."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppec_agentd.consoles import MOST_READERS
from ppec_agentd.guests import LONGEST_WORD, MOST_ADDRESSES, MOST_INTERFACES, GuestNic, GuestSays, guest_says
from ppec_contract.errors import PpecError
from ppec_contract.guest import QueryGuests, ReadConsole
from ppec_lab.conditions import wait_until

TOLD = {
    "hostname": "web-1",
    "os.id": "debian",
    "os.name": "Debian GNU/Linux",
    "os.pretty-name": "Debian GNU/Linux 12 (bookworm)",
    "os.version-id": "12",
    "os.kernel-release": "6.1.0-28-cloud-amd64",
    "if.count": 2,
    "if.0.name": "lo",
    "if.0.hwaddr": "00:00:00:00:00:00",
    "if.0.addr.count": 1,
    "if.0.addr.0.type": "ipv4",
    "if.0.addr.0.addr": "127.0.0.1",
    "if.0.addr.0.prefix": 8,
    "if.1.name": "eth0",
    "if.1.hwaddr": "52:54:00:00:00:01",
    "if.1.addr.count": 2,
    "if.1.addr.0.addr": "10.0.0.5",
    "if.1.addr.0.prefix": 24,
    "if.1.addr.1.addr": "fe80::5054:ff:fe00:1",
    "if.1.addr.1.prefix": 64,
}


def test_what_libvirt_makes_of_an_agent_s_answers_is_read() -> None:
    assert guest_says(TOLD) == GuestSays(
        hostname="web-1",
        os_id="debian",
        os_name="Debian GNU/Linux 12 (bookworm)",
        os_version="12",
        kernel="6.1.0-28-cloud-amd64",
        nics=(
            GuestNic("lo", "00:00:00:00:00:00", ("127.0.0.1/8",)),
            GuestNic("eth0", "52:54:00:00:00:01", ("10.0.0.5/24", "fe80::5054:ff:fe00:1/64")),
        ),
    )
    assert guest_says({}) == GuestSays()


words = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63),
    st.text(max_size=600),
    st.sampled_from(["{{ 1 }}", "<x/>", "a\nb", "\x1b[2J", "::1", "999.1.1.1", "10.0.0.1/8"]),
)


@given(st.dictionaries(st.sampled_from([*TOLD, "os.version", "if.63.name", "if.99.name"]), words))
def test_whatever_a_guest_says_is_bounded_printable_text(told: dict[str, Any]) -> None:
    says = guest_says(told)
    assert len(says.nics) <= MOST_INTERFACES
    assert all(len(nic.addresses) <= MOST_ADDRESSES for nic in says.nics)
    texts = [says.hostname, says.os_id, says.os_name, says.os_version, says.kernel]
    for nic in says.nics:
        texts += [nic.name, nic.mac, *nic.addresses]
    assert all(len(text) <= LONGEST_WORD and text.isprintable() for text in texts)


def test_each_guest_is_asked_and_one_s_silence_is_its_own(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            speaks, silent = vm(), vm()
            await agent.create(speaks, silent)
            agent.hypervisor.sayings[speaks.vm_id] = guest_says(TOLD)
            agent.hypervisor.faults.fail("guest", PpecError("guest.agent_unavailable", "no answer"), nth=2)
            asked = QueryGuests(vm_ids=(speaks.vm_id, silent.vm_id, uuid.uuid4(), speaks.vm_id))
            first, second = (await agent.service._guests.query(asked)).guests
            assert (first.agent_connected, first.hostname, first.problem) == (True, "web-1", None)
            assert first.interfaces[1].addresses[0] == "10.0.0.5/24"
            assert (second.name, second.agent_connected, second.hostname) == (silent.name, False, "")
            assert second.problem.code == "guest.agent_unavailable"

    asyncio.run(scenario())


# --- consoles through the socket ---------------------------------------------------------------------------------


@pytest.fixture
def agent(agent_process: Callable[..., Any], vm: Any) -> Any:
    """An agent with one VM, `agent.vm`, and its console's log, `agent.console`."""
    agent = agent_process().start()
    agent.vm = vm()
    create = {"operation_id": "op-1", "fence": 1, "vms": [agent.vm.model_dump(mode="json")]}
    assert agent.client().call("CreateVms", create)["parameters"]["results"][0]["changed"]
    agent.console = agent.settings.storage.vms / str(agent.vm.vm_id) / "console.log"
    return agent


def watch(agent: Any, **request: Any) -> Any:
    """A client in mid-stream."""
    client = agent.client()
    client.send("cloud.ppec.agent.ReadConsole", {"vm_id": str(agent.vm.vm_id), **request}, more=True)
    return client


def piece(client: Any) -> bytes:
    """The next bytes; signs of life are passed over."""
    while not (data := base64.b64decode(client.receive()["parameters"]["data"])):
        pass
    return data


def test_the_tail_then_what_comes(agent: Any) -> None:
    agent.console.write_bytes(b"\x00\xff\x1b[2Jolder\n")
    client = watch(agent, tail_bytes=9)
    first = client.receive()
    assert first["continues"]
    assert base64.b64decode(first["parameters"]["data"]) == b"[2Jolder\n"
    assert first["parameters"]["state"] == "running"
    with agent.console.open("ab") as log:
        log.write(b"\x80newer")
    assert piece(client) == b"\x80newer"


def test_without_more_there_is_one_reply_with_all_of_the_tail(agent: Any) -> None:
    agent.console.write_bytes(bytes(range(256)) * 2048)
    asked = {"vm_id": str(agent.vm.vm_id), "tail_bytes": 262144}
    reply = agent.client().call("ReadConsole", asked)
    assert base64.b64decode(reply["parameters"]["data"]) == bytes(range(256)) * 1024
    reply = agent.client().call("ReadConsole", {**asked, "follow": False}, more=True)
    assert "continues" not in reply


def test_the_places_of_readers_that_leave_are_free_again(agent: Any) -> None:
    readers = [watch(agent) for _ in range(MOST_READERS)]
    for reader in readers:
        assert reader.receive()["continues"]
    refused = agent.client().call("ReadConsole", {"vm_id": str(agent.vm.vm_id)}, more=True)
    assert refused["parameters"]["code"] == "agent.busy"
    for reader in readers:
        reader.close()

    def admitted() -> bool:
        client = watch(agent)
        return "continues" in client.receive()

    wait_until(admitted, "the places are free", timeout_s=60)


def test_a_reader_that_takes_nothing_holds_nobody_up(agent: Any) -> None:
    agent.console.touch()
    stuck, live = watch(agent, tail_bytes=0), watch(agent, tail_bytes=0)
    for client in (stuck, live):
        client.receive()
    got = b""
    for _ in range(64):
        with agent.console.open("ab") as log:
            log.write(bytes(65536))
        while len(got) % 65536 or not got:
            got += piece(live)
        got = b""
    with agent.console.open("ab") as log:
        log.write(b"end")
    while not got.endswith(b"end"):
        got = piece(live)


def test_a_hypervisor_that_hangs_keeps_no_reader_waiting(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one = vm()
            await agent.create(one)
            log = agent.context.folder(one.vm_id).console_log
            log.write_bytes(b"before")
            async with contextlib.aclosing(
                agent.service._guests.read_console(ReadConsole(vm_id=one.vm_id), more=True)
            ) as pieces:
                assert base64.b64decode((await anext(pieces)).data) == b"before"
                agent.hypervisor.faults.delays_s["domain"] = 600
                agent.hypervisor.crash(one.vm_id)  # makes it look, and hang
                with log.open("ab") as file:
                    file.write(b"after")
                async with asyncio.timeout(60):
                    assert base64.b64decode((await anext(pieces)).data) == b"after"
                    # And a sign of life, though nothing can be said of the VM.
                    sign = await anext(pieces)
                assert (sign.data, sign.state) == ("", None)

    asyncio.run(scenario())


def test_a_stream_tells_each_change_of_state(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            one = vm()
            await agent.create(one)
            async with contextlib.aclosing(
                agent.service._guests.read_console(ReadConsole(vm_id=one.vm_id), more=True)
            ) as pieces:
                told = [(await anext(pieces)).state]
                async with asyncio.timeout(60):
                    for change in (agent.hypervisor.pause, agent.hypervisor.resume, agent.hypervisor.destroy):
                        await change(one.vm_id)
                        while (state := (await anext(pieces)).state) is None:
                            pass
                        told.append(state)
                assert told == ["running", "paused", "running", "stopped"]

    asyncio.run(scenario())


def test_a_stream_ends_with_its_vm(agent: Any) -> None:
    client = watch(agent)
    assert client.receive()["continues"]
    delete = {"operation_id": "op-2", "fence": 1, "vm_ids": [str(agent.vm.vm_id)]}
    agent.client().call("DeleteVms", delete)
    while (last := client.receive()).get("continues"):
        pass
    assert "error" not in last
    assert last["parameters"]["data"] == ""


def test_the_agent_s_end_does_not_wait_for_readers(agent: Any) -> None:
    client = watch(agent)
    assert client.receive()["continues"]
    assert agent.end() == 0


def test_what_is_typed_arrives_and_is_written_down_nowhere(agent: Any) -> None:
    asked = {"vm_id": str(agent.vm.vm_id), "data": base64.b64encode(b"hunter2\n").decode()}
    assert agent.client().call("WriteConsole", asked)["parameters"] == {"written_bytes": 8}
    for path in agent.folder.rglob("*"):
        if path.is_file():
            assert b"hunter2" not in path.read_bytes()
            assert asked["data"].encode() not in path.read_bytes()


VM_ID = "7d2c4f0e-6f0a-4b7e-9f55-2b1c36a0a001"
BAD = [
    ("WriteConsole", {"vm_id": VM_ID, "data": ""}),
    ("WriteConsole", {"vm_id": VM_ID, "data": "===="}),
    ("WriteConsole", {"vm_id": VM_ID, "data": "YQ"}),
    ("WriteConsole", {"vm_id": VM_ID, "data": "YQ==\n"}),
    ("WriteConsole", {"vm_id": VM_ID, "data": "Y Q=="}),
    ("WriteConsole", {"vm_id": VM_ID, "data": "A" * 5465}),
    ("WriteConsole", {"vm_id": VM_ID, "data": ["YQ=="]}),
    ("WriteConsole", {"vm_id": "../../etc/passwd", "data": "YQ=="}),
    ("ReadConsole", {"vm_id": "../../etc"}),
    ("ReadConsole", {"vm_id": VM_ID, "tail_bytes": -1}),
    ("ReadConsole", {"vm_id": VM_ID, "tail_bytes": 262145}),
    ("ReadConsole", {"vm_id": VM_ID, "tail_bytes": 2**62}),
    ("ReadConsole", {"vm_id": VM_ID, "tail_bytes": "1"}),
    ("ReadConsole", {"vm_id": VM_ID, "path": "/etc/shadow"}),
    ("QueryGuests", {"vm_ids": []}),
    ("QueryGuests", {"vm_ids": [VM_ID] * 257}),
    ("QueryGuests", {"vm_ids": [VM_ID], "timeout_s": 0}),
    ("QueryGuests", {"vm_ids": [VM_ID], "timeout_s": 1e9}),
    ("FreezeVms", {"operation_id": "o", "fence": 0, "vm_ids": [VM_ID], "thaw_after_s": 601}),
    ("FreezeVms", {"operation_id": "o", "fence": 0, "vm_ids": [VM_ID], "thaw_after_s": 0}),
    ("RebootVms", {"operation_id": "o", "fence": 0, "vm_ids": [VM_ID], "timeout_s": -1}),
    ("ResetVms", {"operation_id": "o", "fence": 0, "vm_ids": [VM_ID], "force": True}),
]


def test_bad_requests_are_refused_by_name_and_change_nothing(agent: Any) -> None:
    client, before = agent.client(), agent.client().call("ListVms")["parameters"]
    for method, parameters in BAD:
        for more in (False, True):
            reply = client.call(method, parameters, more=more)
            assert reply["parameters"]["code"] == "request.invalid", (method, parameters)
            assert "A" * 100 not in json.dumps(reply)
    absent = client.call("ReadConsole", {"vm_id": VM_ID}, more=True)
    assert absent["parameters"]["code"] == "vm.not_found"
    absent = client.call("WriteConsole", {"vm_id": VM_ID, "data": "YQ=="})
    assert absent["parameters"]["code"] == "vm.not_found"
    assert agent.client().call("ListVms")["parameters"] == before
