# SPDX-License-Identifier: Apache-2.0
"""Varlink framing: one JSON object, then a NUL byte. Pure bytes in, objects out; no I/O.

Source: the Varlink protocol description (varlink.org/Method-Call). The codec is strict where a lenient parser would
let two readers of one frame disagree: duplicate keys, NaN, numbers beyond 64 bits, invalid UTF-8, lone surrogates,
deep nesting and masses of tiny values are all malformed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final

from ppec_contract.errors import PpecError

MAX_FRAME_BYTES: Final = 4 * 1024 * 1024
MAX_DEPTH: Final = 32
MAX_TOKENS: Final = 400_000
_INT_LIMIT: Final = 2**63
# A string (or what is left of one that isn't closed), a bracket or a comma. The string's part is possessive and can't
# fail once begun, so that the search is linear on any input.
_TOKEN: Final = re.compile(rb'"(?:[^"\\]++|\\(?:.|\Z))*+"?+|[\[\]{},]', re.DOTALL)


class FrameError(PpecError):
    """The bytes are not a frame. The connection can't be trusted to be in step any more and must be closed.

    `why` is what is wrong with JSON, for who read it from elsewhere: a file is no frame.
    """

    why = ""


def _malformed(why: str) -> FrameError:
    error = FrameError("request.malformed", f"the frame is not well-formed: {why}", subject="frame")
    error.why = why
    return error


def place_in(data: bytes, offset: int) -> str:
    """Where that byte is, for people who look with an editor: line and column, in characters, from 1."""
    *before, line = data[:offset].split(b"\n")
    return f"line {len(before) + 1}, column {len(line.decode('utf-8', 'replace')) + 1}"


def _int(text: str) -> int:
    if len(text) > 20 or not -_INT_LIMIT <= (value := int(text)) < _INT_LIMIT:
        raise _malformed("a number does not fit 64 bits")
    return value


def _constant(text: str) -> Any:
    raise _malformed(f"{text} is not JSON")


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise _malformed("a number does not fit 64 bits")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _malformed("an object names a key twice")
    return found


def _check_shape(data: bytes) -> None:
    # Before parsing: the parser recurses once a level, and a few bytes can cost a hundred times their size as objects.
    # Counting in the raw bytes can only come out too high, so that most frames need no closer look.
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH and data.count(b",") <= MAX_TOKENS // 2:
        return
    depth = 0
    for count, token in enumerate(_TOKEN.finditer(data)):
        if count >= MAX_TOKENS:
            raise _malformed(f"it holds more than {MAX_TOKENS} brackets, commas and strings")
        byte = data[token.start()]
        if byte in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise _malformed(f"it is nested deeper than {MAX_DEPTH} levels")
        elif byte in b"]}":
            depth -= 1


def _check_surrogates(value: dict[str, Any]) -> None:
    # Half a surrogate pair can be written as an escape but not as UTF-8: whoever wrote it on would fail.
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _malformed("a string holds half a surrogate pair") from error


def decode_json_object(data: bytes) -> dict[str, Any]:
    """Parses one JSON object by the strict rules above; also used for HTTP bodies. Raises FrameError."""
    _check_shape(data)
    try:
        value = json.loads(
            data.decode("utf-8"),
            parse_int=_int,
            parse_float=_float,
            parse_constant=_constant,
            object_pairs_hook=_unique,
        )
    except UnicodeDecodeError as error:
        raise _malformed(f"it is not UTF-8 ({place_in(data, error.start)})") from error
    except json.JSONDecodeError as error:
        raise _malformed(f"it is not JSON (line {error.lineno}, column {error.colno})") from error
    except RecursionError as error:
        raise _malformed("it is not JSON") from error
    if not isinstance(value, dict):
        raise _malformed("it is not a JSON object")
    if b"\\u" in data:
        _check_surrogates(value)
    return value


def encode(message: dict[str, Any]) -> bytes:
    """One frame. JSON escapes NUL, so the terminator can't occur inside."""
    return json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\0"


class FrameReader:
    """Cuts a byte stream into frames.

    `feed` returns the frames completed by the new bytes, decoded. A frame longer than `max_frame_bytes` raises
    `request.too_large` before it is buffered whole.
    """

    def __init__(
        self, max_frame_bytes: int = MAX_FRAME_BYTES, decode: Callable[[bytes], dict[str, Any]] = decode_json_object
    ) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._decode = decode
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        frames: list[dict[str, Any]] = []
        searched = len(self._buffer)
        self._buffer += data
        while (end := self._buffer.find(0, searched)) >= 0:
            self._check_length(end)
            raw = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            searched = 0
            frames.append(self._decode(raw))
        self._check_length(len(self._buffer))
        return frames

    def _check_length(self, length: int) -> None:
        if length > self._max_frame_bytes:
            raise FrameError(
                "request.too_large", f"the frame is longer than {self._max_frame_bytes} bytes", subject="frame"
            )

    @property
    def pending_bytes(self) -> int:
        """Bytes of an unfinished frame; not zero at end of stream means the peer was cut off."""
        return len(self._buffer)
