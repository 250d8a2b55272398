# SPDX-License-Identifier: Apache-2.0
"""From an HTTP body to checked parameters of an agent method."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.requests import ClientDisconnect, Request

from ppec_contract.agent import Method
from ppec_contract.errors import PpecError
from ppec_contract.frames import decode_json_object
from ppec_contract.model import Model
from ppec_contract.validation import parse

# A client that sends too much is listened to a while longer: one that doesn't read while it writes would otherwise see
# a reset instead of the answer.
_DISCARD_FACTOR = 4


class ClientGoneError(Exception):
    """The client hung up before its request was complete; nobody is left to answer."""


async def read_parameters(request: Request, method: Method, max_bytes: int, timeout_s: float) -> Model:
    """The body as the method's model. Raises PpecError `request.*`, or ClientGoneError."""
    try:
        async with asyncio.timeout(timeout_s):
            body = await _read(request, max_bytes)
    except TimeoutError as error:
        raise PpecError(
            "request.deadline_exceeded", f"the request's body did not arrive within {timeout_s:g} s", subject="request"
        ) from error
    except ClientDisconnect as error:
        raise ClientGoneError from error
    return parse(method.request, decode_json_object(body), subject=method.name)


async def _read(request: Request, max_bytes: int) -> bytes:
    announced = _content_length(request.headers)
    if announced > max_bytes * _DISCARD_FACTOR:
        raise _too_large(max_bytes)
    body = bytearray()
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received <= max_bytes:
            body += chunk
        elif received > max_bytes * _DISCARD_FACTOR:
            break
    if received > max_bytes:
        raise _too_large(max_bytes)
    return bytes(body)


def _content_length(headers: Mapping[str, str]) -> int:
    # The parser in front lets nothing but digits through.
    return int(headers.get("content-length", "0"))


def _too_large(max_bytes: int) -> PpecError:
    return PpecError(
        "request.too_large",
        f"the request's body is larger than {max_bytes} bytes",
        hint="Send fewer VMs in one call.",
        subject="request",
    )
