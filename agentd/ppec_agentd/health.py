# SPDX-License-Identifier: Apache-2.0
"""A host's health: what its figures mean, and when a change of them is worth telling. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from ppec_agentd.smart import SmartFigures
from ppec_contract.host import HealthFinding, HealthLevel
from ppec_contract.words import MAX_CHECKS, short, words

OK, NOTE, WARNING, ERROR = HealthLevel
_BADNESS = {OK: 0, NOTE: 1, WARNING: 2, ERROR: 3}
# Worse is said at once. Better has to last so many looks: a figure at a limit would else change its level all the time.
LOOKS_BEFORE_BETTER = 3

SLOW_LIBVIRT_S = 1.0
LARGEST_CLOCK_ERROR_S = 1.0
# Single corrected errors are ordinary; a module that is failing has thousands.
MANY_CORRECTED = 100


@dataclass(frozen=True, slots=True)
class FileSystemFigures:
    path: str
    size_mib: int
    free_mib: int


@dataclass(frozen=True, slots=True)
class MemoryFigures:
    """`stalled_percent` is the share of the last minute in which all work waited for memory (PSI); None unknown."""

    total_mib: int
    available_mib: int
    stalled_percent: float | None = None


@dataclass(frozen=True, slots=True)
class EccFigures:
    """Errors since boot, as the memory controllers count them."""

    corrected: int
    uncorrected: int


@dataclass(frozen=True, slots=True)
class DriveFigures:
    """`state` is the kernel's word. Temperatures are in degrees Celsius, None where the drive says none."""

    name: str
    state: str = ""
    temperature: float | None = None
    critical_temperature: float | None = None


@dataclass(frozen=True, slots=True)
class ClockFigures:
    """`problem` says why the kernel could not be asked."""

    synchronised: bool = False
    worst_error_s: float = 0.0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class LibvirtFigures:
    """How long a light call took, or why it failed."""

    latency_s: float = 0.0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class PoolFigures:
    """`problem` says why no disk can be made there now."""

    name: str
    problem: str = ""


@dataclass(frozen=True, slots=True)
class HealthFigures:
    """One look. `ecc` None: the machine doesn't count errors of its memory. `vm_drives` are those for VMs, by address,
    with why one can't be handed over."""

    file_systems: tuple[FileSystemFigures, ...]
    memory: MemoryFigures
    ecc: EccFigures | None
    drives: tuple[DriveFigures, ...]
    clock: ClockFigures
    libvirt: LibvirtFigures
    smart: SmartFigures = field(default_factory=SmartFigures)
    pools: tuple[PoolFigures, ...] = ()
    vm_drives: Mapping[str, str] = field(default_factory=dict)


def judge(figures: HealthFigures) -> tuple[HealthFinding, ...]:
    """A finding per check, ordered by name: every check says something, so that one which is well again says that."""
    found = [finding for check in CHECKS for finding in check(figures)]
    # More than can be told: the worst of them.
    told = sorted(found, key=lambda finding: -_BADNESS[finding.level])[:MAX_CHECKS]
    return tuple(sorted(told, key=lambda finding: finding.check))


def _said(check: str, level: HealthLevel, found: str) -> HealthFinding:
    """Paths, devices' names and libvirt's words are whatever they are: here they come within the contract's bounds."""
    return HealthFinding(check=short(check), level=level, found=words(found))


def _disks(figures: HealthFigures) -> Iterator[HealthFinding]:
    for fs in figures.file_systems:
        percent = 100 * fs.free_mib // max(1, fs.size_mib)
        level = ERROR if fs.free_mib < 256 or percent < 2 else WARNING if fs.free_mib < 2048 or percent < 10 else OK
        found = f"{fs.free_mib} of {fs.size_mib} MiB free ({percent} %)"
        yield _said(check=f"disk-space {fs.path}", level=level, found=found)


def _pools(figures: HealthFigures) -> Iterator[HealthFinding]:
    for pool in figures.pools:
        yield _said(f"storage-pool {pool.name}", ERROR if pool.problem else OK, pool.problem or "can be used")


def _memory(figures: HealthFigures) -> Iterator[HealthFinding]:
    memory = figures.memory
    percent = 100 * memory.available_mib // max(1, memory.total_mib)
    level = ERROR if percent < 2 else WARNING if percent < 5 else OK
    found = f"{memory.available_mib} of {memory.total_mib} MiB available ({percent} %)"
    yield _said(check="memory", level=level, found=found)
    stalled = memory.stalled_percent
    if stalled is None:
        yield _said(check="memory-pressure", level=NOTE, found="the kernel doesn't measure it")
    else:
        level = ERROR if stalled >= 40 else WARNING if stalled >= 10 else OK
        found = f"all work waited for memory during {stalled:g} % of a minute"
        yield _said(check="memory-pressure", level=level, found=found)


def _ecc(figures: HealthFigures) -> Iterator[HealthFinding]:
    ecc = figures.ecc
    if ecc is None:
        yield _said(check="ecc", level=NOTE, found="this machine doesn't count errors of its memory")
        return
    level = ERROR if ecc.uncorrected else WARNING if ecc.corrected >= MANY_CORRECTED else OK
    found = f"{ecc.corrected} corrected and {ecc.uncorrected} uncorrected errors since boot"
    yield _said(check="ecc", level=level, found=found)


def _drives(figures: HealthFigures) -> Iterator[HealthFinding]:
    """By the kernel's own word."""
    for drive in figures.drives:
        hot, limit = drive.temperature, drive.critical_temperature
        level, found = OK, drive.state or "there"
        if drive.state and drive.state not in ("live", "running"):
            level = ERROR
        elif hot is not None and limit is not None:
            level = WARNING if hot >= limit else OK
            found += f", {hot:g} °C of at most {limit:g} °C"
        yield _said(check=f"drive {drive.name}", level=level, found=found)


def _smart(figures: HealthFigures) -> Iterator[HealthFinding]:
    """By the drives' own words, as they were last asked for; a host on which they can't be says so once."""
    if figures.smart.problem:
        yield _said(check="smart", level=NOTE, found=figures.smart.problem)
    for drive in figures.smart.drives:
        level = ERROR if drive.failing else WARNING if drive.troubles else NOTE if drive.unknown else OK
        found = "; ".join((*drive.failing, *drive.troubles)) or drive.unknown or "says that it is well"
        yield _said(check=f"smart {drive.name}", level=level, found=found)


def _vm_drives(figures: HealthFigures) -> Iterator[HealthFinding]:
    for address, problem in figures.vm_drives.items():
        yield _said(check=f"vm-drive {address}", level=ERROR if problem else OK, found=problem or "for VMs")


def _clock(figures: HealthFigures) -> Iterator[HealthFinding]:
    clock = figures.clock
    if clock.problem:
        level, found = NOTE, f"can't be asked: {clock.problem}"
    elif not clock.synchronised:
        level, found = WARNING, "not synchronised"
    else:
        level = WARNING if clock.worst_error_s > LARGEST_CLOCK_ERROR_S else OK
        found = f"at most {clock.worst_error_s:.3f} s off"
    yield _said(check="clock", level=level, found=found)


def _libvirt(figures: HealthFigures) -> Iterator[HealthFinding]:
    libvirt = figures.libvirt
    slow = libvirt.latency_s > SLOW_LIBVIRT_S
    level = ERROR if libvirt.problem else WARNING if slow else OK
    found = libvirt.problem or f"answered in {libvirt.latency_s * 1000:.0f} ms"
    yield _said(check="libvirt", level=level, found=found)


CHECKS: tuple[Callable[[HealthFigures], Iterator[HealthFinding]], ...] = (
    _disks,
    _pools,
    _memory,
    _ecc,
    _drives,
    _smart,
    _vm_drives,
    _clock,
    _libvirt,
)


@dataclass(frozen=True, slots=True)
class Change:
    """A check that entered a level it was not in; `before` None: it is new."""

    finding: HealthFinding
    before: HealthLevel | None


@dataclass(frozen=True, slots=True)
class _Standing:
    finding: HealthFinding
    better_looks: int = 0


class HealthBook:
    """What is said of each check: the finding with which it entered its level."""

    def __init__(self) -> None:
        self._standing: dict[str, _Standing] = {}

    @property
    def findings(self) -> tuple[HealthFinding, ...]:
        return tuple(self._standing[check].finding for check in sorted(self._standing))

    def enter(self, look: tuple[HealthFinding, ...]) -> tuple[Change, ...]:
        """Takes one look in and returns what changed. Checks that the look doesn't have are forgotten."""
        changes, after = [], {}
        for finding in look:
            known = self._standing.get(finding.check)
            if known is None:
                changes.append(Change(finding, None))
                after[finding.check] = _Standing(finding)
                continue
            after[finding.check] = entered = _enter(known, finding)
            if entered.finding.level is not known.finding.level:
                changes.append(Change(finding, known.finding.level))
        self._standing = after
        return tuple(changes)


def _enter(known: _Standing, finding: HealthFinding) -> _Standing:
    difference = _BADNESS[finding.level] - _BADNESS[known.finding.level]
    if difference > 0 or (difference < 0 and known.better_looks + 1 >= LOOKS_BEFORE_BETTER):
        return _Standing(finding)
    return replace(known, better_looks=known.better_looks + 1 if difference < 0 else 0)
