# SPDX-License-Identifier: Apache-2.0
"""A scripted agent behind a scripted proxy and a socket, kept honest by the contract's own models.

What it is sent must parse as the contract's request, and what it answers as the contract's reply. `faults` are used up
one per changing call (or, for "busy" and "drop", per call): they make it lose replies, break off and be busy.
"""

from __future__ import annotations

import json
import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ppec_contract.agent import FAILED, METHODS, NDJSON, VmProgress, VmResult
from ppec_contract.errors import PpecError
from ppec_contract.frames import FrameReader, encode
from ppec_contract.validation import parse
from ppec_contract.vm import VcpuPin, VmInfo, VmSpec, VmState

# None: the power state stays.
_STATE_AFTER = {
    "StartVms": "running",
    "StopVms": "stopped",
    "RebootVms": "running",
    "ResetVms": "running",
    "PauseVms": "paused",
    "ResumeVms": "running",
    "FreezeVms": None,
    "ThawVms": None,
}


class FakeAgent:
    """VMs in a dict, a journal, and every request it ever got."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.vms: dict[str, VmInfo] = {}
        self.specs: dict[str, VmSpec] = {}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.failing: dict[str, str] = {}
        self.frozen: set[str] = set()
        self.sizes: dict[str, Any] = {}
        self.faults: list[str] = []
        self.connections = 0
        # What a retune is planned as; None: it isn't possible.
        self.retune_plan: dict[str, Any] | None = None
        self._journal: dict[tuple[str, str, str], VmResult] = {}

    @property
    def changes(self) -> list[tuple[str, dict[str, Any]]]:
        return [(method, sent) for method, sent in self.requests if METHODS[method].changes]

    def replies(self, method: str, parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The Varlink replies of a call, each checked against the contract."""
        self.requests.append((method, parameters))
        if self.faults and self.faults[0] == "busy":
            self.faults.pop(0)
            yield self._error(PpecError("agent.busy", "too many requests"))
            return
        request = parse(METHODS[method].request, parameters)
        try:
            for parameters_out, continues in getattr(self, f"_{method}")(request):
                METHODS[method].reply.model_validate(parameters_out)
                yield {"parameters": parameters_out, **({"continues": True} if continues else {})}
        except PpecError as error:
            yield self._error(error)

    @staticmethod
    def _error(error: PpecError) -> dict[str, Any]:
        return {"error": FAILED, "parameters": error.problem().model_dump(mode="json")}

    def call(self, method: str, parameters: dict[str, Any], on_reply: Any = None) -> dict[str, Any]:
        """In-process, what AgentClient.call does over a wire."""
        from ansible_collections.ppec.cloud.plugins.module_utils.messages import encode_object
        from ansible_collections.ppec.cloud.plugins.module_utils.problem import ProblemError

        last: dict[str, Any] = {}
        for reply in self.replies(method, json.loads(encode_object(parameters))):
            if "error" in reply:
                raise ProblemError.from_body(reply["parameters"])
            last = reply["parameters"]
            if on_reply:
                on_reply(last)
        return last

    def _ListVms(self, request: Any) -> Iterator[tuple[dict[str, Any], bool]]:
        wanted = {str(vm_id) for vm_id in request.vm_ids}
        found = [vm for vm_id, vm in self.vms.items() if not wanted or vm_id in wanted]
        yield {"vms": [vm.model_dump(mode="json") for vm in found]}, False

    def _GetVersion(self, request: Any) -> Iterator[tuple[dict[str, Any], bool]]:
        yield {"host": self.host, "agent_version": "0.1.0", "api_version": 1, "capabilities": ["vm-lifecycle"]}, False

    def _GetReport(self, request: Any) -> Iterator[tuple[dict[str, Any], bool]]:
        report = {
            "host": self.host,
            "boot_id": "b",
            "agent_version": "0.1.0",
            "api_version": 1,
            "capabilities": [],
            "architecture": "x86_64",
            "domain_type": "fake",
            "libvirt_version": "",
            "qemu_version": "",
            "kernel_version": "",
            "cells": [],
            "disk_mib": 1,
            "disk_free_mib": 1,
            "bridges": ["br0"],
            "vms": [],
        }
        yield {"report": report}, False

    def _CreateVms(self, request: Any) -> Iterator[tuple[dict[str, Any], bool]]:
        for spec in request.vms:
            self.specs[str(spec.vm_id)] = spec
        subjects = [(str(spec.vm_id), spec.name) for spec in request.vms]
        yield from self._change("CreateVms", request, subjects)

    def _DeleteVms(self, request: Any) -> Iterator[tuple[dict[str, Any], bool]]:
        yield from self._change("DeleteVms", request, self._named(request))

    def _StartVms(self, request: Any) -> Iterator[tuple[dict[str, Any], bool]]:
        yield from self._change("StartVms", request, self._named(request))

    def _StopVms(self, request: Any) -> Iterator[tuple[dict[str, Any], bool]]:
        yield from self._change("StopVms", request, self._named(request))

    def _PlanRetune(self, request: Any) -> Iterator[tuple[dict[str, Any], bool]]:
        if self.retune_plan is None:
            raise PpecError("retune.not_possible", "nothing can be moved")
        yield {"plan": self.retune_plan}, False

    def _RetuneHost(self, request: Any) -> Iterator[tuple[dict[str, Any], bool]]:
        for move in request.plan.moves:
            vm = self.vms[str(move.vm_id)]
            self.vms[str(move.vm_id)] = vm.model_copy(update={"cells": (move.after.cell,), "pins": move.after.pins})
        results = [
            VmResult(vm_id=move.vm_id, name=move.name, changed=True, vm=self.vms[str(move.vm_id)])
            for move in request.plan.moves
        ]
        yield {"results": [result.model_dump(mode="json") for result in results]}, False

    def _ResizeVms(self, request: Any) -> Iterator[tuple[dict[str, Any], bool]]:
        self.sizes = {str(size.vm_id): size for size in request.sizes}
        subjects = [(vm_id, self.vms[vm_id].name if vm_id in self.vms else "") for vm_id in self.sizes]
        yield from self._change("ResizeVms", request, subjects)

    def __getattr__(self, name: str) -> Any:
        """The other changes of VMs by id are all alike."""
        method = name.removeprefix("_")
        if method not in _STATE_AFTER:
            raise AttributeError(name)
        return lambda request: self._change(method, request, self._named(request))

    def _named(self, request: Any) -> list[tuple[str, str]]:
        return [(str(i), self.vms[str(i)].name if str(i) in self.vms else "") for i in request.vm_ids]

    def _change(
        self, action: str, request: Any, subjects: list[tuple[str, str]]
    ) -> Iterator[tuple[dict[str, Any], bool]]:
        results = []
        for vm_id, name in subjects:
            progress = VmProgress(vm_id=vm_id, name=name, stage="admitted", elapsed_ms=0)
            yield {"progress": progress.model_dump(mode="json")}, True
            key = (request.operation_id, action, vm_id)
            if key in self._journal:
                result = self._journal[key].model_copy(update={"replayed": True})
            else:
                result = self._journal[key] = self._do(action, vm_id, name, request.operation_id)
            results.append(result.model_dump(mode="json"))
            yield {"results": results[-1:]}, True
        yield {"results": results}, False

    def _do(self, action: str, vm_id: str, name: str, operation_id: str) -> VmResult:
        if name in self.failing:
            problem = PpecError(self.failing[name], f"vm {name} did not work out").problem()
            return VmResult(vm_id=vm_id, name=name, changed=False, problem=problem)
        changed = True
        if action == "CreateVms":
            self.vms[vm_id] = _info(self.specs[vm_id], operation_id)
        elif action == "DeleteVms":
            changed = self.vms.pop(vm_id, None) is not None
        elif action == "ResizeVms":
            size = self.sizes[vm_id]
            self.vms[vm_id] = self.vms[vm_id].model_copy(update={"vcpus": size.vcpus, "memory_mib": size.memory_mib})
        elif action in ("FreezeVms", "ThawVms"):
            changed = (vm_id in self.frozen) == (action == "ThawVms")
            (self.frozen.add if action == "FreezeVms" else self.frozen.discard)(vm_id)
        else:
            state = _STATE_AFTER[action] or self.vms[vm_id].state
            self.vms[vm_id] = self.vms[vm_id].model_copy(update={"state": VmState(state)})
        return VmResult(vm_id=vm_id, name=name, changed=changed, vm=self.vms.get(vm_id), stage_ms={"start": 1})


def _info(spec: VmSpec, operation_id: str) -> VmInfo:
    return VmInfo(
        vm_id=spec.vm_id,
        name=spec.name,
        state="running",
        managed=True,
        vcpus=spec.vcpus,
        memory_mib=spec.memory_mib,
        cells=spec.cells,
        pins=tuple(VcpuPin(vcpu=n, pcpu=n) for n in range(spec.vcpus)),
        disk_mib=spec.root_disk.size_mib,
        image_sha256=spec.root_disk.image.sha256,
        macs=tuple(nic.mac for nic in spec.nics),
        operation_id=operation_id,
        pool=spec.root_disk.pool or "",
    )


class _ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    agent: FakeAgent

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        method = self.path.removeprefix("/v1/agent/")
        parameters = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = self.agent.faults[0] if self.agent.faults else ""
        if fault == "drop" or (fault.startswith("script:") and METHODS[method].changes):
            self.agent.faults.pop(0)
            self._script(fault)
            return
        try:
            replies = self.agent.replies(method, parameters)
            first = next(replies)
        except PpecError as error:
            self._json(error.problem().status, error.problem().model_dump(mode="json"))
            return
        if "error" in first:
            self._json(first["parameters"]["status"], first["parameters"])
        elif NDJSON not in self.headers.get("Accept", ""):
            self._json(200, first["parameters"])
        else:
            self._stream(first, replies)

    def _script(self, fault: str) -> None:
        """`drop` closes at once; `script:TEXT` sends TEXT as the rest of an answer without a length, then closes."""
        self.close_connection = True
        if fault != "drop":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + fault.removeprefix("script:").encode())

    def _json(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, first: dict[str, Any], replies: Iterator[dict[str, Any]]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", NDJSON)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        sent = 0
        for reply in (first, *replies):
            # "drop_after:N" loses everything after N replies, though the agent does its work to the end.
            fault = self.agent.faults[0] if self.agent.faults else ""
            if not fault.startswith("drop_after:") or sent < int(fault.partition(":")[2]):
                line = json.dumps(reply).encode() + b"\n"
                self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
                self.wfile.flush()
                sent += 1
        if self.agent.faults and self.agent.faults[0].startswith("drop_after:"):
            self.agent.faults.pop(0)
            self.close_connection = True
            return
        self.wfile.write(b"0\r\n\r\n")


class _ProxyServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, agent: FakeAgent, context: ssl.SSLContext) -> None:
        super().__init__(("127.0.0.1", 0), type("Handler", (_ProxyHandler,), {"agent": agent}))
        self._agent = agent
        self._context = context

    def finish_request(self, request: socket.socket, client_address: Any) -> None:
        try:
            tls = self._context.wrap_socket(request, server_side=True)
        except OSError:
            return
        self._agent.connections += 1
        try:
            super().finish_request(tls, client_address)
        except OSError:
            pass
        finally:
            tls.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@contextmanager
def proxy_of(agent: FakeAgent, ca: Path, certificate: Path, key: Path) -> Iterator[int]:
    """Serves the agent as a host's proxy does; gives the port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(ca)
    context.verify_mode = ssl.CERT_REQUIRED
    server = _ProxyServer(agent, context)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@contextmanager
def socket_of(agent: FakeAgent, path: Path) -> Iterator[Path]:
    """Serves the agent on a UNIX socket, by the contract's own codec."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            agent.connections += 1
            reader = FrameReader()
            while data := self.request.recv(65536):
                for message in reader.feed(data):
                    method = message["method"].rpartition(".")[2]
                    for reply in agent.replies(method, message["parameters"]):
                        if message.get("more") or not reply.get("continues"):
                            self.request.sendall(encode(reply))

    server = socketserver.ThreadingUnixStreamServer(str(path), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield path
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
