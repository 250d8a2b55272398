# SPDX-License-Identifier: Apache-2.0
"""What is asked of a host directly, at its proxy: views and consoles. What changes a host goes through runs alone."""
