# SPDX-License-Identifier: Apache-2.0
"""What agentd takes of a host's memory: its bar is 45 MiB with twenty VMs (`make bench BENCH=footprint`)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

VMS = 20
# Of the 45 MiB some 7 are its share of libraries, and 3 are libvirt's binding, which no fake hypervisor loads. One
# more is kept free.
MAX_OWN_MIB = 34
# Memory that has served once may be kept, not more with every call.
MAX_GROWTH_MIB = 3


def own_mib(pid: int) -> float:
    """Pages that are this process's alone (proc(5)): heap, stacks, and what it has written to of its libraries."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


@pytest.fixture
def no_rich(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a host. structlog loads rich wherever it finds it, which takes 5 MiB; here it is installed for the CLI."""
    (tmp_path / "rich.py").write_text("raise ImportError('hosts have none')\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH", "")))))


@pytest.mark.usefixtures("no_rich")
def test_it_stays_small_with_twenty_vms_and_does_not_grow_with_calls(agent_process: Any, vm: Any) -> None:
    agent = agent_process(lab={"topology": "sockets=2,cores=32,threads=2,memory_mib=65536", "bridges": ["br0"]})
    client = agent.start().client()
    vms = [vm(f"vm-{number}", memory_mib=64).model_dump(mode="json") for number in range(VMS)]
    reply = client.call("CreateVms", {"operation_id": "create", "fence": 1, "vms": vms})
    assert [r.get("problem") for r in reply["parameters"]["results"]] == [None] * VMS

    def work(times: int) -> float:
        for _ in range(times):
            for method in ("GetReport", "ListVms", "GetVersion"):
                assert "error" not in client.call(method)
        return own_mib(agent.pid)

    before = work(20)
    assert before <= MAX_OWN_MIB
    assert work(200) - before <= MAX_GROWTH_MIB
