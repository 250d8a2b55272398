# SPDX-License-Identifier: Apache-2.0
"""The program around the commands: settings, errors, exit codes, what it imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ppec_contract.errors import ERROR_TABLE, PpecError, exit_code
from ppec_orchestrator.cli.configuration import DEFAULT_SERVER, resolve
from ppec_orchestrator.cli.session import hoisted

PPEC = [sys.executable, "-m", "ppec_orchestrator.cli.main"]


def test_flags_go_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / ".config" / "ppec" / "config.toml"
    home = {"HOME": str(tmp_path)}
    assert resolve({}, home).server == DEFAULT_SERVER
    file.parent.mkdir(parents=True)
    file.write_text('server = "https://file:1/"\ntoken = "file"\nca = "~/ca.pem"\n')
    assert resolve({}, home).server == "https://file:1"
    assert resolve({}, home).ca == Path("~/ca.pem").expanduser()
    environment = home | {"PPEC_SERVER": "https://env:1", "PPEC_TOKEN": "env"}
    assert (resolve({}, environment).server, resolve({}, environment).token) == ("https://env:1", "env")
    chosen = resolve({"server": "https://flag:1", "token": None}, environment)
    assert (chosen.server, chosen.token) == ("https://flag:1", "env")


@pytest.mark.parametrize("text", ["server = ", "server = 1", 'sever = "x"', "\x00"])
def test_a_file_that_can_not_be_used_is_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "ppec" / "config.toml"
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(PpecError, match=r"config\.toml"):
        resolve({}, {"XDG_CONFIG_HOME": str(tmp_path)})


@pytest.mark.parametrize("url", ["http://orchestrator:8443", "ftp://x", "orchestrator:8443", "https://", "file:///x"])
def test_a_token_is_never_sent_in_clear(url: str) -> None:
    with pytest.raises(PpecError) as caught:
        resolve({"server": url}, {})
    assert caught.value.code == "request.invalid"


@pytest.mark.parametrize(
    ("given", "put"),
    [
        ("vm list --output json", "--output json vm list"),
        ("vm list -o json", "-o json vm list"),
        ("vm --ca=x list --token t", "--ca=x --token t vm list"),
        ("vm show -- --output", "vm show -- --output"),
        ("vm list --output", "--output vm list"),
        ("--help", "--help"),
    ],
)
def test_common_options_may_stand_anywhere(given: str, put: str) -> None:
    assert hoisted(given.split()) == put.split()


def test_without_a_token_it_says_what_to_do(ppec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PPEC_TOKEN")
    ran = ppec("vm", "list")
    assert (ran.code, ran.out) == (3, "")
    assert ran.err == "error: no valid token [auth.required]\nhint: Make a token.\n"
    assert ppec("--token", "wrong", "vm", "list").code == 3


@pytest.mark.parametrize("code", ERROR_TABLE)
def test_every_error_has_its_exit_code(orchestrator: Any, ppec: Any, code: str) -> None:
    orchestrator.instead["GET", "/v1/flavors"] = [lambda handler: handler.problem(PpecError(code, "so it is"))]
    ran = ppec("flavor", "list")
    assert ran.code == exit_code(code)
    assert ran.err == f"error: so it is [{code}]\n"
    assert ran.out == ""


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (502, b"<html>Bad Gateway</html>", 8),
        (401, b"", 3),
        (302, b"", 8),
        (200, b"<html>", 2),
        (200, b'{"items": [{"name": 1}]}', 2),
    ],
)
def test_a_server_that_is_not_an_orchestrator(
    orchestrator: Any, ppec: Any, status: int, body: bytes, code: int
) -> None:
    orchestrator.instead["GET", "/v1/flavors"] = [lambda handler: handler.reply(status, body, "text/html")]
    ran = ppec("flavor", "list")
    assert ran.code == code
    assert ran.err.startswith("error: ")
    assert "Traceback" not in ran.err


def test_nobody_there(ppec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPEC_SERVER", "https://127.0.0.1:1")
    ran = ppec("flavor", "list")
    assert ran.code == 7
    assert "[orchestrator.unavailable]" in ran.err


def test_a_ca_file_that_is_none(ppec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPEC_SERVER", "https://127.0.0.1:1")
    (tmp_path / "ca").write_text("no certificate")
    for ca in (tmp_path / "ca", tmp_path / "absent"):
        assert ppec("flavor", "list", "--ca", str(ca)).code == 2


@pytest.mark.parametrize("line", ["vm", "vm create", "vm fly", "vm create --flavor x --image y --policy wild", "--wat"])
def test_a_wrong_command_line_is_exit_code_2(ppec: Any, line: str) -> None:
    assert ppec(*line.split()).code == 2


def test_help_of_every_command(ppec: Any) -> None:
    groups = (
        "vm",
        "host",
        "operation",
        "image",
        "flavor",
        "datacentre",
        "cluster",
        "rack",
        "ipdb prefix",
        "ipdb vrf",
        "fleet",
        "plan",
    )
    for group in groups:
        assert ppec(*group.split(), "--help").code == 0
    top = ppec("--help")
    assert top.code == 0
    assert "Exit codes: 2 fix the request" in " ".join(top.out.split())


def test_it_imports_no_server(orchestrator: Any, make: Any, tmp_path: Path) -> None:
    """And of its own weight only what the command needs."""
    program = (
        "import sys, json\n"
        "from ppec_orchestrator.cli.main import run\n"
        "run(sys.argv[1:])\n"
        "print(json.dumps(sorted(name.partition('.')[0] for name in sys.modules)), file=sys.stderr)\n"
    )
    environment = {**os.environ, "PPEC_SERVER": orchestrator.url, "PPEC_TOKEN": make.token, "HOME": str(tmp_path)}
    loaded = {}
    for line in ("vm list -o json", "--help"):
        command = [sys.executable, "-c", program, *line.split()]
        ran = subprocess.run(command, env=environment, capture_output=True, timeout=120, check=True)
        loaded[line] = set(json.loads(ran.stderr.splitlines()[-1]))
    servers = {"fastapi", "starlette", "uvicorn", "sqlalchemy", "alembic", "ansible", "ansible_runner", "numpy"}
    assert not loaded["vm list -o json"] & servers
    assert not loaded["--help"] & (servers | {"httpx2", "rich"})


def test_the_program_writes_json_into_a_pipe(orchestrator: Any, make: Any, tmp_path: Path) -> None:
    orchestrator.vms = {"a": make.vm(0, "a", labels={"stadt": "Zürich"})}
    environment = {"PATH": os.environ["PATH"], "PPEC_SERVER": orchestrator.url, "PPEC_TOKEN": make.token}
    environment |= {"HOME": str(tmp_path), "LC_ALL": "C"}
    command = [*PPEC, "vm", "show", "a", "--output", "json"]
    ran = subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)
    assert ran.returncode == 0
    assert json.loads(ran.stdout)["labels"] == {"stadt": "Zürich"}
    assert ran.stderr == b""
