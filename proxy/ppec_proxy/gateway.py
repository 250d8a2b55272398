# SPDX-License-Identifier: Apache-2.0
"""HTTP in, Varlink out: the routes of the proxy, which are exactly the contract's methods (and `/healthz`)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from ppec_contract.agent import METHODS, NDJSON, Method
from ppec_contract.errors import PpecError
from ppec_proxy.agent_pool import AgentPool
from ppec_proxy.ndjson import NdjsonResponse
from ppec_proxy.request_body import read_parameters
from ppec_proxy.settings import Settings
from ppec_proxy.varlink_errors import error_reply, reply_error

_PREFIX = "/v1/agent/"
Replies = AsyncGenerator[dict[str, Any], None]


@dataclass(frozen=True, slots=True)
class Gateway:
    """The ASGI application inside the edge."""

    settings: Settings
    agent: AgentPool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        path = request.url.path
        if path == "/healthz":
            _require_verb(request, "GET")
            await self._health(scope, receive, send)
            return
        method = METHODS.get(path.removeprefix(_PREFIX)) if path.startswith(_PREFIX) else None
        if method is None:
            raise PpecError(
                "request.unknown_method",
                f"there is no {path[:120]!r} here",
                hint=f"The agent's methods are {', '.join(f'POST {m.http_path}' for m in METHODS.values())}.",
                subject="request",
            )
        _require_verb(request, "POST")
        await self._call(method, request, send)

    async def _health(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Healthy means: a request would get through to an agent that answers."""
        version = await self._single(METHODS["GetVersion"], {"method": METHODS["GetVersion"].varlink_name})
        await JSONResponse({"status": "ok", "agent": version})(scope, receive, send)

    async def _call(self, method: Method, request: Request, send: Send) -> None:
        parameters = await read_parameters(request, method, self.settings.max_body_bytes, self.settings.body_timeout_s)
        if method.changes:
            request.state.access["operation_id"] = getattr(parameters, "operation_id", None)
        # What goes on is what was checked, written anew, so the agent can't read it differently; defaults are left to
        # the agent, which may be of the previous release and refuse a field it doesn't know.
        message: dict[str, Any] = {
            "method": method.varlink_name,
            "parameters": parameters.model_dump(mode="json", exclude_unset=True),
        }
        if _accepts_ndjson(request):
            await self._stream(method, message | ({"more": True} if method.streams else {}), request, send)
        else:
            reply = await self._single(method, message)
            await JSONResponse(reply)(request.scope, request.receive, send)

    async def _single(self, method: Method, message: dict[str, Any]) -> Any:
        async with aclosing(self._answers(method, message)) as answers:
            reply = await anext(answers)
        if error := reply_error(reply):
            raise error
        return reply.get("parameters") or {}

    async def _stream(self, method: Method, message: dict[str, Any], request: Request, send: Send) -> None:
        """One line per reply. An error before the first line is a plain problem; after it, a line like the agent's.

        A client that goes away, or stops reading, is no reason to stop: the replies are read to the end, so that the
        agent is never held up by its audience. Only a method that `follows` something has no end of its own: there the
        client's leaving is it, and the agent is hung up on.
        """
        async with aclosing(self._answers(method, message)) as answers:
            first = await anext(answers)
            if error := reply_error(first):
                raise error
            response = NdjsonResponse(send, self.settings.stalled_client_timeout_s)
            await response.start()
            await response.line(_line(first))
            try:
                if method.follows:
                    await _while_there(request, _pass_on(answers, response))
                else:
                    async for reply in answers:
                        await response.line(_line(reply))
            except PpecError as error:
                request.state.access["error"] = error.code
                await response.line(_line(error_reply(error)))
            await response.end()

    async def _answers(self, method: Method, message: dict[str, Any]) -> Replies:
        """The agent's replies within the method's deadline, which counts from now to the last reply; for one that
        `follows`, to each reply anew: an agent that says nothing for so long has gone."""
        limit = self.settings.change_timeout_s if method.changes else self.settings.read_timeout_s
        now = asyncio.get_running_loop().time
        deadline = now() + limit
        async with aclosing(self.agent.replies(message, once=method.once)) as replies:
            while True:
                if method.follows:
                    deadline = now() + limit
                try:
                    async with asyncio.timeout_at(deadline):
                        reply = await anext(replies, None)
                except TimeoutError as error:
                    raise _too_late(method, limit) from error
                if reply is None:
                    return
                yield reply


async def _pass_on(answers: Replies, response: NdjsonResponse) -> None:
    async for reply in answers:
        await response.line(_line(reply))
        if response.stalled:
            return


async def _while_there(request: Request, work: Coroutine[Any, Any, None]) -> None:
    """Does the work as long as the client is there."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _line(reply: dict[str, Any]) -> bytes:
    shown = {key: reply[key] for key in ("error", "parameters", "continues") if key in reply}
    return json.dumps(shown, separators=(",", ":")).encode() + b"\n"


def _accepts_ndjson(request: Request) -> bool:
    accepted = request.headers.get("accept", "").split(",")
    return any(part.partition(";")[0].strip().lower() == NDJSON for part in accepted)


def _require_verb(request: Request, verb: str) -> None:
    if request.method != verb:
        raise PpecError(
            "request.method_not_allowed",
            f"{request.url.path} takes {verb}, not {request.method}",
            subject="request",
            details={"allow": verb},
        )


def _too_late(method: Method, limit_s: float) -> PpecError:
    return PpecError(
        "request.deadline_exceeded",
        f"the agent did not finish {method.name} within {limit_s:g} s",
        hint="The agent works on; repeat the call with the same operation id to get its answer.",
        subject="agent",
    )
