# SPDX-License-Identifier: Apache-2.0
"""Log lines as JSON on stderr, ours and the libraries' alike; the journal keeps them."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable

import structlog


def configure(level: str = "info") -> None:
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # uvicorn's own access lines know no identity, and its start-up chatter says nothing ours doesn't.
    logging.getLogger("uvicorn.access").propagate = False
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


class OncePerSecond:
    """Passes one event a second on and counts the others, so that a flood can't fill the disk with log lines."""

    def __init__(self, emit: Callable[[str, int], None]) -> None:
        self._emit = emit
        self._last = float("-inf")
        self._suppressed = 0

    def __call__(self, subject: str) -> None:
        now = time.monotonic()
        if now - self._last < 1.0:
            self._suppressed += 1
            return
        self._emit(subject, self._suppressed)
        self._last, self._suppressed = now, 0
