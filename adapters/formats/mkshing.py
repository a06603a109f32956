"""SVDiff as svdiff-pytorch by mkshing (v0.2) writes it: `<layer>.delta`.

A convolution is the matrix c_out x rest, as here. A norm's weight w is taken as a matrix 1 x n, which has the single
singular value |w|: w' = w relu(|w| + delta) / |w|, so our full-length shift is w (relu(|w| + delta) / |w| - 1). Its
scale is chosen when it is used and multiplies delta; ours is 1.
"""

import torch
from torch import Tensor

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.formats.draft import TEXT_ENCODER, Draft, ImportBase
from hueshift.adapters.formats.exports import BASE_HASH_KEY, Leftovers
from hueshift.adapters.formats.source import ForeignFile
from hueshift.adapters.formats.spelling import Part, split_part
from hueshift.adapters.formats.words import take_words
from hueshift.adapters.tensors import pack

_ENDING = ".delta"
# A shift counts as a multiple of the weights, which is all this form can say, up to rounding of fp32.
_PARALLEL = 1e-5


def read(draft: Draft, source: ForeignFile) -> None:
    """Add the shifts of every layer to the draft."""
    for key in source.entries:
        if not key.endswith(_ENDING):
            continue
        layer = draft.locate(key.removesuffix(_ENDING))
        if layer is None and split_part(key)[0] is Part.TEXT:
            source.skip(key)
            draft.leave_out([key], TEXT_ENCODER)
        if layer is None:
            continue
        shift = source.read(key)
        expected = 1 if layer in draft.norm_sizes else draft.matrices[layer].rank
        if tuple(shift.shape) != (expected,):
            raise InvalidArgument(
                Reason.ADAPTER_SHAPE_MISMATCH,
                f"adapter file refused: tensor {key!r} has shape {list(shift.shape)}, but layer {layer!r} of the base "
                f"model needs [{expected}]; it was made for another base model or another SVDiff program",
            )
        if layer in draft.norm_sizes:
            draft.add_norm(layer, _full_length(draft.base.parameter(f"{layer}.weight"), float(shift)))
        else:
            draft.add_spectral(layer, shift)
    take_words(draft, source)


def write(adapter: Adapter, base: ImportBase, left: Leftovers) -> bytes:
    """Write spectral shifts, and shifts of norms that are multiples of the norm's weights."""
    left.refuse("low-rank parts", adapter.lowrank)
    left.refuse("learned words", adapter.tokens, "; the textual_inversion form holds them")
    tensors: dict[str, Tensor] = {f"{layer}{_ENDING}": shift for layer, shift in adapter.spectral.items()}
    # In the dtype of the other shifts, so that what was read from such a file is written as it was.
    dtypes = {shift.dtype for shift in adapter.spectral.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    unlike: list[str] = []
    for layer, shift in adapter.norm.items():
        delta = _single_value(base.parameter(f"{layer}.weight"), shift)
        if delta is None:
            unlike.append(layer)
        else:
            tensors[f"{layer}{_ENDING}"] = torch.tensor([delta], dtype=dtype)
    left.refuse("shifts of norms that are not one multiple of the weights", unlike)
    return pack(tensors, {BASE_HASH_KEY: adapter.base_hash})


def _full_length(weight: Tensor, delta: float) -> Tensor:
    weight = weight.double()
    sigma = torch.linalg.norm(weight)
    if float(sigma) == 0.0:
        return torch.zeros_like(weight).float()
    factor = max(float(sigma) + delta, 0.0) / float(sigma) - 1
    return (weight * factor).float()


def _single_value(weight: Tensor, shift: Tensor) -> float | None:
    """The delta whose full-length shift is `shift`; None if there is none."""
    weight, shift = weight.double(), shift.double()
    square = torch.dot(weight, weight)
    if float(square) == 0.0:
        return None if bool(shift.any()) else 0.0
    factor = torch.dot(shift, weight) / square
    if torch.linalg.norm(shift - factor * weight) > _PARALLEL * torch.linalg.norm(shift) or float(factor) < -1:
        return None
    return float(factor * square.sqrt())
