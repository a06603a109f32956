"""LoRA (Hu et al. 2021) on linear and convolution layers, LoCon's three-part form, and DoRA's magnitudes on top."""

import torch
from torch import Tensor

from hueshift.adapters.formats.foreign_module import ForeignModule
from hueshift.adapters.layout import MatrixLayer


def factors(module: ForeignModule, layer: MatrixLayer) -> tuple[Tensor, Tensor]:
    """Return A [rank, cols] and B [rows, rank] in the file's own dtype, unless there is a middle part.

    A convolution's down is [rank, c_in, k, k] with an up of 1x1, so down flattened is A. With a middle part
    [rank, rank, k, k] (LyCORIS' Tucker form), down is [rank, c_in]: A = sum_j mid[i, j] down[j].
    """
    down, up = module.read("down"), module.read("up")
    if down.dim() < 2:
        raise module.wrong("down", down, f"[rank, {layer.cols}]")
    if "mid" in module.keys:
        a = _through_middle(module, layer, down)
    else:
        if tuple(down.shape[1:]) != layer.weight_shape[1:] and down.flatten(1).shape != (down.shape[0], layer.cols):
            raise module.wrong("down", down, f"[rank, {layer.cols}]")
        a = down.flatten(1)
    rank = module.check_rank("up", a.shape[0])
    if up.numel() != layer.rows * rank or up.shape[:2] != (layer.rows, rank):
        raise module.wrong("up", up, f"[{layer.rows}, {rank}]")
    return a.contiguous(), up.reshape(layer.rows, rank).contiguous()


def with_magnitude(module: ForeignModule, layer: MatrixLayer, weight: Tensor, delta: Tensor) -> Tensor:
    """Return the change that DoRA makes of `delta` (Liu et al. 2024): m (W + D) / |W + D| - W, all [rows, cols] fp64.

    The norm is taken of every output's row; LyCORIS also has the form over every input channel, told by the shape.
    """
    changed = weight + delta
    role = "magnitude" if "magnitude" in module.keys else "dora_scale"
    magnitude = module.read(role).double()
    inputs = layer.weight_shape[1]
    per_output = magnitude.numel() == layer.rows and (role == "magnitude" or magnitude.shape[0] == layer.rows)
    if per_output:
        norm = torch.linalg.norm(changed, dim=1)
        return changed * _ratio(magnitude.flatten(), norm)[:, None] - weight
    if magnitude.numel() != inputs or tuple(magnitude.shape[:2]) != (1, inputs):
        raise module.wrong(role, magnitude, f"one number for each of {layer.rows} outputs or {inputs} inputs")
    channels = changed.reshape(layer.rows, inputs, -1)
    ratio = _ratio(magnitude.flatten(), torch.linalg.norm(channels, dim=(0, 2)))
    return (channels * ratio[:, None]).reshape(layer.rows, layer.cols) - weight


def _ratio(magnitude: Tensor, norm: Tensor) -> Tensor:
    # A row of zeros has no direction and stays zero.
    return magnitude / norm.clamp(min=torch.finfo(torch.float32).tiny)


def _through_middle(module: ForeignModule, layer: MatrixLayer, down: Tensor) -> Tensor:
    mid = module.read("mid")
    rank = module.check_rank("mid", mid.shape[0] if mid.dim() else 1)
    if mid.dim() != 4 or mid.shape[2:] != layer.weight_shape[2:]:
        raise module.wrong("mid", mid, f"[rank, rank, {', '.join(map(str, layer.weight_shape[2:]))}]")
    inner = module.check_rank("mid", mid.shape[1])
    if down.numel() != inner * layer.weight_shape[1] or down.shape[0] != inner:
        raise module.wrong("down", down, f"[{inner}, {layer.weight_shape[1]}]")
    a = torch.einsum("ijkl,jc->ickl", mid.float(), down.reshape(inner, -1).float())
    return a.reshape(rank, layer.cols)
