# SPDX-License-Identifier: Apache-2.0
"""Where VMs go. Pure: a fleet snapshot and a request in, a plan out; nothing here knows whether the fleet is real.

README.md beside this file says which module calls which, and what the algorithms are called elsewhere."""
