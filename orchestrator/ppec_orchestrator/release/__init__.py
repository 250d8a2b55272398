# SPDX-License-Identifier: Apache-2.0
"""Releases: the plain relocatable tree that hosts run, built to the same bytes every time."""
