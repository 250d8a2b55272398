# SPDX-License-Identifier: Apache-2.0
"""`ppec vm console` in a real terminal, against a WebSocket server that a test scripts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from ppec_contract.api_consoles import ConsoleEnd, ConsoleNotice
from ppec_contract.errors import PpecError
from ppec_lab.terminal import Terminal

SOON_S = 60
TOKEN = "secret-token-of-the-test"
COMMAND = [sys.executable, "-m", "ppec_orchestrator.cli.main", "vm", "console", "web"]


@dataclass
class Server:
    """A console: `script` is what it does with a connection that is let in."""

    url: str = ""
    script: Callable[[ServerConnection], None] = lambda _: None
    refusal: PpecError | None = None
    paths: list[str] = field(default_factory=list)
    # What was typed, and whether the client closed it itself.
    typed: bytes = b""
    left: threading.Event = field(default_factory=threading.Event)

    def hear(self, connection: ServerConnection, last: bytes) -> None:
        """Until `last` was typed."""
        while last not in self.typed:
            self.typed += connection.recv(timeout=SOON_S)  # type: ignore[operator]

    def handle(self, connection: ServerConnection) -> None:
        try:
            self.script(connection)
        except ConnectionClosed:
            self.left.set()

    def admit(self, connection: ServerConnection, request: Any) -> Any:
        self.paths.append(request.path)
        refusal = self.refusal
        if refusal is None and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            refusal = PpecError("auth.required", "no")
        if refusal is None:
            return None
        problem = refusal.problem()
        return connection.respond(problem.status, problem.model_dump_json())


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    with serve(made.handle, "127.0.0.1", 0, process_request=made.admit, compression=None) as listener:
        made.url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        thread = threading.Thread(target=listener.serve_forever, daemon=True)
        thread.start()
        yield made
        listener.shutdown()
        thread.join(SOON_S)


def tell(connection: ServerConnection, **notice: Any) -> None:
    connection.send(ConsoleNotice(**notice).model_dump_json(exclude_defaults=True))


@pytest.fixture
def terminal(server: Server, tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """With `ppec vm console` in it."""
    with contextlib.ExitStack() as stack:

        def start(*options: str) -> Terminal:
            return stack.enter_context(Terminal([*COMMAND, *options], environment(server, tmp_path)))

        yield start


def environment(server: Server, home: Path) -> dict[str, str]:
    user = {"PPEC_SERVER": server.url, "PPEC_TOKEN": TOKEN}
    return {"PATH": os.environ["PATH"], "HOME": str(home), "TERM": "xterm", **user}


def test_every_key_goes_to_the_guest_until_the_escape(server: Server, terminal: Callable[..., Terminal]) -> None:
    def script(connection: ServerConnection) -> None:
        tell(connection, state="running")
        connection.send(b"login\xff: ")
        server.hear(connection, b"end")
        connection.send(server.typed)
        connection.recv(timeout=SOON_S)

    server.script = script
    console = terminal()
    console.see(b"login\xff: ")
    assert not console.modes()[3] & (termios.ECHO | termios.ICANON | termios.ISIG)
    # Interrupt, suspend, quit, end of file, flow control, delete.
    keys = b"root\r\x03\x1a\x1c\x04\x13\x11\x7fend"
    console.type(keys)
    console.see(keys)
    console.type(b"\x1d")
    code, told = console.end()
    assert (code, server.typed, console.untouched) == (0, keys, True)
    assert "Ctrl-] leaves" in told
    assert server.left.wait(SOON_S)
    assert server.paths == ["/v1/vms/web/console?read_only=false&follow=true&tail_bytes=16384"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_terminal_as_it_was(
    server: Server, terminal: Callable[..., Terminal], number: signal.Signals
) -> None:
    def script(connection: ServerConnection) -> None:
        connection.send(b"ready")
        connection.recv(timeout=SOON_S)

    server.script = script
    console = terminal()
    console.see(b"ready")
    console.process.send_signal(number)
    assert (console.end()[0], console.untouched) == (128 + number, True)
    assert server.left.wait(SOON_S)


@pytest.mark.parametrize(
    ("notice", "code", "said"),
    [
        ({"ended": ConsoleEnd.VM_OFF}, 0, "the VM is off"),
        ({"ended": ConsoleEnd.IDLE}, 0, "nothing was written"),
        ({"ended": "problem", "problem": PpecError("console.busy", "in other hands").problem()}, 7, "in other hands"),
        (None, 7, "closed the console"),
    ],
)
def test_how_it_ended_is_said_and_the_terminal_is_as_it_was(
    server: Server, terminal: Callable[..., Terminal], notice: dict[str, Any] | None, code: int, said: str
) -> None:
    def script(connection: ServerConnection) -> None:
        connection.send(b"bye")
        if notice is not None:
            tell(connection, **notice)

    server.script = script
    console = terminal()
    console.see(b"bye")
    ended = console.end()
    assert (ended[0], console.untouched) == (code, True), ended
    assert said in ended[1]


def test_read_only_touches_neither_keys_nor_terminal(server: Server, terminal: Callable[..., Terminal]) -> None:
    def script(connection: ServerConnection) -> None:
        connection.send(b"ready")
        connection.recv(timeout=SOON_S)

    server.script = script
    console = terminal("--read-only", "--tail-bytes", "5")
    console.see(b"ready")
    assert console.untouched
    assert server.paths == ["/v1/vms/web/console?read_only=true&follow=true&tail_bytes=5"]
    console.process.send_signal(signal.SIGINT)
    assert console.end()[0] == 0
    assert server.left.wait(SOON_S)


def test_a_refusal_has_its_exit_code(server: Server, terminal: Callable[..., Terminal]) -> None:
    for code, exit_code in (("vm.not_found", 4), ("auth.forbidden", 3), ("orchestrator.busy", 7)):
        server.refusal = PpecError(code, f"because of {code}")
        ended = terminal().end()
        assert (ended[0], f"because of {code}" in ended[1]) == (exit_code, True), ended


def test_a_pipe_is_typed_whole_and_a_file_gets_the_bytes(server: Server, tmp_path: Path) -> None:
    def script(connection: ServerConnection) -> None:
        server.hear(connection, b"halt\n")
        connection.send(bytes(range(256)))
        tell(connection, ended=ConsoleEnd.VM_OFF)

    server.script = script
    typed = b"\x1d is only a key here\nhalt\n"
    ran = subprocess.run(
        COMMAND, env=environment(server, tmp_path), input=typed, capture_output=True, timeout=SOON_S, check=False
    )
    assert (ran.returncode, ran.stdout, server.typed) == (0, bytes(range(256)), typed), ran.stderr
