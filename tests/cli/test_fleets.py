# SPDX-License-Identifier: Apache-2.0
"""ppec plan and ppec fleet: through the real program, with no orchestrator anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ppec_contract.api_placement import MAX_PLAN_MOVES
from ppec_contract.errors import PpecError, exit_code
from ppec_orchestrator.cli.fleets import refuse_faults

# Golden files of the readers' own tests: formats are kept in one place.
SNAPSHOT = Path(__file__).parent.parent / "orchestrator" / "fleets" / "golden" / "fleet.json"
NOBODY = "https://127.0.0.1:1"
# Of a plan that refuses VMs.
ANSWER = {"executable", "placed", "refused", "load_cpu_s", "plan_cpu_s", "advice_cpu_s"}


@dataclass
class Ran:
    code: int
    out: bytes
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Program = Callable[..., Ran]


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """The program in a process of its own, whose orchestrator is nobody."""

    def go(*arguments: str) -> Ran:
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PPEC_SERVER": NOBODY}
        command = [str(Path(sys.executable).parent / "ppec"), *arguments]
        ran = subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)
        return Ran(ran.returncode, ran.stdout, ran.stderr.decode())

    return go


@pytest.fixture
def fleet(program: Program, tmp_path: Path) -> str:
    """Twelve hosts and a hundred requests."""
    path = str(tmp_path / "fleet.json")
    made = program("fleet", "generate", "--hosts", "12", "--clusters", "2", "--requests", "100", "--seed", "4", path)
    assert (made.code, made.out, made.err) == (0, b"", "")
    return path


@pytest.mark.parametrize("policy", ["balanced", "pack", "spread"])
def test_a_plan_on_a_file_is_json_and_the_same_each_time(program: Program, fleet: str, policy: str) -> None:
    ran = program("plan", "--fleet", fleet, "--policy", policy, "--output", "json")
    assert (ran.code, ran.err) == (0, "")
    answer = ran.json
    assert set(answer) == ANSWER
    assert answer["executable"] is True
    assert len(answer["placed"]) + len(answer["refused"]) == 100
    assert len(answer["placed"]) > 20
    assert set(answer["placed"][0]) == {"vm", "host", "cells"}
    assert all(sum(each["reasons"].values()) == 12 for each in answer["refused"])
    again = program("plan", "--fleet", fleet, "--policy", policy, "--output", "json").json
    assert (again["placed"], again["refused"]) == (answer["placed"], answer["refused"])


def test_requests_of_a_file_take_the_place_of_the_fleets(program: Program, fleet: str, tmp_path: Path) -> None:
    requests = tmp_path / "requests.json"
    requests.write_text(
        json.dumps(
            {
                "schema": "ppec-requests/1",
                "groups": [{"name": "web"}],
                "batch": [{"name": f"web-{n}", "profile": "c2.4", "groups": ["web"]} for n in range(13)],
            }
        )
    )
    answer = program("plan", "--fleet", fleet, "--requests", str(requests), "-o", "json").json
    hosts = {each["host"] for each in answer["placed"]}
    assert len(hosts) == len(answer["placed"]) <= 12
    assert answer["refused"][-1]["vm"] == "web-12"
    assert answer["refused"][-1]["reasons"]["anti-affinity"] == len(hosts)


def test_what_is_asked_for_besides_is_in_the_answer(program: Program, fleet: str) -> None:
    answer = program("plan", "--fleet", fleet, "--n-plus-one", "warn:rack", "--max-moves", "2", "-o", "json").json
    assert {"exposed", "moves"} < set(answer)


def test_the_largest_go_first_where_all_are_needed(program: Program) -> None:
    ran = program("plan", "--fleet", str(SNAPSHOT), "--mode", "all-or-nothing", "-o", "json")
    assert [each["vm"] for each in ran.json["refused"]] == ["db-2"]


def test_whom_to_refuse_is_left_to_the_planner(program: Program, fleet: str, tmp_path: Path) -> None:
    """Those who ask first have much memory, and two vCPUs each like all others."""
    requests = tmp_path / "requests.json"
    fat = {"name": "fat", "architecture": "x86_64", "shape": {"vcpus": 2, "memory_mib": 131072, "disk_mib": 1024}}
    lean = {"name": "lean", "architecture": "x86_64", "shape": {"vcpus": 2, "memory_mib": 4096, "disk_mib": 1024}}
    batch = [
        {"name": f"{kind}-{n}", "profile": kind} for kind, count in (("fat", 30), ("lean", 300)) for n in range(count)
    ]
    requests.write_text(json.dumps({"schema": "ppec-requests/1", "profiles": [fat, lean], "batch": batch}))
    placed = {}
    for mode in ("best-effort", "most-vcpus"):
        command = ("plan", "--fleet", fleet, "--requests", str(requests), "--mode", mode, "--check", "-o", "json")
        answer = program(*command).json
        assert (answer["faults"], answer["executable"], bool(answer["refused"])) == ([], True, True)
        placed[mode] = len(answer["placed"])
    assert placed["most-vcpus"] > placed["best-effort"]


def test_a_batch_that_needs_all_of_its_vms_is_not_executable_without_one(program: Program, fleet: str) -> None:
    command = ["plan", "--fleet", fleet, "--mode"]
    answers = {mode: program(*command, mode, "-o", "json") for mode in ("all-or-nothing", "best-effort")}
    assert {mode: (ran.code, ran.json["executable"]) for mode, ran in answers.items()} == {
        "all-or-nothing": (0, False),
        "best-effort": (0, True),
    }
    assert all(ran.json["placed"] and ran.json["refused"] for ran in answers.values())
    assert "None of these VMs would be made: the batch needs all of its 100" in program(*command, "all-or-nothing").err
    assert "None of these" not in program(*command, "best-effort").err


def test_a_plan_that_places_nothing_is_not_executable(program: Program) -> None:
    answer = program("plan", "--fleet", str(SNAPSHOT), "-o", "json").json
    assert (answer["placed"], answer["executable"]) == ([], False)


@pytest.mark.parametrize("policy", ["balanced", "pack", "spread"])
def test_a_plan_is_checked_by_who_shares_no_code_with_the_planner(program: Program, fleet: str, policy: str) -> None:
    command = ["plan", "--fleet", fleet, "--policy", policy, "--check"]
    answer = program(*command, "-o", "json").json
    assert set(answer) == ANSWER | {"faults", "check_cpu_s"}
    assert answer["faults"] == []
    assert set(answer["placed"][0]) == {"vm", "host", "cells"}
    placed, refused = len(answer["placed"]), len(answer["refused"])
    ran = program(*command)
    assert ran.code == 0
    assert ran.err.endswith(f"Checked: {placed} placements and {refused} refusals hold.\n")


def test_refused_vms_are_told_what_would_help_by_their_kinds(program: Program, fleet: str) -> None:
    command = ["plan", "--fleet", fleet, "--advise"]
    whole = _with_changes(program(*command, "1000", "-o", "json").json)
    assert all(each["changes"] for each in whole["refused"])
    kinds = {json.dumps(each["changes"]) for each in whole["refused"]}
    assert len(kinds) > 3
    change = whole["refused"][0]["changes"][0]
    assert set(change) == {"kind", "sentence", "details"}
    told = program(*command, "3")
    some = _with_changes(program(*command, "3", "-o", "json").json)
    advised = [each for each in some["refused"] if "changes" in each]
    assert [each["changes"] for each in advised] == [
        each["changes"] for each in whole["refused"] if each["vm"] in {one["vm"] for one in advised}
    ]
    assert len(advised) < len(some["refused"])
    lines = told.err.splitlines()
    assert "12 hosts: " not in told.err, "why they were refused is said in the table, and there alone"
    heads = [line.partition(" and ")[0].rstrip(":") for line in lines if line.endswith(":")]
    kinds_of = {json.dumps(each["changes"]): each["vm"] for each in reversed(advised)}
    assert heads == [each["vm"] for each in advised if each["vm"] in kinds_of.values()]
    table = [row for row in _rows(told.out, "refused VMs") if row.split()[0].isdecimal()]
    assert {row.split()[1] for row in table[:3]} == set(heads)
    assert all(" 12 hosts: " in row for row in table)
    assert sum(int(row.split()[0]) for row in table) == len(some["refused"])
    assert f"  would fit: {some['refused'][0]['changes'][0]['sentence']}" in lines
    assert f"{len(some['refused']) - len(advised)} more VMs were refused" in lines[-1]


def _with_changes(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer with each VM's changes beside it: they are told once for VMs of one kind."""
    told = {each["vm"]: each["changes"] for each in answer["refused"] if "changes" in each}
    for each in answer["refused"]:
        assert not {"changes", "changes_as"} <= each.keys()
        if (first := each.pop("changes_as", None)) is not None:
            each["changes"] = told[first]
    assert len({json.dumps(changes) for changes in told.values()}) > 1
    return answer


def test_nobody_has_to_be_told_what_would_help(program: Program, fleet: str) -> None:
    ran = program("plan", "--fleet", fleet, "--advise", "0", "-o", "json")
    assert set(ran.json) == ANSWER - {"advice_cpu_s"}
    assert all(set(each) == {"vm", "reasons"} for each in ran.json["refused"])
    assert program("plan", "--fleet", fleet, "--advise", "0").err == ""


def test_with_n_plus_one_the_check_loses_every_domain(program: Program, fleet: str) -> None:
    command = ["plan", "--fleet", fleet, "--n-plus-one", "required", "--check"]
    answer = program(*command, "--evidence", "-o", "json").json
    assert answer["faults"] == []
    exposed, told = {each["domain"] for each in answer["exposed"]}, answer["evacuations"]
    assert {each["domain"] for each in told if each["without_place"]} == exposed
    assert answer["domains_checked"] == len(told) - len(exposed) > 0
    new = {each["vm"] for each in answer["placed"]}
    restarts = [(each["domain"], restart) for each in told for restart in each["restarts"]]
    assert new <= {restart["vm"] for _, restart in restarts}
    assert all(restart["host"] != domain and restart["cells"] for domain, restart in restarts)
    ran = program(*command, "--advise", "0")
    held = f"{len(answer['placed'])} placements and {len(answer['refused'])} refusals hold"
    assert ran.err == f"Checked: {held}, and {answer['domains_checked']} domains can be lost (N+1).\n"
    # More kinds of reasons than the table has rows for.
    table = [row for row in _rows(ran.out, "refused VMs") if row.split()[0].isdecimal()]
    assert ["counted otherwise" in row for row in table] == [False] * 8 + [True]
    assert sum(int(row.split()[0]) for row in table) == len(answer["refused"])


def test_the_rule_of_a_cluster_holds_without_being_asked_for(program: Program, fleet: str, tmp_path: Path) -> None:
    document = json.loads(Path(fleet).read_text())
    clusters = {host["cluster"] for host in document["hosts"]}
    rule = {"mode": "required", "level": "rack"}
    document["clusters"] = [{"name": name, "n_plus_one": rule} for name in sorted(clusters)]
    path = tmp_path / "ruled.json"
    path.write_text(json.dumps(document))
    kept = program("plan", "--fleet", str(path), "--check", "--evidence", "-o", "json").json
    asked = program("plan", "--fleet", fleet, "--n-plus-one", "required:rack", "--evidence", "-o", "json").json
    assert kept["faults"] == []
    assert kept["domains_checked"] > 0
    for what in ("placed", "exposed", "evacuations"):
        assert kept[what] == asked[what]
    assert {each["level"] for each in kept["evacuations"]} == {"rack"}
    answer = tmp_path / "answer.json"
    answer.write_text(json.dumps(kept))
    assert program("plan", "--fleet", str(path), "--verify", str(answer)).code == 0
    # Of the fleet without the rule it is no answer.
    assert "was made with N+1" in program("plan", "--fleet", fleet, "--verify", str(answer)).err


def test_faults_end_with_an_exit_code_of_ours() -> None:
    refuse_faults(())
    with pytest.raises(PpecError, match="2 faults, the first of them: v1 does not fit") as refused:
        refuse_faults(("v1 does not fit", "another"))
    assert exit_code(refused.value.code) == 8


def test_evidence_says_what_it_takes_to_play_the_plan_through(program: Program, fleet: str) -> None:
    answer = program("plan", "--fleet", fleet, "--evidence", "-o", "json").json
    assert set(answer) == ANSWER
    evidence = [each["evidence"] for each in answer["placed"]]
    assert {*evidence[0]} == {"step", "candidates", "score", "epoch", "searched", "broken"}
    steps = [each["step"] for each in [*evidence, *answer["refused"]]]
    assert sorted(steps) == list(range(100))
    assert all(0 < each["candidates"] <= 12 for each in evidence)


def test_a_saved_answer_is_verified_and_one_that_was_changed_is_found_out(
    program: Program, fleet: str, tmp_path: Path
) -> None:
    command, path = ["plan", "--fleet", fleet, "--n-plus-one", "warn"], tmp_path / "answer.json"
    path.write_bytes(program(*command, "--evidence", "-o", "json").out)
    answer = json.loads(path.read_text())
    ran = program(*command, "--verify", str(path))
    held = f"{len(answer['placed'])} placements and {len(answer['refused'])} refusals hold"
    lost = len([each for each in answer["evacuations"] if not each["without_place"]])
    assert (ran.code, ran.out) == (0, b"")
    assert ran.err == f"Checked: {held}, and {lost} domains can be lost (N+1).\n"
    answer["placed"][0]["evidence"]["candidates"] += 1
    path.write_text(json.dumps(answer))
    ran = program(*command, "--verify", str(path), "-o", "json")
    assert ran.code == 8
    assert set(ran.json) == {"placed", "refused", "faults", "domains_checked", "check_cpu_s"}
    (fault,) = ran.json["faults"]
    assert f"{answer['placed'][0]['vm']}: candidates is said to be " in fault
    assert "Don't carry it out." in ran.err


def test_a_table_for_people(program: Program, fleet: str) -> None:
    ran = program("plan", "--fleet", fleet, "--policy", "pack")
    assert ran.code == 0
    text = ran.out.decode()
    for word in ("cores", "memory MiB", "before", "after", "refused VMs", "without enough free cores", "score after"):
        assert word in text


def test_the_table_has_what_cells_of_the_fleet_have(program: Program, tmp_path: Path) -> None:
    shape = {"vcpus": 4, "memory_mib": 1024, "disk_mib": 10, "numa": {"cpus": "shared", "huge_page_kib": 2048}}
    profile = {"name": "p", "shape": shape, "architecture": "x86_64"}
    cell = {"cell": 0, "socket": 0, "threads_per_core": 1, "memory_mib": 4096, "memory_free_mib": 4096}
    cell |= {"cores": 0, "cores_free": 0, "shared_cpus": 4, "shared_vcpus": 16, "shared_vcpus_free": 12}
    cell |= {"pages_2m": 1024, "pages_2m_free": 1024}
    stands = {"datacentre": "d", "cluster": "c", "rack": "r", "vrf": "v", "architecture": "x86_64"}
    host = {"host_id": 1, "name": "h1", "cells": [cell], "disk_mib": 100, "disk_free_mib": 100, "prefixes": [[1]]}
    document = {"schema": "ppec-fleet/1", "profiles": [profile], "hosts": [host | stands]}
    document["requests"] = {"batch": [{"name": "a", "profile": "p"}]}
    (tmp_path / "fleet.json").write_text(json.dumps(document))
    ran = program("plan", "--fleet", str(tmp_path / "fleet.json"))
    assert ran.code == 0, ran.err
    table = [line.split() for line in ran.out.decode().splitlines()]
    assert ["shared", "vCPUs", "16", "25.0%", "50.0%"] in table
    assert ["huge", "pages", "of", "2", "MiB", "1024", "0.0%", "50.0%"] in table
    assert not [line for line in table if line[:2] == ["NVMe", "drives"]]


def test_of_a_fleet_without_hosts_it_is_said_that_it_has_none(program: Program, tmp_path: Path) -> None:
    profile = {"name": "p", "shape": {"vcpus": 4, "memory_mib": 1024, "disk_mib": 10}, "architecture": "x86_64"}
    document = {"schema": "ppec-fleet/1", "profiles": [profile], "hosts": []}
    document["requests"] = {"batch": [{"name": "a", "profile": "p"}]}
    (tmp_path / "fleet.json").write_text(json.dumps(document))
    ran = program("plan", "--fleet", str(tmp_path / "fleet.json"))
    assert ran.code == 0
    assert _rows(ran.out, "refused VMs")[0].split(maxsplit=2) == ["1", "a", "the fleet has no hosts"]
    assert "0 hosts" not in ran.out.decode()


def test_pools_and_drives_are_in_the_table_of_uses(program: Program, tmp_path: Path) -> None:
    """A pool's disks are none of their host's own, and the other way about."""
    document = json.loads(SNAPSHOT.read_text())
    shape = {"vcpus": 4, "memory_mib": 1024, "disk_mib": 250_000}
    pooled = {"name": "pooled", "shape": shape | {"pool": "san", "nvme": 1}, "architecture": "x86_64"}
    document["profiles"] += [pooled, {"name": "plain", "shape": shape, "architecture": "x86_64"}]
    document["requests"] = {"batch": [{"name": name, "profile": name} for name in ("pooled", "plain")]}
    (tmp_path / "fleet.json").write_text(json.dumps(document))
    ran = program("plan", "--fleet", str(tmp_path / "fleet.json"))
    assert ran.code == 0
    uses = [row.split() for row in _rows(ran.out, "use")]
    assert ["disk", "MiB", "2000000", "5.1%", "17.6%"] in uses
    assert ["pool", "san", "MiB", "1000000", "10.0%", "35.0%"] in uses
    assert ["NVMe", "drives", "2", "50.0%", "100.0%"] in uses
    bare = program("plan", "--fleet", _without_storage(document, tmp_path)).out.decode()
    assert "pool" not in bare
    assert "NVMe" not in bare


def _without_storage(document: dict[str, Any], folder: Path) -> str:
    for host in document["hosts"]:
        host.pop("pools", None)
        host["vms"] = []
        host["disk_free_mib"] = host["disk_mib"]
        host["cells"] = [
            {"cell": 0, "socket": 0, "threads_per_core": 1, "cores": 8, "cores_free": 8}
            | dict.fromkeys(("memory_mib", "memory_free_mib"), 65536)
        ]
    document["profiles"] = document["profiles"][-1:]
    document["requests"] = {"batch": [{"name": "plain", "profile": "plain"}]}
    (folder / "bare.json").write_text(json.dumps(document))
    return str(folder / "bare.json")


def _rows(out: bytes, header: str) -> list[str]:
    """Of the table whose first column has this header, up to the next one's."""
    lines = out.decode().splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith(header))
    rows = lines[begin + 2 :]
    end = next((number for number, line in enumerate(rows) if line.startswith("─")), len(rows))
    return rows[:end]


def test_a_fleet_in_figures(program: Program, fleet: str) -> None:
    shown = program("fleet", "show", fleet, "--output", "json").json
    assert (shown["hosts"], shown["clusters"], shown["cells"], shown["requests"]) == (12, 2, 24, 100)
    assert 0 < shown["cores_free"] < shown["cores"]
    assert "memory free, MiB" in program("fleet", "show", fleet).out.decode()


def test_a_generated_fleet_goes_to_standard_output_and_is_the_seeds(program: Program) -> None:
    lines = [program("fleet", "generate", "--hosts", "2", "--requests", "1", "--seed", s).out for s in ("1", "1", "2")]
    assert lines[0] == lines[1] != lines[2]
    assert json.loads(lines[0])["schema"] == "ppec-fleet/1"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_fleets_file_has_the_mode_that_the_umask_leaves(program: Program, tmp_path: Path, umask: int) -> None:
    path = tmp_path / "fleet.json"
    path.write_text("an older one")
    before = os.umask(umask)
    try:
        assert program("fleet", "generate", "--hosts", "2", str(path)).code == 0
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".fleet")] == []


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (b'{"schema": "ppec-fleet/1", "hosts": [{"host_id": 1}]}', "fleet.invalid", "hosts[0].name"),
        (b'{"schema": "other/1"}', "fleet.unreadable", "'other/1' is no format of fleets"),
        (b"g|u|preferred||\n\nn|1|2|3|4|5|6|N|u\n\n\n\n", "fleet.invalid", "line 3: 2 of 1 memory"),
        (None, "fleet.unreadable", "No such file"),
    ],
)
def test_a_wrong_file_is_refused(program: Program, tmp_path: Path, content: bytes | None, code: str, said: str) -> None:
    path = tmp_path / "fleet"
    if content is not None:
        path.write_bytes(content)
    ran = program("plan", "--fleet", str(path), "--output", "json")
    assert (ran.code, ran.out) == (2, b"")
    assert f"[{code}]" in ran.err
    assert said in ran.err
    assert str(path) in ran.err
    assert "Traceback" not in ran.err


def test_a_million_requests_are_refused(program: Program, tmp_path: Path) -> None:
    document = json.loads(SNAPSHOT.read_text())
    document["requests"]["batch"] = ["HERE"]
    requests = ",".join(f'{{"name":"n{n}","profile":"gold"}}' for n in range(10**6))
    (tmp_path / "fleet.json").write_text(json.dumps(document).replace('"HERE"', requests))
    ran = program("plan", "--fleet", str(tmp_path / "fleet.json"))
    assert ran.code == 2
    assert "requests.batch: List should have at most 100000 items" in ran.err


@pytest.mark.parametrize(
    "line",
    [
        "plan --fleet F --policy wild",
        "plan --fleet F --n-plus-one maybe",
        "plan --fleet F --n-plus-one warn:datacentre",
        "plan --fleet F --max-moves -1",
        "plan --fleet F --advise -1",
        "plan --fleet F --max-moves 17",
        "fleet generate --hosts 0 -",
        "fleet generate --hosts 2 --clusters 3 -",
        "fleet generate --hosts 2 /nowhere/at/all.json",
    ],
)
def test_a_wrong_command_line_is_exit_code_2(program: Program, line: str) -> None:
    ran = program(*(str(SNAPSHOT) if word == "F" else word for word in line.split()))
    assert (ran.code, ran.out) == (2, b"")
    assert "Traceback" not in ran.err


def test_moves_are_bounded_as_the_api_bounds_them(program: Program) -> None:
    assert program("plan", "--fleet", str(SNAPSHOT), "--max-moves", str(MAX_PLAN_MOVES)).code == 0
    ran = program("plan", "--fleet", str(SNAPSHOT), "--max-moves", str(MAX_PLAN_MOVES + 1))
    assert ran.code == 2
    assert "17 moves of running VMs are wanted, 16 can be had" in ran.err
    assert "Allow from 0 to 16 moves" in ran.err


def test_without_requests_there_is_nothing_to_plan(program: Program, tmp_path: Path) -> None:
    document = json.loads(SNAPSHOT.read_text())
    del document["requests"]
    (tmp_path / "fleet.json").write_text(json.dumps(document))
    ran = program("plan", "--fleet", str(tmp_path / "fleet.json"))
    assert ran.code == 2
    assert "Give --requests" in ran.err


def test_a_fleet_tells_what_it_could_not_lose(program: Program, tmp_path: Path) -> None:
    """Of three hosts the empty one takes the VM of either other one. Of these two alone neither takes the other's."""

    def host(number: int, cores_free: int) -> dict[str, Any]:
        used = 8 - cores_free
        cell = {"cell": 0, "socket": 0, "threads_per_core": 1, "cores": 8, "cores_free": cores_free}
        memory = {"memory_mib": 9000, "memory_free_mib": 9000 - used}
        vm = {"vm_id": f"00000000-0000-0000-0000-00000000000{number}", "name": f"vm-{number}", "profile": f"c{used}"}
        return {
            "host_id": number, "name": f"h{number}", "region": "n", "datacentre": "d", "cluster": "c",
            "rack": f"r{number // 2}", "vrf": "v", "architecture": "x86_64", "disk_mib": 9, "disk_free_mib": 9,
            "prefixes": [[1]], "live": True, "draining": False, "cells": [cell | memory],
            "vms": [vm | {"cells": [0]}] if used else [],
        }  # fmt: skip

    profiles = [
        {"name": f"c{cores}", "architecture": "x86_64", "shape": {"vcpus": cores, "memory_mib": cores, "disk_mib": 0}}
        for cores in (4, 8)
    ]
    hosts = [host(1, 0), host(2, 4), host(3, 8)]
    file = tmp_path / "fleet.json"
    for several, exposed in (
        (hosts, set()),
        (hosts[:2], {("h1", "host", "c", "vm-1", 1), ("h2", "host", "c", "vm-2", 1)}),
    ):
        file.write_text(json.dumps({"schema": "ppec-fleet/1", "profiles": profiles, "hosts": several}))
        ran = program("fleet", "exposed", str(file), "-o", "json")
        assert ran.code == 0, ran.err
        assert {tuple(each.values()) for each in ran.json["exposed"]} == exposed
        assert ran.json["domains"] == len(several)
    said = program("fleet", "exposed", str(file))
    assert "vm-1" in said.out.decode()
    assert "0 of 2 hosts can be lost, each alone." in said.err
    racks = program("fleet", "exposed", str(file), "--level", "rack", "-o", "json").json
    assert {each["domain"] for each in racks["exposed"]} == {"r0", "r1"}
