"""structlog set-up: one JSON line an event on stderr, with the service's name in each.

A module that logs has a logger of its own: `log = structlog.get_logger(__name__)`.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO

import structlog

from common.log_stream import LogStream


def configure_log(service: str, level: str, stream: TextIO | LogStream | None = None) -> structlog.stdlib.BoundLogger:
    """Set up logging of this process; returns a logger of its own. A level that does not exist is taken for `info`: the
    settings that are read next name it. `stream`: instead of stderr."""
    threshold = logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
    file: Any = sys.stderr if stream is None else stream
    logging.basicConfig(stream=file, level=logging.WARNING, format="%(message)s")

    def name_service(logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {"service": service, **event}

    structlog.configure(
        processors=[
            name_service,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.PrintLoggerFactory(file=file),
        cache_logger_on_first_use=True,
    )
    logger: structlog.stdlib.BoundLogger = structlog.get_logger()
    return logger
