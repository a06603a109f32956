"""How large a call two forms of a plan are compared at: as large as fits, up to a batch as it is under load."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import structlog

from hueshift.engines.cuda_buffers import CallShape
from hueshift.engines.cuda_engine import CudaEngine
from hueshift.engines.device_errors import Fault, classify, release_memory

_FORM_ROWS = 8
_log = structlog.get_logger()
Found = TypeVar("Found")


def form_shapes(engine: CudaEngine) -> list[CallShape]:
    """The calls that two forms of a plan may be compared at, the largest first."""
    rows = sorted((bucket for bucket in engine.buckets if bucket <= _FORM_ROWS), reverse=True)
    return [CallShape(bucket, *engine.options.warm_sizes[0]) for bucket in rows]


def as_fits(engine: CudaEngine, roles: Sequence[str], trial: Callable[[CallShape], Found]) -> Found:
    """What `trial` finds at the largest call that it fits in memory with; `roles` are the networks that it calls.

    Raises what says so where even one row does not fit: then nothing could be served.
    """
    *larger, least = form_shapes(engine)
    for shape in larger:
        try:
            return trial(shape)
        except Exception as error:
            if classify(error) is not Fault.MEMORY:
                raise
        # Graphs of a call that did fit must not serve another form. And once the error is gone, what it holds is too.
        for role in roles:
            engine.graphs.forget(role)
        release_memory()
        _log.warning("form_without_memory", roles=list(roles), rows=shape.rows)
    return trial(least)
