"""Logging: JSON lines to standard error, with the request id and a hash of the tenant, and never a prompt.

Libraries that use the standard library's logging go through the same processors.
"""

import hashlib
import logging
import sys
from typing import TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from hueshift.server.rpc.call import CURRENT_CALL
from hueshift.server.settings import LogSettings

_LOGGER = "hueshift"
# What callers wrote or sent. Nothing logs these; the filter makes sure that nothing ever will.
_PRIVATE = frozenset(
    {"prompt", "negative_prompt", "caption", "captions", "secret", "authorization", "tenant", "pixels"}
)


def tenant_hash(tenant: str) -> str:
    """Return the first 12 hex digits of the tenant's SHA-256: enough to follow one tenant, not to name it."""
    return hashlib.sha256(tenant.encode()).hexdigest()[:12]


def configure_logs(settings: LogSettings, stream: TextIO | None = None) -> None:
    """Send structlog and the standard library's logging to `stream` (standard error). Called once, at start."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        add_call,
        drop_private,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    if settings.json_lines:
        # Without the local variables that structlog shows by default: prompts and pictures would be among them.
        tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        last: list[Processor] = [
            structlog.processors.ExceptionRenderer(tracebacks),
            structlog.processors.JSONRenderer(),
        ]
    else:
        last = [structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)]
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    # Libraries are chatty: the graph exporter alone tells of a thousand merged constants.
    root.setLevel(max(level, logging.WARNING))
    ours = logging.getLogger(_LOGGER)
    ours.setLevel(level)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        # One name: by module, what runs as __main__ would count as a library.
        logger_factory=lambda *_: ours,
        cache_logger_on_first_use=False,
    )


def add_call(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    """Add the request id and the tenant's hash of the call being answered, if any."""
    call = CURRENT_CALL.get(None)
    if call is not None:
        event.setdefault("request_id", call.request_id)
        if call.tenant:
            event.setdefault("tenant_hash", tenant_hash(call.tenant))
    return event


def drop_private(_logger: WrappedLogger, _name: str, event: EventDict) -> EventDict:
    """Replace what callers wrote; a tenant's name becomes its hash."""
    for key in _PRIVATE & event.keys():
        value = event.pop(key)
        if key == "tenant" and isinstance(value, str):
            event.setdefault("tenant_hash", tenant_hash(value))
        else:
            event[key] = "(left out)"
    return event
