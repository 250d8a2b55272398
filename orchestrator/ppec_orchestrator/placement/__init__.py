# SPDX-License-Identifier: Apache-2.0
"""Where VMs go. Pure: a fleet snapshot and a request in, a plan out; nothing here knows whether the fleet is real."""
