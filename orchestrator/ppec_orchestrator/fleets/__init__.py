# SPDX-License-Identifier: Apache-2.0
"""Fleets that are no live record: read from files of three formats, written as a snapshot, or generated.

All of them end as `FleetFile`: the planner's `Fleet`, and requests to try on it.
"""
