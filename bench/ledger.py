# SPDX-License-Identifier: Apache-2.0
"""Admissions per second with 64 clients: the ledger by itself, beside one lock over all, and through the socket."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from bench.agent_client import AgentClient, one_vm
from bench.figures import PAIRS, Figures, paired
from ppec_agentd.ledger import Claim, Ledger
from ppec_agentd.topology import declare_topology
from ppec_contract.errors import PpecError

CLIENTS = 64
EACH = 40
THROUGH_SOCKET_EACH = 4
# What an admission is followed by: the hypervisor's part, much shortened so that the reference ends in seconds.
SLOW_S = 0.0005
TOPOLOGY = "sockets=2,cells=4,cores=16,threads=2,memory_mib=262144"
# Room for every client's VMs at once.
ROOMY = "sockets=2,cells=4,cores=40,threads=2,memory_mib=262144"

SETTINGS = """
host = "bench"
hypervisor = "fake"
[socket]
path = "{folder}/agentd.sock"
group = ""
max_connections = 128
[storage]
state_dir = "{folder}/state"
disk_mib = 10000000
[limits]
concurrent_starts = 64
concurrent_preparations = 64
[lab]
topology = "{topology}"
bridges = ["br0"]
[log]
level = "error"
"""


def run(figures: Figures) -> None:
    seconds = _admissions(nullcontext)
    figures.add("ledger.admissions", CLIENTS * EACH / seconds, "per s")
    lock = threading.Lock()
    pairs = PAIRS // 2
    ratio, one_lock_s, ours_s = paired(
        lambda: _admissions(lambda: lock, SLOW_S), lambda: _admissions(nullcontext, SLOW_S), pairs
    )
    figures.add("ledger.beside_slow_calls", CLIENTS * EACH / ours_s, "per s")
    figures.add("ledger.beside_slow_calls.one_lock", CLIENTS * EACH / one_lock_s, "per s")
    figures.add("ledger.beside_slow_calls.ratio", ratio, "x", bar="> 1")
    with fake_agent(ROOMY) as socket_path:
        refused_s = _through_socket(socket_path, refused=True)
        figures.add("ledger.refusals_through_socket", CLIENTS * THROUGH_SOCKET_EACH / refused_s, "per s")
        created_s = _through_socket(socket_path, refused=False)
        figures.add("ledger.creates_through_socket", CLIENTS * THROUGH_SOCKET_EACH / created_s, "per s")


def _admissions(guard: Callable[[], AbstractContextManager[object]], slow_s: float = 0) -> float:
    """Seconds for all clients' admissions, each then committed and released; `guard` is held from first to last."""
    ledger = Ledger(declare_topology(TOPOLOGY), 10**7, reserved_cores_per_cell=1)
    numbers = itertools.count(1)

    def client(index: int) -> None:
        for _ in range(EACH):
            number = next(numbers)
            claim = Claim(uuid.UUID(int=number), f"vm-{number}", 2, 1024, 10, (index % 8,))
            with guard():
                ledger.reserve(claim)
                if slow_s:
                    time.sleep(slow_s)
                ledger.commit(claim.vm_id)
            ledger.release(claim.vm_id)

    return _timed(client)


def _timed(client: Callable[[int], None]) -> float:
    barrier = threading.Barrier(CLIENTS + 1)

    def begin(index: int) -> None:
        barrier.wait(60)
        client(index)

    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(begin, index) for index in range(CLIENTS)]
        barrier.wait(60)
        started = time.monotonic()
        for task in running:
            task.result(120)
        return time.monotonic() - started


def _through_socket(path: Path, *, refused: bool) -> float:
    """Seconds for all clients' CreateVms calls of one VM each, one after another on a connection of its own."""
    clients = [AgentClient(path) for _ in range(CLIENTS)]
    image = path.parent / "image.raw"
    image.write_bytes(b"PPEC" + bytes(65532))
    kind = "refused" if refused else "created"

    def client(index: int) -> None:
        for turn in range(THROUGH_SOCKET_EACH):
            vm = one_vm(f"vm-{kind}-{index}-{turn}", image, index % 8, memory_mib=10**6 if refused else 1024)
            problem = clients[index].create(vm, f"{kind}-{index}-{turn}")
            if (problem == "host.no_capacity") != refused:
                raise PpecError("request.invalid", f"the benchmark's VM {vm['name']} was answered {problem!r}")

    try:
        return _timed(client)
    finally:
        for one in clients:
            one.close()


@contextmanager
def fake_agent(topology: str) -> Iterator[Path]:
    """An agent on the fake hypervisor, in a process of its own; its socket."""
    with tempfile.TemporaryDirectory(prefix="ppec-bench-", dir="/tmp") as directory:
        folder = Path(directory)
        settings = folder / "agentd.toml"
        settings.write_text(SETTINGS.format(folder=folder, topology=topology))
        program = Path(sys.executable).with_name("ppec-agentd")
        process = subprocess.Popen([str(program), "--config", str(settings)])
        try:
            socket_path = folder / "agentd.sock"
            _wait_for(socket_path, process)
            yield socket_path
        finally:
            process.terminate()
            process.wait(30)


def _wait_for(path: Path, process: subprocess.Popen[bytes], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the agent did not come up (exit {process.poll()})")
        time.sleep(0.05)
