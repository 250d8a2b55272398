# SPDX-License-Identifier: Apache-2.0
"""A small orchestrator, shaped by the contract's models, that a test fills and scripts."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from uuid import UUID

import pytest
from pydantic import BaseModel

from ppec_contract.api import LabelsUpdate, Page
from ppec_contract.api_hosts import HostRetune
from ppec_contract.api_ipdb import AddressView
from ppec_contract.api_operations import ItemState, OperationItem, OperationState, OperationStep, OperationView
from ppec_contract.api_placement import PlanView
from ppec_contract.api_plans import PlanDetails, PlanState
from ppec_contract.api_vms import VmAction, VmRecord, VmResize, VmsAction, VmsCreate, VmView
from ppec_contract.errors import PpecError
from ppec_contract.validation import parse
from ppec_contract.vm import VcpuPin

TOKEN = "secret-token-of-the-test"
NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
PAGE = 2
LINES = "application/x-ndjson"
_DOCUMENT = json.loads((Path(__file__).parents[2] / "docs" / "openapi.json").read_text(encoding="utf-8"))


def vm_id(number: int) -> UUID:
    return UUID(int=number + 1)


def vm_view(number: int, name: str, **changes: Any) -> VmView:
    return VmView(
        **{
            "vm_id": vm_id(number),
            "name": name,
            "record": VmRecord.ACTIVE,
            "observed": "running",
            "flavor": "small",
            "image": "tiny",
            "vcpus": 2,
            "memory_mib": 512,
            "disk_mib": 1024,
            "host": f"h{number % 3 + 1}",
            "cells": (number % 2,),
            "pins": (VcpuPin(vcpu=0, pcpu=4), VcpuPin(vcpu=1, pcpu=5)),
            "vrf": "blue",
            "addresses": (AddressView(address=f"10.0.0.{number + 10}", prefix="10.0.0.0/24", vrf="blue"),),
            "created_at": NOW,
            "operation_id": "op-1",
        }
        | changes
    )


def item(number: int, name: str, state: str = "pending", **changes: Any) -> OperationItem:
    return OperationItem(**{"vm_id": vm_id(number), "name": name, "state": ItemState(state)} | changes)


def operation(state: str, *items: OperationItem, **changes: Any) -> OperationView:
    ended = OperationState(state).ended
    return OperationView(
        **{
            "operation_id": "op-1",
            "kind": "create",
            "state": OperationState(state),
            "created_by": "alice",
            "created_at": NOW,
            "started_at": NOW + timedelta(seconds=1),
            "ended_at": NOW + timedelta(seconds=3) if ended else None,
            "items": items,
            "steps": (OperationStep(ordinal=0, name="reserve", state="done", started_at=NOW, ended_at=NOW),),
        }
        | changes
    )


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


# What one connection to the event stream does: send these views (and "end"), then close, or be cut in the middle.
Script = list[OperationView | str]


@dataclass
class Orchestrator:
    """State and behaviour of the double; the handler below only does HTTP."""

    resources: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    vms: dict[str, VmView] = field(default_factory=dict)
    current: OperationView = field(default_factory=lambda: operation("queued"))
    plan: PlanView | None = None
    kept: PlanDetails | None = None
    streams: list[Script] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    # Answers, by method and path, that take the place of what would be answered; each is used once.
    instead: dict[tuple[str, str], list[Callable[[Any], None]]] = field(default_factory=dict)
    url: str = ""

    def answer(self, request: Request) -> tuple[int, BaseModel | dict[str, Any] | None]:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            raise PpecError("auth.required", "no valid token", hint="Make a token.")
        parts = [unquote(part) for part in request.path.split("/")[2:]]
        if parts[0] == "vms":
            return self._vms(request, parts)
        if parts[0] == "operations":
            return self._operations(request, parts)
        if parts[0] == "plans":
            return self._plans(request, parts)
        return self._resource(request, parts)

    def _vms(self, request: Request, parts: list[str]) -> tuple[int, Any]:
        if request.method == "GET" and len(parts) == 1:
            wanted = [vm for vm in self.vms.values() if request.query.get("host") in (None, vm.host)]
            return 200, self._page(request, [vm.model_dump(mode="json") for vm in wanted])
        if request.method == "GET":
            found = [vm for vm in self.vms.values() if parts[1] in (vm.name, str(vm.vm_id))]
            if not found:
                raise PpecError("vm.not_found", f"there is no VM {parts[1]}", hint="List them.")
            return 200, found[0]
        if parts == ["vms", "actions"]:
            asked = parse(VmsAction, request.json)
            assert asked.action in VmAction
            return 202, self.current
        if parts[-1] == "labels":
            parse(LabelsUpdate, request.json)
            return 200, self.vms[parts[1]]
        if request.method == "PATCH":
            parse(VmResize, request.json)
            return 202, self.current
        parse(VmsCreate, request.json)
        assert request.headers.get("idempotency-key")
        return 202, self.current

    def _plans(self, request: Request, parts: list[str]) -> tuple[int, Any]:
        if parts[-1] == "execute":
            assert request.headers.get("idempotency-key")
            return 202, self.current
        if request.method == "GET" and len(parts) == 1:
            hidden = {"plan", "request"}
            return 200, self._page(request, [self.kept.model_dump(mode="json", exclude=hidden)] if self.kept else [])
        if len(parts) > 1:
            assert self.kept is not None
            if not self.kept.plan_id.startswith(parts[1]):
                raise PpecError("plan.not_found", f"there is no plan {parts[1]}")
            if parts[-1] == "approve":
                assert parts[1] == self.kept.plan_id, "the hash has to be whole"
                given = {"state": PlanState.APPROVED, "approved_by": "bob", "approved_at": NOW, "needs_approval": False}
                self.kept = self.kept.model_copy(update=given)
            return 200, self.kept
        parse(VmsCreate, request.json)
        assert self.plan is not None
        return 200, self.plan

    def _operations(self, request: Request, parts: list[str]) -> tuple[int, Any]:
        if len(parts) == 1:
            return 200, self._page(request, [self.current.model_dump(mode="json")])
        if parts[1] != self.current.operation_id:
            raise PpecError("operation.not_found", f"there is no operation {parts[1]}")
        if parts[-1] == "cancel":
            return 202, self.current.model_copy(update={"cancel_requested": True})
        return 200, self.current

    def _resource(self, request: Request, parts: list[str]) -> tuple[int, Any]:
        if parts[-1] == "retune":
            parse(HostRetune, request.json)
            assert request.headers.get("idempotency-key")
            return 202, self.current
        kept = self.resources.setdefault(parts[0], [])
        if request.method == "GET" and len(parts) == 1:
            return 200, self._page(request, kept)
        if request.method == "POST" and len(parts) == 1:
            kept.append(request.json)
            return 201, request.json
        name = "prefix_id" if parts[0] == "prefixes" else "name"
        found = [one for one in kept if str(one[name]) == parts[1]]
        if not found:
            raise PpecError(f"{parts[0].rstrip('s')}.not_found", f"there is no {parts[1]}")
        if parts[-1] == "enrolment-token":
            return 201, {"host": parts[1], "token": "t" * 20, "expires_at": NOW.isoformat()}
        if request.method == "PATCH":
            found[0] |= {} if parts[-1] == "labels" else request.json
        if request.method == "DELETE":
            kept.remove(found[0])
            return 204, None
        return 200, found[0]

    def _page(self, request: Request, items: list[dict[str, Any]]) -> Page[Any]:
        if request.headers.get("accept") == LINES:
            return Page[Any](items=tuple(items))
        start = int(request.query.get("cursor", "0"))
        end = start + min(PAGE, int(request.query.get("limit", PAGE)))
        return Page[Any](items=tuple(items[start:end]), next_cursor=str(end) if end < len(items) else None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    orchestrator: Orchestrator

    def log_message(self, *_: object) -> None: ...

    def _serve(self) -> None:
        split = urlsplit(self.path)
        query = {key: ",".join(values) for key, values in parse_qs(split.query).items()}
        headers = {key.lower(): value for key, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", "0")))
        request = Request(self.command, split.path, query, headers, body)
        self.orchestrator.requests.append(request)
        if waiting := self.orchestrator.instead.get((self.command, split.path)):
            waiting.pop(0)(self)
        elif split.path.endswith("/events"):
            self._stream()
        else:
            try:
                status, value = self.orchestrator.answer(request)
                if isinstance(value, Page) and request.headers.get("accept") == LINES:
                    self.reply(status, b"".join(_json(item) + b"\n" for item in value.items), LINES)
                else:
                    self.reply(status, value)
            except PpecError as error:
                self.problem(error)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815

    def problem(self, error: PpecError) -> None:
        self.reply(error.problem().status, error.problem(), "application/problem+json")

    def reply(self, status: int, value: Any, content_type: str = "application/json") -> None:
        body = b"" if value is None else value if isinstance(value, bytes) else _json(value)
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def cut(self) -> None:
        """The connection is closed instead of an answer."""
        self.close_connection = True

    def _stream(self) -> None:
        script = self.orchestrator.streams.pop(0) if self.orchestrator.streams else []
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for step in script:
            if isinstance(step, OperationView):
                self.orchestrator.current = step
                self.wfile.write(b"event: operation\ndata: " + _json(step) + b"\n\n")
            elif step == "end":
                self.wfile.write(b"event: end\ndata: {}\n\n")
            elif step == "comment":
                self.wfile.write(b": still here\n\n")
            else:
                self.wfile.write(step.encode())
            self.wfile.flush()
        self.close_connection = True


def _json(value: Any) -> bytes:
    return value.model_dump_json().encode() if isinstance(value, BaseModel) else json.dumps(value).encode()


@pytest.fixture
def orchestrator() -> Iterator[Orchestrator]:
    state = Orchestrator()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"orchestrator": state}))
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    unknown = {(one.path, name) for one in state.requests for name in set(one.query) - _known(one)}
    assert unknown == set(), "the API refuses query parameters that it doesn't document"


def _known(request: Request) -> set[str]:
    """The names of the query parameters that the API's document has for it."""
    return {
        parameter["name"]
        for path, methods in _DOCUMENT["paths"].items()
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", path), request.path)
        for parameter in methods.get(request.method.lower(), {}).get("parameters", ())
        if parameter["in"] == "query"
    }


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Ppec = Callable[..., Ran]


@pytest.fixture
def ppec(
    orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Ppec:
    """Runs one command line against the double, as a user whose environment is set up."""
    from ppec_orchestrator.cli.main import run

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("PPEC_CA", raising=False)
    monkeypatch.setenv("PPEC_SERVER", orchestrator.url)
    monkeypatch.setenv("PPEC_TOKEN", TOKEN)

    def go(*arguments: str) -> Ran:
        capsys.readouterr()
        code = run(arguments)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return go


@pytest.fixture
def make() -> Any:
    """The builders of views, for tests (test folders are no packages to import from)."""

    class Make:
        vm_id = staticmethod(vm_id)
        vm = staticmethod(vm_view)
        item = staticmethod(item)
        operation = staticmethod(operation)
        token = TOKEN

    return Make
