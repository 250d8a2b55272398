# SPDX-License-Identifier: Apache-2.0
"""What a host says of itself has bounds, and agents keep within them whatever they find."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ppec_contract.host import Drift, DriftKind, HealthFinding, HealthLevel, HostReport, Vitals
from ppec_contract.vm import VmInfo
from ppec_contract.words import (
    LONGEST_SHORT,
    LONGEST_WORDS,
    MAX_CHECKS,
    MAX_DRIFT,
    MAX_PARTS,
    MAX_PINS,
    MAX_VMS,
    SAID_WORDS,
    short,
    words,
)

from .host_reports import report

# Surrogates too: so does Python show a file's name that is no UTF-8.
TEXTS = st.text(st.characters(), max_size=20).flatmap(lambda text: st.integers(0, 400).map(lambda n: text * n))


@given(TEXTS)
def test_whatever_is_found_can_be_said(text: str) -> None:
    said = Drift(kind=DriftKind.DISKS, name=short(text), before=words(text), after=words(text))
    assert Drift.model_validate_json(said.model_dump_json()) == said
    assert len(said.name) <= LONGEST_SHORT
    assert len(said.after) <= SAID_WORDS
    assert words(said.after) == said.after


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ("as it is", "as it is"),
        ("two  spaces", "two  spaces"),
        ("two\nlines\r\n", "two lines"),
        ("a\x00b\x1b[2J", "a?b?[2J"),
        ("\udcff", "?"),
        ("x" * SAID_WORDS, "x" * SAID_WORDS),
        ("x" * (SAID_WORDS + 1), "x" * (SAID_WORDS - 1) + "…"),
    ],
)
def test_how_it_is_said(found: str, said: str) -> None:
    assert words(found) == said


VM = {"vm_id": "8f14e45f-ceea-467f-9c3f-0c5f1e4b2a3d", "name": "v", "state": "running", "managed": True, "vcpus": 2}
VM |= {"memory_mib": 64}
DRIVE = {"name": "sda", "size_mib": 1, "rotational": True}
HOSTILE: list[tuple[type[Any], dict[str, Any]]] = [
    (HealthFinding, {"found": "x" * (LONGEST_WORDS + 1)}),
    (HealthFinding, {"found": "a\x00b"}),
    (HealthFinding, {"check": "x" * (LONGEST_SHORT + 1)}),
    (HealthFinding, {"check": "a\nb"}),
    (Drift, {"name": "x" * (LONGEST_SHORT + 1)}),
    (Drift, {"before": "x" * (LONGEST_WORDS + 1)}),
    (Drift, {"after": "a\x1bb"}),
    (Vitals, {"health": [{"check": "c", "level": "ok", "found": ""}] * (MAX_CHECKS + 1)}),
    (Vitals, {"use": {"free_mib": {str(number): 1 for number in range(100)}}}),
    (Vitals, {"use": {"free_mib": {"x" * 300: 1}}}),
    (HostReport, {"drift": [{"kind": "pins"}] * (MAX_DRIFT + 1)}),
    (HostReport, {"vms": [VM] * (MAX_VMS + 1)}),
    (HostReport, {"drives": [DRIVE] * (MAX_PARTS + 1)}),
    (HostReport, {"bridges": ["b"] * (MAX_PARTS + 1)}),
    (HostReport, {"kernel_version": "x" * 300}),
    (HostReport, {"capabilities": ["x" * 300]}),
    (VmInfo, {"name": "x" * 300}),
    (VmInfo, {"pins": [{"vcpu": 0, "pcpu": 0}] * (MAX_PINS + 1)}),
    (VmInfo, {"vcpus": 2**31}),
    (VmInfo, {"macs": ["x" * 300]}),
]
WELL: dict[type[Any], Any] = {
    HealthFinding: HealthFinding(check="c", level=HealthLevel.OK, found="f").model_dump(mode="json"),
    Drift: {"kind": "pins"},
    Vitals: {},
    HostReport: report().model_dump(mode="json"),
    VmInfo: VM,
}


def test_lines_of_the_first_agents_are_taken() -> None:
    for model, change in ((HealthFinding, {"found": "a\nb\tc"}), (Drift, {"after": "a\r\nb"})):
        assert model.model_validate(WELL[model] | change).model_dump(mode="json").items() >= change.items()


@pytest.mark.parametrize(("model", "change"), HOSTILE, ids=[f"{m.__name__}-{'.'.join(c)}" for m, c in HOSTILE])
def test_what_is_longer_is_refused(model: type[Any], change: dict[str, Any]) -> None:
    model.model_validate(WELL[model])
    with pytest.raises(ValidationError):
        model.model_validate(WELL[model] | change)
