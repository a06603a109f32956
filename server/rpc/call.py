"""The call being answered: who asks, under which request id, until when. Set by the interceptors, read by services."""

from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CallInfo:
    """One call. `deadline` is in the server clock's monotonic seconds; None on streams that may stay open.

    `credential` is the value of the `authorization` metadata key, which a front end passes on; never logged.
    """

    method: str
    request_id: str
    tenant: str
    deadline: float | None
    credential: str = field(default="", repr=False)


CURRENT_CALL: ContextVar[CallInfo] = ContextVar("hueshift_call")


def current_call() -> CallInfo:
    """Return the call this task answers. Raises LookupError outside of a call."""
    return CURRENT_CALL.get()
