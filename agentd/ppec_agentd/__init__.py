# SPDX-License-Identifier: Apache-2.0
"""The host agent: what acts on one bare-metal host. README.md walks one request through it."""

from importlib.metadata import PackageNotFoundError, version

try:
    # A release's metadata carries its hash: 0.1.0+1a2b3c4d.
    AGENT_VERSION = version("ppec")
except PackageNotFoundError:  # a bare source tree
    AGENT_VERSION = "0.1.0"
