# SPDX-License-Identifier: Apache-2.0
"""Retune: move running VMs between the NUMA cells of their host, so that a large one fits. Pure but for its action."""
