# SPDX-License-Identifier: Apache-2.0
"""Policies from a request to the report, and back from the domains after a restart, on the fake hypervisor."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from ppec_agentd.recovery import recover
from ppec_contract.host import CellReport

TOPOLOGY = "sockets=2,cores=6,threads=2,memory_mib=8192,huge_2m=1024"
RESERVE = {"cores_per_cell": 1, "memory_per_cell_mib": 0, "shared_cores_per_cell": 1, "shared_vcpus_per_cpu": 3}


def free(cells: tuple[CellReport, ...]) -> list[tuple[int, int, int, int]]:
    return [
        (cell.cores_free, cell.memory_free_mib, cell.huge_pages[0].pages_free, cell.shared_vcpus_free) for cell in cells
    ]


def test_every_policy_is_held_reported_and_found_again(short_dir: Path, words: Any, vm: Any) -> None:
    settings = words.settings_of(short_dir, lab={"topology": TOPOLOGY, "bridges": ["br0"]}, reserve=RESERVE)
    empty, used = (4, 6144, 1024, 6), [(1, 6144 - 256 - 256 - 64, 1024, 6 - 2), (4 - 1 - 1, 6144 - 256, 1024 - 256, 6)]

    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            assert free(agent.context.ledger.cells()) == [empty, empty]
            results = await agent.create(
                vm("sharing", numa={"cpus": "shared"}, memory_mib=256),
                vm("wide", vcpus=4, cells=[0, 1], numa={"multi_cell": True}, memory_mib=512),
                vm("isolated", vcpus=2, numa={"smt": "isolate"}, memory_mib=64),
                vm("paged", cells=[1], numa={"huge_page_kib": 2048}, memory_mib=512),
            )
            assert [result.problem for result in results] == [None] * 4
            first = free(agent.context.ledger.cells())
        async with words.open_agent(settings) as again:
            assert free(again.context.ledger.cells()) == [empty, empty]
            await recover(again.context)
            assert free(again.context.ledger.cells()) == first == used
            assert again.context.ledger.audit(await again.hypervisor.domains()) == ()
            await again.delete(*(result.vm_id for result in results), operation="op-2")
            assert free(again.context.ledger.cells()) == [empty, empty]

    asyncio.run(scenario())
