# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fragments: what a VM is to be, as the options of a module or as those of each of its O(vms)."""

from __future__ import annotations

from textwrap import indent


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  vm_id:
    description: The VM's UUID.
    type: str
    required: true
  name:
    description: The VM's name, a DNS label. Needed for O(state=present).
    type: str
  vcpus:
    description: Number of vCPUs, an even one. Needed for O(state=present) and O(state=resized).
    type: int
  memory_mib:
    description: Memory in MiB. Needed for O(state=present) and O(state=resized).
    type: int
  max_vcpus:
    description: Up to how many vCPUs the VM can grow while it runs, an even number. Left out, no further.
    type: int
  max_memory_mib:
    description: Up to how much memory in MiB the VM can grow while it runs. Left out, no further.
    type: int
  numa:
    description: How the VM sits on the host's CPUs and memory.
    type: dict
    suboptions:
      cpus:
        description:
          - V(dedicated), which is the contract's default, gives the VM whole physical cores of its own.
          - V(shared) lets its vCPUs float over the CPUs that the host sets aside for sharing.
        type: str
        choices: [dedicated, shared]
      smt:
        description:
          - What a dedicated VM makes of SMT siblings, which are always its own.
          - V(prefer), the contract's default, puts a vCPU on every thread and takes cores without siblings as well.
          - V(isolate) puts one vCPU on a core and leaves its siblings idle.
          - V(require) is V(prefer) on cores that have siblings, and on no others.
        type: str
        choices: [prefer, isolate, require]
      multi_cell:
        description: Whether the VM may span sockets, and is shown NUMA cells that mirror the host's.
        type: bool
      huge_page_kib:
        description: Size in KiB of the pages behind the guest's memory, 0 for the ordinary ones.
        type: int
        choices: [0, 2048, 1048576]
  cells:
    description: NUMA cells of one socket that the VM's cores and memory are taken from. Needed for O(state=present).
    type: list
    elements: int
  root_disk:
    description: The disk the VM boots from. Needed for O(state=present).
    type: dict
    suboptions:
      size_mib:
        description: Virtual size in MiB.
        type: int
        required: true
      image:
        description: The image it is an overlay of.
        type: dict
        required: true
        suboptions:
          name:
            description: The image's name.
            type: str
            required: true
          sha256:
            description: Checksum of the image file (hex).
            type: str
            required: true
          size_bytes:
            description: Size of the image file.
            type: int
            required: true
          format:
            description: Format of the image file.
            type: str
            choices: [qcow2, raw]
            required: true
          url:
            description: Where the host fetches it once, C(https://) or C(file:///).
            type: str
            required: true
      pool:
        description: The host's storage pool that gets the disk; without one, where the host keeps VMs by itself.
        type: str
  nvme_drives:
    description:
      - How many NVMe drives of the host the VM gets whole, near its cells. The host chooses them.
    type: int
  nics:
    description: Network interfaces.
    type: list
    elements: dict
    suboptions:
      mac:
        description: MAC address.
        type: str
        required: true
      bridge:
        description: The host's bridge it is plugged into.
        type: str
        required: true
      addresses:
        description: Addresses with prefix length that the guest is told to use.
        type: list
        elements: str
      gateway4:
        description: IPv4 gateway.
        type: str
      gateway6:
        description: IPv6 gateway.
        type: str
      nameservers:
        description: Addresses of name servers.
        type: list
        elements: str
  user_data:
    description:
      - Cloud-init user data, handed to the guest byte for byte.
      - Kept out of results and logs. Mark text that holds C({{) or C({%) with C(!unsafe), or read it with a lookup.
    type: str
  tags:
    description: Words of yours for the VM, text to text.
    type: dict
"""

    # Made of the above. Annotated, because ansible-test's yamllint expects a literal of each plain assignment.
    LIST: str = """
options:
  vms:
    description: The VMs. For states other than V(present), O(vms[].vm_id) is enough.
    type: list
    elements: dict
    suboptions:
""" + indent(DOCUMENTATION.partition("options:\n")[2], "    ")
