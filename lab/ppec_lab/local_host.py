# SPDX-License-Identifier: Apache-2.0
"""A host without a machine of its own: agentd and proxy as two processes beside the orchestrator.

With the fake hypervisor it needs neither root nor libvirt; with the URI of a private libvirtd it makes real domains.
The rest of the chain, certificates and ring-fence included, is the real one.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import ssl
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import NameOID

from ppec_lab.background_process import BackgroundProcess
from ppec_lab.conditions import wait_until
from ppec_lab.orchestrator_process import BIN, OrchestratorProcess

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
TOPOLOGY = "sockets=2,cores=8,threads=1,memory_mib=32768"


@dataclass(frozen=True)
class LocalHost:
    """One host named `name`, its state in `directory`. `libvirt_uri` None means the fake hypervisor."""

    name: str
    directory: Path
    orchestrator: OrchestratorProcess
    port: int
    address: str = "127.0.0.1"
    libvirt_uri: str | None = None
    topology: str = TOPOLOGY
    bridges: tuple[str, ...] = ("br-ppec",)
    agent_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def agentd(self) -> BackgroundProcess:
        return BackgroundProcess(self.directory, "agentd")

    @property
    def proxy(self) -> BackgroundProcess:
        return BackgroundProcess(self.directory, "proxy")

    @property
    def socket(self) -> Path:
        """The agent's socket: its folder has a short name, since a socket's path may have 107 bytes."""
        link = self.directory / "run"
        if not link.is_symlink():
            link.symlink_to(tempfile.mkdtemp(prefix="ppec-run-"))
        return link.resolve() / "agentd.sock"

    def enrol(self) -> None:
        """Gets the host's certificate with a one-time token unless it has one that counts, as the `pki` role does on a
        machine. Processes that run with an older one are ended."""
        if self._certificate_counts():
            return
        self.stop()
        pki = self.directory / "pki"
        pki.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)])
        csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, SHA256())
        given = self.orchestrator.request("POST", f"/v1/hosts/{self.name}/enrolment-token")
        pem = csr.public_bytes(serialization.Encoding.PEM).decode()
        body = {"host": self.name, "token": given.get("token", ""), "csr_pem": pem}
        reply = self.orchestrator.request("POST", "/v1/enrol", body)
        if "certificate_pem" not in reply:
            raise RuntimeError(f"host {self.name} could not enrol: {reply.get('detail', reply)}")
        key_pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (pki / "host.key").touch(mode=0o600)
        (pki / "host.key").write_bytes(key_pem)
        (pki / "ca.pem").write_text(reply["ca_pem"])
        (pki / "host.pem").write_text(reply["certificate_pem"])

    def start(self) -> None:
        """Enrols if need be, starts both processes and waits until the proxy listens."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.enrol()
        self._write("agentd", self._agentd_settings())
        self._write("proxy", self._proxy_settings())
        self.start_agentd()
        self.proxy.start([str(BIN / "ppec-proxy"), "--config", str(self.directory / "proxy.toml")])
        wait_until(lambda: self._up(self.proxy, self._proxy_listens), f"proxy of {self.name} listens", timeout_s=60)

    def start_agentd(self) -> None:
        self.agentd.start([str(BIN / "ppec-agentd"), "--config", str(self.directory / "agentd.toml")])
        wait_until(lambda: self._up(self.agentd, self._agentd_listens), f"agentd of {self.name} serves", timeout_s=60)

    def stop(self) -> None:
        self.proxy.stop()
        self.agentd.stop()

    def remove(self) -> None:
        """Ends the processes and removes the host's state."""
        self.stop()
        if (self.directory / "run").is_symlink():
            shutil.rmtree((self.directory / "run").resolve(), ignore_errors=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def fake_domains(self) -> list[str]:
        """Ids of the domains that the fake hypervisor holds, from its own state file."""
        path = self.directory / "state" / "fake-hypervisor.json"
        return [domain["vm_id"] for domain in json.loads(path.read_text())] if path.exists() else []

    def vm_folders(self) -> list[Path]:
        """The VMs' own folders: what is left here after a delete is a leak."""
        vms = self.directory / "state" / "vms"
        return sorted(vms.iterdir()) if vms.is_dir() else []

    def seeds(self) -> list[Path]:
        """The VMs' cloud-init seeds."""
        return [path for folder in self.vm_folders() for path in sorted(folder.glob("*.iso"))]

    def _certificate_counts(self) -> bool:
        """Whether there is one, of the orchestrator's CA, that it doesn't refuse; when it can't be asked, it counts."""
        pki = self.directory / "pki"
        if not (pki / "host.pem").exists() or (pki / "ca.pem").read_text() != self.orchestrator.ca.read_text():
            return False
        context = ssl.create_default_context(cafile=str(pki / "ca.pem"))
        context.load_cert_chain(pki / "host.pem", pki / "host.key")
        # There is no such image: 404 is for those who may ask.
        url = f"{self.orchestrator.url}/v1/images/{'0' * 64}/content"
        try:
            with urllib.request.urlopen(url, context=context, timeout=60):  # noqa: S310 - always https
                return True
        except urllib.error.HTTPError as refused:
            return refused.code != HTTPStatus.UNAUTHORIZED
        except OSError:
            return True

    def _up(self, process: BackgroundProcess, listens: Any) -> bool:
        if process.pid() is None:
            raise RuntimeError(f"{process.name} of {self.name} ended at once:\n{process.tail()}")
        return bool(listens())

    def _agentd_listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def _proxy_listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((self.address, self.port)) == 0

    def _agentd_settings(self) -> dict[str, Any]:
        pki = self.directory / "pki"
        settings: dict[str, dict[str, Any]] = {
            "socket": {"path": str(self.socket), "group": "", "mode": 0o600},
            "storage": {"state_dir": str(self.directory / "state"), "disk_mib": 1_000_000},
            "lab": {"topology": self.topology, "bridges": list(self.bridges)},
            "tls": {
                "ca_path": str(pki / "ca.pem"),
                "certificate_path": str(pki / "host.pem"),
                "key_path": str(pki / "host.key"),
            },
            "reports": {"orchestrator_url": self.orchestrator.url},
        }
        if self.libvirt_uri:
            settings["libvirt"] = {"uri": self.libvirt_uri}
        for section, values in self.agent_settings.items():
            settings.setdefault(section, {}).update(values)
        return {"host": self.name, "hypervisor": "libvirt" if self.libvirt_uri else "fake", **settings}

    def _proxy_settings(self) -> dict[str, Any]:
        pki = self.directory / "pki"
        return {
            "allow_from": ["127.0.0.0/8"],
            "certificate_path": str(pki / "host.pem"),
            "key_path": str(pki / "host.key"),
            "ca_path": str(pki / "ca.pem"),
            "listen_address": self.address,
            "listen_port": self.port,
            "agent_socket_path": str(self.socket),
        }

    def _write(self, name: str, settings: Mapping[str, Any]) -> None:
        (self.directory / f"{name}.toml").write_text("\n".join(_toml(settings)) + "\n")


def _toml(settings: Mapping[str, Any], table: tuple[str, ...] = ()) -> Iterator[str]:
    """TOML whose values are written as JSON: its strings, numbers, booleans and lists are TOML's too."""
    if table:
        yield f"[{'.'.join(map(_toml_key, table))}]"
    for key, value in settings.items():
        if not isinstance(value, Mapping):
            yield f"{_toml_key(key)} = {json.dumps(value)}"
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _toml(value, (*table, key))


def _toml_key(key: str) -> str:
    """Quoted where TOML has no bare key for it, as for a PCI address."""
    return key if _BARE_KEY.fullmatch(key) else json.dumps(key)
