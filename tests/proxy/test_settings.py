# SPDX-License-Identifier: Apache-2.0
"""The proxy's settings: every number has bounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppec_contract.errors import PpecError
from ppec_proxy.settings import Settings, load

NUMBERS = [name for name, field in Settings.model_fields.items() if field.annotation in (int, float)]
NEEDED = 'allow_from = ["127.0.0.1/32"]\ncertificate_path = "c"\nkey_path = "k"\nca_path = "a"\n'


def test_there_are_numbers() -> None:
    assert len(NUMBERS) == 9


@pytest.mark.parametrize("value", [-1, 10**18])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_out_of_bounds_is_refused(tmp_path: Path, name: str, value: int) -> None:
    path = tmp_path / "proxy.toml"
    path.write_text(f"{NEEDED}{name} = {value}\n")
    with pytest.raises(PpecError) as refused:
        load(path)
    assert refused.value.message.startswith(f"settings {path}: {name}: Value error, wanted ")
    shown = str(value) if Settings.model_fields[name].annotation is int else f"{value:g}"
    assert refused.value.message.endswith(f", found {shown}")
