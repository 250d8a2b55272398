# SPDX-License-Identifier: Apache-2.0
"""One operation retunes its host for one VM after another: each plan is carried out, and each of them once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from ppec_agentd.actions.retune import HOST_ID, flight_of, is_flight
from ppec_agentd.connection import Call
from ppec_agentd.report import CAPABILITIES
from ppec_contract.agent import RetuneHost
from ppec_contract.retune import RetunePlan
from ppec_contract.version import Capability

FOUR_CELLS = {"lab": {"topology": "sockets=4,cores=4,memory_mib=8192", "bridges": ["br0"]}}


async def planned(agent: Any, cell: int) -> RetunePlan:
    want = {"vcpus": 4, "memory_mib": 512, "cells": [cell]}
    replies = [reply async for reply in agent.service.answer(Call("cloud.ppec.agent.PlanRetune", {"want": want}))]
    assert replies[-1].error is None, replies[-1]
    return RetunePlan.model_validate(replies[-1].parameters["plan"], strict=False)


def test_each_plan_of_one_operation_is_carried_out_once(short_dir: Path, words: Any, vm: Any) -> None:
    async def main() -> None:
        async with words.open_agent(words.settings_of(short_dir, **FOUR_CELLS)) as agent:
            await agent.create(*(vm(name, vcpus=2, cells=[cell]) for cell, name in enumerate("abcd")))
            for cell in (0, 2):
                call = RetuneHost(operation_id="create-1", fence=1, plan=await planned(agent, cell))
                (moved,) = await agent.run(call)
                assert (moved.problem, moved.changed, moved.replayed) == (None, True, False)
                assert moved.vm.cells != (cell,)
                (again,) = await agent.run(call)
                assert (again.problem, again.replayed, again.vm.cells) == (None, True, moved.vm.cells)
                (made,) = await agent.create(vm(f"wide-{cell}", vcpus=4, cells=[cell]), operation="create-1")
                assert made.problem is None

    asyncio.run(main())


def test_hosts_say_that_they_can() -> None:
    """Orchestrators have cells opened for creates only where they do."""
    assert Capability.SEVERAL_RETUNES in CAPABILITIES


@pytest.mark.parametrize("vm_id", [UUID(int=1), UUID("00000000-0000-4000-8000-000000000000"), UUID(int=(1 << 64) - 1)])
def test_no_vm_is_taken_for_a_retune(vm_id: UUID) -> None:
    assert not is_flight(vm_id)


def test_retunes_have_ids_of_their_plans() -> None:
    one, other = (RetunePlan(opened=(cell,), moves=(), before=(), after=()) for cell in (0, 1))
    assert flight_of(one) == flight_of(one) != flight_of(other)
    assert all(is_flight(each) for each in (flight_of(one), flight_of(other), HOST_ID))
