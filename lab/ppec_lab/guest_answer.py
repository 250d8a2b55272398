# SPDX-License-Identifier: Apache-2.0
"""Asks guests over the network whether they are up and have applied their seed."""

from __future__ import annotations

import http.client
import time
from collections.abc import Mapping
from dataclasses import dataclass

from ppec_lab.conditions import NotReachedError

PORT = 8000

# The Debian guest answers like the small one, once cloud-init has come to its end: "<host name> <instance id>".
DEBIAN_USER_DATA = """#cloud-config
write_files:
  - path: /run/ppec-answer/answer.sh
    permissions: "0755"
    content: |
      #!/bin/sh
      echo "$(hostname) $(cat /var/lib/cloud/data/instance-id)" > /run/ppec-answer/index.html
runcmd:
  - [sh, /run/ppec-answer/answer.sh]
  - [systemd-run, --unit=ppec-answer, python3, -m, http.server, "8000", --directory, /run/ppec-answer]
"""


@dataclass(frozen=True)
class Answer:
    """What the guest at `address` said, and how long after the start of the wait."""

    address: str
    host_name: str
    instance_id: str
    user_data_sha256: str | None
    after_s: float


def ask(address: str, timeout_s: float = 2.0) -> tuple[str, str, str | None] | None:
    """Host name, instance id and the user data's sha256 (if it says), or None while there is no answer."""
    connection = http.client.HTTPConnection(address, PORT, timeout=timeout_s)
    try:
        connection.request("GET", "/")
        words = connection.getresponse().read(4096).decode(errors="replace").split()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return (words[0], words[1], words[2] if len(words) > 2 else None) if len(words) >= 2 else None


def wait_for_answers(addresses: Mapping[str, str], *, timeout_s: float) -> dict[str, Answer]:
    """Waits until each VM (name to address) has answered by its own address with its own name.

    Raises NotReachedError naming those that did not.
    """
    start = time.monotonic()
    answers: dict[str, Answer] = {}
    while len(answers) < len(addresses):
        for name, address in addresses.items():
            if name in answers or (said := ask(address)) is None or said[0] != name:
                continue
            answers[name] = Answer(address, *said, after_s=time.monotonic() - start)
        if time.monotonic() - start > timeout_s:
            silent = ", ".join(f"{n} ({a})" for n, a in addresses.items() if n not in answers)
            raise NotReachedError(f"waited {timeout_s:g} s in vain for guests to answer: {silent}")
        time.sleep(0.1)
    return answers
