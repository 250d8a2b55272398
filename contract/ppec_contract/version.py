# SPDX-License-Identifier: Apache-2.0
"""The contract's version and what an agent can say it is able to do."""

from __future__ import annotations

from enum import StrEnum

# Bumped when a peer of the previous version could misunderstand; additions are announced as capabilities.
API_VERSION = 1


class Capability(StrEnum):
    """A feature an agent announces in its report; a caller asks for nothing that isn't announced."""

    VM_LIFECYCLE = "vm-lifecycle"
    VM_POWER = "vm-power"
    VM_CONSOLE = "vm-console"
    GUEST_AGENT = "guest-agent"
    PROGRESS_STREAM = "progress-stream"
    FENCING = "fencing"
    NUMA_PINNING = "numa-pinning"
    # Takes a VM's `numa`, `max_vcpus` and `max_memory_mib`.
    VM_POLICIES = "vm-policies"
    IMAGE_CACHE = "image-cache"
    # Carries out several retunes of one operation, each plan once. Older ones repeat the first's result.
    SEVERAL_RETUNES = "several-retunes"
    # Takes `root_disk.pool`, and `nvme_drives`, of a VM.
    STORAGE_POOLS = "storage-pools"
    NVME_DRIVES = "nvme-drives"
