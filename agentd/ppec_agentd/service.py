# SPDX-License-Identifier: Apache-2.0
"""From a Varlink call to the action or view that answers it, by the contract's table of methods."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import structlog

from ppec_agentd import AGENT_VERSION
from ppec_agentd.actions.batch import Actions
from ppec_agentd.connection import Call, Reply
from ppec_agentd.guest_views import GuestViews
from ppec_agentd.introspection import answer_introspection, method_not_found
from ppec_agentd.observed import vm_info
from ppec_agentd.report import CAPABILITIES, ReportSource
from ppec_agentd.retune.plan import plan_retune
from ppec_contract.agent import (
    INTERFACE,
    METHODS,
    GetReport,
    GetReportReply,
    GetVersion,
    GetVersionReply,
    ListVms,
    ListVmsReply,
    Method,
    PlanRetune,
    PlanRetuneReply,
    VmsReply,
    WriteCall,
)
from ppec_contract.errors import PpecError
from ppec_contract.guest import QueryGuests, ReadConsole, ReadConsoleReply, WriteConsole
from ppec_contract.model import Model
from ppec_contract.validation import parse
from ppec_contract.version import API_VERSION

log = structlog.get_logger(__name__)


class Service:
    """Answers calls. Adding a method: README.md, "How to add a method"."""

    def __init__(self, actions: Actions, reports: ReportSource) -> None:
        self._actions = actions
        self._reports = reports
        self._guests = GuestViews(actions.host)
        self._views: dict[type[Model], Callable[[Any], Awaitable[Model]]] = {
            ListVms: self._list_vms,
            GetReport: self._get_report,
            GetVersion: self._get_version,
            PlanRetune: self._plan_retune,
            QueryGuests: self._guests.query,
            WriteConsole: self._guests.write_console,
        }
        self._planning = asyncio.Lock()
        # Kept here, so that work goes on when the connection that asked for it is gone.
        self._work: set[asyncio.Task[VmsReply]] = set()

    async def answer(self, call: Call) -> AsyncIterator[Reply]:
        """All replies to a call: at least one, whatever happens; nothing about an error of ours but its code."""
        introspection = answer_introspection(call)
        if introspection is not None:
            yield introspection
            return
        interface, _, name = call.method.rpartition(".")
        method = METHODS.get(name) if interface == INTERFACE else None
        if method is None:
            yield method_not_found(call)
            return
        try:
            request = parse(method.request, call.parameters, subject=name)
            if isinstance(request, WriteCall):
                async for reply in self._change(request, method, call):
                    yield reply
            elif isinstance(request, ReadConsole):
                async with contextlib.aclosing(self._console(request, call)) as replies:
                    async for reply in replies:
                        yield reply
            else:
                yield _reply(await self._views[method.request](request))
        except PpecError as error:
            yield Reply.failed(error)
        except Exception:
            log.exception("call_broke", method=call.method)
            yield Reply.failed(PpecError("internal.error", f"{name}: an error of the agent's; its log has the details"))

    async def _change(self, request: WriteCall, method: Method, call: Call) -> AsyncIterator[Reply]:
        news: asyncio.Queue[VmsReply | None] = asyncio.Queue()
        work = asyncio.create_task(self._actions.run(request, news.put_nowait), name=method.name)
        self._work.add(work)
        work.add_done_callback(self._work.discard)
        work.add_done_callback(lambda _: news.put_nowait(None))
        while (reply := await news.get()) is not None:
            if call.more:
                yield _reply(reply, continues=True)
        yield _reply(await asyncio.shield(work))

    async def _console(self, request: ReadConsole, call: Call) -> AsyncGenerator[Reply, None]:
        last = ReadConsoleReply()
        # Closed at once when the caller leaves, so that its place is free for another reader.
        async with contextlib.aclosing(self._guests.read_console(request, more=call.more)) as pieces:
            async for piece in pieces:
                if call.more:
                    yield _reply(piece, continues=True)
                else:
                    last = piece
        # With `more` the last reply says no more than that the stream has ended.
        yield _reply(last)

    # --- views --------------------------------------------------------------------------------------------------

    async def _list_vms(self, request: ListVms) -> ListVmsReply:
        domains = await self._reports.domains()
        wanted = set(request.vm_ids)
        return ListVmsReply(vms=tuple(vm_info(d) for d in domains if not wanted or d.vm_id in wanted))

    async def _get_report(self, request: GetReport) -> GetReportReply:
        return GetReportReply(report=await self._reports.build())

    async def _plan_retune(self, request: PlanRetune) -> PlanRetuneReply:
        # Off the loop, for on a large host the search takes its time; one at a time, for others need threads as well.
        async with self._planning:
            state = await self._reports.movable()
            plan = await asyncio.to_thread(plan_retune, state, request.want, request.bounds)
        return PlanRetuneReply(plan=plan)

    async def _get_version(self, request: GetVersion) -> GetVersionReply:
        return GetVersionReply(
            host=self._reports.host,
            agent_version=AGENT_VERSION,
            api_version=API_VERSION,
            capabilities=CAPABILITIES,
        )


def _reply(model: Model, *, continues: bool = False) -> Reply:
    return Reply(model.model_dump(mode="json"), continues=continues)
