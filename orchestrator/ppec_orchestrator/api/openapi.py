# SPDX-License-Identifier: Apache-2.0
"""The OpenAPI document: `python -m ppec_orchestrator.api.openapi FILE` writes it, a test compares it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from ppec_orchestrator.api.app import add_routes


def openapi_document() -> dict[str, Any]:
    """Of the API alone: it needs no services."""
    app: FastAPI = add_routes()
    return app.openapi()


def rendered() -> str:
    return json.dumps(openapi_document(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(rendered(), encoding="utf-8")
