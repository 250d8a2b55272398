# SPDX-License-Identifier: Apache-2.0
"""Topologies read from capabilities documents and from a lab's declaration."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppec_agentd.topology import (
    Core,
    HugePages,
    declare_topology,
    format_cpu_list,
    parse_capabilities,
    parse_cpu_list,
)

CAPABILITIES = Path(__file__).parent / "capabilities"


def read(name: str) -> str:
    return (CAPABILITIES / f"{name}.xml").read_text()


def test_two_sockets_with_smt() -> None:
    topology = parse_capabilities(read("x86_64-two-sockets-smt"))
    assert topology.sockets == (0, 1)
    assert not topology.declared
    first, second = topology.cells
    assert (first.cell, first.socket, first.memory_mib, first.threads_per_core) == (0, 0, 65536, 2)
    assert first.cores == tuple(Core((n, n + 8), 0) for n in range(4))
    assert second.cores == tuple(Core((n, n + 8), 1) for n in range(4, 8))
    assert second.distances == ((0, 21), (1, 10))
    assert first.huge_pages == (HugePages(2048, 1024), HugePages(1048576, 8))
    assert topology.cell_of_cpu[13] == 1
    assert topology.memory_mib == 2 * 65536


def test_offline_cpus_and_siblings_are_left_out() -> None:
    """CPU 2 is offline: its sibling CPU 6 is a core of one thread, and cell 1 has no CPU at all."""
    topology = parse_capabilities(read("x86_64-offline-and-memory-only"))
    busy, memory_only = topology.cells
    assert busy.cores == (Core((0, 4), 0), Core((1, 5), 0), Core((3, 7), 0), Core((6,), 0))
    assert memory_only.cores == ()
    assert memory_only.memory_mib == 16384
    assert memory_only.socket == 0
    assert memory_only.huge_pages == ()


def test_one_cell_over_two_sockets_keeps_each_cores_socket() -> None:
    topology = parse_capabilities(read("x86_64-one-cell-two-sockets"))
    assert len(topology.cells) == 1
    assert topology.sockets == (0, 1)
    assert [core.cpus for core in topology.cores_of_socket(1)] == [(2,), (3,)]


def test_sub_numa_clusters_share_a_socket() -> None:
    topology = parse_capabilities(read("aarch64-sub-numa"))
    assert [cell.socket for cell in topology.cells] == [36, 36]
    assert {core.die for core in topology.cores} == {0, 1}


@pytest.mark.parametrize("xml", ["<capabilities><host/></capabilities>", "<capabilities/>"])
def test_capabilities_without_a_cpu_are_refused(xml: str) -> None:
    with pytest.raises(ValueError, match="no online CPU"):
        parse_capabilities(xml)


def test_declared_topology_numbers_siblings_as_linux_does() -> None:
    topology = declare_topology("sockets=2,cores=4,threads=2,memory_mib=8192")
    assert topology.declared
    assert [cell.socket for cell in topology.cells] == [0, 1]
    assert topology.cells[1].cores == tuple(Core((n, n + 8), 1) for n in range(4, 8))
    assert topology.cells[1].distances == ((0, 20), (1, 10))
    assert topology.memory_mib == 16384


def test_declared_cells_per_socket() -> None:
    topology = declare_topology("sockets=2,cells=2,cores=2")
    assert [cell.socket for cell in topology.cells] == [0, 0, 1, 1]
    assert len(topology.cell_of_cpu) == 8


def test_declared_huge_pages_are_part_of_a_cells_memory() -> None:
    (cell,) = declare_topology("memory_mib=8192,huge_2m=512,huge_1g=2").cells
    assert cell.huge_pages == (HugePages(2048, 512), HugePages(1048576, 2))
    assert cell.huge_pages_mib == 1024 + 2048


@pytest.mark.parametrize(
    "declaration",
    [
        "memory_mib=1024,huge_1g=2",
        "",
        "sockets",
        "sockets=0",
        "sockets=-1",
        "cores=4;rm",
        "nodes=2",
        "cores=5000",
        "sockets=2,",
        "cores=٣",
    ],
)
def test_a_bad_declaration_is_refused(declaration: str) -> None:
    with pytest.raises(ValueError, match="topology"):
        declare_topology(declaration)


def test_cpu_lists_with_exclusions() -> None:
    assert parse_cpu_list("0-3,^2,8") == (0, 1, 3, 8)
    assert parse_cpu_list("") == ()
    assert format_cpu_list([5, 0, 1, 2]) == "0-2,5"


@given(st.sets(st.integers(0, 4095)))
def test_cpu_lists_survive_the_round_trip(numbers: set[int]) -> None:
    assert parse_cpu_list(format_cpu_list(numbers)) == tuple(sorted(numbers))
