# SPDX-License-Identifier: Apache-2.0
"""`ppec-agentd doctor`: look, judge, print."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from ppec_agentd.doctor.checks import examine
from ppec_agentd.doctor.findings import Finding, Level, exit_code, worst
from ppec_agentd.doctor.gather import take_snapshot
from ppec_agentd.settings import load
from ppec_contract.errors import PpecError

Output = Literal["text", "json"]


def run_doctor(config: Path, output: Output) -> int:
    """Prints the findings and returns the exit code. Settings that can't be read are the one finding then."""
    try:
        settings = load(config)
    except PpecError as error:
        advice = "Correct the file; the agentd role writes it."
        findings: tuple[Finding, ...] = (
            Finding("settings", Level.ERROR, f"settings {config}", error.message, "a valid file", advice),
        )
        host = ""
    else:
        findings, host = examine(take_snapshot(settings)), settings.host
    sys.stdout.write(as_json(host, findings) if output == "json" else as_text(findings))
    return exit_code(worst(findings))


def as_json(host: str, findings: tuple[Finding, ...]) -> str:
    rows = [asdict(finding) | {"level": finding.level.name.lower()} for finding in findings]
    document = {"host": host, "worst": worst(findings).name.lower(), "findings": rows}
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def as_text(findings: tuple[Finding, ...]) -> str:
    """One line each, what to do below it, the worst last: it is what stands above the prompt."""
    lines = []
    for finding in sorted(findings, key=lambda finding: finding.level):
        wanted = f" (wanted: {finding.wanted})" if finding.wanted else ""
        lines.append(f"{finding.level.name.lower():8}{finding.subject}: {finding.found}{wanted}")
        if finding.advice:
            lines.append(f"        -> {finding.advice}")
    counts = Counter(finding.level for finding in findings)
    lines.append(", ".join(f"{counts[level]} {level.name.lower()}" for level in reversed(Level) if counts[level]))
    return "\n".join(lines) + "\n"
