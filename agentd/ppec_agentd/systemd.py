# SPDX-License-Identifier: Apache-2.0
"""The two things systemd and a daemon say to one another: sockets handed over, and notifications.

Source: sd_listen_fds(3), sd_notify(3). Both are a few lines of stdlib; without systemd they do nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket

_FIRST_LISTEN_FD = 3


def take_listening_socket() -> socket.socket | None:
    """The one listening socket systemd (or the syncer) opened for this process, if any."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        return None
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    os.set_inheritable(_FIRST_LISTEN_FD, False)
    return socket.socket(fileno=_FIRST_LISTEN_FD)


def notify(*lines: str) -> None:
    """Tells the service manager, e.g. ``notify("READY=1", "STATUS=serving")``. Never fails."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as peer:
        peer.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
        peer.sendall("\n".join(lines).encode())
