# SPDX-License-Identifier: Apache-2.0
"""The `ansible-playbook` that ansible-runner finds first: hands itself to the fork server, or runs the real one.

Installed as a script of its own and started by `python -I -S -E`, so it imports built-in modules only: what it costs
is added to every run. It passes argv, environment, working directory and its three descriptors to the fork server
and waits for the exit code. Without a fork server it becomes the real ansible-playbook.
"""

import _socket
import _struct
import os
import sys

SOCKET_VARIABLE = "PPEC_FORK_SOCKET"
PYTHON_VARIABLE = "PPEC_ANSIBLE_PYTHON"


def request() -> bytes:
    """`playbook`, working directory, umask, argv and environment: NUL-separated, the argument count in front."""
    umask = os.umask(0o77)
    os.umask(umask)
    argv = [os.fsencode(word) for word in sys.argv[1:]]
    environment = [name + b"=" + value for name, value in os.environb.items()]
    directory = os.getcwdb()  # noqa: PTH109 - importing pathlib would take longer than all the rest
    head = [b"playbook", directory, b"%o" % umask, b"%d" % len(argv)]
    return b"\0".join([*head, *argv, *environment])


def by_fork(path: str) -> int:
    """The exit code. OSError when the fork server isn't there or can't take the request."""
    body = request()
    descriptors = _struct.pack("3i", 0, 1, 2)
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
    connection.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDBUF, len(body) + 65536)
    # Nothing between these two: the fork server waits for the request of whoever has connected.
    connection.connect(path)
    connection.sendmsg([body], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, descriptors)])
    if connection.recv(64) != b"taken":
        raise OSError("refused")
    answer = connection.recv(64)
    # The playbook is under way: from here on a second one must not be started.
    return int(answer) if answer else 250


def main() -> None:
    # ansible-runner has SIGHUP ignored; when it dies, its playbook must not linger on a dead terminal.
    import _signal  # type: ignore[import-not-found]

    _signal.signal(_signal.SIGHUP, _signal.SIG_DFL)
    path = os.environ.get(SOCKET_VARIABLE)
    if path:
        try:  # noqa: SIM105 - contextlib is not a built-in module
            os._exit(by_fork(path))
        except OSError:
            pass
    python = os.environ.get(PYTHON_VARIABLE) or sys.executable
    os.execv(python, [python, "-m", "ansible", "playbook", *sys.argv[1:]])  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    main()
