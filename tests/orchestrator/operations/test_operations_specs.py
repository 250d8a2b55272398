# SPDX-License-Identifier: Apache-2.0
"""What a host is told of a VM: MAC addresses above all."""

from __future__ import annotations

import uuid

from ppec_orchestrator.operations.specs import mac_address

VM = uuid.UUID("6f1f8e0a-8f7c-4b8e-9a51-0d7f6f3b2c11")


def test_mac_addresses_are_local_unicast_and_none_that_libvirt_refuses() -> None:
    firsts = {int(mac_address(uuid.UUID(int=number), 0)[:2], 16) for number in range(2000)}
    assert all(first & 0x83 == 0x02 for first in firsts)
    assert len(firsts) == 32


def test_mac_address_is_of_the_vm_and_its_nic() -> None:
    assert mac_address(VM, 0) == "12:e7:37:66:58:6a", "a VM keeps it for life, so no release may change it"
    assert len({mac_address(VM, number) for number in range(8)}) == 8


def test_mac_addresses_of_a_large_fleet_differ() -> None:
    assert len({mac_address(uuid.UUID(int=number), 0) for number in range(100_000)}) == 100_000
