"""torch.compile for one network at one shape, for capture in a graph of ours.

Why not `mode="reduce-overhead"`, whose CUDA graphs torch manages: it records again without a word when an input's
address changes (128 times before it says so), its trees belong to the thread that warmed them while our steps run on
another, and its memory is its own. Plain compiled kernels in our graphs have none of that. Never with freezing: it
folds weights into constants, and merged weights would no longer be seen.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Entries that torch.compile may keep for one function; it counts all plans, buckets and sizes together, and runs
# eagerly without an error beyond it (torch's default is 8).
_MOST_SHAPES = 512

Compute = Callable[..., Tensor]


def compile_network(compute: Compute, *, autotune: bool) -> Compute:
    """Return `compute` compiled for the shapes of its first call, as one graph without Python in between."""
    options: dict[str, str | int | bool | Callable[..., Any]] = {
        "triton.cudagraphs": False,
        "freezing": False,
        "max_autotune": autotune,
        "coordinate_descent_tuning": autotune,
    }
    compiled: Compute = torch.compile(compute, fullgraph=True, dynamic=False, options=options)

    def call(*inputs: Tensor | None) -> Tensor:
        config: Any = torch._dynamo.config
        with config.patch(recompile_limit=_MOST_SHAPES, accumulated_recompile_limit=_MOST_SHAPES):
            return compiled(*inputs)

    return call
