# SPDX-License-Identifier: Apache-2.0
"""What agentd and the proxy take of a host: memory after some work, and CPU time while nothing happens."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import time
from typing import Any

from bench.agent_client import AgentClient, one_vm
from bench.figures import Figures
from bench.process_memory import memory_mib
from bench.released_host import ReleasedHost, released_host

VMS = 20
REPORTS = 10
REQUESTS = 100
# Bytes of user data, of the 64 KiB that there may be.
LARGE = 60_000
SETTLE_S = 3.0
# In a minute each of the agent's periods comes round: ten seconds (health, heartbeat), thirty, sixty (report).
IDLE_S = 62.0


def run(figures: Figures) -> None:
    with released_host() as host:
        _make_vms(host)
        _ask_proxy(host)
        time.sleep(SETTLE_S)
        reports, beats = host.orchestrator.seen["PUT"], host.orchestrator.seen["POST"]
        agent_s, proxy_s, started_s = host.agentd.cpu_s(), host.proxy.cpu_s(), time.monotonic()
        time.sleep(IDLE_S)
        elapsed_s = time.monotonic() - started_s
        agent_s, proxy_s = host.agentd.cpu_s() - agent_s, host.proxy.cpu_s() - proxy_s
        if host.orchestrator.seen["POST"] == beats:
            raise RuntimeError("the agent sent no heartbeat in a minute: what was measured is not an agent at work")
        figures.add("agent.idle_cpu", 100 * agent_s / elapsed_s, "% of a core", bar="<= 0.2")
        figures.add("agent.idle_reports", host.orchestrator.seen["PUT"] - reports, "reports")
        figures.add("agent.idle_heartbeats", host.orchestrator.seen["POST"] - beats, "heartbeats")
        figures.add("proxy.idle_cpu", 100 * proxy_s / elapsed_s, "% of a core", bar="<= 0.2")
        _memory(figures, host)


def _memory(figures: Figures, host: ReleasedHost) -> None:
    """Beside it the resident set, in which libraries count whole that libvirtd and each QEMU have in memory anyway."""
    for name, daemon, bar_mib in (("agent", host.agentd, 45), ("proxy", host.proxy, 55)):
        taken_mib, resident_mib = memory_mib(daemon.pid, host.pids())
        figures.add(f"{name}.memory", taken_mib, "MiB", bar=f"<= {bar_mib}")
        figures.add(f"{name}.memory_rss", resident_mib, "MiB")


def _make_vms(host: ReleasedHost) -> None:
    """Twenty VMs on the agent's own socket, then paused: an emulated guest would take the CPU that is measured."""
    with contextlib.closing(host.client()) as client:
        vms = [one_vm(f"vm-{number}", host.image, number % 2, memory_mib=64) for number in range(VMS)]
        _all_done(client, "CreateVms", {"operation_id": "bench-create", "vms": vms})
        _all_done(client, "PauseVms", {"operation_id": "bench-pause", "vm_ids": [vm["vm_id"] for vm in vms]})
        for _ in range(REPORTS):
            client.call("GetReport", {})
            client.call("ListVms", {})


def _all_done(client: AgentClient, method: str, parameters: dict[str, Any]) -> None:
    reply = client.call(method, {"fence": 1, **parameters})
    problems = [result["problem"] for result in reply["results"] if result.get("problem")]
    if problems:
        raise RuntimeError(f"{method}: {problems[0]}")


def _ask_proxy(host: ReleasedHost) -> None:
    """Over TLS: reports, and creates of a VM with much user data that no cell has room for."""
    context = ssl.create_default_context(cafile=str(host.ca.path))
    context.load_cert_chain(host.operator.certificate, host.operator.key)
    connection = http.client.HTTPSConnection("127.0.0.1", host.proxy_port, context=context, timeout=60)
    with contextlib.closing(connection):
        for number in range(REQUESTS // 2):
            vm = one_vm(f"large-{number}", host.image, 0, memory_mib=10**6) | {"user_data": "x" * LARGE}
            create = {"operation_id": f"large-{number}", "fence": 1, "vms": [vm]}
            for method, body in (("GetReport", {}), ("CreateVms", create)):
                connection.request("POST", f"/v1/agent/{method}", json.dumps(body))
                response = connection.getresponse()
                answer = response.read()
                if response.status != http.HTTPStatus.OK:
                    raise RuntimeError(f"the proxy answered {response.status}: {answer[:500]!r}")
