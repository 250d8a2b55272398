# SPDX-License-Identifier: Apache-2.0
"""The figures of PPEC, taken beside their peers in one run: `make bench`, or `make bench BENCH=creating`."""
