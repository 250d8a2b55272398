# SPDX-License-Identifier: Apache-2.0
"""Creating, listing and changing VMs, and waiting for how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ppec_contract.agent import Effect, Resized
from ppec_contract.api_operations import OperationState
from ppec_contract.api_placement import ExposedView, Policy
from ppec_contract.api_vms import BatchMode, VmRecord
from ppec_contract.errors import PpecError
from ppec_contract.guest import GuestInfo, GuestInterface


def test_create_sends_what_was_asked_once(orchestrator: Any, ppec: Any, tmp_path: Path) -> None:
    text = "#cloud-config\r\n{{ not a template }} $(id)\n"
    (tmp_path / "user-data").write_bytes(text.encode())
    ran = ppec(
        *(
            "vm",
            "create",
            "--flavor",
            "small",
            "--image",
            "tiny",
            "--count",
            "6",
            "--name",
            "web",
            "--policy",
            "spread",
        ),
        *("--mode", "best-effort", "--cluster", "c1", "--label", "a=b=c", "--label", "<x>=[red]"),
        *("--user-data", str(tmp_path / "user-data")),
    )
    assert (ran.code, ran.out) == (0, "op-1\n")
    assert len(orchestrator.requests) == 1
    assert orchestrator.requests[0].json == {
        "flavor": "small",
        "image": "tiny",
        "count": 6,
        "name": "web",
        "policy": "spread",
        "mode": "best-effort",
        "cluster": "c1",
        "user_data": text,
        "labels": {"a": "b=c", "<x>": "[red]"},
    }


def test_what_n_plus_one_warns_of_is_said_at_once_and_for_good(orchestrator: Any, ppec: Any, make: Any) -> None:
    orchestrator.current = make.operation("queued", exposed=(ExposedView(domain="h1", vm="db", without_place=2),))
    said = "h1 is exposed: its loss leaves 2 VMs without a place, db first"
    ran = ppec("vm", "create", "--flavor", "small", "--image", "tiny", "--n-plus-one", "warn")
    assert (ran.code, said in ran.err, said in ran.out) == (0, True, False)
    assert said in ppec("operation", "show", "op-1").err


def test_at_least_is_a_best_effort(orchestrator: Any, ppec: Any) -> None:
    batch = ("vm", "create", "--flavor", "small", "--image", "tiny", "--count", "50", "--at-least", "30")
    assert ppec(*batch).code == 0
    sent = orchestrator.requests[0].json
    assert (sent["count"], sent["at_least"], sent["mode"]) == (50, 30, "best-effort")
    assert ppec(*batch, "--mode", "most-vcpus").code == 0
    assert orchestrator.requests[1].json["mode"] == "most-vcpus"


@pytest.mark.parametrize("command", ["vm create", "explain"])
def test_a_pool_and_drives_are_asked_for(orchestrator: Any, ppec: Any, command: str) -> None:
    size = ("--vcpus", "2", "--memory-mib", "512", "--disk-mib", "1024")
    ppec(*command.split(), "--image", "tiny", *size, "--nvme-drives", "2", "--pool", "ssd")
    sent = orchestrator.requests[0].json
    assert sent["pool"] == "ssd"
    assert sent["size"] == {"vcpus": 2, "memory_mib": 512, "disk_mib": 1024, "nvme_drives": 2}


def test_pools_and_drives_are_shown_where_vms_have_them(orchestrator: Any, ppec: Any, make: Any) -> None:
    orchestrator.vms = {"a": make.vm(0, "a")}
    assert "pool" not in ppec("vm", "list").out
    assert "drives" not in ppec("vm", "show", "a").out
    orchestrator.vms["b"] = make.vm(1, "b", pool="ssd", nvme_drives=1, drives=("0000:01:00.0",))
    listed = [line.split() for line in ppec("vm", "list").out.splitlines()]
    assert listed[0][-3:] == ["pool", "NVMe", "drives"]
    assert {row[0]: row[-2:] for row in listed[2:]} == {"a": ["-", "-"], "b": ["ssd", "1"]}
    shown = ppec("vm", "show", "b").out
    assert [word in shown for word in ("ssd", "nvme drives", "0000:01:00.0")] == [True] * 3
    assert ppec("vm", "list", "--pool", "ssd").code == 0
    assert orchestrator.requests[-1].query["pool"] == "ssd"


def test_a_mistake_is_found_before_anything_is_sent(orchestrator: Any, ppec: Any) -> None:
    for wrong in (
        ["--name", "{{ x }}"],
        ["--count", "0"],
        ["a", "a"],
        ["--label", "x"],
        ["--user-data", "/nonexistent"],
    ):
        ran = ppec("vm", "create", "--flavor", "small", "--image", "tiny", *wrong)
        assert (ran.code, ran.out) == (2, "")
        assert "[request.invalid]" in ran.err
    assert orchestrator.requests == []


def test_a_lost_answer_is_asked_for_again_with_the_same_key(orchestrator: Any, ppec: Any) -> None:
    orchestrator.instead["POST", "/v1/vms"] = [lambda handler: handler.cut()]
    assert ppec("vm", "create", "--flavor", "small", "--image", "tiny").code == 0
    keys = [request.headers["idempotency-key"] for request in orchestrator.requests]
    assert len(keys) == 2
    assert len(set(keys)) == 1


def test_wait_shows_every_change_and_a_table_at_the_end(orchestrator: Any, ppec: Any, make: Any) -> None:
    names = ("web-1", "web-2")
    orchestrator.vms = {name: make.vm(n, name) for n, name in enumerate(names)}
    running = make.operation(
        "running", make.item(0, "web-1", "running", host="h1", stage="disk"), make.item(1, "web-2", "pending")
    )
    took = {"image": 3, "disk": 41, "start": 300}
    done = (make.item(n, name, "succeeded", host=f"h{n + 1}", stage_ms=took) for n, name in enumerate(names))
    ended = make.operation("succeeded", *done)
    orchestrator.streams = [[running, "comment", running, ended, "end"]]
    ran = ppec("vm", "create", "--flavor", "small", "--image", "tiny", "--count", "2", "--name", "web", "--wait")
    assert ran.code == 0
    progress = [line.partition("] ")[2] for line in ran.err.splitlines() if line.startswith("[")]
    assert progress == [
        "operation op-1: queued",
        "operation op-1: running",
        "web-1: running on h1 disk",
        "web-2: pending",
        "operation op-1: succeeded",
        "web-1: succeeded on h1",
        "web-2: succeeded on h2",
    ]
    assert "operation op-1: succeeded, 2 of 2 VMs in 3.0 s" in ran.err
    rows = [line.split() for line in ran.out.splitlines()]
    assert rows[2][:7] == ["web-1", "succeeded", "h1", "0", "4-5", "blue", "10.0.0.10"]
    assert "image 3, disk 41, start 300" in ran.out


def test_a_broken_stream_is_taken_up_again(orchestrator: Any, ppec: Any, make: Any) -> None:
    running = make.operation("running", make.item(0, "a", "running", host="h1", stage="disk"))
    later = make.operation("running", make.item(0, "a", "running", host="h1", stage="start"))
    ended = make.operation("succeeded", make.item(0, "a", "succeeded", host="h1"))
    orchestrator.vms = {"a": make.vm(0, "a")}
    orchestrator.streams = [[running], ['event: operation\ndata: {"operation_id": "op-'], [later], [ended, "end"]]
    ran = ppec("operation", "watch", "op-1")
    assert ran.code == 0
    assert [line.split("] ")[1] for line in ran.err.splitlines() if "a: " in line] == [
        "a: running on h1 disk",
        "a: running on h1 start",
        "a: succeeded on h1",
    ]


def test_a_restarting_orchestrator_is_waited_for(orchestrator: Any, ppec: Any, make: Any) -> None:
    def unavailable(handler: Any) -> None:
        handler.problem(PpecError("store.unavailable", "starting"))

    orchestrator.instead["GET", "/v1/operations/op-1"] = [unavailable, unavailable]
    orchestrator.instead["GET", "/v1/operations/op-1/events"] = [unavailable]
    orchestrator.streams = [[make.operation("succeeded"), "end"]]
    assert ppec("operation", "watch", "op-1").code == 0


@pytest.mark.parametrize(
    ("state", "items", "code"),
    [
        ("failed", [("refused", "placement.no_capacity")], 6),
        ("partial", [("succeeded", None), ("failed", "vm.exists")], 5),
        ("partial", [("failed", "host.unreachable"), ("failed", "vm.exists")], 7),
        ("failed", [("undone", None)], 8),
        ("cancelled", [("undone", None)], 5),
    ],
)
def test_an_operation_that_did_not_work_out_exits_by_its_first_problem(
    orchestrator: Any, ppec: Any, make: Any, state: str, items: Any, code: int
) -> None:
    made = [
        make.item(n, f"v{n}", how, problem=PpecError(why, f"why {n}", hint="do").problem() if why else None)
        for n, (how, why) in enumerate(items)
    ]
    orchestrator.streams = [[make.operation(state, *made), "end"]]
    ran = ppec("vm", "delete", *(f"v{n}" for n in range(len(items))), "--wait")
    assert ran.code == code
    for n, (_, why) in enumerate(items):
        if why:
            assert f"error: why {n} [{why}]" in ran.err


def test_wait_with_json_keeps_stdout_for_the_machine(orchestrator: Any, ppec: Any, make: Any) -> None:
    orchestrator.streams = [[make.operation("running"), make.operation("failed"), "end"]]
    ran = ppec("vm", "start", "a", "--wait", "--output", "json")
    assert ran.json["state"] == "failed"
    assert ran.code == 8
    assert "running" in ran.err


def test_a_list_follows_the_cursor(orchestrator: Any, ppec: Any, make: Any) -> None:
    orchestrator.vms = {f"v{n}": make.vm(n, f"v{n}") for n in range(5)}
    assert [vm["name"] for vm in ppec("vm", "list", "--output", "json").json] == [f"v{n}" for n in range(5)]
    assert len(orchestrator.requests) == 1
    assert "v4" in ppec("vm", "list").out
    assert [request.query.get("cursor") for request in orchestrator.requests[1:]] == [None, "2", "4"]
    assert [vm["name"] for vm in ppec("-o", "json", "vm", "list", "--host", "h1").json] == ["v0", "v3"]


def test_a_list_can_be_cut_short_and_narrowed(orchestrator: Any, ppec: Any, make: Any) -> None:
    orchestrator.vms = {f"v{n}": make.vm(n, f"v{n}") for n in range(9)}
    assert len(ppec("vm", "list", "--output", "json", "--limit", "3").json) == 3
    assert len(orchestrator.requests) == 2
    orchestrator.vms.clear()
    ppec("vm", "list", "--name", "v1", "--record", "failed")
    assert orchestrator.requests[-1].query == {"name": "v1", "record": "failed", "limit": "500"}
    ppec("vm", "list", "-q", "Web", "--label", "tier=web", "--label", "gpu", "--observed", "paused", "--rack", "r1")
    wanted = {"q": "Web", "label": "tier=web,gpu", "observed": "paused", "rack": "r1", "limit": "500"}
    assert orchestrator.requests[-1].query == wanted
    for named in ("-q", "--q", "--query"):
        assert ppec("vm", "list", named, "web").code == ppec("host", "list", named, "web").code == 0
        assert [one.query for one in orchestrator.requests[-2:]] == [{"q": "web", "limit": "500"}] * 2
    ppec("host", "list", "--architecture", "aarch64", "--not-draining", "--liveness", "up", "--limit", "7")
    wanted = {"architecture": "aarch64", "draining": "false", "liveness": "up", "limit": "8"}
    assert orchestrator.requests[-1].query == wanted
    ppec("operation", "list", "--state", "running", "--kind", "create")
    assert orchestrator.requests[-1].query == {"state": "running", "kind": "create", "limit": "500"}


def test_people_are_shown_the_first_of_many_and_told_so(orchestrator: Any, ppec: Any, make: Any) -> None:
    orchestrator.vms = {f"v{n}": make.vm(n, f"v{n}") for n in range(9)}
    first = ppec("vm", "list", "--limit", "3")
    assert ("v2" in first.out, "v3" in first.out, "--all" in first.err) == (True, False, True)
    whole = ppec("vm", "list", "--all")
    assert (whole.out.count("10.0.0."), whole.err) == (9, "")


def test_programs_may_page_by_the_cursor(orchestrator: Any, ppec: Any, make: Any) -> None:
    orchestrator.vms = {f"v{n}": make.vm(n, f"v{n}") for n in range(3)}
    page = ppec("vm", "list", "--paged", "--limit", "2", "-o", "json").json
    assert ([vm["name"] for vm in page["items"]], page["next_cursor"]) == (["v0", "v1"], "2")
    last = ppec("vm", "list", "--cursor", page["next_cursor"], "-o", "json").json
    assert ([vm["name"] for vm in last["items"]], last["next_cursor"]) == (["v2"], None)


def test_a_list_that_breaks_off_is_an_error_and_no_json(orchestrator: Any, ppec: Any, make: Any) -> None:
    def half(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/x-ndjson")
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(make.vm(0, "v0").model_dump_json().encode() + b"\n")
        handler.close_connection = True

    orchestrator.instead[("GET", "/v1/vms")] = [half]
    ran = ppec("vm", "list", "-o", "json")
    assert (ran.code, "]" in ran.out.splitlines()) == (7, False)


@pytest.mark.parametrize(("noun", "path"), [("vm", "/v1/vms/a/labels"), ("host", "/v1/hosts/a/labels")])
def test_labels_are_set_and_removed(orchestrator: Any, ppec: Any, make: Any, noun: str, path: str) -> None:
    orchestrator.vms = {"a": make.vm(0, "a")}
    view = {"name": "a", "rack": "r", "cluster": "c", "datacentre": "d", "vrf": "v", "address": "a", "port": 1}
    orchestrator.resources["hosts"] = [{**view, "liveness": "up", "draining": False}]
    assert ppec(noun, "label", "a", "tier=web", "gpu=", "old-").code == 0
    sent = orchestrator.requests[-1]
    assert (sent.method, sent.path) == ("PATCH", path)
    assert sent.json == {"labels": {"tier": "web", "gpu": "", "old": None}}
    assert ppec(noun, "label", "a", "neither").code == 2
    assert len(orchestrator.requests) == 1


def test_show_and_its_absence(orchestrator: Any, ppec: Any, make: Any) -> None:
    orchestrator.vms = {"a": make.vm(0, "a")}
    assert "10.0.0.10" in ppec("vm", "show", "a").out
    ran = ppec("vm", "show", "a/../b")
    assert (ran.code, ran.out) == (4, "")
    assert ran.err == "error: there is no VM a/../b [vm.not_found]\nhint: List them.\n"


def test_resize_says_what_waits_for_the_next_start(orchestrator: Any, ppec: Any, make: Any) -> None:
    effects = Resized(vcpus=Effect.NOW, memory_mib=Effect.NEXT_START)
    orchestrator.current = make.operation("succeeded", make.item(0, "a", "succeeded", resized=effects))
    ran = ppec("vm", "resize", "a", "--vcpus", "4", "--memory", "512", "--wait")
    assert ran.code == 0, ran.err
    assert "a: vCPUs changed, memory changed at the next start" in ran.err
    sent = len(orchestrator.requests)
    assert ppec("vm", "resize", "a").code == 2
    assert ppec("vm", "resize", "a", "--vcpus", "3").code == 2
    assert len(orchestrator.requests) == sent


def test_actions_carry_their_options(orchestrator: Any, ppec: Any) -> None:
    ppec("vm", "stop", "a", "b", "--timeout-s", "5", "--force")
    assert orchestrator.requests[-1].json == {"action": "stop", "vms": ["a", "b"], "timeout_s": 5.0, "force": True}
    ppec("vm", "reboot", "a", "--timeout", "5", "--force")
    assert orchestrator.requests[-1].json == {"action": "reboot", "vms": ["a"], "timeout_s": 5.0, "force": True}
    ppec("vm", "reboot", "a")
    assert orchestrator.requests[-1].json == {"action": "reboot", "vms": ["a"], "timeout_s": 60.0, "force": False}
    for action in ("reset", "pause", "resume"):
        ppec("vm", action, "a", "b")
        assert orchestrator.requests[-1].json == {"action": action, "vms": ["a", "b"]}
    ppec("vm", "freeze", "a", "b", "--thaw-after-s", "5")
    assert orchestrator.requests[-1].json == {"action": "freeze", "vms": ["a", "b"], "thaw_after_s": 5.0}
    ppec("vm", "thaw", "a", "b")
    assert orchestrator.requests[-1].json == {"action": "thaw", "vms": ["a", "b"]}
    ppec("vm", "resize", "a", "--vcpus", "4", "--memory", "2G")
    assert (orchestrator.requests[-1].method, orchestrator.requests[-1].path) == ("PATCH", "/v1/vms/a")
    assert orchestrator.requests[-1].json == {"vcpus": 4, "memory_mib": 2048, "timeout_s": 10.0}
    ppec("vm", "delete", "a")
    assert orchestrator.requests[-1].json == {"action": "delete", "vms": ["a"]}


def test_a_guest_s_word_is_shown_and_is_text(orchestrator: Any, ppec: Any, make: Any) -> None:
    nics = (GuestInterface(name="eth0", mac="52:54:00:00:00:01", addresses=("10.0.0.5/24", "fe80::1/64")),)
    told = GuestInfo(
        vm_id=make.vm_id(0), name="a", agent_connected=True, hostname=HOSTILE, os_name="Debian", interfaces=nics
    )
    orchestrator.instead[("GET", "/v1/vms/a/guest")] = [lambda handler: handler.reply(200, told)] * 2
    shown = ppec("vm", "guest", "a", "--timeout", "9")
    assert (shown.code, orchestrator.requests[-1].query) == (0, {"timeout_s": "9.0"})
    assert "eth0" in shown.out
    assert "10.0.0.5/24" in shown.out
    assert not set(shown.out) & set("\x1b\x9b\u202e")
    assert GuestInfo.model_validate(ppec("vm", "guest", "a", "-o", "json").json) == told
    assert ppec("vm", "guest", "a", "--timeout", "31").code == 2


def all_of_terminal(ours: int) -> bytes:
    """What is written to it until nobody has it open; a terminal that nobody reads holds its writer up."""
    text = b""
    # Its end is an error, EIO.
    with suppress(OSError):
        while part := os.read(ours, 65536):
            text += part
    return text


def test_on_a_terminal_the_table_redraws_itself(orchestrator: Any, make: Any, tmp_path: Path) -> None:
    running = make.operation("running", *(make.item(n, f"v{n}", "running", host="h1", stage="disk") for n in range(50)))
    orchestrator.streams = [[running, make.operation("succeeded"), "end"]]
    ours, theirs = os.openpty()
    environment = {"PATH": os.environ["PATH"], "PPEC_SERVER": orchestrator.url, "PPEC_TOKEN": make.token}
    environment |= {"HOME": str(tmp_path), "TERM": "xterm", "COLUMNS": "100", "LINES": "20"}
    command = [sys.executable, "-m", "ppec_orchestrator.cli.main", "operation", "watch", "op-1"]
    with ThreadPoolExecutor(1) as pool:
        with subprocess.Popen(command, env=environment, stderr=theirs, stdout=subprocess.DEVNULL) as running_ppec:
            os.close(theirs)
            reading = pool.submit(all_of_terminal, ours)
            code = running_ppec.wait(120)
        shown = reading.result(60).decode()
    os.close(ours)
    assert code == 0
    assert "\x1b[" in shown  # it moves the cursor
    assert "operation op-1: succeeded" in shown
    assert "[   " not in shown  # and writes no log lines


HOSTILE = "[red]x[/red] [link=http://x]y[/] :smile: \x1b[31m\x9b31m \u202egnp"


def test_text_of_tenants_is_neither_markup_nor_terminal_control(orchestrator: Any, ppec: Any, make: Any) -> None:
    orchestrator.vms = {"a": make.vm(0, "a", labels={HOSTILE[:60]: HOSTILE})}
    orchestrator.current = make.operation("failed", problem=PpecError("run.failed", HOSTILE, hint=HOSTILE).problem())
    for ran in (ppec("vm", "list"), ppec("vm", "show", "a"), ppec("operation", "show", "op-1")):
        shown = ran.out + ran.err
        assert "[red]x[/red] [link=http://x]y[/] :smile:" in shown.replace("\n", "")
        assert not set(shown) & set("\x1b\x9b\u202e")
    assert ppec("vm", "show", "a", "-o", "json").json["labels"][HOSTILE[:60]] == HOSTILE


def test_the_choices_offered_are_those_of_the_contract() -> None:
    from typing import get_args

    from ppec_contract import host
    from ppec_orchestrator.cli import catalogue, operations, vms, wanted

    assert set(get_args(wanted.Policy)) == set(Policy)
    assert set(get_args(wanted.Mode)) == set(BatchMode)
    assert set(get_args(vms.Record)) == set(VmRecord)
    assert set(get_args(operations.State)) == set(OperationState)
    assert get_args(catalogue.Architecture) == get_args(host.Architecture)
