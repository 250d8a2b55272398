# SPDX-License-Identifier: Apache-2.0
"""`ppec-agentd doctor`: whether a host can serve, and what to do where it can't.

`gather.py` reads the host into a `HostFactsSnapshot` (snapshot.py), the only step that touches anything; `CHECKS`
(checks.py) is a table of pure functions of it; `command.py` prints what they find.
"""
