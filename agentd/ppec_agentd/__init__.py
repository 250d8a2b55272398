# SPDX-License-Identifier: Apache-2.0
"""The host agent: what acts on one bare-metal host. README.md walks one request through it."""

AGENT_VERSION = "0.1.0"
