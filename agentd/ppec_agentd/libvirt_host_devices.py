# SPDX-License-Identifier: Apache-2.0
"""The hypervisor port's host devices, on libvirt."""

from __future__ import annotations

from typing import Any

import libvirt

from ppec_agentd.libvirt_connection import LibvirtConnection
from ppec_contract.errors import PpecError


class LibvirtHostDevices:
    """The part of `LibvirtHypervisor` that gives devices back to the host."""

    _connection: LibvirtConnection

    async def reattach(self, address: str) -> bool:
        def work(connection: Any) -> bool:
            try:
                connection.nodeDeviceLookupByName(_node_device(address)).reAttach()
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_NO_NODE_DEVICE:
                    return False
                if error.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID:
                    raise PpecError(
                        "vm.wrong_state",
                        f"can't take device {address} back: a domain that runs has it",
                        subject=f"device {address}",
                    ) from error
                raise
            return True

        return await self._connection.call(f"take back device {address} from", None, work)


def _node_device(address: str) -> str:
    """libvirt's name of the device at an address like 0000:3b:00.0."""
    return "pci_" + address.translate(str.maketrans(":.", "__"))
