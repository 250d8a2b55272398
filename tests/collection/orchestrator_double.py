# SPDX-License-Identifier: Apache-2.0
"""A scripted orchestrator over HTTPS, kept honest by the contract: bodies are its requests, answers its views."""

from __future__ import annotations

import json
import ssl
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from ppec_contract.agent import Effect, Resized
from ppec_contract.api import Page
from ppec_contract.api_hosts import HostView
from ppec_contract.api_ipdb import AddressView
from ppec_contract.api_operations import OperationItem, OperationView
from ppec_contract.api_vms import VmResize, VmsAction, VmsCreate, VmView
from ppec_contract.errors import PpecError
from ppec_contract.guest import GuestInfo
from ppec_contract.validation import parse

TOKEN = "s3cret-token-of-the-test"
NOW = datetime(2026, 1, 1, tzinfo=UTC)


class FakeOrchestrator:
    """VMs by name; an operation ends at its `polls`-th look. `faults`: "drop", or an error code for the next request;
    `operation_problem` makes the next operation end failed."""

    def __init__(self) -> None:
        self.vms: dict[str, VmView] = {}
        self.frozen: set[str] = set()
        self.operations: dict[str, dict[str, Any]] = {}
        self.changes: list[tuple[str, dict[str, Any]]] = []
        self.requests: list[tuple[str, str]] = []
        self.faults: list[str] = []
        self.operation_problem = ""
        self.polls = 2
        self.page_size = 2
        self._answers: dict[str, OperationView] = {}

    def get(self, path: str, query: dict[str, str]) -> Any:
        match [unquote(part) for part in path.removeprefix("/v1/").split("/")]:
            case ["vms"]:
                return self._page(list(self.vms.values()), query)
            case ["vms", name]:
                if name not in self.vms:
                    raise PpecError("vm.not_found", f"vm {name[:63]!r} does not exist")
                return self.vms[name]
            case ["vms", name, "guest"]:
                if not 1 <= float(query["timeout_s"]) <= 30:
                    raise PpecError("request.invalid", f"timeout_s is {query['timeout_s']}, wanted 1 to 30")
                vm = self.get(f"/v1/vms/{name}", {})
                return GuestInfo(vm_id=vm.vm_id, name=name, agent_connected=True, frozen=name in self.frozen)
            case ["hosts"]:
                return self._page([_host(f"h{n}") for n in range(5)], query)
            case ["hosts", name]:
                if not name.startswith("h"):
                    raise PpecError("host.not_found", f"host {name!r} does not exist")
                return _host(name)
            case ["operations", operation_id]:
                return self._look(operation_id)
        raise PpecError("request.unknown_method", f"there is no {path}")

    def post(self, path: str, body: Any, key: str) -> OperationView:
        assert key
        if key in self._answers:
            return self._answers[key]
        resized: Resized | None = None
        if path.removeprefix("/v1/vms/") in self.vms:
            name = path.removeprefix("/v1/vms/")
            end, resized = self._resize(self.vms[name], parse(VmResize, body))
        elif path == "/v1/vms":
            create = parse(VmsCreate, body)
            own = [{key: getattr(item, key) for key in item.model_fields_set} for item in create.items] or [{}]
            wanted = [create.model_copy(update=each) for each in own]
            for each in wanted:
                if each.name in self.vms and self.vms[each.name].record != "failed":
                    raise PpecError("vm.exists", f"vm {each.name} exists")
            self.vms |= {str(each.name): _vm(each, self._next_id()) for each in wanted}
            end = {str(each.name): {"record": "active", "observed": "running"} for each in wanted}
        else:
            action = parse(VmsAction, body)
            end = {str(name): _after(action) for name in action.vms}
            if action.action in ("freeze", "thaw"):
                self.frozen = self.frozen - set(action.vms) | (set(action.vms) if action.action == "freeze" else set())
        self.changes.append((path, body))
        operation = OperationView(
            operation_id=self._next_id(), kind="test", state="queued", created_by="me", created_at=NOW
        )
        self.operations[operation.operation_id] = {
            "view": operation,
            "end": end,
            "polls": self.polls,
            "resized": resized,
        }
        self._answers[key] = operation
        return operation

    def _resize(self, vm: VmView, asked: VmResize) -> tuple[dict[str, Any], Resized]:
        """One that runs grows at once, and shrinks at its next start."""
        running, end, effects = vm.observed == "running", {}, {}
        for part in ("vcpus", "memory_mib"):
            before, wanted = getattr(vm, part), getattr(asked, part) or getattr(vm, part)
            end[part] = wanted
            later = running and wanted < before
            effects[part] = Effect.UNCHANGED if wanted == before else Effect.NEXT_START if later else Effect.NOW
        return {vm.name: end}, Resized(**effects)

    def _next_id(self) -> str:
        return f"op-{len(self.operations)}"

    def _look(self, operation_id: str) -> OperationView:
        operation = self.operations[operation_id]
        operation["polls"] -= 1
        if operation["polls"] > 0 or operation["view"].state.ended:
            return operation["view"]
        view, problem = operation["view"], self.operation_problem
        if problem:
            item = OperationItem(
                vm_id=uuid.uuid4(),
                name="x",
                state="refused",
                problem=PpecError(problem, "no host can take it").problem(),
            )
            view = view.model_copy(update={"items": (item,)})
        else:
            if operation["resized"] is not None:
                item = OperationItem(vm_id=uuid.uuid4(), name="x", state="succeeded", resized=operation["resized"])
                view = view.model_copy(update={"items": (item,)})
            for name, change in operation["end"].items():
                if change is None:
                    del self.vms[name]
                else:
                    self.vms[name] = VmView.model_validate({**self.vms[name].model_dump(), **change})
        state = "failed" if problem else "succeeded"
        operation["view"] = OperationView.model_validate({**view.model_dump(), "state": state})
        return operation["view"]

    def _page(self, items: list[Any], query: dict[str, str]) -> Page[Any]:
        start = int(query.get("cursor", "0"))
        end = start + self.page_size
        return Page(items=tuple(items[start:end]), next_cursor=str(end) if end < len(items) else None)


def _after(action: VmsAction) -> dict[str, Any] | None:
    if action.action == "delete":
        return None
    if action.action in ("freeze", "thaw"):
        return {}
    return {"observed": {"stop": "stopped", "pause": "paused"}.get(action.action, "running")}


def _vm(create: VmsCreate, operation_id: str) -> VmView:
    return VmView(
        vm_id=uuid.uuid4(),
        name=str(create.name),
        record="creating",
        observed="unknown",
        flavor=create.flavor,
        pool=create.pool,
        image=create.image,
        vcpus=2,
        memory_mib=512,
        disk_mib=1024,
        host=create.host or "h1",
        vrf=create.vrf or "prod",
        labels=create.labels,
        addresses=tuple(
            AddressView(address=one.address, prefix=ip_network(one.address), vrf="prod")
            for one in create.networks
            if one.address is not None
        ),
        created_at=NOW,
        operation_id=operation_id,
    )


def _host(name: str) -> HostView:
    return HostView(
        name=name,
        rack="r1",
        cluster="c1",
        datacentre="dc1",
        vrf="prod",
        address="127.0.0.1",
        port=7443,
        liveness="up",
        draining=False,
    )


class _Handler(BaseHTTPRequestHandler):
    orchestrator: FakeOrchestrator

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(None)

    def do_PATCH(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body: Any) -> None:
        url = urlsplit(self.path)
        self.orchestrator.requests.append((self.command, url.path))
        try:
            answer = self._do(url, body)
        except PpecError as error:
            self._send(error.problem().status, error.problem())
            return
        if self.orchestrator.faults[:1] == ["lose"]:
            self.orchestrator.faults.pop(0)
            return
        self._send(202 if self.command in ("POST", "PATCH") else 200, answer)

    def _do(self, url: Any, body: Any) -> Any:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise PpecError("auth.required", "the bearer token is unknown or has expired")
        if self.orchestrator.faults and self.orchestrator.faults[0] != "lose":
            raise PpecError(self.orchestrator.faults.pop(0), "as scripted")
        if self.command in ("POST", "PATCH"):
            return self.orchestrator.post(url.path, body, self.headers.get("Idempotency-Key", ""))
        return self.orchestrator.get(url.path, {k: v[0] for k, v in parse_qs(url.query).items()})

    def _send(self, status: int, body: Any) -> None:
        data = body.model_dump_json().encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def api_of(orchestrator: FakeOrchestrator, certificate: Path, key: Path) -> Iterator[str]:
    """Serves it over HTTPS; gives its URL."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"orchestrator": orchestrator}))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
