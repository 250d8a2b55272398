# SPDX-License-Identifier: Apache-2.0
"""Asks the drives for their health and leaves the answers in a file: `ppec-agentd read-smart`, from a timer.

A process of its own, because asking takes capabilities (CAP_SYS_RAWIO, CAP_SYS_ADMIN) that the agent doesn't have, and
because a drive that hangs may keep who asks it for ever. It looks into no answer: that is left to the agent.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ppec_agentd.inventory import read_drives
from ppec_agentd.smart import SmartDrive, SmartFigures, drive_of
from ppec_contract.errors import PpecError
from ppec_contract.frames import decode_json_object

SMART_FILE = Path("/run/ppec-smart/smart.json")
# A drive answers in milliseconds; one in trouble may try for some seconds.
ANSWER_S = 15.0
KILLED_S = 1.0
MAX_ANSWER_BYTES = 128 * 1024
MAX_FILE_BYTES = 8 * 1024 * 1024
# The timer asks every half hour.
LONGEST_AGE_S = 2 * 3600.0
# smartctl(8): a drive that sleeps is left alone, and this is the exit status then, which nothing else has.
_ASLEEP = 3
_ARGUMENTS = ("--json=c", f"--nocheck=standby,{_ASLEEP}", "--info", "--health", "--attributes")


def read_smart(file: Path = SMART_FILE, tool: str = "smartctl", root: Path = Path("/")) -> None:
    """Asks each drive of the machine in turn and replaces the file. Of one that sleeps the last answer stands.

    In the file: `tool` is "" if there is none, `drives` has by name what was printed, or "" where no answer came.
    """
    found = shutil.which(tool)
    before = _answers(file)
    names = [drive.name for drive in read_drives(root)] if found else []
    drives = {name: _ask((found or "", *_ARGUMENTS, *_kind(name, root)), name, before) for name in names}
    aside = file.with_suffix(".new")
    aside.write_text(json.dumps({"tool": found or "", "drives": drives}), encoding="utf-8")
    aside.replace(file)


def read_figures(file: Path, now_s: float | None = None) -> SmartFigures:
    """What the drives said last. Blocking, and never longer than it takes to read a file."""
    try:
        age_s = (time.time() if now_s is None else now_s) - file.stat().st_mtime
        with file.open("rb") as opened:
            said = decode_json_object(opened.read(MAX_FILE_BYTES))
        tool, drives = said["tool"], said["drives"]
        texts = {str(name): str(answer) for name, answer in drives.items()}
    except FileNotFoundError:
        return SmartFigures(problem="not read on this host: ppec-smart.timer has left no answer")
    except (OSError, PpecError, ValueError, KeyError, AttributeError):
        return SmartFigures(problem=f"{file} can't be read")
    problem = "" if tool else "smartctl is not installed"
    if age_s > LONGEST_AGE_S:
        problem = f"last read {age_s / 3600:.0f} h ago: see ppec-smart.service"
    return SmartFigures(tuple(_drive(name, texts[name]) for name in sorted(texts)), problem)


def _drive(name: str, answer: str) -> SmartDrive:
    return drive_of(name, answer) if answer else SmartDrive(name, unknown="gave no answer")


def _kind(drive: str, root: Path) -> tuple[str, ...]:
    """smartctl(8): to find out what it talks to, it might wake a drive that sleeps. The kernel knows already."""
    if drive.startswith("nvme"):
        return ("--device=nvme",)
    if not drive.startswith("sd"):
        return ()
    try:
        vendor = (root / "sys/block" / drive / "device/vendor").read_text(errors="replace").strip()
    except OSError:
        return ()
    return ("--device=sat",) if vendor == "ATA" else ("--device=scsi",)


def _ask(command: tuple[str, ...], drive: str, before: dict[str, str]) -> str:
    # Its name comes from the kernel and is after a path: it can be no option.
    status, answer = run_bounded((*command, f"/dev/{drive}"), ANSWER_S)
    return before.get(drive, answer) if status == _ASLEEP else answer


def run_bounded(command: Sequence[str], timeout_s: float) -> tuple[int | None, str]:
    """Exit status and output; (None, "") after the timeout. Who can't even be killed (it waits for a drive, in the
    kernel) is not waited for: the unit's control group has it still, and no second one is started until it ends."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.DEVNULL, env={"LC_ALL": "C"}
        )
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KILLED_S)
            return None, ""
        size = os.fstat(output.fileno()).st_size
        output.seek(0)
        return status, output.read().decode(errors="replace") if size <= MAX_ANSWER_BYTES else ""


def _answers(file: Path) -> dict[str, str]:
    try:
        drives = json.loads(file.read_text(encoding="utf-8"))["drives"]
        return {str(name): str(answer) for name, answer in drives.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
