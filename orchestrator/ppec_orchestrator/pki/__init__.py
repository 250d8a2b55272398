# SPDX-License-Identifier: Apache-2.0
"""The fleet's own certificate authority."""
