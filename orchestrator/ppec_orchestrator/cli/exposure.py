# SPDX-License-Identifier: Apache-2.0
"""N+1 in words: how the rule is given and shown, and what it warns of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppec_contract.api_placement import ExposedView, NPlusOne
    from ppec_orchestrator.cli.output import Output


RULE_HELP = "off, warn or required; with :rack after the loss of a rack in place of a host."


def rule_given(text: str) -> dict[str, Any]:
    """`required:rack` as the API has it; what is wrong with it the contract says."""
    mode, _, level = text.partition(":")
    return {"mode": mode} | ({"level": level} if level else {})


def rule_shown(rule: NPlusOne) -> str:
    """As it is given."""
    return f"{rule.mode}:{rule.level}" if rule.level != "host" else rule.mode


def say_exposed(output: Output, exposed: Iterable[ExposedView]) -> None:
    for each in exposed:
        vms = "1 VM" if each.without_place == 1 else f"{each.without_place} VMs"
        output.say(f"{each.domain} is exposed: its loss leaves {vms} without a place, {each.vm} first")
