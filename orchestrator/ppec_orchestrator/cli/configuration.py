# SPDX-License-Identifier: Apache-2.0
"""Which orchestrator to talk to, and as whom: flags, then environment, then `~/.config/ppec/config.toml`."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ppec_contract.errors import PpecError

DEFAULT_SERVER = "https://localhost:8443"
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_KEYS = ("server", "token", "ca")


@dataclass(frozen=True, slots=True)
class Configuration:
    """`ca` is the path of a CA certificate (PEM); without it the system's CAs are trusted."""

    server: str
    token: str | None
    ca: Path | None


def config_path(environment: Mapping[str, str]) -> Path:
    base = environment.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path(environment.get("HOME", "/")) / ".config") / "ppec" / "config.toml"


def resolve(flags: Mapping[str, str | None], environment: Mapping[str, str] = os.environ) -> Configuration:
    """Raises PpecError `request.invalid` for a file that can't be used."""
    file = _from_file(config_path(environment))

    def chosen(key: str) -> str | None:
        return flags.get(key) or environment.get(f"PPEC_{key.upper()}") or file.get(key)

    ca = chosen("ca")
    return Configuration(
        server=_safe_server((chosen("server") or DEFAULT_SERVER).rstrip("/")),
        token=chosen("token"),
        ca=Path(ca).expanduser() if ca else None,
    )


def _safe_server(url: str) -> str:
    """A token sent in clear is a token given away: http is for the same machine only."""
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return url
    if parts.scheme == "http" and parts.hostname in _LOOPBACK:
        return url
    raise PpecError(
        "request.invalid",
        f"{url[:200]!r} is not an https:// URL",
        hint="Give --server (PPEC_SERVER) as https://name:port; http is taken for this machine only.",
        subject="configuration",
    )


def _from_file(path: Path) -> dict[str, str]:
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise _unusable(path, str(error)) from error
    wrong = [key for key, value in values.items() if key not in _KEYS or not isinstance(value, str)]
    if wrong:
        raise _unusable(path, f"wrong or unknown keys: {', '.join(wrong)}")
    return values


def _unusable(path: Path, why: str) -> PpecError:
    return PpecError(
        "request.invalid",
        f"the configuration {path} can't be used: {why}",
        hint=f"It takes the texts {', '.join(_KEYS)}.",
        subject=f"configuration {path}",
    )
