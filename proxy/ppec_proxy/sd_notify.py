# SPDX-License-Identifier: Apache-2.0
"""Tells the service manager how the daemon is (sd_notify(3)); does nothing when none listens."""

from __future__ import annotations

import os
import socket


def notify(*assignments: str) -> None:
    """Sends e.g. `READY=1`. A name that starts with @ is in the abstract namespace."""
    target = os.environ.get("NOTIFY_SOCKET")
    if not target:
        return
    address = "\0" + target[1:] if target.startswith("@") else target
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        try:
            channel.sendto("\n".join(assignments).encode(), address)
        except OSError:
            # A service manager that restarts is no reason to stop serving.
            return
