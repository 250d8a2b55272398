# Copyright (c) 2026, PPEC contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fragment: how to reach the orchestrator."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  api_url:
    description:
      - Where the orchestrator's API is, without C(/v1).
      - Taken from the environment variable E(PPEC_SERVER) when not given.
      - Unencrypted C(http) is accepted for a loopback address only, because the token travels along.
    type: str
    required: true
  token:
    description:
      - Bearer token of the API.
      - Taken from the environment variable E(PPEC_TOKEN) when not given.
    type: str
    required: true
  ca_path:
    description:
      - File with the CA certificate (PEM) that issued the orchestrator's certificate. The system's CAs when not given.
      - A server that shows a PPEC identity must be an orchestrator; any other must match the host name of O(api_url).
      - Taken from the environment variable E(PPEC_CA) when not given.
    type: path
  request_timeout_s:
    description:
      - Seconds one request may wait for its answer.
    type: float
    default: 30.0
"""
