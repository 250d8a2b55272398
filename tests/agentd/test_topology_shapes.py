# SPDX-License-Identifier: Apache-2.0
"""What is true of every machine's topology, on documents of many shapes (fixtures/capabilities/build.py)."""

from __future__ import annotations

import runpy
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from ppec_agentd.topology import Core, Topology, parse_capabilities

FOLDER = Path(__file__).parent / "fixtures" / "capabilities"
DOCUMENTS = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.xml"))}

# Sockets, cells, cores, and the numbers of threads that cores have.
SHAPES: dict[str, tuple[int, int, int, set[int]]] = {
    "aarch64-160-cores": (2, 8, 160, {1}),
    "ppc64le-offline-siblings": (2, 2, 7, {1, 4}),
    "ppc64le-smt8": (2, 2, 12, {8}),
    "x86_64-1-socket-smt": (1, 1, 16, {2}),
    "x86_64-2-sockets-interleaved": (2, 2, 24, {2}),
    "x86_64-2-sockets-nosmt-kernel": (2, 2, 16, {1}),
    "x86_64-2-sockets-nps4": (2, 8, 64, {2}),
    "x86_64-2-sockets-snc4": (2, 8, 112, {2}),
    "x86_64-4-sockets-ring": (4, 4, 32, {2}),
    "x86_64-8-sockets-no-smt": (8, 8, 48, {1}),
    "x86_64-asymmetric": (2, 2, 16, {2}),
    "x86_64-cxl": (2, 3, 16, {2}),
    "x86_64-hbm": (2, 4, 24, {2}),
    "x86_64-module-pairs": (2, 4, 16, {2}),
    "x86_64-one-cell-over-sockets": (2, 1, 16, {2}),
}

every_shape = pytest.mark.parametrize("name", DOCUMENTS)


def shape(name: str) -> Topology:
    return parse_capabilities(DOCUMENTS[name])


def test_the_documents_are_what_the_script_builds() -> None:
    script = runpy.run_path(str(FOLDER / "build.py"))
    built = {name: script["document"](make()) for name, make in script["MACHINES"].items()}
    assert built == DOCUMENTS


@every_shape
def test_each_shape_is_understood(name: str) -> None:
    found = shape(name)
    sizes = (len(found.sockets), len(found.cells), len(found.cores), {len(core.cpus) for core in found.cores})
    assert sizes == SHAPES[name]


@every_shape
def test_every_online_cpu_is_in_one_core_of_one_cell(name: str) -> None:
    found = shape(name)
    online = {int(cpu.attrib["id"]) for cpu in ET.fromstring(DOCUMENTS[name]).iter("cpu") if cpu.get("siblings")}
    seen = Counter(cpu for core in found.cores for cpu in core.cpus)
    assert set(seen) == online
    assert set(seen.values()) == {1}
    assert found.core_of_cpu == {c: k for k in found.cores for c in k.cpus}
    assert all(cpu in found.by_cell[cell].cpus for cpu, cell in found.cell_of_cpu.items())


@every_shape
def test_cells_and_cores_ascend_and_sockets_add_up(name: str) -> None:
    found = shape(name)
    assert [cell.cell for cell in found.cells] == sorted(found.by_cell)
    for cell in found.cells:
        assert list(cell.cores) == sorted(cell.cores, key=lambda core: core.cpus)
        assert cell.socket in found.sockets
    assert sum(len(found.cores_of_socket(socket)) for socket in found.sockets) == len(found.cores)


@every_shape
def test_distances_are_to_every_cell_and_nearest_to_itself(name: str) -> None:
    found = shape(name)
    for cell in found.cells:
        distances = dict(cell.distances)
        assert distances.keys() == found.by_cell.keys()
        assert distances.pop(cell.cell) == 10
        assert all(distance > 10 for distance in distances.values())


@every_shape
def test_huge_pages_are_a_part_of_the_memory_and_ordinary_ones_are_not_counted(name: str) -> None:
    found = shape(name)
    for element, cell in zip(ET.fromstring(DOCUMENTS[name]).iter("cell"), found.cells, strict=True):
        sizes = sorted(int(pages.attrib["size"]) for pages in element.iter("pages"))
        assert [pages.size_kib for pages in cell.huge_pages] == sizes[1:]
        assert 0 <= cell.huge_pages_mib <= cell.memory_mib


def test_interleaved_cpu_numbers_stay_with_their_sockets() -> None:
    first, second = shape("x86_64-2-sockets-interleaved").cells
    assert first.cores[:2] == (Core((0, 24), 0), Core((2, 26), 0))
    assert second.cores[:2] == (Core((1, 25), 1), Core((3, 27), 1))


def test_memory_only_cells_belong_to_the_nearest_socket() -> None:
    assert [cell.socket for cell in shape("x86_64-cxl").cells] == [0, 1, 1]
    assert [cell.socket for cell in shape("x86_64-hbm").cells] == [0, 1, 0, 1]


def test_what_is_left_of_a_core_is_a_narrower_core() -> None:
    first, second = shape("ppc64le-offline-siblings").cells
    assert [core.cpus for core in first.cores] == [(0, 1, 2, 3), (8, 9, 10, 11), (16,), (24, 25, 26, 27)]
    assert [core.cpus[0] for core in second.cores] == [32, 48, 56]
    assert (second.cell, second.socket) == (8, 8)
