# SPDX-License-Identifier: Apache-2.0
"""Address arithmetic: which addresses of a prefix may be given out, in which order. No I/O."""
