# SPDX-License-Identifier: Apache-2.0
"""What the tests of real runs share lies beside this file, in real_runs.py."""

from __future__ import annotations

from .real_runs import folder, open_dispatcher

# pytest finds the fixtures here.
__all__ = ["folder", "open_dispatcher"]
