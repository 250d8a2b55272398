# SPDX-License-Identifier: Apache-2.0
"""A cloud of processes: an orchestrator and hosts, each of which may be killed and started again."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path
from typing import Any

from ppec_lab.conditions import wait_until
from ppec_lab.local_host import LocalHost
from ppec_lab.orchestrator_process import OrchestratorProcess, free_port


class LocalCloud:
    """An orchestrator and hosts (of fake hypervisors, if not said otherwise), all processes of this machine."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.orchestrator = OrchestratorProcess(directory / "orchestrator", free_port())
        self.hosts: list[LocalHost] = []

    def start(
        self, hosts: int = 2, prefix: str = "198.51.100.0/24", libvirt_uri: str | None = None, **settings: Any
    ) -> None:
        """`prefix` has the VMs' addresses; `settings` go to each agent, by section. With the URI of a private libvirtd
        its one host makes real domains there."""
        self.orchestrator.start()
        gateway = str(ip_network(prefix)[1])
        serves = {"vrf": "blue", "gateway": gateway, "cluster": "c1", "bridge": "br-ppec"}
        self.register("datacentres", name="dc", region="lab")
        self.register("clusters", name="c1", datacentre="dc")
        self.register("racks", name="r1", cluster="c1")
        self.register("vrfs", name="blue")
        self.register("prefixes", cidr=prefix, **serves)
        self.register("flavors", name="small", vcpus=2, memory_mib=256, disk_mib=64)
        empty = self.directory / "empty.raw"
        empty.write_bytes(bytes(1024 * 1024))
        self.orchestrator.ppec("image", "import", "empty", str(empty), "--format", "raw")
        for number in range(1, hosts + 1):
            self._add_host(f"h{number}", libvirt_uri, settings)
        wait_until(self.all_up, "all hosts report", timeout_s=60, every_s=0.2)

    def register(self, resource: str, **body: Any) -> None:
        """Makes a resource, by its name in the API: the command would take half a second of CPU each time."""
        answer = self.orchestrator.request("POST", f"/v1/{resource}", body)
        if "code" in answer:
            raise RuntimeError(f"{resource} {body} could not be made: {answer}")

    def all_up(self) -> bool:
        listed = self.orchestrator.request("GET", "/v1/hosts")["items"]
        return all(host["liveness"] == "up" for host in listed)

    def create(self, **body: Any) -> dict[str, Any]:
        """POST /v1/vms; the operation, or the problem."""
        request = {"flavor": "small", "image": "empty", **body}
        answer: dict[str, Any] = self.orchestrator.request("POST", "/v1/vms", request)
        return answer

    def operation(self, operation_id: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.orchestrator.request("GET", f"/v1/operations/{operation_id}")
        return answer

    def ended(self, operation_id: str, timeout_s: float = 120.0) -> dict[str, Any]:
        """Waits until the operation has come to its end, whoever works on it."""
        open_states = ("queued", "running")

        def look() -> dict[str, Any] | None:
            found = self.operation(operation_id)
            return None if found["state"] in open_states else found

        return wait_until(look, f"operation {operation_id} ends", timeout_s=timeout_s, every_s=0.1) or {}

    def vms(self) -> list[dict[str, Any]]:
        return list(self.orchestrator.ppec("vm", "list"))

    def addresses_in_use(self) -> set[str]:
        return {a["address"] for a in self.orchestrator.ppec("ipdb", "address", "list") if a["vm_id"]}

    def domains(self) -> dict[str, list[str]]:
        """Domain ids per host, straight from each fake hypervisor's state file."""
        return {host.name: sorted(host.fake_domains()) for host in self.hosts}

    def remove(self) -> None:
        for host in self.hosts:
            host.remove()
        self.orchestrator.stop()

    def _add_host(self, name: str, libvirt_uri: str | None, settings: dict[str, Any]) -> None:
        host = LocalHost(
            name,
            self.directory / name,
            self.orchestrator,
            free_port(),
            libvirt_uri=libvirt_uri,
            agent_settings=settings,
        )
        self.register("hosts", name=name, rack="r1", vrf="blue", address=host.address, port=host.port)
        host.start()
        self.hosts.append(host)
