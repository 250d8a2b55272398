# SPDX-License-Identifier: Apache-2.0
"""The agent's settings: one TOML file, read once, checked whole, frozen.

Units stand last in each name; every number has bounds, which its refusal names.
`/etc/ppec/agentd.toml` is rendered by the `agentd` role; README.md shows a whole file.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from ppec_agentd.domain_xml.build import DiskCache
from ppec_agentd.nvme.drive import PciAddress
from ppec_agentd.topology import declare_topology
from ppec_contract.agent import SOCKET_PATH
from ppec_contract.errors import PpecError
from ppec_contract.model import BridgeName, HostName, Model, ResourceName
from ppec_contract.validation import between, parse
from ppec_contract.words import MAX_PARTS, MAX_POOLS

DEFAULT_PATH = Path("/etc/ppec/agentd.toml")
# sun_path holds 108 bytes with its final NUL; the agent binds a temporary name four bytes longer, then renames it.
LONGEST_SOCKET_PATH = 103

_DAY_S = 86400
_LARGEST_MIB = 2**30
Seconds = Annotated[float, between(0.001, _DAY_S, "s")]


class SocketSettings(Model):
    """Where the agent listens and who may connect.

    Allowed are root, the agent's own user, members of `group`, and `allowed_uids`. With an
    empty `group` the socket belongs to the agent's own group and only the users count.
    """

    path: Path = Path(SOCKET_PATH)
    group: str = "ppec"
    mode: Annotated[int, between(0, 0o777)] = 0o660
    allowed_uids: tuple[Annotated[int, between(0, 2**32 - 2)], ...] = ()
    max_connections: Annotated[int, between(1, 4096)] = 64
    frame_timeout_s: Seconds = 10.0
    idle_timeout_s: Seconds = 600.0
    write_timeout_s: Seconds = 30.0

    @field_validator("path")
    @classmethod
    def _fits(cls, path: Path) -> Path:
        if len(str(path).encode()) > LONGEST_SOCKET_PATH:
            raise ValueError(f"the socket's path is longer than {LONGEST_SOCKET_PATH} bytes")
        return path


class PoolSettings(Model):
    """A folder for disks of VMs that ask for this pool; it must be there, the agent doesn't make it.

    `disk_mib` is what VMs may use; without it, what is free when the agent starts plus what VMs hold there already.
    With `mounted` the pool is used only if a file system is mounted at `path`.
    """

    path: Path
    disk_mib: Annotated[int, between(0, _LARGEST_MIB, "MiB")] | None = None
    mounted: bool = False

    @field_validator("path")
    @classmethod
    def _plain(cls, path: Path) -> Path:
        # The agent's unit names it, too, where blanks, quotes, colons and percent signs mean something.
        # Two slashes in front are kept, and make another path to whoever compares it, though it is the same folder.
        if not re.fullmatch(r"(/[A-Za-z0-9._+@-]+)+", str(path)) or ".." in path.parts:
            raise ValueError("a pool's path is absolute, without .. or // and of letters, digits, dots and -_+@ alone")
        return path


class StorageSettings(Model):
    """`state_dir` holds the journal and one folder per VM; images are kept in `image_dir` (default: state_dir/images).
    `pools`, by name, take disks of VMs that ask for them.

    `disk_mib` is what VMs may use; without it, what the file system had free plus what the VMs already hold. An image
    that no VM of the host needs is removed `image_keep_s` after it was last used: the folder is this agent's alone.
    """

    state_dir: Path = Path("/var/lib/ppec")
    image_dir: Path | None = None
    image_keep_s: Annotated[float, between(0.001, 3650 * _DAY_S, "s")] = 7 * 86400.0
    disk_mib: Annotated[int, between(0, _LARGEST_MIB, "MiB")] | None = None
    pools: Annotated[dict[ResourceName, PoolSettings], Field(max_length=MAX_POOLS)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _pools_are_apart(self) -> StorageSettings:
        """What is counted in one place must not be counted in another, nor taken for a VM's folder there."""
        places = {"the VMs' own place": self.vms, "the images": self.images, "the drives' records": self.drives}
        for name, pool in self.pools.items():
            for other, path in places.items():
                if pool.path.is_relative_to(path) or path.is_relative_to(pool.path):
                    raise ValueError(f"pool {name} at {pool.path} and {other} at {path} must not lie in one another")
            places[f"pool {name}"] = pool.path
        return self

    @property
    def images(self) -> Path:
        return self.image_dir or self.state_dir / "images"

    @property
    def vms(self) -> Path:
        return self.state_dir / "vms"

    @property
    def journal(self) -> Path:
        return self.state_dir / "journal.log"

    @property
    def drives(self) -> Path:
        return self.state_dir / "drives"

    @property
    def fake_hypervisor(self) -> Path:
        return self.state_dir / "fake-hypervisor.json"


class NvmeSettings(Model):
    """Which NVMe drives of the machine VMs may have whole, by PCI address (``0000:3b:00.0``).

    They are erased before each hand-over; of one in use by the host nothing is touched, and it is left out. An erasing
    may take `erase_timeout_s`.
    """

    drives: Annotated[tuple[PciAddress, ...], Field(max_length=MAX_PARTS)] = ()
    erase_timeout_s: Seconds = 3600.0

    @field_validator("drives")
    @classmethod
    def _each_once(cls, drives: tuple[PciAddress, ...]) -> tuple[PciAddress, ...]:
        twice = sorted({drive for drive in drives if drives.count(drive) > 1})
        if twice:
            raise ValueError(f"each drive is named once; more than once: {', '.join(twice)}")
        return drives


class LibvirtSettings(Model):
    """`domain_type` overrides the decision made from the CPU's flags; `disk_cache` is QEMU's cache mode of disks."""

    uri: Annotated[str, Field(min_length=1)] = "qemu:///system"
    domain_type: Literal["kvm", "qemu"] | None = None
    disk_cache: DiskCache = "none"


class ReserveSettings(Model):
    """What of each NUMA cell VMs never get: the host's own buffer; and what they get only together.

    `shared_cores_per_cell` cores, next to the reserved ones, are for VMs on shared CPUs, up to `shared_vcpus_per_cpu`
    of their vCPUs for each of the CPUs. Fewer of them while VMs run there leave those VMs where they are.
    """

    cores_per_cell: Annotated[int, between(0, 64)] = 0
    memory_per_cell_mib: Annotated[int, between(0, _LARGEST_MIB, "MiB")] = 512
    shared_cores_per_cell: Annotated[int, between(0, 1024)] = 0
    shared_vcpus_per_cpu: Annotated[int, between(1, 64)] = 4


class ExpectSettings(Model):
    """What this host must have: `ppec-agentd doctor` says so where it hasn't. The agent itself goes by what it finds.

    Huge pages are counted on each NUMA cell; `iommu` is for hosts whose devices are handed to guests.
    """

    bridges: tuple[BridgeName, ...] = ()
    huge_pages_2mib_per_cell: Annotated[int, between(0, _LARGEST_MIB)] = 0
    huge_pages_1gib_per_cell: Annotated[int, between(0, 2**20)] = 0
    iommu: bool = False


class LabSettings(Model):
    """A declared machine in place of the one found: for the fake hypervisor, and for labs whose hosts are small.

    `topology` is `topology.declare_topology`'s text, e.g. ``sockets=2,cores=4,threads=2,memory_mib=8192``; `bridges`
    are the bridges the fake hypervisor has, `delays_s` slows its methods by name (``start = 0.5``), `fail_every` has
    every so-manieth call of a method fail (``start = 20``), and with `deaf_guests` its guests ignore the power button.
    `nvme_drives` are the drives its machine has, each with its cell (``"0000:3b:00.0" = 1``). `health_every_s` is how
    often the host's health is looked at, which a test need not wait for.
    """

    topology: str | None = None
    bridges: tuple[BridgeName, ...] = ()
    delays_s: dict[str, Annotated[float, between(0, 600, "s")]] = Field(default_factory=dict)
    fail_every: dict[str, Annotated[int, between(2, 1_000_000)]] = Field(default_factory=dict)
    deaf_guests: bool = False
    nvme_drives: dict[PciAddress, Annotated[int, between(0, 1024)]] = Field(default_factory=dict)
    health_every_s: Annotated[float, between(0.1, 60, "s")] = 10.0

    @field_validator("topology")
    @classmethod
    def _declarable(cls, text: str | None) -> str | None:
        if text is not None:
            declare_topology(text)
        return text


class LimitSettings(Model):
    """`concurrent_starts`: domains started at once. More than two gains nothing: libvirt serialises most of a start.

    `image_timeout_s` bounds one fetch with all its tries. `image_away_s` is how long the fetch goes on trying after its
    source was first found away: longer than any restart of the orchestrator, and far below what the orchestrator gives
    a host for a run (600 s), so that a source this host can't reach is said in time for the VM to go elsewhere.
    """

    concurrent_starts: Annotated[int, between(1, 64)] = 2
    concurrent_preparations: Annotated[int, between(1, 64)] = 4
    hypervisor_timeout_s: Seconds = 120.0
    command_timeout_s: Seconds = 120.0
    image_timeout_s: Seconds = 1800.0
    image_away_s: Seconds = 120.0


class TlsSettings(Model):
    """The host's certificate, used towards the orchestrator (reports, images), whose identity is checked."""

    ca_path: Path = Path("/etc/ppec/pki/ca.pem")
    certificate_path: Path = Path("/etc/ppec/pki/host.pem")
    key_path: Path = Path("/etc/ppec/pki/host.key")
    server_identity: str = "ppec://orchestrator/main"


class ReportSettings(Model):
    """Without `orchestrator_url` nothing is reported. The orchestrator's answers may change the intervals."""

    orchestrator_url: Annotated[str, StringConstraints(pattern=r"^https://[A-Za-z0-9.\-:\[\]]+/?$")] | None = None
    heartbeat_interval_s: Annotated[float, between(0.5, 3600, "s")] = 10.0
    report_interval_s: Annotated[float, between(1, _DAY_S, "s")] = 60.0
    timeout_s: Seconds = 10.0
    longest_backoff_s: Seconds = 60.0


class LogSettings(Model):
    format: Literal["json", "console"] = "json"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Settings(Model):
    """The whole file."""

    host: HostName
    hypervisor: Literal["libvirt", "fake"] = "libvirt"
    socket: SocketSettings = SocketSettings()
    storage: StorageSettings = StorageSettings()
    nvme: NvmeSettings = NvmeSettings()
    libvirt: LibvirtSettings = LibvirtSettings()
    reserve: ReserveSettings = ReserveSettings()
    expect: ExpectSettings = ExpectSettings()
    lab: LabSettings = LabSettings()
    limits: LimitSettings = LimitSettings()
    tls: TlsSettings = TlsSettings()
    reports: ReportSettings = ReportSettings()
    log: LogSettings = LogSettings()

    @model_validator(mode="after")
    def _fake_is_declared(self) -> Settings:
        if self.hypervisor == "fake" and not self.lab.topology:
            raise ValueError("the fake hypervisor needs a declared machine: set topology in [lab]")
        return self


def load(path: Path = DEFAULT_PATH) -> Settings:
    """The file's settings. Raises PpecError `request.invalid` that names the file and each wrong field."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or "can't be read"
        raise PpecError("request.invalid", f"settings file {path}: {reason}", subject=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PpecError("request.invalid", f"settings file {path}: {error}", subject=str(path)) from error
    return parse(Settings, document, subject=f"settings file {path}")
