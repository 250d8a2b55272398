# SPDX-License-Identifier: Apache-2.0
"""The whole chain on this machine, on real libvirt, as a caller of the API sees it."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppec_lab.conditions import wait_until
from ppec_lab.local_host import LocalHost
from ppec_lab.orchestrator_process import OrchestratorProcess, free_port
from ppec_lab.private_libvirtd import private_libvirtd

BRIDGE = "ppecbench0"


@dataclass
class Caller:
    """A client with one warm connection, as a service that asks for VMs would keep."""

    orchestrator: OrchestratorProcess

    def __post_init__(self) -> None:
        self._context = ssl.create_default_context(cafile=str(self.orchestrator.ca))
        self._headers = {"Authorization": f"Bearer {self.orchestrator.token}", "Content-Type": "application/json"}
        self.warm()

    def warm(self) -> None:
        """Opens the connection afresh: the server closes one that was idle while the floor was measured."""
        self._connection = self._connect()
        self._connection.connect()

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        self._connection.request("POST", path, json.dumps(body), self._headers)
        answer: dict[str, Any] = json.loads(self._connection.getresponse().read())
        if "operation_id" not in answer:
            raise RuntimeError(f"POST {path}: {answer}")
        return answer

    def follow(self, operation_id: str) -> dict[str, Any]:
        """Reads the operation's event stream to its end; the last state told."""
        stream = self._connect()
        stream.request("GET", f"/v1/operations/{operation_id}/events", headers=self._headers)
        response = stream.getresponse()
        state: dict[str, Any] = {}
        event = ""
        for line in (raw.decode().rstrip("\r\n") for raw in response):
            if line.startswith("event: "):
                event = line.removeprefix("event: ")
                if event == "end":
                    break
            elif line.startswith("data: ") and event == "operation":
                state = json.loads(line.removeprefix("data: "))
        stream.close()
        return state

    def create(self, **body: Any) -> tuple[float, dict[str, Any]]:
        """Seconds from sending the request to knowing that the operation has ended, and the operation."""
        self.warm()
        started = time.monotonic()
        asked = self.post("/v1/vms", {"flavor": "bench", "image": "bench", **body})
        ended = self.follow(asked["operation_id"])
        elapsed_s = time.monotonic() - started
        if ended["state"] != "succeeded":
            raise RuntimeError(f"the operation ended {ended['state']}: {ended['problem'] or ended['items']}")
        return elapsed_s, ended

    def delete(self, operation: dict[str, Any]) -> float:
        """The VMs of an operation that has created them; seconds as for `create`."""
        names = [item["vm_id"] for item in operation["items"]]
        self.warm()
        started = time.monotonic()
        asked = self.post("/v1/vms/actions", {"action": "delete", "vms": names})
        ended = self.follow(asked["operation_id"])
        elapsed_s = time.monotonic() - started
        if ended["state"] != "succeeded":
            raise RuntimeError(f"the delete ended {ended['state']}: {ended['problem'] or ended['items']}")
        return elapsed_s

    def _connect(self) -> http.client.HTTPSConnection:
        address, port = self.orchestrator.addresses[0], self.orchestrator.port
        return http.client.HTTPSConnection(address, port, context=self._context, timeout=600)


@dataclass
class Chain:
    """`uri` is the libvirtd on which the chain and the floor make their domains in turn."""

    directory: Path
    uri: str
    orchestrator: OrchestratorProcess
    host: LocalHost

    def restart_orchestrator(self, *, fork_server: bool) -> Caller:
        """The same orchestrator again, with Ansible warm or cold; returns when it is ready for work."""
        self.orchestrator.stop()
        again = OrchestratorProcess(
            self.directory / "orchestrator", self.orchestrator.port, settings={"fork_server": fork_server}
        )
        again.start()
        ppec = again.ppec
        wait_until(lambda: ppec("host", "list")[0]["liveness"] == "up", "the host reports", timeout_s=60, every_s=0.3)
        self.orchestrator = again
        return Caller(again)


@contextlib.contextmanager
def chain(directory: Path) -> Iterator[Chain]:
    """Starts everything, with an image that boots nothing, and removes it."""
    subprocess.run(["ip", "link", "add", BRIDGE, "type", "bridge"], check=True)
    subprocess.run(["ip", "link", "set", BRIDGE, "up"], check=True)
    try:
        with private_libvirtd(directory / "libvirtd") as libvirtd:
            orchestrator = OrchestratorProcess(directory / "orchestrator", free_port())
            host = LocalHost(
                "bench1",
                directory / "bench1",
                orchestrator,
                free_port(),
                libvirt_uri=libvirtd.uri,
                topology="sockets=2,cores=64,threads=1,memory_mib=131072",
                bridges=(BRIDGE,),
            )
            try:
                orchestrator.start()
                _register(orchestrator, host, directory)
                host.start()
                yield Chain(directory, libvirtd.uri, orchestrator, host)
            finally:
                host.remove()
                orchestrator.stop()
    finally:
        subprocess.run(["ip", "link", "delete", BRIDGE], check=False)


def _register(orchestrator: OrchestratorProcess, host: LocalHost, directory: Path) -> None:
    ppec = orchestrator.ppec
    ppec("datacentre", "create", "dc", "--region", "bench")
    ppec("cluster", "create", "c1", "--datacentre", "dc")
    ppec("rack", "create", "r1", "--cluster", "c1")
    ppec("ipdb", "vrf", "create", "blue")
    serves = ("--vrf", "blue", "--cluster", "c1", "--bridge", BRIDGE)
    # Address after address: runs follow each other faster than addresses would rest.
    quarantine = ("--quarantine-s", "0")
    ppec("ipdb", "prefix", "create", "198.51.100.0/24", "--gateway", "198.51.100.1", *quarantine, *serves)
    ppec("flavor", "create", "bench", "--vcpus", "2", "--memory-mib", "128", "--disk-mib", "64")
    empty = directory / "empty.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(empty), "16M"], check=True)
    ppec("image", "import", "bench", str(empty))
    ppec("host", "add", host.name, "--rack", "r1", "--vrf", "blue", "--address", host.address, "--port", str(host.port))
