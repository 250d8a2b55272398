# SPDX-License-Identifier: Apache-2.0
"""agentd and the proxy as a host has them: of a release, by the distribution's Python, in their units' environment."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.agent_client import AgentClient
from bench.fleet_ca import Credential, FleetCa
from bench.silent_orchestrator import SilentOrchestrator, silent_orchestrator
from ppec_lab.cloud import PROJECT, build_release
from ppec_lab.conditions import wait_until
from ppec_lab.orchestrator_process import free_port
from ppec_lab.private_libvirtd import PrivateLibvirtd, private_libvirtd

TOPOLOGY = "sockets=2,cores=64,threads=1,memory_mib=131072"
# clock_getcpuclockid(3): another process's CPU clock, which counts the threads that have ended, too.
_CPUCLOCK_SCHED = 2

AGENTD = """
host = "h1"
[socket]
path = "{folder}/agentd.sock"
group = ""
[storage]
state_dir = "{folder}/state"
disk_mib = 1000000
[libvirt]
uri = "{uri}"
[lab]
topology = "{topology}"
[reports]
orchestrator_url = "{orchestrator}"
[tls]
ca_path = "{ca}"
certificate_path = "{certificate}"
key_path = "{key}"
"""
PROXY = """
allow_from = ["127.0.0.1/32"]
listen_address = "127.0.0.1"
listen_port = {port}
agent_socket_path = "{folder}/agentd.sock"
ca_path = "{ca}"
certificate_path = "{certificate}"
key_path = "{key}"
"""


@dataclass(frozen=True)
class Daemon:
    """One running program."""

    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return self.process.pid

    def cpu_s(self) -> float:
        return cpu_s(self.pid)


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has taken, with its threads."""
    return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)


@dataclass(frozen=True)
class ReleasedHost:
    """Everything of it that runs, and how to reach it."""

    libvirtd: PrivateLibvirtd
    agentd: Daemon
    proxy: Daemon
    proxy_port: int
    socket_path: Path
    orchestrator: SilentOrchestrator
    ca: FleetCa
    operator: Credential
    folder: Path

    @property
    def image(self) -> Path:
        """An image that boots nothing."""
        path = self.folder / "image.raw"
        if not path.exists():
            path.write_bytes(b"PPEC" + bytes(65532))
        return path

    def pids(self) -> tuple[int, ...]:
        """Of agentd, the proxy, libvirt's daemons and each QEMU: what a host has and shares libraries among."""
        init = self.libvirtd.init_pid
        inside = Path(f"/proc/{init}/task/{init}/children").read_text().split()
        return (self.agentd.pid, self.proxy.pid, *map(int, inside))

    def client(self) -> AgentClient:
        return AgentClient(self.socket_path, timeout_s=300)


@contextmanager
def released_host() -> Iterator[ReleasedHost]:
    """On a libvirtd of its own, in a folder that vanishes."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ppec-bench-", dir="/tmp")))
        libvirtd = stack.enter_context(private_libvirtd(folder / "lv"))
        ca = FleetCa(folder)
        orchestrator = stack.enter_context(silent_orchestrator(ca))
        release = _unpack(folder / "release")
        credential, port = ca.issue("ppec://host/h1"), free_port()
        words = {
            "folder": folder,
            "uri": libvirtd.uri,
            "topology": TOPOLOGY,
            "orchestrator": orchestrator.url,
            "port": port,
            "ca": ca.path,
            "certificate": credential.certificate,
            "key": credential.key,
        }
        agentd = stack.enter_context(_daemon(release, folder, "agentd", AGENTD.format(**words)))
        socket_path = folder / "agentd.sock"
        wait_until(lambda: _listens(socket.AF_UNIX, str(socket_path)), "agentd listens", timeout_s=60)
        proxy = stack.enter_context(_daemon(release, folder, "proxy", PROXY.format(**words)))
        wait_until(lambda: _listens(socket.AF_INET, ("127.0.0.1", port)), "the proxy listens", timeout_s=60)
        operator = ca.issue("ppec://operator/bench")
        yield ReleasedHost(libvirtd, agentd, proxy, port, socket_path, orchestrator, ca, operator, folder)


def _unpack(folder: Path) -> Path:
    folder.mkdir()
    archive = build_release(PROJECT / "build" / "releases")
    subprocess.run(["tar", "-xzf", str(archive), "-C", str(folder)], check=True)
    (launcher,) = folder.rglob("bin/ppec-agentd")
    return launcher.parent


@contextmanager
def _daemon(programs: Path, folder: Path, role: str, settings: str) -> Iterator[Daemon]:
    config = folder / f"{role}.toml"
    config.write_text(settings)
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8", **unit_environment(role)}
    # By name and not by the launcher's own mode: an archive may be unpacked where nothing can be executed.
    command = ["/usr/bin/python3", "-IB", str(programs / f"ppec-{role}"), "--config", str(config)]
    with (folder / f"{role}.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield Daemon(process)
    finally:
        process.terminate()
        process.wait(60)


def unit_environment(role: str) -> dict[str, str]:
    """What the role's service unit sets by `Environment=`."""
    unit = PROJECT / "collections/ppec/roles" / role / "templates" / f"ppec-{role}.service.j2"
    lines = re.findall(r"^Environment=(.*)$", unit.read_text(), re.MULTILINE)
    pairs = (word.partition("=") for line in lines for word in line.split())
    return {name: value for name, _, value in pairs}


def _listens(family: socket.AddressFamily, address: str | tuple[str, int]) -> bool:
    with socket.socket(family) as probe:
        return probe.connect_ex(address) == 0
