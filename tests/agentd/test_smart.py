# SPDX-License-Identifier: Apache-2.0
"""Drives' own words, as smartctl prints them, and a reader that waits for none of them for long."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppec_agentd import smart_reader
from ppec_agentd.health import judge
from ppec_agentd.serve import main
from ppec_agentd.smart import MANY_REALLOCATED, SmartDrive, SmartFigures, drive_of
from ppec_agentd.smart_reader import LONGEST_AGE_S, read_figures, read_smart, run_bounded
from ppec_contract.host import HealthLevel

from .test_health import WELL

OK, NOTE, WARNING, ERROR = HealthLevel


def attribute(number: int, raw: int, when_failed: str = "") -> dict[str, Any]:
    known = {"name": "Some_Count", "value": 100, "worst": 100, "thresh": 10, "flags": {"prefailure": True}}
    return {"id": number, "when_failed": when_failed, "raw": {"value": raw, "string": str(raw)}, **known}


def smartctl(**parts: Any) -> dict[str, Any]:
    """The keys of smartctl 7's JSON around what it says of one drive."""
    tool = {"version": [7, 3], "argv": ["smartctl"], "exit_status": 0}
    return {"json_format_version": [1, 0], "smartctl": tool, "device": {"name": "/dev/x", "type": "x"}, **parts}


def ata(*attributes: dict[str, Any], passed: bool = True) -> dict[str, Any]:
    support = {"available": True, "enabled": True}
    table = {"revision": 16, "table": [attribute(9, 36055), *attributes]}
    return smartctl(smart_support=support, smart_status={"passed": passed}, ata_smart_attributes=table)


def nvme(passed: bool = True, **values: int) -> dict[str, Any]:
    log = {"critical_warning": 0, "temperature": 36, "available_spare": 100, "available_spare_threshold": 10}
    log |= {"percentage_used": 3, "media_errors": 0, "data_units_read": 2**62, "unsafe_shutdowns": 7}
    return smartctl(smart_status={"passed": passed}, nvme_smart_health_information_log=log | values)


def scsi(grown: int, passed: bool = True) -> dict[str, Any]:
    return smartctl(smart_status={"passed": passed}, scsi_grown_defect_list=grown)


UNABLE = {"messages": [{"string": "/dev/vda: Unable to detect device type", "severity": "error"}], "exit_status": 1}
CASES: list[tuple[str, dict[str, Any], HealthLevel, str]] = [
    ("ata", ata(), OK, "says that it is well"),
    ("ata-reallocated-some", ata(attribute(5, MANY_REALLOCATED - 1)), OK, "says that it is well"),
    ("ata-reallocated-many", ata(attribute(5, MANY_REALLOCATED)), WARNING, "10 reallocated sectors"),
    ("ata-pending", ata(attribute(197, 1)), WARNING, "1 sectors that can't be read"),
    ("ata-uncorrectable", ata(attribute(198, 2)), WARNING, "2 sectors that can't be corrected"),
    ("ata-failed-once", ata(attribute(190, 60, "past")), OK, "says that it is well"),
    ("ata-below-threshold", ata(attribute(10, 9, "now")), ERROR, "attribute 10 is below its threshold"),
    ("ata-failing", ata(attribute(197, 3), passed=False), ERROR, "says that it is failing; 3 sectors"),
    ("nvme", nvme(), OK, "says that it is well"),
    ("nvme-hot", nvme(critical_warning=2), WARNING, "is too hot or too cold"),
    ("nvme-spare", nvme(passed=False, critical_warning=1), ERROR, "says that it is failing; spare blocks are used up"),
    ("nvme-read-only", nvme(critical_warning=12), ERROR, "reliability is degraded; is read-only"),
    ("nvme-no-backup", nvme(critical_warning=16), WARNING, "the backup of its volatile memory failed"),
    ("nvme-errors", nvme(media_errors=4), WARNING, "4 media errors"),
    ("nvme-worn", nvme(percentage_used=100), WARNING, "100 % of its life used"),
    ("scsi", scsi(3), OK, "says that it is well"),
    ("scsi-defects", scsi(30), WARNING, "30 reallocated sectors"),
    ("scsi-failing", scsi(0, passed=False), ERROR, "says that it is failing"),
    ("endless", scsi(10**4000), WARNING, "18446744073709551616 reallocated sectors"),
    ("unsupported", smartctl(smartctl=UNABLE), NOTE, "/dev/vda: Unable to detect device type"),
    ("silent", smartctl(), NOTE, "says nothing of its health"),
    ("not-a-verdict", smartctl(smart_status={"passed": "yes"}), NOTE, "says nothing of its health"),
]


@pytest.mark.parametrize(("said", "level", "found"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_a_drive_says_is_one_check(said: dict[str, Any], level: HealthLevel, found: str) -> None:
    drive = drive_of("sda", json.dumps(said))
    told = {f.check: f for f in judge(replace(WELL, smart=SmartFigures((drive,)))) if f.check.startswith("smart")}
    assert told.keys() == {"smart sda"}
    assert told["smart sda"].level is level
    assert told["smart sda"].found.startswith(found)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
KEYS = st.sampled_from(
    ["smartctl", "smart_status", "ata_smart_attributes", "nvme_smart_health_information_log", "scsi_grown_defect_list"]
)
INNER = st.dictionaries(st.sampled_from(["passed", "messages", "table", "critical_warning", "media_errors"]), JSON)


@given(st.text() | JSON.map(json.dumps) | st.dictionaries(KEYS, JSON | INNER).map(json.dumps))
def test_any_answer_is_judged(answer: str) -> None:
    judge(replace(WELL, smart=SmartFigures((drive_of("sda", answer),))))


@pytest.mark.parametrize("answer", ["", "x", "[]", "[" * 100_000, '{"smart_status": {"passed": true}'])
def test_an_answer_that_is_none_is_no_verdict(answer: str) -> None:
    assert drive_of("sda", answer) == SmartDrive("sda", unknown="smartctl's answer can't be read")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """An ATA and a SCSI drive, an NVMe one, a virtual one, and a loop device."""
    for name, vendor in (("sda", "ATA     "), ("sdb", "HGST"), ("nvme0n1", ""), ("vda", ""), ("loop0", None)):
        block = tmp_path / "root/sys/block" / name
        block.mkdir(parents=True)
        if vendor is not None:
            (block / "device").mkdir()
            (block / "device/vendor").write_text(vendor)
    return tmp_path / "root"


@pytest.fixture
def tool(tmp_path: Path) -> Callable[[str], str]:
    """A program in smartctl's place."""

    def make(script: str) -> str:
        path = tmp_path / "smartctl"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return str(path)

    return make


def test_each_drive_of_the_machine_is_asked_as_what_it_is(
    machine: Path, tool: Callable[[str], str], tmp_path: Path
) -> None:
    asked = tmp_path / "asked"
    script = tool(f"echo \"$@\" >> {asked}; echo '{json.dumps(ata())}'")
    read_smart(tmp_path / "smart.json", script, machine)
    common = "--json=c --nocheck=standby,3 --info --health --attributes"
    assert sorted(asked.read_text().splitlines()) == [
        f"{common} --device=nvme /dev/nvme0n1",
        f"{common} --device=sat /dev/sda",
        f"{common} --device=scsi /dev/sdb",
        f"{common} /dev/vda",
    ]
    drives = tuple(SmartDrive(name) for name in ("nvme0n1", "sda", "sdb", "vda"))
    assert read_figures(tmp_path / "smart.json") == SmartFigures(drives)


def test_of_a_drive_that_sleeps_the_last_answer_stands(
    machine: Path, tool: Callable[[str], str], tmp_path: Path
) -> None:
    file = tmp_path / "smart.json"
    read_smart(file, tool(f"echo '{json.dumps(ata(attribute(197, 1)))}'"), machine)
    before = read_figures(file)
    assert [drive.troubles for drive in before.drives] == [("1 sectors that can't be read",)] * 4
    read_smart(file, tool(f"echo '{json.dumps(smartctl())}'; exit 3"), machine)
    assert read_figures(file) == before
    read_smart(file, tool(f"echo '{json.dumps(ata())}'; exit 4"), machine)
    assert [drive.troubles for drive in read_figures(file).drives] == [()] * 4


def test_what_a_drive_said_stands_when_nobody_asks_any_more(
    machine: Path, tool: Callable[[str], str], tmp_path: Path
) -> None:
    file = tmp_path / "smart.json"
    read_smart(file, tool(f"echo '{json.dumps(ata(passed=False))}'"), machine)
    figures = read_figures(file, time.time() + LONGEST_AGE_S + 60)
    levels = {f.check: f.level for f in judge(replace(WELL, smart=figures)) if f.check.startswith("smart")}
    assert levels == {"smart": NOTE} | dict.fromkeys((f"smart {d}" for d in ("nvme0n1", "sda", "sdb", "vda")), ERROR)


def test_a_drive_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    assert run_bounded(("/bin/sh", "-c", "echo x; exec sleep 600"), 0.2) == (None, "")
    assert run_bounded(("/bin/sh", "-c", "echo x; exit 2"), 60) == (2, "x\n")
    endless = ("/bin/sh", "-c", f"head -c {smart_reader.MAX_ANSWER_BYTES + 1} /dev/zero")
    assert run_bounded(endless, 60) == (0, "")


def test_a_host_that_can_not_tell_says_why(machine: Path, tool: Callable[[str], str], tmp_path: Path) -> None:
    file = tmp_path / "smart.json"
    problems = [read_figures(file).problem]
    read_smart(file, "no-such-tool", machine)
    problems.append(read_figures(file).problem)
    problems.append(read_figures(file, time.time() + LONGEST_AGE_S + 60).problem)
    for text in ("", "{}", '{"tool": "x", "drives": []}', '{"tool": 1'):
        file.write_text(text)
        problems.append(read_figures(file).problem)
    assert [problem.removeprefix(f"{file} ") for problem in problems] == [
        "not read on this host: ppec-smart.timer has left no answer",
        "smartctl is not installed",
        "last read 2 h ago: see ppec-smart.service",
        *["can't be read"] * 4,
    ]
    for problem in problems:
        told = [f for f in judge(replace(WELL, smart=SmartFigures(problem=problem))) if f.check.startswith("smart")]
        assert [(finding.check, finding.level) for finding in told] == [("smart", NOTE)]
    # What is there already, whatever it is, keeps no new answer back.
    read_smart(file, tool("echo {}"), machine)
    assert {drive.unknown for drive in read_figures(file).drives} == {"says nothing of its health"}


@pytest.mark.skipif(shutil.which("smartctl") is None, reason="smartmontools is not installed")
def test_the_real_tool_is_understood(tmp_path: Path) -> None:
    """Whatever drives this machine has: each is judged, and those that can say nothing are said to."""
    file = tmp_path / "smart.json"
    assert main(["read-smart", "--file", str(file)]) == 0
    figures = read_figures(file)
    assert figures.problem == ""
    blocks = {block.name for block in Path("/sys/block").iterdir() if (block / "device").exists()}
    assert {drive.name for drive in figures.drives} == blocks
    assert not [drive for drive in figures.drives if "can't be read" in drive.unknown]
