# SPDX-License-Identifier: Apache-2.0
"""Settings of an agent on the fake hypervisor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ppec_agentd.settings import Settings

TOPOLOGY = "sockets=2,cores=4,threads=2,memory_mib=8192"


def settings_of(folder: Path, **changes: Any) -> Settings:
    """Settings of an agent on the fake hypervisor, whole in `folder`; `changes` replace sections' values."""
    document: dict[str, Any] = {
        "host": "h1",
        "hypervisor": "fake",
        "socket": {"path": str(folder / "agentd.sock"), "group": ""},
        "storage": {"state_dir": str(folder / "state"), "disk_mib": 100_000},
        "reserve": {"memory_per_cell_mib": 0},
        "lab": {"topology": TOPOLOGY, "bridges": ["br0"]},
    }
    for section, values in changes.items():
        document[section] = {**document.get(section, {}), **values} if isinstance(values, dict) else values
    return Settings.model_validate(document)


def settings_with_pool(folder: Path, **changes: Any) -> Settings:
    """The same with storage pool `fast`, which is there."""
    path = folder / "state" / "pools" / "fast"
    path.mkdir(parents=True, exist_ok=True)
    pools = {"fast": {"path": str(path), "disk_mib": 1000}}
    return settings_of(folder, **changes | {"storage": {"pools": pools} | changes.get("storage", {})})


@pytest.fixture
def settings(short_dir: Path) -> Settings:
    return settings_of(short_dir)
