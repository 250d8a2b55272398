# SPDX-License-Identifier: Apache-2.0
"""One module per kind of operation, with its step table. `operations/registry.py` names them all."""
