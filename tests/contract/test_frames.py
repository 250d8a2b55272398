# SPDX-License-Identifier: Apache-2.0
"""The codec of the socket: what it takes, what it refuses, and that no byte sequence surprises it."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppec_contract.frames import MAX_DEPTH, MAX_TOKENS, FrameError, FrameReader, decode_json_object, encode

CALL = {
    "method": "cloud.ppec.agent.CreateVms",
    "parameters": {
        "operation_id": "op-1",
        "fence": 3,
        "vms": [{"name": "ä🦊\n\u0000", "tags": {"a": "}{]["}}],
        "t": 1.5,
    },
    "more": True,
}
MUTATIONS = 50_000

scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)
messages = st.dictionaries(st.text(), values, max_size=5).filter(lambda m: not any(map(_infinite, m.values())))


def _infinite(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_infinite, value))
    if isinstance(value, dict):
        return any(map(_infinite, value.values()))
    return value in (float("inf"), float("-inf"))


def code_of(data: bytes) -> str:
    with pytest.raises(FrameError) as caught:
        decode_json_object(data)
    return caught.value.code


@given(messages)
def test_what_is_encoded_is_read_back(message: dict[str, Any]) -> None:
    frame = encode(message)
    assert frame.count(b"\0") == 1
    reader = FrameReader()
    assert reader.feed(frame) == [message]
    assert reader.pending_bytes == 0


@given(st.lists(messages, min_size=1, max_size=4), st.data())
def test_it_does_not_matter_how_the_stream_is_cut(sent: list[dict[str, Any]], data: st.DataObject) -> None:
    stream = b"".join(map(encode, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    reader = FrameReader()
    received = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        received += reader.feed(stream[start:end])
    assert received == sent


def test_a_frame_truncated_at_any_byte_is_never_a_message() -> None:
    frame = encode(CALL)
    for end in range(len(frame)):
        reader = FrameReader()
        assert reader.feed(frame[:end]) == []
        assert reader.pending_bytes == end
        # And with the terminator where the cut was, it is refused.
        if end < len(frame) - 1:
            with pytest.raises(FrameError) as caught:
                FrameReader().feed(frame[:end] + b"\0")
            assert caught.value.code == "request.malformed"


def test_byte_by_byte_gives_the_same_message() -> None:
    reader = FrameReader()
    received = [message for byte in encode(CALL) for message in reader.feed(bytes([byte]))]
    assert received == [CALL]


def test_an_empty_frame_is_malformed() -> None:
    with pytest.raises(FrameError):
        FrameReader().feed(b"\0")


def test_a_long_frame_is_refused_before_it_is_complete() -> None:
    reader = FrameReader(max_frame_bytes=100)
    assert reader.feed(b"x" * 100) == []
    with pytest.raises(FrameError) as caught:
        reader.feed(b"x")
    assert caught.value.code == "request.too_large"


def test_a_frame_of_just_the_limit_is_taken_and_one_more_is_not() -> None:
    body = b'{"a":"' + b"x" * 92 + b'"}'
    assert len(body) == 100
    assert FrameReader(max_frame_bytes=100).feed(body + b"\0" + body + b"\0") == [{"a": "x" * 92}] * 2
    with pytest.raises(FrameError, match="longer than 99"):
        FrameReader(max_frame_bytes=99).feed(body + b"\0")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"1",
        b'"text"',
        b"{",
        b"{}{}",
        b"{'a':1}",
        b'{"a":1,}',
        b'{"a":01}',
        b'{"a":+1}',
        b'{"a":.5}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":-Infinity}',
        b'{"a":1e400}',
        b'{"a":9223372036854775808}',
        b'{"a":-9223372036854775809}',
        b'{"a":1' + b"0" * 5000 + b"}",
        b'{"a":1,"a":2}',
        b'{"\\u0061":1,"a":2}',
        b'{"b":{"a":1,"a":1}}',
        b'{"a":"\xff"}',
        b'{"a":"\xc0\x80"}',
        b'{"a":"\xed\xa0\x80"}',
        b'{"a":"\\ud800"}',
        b'{"\\udfff":1}',
        b'{"a":["\\ud83e x"]}',
        b'{"a":"\x01"}',
        b"\xef\xbb\xbf{}",
        b'{"a":' * (MAX_DEPTH + 1) + b"1" + b"}" * (MAX_DEPTH + 1),
        b'{"a":' + b"[" * 100_000,
        b"<xml/>",
        b'{"a":[' + b"[]," * (MAX_TOKENS // 3) + b"1]}",
        b'{"a":[' + b"1," * MAX_TOKENS + b"1]}",
        b'{"a":"' + b'\\"[' * 1_000_000,
        b'{"a":"' + b'\\"[' * 1_000_000 + b"\\",
        b"[" * 4_000_000,
        b'"' * 4_000_000 + b"[" * 100,
    ],
)
def test_strictness(body: bytes) -> None:
    assert code_of(body) == "request.malformed"


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b'{"a":9223372036854775807}', 2**63 - 1),
        (b'{"a":-9223372036854775808}', -(2**63)),
        (b'{"a":"\\ud83e\\udd8a"}', "🦊"),
        (b'{"a":"\\u0000"}', "\0"),
        (b'{"a":"' + b"[{" * 500 + b'"}', "[{" * 500),
        (b'{"a":"' + b'\\"[' * 500 + b'"}', '"[' * 500),
        (b'{"a":' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}", json.loads("[" * 31 + "]" * 31)),
        (b'{"a":"' + b"[,{" * 500_000 + b'"}', "[,{" * 500_000),
        (b'{"a":[' + b"[]," * 40_000 + b"1]}", [*([[]] * 40_000), 1]),
        (b' {"a" : 1e2 } ', 100.0),
    ],
)
def test_the_edges_of_what_is_allowed(body: bytes, value: Any) -> None:
    assert decode_json_object(body) == {"a": value}


def test_no_mutation_of_a_frame_does_more_than_be_refused() -> None:
    source = random.Random(7)
    frame = encode(CALL)[:-1]
    interesting = (b"\0", b"{", b"[", b'"', b"\\", b"\\u", b"NaN", b"1e999", b"9" * 30, b"\xff", b"}", b",", b":")
    refused = taken = 0
    for _ in range(MUTATIONS):
        mutated = bytearray(frame)
        for _ in range(source.randint(1, 4)):
            at = source.randrange(len(mutated))
            kind = source.randrange(4)
            if kind == 0:
                mutated[at] = source.randrange(256)
            elif kind == 1:
                mutated[at:at] = source.choice(interesting)
            elif kind == 2:
                del mutated[at : at + source.randint(1, 5)]
            else:
                mutated[at:at] = mutated[max(0, at - 20) : at]
        try:
            for message in FrameReader().feed(bytes(mutated) + b"\0"):
                assert FrameReader().feed(encode(message)) == [message]
            taken += 1
        except FrameError:
            refused += 1
    assert refused > MUTATIONS // 3
    assert taken > 100  # or the mutations would only ever test the first check
