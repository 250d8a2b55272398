# SPDX-License-Identifier: Apache-2.0
"""NVMe drives that are handed to VMs whole: which there are, whether they can be, and erasing them in between."""
