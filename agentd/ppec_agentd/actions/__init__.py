# SPDX-License-Identifier: Apache-2.0
"""What the agent does to VMs: one file per action, `batch` runs them, `context` is what they act on."""
