# SPDX-License-Identifier: Apache-2.0
"""The shape of a host: sockets, dies, NUMA cells, cores and their SMT siblings. Pure; see `parse_capabilities`.

A two-socket host with four cores of two threads each, as `Topology` shows it::

    Topology(cells=(Cell(cell=0, socket=0, memory_mib=8192, cores=(Core(cpus=(0, 1), socket=0, die=0), ...)),
                    Cell(cell=1, socket=1, memory_mib=8192, cores=(Core(cpus=(8, 9), socket=1, die=0), ...))))
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from xml.etree import ElementTree

LOCAL_DISTANCE = 10
REMOTE_DISTANCE = 20


@dataclass(frozen=True, slots=True)
class Core:
    """A physical core: its logical CPUs are SMT siblings of one another, ascending."""

    cpus: tuple[int, ...]
    socket: int
    die: int = 0


@dataclass(frozen=True, slots=True)
class HugePages:
    """The huge pages of one size that a cell holds, free or not."""

    size_kib: int
    count: int


@dataclass(frozen=True, slots=True)
class Cell:
    """A NUMA cell. `cores` ascend by their first CPU and exclude CPUs that are offline; a cell may have none.

    `socket` is where its first core sits (a firmware may spread one cell over all sockets: the cores know). For a cell
    of memory only it is the nearest cell's. `distances` are (cell, distance) pairs, 10 meaning local.
    """

    cell: int
    socket: int
    memory_mib: int
    cores: tuple[Core, ...]
    distances: tuple[tuple[int, int], ...] = ()
    huge_pages: tuple[HugePages, ...] = ()

    @property
    def threads_per_core(self) -> int:
        return max((len(core.cpus) for core in self.cores), default=1)

    @property
    def cpus(self) -> tuple[int, ...]:
        return tuple(sorted(cpu for core in self.cores for cpu in core.cpus))

    @property
    def huge_pages_mib(self) -> int:
        """The memory that is set aside as huge pages, in use or not: no ordinary allocation gets any of it."""
        return min(self.memory_mib, sum(pages.size_kib * pages.count // 1024 for pages in self.huge_pages))


@dataclass(frozen=True)
class Topology:
    """A host's cells, ascending by number.

    `declared` is true if this is not what the machine has but what a lab's setting says it should act as, so that a
    small machine can exercise placement, ledger and reports of a big host. Nothing is then pinned or bound for real
    (the CPUs don't exist): the ledger and the domains' metadata carry the pins, libvirt never hears of them, and no
    claim about performance may rest on such a host.
    """

    cells: tuple[Cell, ...]
    declared: bool = False

    @cached_property
    def by_cell(self) -> dict[int, Cell]:
        return {cell.cell: cell for cell in self.cells}

    @cached_property
    def cell_of_cpu(self) -> dict[int, int]:
        return {cpu: cell.cell for cell in self.cells for cpu in cell.cpus}

    @cached_property
    def core_of_cpu(self) -> dict[int, Core]:
        return {cpu: core for core in self.cores for cpu in core.cpus}

    @property
    def sockets(self) -> tuple[int, ...]:
        return tuple(sorted({core.socket for cell in self.cells for core in cell.cores}))

    @property
    def cores(self) -> tuple[Core, ...]:
        return tuple(core for cell in self.cells for core in cell.cores)

    @property
    def memory_mib(self) -> int:
        return sum(cell.memory_mib for cell in self.cells)

    def cores_of_socket(self, socket: int) -> tuple[Core, ...]:
        return tuple(core for core in self.cores if core.socket == socket)


def parse_capabilities(xml: str) -> Topology:
    """The topology in libvirt's capabilities document (`virsh capabilities`, ``<host><topology><cells>``).

    Raises ValueError if the document has no cells or no usable CPU.
    """
    cells = ElementTree.fromstring(xml).findall("./host/topology/cells/cell")  # noqa: S314 - libvirt's own document
    parsed = [_parse_cell(element) for element in cells]
    if not any(cell.cores for cell in parsed):
        raise ValueError(f"the capabilities name {len(parsed)} NUMA cells and no online CPU")
    by_number = {cell.cell: cell for cell in parsed}
    settled = (cell if cell.cores else _with_nearest_socket(cell, by_number) for cell in parsed)
    return Topology(cells=tuple(sorted(settled, key=lambda cell: cell.cell)))


def _parse_cell(element: ElementTree.Element) -> Cell:
    cores = _parse_cores(element.findall("./cpus/cpu"))
    memory = element.find("memory")
    return Cell(
        cell=int(element.get("id", "0")),
        socket=cores[0].socket if cores else 0,
        memory_mib=_kib(memory) // 1024 if memory is not None else 0,
        cores=cores,
        distances=tuple(
            (int(sibling.get("id", "0")), int(sibling.get("value", "0")))
            for sibling in element.findall("./distances/sibling")
        ),
        huge_pages=tuple(_parse_huge_pages(element.findall("pages"))),
    )


def _parse_cores(cpus: list[ElementTree.Element]) -> tuple[Core, ...]:
    """Group CPUs into cores by their `siblings`: core ids repeat between dies and sockets, sibling lists don't.

    An offline CPU carries an id and nothing else, and is left out; so is an offline sibling.
    """
    online = {int(cpu.get("id", "-1")) for cpu in cpus if cpu.get("siblings")}
    cores: dict[tuple[int, ...], Core] = {}
    for cpu in cpus:
        if not cpu.get("siblings"):
            continue
        siblings = tuple(number for number in parse_cpu_list(cpu.get("siblings", "")) if number in online)
        cores[siblings] = Core(siblings, int(cpu.get("socket_id", "0")), int(cpu.get("die_id", "0")))
    return tuple(sorted(cores.values(), key=lambda core: core.cpus))


def _parse_huge_pages(pages: Iterable[ElementTree.Element]) -> Iterable[HugePages]:
    """The smallest size a cell lists is the ordinary page; every larger one is huge."""
    by_size = sorted((int(page.get("size", "0")), int(page.text or "0")) for page in pages)
    return (HugePages(size_kib, count) for size_kib, count in by_size[1:])


def _kib(element: ElementTree.Element) -> int:
    if element.get("unit", "KiB") != "KiB":
        raise ValueError(f"cell memory in {element.get('unit')!r}; libvirt documents KiB")
    return int(element.text or "0")


def _with_nearest_socket(cell: Cell, by_number: dict[int, Cell]) -> Cell:
    near = sorted((distance, number) for number, distance in cell.distances if number in by_number)
    socket = next((by_number[number].socket for _, number in near if by_number[number].cores), 0)
    return Cell(cell.cell, socket, cell.memory_mib, cell.cores, cell.distances, cell.huge_pages)


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """The CPUs of a Linux/libvirt list, ascending: ``"0-2,5,^1"`` is (0, 2, 5). Raises ValueError."""
    wanted: set[int] = set()
    excluded: set[int] = set()
    for part in filter(None, (word.strip() for word in text.split(","))):
        first, _, last = part.removeprefix("^").partition("-")
        numbers = range(int(first), int(last or first) + 1)
        (excluded if part.startswith("^") else wanted).update(numbers)
    return tuple(sorted(wanted - excluded))


def format_cpu_list(numbers: Iterable[int]) -> str:
    """The shortest list of these numbers: (0, 1, 2, 5) is ``"0-2,5"``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(str(end) for end in run) for run in runs)


_DECLARATION = re.compile(r"^[a-z0-9_]+=[0-9]{1,9}(,[a-z0-9_]+=[0-9]{1,9})*$")
_DECLARED_DEFAULTS = {"sockets": 1, "cells": 1, "cores": 4, "threads": 1, "memory_mib": 8192}
_DECLARED_PAGES_KIB = {"huge_2m": 2048, "huge_1g": 1048576}


def declare_topology(declaration: str) -> Topology:
    """A lab's declared host, e.g. ``sockets=2,cores=4,threads=2,memory_mib=8192``.

    `cells` is per socket; `cores`, `memory_mib` and the numbers of huge pages `huge_2m` and `huge_1g` (default none; a
    part of the memory) are per cell. CPUs are numbered as Linux numbers SMT siblings on x86: all first threads, then
    all second ones. Raises ValueError on an unknown word, a zero, more than 4096 CPUs, or pages that the memory can't
    hold.
    """
    if not _DECLARATION.match(declaration):
        raise ValueError(f"topology {declaration!r} is not a list like sockets=2,cores=4,threads=2,memory_mib=8192")
    given = {key: int(value) for key, value in (part.split("=") for part in declaration.split(","))}
    words = _DECLARED_DEFAULTS.keys() | _DECLARED_PAGES_KIB.keys()
    unknown = sorted(given.keys() - words)
    if unknown:
        raise ValueError(f"topology {declaration!r} has unknown {unknown}; known are {sorted(words)}")
    shape = _DECLARED_DEFAULTS | given
    total = shape["sockets"] * shape["cells"] * shape["cores"]
    if min(shape.values()) == 0 or total * shape["threads"] > 4096:
        raise ValueError(f"topology {declaration!r} has a zero or more than 4096 CPUs")
    if _declared_pages_mib(shape) > shape["memory_mib"]:
        raise ValueError(f"topology {declaration!r} has more huge pages than memory")
    cells = tuple(_declared_cell(number, shape) for number in range(shape["sockets"] * shape["cells"]))
    return Topology(cells, declared=True)


def _declared_cell(number: int, shape: dict[str, int]) -> Cell:
    socket, cores, threads = number // shape["cells"], shape["cores"], shape["threads"]
    cell_count = shape["sockets"] * shape["cells"]
    total = cell_count * cores
    return Cell(
        cell=number,
        socket=socket,
        memory_mib=shape["memory_mib"],
        cores=tuple(
            Core(tuple(first + thread * total for thread in range(threads)), socket)
            for first in range(number * cores, (number + 1) * cores)
        ),
        distances=tuple((other, LOCAL_DISTANCE if other == number else REMOTE_DISTANCE) for other in range(cell_count)),
        huge_pages=tuple(
            HugePages(size_kib, shape[word]) for word, size_kib in _DECLARED_PAGES_KIB.items() if word in shape
        ),
    )


def _declared_pages_mib(shape: dict[str, int]) -> int:
    return sum(shape.get(word, 0) * size_kib // 1024 for word, size_kib in _DECLARED_PAGES_KIB.items())
