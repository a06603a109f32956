"""Whole UNet weights, as DreamBooth (Ruiz et al. 2023) leaves them; what was learned is their difference to the base.

A file may hold all weights or some, named as diffusers or the first Stable Diffusion code names them. A weight that
equals the base's, rounded to the file's dtype, is unchanged: rounding is not learning.
"""

from torch import Tensor

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.formats.draft import BIAS, TEXT_ENCODER, Draft
from hueshift.adapters.formats.source import ForeignFile
from hueshift.adapters.formats.spelling import Part, split_part

OTHER = "it belongs to neither the UNet nor its words"


def read(draft: Draft, source: ForeignFile) -> None:
    """Add the difference of every weight."""
    for key in source.entries:
        part, _ = split_part(key)
        if part is not Part.UNET:
            source.skip(key)
            draft.leave_out([key], TEXT_ENCODER if part is Part.TEXT else OTHER)
            continue
        module, _, ending = key.rpartition(".")
        layer = draft.locate(module)
        if layer is None or ending not in ("weight", "bias"):
            continue
        base = draft.base.parameter(f"{layer}.{ending}")
        difference = _difference(key, source.read(key), base)
        if ending == "bias":
            if difference is not None:
                draft.leave_out([key], BIAS)
        elif difference is not None and layer in draft.norm_sizes:
            draft.add_norm(layer, difference.float())
        elif difference is not None:
            matrix = draft.matrices[layer]
            draft.add_delta(matrix, difference.reshape(matrix.rows, matrix.cols), "dense")


def _difference(key: str, tensor: Tensor, base: Tensor) -> Tensor | None:
    """tensor - base in fp64; None if they are the same. A linear layer may be stored as a 1x1 convolution."""
    if tensor.numel() != base.numel() or tensor.shape[:2] != base.shape[:2]:
        raise InvalidArgument(
            Reason.ADAPTER_SHAPE_MISMATCH,
            f"adapter file refused: tensor {key!r} has shape {list(tensor.shape)}, but the base model's has "
            f"{list(base.shape)}; it was made from another base model",
        )
    base = base.reshape(tensor.shape)
    if bool((base.to(tensor.dtype) == tensor).all()):
        return None
    return tensor.double() - base.double()
