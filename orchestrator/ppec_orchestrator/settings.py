# SPDX-License-Identifier: Apache-2.0
"""The orchestrator's settings: a TOML file, then `PPEC_…` environment variables over it."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from ppec_contract.api_vms import MAX_BATCH
from ppec_contract.errors import PpecError
from ppec_contract.validation import between, validation_problem

DEFAULT_CONFIG = Path("/etc/ppec/orchestrator.toml")
PORT = 8443
# A host is silent when it has missed this many heartbeats.
MISSED_HEARTBEATS = 3
_DAY_S = 86400


class Settings(BaseSettings):
    """`server_names` are the names and addresses hosts and people reach this orchestrator by; its certificate
    carries them all, and images are fetched from the first. Intervals are in seconds, sizes as named.

    Agents take no interval outside these bounds either. A body is held in memory, an image on disk.
    """

    model_config = SettingsConfigDict(env_prefix="PPEC_", extra="forbid", frozen=True)

    state_dir: Path = Path("/var/lib/ppec-orchestrator")
    database_url: str = ""
    listen: tuple[str, ...] = ("0.0.0.0",)  # noqa: S104 - hosts report from other machines
    port: Annotated[int, between(0, 65535)] = PORT
    server_names: Annotated[tuple[str, ...], Field(min_length=1)] = ("localhost", "127.0.0.1")
    heartbeat_interval_s: Annotated[float, between(0.5, 3600, "s")] = 10.0
    report_interval_s: Annotated[float, between(1, _DAY_S, "s")] = 60.0
    liveness_flush_s: Annotated[float, between(0.01, 60, "s")] = 2.0
    max_body_bytes: Annotated[int, between(1024, 256 * 1024**2, "bytes")] = 8 * 1024 * 1024
    max_image_bytes: Annotated[int, between(1, 16 * 1024**4, "bytes")] = 64 * 1024**3
    enrolment_token_lifetime_s: Annotated[float, between(1, 30 * _DAY_S, "s")] = 3600.0
    # Without it every run starts Ansible from cold: slower, and nothing else.
    fork_server: bool = True
    # Started runs that wait for a request: two, and as many as bursts have lacked, of some 40 MiB each.
    most_standing_runs: Annotated[int, between(1, 64)] = 8
    # Open consoles: how many at once, and how long one may be when nothing is written or typed.
    max_consoles: Annotated[int, between(1, 1000)] = 64
    console_idle_s: Annotated[float, between(1, _DAY_S, "s")] = 1800.0
    # Where prefixes with a `netbox_id` get their addresses from; none without a URL. The token is in a file of its own.
    netbox_url: str = ""
    netbox_token_path: Path | None = None
    netbox_ca_path: Path | None = None
    # By this description NetBox knows which addresses are this installation's: no two may have the same.
    netbox_mark: Annotated[str, Field(min_length=1, max_length=64)] = "ppec"
    # Free addresses that stand ready of each such prefix.
    netbox_standing: Annotated[int, between(1, 1000)] = 16
    netbox_interval_s: Annotated[float, between(0.1, 3600, "s")] = 10.0
    # Requests for so many VMs or more need a plan that somebody else has approved; 0: none does.
    approvals_vms_from: Annotated[int, between(0, MAX_BATCH)] = 0
    log_level: str = "info"

    @classmethod
    def load(cls, path: Path | None) -> Settings:
        """From `path` (it must exist), else from the default place if there is one; raises `request.invalid`."""
        source = path or DEFAULT_CONFIG
        values: dict[str, Any] = {}
        try:
            if path is not None or source.exists():
                values = tomllib.loads(source.read_text(encoding="utf-8"))
            return cls(**_under_environment(values))
        except ValidationError as error:
            raise validation_problem(error, subject=f"settings {source}") from error
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise PpecError(
                "request.invalid",
                f"settings {source} can't be read: {error}",
                hint="Give --config the path of a TOML file.",
                subject=f"settings {source}",
            ) from error

    @property
    def silent_after_s(self) -> float:
        return MISSED_HEARTBEATS * self.heartbeat_interval_s

    @property
    def effective_database_url(self) -> str:
        return self.database_url or f"sqlite:///{self.state_dir}/ppec.db"

    @property
    def base_url(self) -> str:
        """Where hosts find this orchestrator."""
        name = self.server_names[0]
        return f"https://{f'[{name}]' if ':' in name else name}:{self.port}"

    @property
    def images_dir(self) -> Path:
        return self.state_dir / "images"

    @property
    def pki_dir(self) -> Path:
        return self.state_dir / "pki"

    @property
    def admin_token_path(self) -> Path:
        return self.state_dir / "admin.token"

    def image_url(self, sha256: str) -> str:
        return f"{self.base_url}/v1/images/{sha256}/content"


def _under_environment(values: dict[str, Any]) -> dict[str, Any]:
    """The file's values that no environment variable overrides: pydantic-settings ranks arguments first."""
    return {name: value for name, value in values.items() if f"PPEC_{name.upper()}" not in os.environ}
