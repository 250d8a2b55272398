# SPDX-License-Identifier: Apache-2.0
"""What the agent's tests share. The fixtures lie beside this file, by subject: agent_settings.py, agent_process.py,
orchestrator_double.py, vm_specs.py, hypervisor_suite.py, file_systems.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ppec_agentd.settings import Settings

from .agent_in_process import NOTHING, open_agent
from .agent_process import agent_process
from .agent_settings import settings, settings_of, settings_with_pool
from .crash_points import CrashPoints, Scenario, crash_everywhere, memory_dir, tiny_vm
from .file_systems import file_system, mounted
from .fleet_certificates import FleetCa
from .hypervisor_suite import host, libvirtd
from .orchestrator_double import orchestrator
from .vm_specs import IMAGE, IMAGE_SHA256, image_file, vm

# Where assertions stand outside a test's file: they show what they compared nonetheless.
pytest.register_assert_rewrite(f"{__package__}.resizing")

# pytest finds the fixtures here.
__all__ = [
    "agent_process",
    "file_system",
    "host",
    "image_file",
    "libvirtd",
    "memory_dir",
    "mounted",
    "orchestrator",
    "settings",
    "tiny_vm",
    "vm",
    "words",
]


@dataclass(frozen=True)
class Words:
    """What test files use beside fixtures: test folders are no packages to import from."""

    open_agent: Callable[[Settings], Any] = open_agent
    settings_of: Callable[..., Settings] = settings_of
    settings_with_pool: Callable[..., Settings] = settings_with_pool
    fleet_ca: Callable[[Path], FleetCa] = FleetCa
    crash_everywhere: Callable[..., CrashPoints] = crash_everywhere
    crash_scenario: Callable[..., Scenario] = Scenario
    nothing: dict[str, object] = field(default_factory=lambda: dict(NOTHING))
    image: bytes = IMAGE
    image_sha256: str = IMAGE_SHA256


@pytest.fixture(scope="session")
def words() -> Words:
    return Words()
