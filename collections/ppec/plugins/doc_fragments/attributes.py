# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fragment: what every module of the collection supports."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options: {}
attributes:
  check_mode:
    description: Can run in C(check_mode) and return changed status prediction without modifying the target.
    support: full
  diff_mode:
    description: Returns details on what has changed (or possibly needs changing in C(check_mode)), when in diff mode.
    support: full
  action_group:
    description: Use C(group/ppec.cloud.ppec) in C(module_defaults) to set defaults for this module.
    support: full
    membership:
      - ppec.cloud.ppec
"""

    INFO = r"""
options: {}
attributes:
  check_mode:
    description: Can run in C(check_mode); it never modifies the target.
    support: full
  diff_mode:
    description: Nothing is changed, so there is never a difference to show.
    support: full
  action_group:
    description: Use C(group/ppec.cloud.ppec) in C(module_defaults) to set defaults for this module.
    support: full
    membership:
      - ppec.cloud.ppec
"""

    AGENT = r"""
options: {}
attributes:
  action:
    description: >-
      Has an action plugin: with a proxy's address, or on connection local, the work is done on the controller and no
      module is sent to the host.
    support: full
  async:
    description: Supports being used with the C(async) keyword.
    support: none
"""
