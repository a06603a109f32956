"""Memory that others than the UNet take while it serves, kept free while the engine finds out what fits.

Captured calls hold their memory for good. Captured on an empty device, the largest that fits would leave no room for
decoding its own pictures, and a picture that cannot be decoded is lost when all its steps are done.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from math import isqrt

import structlog
import torch
from torch import nn

from hueshift.adapters.layout import BaseLayout
from hueshift.engines.added_embedding import added_width
from hueshift.engines.base_model import BaseModel
from hueshift.engines.cross_attention import CrossLayout
from hueshift.engines.cuda_lane import GraphLane
from hueshift.engines.cuda_options import CudaOptions
from hueshift.engines.device_errors import Fault, classify, release_memory
from hueshift.engines.encoder_layers import encoders_of
from hueshift.engines.encoder_weights import most_bytes
from hueshift.engines.text_side import is_text_side
from hueshift.engines.vae import VaeStage

# What server/decode_stage.py decodes in one call; a larger picture is a call of its own.
DECODED_PIXELS, DECODED_PICTURES = 1 << 20, 8
# Rows of prompts on the device, by the rows of a call: server/active_batch.py holds twice those, and others are being
# prepared.
_PROMPT_ROWS = 3
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Reserve:
    """Bytes for the text encoders' changed weights, for decoding and encoding of pictures, for prompts' keys and
    values, and for the singular vectors of the layers that make those.
    """

    encoders: int = 0
    pictures: int = 0
    prompts: int = 0
    vectors: int = 0

    @property
    def total(self) -> int:
        """Bytes of all."""
        return self.encoders + self.pictures + self.prompts + self.vectors


def measure_reserve(base: BaseModel, lane: GraphLane, options: CudaOptions, max_batch: int) -> Reserve:
    """Return what a server takes beside an engine of `max_batch` rows; nothing where the lane's memory is not known.

    Pictures are decoded and encoded here once, at the native size and at the largest, to see what that takes. A prompt
    with a word that changes with time takes more than is counted for it.
    """
    if lane.free_bytes() is None:
        return Reserve()
    dtype = options.dtype_on(lane.device)
    width = base.max_tokens * CrossLayout(base.layout).width + added_width(base.layout)
    reserve = Reserve(
        encoders=most_bytes(base) if all(_is_on(lane, encoder) for encoder in encoders_of(base)) else 0,
        pictures=_picture_bytes(base, lane, options) if _is_on(lane, base.vae) else 0,
        prompts=_PROMPT_ROWS * max_batch * width * dtype.itemsize,
        vectors=_vector_bytes(base.layout) if _is_on(lane, base.unet) else 0,
    )
    _log.info("engine_reserve", **asdict(reserve))
    return reserve


@contextmanager
def kept_free(lane: GraphLane, reserve: Reserve) -> Iterator[None]:
    """Let what runs inside find as much memory as it will have while all others work; all of it, with a word, where
    there is less than that.
    """
    with ExitStack() as stack:
        try:
            if reserve.total:
                stack.enter_context(lane.holding(reserve.total))
        except torch.cuda.OutOfMemoryError:
            _log.warning(
                "engine_reserve_without_memory",
                wanted=reserve.total,
                free=lane.free_bytes(),
                note="what the engine tells to fit may not fit while pictures are decoded",
            )
        yield


def _vector_bytes(layout: BaseLayout) -> int:
    """U and V^T, fp32, of every layer of the text side; see EditedLayers."""
    sides = [layer for layer in layout.matrices if is_text_side(layer.name)]
    return sum((layer.rows + layer.cols) * layer.rank * torch.float32.itemsize for layer in sides)


def _picture_bytes(base: BaseModel, lane: GraphLane, options: CudaOptions) -> int:
    """Most memory of decoding a batch, and beside it of encoding one picture that a request starts from."""
    stage, largest = VaeStage(base, tile_above=options.tile_above), isqrt(options.max_area)
    batch = min(DECODED_PICTURES, max(1, DECODED_PIXELS // base.pixels**2))
    shapes = ((batch, base.sample_size), (1, largest))
    latents = [torch.zeros(count, base.latent_channels, side, side) for count, side in shapes]
    pixels = torch.zeros(1, 3, largest * base.latent_factor, largest * base.latent_factor)
    decoded = max(_peak_bytes(lane, partial(stage.decode, part.to(lane.device))) for part in latents)
    return decoded + _peak_bytes(lane, partial(stage.moments, pixels))


def _peak_bytes(lane: GraphLane, make: Callable[[], object]) -> int:
    def work() -> None:
        make()

    try:
        return lane.peak_bytes(work)
    except RuntimeError as error:
        if classify(error) is not Fault.MEMORY:
            raise
    # Once the error and what its traceback holds are gone.
    release_memory()
    _log.warning("picture_without_memory", free=lane.free_bytes())
    return 0


def _is_on(lane: GraphLane, module: object) -> bool:
    parameter = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    return parameter is not None and parameter.device == lane.device
