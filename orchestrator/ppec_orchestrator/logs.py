# SPDX-License-Identifier: Apache-2.0
"""The log: one JSON object per line on standard error, our own events and the libraries' alike."""

from __future__ import annotations

import logging
import sys

import structlog


def configure_logs(level: str) -> None:
    number = logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(),
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=number, force=True)
    # What goes over a WebSocket is a tenant's console: its frames are no line of ours, at whatever level.
    logging.getLogger("uvicorn.error").setLevel(max(number, logging.INFO))
    # Alembic tells of every start that it has nothing to do.
    logging.getLogger("alembic").setLevel(logging.WARNING)
