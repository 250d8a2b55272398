# SPDX-License-Identifier: Apache-2.0
"""`/v1/vms/{vm}/console`: a VM's serial console as a WebSocket.

Who opens it is known by the header that every request has; a refusal is a problem like any other's, and no WebSocket.
It is for operators, to read as well: guests write passwords there.
"""

from __future__ import annotations

import time
from contextlib import AsyncExitStack, suppress
from typing import Annotated, cast

from fastapi import APIRouter, Query, WebSocket
from fastapi.concurrency import run_in_threadpool
from starlette.websockets import WebSocketDisconnect, WebSocketState

from ppec_contract.api_consoles import ConsoleEnd, ConsoleNotice, ConsoleOpen
from ppec_contract.errors import PpecError, http_status
from ppec_contract.validation import parse
from ppec_orchestrator.api.auth import Operator, caller_of, connection_caller
from ppec_orchestrator.api.bodies import StrictJsonRoute
from ppec_orchestrator.api.doors import VmDoor, door_of
from ppec_orchestrator.api.problems import internal_error, problem_response
from ppec_orchestrator.api.queries import QueryParameters
from ppec_orchestrator.api.services import Services
from ppec_orchestrator.api.vms import VmRefInPath
from ppec_orchestrator.audit import Outcome, audit
from ppec_orchestrator.console_relay import ConsoleRelay, Terms
from ppec_orchestrator.roles import Role
from ppec_orchestrator.store.vms import not_found

router = APIRouter(prefix="/v1/vms", tags=["vms"], route_class=StrictJsonRoute)
# Of one message: a paste. Held in memory for each open console.
MAX_TYPED_BYTES = 64 * 1024
_LONGEST_REF = 63
_FORBIDDEN = 403
# RFC 6455, 7.4.1.
_CLOSE_NORMAL, _CLOSE_POLICY, _CLOSE_INTERNAL = 1000, 1008, 1011
_CLOSE_CODES = {ConsoleEnd.UNAUTHORISED: _CLOSE_POLICY, ConsoleEnd.PROBLEM: _CLOSE_INTERNAL}
_QUERY = QueryParameters.of_model(ConsoleOpen)

_NOTICES = {"application/json": {"schema": {"$ref": "#/components/schemas/ConsoleNotice"}}}


@router.get(
    "/{vm}/console",
    name="open_console",
    summary="Open a VM's serial console, as a WebSocket",
    status_code=101,
    responses={101: {"description": "The WebSocket; its text messages are of `ConsoleNotice`.", "content": _NOTICES}},
)
def not_a_websocket(caller: Operator, vm: VmRefInPath, asked: Annotated[ConsoleOpen, Query()]) -> None:
    """Binary messages are bytes, both ways; text messages are notices of the server's: the VM's state, what was
    skipped, and at last why it ended. It ends when the VM goes off."""
    raise PpecError(
        "request.invalid",
        "a console is a WebSocket, and this request is none",
        hint="Use `ppec vm console`, or send the headers of RFC 6455.",
        subject="console",
    )


@router.websocket("/{vm}/console")
async def open_console(websocket: WebSocket, vm: str) -> None:
    services = cast("Services", websocket.app.state.services)
    console = _Console(websocket, services, vm)
    try:
        await console.serve()
    except PpecError as error:
        await console.refuse(error)
    except WebSocketDisconnect:
        pass
    except Exception as error:
        await console.refuse(internal_error(error, f"console of {vm[:_LONGEST_REF]}"))


class _Console:
    """One request for a console, from its headers to its end. Also the relay's `Client`."""

    def __init__(self, websocket: WebSocket, services: Services, vm: str) -> None:
        self._websocket = websocket
        self._services = services
        self._vm = vm

    async def serve(self) -> None:
        await run_in_threadpool(connection_caller, self._websocket, self._services, Role.OPERATOR)
        _QUERY.check(self._websocket, "A console")
        asked = parse(ConsoleOpen, dict(self._websocket.query_params), subject="console")
        if not 0 < len(self._vm) <= _LONGEST_REF or "\x00" in self._vm:
            raise not_found([self._vm[:_LONGEST_REF].replace("\x00", "\ufffd")])
        door = await run_in_threadpool(door_of, self._services.database, self._vm)
        views = self._services.host_views
        async with AsyncExitStack() as stack:
            stack.enter_context(self._services.consoles.taken())
            reading = await stack.enter_async_context(views.line(door.host))
            typing = await stack.enter_async_context(views.line(door.host))
            terms = Terms(asked, self._services.settings.console_idle_s, self._allowed)
            await self._websocket.accept()
            await self._relay(ConsoleRelay(door.vm_id, self, reading, typing, terms), door, asked)

    async def refuse(self, error: PpecError) -> None:
        """As a problem, whatever has been said by then; a client that has left hears nothing."""
        if http_status(error.code) == _FORBIDDEN:
            self._audit("open_console", self._vm, "refused", code=error.code)
        state = self._websocket.application_state
        with suppress(WebSocketDisconnect):
            if state is WebSocketState.CONNECTING:
                await self._websocket.send_denial_response(problem_response(error))
            elif state is WebSocketState.CONNECTED:
                await self._end(ConsoleNotice(ended=ConsoleEnd.PROBLEM, problem=error.problem()))

    async def _relay(self, relay: ConsoleRelay, door: VmDoor, asked: ConsoleOpen) -> None:
        began = time.monotonic()
        self._audit("open_console", door.name, asked="read_only" if asked.read_only else "read_and_type")
        why = "broken_off"
        try:
            end = await relay.run()
            why = end.ended.value if end is not None and end.ended is not None else "client_left"
        except WebSocketDisconnect:
            why = "client_left"
            raise
        finally:
            self._audit(
                "close_console",
                door.name,
                why=why,
                seconds=str(round(time.monotonic() - began)),
                shown_bytes=str(relay.shown_bytes),
                typed_bytes=str(relay.typed_bytes),
            )
        if end is not None:
            await self._end(end)

    async def _end(self, notice: ConsoleNotice) -> None:
        if notice.ended is not None:
            await self.notify(notice)
            await self._websocket.close(_CLOSE_CODES.get(notice.ended, _CLOSE_NORMAL), notice.ended.value)

    async def _allowed(self) -> bool:
        try:
            await run_in_threadpool(connection_caller, self._websocket, self._services, Role.OPERATOR)
        except PpecError as error:
            # A database that is away for a moment is no reason to end what it once allowed.
            return not error.code.startswith("auth.")
        return True

    def _audit(self, action: str, subject: str, outcome: Outcome = "done", **more: str) -> None:
        client = self._websocket.client.host if self._websocket.client is not None else ""
        audit(caller_of(self._websocket), action, subject, outcome, client=client, **more)

    # --- the relay's client ------------------------------------------------------------------------------------------

    async def show(self, data: bytes) -> None:
        await self._websocket.send_bytes(data)

    async def notify(self, notice: ConsoleNotice) -> None:
        await self._websocket.send_text(notice.model_dump_json(exclude_defaults=True))

    async def typed(self) -> bytes | None:
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            return None
        data = message.get("bytes")
        if data is None:
            raise PpecError(
                "request.invalid",
                "a console takes binary messages, and a text came",
                hint="Send what is typed as binary messages.",
                subject="console",
            )
        return bytes(data)
