# SPDX-License-Identifier: Apache-2.0
"""What drives say of their own health, from smartctl's JSON (smartmontools, `smartctl --json`). Pure.

smartctl speaks of ATA, SCSI and NVMe drives with keys of their own beside some common ones; one that is not there is
not judged. A drive that can say nothing (a virtual one, one behind a RAID controller) is a note and no trouble.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Bits of `critical_warning` (NVM Express Base Specification, SMART / Health Information log).
_NVME_ERRORS = {0x01: "spare blocks are used up", 0x04: "reliability is degraded", 0x08: "is read-only"}
_NVME_WARNINGS = {0x02: "is too hot or too cold", 0x10: "the backup of its volatile memory failed"}
# ATA attributes whose raw value counts sectors: reallocated ones are ordinary up to some, the others never are.
_REALLOCATED, _PENDING, _UNCORRECTABLE = 5, 197, 198
MANY_REALLOCATED = 10
WORN_PERCENT = 100


@dataclass(frozen=True, slots=True)
class SmartDrive:
    """`failing` is what has failed, `troubles` what may; `unknown` why nothing is known. All in words."""

    name: str
    failing: tuple[str, ...] = ()
    troubles: tuple[str, ...] = ()
    unknown: str = ""


@dataclass(frozen=True, slots=True)
class SmartFigures:
    """`problem` says why no drive could be asked, or not for long; what was said before stands."""

    drives: tuple[SmartDrive, ...] = ()
    problem: str = ""


def drive_of(name: str, answer: str) -> SmartDrive:
    """From the text that `smartctl --json --info --health --attributes` printed of this drive."""
    try:
        said = json.loads(answer)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        return SmartDrive(name, unknown="smartctl's answer can't be read")
    nvme = _part(said, "nvme_smart_health_information_log")
    passed = _part(said, "smart_status").get("passed")
    if not isinstance(passed, bool) and not nvme:
        return SmartDrive(name, unknown=_why_not(said))
    failing = [] if passed is not False else ["says that it is failing"]
    failing += [*_nvme_words(nvme, _NVME_ERRORS), *_attributes_failing(said)]
    troubles = [*_nvme_words(nvme, _NVME_WARNINGS), *_counted(said, nvme)]
    return SmartDrive(name, tuple(failing), tuple(troubles))


def _why_not(said: dict[str, Any]) -> str:
    messages = _part(said, "smartctl").get("messages")
    texts = [one.get("string") for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []
    return next((text for text in texts if isinstance(text, str) and text), "says nothing of its health")


def _nvme_words(nvme: dict[str, Any], words: dict[int, str]) -> Iterator[str]:
    bits = _count(nvme.get("critical_warning"))
    yield from (text for bit, text in words.items() if bits & bit)


def _attributes_failing(said: dict[str, Any]) -> Iterator[str]:
    for attribute in _attributes(said):
        if attribute.get("when_failed") == "now":
            yield f"attribute {attribute.get('id')} is below its threshold"


def _counted(said: dict[str, Any], nvme: dict[str, Any]) -> Iterator[str]:
    raw = {_count(one.get("id")): _count(_part(one, "raw").get("value")) for one in _attributes(said)}
    reallocated = raw.get(_REALLOCATED, 0) + _count(said.get("scsi_grown_defect_list"))
    if reallocated >= MANY_REALLOCATED:
        yield f"{reallocated} reallocated sectors"
    if pending := raw.get(_PENDING, 0):
        yield f"{pending} sectors that can't be read"
    if uncorrectable := raw.get(_UNCORRECTABLE, 0):
        yield f"{uncorrectable} sectors that can't be corrected"
    if errors := _count(nvme.get("media_errors")):
        yield f"{errors} media errors"
    if (worn := _count(nvme.get("percentage_used"))) >= WORN_PERCENT:
        yield f"{worn} % of its life used"


def _attributes(said: dict[str, Any]) -> Iterator[dict[str, Any]]:
    table = _part(said, "ata_smart_attributes").get("table")
    yield from (one for one in table if isinstance(one, dict)) if isinstance(table, list) else ()


def _part(said: dict[str, Any], name: str) -> dict[str, Any]:
    part = said.get(name)
    return part if isinstance(part, dict) else {}


def _count(value: Any) -> int:
    """No counter has more than 64 bits, and Python refuses to print a number of thousands of digits."""
    return min(value, 2**64) if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0
