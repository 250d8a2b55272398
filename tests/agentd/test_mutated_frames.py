# SPDX-License-Identifier: Apache-2.0
"""Fifty thousand mutants of every method's frame on the agent's socket: each refused without a trace, or a valid call.

After each mutant everything that a call can change is looked at: only one that is still a valid changing call may have
changed it. All else is bounded: an answer or the end of the connection comes, in little time of the processor; the
agent's log knows no error of its own; the process doesn't grow.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from ppec_agentd.connection import read_call
from ppec_agentd.server import Server
from ppec_contract.agent import FAILED, INTERFACE, METHODS
from ppec_contract.errors import ERROR_TABLE, PpecError
from ppec_contract.frames import MAX_DEPTH, MAX_FRAME_BYTES, FrameError, decode_json_object, encode
from ppec_contract.validation import parse

# The first part is in every run of the tests; `make test-long` takes the others, 50,000.
IN_PART, PARTS = 5_000, 11
GROWTH_KIB = 5 * 1024
# What nobody waits for on a loaded machine; what a mutant may cost is counted in processor time.
SOON_S = 60
HANG_CPU_S = 1.0
# In every other part the frames' operation has gone on without them: a mutant that is valid still is mostly refused for
# its fence. In the others each has an operation of its own, and is carried out.
OPERATION, HIGHEST = "op-mutated", 1000
SENTINEL = b'{"method":"org.varlink.service.GetInfo"}\0'
CHANGING = (
    "annotate", "define", "destroy", "freeze", "grow_memory", "pause", "reboot", "redefine", "reseat", "reset",
    "resume", "set_vcpus", "shutdown", "start", "thaw", "type_on_console", "undefine",
)  # fmt: skip
Path_ = tuple[str | int, ...]


# --- mutants ---------------------------------------------------------------------------------------------------------

RAW = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"9223372036854775808", b"-9223372036854775809",
    b"9" * 40, b"0" * 5000, b"1" * 5000, b"01", b"+1", b".5", b"'x'", b"undefined", b'"\xff"', b'"\xc0\x80"',
    b'"\xed\xa0\x80"', b'"\\ud800"', b'"\x01"', b"[" * (MAX_DEPTH + 1), b"[" * 20_000 + b"]" * 20_000,
    b'{"a":' * 40 + b"1" + b"}" * 40, b'{"a":1,"a":2}', b"\xef\xbb\xbf1",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 2**31, 2**53 + 1, 2**63 - 1, -(2**63), 0.5, 1e308, -1e-308, "", " ", "x" * 70,
    "x" * 100_000, "\0", "a\nb", "{{ 7*7 }}", "../../etc/passwd", "<a>&amp;</a>", "'; DROP TABLE vms; --", "\u202e",
    "00000000-0000-0000-0000-000000000000", "1", [], [[]], [None], {}, {"": {}}, ["x"] * 300,
)  # fmt: skip


def truncated(frame: bytes) -> Iterator[bytes]:
    yield from (frame[:end] for end in range(len(frame)))


def bad_bytes(frame: bytes) -> Iterator[bytes]:
    """Something that is no UTF-8 or no JSON before every third byte, and a NUL, which makes two frames of it."""
    for at in range(0, len(frame), 3):
        for bad in (b"\xff", b"\0", b"\x80", b"{"):
            yield frame[:at] + bad + frame[at:]


def paths(value: Any, at: Path_ = ()) -> Iterator[Path_]:
    """All places in a JSON value."""
    yield at
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from paths(part, (*at, key))


def replaced(value: Any, at: Path_, new: Any) -> Any:
    if not at:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[at[0]] = replaced(value[at[0]], at[1:], new)
    return copied


def part_of(value: Any, at: Path_) -> Any:
    for key in at:
        value = value[key]
    return value


def other_values(message: dict[str, Any]) -> Iterator[bytes]:
    """In every place another value: of another kind, beyond a limit, or one that JSON doesn't know."""
    for at in paths(message):
        for new in VALUES:
            yield json.dumps(replaced(message, at, new)).encode()
        marked = json.dumps(replaced(message, at, "@here@")).encode()
        for raw in RAW:
            yield marked.replace(b'"@here@"', raw)
        yield json.dumps(replaced(message, at, nested(MAX_DEPTH - len(at) - 1))).encode()


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(max(0, depth)):
        value = [value]
    return value


def other_keys(message: dict[str, Any]) -> Iterator[bytes]:
    """Keys left out, misspelt, too many, and twice (which json.dumps can't say: the second is renamed in its text)."""
    for at in paths(message):
        found = part_of(message, at)
        if not isinstance(found, dict):
            continue
        yield json.dumps(replaced(message, at, {**found, "surprise": 1})).encode()
        yield json.dumps(replaced(message, at, {**found, "\ud800": 1})).encode()
        for key in found:
            rest = {other: value for other, value in found.items() if other != key}
            yield json.dumps(replaced(message, at, rest)).encode()
            yield json.dumps(replaced(message, at, {**rest, key.upper() + " ": found[key]})).encode()
            twice = json.dumps(replaced(message, at, {**found, "@twice@": found[key]})).encode()
            yield twice.replace(b"@twice@", key.encode())


def at_random(frames: list[bytes], dice: random.Random) -> Iterator[bytes]:
    pieces = [b"\0", b"{", b"}", b"[", b'"', b"\\", b"\\u", b",", b":", b"NaN", b"-", b"1e999", b"9" * 30, b"\xff"]
    while True:
        data = bytearray(dice.choice(frames))
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(len(data) + 1)
            match dice.randrange(5):
                case 0:
                    data[at : at + 1] = bytes([dice.randrange(256)])
                case 1:
                    data[at:at] = dice.choice(pieces)
                case 2:
                    del data[at : at + dice.randint(1, 30)]
                case 3:
                    data[at:at] = data[max(0, at - dice.randint(1, 200)) : at]
                case 4:
                    other = dice.choice(frames)
                    data[at:] = other[dice.randrange(len(other)) :]
        yield bytes(data)


def long_ones(frames: list[bytes]) -> Iterator[bytes]:
    """Beyond the longest frame, at it, and such as cost much more as objects than as bytes."""
    yield b""
    yield b" " * (MAX_FRAME_BYTES + 1)
    yield b"[" * MAX_FRAME_BYTES
    yield b'{"method":"' + b"x" * (MAX_FRAME_BYTES - 13) + b'"}'
    yield b'{"method":"x","parameters":{"a":[' + b"[]," * 130_000 + b"1]}}"
    yield b'{"method":"x","parameters":{' + b",".join(b'"%d":0' % n for n in range(100_000)) + b"}}"
    for frame in frames:
        yield frame[:-1] + b',"x":"' + b"y" * MAX_FRAME_BYTES + b'"}'
        yield frame[:-2] + b',"x":"' + b"y" * 1_000_000 + b'"}}'


def mutants(messages: list[dict[str, Any]], part: int) -> list[tuple[str, bytes]]:
    """`IN_PART` mutants by kind, of those that can be enumerated every `PARTS`-th. Long ones come first: what the
    process takes for them it has from then on."""
    frames = [encode(message)[:-1] for message in messages]
    families = {
        "truncated": (mutant for frame in frames for mutant in truncated(frame)),
        "bad bytes": (mutant for frame in frames for mutant in bad_bytes(frame)),
        "value": (mutant for message in messages for mutant in other_values(message)),
        "key": (mutant for message in messages for mutant in other_keys(message)),
    }
    mine = [(kind, m) for kind, family in families.items() for n, m in enumerate(family) if n % PARTS == part]
    dice = random.Random(20261120 + part)
    long = [("long", mutant) for mutant in long_ones(frames[part % len(frames) :][:2])]
    rest = at_random(frames, dice)
    mine += [("random", next(rest)) for _ in range(IN_PART - len(mine) - len(long))]
    dice.shuffle(mine)
    return long + mine


# --- the agent and its client ----------------------------------------------------------------------------------------


class Client:
    """Sends a mutant and a call that is answered at once: what comes before that answer is the mutant's."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def replies(self, data: bytes) -> tuple[list[dict[str, Any]], bool]:
        """The replies, and whether the agent has hung up."""
        if self._streams is None:
            self._streams = await asyncio.open_unix_connection(str(self._path), limit=2 * MAX_FRAME_BYTES)
        reader, writer = self._streams
        found: list[dict[str, Any]] = []
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            writer.write(data + b"\0" + SENTINEL)
            await writer.drain()
            while True:
                reply = json.loads((await reader.readuntil(b"\0"))[:-1])
                if reply.get("parameters", {}).get("product") == "ppec-agentd":
                    return found, False
                found.append(reply)
        await self.leave()
        return found, True

    async def leave(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            with suppress(ConnectionError):
                await self._streams[1].wait_closed()
            self._streams = None


class Foretold:
    """What the contract says of a mutant's frames: how many are answered, and whether one is a valid change."""

    def __init__(self, data: bytes) -> None:
        self.answered, self.may_change, self.breaks, self.follows = 0, False, False, False
        for piece in (data + b"\0").split(b"\0")[:-1]:
            try:
                message = decode_json_object(piece) if len(piece) <= MAX_FRAME_BYTES else None
            except FrameError:
                message = None
            if message is None:
                self.breaks = True
                return
            self._add(message)

    def _add(self, message: dict[str, Any]) -> None:
        self.answered += 1
        try:
            call = read_call(message)
        except PpecError:
            return
        self.answered -= call.oneway
        interface, _, name = call.method.rpartition(".")
        method = METHODS.get(name) if interface == INTERFACE else None
        if method is None:
            return
        try:
            parse(method.request, call.parameters)
        except PpecError:
            return
        self.may_change |= method.changes or method.once
        self.follows |= method.follows and call.more


async def all_frames(client: Client, standing: tuple[Any, Any], absent: Any) -> list[dict[str, Any]]:
    """A valid call of every method, about VMs that are there; with `more` where that ends."""
    write: dict[str, Any] = {"operation_id": OPERATION, "fence": 1}
    ids = [str(vm.vm_id) for vm in standing]
    planned = {"want": {"cells": [0], "numa": {}}, "bounds": {"moves": 8, "memory_mib": 4096}}
    (reply,), _ = await client.replies(
        json.dumps({"method": f"{INTERFACE}.PlanRetune", "parameters": planned}).encode()
    )
    assert reply["parameters"]["plan"]["moves"]
    parameters: dict[str, dict[str, Any]] = {
        "CreateVms": {**write, "vms": [absent.model_dump(mode="json")]},
        "ResizeVms": {**write, "sizes": [{"vm_id": ids[0], "vcpus": 4, "memory_mib": 768}], "timeout_s": 1.5},
        "RetuneHost": {**write, "plan": reply["parameters"]["plan"]},
        "StopVms": {**write, "vm_ids": ids, "timeout_s": 3.5, "force": True},
        "RebootVms": {**write, "vm_ids": ids, "timeout_s": 3.5, "force": False},
        "FreezeVms": {**write, "vm_ids": ids, "thaw_after_s": 60.5},
        "PlanRetune": planned,
        "QueryGuests": {"vm_ids": ids, "timeout_s": 2.5},
        "ReadConsole": {"vm_id": ids[0], "tail_bytes": 100, "follow": False},
        "WriteConsole": {"vm_id": ids[0], "data": base64.b64encode(b"reboot\n").decode()},
        "ListVms": {"vm_ids": ids},
        "GetReport": {},
        "GetVersion": {},
    }
    by_ids = {**write, "vm_ids": ids}
    calls = [
        {"method": f"{INTERFACE}.{name}", "parameters": parameters.get(name, by_ids), "more": method.streams}
        for name, method in METHODS.items()
    ]
    described = {"method": "org.varlink.service.GetInterfaceDescription", "parameters": {"interface": INTERFACE}}
    return [*calls, described]


class OnHost:
    """Everything on the host that a call can change."""

    def __init__(self, agent: Any) -> None:
        self._agent = agent
        self._written = 0
        to_disk = agent.context.journal.to_disk

        def counted(file: int, data: bytes) -> None:
            self._written += 1
            to_disk(file, data)

        agent.context.journal.to_disk = counted

    async def now(self) -> tuple[Any, ...]:
        ledger, hypervisor = self._agent.context.ledger, self._agent.hypervisor
        calls = [hypervisor.faults.calls(method) for method in CHANGING]
        return self._written, calls, ledger.totals(), ledger.holdings(), await hypervisor.domains(), self._files()

    def _files(self) -> list[str]:
        places = self._agent.context.places.folders
        return sorted(str(path) for place in places for path in place.rglob("*"))


@pytest.fixture
def settings(words: Any, short_dir: Path) -> Any:
    return words.settings_with_pool(short_dir)


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.long) for part in range(1, PARTS))])
def test_mutated_frames_change_nothing(settings: Any, words: Any, tiny_vm: Any, part: int) -> None:
    async def scenario() -> Counter[str]:
        broken: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: broken.append(context))
        async with words.open_agent(settings) as agent:
            server = Server(settings.socket, agent.service)
            await server.open()
            try:
                tally = await send_all(agent, Client(settings.socket.path), tiny_vm, part)
            finally:
                await server.close()
                await agent.context.thaws.close()
        assert broken == []
        return tally

    tally = asyncio.run(scenario())
    assert tally["sent"] == IN_PART
    assert tally["refused"] > IN_PART // 2
    # Or the mutations would only ever test the first check.
    assert min(tally["hung up"], tally["answered"]) > IN_PART // 10
    assert tally["valid"] > IN_PART // 200
    assert tally["changed"] > 0


async def send_all(agent: Any, client: Client, vm: Any, part: int) -> Counter[str]:
    tally: Counter[str] = Counter()
    vms = (vm("one"), vm("other", vcpus=4))
    await stand(agent, vms, "standing")
    messages = await all_frames(client, vms, vm("absent", pool="fast"))
    assert {message["method"].rpartition(".")[2] for message in messages} > set(METHODS)
    if part % 2:
        await agent.delete(vm("nobody").vm_id, operation=OPERATION, fence=HIGHEST)
    host = OnHost(agent)
    before, resident_kib = await host.now(), []
    for number, (kind, mutant) in enumerate(mutants(messages, part)):
        if number % (IN_PART // 5) == 0:
            gc.collect()
            resident_kib.append(_resident_kib())
        tally.update(["sent", kind])
        data = mutant if part % 2 else mutant.replace(OPERATION.encode(), b"op-m%06d" % number)
        foretold = Foretold(data)
        if foretold.follows:
            # It would be answered until the caller leaves: of that test_guest_views.py has its own.
            continue
        hung_up = await send_one(client, data, foretold)
        now = await host.now()
        assert foretold.may_change or now == before, (kind, data[:2000])
        tally.update(["hung up" if hung_up else "answered", "valid" if foretold.may_change else "refused"])
        if now != before:
            tally["changed"] += 1
            await stand(agent, vms, f"again-{number}")
            before = await host.now()
    assert resident_kib[-1] - resident_kib[1] < GROWTH_KIB
    await client.leave()
    return tally


async def stand(agent: Any, vms: tuple[Any, ...], operation: str) -> None:
    """Makes those of the VMs that are not there, so that mutants find something to act on; ends all freezes, for their
    own end would come in another mutant's time."""
    there = {domain.vm_id for domain in await agent.hypervisor.domains()}
    for vm_id in there:
        async with agent.context.thaws.turn(vm_id):
            agent.hypervisor.frozen.discard(vm_id)
            await agent.context.thaws.forget(vm_id)
    for vm in vms:
        if vm.vm_id not in there:
            (made,) = await agent.create(vm, operation=operation)
            assert made.problem is None


async def send_one(client: Client, data: bytes, foretold: Foretold) -> bool:
    """Whether the agent hung up."""
    with capture_logs() as logs:
        begun = time.process_time()
        try:
            replies, hung_up = await asyncio.wait_for(client.replies(data), SOON_S)
        except TimeoutError as error:
            error.add_note(f"no answer to {data[:2000]!r}")
            raise
        assert time.process_time() - begun < HANG_CPU_S, data[:200]
    assert not [line for line in logs if line["log_level"] in ("error", "critical") or "exc_info" in line], data
    assert_well_said(replies, foretold, hung_up=hung_up)
    return hung_up


def assert_well_said(replies: list[dict[str, Any]], foretold: Foretold, *, hung_up: bool) -> None:
    assert hung_up == foretold.breaks
    text = json.dumps(replies)
    assert "internal.error" not in text
    assert "Traceback" not in text
    final = [reply for reply in replies if not reply.get("continues")]
    # The last word before hanging up may be lost with the connection.
    assert len(final) in ({foretold.answered, foretold.answered + 1} if hung_up else {foretold.answered})
    for reply in replies:
        if reply.get("error") == FAILED:
            assert reply["parameters"]["code"] in ERROR_TABLE
        else:
            assert str(reply.get("error", "org.varlink.service.")).startswith("org.varlink.service.")


def _resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4
