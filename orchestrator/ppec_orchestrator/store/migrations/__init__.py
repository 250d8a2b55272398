# SPDX-License-Identifier: Apache-2.0
"""The schema's history, as Alembic revisions."""
