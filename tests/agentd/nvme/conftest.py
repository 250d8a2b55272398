# SPDX-License-Identifier: Apache-2.0
"""An agent whose fake machine has drives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ppec_agentd.recovery import recover

from .agent_with_drives import CELLS, DRIVES, Scenario


@pytest.fixture
def settings(short_dir: Path, words: Any) -> Any:
    return words.settings_of(short_dir, nvme={"drives": list(DRIVES)}, lab={"nvme_drives": CELLS})


@pytest.fixture
def run(settings: Any, words: Any) -> Callable[[Scenario], None]:
    """Each scenario is a life of an agent on the same host, from its recovery to its end."""

    def run(scenario: Scenario, *, settled: bool = True) -> None:
        async def life() -> None:
            async with words.open_agent(settings) as agent:
                await recover(agent.context)
                if settled:
                    await agent.context.drives.idle()
                await scenario(agent)

        asyncio.run(life())

    return run
