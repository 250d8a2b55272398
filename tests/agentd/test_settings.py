# SPDX-License-Identifier: Apache-2.0
"""The settings file: wrong ones are refused whole and by name, before anything is touched."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

import ppec_agentd
from ppec_agentd.housekeeping import Housekeeping
from ppec_agentd.hypervisor import Domain, EventKind, HypervisorEvent
from ppec_agentd.report import ReportSource
from ppec_agentd.settings import Settings, load
from ppec_contract.errors import PpecError
from ppec_contract.model import Model
from ppec_contract.vm import VmState

WHOLE = """
host = "h1"
[socket]
mode = 0o660
allowed_uids = [1000]
[storage]
state_dir = "/srv/ppec"
[reserve]
cores_per_cell = 1
[reports]
orchestrator_url = "https://10.0.0.1:8443"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "agentd.toml"
    path.write_text(text)
    return path


def test_a_file_of_few_words_is_enough(tmp_path: Path) -> None:
    settings = load(written(tmp_path, WHOLE))
    assert settings.socket.mode == 0o660
    assert settings.socket.group == "ppec"
    assert settings.storage.images == Path("/srv/ppec/images")
    assert settings.limits.concurrent_starts == 2
    assert load(written(tmp_path, 'host = "h1"')).hypervisor == "libvirt"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "host: Field required"),
        ('host = "h1"\nhypervisr = "fake"', "hypervisr: Extra inputs"),
        ('host = "../x"', "host: wanted 1 to 63 lower-case letters"),
        ('host = "h1"\nhypervisor = "fake"', "the fake hypervisor needs a declared machine"),
        ('host = "h1"\n[lab]\ntopology = "sockets=0"', "lab.topology"),
        ('host = "h1"\n[reports]\norchestrator_url = "http://10.0.0.1"', "reports.orchestrator_url"),
        ('host = "h1"\n[socket]\npath = "/' + "x" * 104 + '"', "socket.path"),
        ('host = "h1"\n[nvme]\ndrives = ["3b:00.0"]', "nvme.drives.0"),
        ('host = "h1"\n[nvme]\ndrives = ["00003b:00:01.0"]', "nvme.drives.0"),
        ('host = "h1"\n[nvme]\ndrives = ["0000:3b:00.0", "0000:3b:00.0"]', "nvme.drives"),
        ('host = "h1"\n[nvme]\ndrives = ["0000:3b:00.0/.."]', "nvme.drives.0"),
        ("host = ", "Invalid value"),
    ],
)
def test_a_wrong_file_names_the_field(tmp_path: Path, text: str, named: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(PpecError) as refused:
        load(path)
    assert named in refused.value.message
    assert str(path) in refused.value.message


def numbers(model: type[Model], within: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Section and key of every number, however it is wrapped: in a list, in a table, with None."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Model):
            yield from numbers(field.annotation, (*within, name))
        elif re.search(r"\b(int|float)\b", str(field.annotation)):
            (section,) = within
            yield section, name


NUMBERS = list(numbers(Settings))


def test_there_are_numbers() -> None:
    assert len(NUMBERS) == 29


@pytest.mark.parametrize("value", [-1, 10**18])
@pytest.mark.parametrize(("section", "name"), NUMBERS, ids=[name for _, name in NUMBERS])
def test_a_number_out_of_bounds_is_refused(tmp_path: Path, section: str, name: str, value: int) -> None:
    wrapped = {
        "allowed_uids": f"[{value}]",
        "delays_s": f"{{ start = {value} }}",
        "fail_every": f"{{ start = {value} }}",
        "nvme_drives": f'{{ "0000:3b:00.0" = {value} }}',
    }
    path = written(tmp_path, f'host = "h1"\n[{section}]\n{name} = {wrapped.get(name, value)}\n')
    with pytest.raises(PpecError) as refused:
        load(path)
    field = rf"{section}\.{name}(\.0|\.start|\.0000:3b:00\.0)?"
    found = "|".join(re.escape(form) for form in (str(value), f"{value:g}"))
    said = refused.value.message.removeprefix(f"settings file {path}: ")
    assert re.fullmatch(rf"{field}: Value error, wanted \S+ to \S+( s| MiB)?, found ({found})", said), said


def test_the_command_checks_a_file_and_leaves(tmp_path: Path) -> None:
    def run(path: Path) -> tuple[int, str]:
        argv = [sys.executable, "-m", "ppec_agentd.serve", "--check", "--config", str(path)]
        done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr

    assert run(written(tmp_path, WHOLE)) == (0, "")
    status, said = run(written(tmp_path, "host = 7"))
    assert status == 2
    assert "host: Input should be a valid string" in said
    assert "Traceback" not in said
    assert run(tmp_path / "absent")[0] == 2


def test_a_group_that_is_not_there_is_said_in_words(agent_process: Callable[..., Any]) -> None:
    agent = agent_process(socket={"group": "no-such-group"})
    with pytest.raises(RuntimeError) as ended:
        agent.start()
    said = str(ended.value)
    assert "Traceback" not in said
    assert "KeyError" not in said
    (line,) = [line for line in agent.log_lines() if line["event"] == "could_not_run"]
    assert line["code"] == "request.invalid"
    assert "socket.group" in line["why"]
    assert "no-such-group" in line["why"]
    assert not agent.settings.storage.state_dir.exists(), "nothing was touched"


def test_a_traceback_shows_no_variables() -> None:
    code = (
        "import structlog, ppec_agentd.log_setup as log_setup, ppec_agentd.settings as settings\n"
        "log_setup.set_up_logs(settings.LogSettings(format={!r}))\n"
        "def fail(secret): raise ValueError('as planned')\n"
        "try: fail('-'.join(['hunter', '2']))\n"
        "except ValueError: structlog.get_logger().exception('failed')\n"
    )
    for form in ("console", "json"):
        argv = [sys.executable, "-c", code.format(form)]
        said = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stderr
        assert "as planned" in said
        assert "hunter-2" not in said


@pytest.mark.parametrize(("installed", "version"), [("0.1.0+1a2b3c4d", "0.1.0+1a2b3c4d"), (None, "0.1.0")])
def test_its_version_is_the_releases(tmp_path: Path, installed: str | None, version: str) -> None:
    """From the release's metadata; a bare source tree has the constant."""
    source = str(Path(ppec_agentd.__file__).parent.parent)
    if installed is not None:
        metadata = tmp_path / "ppec-1.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: ppec\nVersion: {installed}\n")
    # -I -S: no environment, no site-packages; only the two folders named here.
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {source!r}]; import ppec_agentd as a; print(a.AGENT_VERSION)"
    )
    argv = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == version


def test_the_ledger_follows_what_others_do_to_domains(settings: Any, words: Any, vm: Any) -> None:
    async def scenario() -> None:
        async with words.open_agent(settings) as agent:
            housekeeping = Housekeeping(agent.actions, ReportSource("h1", agent.context))
            agent.hypervisor.on_event(housekeeping.heard)
            by_hand = Domain(uuid4(), "hand", VmState.RUNNING, 2, 700)
            agent.hypervisor.make_by_hand(by_hand)
            await housekeeping.once()
            assert (await agent.left_behind())["memory_mib"] == 700
            agent.hypervisor.cut_off()
            agent.hypervisor.come_back()
            await agent.hypervisor.destroy(by_hand.vm_id)
            await agent.hypervisor.undefine(by_hand.vm_id)
            agent.hypervisor.cut_off()
            await housekeeping.once()
            totals = agent.context.ledger.totals()
            assert totals.memory_mib - totals.memory_free_mib == 700, "it could not be followed"
            agent.hypervisor.come_back()
            housekeeping.heard(HypervisorEvent(EventKind.RECONNECTED))
            await housekeeping.once()
            assert await agent.left_behind() == words.nothing

    asyncio.run(scenario())
