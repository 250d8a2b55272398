# SPDX-License-Identifier: Apache-2.0
"""What N+1 warns of, in words for a reader."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ppec_contract.api_placement import ExposedView
    from ppec_orchestrator.cli.output import Output


def say_exposed(output: Output, exposed: Iterable[ExposedView]) -> None:
    for each in exposed:
        vms = "1 VM" if each.without_place == 1 else f"{each.without_place} VMs"
        output.say(f"{each.domain} is exposed: its loss leaves {vms} without a place, {each.vm} first")
