# SPDX-License-Identifier: Apache-2.0
"""The orchestrator's settings: every number has bounds, in the file and in the environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ppec_contract.errors import PpecError
from ppec_orchestrator.settings import Settings

NUMBERS = [name for name, field in Settings.model_fields.items() if field.annotation in (int, float)]


def written(folder: Path, name: str, value: object) -> Path:
    path = folder / "orchestrator.toml"
    path.write_text(f"{name} = {json.dumps(value)}\n")
    return path


def _shown(name: str, value: int) -> str:
    return str(value) if Settings.model_fields[name].annotation is int else f"{value:g}"


def test_there_are_numbers() -> None:
    assert len(NUMBERS) == 13


@pytest.mark.parametrize("value", [-1, 10**18])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_out_of_bounds_is_refused(tmp_path: Path, name: str, value: int) -> None:
    path = written(tmp_path, name, value)
    with pytest.raises(PpecError) as refused:
        Settings.load(path)
    assert refused.value.message.startswith(f"settings {path}: {name}: Value error, wanted ")
    assert refused.value.message.endswith(f", found {_shown(name, value)}")


@pytest.mark.parametrize("value", ["inf", "nan", "1e9", "0"])
def test_the_environment_has_the_same_bounds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str) -> None:
    monkeypatch.setenv("PPEC_HEARTBEAT_INTERVAL_S", value)
    with pytest.raises(PpecError, match=r"heartbeat_interval_s: Value error, wanted 0\.5 to 3600 s, found "):
        Settings.load(written(tmp_path, "port", 8443))


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("port", 0, 65535),
        ("heartbeat_interval_s", 0.5, 3600.0),
        ("report_interval_s", 1.0, 86400.0),
        ("liveness_flush_s", 0.01, 60.0),
        ("max_body_bytes", 1024, 256 * 1024**2),
        ("max_image_bytes", 1, 16 * 1024**4),
        ("enrolment_token_lifetime_s", 1.0, 30 * 86400.0),
        ("netbox_standing", 1, 1000),
        ("netbox_interval_s", 0.1, 3600.0),
    ],
)
def test_the_bounds_are_those_of_the_readme(tmp_path: Path, name: str, least: float, most: float) -> None:
    for value in (least, most):
        assert getattr(Settings.load(written(tmp_path, name, value)), name) == value
    for value in (least - 1, most + 1):
        with pytest.raises(PpecError, match=name):
            Settings.load(written(tmp_path, name, value))
