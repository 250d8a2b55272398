# SPDX-License-Identifier: Apache-2.0
"""What a run is told, on disk: a file per host with its call, and the plan that says which hosts and VMs these are."""

from __future__ import annotations

import shutil
import stat
import time
from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from ppec_contract.run import HostCall, RunPlan, RunTerms
from ppec_orchestrator.dispatch.dispatcher import AnsibleDispatcher, RunCredentials
from ppec_orchestrator.dispatch.installation import COLLECTION, INVENTORY_PLUGIN, Installation, find_collections
from ppec_orchestrator.dispatch.port import HostTarget, RunRequest
from ppec_orchestrator.dispatch.rundir import RunDirectories, RunDirectory

WAIT_S = 60.0
PLAYBOOK = Path(__file__).parent / "playbook" / "site.yml"
CREDENTIALS = RunCredentials(Path("/nonexistent/ca"), Path("/nonexistent/crt"), Path("/nonexistent/key"))
SECRET = "#cloud-config of a tenant"


@pytest.fixture
def dispatcher(short_dir: Path) -> AnsibleDispatcher:
    """Without a fork server: nothing is left running."""
    shutil.copytree(PLAYBOOK.parent, short_dir / "playbook")
    made = short_dir / "playbook" / "site.yml"
    plugin = COLLECTION / INVENTORY_PLUGIN
    (short_dir / "collections" / plugin).parent.mkdir(parents=True)
    shutil.copy(find_collections() / plugin, short_dir / "collections" / plugin)
    installation = Installation.prepare(short_dir / "ansible", collections=short_dir / "collections", playbook=made)
    return AnsibleDispatcher(short_dir, CREDENTIALS, installation=installation, fork_server=False)


@pytest.fixture
def runs(dispatcher: AnsibleDispatcher, short_dir: Path) -> RunDirectories:
    return RunDirectories(short_dir / "runs")


def target(*vm_ids: str, **more: object) -> HostTarget:
    vms = [{"vm_id": vm_id, "user_data": SECRET} for vm_id in vm_ids]
    return HostTarget("127.0.0.1", 7443, {"vms": vms, **more})


def write(run: RunDirectory, *hosts: str) -> RunPlan:
    terms = RunTerms(
        operation_id="op-1",
        fence=1,
        action="StartVms",
        events_path="/e",
        ca_path="/a",
        certificate_path="/c",
        key_path="/k",
    )
    run.write_calls({host: HostCall(run=terms, address="::1", port=1, parameters={"vm_ids": [host]}) for host in hosts})
    plan = RunPlan(run=terms, hosts={host: frozenset({host}) for host in hosts})
    run.write_plan(plan)
    return plan


def test_started_run_is_adopted_from_its_plan_alone(dispatcher: AnsibleDispatcher) -> None:
    request = RunRequest("op-1", 7, "CreateVms", {"h1": target("vm-1", "vm-2"), "h2": target("vm-3")})
    run = dispatcher.start(request)
    deadline = time.monotonic() + WAIT_S
    while run.result is None:
        assert time.monotonic() < deadline, "the run did not end"
        run.wait(1.0)
    directory = run.directory
    calls = {path.name: HostCall.model_validate_json(path.read_bytes()) for path in directory.calls_path.iterdir()}
    assert {name: call.parameters for name, call in calls.items()} == {
        f"{host}.json": dict(target.parameters) for host, target in request.hosts.items()
    }
    assert {(call.run.operation_id, call.run.fence, call.run.action) for call in calls.values()} == {
        ("op-1", 7, "CreateVms")
    }
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (*directory.calls_path.iterdir(), directory.plan_path)}
    assert (stat.S_IMODE(directory.calls_path.stat().st_mode), modes) == (0o700, {0o600})
    assert SECRET.encode() not in directory.plan_path.read_bytes()
    for path in directory.calls_path.iterdir():
        path.write_bytes(b"\xff not JSON")
    adopted = dispatcher.adopt("op-1")
    assert adopted is not None
    assert (adopted.number, adopted.action, adopted.vm_ids) == (1, "CreateVms", run.vm_ids)
    assert adopted.vm_ids == {"h1": {"vm-1", "vm-2"}, "h2": {"vm-3"}}


def test_run_that_was_cut_short_before_its_plan_never_started(
    dispatcher: AnsibleDispatcher, runs: RunDirectories
) -> None:
    write(runs.create("op-1"), "h1")
    with pytest.raises(PydanticSerializationError):
        dispatcher.start(RunRequest("op-1", 1, "CreateVms", {"h1": target("a"), "h2": target("b", odd=object())}))
    *_, cut = runs.of("op-1")
    assert [path.name for path in cut.calls_path.iterdir()] == ["h1.json"]
    assert cut.plan() is None
    adopted = dispatcher.adopt("op-1")
    assert adopted is not None
    assert adopted.number == 1, "the one before it"


@pytest.mark.parametrize("length", [0, 1, 40])
def test_plan_that_was_cut_short_is_none(dispatcher: AnsibleDispatcher, runs: RunDirectories, length: int) -> None:
    run = runs.create("op-1")
    write(run, "h1")
    run.plan_path.write_bytes(run.plan_path.read_bytes()[:length])
    assert dispatcher.adopt("op-1") is None


def test_forget_removes_calls_and_plan_of_all_runs_of_that_operation(
    dispatcher: AnsibleDispatcher, runs: RunDirectories
) -> None:
    whole, without_plan, empty, other = (runs.create(name) for name in ("op-1", "op-1", "op-1", "op-2"))
    for run in (whole, without_plan, other):
        write(run, "h1", "h2")
    without_plan.plan_path.unlink()
    (without_plan.calls_path / ".h3.json.part").write_text(SECRET)
    dispatcher.forget("op-1")
    assert [list(run.path.rglob("*")) for run in (whole, without_plan, empty)] == [[], [], []]
    assert dispatcher.adopt("op-1") is None
    assert sorted(path.name for path in other.path.rglob("*")) == ["calls", "h1.json", "h2.json", "plan.json"]
    dispatcher.forget("op-1")


@pytest.mark.parametrize(
    "host", ["../plan", "x/../h1", "./h1", "", ".", "..", "/tmp/h1", ".h1", "h1/", "h1\n", "h1\0", "H1", "n" * 64]
)
def test_host_name_leads_nowhere_but_into_the_run_s_folder(
    dispatcher: AnsibleDispatcher, runs: RunDirectories, host: str
) -> None:
    run = runs.create("op-1")
    with pytest.raises(ValidationError):
        run.call_path(host)
    with pytest.raises(ValidationError):
        dispatcher.start(RunRequest("op-2", 1, "CreateVms", {host: target("a")}))
    assert [path.name for found in runs.of("op-2") for path in found.path.rglob("*")] == ["lock"]


@pytest.mark.parametrize("host", ["plan", "run", "a..b", "h1.json", "n" * 63])
def test_every_host_name_has_a_file_of_its_own(runs: RunDirectories, host: str) -> None:
    run = runs.create("op-1")
    assert run.call_path(host) == run.path / "calls" / f"{host}.json"
    write(run, host)
    assert [path.name for path in run.calls_path.iterdir()] == [f"{host}.json"]
