"""Whether cuDNN tries its algorithms for a convolution it has not seen, or takes the one its rules of thumb name.

What was found is kept by torch for the thread that asked and the convolution's shape, and so is what the rules named
(ATen/native/cudnn/Conv_v8.cpp). So a search has to be on from the first call of a shape, and the capture of a call that
ran before, in the same thread, holds what was found.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def convolution_search(on: bool) -> Iterator[None]:
    """Search in the block, or not, in all threads of the process: only while nobody else draws."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
