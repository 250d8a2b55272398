# SPDX-License-Identifier: Apache-2.0
"""Specifications of VMs, and the image that they are made of."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ppec_contract.vm import VmSpec

IMAGE = b"PPEC" + bytes(1024 * 1024 - 4)
IMAGE_SHA256 = hashlib.sha256(IMAGE).hexdigest()


@pytest.fixture(scope="session")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "small.raw"
    path.write_bytes(IMAGE)
    return path


@pytest.fixture
def vm(image_file: Path) -> Callable[..., VmSpec]:
    """Makes a VM's specification: two vCPUs, 512 MiB, a disk of 16 MiB, one NIC on br0."""
    made = iter(range(1, 10_000))

    def make(name: str | None = None, **changes: Any) -> VmSpec:
        number = next(made)
        image = {
            "name": "small",
            "sha256": IMAGE_SHA256,
            "size_bytes": len(IMAGE),
            "format": "raw",
            "url": image_file.as_uri(),
        }
        document: dict[str, Any] = {
            "vm_id": str(uuid.uuid4()),
            "name": name or f"vm-{number}",
            "vcpus": 2,
            "memory_mib": 512,
            "cells": [0],
            "root_disk": {"size_mib": 16, "image": image | changes.pop("image", {}), "pool": changes.pop("pool", None)},
            "nics": [{"mac": f"52:54:00:00:{number // 256:02x}:{number % 256:02x}", "bridge": "br0"}],
        }
        return VmSpec.model_validate_json(json.dumps(document | changes, default=str))

    return make
