# SPDX-License-Identifier: Apache-2.0
"""The proxy's settings: one flat TOML file, `/etc/ppec/proxy.toml`."""

from __future__ import annotations

import tomllib
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ppec_contract.agent import PROXY_PORT, SOCKET_PATH
from ppec_contract.errors import PpecError
from ppec_contract.frames import MAX_FRAME_BYTES
from ppec_contract.model import Model
from ppec_contract.validation import between, parse

DEFAULT_PATH = Path("/etc/ppec/proxy.toml")

Seconds = Annotated[float, between(0.001, 86400, "s")]
Port = Annotated[int, between(0, 65535)]


class Settings(Model):
    """All keys of the file. Times are seconds, sizes bytes.

    `allow_from` has no default on purpose: a proxy without a ring-fence does not start. `listen_port` 0 takes a free
    port, which the ready message to the service manager names.
    """

    allow_from: Annotated[tuple[IPv4Network | IPv6Network, ...], Field(min_length=1, max_length=256)]
    certificate_path: Path
    key_path: Path
    ca_path: Path
    listen_address: IPv4Address | IPv6Address = IPv4Address("0.0.0.0")  # noqa: S104 - the ring-fence guards it
    listen_port: Port = PROXY_PORT
    agent_socket_path: Path = Path(SOCKET_PATH)
    max_body_bytes: Annotated[int, between(1024, MAX_FRAME_BYTES, "bytes")] = MAX_FRAME_BYTES
    max_agent_connections: Annotated[int, between(1, 1024)] = 32
    body_timeout_s: Seconds = 30.0
    agent_queue_timeout_s: Seconds = 5.0
    read_timeout_s: Seconds = 30.0
    change_timeout_s: Seconds = 1200.0
    stalled_client_timeout_s: Seconds = 30.0
    shutdown_timeout_s: Seconds = 30.0


def load(path: Path) -> Settings:
    """Reads and checks the file. Raises PpecError `request.invalid` naming the file and each wrong key."""
    subject = f"settings {path}"
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PpecError(
            "request.invalid",
            f"{subject} can't be read: {error}",
            hint="Write the file as TOML and give it with --config.",
            subject=subject,
        ) from error
    return parse(Settings, values, subject=subject)
