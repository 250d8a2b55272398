# SPDX-License-Identifier: Apache-2.0
"""`ppec vm console`: a WebSocket on one side, the user's terminal on the other.

One thread shows what comes, another sends what is typed, and the main thread waits: a signal may come at any point, and
within the WebSocket library it would leave a lock taken that closing waits for. What a guest writes goes to the
terminal as it is, control sequences included: that is what a console is.
"""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress

from pydantic import ValidationError
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from ppec_contract.api_consoles import ConsoleEnd, ConsoleNotice, ConsoleOpen
from ppec_contract.errors import PpecError
from ppec_contract.guest import MAX_CONSOLE_TAIL_BYTES
from ppec_orchestrator.cli.client import refusal, trust, unreachable
from ppec_orchestrator.cli.configuration import Configuration
from ppec_orchestrator.cli.output import Output
from ppec_orchestrator.cli.session import Session
from ppec_orchestrator.cli.terminal import Ended, raw

ESCAPE = b"\x1d"  # Ctrl-]
_OPEN_S = 20.0
_READ_BYTES = 4096
_ENDS = {
    ConsoleEnd.VM_OFF: "the VM is off",
    ConsoleEnd.VM_GONE: "the VM is gone",
    ConsoleEnd.COMPLETE: "",
    ConsoleEnd.IDLE: "nothing was written or typed for long",
    ConsoleEnd.UNAUTHORISED: "the token counts no longer",
}


def open_console(session: Session, path: str, asked: ConsoleOpen) -> None:
    """Until the user leaves or the console ends. Raises PpecError if it ended by a problem, or could not be opened."""
    output, typing = session.output, not asked.read_only
    keys = sys.stdin.fileno() if typing else -1
    with _opened(session.configuration, path, asked) as socket:
        if typing:
            output.say(f"Connected. {'Ctrl-] leaves.' if os.isatty(keys) else ''}".strip())
        try:
            end = _attached(socket, keys, output)
        except KeyboardInterrupt:
            end = None
        except Ended as ended:
            raise SystemExit(128 + ended.number) from ended
    _tell(output, end)


def _attached(socket: ClientConnection, keys: int, output: Output) -> ConsoleNotice | None:
    """How it ended; None if the user left."""
    left = threading.Event()
    if keys < 0:
        return _screen(socket, output, left).result()
    end, wake = os.pipe()
    keyboard = threading.Thread(target=_type, args=(socket, keys, end, left), name="keyboard", daemon=True)
    try:
        with raw(keys):
            keyboard.start()
            return _screen(socket, output, left).result()
    finally:
        os.close(wake)
        keyboard.join(_OPEN_S)
        os.close(end)


def _screen(socket: ClientConnection, output: Output, left: threading.Event) -> Future[ConsoleNotice | None]:
    """What `_shown` returns or raises."""
    end: Future[ConsoleNotice | None] = Future()

    def show() -> None:
        try:
            end.set_result(_shown(socket, output, left))
        except BaseException as error:
            end.set_exception(error)

    threading.Thread(target=show, name="screen", daemon=True).start()
    return end


def _shown(socket: ClientConnection, output: Output, left: threading.Event) -> ConsoleNotice | None:
    screen = sys.stdout.fileno()
    try:
        for message in socket:
            if isinstance(message, bytes):
                _write(screen, message)
                continue
            notice = _read(message)
            if notice.ended is not None:
                return notice
            if notice.skipped_bytes:
                output.say(f"\r[{notice.skipped_bytes} bytes were skipped]\r")
    except ConnectionClosed as error:
        if not left.is_set():
            raise unreachable("the other end of the console", error) from error
    if not left.is_set():
        raise unreachable("the other end of the console", EOFError("it closed the console without saying why"))
    return None


def _type(socket: ClientConnection, keys: int, end: int, left: threading.Event) -> None:
    """Sends what is typed, up to the escape; of a file or pipe all of it, whatever it holds."""
    escapes = os.isatty(keys)
    with suppress(ConnectionClosed, OSError):
        while True:
            ready, _, _ = select.select([keys, end], [], [])
            if end in ready:
                return
            data = os.read(keys, _READ_BYTES)
            if not data and not escapes:
                return  # The end of a file says that no more is typed, not that nobody looks.
            typed, escape, _ = data.partition(ESCAPE) if escapes else (data, b"", b"")
            if typed:
                socket.send(typed)
            if escape or not data:
                left.set()
                socket.close()
                return


def _write(screen: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(screen, view) :]


def _tell(output: Output, end: ConsoleNotice | None) -> None:
    if end is None or end.ended is None:
        output.say("\nLeft the console.")
    elif end.problem is not None:
        raise end.problem.error()
    elif why := _ENDS.get(end.ended, end.ended.value):
        output.say(f"\nThe console ended: {why}.")


def _read(message: str) -> ConsoleNotice:
    try:
        return ConsoleNotice.model_validate_json(message)
    except ValidationError as error:
        raise PpecError(
            "request.unsupported_version",
            "the orchestrator tells of the console what this program doesn't know",
            hint="Client and orchestrator may be of different releases.",
            subject="orchestrator",
        ) from error


@contextmanager
def _opened(chosen: Configuration, path: str, asked: ConsoleOpen) -> Iterator[ClientConnection]:
    query = f"read_only={_word(asked.read_only)}&follow={_word(asked.follow)}&tail_bytes={asked.tail_bytes}"
    try:
        socket = connect(
            f"{chosen.server.replace('http', 'ws', 1)}{path}?{query}",
            additional_headers={"Authorization": f"Bearer {chosen.token}"} if chosen.token else {},
            ssl=trust(chosen) if chosen.server.startswith("https:") else None,
            open_timeout=_OPEN_S,
            compression=None,
            proxy=None,
            max_size=2 * MAX_CONSOLE_TAIL_BYTES,
        )
    except InvalidStatus as error:
        raise refusal(
            error.response.status_code, error.response.reason_phrase, bytes(error.response.body or b"")
        ) from error
    except (OSError, TimeoutError, InvalidHandshake) as error:
        raise unreachable(chosen.server, error) from error
    with socket:
        yield socket


def _word(flag: bool) -> str:
    return "true" if flag else "false"
