# SPDX-License-Identifier: Apache-2.0
"""Creating and deleting VMs: the chain beside bare libvirt, its work counts and latency, and a thousand at once."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.chain import Caller, Chain, chain
from bench.figures import PAIRS, Figures, compared, paired
from bench.floor import Floor
from ppec_lab.local_cloud import LocalCloud

BATCH = 8
ROWS = 3
SETTLE_S = 2.0
THOUSAND = 1000
FAKE_HOSTS = 10


def run(figures: Figures) -> None:
    with tempfile.TemporaryDirectory(prefix="ppec-bench-", dir="/tmp") as directory, chain(Path(directory)) as made:
        _beside_libvirt(figures, made)
    for fail_every in (0, 20):
        with tempfile.TemporaryDirectory(prefix="ppec-bench-", dir="/tmp") as directory:
            _thousand(figures, Path(directory), fail_every)


def _beside_libvirt(figures: Figures, made: Chain) -> None:
    caller = made.restart_orchestrator(fork_server=True)
    # The first VM fetches the image and is the model of the floor's domains; it is no measurement.
    caller.create(name="model")
    floor = Floor(made.uri, made.directory / "floor", "model")
    try:
        deletes_s: list[float] = []
        ratio, chain_s, floor_s = paired(lambda: _one(caller, deletes_s), floor.create)
        figures.add("create.one.floor", floor_s, "s")
        figures.add("create.one.warm", chain_s, "s")
        figures.add("create.one.warm_ratio", ratio, "x", bar="<= 2.5")
        _deletes(figures, "delete.one", deletes_s, floor)
        last: dict[str, Any] = {}
        ratio, chain_s, floor_s = paired(
            lambda: _batch(caller, last, deletes_s), lambda: floor.create(BATCH, at_once=2)
        )
        figures.add("create.eight.floor", floor_s, "s")
        figures.add("create.eight.warm", chain_s, "s")
        figures.add("create.eight.warm_ratio", ratio, "x", bar="<= 1.5")
        _deletes(figures, "delete.eight", deletes_s, floor)
        for name, figure in last["counters"].items():
            figures.add(f"create.eight.{name}", figure, "count", bar=_count_bar(name))
        warm_ms = _to_agent(made, caller)
        figures.add("create.request_to_agent.warm", warm_ms, "ms", bar="<= 100")
        for name, every_s in (("burst", 0.1 / BATCH), ("five_a_second", 0.2)):
            figures.add(f"create.request_to_agent.{name}", _row_to_agent(made, every_s), "ms", bar="<= 100")
        cold = made.restart_orchestrator(fork_server=False)
        ratio, chain_s, _ = paired(lambda: _one(cold, deletes_s), floor.create)
        figures.add("create.one.cold", chain_s, "s")
        figures.add("create.one.cold_ratio", ratio, "x", bar="<= 5")
        cold_ms = _to_agent(made, cold)
        figures.add("create.request_to_agent.cold", cold_ms, "ms")
        # No bar: it tells a slow machine from a slow path (decision 0010).
        figures.add("create.request_to_agent.warm_to_cold", warm_ms / cold_ms, "x")
    finally:
        floor.close()


def _one(caller: Caller, deletes_s: list[float]) -> float:
    elapsed_s, operation = caller.create()
    deletes_s.append(caller.delete(operation))
    return elapsed_s


def _batch(caller: Caller, last: dict[str, Any], deletes_s: list[float]) -> float:
    elapsed_s, operation = caller.create(count=BATCH)
    last.update(operation)
    deletes_s.append(caller.delete(operation))
    return elapsed_s


def _deletes(figures: Figures, name: str, deletes_s: list[float], floor: Floor) -> None:
    """Of the VMs that the pairs before have created; both lists are empty then."""
    ratio, chain_s, floor_s = compared(deletes_s, floor.removals_s)
    figures.add(f"{name}.floor", floor_s, "s")
    figures.add(f"{name}.warm", chain_s, "s")
    figures.add(f"{name}.warm_ratio", ratio, "x")
    deletes_s.clear()
    floor.removals_s.clear()


def _to_agent(made: Chain, caller: Caller) -> float:
    """Median milliseconds from sending the request to the agent's first answer, as the run's own events tell it."""
    taken = []
    for _ in range(PAIRS):
        caller.warm()
        sent_ms = time.time() * 1000
        asked = caller.post("/v1/vms", {"flavor": "bench", "image": "bench"})
        operation = caller.follow(asked["operation_id"])
        taken.append(_first_answer_ms(made, operation) - sent_ms)
        caller.delete(operation)
    return statistics.median(taken)


def _row_to_agent(made: Chain, every_s: float) -> float:
    """The same for requests that don't wait for each other: rows of eight, one every so often, each its own caller.

    The first row, after which as many runs stand by as it would have needed, is not counted.
    """
    callers = [Caller(made.orchestrator) for _ in range(BATCH)]
    taken = []
    with ThreadPoolExecutor(BATCH) as threads:
        for number in range(ROWS + 1):
            # All that is to stand by does.
            time.sleep(SETTLE_S)
            for caller in callers:
                caller.warm()
            started_s = time.monotonic()
            due = [started_s + every_s * place for place in range(BATCH)]
            ended = list(threads.map(lambda one: _ask_at(made, *one), zip(callers, due, strict=True)))
            taken += [late_ms for late_ms, _ in ended] if number else []
            callers[0].warm()
            callers[0].delete({"items": [item for _, operation in ended for item in operation["items"]]})
    return statistics.median(taken)


def _ask_at(made: Chain, caller: Caller, due_s: float) -> tuple[float, dict[str, Any]]:
    time.sleep(max(0.0, due_s - time.monotonic()))
    sent_ms = time.time() * 1000
    asked = caller.post("/v1/vms", {"flavor": "bench", "image": "bench"})
    operation = caller.follow(asked["operation_id"])
    return _first_answer_ms(made, operation) - sent_ms, operation


def _first_answer_ms(made: Chain, operation: dict[str, Any]) -> float:
    events = made.orchestrator.state_dir / "runs" / operation["operation_id"] / "1" / "events.jsonl"
    return float(json.loads(events.read_text().splitlines()[0])["at_unix_ms"])


def _count_bar(name: str) -> str:
    # One host: hosts + 1 host-tasks, 3 + hosts commits.
    bars = {"runs": "1", "host_tasks": "<= 2", "planning_passes": "1", "commits": "<= 4", "proxy_sessions": "<= 1"}
    return bars.get(name, "")


def _thousand(figures: Figures, directory: Path, fail_every: int) -> None:
    """A thousand VMs on fake hosts in one request; with `fail_every`, every so-manieth start on a host fails."""
    cloud = LocalCloud(directory)
    lab: dict[str, Any] = {"topology": "sockets=2,cores=128,threads=1,memory_mib=262144"}
    if fail_every:
        lab["fail_every"] = {"start": fail_every}
    name = f"create.thousand.{'faults' if fail_every else 'clean'}"
    try:
        cloud.start(hosts=FAKE_HOSTS, prefix="198.18.0.0/20", lab=lab)
        caller = Caller(cloud.orchestrator)
        started = time.monotonic()
        asked = caller.post("/v1/vms", {"flavor": "small", "image": "empty", "count": THOUSAND, "mode": "best-effort"})
        operation = caller.follow(asked["operation_id"])
        figures.add(f"{name}.seconds", time.monotonic() - started, "s")
        running = sum(item["state"] == "succeeded" for item in operation["items"])
        figures.add(f"{name}.running", running, "VMs", bar=f">= {THOUSAND * 0.999 if fail_every else THOUSAND:.0f}")
        domains = [vm_id for ids in cloud.domains().values() for vm_id in ids]
        figures.add(f"{name}.leaked", len(domains) - running + len(domains) - len(set(domains)), "domains", bar="0")
        in_use = len(cloud.addresses_in_use())
        figures.add(f"{name}.leaked_addresses", in_use - running, "addresses", bar="0")
        figures.add(f"{name}.runs", operation["counters"]["runs"], "count")
    finally:
        cloud.remove()
