# SPDX-License-Identifier: Apache-2.0
"""One log line per event on standard error, as JSON for the journal or as text for people."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

from ppec_agentd.settings import LogSettings


def set_up_logs(settings: LogSettings) -> None:
    """Structlog's events and the standard library's records go the same way."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    as_json = settings.format == "json"
    # Plain tracebacks in JSON; no frames' variables ever: they may hold tenant data.
    tail: list[Any] = [structlog.processors.format_exc_info] if as_json else []
    console = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    tail.append(structlog.processors.JSONRenderer() if as_json else console)
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *tail]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.level.upper())
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
